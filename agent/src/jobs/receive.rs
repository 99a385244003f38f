//! A guest comes here: started, moved, thawed. Up to the point where this host holds everything; who may run it is decided
//! elsewhere.

use std::{path::Path, time::Duration};

use base64::Engine as _;
use supercloud_api::{
    Progress, Propagation,
    data::HandoverMessage,
    link::{FrozenMemory, ThawWish, VolumeRoot},
};
use supercloud_blanket::{
    migrate::{Cookie, MAX_COOKIE_BYTES},
    thaw::FrozenBlocks,
};
use supercloud_handover::{DestinationEvent, DestinationPlan, LocalEvent, OperationKind, VolumeStamp};
use supercloud_storage::{
    key::MapRoot,
    process::{
        VolumeClient,
        control::{SealedMap, VolumeStatus},
    },
};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::task::AbortOnDropHandle;

use super::{Fact, Job, JobError, PROGRESS_EVERY, file_error, in_time, prepare, standby, thawed};
use crate::{
    accounts::Account,
    chunks::ChunkSources,
    guest::record::{CopyRecord, VolumeOrigin},
    plane::{
        DataStream, bridge,
        meeting::{MeetingEvent, MeetingHandle},
    },
    socket,
};

const ENCODING: base64::engine::GeneralPurpose = base64::engine::general_purpose::STANDARD;
/// How long the other agent may take to come to the meeting.
pub(super) const MEET_BUDGET: Duration = Duration::from_secs(60);
/// How long the source may take to begin once the blocks are here: its disk may have to answer again first.
pub(super) const BEGIN_BUDGET: Duration = Duration::from_secs(60);
/// How long the copying ahead of blocks may stand still before the guest's memory is asked for all the same.
const STILL_BUDGET: Duration = Duration::from_secs(10);
/// How often the source is told how many blocks came.
const SAY_EVERY: Duration = Duration::from_secs(5);
/// How long adopting the volumes' maps may take: a paused guest waits for it.
const ADOPT_BUDGET: Duration = Duration::from_secs(60);

/// The other agent of a meeting.
pub struct Peer {
    /// To speak to it.
    pub handle: MeetingHandle,
    /// What it says.
    pub events: mpsc::Receiver<MeetingEvent>,
}

/// What came with the order.
pub struct Wants {
    /// The plan.
    pub plan: DestinationPlan,
    /// The copy that is to be made.
    pub copy: CopyRecord,
    /// Where chunks are.
    pub sources: std::sync::Arc<ChunkSources>,
    /// The other agent, if one takes part.
    pub peer: Option<Peer>,
    /// At most this much of the link for blocks, bytes per second.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// For a thaw.
    pub frozen: Option<FrozenMemory>,
    /// Likewise: whether the guest waits for its memory.
    pub thaw: ThawWish,
    /// For a mirror: says when it is to take over.
    pub take_over: std::sync::Arc<tokio::sync::Notify>,
}

/// Does the destination's part up to the request for the switch; tells how it ended.
pub async fn run(job: Job, wants: Wants) {
    let received = receive(&job, wants).await;
    conclude(&job, received).await;
}

/// Tells how it ended.
pub(super) async fn conclude(job: &Job, received: Result<Vec<VolumeStamp>, JobError>) {
    let operation = job.operation;
    let event = |event| Fact::Event(LocalEvent::Destination(event));
    match received {
        Ok(volumes) => {
            job.tell(event(DestinationEvent::StateReceived { operation })).await;
            job.tell(event(DestinationEvent::VolumeMapsReceived { operation, volumes })).await;
        }
        Err(JobError::Cancelled) => {}
        Err(error) => {
            tracing::warn!(guest = %job.guest, %operation, error = crate::chain(&error), "the guest cannot be received");
            job.tell(Fact::Problem(Box::new(error.problem()))).await;
            job.tell(event(DestinationEvent::ReceiveFailed { operation })).await;
        }
    }
}

