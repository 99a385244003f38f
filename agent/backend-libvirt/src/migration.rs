//! Live migration: libvirt's v3 protocol, one phase at a time.
//!
//! | our call | libvirt's phase | source | destination |
//! |---|---|---|---|
//! | `begin` | Begin3 | runs; a job protects it against changes | |
//! | `prepare` | Prepare3 | | QEMU waits for the stream; destroyed if this connection closes |
//! | `perform` | Perform3 | runs, then **paused**, everything sent | receives |
//! | `complete` | Finish3 (paused) | paused | **complete and paused**, bound to no connection |
//! | *the caller's decision* | | paused | paused |
//! | `Backend::resume` | (plain resume) | | runs |
//! | `confirm` | Confirm3 | destroyed, or runs again | |
//!
//! Flags: `LIVE | PAUSED | CHANGE_PROTECTION` in all phases, `AUTO_CONVERGE` on request; never `PEER2PEER` (libvirtd
//! itself would drive all phases, and decide), `TUNNELLED`, `PERSIST_DEST`, `UNDEFINE_SOURCE` (guests are transient).
//! Parameters: `migrate_uri = unix://PATH` at both ends: at the destination QEMU listens on it, at the source QEMU
//! connects to it; the two need not be the same path, our agents' link lies between. `destination_xml` at Prepare,
//! `destination_name` at Prepare and Finish (Finish finds the guest by it). The NBD disks count as shared.
//!
//! What a crash leaves, measured with libvirt 9.0 and QEMU 7.2 (kill -9 of either client, of both, and of either
//! libvirtd, after each phase):
//!
//! | killed after | source | destination | then |
//! |---|---|---|---|
//! | Begin, Prepare | runs, job gone | gone with its client or daemon | |
//! | in the middle of Perform | runs on: the stream breaks with the agent that carries it, the job fails by itself | gone | |
//! | Perform | paused, job gone, stays so | gone with its client or daemon | `confirm(Keep)`: plain resume |
//! | Finish | paused, job gone, stays so | **paused, stays so** | by the decision: resume here, destroy there, or the other way |
//!
//! At no point do both run, and from Finish on nothing but the two QEMU processes is needed to go either way. While the
//! source's client lives, its paused guest can only be resumed through Confirm3 (a plain resume waits 30 s for the job
//! and fails); after its death only by a plain resume: `confirm` does whichever is right.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use supercloud_blanket::{
    Backend as _, BackendError, BackendResult, BoxFuture, Launch, LiveMigration,
    backend::{GuestInfo, PauseReason, RunState},
    host::MAX_SOCKET_PATH_BYTES,
    migrate::{Cookie, CopyLimits, CopyOptions, MemoryMode, Performed, Transfer, TransferProgress, Verdict},
};
use supercloud_ids::GuestId;
use tokio::{sync::watch, time::Instant};
use virt::sys;

use crate::{
    BACK_END, LibvirtBackend,
    backend::{inspect, set_mark, utf8, wake, words},
    ffi::{self, LibError, Params, PhaseCalls},
    metadata::{Mark, Role},
    state,
    transfer::{self, Job},
    xml,
};

const FLAGS: u32 = sys::VIR_MIGRATE_LIVE | sys::VIR_MIGRATE_PAUSED | sys::VIR_MIGRATE_CHANGE_PROTECTION;
/// What a cookie of ours starts with: back end and version of the exchange.
const COOKIE_MAGIC: &[u8] = b"supercloud-libvirt-qemu/1\n";
/// How long a job that lost its client may take to end by itself before it is aborted.
const ORPHAN_PATIENCE: Duration = Duration::from_secs(10);
/// How long ending a move may take where the plain way does not work.
const RECOVERY_BUDGET: Duration = Duration::from_secs(60);
const RECOVERY_POLL: Duration = Duration::from_millis(100);
const MIB: u64 = 1 << 20;

