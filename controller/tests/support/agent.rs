//! An agent of the tests: a real link, the ownership protocol's own machines, and the [`Ground`] as its hypervisor, disks and
//! data plane. Its memory goes when it is killed; its [`Disk`] stays.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use supercloud_api::{
    CompatClass, Room,
    frame::{Frame, read_frame, write_frame},
    handover::{
        DestinationEvent, DestinationOrder, DestinationState, Found, LocalEvent, LocalHandover, OrderBody, Owner,
        OwnerQuery, Report, SourceEvent, SourceOrder, SourceState,
    },
    ids::{Epoch, GuestId, HostId, OperationId, VolumeId},
    link::{
        self, Announced, Answer, Assignment, Directive, Envelope, FrozenContent, FrozenMemory, GuestReport, Hello,
        Holding, Notice, Outcome, Query, ReportDetails, Welcome, kind,
    },
    ticket::Ticket,
    tls::{self, Identity},
    unix_ms,
};
use supercloud_sdn::view::OverlayView;
use tokio::{
    io::{ReadHalf, WriteHalf},
    net::TcpStream,
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_rustls::client::TlsStream;

use super::{
    Random,
    ground::{Ground, Mode},
};

/// How often an agent looks at its guests.
const TICK: Duration = Duration::from_millis(25);
/// Every so many ticks the machines are told that time passes.
const MACHINE_TICKS: u64 = 4;
const HEARTBEAT_TICKS: u64 = 8;
/// Every so many ticks leases are asked for.
const LEASE_TICKS: u64 = 8;
/// Ticks that a copy takes.
const COPY_TICKS: u32 = 3;

/// Where an agent can be made to stand still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Prepare,
    Copy,
    /// The source's last word to the destination.
    HandOver,
    Store,
    Run,
    Fetch,
    Release,
    Discard,
    /// The destination's removal of what it has received in vain.
    Clear,
}

/// What goes wrong by itself, in thousandths.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// Of messages, each way.
    pub lost: u64,
    /// Of ticks: the link breaks.
    pub cut: u64,
    /// Of steps: the agent dies between persisting a step and carrying it out, and starts again.
    pub crash: u64,
    pub stalled: BTreeSet<Stage>,
    /// It refuses to prepare anything.
    pub is_full: bool,
    /// Copying takes so many ticks more, and gets on with each.
    pub crawl_ticks: u32,
    /// What its cloud lacks of what its guests stand on, in bytes.
    pub base_missing: u64,
    /// What its provider has announced for it.
    pub announced: Option<Announced>,
    /// Moves wait with the pause where they are told to.
    pub takes_holds: bool,
}

/// What an agent keeps of a guest.
#[derive(Debug, Clone)]
pub struct Kept {
    pub machine: LocalHandover,
    pub volumes: Vec<VolumeId>,
    pub assignment: Option<Assignment>,
}

/// What an agent keeps.
#[derive(Debug, Default)]
pub struct Disk {
    pub guests: BTreeMap<GuestId, Kept>,
    pub view: Option<OverlayView>,
}

/// A host: what outlives its agent's process.
#[derive(Clone)]
pub struct Seat {
    pub host: HostId,
    pub identity: Identity,
    pub ca: rustls::pki_types::CertificateDer<'static>,
    pub overlay_address: std::net::Ipv4Addr,
    pub data_address: Option<SocketAddr>,
    pub disk: Arc<Mutex<Disk>>,
    pub faults: Arc<Mutex<Faults>>,
    pub ground: Arc<Mutex<Ground>>,
    pub controller: watch::Receiver<SocketAddr>,
    pub seed: u64,
}

pub fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The class that every host of the tests runs.
pub fn class() -> CompatClass {
    CompatClass {
        back_end: "fake".into(),
        accelerator: "none".into(),
        machine_version: "1".into(),
        cpu_baseline: "any".into(),
    }
}

impl Seat {
    /// Starts the agent's process.
    pub fn start(&self) -> JoinHandle<()> {
        let agent = Agent {
            seat: self.clone(),
            random: Random::new(self.seed ^ unix_ms()),
            link: None,
            outbox: VecDeque::new(),
            copying: BTreeMap::new(),
            released: BTreeSet::new(),
            has_crashed: false,
            ticks: 0,
            asked: BTreeMap::new(),
            queries: VecDeque::new(),
            ticket_key: String::new(),
        };
        tokio::spawn(agent.run())
    }

