//! Whole volume processes (in this process), real NBD clients, real sockets.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _};
use supercloud_ids::{Epoch, ProjectId, VolumeId};
use supercloud_storage::{
    backend::{DirStore, ObjectStore},
    key::{ContentRoot, DataKeys, ProjectKey},
    process::{
        ClientError, KeySource, NbdMode, ProcessError, StartRole, VolumeClient, VolumeProcessConfig,
        control::{RefusalCode, RoleStatus},
        run,
    },
    propagation::trace::{Touch, Trace},
    source::ChunkReader,
    transfer::{ImportOptions, export_raw, import_image},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::Command,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

const SIZE: u64 = 64 << 20;

struct World {
    dir: tempfile::TempDir,
    project: ProjectId,
    volume: VolumeId,
    key: ProjectKey,
}

struct Host {
    config: VolumeProcessConfig,
    client: VolumeClient,
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), ProcessError>>,
}

impl World {
    fn new() -> Self {
        use std::os::unix::fs::PermissionsExt as _;
        let _ = tracing_subscriber::fmt().with_test_writer().with_env_filter("info").try_init();
        let dir = tempfile::tempdir().unwrap();
        let key = ProjectKey::generate();
        let path = dir.path().join("key");
        std::fs::write(&path, key.expose_hex()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        Self { dir, project: ProjectId::generate(), volume: VolumeId::generate(), key }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn keys(&self) -> Arc<DataKeys> {
        Arc::new(DataKeys::derive(self.project, &self.key))
    }

    fn config(&self, host: &str, start: StartRole) -> VolumeProcessConfig {
        VolumeProcessConfig {
            volume: self.volume,
            project: self.project,
            size_bytes: SIZE,
            base: None,
            start,
            data_folder: self.path(&format!("{host}/data")),
            run_folder: self.path(&format!("{host}/run")),
            store_folder: self.path(&format!("{host}/store")),
            key: KeySource::File(self.path("key")),
            peer_dial: None,
            chunk_dial: None,
            nbd: NbdMode::Exclusive,
            nbd_uids: vec![],
            agent_uid: None,
            cache_bytes: 16 << 20,
        }
    }

    /// An image in the host's store, with data in some places; also gives its raw form.
    async fn image(&self, host: &str) -> (ContentRoot, PathBuf) {
        let raw = self.path("image.raw");
        let file = std::fs::File::create(&raw).unwrap();
        file.set_len(SIZE).unwrap();
        let mut rng = rand::rngs::SmallRng::seed_from_u64(7);
        for _ in 0..20 {
            let mut data = vec![0; 300_000];
            rng.fill(&mut data[..]);
            file.write_all_at(&data, rng.random_range(0..SIZE - 300_000)).unwrap();
        }
        let folder = self.path(&format!("{host}/store"));
        let store: Arc<dyn ObjectStore> = Arc::new(DirStore::open(&folder).unwrap());
        let options = ImportOptions {
            format: None,
            work_folder: self.dir.path().to_owned(),
            convert_budget: Duration::from_secs(60),
        };
        let imported =
            import_image(&raw, &options, self.keys(), store, &CancellationToken::new(), |_| {}).await.unwrap();
        (imported.root, raw)
    }
}

impl Host {
    async fn start(config: VolumeProcessConfig) -> Self {
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(run(config.clone(), config.key.read().unwrap(), shutdown.clone()));
        let client = VolumeClient::new(config.control_socket());
        if let Err(error) = client.wait_ready(Duration::from_secs(20)).await {
            panic!("not ready: {error:?}; {:?}", task.await);
        }
        Self { config, client, shutdown, task }
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.task.await.unwrap().unwrap();
        assert!(!self.config.nbd_socket().exists() && !self.config.control_socket().exists(), "sockets are left");
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.config.nbd_socket().display())
    }
}

fn has(tool: &str) -> bool {
    let found = std::env::var_os("PATH").is_some_and(|p| std::env::split_paths(&p).any(|d| d.join(tool).exists()));
    if !found {
        assert!(
            std::env::var_os("SUPERCLOUD_REQUIRE").is_none(),
            "SUPERCLOUD_REQUIRE is set, but {tool} is not installed"
        );
        println!("skipped: {tool} is not installed");
    }
    found
}

async fn tool(command: &str, args: &[&str]) -> String {
    let run = Command::new(command).args(args).kill_on_drop(true).output();
    let out = tokio::time::timeout(Duration::from_secs(120), run).await.expect("the tool hangs").unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{command} {args:?}: {text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn real_nbd_clients_agree_with_the_image() {
    if !has("nbdinfo") || !has("nbdcopy") || !has("qemu-img") {
        return;
    }
    let world = World::new();
    let (root, raw) = world.image("a").await;
    let mut config = world.config("a", StartRole::Active { epoch: Epoch(1) });
    config.base = Some(root);
    let host = Host::start(config.clone()).await;

    let info = tool("nbdinfo", &["--json", &host.uri()]).await;
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], SIZE);
    for (flag, want) in [
        ("is_read_only", false),
        ("can_flush", true),
        ("can_fua", true),
        ("can_trim", true),
        ("can_zero", true),
        ("can_multi_conn", false),
    ] {
        assert_eq!(export[flag], want, "{flag}");
    }
    assert!(tool("nbdinfo", &["--list", &host.uri()]).await.contains(&world.volume.to_string()));
    tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&raw), &host.uri()]).await;

    // Another disk over it, by a client that uses many requests at once, zeroes and flushes.
    let other = world.path("other.raw");
    let file = std::fs::File::create(&other).unwrap();
    file.set_len(SIZE).unwrap();
    let mut rng = rand::rngs::SmallRng::seed_from_u64(8);
    for _ in 0..30 {
        let mut data = vec![0; rng.random_range(1..500_000)];
        rng.fill(&mut data[..]);
        file.write_all_at(&data, rng.random_range(0..SIZE - 500_000)).unwrap();
    }
    tool("nbdcopy", &["--flush", text(&other), &host.uri()]).await;
    let back = world.path("back.raw");
    tool("nbdcopy", &[&host.uri(), text(&back)]).await;
    assert!(std::fs::read(&other).unwrap() == std::fs::read(&back).unwrap(), "nbdcopy reads something else");
    host.stop().await;

    let host = Host::start(config).await;
    tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&other), &host.uri()]).await;
    let mut steps = 0;
    let published = host.client.publish(|_, _| steps += 1).await.unwrap();
    assert!(steps > 0);
    host.stop().await;
    let store: Arc<dyn ObjectStore> = Arc::new(DirStore::open(&world.path("a/store")).unwrap());
    let reader = ChunkReader::of_store(world.keys(), store);
    let exported = world.path("exported.raw");
    export_raw(&reader, published.root, &exported, &CancellationToken::new(), |_| {}).await.unwrap();
    assert!(std::fs::read(&other).unwrap() == std::fs::read(&exported).unwrap(), "the published content differs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn fio_verifies_what_it_wrote() {
    if !has("fio") {
        return;
    }
    let world = World::new();
    let host = Host::start(world.config("a", StartRole::Active { epoch: Epoch(1) })).await;
    let uri = format!("--uri={}", host.uri());
    let args = [
        "--name=verify",
        "--ioengine=nbd",
        &uri,
        "--rw=randwrite",
        "--bsrange=512-128k",
        "--bs_unaligned=0",
        "--iodepth=16",
        "--size=48m",
        "--io_size=48m",
        "--fsync=32",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        // Else it leaves a file in the folder that it was called from.
        "--verify_state_save=0",
        "--randseed=5",
    ];
    tool("fio", &args).await;
    let status = host.client.status().await.unwrap();
    assert!(status.guest_written_bytes >= 32 << 20, "{status:?}");
    assert_eq!(status.alarm, None);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_second_client_is_refused_or_replaces_the_first() {
    if !has("nbdinfo") {
        return;
    }
    let world = World::new();
    for mode in [NbdMode::Exclusive, NbdMode::Replace] {
        let mut config = world.config(&format!("{mode:?}"), StartRole::Active { epoch: Epoch(1) });
        config.nbd = mode;
        let host = Host::start(config).await;
        // Connected, and silent: its turn lasts until its handshake budget ends.
        let first = tokio::net::UnixStream::connect(host.config.nbd_socket()).await.unwrap();
        while !host.client.status().await.unwrap().has_client {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let out = Command::new("nbdinfo").arg(host.uri()).output().await.unwrap();
        assert_eq!(out.status.success(), mode == NbdMode::Replace, "{mode:?}");
        drop(first);
        // Once the first has left, the next is served in both modes.
        while host.client.status().await.unwrap().has_client {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tool("nbdinfo", &[&host.uri()]).await;
        host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_volume_moves_between_two_hosts_and_back_of_a_refused_switch() {
    if !has("nbdcopy") || !has("qemu-img") {
        return;
    }
    let world = World::new();
    let (root, _) = world.image("a").await;
    let mut source = world.config("a", StartRole::Active { epoch: Epoch(1) });
    source.base = Some(root);
    let source = Host::start(source).await;
    let disk = world.path("disk.raw");
    let mut content = vec![0; SIZE as usize];
    rand::rngs::SmallRng::seed_from_u64(9).fill(&mut content[10 << 20..30 << 20]);
    std::fs::write(&disk, &content).unwrap();
    tool("nbdcopy", &["--flush", text(&disk), &source.uri()]).await;

    // The destination's store has nothing: the base's chunks come from the source's host.
    let chunk_socket = world.path("chunks.sock");
    let chunk_server = {
        let store: Arc<dyn ObjectStore> = Arc::new(DirStore::open(&world.path("a/store")).unwrap());
        let projects = supercloud_storage::peer::chunks::ServedProjects::default();
        projects.add(world.project);
        let listener = tokio::net::UnixListener::bind(&chunk_socket).unwrap();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (store, projects) = (store.clone(), projects.clone());
                tokio::spawn(async move {
                    supercloud_storage::peer::chunks::serve_chunks(store, projects, stream, &CancellationToken::new())
                        .await
                });
            }
        })
    };
    let mut target = world.config("b", StartRole::Standby);
    target.base = Some(root);
    target.peer_dial = Some(source.config.peer_socket());
    target.chunk_dial = Some(chunk_socket);
    let target = Host::start(target).await;

    // A client may connect already, and waits.
    let waiting = {
        let (uri, back) = (target.uri(), world.path("back.raw"));
        tokio::spawn(async move { tool("nbdcopy", &[&uri, text(&back)]).await })
    };
    target.client.pre_copy(None, false).await.unwrap();
    while target.client.status().await.unwrap().pre_copy.passes < 2 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let before = target.client.status().await.unwrap();
    assert!(before.pulled_bytes_before >= 20 << 20, "{before:?}");
    assert_eq!(before.role, RoleStatus::Standby { is_adopted: false });

    // A first switch is refused: the source goes on and changes something.
    let refused = source.client.seal(Epoch(1)).await.unwrap();
    target.client.adopt(refused).await.unwrap();
    source.client.unseal(Epoch(1)).await.unwrap();
    content[..5 << 20].fill(7);
    std::fs::write(&disk, &content).unwrap();
    tool("nbdcopy", &["--flush", text(&disk), &source.uri()]).await;

    let sealed = source.client.seal(Epoch(1)).await.unwrap();
    assert_ne!(sealed.root, refused.root);
    target.client.adopt(sealed).await.unwrap();
    target.client.adopt(sealed).await.unwrap();
    let stale = target.client.adopt(refused).await;
    assert!(matches!(&stale, Err(ClientError::Refused(r)) if r.code == RefusalCode::Map), "{stale:?}");
    let old = target.client.activate(Epoch(1)).await;
    assert!(matches!(&old, Err(ClientError::Refused(r)) if r.code == RefusalCode::Epoch), "{old:?}");
    let deleted = source.client.shutdown(true, false).await;
    assert!(matches!(&deleted, Err(ClientError::Refused(r)) if r.code == RefusalCode::Role), "{deleted:?}");
    target.client.activate(Epoch(2)).await.unwrap();
    waiting.await.unwrap();
    assert!(std::fs::read(world.path("back.raw")).unwrap() == content, "the client that waited reads something else");

    target.client.start_background_fetch(None).await.unwrap();
    while !source.client.status().await.unwrap().is_released {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let after = target.client.status().await.unwrap();
    assert_eq!((after.missing_blocks, after.role), (0, RoleStatus::Active { epoch: Epoch(2) }));
    source.client.shutdown(true, false).await.unwrap();
    source.task.await.unwrap().unwrap();
    assert!(!source.config.data_folder.exists(), "the source's data is left");
    tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&disk), &target.uri()]).await;
    let config = target.config.clone();
    target.stop().await;
    // Also after a new start, with nobody else there.
    chunk_server.abort();
    let target = Host::start(config).await;
    tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&disk), &target.uri()]).await;
    target.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn bad_orders_are_refused_and_change_nothing() {
    use supercloud_storage::wire::{Frame, read_frame, write_frame};
    let world = World::new();
    let host = Host::start(world.config("a", StartRole::Active { epoch: Epoch(5) })).await;
    let second = run(host.config.clone(), host.config.key.read().unwrap(), CancellationToken::new()).await;
    assert!(matches!(second, Err(ProcessError::Setup { .. })), "two processes serve one volume");
    for (request, code) in [
        (host.client.activate(Epoch(4)).await, RefusalCode::Epoch),
        (host.client.unseal(Epoch(6)).await, RefusalCode::Epoch),
        (host.client.seal(Epoch(4)).await.map(drop), RefusalCode::Epoch),
        (host.client.pre_copy(None, false).await, RefusalCode::Role),
        (host.client.shutdown(true, false).await, RefusalCode::Role),
    ] {
        assert!(matches!(&request, Err(ClientError::Refused(r)) if r.code == code), "{request:?}");
    }
    let mut stream = tokio::net::UnixStream::connect(host.config.control_socket()).await.unwrap();
    for bad in [&b"{}"[..], b"not json", b"{\"request\":\"activate\",\"epoch\":-1}"] {
        write_frame(&mut stream, &Frame::v1(1, bad.to_vec().into())).await.unwrap();
        let answer = read_frame(&mut stream).await.unwrap();
        assert!(String::from_utf8_lossy(&answer.payload).contains("malformed"), "{answer:?}");
    }
    assert_eq!(host.client.status().await.unwrap().role, RoleStatus::Active { epoch: Epoch(5) });
    host.client.shutdown(true, true).await.unwrap();
    host.task.await.unwrap().unwrap();
    assert!(!host.config.data_folder.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_a_guest_does_with_its_blocks_is_recorded_on_request() {
    let world = World::new();
    let (root, raw) = world.image("a").await;
    let mut config = world.config("a", StartRole::Active { epoch: Epoch(1) });
    config.base = Some(root);
    let host = Host::start(config).await;
    host.client.trace(3600).await.unwrap();
    // In place of the other.
    host.client.trace(3).await.unwrap();
    tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&raw), &host.uri()]).await;
    let file = host.config.data_folder.join("trace");
    while !file.exists() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let trace = Trace::decode(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(u64::from(trace.blocks), SIZE.div_ceil(64 << 10));
    assert!(trace.changed.is_empty(), "nothing differs from the base");
    assert!(!trace.events.is_empty() && trace.events.iter().all(|event| event.touch == Touch::Read));
    host.client.shutdown(true, true).await.unwrap();
    host.task.await.unwrap().unwrap();
    assert!(!host.config.data_folder.exists(), "its trace is deleted with it");
}

