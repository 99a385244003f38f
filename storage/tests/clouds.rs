//! A guest's disk over a cloud of clouds: volume processes (in this process) that read over the socket that agents offer, four
//! folders as providers, of which one lies from the beginning and another is replaced by an empty one.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{os::unix::fs::FileExt as _, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use rand::{Rng as _, SeedableRng as _};
use supercloud_ids::{Epoch, ProjectId, VolumeId};
use supercloud_storage::{
    backend::{
        DirStore, ObjectKey, ObjectStore, PutOutcome, StoreFuture,
        depsky::{CloudOfClouds, CloudOfCloudsConfig, MemberConfig, ReadOrder, StoreKey},
    },
    chunk::MAX_SEALED_BYTES,
    key::{ContentRoot, DataKeys, ProjectKey},
    peer::chunks::{ServedProjects, serve_chunks},
    process::{KeySource, NbdMode, StartRole, VolumeClient, VolumeProcessConfig, run},
    sweep,
    transfer::{ImportOptions, import_image},
    volume::FetchLimit,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

const SIZE: u64 = 16 << 20;

/// A folder whose reads are wrong.
#[derive(Debug)]
struct Liar(DirStore);

impl ObjectStore for Liar {
    fn put(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, ()> {
        self.0.put(key, bytes)
    }
    fn put_if_absent(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, PutOutcome> {
        self.0.put_if_absent(key, bytes)
    }
    fn put_batch(&self, objects: Vec<(ObjectKey, Bytes)>) -> StoreFuture<'_, usize> {
        self.0.put_batch(objects)
    }
    fn refresh(&self, keys: Vec<ObjectKey>) -> StoreFuture<'_, Vec<ObjectKey>> {
        self.0.refresh(keys)
    }
    fn get(&self, key: ObjectKey, cap: usize) -> StoreFuture<'_, Bytes> {
        Box::pin(async move {
            let mut bytes = self.0.get(key, cap).await?.to_vec();
            bytes.iter_mut().skip(70).step_by(97).for_each(|byte| *byte ^= 0x55);
            Ok(bytes.into())
        })
    }
    fn exists(&self, key: ObjectKey) -> StoreFuture<'_, bool> {
        self.0.exists(key)
    }
    fn stat(&self, key: ObjectKey) -> StoreFuture<'_, Option<supercloud_storage::backend::ObjectEntry>> {
        self.0.stat(key)
    }
    fn delete(&self, key: ObjectKey) -> StoreFuture<'_, bool> {
        self.0.delete(key)
    }
    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> StoreFuture<'a, Vec<supercloud_storage::backend::ObjectEntry>> {
        self.0.list(prefix, after, limit)
    }
}

/// Serves a store on a socket, as an agent does for its volume processes.
fn offer(store: CloudOfClouds, project: ProjectId, path: &Path) -> AbortOnDropHandle<()> {
    let listener = tokio::net::UnixListener::bind(path).unwrap();
    AbortOnDropHandle::new(tokio::spawn(async move {
        let projects = ServedProjects::default();
        projects.add(project);
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            let (store, projects) = (Arc::new(store.clone()), projects.clone());
            connections.spawn(async move {
                let never = CancellationToken::new();
                let _ = serve_chunks(store, projects, stream, &never).await;
            });
        }
    }))
}

struct Disk {
    config: VolumeProcessConfig,
    client: VolumeClient,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), supercloud_storage::process::ProcessError>>,
}

impl Disk {
    async fn start(folder: &Path, name: &str, project: ProjectId, base: ContentRoot, chunks: &Path) -> Self {
        let config = VolumeProcessConfig {
            volume: VolumeId::generate(),
            project,
            size_bytes: SIZE,
            base: Some(base),
            start: StartRole::Active { epoch: Epoch(1) },
            data_folder: folder.join(format!("{name}/data")),
            run_folder: folder.join(format!("{name}/run")),
            store_folder: folder.join(format!("{name}/store")),
            key: KeySource::File(folder.join("key")),
            peer_dial: None,
            chunk_dial: Some(chunks.to_owned()),
            nbd: NbdMode::Exclusive,
            nbd_uids: vec![],
            agent_uid: None,
            cache_bytes: 16 << 20,
        };
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(run(config.clone(), config.key.read().unwrap(), shutdown.clone()));
        let client = VolumeClient::new(config.control_socket());
        client.wait_ready(Duration::from_secs(60)).await.unwrap();
        Self { config, client, shutdown, task }
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.config.nbd_socket().display())
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.task.await.unwrap().unwrap();
    }
}

async fn nbdcopy(from: &str, to: &str) {
    let run = tokio::process::Command::new("nbdcopy").args(["--flush", from, to]).kill_on_drop(true).output();
    let out = tokio::time::timeout(Duration::from_secs(300), run).await.expect("nbdcopy hangs").unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

fn noise(path: &Path, seed: u64) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(SIZE).unwrap();
    let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
    for _ in 0..12 {
        let mut data = vec![0; 300_000];
        rng.fill(&mut data[..]);
        file.write_all_at(&data, rng.random_range(0..SIZE - 300_000)).unwrap();
    }
}

