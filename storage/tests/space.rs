//! What a guest does not need any more takes no space: a whole volume process, and our VMM's disk as its client.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _},
        net::UnixStream,
    },
    sync::Arc,
    time::{Duration, Instant},
};

use rand::{Rng as _, SeedableRng as _};
use supercloud_blanket::vmm::{
    Ram, memory,
    virtio::{
        Segment, Segments,
        block::{BlockBackend as _, BlockOperation, Empties, Extent},
        nbd::{NbdDisk, NbdLink},
    },
};
use supercloud_ids::{Epoch, ProjectId, VolumeId};
use supercloud_storage::{
    BLOCK_BYTES,
    backend::{DirStore, ObjectStore},
    key::{ContentRoot, DataKeys, ProjectKey},
    manifest::Manifest,
    process::{KeySource, NbdMode, StartRole, VolumeClient, VolumeProcessConfig, run},
    source::ChunkReader,
};
use tokio_util::sync::CancellationToken;
use vm_memory::GuestAddress;

const BLOCK: u64 = BLOCK_BYTES as u64;
const BLOCKS: u64 = 16;
const SIZE: usize = BLOCKS as usize * BLOCK_BYTES;

/// A guest that has only a disk: its memory, of which the first part is what is read and written.
struct Guest {
    disk: NbdDisk,
    ram: Arc<Ram>,
}

impl Guest {
    fn new(stream: UnixStream) -> Self {
        let link = NbdLink::new(stream, Box::new(drop)).unwrap();
        let ram = Arc::new(memory::map(memory::create(4 << 20).unwrap(), 4 << 20).unwrap());
        Self { disk: link.disk(), ram }
    }

    fn all() -> Segments {
        Segments(vec![Segment { at: GuestAddress(0), bytes: u32::try_from(SIZE).unwrap() }])
    }

    fn ask(&mut self, operation: BlockOperation) {
        self.disk.submit(7, operation, &self.ram);
        let end = Instant::now() + Duration::from_secs(60);
        let done = loop {
            match self.disk.done() {
                Some(done) => break done,
                None => assert!(Instant::now() < end, "the volume process does not answer"),
            }
            std::thread::yield_now();
        };
        assert_eq!(done.id, 7);
        done.result.unwrap();
    }

    fn write(&mut self, content: &[u8]) {
        assert_eq!(Self::all().write(&self.ram, content), SIZE);
        self.ask(BlockOperation::Write { offset: 0, from: Self::all() });
    }

    fn read(&mut self) -> Vec<u8> {
        self.ask(BlockOperation::Read { offset: 0, to: Self::all() });
        let mut content = vec![0; SIZE];
        assert_eq!(Self::all().read(&self.ram, &mut content), SIZE);
        content
    }
}

fn extent(offset: u64, bytes: u64, keeps_space: bool) -> Extent {
    Extent { offset, bytes: u32::try_from(bytes).unwrap(), keeps_space }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_a_guest_empties_takes_no_space_on_its_host_and_is_in_no_later_point() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (project, key) = (ProjectId::generate(), ProjectKey::generate());
    std::fs::write(path("key"), key.expose_hex()).unwrap();
    std::fs::set_permissions(path("key"), std::fs::Permissions::from_mode(0o600)).unwrap();
    let config = VolumeProcessConfig {
        volume: VolumeId::generate(),
        project,
        size_bytes: SIZE as u64,
        base: None,
        start: StartRole::Active { epoch: Epoch(1) },
        data_folder: path("data"),
        run_folder: path("run"),
        store_folder: path("store"),
        key: KeySource::File(path("key")),
        peer_dial: None,
        chunk_dial: None,
        nbd: NbdMode::Exclusive,
        nbd_uids: vec![],
        agent_uid: None,
        cache_bytes: 1 << 20,
    };
    let shutdown = CancellationToken::new();
    let process = tokio::spawn(run(config.clone(), config.key.read().unwrap(), shutdown.clone()));
    let client = VolumeClient::new(config.control_socket());
    client.wait_ready(Duration::from_secs(20)).await.unwrap();

    let (keys, socket) = (Arc::new(DataKeys::derive(project, &key)), config.nbd_socket());
    let store: Arc<dyn ObjectStore> = Arc::new(DirStore::open(&path("store")).unwrap());
    let chunks = async |root: ContentRoot| {
        let manifest = Manifest::load(&ChunkReader::of_store(keys.clone(), store.clone()), root).await.unwrap();
        manifest.chunks().collect::<Vec<_>>()
    };
    let data = path("data").join("data");
    // Of what is durable: a file system may give space to what was written later.
    let used = || std::fs::metadata(&data).unwrap().blocks() * 512;
    let seed = 0x0d15_ca4d;
    println!("seed {seed:#x}");
    let mut content = vec![0; SIZE];
    rand::rngs::SmallRng::seed_from_u64(seed).fill(&mut content[..]);

    let mut guest = tokio::task::block_in_place(|| Guest::new(UnixStream::connect(&socket).unwrap()));
    assert_eq!(guest.disk.empties(), Empties { discards: true, zeroes: true });
    tokio::task::block_in_place(|| {
        guest.write(&content);
        guest.ask(BlockOperation::Flush);
    });
    let full = used();
    assert!(full >= SIZE as u64, "{full} bytes");
    let before = chunks(client.take_point().await.unwrap().root).await;
    assert_eq!(before.len() as u64, BLOCKS);

    tokio::task::block_in_place(|| {
        // Whole blocks in two extents, half a block, zeros with and without their space.
        let extents = vec![extent(BLOCK, 2 * BLOCK, false), extent(5 * BLOCK, BLOCK, false)];
        guest.ask(BlockOperation::Discard { extents });
        guest.ask(BlockOperation::Discard { extents: vec![extent(7 * BLOCK, BLOCK / 2, false)] });
        let extents = vec![extent(9 * BLOCK, BLOCK, true), extent(10 * BLOCK, BLOCK, false)];
        guest.ask(BlockOperation::Zero { extents });
        guest.ask(BlockOperation::Flush);
        let empty = [(2, 6), (10, 12), (14, 15), (18, 22)];
        for (from, to) in empty {
            content[from * BLOCK_BYTES / 2..to * BLOCK_BYTES / 2].fill(0);
        }
        assert!(guest.read() == content);
    });
    let given_back = full - used();
    // A file with many holes takes a little to say where they are.
    assert!(given_back + (16 << 10) >= 4 * BLOCK + BLOCK / 2, "{full} bytes before, {given_back} less now");
    assert!(given_back < 5 * BLOCK + BLOCK / 2, "zeros that shall keep their space do");

    let after = chunks(client.take_point().await.unwrap().root).await;
    let blocks: Vec<u32> = after.iter().map(|(block, _)| *block).collect();
    let is_gone = |block: &u32| matches!(block, 1 | 2 | 5 | 10);
    // Zeros that were written may be a chunk or none.
    let kept: Vec<u32> = (0..16).filter(|block| !is_gone(block) && *block != 9).collect();
    assert_eq!(blocks.iter().copied().filter(|block| *block != 9).collect::<Vec<_>>(), kept);
    let is_as_before = |(block, name): &&(u32, _)| before.contains(&(*block, *name));
    assert_eq!(after.iter().filter(is_as_before).count(), 16 - 4 - 2, "no other block has another chunk");
    drop(guest);
    shutdown.cancel();
    process.await.unwrap().unwrap();
}
