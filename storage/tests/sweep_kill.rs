//! A sweep of a real directory by a process of its own, which is killed again and again while others write and delete: what
//! lives is whole after every kill, and in the end nothing else is left.

#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use serde::{Deserialize, Serialize};
use supercloud_ids::ProjectId;
use supercloud_storage::{
    BLOCK_BYTES,
    backend::{DirStore, ObjectKey, ObjectStore},
    chunk,
    key::{ChunkKind, ChunkName, ContentRoot, DataKeys, ProjectKey},
    manifest::{self, Manifest},
    source::ChunkReader,
    sweep::{self, Asked, Authority, AuthorityError, Live, Mark, SweepOptions},
};
use tokio_util::sync::CancellationToken;

const FOLDER: &str = "SUPERCLOUD_SWEPT_FOLDER";

/// The records, in a file that is replaced as a whole.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Records {
    project: ProjectId,
    roots: BTreeSet<ContentRoot>,
    writing_since: Option<SystemTime>,
}

impl Records {
    fn write(&self, folder: &Path) {
        std::fs::write(folder.join("records.new"), serde_json::to_vec(self).unwrap()).unwrap();
        std::fs::rename(folder.join("records.new"), folder.join("records")).unwrap();
    }

    fn read(folder: &Path) -> Self {
        serde_json::from_slice(&std::fs::read(folder.join("records")).unwrap()).unwrap()
    }
}

fn keys(project: ProjectId) -> Arc<DataKeys> {
    Arc::new(DataKeys::derive(project, &ProjectKey::from_bytes([5; 32])))
}

#[derive(Debug)]
struct FileAuthority(PathBuf);

impl Authority for FileAuthority {
    fn live<'a>(&'a self, _: ProjectId, _: &'a Asked) -> BoxFuture<'a, Result<Live, AuthorityError>> {
        Box::pin(async move {
            let records = Records::read(&self.0);
            Ok(Live {
                roots: records.roots.into_iter().map(|root| (root, true)).collect::<BTreeMap<_, _>>(),
                oldest_writer: records.writing_since.map(|since| since.elapsed().unwrap_or_default()),
                mark: Mark { seq: 0, hash: String::new() },
                gone: BTreeSet::new(),
            })
        })
    }

    fn names(
        &self,
        project: ProjectId,
        kind: ChunkKind,
        name: ChunkName,
        sealed: Option<Bytes>,
    ) -> BoxFuture<'_, Result<Option<Vec<ChunkName>>, AuthorityError>> {
        Box::pin(
            async move { Ok(sealed.and_then(|sealed| manifest::names_of(&keys(project), kind, name, &sealed).ok())) },
        )
    }
}

/// The process that is killed; no test of its own.
#[tokio::test]
async fn sweeper_process() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    let store: Arc<dyn ObjectStore> = Arc::new(DirStore::open(&folder.join("store")).unwrap());
    let authority = FileAuthority(folder.clone());
    let options = SweepOptions { holder: "sweeper".into(), grace: Duration::ZERO, pause: Duration::ZERO };
    let never = CancellationToken::new();
    loop {
        for project in sweep::projects(&*store).await.unwrap() {
            if let Err(error) = sweep::sweep_project(&store, project, &authority, &options, &never).await {
                // What lives and cannot be read must not be passed over in silence.
                std::fs::write(folder.join("failed"), format!("{error:?}")).unwrap();
                return;
            }
        }
    }
}

fn start(folder: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "sweeper_process"])
        .env(FOLDER, folder)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

async fn write(folder: &Path, store: &DirStore, records: &mut Records, blocks: BTreeSet<u8>) {
    records.writing_since = Some(SystemTime::now());
    records.write(folder);
    let keys = keys(records.project);
    let mut manifest = Manifest::zeros(64 * BLOCK_BYTES as u64).unwrap();
    let mut objects = Vec::new();
    for block in blocks {
        let (name, sealed) = chunk::seal(&keys, ChunkKind::Data, &[block + 1; 1000]).unwrap();
        manifest.set(block.into(), Some(name));
        objects.push((ObjectKey::chunk(records.project, &name), sealed));
    }
    sweep::put_chunks(store, records.project, objects).await.unwrap();
    let root = manifest.store(&keys, store).await.unwrap();
    records.roots.insert(root);
    records.writing_since = None;
    records.write(folder);
}

