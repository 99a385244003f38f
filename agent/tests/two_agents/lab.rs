//! Hosts for tests: an agent each, a hypervisor that outlives it, real volume processes. Everything is in one temporary folder
//! and is gone when the test ends, however it ends.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use supercloud_agent::{
    agent::{self, AgentError, Parts},
    config::Config,
    identity::Identity,
    ports::{PortError, Switch},
};
use supercloud_api::{
    OverlayEncryption, PortTraffic, Propagation, Shape,
    handover::{OperationKind, Owner, Phase},
    ids::{CloudId, Epoch, GuestId, HostId, NetworkId, OperationId, PortId, ProjectId, VolumeId},
    link::{BootSpec, FlowsOf, FlowsTold, GuestSpec, PortSpec, Secret, VolumeSpec},
};
use supercloud_blanket::{BoxFuture, backend::RunState};
use supercloud_sdn::{switch::SwitchError, view::OverlayView};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{
    controller::{Controller, HostInfo},
    hypervisor::{Hypervisor, World},
};

/// A switch that remembers what it was told.
#[derive(Default)]
pub struct FakeSwitch {
    pub attached: Mutex<BTreeMap<PortId, Epoch>>,
}

impl Switch for FakeSwitch {
    fn attach(&self, port: PortId, _mtu: u16) -> BoxFuture<'_, Result<String, PortError>> {
        self.attached.lock().unwrap().entry(port).or_default();
        Box::pin(async move { Ok(supercloud_sdn::tap::tap_name(port)) })
    }

    fn detach(&self, port: PortId) -> BoxFuture<'_, Result<(), PortError>> {
        self.attached.lock().unwrap().remove(&port);
        Box::pin(async { Ok(()) })
    }

    fn own(&self, port: PortId, epoch: Epoch) -> BoxFuture<'_, Result<(), PortError>> {
        *self.attached.lock().unwrap().get_mut(&port).expect("attached before it is owned") = epoch;
        Box::pin(async { Ok(()) })
    }

    fn apply(&self, _view: OverlayView) -> BoxFuture<'_, Result<(), PortError>> {
        Box::pin(async { Ok(()) })
    }

    fn attached(&self) -> BoxFuture<'_, Result<BTreeMap<PortId, (String, u32)>, PortError>> {
        let attached = self.attached.lock().unwrap();
        let ports = attached.keys().map(|port| (*port, (supercloud_sdn::tap::tap_name(*port), 1))).collect();
        Box::pin(async move { Ok(ports) })
    }

    fn flows(&self, of: FlowsOf) -> BoxFuture<'_, Result<FlowsTold, PortError>> {
        let is_attached = self.attached.lock().unwrap().contains_key(&of.port);
        let told = FlowsTold { traffic: PortTraffic::default(), flows: Vec::new(), left_out: 0 };
        Box::pin(async move { if is_attached { Ok(told) } else { Err(SwitchError::NotAttached(of.port).into()) } })
    }

    fn revision(&self) -> u64 {
        0
    }

    fn encryption(&self) -> Option<OverlayEncryption> {
        None
    }
}

pub struct TestHost {
    pub id: HostId,
    pub config: Config,
    identity: Identity,
    pub hypervisor: Hypervisor,
    pub switch: Arc<FakeSwitch>,
    agent: Mutex<Option<JoinHandle<()>>>,
    cancel: Mutex<CancellationToken>,
}

impl TestHost {
    fn start(&self) {
        let cancel = CancellationToken::new();
        let parts = Parts {
            config: self.config.clone(),
            identity: self.identity.clone(),
            backend: Arc::new(self.hypervisor.clone()),
            switch: self.switch.clone(),
            probe: serde_json::Value::Null,
        };
        *self.cancel.lock().unwrap() = cancel.clone();
        *self.agent.lock().unwrap() = Some(tokio::spawn(async move {
            match agent::run(parts, cancel).await {
                Ok(()) | Err(AgentError::Removed { .. }) => {}
                Err(error) => panic!("the agent does not start: {error}"),
            }
        }));
    }

    /// As by `kill -9`: nothing is said, nothing is tidied up.
    pub async fn kill_agent(&self) {
        let agent = self.agent.lock().unwrap().take();
        if let Some(agent) = agent {
            agent.abort();
            let _ = agent.await;
        }
        self.hypervisor.agent_died().await;
    }