/// What this agent does with guests that move or are frozen.
#[derive(Clone, Default)]
pub(crate) struct Moves(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    /// Long jobs that libvirt runs for this agent, each with the flag that says that it was cancelled.
    running: HashMap<GuestId, Arc<AtomicBool>>,
    /// Moves begun on the connection of this generation: libvirt holds the guest's job for exactly that connection.
    begun: HashMap<GuestId, u64>,
    /// Calls that begin a move and have not returned, whoever waits for them.
    beginning: HashMap<GuestId, u32>,
}

impl Moves {
    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A job begins; it counts as running until the guard is dropped. The guard goes with libvirt's call, not with who
    /// waits for it.
    pub(crate) fn track(&self, guest: GuestId, is_cancelled: &Arc<AtomicBool>) -> Tracked {
        self.table().running.insert(guest, Arc::clone(is_cancelled));
        Tracked { moves: self.clone(), guest, flag: Arc::clone(is_cancelled) }
    }

    /// A call begins a move; it counts until the guard is dropped, which goes with the call.
    fn beginning(&self, guest: GuestId) -> Beginning {
        *self.table().beginning.entry(guest).or_default() += 1;
        Beginning { moves: self.clone(), guest }
    }

    fn is_beginning(&self, guest: GuestId) -> bool {
        self.table().beginning.contains_key(&guest)
    }

    /// The flag of the guest's running job.
    fn running(&self, guest: GuestId) -> Option<Arc<AtomicBool>> {
        self.table().running.get(&guest).cloned()
    }
}

/// A running job; see [`Moves::track`].
pub(crate) struct Tracked {
    moves: Moves,
    guest: GuestId,
    flag: Arc<AtomicBool>,
}

impl Drop for Tracked {
    fn drop(&mut self) {
        let mut table = self.moves.table();
        if table.running.get(&self.guest).is_some_and(|flag| Arc::ptr_eq(flag, &self.flag)) {
            table.running.remove(&self.guest);
        }
    }
}

/// A call that begins a move; see [`Moves::beginning`].
struct Beginning {
    moves: Moves,
    guest: GuestId,
}

impl Beginning {
    /// libvirt holds the job from now on, for the connection of this generation.
    fn succeeded(&self, generation: u64) {
        self.moves.table().begun.insert(self.guest, generation);
    }
}

impl Drop for Beginning {
    fn drop(&mut self) {
        let mut table = self.moves.table();
        if let Some(count) = table.beginning.get_mut(&self.guest) {
            *count -= 1;
            if *count == 0 {
                table.beginning.remove(&self.guest);
            }
        }
    }
}

/// What [`LiveMigration::confirm`] sees of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    state: RunState,
    /// libvirt holds a job for it.
    has_job: bool,
    /// A copy of this agent's own is still going on.
    is_copying: bool,
    /// The job is held for this agent's present connection: Confirm3 is the way. (For any other job it is not: libvirt
    /// would end a job under the hands of the thread that works on it.)
    is_held: bool,
    /// It was resumed by this call already.
    was_resumed: bool,
}

/// What is to be done next to end a move at its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Done,
    Confirm,
    Abort,
    /// For an orphaned job to end by itself; abort it when it does not.
    Wait,
    Resume,
    Destroy,
    Refuse,
}