async fn receive(job: &Job, wants: Wants) -> Result<Vec<VolumeStamp>, JobError> {
    let Wants { plan, copy, sources, peer, bandwidth_bytes_per_s, frozen, thaw, take_over } = wants;
    if let OperationKind::Migrate { post_copy: true, .. } = plan.kind {
        // Refused before anything is made.
        job.host.backend.post_copy()?;
    }
    let is_lazy = match &frozen {
        Some(frozen) => is_lazy(job, thaw, &frozen.format)?,
        None => false,
    };
    job.unless_cancelled(prepare::prepare(job, &plan, &copy, &sources)).await?;
    job.tell(Fact::Event(LocalEvent::Destination(DestinationEvent::Prepared { operation: job.operation }))).await;
    match plan.kind {
        OperationKind::Migrate { .. } | OperationKind::Mirror { .. } => {
            let mut peer = peer.ok_or_else(|| JobError::Protocol("no other agent was named".to_owned()))?;
            let received = match plan.kind {
                OperationKind::Mirror { .. } => {
                    standby::stand_by(job, &plan, &copy, &mut peer, bandwidth_bytes_per_s, &take_over).await
                }
                _ => arrive(job, &plan, &copy, &mut peer, bandwidth_bytes_per_s).await,
            };
            if let Err(error) = &received
                && !matches!(error, JobError::Peer(_) | JobError::Lost | JobError::Cancelled)
            {
                peer.handle.say(HandoverMessage::Failed { problem: error.problem() }).await;
            }
            received
        }
        OperationKind::Thaw { .. } => {
            let frozen = frozen.ok_or_else(|| JobError::Protocol("no memory state was named".to_owned()))?;
            match is_lazy {
                true => thaw_lazily(job, &plan, &copy, &sources, &frozen).await,
                false => thaw_whole(job, &plan, &copy, &sources, &frozen).await,
            }
        }
        _ => match (copy.origin, peer) {
            (VolumeOrigin::Peer, Some(mut peer)) => job.unless_cancelled(collect(job, &plan, &copy, &mut peer)).await,
            (VolumeOrigin::Peer, None) => Err(JobError::Protocol("no host was named that has the volumes".to_owned())),
            _ => job.unless_cancelled(prepare::seal_here(&copy, plan.from.epoch)).await,
        },
    }
}

/// Whether a guest that was frozen in this format is to run before its memory is here.
///
/// # Errors
/// When it is to, and cannot: by name.
fn is_lazy(job: &Job, wish: ThawWish, format: &str) -> Result<bool, JobError> {
    let offered = job.host.backend.lazy_thaw().and_then(|lazy| lazy.takes(format));
    match (wish, offered) {
        (ThawWish::Whole, _) => Ok(false),
        (ThawWish::Lazy, Err(refused)) => Err(refused.into()),
        (ThawWish::Either, Err(lacks)) => {
            tracing::info!(guest = %job.guest, why = %lacks, "the guest waits for its memory");
            Ok(false)
        }
        (_, Ok(())) => Ok(true),
    }
}

/// A frozen guest that goes on without its memory, which stays where it is until [`super::thawed`] fetches it.
async fn thaw_lazily(
    job: &Job,
    plan: &DestinationPlan,
    copy: &CopyRecord,
    sources: &std::sync::Arc<ChunkSources>,
    frozen: &FrozenMemory,
) -> Result<Vec<VolumeStamp>, JobError> {
    let reader = prepare::reader(job, copy, sources);
    let opened = async {
        let image = std::sync::Arc::new(thawed::open(frozen, reader).await?);
        Ok((image, prepare::seal_here(copy, plan.from.epoch).await?))
    };
    let (image, stamps) = job.unless_cancelled(opened).await?;
    // Awaited whatever becomes of the job: half started it would be left.
    let blocks: std::sync::Arc<dyn FrozenBlocks> = image.clone();
    let info = job.host.backend.lazy_thaw()?.thaw_lazily(copy.launch.clone(), blocks, frozen.format.clone()).await;
    if let (Err(_), Some(trouble)) = (&info, image.take_trouble()) {
        // Damage is told apart from a store that is away.
        return Err(Box::new(trouble).into());
    }
    info?;
    let message = "its devices are as they were; its memory follows".to_owned();
    job.show(Progress { message, ..Progress::default() });
    Ok(stamps)
}

