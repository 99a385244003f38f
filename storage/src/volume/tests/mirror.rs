//! A volume that is mirrored: cuts at the source, staged and committed at a standby, over streams in memory.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use proptest::prelude::*;
use rand::{Rng as _, SeedableRng as _};
use supercloud_ids::Epoch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{
    SECTOR, SIZE, World,
    handover::{Link, client, standby, write_stamp},
    model::{block_on, contents},
    read_all, stamp, until,
};
use crate::{
    BLOCK_BYTES,
    backend::ObjectStore,
    key::{ChunkName, MapRoot},
    peer::PeerClient,
    process::control::{FollowStatus, PreCopyStatus},
    volume::{
        Ahead, BlockSource, CutInfo, FetchFuture, FetchLimit, Fetched, MapPage, Priority, Volume, VolumeError,
        role::Role, sim::SimDisk,
    },
};

const SECTORS: usize = SIZE / SECTOR;
const LAST: Epoch = Epoch(1);

/// Follows until it is ended.
struct Follower {
    disk: Arc<SimDisk>,
    volume: Volume,
    task: JoinHandle<()>,
}

impl Follower {
    async fn new(world: &World, link: &Arc<Link>) -> Self {
        let (disk, volume) = standby(world, link).await;
        Self::of(disk, volume).await
    }

    async fn of(disk: Arc<SimDisk>, volume: Volume) -> Self {
        volume.begin_follow().await.unwrap();
        let follower = volume.clone();
        let task = tokio::spawn(async move { follower.follow(&FetchLimit::default()).await.unwrap() });
        Self { disk, volume, task }
    }

    fn status(&self) -> FollowStatus {
        self.volume.follow_status().unwrap()
    }

    async fn staged(&self, number: u64) {
        until("a cut to be staged", || self.status().staged >= number).await;
        assert_eq!(self.status().staged, number);
    }

    async fn stop(&mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }

    /// The source is gone and fenced.
    async fn promote(&mut self) -> Result<(), VolumeError> {
        self.stop().await;
        self.volume.promote(LAST).await?;
        self.volume.activate(Epoch(2)).await
    }
}

#[derive(Debug, Clone)]
enum Op {
    Write { at: usize, len: usize },
    Zero { at: usize, len: usize },
    Discard { at: usize, len: usize },
    Flush,
    Publish,
    Cut,
    Staged,
    Commit,
    Link(bool),
}

fn range(most: usize) -> impl Strategy<Value = (usize, usize)> {
    (0..SECTORS, 1..=most).prop_map(|(at, len)| (at, len.min(SECTORS - at)))
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => range(3).prop_map(|(at, len)| Op::Write { at, len }),
        4 => range(300).prop_map(|(at, len)| Op::Write { at, len }),
        2 => range(300).prop_map(|(at, len)| Op::Zero { at, len }),
        2 => range(300).prop_map(|(at, len)| Op::Discard { at, len }),
        1 => Just(Op::Flush),
        1 => Just(Op::Publish),
        6 => Just(Op::Cut),
        4 => Just(Op::Staged),
        4 => Just(Op::Commit),
        1 => any::<bool>().prop_map(Op::Link),
    ]
}

