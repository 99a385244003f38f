//! The task that owns a guest: takes events in, lets the machine decide, keeps the record, has the effects carried out.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use supercloud_api::{
    Problem, Progress,
    link::{Assignment, GuestEventKind, Notice},
};
use supercloud_handover::{DestinationEvent, LocalEffect, LocalEvent, Report, SourceEvent, SourceState, VolumeStamp};
use supercloud_ids::{GuestId, OperationId};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{
    GuestMessage, GuestView,
    lease::Leasing,
    reboots::Reboots,
    record::{GuestRecord, Places},
    report,
    watcher::{self, Look, Watched},
};
use crate::{
    chunks::{ChunkPlaces, ChunkSources},
    host::Host,
    jobs::{Fact, Job, Outcome, base::BaseFetch},
    plane::{Incoming, admission::Role, meeting::Meeting, not_here},
};

/// The protocol's timer.
const TICK: Duration = Duration::from_secs(1);
/// How often a host that only has blocks of a guest asks who owns it: there may be thousands of them.
const ASK_EVERY: Duration = Duration::from_secs(15);
/// How often the hypervisor is asked whether the guest is still there.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// How long a guest of which nothing is here is remembered.
const IDLE_BUDGET: Duration = Duration::from_secs(2);
/// How long a job that is not wanted any more may take to end.
const JOB_END_BUDGET: Duration = Duration::from_secs(90);
/// A console log larger than this is cut.
const CONSOLE_LOG_BYTES: u64 = 16 << 20;
/// Facts of jobs that may wait.
const FACTS: usize = 64;

/// A job under way.
pub(super) struct Running {
    pub operation: OperationId,
    cancel: CancellationToken,
    task: AbortOnDropHandle<Outcome>,
}

impl Running {
    pub fn is_over(&self) -> bool {
        self.task.is_finished()
    }

    /// Ends it, and waits for that; what it did to the guest's process.
    pub async fn end(self) -> Outcome {
        self.cancel.cancel();
        match tokio::time::timeout(JOB_END_BUDGET, self.task).await {
            Ok(ended) => ended.unwrap_or_default(),
            Err(_) => {
                tracing::warn!(operation = %self.operation, "a job did not end in time; it is dropped");
                Outcome::Nothing
            }
        }
    }
}

/// The jobs of a guest; at most one of each kind.
#[derive(Default)]
pub(super) struct Jobs {
    /// Copying, freezing or shutting down: what a source does.
    pub leave: Option<Running>,
    /// Storing a freeze.
    pub store: Option<Running>,
    /// Receiving: what a destination does.
    pub receive: Option<Running>,
    /// Fetching what is missing.
    pub fetch: Option<Running>,
    /// Serving memory that a move has left behind.
    pub serve: Option<Running>,
}

impl Jobs {
    /// Whether the guest's process may come, go or stand still by our own doing.
    pub fn may_change_the_process(&self) -> bool {
        [&self.leave, &self.store, &self.receive].into_iter().flatten().any(|job| !job.is_over())
    }
}

/// The two agents of an operation.
pub(super) struct Met {
    pub operation: OperationId,
    pub meeting: Meeting,
    /// Who listens to it here, where no job does.
    pub _listener: Option<AbortOnDropHandle<()>>,
}