/// Not a test of its own: what [`a_killed_process_loses_nothing_acknowledged`] runs as another process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serve_as_another_process() {
    let Some(path) = std::env::var_os("VOLUME_PROCESS_CONFIG") else { return };
    let config = VolumeProcessConfig::from_file(path.as_ref()).unwrap();
    let key = config.key.read().unwrap();
    run(config, key, CancellationToken::new()).await.unwrap();
}

fn another_process(config: &Path) -> tokio::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "serve_as_another_process", "--nocapture"])
        .env("VOLUME_PROCESS_CONFIG", config)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

/// An NBD client of the barest kind: EXPORT_NAME, then one request after the other.
struct Nbd(tokio::net::UnixStream);

impl Nbd {
    async fn connect(config: &VolumeProcessConfig) -> Self {
        let mut nbd = tokio::net::UnixStream::connect(config.nbd_socket()).await.unwrap();
        let mut hello = [0; 18];
        nbd.read_exact(&mut hello).await.unwrap();
        nbd.write_all(&[&3u32.to_be_bytes()[..], b"IHAVEOPT", &1u32.to_be_bytes(), &0u32.to_be_bytes()].concat())
            .await
            .unwrap();
        let mut export = [0; 10];
        nbd.read_exact(&mut export).await.unwrap();
        assert_eq!(u64::from_be_bytes(export[..8].try_into().unwrap()), SIZE);
        Self(nbd)
    }