fn next_step(seen: Seen, verdict: Verdict) -> Step {
    use PauseReason::{Arrived, Departed, DiskError, Incoming};
    match (seen.state, verdict) {
        (RunState::Paused(Incoming | Arrived), _) => Step::Refuse,
        (_, Verdict::Keep) if seen.is_copying => Step::Abort,
        (_, Verdict::Release) if seen.is_copying => Step::Refuse,
        // Never destroy what runs: if it runs here, the move did not happen.
        (RunState::Running | RunState::ShuttingDown, Verdict::Release) => Step::Refuse,
        (RunState::Paused(reason), Verdict::Release) if reason != Departed => Step::Refuse,
        _ if seen.has_job && seen.is_held => Step::Confirm,
        (RunState::Running, Verdict::Keep) if seen.has_job => Step::Abort,
        // A save that an earlier agent began. It stands still meanwhile, and whoever keeps it wants it to run.
        (RunState::Paused(PauseReason::Saving), Verdict::Keep) if seen.has_job => Step::Abort,
        _ if seen.has_job => Step::Wait,
        (RunState::Paused(_) | RunState::Crashed, Verdict::Release) => Step::Destroy,
        (RunState::Running | RunState::ShuttingDown | RunState::Crashed, Verdict::Keep) => Step::Done,
        // Its disk does not answer: it is kept, and goes on when the disk is back.
        (RunState::Paused(DiskError), Verdict::Keep) if seen.was_resumed => Step::Done,
        (RunState::Paused(_), Verdict::Keep) => Step::Resume,
    }
}

fn wrap(cookie: &[u8]) -> BackendResult<Cookie> {
    Cookie::new([COOKIE_MAGIC, cookie].concat())
}

fn unwrap(cookie: &Cookie) -> BackendResult<Vec<u8>> {
    match cookie.as_bytes().strip_prefix(COOKIE_MAGIC) {
        // libvirt reads it as a string and wants the final zero that it wrote itself.
        Some(inner) if inner.is_empty() || (inner.ends_with(&[0]) && !inner[..inner.len() - 1].contains(&0)) => {
            Ok(inner.to_vec())
        }
        Some(_) => Err(BackendError::Foreign { what: "the cookie", detail: "it is cut or broken".to_owned() }),
        None => {
            let detail = "it is not of this back end and version".to_owned();
            Err(BackendError::Foreign { what: "the cookie", detail })
        }
    }
}

/// libvirt counts bandwidth in whole MiB/s.
fn mib_per_s(bytes_per_s: u64) -> u64 {
    (bytes_per_s / MIB).max(1)
}

fn socket_uri(socket: &std::path::Path) -> BackendResult<String> {
    let path = utf8(socket)?;
    let is_plain = path.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'.' | b'-' | b'_'));
    if !is_plain || path.len() > MAX_SOCKET_PATH_BYTES {
        let source = std::io::Error::new(
            std::io::ErrorKind::InvalidInput,
            "a stream's socket has at most 107 characters of a-z, A-Z, 0-9, '/', '.', '-', '_'",
        );
        return Err(BackendError::File { what: "use", path: socket.to_owned(), source });
    }
    Ok(format!("unix://{path}"))
}

impl LibvirtBackend {
    fn phase_calls(&self) -> BackendResult<PhaseCalls> {
        self.phases.clone().map_err(|missing| BackendError::Unsupported {
            back_end: BACK_END,
            option: format!("live migration: {missing} is missing"),
        })
    }

    async fn begin_move(&self, guest: GuestId) -> BackendResult<Cookie> {
        let phases = self.phase_calls()?;
        let connection = Arc::clone(&self.connection);
        let beginning = self.moves.beginning(guest);
        let begun = self
            .quick("begin a move", move |at| {
                let Some(found) = inspect(at, guest)? else {
                    return Ok(Err(BackendError::NoSuchGuest { guest }));
                };
                if found.state != RunState::Running {
                    let is = words(found.state);
                    return Ok(Err(BackendError::WrongState { guest, wants: "begin a move", is }));
                }
                if found.mark.role != Role::Owner {
                    // It arrived here and the mark was not renewed then; paused, it would pass for an arriving guest.
                    set_mark(&found.domain, Mark { role: Role::Owner, ..found.mark })?;
                }
                let cookie = phases.begin(&found.domain, &Params::new(), FLAGS)?;
                // Here, and not by who waits for it: the job is held also when nobody does any more.
                if let Some(generation) = connection.generation_of(at) {
                    beginning.succeeded(generation);
                }
                Ok(Ok(cookie))
            })
            .await??;
        self.connection.sink.take_departed_at(guest);
        wrap(&begun)
    }

