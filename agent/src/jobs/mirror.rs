//! A second copy of a running guest: the source keeps it up to date, cut after cut. Its standby is [`super::standby`].

use std::time::Duration;

use supercloud_api::{Code, MirrorStanding, Problem, Progress, data::HandoverMessage, link::MirrorOptions};
use supercloud_blanket::{
    BackendError,
    backend::{RunState, StopReason},
    mirror::{MirrorOptions as BackendOptions, MirrorProgress},
};
use supercloud_handover::{LocalEvent, SourceEvent};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{
    Fact, Job, JobError, PROGRESS_EVERY,
    depart::{Wants, make_ready},
    lease::Held,
    receive::Peer,
};
use crate::{plane::meeting::MeetingEvent, volumes::VolumeHome};

/// A mirror whose standby acknowledges nothing for so long (or for this many intervals, where that is longer) is given up.
const SILENT_BUDGET: Duration = Duration::from_secs(30);
const SILENT_INTERVALS: u32 = 10;
/// A first copy that moves nothing for so long is given up.
const FIRST_COPY_BUDGET: Duration = Duration::from_secs(60);
/// A first lease that is not granted for so long, or that the guest's process does not take, is not waited for.
const LEASE_BUDGET: Duration = Duration::from_secs(30);
/// How often it is asked, at a pause of [`PROGRESS_EVERY`], why a process has ended.
const REASON_LOOKS: u32 = 8;

/// The source's part: until it is ended, or broken.
pub async fn keep(job: Job, wants: Wants, options: MirrorOptions) {
    let operation = job.operation;
    let mut peer = wants.peer;
    let lease = wants.lease.as_ref();
    let error = match keep_up(&job, wants.epoch, &wants.volumes, (options, lease), &mut peer).await {
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
    let problem = match &error {
        JobError::Lost => {
            let detail = "the connection with the standby broke; the guest runs on without a mirror: begin a new one";
            Problem::new(Code::HostUnavailable, detail)
        }
        error => error.problem(),
    };
    job.tell(Fact::Problem(Box::new(problem))).await;
    job.tell(Fact::Event(LocalEvent::Source(event))).await;
    // Where the controller cannot be reached, the standby may still be told to take over.
    loop {
        tokio::select! {
            () = job.cancel.cancelled() => return,
            event = peer.events.recv() => match event {
                Some(MeetingEvent::Message(HandoverMessage::TakesOver)) => drop(stand_still(&job, &peer).await),
                Some(_) => {}
                None => return,
            },
        }
    }
}

/// The standby takes over: the guest must not run here any more. What becomes of it the controller says: it is asked every second.
async fn stand_still(job: &Job, peer: &Peer) -> bool {
    match job.host.backend.pause(job.guest).await {
        Ok(()) | Err(BackendError::NoSuchGuest { .. }) => {
            tracing::warn!(guest = %job.guest, "the standby takes over; the guest stands still here");
            peer.handle.say(HandoverMessage::StandsStill).await;
            true
        }
        // The standby says so again.
        Err(error) => {
            tracing::error!(guest = %job.guest, error = crate::chain(&error), "the guest cannot be stopped");
            false
        }
    }
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
    (options, lease): (MirrorOptions, Option<&Held>),
    peer: &mut Peer,
) -> Result<(), JobError> {
    let mirroring = job.host.backend.mirroring()?;
    if let Some(lease) = lease {
        // Before there is anything that could take over.
        let obeys = async { lease.clone().wait_for(Option::is_some).await.is_ok() };
        tokio::select! {
            () = job.cancel.cancelled() => return Err(JobError::Cancelled),
            obeys = tokio::time::timeout(LEASE_BUDGET, obeys) => if !obeys.unwrap_or(false) {
                return Err(JobError::Deadline("the controller's lease"));
            },
        }
    }
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
                    if stand_still(job, peer).await {
                        job.cancel.cancelled().await;
                        return Err(JobError::Cancelled);
                    }
                }
                Some(_) => {}
            },
            _ = ticks.tick() => {
                let now = run.progress.borrow().clone();
                if let Some(why) = &now.is_broken {
                    return Err(JobError::Protocol(format!("the mirror broke: {why}")));
                }
                job.show(shown(&now, lease.is_some()));
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

fn shown(now: &MirrorProgress, is_leased: bool) -> Progress {
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
            is_leased,
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

#[cfg(test)]
mod tests {
    use super::*;

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
