//! What is done by itself for guests that are lost, and for those of which a mirror is to be kept.

use supercloud_api::{
    GuestState, OnLoss, OperationKind, Phase,
    handover::Owner,
    ids::{Epoch, GuestId},
};
use supercloud_controller::state::OperationRecord;

use crate::support::{agent::lock, seed, world::World};

/// It runs at this host, and nowhere else.
async fn runs_only_at(world: &World, guest: GuestId, host: usize) -> Epoch {
    let to = world.id(host);
    world.until("the guest runs", async |world| lock(&world.ground).runs_at(guest).iter().any(|at| at.0 == to)).await;
    let at = lock(&world.ground).runs_at(guest);
    assert_eq!(at.len(), 1, "{at:?}");
    at[0].1
}

/// Operations of this kind that were ever begun.
async fn begun(world: &World, kind: OperationKind) -> usize {
    let all = world.state().list::<OperationRecord>().await.unwrap();
    all.iter().filter(|record| record.operation.kind == kind).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_lost_with_its_host_starts_elsewhere_if_it_wants_that() {
    let mut world = World::new(seed("on-loss", 80), 2).await;
    let (wants, does_not) = (world.guest().await, world.guest().await);
    for guest in [wants, does_not] {
        world.done(world.start(guest, 0).await).await;
    }
    world.settled().await;
    world.wish(wants, OnLoss::RestartFromVolume, None).await;
    world.kill_agent(0).await;
    world.bury(0);
    // Silence is no loss, however often the controller looks.
    for _ in 0..3 {
        world.restart_controller().await;
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
    assert_eq!(begun(&world, OperationKind::GuestStart).await, 2);
    let epoch = world.record(wants).await.owner.epoch;
    world.remove_host(0).await;
    assert!(runs_only_at(&world, wants, 1).await > epoch);
    world.settled().await;
    assert_eq!(world.record(wants).await.owner.owner, Owner::Host(world.id(1)));
    let left = world.record(does_not).await;
    assert_eq!((left.guest.state, left.guest.operation), (GuestState::Lost, None));
    assert_eq!(begun(&world, OperationKind::GuestStart).await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_process_dies_starts_again_where_its_disk_is_also_over_a_restart_of_the_controller() {
    let mut world = World::new(seed("on-crash", 81), 3).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 1).await).await;
    world.settled().await;
    world.wish(guest, OnLoss::RestartFromVolume, None).await;
    let mut last = world.record(guest).await.owner.epoch;
    for _ in 0..2 {
        world.crash(guest, 1).await;
        world
            .until("it is lost or starts", async |world| world.record(guest).await.guest.state != GuestState::Running)
            .await;
        world.restart_controller().await;
        let epoch = runs_only_at(&world, guest, 1).await;
        assert!(epoch > last);
        last = epoch;
        world.settled().await;
    }
    assert_eq!(begun(&world, OperationKind::GuestStart).await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_guest_waits_for_the_host_that_has_its_disk_as_long_as_that_is_only_silent() {
    let mut world = World::new(seed("on-silence", 83), 2).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    world.settled().await;
    world.crash(guest, 0).await;
    world.until("it is lost", async |world| world.record(guest).await.guest.state == GuestState::Lost).await;
    world.settled().await;
    world.kill_agent(0).await;
    world.wish(guest, OnLoss::RestartFromVolume, None).await;
    let waits = async |world: &World| {
        let (events, _) = world.state().events(0, 10_000).await.unwrap();
        events.iter().any(|event| event.kind == "guest.recovery_waits" && event.guest == Some(guest))
    };
    world.until("it waits", waits).await;
    assert_eq!(begun(&world, OperationKind::GuestStart).await, 1);
    world.start_agent(0);
    runs_only_at(&world, guest, 0).await;
    assert_eq!(begun(&world, OperationKind::GuestStart).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_is_kept_is_begun_again_at_a_third_host_after_a_fail_over() {
    let mut world = World::new(seed("kept-mirror", 82), 3).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    world.settled().await;
    // It is begun by itself in the first place, too.
    world.wish(guest, OnLoss::Nothing, Some(1)).await;
    world.protected(guest, 1).await;
    let epoch = world.record(guest).await.owner.epoch;
    world.kill_agent(0).await;
    world.bury(0);
    world.remove_host(0).await;
    assert_eq!(runs_only_at(&world, guest, 1).await, epoch.next());
    world.protected(guest, 2).await;
    // The standby goes away: the mirror ends, and is begun again when there is a host for it.
    let second = world.record(guest).await.guest.operation.expect("a mirror");
    world.kill_agent(2).await;
    world.until("it breaks", async |world| world.operation(second).await.error.is_some()).await;
    world.start_agent(2);
    assert_eq!(world.end(second).await.phase, Phase::RolledBack);
    world
        .until("a third mirror", async |world| world.record(guest).await.guest.operation.is_some_and(|id| id != second))
        .await;
    world.protected(guest, 2).await;
    assert_eq!(runs_only_at(&world, guest, 1).await, epoch.next());
    // Nobody wants it any more.
    let third = world.record(guest).await.guest.operation.unwrap();
    world.wish(guest, OnLoss::Nothing, None).await;
    world.cancel(third).await;
    world.end(third).await;
    world.settled().await;
    // The longest wait between two attempts is two seconds here.
    tokio::time::sleep(std::time::Duration::from_secs(4)).await;
    assert_eq!(world.record(guest).await.guest.operation, None);
}