/// A frozen guest: its memory comes out of the store into a file, and the hypervisor takes it, standing still.
async fn thaw_whole(
    job: &Job,
    plan: &DestinationPlan,
    copy: &CopyRecord,
    sources: &std::sync::Arc<ChunkSources>,
    frozen: &FrozenMemory,
) -> Result<Vec<VolumeStamp>, JobError> {
    let path = job.places.memory();
    let stamps = job.unless_cancelled(fetch_memory(job, plan, copy, sources, frozen, &path)).await?;
    // Awaited whatever becomes of the job: half started it would be left.
    let info = job.host.backend.thaw(copy.launch.clone(), path.clone(), frozen.format.clone()).await;
    // The hypervisor has read it all, or it is of no use.
    let _ = tokio::fs::remove_file(&path).await;
    info?;
    job.show(Progress {
        memory_total_bytes: frozen.bytes,
        memory_sent_bytes: frozen.bytes,
        message: "its state is back in memory".to_owned(),
        ..Progress::default()
    });
    Ok(stamps)
}

/// The memory of a frozen guest, out of the store into a file; the volumes are sealed then.
async fn fetch_memory(
    job: &Job,
    plan: &DestinationPlan,
    copy: &CopyRecord,
    sources: &std::sync::Arc<ChunkSources>,
    frozen: &FrozenMemory,
    path: &Path,
) -> Result<Vec<VolumeStamp>, JobError> {
    prepare::check_disk(job, frozen.bytes).await?;
    // Left by an operation that did not succeed.
    let _ = tokio::fs::remove_file(path).await;
    let reader = prepare::reader(job, copy, sources);
    let root = prepare::parse_root(&frozen.root)?;
    let total = frozen.bytes;
    let shown = std::sync::Mutex::new(Instant::now() - PROGRESS_EVERY);
    let exported = supercloud_storage::transfer::export_raw(&reader, root, path, &job.cancel, |progress| {
        let mut at = shown.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if at.elapsed() >= PROGRESS_EVERY {
            *at = Instant::now();
            job.show(Progress {
                memory_total_bytes: total,
                memory_sent_bytes: progress.done_bytes,
                memory_remaining_bytes: total.saturating_sub(progress.done_bytes),
                message: "fetching the frozen memory".to_owned(),
                ..Progress::default()
            });
        }
    })
    .await;
    exported.map_err(|source| JobError::Content { what: "the frozen memory", source: Box::new(source) })?;
    // In the store it is filled up to whole sectors.
    let (file, bytes) = (path.to_owned(), frozen.bytes);
    tokio::task::spawn_blocking(move || {
        std::fs::File::options().write(true).open(&file).and_then(|file| file.set_len(bytes))
    })
    .await?
    .map_err(file_error("cut", path))?;
    prepare::seal_here(copy, plan.from.epoch).await
}

/// A guest that starts here while another host has its volumes.
async fn collect(
    job: &Job,
    plan: &DestinationPlan,
    copy: &CopyRecord,
    peer: &mut Peer,
) -> Result<Vec<VolumeStamp>, JobError> {
    in_time("the host that has the volumes", MEET_BUDGET, async {
        loop {
            if let HandoverMessage::Performed { volumes, .. } = next_message(peer).await? {
                return adopt(job, plan, copy, &volumes).await;
            }
        }
    })
    .await
}