    async fn perform_move(
        job: Job,
        tracked: Tracked,
        phases: PhaseCalls,
        cookie: Vec<u8>,
        uri: String,
        options: CopyOptions,
        progress: watch::Sender<TransferProgress>,
    ) -> BackendResult<Performed> {
        let (connection, guest) = (Arc::clone(&job.connection), job.guest);
        let (cookie, figures) = job
            .drive(&progress, move |at| {
                let _tracked = tracked;
                let Some(found) = inspect(at, guest)? else {
                    return Err(LibError::new(sys::VIR_ERR_NO_DOMAIN, "the guest is not here any more"));
                };
                if let Some(pause) = options.max_downtime_ms {
                    found.domain.migrate_set_max_downtime(pause.max(1), 0)?;
                }
                let mut params = Params::new().text(sys::VIR_MIGRATE_PARAM_URI, &uri)?;
                if let Some(bytes) = options.bandwidth_bytes_per_s {
                    params = params.number(sys::VIR_MIGRATE_PARAM_BANDWIDTH, mib_per_s(bytes))?;
                }
                let converge = if options.auto_converge { sys::VIR_MIGRATE_AUTO_CONVERGE } else { 0 };
                let cookie = phases.perform(&found.domain, &params, &cookie, FLAGS | converge)?;
                // The last figures, which a quick copy shows nowhere else; a millisecond on a local socket.
                Ok((cookie, transfer::figures(&found.domain).ok()))
            })
            .await?;
        if let Some(job) = figures {
            progress.send_modify(|last| *last = state::advance(last, &job, true));
        }
        let last = *progress.borrow();
        // The event comes on the same connection before the answer, but through another thread.
        let paused_for = match connection.sink.take_departed_at(guest) {
            Some(at) => at.elapsed(),
            None => Duration::from_millis(last.expected_downtime_ms.unwrap_or(0)),
        };
        Ok(Performed { cookie: wrap(&cookie)?, paused_for, progress: last, left_bytes: 0 })
    }

    async fn prepare_move(&self, launch: Launch, cookie: Cookie, listen: PathBuf) -> BackendResult<Cookie> {
        let phases = self.phase_calls()?;
        let cookie = unwrap(&cookie)?;
        let uri = socket_uri(&listen)?;
        self.admit(&launch).await?;
        let guest = launch.guest;
        let text = xml::render(&launch, &Mark { guest, epoch: launch.epoch, role: Role::Incoming });
        let out = self
            .slow("prepare an incoming guest", move |at| {
                let params = Params::new()
                    .text(sys::VIR_MIGRATE_PARAM_URI, &uri)?
                    .text(sys::VIR_MIGRATE_PARAM_DEST_NAME, &guest.to_string())?
                    .text(sys::VIR_MIGRATE_PARAM_DEST_XML, &text)?;
                phases.prepare(at, &params, &cookie, FLAGS)
            })
            .await?;
        wrap(&out)
    }

    async fn complete_move(&self, guest: GuestId, cookie: Cookie) -> BackendResult<GuestInfo> {
        let phases = self.phase_calls()?;
        let cookie = unwrap(&cookie)?;
        let taken = self
            .slow("take an incoming guest", move |at| {
                match inspect(at, guest)? {
                    None => return Ok(Err(BackendError::NoSuchGuest { guest })),
                    Some(found) => match found.state {
                        // A repeated call.
                        RunState::Paused(PauseReason::Arrived) => return Ok(Ok(found)),
                        RunState::Paused(PauseReason::Incoming) => {}
                        state => {
                            let is = words(state);
                            return Ok(Err(BackendError::WrongState { guest, wants: "complete its move", is }));
                        }
                    },
                }
                let params = Params::new().text(sys::VIR_MIGRATE_PARAM_DEST_NAME, &guest.to_string())?;
                phases.finish(at, &params, &cookie, FLAGS)?;
                Ok(inspect(at, guest)?.ok_or(BackendError::NoSuchGuest { guest }))
            })
            .await;
        match taken.and_then(|inner| inner) {
            Ok(found) if found.state == RunState::Paused(PauseReason::Arrived) => Ok(self.info(&found)),
            Ok(found) => {
                let is = words(found.state);
                self.discard_move(guest).await?;
                Err(BackendError::WrongState { guest, wants: "complete its move", is })
            }
            Err(error @ (BackendError::NoSuchGuest { .. } | BackendError::WrongState { .. })) => Err(error),
            Err(error) => {
                // libvirt destroys it itself when the finish fails; make sure.
                self.discard_move(guest).await?;
                Err(error)
            }
        }
    }

