//! What goes well: starts, moves, freezes, stops.

use supercloud_api::{Code, Freeze, GuestState, OperationKind, Volume, handover::Owner, ids::FreezeId};
use supercloud_controller::state::{HostRecord, Work};

use crate::support::{
    agent::{Stage, lock},
    seed,
    world::World,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_goes_round_three_hosts_and_is_the_same_guest() {
    let mut world = World::new(seed("moves", 1), 3).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    world.settled().await;
    let first = world.record(guest).await;
    assert_eq!((first.guest.starts, first.owner.epoch.0), (1, 1));
    assert!(first.guest.compat_class.is_some());
    for (n, to) in [1, 2, 0, 2].into_iter().enumerate() {
        let id = world.migrate(guest, to).await;
        world.done(id).await;
        world.settled().await;
        let record = world.record(guest).await;
        assert_eq!(record.owner.owner, Owner::Host(world.id(to)));
        assert_eq!((record.guest.starts, record.owner.epoch.0), (1, 2 + n as u64));
        let operation = world.operation(id).await;
        assert_eq!(operation.destination, Some(world.id(to)));
        assert!(operation.progress.memory_sent_bytes > 0);
        let volume = world.state().need::<Volume>(&record.guest.volumes[0]).await.unwrap();
        assert!(volume.map_root.is_some() && volume.map_version > 0);
    }
    assert_eq!(lock(&world.ground).boots[&guest], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_freeze_thaws_once_anywhere_and_a_stale_one_is_refused() {
    let mut world = World::new(seed("freeze", 2), 2).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    world.done(world.freeze(guest).await).await;
    world.settled().await;
    let record = world.record(guest).await;
    let first = record.guest.freeze.expect("a freeze");
    let freeze = world.state().need::<Freeze>(&first).await.unwrap();
    assert_eq!((freeze.epoch.0, freeze.is_consumed, freeze.volumes.len()), (1, false, 1));
    let volume = world.state().need::<Volume>(&record.guest.volumes[0]).await.unwrap();
    assert_eq!(volume.base_cloud, Some(freeze.cloud));
    assert_eq!(volume.base.as_ref(), Some(&freeze.volumes[0].root));

    world.done(world.thaw(guest, 1).await).await;
    world.settled().await;
    assert!(world.state().need::<Freeze>(&first).await.unwrap().is_consumed);
    assert_eq!((world.record(guest).await.guest.starts, lock(&world.ground).boots[&guest]), (1, 1));
    world.until("the memory state dropped", async |world| lock(&world.ground).frozen[&first].is_dropped).await;
    // The agent says when its cloud has all of the base: the cloud where the guest was frozen is not needed any more.
    let cloud = world.state().need::<HostRecord>(&world.id(1)).await.unwrap().host.cloud;
    assert_ne!(cloud, freeze.cloud);
    let volume = record.guest.volumes[0];
    world
        .until("the base came", async |world| {
            world.state().need::<Volume>(&volume).await.unwrap().base_cloud == Some(cloud)
        })
        .await;

    // While it runs, and when it is frozen anew: the old freeze is not its state any more.
    let stale = Work::GuestThaw { freeze: first, memory: None };
    let id = world.submit(guest, OperationKind::GuestThaw, stale.clone(), Some(0)).await;
    world.undone(id, Code::WrongState).await;
    world.settled().await;
    world.done(world.freeze(guest).await).await;
    let id = world.submit(guest, OperationKind::GuestThaw, stale, Some(0)).await;
    world.undone(id, Code::WrongState).await;
    let none = Work::GuestThaw { freeze: FreezeId::generate(), memory: None };
    let id = world.submit(guest, OperationKind::GuestThaw, none, Some(0)).await;
    world.undone(id, Code::NotFound).await;
    world.done(world.thaw(guest, 0).await).await;
    world.settled().await;
    assert_eq!(world.record(guest).await.owner.epoch.0, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thaw_says_which_cloud_is_still_needed() {
    let mut world = World::new(seed("left-behind", 7), 2).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    world.settled().await;
    world.done(world.freeze(guest).await).await;
    world.faults(1, |faults| faults.base_missing = 7);
    let thaw = world.thaw(guest, 1).await;
    world.done(thaw).await;
    let message = world.operation(thaw).await.progress.message;
    assert!(message.contains("is needed until the guest's base_missing_bytes is 0"), "{message}");
    let volume = world.record(guest).await.guest.volumes[0];
    let base_cloud = async |world: &World| world.state().need::<Volume>(&volume).await.unwrap().base_cloud;
    let from = base_cloud(&world).await;
    world.faults(1, |faults| faults.base_missing = 0);
    world.until("brought", async |world| base_cloud(world).await != from).await;
    // Nothing is left behind where it came from.
    world.done(world.freeze(guest).await).await;
    let thaw = world.thaw(guest, 1).await;
    world.done(thaw).await;
    assert_eq!(world.operation(thaw).await.progress.message, "");
    world.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_guest_starts_where_its_volume_is_or_takes_it_along() {
    let mut world = World::new(seed("stop", 3), 3).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    for (starts, to) in [(2, 0), (3, 1), (4, 2), (5, 2)] {
        world.done(world.stop(guest).await).await;
        world.settled().await;
        let stopped = world.record(guest).await;
        assert_eq!((stopped.guest.state, stopped.owner.holders.len()), (GuestState::Stopped, 1));
        assert_eq!(stopped.guest.host, None);
        world.done(world.start(guest, to).await).await;
        world.settled().await;
        let record = world.record(guest).await;
        assert_eq!((record.guest.starts, record.owner.owner), (starts, Owner::Host(world.id(to))));
        assert!(record.owner.holders.is_empty());
    }
    // Nothing that was written was lost: the ground checks it at every start.
    assert!(lock(&world.ground).written[&guest] > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_powers_itself_off_is_stopped_also_in_the_middle_of_a_move() {
    let mut world = World::new(seed("power-off", 4), 2).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    world.settled().await;
    world.power_off(guest, 0);
    world.until("stopped", async |world| world.record(guest).await.guest.state == GuestState::Stopped).await;
    world.settled().await;
    world.done(world.start(guest, 0).await).await;
    world.settled().await;

    world.stall(Stage::Copy, true);
    let id = world.migrate(guest, 1).await;
    world.phase(id, supercloud_api::Phase::Copy).await;
    world.power_off(guest, 0);
    world.stall(Stage::Copy, false);
    world.undone(id, Code::HostUnavailable).await;
    world.until("stopped", async |world| world.record(guest).await.guest.state == GuestState::Stopped).await;
    world.settled().await;

    // The word of it is lost: heartbeats say it too.
    world.done(world.start(guest, 1).await).await;
    world.settled().await;
    world.kill_agent(1).await;
    world.power_off(guest, 1);
    world.start_agent(1);
    world.until("stopped", async |world| world.record(guest).await.guest.state == GuestState::Stopped).await;
    world.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crashed_guest_is_lost_with_an_alarm_and_starts_again_from_its_volume() {
    let mut world = World::new(seed("crash", 5), 2).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    world.settled().await;
    for to in [1, 1] {
        let at = world.place(guest).await.unwrap();
        world.crash(guest, at).await;
        world.until("lost", async |world| world.record(guest).await.guest.state == GuestState::Lost).await;
        world.settled().await;
        let lost = world.record(guest).await;
        assert!(lost.guest.alarm.is_some());
        assert_eq!(lost.guest.host, Some(world.id(at)));
        world.done(world.start(guest, to).await).await;
        world.settled().await;
        assert_eq!(world.record(guest).await.guest.alarm, None);
    }
    assert_eq!(world.record(guest).await.guest.starts, 3);
}