    pub async fn dial(&self, alpn: &[u8]) -> std::io::Result<TlsStream<TcpStream>> {
        let address = *self.controller.borrow();
        let config = tls::client_config(std::slice::from_ref(&self.ca), self.identity.clone(), alpn).unwrap();
        let stream = TcpStream::connect(address).await?;
        tokio_rustls::TlsConnector::from(Arc::new(config)).connect(tls::controller_server_name(), stream).await
    }

    pub fn hello(&self, guests: Vec<GuestReport>) -> Hello {
        Hello {
            host: self.host,
            agent_version: "test".into(),
            data_address: self.data_address,
            overlay_address: Some(self.overlay_address),
            overlay_encryption: None,
            capacity: Room { vcpus: 64, memory_bytes: 1 << 36, disk_bytes: 1 << 40 },
            compat_classes: vec![class()],
            probe: serde_json::json!({}),
            guests,
            volumes: Vec::new(),
            view_revision: 0,
            takes_sweeps: false,
            takes_consoles: false,
            knows_predictive: false,
            takes_checks: false,
            takes_points: true,
            takes_checkpoints: true,
            moves_none_live: false,
            takes_mirrors: true,
            takes_post_copy: true,
            takes_lazy_thaw: true,
            takes_holds: lock(&self.faults).takes_holds,
            measures_paths: false,
            tells_flows: false,
            takes_leases: true,
        }
    }
}

struct Link {
    writer: WriteHalf<TlsStream<TcpStream>>,
    directives: mpsc::Receiver<Heard>,
    reader: JoinHandle<()>,
    /// The newest overlay view in this session.
    told: Option<OverlayView>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// What the controller says.
enum Heard {
    Directive(Directive),
    Answer(Envelope<Outcome<Answer>>),
}

async fn read(mut reader: ReadHalf<TlsStream<TcpStream>>, heard: mpsc::Sender<Heard>) {
    while let Ok(frame) = read_frame(&mut reader).await {
        let said = match frame.kind {
            kind::DIRECTIVE => Heard::Directive(
                frame.parse_json(kind::DIRECTIVE, link::VERSION).expect("a directive that can be read"),
            ),
            kind::ANSWER => {
                Heard::Answer(frame.parse_json(kind::ANSWER, link::VERSION).expect("an answer that can be read"))
            }
            _ => continue,
        };
        if heard.send(said).await.is_err() {
            return;
        }
    }
}

async fn heard(link: &mut Option<Link>) -> Option<Heard> {
    link.as_mut()?.directives.recv().await
}

struct Agent {
    seat: Seat,
    random: Random,
    link: Option<Link>,
    outbox: VecDeque<Notice>,
    copying: BTreeMap<GuestId, (OperationId, u32)>,
    /// Moves that need not wait for others any more.
    released: BTreeSet<OperationId>,
    has_crashed: bool,
    ticks: u64,
    /// Of which guest and when leases were asked for, by the questions' numbers.
    asked: BTreeMap<u64, (GuestId, u64)>,
    queries: VecDeque<Envelope<Query>>,
    ticket_key: String,
}

impl Agent {
    async fn run(mut self) {
        self.restarted();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let directive = tokio::select! {
                directive = heard(&mut self.link), if self.link.is_some() => Some(directive),
                _ = ticks.tick() => None,
            };
            match directive {
                Some(Some(Heard::Answer(answer))) => {
                    if !self.is_lost() {
                        self.leased(answer);
                    }
                }
                Some(Some(Heard::Directive(directive))) => {
                    if !self.is_lost() {
                        self.obey(directive);
                    } else if matches!(directive, Directive::Overlay { .. }) {
                        // It is told once a session: it is lost with the session, or not at all.
                        self.link = None;
                    }
                }
                Some(None) => self.link = None,
                None => {
                    let cut = lock(&self.seat.faults).cut;
                    if self.random.is_hit(cut) {
                        self.link = None;
                    }
                    if self.link.is_none() {
                        self.link = tokio::time::timeout(Duration::from_secs(5), self.connect()).await.unwrap_or(None);
                    }
                    self.tick();
                }
            }
            if std::mem::take(&mut self.has_crashed) {
                self.link = None;
                self.outbox.clear();
                self.copying.clear();
                self.restarted();
            }
            self.flush().await;
        }
    }

    fn is_lost(&mut self) -> bool {
        let lost = lock(&self.seat.faults).lost;
        self.random.is_hit(lost)
    }

