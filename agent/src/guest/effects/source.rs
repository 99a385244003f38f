//! The source's effects.

use std::{collections::HashMap, sync::Arc, time::Duration};

use supercloud_api::{
    Code, MemoryMode, Problem,
    data::HandoverMessage,
    ids::{Epoch, FreezeId, OperationId},
    link::Peer,
};
use supercloud_blanket::{
    backend::{PauseReason, RunState, StopMode},
    migrate::Verdict,
};
use supercloud_handover::{LocalEvent, OperationKind, SourceEvent, SourcePlan, VolumeStamp};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{EffectError, Followed, source};
use crate::{
    chunks::ChunkSources,
    guest::{
        actor::{Actor, Met, Running},
        record::{CopyRecord, VolumeOrigin},
    },
    jobs::{self, JobError, Outcome, depart, freeze, memory, mirror, receive},
    plane::{
        PlaneError,
        admission::Role,
        meeting::{Meeting, MeetingEvent, MeetingParams},
    },
};

/// How often the destruction of a process is tried before its batch of effects is given up.
const KILL_TRIES: u32 = 3;
/// The pause between two tries.
const KILL_PAUSE: Duration = Duration::from_secs(1);
/// The pause after a shut-down that failed.
const SHUT_DOWN_PAUSE: Duration = Duration::from_secs(5);

impl Actor {
    /// Whether a job of this kind works on the operation already; else the way is free.
    pub(in crate::guest) fn is_at_it(job: Option<&Running>, operation: OperationId) -> bool {
        job.is_some_and(|job| job.operation == operation && !job.is_over())
    }

    pub(in crate::guest) async fn start_copy(&mut self, plan: &SourcePlan) -> Vec<LocalEvent> {
        let operation = plan.operation;
        if Self::is_at_it(self.jobs.leave.as_ref(), operation) {
            return Vec::new();
        }
        self.problem = None;
        self.keep_lease().await;
        match self.try_start_copy(plan).await {
            Ok(()) => Vec::new(),
            Err(problem) => {
                tracing::warn!(guest = %self.guest, %operation, %problem, "the copy cannot begin");
                self.problem = Some(problem);
                source(SourceEvent::CopyFailed { operation })
            }
        }
    }

    pub(in crate::guest) async fn try_start_copy(&mut self, plan: &SourcePlan) -> Result<(), Problem> {
        let operation = plan.operation;
        let internal = |detail: &str| Problem::new(Code::Internal, detail);
        let copy = self.current_at(plan.epoch).map_err(|error| internal(&error.to_string()))?;
        if let OperationKind::Migrate { post_copy: true, .. } = plan.kind
            && let Err(error) = self.host.backend.post_copy()
        {
            return Err(Problem::new(Code::Unsupported, error.to_string()));
        }
        let job = self.job(operation);
        if let OperationKind::Freeze { .. } = plan.kind {
            self.note_spooling(operation).await.map_err(|error| internal(&crate::chain(&error)))?;
            self.jobs.leave = Some(Self::start(&job.clone(), freeze::suspend(job, copy, self.chunk_sources())));
            return Ok(());
        }
        let assignment = self.record.assignment.as_ref().filter(|assignment| assignment.operation == operation);
        let assignment = assignment.ok_or_else(|| internal("the order came without its assignment"))?;
        let mut options = assignment.migration.clone();
        if !matches!(plan.kind, OperationKind::Migrate { post_copy: true, .. }) {
            // By what was decided nobody would serve what is left behind.
            options.memory = MemoryMode::PreCopy;
        }
        let mirror = match plan.kind {
            OperationKind::Mirror { .. } => {
                Some(assignment.mirror.ok_or_else(|| internal("the assignment does not say how to mirror"))?)
            }
            _ => None,
        };
        if mirror.is_some_and(|options| options.lease_ms.is_some()) && self.leasing.held().is_none() {
            return Err(internal("the guest is to run by a lease, and none is kept"));
        }
        let peer = assignment.peer.clone().ok_or_else(|| internal("the assignment names no destination"))?;
        self.check_reach(&peer)?;
        let mut meeting = Meeting::begin(self.meeting_params(operation, Some(peer), Role::Source));
        let events = meeting.take_events().ok_or_else(|| internal("the meeting has no events"))?;
        self.released = CancellationToken::new();
        let (maps, wanted_maps) = tokio::sync::mpsc::channel(1);
        let wants = depart::Wants {
            epoch: plan.epoch,
            volumes: copy.volumes,
            options,
            peer: receive::Peer { handle: meeting.handle(), events },
            released: self.released.clone(),
            maps: wanted_maps,
            lease: self.leasing.held(),
        };
        self.met = Some(Met { operation, meeting, _listener: None });
        self.maps = Some(maps);
        self.jobs.leave = Some(match mirror {
            Some(options) => Self::start(&job.clone(), mirror::keep(job, wants, options)),
            None => Self::start(&job.clone(), depart::run(job, wants)),
        });
        Ok(())
    }

