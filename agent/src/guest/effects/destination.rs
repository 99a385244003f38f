//! The destination's effects.

use std::sync::Arc;

use supercloud_api::{
    Code, CompatClass, Problem, Progress,
    ids::{Epoch, OperationId},
    link::{Assignment, Peer},
};
use supercloud_blanket::{
    BackendError,
    backend::{RunState, StopMode},
};
use supercloud_handover::{
    DestinationEvent, DestinationPlan, DestinationState, LocalEvent, OperationKind, SourceState, VolumeStamp,
};

use super::{DONE, EffectError, Followed, destination};
use crate::{
    chunks::{self, ChunkSources},
    guest::{
        actor::{Actor, Met},
        dials, machine,
        record::{CopyRecord, VolumeOrigin},
    },
    jobs::{JobError, fetch, memory, prepare, receive, standby, thawed},
    plane::{
        admission::Role,
        meeting::{Meeting, MeetingHandle},
    },
};

impl Actor {
    pub(in crate::guest) async fn prepare(&mut self, plan: DestinationPlan) -> Followed {
        let operation = plan.operation;
        if Self::is_at_it(self.jobs.receive.as_ref(), operation) {
            return DONE;
        }
        let assignment = self.record.assignment.clone().filter(|assignment| assignment.operation == operation);
        let assignment = assignment.ok_or(EffectError::NoAssignment)?;
        let origin = match self.origin(&plan, &assignment) {
            Ok(origin) => origin,
            Err(EffectError::StillReleasing) => return Err(EffectError::StillReleasing),
            Err(error) => return Ok(self.cannot_prepare(operation, Problem::new(Code::WrongState, error.to_string()))),
        };
        let described = self.class(&assignment.spec.compat_class).and_then(|class| {
            let (cache, has_balloon) = (self.host.boot_cache(), self.host.backend.has_balloon(&class));
            let mut copy =
                machine::describe(&plan, &assignment.spec, &class, &self.places, &cache, origin, has_balloon)?;
            copy.launch.spec.devices.has_rng = self.host.backend.has_rng();
            Ok(copy)
        });
        let reach = match assignment.peer.as_ref().filter(|_| origin == VolumeOrigin::Peer) {
            Some(peer) => self.check_reach(peer),
            None => Ok(()),
        };
        let copy = match reach.and(described) {
            Ok(copy) => copy,
            Err(problem) => return Ok(self.cannot_prepare(operation, problem)),
        };
        self.problem = None;
        self.arrived = None;
        // Remembered before anything is made, so that a restarted agent finds what is to be removed.
        self.record.incoming = Some(copy.clone());
        if !self.save().await {
            return Err(EffectError::Unsaved);
        }
        self.make_folders().await?;
        let sources = self.offer_chunks(&copy)?;
        let needs_peer = origin == VolumeOrigin::Peer;
        let peer = match assignment.peer.clone().filter(|_| needs_peer) {
            Some(peer) => Some(self.meet_as_destination(operation, peer, &copy)?),
            None => None,
        };
        let job = self.job(operation);
        let wants = receive::Wants {
            plan,
            copy,
            sources,
            peer,
            bandwidth_bytes_per_s: assignment
                .mirror
                .map_or(assignment.migration.bandwidth_bps, |mirror| mirror.bandwidth_bps)
                .map(|bps| (bps / 8).max(1)),
            frozen: assignment.frozen.clone(),
            thaw: assignment.thaw,
            take_over: self.take_over.insert(Arc::default()).clone(),
        };
        self.jobs.receive = Some(Self::start(&job.clone(), receive::run(job, wants)));
        DONE
    }

    /// Goes on with a standby that an agent before has left. Where that does not begin, the order to take over tells so.
    pub(in crate::guest) fn keep_standby(&mut self, plan: DestinationPlan, copy: CopyRecord) {
        let operation = plan.operation;
        let peer = self.record.assignment.as_ref().filter(|assignment| assignment.operation == operation);
        let peer = peer.and_then(|assignment| assignment.peer.clone());
        let mut meeting = Meeting::begin(self.meeting_params(operation, peer, Role::Destination));
        let Some(events) = meeting.take_events() else { return };
        let peer = receive::Peer { handle: meeting.handle(), events };
        self.met = Some(Met { operation, meeting, _listener: None });
        let take_over = self.take_over.insert(Arc::default()).clone();
        let job = self.job(operation);
        self.jobs.receive = Some(Self::start(&job.clone(), standby::go_on(job, plan, copy, peer, take_over)));
    }

