//! Random operations against a plain vector of bytes, through kills and power cuts.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use proptest::prelude::*;
use rand::{Rng as _, SeedableRng as _};
use tokio_util::sync::CancellationToken;

use super::{SECTOR, SIZE, World, read_all, stamp, stamp_of};
use crate::{
    backend::ObjectStore,
    key::{ChunkKind, ContentRoot},
    manifest::Manifest,
    source::ChunkReader,
    volume::{CutOf, Volume, disk::Disk, role::Role, sim::SimDisk},
};

#[derive(Debug, Clone)]
enum Op {
    /// Sectors.
    Write {
        at: usize,
        len: usize,
        is_fua: bool,
    },
    /// Bytes, of any alignment.
    Splice {
        at: usize,
        len: usize,
    },
    Zero {
        at: usize,
        len: usize,
    },
    Discard {
        at: usize,
        len: usize,
    },
    Flush,
    Kill,
    PowerCut(u64),
    Close,
    Publish,
    /// A point of the history.
    Point,
    /// Some points are thinned out, and a sweep takes all that nothing names any more.
    Thin(u64),
    /// A cut of a checkpoint; in a series of its own, or the next of the one before.
    Cut {
        begins: bool,
    },
    /// The newest cut becomes a point.
    PointOfCut,
}

const SECTORS: usize = SIZE / SECTOR;

fn range(most: usize) -> impl Strategy<Value = (usize, usize)> {
    (0..SECTORS, 1..=most).prop_map(|(at, len)| (at, len.min(SECTORS - at)))
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (range(300), proptest::bool::weighted(0.1)).prop_map(|((at, len), is_fua)| Op::Write { at, len, is_fua }),
        4 => range(3).prop_map(|(at, len)| Op::Write { at, len, is_fua: false }),
        2 => (0..SIZE, 1..5000usize).prop_map(|(at, len)| Op::Splice { at, len: len.min(SIZE - at) }),
        2 => range(300).prop_map(|(at, len)| Op::Zero { at, len }),
        2 => range(300).prop_map(|(at, len)| Op::Discard { at, len }),
        3 => Just(Op::Flush),
        1 => Just(Op::Kill),
        1 => any::<u64>().prop_map(Op::PowerCut),
        1 => Just(Op::Close),
        1 => Just(Op::Publish),
        3 => Just(Op::Point),
        1 => any::<u64>().prop_map(Op::Thin),
        2 => any::<bool>().prop_map(|begins| Op::Cut { begins }),
        2 => Just(Op::PointOfCut),
    ]
}

/// What a sector may hold after a power cut: its last durable content and everything written since.
struct Model {
    now: Vec<u8>,
    allowed: Vec<BTreeSet<Vec<u8>>>,
}

impl Model {
    fn new(now: Vec<u8>) -> Self {
        let mut model = Self { now, allowed: Vec::new() };
        model.settle();
        model
    }

    /// Everything is durable.
    fn settle(&mut self) {
        self.allowed = self.now.chunks(SECTOR).map(|sector| BTreeSet::from([sector.to_vec()])).collect();
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        self.now[at..at + bytes.len()].copy_from_slice(bytes);
        for sector in at / SECTOR..=(at + bytes.len() - 1) / SECTOR {
            let content = self.now[sector * SECTOR..(sector + 1) * SECTOR].to_vec();
            self.allowed[sector].insert(content);
        }
    }

    /// Checks what was read after a power cut, and takes it for the truth.
    fn judge(&mut self, read: Vec<u8>) -> Result<(), TestCaseError> {
        for (sector, content) in read.chunks(SECTOR).enumerate() {
            prop_assert!(
                self.allowed[sector].contains(content),
                "sector {sector} holds {:?}, of none of {:?}",
                stamp_of(content),
                self.allowed[sector].iter().map(|c| stamp_of(c)).collect::<Vec<_>>()
            );
        }
        self.now = read;
        self.settle();
        Ok(())
    }
}