    /// Gives the error number.
    async fn ask(&mut self, command: u16, offset: u64, len: u32, data: &[u8]) -> u32 {
        let command = [&[0, 0][..], &command.to_be_bytes()].concat();
        let magic = 0x2560_9513u32.to_be_bytes();
        let cookie = 7u64.to_be_bytes();
        let header = [&magic[..], &command, &cookie, &offset.to_be_bytes(), &len.to_be_bytes(), data];
        self.0.write_all(&header.concat()).await.unwrap();
        let mut reply = [0; 16];
        self.0.read_exact(&mut reply).await.unwrap();
        u32::from_be_bytes(reply[4..8].try_into().unwrap())
    }
}

/// A source in a process of its own, which is killed; what its mirror stood for goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_committed_cut_of_a_killed_source_is_promoted() {
    const CUT: u16 = 0x5343;
    let world = World::new();
    let (root, raw) = world.image("a").await;
    let mut source = world.config("a", StartRole::Active { epoch: Epoch(1) });
    source.base = Some(root);
    let path = world.path("config.json");
    std::fs::write(&path, serde_json::to_vec(&source).unwrap()).unwrap();
    let mut child = another_process(&path);
    let client = VolumeClient::new(source.control_socket());
    client.wait_ready(Duration::from_secs(30)).await.unwrap();
    client.end_cuts().await.unwrap();
    let mut target = world.config("b", StartRole::Standby);
    target.base = Some(root);
    target.store_folder = world.path("a/store");
    target.peer_dial = Some(source.peer_socket());
    let target = Host::start(target).await;
    let is = |code| move |refusal: &ClientError| matches!(refusal, ClientError::Refused(r) if r.code == code);

    let mut nbd = Nbd::connect(&source).await;
    let mut now = std::fs::read(&raw).unwrap();
    let mut rng = rand::rngs::SmallRng::seed_from_u64(12);
    let early = target.client.await_staged(0).await;
    assert!(early.as_ref().is_err_and(is(RefusalCode::Role)), "{early:?}");
    target.client.follow(None).await.unwrap();
    let mut committed = now.clone();
    for cut in 1..=8u64 {
        for _ in 0..rng.random_range(1..60) {
            let mut data = vec![0; 512 * rng.random_range(1..200)];
            rng.fill(&mut data[..]);
            let at = rng.random_range(0..(SIZE - data.len() as u64) / 512) * 512;
            let len = u32::try_from(data.len()).unwrap();
            assert_eq!(nbd.ask(1, at, len, &data).await, 0);
            now[at as usize..at as usize + data.len()].copy_from_slice(&data);
        }
        assert_eq!(nbd.ask(CUT, cut, 0, &[]).await, 0);
        assert_eq!(nbd.ask(CUT, cut, 0, &[]).await, 22);
        while target.client.await_staged(cut - 1).await.unwrap().staged < cut {}
        if cut < 8 {
            target.client.commit_cut(cut).await.unwrap();
            committed.clone_from(&now);
        }
    }
    let beyond = target.client.commit_cut(9).await;
    assert!(beyond.as_ref().is_err_and(is(RefusalCode::Cut)), "{beyond:?}");
    for refused in [target.client.pre_copy(None, false).await, target.client.shutdown(true, false).await] {
        assert!(refused.as_ref().is_err_and(is(RefusalCode::Role)), "{refused:?}");
    }
    child.kill().await.unwrap();
    let following = target.client.status().await.unwrap().following.unwrap();
    assert_eq!((following.staged, following.committed), (8, 7), "{following:?}");

    let sealed = target.client.promote(Epoch(1)).await.unwrap();
    assert_eq!(target.client.promote(Epoch(1)).await.unwrap(), sealed);
    let old = target.client.activate(Epoch(1)).await;
    assert!(old.as_ref().is_err_and(is(RefusalCode::Epoch)), "{old:?}");
    target.client.activate(Epoch(2)).await.unwrap();
    let status = target.client.status().await.unwrap();
    assert_eq!((status.missing_blocks, status.following), (0, None));
    assert!(!target.config.data_folder.join("stage").exists());
    if has("nbdcopy") {
        let back = world.path("back.raw");
        tool("nbdcopy", &[&target.uri(), text(&back)]).await;
        assert!(std::fs::read(&back).unwrap() == committed, "what was promoted is not the committed cut");
        let config = target.config.clone();
        target.stop().await;
        let target = Host::start(config).await;
        tool("nbdcopy", &[&target.uri(), text(&back)]).await;
        assert!(std::fs::read(&back).unwrap() == committed, "it differs after a new start");
        target.stop().await;
    }
}