pub(super) struct Actor {
    pub host: Arc<Host>,
    pub guest: GuestId,
    pub places: Places,
    pub record: GuestRecord,
    /// What is on disk.
    saved: Option<GuestRecord>,
    is_restart: bool,
    facts_tx: mpsc::Sender<Fact>,
    facts: mpsc::Receiver<Fact>,
    pub jobs: Jobs,
    pub leasing: Leasing,
    /// To the job that copies: the guest may be paused, if it was to wait with that.
    pub released: CancellationToken,
    /// To the job that copies: the maps of the sealed volumes.
    pub maps: Option<mpsc::Sender<Vec<VolumeStamp>>>,
    pub met: Option<Met>,
    /// To the job that stands by.
    pub take_over: Option<Arc<tokio::sync::Notify>>,
    /// To the job that fetches.
    pub source_lost: Arc<tokio::sync::Notify>,
    /// Why memory that is missing cannot be had for now.
    memory_alarm: Option<String>,
    pub ticket: watch::Sender<String>,
    pub chunk_places: ChunkPlaces,
    /// What the chunk socket leads to, and its task.
    pub sources: Option<(Arc<ChunkSources>, AbortOnDropHandle<()>)>,
    /// Brings here what the volumes stand on, while the guest runs.
    base: Option<BaseFetch>,
    /// Volumes' ways to their source.
    pub dials: Vec<AbortOnDropHandle<()>>,
    pub watched: Watched,
    looks: mpsc::Receiver<Look>,
    _watcher: AbortOnDropHandle<()>,
    look: Look,
    /// How far `progress_of` is.
    pub progress: Progress,
    progress_of: Option<OperationId>,
    pub problem: Option<Problem>,
    /// The state arrived then; the source had paused it so long before.
    pub arrived: Option<(Instant, Duration)>,
    /// A disk did not answer, and the guest stands still.
    pub is_stalled: bool,
    pub reboots: Reboots,
    /// Events that could not be taken, because the record could not be kept.
    unkept: VecDeque<LocalEvent>,
    looked_at: Instant,
    asked_at: Instant,
    idle_since: Instant,
    view: watch::Sender<GuestView>,
}

/// What nobody says again, each once: ticks come by themselves, and the controller repeats its orders.
fn told_once(events: VecDeque<LocalEvent>) -> VecDeque<LocalEvent> {
    let mut kept = VecDeque::new();
    for event in events {
        let is_repeated = matches!(
            event,
            LocalEvent::Source(SourceEvent::Tick | SourceEvent::Order(_))
                | LocalEvent::Destination(DestinationEvent::Tick | DestinationEvent::Order(_))
        );
        if !is_repeated && !kept.contains(&event) {
            kept.push_back(event);
        }
    }
    kept
}

impl Actor {
    pub fn new(host: Arc<Host>, guest: GuestId, record: Option<GuestRecord>, view: watch::Sender<GuestView>) -> Self {
        let (facts_tx, facts) = mpsc::channel(FACTS);
        let (looks_tx, looks) = mpsc::channel(1);
        let watched = Watched::default();
        let watcher = tokio::spawn(watcher::run(host.clone(), watched.clone(), looks_tx));
        let places = host.places(guest);
        let is_restart = record.is_some();
        let saved = record.clone();
        let record = record.unwrap_or_else(|| GuestRecord::new(guest, host.id));
        let assignment = record.assignment.as_ref();
        let ticket = watch::Sender::new(assignment.and_then(|a| a.ticket.clone()).unwrap_or_default());
        let chunk_places = ChunkPlaces::new(host.link.clone(), guest);
        chunk_places.set(assignment.map(|a| a.chunk_sources.clone()).unwrap_or_default());
        Self {
            host,
            guest,
            places,
            record,
            saved,
            is_restart,
            facts_tx,
            facts,
            jobs: Jobs::default(),
            // An agent before may have kept one.
            leasing: if is_restart { Leasing::Left } else { Leasing::None },
            released: CancellationToken::new(),
            maps: None,
            met: None,
            take_over: None,
            source_lost: Arc::default(),
            memory_alarm: None,
            ticket,
            chunk_places,
            sources: None,
            base: None,
            dials: Vec::new(),
            watched,
            looks,
            _watcher: AbortOnDropHandle::new(watcher),
            look: Look::default(),
            progress: Progress::default(),
            progress_of: None,
            problem: None,
            arrived: None,
            is_stalled: false,
            reboots: Reboots::default(),
            unkept: VecDeque::new(),
            looked_at: Instant::now(),
            asked_at: Instant::now(),
            idle_since: Instant::now(),
            view,
        }
    }