async fn check(ops: Vec<Op>, has_base: bool) -> Result<(), TestCaseError> {
    let world = World::new(has_base).await;
    let mut disk = SimDisk::new();
    let mut volume = world.active(disk.clone()).await;
    let mut model = Model::new(world.content.clone());
    let mut number = 0;
    // What the points hold.
    let mut points: Vec<(ContentRoot, Vec<u8>)> = Vec::new();
    // The newest series, the newest cut in it, and what it holds unless a point took it.
    let (mut series, mut cut) = (0, None::<(u64, Option<Vec<u8>>)>);
    for op in ops {
        if matches!(op, Op::Kill | Op::PowerCut(_) | Op::Close) {
            cut = None;
        }
        match op {
            Op::Write { at, len, is_fua } => {
                let mut bytes = vec![0; len * SECTOR];
                number += 1;
                bytes.chunks_mut(SECTOR).for_each(|sector| stamp(sector, number));
                model.write(at * SECTOR, &bytes);
                volume.write((at * SECTOR) as u64, bytes.into(), is_fua).await.unwrap();
                if is_fua {
                    model.settle();
                }
            }
            Op::Splice { at, len } => {
                number += 1;
                let bytes = vec![number.to_le_bytes()[0] | 1; len];
                model.write(at, &bytes);
                volume.write(at as u64, bytes.into(), false).await.unwrap();
                // Not whole sectors: after a power cut a sector may be torn inside such a write. Settled, so that the
                // model stays one of whole sectors.
                volume.flush().await.unwrap();
                model.settle();
            }
            Op::Zero { at, len } => {
                model.write(at * SECTOR, &vec![0; len * SECTOR]);
                volume.write_zeroes((at * SECTOR) as u64, (len * SECTOR) as u64, false).await.unwrap();
            }
            Op::Discard { at, len } => {
                let (start, end) = (at * SECTOR, (at + len) * SECTOR);
                volume.discard(start as u64, (end - start) as u64, false).await.unwrap();
                // What a discard leaves is the volume's choice: either all zeros or as it was, sector by sector.
                let read = volume.read(start as u64, end - start).await.unwrap();
                for (index, sector) in read.chunks(SECTOR).enumerate() {
                    let at = start + index * SECTOR;
                    prop_assert!(sector == &model.now[at..at + SECTOR] || crate::is_zero(sector));
                    model.write(at, sector);
                }
            }
            Op::Flush => {
                volume.flush().await.unwrap();
                model.settle();
            }
            Op::Kill => {
                disk = disk.after_kill();
                volume = world.active(disk.clone()).await;
                // Recovery makes all of it durable.
                model.settle();
            }
            Op::PowerCut(seed) => {
                disk = disk.after_power_cut(&mut rand::rngs::SmallRng::seed_from_u64(seed));
                volume = world.active(disk.clone()).await;
                model.judge(read_all(&volume).await)?;
            }
            Op::Close => {
                volume.close().await.unwrap();
                prop_assert!(volume.write(0, Bytes::from_static(b"x"), false).await.is_err());
                disk = disk.after_power_cut(&mut rand::rngs::SmallRng::seed_from_u64(1));
                volume = world.active(disk.clone()).await;
                model.settle();
            }
            Op::Publish => {
                let store: Arc<dyn ObjectStore> = world.store.clone();
                let published = volume.publish(&store, &CancellationToken::new(), |_| {}).await.unwrap();
                prop_assert!(contents(&world, published.root).await == model.now, "what was published differs");
            }
            Op::Point => {
                let store: Arc<dyn ObjectStore> = world.store.clone();
                let never = CancellationToken::new();
                let taken = volume.point(&store, &never, |_| {}).await.unwrap();
                points.push((taken.root, model.now.clone()));
                let again = volume.point(&store, &never, |_| {}).await.unwrap();
                prop_assert_eq!((again.root, again.stored_bytes), (taken.root, 0));
                // Blocks of zeros have no chunk; nothing else is read twice.
                prop_assert_eq!(again.sealed_blocks, 0);
            }
            Op::Cut { begins } => {
                if begins || cut.is_none() {
                    series += 1;
                    volume.begin_cuts(series).await.unwrap();
                    cut = Some((0, None));
                }
                let number = cut.take().map_or(1, |(number, _)| number + 1);
                volume.cut(number).await.unwrap();
                prop_assert!(volume.cut(number).await.is_err());
                // Asked again, it is the same series.
                volume.begin_cuts(series).await.unwrap();
                cut = Some((number, Some(model.now.clone())));
            }
            Op::PointOfCut => {
                let store: Arc<dyn ObjectStore> = world.store.clone();
                let number = cut.as_ref().map_or(1, |(number, _)| *number);
                let of = |series, number| CutOf { series, number };
                let never = CancellationToken::new();
                for other in
                    [of(series, number + 1), of(series + 1, number), of(0, number), of(series, number.wrapping_sub(1))]
                {
                    let taken = volume.point_of_cut(other, &store, &never, |_| ()).await;
                    prop_assert!(taken.is_err(), "another cut than was made");
                }
                let taken = volume.point_of_cut(of(series, number), &store, &never, |_| {}).await;
                match cut.as_mut().and_then(|(_, content)| content.take()) {
                    Some(content) => points.push((taken.unwrap().root, content)),
                    None => prop_assert!(taken.is_err(), "nothing was cut, or it was taken"),
                }
            }
            Op::Thin(seed) => {
                let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
                points.retain(|_| rng.random_bool(0.5));
                sweep_but(&world, points.iter().map(|(root, _)| *root)).await;
            }
        }
        prop_assert!(read_all(&volume).await == model.now, "what is read differs");
        for (index, (root, content)) in points.iter().enumerate() {
            prop_assert!(contents(&world, *root).await == *content, "point {index} differs from what was there then");
        }
    }
    Ok(())
}