/// Writes numbered sectors without ever flushing, over the real socket, and kills the process with SIGKILL in the
/// middle. Every write that was acknowledged must be there when it is started again.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_killed_process_loses_nothing_acknowledged() {
    let world = World::new();
    let (root, raw) = world.image("a").await;
    let mut config = world.config("a", StartRole::Active { epoch: Epoch(1) });
    config.base = Some(root);
    let path = world.path("config.json");
    std::fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
    let client = VolumeClient::new(config.control_socket());
    let mut expected = std::fs::read(&raw).unwrap();
    let mut rng = rand::rngs::SmallRng::seed_from_u64(11);
    let mut number = 0u64;
    for round in 0..4 {
        let mut child = another_process(&path);
        let status = client.wait_ready(Duration::from_secs(30)).await.unwrap();
        assert_eq!(status.role, RoleStatus::Active { epoch: Epoch(1) }, "round {round}");
        if has("nbdcopy") {
            let back = world.path("back.raw");
            let uri = format!("nbd+unix:///?socket={}", config.nbd_socket().display());
            tool("nbdcopy", &[&uri, text(&back)]).await;
            assert!(std::fs::read(&back).unwrap() == expected, "round {round}: acknowledged writes are gone");
        }
        let mut nbd = Nbd::connect(&config).await;
        for _ in 0..rng.random_range(50..400) {
            number += 1;
            let at = rng.random_range(0..SIZE / 512) * 512;
            let data: Vec<u8> = std::iter::repeat_n(number.to_be_bytes(), 64).flatten().collect();
            assert_eq!(nbd.ask(1, at, 512, &data).await, 0);
            expected[at as usize..at as usize + 512].copy_from_slice(&data);
        }
        child.kill().await.unwrap();
    }
}