    async fn connect(&mut self) -> Option<Link> {
        let mut stream = self.seat.dial(tls::ALPN_AGENT).await.ok()?;
        let hello = self.seat.hello(self.reports());
        write_frame(&mut stream, &Frame::json(kind::HELLO, link::VERSION, &hello).unwrap()).await.ok()?;
        let welcome: Welcome = read_frame(&mut stream).await.ok()?.parse_json(kind::WELCOME, link::VERSION).unwrap();
        self.ticket_key = welcome.ticket_key;
        let (reader, writer) = tokio::io::split(stream);
        let (directives, received) = mpsc::channel(64);
        Some(Link { writer, directives: received, reader: tokio::spawn(read(reader, directives)), told: None })
    }

    async fn flush(&mut self) {
        while let Some(query) = self.queries.pop_front() {
            let Some(link) = self.link.as_mut() else { break };
            let frame = Frame::json(kind::QUERY, link::VERSION, &query).unwrap();
            if write_frame(&mut link.writer, &frame).await.is_err() {
                self.link = None;
            }
        }
        while let Some(notice) = self.outbox.pop_front() {
            if self.is_lost() {
                continue;
            }
            let Some(link) = &mut self.link else { return self.outbox.clear() };
            let frame = Frame::json(kind::NOTICE, link::VERSION, &notice).unwrap();
            if write_frame(&mut link.writer, &frame).await.is_err() {
                self.link = None;
            }
        }
    }

    fn reports(&self) -> Vec<GuestReport> {
        let disk = lock(&self.seat.disk);
        let mut ground = lock(&self.seat.ground);
        let base_missing = lock(&self.seat.faults).base_missing;
        let report = |(guest, kept): (&GuestId, &Kept)| {
            let machine = &kept.machine;
            let epoch = machine.destination().grant().map_or(machine.source().epoch(), |grant| grant.epoch);
            let local = ground.local(self.seat.host, *guest);
            let holding = match (machine.source().state(), local.by_epoch(epoch).map(|process| process.mode)) {
                (_, Some(Mode::Running)) => Holding::Running,
                (_, Some(_)) => Holding::Paused,
                (SourceState::Running, None) if local.is_off => Holding::Down,
                (_, None) if !local.processes.is_empty() => Holding::Incoming,
                (_, None) => Holding::Volumes,
            };
            let (operation, alarm) = (machine.destination().operation(), None);
            let base_missing_bytes = (holding == Holding::Running).then_some(base_missing);
            GuestReport {
                guest: *guest,
                epoch,
                holding,
                operation,
                alarm,
                missing_bytes: 0,
                base_missing_bytes,
                volumes: Vec::new(),
            }
        };
        disk.guests.iter().map(report).collect()
    }

    /// A new process finds what the one before has left.
    fn restarted(&mut self) {
        let host = self.seat.host;
        let guests: Vec<GuestId> = lock(&self.seat.disk).guests.keys().copied().collect();
        for guest in guests {
            let Some(machine) = self.machine(guest) else { continue };
            let (source, destination) = {
                let mut ground = lock(&self.seat.ground);
                let local = ground.local(host, guest);
                let (epoch, operation) = (machine.source().epoch(), machine.destination().operation());
                local.processes.retain(|p| p.epoch == Some(epoch) || Some(p.operation) == operation);
                let found = |process: Option<&mut super::ground::Process>| match process.map(|p| p.mode) {
                    None => Found::Nothing,
                    Some(Mode::Running) => Found::Running,
                    Some(_) => Found::Paused,
                };
                let source = match local.is_off {
                    // How a guest ended is kept beside it: it was no accident.
                    true => Found::Paused,
                    false => found(local.by_epoch(epoch)),
                };
                // A standby stays if it could go on.
                let is_receiving = matches!(machine.destination().state(), DestinationState::Receiving { .. });
                let has_cut = local.adopt.is_some();
                let destination = operation.map(|operation| match is_receiving && !has_cut {
                    true => Found::Nothing,
                    false => found(local.by_operation(operation)),
                });
                (source, destination)
            };
            self.step(guest, LocalEvent::Source(SourceEvent::Restarted { found: source }));
            if let Some(found) = destination {
                self.step(guest, LocalEvent::Destination(DestinationEvent::Restarted { found }));
            }
        }
    }

    pub(super) fn machine(&self, guest: GuestId) -> Option<LocalHandover> {
        lock(&self.seat.disk).guests.get(&guest).map(|kept| kept.machine.clone())
    }

