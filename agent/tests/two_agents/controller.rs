//! A controller for tests: real TLS links, the ownership protocol's own decisions over records in memory, tickets, and faults
//! that a test injects.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair,
};
use rustls::pki_types::CertificateDer;
use supercloud_agent::identity::{Identity, Request};
use supercloud_api::{
    Code, MemoryMode, Problem,
    frame::{Frame, read_frame, write_frame},
    handover::{
        self, AbortReason, BeginRequest, DestinationOrder, OperationKind, Order, OrderBody, Owner, OwnerRecord, Phase,
        Report, SourceOrder, WhenOpen,
    },
    ids::{CloudId, FreezeId, GuestId, HostId, OperationId, ProjectId, VolumeId},
    link::{
        self, Answer, Assignment, ChunkSource, Directive, Envelope, FrozenContent, GuestSpec, Hello, MigrationOptions,
        MirrorOptions, Notice, Outcome, Peer, Query, Welcome, kind,
    },
    ticket::{Party, Signer, Ticket},
    tls, unix_ms,
};
use supercloud_storage::{
    backend::DirStore,
    key::{ChunkKind, ContentRoot, DataKeys, ProjectKey},
    manifest::names_of,
    source::ChunkReader,
};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_rustls::TlsAcceptor;

/// What a test knows of a host.
#[derive(Clone)]
pub struct HostInfo {
    pub id: HostId,
    pub name: String,
    pub data_address: Option<SocketAddr>,
    pub certificate_sha256: String,
    pub cloud: CloudId,
}

/// Something that happens when a report comes in, before it is taken.
pub type Hook = Box<dyn FnMut(HostId, &Report) -> Verdict + Send>;

/// What becomes of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is taken.
    Take,
    /// It is lost.
    Drop,
    /// The operation is aborted first.
    AbortFirst,
}

struct State {
    records: HashMap<GuestId, OwnerRecord>,
    specs: HashMap<GuestId, GuestSpec>,
    /// To sweeps: as if nothing were known.
    is_forgetful: bool,
    hosts: BTreeMap<HostId, HostInfo>,
    links: HashMap<HostId, mpsc::UnboundedSender<Directive>>,
    cut: HashSet<HostId>,
    removed: HashSet<HostId>,
    frozen: Option<(FrozenContent, HostId)>,
    pub progress: HashMap<OperationId, supercloud_api::Progress>,
    problems: Vec<supercloud_api::Problem>,
    discarded: HashSet<GuestId>,
    consoles: Vec<(HostId, u64, link::ConsoleNews)>,
    /// The newest word of each.
    paths: HashMap<HostId, Vec<link::PathMeasured>>,
    flows: Vec<(HostId, u64, link::Outcome<link::FlowsTold>)>,
    events: Vec<link::GuestEventKind>,
    hook: Option<Hook>,
    /// Queries that are still to be left unanswered, with a broken link.
    queries_to_lose: u32,
    /// Assignments bring chunk sources whose tickets are too old.
    tickets_have_aged: bool,
    /// What each host said last of a guest.
    reports: HashMap<(HostId, GuestId), link::GuestReport>,
    /// What sweeps of stores told.
    swept: Vec<(HostId, link::StoreSwept)>,
    /// What checks of volumes told.
    checked: Vec<(HostId, link::VolumeChecked)>,
    points: Vec<(HostId, link::PointTaken)>,
    /// How often sources were asked for since.
    asked_for_sources: u32,
    /// Of the moves that begin, in bits per second.
    bandwidth_bps: Option<u64>,
    /// Which memory of the moves that begin may follow.
    memory: MemoryMode,
    /// Whether guests that are thawed from now on wait for theirs.
    thaw: link::ThawWish,
    /// By which the mirrors that begin are fenced, in milliseconds.
    lease_ms: Option<u64>,
    /// How many leases were granted.
    granted: u64,
}

