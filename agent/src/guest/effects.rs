//! What the machine wants, carried out. Each effect means "see to it that" and may be repeated.

use std::{collections::HashMap, sync::Arc, time::Duration};

use supercloud_api::{
    Code, CompatClass, Problem,
    data::HandoverMessage,
    ids::{Epoch, OperationId},
};
use supercloud_blanket::{
    backend::{PauseReason, RunState, StopMode},
    migrate::Verdict,
};
use supercloud_handover::{
    DestinationEffect, DestinationEvent, DestinationPlan, DestinationState, LocalEffect, LocalEvent, OperationKind,
    SourceEffect, SourceEvent, SourcePlan, SourceState, VolumeStamp,
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    actor::{Actor, Met},
    dials, machine,
    record::{CopyRecord, VolumeOrigin},
};
use crate::{
    chunks::{self, ChunkSources},
    durable::DurableError,
    jobs::{self, JobError, depart, fetch, freeze, prepare, receive},
    plane::{
        admission::Role,
        meeting::{Meeting, MeetingEvent, MeetingParams},
    },
    ports::PortError,
    volumes::VolumesError,
};

/// How often the destruction of a process is tried before its batch of effects is given up.
const KILL_TRIES: u32 = 3;
/// The pause between two tries.
const KILL_PAUSE: Duration = Duration::from_secs(1);
/// The pause after a shut-down that failed.
const SHUT_DOWN_PAUSE: Duration = Duration::from_secs(5);

