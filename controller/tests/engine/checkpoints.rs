//! Guests that are lost and go on from a checkpoint: by themselves, through deaths of the controller, as often as they are lost.

use supercloud_api::{
    Freeze, GuestState, HistoryBand, HistoryPolicy, OnLoss, OperationKind, Phase, Volume, VolumeHistory,
    handover::Owner,
    history::verify,
    ids::{Epoch, GuestId},
    link::{Answer, CheckpointContent, PointContent, PointTaken, Query},
    unix_ms,
};
use supercloud_controller::{
    link::LinkHandler as _,
    operations::points::Asked,
    state::{Change, Context, OperationRecord},
};

use crate::support::{
    agent::{Stage, lock, root_of},
    ground::Frozen,
    seed,
    world::World,
};

async fn volume(world: &World, guest: GuestId) -> Volume {
    let id = world.record(guest).await.guest.volumes[0];
    world.state().need::<Volume>(&id).await.unwrap().value
}

async fn history(world: &World, guest: GuestId) -> VolumeHistory {
    let id = world.record(guest).await.guest.volumes[0];
    world.state().need::<VolumeHistory>(&id).await.unwrap().value
}

async fn begin(world: &World, guest: GuestId, memory: Option<u32>) {
    let volume = volume(world, guest).await;
    let policy = HistoryPolicy { every_s: None, keep: vec![HistoryBand { for_s: 3600, every_s: 60 }], memory };
    let mut change = Change::new();
    change.create(&VolumeHistory::begin(volume.id, volume.project, policy, volume.base.clone(), unix_ms()));
    world.state().commit(&Context::system(), change).await.unwrap();
}

/// The guest's host takes a checkpoint, or a point of the disk alone; what the controller made of it.
async fn take(world: &World, guest: GuestId, version: u64, change: impl Fn(&mut PointContent)) -> VolumeHistory {
    let volume = volume(world, guest).await;
    let host = world.record(guest).await.guest.host.unwrap();
    let boot = lock(&world.ground).boots[&guest];
    let mut content = PointContent {
        root: root_of(1000 + version),
        epoch: volume.epoch,
        version,
        age_ms: 0,
        total_blocks: 1,
        sealed_blocks: 1,
        stored_bytes: 10,
        memory: Some(CheckpointContent {
            root: root_of(boot),
            bytes: 64 << 20,
            format: "test/1".into(),
            stored_blocks: 5,
            filled_blocks: 9,
            stood_still_us: 700,
        }),
    };
    change(&mut content);
    let kept = Frozen { guest, boot, version: 0, volumes: vec![volume.id], is_dropped: false };
    lock(&world.ground).checkpoints.insert(root_of(boot), kept);
    let controller = world.controller.as_ref().unwrap();
    let at = tokio::time::Instant::now();
    assert!(controller.points.ask(volume.id, Asked { host, guest, project: world.project, at, memory: true }));
    let before = history(world, guest).await;
    world
        .until("it is over", async |world| {
            let taken = PointTaken { guest, volume: volume.id, content: Some(content.clone()), problem: None };
            let answer = controller.engine.query(host, Query::PointTaken { taken }).await;
            assert!(matches!(answer, Ok(Answer::Noted)));
            history(world, guest).await != before
        })
        .await;
    history(world, guest).await
}

async fn runs(world: &World, guest: GuestId, other_than: usize) -> Epoch {
    let not = world.id(other_than);
    world.until("the guest runs", async |world| lock(&world.ground).runs_at(guest).iter().any(|at| at.0 != not)).await;
    let at = lock(&world.ground).runs_at(guest);
    assert_eq!(at.len(), 1, "{at:?}");
    at[0].1
}

