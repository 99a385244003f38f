//! A second copy of a running guest: the source keeps it up to date, the standby takes cut after cut and waits.
//!
//! Only the standby's agent has a cut committed, when the hypervisor and all volumes have it whole: to the volumes first, to the
//! hypervisor (which acknowledges it to the source) last. So whatever was acknowledged can be taken over.

use std::{path::Path, time::Duration};

use supercloud_api::{Code, MirrorStanding, Problem, Progress, data::HandoverMessage, link::MirrorOptions};
use supercloud_blanket::{
    backend::{RunState, StopReason},
    mirror::{MirrorOptions as BackendOptions, MirrorProgress, Mirroring},
};
use supercloud_handover::{DestinationPlan, LocalEvent, SourceEvent, VolumeStamp};
use supercloud_storage::process::control::{FollowStatus, VolumeStatus};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Fact, Job, JobError, PROGRESS_EVERY,
    depart::{Wants, make_ready},
    in_time,
    receive::{BEGIN_BUDGET, MEET_BUDGET, Peer, await_ahead, begin, carry_in, encode, met},
};
use crate::{guest::record::CopyRecord, plane::meeting::MeetingEvent, volumes::VolumeHome};

/// A mirror whose standby acknowledges nothing for so long (or for this many intervals, where that is longer) is given up.
const SILENT_BUDGET: Duration = Duration::from_secs(30);
const SILENT_INTERVALS: u32 = 10;
/// A first copy that moves nothing for so long is given up.
const FIRST_COPY_BUDGET: Duration = Duration::from_secs(60);
/// How often it is asked, at a pause of [`PROGRESS_EVERY`], why a process has ended.
const REASON_LOOKS: u32 = 8;
/// The pause before what failed at a standby is tried again.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// The source's part: until it is ended, or broken.
pub async fn keep(job: Job, wants: Wants, options: MirrorOptions) {
    let operation = job.operation;
    let mut peer = wants.peer;
    let error = match keep_up(&job, wants.epoch, &wants.volumes, options, &mut peer).await {
        // Nobody but this agent ends it, and then this job, too.
        Ok(()) => JobError::Lost,
        Err(JobError::Cancelled) => return,
        Err(error) => error,
    };
    tracing::warn!(guest = %job.guest, %operation, error = crate::chain(&error), "the guest is not mirrored any more");
    let is_gone = is_gone(&job).await;
    let event = if is_gone { SourceEvent::GuestGone } else { SourceEvent::CopyFailed { operation } };
    if is_gone {
        peer.handle.say(HandoverMessage::StandsStill).await;
    } else if !matches!(error, JobError::Peer(_) | JobError::Lost) {
        peer.handle.say(HandoverMessage::Failed { problem: error.problem() }).await;
    }
    job.tell(Fact::Problem(Box::new(error.problem()))).await;
    job.tell(Fact::Event(LocalEvent::Source(event))).await;
}

/// Whether the guest's process is gone against its will: then it lives on in its standby. One that switched itself off does not want
/// to; why it ended may be known a moment later than that it did.
async fn is_gone(job: &Job) -> bool {
    let backend = &job.host.backend;
    for _ in 0..REASON_LOOKS {
        match backend.status(job.guest).await {
            Ok(None) => {}
            Ok(Some(info)) => return info.state == RunState::Crashed,
            Err(_) => return false,
        }
        if let Ok(Some(reason)) = backend.how_it_ended(job.guest).await {
            return reason != StopReason::PoweredOff;
        }
        tokio::time::sleep(PROGRESS_EVERY).await;
    }
    true
}

