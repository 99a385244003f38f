//! [`Checkpointing`] on processes of our own VMM: a mirror of one cut, whose standby is a file.
//!
//! What the process does it does for any mirror; the stream stays in this agent, which keeps its first whole cut
//! ([`supercloud_blanket::vmm::travel::image`]) and ends it then. So a checkpoint goes with its agent.

use std::{
    fs::File,
    io,
    net::Shutdown,
    os::unix::{fs::OpenOptionsExt as _, net::UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use supercloud_blanket::{
    BackendError, BackendResult, MachineSpec,
    checkpoint::{CheckpointProgress, CheckpointRun, Checkpointed, Checkpointing},
    vmm::{
        MachineConfig,
        travel::{
            TravelError,
            image::{self, Written},
        },
    },
};
use supercloud_ids::GuestId;
use tokio::{
    sync::{OwnedMutexGuard, watch},
    task::JoinHandle,
};

use crate::{
    BACK_END, KvmBackend,
    backend::{failed, words},
    control::{MirrorProgress, Request, State},
    keeper::{Keeper, Seen, run_state},
    migration::verb,
};

/// The format of its files.
pub(crate) const FORMAT: &str = "supercloud-kvm-image/1";
/// A cut that a disk does not take is tried again so soon. After one that is whole there is none: it is not acknowledged.
const INTERVAL_MS: u64 = 100;
/// How long the process may take to say what came of it.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Held while the way by which a guest leaves is given to somebody.
pub(crate) type Turn = OwnedMutexGuard<()>;

/// The way by which a guest leaves its process: for a move, a freeze, a mirror, or a checkpoint, which is in nobody's way.
#[derive(Debug, Default)]
pub(crate) struct Way {
    turn: Arc<tokio::sync::Mutex<()>>,
    checkpoint: Mutex<Option<Arc<Stream>>>,
}

/// The stream of a checkpoint.
#[derive(Debug)]
struct Stream {
    socket: UnixStream,
    is_given_up: AtomicBool,
}

impl Stream {
    /// Both ends hear of it.
    fn give_up(&self) {
        self.is_given_up.store(true, Ordering::Release);
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl Way {
    fn checkpoint(&self) -> std::sync::MutexGuard<'_, Option<Arc<Stream>>> {
        self.checkpoint.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Keeper {
    /// Ends a checkpoint, for something that it must not be in the way of. Nobody else takes the way while the turn is held.
    pub(crate) async fn make_way(&self) -> BackendResult<Turn> {
        let turn = Arc::clone(&self.way.turn).lock_owned().await;
        let there = self.way.checkpoint().clone();
        if let Some(stream) = there {
            stream.give_up();
            self.clear(&stream).await?;
        }
        Ok(turn)
    }

    /// Ends a checkpoint's mirror; the turn is held. The way is free only when the process has heard of it.
    async fn clear(&self, stream: &Arc<Stream>) -> BackendResult<()> {
        self.ask("end a checkpoint", verb("end_mirror"), None).await?;
        self.way.checkpoint().take_if(|there| Arc::ptr_eq(there, stream));
        Ok(())
    }
}

/// A checkpoint that is dropped half way is given up. That it was is known until somebody needs the way.
struct GiveUp(Arc<Stream>);

impl Drop for GiveUp {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

struct Begun {
    stream: Arc<Stream>,
    writing: JoinHandle<Result<Written, TravelError>>,
    /// As it was before.
    mirrors_over: u32,
    mirror: MirrorProgress,
}

/// What machine it is.
pub(crate) fn config_of(spec: &MachineSpec) -> MachineConfig {
    MachineConfig { vcpus: u8::try_from(spec.vcpus).unwrap_or(u8::MAX), memory_bytes: spec.memory_bytes }
}

const WHAT: &str = "take a checkpoint of a guest";

async fn begin(keeper: &Keeper, path: &Path) -> BackendResult<Begun> {
    let guest = keeper.guest();
    let busy = |is: &str| BackendError::WrongState { guest, wants: WHAT, is: is.to_owned() };
    let config = config_of(&keeper.record().launch.spec);
    // Before the file: others' are left alone.
    let Ok(_turn) = Arc::clone(&keeper.way.turn).try_lock_owned() else {
        return Err(busy("about to leave its process"));
    };
    let there = keeper.way.checkpoint().clone();
    match there {
        Some(there) if !there.is_given_up.load(Ordering::Acquire) => return Err(busy("being checkpointed")),
        // One that was dropped half way, and that nobody was in need of ending.
        Some(there) => keeper.clear(&there).await?,
        None => {}
    }
    let status = keeper.ask(WHAT, verb("status"), None).await?;
    match (status.state, status.is_mirrored) {
        (Some(State::Running), Some(false)) => {}
        (Some(State::Running), Some(true)) => return Err(busy("mirrored")),
        (Some(State::Running), None) => {
            let option = "checkpoints of a guest whose process is older than mirrors".to_owned();
            return Err(BackendError::Unsupported { back_end: BACK_END, option });
        }
        (Some(State::Sending), _) => return Err(busy("on its way")),
        (Some(state), _) => return Err(busy(&words(run_state(state, &keeper.record().role)))),
        (None, _) => return Err(busy("not known")),
    }
    keeper.seen().must_be_whole(guest, WHAT)?;
    let file = create(path).await?;
    let (ours, theirs) = UnixStream::pair().map_err(failed(WHAT))?;
    let from = ours.try_clone().map_err(failed(WHAT))?;
    let stream = Arc::new(Stream { socket: ours, is_given_up: AtomicBool::new(false) });
    let Seen { mirrors_over, mirror, .. } = keeper.seen();
    keeper.ask(WHAT, verb("stream"), Some(theirs.into())).await?;
    let request = Request { interval_ms: Some(INTERVAL_MS), ..verb("mirror") };
    keeper.ask(WHAT, request, None).await?;
    *keeper.way.checkpoint() = Some(Arc::clone(&stream));
    let writing = tokio::task::spawn_blocking(move || image::write(&from, config, &file));
    Ok(Begun { stream, writing, mirrors_over, mirror })
}

async fn create(path: &Path) -> BackendResult<File> {
    let to = path.to_owned();
    let create = move || {
        // What a guest has in its memory is nobody else's.
        File::options().read(true).write(true).create_new(true).mode(0o600).open(to)
    };
    let created = tokio::task::spawn_blocking(create).await.map_err(io::Error::other).and_then(|created| created);
    created.map_err(|source| BackendError::File { what: WHAT, path: path.to_owned(), source })
}

async fn take(keeper: &Keeper, path: &Path, shown: &watch::Sender<CheckpointProgress>) -> BackendResult<Checkpointed> {
    let Begun { stream, mut writing, mirrors_over, mirror } = begin(keeper, path).await?;
    let _give_up = GiveUp(Arc::clone(&stream));
    let memory_total_bytes = keeper.record().launch.spec.memory_bytes;
    let mut last = mirror;
    let written = loop {
        let news = |seen: &Seen| seen.mirror != last || seen.gone.is_some();
        tokio::select! {
            written = &mut writing => break written,
            seen = keeper.until(WHAT, Duration::MAX, news), if !writing.is_finished() => match seen {
                Ok(seen) if seen.gone.is_none() => {
                    last = seen.mirror;
                    let memory_remaining_bytes = if last.cut == 0 { last.left_bytes } else { 0 };
                    shown.send_replace(CheckpointProgress { memory_total_bytes, memory_remaining_bytes });
                }
                // With the process, its end of the stream went.
                _ => break (&mut writing).await,
            },
        }
    };
    let written = written.map_err(io::Error::other).map_err(failed(WHAT))?;
    let stood_still = match &written {
        Ok(written) => stood_still(keeper, written.cut, mirror).await,
        Err(_) => Duration::ZERO,
    };
    if stream.is_given_up.load(Ordering::Acquire) {
        return Err(BackendError::Cancelled { what: WHAT });
    }
    let written = match written {
        Ok(written) => written,
        Err(error) => return Err(why(keeper, &stream, mirrors_over, path, error).await),
    };
    end(keeper, &stream).await?;
    Ok(Checkpointed { format: FORMAT.to_owned(), bytes: written.bytes, cut: written.cut, stood_still })
}

/// Ends the mirror, unless who needed the way has done that.
async fn end(keeper: &Keeper, stream: &Arc<Stream>) -> BackendResult<()> {
    let _turn = Arc::clone(&keeper.way.turn).lock_owned().await;
    let is_there = keeper.way.checkpoint().as_ref().is_some_and(|there| Arc::ptr_eq(there, stream));
    if is_there { keeper.clear(stream).await } else { Ok(()) }
}

/// As the process tells of the cut; zero when it does not within a moment.
async fn stood_still(keeper: &Keeper, cut: u64, before: MirrorProgress) -> Duration {
    let is_told = |seen: &Seen| (seen.mirror != before && seen.mirror.cut >= cut) || seen.gone.is_some();
    match keeper.until(WHAT, LAST_WORDS, is_told).await {
        Ok(seen) => Duration::from_micros(seen.mirror.pause_us),
        Err(_) => Duration::ZERO,
    }
}

/// Why there is none: the file, or what the process says.
async fn why(keeper: &Keeper, stream: &Arc<Stream>, over: u32, path: &Path, error: TravelError) -> BackendError {
    // The process's end is let go in any case.
    let _ = stream.socket.shutdown(Shutdown::Both);
    let ended = end(keeper, stream).await;
    if let TravelError::File(source) = error {
        return BackendError::File { what: WHAT, path: path.to_owned(), source };
    }
    let seen = keeper.until(WHAT, LAST_WORDS, |seen| seen.gone.is_some() || seen.mirrors_over > over).await;
    match (seen, ended) {
        (Ok(seen), _) if seen.gone.is_some() => BackendError::NoSuchGuest { guest: keeper.guest() },
        (Ok(Seen { mirror_error: Some(detail), .. }), _) => BackendError::Failed { what: WHAT, detail },
        _ => {
            let detail = format!("{}: {}", path.display(), chain(&error));
            BackendError::Failed { what: WHAT, detail }
        }
    }
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

impl Checkpointing for KvmBackend {
    fn checkpoint(&self, guest: GuestId, file: PathBuf) -> BackendResult<CheckpointRun> {
        let keeper = self.keeper(guest)?.ok_or(BackendError::NoSuchGuest { guest })?;
        let (sender, progress) = watch::channel(CheckpointProgress::default());
        let done = async move { take(&keeper, &file, &sender).await };
        Ok(CheckpointRun { progress, done: Box::pin(done) })
    }
}
