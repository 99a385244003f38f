//! A volume moves from one host to another, over streams in memory.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _};
use supercloud_ids::Epoch;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{SECTOR, SIZE, World, read_all, stamp, stamp_of, until};
use crate::{
    BLOCK_BYTES,
    key::ChunkName,
    peer::{Dial, DialFuture, Hello, PeerClient, Stream, serve_peer},
    process::control::{AlarmCode, PreCopyStatus},
    volume::{
        Ahead, BlockSource, FetchError, FetchFuture, FetchLimit, Fetched, MapPage, Priority, Volume, VolumeError,
        role::Role, sim::SimDisk,
    },
};

/// A way to a volume; every dial makes a new server. Can be cut.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) source: Mutex<Volume>,
    is_cut: AtomicBool,
    open: Mutex<CancellationToken>,
    dials: AtomicU64,
}

impl Link {
    pub(super) fn to(source: &Volume) -> Arc<Self> {
        Arc::new(Self {
            source: Mutex::new(source.clone()),
            is_cut: AtomicBool::new(false),
            open: Mutex::default(),
            dials: AtomicU64::new(0),
        })
    }

    pub(super) fn cut(&self) {
        self.is_cut.store(true, Ordering::SeqCst);
        self.open.lock().unwrap().cancel();
    }

    pub(super) fn heal(&self) {
        *self.open.lock().unwrap() = CancellationToken::new();
        self.is_cut.store(false, Ordering::SeqCst);
    }
}

impl Dial for Link {
    fn dial(&self) -> DialFuture<'_> {
        Box::pin(async move {
            if self.is_cut.load(Ordering::SeqCst) {
                return Err(std::io::ErrorKind::ConnectionRefused.into());
            }
            self.dials.fetch_add(1, Ordering::SeqCst);
            let (ours, theirs) = tokio::io::duplex(300_000);
            let (source, cancel) = (self.source.lock().unwrap().clone(), self.open.lock().unwrap().clone());
            tokio::spawn(async move { serve_peer(source, theirs, &cancel).await });
            Ok(Box::new(ours) as Box<dyn Stream>)
        })
    }
}

pub(super) fn client(world: &World, link: &Arc<Link>) -> Arc<PeerClient> {
    let hello =
        Hello { volume: world.volume, project: world.keys.project(), size_bytes: SIZE as u64, base: world.base };
    Arc::new(PeerClient::new(link.clone(), hello))
}

pub(super) async fn standby(world: &World, link: &Arc<Link>) -> (Arc<SimDisk>, Volume) {
    let disk = SimDisk::new();
    let volume = world.open(disk.clone(), Role::Standby).await.unwrap();
    volume.set_source(Some(client(world, link)));
    (disk, volume)
}

pub(super) async fn write_stamp(volume: &Volume, sector: usize, number: u64) {
    let mut bytes = vec![0; SECTOR];
    stamp(&mut bytes, number);
    volume.write((sector * SECTOR) as u64, bytes.into(), false).await.unwrap();
}

