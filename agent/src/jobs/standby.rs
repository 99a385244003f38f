//! A mirror's standby: takes cut after cut, and waits for the order to go on from the last one.
//!
//! Only this agent has a cut committed, when the hypervisor and all volumes have it whole: to the volumes first, to the hypervisor
//! (which acknowledges it to the source) last. So whatever was acknowledged can be taken over, also by the agent that comes after this
//! one: it takes no more cuts, and finishes a commit that may have been under way.

use std::{path::Path, sync::Arc, time::Duration};

use supercloud_api::{Code, Problem, Progress, data::HandoverMessage};
use supercloud_blanket::mirror::{Mirroring, Standing};
use supercloud_handover::{DestinationPlan, VolumeStamp};
use supercloud_ids::GuestId;
use supercloud_storage::process::control::{FollowStatus, RoleStatus, VolumeStatus};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Fact, Job, JobError, in_time,
    receive::{BEGIN_BUDGET, MEET_BUDGET, Peer, await_ahead, begin, carry_in, conclude, encode, met},
};
use crate::{guest::record::CopyRecord, host::Host, plane::meeting::MeetingEvent, volumes::VolumeHome};

/// What is said of a standby that an agent before has left.
const LEFT: &str = "the standby's agent was restarted: it takes no more cuts. It can still take over from the last one when the source \
                    is lost; else end this mirror and begin a new mirror";
/// The pause before what failed at a standby is tried again.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// How long a restarted agent listens for the source before it may take that for dead: longer than two agents that are there take to
/// meet.
pub(super) const LISTEN_BUDGET: Duration = Duration::from_secs(20);

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
    let live = job.host.backend.live_migration()?;
    // Refused before anything is copied.
    job.host.backend.mirroring()?;
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
    let mut standby = Standby::of(job, &copy.volumes, Standing::Nothing)?;
    job.unless_cancelled(standby.receive(peer, Some(&listen), take_over)).await?;
    standby.promote(plan).await
}

/// Whether a standby that an agent before has left could go on from a cut: its process, and with it each volume. What does not answer
/// counts as if it could: it may be the last copy.
pub async fn could_go_on(host: &Host, guest: GuestId, copy: &CopyRecord) -> bool {
    let Ok(mirroring) = host.backend.mirroring() else { return false };
    let standing = match mirroring.standing(guest).await {
        Ok(standing) => standing,
        Err(error) => {
            tracing::warn!(%guest, error = crate::chain(&error), "a standby's process does not tell what it has");
            return true;
        }
    };
    for home in &copy.volumes {
        let status = async {
            host.runner.ensure(home).await?;
            home.client().status().await.map_err(|source| JobError::Volume { what: "answer", source })
        };
        match status.await {
            Ok(status) if has_cut(standing, &status) => {}
            Ok(_) => return false,
            Err(error) => {
                tracing::warn!(%guest, error = crate::chain(&error), "a standby's volume does not tell what it has");
            }
        }
    }
    standing != Standing::Nothing
}

/// Whether a volume has what its process has. Cuts are committed in volumes first; volumes are promoted last. Pure.
fn has_cut(standing: Standing, volume: &VolumeStatus) -> bool {
    let committed = volume.following.as_ref().map_or(0, |following| following.committed);
    match standing {
        Standing::Nothing => false,
        Standing::Committed(cut) => committed >= cut,
        Standing::Promoted => committed > 0 || is_promoted(volume),
    }
}

/// Whether a volume is as it was at just this cut.
fn is_at(cut: u64, volume: &VolumeStatus) -> bool {
    volume.following.as_ref().is_some_and(|following| following.committed == cut) || is_promoted(volume)
}

fn is_promoted(volume: &VolumeStatus) -> bool {
    matches!(volume.role, RoleStatus::Standby { is_adopted: true })
}