/// Takes all chunks from the store but those of the base and of these.
async fn sweep_but(world: &World, roots: impl Iterator<Item = ContentRoot>) {
    let reader = ChunkReader::of_store(world.keys.clone(), world.store.clone());
    let mut live = BTreeSet::new();
    for root in roots.chain(world.base) {
        let manifest = Manifest::load(&reader, root).await.unwrap();
        let parts = manifest.seal(&world.keys).unwrap().1.into_iter().map(|(name, _)| name);
        live.extend(parts.chain(manifest.chunks().map(|(_, name)| name)));
    }
    world.store.objects.lock().unwrap().retain(|key, _| key.chunk_name().is_none_or(|name| live.contains(&name)));
}

/// What a manifest holds.
pub(super) async fn contents(world: &World, root: crate::key::ContentRoot) -> Vec<u8> {
    let reader = ChunkReader::of_store(world.keys.clone(), world.store.clone());
    let manifest = Manifest::load(&reader, root).await.unwrap();
    let mut out = vec![0; SIZE.next_multiple_of(crate::BLOCK_BYTES)];
    for (block, name) in manifest.chunks() {
        let plain = reader.read(ChunkKind::Data, name).await.unwrap();
        let at = block as usize * crate::BLOCK_BYTES;
        out[at..at + plain.len()].copy_from_slice(&plain);
    }
    assert!(crate::is_zero(&out[SIZE..]));
    out.truncate(SIZE);
    out
}

pub(super) fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn a_volume_is_a_vector_of_bytes_through_kills_and_power_cuts(
        ops in proptest::collection::vec(op(), 1..40),
        has_base in any::<bool>(),
    ) {
        block_on(check(ops, has_base))?;
    }
}

