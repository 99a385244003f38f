//! Guests of which a second copy is kept: ended, taken over, and what must not happen meanwhile.

use supercloud_api::{
    GuestState, Phase, Volume,
    handover::Owner,
    ids::{Epoch, GuestId, OperationId},
};

use crate::support::{agent::lock, seed, world::World};

/// A guest at host 0 with a standby at host 1 that has a whole cut.
async fn mirrored(world: &mut World) -> (GuestId, OperationId) {
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    world.settled().await;
    let mirror = world.mirror(guest, 1).await;
    world.phase(mirror, Phase::Copy).await;
    world.protected(guest, 1).await;
    (guest, mirror)
}

/// It runs at this host, with all it had, and nowhere else; nothing of it is anywhere else.
async fn went_on(world: &World, guest: GuestId, host: usize, epoch: Epoch) {
    let record = world.record(guest).await;
    assert_eq!((record.owner.owner, record.owner.epoch), (Owner::Host(world.id(host)), epoch));
    assert_eq!(record.guest.state, GuestState::Running);
    assert_eq!(lock(&world.ground).runs_at(guest), vec![(world.id(host), epoch)]);
    let volume = world.state().need::<Volume>(&record.guest.volumes[0]).await.unwrap();
    assert_eq!((volume.host, volume.needed_source), (Some(world.id(host)), None));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_holds_the_guest_until_it_is_ended_and_then_leaves_nothing() {
    let mut world = World::new(seed("mirror", 60), 3).await;
    let (guest, mirror) = mirrored(&mut world).await;
    let epoch = world.record(guest).await.owner.epoch;
    world.restart_controller().await;
    assert_eq!(world.operation(mirror).await.phase, Phase::Copy);
    world.cancel(mirror).await;
    assert_eq!(world.end(mirror).await.phase, Phase::RolledBack);
    world.settled().await;
    went_on(&world, guest, 0, epoch).await;
    assert!(lock(&world.ground).local(world.id(1), guest).is_empty());
    // And it can be moved again.
    world.done(world.migrate(guest, 2).await).await;
    world.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_takes_over_when_somebody_says_that_the_host_is_dead_and_not_before() {
    let mut world = World::new(seed("failover", 61), 3).await;
    let (guest, mirror) = mirrored(&mut world).await;
    let epoch = world.record(guest).await.owner.epoch;
    world.kill_agent(0).await;
    world.bury(0);
    // A host that is silent is not yet a host that is dead.
    for _ in 0..3 {
        world.restart_controller().await;
        assert_eq!(world.operation(mirror).await.phase, Phase::Copy);
        assert_eq!(world.record(guest).await.owner.epoch, epoch);
    }
    world.fail_over(mirror).await;
    world.done(mirror).await;
    world.until("the guest runs", async |world| !lock(&world.ground).runs_at(guest).is_empty()).await;
    went_on(&world, guest, 1, epoch.next()).await;
    assert!(world.record(guest).await.guest.alarm.is_none());
    // Mirrored again, to a third host.
    let again = world.mirror(guest, 2).await;
    world.phase(again, Phase::Copy).await;
    world.protected(guest, 2).await;
    world.kill_agent(1).await;
    world.bury(1);
    world.fail_over(again).await;
    world.done(again).await;
    went_on(&world, guest, 2, epoch.next().next()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_takes_over_when_its_source_is_removed_or_says_that_the_guest_is_gone() {
    let mut world = World::new(seed("mirror-lost", 62), 2).await;
    let (guest, mirror) = mirrored(&mut world).await;
    let epoch = world.record(guest).await.owner.epoch;
    // The process dies, its host lives on, and must keep nothing.
    world.crash(guest, 0).await;
    world.done(mirror).await;
    world.settled().await;
    went_on(&world, guest, 1, epoch.next()).await;
    assert!(lock(&world.ground).local(world.id(0), guest).is_empty());

    let mut world = World::new(seed("mirror-removed", 63), 2).await;
    let (guest, mirror) = mirrored(&mut world).await;
    let epoch = world.record(guest).await.owner.epoch;
    world.kill_agent(0).await;
    world.bury(0);
    world.remove_host(0).await;
    world.done(mirror).await;
    went_on(&world, guest, 1, epoch.next()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_whose_standby_goes_away_ends_and_the_guest_runs_on() {
    let mut world = World::new(seed("standby-lost", 64), 2).await;
    let (guest, mirror) = mirrored(&mut world).await;
    let epoch = world.record(guest).await.owner.epoch;
    world.kill_agent(1).await;
    world.until("the guest runs on", async |world| world.operation(mirror).await.error.is_some()).await;
    assert_eq!(lock(&world.ground).runs_at(guest), vec![(world.id(0), epoch)]);
    world.start_agent(1);
    assert_eq!(world.end(mirror).await.phase, Phase::RolledBack);
    world.settled().await;
    went_on(&world, guest, 0, epoch).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_without_a_whole_cut_does_not_take_over() {
    let mut world = World::new(seed("no-cut", 65), 2).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    world.settled().await;
    world.stall(crate::support::agent::Stage::Copy, true);
    let mirror = world.mirror(guest, 1).await;
    world.phase(mirror, Phase::Copy).await;
    world.kill_agent(0).await;
    world.bury(0);
    world.fail_over(mirror).await;
    assert_eq!(world.end(mirror).await.phase, Phase::RolledBack);
    world.until("lost", async |world| world.record(guest).await.guest.state == GuestState::Lost).await;
    assert!(lock(&world.ground).runs_at(guest).is_empty());
    world.done(world.start(guest, 1).await).await;
}