/// A running guest moves here.
async fn arrive(
    job: &Job,
    plan: &DestinationPlan,
    copy: &CopyRecord,
    peer: &mut Peer,
    bandwidth_bytes_per_s: Option<u64>,
) -> Result<Vec<VolumeStamp>, JobError> {
    let backend = &job.host.backend;
    let live = backend.live_migration()?;
    let ahead = async {
        in_time("the source", MEET_BUDGET, met(peer)).await?;
        copy_ahead(job, copy, bandwidth_bytes_per_s, peer).await?;
        peer.handle.say(HandoverMessage::CopiedAhead).await;
        in_time("the source's beginning", BEGIN_BUDGET, begin(job, plan, peer)).await
    };
    let cookie = job.unless_cancelled(ahead).await?;
    let listen = job.places.incoming_stream();
    let _ = tokio::fs::remove_file(&listen).await;
    // Awaited whatever becomes of the job: half started it would be left.
    let cookie = live.prepare(copy.launch.clone(), cookie, listen.clone()).await?;
    let cookie = ENCODING.encode(cookie.as_bytes());
    peer.handle.say(HandoverMessage::Prepared { cookie, takes_draining: true }).await;
    let mut streams = JoinSet::new();
    let performed = job.unless_cancelled(performed(job, copy, peer, &listen, &mut streams)).await?;
    let at = Instant::now();
    job.tell(Fact::Arrived { at, paused_for: performed.paused_for }).await;
    // The guest stands still everywhere now: both at once, while the stream's last bytes are still carried.
    let adopt = async {
        let stamps = in_time("the volumes' maps", ADOPT_BUDGET, adopt(job, plan, copy, &performed.volumes)).await?;
        Ok((stamps, at.elapsed()))
    };
    let complete = async {
        let info = live.complete(job.guest, performed.cookie).await.map_err(JobError::from)?;
        Ok((info, at.elapsed()))
    };
    let ((stamps, adopted), (info, completed)) =
        job.unless_cancelled(async { tokio::try_join!(adopt, complete) }).await?;
    drop(streams);
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    tracing::info!(
        guest = %job.guest, operation = %job.operation, ?info, paused_before_ms = ms(performed.paused_for),
        adopted_ms = ms(adopted), completed_ms = ms(completed), "everything of the guest is here"
    );
    Ok(stamps)
}

async fn next_event(peer: &mut Peer) -> Result<MeetingEvent, JobError> {
    peer.events.recv().await.ok_or(JobError::Lost)
}

/// The next message; what else happens is left out until the two have met.
async fn next_message(peer: &mut Peer) -> Result<HandoverMessage, JobError> {
    loop {
        match next_event(peer).await? {
            MeetingEvent::Message(HandoverMessage::Failed { problem }) => return Err(JobError::Peer(problem)),
            MeetingEvent::Message(message) => return Ok(message),
            // Before anything has been copied a broken connection costs nothing: it is dialled again.
            MeetingEvent::Connected | MeetingEvent::Lost | MeetingEvent::Memory(_) => {}
        }
    }
}

/// Waits for the two to have met.
pub(super) async fn met(peer: &mut Peer) -> Result<(), JobError> {
    loop {
        match next_event(peer).await? {
            MeetingEvent::Connected => return Ok(()),
            MeetingEvent::Message(HandoverMessage::Failed { problem }) => return Err(JobError::Peer(problem)),
            _ => {}
        }
    }
}

pub(super) async fn begin(job: &Job, plan: &DestinationPlan, peer: &mut Peer) -> Result<Cookie, JobError> {
    loop {
        if let HandoverMessage::Begin { operation, guest, epoch, cookie } = next_message(peer).await? {
            if (operation, guest, epoch) != (job.operation, job.guest, plan.from.epoch) {
                return Err(JobError::Protocol(format!("it begins {operation} of {guest} at epoch {epoch}")));
            }
            return decode(&cookie);
        }
    }
}

/// Reads a cookie of the other agent's back end.
///
/// # Errors
/// When it is too large or not base64.
pub fn decode(cookie: &str) -> Result<Cookie, JobError> {
    if cookie.len() > MAX_COOKIE_BYTES.div_ceil(3) * 4 {
        return Err(JobError::Protocol("its cookie is too large".to_owned()));
    }
    let bytes = ENCODING.decode(cookie).map_err(|_| JobError::Protocol("its cookie is not base64".to_owned()))?;
    Ok(Cookie::new(bytes)?)
}