async fn keep_up(
    job: &Job,
    epoch: supercloud_ids::Epoch,
    volumes: &[VolumeHome],
    options: MirrorOptions,
    peer: &mut Peer,
) -> Result<(), JobError> {
    let mirroring = job.host.backend.mirroring()?;
    // What an earlier mirror may have left would be taken for this one's cuts.
    end_cuts(volumes).await;
    let ready = make_ready(job, epoch, peer, Instant::now()).await?;
    let interval_between = Duration::from_millis(options.interval_ms);
    let wanted = BackendOptions {
        interval: interval_between,
        is_strict: options.is_strict,
        bandwidth_bytes_per_s: options.bandwidth_bps.map(|bps| (bps / 8).max(1)),
    };
    let _bridge = ready.bridge;
    let mut run = mirroring.mirror(job.guest, ready.cookie, ready.stream, wanted)?;
    let silent = SILENT_BUDGET.max(interval_between.saturating_mul(SILENT_INTERVALS));
    let mut pace = Pace { seen: MirrorProgress::default(), moved_at: Instant::now() };
    let mut ticks = interval(PROGRESS_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            ended = &mut run.done => return Ok(ended?),
            () = job.cancel.cancelled() => return Err(JobError::Cancelled),
            heard = peer.events.recv() => match heard {
                Some(MeetingEvent::Lost) | None => return Err(JobError::Lost),
                Some(MeetingEvent::Message(HandoverMessage::Failed { problem })) => return Err(JobError::Peer(problem)),
                Some(MeetingEvent::Message(HandoverMessage::TakesOver)) => {
                    match job.host.backend.pause(job.guest).await {
                        Ok(()) => {
                            tracing::warn!(guest = %job.guest, "the standby takes over; the guest stands still here");
                            peer.handle.say(HandoverMessage::StandsStill).await;
                            // What becomes of it the controller says: it is asked every second.
                            job.cancel.cancelled().await;
                            return Err(JobError::Cancelled);
                        }
                        // The standby says so again.
                        Err(error) => {
                            tracing::error!(guest = %job.guest, error = crate::chain(&error), "the guest cannot be stopped");
                        }
                    }
                }
                Some(_) => {}
            },
            _ = ticks.tick() => {
                let now = run.progress.borrow().clone();
                if let Some(why) = &now.is_broken {
                    return Err(JobError::Protocol(format!("the mirror broke: {why}")));
                }
                job.show(shown(&now));
                if pace.stands_still(now, silent) {
                    return Err(JobError::Deadline("the standby's acknowledgement"));
                }
            }
        }
    }
}

/// When a mirror last got on.
struct Pace {
    seen: MirrorProgress,
    moved_at: Instant,
}

impl Pace {
    /// Whether it has stood still for too long.
    fn stands_still(&mut self, now: MirrorProgress, silent: Duration) -> bool {
        let has_moved = match now.committed {
            0 => (now.sent_bytes, now.cut) != (self.seen.sent_bytes, self.seen.cut),
            committed => committed != self.seen.committed,
        };
        if has_moved {
            self.moved_at = Instant::now();
        }
        let budget = if now.committed == 0 { FIRST_COPY_BUDGET.max(silent) } else { silent };
        self.seen = now;
        self.moved_at.elapsed() > budget
    }
}

fn shown(now: &MirrorProgress) -> Progress {
    let message = match now.committed {
        0 if now.cut == 0 => "the first copy of its memory is being made".to_owned(),
        0 => "the first cut is on its way to the standby".to_owned(),
        committed => format!(
            "the standby has cut {committed}, which is {} ms old; the guest stood still for {} ms",
            now.committed_age_ms, now.pause_ms
        ),
    };
    Progress {
        memory_total_bytes: now.memory_total_bytes,
        memory_sent_bytes: now.sent_bytes,
        memory_remaining_bytes: now.memory_remaining_bytes,
        mirror: Some(MirrorStanding {
            cut: now.cut,
            committed: now.committed,
            committed_age_ms: now.committed_age_ms,
            pause_ms: now.pause_ms,
            dirty_bytes: now.dirty_bytes_last_cut,
        }),
        message,
        ..Progress::default()
    }
}

/// Has volumes forget a mirror's cuts. Best effort: what is kept of the last one costs only disk.
pub async fn end_cuts(volumes: &[VolumeHome]) {
    for home in volumes {
        if let Err(error) = home.client().end_cuts().await {
            tracing::debug!(volume = %home.volume, error = crate::chain(&error), "a volume keeps its last cut");
        }
    }
}

