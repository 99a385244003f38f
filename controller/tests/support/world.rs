//! The controller, the records that REST would have written, and the hosts.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use rcgen::{CertificateParams, KeyPair};
use serde_json::json;
use supercloud_api::{
    Cloud, Code, Guest, Image, KeptMirror, MemoryMode, MirrorMode, Network, OnLoss, Operation, OperationKind, Phase,
    Port, Problem, Project, Volume,
    handover::{self, BeginRequest, Owner, OwnerRecord},
    ids::{
        CloudId, FreezeId, GuestId, HostId, ImageId, NetworkId, OperationId, PortId, ProjectId, RequestId, VolumeId,
    },
    link::{MigrationOptions, MirrorOptions},
    tls::{self, Identity},
    unix_ms,
};
use supercloud_controller::{
    ca::Authority,
    consoles::Consoles,
    fencing::{self, Claim, Fencing},
    flows::FlowBoard,
    keys::Keys,
    leases::LeaseBoard,
    link::{self, ChunkServer, LinkHandler, Sessions},
    notices::{self, Leaving, NoticesConfig},
    operations::{Engine, Pace, Parts, Reach, points::PointBoard, progress::ProgressBoard, sweeps::SweepBoard},
    paths::PathBoard,
    plans::{self, Runner},
    recovery::{self, Recovery},
    state::{
        Change, Context, EventDraft, GuestRecord, HostRecord, LiveHosts, OperationRecord, ProjectRecord, State,
        StateError, Stored, Work, keys as places, retry_conflicts,
    },
};
use supercloud_storage::backend::DirStore;
use supercloud_store::{SledOptions, SledStore, Store};
use tokio::{
    net::TcpListener,
    sync::{Notify, watch},
    task::{JoinHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;

use super::{
    agent::{Faults, Seat, Stage, lock},
    ground::Ground,
};

/// How long anything may take before a test gives up: far more than it needs on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// The engine's pace in tests.
pub fn pace() -> Pace {
    Pace {
        repeat: Duration::from_millis(150),
        flush: Duration::from_millis(60),
        look: Duration::from_millis(300),
        ..Pace::default()
    }
}

/// A controller that runs.
pub struct Running {
    pub engine: Arc<Engine>,
    pub state: State,
    pub chunks: Arc<DirStore>,
    pub sweeps: SweepBoard,
    pub points: PointBoard,
    pub live: LiveHosts,
    pub plans_wake: Arc<Notify>,
    store: Arc<SledStore>,
    tasks: JoinSet<()>,
    cancel: CancellationToken,
}

/// A host and its agent's process.
pub struct Host {
    pub seat: Seat,
    pub process: Option<JoinHandle<()>>,
}

pub struct World {
    pub folder: tempfile::TempDir,
    pub seed: u64,
    pub pace: Pace,
    pub controller: Option<Running>,
    pub ground: Arc<Mutex<Ground>>,
    pub hosts: Vec<Host>,
    pub project: ProjectId,
    pub project_key: [u8; 32],
    pub image: ImageId,
    network: NetworkId,
    address: watch::Sender<SocketAddr>,
    guests: u8,
}

impl World {
    /// A controller and so many hosts, each in a cloud of its own, connected.
    pub async fn new(seed: u64, hosts: u8) -> Self {
        Self::at_pace(seed, hosts, pace()).await
    }

    pub async fn at_pace(seed: u64, hosts: u8, pace: Pace) -> Self {
        // A log only when it is asked for: RUST_LOG.
        let _only_once = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init();
        let mut world = Self {
            folder: tempfile::tempdir().unwrap(),
            seed,
            pace,
            controller: None,
            ground: Arc::default(),
            hosts: Vec::new(),
            project: ProjectId::generate(),
            project_key: [7; 32],
            image: ImageId::generate(),
            network: NetworkId::generate(),
            address: watch::channel(SocketAddr::from(([127, 0, 0, 1], 1))).0,
            guests: 0,
        };
        world.start_controller().await;
        world.found().await;
        for n in 1..=hosts {
            world.join(n).await;
        }
        for n in 0..world.hosts.len() {
            world.start_agent(n);
        }
        world
    }

    pub fn state(&self) -> &State {
        &self.controller.as_ref().expect("a controller that runs").state
    }

    pub async fn start_controller(&mut self) {
        let folder = self.folder.path().to_owned();
        let (keys, authority) = tokio::task::spawn_blocking(move || {
            (Keys::open_or_make(&folder).unwrap(), Authority::open_or_make(&folder).unwrap())
        })
        .await
        .unwrap();
        let (keys, authority) = (Arc::new(keys), Arc::new(authority));
        let store = SledStore::open(self.folder.path().join("state"), SledOptions::default()).await.unwrap();
        let store = Arc::new(store);
        let state = State::open(Arc::clone(&store) as Arc<dyn Store>).await.unwrap();
        let chunks = Arc::new(DirStore::open(&self.folder.path().join("store")).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let identity = authority.server_identity(&["127.0.0.1".into()]).unwrap();
        let certificate_sha256 = tls::fingerprint(&identity.chain[0]);
        let ca = std::slice::from_ref(authority.certificate());
        let server = tls::server_config(ca, identity, &[tls::ALPN_AGENT, tls::ALPN_DATA]).unwrap();
        let sessions = Sessions::default();
        let (sweeps, points) = (SweepBoard::default(), PointBoard::default());
        let (live, plans_wake) = (LiveHosts::default(), Arc::new(Notify::new()));
        let (progress, leases, claim) = (ProgressBoard::default(), LeaseBoard::default(), Claim::default());
        let parts = Parts {
            state: state.clone(),
            sessions: sessions.clone(),
            live: live.clone(),
            keys: Arc::clone(&keys),
            authority,
            reach: Reach {
                link_address: address.to_string(),
                api_url: "https://controller".into(),
                certificate_sha256: certificate_sha256.clone(),
            },
            progress: progress.clone(),
            consoles: Consoles::new(sessions.clone()),
            sweeps: sweeps.clone(),
            checks: Default::default(),
            points: points.clone(),
            paths: Default::default(),
            flows: FlowBoard::new(sessions.clone()),
            leases: leases.clone(),
            claim: claim.clone(),
            store: Arc::clone(&chunks),
            uploads: self.folder.path().join("uploads"),
        };
        let (engine, imports) = Engine::at_pace(parts, self.pace);
        let chunk_server =
            ChunkServer::new(Arc::clone(&chunks) as _, &keys.tickets.0.public_key_hex(), &certificate_sha256);
        let cancel = CancellationToken::new();
        let handler: Arc<dyn LinkHandler> = Arc::clone(&engine) as _;
        let mut tasks = JoinSet::new();
        tasks.spawn(link::serve(listener, Arc::new(server), sessions, handler, chunk_server, cancel.clone()));
        tasks.spawn(Arc::clone(&engine).run(imports, cancel.clone()));
        let pace = plans::Pace {
            look: Duration::from_millis(50),
            idle: Duration::from_millis(200),
            wait: Duration::from_secs(20),
        };
        let runner = Runner::new(state.clone(), live.clone(), Arc::clone(&plans_wake), pace);
        let stop = cancel.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = runner.run() => {}
                () = stop.cancelled() => {}
            }
        });
        let pace = recovery::Pace {
            look: Duration::from_millis(50),
            idle: Duration::from_millis(50),
            settle: Duration::from_millis(300),
            first_wait: Duration::from_millis(500),
            longest_wait: Duration::from_secs(2),
            calm: Duration::from_secs(600),
        };
        let (recovery, stop) = (Recovery::new(state.clone(), live.clone(), pace), cancel.clone());
        tasks.spawn(async move {
            tokio::select! {
                () = recovery.run() => {}
                () = stop.cancelled() => {}
            }
        });
        let pace = fencing::Pace { look: Duration::from_millis(50), settle: Duration::from_millis(500) };
        let (fencing, stop) =
            (Fencing::new(state.clone(), live.clone(), leases, claim, progress, pace), cancel.clone());
        tasks.spawn(async move {
            tokio::select! {
                () = fencing.run() => {}
                () = stop.cancelled() => {}
            }
        });
        let pace = notices::Pace { look: Duration::from_millis(50), again: Duration::from_millis(300) };
        let (parts, wake) = ((state.clone(), live.clone()), Arc::clone(&plans_wake));
        let (paths, config) = (PathBoard::default(), NoticesConfig::default());
        let (leaving, stop) = (Leaving::new(parts.0, parts.1, paths, wake, config, pace), cancel.clone());
        tasks.spawn(async move {
            tokio::select! {
                () = leaving.run() => {}
                () = stop.cancelled() => {}
            }
        });
        self.controller =
            Some(Running { engine, state, chunks, sweeps, points, live, plans_wake, store, tasks, cancel });
        self.address.send_replace(address);
    }

    /// Drops every task where it stands, as a crash would.
    pub async fn kill_controller(&mut self) {
        let Some(mut controller) = self.controller.take() else { return };
        controller.tasks.shutdown().await;
        controller.store.close().await;
    }

    /// Ends it as an operator does: everything is told to stop, and does.
    pub async fn stop_controller(&mut self) {
        let Some(mut controller) = self.controller.take() else { return };
        controller.cancel.cancel();
        let ended = async { while controller.tasks.join_next().await.is_some() {} };
        tokio::time::timeout(PATIENCE, ended).await.expect("every task ends when it is told to");
        controller.store.close().await;
    }

    pub async fn restart_controller(&mut self) {
        self.kill_controller().await;
        self.start_controller().await;
    }

    async fn found(&self) {
        let controller = self.controller.as_ref().unwrap();
        let (project, network, image) = (self.project, self.network, self.image);
        let folder = self.folder.path().to_owned();
        let keys = tokio::task::spawn_blocking(move || Keys::open_or_make(&folder).unwrap()).await.unwrap();
        let sealed = keys.root.seal(&format!("project-key/{project}"), &self.project_key);
        let mut change = Change::new();
        change.create(&ProjectRecord {
            project: Project {
                id: project,
                name: name("p"),
                quota: supercloud_api::Quota::default(),
                created_at_ms: 1,
            },
            sealed_key: hex::encode(sealed),
        });
        let network: Network = serde_json::from_value(json!({
            "id": network, "project": project, "name": "lan", "cidr": "10.1.0.0/24", "gateway": "10.1.0.1", "dns": [],
            "vni": 7, "mtu": 1450, "created_at_ms": 1,
        }))
        .unwrap();
        change.create(&network);
        let image: Image = serde_json::from_value(json!({
            "id": image, "project": project, "name": "img", "state": "ready", "cmdline": null, "uploaded": [],
            "parts": [{"part": "disk", "root": "0".repeat(64), "size_bytes": 1 << 20, "stored_bytes": 0}],
            "created_at_ms": 1,
        }))
        .unwrap();
        change.create(&image);
        controller.state.commit(&Context::system(), change).await.unwrap();
    }

    /// A host of the records, with a certificate of the CA.
    pub async fn join(&mut self, n: u8) {
        let (host, cloud) = (HostId::generate(), CloudId::generate());
        let (identity, ca) = identity(self.folder.path(), host).await;
        let record: supercloud_api::Host = serde_json::from_value(json!({
            "id": host, "name": format!("h{n}"), "cloud": cloud, "cloud_name": format!("c{n}"), "state": "up",
            "data_address": null, "overlay_address": null, "overlay_index": n,
            "capacity": {"vcpus": 0, "memory_bytes": 0, "disk_bytes": 0},
            "used": {"vcpus": 0, "memory_bytes": 0, "disk_bytes": 0}, "compat_classes": [], "probe": {},
            "agent_version": "", "certificate_sha256": "", "last_seen_ms": 0, "created_at_ms": 1,
        }))
        .unwrap();
        let mut change = Change::new();
        change.create(&Cloud { id: cloud, name: name(&format!("c{n}")), provider: "lab".into(), created_at_ms: 1 });
        change.create(&HostRecord { host: record, is_cordoned: false, is_removed: false, withdrawn: None });
        self.state().commit(&Context::system(), change).await.unwrap();
        let seat = Seat {
            host,
            identity,
            ca,
            overlay_address: Ipv4Addr::new(198, 19, 1, n),
            data_address: Some(SocketAddr::from(([198, 19, 1, n], 9000))),
            disk: Arc::default(),
            faults: Arc::default(),
            ground: Arc::clone(&self.ground),
            controller: self.address.subscribe(),
            seed: self.seed ^ u64::from(n),
        };
        self.hosts.push(Host { seat, process: None });
    }

    pub fn id(&self, host: usize) -> HostId {
        self.hosts[host].seat.host
    }

    pub fn start_agent(&mut self, host: usize) {
        let host = &mut self.hosts[host];
        host.process = Some(host.seat.start());
        lock(&self.ground).away.remove(&host.seat.host);
    }

    pub async fn kill_agent(&mut self, host: usize) {
        let host = &mut self.hosts[host];
        lock(&self.ground).away.insert(host.seat.host);
        if let Some(process) = host.process.take() {
            process.abort();
            let _it_was_aborted = process.await;
        }
    }

    /// The guest shuts down from inside.
    pub fn power_off(&self, guest: GuestId, host: usize) {
        let mut ground = lock(&self.ground);
        let local = ground.local(self.id(host), guest);
        local.processes.clear();
        local.is_off = true;
    }

    /// The guest's process ends by accident; a restarted agent finds that out.
    pub async fn crash(&mut self, guest: GuestId, host: usize) {
        self.kill_agent(host).await;
        lock(&self.ground).local(self.id(host), guest).processes.clear();
        self.start_agent(host);
    }

    /// The host is gone for good, with all that it held; its agent was killed before.
    pub fn bury(&self, host: usize) {
        let mut ground = lock(&self.ground);
        let id = self.id(host);
        ground.dead.insert(id);
        let mine: Vec<GuestId> = ground.locals.keys().filter(|(at, _)| *at == id).map(|(_, guest)| *guest).collect();
        ground.bereft.extend(mine);
    }

    pub fn faults(&self, host: usize, change: impl FnOnce(&mut Faults)) {
        change(&mut lock(&self.hosts[host].seat.faults));
    }

    pub fn stall(&self, stage: Stage, is_stalled: bool) {
        for host in 0..self.hosts.len() {
            self.faults(host, |faults| {
                faults.stalled.remove(&stage);
                if is_stalled {
                    faults.stalled.insert(stage);
                }
            });
        }
    }

    /// A guest that was never started, with its volume and its port.
    pub async fn guest(&mut self) -> GuestId {
        self.guests += 1;
        let n = self.guests;
        let (guest, volume, port) = (GuestId::generate(), VolumeId::generate(), PortId::generate());
        let (project, ip) = (self.project, Ipv4Addr::new(10, 1, 0, 10 + n));
        let shown: Guest = serde_json::from_value(json!({
            "id": guest, "project": project, "name": format!("g{n}"), "state": "created", "alarm": null,
            "shape": {"vcpus": 1, "memory_bytes": 1 << 26}, "image": self.image, "host": null, "host_name": null,
            "cloud": null, "cloud_name": null, "epoch": 0, "compat_class": null, "volumes": [volume], "ports": [port],
            "ipv4": ip, "operation": null, "freeze": null, "follow_prices": false, "starts": 0, "created_at_ms": 1,
        }))
        .unwrap();
        let volume: Volume = serde_json::from_value(json!({
            "id": volume, "project": project, "name": format!("g{n}-disk"), "size_bytes": 1 << 20,
            "base": "0".repeat(64), "image": self.image, "guest": guest, "epoch": 0, "host": null,
            "needed_source": null, "base_cloud": null, "map_root": null, "map_version": 0, "durability": "host",
            "propagation": "hot-standby", "created_at_ms": 1,
        }))
        .unwrap();
        let port: Port = serde_json::from_value(json!({
            "id": port, "network": self.network, "project": project, "guest": guest,
            "mac": format!("02:00:00:00:00:{n:02x}"), "ipv4": ip, "host": null, "epoch": 0, "prepared_at": null,
            "moved_from": null,
        }))
        .unwrap();
        let mut change = Change::new();
        change.claim(places::address(self.network, ip), port.id).create(&port).create_named(&volume);
        change.create_named(&GuestRecord {
            guest: shown,
            owner: OwnerRecord::new(guest),
            discarding: Default::default(),
            put_aside: None,
            stays: Vec::new(),
        });
        change.event(EventDraft::new("guest.created").project(project).guest(guest));
        self.state().commit(&Context::system(), change).await.unwrap();
        guest
    }

    pub async fn record(&self, guest: GuestId) -> Stored<GuestRecord> {
        self.state().need::<GuestRecord>(&guest).await.unwrap()
    }

    /// Where the record says that the guest is, as an index of [`World::hosts`].
    pub async fn place(&self, guest: GuestId) -> Option<usize> {
        match self.record(guest).await.owner.owner {
            Owner::Host(host) => self.hosts.iter().position(|h| h.seat.host == host),
            _ => None,
        }
    }

    /// Accepts an operation as admission does: it holds the guest from now on. `Err`: another one does.
    pub async fn try_submit(
        &self,
        guest: GuestId,
        kind: OperationKind,
        work: Work,
        to: Option<usize>,
    ) -> Result<OperationId, Problem> {
        let state = self.state();
        retry_conflicts(|| async {
            let before = state.need::<GuestRecord>(&guest).await?;
            if before.guest.operation.is_some() {
                return Ok(Err(Problem::new(Code::OperationInProgress, "busy")));
            }
            let id = OperationId::generate();
            let operation = Operation {
                project: Some(self.project),
                guest: Some(guest),
                source: before.guest.host,
                destination: to.map(|to| self.id(to)),
                ..Context::actor("token:test".into(), RequestId::generate()).planned(id, kind)
            };
            let mut now = before.value.clone();
            now.guest.operation = Some(id);
            let mut change = Change::new();
            change.update(&before, &now).create_operation(&OperationRecord { operation, work: work.clone() });
            state.commit(&Context::system(), change).await?;
            Ok::<_, StateError>(Ok(id))
        })
        .await
        .unwrap()
    }

    /// Accepts a group's operation as admission does: all of its parts are begun, or none. `Err`: one of the guests is held, or cannot.
    pub async fn try_together(
        &self,
        kind: OperationKind,
        parts: &[(GuestId, OperationKind, Work, Option<usize>)],
    ) -> Result<OperationId, Problem> {
        let state = self.state();
        retry_conflicts(|| async {
            let whole = OperationId::generate();
            let context = Context::actor("token:test".into(), RequestId::generate());
            let mut change = Change::new();
            let mut ids = Vec::new();
            for (guest, kind, work, to) in parts {
                let before = state.need::<GuestRecord>(guest).await?;
                let id = OperationId::generate();
                let to = to.map(|to| self.id(to));
                let wanted = match (work, to) {
                    (Work::GuestMigrate { options }, Some(to)) => {
                        handover::OperationKind::Migrate { to, post_copy: !options.memory.is_pre_copy() }
                    }
                    (Work::GuestFreeze { freeze }, _) => handover::OperationKind::Freeze { freeze: *freeze },
                    (Work::GuestThaw { freeze, .. }, Some(to)) => handover::OperationKind::Thaw { freeze: *freeze, to },
                    other => panic!("no group does {other:?}"),
                };
                let request = BeginRequest { operation: id, kind: wanted, group: Some(whole) };
                let begun = handover::begin(&before.owner, &request);
                let (None, Ok(owner)) = (before.guest.operation, begun) else {
                    return Ok(Err(Problem::new(Code::OperationInProgress, "busy")));
                };
                let mut now = before.value.clone();
                (now.owner, now.guest.operation) = (owner, Some(id));
                let operation = Operation {
                    project: Some(self.project),
                    guest: Some(*guest),
                    part_of: Some(whole),
                    source: before.guest.host,
                    destination: to,
                    ..context.planned(id, *kind)
                };
                change.update(&before, &now);
                change.create_operation(&OperationRecord { operation, work: work.clone() });
                ids.push(id);
            }
            let operation = Operation { project: Some(self.project), parts: ids, ..context.planned(whole, kind) };
            change.create_operation(&OperationRecord { operation, work: Work::Group });
            state.commit(&Context::system(), change).await?;
            Ok::<_, StateError>(Ok(whole))
        })
        .await
        .unwrap()
    }

    /// Moves guests together.
    pub async fn migrate_together(&self, guests: &[GuestId], to: usize) -> OperationId {
        let part = |guest: &GuestId| {
            let options = MigrationOptions::default();
            (*guest, OperationKind::GuestMigrate, Work::GuestMigrate { options }, Some(to))
        };
        let parts: Vec<_> = guests.iter().map(part).collect();
        self.try_together(OperationKind::GroupMigrate, &parts).await.unwrap()
    }

    /// Freezes guests together.
    pub async fn freeze_together(&self, guests: &[GuestId]) -> OperationId {
        let part = |guest: &GuestId| {
            let work = Work::GuestFreeze { freeze: FreezeId::generate() };
            (*guest, OperationKind::GuestFreeze, work, None)
        };
        let parts: Vec<_> = guests.iter().map(part).collect();
        self.try_together(OperationKind::GroupFreeze, &parts).await.unwrap()
    }

    /// Thaws guests together.
    pub async fn thaw_together(&self, guests: &[GuestId], to: usize) -> OperationId {
        let mut parts = Vec::new();
        for guest in guests {
            let freeze = self.record(*guest).await.guest.freeze.expect("a frozen guest");
            parts.push((*guest, OperationKind::GuestThaw, Work::GuestThaw { freeze, memory: None }, Some(to)));
        }
        self.try_together(OperationKind::GroupThaw, &parts).await.unwrap()
    }

    /// Waits until a group's operation has ended as all of its parts have; how.
    pub async fn end_together(&self, whole: OperationId) -> Phase {
        let ended = self.end(whole).await.phase;
        let mut ends = Vec::new();
        for part in self.operation(whole).await.parts {
            ends.push(self.operation(part).await.phase);
        }
        assert!(ends.iter().all(|end| *end == ended), "all or none: {ended:?} of {ends:?}");
        ended
    }

    pub async fn submit(&self, guest: GuestId, kind: OperationKind, work: Work, to: Option<usize>) -> OperationId {
        self.try_submit(guest, kind, work, to).await.unwrap()
    }

    pub async fn start(&self, guest: GuestId, to: usize) -> OperationId {
        self.submit(guest, OperationKind::GuestStart, Work::GuestStart, Some(to)).await
    }

    pub async fn stop(&self, guest: GuestId) -> OperationId {
        self.submit(guest, OperationKind::GuestStop, Work::GuestStop { grace_ms: 0 }, None).await
    }

    pub async fn migrate(&self, guest: GuestId, to: usize) -> OperationId {
        let work = Work::GuestMigrate { options: MigrationOptions::default() };
        self.submit(guest, OperationKind::GuestMigrate, work, Some(to)).await
    }

    /// As [`Self::migrate`]; memory may follow.
    pub async fn migrate_leaving(&self, guest: GuestId, to: usize) -> OperationId {
        let options = MigrationOptions { memory: MemoryMode::Hybrid, ..MigrationOptions::default() };
        self.submit(guest, OperationKind::GuestMigrate, Work::GuestMigrate { options }, Some(to)).await
    }

    pub async fn mirror(&self, guest: GuestId, to: usize) -> OperationId {
        self.mirror_by(guest, to, None).await
    }

    /// As [`Self::mirror`], fenced by a lease.
    pub async fn mirror_by(&self, guest: GuestId, to: usize, lease_ms: Option<u64>) -> OperationId {
        let options = MirrorOptions { interval_ms: 50, is_strict: false, lease_ms, bandwidth_bps: None };
        let work = Work::GuestMirror { options, is_failing_over: false };
        self.submit(guest, OperationKind::GuestMirror, work, Some(to)).await
    }

    /// What is to be done for this guest by itself.
    pub async fn wish(&self, guest: GuestId, on_loss: OnLoss, mirror_at: Option<usize>) {
        let (state, to) = (self.state(), mirror_at.map(|host| self.id(host)));
        retry_conflicts(|| async {
            let before = state.need::<GuestRecord>(&guest).await?;
            let mut now = before.value.clone();
            now.guest.on_loss = on_loss;
            now.guest.kept_mirror = to.map(|to| KeptMirror {
                to: to.to_string().into(),
                interval_ms: 50,
                mode: MirrorMode::Async,
                bandwidth_bps: None,
                lease_ms: None,
            });
            let mut change = Change::new();
            change.update(&before, &now);
            state.commit(&Context::system(), change).await?;
            Ok::<_, StateError>(())
        })
        .await
        .unwrap();
    }

    /// Waits until the standby has a whole cut.
    pub async fn protected(&self, guest: GuestId, to: usize) {
        let to = self.id(to);
        self.until("a whole cut", async |world| lock(&world.ground).local(to, guest).adopt.is_some()).await;
    }

    /// The guest's host is dead, somebody says.
    pub async fn fail_over(&self, operation: OperationId) {
        let state = self.state();
        retry_conflicts(|| async {
            let before = state.need::<OperationRecord>(&operation).await?;
            let mut now = before.value.clone();
            if let Work::GuestMirror { is_failing_over, .. } = &mut now.work {
                *is_failing_over = true;
            }
            let mut change = Change::new();
            change.update(&before, &now);
            state.commit(&Context::system(), change).await?;
            Ok::<_, StateError>(())
        })
        .await
        .unwrap();
    }

    pub async fn freeze(&self, guest: GuestId) -> OperationId {
        let work = Work::GuestFreeze { freeze: FreezeId::generate() };
        self.submit(guest, OperationKind::GuestFreeze, work, None).await
    }

    pub async fn thaw(&self, guest: GuestId, to: usize) -> OperationId {
        let freeze = self.record(guest).await.guest.freeze.expect("a frozen guest");
        self.submit(guest, OperationKind::GuestThaw, Work::GuestThaw { freeze, memory: None }, Some(to)).await
    }

    pub async fn delete(&self, guest: GuestId) -> OperationId {
        self.submit(guest, OperationKind::GuestDelete, Work::GuestDelete, None).await
    }

    /// An image whose disk was uploaded, and its import.
    pub async fn import(&self, disk: &[u8], format: Option<supercloud_api::DiskFormat>) -> (ImageId, OperationId) {
        let (image, id, now_ms) = (ImageId::generate(), OperationId::generate(), unix_ms());
        let folder = self.folder.path().join("uploads").join(image.to_string());
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("disk"), disk).unwrap();
        let record: Image = serde_json::from_value(json!({
            "id": image, "project": self.project, "name": format!("i{now_ms}"), "state": "importing", "cmdline": null,
            "uploaded": [{"part": "disk", "bytes": disk.len()}], "parts": [], "created_at_ms": now_ms,
        }))
        .unwrap();
        let operation: Operation = serde_json::from_value(json!({
            "id": id, "kind": "image_import", "project": self.project, "phase": "plan", "guest": null, "image": image,
            "volume": null, "source": null, "destination": null, "progress": {}, "is_cancel_requested": false,
            "error": null, "actor": "token:test", "request_id": RequestId::generate(), "reason": null,
            "created_at_ms": now_ms, "updated_at_ms": now_ms, "ended_at_ms": null,
            "phase_times": [{"phase": "plan", "at_ms": now_ms}],
        }))
        .unwrap();
        let mut change = Change::new();
        change.create(&record).create_operation(&OperationRecord { operation, work: Work::ImageImport { format } });
        self.state().commit(&Context::system(), change).await.unwrap();
        (image, id)
    }

    pub async fn cancel(&self, operation: OperationId) {
        let state = self.state();
        retry_conflicts(|| async {
            let before = state.need::<OperationRecord>(&operation).await?;
            let mut now = before.value.clone();
            now.operation.is_cancel_requested = true;
            let mut change = Change::new();
            change.update(&before, &now);
            state.commit(&Context::system(), change).await?;
            Ok::<_, StateError>(())
        })
        .await
        .unwrap();
    }

    pub async fn remove_host(&self, host: usize) {
        let (state, id) = (self.state(), self.id(host));
        retry_conflicts(|| async {
            let before = state.need::<HostRecord>(&id).await?;
            let mut change = Change::new();
            change.update(&before, &HostRecord { is_removed: true, ..before.value.clone() });
            state.commit(&Context::system(), change).await?;
            Ok::<_, StateError>(())
        })
        .await
        .unwrap();
    }

    pub async fn operation(&self, id: OperationId) -> Operation {
        self.state().need::<OperationRecord>(&id).await.unwrap().value.operation
    }

    /// Waits until `is_so`; panics with what is there when that takes too long.
    pub async fn until(&self, what: &str, mut is_so: impl AsyncFnMut(&Self) -> bool) {
        let end = tokio::time::Instant::now() + PATIENCE;
        while !is_so(self).await {
            if tokio::time::Instant::now() > end {
                panic!("{what} does not come (seed {}):\n{}", self.seed, self.picture().await);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn phase(&self, id: OperationId, phase: Phase) {
        self.until(&format!("{id} in {phase:?}"), async |world| {
            let now = world.operation(id).await.phase;
            assert!(!now.is_terminal() || now == phase, "{id} is {now:?}:\n{}", world.picture().await);
            now == phase
        })
        .await;
    }

    /// The operation when it has ended.
    pub async fn end(&self, id: OperationId) -> Operation {
        self.until(&format!("the end of {id}"), async |world| world.operation(id).await.phase.is_terminal()).await;
        self.operation(id).await
    }

    pub async fn done(&self, id: OperationId) {
        let ended = self.end(id).await;
        assert_eq!(ended.phase, Phase::Done, "{ended:#?}\n{}", self.picture().await);
    }

    /// Ends as if it had never been: with a reason of this code.
    pub async fn undone(&self, id: OperationId, code: Code) {
        let ended = self.end(id).await;
        assert_eq!(ended.phase, Phase::RolledBack, "{ended:#?}\n{}", self.picture().await);
        assert_eq!(ended.error.map(|error| error.code), Some(code));
    }
}

pub fn name(text: &str) -> supercloud_api::Name {
    text.parse().unwrap()
}

/// A key and certificate for a host.
pub async fn identity(folder: &Path, host: HostId) -> (Identity, rustls::pki_types::CertificateDer<'static>) {
    let folder = folder.to_owned();
    let authority = tokio::task::spawn_blocking(move || Authority::open_or_make(&folder).unwrap()).await.unwrap();
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
    let certificate = authority.sign_host(host, &csr).unwrap();
    let chain = tls::certificates_of_pem(&certificate).unwrap();
    let identity = Identity { chain, key: tls::key_of_pem(&key.serialize_pem()).unwrap() };
    (identity, authority.certificate().clone())
}