    fn violate(&self, what: &str) {
        lock(&self.seat.ground).violate(format!("{}: {what}", self.seat.host));
    }

    fn obey(&mut self, directive: Directive) {
        let host = self.seat.host;
        match directive {
            Directive::Order { guest, order, assignment, .. } => {
                self.check_order(guest, &order, assignment.as_deref());
                let mut disk = lock(&self.seat.disk);
                let kept = disk.guests.entry(guest).or_insert_with(|| Kept {
                    machine: LocalHandover::idle(guest, host),
                    volumes: Vec::new(),
                    assignment: None,
                });
                if let Some(assignment) = assignment {
                    kept.volumes = assignment.spec.volumes.iter().map(|volume| volume.volume).collect();
                    kept.assignment = Some(*assignment);
                }
                drop(disk);
                self.step(guest, order.into());
            }
            Directive::Overlay { revision, view } => {
                let view: OverlayView = serde_json::from_value(view).expect("a view that can be read");
                if let Err(error) = view.check() {
                    self.violate(&format!("the view is refused: {error}"));
                }
                if view.revision != revision {
                    self.violate("the view is of another revision than its directive");
                }
                let told = self.link.as_mut().and_then(|link| link.told.replace(view.clone()));
                // A real agent takes none but a newer one: the same may come twice, another one must not.
                if let Some(before) = told
                    && before.revision >= revision
                    && before != view
                {
                    self.violate(&format!("a view is told that is no newer than the one before: {view:?}, {before:?}"));
                }
                lock(&self.seat.disk).view = Some(view);
            }
            Directive::OverlayPiece { .. } => self.violate("a small view comes in pieces"),
            Directive::Console { .. } => self.violate("it never said that it shows consoles"),
            Directive::MeasurePaths { .. } => self.violate("it never said that it measures paths"),
            Directive::SwitchOver { operation, .. } => {
                if !lock(&self.seat.faults).takes_holds {
                    self.violate("it never said that guests hold");
                }
                self.released.insert(operation);
            }
            Directive::TellFlows { .. } => self.violate("it never said that it tells flows"),
            Directive::Discard { guest } => {
                if lock(&self.seat.faults).stalled.contains(&Stage::Discard) {
                    return;
                }
                let mut ground = lock(&self.seat.ground);
                if ground.local(host, guest).is_running() {
                    ground.violate(format!("{guest} runs at {host} and is to be discarded"));
                }
                ground.locals.remove(&(host, guest));
                drop(ground);
                lock(&self.seat.disk).guests.remove(&guest);
                self.outbox.push_back(Notice::Discarded { guest });
            }
            Directive::CheckVolume { .. } | Directive::TakePoint { .. } => {}
            Directive::DropFreeze { freeze, .. } => {
                if let Some(frozen) = lock(&self.seat.ground).frozen.get_mut(&freeze) {
                    frozen.is_dropped = true;
                }
            }
            Directive::SweepStore => self.violate("it is told to sweep, and has never asked what lives"),
        }
    }

    /// What the agent needs must come with the order.
    fn check_order(&self, guest: GuestId, order: &OrderBody, assignment: Option<&Assignment>) {
        let operation = match order {
            OrderBody::Source(SourceOrder::Begin(plan)) => plan.operation,
            OrderBody::Destination(DestinationOrder::Prepare(plan)) => plan.operation,
            _ => return,
        };
        let Some(assignment) = assignment.filter(|a| a.operation == operation && a.spec.guest == guest) else {
            return self.violate(&format!("an order of {operation} without its assignment"));
        };
        if assignment.chunk_sources.is_empty() || assignment.spec.volumes.is_empty() || assignment.spec.ports.is_empty()
        {
            self.violate(&format!("the assignment of {operation} lacks something"));
        }
        let (Some(peer), Some(ticket)) = (&assignment.peer, &assignment.ticket) else { return };
        let is_dead = lock(&self.seat.ground).dead.contains(&peer.host);
        if is_dead
            && matches!(order, OrderBody::Destination(DestinationOrder::Prepare(plan)) if !plan.kind.has_source())
        {
            self.violate(&format!("{operation} is to have its blocks from a host that was removed"));
        }
        let me = tls::fingerprint(&self.seat.identity.chain[0]);
        let checked = Ticket::verify(ticket, &self.ticket_key, unix_ms())
            .and_then(|ticket| ticket.check_peer(&me, &peer.certificate_sha256).map(|()| ticket));
        match checked {
            Ok(ticket) if ticket.operation == Some(operation) && ticket.guest == Some(guest) => {}
            other => self.violate(&format!("the ticket of {operation} is not acceptable: {other:?}")),
        }
    }