/// Goes on with a standby that an agent before has left: nothing more is received; it waits for the order to take over, or for its end.
pub async fn go_on(job: Job, plan: DestinationPlan, copy: CopyRecord, mut peer: Peer, take_over: Arc<Notify>) {
    let done = wait_on(&job, &plan, &copy, &mut peer, &take_over).await;
    conclude(&job, done).await;
}

async fn wait_on(
    job: &Job,
    plan: &DestinationPlan,
    copy: &CopyRecord,
    peer: &mut Peer,
    take_over: &Notify,
) -> Result<Vec<VolumeStamp>, JobError> {
    job.tell(Fact::Problem(Box::new(Problem::new(Code::WrongState, LEFT)))).await;
    let has = loop {
        match job.host.backend.mirroring()?.standing(job.guest).await {
            Ok(Standing::Nothing) => return Err(nothing_whole()),
            Ok(has) => break has,
            Err(error) => {
                tracing::warn!(guest = %job.guest, error = crate::chain(&error), "a standby does not tell what it has")
            }
        }
        tokio::select! {
            () = job.cancel.cancelled() => return Err(JobError::Cancelled),
            () = tokio::time::sleep(RETRY_PAUSE) => {}
        }
    };
    let mut standby = Standby::of(job, &copy.volumes, has)?;
    standby.is_left = true;
    job.unless_cancelled(standby.receive(peer, None, take_over)).await?;
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
    /// An agent before has left it.
    is_left: bool,
    job: &'a Job,
    mirroring: &'a dyn Mirroring,
    volumes: &'a [VolumeHome],
    staged: watch::Receiver<u64>,
    followed: Vec<Followed>,
    /// What was committed here, as far as this agent knows.
    has: Standing,
    /// Some parts may have committed this one.
    committing: Option<u64>,
}

impl<'a> Standby<'a> {
    fn of(job: &'a Job, volumes: &'a [VolumeHome], has: Standing) -> Result<Self, JobError> {
        let mirroring = job.host.backend.mirroring()?;
        Ok(Self {
            is_left: false,
            job,
            mirroring,
            volumes,
            staged: mirroring.staged(job.guest)?,
            followed: volumes.iter().map(|home| Followed::begin(home.clone())).collect(),
            has,
            committing: None,
        })
    }

    /// The newest cut that was committed.
    const fn committed(&self) -> u64 {
        match self.has {
            Standing::Nothing => 0,
            Standing::Committed(cut) => cut,
            // Nothing comes after it.
            Standing::Promoted => u64::MAX,
        }
    }