pub struct Controller {
    state: Mutex<State>,
    signer: Signer,
    issuer: Issuer<'static, KeyPair>,
    ca_pem: String,
    pub address: SocketAddr,
    certificate: tls::Identity,
}

fn party(state: &State, host: HostId) -> Party {
    Party { host: Some(host), certificate_sha256: state.hosts[&host].certificate_sha256.clone() }
}

/// What the guests of a project stand on, and its freeze if none has thawed it.
fn live(state: &State, project: ProjectId) -> Answer {
    let specs = state.specs.values().filter(|spec| spec.project == project);
    let mut roots: std::collections::BTreeSet<String> =
        specs.clone().flat_map(|spec| &spec.volumes).filter_map(|volume| volume.base_root.clone()).collect();
    let is_frozen = |spec: &GuestSpec| matches!(state.records[&spec.guest].owner, Owner::Frozen(_));
    if let (true, Some((content, _))) = (specs.clone().any(is_frozen), &state.frozen) {
        roots.insert(content.memory.root.clone());
    }
    if state.is_forgetful {
        roots.clear();
    }
    Answer::StoreRoots {
        roots: roots.into_iter().map(|root| link::StoreRoot { root, is_home: true }).collect(),
        more: false,
        oldest_writer_ms: None,
        mark: link::HistoryMark { seq: 0, hash: String::new() },
        is_holder_gone: false,
        gone: Vec::new(),
    }
}