    async fn discard_move(&self, guest: GuestId) -> BackendResult<()> {
        let found = self.quick("look for a guest", move |at| inspect(at, guest)).await?;
        match found.map(|found| found.state) {
            None => Ok(()),
            Some(RunState::Paused(PauseReason::Incoming | PauseReason::Arrived) | RunState::Crashed) => {
                self.destroy(guest).await
            }
            Some(state) => Err(BackendError::WrongState { guest, wants: "discard it as incoming", is: words(state) }),
        }
    }

    async fn confirm_move(&self, guest: GuestId, verdict: Verdict) -> BackendResult<()> {
        let begin = Instant::now();
        let mut was_resumed = false;
        self.connection.sink.take_departed_at(guest);
        loop {
            if self.moves.is_beginning(guest) && begin.elapsed() < RECOVERY_BUDGET {
                // It will hold the guest's job, or not: only then can that be ended.
                tokio::time::sleep(RECOVERY_POLL).await;
                continue;
            }
            let found = self.quick("look for a guest", move |at| {
                let Some(found) = inspect(at, guest)? else { return Ok(None) };
                let has_job = ffi::job_stats(&found.domain)
                    .is_ok_and(|(kind, _)| u32::try_from(kind) != Ok(sys::VIR_DOMAIN_JOB_NONE));
                Ok(Some((found.state, has_job)))
            });
            let (state, has_job) = match (found.await?, verdict) {
                (Some(found), _) => found,
                (None, Verdict::Release) => return Ok(()),
                (None, Verdict::Keep) => return Err(BackendError::NoSuchGuest { guest }),
            };
            let generation = self.connection.generation();
            let is_copying = self.moves.running(guest).is_some();
            let is_held = self.moves.table().begun.get(&guest) == Some(&generation);
            match next_step(Seen { state, has_job, is_copying, is_held, was_resumed }, verdict) {
                Step::Done => {
                    self.moves.table().begun.remove(&guest);
                    return Ok(());
                }
                Step::Confirm => {
                    self.moves.table().begun.remove(&guest);
                    self.try_confirm(guest, verdict).await?;
                    continue;
                }
                Step::Abort => self.abort_orphan(guest).await,
                Step::Wait if begin.elapsed() > ORPHAN_PATIENCE => self.abort_orphan(guest).await,
                Step::Wait => {}
                Step::Resume => {
                    was_resumed = true;
                    self.quick("resume the source of a move", move |at| match inspect(at, guest)? {
                        Some(found) => wake(&found.domain),
                        None => Ok(()),
                    })
                    .await?;
                    continue;
                }
                Step::Destroy => return self.destroy(guest).await,
                Step::Refuse => {
                    let is = words(state);
                    return Err(BackendError::WrongState { guest, wants: "end its move as the source", is });
                }
            }
            if begin.elapsed() > RECOVERY_BUDGET {
                let budget_ms = u64::try_from(RECOVERY_BUDGET.as_millis()).unwrap_or(u64::MAX);
                return Err(BackendError::Deadline { what: "end a move", budget_ms });
            }
            tokio::time::sleep(RECOVERY_POLL).await;
        }
    }