    /// Has the job that stands by go on from its last cut. Said again and again; a job that has ended has told what came of it.
    pub(in crate::guest) fn take_over(&self, operation: OperationId) -> Vec<LocalEvent> {
        match (&self.jobs.receive, &self.take_over) {
            (Some(job), Some(take_over)) if job.operation == operation => {
                take_over.notify_one();
                Vec::new()
            }
            _ => destination(DestinationEvent::ReceiveFailed { operation }),
        }
    }

    pub(in crate::guest) fn cannot_prepare(&mut self, operation: OperationId, problem: Problem) -> Vec<LocalEvent> {
        tracing::warn!(guest = %self.guest, %operation, %problem, "the guest cannot come here");
        self.problem = Some(problem);
        destination(DestinationEvent::ReceiveFailed { operation })
    }

    /// Where the volumes of the copy come from.
    pub(in crate::guest) fn origin(
        &self,
        plan: &DestinationPlan,
        assignment: &Assignment,
    ) -> Result<VolumeOrigin, EffectError> {
        let starts = matches!(plan.kind, OperationKind::Start { .. } | OperationKind::RestartFromVolume { .. });
        match (self.record.handover.source().state(), &self.record.current) {
            (SourceState::Idle, _) | (_, None) => {}
            (SourceState::Serving { .. } | SourceState::Lost { .. }, Some(copy))
                if starts && copy.epoch == plan.from.epoch =>
            {
                return Ok(VolumeOrigin::Local);
            }
            // Its folders are in the way until it is gone.
            _ => return Err(EffectError::StillReleasing),
        }
        let is_moved = matches!(plan.kind, OperationKind::Migrate { .. } | OperationKind::Mirror { .. });
        let is_elsewhere = starts && assignment.peer.is_some();
        Ok(if is_moved || is_elsewhere { VolumeOrigin::Peer } else { VolumeOrigin::Fresh })
    }

    pub(in crate::guest) fn class(&self, wanted: &Option<CompatClass>) -> Result<CompatClass, Problem> {
        let mine = &self.host.classes;
        let first = mine.first().ok_or_else(|| Problem::new(Code::Unsupported, "this host cannot run any guest"))?;
        match wanted {
            None => Ok(first.clone()),
            Some(class) if mine.iter().any(|mine| mine.serves(class)) => Ok(class.clone()),
            Some(class) => {
                let offers: Vec<String> = mine.iter().map(ToString::to_string).collect();
                let lacks = class.lacking_of(mine).map_or_else(String::new, |names| format!(": it lacks {names}"));
                let detail = format!("the guest runs as {class}; this host offers {}{lacks}", offers.join(", "));
                Err(Problem::new(Code::Incompatible, detail))
            }
        }
    }

    pub(in crate::guest) async fn make_folders(&self) -> Result<(), EffectError> {
        let (places, qemu) = (self.places.clone(), self.host.qemu);
        let made = tokio::task::spawn_blocking(move || places.make(qemu));
        Ok(made.await??)
    }

    /// Serves other clouds' chunks to this guest's volume processes.
    pub(in crate::guest) fn offer_chunks(&mut self, copy: &CopyRecord) -> Result<Arc<ChunkSources>, EffectError> {
        let places = self.chunk_places.clone();
        let sources = Arc::new(ChunkSources::new(self.host.plane.clone(), copy.spec.project, places, &self.host.store));
        // The old socket's task first: it would remove nothing, but must not answer any more.
        self.sources = None;
        let task = chunks::offer(sources.clone(), &self.places.chunk_socket(), self.host.runner.user)
            .map_err(EffectError::Socket)?;
        self.sources = Some((sources.clone(), task));
        Ok(sources)
    }

    pub(in crate::guest) fn meet_as_destination(
        &mut self,
        operation: OperationId,
        peer: Peer,
        copy: &CopyRecord,
    ) -> Result<receive::Peer, EffectError> {
        let mut meeting = Meeting::begin(self.meeting_params(operation, Some(peer), Role::Destination));
        let handle = meeting.handle();
        let events = meeting.take_events().ok_or(EffectError::NoAssignment)?;
        self.offer_dials(copy, &handle)?;
        self.met = Some(Met { operation, meeting, _listener: None });
        Ok(receive::Peer { handle, events })
    }

    pub(in crate::guest) fn offer_dials(
        &mut self,
        copy: &CopyRecord,
        handle: &MeetingHandle,
    ) -> Result<(), EffectError> {
        self.dials.clear();
        for home in &copy.volumes {
            self.dials.push(dials::offer(home, handle.clone(), self.host.runner.user).map_err(EffectError::Socket)?);
        }
        Ok(())
    }