    /// One of the two must be able to dial the other.
    pub(in crate::guest) fn check_reach(&self, peer: &Peer) -> Result<(), Problem> {
        if peer.data_address.is_some() || self.host.plane.address.is_some() {
            return Ok(());
        }
        let error = PlaneError::NoAddress(peer.name.to_string());
        Err(Problem::new(Code::HostUnavailable, error.to_string()))
    }

    pub(in crate::guest) fn meeting_params(
        &self,
        operation: OperationId,
        peer: Option<Peer>,
        role: Role,
    ) -> MeetingParams {
        let served: HashMap<_, _> = match (role, &self.record.current) {
            (Role::Source, Some(copy)) => copy.volumes.iter().map(|home| (home.volume, home.peer_socket())).collect(),
            _ => HashMap::new(),
        };
        MeetingParams {
            plane: self.host.plane.clone(),
            operation,
            peer,
            ticket: self.ticket.subscribe(),
            role,
            peer_sockets: Arc::new(move |volume| served.get(&volume).cloned()),
        }
    }

    /// Serves what a move has left behind to whoever comes with the right, or says that it is gone.
    pub(in crate::guest) fn serve_memory(&mut self, is_gone: bool) {
        self.meet_again(Role::Source);
        let Some(met) = &self.met else { return };
        if Self::is_at_it(self.jobs.serve.as_ref(), met.operation) {
            return;
        }
        let (operation, handle, events) = (met.operation, met.meeting.handle(), met.meeting.listen());
        let job = self.job(operation);
        self.jobs.serve = Some(Self::start(&job.clone(), memory::serve(job, handle, events, is_gone)));
    }

    /// Takes part in the last operation's meeting again, after a restart or when its job is over.
    pub(in crate::guest) fn meet_again(&mut self, role: Role) {
        let Some(assignment) = &self.record.assignment else { return };
        let (operation, peer) = (assignment.operation, assignment.peer.clone());
        if peer.is_none() || self.met.as_ref().is_some_and(|met| met.operation == operation) {
            return;
        }
        let meeting = Meeting::begin(self.meeting_params(operation, peer, role));
        self.met = Some(Met { operation, meeting, _listener: None });
    }

    /// Another host starts the guest and wants the volumes that are sealed here: it has a ticket, this host no order.
    pub(in crate::guest) fn meet_as_holder(&mut self, operation: OperationId) {
        let mut meeting = Meeting::begin(self.meeting_params(operation, None, Role::Source));
        let stamps = self.record.current.as_ref().map(|copy| copy.sealed.clone()).unwrap_or_default();
        let (handle, events) = (meeting.handle(), meeting.take_events());
        let listener = tokio::spawn(async move {
            let Some(mut events) = events else { return };
            while let Some(event) = events.recv().await {
                if let MeetingEvent::Connected = event {
                    let volumes = depart::roots(&stamps);
                    let told = HandoverMessage::Performed { cookie: String::new(), volumes, paused_for_ms: 0 };
                    handle.say(told).await;
                }
            }
        });
        self.met = Some(Met { operation, meeting, _listener: Some(AbortOnDropHandle::new(listener)) });
    }