    /// Takes cuts until it is told to take over; without a place to `listen` at, there come none. A source that is silent is what it
    /// waits for.
    async fn receive(&mut self, peer: &mut Peer, listen: Option<&Path>, take_over: &Notify) -> Result<(), JobError> {
        let mut streams: JoinSet<std::io::Result<(u64, u64)>> = JoinSet::new();
        let mut looks = interval(RETRY_PAUSE);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut is_open, mut is_source_there, mut is_wanted) = (true, true, false);
        let mut listens_until = self.is_left.then(|| Instant::now() + LISTEN_BUDGET);
        loop {
            if listens_until.is_some_and(|until| Instant::now() >= until) {
                (listens_until, is_source_there) = (None, false);
            }
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
                    Some(MeetingEvent::Memory(stream)) => {
                        if let Some(listen) = listen {
                            streams.spawn(carry_in(self.job, *stream, listen));
                        }
                    }
                    Some(MeetingEvent::Connected) => {
                        (listens_until, is_source_there) = (None, true);
                        if self.is_left {
                            let detail = "the standby's agent was restarted: begin a new mirror";
                            let problem = Problem::new(Code::HostUnavailable, detail);
                            peer.handle.say(HandoverMessage::Failed { problem }).await;
                        }
                    }
                    Some(MeetingEvent::Lost | MeetingEvent::Message(HandoverMessage::StandsStill)) => is_source_there = false,
                    Some(MeetingEvent::Message(HandoverMessage::Failed { problem })) => {
                        // With a whole cut here the controller decides: the source may be dying. It is still heard: its guest runs.
                        if self.has == Standing::Nothing {
                            return Err(JobError::Peer(problem));
                        }
                        tracing::warn!(guest = %self.job.guest, %problem, "the source gives the mirror up");
                    }
                    Some(_) => {}
                    None => (is_open, is_source_there) = (false, false),
                },
                Some(ended) = streams.join_next() => {
                    tracing::info!(guest = %self.job.guest, ?ended, committed = self.committed(), "the mirror's stream has ended");
                }
                changed = self.staged.changed() => {
                    if changed.is_err() {
                        return Err(JobError::Protocol("the standby's process is gone".to_owned()));
                    }
                }
                () = any_volume => {}
                _ = looks.tick() => {
                    if is_wanted && is_source_there {
                        // It may not have been able to stop the guest, or not have heard.
                        peer.handle.say(HandoverMessage::TakesOver).await;
                    }
                    if self.is_left && !is_wanted {
                        self.job.show(Progress { message: LEFT.to_owned(), ..Progress::default() });
                    }
                }
            }
        }
    }

    fn next(&mut self) -> Option<u64> {
        let volumes: Vec<u64> = self.followed.iter().map(Followed::staged).collect();
        let hypervisor = *self.staged.borrow_and_update();
        next_commit(hypervisor, &volumes, self.committed())
    }

    /// The cut that the agent before may have been committing, by what all say now: it was staged everywhere before any part was asked to
    /// commit it, and what that agent asked for may be done any time. So it is committed, too, everywhere.
    async fn left(&mut self) -> Result<Option<u64>, JobError> {
        let statuses = self.statuses().await?;
        let standing = self.mirroring.standing(self.job.guest).await?;
        if !statuses.iter().all(|status| has_cut(standing, status)) {
            return Err(nothing_whole());
        }
        let staged: Vec<u64> =
            statuses.iter().map(|status| status.following.as_ref().map_or(0, |now| now.staged)).collect();
        let hypervisor = *self.staged.borrow_and_update();
        Ok(next_commit(hypervisor, &staged, self.committed()))
    }

    async fn statuses(&self) -> Result<Vec<VolumeStatus>, JobError> {
        let statuses = self.volumes.iter().map(|home| async move {
            let status = home.client().status().await;
            status.map_err(|source| JobError::Volume { what: "answer", source })
        });
        futures::future::try_join_all(statuses).await
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
        self.has = Standing::Committed(cut);
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
        let cut = match self.committing {
            None if self.is_left => self.left().await?,
            None => self.next(),
            cut => cut,
        };
        if let Some(cut) = cut {
            self.commit(cut).await?;
        }
        if self.has == Standing::Nothing {
            return Err(nothing_whole());
        }
        if let Standing::Committed(cut) = self.has
            && !self.statuses().await?.iter().all(|volume| is_at(cut, volume))
        {
            // Nobody gets here as cuts are committed; there is no way back after this.
            return Err(JobError::Protocol(format!(
                "its memory is that of cut {cut}, and a disk is that of another one"
            )));
        }
        let message = match self.has {
            Standing::Committed(cut) => format!("taking over from cut {cut}"),
            _ => "taking over from its last cut".to_owned(),
        };
        self.job.show(Progress { message, ..Progress::default() });
        let info = self.mirroring.promote(self.job.guest).await?;
        let promoted = self.volumes.iter().map(|home| async move {
            let sealed = home.client().promote(plan.from.epoch).await;
            let sealed = sealed.map_err(|source| JobError::Volume { what: "take over", source })?;
            Ok::<_, JobError>(VolumeStamp { volume: home.volume, root: sealed.root.0, version: sealed.version })
        });
        let stamps = futures::future::try_join_all(promoted).await?;
        tracing::info!(guest = %self.job.guest, has = ?self.has, ?info, "the standby takes over");
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
}