/// The standby's part: takes cuts until it is told to take over; then makes the last one whole.
///
/// # Errors
/// When the mirror has come to an end, or there is no cut to take over.
pub(super) async fn stand_by(
    job: &Job,
    plan: &DestinationPlan,
    copy: &CopyRecord,
    peer: &mut Peer,
    bandwidth_bytes_per_s: Option<u64>,
    take_over: &Notify,
) -> Result<Vec<VolumeStamp>, JobError> {
    let (live, mirroring) = (job.host.backend.live_migration()?, job.host.backend.mirroring()?);
    let ahead = async {
        in_time("the source", MEET_BUDGET, met(peer)).await?;
        follow(job, copy, bandwidth_bytes_per_s, peer).await?;
        peer.handle.say(HandoverMessage::CopiedAhead).await;
        in_time("the source's beginning", BEGIN_BUDGET, begin(job, plan, peer)).await
    };
    let cookie = tokio::select! {
        cookie = job.unless_cancelled(ahead) => cookie?,
        () = take_over.notified() => return Err(nothing_whole()),
    };
    let listen = job.places.incoming_stream();
    let _ = tokio::fs::remove_file(&listen).await;
    // Awaited whatever becomes of the job: half started it would be left.
    let cookie = live.prepare(copy.launch.clone(), cookie, listen.clone()).await?;
    peer.handle.say(HandoverMessage::Prepared { cookie: encode(&cookie), takes_draining: false }).await;
    let mut standby = Standby {
        job,
        mirroring,
        volumes: &copy.volumes,
        staged: mirroring.staged(job.guest)?,
        followed: copy.volumes.iter().map(|home| Followed::begin(home.clone())).collect(),
        committed: 0,
        committing: None,
    };
    job.unless_cancelled(standby.receive(peer, &listen, take_over)).await?;
    standby.promote(plan).await
}

fn nothing_whole() -> JobError {
    let detail = "the standby has no whole copy of the guest yet; it starts again from its volumes";
    JobError::Refused(Problem::new(Code::WrongState, detail))
}

/// Has the volumes follow the source's, and waits until they have what it has now, or get no further.
async fn follow(
    job: &Job,
    copy: &CopyRecord,
    bandwidth_bytes_per_s: Option<u64>,
    peer: &mut Peer,
) -> Result<(), JobError> {
    for home in &copy.volumes {
        let followed = home.client().follow(bandwidth_bytes_per_s).await;
        followed.map_err(|source| JobError::Volume { what: "follow the source's", source })?;
    }
    let clients: Vec<_> = copy.volumes.iter().map(VolumeHome::client).collect();
    let has_passed = |status: &VolumeStatus| status.following.as_ref().is_some_and(|following| following.passes >= 1);
    await_ahead(job, copy, peer, &clients, "copying the disk to the standby", has_passed).await
}

/// Asks a volume process for its newest staged cut, again and again.
struct Followed {
    newest: watch::Receiver<Result<FollowStatus, String>>,
    _task: AbortOnDropHandle<()>,
}

impl Followed {
    fn begin(home: VolumeHome) -> Self {
        let (told, newest) = watch::channel(Ok(FollowStatus::default()));
        let task = tokio::spawn(async move {
            let mut after = 0;
            loop {
                match home.client().await_staged(after).await {
                    Ok(status) => {
                        after = after.max(status.staged);
                        let trouble = told.borrow().as_ref().ok().and_then(|had| had.trouble.clone());
                        if let Some(why) = status.trouble.as_ref().filter(|now| Some(*now) != trouble.as_ref()) {
                            tracing::warn!(volume = %home.volume, why, "a volume cannot follow its source");
                        }
                        let changed = |had: &mut Result<FollowStatus, String>| {
                            let is_new = had.as_ref().ok() != Some(&status);
                            *had = Ok(status.clone());
                            is_new
                        };
                        told.send_if_modified(changed);
                    }
                    Err(error) => {
                        let why = crate::chain(&error);
                        told.send_if_modified(|had| had.is_ok() && std::mem::replace(had, Err(why)).is_ok());
                        tokio::time::sleep(RETRY_PAUSE).await;
                    }
                }
            }
        });
        Self { newest, _task: AbortOnDropHandle::new(task) }
    }