    /// The host loses its power, with all that runs there.
    pub async fn die(&self, guest: GuestId) {
        let agent = self.agent.lock().unwrap().take();
        if let Some(agent) = agent {
            agent.abort();
            let _ = agent.await;
        }
        for pid in self.volume_pids() {
            // SAFETY: kill takes no pointers; the process is a volume process that this lab started.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        self.hypervisor.crash(guest).await;
    }

    pub fn data_address(&self) -> SocketAddr {
        self.config.data_listen
    }

    pub fn fingerprint(&self) -> String {
        self.identity.material().unwrap().fingerprint
    }

    pub fn start_agent(&self) {
        self.start();
    }

    /// Whether the agent has ended by itself.
    pub fn has_ended(&self) -> bool {
        self.agent.lock().unwrap().as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// In order, as by SIGTERM.
    pub async fn leave(&self) {
        self.cancel.lock().unwrap().cancel();
        let agent = self.agent.lock().unwrap().take();
        if let Some(agent) = agent {
            agent.await.expect("the agent ends");
        }
    }

    /// Where a guest's memory is while it is frozen or thawed.
    pub fn memory_file(&self, guest: GuestId) -> std::path::PathBuf {
        self.config.guests_dir().join(guest.to_string()).join("memory")
    }

    /// From now on the guest's record cannot be kept, as on a full disk, until `is_full` is false.
    pub fn fill_disk(&self, guest: GuestId, is_full: bool) {
        // In the place of the temporary file.
        let blocker = self.memory_file(guest).with_file_name("guest.json.new");
        match is_full {
            true => std::fs::create_dir(blocker).unwrap(),
            false => std::fs::remove_dir(blocker).unwrap(),
        }
    }

    /// Folders of guests that are left.
    pub fn leftovers(&self) -> Vec<String> {
        let mut found = Vec::new();
        for folder in [self.config.guests_dir(), self.config.run_dir.clone()] {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                found.push(entry.path().display().to_string());
            }
        }
        found
    }

    pub fn volume_pids(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        collect_pids(&self.config.data_dir, &mut pids);
        pids
    }
}

/// Reads the process records of volume processes below a folder.
fn collect_pids(folder: &Path, pids: &mut Vec<i32>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect_pids(&path, pids);
        } else if path.file_name().is_some_and(|name| name == "process.json")
            && let Ok(text) = std::fs::read_to_string(&path)
            && let Ok(record) = serde_json::from_str::<serde_json::Value>(&text)
            && let Some(pid) = record["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok())
        {
            let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            if exe.to_string_lossy().contains("supercloud-volume") {
                pids.push(pid);
            }
        }
    }
}

pub struct Lab {
    pub world: Arc<World>,
    pub controller: Arc<Controller>,
    pub hosts: Vec<Arc<TestHost>>,
    folder: tempfile::TempDir,
}

impl Drop for Lab {
    #[expect(clippy::disallowed_methods, reason = "the test is over; its agents' tasks need a moment to end")]
    fn drop(&mut self) {
        for host in &self.hosts {
            if let Some(agent) = host.agent.lock().unwrap().take() {
                agent.abort();
            }
        }
        std::thread::sleep(Duration::from_millis(200));
        let mut pids = Vec::new();
        collect_pids(self.folder.path(), &mut pids);
        for pid in pids {
            let _ = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
    }
}

/// Of a loopback address of its own: an agent that is started anew finds its port free, whatever other tests took meanwhile.
fn free_address() -> SocketAddr {
    static HOSTS: AtomicU16 = AtomicU16::new(0);
    let [high, low] = HOSTS.fetch_add(1, Ordering::SeqCst).to_be_bytes();
    let address = std::net::Ipv4Addr::new(127, 77, high, low);
    std::net::TcpListener::bind((address, 0)).unwrap().local_addr().unwrap()
}

impl Lab {
    /// Hosts in clouds of their own; `dialable` says which of them others can dial.
    pub async fn begin(dialable: &[bool]) -> Self {
        Self::begin_with(dialable, |_, _| {}).await
    }

    /// The same, where the configuration of each host is changed.
    pub async fn begin_with(dialable: &[bool], change: impl Fn(usize, &mut Config)) -> Self {
        let filter = tracing_subscriber::EnvFilter::try_from_default_env()
            .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
        // The first test of the process wins.
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
        supercloud_api::tls::install_provider();
        let folder = tempfile::Builder::new().prefix("agt-").tempdir_in("/tmp").unwrap();
        // Volume processes of another user pass through.
        std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
        let (world, controller) = (Arc::new(World::default()), Controller::begin().await);
        world.piece_ms.store(5, Ordering::SeqCst);
        let mut hosts = Vec::new();
        for (index, is_dialable) in dialable.iter().enumerate() {
            let (id, name) = (HostId::generate(), format!("host{index}"));
            let identity = controller.join(id);
            let data_listen = free_address();
            let data_address = is_dialable.then_some(data_listen);
            controller.add_host(HostInfo {
                id,
                name: name.clone(),
                data_address,
                certificate_sha256: identity.material().unwrap().fingerprint,
                cloud: CloudId::generate(),
            });
            let at = folder.path().join(&name);
            let mut config: Config = serde_json::from_value(serde_json::json!({
                "controller_url": "https://unused",
                "data_dir": at.join("data"),
                "run_dir": at.join("run"),
                "store_dir": at.join("store"),
                "qemu_user": own_user(),
                "volume_user": volume_user(),
                "data_listen": data_listen,
                "data_address": data_address,
                "sweep": { "every_s": 0, "after_freezes": true, "grace_s": 0 },
                "volume_program": env!("CARGO_BIN_EXE_supercloud-volume"),
                "capacity": { "vcpus": 8, "memory_bytes": 8_u64 << 30, "disk_bytes": 64_u64 << 30 },
            }))
            .unwrap();
            config.ovs.metadata_port.clear();
            change(index, &mut config);
            config.check().unwrap();
            let host = TestHost {
                id,
                config,
                identity,
                hypervisor: Hypervisor::new(&name, &world),
                switch: Arc::default(),
                agent: Mutex::default(),
                cancel: Mutex::default(),
            };
            host.start();
            hosts.push(Arc::new(host));
        }
        Self { world, controller, hosts, folder }
    }