    /// After a restart: the way to the blocks that are still at the source.
    pub(in crate::guest) fn dial_again(&mut self, copy: &CopyRecord) -> Result<(), EffectError> {
        self.meet_again(Role::Destination);
        let Some(handle) = self.met.as_ref().map(|met| met.meeting.handle()) else { return Ok(()) };
        self.offer_dials(copy, &handle)
    }

    pub(in crate::guest) async fn destroy_received(&mut self, operation: OperationId) -> Followed {
        for job in [self.jobs.receive.take(), self.jobs.fetch.take()].into_iter().flatten() {
            job.end().await;
        }
        if let Some(copy) = self.record.incoming.clone() {
            self.kill_at(copy.epoch).await?;
            self.dials.clear();
            if copy.origin == VolumeOrigin::Local {
                // They are the old copy's, and stay sealed as they were.
                if let Some(seed) = &copy.seed {
                    self.host.runner.delete(seed).await?;
                }
            } else {
                self.remove_copy(&copy).await?;
            }
            // Memory of a thaw that came to nothing; a spooled guest is never a destination here.
            if self.record.spooled.is_none() {
                let _ = tokio::fs::remove_file(self.places.memory()).await;
            }
            self.record.incoming = None;
        }
        self.met = None;
        match &self.record.current {
            Some(copy) => {
                let disk_bytes = copy.spec.volumes.iter().map(|volume| volume.size_bytes).sum();
                self.host.ledger.note_volumes(self.guest, disk_bytes);
            }
            None => self.host.ledger.release(self.guest),
        }
        Ok(destination(DestinationEvent::Destroyed { operation }))
    }

    /// Whether the incoming copy has had a process since before the grant: a start has none until it is granted.
    pub(in crate::guest) fn has_received_process(&self) -> bool {
        match self.record.handover.destination().state() {
            DestinationState::Receiving { plan, .. }
            | DestinationState::Complete { plan, .. }
            | DestinationState::Granted { plan, .. }
            | DestinationState::Running { plan, .. } => {
                matches!(
                    plan.kind,
                    OperationKind::Migrate { .. } | OperationKind::Mirror { .. } | OperationKind::Thaw { .. }
                )
            }
            _ => true,
        }
    }

    pub(in crate::guest) async fn run_guest(&mut self, epoch: Epoch) -> Followed {
        let copy = self.incoming_at(epoch)?;
        let backend = self.host.backend.clone();
        let mut info = backend.status(self.guest).await?;
        if let Some(old) = info.as_ref().filter(|info| info.epoch != epoch) {
            // Of an epoch that is over: nobody may run it, and it is in the way.
            self.kill_at(old.epoch).await?;
            info = None;
        }
        match info.map(|info| info.state) {
            None if self.has_received_process() => return Ok(destination(DestinationEvent::GuestGone)),
            None => {
                backend.start(copy.launch.clone()).await?;
            }
            Some(RunState::Running) => {}
            Some(RunState::Crashed) => {
                backend.stop(self.guest, StopMode::Kill).await?;
                return Ok(destination(DestinationEvent::GuestGone));
            }
            Some(_) => {
                if self.leaves_memory() || self.is_thawed_lazily()? {
                    // What it wants first is missing at once.
                    self.start_fetch(epoch)?;
                }
                backend.resume(self.guest, epoch).await?;
            }
        }
        let running_at = tokio::time::Instant::now();
        if let Some((at, paused_for)) = self.arrived.take() {
            let downtime = paused_for + running_at.duration_since(at);
            let downtime_ms = u64::try_from(downtime.as_millis()).unwrap_or(u64::MAX);
            tracing::info!(guest = %self.guest, %epoch, downtime_ms, "the guest runs here");
            let told = Progress { downtime_ms: Some(downtime_ms), ..self.progress.clone() };
            self.progressed(&told);
        }
        self.record.alarm = None;
        self.record.is_off = false;
        let disk_bytes = copy.spec.volumes.iter().map(|volume| volume.size_bytes).sum();
        self.host.ledger.note(self.guest, copy.spec.shape, disk_bytes);
        self.watched.lock().await.clone_from(&copy.all_volumes().cloned().collect());
        Ok(destination(DestinationEvent::GuestRunning { epoch }))
    }