    /// The newest staged cut; 0 while it does not answer.
    fn staged(&self) -> u64 {
        self.newest.borrow().as_ref().map_or(0, |status| status.staged)
    }
}

/// The next cut to commit: the newest that the hypervisor has staged, if all volumes have it, too. Pure.
fn next_commit(hypervisor: u64, volumes: &[u64], committed: u64) -> Option<u64> {
    (hypervisor > committed && volumes.iter().all(|staged| *staged >= hypervisor)).then_some(hypervisor)
}

struct Standby<'a> {
    job: &'a Job,
    mirroring: &'a dyn Mirroring,
    volumes: &'a [VolumeHome],
    staged: watch::Receiver<u64>,
    followed: Vec<Followed>,
    committed: u64,
    /// Some parts may have committed this one.
    committing: Option<u64>,
}

impl Standby<'_> {
    /// Takes cuts until it is told to take over. A source that is silent is what it waits for.
    async fn receive(&mut self, peer: &mut Peer, listen: &Path, take_over: &Notify) -> Result<(), JobError> {
        let mut streams: JoinSet<std::io::Result<(u64, u64)>> = JoinSet::new();
        let mut looks = interval(RETRY_PAUSE);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut is_open, mut is_source_there, mut is_wanted) = (true, true, false);
        loop {
            if is_wanted && !is_source_there {
                return Ok(());
            }
            if let Some(cut) = self.next() {
                self.try_commit(cut).await;
            }
            let changes: Vec<_> = self.followed.iter_mut().map(|one| Box::pin(one.newest.changed())).collect();
            let any_volume = async {
                match changes.is_empty() {
                    true => std::future::pending().await,
                    false => drop(futures::future::select_all(changes).await),
                }
            };
            tokio::select! {
                () = take_over.notified() => {
                    is_wanted = true;
                    if is_source_there {
                        // Declared dead, and alive: cut off from the controller only. Two must not run.
                        tracing::warn!(guest = %self.job.guest, "told to take over, and the source is still heard");
                        peer.handle.say(HandoverMessage::TakesOver).await;
                        let message = "its source is still heard; it waits until that has stopped the guest, or is silent";
                        self.job.show(Progress { message: message.to_owned(), ..Progress::default() });
                    }
                }
                event = peer.events.recv(), if is_open => match event {
                    Some(MeetingEvent::Memory(stream)) => drop(streams.spawn(carry_in(self.job, *stream, listen))),
                    Some(MeetingEvent::Connected) => is_source_there = true,
                    Some(MeetingEvent::Lost | MeetingEvent::Message(HandoverMessage::StandsStill)) => is_source_there = false,
                    Some(MeetingEvent::Message(HandoverMessage::Failed { problem })) => {
                        // With a whole cut here the controller decides: the source may be dying.
                        is_source_there = false;
                        if self.committed == 0 {
                            return Err(JobError::Peer(problem));
                        }
                        tracing::warn!(guest = %self.job.guest, %problem, "the source gives the mirror up");
                    }
                    Some(_) => {}
                    None => (is_open, is_source_there) = (false, false),
                },
                Some(ended) = streams.join_next() => {
                    tracing::info!(guest = %self.job.guest, ?ended, committed = self.committed, "the mirror's stream has ended");
                }
                changed = self.staged.changed() => {
                    if changed.is_err() {
                        return Err(JobError::Protocol("the standby's process is gone".to_owned()));
                    }
                }
                () = any_volume => {}
                _ = looks.tick() => {}
            }
        }
    }

    fn next(&mut self) -> Option<u64> {
        let volumes: Vec<u64> = self.followed.iter().map(Followed::staged).collect();
        let hypervisor = *self.staged.borrow_and_update();
        next_commit(hypervisor, &volumes, self.committed)
    }

    /// Commits a cut, or leaves it for the next attempt.
    async fn try_commit(&mut self, cut: u64) {
        if let Err(error) = self.commit(cut).await {
            tracing::warn!(guest = %self.job.guest, cut, error = crate::chain(&error), "a cut is not committed yet");
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    async fn commit(&mut self, cut: u64) -> Result<(), JobError> {
        self.committing = Some(cut);
        let commits = self.volumes.iter().map(|home| async move {
            let committed = home.client().commit_cut(cut).await;
            committed.map_err(|source| JobError::Volume { what: "commit a cut", source })
        });
        futures::future::try_join_all(commits).await?;
        self.mirroring.commit(self.job.guest, cut).await?;
        self.committed = cut;
        self.committing = None;
        Ok(())
    }

    /// Makes of the last cut a guest and volumes that can go on; tried until somebody gives it up, because it is all there is.
    async fn promote(&mut self, plan: &DestinationPlan) -> Result<Vec<VolumeStamp>, JobError> {
        loop {
            let error = match self.try_promote(plan).await {
                Ok(stamps) => return Ok(stamps),
                Err(error @ JobError::Refused(_)) => return Err(error),
                Err(error) => error,
            };
            let why = crate::chain(&error);
            tracing::warn!(guest = %self.job.guest, error = why, "the last cut is not whole yet");
            self.job.show(Progress { message: format!("it cannot take over yet: {why}"), ..Progress::default() });
            tokio::select! {
                () = self.job.cancel.cancelled() => return Err(JobError::Cancelled),
                () = tokio::time::sleep(RETRY_PAUSE) => {}
            }
        }
    }

    async fn try_promote(&mut self, plan: &DestinationPlan) -> Result<Vec<VolumeStamp>, JobError> {
        // What is whole everywhere and was not taken yet, too.
        if let Some(cut) = self.committing.or_else(|| self.next()) {
            self.commit(cut).await?;
        }
        if self.committed == 0 {
            return Err(nothing_whole());
        }
        self.job.show(Progress { message: format!("taking over from cut {}", self.committed), ..Progress::default() });
        let info = self.mirroring.promote(self.job.guest).await?;
        let promoted = self.volumes.iter().map(|home| async move {
            let sealed = home.client().promote(plan.from.epoch).await;
            let sealed = sealed.map_err(|source| JobError::Volume { what: "take over", source })?;
            Ok::<_, JobError>(VolumeStamp { volume: home.volume, root: sealed.root.0, version: sealed.version })
        });
        let stamps = futures::future::try_join_all(promoted).await?;
        tracing::info!(guest = %self.job.guest, cut = self.committed, ?info, "the standby takes over");
        Ok(stamps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_is_committed_when_everybody_has_it_and_once() {
        assert_eq!(next_commit(0, &[0], 0), None);
        assert_eq!(next_commit(1, &[0], 0), None);
        assert_eq!(next_commit(1, &[1, 0], 0), None);
        assert_eq!(next_commit(1, &[1, 1], 0), Some(1));
        assert_eq!(next_commit(1, &[1, 1], 1), None);
        // Volumes may be a cut ahead; a hypervisor's cut that is passed cannot come again.
        assert_eq!(next_commit(2, &[3, 2], 1), Some(2));
        assert_eq!(next_commit(3, &[2], 1), None);
        assert_eq!(next_commit(7, &[], 6), Some(7));
    }

    #[tokio::test(start_paused = true)]
    async fn a_standby_that_acknowledges_nothing_is_given_up_and_a_slow_one_is_not() {
        let mut pace = Pace { seen: MirrorProgress::default(), moved_at: Instant::now() };
        for committed in 1..50 {
            tokio::time::sleep(SILENT_BUDGET - Duration::from_secs(1)).await;
            let now = MirrorProgress { committed, cut: committed, ..MirrorProgress::default() };
            assert!(!pace.stands_still(now, SILENT_BUDGET));
        }
        tokio::time::sleep(SILENT_BUDGET + Duration::from_secs(1)).await;
        // Cuts that are begun are no acknowledgement.
        let now = MirrorProgress { committed: 49, cut: 50, sent_bytes: 7, ..MirrorProgress::default() };
        assert!(pace.stands_still(now, SILENT_BUDGET));
    }
}