/// Why an effect could not be carried out (now).
#[derive(Debug, thiserror::Error)]
pub(super) enum EffectError {
    #[error(transparent)]
    Job(#[from] JobError),
    #[error(transparent)]
    Volumes(#[from] VolumesError),
    #[error(transparent)]
    Backend(#[from] supercloud_blanket::BackendError),
    #[error(transparent)]
    Port(#[from] PortError),
    #[error("the guest's folders cannot be made")]
    Durable(#[from] DurableError),
    #[error("a socket of the guest cannot be made")]
    Socket(#[source] std::io::Error),
    #[error("nothing is here of epoch {0}")]
    NoCopy(Epoch),
    #[error("the order came without what is needed to carry it out")]
    NoAssignment,
    #[error("the guest's former copy here is still being released")]
    StillReleasing,
    #[error("the guest's state cannot be kept")]
    Unsaved,
    #[error("a worker died")]
    Worker(#[from] tokio::task::JoinError),
}

type Followed = Result<Vec<LocalEvent>, EffectError>;

fn source(event: SourceEvent) -> Vec<LocalEvent> {
    vec![LocalEvent::Source(event)]
}

fn destination(event: DestinationEvent) -> Vec<LocalEvent> {
    vec![LocalEvent::Destination(event)]
}

const DONE: Followed = Ok(Vec::new());

impl Actor {
    /// Carries one effect out; the events that follow from it.
    pub(super) async fn carry_out(&mut self, effect: LocalEffect) -> Followed {
        match effect {
            LocalEffect::Source(effect) => self.carry_out_source(effect).await,
            LocalEffect::Destination(effect) => self.carry_out_destination(effect).await,
        }
    }

    async fn carry_out_source(&mut self, effect: SourceEffect) -> Followed {
        match effect {
            SourceEffect::Send(report) => {
                self.send(report);
                DONE
            }
            SourceEffect::StartCopy(plan) => Ok(self.start_copy(&plan)),
            SourceEffect::StopCopy { .. } => {
                self.maps = None;
                if let Some(job) = self.jobs.leave.take() {
                    job.end().await;
                }
                if let Some(job) = self.jobs.store.take() {
                    job.end().await;
                }
                DONE
            }
            SourceEffect::ShutDownGuest { operation } => {
                self.shut_down(operation);
                DONE
            }
            SourceEffect::SealVolumes { operation, epoch } => self.seal(operation, epoch).await,
            SourceEffect::SendVolumeMaps { .. } => {
                let stamps = self.record.current.as_ref().map(|copy| copy.sealed.clone()).unwrap_or_default();
                if let Some(maps) = &self.maps {
                    // A job that has them already needs no more of them.
                    let _ = maps.try_send(stamps);
                }
                DONE
            }
            SourceEffect::StoreFreeze { operation, freeze } => {
                self.store_freeze(operation, freeze);
                DONE
            }
            SourceEffect::UnsealVolumes { epoch } => {
                let copy = self.current_at(epoch)?;
                for home in &copy.volumes {
                    self.host.runner.ensure(home).await?;
                    let unsealed = home.client().unseal(epoch).await;
                    unsealed.map_err(|source| JobError::Volume { what: "go on", source })?;
                }
                DONE
            }
            SourceEffect::ResumeGuest { epoch } => self.resume_source(epoch).await,
            SourceEffect::DestroyGuest { epoch } => {
                self.kill_at(epoch).await?;
                DONE
            }
            SourceEffect::ServeMemory { epoch } => {
                // Post-copy is refused at its beginning, so no order can lead here.
                tracing::error!(guest = %self.guest, %epoch, "asked to serve memory, which this agent never offers");
                DONE
            }
            SourceEffect::ServeVolumes { epoch } => {
                let copy = self.current_at(epoch)?;
                for home in &copy.volumes {
                    self.host.runner.ensure(home).await?;
                }
                let disk_bytes = copy.spec.volumes.iter().map(|volume| volume.size_bytes).sum();
                self.host.ledger.note_volumes(self.guest, disk_bytes);
                self.meet_again(Role::Source);
                DONE
            }
            SourceEffect::DeleteVolumes { epoch } => self.delete_volumes(epoch).await,
            SourceEffect::Raise(alarm) => {
                self.raise(&alarm).await;
                DONE
            }
            SourceEffect::Refuse(refusal) => {
                tracing::debug!(guest = %self.guest, %refusal, "the source's machine refuses an event");
                DONE
            }
        }
    }

    async fn carry_out_destination(&mut self, effect: DestinationEffect) -> Followed {
        match effect {
            DestinationEffect::Send(report) => {
                self.send(report);
                DONE
            }
            DestinationEffect::Prepare(plan) => self.prepare(plan).await,
            DestinationEffect::DestroyReceived { operation } => self.destroy_received(operation).await,
            DestinationEffect::ActivateVolumes { epoch } => {
                let from = self.granted_from().unwrap_or(epoch);
                let copy = self.incoming_at(epoch)?;
                prepare::activate(&self.host.runner, &copy, from).await?;
                DONE
            }
            DestinationEffect::ActivatePorts { epoch } => {
                let copy = self.incoming_at(epoch)?;
                for port in &copy.spec.ports {
                    self.host.switch.own(port.port, epoch).await?;
                }
                DONE
            }
            DestinationEffect::RunGuest { epoch } => self.run_guest(epoch).await,
            DestinationEffect::StartFetch { epoch } => {
                self.start_fetch(epoch)?;
                DONE
            }
            DestinationEffect::DestroyGuest { .. } => {
                if let Some(epoch) = self.record.incoming.as_ref().map(|copy| copy.epoch) {
                    self.kill_at(epoch).await?;
                }
                DONE
            }
            DestinationEffect::SealVolumes { epoch } => self.seal_granted(epoch).await,
            DestinationEffect::Raise(alarm) => {
                self.raise(&alarm).await;
                DONE
            }
            DestinationEffect::Refuse(refusal) => {
                tracing::debug!(guest = %self.guest, %refusal, "the destination's machine refuses an event");
                DONE
            }
        }
    }

    fn current_at(&self, epoch: Epoch) -> Result<CopyRecord, EffectError> {
        let copy = self.record.current.as_ref().filter(|copy| copy.epoch == epoch);
        copy.cloned().ok_or(EffectError::NoCopy(epoch))
    }

    /// The copy that was granted; it has its place until the machines turn.
    fn incoming_at(&self, epoch: Epoch) -> Result<CopyRecord, EffectError> {
        let copies = [&self.record.incoming, &self.record.current];
        let copy = copies.into_iter().flatten().find(|copy| copy.epoch == epoch);
        copy.cloned().ok_or(EffectError::NoCopy(epoch))
    }

    /// The epoch before the one that was granted.
    fn granted_from(&self) -> Option<Epoch> {
        match self.record.handover.destination().state() {
            DestinationState::Granted { plan, .. }
            | DestinationState::Running { plan, .. }
            | DestinationState::Complete { plan, .. } => Some(plan.from.epoch),
            _ => None,
        }
    }

    async fn raise(&mut self, alarm: &supercloud_handover::Alarm) {
        tracing::error!(guest = %self.guest, %alarm, "ALARM");
        self.record.alarm = Some(alarm.to_string());
        self.save().await;
    }

    // ------------------------------------------------------------------------------------------ source

    /// Whether a job of this kind works on the operation already; else the way is free.
    fn is_at_it(job: Option<&super::actor::Running>, operation: OperationId) -> bool {
        job.is_some_and(|job| job.operation == operation && !job.is_over())
    }

    fn start_copy(&mut self, plan: &SourcePlan) -> Vec<LocalEvent> {
        let operation = plan.operation;
        if Self::is_at_it(self.jobs.leave.as_ref(), operation) {
            return Vec::new();
        }
        self.problem = None;
        match self.try_start_copy(plan) {
            Ok(()) => Vec::new(),
            Err(problem) => {
                tracing::warn!(guest = %self.guest, %operation, %problem, "the copy cannot begin");
                self.problem = Some(problem);
                source(SourceEvent::CopyFailed { operation })
            }
        }
    }

    fn try_start_copy(&mut self, plan: &SourcePlan) -> Result<(), Problem> {
        let operation = plan.operation;
        let internal = |detail: &str| Problem::new(Code::Internal, detail);
        let copy = self.current_at(plan.epoch).map_err(|error| internal(&error.to_string()))?;
        if let OperationKind::Migrate { post_copy: true, .. } = plan.kind {
            return Err(Problem::new(Code::Unsupported, "this agent does not offer post-copy"));
        }
        let job = self.job(operation);
        if let OperationKind::Freeze { .. } = plan.kind {
            self.jobs.leave = Some(Self::start(&job.clone(), freeze::suspend(job, copy)));
            return Ok(());
        }
        let assignment = self.record.assignment.as_ref().filter(|assignment| assignment.operation == operation);
        let assignment = assignment.ok_or_else(|| internal("the order came without its assignment"))?;
        let options = assignment.migration.clone();
        let peer = assignment.peer.clone().ok_or_else(|| internal("the assignment names no destination"))?;
        self.check_reach(&peer)?;
        let mut meeting = Meeting::begin(self.meeting_params(operation, Some(peer), Role::Source));
        let events = meeting.take_events().ok_or_else(|| internal("the meeting has no events"))?;
        let (maps, wanted_maps) = tokio::sync::mpsc::channel(1);
        let wants = depart::Wants {
            epoch: plan.epoch,
            volumes: copy.volumes,
            options,
            peer: receive::Peer { handle: meeting.handle(), events },
            maps: wanted_maps,
        };
        self.met = Some(Met { operation, meeting, _listener: None });
        self.maps = Some(maps);
        self.jobs.leave = Some(Self::start(&job.clone(), depart::run(job, wants)));
        Ok(())
    }

    /// One of the two must be able to dial the other.
    fn check_reach(&self, peer: &supercloud_api::link::Peer) -> Result<(), Problem> {
        if peer.data_address.is_some() || self.host.plane.address.is_some() {
            return Ok(());
        }
        let error = crate::plane::PlaneError::NoAddress(peer.name.to_string());
        Err(Problem::new(Code::HostUnavailable, error.to_string()))
    }

    fn meeting_params(
        &self,
        operation: OperationId,
        peer: Option<supercloud_api::link::Peer>,
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

    /// Takes part in the last operation's meeting again, after a restart or when its job is over.
    pub(super) fn meet_again(&mut self, role: Role) {
        let Some(assignment) = &self.record.assignment else { return };
        let (operation, peer) = (assignment.operation, assignment.peer.clone());
        if peer.is_none() || self.met.as_ref().is_some_and(|met| met.operation == operation) {
            return;
        }
        let meeting = Meeting::begin(self.meeting_params(operation, peer, role));
        self.met = Some(Met { operation, meeting, _listener: None });
    }

    /// Another host starts the guest and wants the volumes that are sealed here: it has a ticket, this host no order.
    pub(super) fn meet_as_holder(&mut self, operation: OperationId) {
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

    fn shut_down(&mut self, operation: OperationId) {
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
                        () = job.cancel.cancelled() => return,
                        () = tokio::time::sleep(SHUT_DOWN_PAUSE) => {}
                    }
                    // It had its grace.
                    mode = StopMode::Kill;
                }
                job.tell(jobs::Fact::Event(LocalEvent::Source(SourceEvent::GuestPaused { operation }))).await;
            }
        };
        self.jobs.leave = Some(Self::start(&job, work));
    }

    async fn seal(&mut self, operation: Option<OperationId>, epoch: Epoch) -> Followed {
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

    fn store_freeze(&mut self, operation: OperationId, freeze: supercloud_api::ids::FreezeId) {
        if Self::is_at_it(self.jobs.store.as_ref(), operation) {
            return;
        }
        let (Some(copy), Some(spooled)) = (self.record.current.clone(), self.record.spooled.clone()) else {
            tracing::error!(guest = %self.guest, %operation, "a freeze is to be stored whose memory is not here");
            return;
        };
        let job = self.job(operation);
        self.jobs.store = Some(Self::start(&job.clone(), freeze::store(job, copy, spooled, freeze)));
    }

    async fn resume_source(&mut self, epoch: Epoch) -> Followed {
        let copy = self.current_at(epoch)?;
        let backend = self.host.backend.clone();
        let info = backend.status(self.guest).await?.filter(|info| info.epoch == epoch);
        match info.map(|info| info.state) {
            None => {
                if self.record.spooled.is_none() {
                    // What powered itself off goes on being off: that is told by itself.
                    let event = match self.record.is_off {
                        true => SourceEvent::GuestResumed { epoch },
                        false => SourceEvent::GuestGone,
                    };
                    return Ok(source(event));
                }
                self.thaw_back(&copy).await?;
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
        self.drop_spool().await;
        self.record.alarm = None;
        Ok(source(SourceEvent::GuestResumed { epoch }))
    }

    /// A freeze that came to nothing: the guest comes out of its file again.
    async fn thaw_back(&self, copy: &CopyRecord) -> Result<(), EffectError> {
        if let Some(spooled) = &self.record.spooled {
            let file = self.places.memory();
            self.host.backend.thaw(copy.launch.clone(), file, spooled.format.clone()).await?;
        }
        Ok(())
    }

    async fn drop_spool(&mut self) {
        if self.record.spooled.take().is_some() || self.record.frozen.take().is_some() {
            self.record.frozen = None;
            self.save().await;
            // It only takes room; the next freeze replaces it.
            let _ = tokio::fs::remove_file(self.places.memory()).await;
        }
    }

    /// Destroys the guest's process, if there is one of this epoch, whatever its state. Tried more than once: a copy
    /// without a right to run must not stay because a daemon was busy.
    pub(super) async fn kill_at(&self, epoch: Epoch) -> Result<(), EffectError> {
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

    async fn try_kill_at(&self, epoch: Epoch) -> Result<(), EffectError> {
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

    async fn delete_volumes(&mut self, epoch: Epoch) -> Followed {
        let deleted = source(SourceEvent::VolumesDeleted { epoch });
        let Ok(copy) = self.current_at(epoch) else { return Ok(deleted) };
        self.met = None;
        let is_lent = self.record.incoming.as_ref().is_some_and(|incoming| incoming.origin == VolumeOrigin::Local);
        if !is_lent {
            self.remove_copy(&copy).await?;
        }
        self.record.current = None;
        self.drop_spool().await;
        if self.record.incoming.is_none() {
            self.host.ledger.release(self.guest);
        }
        Ok(deleted)
    }

    /// Removes a copy's volumes from this host, and its ports where no other copy of the guest is here.
    async fn remove_copy(&self, copy: &CopyRecord) -> Result<(), EffectError> {
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

    // ------------------------------------------------------------------------------------------ destination

    async fn prepare(&mut self, plan: DestinationPlan) -> Followed {
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
            machine::describe(&plan, &assignment.spec, &class, &self.places, &self.host.boot_cache(), origin)
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
            bandwidth_bytes_per_s: assignment.migration.bandwidth_bps.map(|bps| (bps / 8).max(1)),
            frozen: assignment.frozen.clone(),
        };
        self.jobs.receive = Some(Self::start(&job.clone(), receive::run(job, wants)));
        DONE
    }

    fn cannot_prepare(&mut self, operation: OperationId, problem: Problem) -> Vec<LocalEvent> {
        tracing::warn!(guest = %self.guest, %operation, %problem, "the guest cannot come here");
        self.problem = Some(problem);
        destination(DestinationEvent::ReceiveFailed { operation })
    }

    /// Where the volumes of the copy come from.
    fn origin(
        &self,
        plan: &DestinationPlan,
        assignment: &supercloud_api::link::Assignment,
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
        let is_moved = matches!(plan.kind, OperationKind::Migrate { .. });
        let is_elsewhere = starts && assignment.peer.is_some();
        Ok(if is_moved || is_elsewhere { VolumeOrigin::Peer } else { VolumeOrigin::Fresh })
    }

    fn class(&self, wanted: &Option<CompatClass>) -> Result<CompatClass, Problem> {
        let mine = &self.host.classes;
        let first = mine.first().ok_or_else(|| Problem::new(Code::Unsupported, "this host cannot run any guest"))?;
        match wanted {
            None => Ok(first.clone()),
            Some(class) if mine.contains(class) => Ok(class.clone()),
            Some(class) => {
                let mine: Vec<String> = mine.iter().map(ToString::to_string).collect();
                let detail = format!("the guest runs as {class}; this host offers {}", mine.join(", "));
                Err(Problem::new(Code::Incompatible, detail))
            }
        }
    }

    pub(super) async fn make_folders(&self) -> Result<(), EffectError> {
        let (run, folder) = (self.places.run.clone(), self.places.folder.clone());
        let made = tokio::task::spawn_blocking(move || {
            crate::durable::make_folder(&folder)?;
            crate::durable::make_folder(&run)
        });
        Ok(made.await??)
    }

    /// Serves other clouds' chunks to this guest's volume processes.
    pub(super) fn offer_chunks(&mut self, copy: &CopyRecord) -> Result<Arc<ChunkSources>, EffectError> {
        let places = self.chunk_places.subscribe();
        let sources = Arc::new(ChunkSources::new(&self.host.plane, copy.spec.project, &places));
        // The old socket's task first: it would remove nothing, but must not answer any more.
        self.sources = None;
        let task = chunks::offer(sources.clone(), &self.places.chunk_socket()).map_err(EffectError::Socket)?;
        self.sources = Some((sources.clone(), task));
        Ok(sources)
    }

    fn meet_as_destination(
        &mut self,
        operation: OperationId,
        peer: supercloud_api::link::Peer,
        copy: &CopyRecord,
    ) -> Result<receive::Peer, EffectError> {
        let mut meeting = Meeting::begin(self.meeting_params(operation, Some(peer), Role::Destination));
        let handle = meeting.handle();
        let events = meeting.take_events().ok_or(EffectError::NoAssignment)?;
        self.offer_dials(copy, &handle)?;
        self.met = Some(Met { operation, meeting, _listener: None });
        Ok(receive::Peer { handle, events })
    }

    fn offer_dials(
        &mut self,
        copy: &CopyRecord,
        handle: &crate::plane::meeting::MeetingHandle,
    ) -> Result<(), EffectError> {
        self.dials.clear();
        for home in &copy.volumes {
            self.dials.push(dials::offer(home, handle.clone()).map_err(EffectError::Socket)?);
        }
        Ok(())
    }

    /// After a restart: the way to the blocks that are still at the source.
    pub(super) fn dial_again(&mut self, copy: &CopyRecord) -> Result<(), EffectError> {
        self.meet_again(Role::Destination);
        let Some(handle) = self.met.as_ref().map(|met| met.meeting.handle()) else { return Ok(()) };
        self.offer_dials(copy, &handle)
    }

    async fn destroy_received(&mut self, operation: OperationId) -> Followed {
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
    pub(super) fn has_received_process(&self) -> bool {
        match self.record.handover.destination().state() {
            DestinationState::Receiving { plan, .. }
            | DestinationState::Complete { plan, .. }
            | DestinationState::Granted { plan, .. }
            | DestinationState::Running { plan, .. } => {
                matches!(plan.kind, OperationKind::Migrate { .. } | OperationKind::Thaw { .. })
            }
            _ => true,
        }
    }

    async fn run_guest(&mut self, epoch: Epoch) -> Followed {
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
            Some(_) => backend.resume(self.guest, epoch).await?,
        }
        let running_at = tokio::time::Instant::now();
        if let Some((at, paused_for)) = self.arrived.take() {
            let downtime = paused_for + running_at.duration_since(at);
            let downtime_ms = u64::try_from(downtime.as_millis()).unwrap_or(u64::MAX);
            tracing::info!(guest = %self.guest, %epoch, downtime_ms, "the guest runs here");
            let told = supercloud_api::Progress { downtime_ms: Some(downtime_ms), ..self.progress.clone() };
            self.progressed(&told);
        }
        self.record.alarm = None;
        self.record.is_off = false;
        let disk_bytes = copy.spec.volumes.iter().map(|volume| volume.size_bytes).sum();
        self.host.ledger.note(self.guest, copy.spec.shape, disk_bytes);
        self.watched.lock().await.clone_from(&copy.all_volumes().cloned().collect());
        Ok(destination(DestinationEvent::GuestRunning { epoch }))
    }

    fn start_fetch(&mut self, epoch: Epoch) -> Result<(), EffectError> {
        let copy = self.incoming_at(epoch)?;
        if Self::is_at_it(self.jobs.fetch.as_ref(), copy.operation) {
            return Ok(());
        }
        let limit = self.record.assignment.as_ref().and_then(|assignment| assignment.migration.bandwidth_bps);
        let job = self.job(copy.operation);
        let work = fetch::run(job.clone(), epoch, copy.volumes, limit.map(|bps| (bps / 8).max(1)));
        self.jobs.fetch = Some(Self::start(&job, work));
        Ok(())
    }

    /// Seals the volumes of a copy that was granted and is lost: what they hold may be needed for a recovery.
    async fn seal_granted(&mut self, epoch: Epoch) -> Followed {
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

    // ------------------------------------------------------------------------------------------ others

    /// A disk did not answer: the guest stands still until it does. Tries to let it go on.
    pub(super) async fn resume_stalled(&mut self) {
        if !self.is_mine_to_run() {
            return;
        }
        let epoch = self.record.handover.destination().epoch().unwrap_or(self.record.handover.source().epoch());
        match self.host.backend.status(self.guest).await {
            Ok(Some(info)) if info.state == RunState::Paused(PauseReason::DiskError) => {
                if let Err(error) = self.host.backend.resume(self.guest, epoch).await {
                    tracing::debug!(guest = %self.guest, error = crate::chain(&error), "the disk does not answer yet");
                }
            }
            Ok(Some(info)) if info.state == RunState::Running => self.is_stalled = false,
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(guest = %self.guest, error = crate::chain(&error), "the hypervisor does not tell");
            }
        }
    }

    /// The guest was deleted: nothing of it stays. Whether nothing is left.
    pub(super) async fn discard(&mut self) -> bool {
        let jobs = std::mem::take(&mut self.jobs);
        for job in [jobs.leave, jobs.store, jobs.receive, jobs.fetch].into_iter().flatten() {
            job.end().await;
        }
        match self.try_discard().await {
            Ok(()) => {
                tracing::info!(guest = %self.guest, "discarded");
                self.host.link.tell_once(supercloud_api::link::Notice::Discarded { guest: self.guest });
                true
            }
            Err(error) => {
                tracing::warn!(guest = %self.guest, error = crate::chain(&error), "not discarded yet; told again, it is tried again");
                false
            }
        }
    }

    async fn try_discard(&mut self) -> Result<(), EffectError> {
        if let Some(info) = self.host.backend.status(self.guest).await? {
            self.kill_at(info.epoch).await?;
        }
        self.met = None;
        self.dials.clear();
        self.sources = None;
        for copy in [self.record.incoming.clone(), self.record.current.clone()].into_iter().flatten() {
            self.record.incoming = self.record.incoming.take().filter(|other| other.epoch != copy.epoch);
            self.remove_copy(&copy).await?;
            for port in &copy.spec.ports {
                self.host.switch.detach(port.port).await?;
            }
        }
        self.record.current = None;
        Ok(())
    }

    /// Removes the guest's folders.
    pub(super) async fn forget_files(&self) {
        let (run, folder) = (self.places.run.clone(), self.places.folder.clone());
        let removed = tokio::task::spawn_blocking(move || {
            crate::durable::remove_folder(&folder)?;
            crate::durable::remove_folder(&run)
        });
        if let Ok(Err(error)) = removed.await {
            tracing::warn!(guest = %self.guest, error = crate::chain(&error), "the guest's folders cannot be removed");
        }
    }
}