    pub fn host(&self, id: HostId) -> &TestHost {
        self.hosts.iter().find(|host| host.id == id).unwrap()
    }

    pub fn add_guest(&self) -> GuestId {
        let guest = GuestId::generate();
        self.controller.add_guest(GuestSpec {
            guest,
            name: "guest".parse().unwrap(),
            project: ProjectId::generate(),
            project_key: Secret([3; 32]),
            shape: Shape { vcpus: 1, memory_bytes: 64 << 20 },
            compat_class: None,
            boot: BootSpec::Disk,
            volumes: vec![VolumeSpec {
                volume: VolumeId::generate(),
                size_bytes: 1 << 20,
                base_root: None,
                propagation: Propagation::HotStandby,
            }],
            ports: vec![PortSpec {
                port: PortId::generate(),
                network: NetworkId::generate(),
                mac: "02:00:00:00:00:01".into(),
                ipv4: "10.0.0.2".parse().unwrap(),
                mtu: 1450,
            }],
            user_data: Some("#cloud-config\n".into()),
        });
        guest
    }

    /// Does an operation to its end.
    pub async fn done(&self, guest: GuestId, kind: OperationKind) -> OperationId {
        let operation = self.controller.operate(guest, kind);
        let phase = self.controller.ended(guest, operation).await;
        assert_eq!(phase, Phase::Done, "{kind:?}: {:?}", self.controller.problems());
        operation
    }

    pub async fn start(&self, guest: GuestId, at: usize) {
        self.done(guest, OperationKind::Start { to: self.hosts[at].id }).await;
    }

    pub fn migrate(&self, to: usize) -> OperationKind {
        OperationKind::Migrate { to: self.hosts[to].id, post_copy: false }
    }

    /// Waits for something that must come.
    pub async fn eventually(&self, what: &str, mut holds: impl AsyncFnMut() -> bool) {
        let waited = async {
            while !holds().await {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(90), waited).await.is_err() {
            panic!("this does not come true: {what}; {}", self.controller.story());
        }
    }

    /// The guest runs at its owner, once, by right; its disk has everything; nothing of it is anywhere else.
    pub async fn check(&self, guest: GuestId) {
        let record = self.controller.record(guest);
        let Owner::Host(owner) = record.owner else { panic!("{guest} is not owned by a host: {record:?}") };
        assert!(record.operation.is_none() && record.holders.is_empty(), "{record:?}");
        let host = self.host(owner);
        self.eventually("it runs at its owner", async || {
            host.hypervisor.epoch_of(guest).await == Some((record.epoch, RunState::Running))
        })
        .await;
        assert_eq!(self.world.running(guest), 1);
        let checked = host.hypervisor.check_disk(guest).await;
        assert!(checked > 0, "nothing was written");
        for other in self.hosts.iter().filter(|other| other.id != owner) {
            assert_eq!(other.hypervisor.epoch_of(guest).await, None);
            self.eventually("nothing is left elsewhere", async || other.leftovers().is_empty()).await;
            assert!(other.switch.attached.lock().unwrap().is_empty());
            assert!(other.volume_pids().is_empty());
        }
        assert_eq!(host.switch.attached.lock().unwrap().values().copied().collect::<Vec<_>>(), [record.epoch]);
        self.violations();
    }

    /// As [`Self::check`], where another host is dead and what it has is not tidied up.
    pub async fn check_at_owner(&self, guest: GuestId) {
        let record = self.controller.record(guest);
        let Owner::Host(owner) = record.owner else { panic!("{guest} is not owned by a host: {record:?}") };
        let host = self.host(owner);
        self.eventually("it runs at its owner", async || {
            host.hypervisor.epoch_of(guest).await == Some((record.epoch, RunState::Running))
        })
        .await;
        assert_eq!(self.world.running(guest), 1);
        assert!(host.hypervisor.check_disk(guest).await > 0, "nothing was written");
        self.violations();
    }

    pub fn violations(&self) {
        let violations = self.world.violations.lock().unwrap();
        assert!(violations.is_empty(), "{violations:?}");
    }
}

/// The user as which the tests run: their hypervisor is this very process.
fn own_user() -> String {
    let said = std::process::Command::new("id").arg("-un").output().unwrap();
    String::from_utf8(said.stdout).unwrap().trim().to_owned()
}

/// Volume processes become another user where they can: one that is on every machine.
fn volume_user() -> String {
    Some(own_user()).filter(|user| user != "root").unwrap_or_else(|| "nobody".to_owned())
}