/// Text form of a cookie.
#[must_use]
pub fn encode(cookie: &Cookie) -> String {
    ENCODING.encode(cookie.as_bytes())
}

/// Waits until the blocks that the source has now have been copied once, or copying stands still.
async fn copy_ahead(
    job: &Job,
    copy: &CopyRecord,
    bandwidth_bytes_per_s: Option<u64>,
    peer: &mut Peer,
) -> Result<(), JobError> {
    let specs = copy.volumes.iter().zip(&copy.spec.volumes);
    let mut ahead: Vec<VolumeClient> = Vec::new();
    for (home, spec) in specs {
        let is_predictive = match spec.propagation {
            Propagation::OnDemand => continue,
            Propagation::HotStandby => false,
            Propagation::Predictive => true,
        };
        let started = home.client().pre_copy(bandwidth_bytes_per_s, is_predictive).await;
        started.map_err(|source| JobError::Volume { what: "copy ahead", source })?;
        ahead.push(home.client());
    }
    let has_passed = |status: &VolumeStatus| status.pre_copy.passes >= 1;
    await_ahead(job, copy, peer, &ahead, "copying the disk ahead", has_passed).await
}

/// Waits until these volumes have been through their source's map once, or copying stands still.
///
/// # Errors
/// When the source is lost or gives up, or a volume does not answer.
pub(super) async fn await_ahead(
    job: &Job,
    copy: &CopyRecord,
    peer: &mut Peer,
    ahead: &[VolumeClient],
    message: &str,
    has_passed: impl Fn(&VolumeStatus) -> bool,
) -> Result<(), JobError> {
    let mut ticks = interval(PROGRESS_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut last, mut moved_at) = (0, Instant::now());
    let (mut said, mut said_at) = (0, Instant::now());
    loop {
        tokio::select! {
            event = next_event(peer) => match event? {
                MeetingEvent::Message(HandoverMessage::Failed { problem }) => return Err(JobError::Peer(problem)),
                MeetingEvent::Lost => return Err(JobError::Lost),
                _ => {}
            },
            _ = ticks.tick() => {}
        }
        let mut is_done = true;
        for client in ahead {
            let status = client.status().await.map_err(|source| JobError::Volume { what: "answer", source })?;
            is_done &= has_passed(&status);
        }
        let bytes = show_blocks(job, copy, message).await?;
        if bytes != last {
            (last, moved_at) = (bytes, Instant::now());
        }
        // The source waits as long as this grows.
        if bytes > said && said_at.elapsed() > SAY_EVERY {
            (said, said_at) = (bytes, Instant::now());
            peer.handle.say(HandoverMessage::Preparing { bytes }).await;
        }
        if is_done {
            return Ok(());
        }
        if moved_at.elapsed() > STILL_BUDGET {
            tracing::warn!(guest = %job.guest, "copying blocks ahead stands still; going on without");
            return Ok(());
        }
    }
}

/// Tells how many bytes of blocks came; returns that number.
async fn show_blocks(job: &Job, copy: &CopyRecord, message: &str) -> Result<u64, JobError> {
    let mut bytes = 0;
    for home in &copy.volumes {
        let status = home.client().status().await.map_err(|source| JobError::Volume { what: "answer", source })?;
        bytes += status.pulled_bytes_before;
    }
    let message = message.to_owned();
    job.show(Progress { disk_bytes_before_resume: Some(bytes), message, ..Progress::default() });
    Ok(bytes)
}

struct Performed {
    cookie: Cookie,
    volumes: Vec<VolumeRoot>,
    paused_for: Duration,
}