async fn thaws(world: &World) -> Vec<OperationRecord> {
    let all = world.state().list::<OperationRecord>().await.unwrap();
    all.into_iter()
        .map(|record| record.value)
        .filter(|record| record.operation.kind == OperationKind::GuestThaw)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_lost_with_its_host_goes_on_from_its_newest_checkpoint() {
    let mut world = World::new(seed("checkpoints", 120), 3).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    world.settled().await;
    begin(&world, guest, Some(2)).await;
    let taken = take(&world, guest, 5, |_| ()).await;
    let point = taken.points[0].clone();
    assert!(point.is_checkpoint(), "{point:?}");
    verify(&taken).unwrap();
    // What a host says of memory is looked at as what it says of disks.
    for (change, why) in [
        ((|content| content.memory = None) as fn(&mut PointContent), "without the guest's memory"),
        (|content| content.memory.as_mut().unwrap().root = "x".into(), "a root of the memory"),
        (|content| content.memory.as_mut().unwrap().bytes = 1 << 50, "more than the guest has"),
        (|content| content.memory.as_mut().unwrap().format = "x".repeat(65), "more than the guest has"),
    ] {
        let now = take(&world, guest, 6, change).await;
        assert_eq!(now.points, taken.points);
        assert!(now.problem.as_ref().is_some_and(|problem| problem.contains(why)), "{:?}", now.problem);
        // The next one is another problem.
        let other = VolumeHistory { problem: None, ..now };
        let mut reset = Change::new();
        let before = world.state().need::<VolumeHistory>(&other.volume).await.unwrap();
        reset.update(&before, &other);
        world.state().commit(&Context::system(), reset).await.unwrap();
    }

    world.wish(guest, OnLoss::ThawCheckpoint, None).await;
    let epoch = world.record(guest).await.owner.epoch;
    // The controller dies while the guest is on its way.
    world.stall(Stage::HandOver, true);
    world.kill_agent(0).await;
    world.bury(0);
    world.remove_host(0).await;
    world.until("it is begun", async |world| !thaws(world).await.is_empty()).await;
    world.until("it is prepared", async |world| thaws(world).await[0].operation.phase >= Phase::Prepare).await;
    assert_eq!(world.record(guest).await.owner.owner, Owner::Frozen(world.record(guest).await.guest.freeze.unwrap()));
    world.kill_controller().await;
    world.stall(Stage::HandOver, false);
    world.start_controller().await;
    assert_eq!(runs(&world, guest, 0).await, epoch.next());
    world.settled().await;
    assert_eq!(lock(&world.ground).boots[&guest], 1, "its memory came back");
    assert_eq!(thaws(&world).await.len(), 1);
    let after = history(&world, guest).await;
    verify(&after).unwrap();
    assert_eq!((&after.points, &after.seen_base), (&taken.points, &Some(point.root.clone())), "the point stays");
    assert_eq!(volume(&world, guest).await.base, Some(point.root.clone()));
    let made = world.state().list::<Freeze>().await.unwrap();
    assert!(made.iter().all(|made| made.is_consumed && made.point == Some(point.number)), "{made:?}");

    // Lost again, before there is another one: it goes back to the same.
    let at = world.place(guest).await.unwrap();
    world.crash(guest, at).await;
    world.until("it is thawed again", async |world| thaws(world).await.len() == 2).await;
    world
        .until("it runs", async |world| lock(&world.ground).runs_at(guest).iter().any(|at| at.1 == epoch.next().next()))
        .await;
    lock(&world.ground).bereft.insert(guest);
    world.settled().await;
    assert_eq!(lock(&world.ground).boots[&guest], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_checkpoint_a_guest_stays_lost_and_one_that_was_frozen_stays_frozen() {
    let mut world = World::new(seed("no-checkpoint", 121), 2).await;
    let (lost, frozen) = (world.guest().await, world.guest().await);
    for guest in [lost, frozen] {
        world.done(world.start(guest, 0).await).await;
        world.wish(guest, OnLoss::ThawCheckpoint, None).await;
    }
    world.settled().await;
    begin(&world, lost, None).await;
    world.done(world.freeze(frozen).await).await;
    world.settled().await;
    world.crash(lost, 0).await;
    let waits = async |world: &World| {
        let (events, _) = world.state().events(0, 10_000).await.unwrap();
        let mine = events.iter().filter(|event| event.kind == "guest.recovery_waits" && event.guest == Some(lost));
        mine.map(|event| event.data["detail"].as_str().unwrap_or_default().to_owned()).next()
    };
    world.until("it is said", async |world| waits(world).await.is_some()).await;
    let said = waits(&world).await.unwrap();
    assert!(said.contains("no checkpoint"), "{said}");
    for _ in 0..2 {
        world.restart_controller().await;
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
    assert_eq!(world.record(lost).await.guest.state, GuestState::Lost);
    assert_eq!(world.record(frozen).await.guest.state, GuestState::Frozen);
    assert!(thaws(&world).await.is_empty());
}