    pub async fn run(mut self, mut mailbox: mpsc::Receiver<GuestMessage>, ended: mpsc::Sender<GuestId>) {
        if self.is_restart {
            self.publish();
            let events = self.restore().await;
            self.keep_lease().await;
            self.process(events).await;
        }
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.publish();
            tokio::select! {
                message = mailbox.recv() => match message {
                    Some(GuestMessage::Discard) => {
                        if self.discard().await {
                            break;
                        }
                    }
                    Some(message) => self.hear(message).await,
                    None => return,
                },
                Some(fact) = self.facts.recv() => self.learn(fact).await,
                Some(look) = self.looks.recv() => self.looked(look).await,
                _ = ticks.tick() => {
                    self.tick().await;
                    if self.is_forgettable() && self.idle_since.elapsed() > IDLE_BUDGET && mailbox.is_empty() {
                        break;
                    }
                }
            }
        }
        self.forget_files().await;
        self.host.ledger.release(self.guest);
        // The host's own end needs no word of it.
        let _ = ended.send(self.guest).await;
    }

    fn is_forgettable(&self) -> bool {
        self.record.handover.is_idle() && self.record.current.is_none() && self.record.incoming.is_none()
    }

    async fn hear(&mut self, message: GuestMessage) {
        self.idle_since = Instant::now();
        match message {
            GuestMessage::Order { order, assignment } => {
                if let Some(assignment) = assignment {
                    self.assigned(*assignment);
                }
                self.process([LocalEvent::from(order)]).await;
            }
            GuestMessage::LinkUp { owned } => {
                match report::reconcile(&self.record.handover, owned) {
                    // Whoever calls a guest lost that runs makes a second copy of it.
                    Some(Report::GuestLost { .. }) if self.may_have_a_process().await => {
                        tracing::error!(guest = %self.guest, "the guest is here, and what this agent knew of it is not");
                    }
                    Some(report) => self.send(report),
                    None => {}
                }
                self.process(self.ticks()).await;
            }
            GuestMessage::Event(event) => self.happened(event).await,
            GuestMessage::SwitchOver { operation } => {
                if self.jobs.leave.as_ref().is_some_and(|job| job.operation == operation) {
                    self.released.cancel();
                }
            }
            GuestMessage::Look => self.look_for_process().await,
            GuestMessage::Incoming(incoming) => self.met_by(*incoming).await,
            // Taken by the loop.
            GuestMessage::Discard => {}
        }
    }

    /// What came with an order counts from now on; fresh tickets reach what is under way.
    fn assigned(&mut self, assignment: Assignment) {
        let is_same = self.record.assignment.as_ref().is_some_and(|had| had.operation == assignment.operation);
        let is_busy = report::operation(&self.record.handover).is_some();
        if !is_same && is_busy {
            // For an operation that the machine will refuse as long as another is under way.
            tracing::debug!(guest = %self.guest, operation = %assignment.operation, "an assignment comes too early or late");
            return;
        }
        if let Some(ticket) = &assignment.ticket {
            self.ticket.send_if_modified(|had| std::mem::replace(had, ticket.clone()) != *ticket);
        }
        self.chunk_places.set(assignment.chunk_sources.clone());
        self.record.assignment = Some(assignment);
    }

    async fn learn(&mut self, fact: Fact) {
        self.idle_since = Instant::now();
        match fact {
            Fact::Event(event) => self.process([event]).await,
            Fact::Progress(told) => self.progressed(&told),
            Fact::Problem(problem) => self.problem = Some(*problem),
            // Kept before the event that follows it: it may say that a file is all there is of the guest.
            Fact::Outcome(operation, outcome) => self.conclude(operation, outcome).await,
            Fact::Frozen(frozen) => {
                self.record.frozen = Some(*frozen);
                self.save().await;
            }
            Fact::Arrived { at, paused_for } => self.arrived = Some((at, paused_for)),
            Fact::MemoryStalled(why) => self.memory_alarm = why,
        }
    }

    pub fn progressed(&mut self, told: &Progress) {
        let operation = report::operation(&self.record.handover);
        if operation != self.progress_of {
            self.progress = Progress::default();
            self.progress_of = operation;
        }
        report::merge(&mut self.progress, told);
        if let Some(operation) = operation {
            self.host.link.tell(Notice::Progress { operation, progress: self.progress.clone() });
        }
    }

    async fn looked(&mut self, look: Look) {
        let mended = look.mended;
        self.look = look;
        if mended {
            self.is_stalled = true;
        }
        if self.is_stalled {
            self.resume_stalled().await;
        }
    }

    fn ticks(&self) -> Vec<LocalEvent> {
        vec![LocalEvent::Source(SourceEvent::Tick), LocalEvent::Destination(DestinationEvent::Tick)]
    }

    async fn tick(&mut self) {
        if !self.record.handover.is_idle() || !self.is_forgettable() {
            self.idle_since = Instant::now();
        }
        let is_serving = matches!(self.record.handover.source().state(), SourceState::Serving { .. });
        if is_serving && self.asked_at.elapsed() < ASK_EVERY {
            // Nothing but the question who owns the guest now; the controller tells by itself when that changes.
            self.process([LocalEvent::Destination(DestinationEvent::Tick)]).await;
        } else {
            self.asked_at = Instant::now();
            self.process(self.ticks()).await;
        }
        self.keep_lease().await;
        self.bring_base();
        self.tell_reboots();
        if self.looked_at.elapsed() > LOOK_EVERY {
            self.looked_at = Instant::now();
            self.look_for_process().await;
            self.trim_console().await;
        }
    }

    /// Has what the guest's volumes stand on brought into this cloud's store, while nothing else is done with the guest: a
    /// guest that runs must need neither the controller nor the cloud from which it came.
    fn bring_base(&mut self) {
        if !self.is_mine_to_run() {
            // A job wants the line for itself; what was brought so far is kept.
            self.base = None;
            return;
        }
        let copy = self.record.incoming.as_ref().or(self.record.current.as_ref());
        if let (Some(copy), Some((sources, _))) = (copy, &self.sources)
            && !self.base.as_ref().is_some_and(|base| base.is_for(copy))
        {
            self.base = Some(BaseFetch::begin(self.guest, copy, sources, &self.host));
        }
    }

    async fn trim_console(&self) {
        let log = self.places.console_log();
        let trimmed =
            tokio::task::spawn_blocking(move || supercloud_libvirt::console::trim_log(&log, CONSOLE_LOG_BYTES)).await;
        if let Ok(Err(error)) = trimmed {
            tracing::warn!(guest = %self.guest, %error, "the console's log cannot be kept small");
        }
    }

    pub fn tell_event(&self, event: GuestEventKind) {
        self.tell_events(event, 1);
    }

    pub fn tell_events(&self, event: GuestEventKind, times: u32) {
        let epoch = self.record.handover.destination().epoch().unwrap_or(self.record.handover.source().epoch());
        self.host.link.tell_once(Notice::GuestEvent { guest: self.guest, epoch, event, times });
    }

    /// Feeds events to the machine, one after the other, with all that follows from them.
    pub async fn process(&mut self, events: impl IntoIterator<Item = LocalEvent>) {
        let mut events: VecDeque<LocalEvent> = std::mem::take(&mut self.unkept).into_iter().chain(events).collect();
        while let Some(event) = events.pop_front() {
            let before = self.record.clone();
            let effects = self.record.handover.step(event.clone());
            if self.record.handover != before.handover {
                tracing::debug!(guest = %self.guest, ?event, source = ?self.record.handover.source().state(), destination = ?self.record.handover.destination().state(), "step");
            }
            if let Some(replaced) = self.record.turn() {
                tracing::debug!(guest = %self.guest, epoch = %replaced.epoch, "an older copy is replaced");
            }
            if !self.save().await {
                // What is not remembered must not be done: the next tick tries again.
                let alarm = self.record.alarm.take();
                self.record = before;
                self.record.alarm = alarm;
                events.push_front(event);
                self.unkept = told_once(events);
                return;
            }
            self.carry_out_all(effects, &mut events).await;
            self.settle().await;
            if self.leasing.is_kept() {
                self.keep_lease().await;
            }
        }
    }

    async fn carry_out_all(&mut self, effects: Vec<LocalEffect>, events: &mut VecDeque<LocalEvent>) {
        for effect in effects {
            match self.carry_out(effect.clone()).await {
                Ok(followed) => events.extend(followed),
                Err(error) => {
                    let error = crate::chain(&error);
                    tracing::warn!(guest = %self.guest, ?effect, error, "could not be carried out; it is tried again");
                    return;
                }
            }
        }
    }

    /// Lets go of what is not needed in the machine's new state.
    async fn settle(&mut self) {
        let handover = &self.record.handover;
        if !handover.is_quiet() {
            return;
        }
        self.arrived = None;
        if self.jobs.fetch.as_ref().is_some_and(Running::is_over) {
            self.jobs.fetch = None;
        }
        if self.met.take().is_some() {
            self.dials.clear();
            if let Some(copy) = &self.record.current {
                for home in &copy.volumes {
                    // A socket that nobody serves any more.
                    let _ = tokio::fs::remove_file(home.peer_dial()).await;
                }
            }
        }
        if let Some(job) = self.jobs.leave.take() {
            job.end().await;
        }
        self.maps = None;
    }

    pub fn send(&self, report: Report) {
        let details = report::details(&report, &self.record, (&self.progress, self.progress_of), self.problem.as_ref());
        self.host.link.tell(Notice::Report { guest: self.guest, report, details: Box::new(details) });
    }

    /// Keeps the record, if it differs from what is kept. Whether it is kept now.
    pub async fn save(&mut self) -> bool {
        if self.saved.as_ref() == Some(&self.record) || (self.saved.is_none() && self.is_forgettable()) {
            return true;
        }
        let (record, places) = (self.record.clone(), self.places.clone());
        let kept = tokio::task::spawn_blocking(move || record.save(&places).map(|()| record)).await;
        match kept {
            Ok(Ok(record)) => {
                self.saved = Some(record);
                true
            }
            Ok(Err(error)) => {
                let error = crate::chain(&error);
                tracing::error!(guest = %self.guest, error, "the guest's state cannot be kept; nothing is done");
                self.record.alarm = Some(format!("the agent cannot keep the guest's state: {error}"));
                false
            }
            Err(_) => false,
        }
    }

    pub fn job(&self, operation: OperationId) -> Job {
        Job {
            host: self.host.clone(),
            guest: self.guest,
            operation,
            places: self.places.clone(),
            facts: self.facts_tx.clone(),
            cancel: CancellationToken::new(),
        }
    }

    /// Starts a job's task.
    pub fn start<O: Into<Outcome>>(job: &Job, work: impl Future<Output = O> + Send + 'static) -> Running {
        Running {
            operation: job.operation,
            cancel: job.cancel.clone(),
            task: AbortOnDropHandle::new(tokio::spawn(async move { work.await.into() })),
        }
    }

    /// Another agent opened a connection with a ticket for this guest.
    async fn met_by(&mut self, incoming: Incoming) {
        let ticket = &incoming.ticket;
        let Some(operation) = ticket.operation else {
            incoming.refuse(not_here("the ticket names no operation")).await;
            return;
        };
        let handover = &self.record.handover;
        let is_current = match incoming.role {
            Role::Source => ticket.epoch == handover.source().epoch(),
            Role::Destination => {
                report::operation(handover) == Some(operation)
                    && self.record.incoming.as_ref().is_some_and(|copy| copy.epoch == ticket.epoch.next())
            }
        };
        if !is_current {
            incoming.refuse(not_here("the ticket is for another epoch of the guest than this host's")).await;
            return;
        }
        let is_met = self.met.as_ref().is_some_and(|met| met.operation == operation);
        let is_serving = matches!(handover.source().state(), SourceState::Serving { .. });
        if !is_met && incoming.role == Role::Source && is_serving {
            self.meet_as_holder(operation);
        }
        match &self.met {
            Some(met) if met.operation == operation => met.meeting.arrived(incoming),
            _ => incoming.refuse(not_here("this host does not take part in the operation (yet)")).await,
        }
    }

    fn publish(&self) {
        let base_missing = self.base.as_ref().and_then(BaseFetch::missing_bytes);
        let over = self.leasing.alarm();
        let alarm = over.or(self.memory_alarm.as_deref()).or(self.look.alarm.as_deref());
        let row =
            report::row(&self.record, self.is_stalled || over.is_some(), alarm, self.look.missing_bytes, base_missing);
        let copy = self.record.incoming.as_ref().or(self.record.current.as_ref());
        let runs_here = row.as_ref().is_some_and(|row| {
            use supercloud_api::link::Holding::{Paused, Running};
            matches!(row.holding, Running | Paused)
        });
        let spec = copy.filter(|_| runs_here).map(|copy| &copy.spec);
        let view = GuestView {
            epoch: row.as_ref().map_or_else(Default::default, |row| row.epoch),
            ports: spec.map_or_else(Vec::new, |spec| spec.ports.iter().map(|port| port.port).collect()),
            spec: None,
            report: row,
        };
        self.view.send_if_modified(|had| {
            let is_same_spec = had.spec.as_deref() == spec;
            if is_same_spec && had.report == view.report && had.ports == view.ports && had.epoch == view.epoch {
                return false;
            }
            let spec = if is_same_spec { had.spec.clone() } else { spec.cloned().map(Arc::new) };
            *had = GuestView { spec, ..view };
            true
        });
    }
}