impl Controller {
    pub async fn begin() -> Arc<Self> {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let ca_pem = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        let own = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![tls::CONTROLLER_NAME.to_owned()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&own, &issuer).unwrap().pem();
        let certificate = tls::Identity {
            chain: tls::certificates_of_pem(&certificate).unwrap(),
            key: tls::key_of_pem(&own.serialize_pem()).unwrap(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let controller = Arc::new(Self {
            state: Mutex::new(State {
                records: HashMap::new(),
                specs: HashMap::new(),
                is_forgetful: false,
                checked: Vec::new(),
                points: Vec::new(),
                hosts: BTreeMap::new(),
                links: HashMap::new(),
                cut: HashSet::new(),
                removed: HashSet::new(),
                frozen: None,
                thaw: link::ThawWish::Whole,
                swept: Vec::new(),
                progress: HashMap::new(),
                problems: Vec::new(),
                discarded: HashSet::new(),
                consoles: Vec::new(),
                paths: HashMap::new(),
                flows: Vec::new(),
                events: Vec::new(),
                hook: None,
                queries_to_lose: 0,
                tickets_have_aged: false,
                reports: HashMap::new(),
                asked_for_sources: 0,
                bandwidth_bps: None,
                memory: MemoryMode::PreCopy,
                lease_ms: None,
                granted: 0,
            }),
            signer: Signer::from_pkcs8(&Signer::generate_pkcs8().unwrap()).unwrap(),
            issuer,
            ca_pem,
            address: listener.local_addr().unwrap(),
            certificate,
        });
        tokio::spawn(controller.clone().listen(listener));
        tokio::spawn(controller.clone().repeat());
        controller
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Certifies a host.
    pub fn join(&self, host: HostId) -> Identity {
        let request = Request::make(host).unwrap();
        let certificate = self.certify(host, &request.csr_pem);
        request.complete(host, certificate, self.ca_pem.clone(), self.address.to_string()).unwrap()
    }

    fn certify(&self, host: HostId, csr_pem: &str) -> String {
        let mut csr = CertificateSigningRequestParams::from_pem(csr_pem).unwrap();
        let mut params = CertificateParams::new(vec![tls::host_dns_name(host)]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        csr.params = params;
        csr.signed_by(&self.issuer).unwrap().pem()
    }

    pub fn add_host(&self, info: HostInfo) {
        self.state().hosts.insert(info.id, info);
    }

    pub fn add_guest(&self, spec: GuestSpec) {
        let mut state = self.state();
        state.records.insert(spec.guest, OwnerRecord::new(spec.guest));
        state.specs.insert(spec.guest, spec);
    }

    /// Injects a fault; replaces the one before.
    pub fn hook(&self, hook: impl FnMut(HostId, &Report) -> Verdict + Send + 'static) {
        self.state().hook = Some(Box::new(hook));
    }

    pub fn unhook(&self) {
        self.state().hook = None;
    }

    /// The next queries break the link they come by.
    pub fn lose_queries(&self, count: u32) {
        self.state().queries_to_lose = count;
    }

    /// A ticket, signed as it is.
    pub fn sign(&self, ticket: &Ticket) -> String {
        self.signer.sign(ticket)
    }

    /// The CA alone.
    pub fn ca(&self) -> Vec<CertificateDer<'static>> {
        tls::certificates_of_pem(&self.ca_pem).unwrap()
    }

    /// Cuts a host's link, and keeps it cut until `heal`.
    pub fn cut(&self, host: HostId) {
        let mut state = self.state();
        state.cut.insert(host);
        state.links.remove(&host);
    }

    /// An operator removes a host.
    pub fn remove(&self, host: HostId) {
        let mut state = self.state();
        state.removed.insert(host);
        state.links.remove(&host);
    }

    /// The host is dead, an operator says of this guest.
    pub fn lose(&self, guest: GuestId, host: HostId) {
        let mut state = self.state();
        if let Some(record) = handover::note_host_lost(&state.records[&guest], host).record {
            state.records.insert(guest, record);
        }
        drop(state);
        self.send_orders(guest);
    }

    /// The guest is set back to a checkpoint that this host has taken.
    pub fn set_back(&self, guest: GuestId, freeze: FreezeId, point: &link::PointContent, host: HostId) {
        let mut state = self.state();
        let record = handover::set_back(&state.records[&guest], freeze).unwrap_or_else(|refusal| panic!("{refusal}"));
        state.records.insert(guest, record);
        let memory = point.memory.clone().expect("it has memory");
        let memory = link::FrozenMemory { freeze, root: memory.root, bytes: memory.bytes, format: memory.format };
        for volume in &mut state.specs.get_mut(&guest).unwrap().volumes {
            volume.base_root = Some(point.root.clone());
        }
        state.frozen = Some((FrozenContent { memory, volumes: Vec::new() }, host));
        drop(state);
        self.send_orders(guest);
    }

    pub fn heal(&self, host: HostId) {
        self.state().cut.remove(&host);
    }

    pub fn record(&self, guest: GuestId) -> OwnerRecord {
        self.state().records[&guest].clone()
    }

    /// What the moves from now on may take of the link, in bits per second.
    pub fn limit_bandwidth(&self, bandwidth_bps: Option<u64>) {
        self.state().bandwidth_bps = bandwidth_bps;
    }

    /// Which memory of the moves from now on may follow.
    pub fn leave_memory(&self, memory: MemoryMode) {
        self.state().memory = memory;
    }

    /// Whether guests that are thawed from now on wait for their memory.
    pub fn thaw(&self, wish: link::ThawWish) {
        self.state().thaw = wish;
    }

    /// The mirrors from now on are fenced by a lease.
    pub fn fence(&self, lease_ms: u64) {
        self.state().lease_ms = Some(lease_ms);
    }

    /// How many leases were granted.
    pub fn granted(&self) -> u64 {
        self.state().granted
    }

    /// What it knows, for the message of a test that fails.
    pub fn story(&self) -> String {
        let state = self.state();
        let (records, progress, problems) = (&state.records, &state.progress, &state.problems);
        format!("records {records:?}, progress {progress:?}, problems {problems:?}")
    }

    pub fn problems(&self) -> Vec<supercloud_api::Problem> {
        self.state().problems.clone()
    }

    pub fn progress(&self, operation: OperationId) -> Option<supercloud_api::Progress> {
        self.state().progress.get(&operation).cloned()
    }

    pub fn frozen(&self) -> Option<FrozenContent> {
        self.state().frozen.as_ref().map(|(content, _)| content.clone())
    }

    pub fn is_discarded(&self, guest: GuestId) -> bool {
        self.state().discarded.contains(&guest)
    }

    pub fn has_event(&self, event: link::GuestEventKind) -> bool {
        self.state().events.contains(&event)
    }

    /// From now on assignments bring chunk tickets that are too old.
    pub fn let_tickets_age(&self) {
        self.state().tickets_have_aged = true;
    }

    /// What a host said last of a guest.
    pub fn report(&self, host: HostId, guest: GuestId) -> Option<link::GuestReport> {
        self.state().reports.get(&(host, guest)).cloned()
    }

    /// How often agents have asked for chunk sources.
    pub fn asked_for_sources(&self) -> u32 {
        self.state().asked_for_sources
    }

    /// Begins an operation.
    pub fn operate(&self, guest: GuestId, kind: OperationKind) -> OperationId {
        let operation = OperationId::generate();
        let mut state = self.state();
        let record = handover::begin(&state.records[&guest], &BeginRequest { operation, kind, group: None })
            .unwrap_or_else(|refusal| panic!("{refusal}"));
        let record = handover::leave_plan(&record, operation).unwrap_or(record);
        state.records.insert(guest, record);
        drop(state);
        self.send_orders(guest);
        operation
    }

    /// Asks for an operation to be aborted; whether it is.
    pub fn abort(&self, guest: GuestId, operation: OperationId) -> bool {
        let mut state = self.state();
        let aborted = Self::abort_in(&mut state, guest, operation);
        drop(state);
        self.send_orders(guest);
        aborted
    }

    fn abort_in(state: &mut State, guest: GuestId, operation: OperationId) -> bool {
        match handover::request_abort(&state.records[&guest], operation, AbortReason::Cancelled) {
            handover::AbortDecision::Aborted { record } => {
                state.records.insert(guest, *record);
                true
            }
            handover::AbortDecision::AlreadyAborted(_) => true,
            _ => false,
        }
    }

    /// Waits until an operation has ended; how.
    pub async fn ended(&self, guest: GuestId, operation: OperationId) -> Phase {
        let waited = async {
            loop {
                let record = self.record(guest);
                if let Some(last) = record.last.filter(|last| last.operation == operation) {
                    return last.phase;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        match tokio::time::timeout(Duration::from_secs(120), waited).await {
            Ok(phase) => phase,
            Err(_) => panic!("operation {operation} does not end: {}", self.story()),
        }
    }

    /// Sweeps are told of nothing that lives, as by records that came from a backup.
    pub fn forget_all(&self) {
        self.state().is_forgetful = true;
    }

    pub fn discard(&self, host: HostId, guest: GuestId) {
        if let Some(link) = self.state().links.get(&host) {
            let _ = link.send(Directive::Discard { guest });
        }
    }

    pub fn project(&self, guest: GuestId) -> ProjectId {
        self.state().specs[&guest].project
    }

    pub fn is_linked(&self, host: HostId) -> bool {
        self.state().links.contains_key(&host)
    }

    pub fn direct(&self, host: HostId, directive: Directive) {
        self.state().links[&host].send(directive).unwrap();
    }

    /// What checks of volumes told.
    pub fn checked(&self, host: HostId) -> Vec<link::VolumeChecked> {
        let of_host = |(at, checked): &(HostId, link::VolumeChecked)| (*at == host).then(|| checked.clone());
        self.state().checked.iter().filter_map(of_host).collect()
    }

    /// What points of volumes told.
    pub fn points(&self, host: HostId) -> Vec<link::PointTaken> {
        let of_host = |(at, taken): &(HostId, link::PointTaken)| (*at == host).then(|| taken.clone());
        self.state().points.iter().filter_map(of_host).collect()
    }

    /// What the guest's volume stands on.
    pub fn base(&self, guest: GuestId) -> ContentRoot {
        self.state().specs[&guest].volumes[0].base_root.as_ref().unwrap().parse().unwrap()
    }

    /// Reads the guest's project in a store.
    pub fn reader(&self, guest: GuestId, store: &std::path::Path) -> ChunkReader {
        let (project, key) = {
            let state = self.state();
            let spec = &state.specs[&guest];
            (spec.project, spec.project_key.0)
        };
        let keys = Arc::new(DataKeys::derive(project, &ProjectKey::from_bytes(key)));
        ChunkReader::of_store(keys, Arc::new(DirStore::open(store).unwrap()))
    }

    pub fn volume(&self, guest: GuestId) -> VolumeId {
        self.state().specs[&guest].volumes[0].volume
    }

    /// What the sweeps of a host's store told.
    /// What a host told last of the ways to others.
    pub fn paths(&self, host: HostId) -> Vec<link::PathMeasured> {
        self.state().paths.get(&host).cloned().unwrap_or_default()
    }

    /// The answer of a host to a question for flows.
    pub fn flows(&self, host: HostId, asked: u64) -> Option<Result<link::FlowsTold, Problem>> {
        let state = self.state();
        let told = state.flows.iter().find(|(from, number, _)| (*from, *number) == (host, asked));
        told.map(|(_, _, told)| told.clone().into())
    }

    /// What consoles told, in order.
    pub fn consoles(&self, host: HostId) -> Vec<(u64, link::ConsoleNews)> {
        let told = &self.state().consoles;
        told.iter().filter(|(from, ..)| *from == host).map(|(_, console, news)| (*console, news.clone())).collect()
    }

    pub fn swept(&self, host: HostId) -> Vec<link::StoreSwept> {
        let of_host = |(at, swept): &(HostId, link::StoreSwept)| (*at == host).then(|| swept.clone());
        self.state().swept.iter().filter_map(of_host).collect()
    }

    async fn repeat(self: Arc<Self>) {
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let guests: Vec<GuestId> = self.state().records.keys().copied().collect();
            for guest in guests {
                self.send_orders(guest);
            }
        }
    }

    fn send_orders(&self, guest: GuestId) {
        let state = self.state();
        for order in state.records[&guest].orders() {
            self.send_order(&state, guest, order);
        }
    }

    fn send_order(&self, state: &State, guest: GuestId, order: Order) {
        let Some(link) = state.links.get(&order.to) else { return };
        let operation = match &order.body {
            OrderBody::Source(SourceOrder::Begin(plan)) => Some((plan.operation, plan.kind)),
            OrderBody::Destination(DestinationOrder::Prepare(plan)) => Some((plan.operation, plan.kind)),
            _ => None,
        };
        let assignment =
            operation.map(|(operation, kind)| Box::new(self.assignment(state, guest, order.to, operation, kind)));
        let _ = link.send(Directive::Order { guest, order: order.body, assignment, mark: None });
    }

    fn assignment(
        &self,
        state: &State,
        guest: GuestId,
        to: HostId,
        operation: OperationId,
        kind: OperationKind,
    ) -> Assignment {
        let record = &state.records[&guest];
        let spec = state.specs[&guest].clone();
        let from = record.operation.as_ref().map_or(record.stamp(), |op| op.from);
        let owner = match from.owner {
            Owner::Host(host) => Some(host),
            _ => record.holders.first().map(|holder| holder.host),
        };
        let other = match kind {
            OperationKind::Migrate { to: destination, .. } | OperationKind::Mirror { to: destination } => {
                if destination == to { owner } else { Some(destination) }
            }
            OperationKind::Start { .. } | OperationKind::RestartFromVolume { .. } => owner.filter(|owner| *owner != to),
            _ => None,
        };
        let ticket = |source: HostId, destination: HostId, volumes: Vec<VolumeId>| {
            self.signer.sign(&Ticket {
                version: Ticket::VERSION,
                operation: Some(operation),
                project: spec.project,
                guest: Some(guest),
                epoch: from.epoch,
                source: party(state, source),
                destination: party(state, destination),
                volumes,
                expires_at_ms: unix_ms() + 60_000,
            })
        };
        let volumes: Vec<VolumeId> = spec.volumes.iter().map(|volume| volume.volume).collect();
        let is_destination = kind.destination() == Some(to);
        let permission = other.map(|other| match is_destination {
            true => ticket(other, to, volumes),
            false => ticket(to, other, volumes),
        });
        let chunk_sources = self.chunk_sources(state, guest, to, state.tickets_have_aged);
        let mut frozen = None;
        if let (OperationKind::Thaw { .. }, Some((content, _))) = (kind, &state.frozen) {
            frozen = Some(content.memory.clone());
        }
        let peer = other.map(|other| {
            let host = &state.hosts[&other];
            Peer {
                host: other,
                name: host.name.parse().unwrap(),
                data_address: host.data_address,
                certificate_sha256: host.certificate_sha256.clone(),
            }
        });
        Assignment {
            operation,
            spec,
            peer,
            ticket: permission,
            chunk_sources,
            mirror: matches!(kind, OperationKind::Mirror { .. }).then_some(MirrorOptions {
                interval_ms: 50,
                is_strict: true,
                lease_ms: state.lease_ms,
                bandwidth_bps: None,
            }),
            migration: MigrationOptions {
                auto_converge: true,
                bandwidth_bps: state.bandwidth_bps,
                memory: state.memory,
                ..MigrationOptions::default()
            },
            grace_ms: 0,
            frozen,
            thaw: state.thaw,
        }
    }

    /// The agents of other clouds, with tickets; `aged`: that were good once.
    fn chunk_sources(&self, state: &State, guest: GuestId, to: HostId, aged: bool) -> Vec<ChunkSource> {
        let cloud = state.hosts[&to].cloud;
        let source = |host: &HostInfo| {
            let ticket = Ticket {
                version: Ticket::VERSION,
                operation: None,
                project: state.specs[&guest].project,
                guest: None,
                epoch: state.records[&guest].epoch,
                source: party(state, host.id),
                destination: party(state, to),
                volumes: Vec::new(),
                expires_at_ms: if aged { unix_ms() - 1 } else { unix_ms() + 60_000 },
            };
            Some(ChunkSource {
                address: host.data_address?,
                certificate_sha256: host.certificate_sha256.clone(),
                ticket: self.signer.sign(&ticket),
            })
        };
        state.hosts.values().filter(|host| host.cloud != cloud).filter_map(source).collect()
    }

    async fn listen(self: Arc<Self>, listener: TcpListener) {
        let ca = tls::certificates_of_pem(&self.ca_pem).unwrap();
        let config = tls::server_config(&ca, self.certificate.clone(), &[tls::ALPN_AGENT]).unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let (controller, acceptor) = (self.clone(), acceptor.clone());
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(tcp).await else { return };
                let leaf = stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned();
                let host = tls::host_of_certificate(&leaf).unwrap();
                controller.serve(host, stream).await;
            });
        }
    }

    async fn serve(&self, host: HostId, mut stream: tokio_rustls::server::TlsStream<tokio::net::TcpStream>) {
        if self.state().cut.contains(&host) {
            return;
        }
        let Ok(frame) = read_frame(&mut stream).await else { return };
        let hello: Hello = frame.parse_json(kind::HELLO, link::VERSION).unwrap();
        assert_eq!(hello.host, host);
        if self.state().removed.contains(&host) {
            let farewell = link::Farewell { host, problem: Problem::new(Code::Forbidden, "removed") };
            let _ = write_frame(&mut stream, &Frame::json(kind::FAREWELL, link::VERSION, &farewell).unwrap()).await;
            return;
        }
        let welcome = {
            let state = self.state();
            let owned = state.records.values().filter(|record| record.owner == Owner::Host(host));
            Welcome {
                host_name: state.hosts[&host].name.parse().unwrap(),
                cloud: state.hosts[&host].cloud,
                ticket_key: self.signer.public_key_hex(),
                heartbeat_ms: 500,
                owned: owned.map(|record| (record.guest, record.epoch)).collect(),
            }
        };
        let frame = Frame::json(kind::WELCOME, link::VERSION, &welcome).unwrap();
        if write_frame(&mut stream, &frame).await.is_err() {
            return;
        }
        let (orders, mut outgoing) = mpsc::unbounded_channel();
        self.state().links.insert(host, orders);
        let (answers, mut answered) = mpsc::unbounded_channel();
        let (mut reader, mut writer) = tokio::io::split(stream);
        let read = async {
            while let Ok(frame) = read_frame(&mut reader).await {
                match frame.kind {
                    kind::NOTICE => self.take(host, frame.parse_json(kind::NOTICE, link::VERSION).unwrap()),
                    kind::QUERY => {
                        let query: Envelope<Query> = frame.parse_json(kind::QUERY, link::VERSION).unwrap();
                        match self.answer(host, query) {
                            Some(answer) => answers.send(answer).unwrap(),
                            None => return,
                        }
                    }
                    other => panic!("a frame of kind {other}"),
                }
            }
        };
        let write = async {
            loop {
                let frame = tokio::select! {
                    directive = outgoing.recv() => match directive {
                        Some(directive) => Frame::json(kind::DIRECTIVE, link::VERSION, &directive).unwrap(),
                        None => return,
                    },
                    Some(answer) = answered.recv() => Frame::json(kind::ANSWER, link::VERSION, &answer).unwrap(),
                };
                if write_frame(&mut writer, &frame).await.is_err() {
                    return;
                }
            }
        };
        // A cut link loses its sender, which ends the writing.
        tokio::select! {
            () = read => {}
            () = write => {}
        }
    }

    fn answer(&self, host: HostId, query: Envelope<Query>) -> Option<Envelope<Outcome<Answer>>> {
        let mut state = self.state();
        if state.queries_to_lose > 0 {
            state.queries_to_lose -= 1;
            return None;
        }
        let body = match query.body {
            Query::RenewLease { guest, epoch, asked_ms, lease_ms } => {
                let record = &state.records[&guest];
                let is_lost = record.operation.as_ref().is_some_and(|op| op.is_mirrored() && op.source_lost);
                if record.is_owned_by(host, epoch) && !is_lost {
                    state.granted += 1;
                    Outcome::Ok(Answer::Lease { asked_ms, lease_ms })
                } else {
                    Outcome::Err(Problem::new(Code::Forbidden, "it runs elsewhere"))
                }
            }
            Query::RenewCertificate { csr_pem } => {
                Outcome::Ok(Answer::Certificate { certificate_pem: self.certify(host, &csr_pem) })
            }
            Query::ChunkSources { guest } => {
                state.asked_for_sources += 1;
                Outcome::Ok(Answer::ChunkSources { sources: self.chunk_sources(&state, guest, host, false) })
            }
            Query::StoreRoots { project, .. } => Outcome::Ok(live(&state, project)),
            Query::StoreNames { project, part, name, sealed } => {
                let spec = state.specs.values().find(|spec| spec.project == project).unwrap();
                let keys = DataKeys::derive(project, &ProjectKey::from_bytes(spec.project_key.0));
                let kind = match part {
                    link::ManifestPart::Root => ChunkKind::Root,
                    link::ManifestPart::Leaf => ChunkKind::Leaf,
                };
                let sealed = sealed.map(|sealed| hex::decode(sealed).unwrap());
                let names = sealed.and_then(|sealed| names_of(&keys, kind, name.parse().unwrap(), &sealed).ok());
                let names = names.map(|names| names.iter().map(ToString::to_string).collect());
                Outcome::Ok(Answer::StoreNames { names })
            }
            Query::VolumeChecked { checked } => {
                state.checked.push((host, checked));
                Outcome::Ok(Answer::Noted)
            }
            Query::PointTaken { taken } => {
                state.points.push((host, taken));
                Outcome::Ok(Answer::Noted)
            }
            Query::StoreSwept { swept } => {
                state.swept.push((host, swept));
                Outcome::Ok(Answer::Noted)
            }
            Query::GuestToken { .. } | Query::GuestCall { .. } => {
                Outcome::Err(Problem::new(Code::Forbidden, "not here"))
            }
        };
        Some(Envelope { number: query.number, body })
    }

    fn take(&self, host: HostId, notice: Notice) {
        match notice {
            Notice::Report { guest, report, details } => {
                let mut hook = self.state().hook.take();
                let verdict = hook.as_mut().map_or(Verdict::Take, |hook| hook(host, &report));
                let mut state = self.state();
                state.hook = state.hook.take().or(hook);
                if verdict == Verdict::Drop {
                    return;
                }
                if let (Verdict::AbortFirst, Some(op)) = (verdict, &state.records[&guest].operation) {
                    let operation = op.id;
                    Self::abort_in(&mut state, guest, operation);
                }
                if let Some(problem) = details.problem {
                    state.problems.push(problem);
                }
                if let (Report::NothingMissing { operation, .. }, Some(told)) = (&report, &details.progress) {
                    // What was told while nobody listened.
                    let known = state.progress.entry(*operation).or_default();
                    known.memory_missing_bytes = told.memory_missing_bytes;
                }
                let accepted = handover::accept(&state.records[&guest], host, &report, WhenOpen::Abort);
                if let Some(record) = accepted.record {
                    record.check().unwrap();
                    if let (Owner::Frozen(_), Some(content)) = (record.owner, details.frozen) {
                        let spec = state.specs.get_mut(&guest).unwrap();
                        for volume in &mut spec.volumes {
                            let stored = content.volumes.iter().find(|stored| stored.volume == volume.volume).unwrap();
                            volume.base_root = Some(stored.root.clone());
                        }
                        state.frozen = Some((content, host));
                    }
                    state.records.insert(guest, record);
                }
                for order in accepted.orders {
                    self.send_order(&state, guest, order);
                }
            }
            Notice::Progress { operation, progress } => {
                // Both ends tell of it; the destination knows nothing of the memory that is sent.
                let mut state = self.state();
                let known = state.progress.entry(operation).or_default();
                let memory_sent_bytes = known.memory_sent_bytes.max(progress.memory_sent_bytes);
                if let (Some(before), Some(now)) = (known.memory_missing_bytes, progress.memory_missing_bytes) {
                    assert!(now <= before, "more memory is missing than before");
                }
                let memory_missing_bytes = progress.memory_missing_bytes.or(known.memory_missing_bytes);
                *known = supercloud_api::Progress { memory_sent_bytes, memory_missing_bytes, ..progress };
            }
            Notice::Discarded { guest } => {
                self.state().discarded.insert(guest);
            }
            Notice::Paths { paths } => drop(self.state().paths.insert(host, paths)),
            Notice::Flows { asked, told } => self.state().flows.push((host, asked, told)),
            Notice::Console { console, news } => self.state().consoles.push((host, console, news)),
            Notice::GuestEvent { event, .. } => self.state().events.push(event),
            Notice::Heartbeat { guests, .. } => {
                let mut state = self.state();
                for report in guests {
                    state.reports.insert((host, report.guest), report);
                }
            }
        }
    }
}