/// As a volume's history grows: a point is the newest one with some blocks changed; of the others it counts on being there.
async fn point(folder: &Path, store: &Arc<DirStore>, records: &mut Records, newest: ContentRoot, blocks: BTreeSet<u8>) {
    records.writing_since = Some(SystemTime::now());
    records.write(folder);
    let keys = keys(records.project);
    let reader = ChunkReader::of_store(keys.clone(), store.clone());
    let mut manifest = Manifest::load(&reader, newest).await.unwrap();
    let known: Vec<ChunkName> = manifest.chunks().map(|(_, name)| name).collect();
    let lacking = sweep::count_on(&**store, records.project, &known).await.unwrap();
    assert!(lacking.is_empty(), "{} chunks of a point that lives are gone", lacking.len());
    let mut objects = Vec::new();
    for block in blocks {
        let (name, sealed) = chunk::seal(&keys, ChunkKind::Data, &[block + 100; 1000]).unwrap();
        manifest.set(block.into(), Some(name));
        objects.push((ObjectKey::chunk(records.project, &name), sealed));
    }
    sweep::put_chunks(&**store, records.project, objects).await.unwrap();
    let root = manifest.store(&keys, &**store).await.unwrap();
    // The one before may be thinned out as soon as this one is recorded.
    if root != newest && blocks_are_odd(&manifest) {
        records.roots.remove(&newest);
    }
    records.roots.insert(root);
    records.writing_since = None;
    records.write(folder);
}

fn blocks_are_odd(manifest: &Manifest) -> bool {
    manifest.chunks().count() % 2 == 1
}

async fn there(store: &DirStore) -> BTreeSet<ChunkName> {
    let listed = store.list("", None, 100_000).await.unwrap();
    listed.into_iter().filter_map(|entry| entry.key.chunk_name()).collect()
}

/// Checks all that lives, to the last byte; gives the names.
async fn check(store: &Arc<DirStore>, records: &Records) -> BTreeSet<ChunkName> {
    let reader = ChunkReader::of_store(keys(records.project), store.clone());
    let mut names = BTreeSet::new();
    for root in &records.roots {
        manifest::verify(&reader, *root, true).await.unwrap();
        names.extend(Manifest::load(&reader, *root).await.unwrap().chunks().map(|(_, name)| name));
    }
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_killed_at_any_point_leaves_all_that_lives_and_in_the_end_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let seed: u64 = std::env::var("SUPERCLOUD_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(0x5eed);
    let kills = if std::env::var_os("SUPERCLOUD_SOAK").is_some() { 500 } else { 25 };
    println!("seed {seed}, {kills} kills");
    let mut rng = SmallRng::seed_from_u64(seed);
    let store = Arc::new(DirStore::open(&folder.join("store")).unwrap());
    let mut records = Records { project: ProjectId::generate(), roots: BTreeSet::new(), writing_since: None };
    records.write(folder);
    let mut most = 0;
    for _ in 0..kills {
        let mut sweeper = start(folder);
        let life = Instant::now() + Duration::from_millis(rng.random_range(20..400));
        while Instant::now() < life {
            let blocks = (0..rng.random_range(1..30)).map(|_| rng.random_range(0..64)).collect();
            let newest = records.roots.iter().nth(rng.random_range(0..records.roots.len().max(1))).copied();
            match newest.filter(|_| rng.random_bool(0.5)) {
                Some(newest) => point(folder, &store, &mut records, newest, blocks).await,
                None => write(folder, &store, &mut records, blocks).await,
            }
            if rng.random_bool(0.8) {
                let share = rng.random_range(0.0..1.0);
                records.roots.retain(|_| rng.random_bool(share));
                records.write(folder);
            }
            most = most.max(there(&store).await.len());
        }
        sweeper.kill().unwrap();
        sweeper.wait().unwrap();
        assert!(!folder.join("failed").exists(), "{}", std::fs::read_to_string(folder.join("failed")).unwrap());
        check(&store, &records).await;
    }
    let mut sweeper = start(folder);
    let needed = check(&store, &records).await;
    let patience = Instant::now() + Duration::from_secs(120);
    // Besides data each manifest has a leaf and a root; those of different roots differ.
    while there(&store).await.len() != needed.len() + 2 * records.roots.len() {
        assert!(Instant::now() < patience, "{} chunks are left", there(&store).await.len());
        assert!(!folder.join("failed").exists(), "{}", std::fs::read_to_string(folder.join("failed")).unwrap());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    sweeper.kill().unwrap();
    sweeper.wait().unwrap();
    check(&store, &records).await;
    println!("{most} chunks at most, {} in the end", there(&store).await.len());
}