    pub(in crate::guest) fn shut_down(&mut self, operation: OperationId) {
        if Self::is_at_it(self.jobs.leave.as_ref(), operation) {
            return;
        }
        let grace = self.record.assignment.as_ref().filter(|assignment| assignment.operation == operation);
        let mode = match grace.map_or(0, |assignment| assignment.grace_ms) {
            0 => StopMode::Kill,
            ms => StopMode::Graceful { budget: Duration::from_millis(ms) },
        };
        let job = self.job(operation);
        let work = {
            let job = job.clone();
            async move {
                let mut mode = mode;
                while let Err(error) = job.host.backend.stop(job.guest, mode).await {
                    tracing::warn!(guest = %job.guest, error = crate::chain(&error), "the guest is not stopped yet");
                    tokio::select! {
                        () = job.cancel.cancelled() => return Outcome::Nothing,
                        () = tokio::time::sleep(SHUT_DOWN_PAUSE) => {}
                    }
                    // It had its grace.
                    mode = StopMode::Kill;
                }
                job.tell(jobs::Fact::Event(LocalEvent::Source(SourceEvent::GuestPaused { operation }))).await;
                Outcome::ShutDown
            }
        };
        self.jobs.leave = Some(Self::start(&job, work));
    }

    pub(in crate::guest) async fn seal(&mut self, operation: Option<OperationId>, epoch: Epoch) -> Followed {
        let Ok(copy) = self.current_at(epoch) else {
            // Nothing that could be written to.
            let nothing = |operation| source(SourceEvent::VolumesSealed { operation, volumes: Vec::new() });
            return Ok(operation.map(nothing).unwrap_or_default());
        };
        let mut stamps = Vec::new();
        for home in &copy.volumes {
            self.host.runner.ensure(home).await?;
            let sealed = home.client().seal(epoch).await;
            let sealed = sealed.map_err(|source| JobError::Volume { what: "take its seal", source })?;
            stamps.push(VolumeStamp { volume: home.volume, root: sealed.root.0, version: sealed.version });
        }
        if let Some(copy) = &mut self.record.current {
            copy.sealed.clone_from(&stamps);
        }
        let sealed = |operation| source(SourceEvent::VolumesSealed { operation, volumes: stamps });
        Ok(operation.map(sealed).unwrap_or_default())
    }

    fn chunk_sources(&self) -> Option<Arc<ChunkSources>> {
        self.sources.as_ref().map(|(sources, _)| Arc::clone(sources))
    }

    pub(in crate::guest) fn store_freeze(&mut self, operation: OperationId, freeze: FreezeId) {
        if Self::is_at_it(self.jobs.store.as_ref(), operation) {
            return;
        }
        let (Some(copy), Some(spooled)) = (self.record.current.clone(), self.record.spooled.clone()) else {
            tracing::error!(guest = %self.guest, %operation, "a freeze is to be stored whose memory is not here");
            return;
        };
        let job = self.job(operation);
        self.jobs.store =
            Some(Self::start(&job.clone(), freeze::store(job, copy, spooled, freeze, self.chunk_sources())));
    }

    pub(in crate::guest) async fn resume_source(&mut self, epoch: Epoch) -> Followed {
        let copy = self.current_at(epoch)?;
        let backend = self.host.backend.clone();
        let info = backend.status(self.guest).await?.filter(|info| info.epoch == epoch);
        let was_mirrored = self.record.assignment.as_ref().is_some_and(|assignment| assignment.mirror.is_some());
        if info.is_some() && was_mirrored {
            // It is ended for good: nothing may be held back any more.
            backend.mirroring()?.end_mirror(self.guest).await?;
        }
        match info.map(|info| info.state) {
            None => {
                self.find_spooled().await?;
                if self.record.spooled.is_none() {
                    if !self.record.is_off && self.has_powered_off().await {
                        self.note_power_off().await;
                    }
                    // What powered itself off goes on being off: that is told by itself.
                    let event = match self.record.is_off {
                        true => SourceEvent::GuestResumed { epoch },
                        false => SourceEvent::GuestGone,
                    };
                    return Ok(source(event));
                }
                self.thaw_back(&copy).await?;
                self.drop_spool().await;
                backend.resume(self.guest, epoch).await?;
            }
            // It came out of its file and has not run since; of one whose file still counts it is not known whether it
            // came out whole.
            Some(RunState::Paused(PauseReason::Arrived)) => {
                if self.record.spooled.is_some() {
                    backend.stop(self.guest, StopMode::Kill).await?;
                    self.thaw_back(&copy).await?;
                    self.drop_spool().await;
                }
                backend.resume(self.guest, epoch).await?;
            }
            Some(RunState::Crashed) => {
                backend.stop(self.guest, StopMode::Kill).await?;
                return Ok(source(SourceEvent::GuestGone));
            }
            Some(RunState::Paused(PauseReason::DiskError)) => backend.resume(self.guest, epoch).await?,
            Some(_) => {
                if let Ok(live) = backend.live_migration() {
                    live.confirm(self.guest, Verdict::Keep).await?;
                }
                let now = backend.status(self.guest).await?.map(|info| info.state);
                if !matches!(now, Some(RunState::Running | RunState::ShuttingDown)) {
                    backend.resume(self.guest, epoch).await?;
                }
            }
        }
        if was_mirrored {
            // The guest runs by now; a mirror that is begun after this one must find none of its cuts.
            mirror::end_cuts(&copy.volumes).await;
        }
        self.drop_spool().await;
        self.record.alarm = None;
        Ok(source(SourceEvent::GuestResumed { epoch }))
    }