/// Runs operations at a source; then it is gone, wherever the follower is. What is promoted is the committed cut.
async fn check(ops: Vec<Op>, has_base: bool, is_committing_late: bool, seed: u64) -> Result<(), TestCaseError> {
    let world = World::new(has_base).await;
    let source = world.active(SimDisk::new()).await;
    let link = Link::to(&source);
    let mut follower = Follower::new(&world, &link).await;
    let mut now = world.content.clone();
    let (mut cuts, mut newest, mut number, mut is_cut) = (HashMap::new(), 0u64, 0, false);
    for op in ops {
        match op {
            Op::Write { at, len } => {
                number += 1;
                let (start, end) = (at * SECTOR, (at + len) * SECTOR);
                now[start..end].chunks_mut(SECTOR).for_each(|sector| stamp(sector, number));
                source.write(start as u64, now[start..end].to_vec().into(), false).await.unwrap();
            }
            Op::Zero { at, len } => {
                let (start, end) = (at * SECTOR, (at + len) * SECTOR);
                now[start..end].fill(0);
                source.write_zeroes(start as u64, (end - start) as u64, false).await.unwrap();
            }
            Op::Discard { at, len } => {
                let (start, end) = (at * SECTOR, (at + len) * SECTOR);
                source.discard(start as u64, (end - start) as u64, false).await.unwrap();
                now[start..end].copy_from_slice(&source.read(start as u64, end - start).await.unwrap());
            }
            Op::Flush => source.flush().await.unwrap(),
            Op::Publish => {
                let store: Arc<dyn ObjectStore> = world.store.clone();
                let published = source.publish(&store, &CancellationToken::new(), |_| {}).await.unwrap();
                prop_assert!(contents(&world, published.root).await == now, "what was published differs");
            }
            Op::Cut => {
                newest += 1;
                source.cut(newest).await.unwrap();
                prop_assert!(source.cut(newest).await.is_err(), "a number is used twice");
                cuts.insert(newest, now.clone());
            }
            Op::Staged if !is_cut => follower.staged(newest).await,
            Op::Commit => {
                let staged = follower.status().staged;
                match follower.volume.commit_cut(staged).await {
                    Ok(()) => prop_assert_eq!(follower.status().committed, staged),
                    // The next one is being staged.
                    Err(VolumeError::Cut { .. }) => {}
                    Err(error) => panic!("{error:?}"),
                }
            }
            Op::Link(true) => {
                link.cut();
                is_cut = true;
            }
            Op::Link(false) => {
                link.heal();
                is_cut = false;
            }
            Op::Staged => {}
        }
    }
    prop_assert!(read_all(&source).await == now, "the source itself differs");
    // The source is gone, at any moment.
    link.cut();
    drop(source);
    if is_committing_late {
        let staged = follower.status().staged;
        let _ = follower.volume.commit_cut(staged).await;
    }
    let committed = follower.status().committed;
    let promoted = follower.promote().await;
    let Some(expected) = cuts.get(&committed) else {
        prop_assert!(matches!(promoted, Err(VolumeError::Following(_))), "{promoted:?} without a committed cut");
        return Ok(());
    };
    prop_assert!(promoted.is_ok(), "{promoted:?}");
    prop_assert_eq!(follower.volume.missing(), 0);
    prop_assert!(read_all(&follower.volume).await == *expected, "cut {} differs", committed);
    // It is durable, and a volume like any other.
    let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
    let disk = follower.disk.after_power_cut(&mut rng);
    let volume = world.open(disk, Role::Standby).await.unwrap();
    prop_assert_eq!(volume.role(), Role::Active { epoch: Epoch(2) });
    prop_assert!(read_all(&volume).await == *expected, "cut {} differs after a power cut", committed);
    write_stamp(&volume, 3, 5).await;
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn what_is_promoted_is_the_committed_cut_byte_for_byte(
        ops in proptest::collection::vec(op(), 1..50),
        has_base in any::<bool>(),
        is_committing_late in any::<bool>(),
        seed in any::<u64>(),
    ) {
        block_on(check(ops, has_base, is_committing_late, seed))?;
    }
}

/// The guest stands still for the instant of a cut only; it writes on, and a publish runs, while the cut is brought.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn cuts_under_a_writer_and_a_publish_are_of_their_instant() {
    for seed in 0..12u64 {
        let world = World::new(seed % 2 == 0).await;
        let source = world.active(SimDisk::new()).await;
        let link = Link::to(&source);
        let mut follower = Follower::new(&world, &link).await;
        let content = Arc::new(tokio::sync::Mutex::new(world.content.clone()));
        let writer = {
            let (source, content) = (source.clone(), content.clone());
            tokio::spawn(async move {
                let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
                for number in 1u64.. {
                    let mut content = content.lock().await;
                    let sector = rng.random_range(0..SECTORS);
                    write_stamp(&source, sector, number).await;
                    stamp(&mut content[sector * SECTOR..(sector + 1) * SECTOR], number);
                }
            })
        };
        let publisher = {
            let (source, store): (_, Arc<dyn ObjectStore>) = (source.clone(), world.store.clone());
            tokio::spawn(async move {
                loop {
                    source.publish(&store, &CancellationToken::new(), |_| {}).await.unwrap();
                }
            })
        };
        let mut expected = Vec::new();
        let rounds = 2 + seed % 5;
        for cut in 1..=rounds {
            {
                let content = content.lock().await;
                source.cut(cut).await.unwrap();
                expected = content.clone();
            }
            follower.staged(cut).await;
            if cut < rounds || seed % 2 == 0 {
                follower.volume.commit_cut(cut).await.unwrap();
                follower.volume.commit_cut(cut).await.unwrap();
            }
        }
        assert!(!publisher.is_finished(), "the publish failed");
        link.cut();
        writer.abort();
        publisher.abort();
        // Staged everywhere, as the agent found: committed late.
        follower.volume.commit_cut(rounds).await.unwrap();
        follower.promote().await.unwrap();
        assert!(read_all(&follower.volume).await == expected, "seed {seed}");
    }
}