/// Carries the hypervisor's stream until the source says that all of it went.
async fn performed(
    job: &Job,
    copy: &CopyRecord,
    peer: &mut Peer,
    listen: &Path,
    streams: &mut JoinSet<std::io::Result<(u64, u64)>>,
) -> Result<Performed, JobError> {
    let mut ticks = interval(PROGRESS_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut _learning = None;
    loop {
        tokio::select! {
            event = next_event(peer) => match event? {
                MeetingEvent::Message(HandoverMessage::Draining) => _learning = Some(learn(copy)),
                MeetingEvent::Memory(stream) => drop(streams.spawn(carry_in(job, *stream, listen))),
                MeetingEvent::Message(HandoverMessage::Performed { cookie, volumes, paused_for_ms }) => {
                    let paused_for = Duration::from_millis(paused_for_ms);
                    return Ok(Performed { cookie: decode(&cookie)?, volumes, paused_for });
                }
                MeetingEvent::Message(HandoverMessage::Failed { problem }) => return Err(JobError::Peer(problem)),
                MeetingEvent::Lost => return Err(JobError::Lost),
                MeetingEvent::Message(_) | MeetingEvent::Connected => {}
            },
            Some(ended) = streams.join_next() => match ended? {
                Ok((bytes, _)) => tracing::debug!(guest = %job.guest, bytes, "the memory stream has ended"),
                Err(error) => {
                    tracing::info!(guest = %job.guest, %error, "the memory stream broke");
                    return Err(JobError::Lost);
                }
            },
            _ = ticks.tick() => {
                // The source tells of the memory; blocks are this side's.
                show_blocks(job, copy, "").await?;
            }
        }
    }
}

/// Has the volumes ask for their maps while the last of the memory comes. Only for speed.
fn learn(copy: &CopyRecord) -> AbortOnDropHandle<()> {
    let homes = copy.volumes.clone();
    AbortOnDropHandle::new(tokio::spawn(async move {
        let ask = async |home: crate::volumes::VolumeHome| {
            if let Err(error) = home.client().learn_map().await {
                tracing::debug!(volume = %home.volume, %error, "the map was not asked for ahead");
            }
        };
        futures::future::join_all(homes.into_iter().map(ask)).await;
    }))
}

/// Carries the memory stream to the hypervisor.
pub(super) fn carry_in(
    job: &Job,
    stream: DataStream,
    listen: &Path,
) -> impl Future<Output = std::io::Result<(u64, u64)>> + Send + 'static {
    // SAFETY: geteuid takes no arguments and cannot fail.
    let own = || Account { uid: unsafe { libc::geteuid() }, gid: 0 };
    let server = if job.host.backend.takes_streams_itself() { own() } else { job.host.qemu };
    carry(stream, listen.to_owned(), server)
}

async fn carry(stream: DataStream, listen: std::path::PathBuf, server: Account) -> std::io::Result<(u64, u64)> {
    let local = bridge::connect(&listen, Duration::from_secs(10)).await?;
    if !socket::is_server(&local, server) {
        return Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, "another user listens for the stream"));
    }
    bridge::carry(stream, local).await
}

/// Takes the maps of the sealed volumes; each is checked against its root.
async fn adopt(
    job: &Job,
    plan: &DestinationPlan,
    copy: &CopyRecord,
    roots: &[VolumeRoot],
) -> Result<Vec<VolumeStamp>, JobError> {
    let adopt_one = |home: &crate::volumes::VolumeHome| {
        let home = home.clone();
        let told = roots.iter().find(|told| told.volume == home.volume).cloned();
        async move {
            let told =
                told.ok_or_else(|| JobError::Protocol(format!("it does not tell the map of {}", home.volume)))?;
            let root: MapRoot = told
                .root
                .parse()
                .map_err(|_| JobError::Protocol(format!("the root of {}'s map is malformed", home.volume)))?;
            let sealed = SealedMap { epoch: plan.from.epoch, root, version: told.version, blocks: 0 };
            let adopted = home.client().adopt(sealed).await;
            adopted.map_err(|source| JobError::Volume { what: "take the source's map", source })?;
            Ok::<_, JobError>(VolumeStamp { volume: home.volume, root: root.0, version: told.version })
        }
    };
    let stamps = futures::future::try_join_all(copy.volumes.iter().map(adopt_one)).await?;
    tracing::debug!(guest = %job.guest, "the volumes' maps are here");
    Ok(stamps)
}