    /// Destroys the guest's process, if there is one of this epoch, whatever its state. Tried more than once: a copy
    /// without a right to run must not stay because a daemon was busy.
    pub(in crate::guest) async fn kill_at(&self, epoch: Epoch) -> Result<(), EffectError> {
        let mut tries = 0;
        loop {
            match self.try_kill_at(epoch).await {
                Ok(()) => return Ok(()),
                Err(error) if tries >= KILL_TRIES => return Err(error),
                Err(error) => {
                    tracing::warn!(guest = %self.guest, %epoch, error = crate::chain(&error), "not destroyed yet");
                    tries += 1;
                    tokio::time::sleep(KILL_PAUSE).await;
                }
            }
        }
    }

    pub(in crate::guest) async fn try_kill_at(&self, epoch: Epoch) -> Result<(), EffectError> {
        let backend = &self.host.backend;
        let Some(info) = backend.status(self.guest).await?.filter(|info| info.epoch == epoch) else { return Ok(()) };
        let live = backend.live_migration().ok();
        match (info.state, live) {
            (RunState::Paused(PauseReason::Departed), Some(live)) => {
                live.confirm(self.guest, Verdict::Release).await?;
            }
            (RunState::Paused(PauseReason::Incoming | PauseReason::Arrived), Some(live)) => {
                live.discard(self.guest).await?;
            }
            _ => backend.stop(self.guest, StopMode::Kill).await?,
        }
        Ok(())
    }

    pub(in crate::guest) async fn delete_volumes(&mut self, epoch: Epoch) -> Followed {
        let deleted = source(SourceEvent::VolumesDeleted { epoch });
        let Ok(copy) = self.current_at(epoch) else { return Ok(deleted) };
        self.met = None;
        if let Some(job) = self.jobs.serve.take() {
            job.end().await;
        }
        let is_lent = self.record.incoming.as_ref().is_some_and(|incoming| incoming.origin == VolumeOrigin::Local);
        if !is_lent {
            self.remove_copy(&copy).await?;
        }
        self.record.current = None;
        self.record.is_memory_gone = false;
        self.drop_spool().await;
        if self.record.incoming.is_none() {
            self.host.ledger.release(self.guest);
        }
        Ok(deleted)
    }

    /// Removes a copy's volumes from this host, and its ports where no other copy of the guest is here.
    pub(in crate::guest) async fn remove_copy(&self, copy: &CopyRecord) -> Result<(), EffectError> {
        self.watched.lock().await.clear();
        for home in copy.all_volumes() {
            self.host.runner.delete(home).await?;
            // A socket that nobody serves any more.
            let _ = tokio::fs::remove_file(home.peer_dial()).await;
        }
        let is_other = |other: &Option<CopyRecord>| other.as_ref().is_some_and(|other| other.epoch != copy.epoch);
        if !is_other(&self.record.incoming) && !is_other(&self.record.current) {
            for port in &copy.spec.ports {
                self.host.switch.detach(port.port).await?;
            }
        }
        Ok(())
    }
}