fn is_same(one: &Path, other: &Path) -> bool {
    std::fs::read(one).unwrap() == std::fs::read(other).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_guests_disk_stands_on_four_providers_of_which_one_lies_and_one_is_replaced() {
    use std::os::unix::fs::PermissionsExt as _;
    if !std::env::var_os("PATH").is_some_and(|p| std::env::split_paths(&p).any(|d| d.join("nbdcopy").exists())) {
        assert!(std::env::var_os("SUPERCLOUD_REQUIRE").is_none(), "SUPERCLOUD_REQUIRE is set, but nbdcopy is missing");
        println!("skipped: nbdcopy is not installed");
        return;
    }
    let _ = tracing_subscriber::fmt().with_test_writer().with_env_filter("info").try_init();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let text = |name: &str| path(name).to_str().unwrap().to_owned();
    let (project, key) = (ProjectId::generate(), ProjectKey::generate());
    for (name, text) in [("key", key.expose_hex()), ("store-key", hex::encode([5; 32]))] {
        std::fs::write(path(name), text).unwrap();
        std::fs::set_permissions(path(name), std::fs::Permissions::from_mode(0o600)).unwrap();
    }
    let keys = Arc::new(DataKeys::derive(project, &key));

    // The first one lies, and is asked first.
    let member = |i: usize| {
        let store = DirStore::open(&path(&format!("provider-{i}"))).unwrap();
        let store: Arc<dyn ObjectStore> = if i == 0 { Arc::new(Liar(store)) } else { Arc::new(store) };
        (format!("provider-{i}"), store)
    };
    let store_key = StoreKey::from_bytes([5; 32]);
    let clouds = CloudOfClouds::over((0..4).map(member).collect(), &store_key, ReadOrder::Listed).unwrap();
    noise(&path("image.raw"), 1);
    let options =
        ImportOptions { format: None, work_folder: folder.path().to_owned(), convert_budget: Duration::from_secs(60) };
    let store: Arc<dyn ObjectStore> = Arc::new(clouds.clone());
    let never = CancellationToken::new();
    let image = import_image(&path("image.raw"), &options, keys.clone(), store.clone(), &never, |_| {}).await.unwrap();
    let offered = offer(clouds.clone(), project, &path("chunks-a"));

    let disk = Disk::start(folder.path(), "a", project, image.root, &path("chunks-a")).await;
    nbdcopy(&disk.uri(), &text("read.raw")).await;
    assert!(is_same(&path("read.raw"), &path("image.raw")), "the image reads otherwise");
    noise(&path("written.raw"), 2);
    nbdcopy(&text("written.raw"), &disk.uri()).await;
    let published = disk.client.publish(|_, _| {}).await.unwrap();
    // As an agent does at a freeze: what the process has stored beside it goes into the cloud's store.
    let near = DirStore::open(&disk.config.store_folder).unwrap();
    disk.stop().await;
    for entry in near.list("", None, 100_000).await.unwrap() {
        if entry.key.chunk_name().is_some() {
            let sealed = near.get(entry.key.clone(), MAX_SEALED_BYTES).await.unwrap();
            sweep::put_chunks(&*store, project, vec![(entry.key, sealed)]).await.unwrap();
        }
    }
    clouds.settle().await;
    let members = clouds.members();
    assert!(members[0].wrong > 0 && members[1..].iter().all(|member| member.wrong == 0), "{members:?}");
    drop((offered, store, clouds));

    // The third provider is left for another, by configuration; the liar has come to its senses.
    std::fs::remove_dir_all(path("provider-2")).unwrap();
    let member = |i: usize| MemberConfig {
        name: format!("provider-{i}"),
        bucket: None,
        folder: Some(path(&if i == 2 { "provider-new".to_owned() } else { format!("provider-{i}") })),
    };
    let config = CloudOfCloudsConfig {
        key_file: path("store-key"),
        read_order: ReadOrder::Fastest,
        members: (0..4).map(member).collect(),
    };
    let clouds = CloudOfClouds::open(&config).unwrap();
    let mended = clouds.mend_all(&FetchLimit::default(), |_| ()).await.unwrap();
    assert!(mended.mended >= mended.objects && mended.unreadable == 0 && mended.unanswered == 0, "{mended:?}");
    drop(clouds);
    // Then the second one is gone, too: what was put anew is needed.
    std::fs::remove_dir_all(path("provider-1")).unwrap();
    let clouds = CloudOfClouds::open(&config).unwrap();
    let offered = offer(clouds.clone(), project, &path("chunks-b"));
    let disk = Disk::start(folder.path(), "b", project, published.root, &path("chunks-b")).await;
    nbdcopy(&disk.uri(), &text("again.raw")).await;
    assert!(is_same(&path("again.raw"), &path("written.raw")), "what the guest wrote reads otherwise");
    disk.stop().await;
    drop(offered);
}
