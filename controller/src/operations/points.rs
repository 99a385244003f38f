//! Points of volumes' histories: asked of the host that holds the volume when they are due, recorded when it has brought the
//! content into its cloud's store. The rules (clock, chain, thinning) are pure and in [`supercloud_api::history`].
//!
//! Why a sweep takes nothing of a point on its way: from the asking until the record is written it counts as a writer
//! ([`PointBoard::oldest_ms`]); after that its root lives.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use supercloud_api::{
    Freeze, PointMemory, Problem, Volume, VolumeHistory,
    handover::OperationKind,
    history::Taken,
    ids::{GuestId, HostId, ProjectId, RequestId, VolumeId},
    link::{Answer, CheckpointContent, Directive, PointContent, PointTaken},
    unix_ms,
};
use supercloud_storage::key::ContentRoot;
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{Engine, EngineError, handler::internal};
use crate::{
    chain,
    state::{Change, Context, EventDraft, GuestRecord, HostRecord, LiveHosts, Stored, retry_conflicts},
};

/// Points that are asked for or under way at once.
const ASKED_AT_MOST: usize = 1000;
/// A host that has not answered by then is not listened to: its point holds up sweeps until then.
const PATIENCE: Duration = Duration::from_secs(3600);
/// After one that failed the next is tried so soon, or when it is due if that is sooner.
const RETRY: Duration = Duration::from_secs(300);
/// What a checkpoint may have beside the guest's memory, in bytes.
const MEMORY_EXTRA_BYTES: u64 = 64 << 20;
/// The longest name of a format, in bytes.
const FORMAT_AT_MOST: usize = 64;
/// The longest problem that is kept, in characters.
const PROBLEM_AT_MOST: usize = 500;

/// A point that a host is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// The host.
    pub host: HostId,
    /// Whose volume.
    pub guest: GuestId,
    /// Its project.
    pub project: ProjectId,
    /// When; the moment of the point is not before.
    pub at: Instant,
    /// With the guest's memory: a checkpoint.
    pub memory: bool,
}

#[derive(Debug, Default)]
struct Board {
    capable: HashSet<HostId>,
    new: BTreeMap<VolumeId, Asked>,
    /// Passed on: what is not in here is no answer.
    under_way: BTreeMap<VolumeId, Asked>,
    /// Of them, those whose host has come anew since: it may have forgotten them, or answer yet.
    doubtful: HashSet<VolumeId>,
    /// When the next one of a volume is due; not there: by its history.
    due: HashMap<VolumeId, Instant>,
}

impl Asked {
    /// Whether an answer to it still counts.
    fn is_heard(&self) -> bool {
        self.at.elapsed() < PATIENCE
    }
}

impl Board {
    /// When the point of a volume was asked for that is to be taken or under way; one that is doubtful may be asked for again.
    fn since(&self, volume: VolumeId) -> Option<Instant> {
        let under_way = self.under_way.get(&volume).filter(|_| !self.doubtful.contains(&volume));
        self.new.get(&volume).or(under_way).filter(|asked| asked.is_heard()).map(|asked| asked.at)
    }
}

/// Where points are asked for. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct PointBoard(Arc<(Mutex<Board>, Notify)>);