/// All of the source's blocks are written and copied ahead.
async fn filled(world: &World) -> (Volume, Arc<Link>, Arc<SimDisk>, Volume) {
    let source = world.active(SimDisk::new()).await;
    source.write(0, vec![1; SIZE].into(), false).await.unwrap();
    let link = Link::to(&source);
    let (disk, target) = standby(world, &link).await;
    copy_ahead(&target).await;
    (source, link, disk, target)
}

async fn copy_ahead(target: &Volume) {
    let (limit, status) = (FetchLimit::default(), tokio::sync::watch::Sender::new(PreCopyStatus::default()));
    let mut passes = status.subscribe();
    tokio::select! {
        copied = target.pre_copy(&limit, &status, Ahead::All) => panic!("{copied:?}"),
        _ = passes.wait_for(|status| status.passes >= 1) => {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_was_copied_ahead_is_not_brought_again() {
    let world = World::new(true).await;
    let (source, link, disk, target) = filled(&world).await;
    write_stamp(&source, 0, 5).await;
    let follower = Follower::of(disk, target).await;
    source.cut(1).await.unwrap();
    follower.staged(1).await;
    assert!(follower.status().pulled_blocks <= 1, "{:?}", follower.status());
    follower.volume.commit_cut(1).await.unwrap();
    write_stamp(&source, SECTORS - 1, 6).await;
    source.cut(2).await.unwrap();
    follower.staged(2).await;
    assert!(follower.status().pulled_blocks <= 2, "{:?}", follower.status());
    assert_eq!(follower.status().trouble, None);
    drop(link);
}

/// A copy that is newer than the cut gives way to the cut's; when the process dies then, nobody takes the one for the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_copy_newer_than_the_first_cut_is_never_taken_for_the_cut_or_the_cut_for_it() {
    let world = World::new(false).await;
    for seed in 0..16u64 {
        let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
        let (source, link, disk, target) = filled(&world).await;
        source.cut(1).await.unwrap();
        let first = read_all(&source).await;
        for sector in [0, 200, 300] {
            write_stamp(&source, sector, 7).await;
        }
        source.write_zeroes(3 * BLOCK_BYTES as u64, BLOCK_BYTES as u64, false).await.unwrap();
        copy_ahead(&target).await;
        let mut follower = Follower::of(disk, target).await;
        follower.staged(1).await;
        follower.volume.commit_cut(1).await.unwrap();
        if seed < 4 {
            link.cut();
            follower.promote().await.unwrap();
            assert!(read_all(&follower.volume).await == first, "seed {seed}");
            continue;
        }
        // The standby's process, or its host, dies. What is there is copied ahead, and a move makes use of it.
        follower.stop().await;
        let is_power_cut = seed % 2 == 0;
        let disk = if is_power_cut { follower.disk.after_power_cut(&mut rng) } else { follower.disk.after_kill() };
        let again = world.open(disk, Role::Standby).await.unwrap();
        assert!(matches!(again.promote(LAST).await, Err(VolumeError::Following(_))), "promoted after a crash");
        again.set_source(Some(client(&world, &link)));
        let expected = read_all(&source).await;
        again.adopt(source.seal(Epoch(1)).await.unwrap()).await.unwrap();
        again.activate(Epoch(2)).await.unwrap();
        assert!(read_all(&again).await == expected, "seed {seed}: after a crash and a move it differs");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_guest_may_move_to_where_its_mirror_was() {
    let world = World::new(true).await;
    let (source, _link, disk, target) = filled(&world).await;
    let mut follower = Follower::of(disk, target).await;
    source.cut(1).await.unwrap();
    follower.staged(1).await;
    follower.volume.commit_cut(1).await.unwrap();
    write_stamp(&source, 9, 9).await;
    source.cut(2).await.unwrap();
    follower.staged(2).await;
    follower.stop().await;
    follower.volume.end_follow().await.unwrap();
    assert_eq!(follower.volume.follow_status(), None);
    assert!(matches!(follower.volume.promote(LAST).await, Err(VolumeError::Following(_))));
    source.end_cuts().await.unwrap();
    let expected = read_all(&source).await;
    follower.volume.adopt(source.seal(Epoch(1)).await.unwrap()).await.unwrap();
    follower.volume.activate(Epoch(2)).await.unwrap();
    assert!(follower.volume.missing() <= 7);
    assert!(read_all(&follower.volume).await == expected);
    assert!(follower.volume.pulled_bytes().1 <= BLOCK_BYTES as u64, "copies are not made use of");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_full_disk_at_the_standby_delays_a_cut_and_loses_none() {
    let world = World::new(true).await;
    let (source, link, disk, target) = filled(&world).await;
    let mut follower = Follower::of(disk.clone(), target).await;
    source.cut(1).await.unwrap();
    follower.staged(1).await;
    follower.volume.commit_cut(1).await.unwrap();
    // No room to stage.
    *disk.room.lock().unwrap() = Some(("stage", 2));
    source.write(0, vec![2; SIZE].into(), false).await.unwrap();
    source.cut(2).await.unwrap();
    until("the trouble to be told", || follower.status().trouble.is_some()).await;
    assert_eq!((follower.status().staged, follower.status().committed), (1, 1));
    *disk.room.lock().unwrap() = None;
    follower.staged(2).await;
    // No room to commit: half of it is done, and nothing but the rest can follow.
    *disk.room.lock().unwrap() = Some(("data", 3));
    let failed = follower.volume.commit_cut(2).await;
    assert!(matches!(failed, Err(VolumeError::Disk { .. })), "{failed:?}");
    assert_eq!(follower.status().committed, 1);
    link.cut();
    let early = follower.promote().await;
    assert!(matches!(early, Err(VolumeError::Disk { .. })), "{early:?}");
    *disk.room.lock().unwrap() = None;
    follower.volume.promote(LAST).await.unwrap();
    follower.volume.promote(LAST).await.unwrap();
    follower.volume.activate(Epoch(2)).await.unwrap();
    assert!(read_all(&follower.volume).await.iter().all(|byte| *byte == 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_full_disk_at_the_source_costs_the_cut_and_not_the_guest() {
    let world = World::new(true).await;
    let disk = SimDisk::new();
    let source = world.active(disk.clone()).await;
    source.write(0, vec![1; SIZE].into(), false).await.unwrap();
    source.cut(1).await.unwrap();
    *disk.room.lock().unwrap() = Some(("cut", 1));
    for sector in [0, 200, 300] {
        write_stamp(&source, sector, 7).await;
    }
    *disk.room.lock().unwrap() = None;
    let link = Link::to(&source);
    let follower = Follower::new(&world, &link).await;
    source.cut(2).await.unwrap();
    follower.staged(2).await;
    // A standby that stays away for many cuts gets the newest.
    link.cut();
    for cut in 3..20 {
        write_stamp(&source, cut as usize, cut).await;
        source.cut(cut).await.unwrap();
    }
    link.heal();
    follower.staged(19).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn only_an_active_volume_with_all_of_its_blocks_is_cut() {
    let world = World::new(true).await;
    let source = world.active(SimDisk::new()).await;
    write_stamp(&source, 0, 7).await;
    source.cut(5).await.unwrap();
    assert!(matches!(source.cut(5).await, Err(VolumeError::Cut { number: 5, .. })));
    assert!(matches!(source.cut(4).await, Err(VolumeError::Cut { number: 4, .. })));
    assert!(source.cut_page(4, 0, 0).await.is_err());
    assert!(source.cut_block(5, u32::MAX).await.is_err());
    source.end_cuts().await.unwrap();
    assert!(source.cut_page(5, 0, 0).await.is_err());
    source.cut(1).await.unwrap();
    let sealed = source.seal(Epoch(1)).await.unwrap();
    assert!(matches!(source.cut(2).await, Err(VolumeError::Role(_))));
    let link = Link::to(&source);
    let (_, target) = standby(&world, &link).await;
    assert!(matches!(target.cut(1).await, Err(VolumeError::Role(_))));
    assert!(matches!(target.commit_cut(1).await, Err(VolumeError::Following(_))));
    target.adopt(sealed).await.unwrap();
    target.activate(Epoch(2)).await.unwrap();
    assert!(matches!(target.cut(1).await, Err(VolumeError::Cut { .. })), "a block is still elsewhere");
    assert!(matches!(target.begin_follow().await, Err(VolumeError::Role(_))));
    target.read(0, SECTOR).await.unwrap();
    target.cut(1).await.unwrap();
}

/// What a source that lies changes in its answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lie {
    Root,
    Since,
    Number,
    Place,
    Version,
    Circle,
    Digest,
    Left,
    Content,
    Length,
    Zeros,
}

#[derive(Debug)]
struct Liar {
    truth: Arc<PeerClient>,
    lie: Mutex<Option<Lie>>,
}

impl Liar {
    fn tells(&self, lie: Lie) -> bool {
        *self.lie.lock().unwrap() == Some(lie)
    }
}

impl BlockSource for Liar {
    fn map_page(&self, from: u32, since: u64) -> FetchFuture<'_, MapPage> {
        self.truth.map_page(from, since)
    }

    fn block(&self, block: u32, version: u64, priority: Priority) -> FetchFuture<'_, Fetched> {
        self.truth.block(block, version, priority)
    }

    fn released(&self) -> FetchFuture<'_, ()> {
        self.truth.released()
    }

    fn await_cut(&self, after: u64, have: u64) -> FetchFuture<'_, Option<CutInfo>> {
        Box::pin(async move {
            let mut cut = self.truth.await_cut(after, have).await?;
            if let Some(cut) = &mut cut {
                match () {
                    () if self.tells(Lie::Root) => cut.root = MapRoot([1; 32]),
                    () if self.tells(Lie::Since) => cut.since = u64::MAX,
                    () if self.tells(Lie::Number) => cut.number = after,
                    () => {}
                }
            }
            Ok(cut)
        })
    }

    fn cut_page(&self, number: u64, from: u32, since: u64) -> FetchFuture<'_, MapPage> {
        Box::pin(async move {
            let mut page = self.truth.cut_page(number, from, since).await?;
            match () {
                () if self.tells(Lie::Place) => page.entries[0].block = u32::MAX,
                () if self.tells(Lie::Version) => page.entries[0].version = u64::MAX,
                () if self.tells(Lie::Circle) => page.next = Some(0),
                () if self.tells(Lie::Digest) => page.entries[0].digest = Some(ChunkName([1; 32])),
                () if self.tells(Lie::Left) => drop(page.entries.pop()),
                () => {}
            }
            Ok(page)
        })
    }

    fn cut_block(&self, number: u64, block: u32, version: u64) -> FetchFuture<'_, Fetched> {
        Box::pin(async move {
            let mut fetched = self.truth.cut_block(number, block, version).await?;
            match () {
                () if self.tells(Lie::Content) => fetched.data = Some(vec![8; BLOCK_BYTES].into()),
                () if self.tells(Lie::Length) => fetched.data = Some(vec![8; SECTOR].into()),
                () if self.tells(Lie::Zeros) => fetched.data = None,
                () => {}
            }
            Ok(fetched)
        })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_source_that_lies_is_found_out_and_the_committed_cut_stays() {
    let lies = [
        Lie::Root,
        Lie::Since,
        Lie::Number,
        Lie::Place,
        Lie::Version,
        Lie::Circle,
        Lie::Digest,
        Lie::Left,
        Lie::Content,
        Lie::Length,
        Lie::Zeros,
    ];
    for (index, lie) in lies.into_iter().enumerate() {
        let world = World::new(true).await;
        let source = world.active(SimDisk::new()).await;
        let link = Link::to(&source);
        let (disk, target) = standby(&world, &link).await;
        let liar = Arc::new(Liar { truth: client(&world, &link), lie: Mutex::default() });
        target.set_source(Some(liar.clone()));
        let mut follower = Follower::of(disk, target).await;
        write_stamp(&source, 0, 7).await;
        write_stamp(&source, 300, 7).await;
        source.cut(1).await.unwrap();
        let first = read_all(&source).await;
        follower.staged(1).await;
        follower.volume.commit_cut(1).await.unwrap();
        *liar.lie.lock().unwrap() = Some(lie);
        write_stamp(&source, 0, 8).await;
        write_stamp(&source, 200, 8).await;
        source.cut(2).await.unwrap();
        until("the lie to be found out", || follower.status().trouble.is_some()).await;
        assert_eq!((follower.status().staged, follower.status().committed), (1, 1), "{lie:?}");
        if index % 2 == 0 {
            // It mends its ways. What it said of its map before is not believed: the next cut is asked for whole.
            *liar.lie.lock().unwrap() = None;
            until("the liar to be believed again", || {
                follower.status().staged == 2
                    || follower.status().trouble.as_ref().is_some_and(|t| t.contains("keeps less"))
            })
            .await;
            source.cut(3).await.unwrap();
            follower.staged(3).await;
            follower.volume.commit_cut(3).await.unwrap();
            let now = read_all(&source).await;
            follower.promote().await.unwrap();
            assert!(read_all(&follower.volume).await == now, "{lie:?}");
        } else {
            follower.promote().await.unwrap();
            assert!(read_all(&follower.volume).await == first, "{lie:?}");
        }
    }
}