const SECTORS: usize = SIZE / SECTOR;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_volume_moves_under_a_writer_and_nothing_is_lost_or_old() {
    for seed in 0..15u64 {
        let world = World::new(seed % 3 != 0).await;
        let source = world.active(SimDisk::new()).await;
        let link = Link::to(&source);
        let (disk, target) = standby(&world, &link).await;
        // The guest: one writer with a queue depth of one, which goes on at the destination after the switch.
        let expected = Arc::new(Mutex::new(world.content.clone()));
        let (stop, stopped) = watch::channel(false);
        let writer = {
            let (source, expected, stopped) = (source.clone(), expected.clone(), stopped.clone());
            tokio::spawn(async move {
                let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
                for number in 1u64.. {
                    if *stopped.borrow() {
                        return;
                    }
                    let sector = rng.random_range(0..SECTORS);
                    write_stamp(&source, sector, number).await;
                    stamp(&mut expected.lock().unwrap()[sector * SECTOR..(sector + 1) * SECTOR], number);
                    if number % 50 == 0 {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
            })
        };
        let is_hot = seed % 2 == 0;
        if is_hot {
            let (limit, status) = (FetchLimit::default(), watch::Sender::new(PreCopyStatus::default()));
            let ahead = if seed % 4 == 0 { Ahead::Predicted } else { Ahead::All };
            let copy = target.pre_copy(&limit, &status, ahead);
            let mut passes = status.subscribe();
            tokio::select! {
                copied = copy => panic!("the pre-copy ended: {copied:?}"),
                _ = passes.wait_for(|status| status.passes >= 3) => {}
            }
        } else {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // The guest is paused, then the switch.
        stop.send_replace(true);
        writer.await.unwrap();
        let sealed = source.seal(Epoch(1)).await.unwrap();
        target.adopt(sealed).await.unwrap();
        let (before, _) = target.pulled_bytes();
        assert_eq!(before > 0, is_hot);
        target.activate(Epoch(2)).await.unwrap();
        let expected = expected.lock().unwrap().clone();

        // Half of the seeds: everything is read before the fetch; the others fetch first, with the link cut once.
        if seed % 4 < 2 {
            assert!(read_all(&target).await == expected, "seed {seed}: read on demand differs");
        }
        let fetch = {
            let target = target.clone();
            tokio::spawn(async move { target.fetch_all(&FetchLimit::default()).await })
        };
        link.cut();
        tokio::time::sleep(Duration::from_millis(2)).await;
        link.heal();
        until("the fetch", || target.missing() == 0).await;
        let fetched = fetch.await.unwrap();
        assert!(matches!(fetched, Ok(()) | Err(VolumeError::Source(_))), "{fetched:?}");
        target.fetch_all(&FetchLimit::default()).await.unwrap();
        assert!(source.is_released());
        // Nothing missing is a durable fact: the power may go, and the source is gone.
        link.cut();
        let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
        let after = world.open(disk.after_power_cut(&mut rng), Role::Standby).await.unwrap();
        assert_eq!((after.role(), after.missing()), (Role::Active { epoch: Epoch(2) }, 0));
        assert!(read_all(&after).await == expected, "seed {seed}: after the move and a power cut it differs");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_destination_that_dies_at_any_moment_still_finds_the_newest() {
    let world = World::new(true).await;
    for seed in 0..30u64 {
        let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
        let source = world.active(SimDisk::new()).await;
        let mut expected = world.content.clone();
        for number in 1..200 {
            let sector = rng.random_range(0..SECTORS);
            write_stamp(&source, sector, number).await;
            stamp(&mut expected[sector * SECTOR..(sector + 1) * SECTOR], number);
        }
        let link = Link::to(&source);
        let (mut disk, mut target) = standby(&world, &link).await;
        let sealed = source.seal(Epoch(1)).await.unwrap();
        let mut is_active = false;
        for _ in 0..4 {
            // A part of the way, then it dies in one way or the other.
            let steps = async {
                if !is_active {
                    target.adopt(sealed).await.unwrap();
                    target.activate(Epoch(2)).await.unwrap();
                }
                is_active = true;
                for _ in 0..rng.random_range(0..40) {
                    let sector = rng.random_range(0..SECTORS);
                    let read = target.read((sector * SECTOR) as u64, SECTOR).await.unwrap();
                    assert_eq!(stamp_of(&read), stamp_of(&expected[sector * SECTOR..(sector + 1) * SECTOR]));
                }
            };
            steps.await;
            let is_power_cut = rng.random_bool(0.5);
            disk = if is_power_cut { disk.after_power_cut(&mut rng) } else { disk.after_kill() };
            target = world.open(disk.clone(), Role::Standby).await.unwrap();
            target.set_source(Some(client(&world, &link)));
            assert_eq!(target.role(), Role::Active { epoch: Epoch(2) });
            assert!(read_all(&target).await == expected, "seed {seed}");
        }
        target.fetch_all(&FetchLimit::default()).await.unwrap();
        link.cut();
        assert!(read_all(&target).await == expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn copies_that_were_not_durable_at_the_switch_are_pulled_again_after_a_power_cut() {
    let world = World::new(true).await;
    for seed in 0..20u64 {
        let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
        let source = world.active(SimDisk::new()).await;
        for block in 0..SIZE / BLOCK_BYTES {
            write_stamp(&source, block * BLOCK_BYTES / SECTOR, 10 + block as u64).await;
        }
        let link = Link::to(&source);
        let (disk, target) = standby(&world, &link).await;
        // Dropped in the middle of a pass, before its flush: 10 ms per block.
        let (limit, status) = (FetchLimit::default(), watch::Sender::new(PreCopyStatus::default()));
        limit.set(Some(100 * BLOCK_BYTES as u64));
        tokio::select! {
            copied = target.pre_copy(&limit, &status, Ahead::All) => panic!("{copied:?}"),
            () = until("some blocks", || target.pulled_bytes().0 > 0) => {}
        }
        target.adopt(source.seal(Epoch(1)).await.unwrap()).await.unwrap();
        target.activate(Epoch(2)).await.unwrap();
        let expected = world_with_stamps(&world);
        assert_eq!(target.missing(), 6, "a copy that is not synced counts as missing");
        let cut = disk.after_power_cut(&mut rng);
        let after = world.open(cut, Role::Standby).await.unwrap();
        after.set_source(Some(client(&world, &link)));
        assert!(read_all(&after).await == expected, "seed {seed}");
        // Without a power cut the copy is used.
        let pulled = target.pulled_bytes().1;
        assert!(read_all(&target).await == expected, "seed {seed}");
        assert!(target.pulled_bytes().1 - pulled < 6 * BLOCK_BYTES as u64);
    }
}

/// The base with the stamps of the first sectors of all blocks.
fn world_with_stamps(world: &World) -> Vec<u8> {
    let mut expected = world.content.clone();
    for block in 0..SIZE / BLOCK_BYTES {
        let at = block * BLOCK_BYTES;
        stamp(&mut expected[at..at + SECTOR], 10 + block as u64);
    }
    expected
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_map_that_was_learnt_ahead_is_not_asked_for_again() {
    for writes_after in [false, true] {
        let world = World::new(true).await;
        let source = world.active(SimDisk::new()).await;
        write_stamp(&source, 5, 7).await;
        let link = Link::to(&source);
        let (_, target) = standby(&world, &link).await;
        target.learn_map().await.unwrap();
        if writes_after {
            write_stamp(&source, 5, 8).await;
        }
        let sealed = source.seal(Epoch(1)).await.unwrap();
        link.cut();
        let adopted = target.adopt(sealed).await;
        if writes_after {
            assert!(matches!(adopted, Err(VolumeError::Source(_))), "{adopted:?}");
            link.heal();
            target.adopt(sealed).await.unwrap();
        } else {
            adopted.unwrap();
            link.heal();
        }
        target.activate(Epoch(2)).await.unwrap();
        assert!(read_all(&target).await == read_all(&source_content(&source).await).await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn zeros_over_a_stale_copy_are_zeros() {
    let world = World::new(true).await;
    let source = world.active(SimDisk::new()).await;
    for block in [0u64, 1, 2] {
        source.write(block * BLOCK_BYTES as u64, vec![7; BLOCK_BYTES].into(), false).await.unwrap();
    }
    let link = Link::to(&source);
    let (disk, target) = standby(&world, &link).await;
    let (limit, status) = (FetchLimit::default(), watch::Sender::new(PreCopyStatus::default()));
    let mut passes = status.subscribe();
    tokio::select! {
        copied = target.pre_copy(&limit, &status, Ahead::All) => panic!("{copied:?}"),
        _ = passes.wait_for(|status| status.passes >= 1) => {}
    }
    // One becomes zeros at the source, one is written again there and zeroed at the destination.
    source.write_zeroes(0, BLOCK_BYTES as u64, false).await.unwrap();
    write_stamp(&source, BLOCK_BYTES / SECTOR, 3).await;
    target.adopt(source.seal(Epoch(1)).await.unwrap()).await.unwrap();
    target.activate(Epoch(2)).await.unwrap();
    target.write_zeroes(BLOCK_BYTES as u64, BLOCK_BYTES as u64, false).await.unwrap();
    for block in [0, 1] {
        write_stamp(&target, block * BLOCK_BYTES / SECTOR + 9, 4).await;
    }
    let mut expected = read_all(&source_content(&source).await).await;
    expected[..2 * BLOCK_BYTES].fill(0);
    for block in [0, 1] {
        let at = block * BLOCK_BYTES + 9 * SECTOR;
        stamp(&mut expected[at..at + SECTOR], 4);
    }
    assert!(read_all(&target).await == expected);
    let after = world.open(disk.after_kill(), Role::Standby).await.unwrap();
    assert!(read_all(&after).await == expected);
}

/// The source, readable again.
async fn source_content(source: &Volume) -> Volume {
    source.unseal(Epoch(1)).await.unwrap();
    source.clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_overwrite_while_the_block_is_under_way_wins() {
    let world = World::new(true).await;
    for seed in 0..30u64 {
        let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
        let source = world.active(SimDisk::new()).await;
        for block in 0..6 {
            write_stamp(&source, block * BLOCK_BYTES / SECTOR, 10 + block as u64).await;
        }
        let link = Link::to(&source);
        let (_, target) = standby(&world, &link).await;
        target.adopt(source.seal(Epoch(1)).await.unwrap()).await.unwrap();
        target.activate(Epoch(2)).await.unwrap();
        let fetch = {
            let target = target.clone();
            tokio::spawn(async move { target.fetch_all(&FetchLimit::default()).await })
        };
        for block in 0..6u64 {
            tokio::time::sleep(Duration::from_micros(rng.random_range(0..300))).await;
            target.write(block * BLOCK_BYTES as u64, vec![9; BLOCK_BYTES].into(), false).await.unwrap();
        }
        fetch.await.unwrap().unwrap();
        assert!(read_all(&target).await[..6 * BLOCK_BYTES].iter().all(|b| *b == 9), "seed {seed}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn blocks_copied_ahead_before_a_power_cut_of_the_source_are_not_trusted() {
    let world = World::new(false).await;
    for seed in 0..20u64 {
        let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
        let disk = SimDisk::new();
        let source = world.active(disk.clone()).await;
        write_stamp(&source, 0, 1).await;
        source.flush().await.unwrap();
        // Unflushed, but copied ahead by the destination.
        write_stamp(&source, 0, 2).await;
        write_stamp(&source, SECTORS - 1, 3).await;
        let link = Link::to(&source);
        let (_, target) = standby(&world, &link).await;
        let (limit, status) = (FetchLimit::default(), watch::Sender::new(PreCopyStatus::default()));
        let mut passes = status.subscribe();
        tokio::select! {
            copied = target.pre_copy(&limit, &status, Ahead::All) => panic!("{copied:?}"),
            _ = passes.wait_for(|status| status.passes >= 1) => {}
        }
        // The source's host loses its power; what the guest finds there now is the truth.
        let source = world.open(disk.after_power_cut(&mut rng), Role::Standby).await.unwrap();
        let truth = read_all(&source).await;
        *link.source.lock().unwrap() = source.clone();
        link.cut();
        link.heal();
        if seed % 2 == 0 {
            // And goes on to give out versions, as it did before.
            write_stamp(&source, 5, 9).await;
        }
        let truth = if seed % 2 == 0 { read_all(&source).await } else { truth };
        let sealed = source.seal(Epoch(1)).await.unwrap();
        // The connection of before is gone; a request on it may fail once.
        while let Err(error) = target.adopt(sealed).await {
            assert!(matches!(error, VolumeError::Source(_)), "{error:?}");
        }
        target.activate(Epoch(2)).await.unwrap();
        assert!(read_all(&target).await == truth, "seed {seed}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_source_out_of_reach_stalls_reads_with_an_alarm_and_whole_overwrites_go_on() {
    let world = World::new(true).await;
    let source = world.active(SimDisk::new()).await;
    write_stamp(&source, 0, 7).await;
    write_stamp(&source, BLOCK_BYTES / SECTOR, 8).await;
    let link = Link::to(&source);
    let (_, target) = standby(&world, &link).await;
    target.adopt(source.seal(Epoch(1)).await.unwrap()).await.unwrap();
    target.activate(Epoch(2)).await.unwrap();
    assert_eq!(target.missing(), 2);
    link.cut();
    let reading = {
        let target = target.clone();
        tokio::spawn(async move { target.read(0, SECTOR).await.unwrap() })
    };
    // A part of a block has to wait, too; its write is not lost by the waiting.
    let writing = {
        let target = target.clone();
        tokio::spawn(async move { write_stamp(&target, 1, 99).await })
    };
    until("the alarm", || target.alarm().is_some_and(|alarm| alarm.code == AlarmCode::SourceUnreachable)).await;
    target.write(BLOCK_BYTES as u64, vec![5; BLOCK_BYTES].into(), true).await.unwrap();
    assert_eq!(target.missing(), 1);
    // A block of the base is not concerned.
    assert!(target.read(3 * BLOCK_BYTES as u64, SECTOR).await.is_ok());
    assert!(!reading.is_finished() && !writing.is_finished());
    link.heal();
    assert_eq!(stamp_of(&reading.await.unwrap()), Some(7));
    writing.await.unwrap();
    assert_eq!(stamp_of(&target.read(SECTOR as u64, SECTOR).await.unwrap()), Some(99));
    assert_eq!(target.alarm(), None);
    let (before, after) = target.pulled_bytes();
    assert_eq!((before, after), (0, BLOCK_BYTES as u64), "the block that was overwritten was pulled");
}

/// A source that lies in one way.
#[derive(Debug)]
struct Liar {
    honest: Arc<PeerClient>,
    lie: Lie,
    is_lying: AtomicBool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Lie {
    Content,
    Newer,
    Zeros,
    MapVersion,
    MapDigest,
    MapLess,
}

impl BlockSource for Liar {
    fn map_page(&self, from: u32, since: u64) -> FetchFuture<'_, MapPage> {
        Box::pin(async move {
            let mut page = self.honest.map_page(from, since).await?;
            match (self.is_lying.load(Ordering::SeqCst), self.lie) {
                (true, Lie::MapVersion) => page.entries[0].version += 1,
                (true, Lie::MapDigest) => page.entries[0].digest = Some(ChunkName([1; 32])),
                (true, Lie::MapLess) => drop(page.entries.pop()),
                _ => {}
            }
            Ok(page)
        })
    }

    fn block(&self, block: u32, version: u64, priority: Priority) -> FetchFuture<'_, Fetched> {
        Box::pin(async move {
            let mut fetched = self.honest.block(block, version, priority).await?;
            match (self.is_lying.load(Ordering::SeqCst), self.lie) {
                (true, Lie::Content) => {
                    let mut data = fetched.data.unwrap().to_vec();
                    data[100] ^= 1;
                    fetched.data = Some(data.into());
                }
                (true, Lie::Newer) => fetched.version += 1,
                (true, Lie::Zeros) => fetched.data = None,
                _ => {}
            }
            Ok(fetched)
        })
    }

    fn released(&self) -> FetchFuture<'_, ()> {
        Box::pin(async { Err(FetchError::Refused("no".into())) })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_lying_source_is_never_believed() {
    for lie in [Lie::Content, Lie::Newer, Lie::Zeros, Lie::MapVersion, Lie::MapDigest, Lie::MapLess] {
        let world = World::new(true).await;
        let source = world.active(SimDisk::new()).await;
        write_stamp(&source, 0, 7).await;
        let link = Link::to(&source);
        let disk = SimDisk::new();
        let target = world.open(disk, Role::Standby).await.unwrap();
        let honest = client(&world, &link);
        let liar = Arc::new(Liar { honest, lie, is_lying: AtomicBool::new(true) });
        target.set_source(Some(liar.clone()));
        let sealed = source.seal(Epoch(1)).await.unwrap();
        let adopted = target.adopt(sealed).await;
        if matches!(lie, Lie::MapVersion | Lie::MapDigest | Lie::MapLess) {
            assert!(matches!(adopted, Err(VolumeError::Map { .. })), "{lie:?}: {adopted:?}");
            assert_eq!(target.role(), Role::Standby);
            liar.is_lying.store(false, Ordering::SeqCst);
            target.adopt(sealed).await.unwrap();
            continue;
        }
        adopted.unwrap();
        target.activate(Epoch(2)).await.unwrap();
        let reading = {
            let target = target.clone();
            tokio::spawn(async move { target.read(0, SECTOR).await.unwrap() })
        };
        until("the alarm", || target.alarm().is_some()).await;
        assert!(!reading.is_finished(), "{lie:?}");
        liar.is_lying.store(false, Ordering::SeqCst);
        assert_eq!(stamp_of(&reading.await.unwrap()), Some(7));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_volume_moves_on_before_everything_has_arrived() {
    let world = World::new(true).await;
    let first = world.active(SimDisk::new()).await;
    for block in 0..SIZE / BLOCK_BYTES {
        write_stamp(&first, block * BLOCK_BYTES / SECTOR, 10 + block as u64).await;
    }
    let expected = read_all(&first).await;
    let link = Link::to(&first);
    let (_, second) = standby(&world, &link).await;
    second.adopt(first.seal(Epoch(1)).await.unwrap()).await.unwrap();
    second.activate(Epoch(2)).await.unwrap();
    let next_link = Link::to(&second);
    let (_, third) = standby(&world, &next_link).await;
    third.adopt(second.seal(Epoch(2)).await.unwrap()).await.unwrap();
    third.activate(Epoch(3)).await.unwrap();
    assert!(read_all(&third).await == expected, "through two hosts it differs");
    third.fetch_all(&FetchLimit::default()).await.unwrap();
    assert!(second.is_released() && !first.is_released());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn peers_of_other_volumes_and_garbage_are_let_go() {
    let world = World::new(false).await;
    let source = world.active(SimDisk::new()).await;
    let link = Link::to(&source);
    let stranger = World { volume: supercloud_ids::VolumeId::generate(), ..world.clone() };
    let refused = client(&stranger, &link).map_page(0, 0).await;
    assert!(matches!(refused, Err(FetchError::Refused(_))), "{refused:?}");

    let seed = 0x5eed_0008;
    println!("seed {seed:#x}");
    let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    for round in 0..200 {
        let (mut ours, theirs) = tokio::io::duplex(100_000);
        let (volume, cancel) = (source.clone(), CancellationToken::new());
        let server = tokio::spawn(async move { serve_peer(volume, theirs, &cancel).await });
        let mut wire = Vec::new();
        let hello = Hello { volume: world.volume, project: world.keys.project(), size_bytes: SIZE as u64, base: None };
        let messages = [
            crate::peer::Message::Hello(hello),
            crate::peer::Message::GetMap { request: 1, from: 0, since: 0 },
            crate::peer::Message::GetBlocks { request: 2, blocks: vec![(0, 1), (1 << 30, 1)] },
            crate::peer::Message::Released { request: 3 },
        ];
        for message in messages {
            crate::wire::write_frame(&mut wire, &message.encode()).await.unwrap();
        }
        if round > 0 {
            for _ in 0..rng.random_range(1..6) {
                let at = rng.random_range(0..wire.len());
                wire[at] = rng.random();
            }
        }
        // The server may hang up in the middle.
        let _ = ours.write_all(&wire).await;
        let _ = ours.shutdown().await;
        let mut answers = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(20), ours.read_to_end(&mut answers)).await.expect("it hangs");
        let _ = tokio::time::timeout(Duration::from_secs(20), server).await.expect("it hangs").unwrap();
    }
    // It still serves.
    assert!(client(&world, &link).map_page(0, 0).await.is_ok());
}
