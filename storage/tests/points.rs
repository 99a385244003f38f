//! What a point of a volume's history costs, on real files: a volume of 1 GiB over an image of 1 GiB with few changes.
//! `cargo test -p supercloud-storage --test points --release -- --ignored --nocapture`

use std::{sync::Arc, time::Instant};

use rand::{Rng as _, RngCore as _, SeedableRng as _, rngs::SmallRng};
use supercloud_ids::{Epoch, ProjectId, VolumeId};
use supercloud_storage::{
    BLOCK_BYTES,
    backend::{DirStore, ObjectKey, ObjectStore},
    chunk,
    key::{ChunkKind, ChunkName, DataKeys, ProjectKey},
    manifest::Manifest,
    source::ChunkReader,
    sweep,
    volume::{Volume, VolumeParams, disk::FolderDisk, role::Role},
};
use tokio_util::sync::CancellationToken;

const BLOCKS: u32 = 16_384;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures; writes 1.2 GB"]
async fn the_cost_of_a_point() {
    let folder = tempfile::tempdir_in(std::env::var_os("SUPERCLOUD_BENCH_DIR").unwrap_or("/tmp".into())).unwrap();
    let project = ProjectId::generate();
    let keys = Arc::new(DataKeys::derive(project, &ProjectKey::generate()));
    let store = Arc::new(DirStore::open(&folder.path().join("store")).unwrap());
    let mut rng = SmallRng::seed_from_u64(5);
    let mut block = vec![0; BLOCK_BYTES];
    let mut image = Manifest::zeros(u64::from(BLOCKS) * BLOCK_BYTES as u64).unwrap();
    for at in (0..BLOCKS).step_by(256) {
        let mut objects = Vec::new();
        for at in at..at + 256 {
            rng.fill_bytes(&mut block);
            let (name, sealed) = chunk::seal(&keys, ChunkKind::Data, &block).unwrap();
            image.set(at, Some(name));
            objects.push((ObjectKey::chunk(project, &name), sealed));
        }
        sweep::put_chunks(&*store, project, objects).await.unwrap();
    }
    let base = image.store(&keys, &*store).await.unwrap();
    let params = VolumeParams {
        volume: VolumeId::generate(),
        size_bytes: image.size_bytes(),
        base: Some(base),
        reader: ChunkReader::of_store(keys.clone(), store.clone()),
        start: Role::Active { epoch: Epoch(1) },
        cache_bytes: 64 << 20,
    };
    let disk = Arc::new(FolderDisk::open(&folder.path().join("volume")).unwrap());
    let volume = Volume::open(disk, params).await.unwrap();
    let shared: Arc<dyn ObjectStore> = store.clone();
    let never = CancellationToken::new();
    let mut written = 0;
    for (label, changes) in [("first, 2048 blocks changed", 2048), ("64 more", 64), ("64 more", 64), ("none", 0)] {
        for _ in 0..changes {
            rng.fill_bytes(&mut block[..4096]);
            let at = u64::from(rng.random_range(0..BLOCKS)) * BLOCK_BYTES as u64;
            volume.write(at, block[..4096].to_vec().into(), false).await.unwrap();
            written += 4096;
        }
        volume.flush().await.unwrap();
        let begun = Instant::now();
        let point = volume.point(&shared, &never, |_| ()).await.unwrap();
        let took = begun.elapsed();
        // What the agent does then, so that all of it stays in this cloud's store.
        let begun = Instant::now();
        let manifest = Manifest::load(&ChunkReader::of_store(keys.clone(), store.clone()), point.root).await.unwrap();
        let mut names: Vec<ChunkName> = manifest.chunks().map(|(_, name)| name).collect();
        names.sort_unstable();
        assert!(sweep::count_on(&*store, project, &names).await.unwrap().is_empty());
        let counted = begun.elapsed();
        println!(
            "{label}: {} of {} changed blocks read, {} bytes of chunks stored, {took:.2?}; {} chunks counted on in {counted:.2?}",
            point.sealed_blocks,
            point.total_blocks,
            point.stored_bytes,
            names.len(),
        );
    }
    // A full publish of the same, for comparison.
    let begun = Instant::now();
    let full = volume.publish(&shared, &never, |_| ()).await.unwrap();
    println!(
        "a full publish: {} blocks read, {:.2?}; {written} bytes written in all",
        full.sealed_blocks,
        begun.elapsed()
    );
    let again = volume.point(&shared, &never, |_| ()).await.unwrap();
    assert_eq!((again.root, again.sealed_blocks), (full.root, 0));
}