impl PointBoard {
    fn with<T>(&self, work: impl FnOnce(&mut Board) -> T) -> T {
        work(&mut self.0.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A point of a volume is to be taken by its host; false when too many are. One that is under way is not asked for again, unless
    /// its host has come anew since; then the moment of the first question stays, as the answer may be to that one.
    #[must_use]
    pub fn ask(&self, volume: VolumeId, asked: Asked) -> bool {
        let is_taken = self.with(|board| {
            let Board { under_way, doubtful, .. } = &mut *board;
            under_way.retain(|_, asked| asked.is_heard());
            doubtful.retain(|volume| under_way.contains_key(volume));
            if board.since(volume).is_some() {
                return true;
            }
            let before = board.under_way.get(&volume);
            let before = before.filter(|before| (before.host, before.guest) == (asked.host, asked.guest));
            let at = before.map_or(asked.at, |before| before.at);
            let has_room = board.new.len() + board.under_way.len() < ASKED_AT_MOST;
            if has_room {
                board.new.insert(volume, Asked { at, ..asked });
            }
            has_room
        });
        self.0.1.notify_one();
        is_taken
    }

    /// How long a point of a volume has been asked for or under way.
    #[must_use]
    pub fn since(&self, volume: VolumeId) -> Option<Duration> {
        self.with(|board| board.since(volume)).map(|at| at.elapsed())
    }

    /// Whether a host takes points.
    #[must_use]
    pub fn takes(&self, host: HostId) -> bool {
        self.with(|board| board.capable.contains(&host))
    }

    /// The volume's policy has changed: when its next point is due follows from its history again.
    pub fn reconsider(&self, volume: VolumeId) {
        self.with(|board| board.due.remove(&volume));
    }

    /// What a host said of itself when it came. It may have forgotten what it was asked before, so that is asked again soon; when it
    /// has not (only the connection was lost), its answer still counts.
    pub(crate) fn note_capable(&self, host: HostId, is_capable: bool) {
        self.with(|board| {
            board.under_way.retain(|_, asked| is_capable || asked.host != host);
            let Board { under_way, doubtful, due, .. } = &mut *board;
            for (volume, _) in under_way.iter().filter(|(_, asked)| asked.host == host) {
                doubtful.insert(*volume);
                if let Some(due) = due.get_mut(volume) {
                    *due = (*due).min(Instant::now() + RETRY);
                }
            }
            if is_capable {
                board.capable.insert(host)
            } else {
                board.capable.remove(&host)
            };
        });
    }

    /// How long the oldest point of a project has been on its way, in milliseconds.
    pub(super) fn oldest_ms(&self, project: ProjectId) -> Option<u64> {
        self.with(|board| {
            let all = board.new.values().chain(board.under_way.values());
            all.filter(|asked| asked.project == project && asked.is_heard())
                .map(|asked| millis(asked.at.elapsed()))
                .max()
        })
    }

    fn under_way(&self, volume: VolumeId, host: HostId, guest: GuestId) -> Option<Asked> {
        self.with(|board| board.under_way.get(&volume).copied())
            .filter(|asked| asked.host == host && asked.guest == guest && asked.is_heard())
    }

    /// It is over; a failed one is tried again soon.
    fn end(&self, volume: VolumeId, is_kept: bool) {
        self.with(|board| {
            board.under_way.remove(&volume);
            board.doubtful.remove(&volume);
            if !is_kept && let Some(due) = board.due.get_mut(&volume) {
                *due = (*due).min(Instant::now() + RETRY);
            }
        });
    }

    fn is_due(&self, history: &VolumeHistory) -> bool {
        let Some(every_s) = history.policy.every_s else { return false };
        match self.with(|board| board.due.get(&history.volume).copied()) {
            Some(due) => due <= Instant::now(),
            // The first one since this controller's start. A clock that went back makes none wait.
            None => {
                let last_ms = history.points.last().map_or(0, |last| last.at_ms);
                let now_ms = unix_ms();
                now_ms < last_ms || now_ms - last_ms >= every_s.saturating_mul(1000)
            }
        }
    }

    fn set_due(&self, volume: VolumeId, every_s: Option<u64>) {
        let every = Duration::from_secs(every_s.unwrap_or(0));
        self.with(|board| board.due.insert(volume, Instant::now() + every));
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Engine {
    /// Asks for points that are due, and passes on those that are asked for, until cancelled.
    pub(super) async fn take_points(&self, cancel: CancellationToken) {
        let mut ticks = tokio::time::interval(self.pace.look);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                () = self.points.0.1.notified() => {}
                _ = ticks.tick() => if let Err(error) = self.look_at_histories().await {
                    warn!("points of volumes are not looked at: {}", chain(&error));
                }
            }
            for (volume, asked) in self.points.with(|board| std::mem::take(&mut board.new)) {
                self.points.with(|board| {
                    board.doubtful.remove(&volume);
                    board.under_way.insert(volume, asked);
                });
                if !self
                    .sessions
                    .send(asked.host, Directive::TakePoint { guest: asked.guest, volume, memory: asked.memory })
                {
                    self.points.end(volume, false);
                }
            }
        }
    }

    async fn look_at_histories(&self) -> Result<(), EngineError> {
        for history in self.state.list::<VolumeHistory>().await? {
            let Some(volume) = self.state.read::<Volume>(&history.volume).await? else { continue };
            if volume.base != history.seen_base {
                self.keep_freeze(&history, &volume).await?;
            }
            if !self.points.is_due(&history) {
                continue;
            }
            let mut asked = self.askable(&volume, history.policy.memory.is_some()).await?;
            if asked.is_err() {
                // Rather a point of the disk than none.
                asked = self.askable(&volume, false).await?;
            }
            // Who cannot be asked now is asked as soon as that can be.
            if let Ok(asked) = asked
                && self.points.ask(volume.id, asked)
            {
                self.points.set_due(volume.id, history.policy.every_s);
            }
        }
        Ok(())
    }

    /// Who is to be asked for a point of a volume; in words why nobody can be.
    async fn askable(&self, volume: &Volume, memory: bool) -> Result<Result<Asked, String>, EngineError> {
        askable(&self.state, &self.points, &self.live, volume, memory, |host| self.sessions.is_open(host)).await
    }

    /// A host has taken a point, or not.
    pub(super) async fn point_taken(&self, host: HostId, taken: PointTaken) -> Result<Answer, Problem> {
        let Some(asked) = self.points.under_way(taken.volume, host, taken.guest) else { return Ok(Answer::Noted) };
        let outcome = match taken.content {
            Some(content) => self.keep_point(host, &asked, taken.volume, &content).await,
            None => Ok(Err(taken.problem.unwrap_or_else(|| "its host does not say why".to_owned()))),
        };
        let is_kept = matches!(outcome, Ok(Ok(())));
        let told = match outcome {
            Ok(Ok(())) => Ok(()),
            Ok(Err(problem)) => self.tell_missed(host, taken.volume, &problem).await,
            Err(error) => Err(error),
        };
        // Rather a point of the disk than none, where a policy asks; with the memory it is tried again when the next one is due.
        let falls_back = asked.memory && !is_kept && self.has_schedule(taken.volume).await;
        // After the record: until then it is a writer.
        self.points.end(taken.volume, is_kept || falls_back);
        if falls_back && !self.points.ask(taken.volume, Asked { memory: false, at: Instant::now(), ..asked }) {
            self.points.end(taken.volume, false);
        }
        told.map(|()| Answer::Noted).map_err(|error| internal(&error))
    }

    async fn has_schedule(&self, volume: VolumeId) -> bool {
        let history = self.state.read::<VolumeHistory>(&volume).await;
        history.is_ok_and(|history| history.is_some_and(|history| history.policy.every_s.is_some()))
    }

    /// Records a point; in words why it is none.
    async fn keep_point(
        &self,
        host: HostId,
        asked: &Asked,
        id: VolumeId,
        content: &PointContent,
    ) -> Result<Result<(), String>, EngineError> {
        let Ok(root) = content.root.parse::<ContentRoot>() else {
            return Ok(Err("its host names a root that is none".to_owned()));
        };
        let cloud = self.state.need::<HostRecord>(&host).await?.host.cloud;
        let guest = self.state.read::<GuestRecord>(&asked.guest).await?;
        let memory_bytes = guest.map_or(0, |guest| guest.guest.shape.memory_bytes);
        retry_conflicts(|| async {
            let (Some(before), Some(volume)) =
                (self.state.read::<VolumeHistory>(&id).await?, self.state.read::<Volume>(&id).await?)
            else {
                return Ok(Err("the volume keeps no history any more".to_owned()));
            };
            let memory = match memory_of(&before, content, asked.memory, memory_bytes) {
                Ok(memory) => memory,
                Err(why) => return Ok(Err(why)),
            };
            // A writer that was fenced meanwhile may tell of what nobody else has seen.
            if volume.host != Some(host) || volume.epoch != content.epoch {
                return Ok(Err("the volume changed hands meanwhile".to_owned()));
            }
            if let Some(last) = before.points.last()
                && (content.epoch, content.version) < (last.epoch, last.version)
            {
                return Ok(Err(format!(
                    "its host gives version {} after version {}: an older state",
                    content.version, last.version
                )));
            }
            // By this clock alone: a host's may say anything. Not before it was asked for, however old it is said to be.
            let age_ms = content.age_ms.min(millis(asked.at.elapsed()));
            let mut now = before.value.clone();
            let point = now.append(Taken {
                wall_ms: unix_ms().saturating_sub(age_ms),
                epoch: content.epoch,
                version: content.version,
                root: root.to_string(),
                cloud,
                stored_bytes: content.stored_bytes,
                memory,
            });
            let (number, at_ms, hash) = (point.number, point.at_ms, point.hash.clone());
            let thinned = now.thin_by_newest();
            now.problem = None;
            let mut change = Change::new();
            change.update(&before, &now).unchanged(&volume);
            change.event(EventDraft::new("volume.point").project(volume.project).guest(volume.guest).host(host).data(
                serde_json::json!({
                    "volume": volume.name, "point": number, "at_ms": at_ms, "hash": hash,
                    "changed_blocks": content.total_blocks, "read_blocks": content.sealed_blocks,
                    "stored_bytes": content.stored_bytes, "thinned": thinned,
                    "memory": content.memory.as_ref().map(|memory| serde_json::json!({
                        "bytes": memory.bytes, "filled_blocks": memory.filled_blocks, "stored_blocks": memory.stored_blocks,
                        "stood_still_us": memory.stood_still_us,
                    })),
                }),
            ));
            self.state.commit(&Context::actor(format!("host:{host}"), RequestId::generate()), change).await?;
            Ok::<_, EngineError>(Ok(()))
        })
        .await
    }

    /// A freeze has left another content than the history has seen: that is a point too, unless a later one was taken since.
    async fn keep_freeze(&self, before: &Stored<VolumeHistory>, volume: &Stored<Volume>) -> Result<(), EngineError> {
        let mut now = before.value.clone();
        now.seen_base.clone_from(&volume.base);
        let mut change = Change::new();
        change.unchanged(volume);
        if let (Some(root), Some(cloud)) = (&volume.base, volume.base_cloud) {
            let freezes = self.state.list::<Freeze>().await?;
            let of = |freeze: &&Stored<Freeze>| {
                freeze.volumes.iter().any(|frozen| frozen.volume == volume.id && frozen.root == *root)
            };
            let freeze = freezes.iter().rev().find(of);
            if let Some(freeze) =
                freeze.filter(|freeze| now.points.last().is_none_or(|last| last.at_ms < freeze.created_at_ms))
            {
                let point = now.append(Taken {
                    wall_ms: freeze.created_at_ms,
                    epoch: freeze.epoch,
                    version: volume.map_version,
                    root: root.clone(),
                    cloud,
                    stored_bytes: 0,
                    memory: None,
                });
                let data = serde_json::json!({
                    "volume": volume.name, "point": point.number, "at_ms": point.at_ms, "hash": point.hash, "freeze": freeze.id,
                });
                now.thin_by_newest();
                change.event(EventDraft::new("volume.point").project(volume.project).guest(volume.guest).data(data));
            }
        }
        change.update(before, &now);
        match self.state.commit(&Context::system(), change).await {
            // Looked at again with the next tick.
            Err(error) if error.is_conflict() => Ok(()),
            other => Ok(other.map(|_| ())?),
        }
    }

    /// A point was due and could not be taken. Told once for each reason.
    async fn tell_missed(&self, host: HostId, id: VolumeId, problem: &str) -> Result<(), EngineError> {
        let problem: String = problem.chars().take(PROBLEM_AT_MOST).collect();
        retry_conflicts(|| async {
            let (Some(before), Some(volume)) =
                (self.state.read::<VolumeHistory>(&id).await?, self.state.read::<Volume>(&id).await?)
            else {
                return Ok(());
            };
            if before.problem.as_ref() == Some(&problem) {
                return Ok(());
            }
            let now = VolumeHistory { problem: Some(problem.clone()), ..before.value.clone() };
            let mut change = Change::new();
            change.update(&before, &now);
            let data = serde_json::json!({ "volume": volume.name, "problem": problem });
            change.event(
                EventDraft::new("volume.no_point").project(volume.project).guest(volume.guest).host(host).data(data),
            );
            self.state.commit(&Context::actor(format!("host:{host}"), RequestId::generate()), change).await?;
            Ok::<_, EngineError>(())
        })
        .await
    }
}

/// Who is to be asked for a point of a volume; in words why nobody can be.
pub(crate) async fn askable(
    state: &crate::state::State,
    points: &PointBoard,
    live: &LiveHosts,
    volume: &Volume,
    memory: bool,
    is_open: impl Fn(HostId) -> bool,
) -> Result<Result<Asked, String>, EngineError> {
    let (Some(guest), Some(host)) = (volume.guest, volume.host) else {
        return Ok(Err(format!("no host holds volume {}: its guest was never started, or is frozen", volume.name)));
    };
    let Some(record) = state.read::<GuestRecord>(&guest).await? else {
        return Ok(Err(format!("volume {} has no guest", volume.name)));
    };
    if !record.owner.is_owned_by(host, volume.epoch) {
        return Ok(Err(format!("the guest of volume {} does not run", volume.name)));
    }
    // A mirror's may be held for weeks, and cuts have a snapshot of their own.
    let is_mirror =
        |operation: &supercloud_api::handover::Operation| matches!(operation.kind, OperationKind::Mirror { .. });
    if record.owner.operation.as_ref().is_some_and(|operation| !is_mirror(operation)) {
        return Ok(Err(format!("an operation holds the guest of volume {}", volume.name)));
    }
    if !is_open(host) {
        return Ok(Err(format!("the host that holds volume {} is not connected", volume.name)));
    }
    if !points.takes(host) {
        return Ok(Err("the agent of the host that holds it is of a version that takes no points".to_owned()));
    }
    if memory {
        if record.owner.operation.is_some() {
            return Ok(Err(format!("the guest of volume {} is mirrored: its memory is kept there", volume.name)));
        }
        if record.guest.volumes.len() != 1 {
            return Ok(Err(format!("the guest of volume {} has other volumes: a checkpoint is of one", volume.name)));
        }
        if !live.takes_checkpoints(host) {
            let why = "the host that holds it takes no checkpoints of running guests: its back end lacks it, or its agent is older";
            return Ok(Err(why.to_owned()));
        }
    }
    Ok(Ok(Asked { host, guest, project: volume.project, at: Instant::now(), memory }))
}

/// What a host gives of a guest's memory, as it may be kept; in words why it may not.
fn memory_of(
    history: &VolumeHistory,
    content: &PointContent,
    is_wanted: bool,
    memory_bytes: u64,
) -> Result<Option<PointMemory>, String> {
    let Some(CheckpointContent { root, bytes, format, .. }) = &content.memory else {
        return if is_wanted { Err("its host gives the disk without the guest's memory".to_owned()) } else { Ok(None) };
    };
    let Ok(root) = root.parse::<ContentRoot>() else {
        return Err("its host names a root of the memory that is none".to_owned());
    };
    if *bytes > memory_bytes.saturating_add(MEMORY_EXTRA_BYTES) || format.len() > FORMAT_AT_MOST {
        return Err(format!(
            "its host gives {bytes} bytes of memory for volume {}: more than the guest has",
            history.volume
        ));
    }
    Ok(Some(PointMemory { root: root.to_string(), bytes: *bytes, format: format.clone(), is_kept: true }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_dated_by_the_first_question_that_it_may_answer() {
        let (board, volume, host) = (PointBoard::default(), VolumeId::generate(), HostId::generate());
        let (guest, project) = (GuestId::generate(), ProjectId::generate());
        let ask = |at| board.ask(volume, Asked { host, guest, project, at, memory: false });
        let pass_on = || {
            board.with(|board| {
                let new = std::mem::take(&mut board.new);
                let count = new.len();
                board.doubtful.retain(|volume| !new.contains_key(volume));
                board.under_way.extend(new);
                count
            })
        };
        let under_way = || board.under_way(volume, host, guest).map(|asked| asked.at);
        let now = Instant::now();
        let first = now.checked_sub(Duration::from_secs(60)).unwrap();
        assert!(ask(first) && pass_on() == 1);
        // It is on its way: not asked for again.
        assert!(ask(now) && pass_on() == 0);
        assert!(board.since(volume).is_some_and(|since| since >= Duration::from_secs(60)));

        // The host comes anew. It may answer, and may be asked again; whichever it answers, it was asked at first.
        board.note_capable(host, true);
        assert_eq!((board.since(volume), under_way()), (None, Some(first)));
        assert!(ask(now) && pass_on() == 1);
        assert_eq!(under_way(), Some(first));
        assert!(board.since(volume).is_some() && board.oldest_ms(project).is_some_and(|oldest| oldest >= 60_000));

        // One that takes none any more answers nothing.
        board.note_capable(host, false);
        assert_eq!((under_way(), board.oldest_ms(project)), (None, None));
        // What took too long is not heard, and does not date the next one.
        board.with(|board| {
            let Some(at) = now.checked_sub(PATIENCE) else { return };
            board.under_way.insert(volume, Asked { host, guest, project, at, memory: false });
        });
        assert_eq!((under_way(), board.oldest_ms(project)), (None, None));
        assert!(ask(now) && pass_on() == 1);
        assert_eq!(under_way(), Some(now));
    }
}