    /// Aborts a copy that nobody waits for. When there is none by now, the next look tells.
    async fn abort_orphan(&self, guest: GuestId) {
        if let Some(flag) = self.moves.running(guest) {
            flag.store(true, Ordering::Release);
        }
        if let Err(error) = transfer::abort(&self.connection, guest).await {
            tracing::debug!(%guest, %error, "nothing to abort");
        }
    }

    /// The protocol's own last phase. Its failure is no failure of ours: the state decides what to do then.
    async fn try_confirm(&self, guest: GuestId, verdict: Verdict) -> BackendResult<()> {
        let phases = self.phase_calls()?;
        let tried = self
            .slow("confirm a move", move |at| {
                let Some(found) = inspect(at, guest)? else { return Ok(()) };
                phases.confirm(&found.domain, &Params::new(), FLAGS, verdict == Verdict::Keep)
            })
            .await;
        match tried {
            Err(error @ (BackendError::Away { .. } | BackendError::Deadline { .. })) => Err(error),
            Err(error) => {
                tracing::info!(%guest, %error, ?verdict, "the move's last phase was refused; ending it by hand");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

impl LiveMigration for LibvirtBackend {
    fn begin(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<Cookie>> {
        Box::pin(self.begin_move(guest))
    }

    fn perform(
        &self,
        guest: GuestId,
        cookie: Cookie,
        stream: PathBuf,
        options: CopyOptions,
    ) -> BackendResult<Transfer<Performed>> {
        if options.memory != MemoryMode::PreCopy {
            // Refused by its name.
            self.post_copy()?;
        }
        let phases = self.phase_calls()?;
        let cookie = unwrap(&cookie)?;
        let uri = socket_uri(&stream)?;
        let is_cancelled = Arc::new(AtomicBool::new(false));
        let tracked = self.moves.track(guest, &is_cancelled);
        let (sender, progress) = watch::channel(TransferProgress::default());
        let job = Job {
            connection: Arc::clone(&self.connection),
            guest,
            what: "copy a guest",
            budget: options.budget,
            is_cancelled,
        };
        let done = Self::perform_move(job, tracked, phases, cookie, uri, options, sender);
        Ok(Transfer { progress, done: Box::pin(done) })
    }

    fn set_limits(&self, guest: GuestId, limits: CopyLimits) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            let found = self.expect(guest).await?;
            self.quick("change the limits of a copy", move |_| {
                if let Some(pause) = limits.max_downtime_ms {
                    found.domain.migrate_set_max_downtime(pause.max(1), 0)?;
                }
                if let Some(bytes) = limits.bandwidth_bytes_per_s {
                    found.domain.migrate_set_max_speed(mib_per_s(bytes), 0)?;
                }
                Ok(())
            })
            .await
        })
    }

    fn cancel(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            let Some(is_cancelled) = self.moves.running(guest) else { return Ok(()) };
            is_cancelled.store(true, Ordering::Release);
            match transfer::abort(&self.connection, guest).await {
                // Over already, or not begun in earnest: not an error of the caller's.
                Err(BackendError::Failed { .. } | BackendError::Cancelled { .. }) | Ok(()) => Ok(()),
                Err(error) => Err(error),
            }
        })
    }

    fn confirm(&self, guest: GuestId, verdict: Verdict) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(self.confirm_move(guest, verdict))
    }

    fn prepare(&self, launch: Launch, cookie: Cookie, listen: PathBuf) -> BoxFuture<'_, BackendResult<Cookie>> {
        Box::pin(self.prepare_move(launch, cookie, listen))
    }

    fn complete(&self, guest: GuestId, cookie: Cookie) -> BoxFuture<'_, BackendResult<GuestInfo>> {
        Box::pin(self.complete_move(guest, cookie))
    }

    fn discard(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(self.discard_move(guest))
    }
}

#[cfg(test)]
#[path = "migration_tests.rs"]
mod tests;
