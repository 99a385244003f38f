//! A running guest moves away: the source's part up to the pause, and after it the volumes' maps.

use std::{path::PathBuf, time::Duration};

use supercloud_api::{
    self as api, Progress,
    data::{Channel, HandoverMessage},
    link::{MigrationOptions, VolumeRoot},
};
use supercloud_blanket::migrate::{Cookie, CopyLimits, CopyOptions, MemoryMode, TransferPhase, TransferProgress};
use supercloud_blanket::{
    BackendError,
    backend::{PauseReason, RunState},
};
use supercloud_handover::{LocalEvent, SourceEvent, VolumeStamp};
use supercloud_ids::Epoch;
use tokio::{
    net::UnixListener,
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{
    Fact, Job, JobError, PROGRESS_EVERY, file_error, in_time,
    lease::Held,
    receive::{Peer, decode, encode},
};
use crate::{
    accounts::Account,
    plane::{
        bridge,
        meeting::{MeetingEvent, MeetingHandle},
    },
    socket,
    volumes::VolumeHome,
};

/// How long the other agent may take to come to the meeting.
const MEET_BUDGET: Duration = Duration::from_secs(60);
/// How long the destination may get no further with the blocks that it copies ahead, which last as long as their size wants; no word
/// of it for so long, or always the same, while the connection lives, means that it hangs.
const AHEAD_BUDGET: Duration = Duration::from_secs(240);
/// How long the destination's hypervisor may take to be ready for the stream.
const PREPARED_BUDGET: Duration = Duration::from_secs(90);
/// A copy that moves nothing for so long is given up.
const STILL_BUDGET: Duration = Duration::from_secs(60);
/// How long a disk that does not answer may hold up the beginning of a move, and the time between two attempts.
const STALL_BUDGET: Duration = Duration::from_secs(30);
const STALL_PAUSE: Duration = Duration::from_millis(500);
/// How long a paused source waits for the answer to its maps before it asks for its guest back.
const ANSWER_BUDGET: Duration = Duration::from_secs(30);
/// The budget of a copy without a deadline.
const COPY_BUDGET: Duration = Duration::from_secs(3600);
/// The pause that is aimed at when nothing is said, in milliseconds.
const MAX_DOWNTIME_MS: u64 = 300;

/// What the hand-over itself takes of the pause beside the hypervisor's last pages, in milliseconds: half a round trip between
/// the hosts, a whole one to the controller, and what is made durable on the way (measured: 105 to 200 with 40 to 140 ms between
/// the hosts and 10 to 90 ms to the controller).
const HAND_OVER_MS: u64 = 150;
/// Rounds after which a guest that does not come to the shorter pause gets the whole one for its pages.
const ROUNDS_FOR_LESS: u64 = 6;

/// What came with the order.
pub struct Wants {
    /// The epoch at which the guest is owned here.
    pub epoch: Epoch,
    /// Its volumes.
    pub volumes: Vec<VolumeHome>,
    /// How it may go.
    pub options: MigrationOptions,
    /// The other agent.
    pub peer: Peer,
    /// The guest may be paused, if it was to wait with that.
    pub released: CancellationToken,
    /// The maps, when the volumes are sealed.
    pub maps: mpsc::Receiver<Vec<VolumeStamp>>,
    /// Of a mirror that is fenced by a lease: that.
    pub lease: Option<Held>,
}

/// Does the source's part; after the pause it stays to give the maps, and tells when the other agent is lost.
pub async fn run(job: Job, wants: Wants) {
    let operation = job.operation;
    let event = |event| Fact::Event(LocalEvent::Source(event));
    let Wants { epoch, volumes, options, mut peer, mut maps, released, .. } = wants;
    let departed = depart(&job, epoch, &volumes, &options, &released, &mut peer).await;
    // The bridge stays: its last bytes may still be on their way when the hypervisor has written them.
    let (cookie, paused_at, _bridge) = match departed {
        Ok(departed) => departed,
        Err(JobError::Cancelled) => return,
        Err(error) => {
            tracing::warn!(guest = %job.guest, %operation, error = crate::chain(&error), "the guest cannot be copied");
            if !matches!(error, JobError::Peer(_) | JobError::Lost) {
                peer.handle.say(HandoverMessage::Failed { problem: error.problem() }).await;
            }
            job.tell(Fact::Problem(Box::new(error.problem()))).await;
            job.tell(event(SourceEvent::CopyFailed { operation })).await;
            return;
        }
    };
    job.tell(event(SourceEvent::GuestPaused { operation })).await;
    let mut said = false;
    let mut patience = Box::pin(tokio::time::sleep(ANSWER_BUDGET));
    loop {
        tokio::select! {
            () = job.cancel.cancelled() => return,
            () = &mut patience => {
                patience.as_mut().reset(Instant::now() + ANSWER_BUDGET);
                job.tell(event(SourceEvent::PeerLost { operation })).await;
            }
            stamps = maps.recv() => {
                let Some(stamps) = stamps else { return };
                // Once: the guest's task asks again every second.
                if !std::mem::replace(&mut said, true) {
                    let volumes = roots(&stamps);
                    let paused_for_ms = u64::try_from(paused_at.elapsed().as_millis()).unwrap_or(u64::MAX);
                    peer.handle.say(HandoverMessage::Performed { cookie: encode(&cookie), volumes, paused_for_ms }).await;
                }
            }
            heard = peer.events.recv() => match heard {
                Some(MeetingEvent::Lost) | None => {
                    job.tell(event(SourceEvent::PeerLost { operation })).await;
                    if heard.is_none() {
                        return;
                    }
                }
                Some(MeetingEvent::Message(HandoverMessage::Failed { problem })) => {
                    job.tell(Fact::Problem(Box::new(problem))).await;
                    job.tell(event(SourceEvent::PeerLost { operation })).await;
                }
                Some(_) => {}
            },
        }
    }
}

/// The maps as they are told to the other agent.
#[must_use]
pub fn roots(stamps: &[VolumeStamp]) -> Vec<VolumeRoot> {
    let root = |stamp: &VolumeStamp| VolumeRoot {
        volume: stamp.volume,
        root: hex::encode(stamp.root),
        version: stamp.version,
    };
    stamps.iter().map(root).collect()
}

/// Begins the move. A guest whose disk has not answered for a moment is resumed first.
async fn begin(job: &Job, epoch: Epoch) -> Result<Cookie, JobError> {
    let live = job.host.backend.live_migration()?;
    let end = Instant::now() + STALL_BUDGET;
    loop {
        let error = match live.begin(job.guest).await {
            Ok(cookie) => return Ok(cookie),
            Err(error) => error,
        };
        let stalls = matches!(error, BackendError::WrongState { .. }) && resume_stalled(job, epoch).await?;
        if !stalls || Instant::now() >= end {
            return Err(error.into());
        }
        tokio::time::sleep(STALL_PAUSE).await;
    }
}

/// Resumes the guest if its disk did not answer for a moment: its volume's process is being started anew, and while a job is at
/// the guest nobody else resumes it. Whether it runs, or stands still for its disk alone.
async fn resume_stalled(job: &Job, epoch: Epoch) -> Result<bool, JobError> {
    match job.host.backend.status(job.guest).await?.map(|info| info.state) {
        Some(RunState::Running) => Ok(true),
        Some(RunState::Paused(PauseReason::DiskError)) => {
            if let Err(error) = job.host.backend.resume(job.guest, epoch).await {
                tracing::debug!(guest = %job.guest, error = crate::chain(&error), "the disk does not answer yet");
            }
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// A guest whose destination is ready for its stream.
pub(super) struct Ready {
    /// What the destination's hypervisor says to this one.
    pub cookie: Cookie,
    /// Where the hypervisor is to send to.
    pub stream: PathBuf,
    /// Carries the stream.
    pub bridge: AbortOnDropHandle<()>,
    takes_draining: bool,
    met_after: Duration,
    ahead_after: Duration,
    ready_after: Duration,
}

/// Meets the destination, and waits until it has the blocks and its hypervisor listens.
pub(super) async fn make_ready(job: &Job, epoch: Epoch, peer: &mut Peer, began: Instant) -> Result<Ready, JobError> {
    let (guest, operation) = (job.guest, job.operation);
    let connected = async {
        loop {
            match peer.events.recv().await.ok_or(JobError::Lost)? {
                MeetingEvent::Connected => return Ok(()),
                MeetingEvent::Message(HandoverMessage::Failed { problem }) => return Err(JobError::Peer(problem)),
                _ => {}
            }
        }
    };
    job.unless_cancelled(in_time("the destination", MEET_BUDGET, connected)).await?;
    let met_after = began.elapsed();
    // The guest runs on, and goes on running.
    job.unless_cancelled(copied_ahead(peer, || resume_stalled(job, epoch))).await?;
    let ahead_after = began.elapsed();
    let cookie = job.unless_cancelled(begin(job, epoch)).await?;
    peer.handle.say(HandoverMessage::Begin { operation, guest, epoch, cookie: encode(&cookie) }).await;
    let prepared = in_time("the destination's readiness", PREPARED_BUDGET, prepared(peer));
    let (cookie, takes_draining) = job.unless_cancelled(prepared).await?;
    let ready_after = began.elapsed();
    let stream = job.places.outgoing_stream();
    let qemu = job.host.qemu;
    let listener = socket::listen(&stream, qemu).map_err(file_error("listen at", &stream))?;
    let bridge = AbortOnDropHandle::new(tokio::spawn(carry_one(listener, qemu, peer.handle.clone(), stream.clone())));
    Ok(Ready { cookie, stream, bridge, takes_draining, met_after, ahead_after, ready_after })
}

/// Copies until the guest is paused here and everything is there; the moment at which its last vCPU stopped.
async fn depart(
    job: &Job,
    epoch: Epoch,
    volumes: &[VolumeHome],
    options: &MigrationOptions,
    released: &CancellationToken,
    peer: &mut Peer,
) -> Result<(Cookie, Instant, AbortOnDropHandle<()>), JobError> {
    let (guest, operation) = (job.guest, job.operation);
    let live = job.host.backend.live_migration()?;
    let began = Instant::now();
    let Ready { cookie, stream, bridge, takes_draining, met_after, ahead_after, ready_after } =
        make_ready(job, epoch, peer, began).await?;
    // So that sealing has little left to hash while the guest is paused. Only for speed: beside the copy, which is longer.
    let mut warming = warm(volumes);
    let deadline = options.deadline_ms.map(Duration::from_millis);
    let budget = deadline.map_or(COPY_BUDGET, |deadline| deadline.saturating_sub(began.elapsed()));
    let max_downtime_ms = options.max_downtime_ms.unwrap_or(MAX_DOWNTIME_MS);
    let copy = CopyOptions {
        bandwidth_bytes_per_s: options.bandwidth_bps.map(|bps| (bps / 8).max(1)),
        max_downtime_ms: Some(pause_for_pages_ms(max_downtime_ms)),
        auto_converge: options.auto_converge,
        budget,
        memory: match options.memory {
            api::MemoryMode::PreCopy => MemoryMode::PreCopy,
            api::MemoryMode::Hybrid => MemoryMode::Hybrid,
            api::MemoryMode::PostCopy => MemoryMode::PostCopy,
        },
        holds: options.holds && live.takes_holds(),
    };
    let holds = copy.holds;
    let mut transfer = live.perform(guest, cookie, stream, copy)?;
    let mut ticks = interval(PROGRESS_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failure = None;
    let (mut last, mut moved_at) = ((TransferPhase::Setup, 0, 0), Instant::now());
    let (mut is_drain_said, mut _allowing, mut _releasing) = (false, None, None);
    // From here on the copy's end is always awaited: who is dropped in the middle leaves libvirt's job running.
    let ended = loop {
        tokio::select! {
            ended = &mut transfer.done => break ended,
            () = job.cancel.cancelled(), if failure.is_none() => {
                failure = Some(JobError::Cancelled);
                cancel(job).await;
            }
            heard = peer.events.recv(), if failure.is_none() => {
                failure = match heard {
                    Some(MeetingEvent::Lost) | None => Some(JobError::Lost),
                    Some(MeetingEvent::Message(HandoverMessage::Failed { problem })) => Some(JobError::Peer(problem)),
                    Some(_) => None,
                };
                if failure.is_some() {
                    cancel(job).await;
                }
            }
            Ok(()) = transfer.progress.changed(), if !is_drain_said => {
                if transfer.progress.borrow_and_update().phase >= TransferPhase::Drain {
                    // The last pages are on their way; meanwhile both sides make ready what is asked of them next.
                    is_drain_said = true;
                    if takes_draining {
                        peer.handle.say(HandoverMessage::Draining).await;
                    }
                    warming = warm(volumes);
                }
            }
            () = released.cancelled(), if holds && _releasing.is_none() => {
                _releasing = Some(limit(job, CopyLimits { holds: Some(false), ..CopyLimits::default() }));
            }
            _ = ticks.tick() => {
                let told = *transfer.progress.borrow();
                job.show(progress(&told));
                if told.iteration > ROUNDS_FOR_LESS && _allowing.is_none() {
                    let longer = CopyLimits { max_downtime_ms: Some(max_downtime_ms), ..CopyLimits::default() };
                    _allowing = Some(limit(job, longer));
                }
                let mark = (told.phase, told.iteration, told.memory_processed_bytes);
                if mark != last {
                    (last, moved_at) = (mark, Instant::now());
                } else if moved_at.elapsed() > STILL_BUDGET && failure.is_none() {
                    failure = Some(JobError::Deadline("progress of the copy"));
                    cancel(job).await;
                }
            }
        }
    };
    // The seal does what is left of it.
    drop(warming);
    match (failure, ended) {
        // Paused here although somebody gave up: the controller's answer decides what becomes of it.
        (None, Ok(performed)) => {
            job.show(progress(&performed.progress));
            let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            tracing::info!(
                %guest, %operation, met_ms = ms(met_after), ahead_ms = ms(ahead_after), ready_ms = ms(ready_after), copied_ms = ms(began.elapsed()),
                paused_ms = ms(performed.paused_for), left_bytes = performed.left_bytes, "the guest's memory has gone over"
            );
            let paused_at = Instant::now().checked_sub(performed.paused_for).unwrap_or_else(Instant::now);
            Ok((performed.cookie, paused_at, bridge))
        }
        (Some(failure), _) => Err(failure),
        (None, Err(error)) => Err(error.into()),
    }
}

/// How long the last pages may take, so that the whole pause is what is aimed at; never less than a third of it.
fn pause_for_pages_ms(whole_ms: u64) -> u64 {
    whole_ms.saturating_sub(HAND_OVER_MS).max(whole_ms.div_ceil(3)).max(1)
}

/// Gives the copy that is under way other limits; beside it, whose end nothing may delay.
fn limit(job: &Job, limits: CopyLimits) -> AbortOnDropHandle<()> {
    let (host, guest) = (job.host.clone(), job.guest);
    AbortOnDropHandle::new(tokio::spawn(async move {
        let Ok(live) = host.backend.live_migration() else { return };
        while let Err(error) = live.set_limits(guest, limits).await {
            tracing::debug!(%guest, error = crate::chain(&error), "the copy's limits cannot be changed now");
            tokio::time::sleep(PROGRESS_EVERY).await;
        }
    }))
}

/// Has volumes make durable and hash what sealing them would have to while the guest stands still. Only for speed.
fn warm(volumes: &[VolumeHome]) -> AbortOnDropHandle<()> {
    let homes = volumes.to_vec();
    AbortOnDropHandle::new(tokio::spawn(async move {
        for home in homes {
            if let Err(error) = home.client().warm_digests().await {
                tracing::debug!(volume = %home.volume, %error, "digests were not computed ahead");
            }
        }
    }))
}

/// Asks the hypervisor to give up the copy or save of the guest that is under way.
pub async fn cancel(job: &Job) {
    let Ok(live) = job.host.backend.live_migration() else { return };
    if let Err(error) = live.cancel(job.guest).await {
        tracing::warn!(guest = %job.guest, %error, "the copy could not be cancelled");
    }
}

/// Waits until the destination has copied the blocks ahead, as long as it gets on; `look` is done now and then meanwhile.
async fn copied_ahead<L: Future<Output = Result<bool, JobError>>>(
    peer: &mut Peer,
    mut look: impl FnMut() -> L,
) -> Result<(), JobError> {
    let (mut most, mut until) = (0, Instant::now() + AHEAD_BUDGET);
    let mut looks = interval(PROGRESS_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let event = tokio::select! {
            event = peer.events.recv() => event.ok_or(JobError::Lost)?,
            () = tokio::time::sleep_until(until) => return Err(JobError::Deadline("the blocks that are copied ahead")),
            _ = looks.tick() => {
                look().await?;
                continue;
            }
        };
        match event {
            MeetingEvent::Message(HandoverMessage::CopiedAhead) => return Ok(()),
            MeetingEvent::Message(HandoverMessage::Preparing { bytes }) if bytes > most => {
                (most, until) = (bytes, Instant::now() + AHEAD_BUDGET);
            }
            MeetingEvent::Message(HandoverMessage::Failed { problem }) => return Err(JobError::Peer(problem)),
            MeetingEvent::Lost => return Err(JobError::Lost),
            _ => {}
        }
    }
}

/// Waits for the destination's hypervisor; also whether that agent can be told of the drain.
async fn prepared(peer: &mut Peer) -> Result<(Cookie, bool), JobError> {
    loop {
        match peer.events.recv().await.ok_or(JobError::Lost)? {
            MeetingEvent::Message(HandoverMessage::Prepared { cookie, takes_draining }) => {
                return Ok((decode(&cookie)?, takes_draining));
            }
            MeetingEvent::Message(HandoverMessage::Failed { problem }) => return Err(JobError::Peer(problem)),
            MeetingEvent::Lost => return Err(JobError::Lost),
            _ => {}
        }
    }
}

/// Takes the hypervisor's one connection and carries it to the other agent.
async fn carry_one(listener: UnixListener, qemu: Account, meeting: MeetingHandle, path: PathBuf) {
    let carried = async {
        let local = loop {
            let (local, _) = listener.accept().await?;
            if socket::is_peer_allowed(&local, qemu) {
                break local;
            }
            tracing::warn!("refused a user at the memory stream's socket");
        };
        let remote = meeting.open(Channel::Memory).await.map_err(std::io::Error::other)?;
        bridge::carry(local, remote).await
    };
    match carried.await {
        Ok((bytes, _)) => tracing::debug!(bytes, "the memory stream has ended"),
        Err(error) => tracing::info!(%error, "the memory stream broke"),
    }
    // The next copy makes its own.
    let _ = tokio::fs::remove_file(&path).await;
}

/// The hypervisor's figures as people see them.
#[must_use]
pub fn progress(told: &TransferProgress) -> Progress {
    let (eta_min_ms, eta_max_ms) =
        estimate_ms(told.memory_remaining_bytes, told.dirty_bytes_per_s, told.bandwidth_bytes_per_s);
    let message = match told.phase {
        TransferPhase::Setup => String::new(),
        TransferPhase::Copy if eta_max_ms.is_none() && told.iteration > 1 => {
            let slowed = match told.throttle_percent {
                0 => String::new(),
                percent => format!("; it is slowed by {percent} %"),
            };
            format!("the guest writes its memory faster than it can be copied{slowed}")
        }
        TransferPhase::Copy if told.is_holding => {
            "ready to change over; it waits for the other guests of its group".to_owned()
        }
        TransferPhase::Copy => format!("copying memory, round {}", told.iteration.max(1)),
        TransferPhase::Drain => "paused; the last pages are going".to_owned(),
        TransferPhase::Done => "all of its memory has gone over".to_owned(),
    };
    Progress {
        memory_total_bytes: told.memory_total_bytes,
        memory_sent_bytes: told.memory_processed_bytes,
        memory_remaining_bytes: told.memory_remaining_bytes,
        round: u32::try_from(told.iteration).unwrap_or(u32::MAX),
        dirty_bytes_per_s: told.dirty_bytes_per_s,
        bandwidth_bytes_per_s: told.bandwidth_bytes_per_s,
        is_holding: told.is_holding,
        eta_min_ms,
        eta_max_ms,
        message,
        ..Progress::default()
    }
}

/// The least and the most time until the switch. The least: nothing more is written. The most: what is written while the
/// rest goes has to go, too, and again what is written meanwhile (a geometric series), which only ends when the link is
/// faster than the guest writes.
fn estimate_ms(remaining: u64, dirty_per_s: u64, bandwidth_per_s: u64) -> (Option<u64>, Option<u64>) {
    let ms = |per_s: u64| remaining.saturating_mul(1000).checked_div(per_s);
    (ms(bandwidth_per_s), bandwidth_per_s.checked_sub(dirty_per_s).and_then(ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meeting() -> (mpsc::Sender<MeetingEvent>, Peer) {
        let (said, events) = mpsc::channel(8);
        (said, Peer { handle: MeetingHandle::of_nobody(), events })
    }

    #[tokio::test(start_paused = true)]
    async fn a_destination_may_copy_ahead_for_as_long_as_it_gets_on() {
        let (said, mut peer) = meeting();
        let waits = tokio::spawn(async move { copied_ahead(&mut peer, || std::future::ready(Ok(true))).await });
        for bytes in 1..100 {
            tokio::time::sleep(AHEAD_BUDGET - Duration::from_secs(1)).await;
            said.send(MeetingEvent::Message(HandoverMessage::Preparing { bytes })).await.unwrap();
        }
        said.send(MeetingEvent::Message(HandoverMessage::CopiedAhead)).await.unwrap();
        waits.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_destination_that_always_says_the_same_hangs() {
        let (said, mut peer) = meeting();
        let waits = tokio::spawn(async move { copied_ahead(&mut peer, || std::future::ready(Ok(true))).await });
        let begin = Instant::now();
        while !waits.is_finished() {
            let _ = said.send(MeetingEvent::Message(HandoverMessage::Preparing { bytes: 7 })).await;
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
        assert!(matches!(waits.await.unwrap(), Err(JobError::Deadline(_))));
        assert!(begin.elapsed() <= AHEAD_BUDGET + Duration::from_secs(10));
    }

    #[test]
    fn the_hand_over_has_its_share_of_the_pause() {
        for (whole, pages) in
            [(300, 150), (1000, 850), (150, 50), (100, 34), (1, 1), (0, 1), (u64::MAX, u64::MAX - 150)]
        {
            assert_eq!(pause_for_pages_ms(whole), pages, "of {whole}");
        }
    }

    #[test]
    fn the_estimate_is_a_range_that_ends_only_when_it_converges() {
        assert_eq!(estimate_ms(1000, 0, 100), (Some(10_000), Some(10_000)));
        assert_eq!(estimate_ms(1000, 50, 100), (Some(10_000), Some(20_000)));
        assert_eq!(estimate_ms(1000, 100, 100), (Some(10_000), None));
        assert_eq!(estimate_ms(1000, 200, 100), (Some(10_000), None));
        assert_eq!(estimate_ms(1000, 0, 0), (None, None));
        let told = TransferProgress {
            phase: TransferPhase::Copy,
            iteration: 3,
            memory_remaining_bytes: 10,
            dirty_bytes_per_s: 9,
            bandwidth_bytes_per_s: 8,
            throttle_percent: 40,
            ..TransferProgress::default()
        };
        assert!(progress(&told).message.contains("40 %"));
    }
}