    /// One event: step, persist, carry out; then what that brings.
    pub(super) fn step(&mut self, guest: GuestId, event: LocalEvent) {
        let crash = lock(&self.seat.faults).crash;
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let effects = {
                let mut disk = lock(&self.seat.disk);
                let Some(kept) = disk.guests.get_mut(&guest) else { return };
                kept.machine.step(event)
            };
            for effect in effects {
                if self.has_crashed || self.random.is_hit(crash) {
                    self.has_crashed = true;
                    return;
                }
                match effect.report() {
                    Some(report) => self.report(guest, report.clone()),
                    None => {
                        if !self.perform(guest, effect, &mut events) {
                            break;
                        }
                    }
                }
            }
        }
    }

    fn report(&mut self, guest: GuestId, report: Report) {
        let mut details = ReportDetails::default();
        match &report {
            Report::Prepared { .. } | Report::Running { .. } => details.compat_class = Some(class()),
            Report::RequestSwitch(request) => {
                if let Owner::Frozen(freeze) = request.to {
                    details.frozen = lock(&self.seat.ground).frozen.get(&freeze).map(|frozen| FrozenContent {
                        memory: FrozenMemory {
                            freeze,
                            root: root_of(frozen.boot),
                            bytes: 1 << 20,
                            format: "fake/1".into(),
                        },
                        volumes: frozen
                            .volumes
                            .iter()
                            .map(|volume| supercloud_api::FrozenVolume {
                                volume: *volume,
                                root: root_of(frozen.version),
                                stored_bytes: 4096,
                            })
                            .collect(),
                    });
                }
            }
            _ => {}
        }
        self.outbox.push_back(Notice::Report { guest, report, details: Box::new(details) });
    }

    fn tick(&mut self) {
        self.ticks += 1;
        lock(&self.seat.ground).write(self.seat.host);
        let guests: Vec<GuestId> = lock(&self.seat.disk).guests.keys().copied().collect();
        for guest in guests {
            self.look_at_source(guest);
            self.look_at_destination(guest);
            if self.ticks.is_multiple_of(MACHINE_TICKS) {
                self.step(guest, LocalEvent::Source(SourceEvent::Tick));
                self.step(guest, LocalEvent::Destination(DestinationEvent::Tick));
            }
            self.forget(guest);
        }
        if self.ticks.is_multiple_of(LEASE_TICKS) {
            self.ask_for_leases();
        }
        if self.ticks.is_multiple_of(HEARTBEAT_TICKS) {
            let heartbeat = Notice::Heartbeat {
                used: Room::default(),
                guests: self.reports(),
                view_revision: 0,
                announced: lock(&self.seat.faults).announced,
            };
            self.outbox.push_back(heartbeat);
        }
    }

    fn forget(&mut self, guest: GuestId) {
        let mut disk = lock(&self.seat.disk);
        let mut ground = lock(&self.seat.ground);
        let is_idle = disk.guests.get(&guest).is_some_and(|kept| kept.machine.is_idle());
        if is_idle && ground.local(self.seat.host, guest).is_empty() {
            disk.guests.remove(&guest);
            ground.locals.remove(&(self.seat.host, guest));
        }
    }

    pub(super) fn stamps(&self, guest: GuestId, version: u64) -> Vec<supercloud_api::handover::VolumeStamp> {
        let mut root = [0; 32];
        root[..8].copy_from_slice(&version.to_be_bytes());
        let stamp = |volume: &VolumeId| supercloud_api::handover::VolumeStamp { volume: *volume, root, version };
        lock(&self.seat.disk)
            .guests
            .get(&guest)
            .map(|kept| kept.volumes.iter().map(stamp).collect())
            .unwrap_or_default()
    }
}

/// A root that stands for a number.
pub fn root_of(number: u64) -> String {
    format!("{number:016x}{:048}", 0)
}

/// A source's question that a liar asks.
pub fn query(operation: Option<OperationId>, epoch: Epoch) -> OwnerQuery {
    OwnerQuery { operation, epoch, copy: supercloud_api::handover::LocalCopy::Intact, wants_back: true }
}

#[path = "effects.rs"]
mod effects;
#[path = "leases.rs"]
mod leases;
#[path = "look.rs"]
mod look;