/// Several writers, each with its own sectors, flushing now and then; the power goes at a random moment. What a writer
/// had flushed is there, or something newer of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn power_cuts_under_concurrent_writers_lose_nothing_flushed() {
    const WRITERS: usize = 6;
    for seed in 0..40u64 {
        let world = World::new(seed % 2 == 0).await;
        let disk = SimDisk::new();
        let volume = world.active(disk.clone()).await;
        let flushed: Arc<Vec<std::sync::atomic::AtomicU64>> =
            Arc::new(std::iter::repeat_with(Default::default).take(SECTORS).collect());
        let mut writers = tokio::task::JoinSet::new();
        for writer in 0..WRITERS {
            let (volume, flushed) = (volume.clone(), flushed.clone());
            writers.spawn(async move {
                let mut rng = rand::rngs::SmallRng::seed_from_u64(seed * 100 + writer as u64);
                let mut written = std::collections::HashMap::new();
                for number in 1u64.. {
                    // Interleaved: neighbours in a block belong to different writers.
                    let sector = rng.random_range(0..SECTORS / WRITERS) * WRITERS + writer;
                    let mut bytes = vec![0; SECTOR];
                    stamp(&mut bytes, number);
                    volume.write((sector * SECTOR) as u64, bytes.into(), false).await.unwrap();
                    written.insert(sector, number);
                    if rng.random_bool(0.1) {
                        volume.flush().await.unwrap();
                        for (sector, number) in written.drain() {
                            flushed[sector].store(number, std::sync::atomic::Ordering::SeqCst);
                        }
                    }
                }
            });
        }
        let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
        tokio::time::sleep(std::time::Duration::from_micros(rng.random_range(500..20_000))).await;
        // Known to be flushed before the cut.
        let known: Vec<u64> = flushed.iter().map(|f| f.load(std::sync::atomic::Ordering::SeqCst)).collect();
        let after = disk.after_power_cut(&mut rng);
        writers.shutdown().await;
        let volume = world.active(after).await;
        let read = read_all(&volume).await;
        for (sector, content) in read.chunks(SECTOR).enumerate() {
            let found = stamp_of(content);
            let base = stamp_of(&world.content[sector * SECTOR..(sector + 1) * SECTOR]);
            let is_right = if known[sector] == 0 && found == base {
                true
            } else {
                found.is_some_and(|found| found < 1_000_000 && found >= known[sector])
            };
            assert!(is_right, "seed {seed}: sector {sector} holds {found:?}, {} was flushed", known[sector]);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_flushes_share_few_syncs() {
    let world = World::new(false).await;
    let disk = SimDisk::new();
    let volume = world.active(disk.clone()).await;
    let before = disk.syncs.load(std::sync::atomic::Ordering::SeqCst);
    let mut tasks = tokio::task::JoinSet::new();
    for i in 0..200u64 {
        let volume = volume.clone();
        tasks.spawn(async move { volume.write((i % 50) * 512, vec![1; 512].into(), true).await.unwrap() });
    }
    tasks.join_all().await;
    let syncs = disk.syncs.load(std::sync::atomic::Ordering::SeqCst) - before;
    assert!(syncs < 200, "{syncs} syncs for 200 flushes");
}

#[tokio::test]
async fn after_a_failed_sync_nothing_is_acknowledged_any_more() {
    let world = World::new(false).await;
    let disk = SimDisk::new();
    let volume = world.active(disk.clone()).await;
    volume.write(0, vec![1; 512].into(), false).await.unwrap();
    disk.is_broken.store(true, std::sync::atomic::Ordering::SeqCst);
    assert!(volume.flush().await.is_err());
    disk.is_broken.store(false, std::sync::atomic::Ordering::SeqCst);
    assert!(volume.flush().await.is_err(), "a sync that works again says nothing of what was lost before");
    assert!(volume.write(0, vec![1; 512].into(), false).await.is_err());
    assert!(volume.alarm().is_some());
    assert!(volume.seal(supercloud_ids::Epoch(1)).await.is_err());
}

#[tokio::test]
async fn a_journal_of_another_volume_or_a_damaged_one_is_refused() {
    let world = World::new(false).await;
    let disk = SimDisk::new();
    let volume = world.active(disk.clone()).await;
    for i in 0..50u64 {
        volume.write(i * 4096, vec![1; 4096].into(), true).await.unwrap();
    }
    drop(volume);
    let mut params = world.params(Role::Standby);
    params.size_bytes += 512;
    assert!(Volume::open(disk.after_kill(), params).await.is_err());

    let size = disk.open("map.journal", false).unwrap().unwrap().size().unwrap();
    let mut refused = 0;
    // A flipped bit anywhere: refused, or in the slack of a batch, or taken for a torn tail when it is in the last.
    let want = read_all(&world.active(disk.after_kill()).await).await;
    for at in (0..size).step_by(37) {
        let copy = disk.after_kill();
        let file = copy.open("map.journal", false).unwrap().unwrap();
        let mut byte = [0];
        file.read_at(&mut byte, at).unwrap();
        file.write_at(&[byte[0] ^ 16], at).unwrap();
        match world.open(copy, Role::Standby).await {
            Err(_) => refused += 1,
            Ok(volume) => assert!(at >= size - 1024 || read_all(&volume).await == want, "byte {at}"),
        }
    }
    assert!(refused > 10, "{refused} of {} were refused", size / 37);
}

#[tokio::test]
async fn mutated_journals_and_hot_logs_never_panic() {
    let seed = 0x5eed_0007;
    println!("seed {seed:#x}");
    let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
    let world = World::new(false).await;
    let disk = SimDisk::new();
    let volume = world.active(disk.clone()).await;
    for i in 0..20u64 {
        volume.write(i * 4096, vec![1; 4096].into(), i % 4 == 0).await.unwrap();
    }
    for _ in 0..300 {
        let copy = disk.after_kill();
        for name in ["map.journal", "hot.0", "hot.1"] {
            let file = copy.open(name, true).unwrap().unwrap();
            let size = file.size().unwrap();
            for _ in 0..rng.random_range(0..3) {
                let bytes: [u8; 4] = rng.random();
                file.write_at(&bytes, rng.random_range(0..size.max(1))).unwrap();
            }
            if rng.random_bool(0.1) {
                file.set_len(rng.random_range(0..=size)).unwrap();
            }
        }
        if let Ok(volume) = world.open(copy, Role::Standby).await
            && volume.role().is_active()
        {
            read_all(&volume).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_published_volume_is_of_one_moment() {
    let world = World::new(true).await;
    let volume = world.active(SimDisk::new()).await;
    let write = |sector: usize, number| {
        let mut bytes = vec![0; SECTOR];
        stamp(&mut bytes, number);
        let volume = volume.clone();
        async move { volume.write((sector * SECTOR) as u64, bytes.into(), false).await.unwrap() }
    };
    for sector in (0..SECTORS).step_by(64).chain([SECTORS - 1]) {
        write(sector, 1).await;
    }
    // Every number goes into the first block, then into the last: at any moment the first is as new, or one newer.
    let writer = {
        let volume = volume.clone();
        tokio::spawn(async move {
            for round in 2u64.. {
                for sector in [0, SECTORS - 1] {
                    let mut bytes = vec![0; SECTOR];
                    stamp(&mut bytes, round);
                    volume.write((sector * SECTOR) as u64, bytes.into(), false).await.unwrap();
                }
            }
        })
    };
    let store: Arc<dyn ObjectStore> = world.store.clone();
    let mut last = 0;
    for _ in 0..40 {
        let published = volume.publish(&store, &CancellationToken::new(), |_| {}).await.unwrap();
        let content = contents(&world, published.root).await;
        let first = stamp_of(&content[..SECTOR]).unwrap();
        let second = stamp_of(&content[(SECTORS - 1) * SECTOR..]).unwrap();
        assert!(first == second || first == second + 1, "not of one moment: {first} and {second}");
        assert!(first >= last);
        last = first;
    }
    assert!(last > 1, "nothing was written meanwhile");
    writer.abort();
    let _ = writer.await;
}