    pub(in crate::guest) fn start_fetch(&mut self, epoch: Epoch) -> Result<(), EffectError> {
        let copy = self.incoming_at(epoch)?;
        if Self::is_at_it(self.jobs.fetch.as_ref(), copy.operation) {
            return Ok(());
        }
        let limit = self.record.assignment.as_ref().and_then(|assignment| assignment.migration.bandwidth_bps);
        let job = self.job(copy.operation);
        let origin = match (&self.met, &self.sources) {
            (Some(_), _) => fetch::Origin::Peer,
            (None, Some((sources, _))) => {
                fetch::Origin::Chunks { sources: sources.clone(), before: sources.served_bytes() }
            }
            (None, None) => fetch::Origin::Uncounted,
        };
        let memory = match self.memory_to_fetch() {
            Some(memory) => Some(fetch::Memory::Left(memory)),
            None => self.frozen_memory(&copy)?.map(Box::new).map(fetch::Memory::Frozen),
        };
        let bandwidth_bytes_per_s = limit.map(|bps| (bps / 8).max(1));
        let wants = fetch::Wants { epoch, volumes: copy.volumes, origin, bandwidth_bytes_per_s, memory };
        self.jobs.fetch = Some(Self::start(&job.clone(), fetch::run(job, wants)));
        Ok(())
    }

    /// Whether the guest was thawed before its memory was here, and some of it may be missing.
    fn is_thawed_lazily(&self) -> Result<bool, EffectError> {
        let is_thawed = match self.record.handover.destination().state() {
            DestinationState::Granted { plan, .. } | DestinationState::Running { plan, .. } => {
                matches!(plan.kind, OperationKind::Thaw { .. })
            }
            _ => false,
        };
        if !is_thawed {
            return Ok(false);
        }
        // Where nobody can say, nobody may say that nothing is missing.
        match self.host.backend.lazy_thaw().and_then(|lazy| lazy.is_lazy(self.guest)) {
            Ok(is_lazy) => Ok(is_lazy),
            Err(BackendError::Unsupported { .. } | BackendError::NoSuchGuest { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// What memory is fetched with that is missing after a thaw.
    fn frozen_memory(&self, copy: &CopyRecord) -> Result<Option<thawed::Fetch>, EffectError> {
        if !self.is_thawed_lazily()? {
            return Ok(None);
        }
        let assignment = self.record.assignment.as_ref().filter(|assignment| assignment.operation == copy.operation);
        let frozen = assignment.and_then(|assignment| assignment.frozen.clone()).ok_or(EffectError::NoAssignment)?;
        let (sources, _) = self.sources.as_ref().ok_or(EffectError::NoAssignment)?;
        let reader = sources.reader(prepare::keys(copy), &self.host.store);
        Ok(Some(thawed::Fetch { frozen, reader, is_missing: Arc::default() }))
    }

    /// Whether the guest comes by a move that may leave memory behind.
    fn leaves_memory(&self) -> bool {
        let state = self.record.handover.destination().state();
        matches!(state, DestinationState::Granted { plan, .. } | DestinationState::Running { plan, .. }
            if matches!(plan.kind, OperationKind::Migrate { post_copy: true, .. }))
    }

    /// What memory is fetched with, if the move may have left some behind.
    fn memory_to_fetch(&mut self) -> Option<memory::Fetch> {
        if !self.leaves_memory() {
            return None;
        }
        self.meet_again(Role::Destination);
        // Its own: what was said of a source before counts for nothing.
        self.source_lost = Arc::default();
        let meeting = &self.met.as_ref()?.meeting;
        Some(memory::Fetch {
            handle: meeting.handle(),
            events: meeting.listen(),
            source_lost: self.source_lost.clone(),
            is_missing: Arc::default(),
        })
    }

    /// Seals the volumes of a copy that was granted and is lost: what they hold may be needed for a recovery.
    pub(in crate::guest) async fn seal_granted(&mut self, epoch: Epoch) -> Followed {
        let Ok(copy) = self.incoming_at(epoch) else { return DONE };
        if let Some(from) = self.granted_from() {
            // So that what has been adopted here carries the granted epoch before it is sealed.
            prepare::activate(&self.host.runner, &copy, from).await?;
        }
        let mut stamps = Vec::new();
        for home in &copy.volumes {
            self.host.runner.ensure(home).await?;
            let sealed = home.client().seal(epoch).await;
            let sealed = sealed.map_err(|source| JobError::Volume { what: "take its seal", source })?;
            stamps.push(VolumeStamp { volume: home.volume, root: sealed.root.0, version: sealed.version });
        }
        for kept in [&mut self.record.incoming, &mut self.record.current].into_iter().flatten() {
            if kept.epoch == epoch {
                kept.sealed.clone_from(&stamps);
            }
        }
        DONE
    }
}
