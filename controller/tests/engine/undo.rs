//! What is cancelled, refused or too late: before the switch everything is as before, after it everything goes on.

use std::time::Duration;

use supercloud_api::{Code, GuestState, OperationKind, Phase, handover::Owner, link::MigrationOptions};
use supercloud_controller::{operations::Pace, state::Work};

use crate::support::{
    agent::{Stage, lock},
    seed,
    world::{World, pace},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_move_is_cancelled_in_every_phase_before_the_switch_and_in_none_after() {
    let mut world = World::new(seed("cancel", 10), 2).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    for (stage, phase) in
        [(Stage::Prepare, Phase::Prepare), (Stage::Copy, Phase::Copy), (Stage::HandOver, Phase::Switch)]
    {
        world.stall(stage, true);
        let id = world.migrate(guest, 1).await;
        world.phase(id, phase).await;
        world.cancel(id).await;
        // What stands still is told to stop all the same, except a destination that prepares: it ends that first.
        world.undone(id, Code::WrongState).await;
        world.stall(stage, false);
        world.settled().await;
        assert_eq!(world.place(guest).await, Some(0));
        world.done(world.migrate(guest, 1).await).await;
        world.done(world.migrate(guest, 0).await).await;
        world.settled().await;
    }
    for (stage, phase) in [(Stage::Run, Phase::Resume), (Stage::Fetch, Phase::Finish), (Stage::Release, Phase::Finish)]
    {
        let (from, to) = if world.place(guest).await == Some(0) { (0, 1) } else { (1, 0) };
        world.stall(stage, true);
        let id = world.migrate(guest, to).await;
        world.phase(id, phase).await;
        world.switched(guest, from, to).await;
        world.cancel(id).await;
        world.restart_controller().await;
        world.stall(stage, false);
        world.done(id).await;
        world.settled().await;
        assert_eq!(world.place(guest).await, Some(to));
        world.done(world.migrate(guest, from).await).await;
    }
    assert_eq!(lock(&world.ground).boots[&guest], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn starts_freezes_and_thaws_are_cancelled_and_a_stop_is_not() {
    let mut world = World::new(seed("cancel-others", 11), 2).await;
    let guest = world.guest().await;
    world.stall(Stage::Prepare, true);
    let id = world.start(guest, 0).await;
    world.phase(id, Phase::Prepare).await;
    world.cancel(id).await;
    world.stall(Stage::Prepare, false);
    world.undone(id, Code::WrongState).await;
    world.settled().await;
    let record = world.record(guest).await;
    assert_eq!((record.guest.state, record.guest.compat_class.clone()), (GuestState::Created, None));
    // The class in which it was only to be started is not its own.
    world.stall(Stage::HandOver, true);
    let id = world.start(guest, 0).await;
    world.phase(id, Phase::Copy).await;
    assert!(world.record(guest).await.guest.compat_class.is_some());
    world.cancel(id).await;
    world.undone(id, Code::WrongState).await;
    world.stall(Stage::HandOver, false);
    world.settled().await;
    assert_eq!(world.record(guest).await.guest.compat_class, None);
    world.done(world.start(guest, 0).await).await;

    world.stall(Stage::Store, true);
    let id = world.freeze(guest).await;
    world.phase(id, Phase::Switch).await;
    world.cancel(id).await;
    world.stall(Stage::Store, false);
    world.undone(id, Code::WrongState).await;
    world.settled().await;
    assert_eq!(world.place(guest).await, Some(0));

    world.done(world.freeze(guest).await).await;
    world.stall(Stage::Prepare, true);
    let id = world.thaw(guest, 1).await;
    world.phase(id, Phase::Prepare).await;
    world.cancel(id).await;
    world.stall(Stage::Prepare, false);
    world.undone(id, Code::WrongState).await;
    world.settled().await;
    world.done(world.thaw(guest, 1).await).await;

    world.stall(Stage::Copy, true);
    let id = world.stop(guest).await;
    world.phase(id, Phase::Copy).await;
    world.cancel(id).await;
    world.stall(Stage::Copy, false);
    world.done(id).await;
    world.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_refuses_leaves_everything_as_it_was() {
    let mut world = World::new(seed("refusal", 12), 2).await;
    let guest = world.guest().await;
    world.faults(0, |faults| faults.is_full = true);
    world.undone(world.start(guest, 0).await, Code::HostUnavailable).await;
    world.settled().await;
    assert_eq!(world.record(guest).await.owner.owner, Owner::Unowned);
    world.done(world.start(guest, 1).await).await;
    world.undone(world.migrate(guest, 0).await, Code::HostUnavailable).await;
    world.settled().await;
    assert_eq!(world.place(guest).await, Some(1));
    world.faults(0, |faults| faults.is_full = false);
    world.done(world.migrate(guest, 0).await).await;
    world.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_takes_too_long_before_the_switch_is_given_up() {
    let soon = Duration::from_millis(400);
    let hasty = Pace {
        plan_budget: soon,
        prepare_budget: soon,
        copy_budget: soon,
        freeze_budget: soon,
        switch_budget: soon,
        ..pace()
    };
    let mut world = World::at_pace(seed("deadlines", 13), 2, hasty).await;
    let guest = world.guest().await;
    // The destination is away: what it may hold is cleared when it is back.
    world.kill_agent(1).await;
    let id = world.start(guest, 1).await;
    world.until("aborted", async |world| world.operation(id).await.error.is_some()).await;
    assert!(!world.operation(id).await.phase.is_terminal());
    world.start_agent(1);
    world.undone(id, Code::HostUnavailable).await;

    world.done(world.start(guest, 0).await).await;
    world.settled().await;
    // The guest is paused and the destination never gets the last word.
    world.stall(Stage::HandOver, true);
    let id = world.migrate(guest, 1).await;
    world.undone(id, Code::HostUnavailable).await;
    let deadline = Work::GuestMigrate { options: MigrationOptions { deadline_ms: Some(100), ..Default::default() } };
    world.stall(Stage::HandOver, false);
    world.stall(Stage::Copy, true);
    let id = world.submit(guest, OperationKind::GuestMigrate, deadline, Some(1)).await;
    world.undone(id, Code::HostUnavailable).await;
    world.stall(Stage::Copy, false);
    // A freeze that cannot be stored.
    world.stall(Stage::Store, true);
    world.undone(world.freeze(guest).await, Code::HostUnavailable).await;
    world.stall(Stage::Store, false);
    world.settled().await;
    assert_eq!((world.place(guest).await, lock(&world.ground).boots[&guest]), (Some(0), 1));
    world.done(world.migrate(guest, 1).await).await;
    world.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_freeze_that_takes_long_and_gets_on_is_let_be() {
    let budget = Duration::from_secs(3);
    let mut world = World::at_pace(seed("crawl", 16), 1, Pace { freeze_budget: budget, ..pace() }).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    // Three times the budget, at 40 ticks a second.
    world.faults(0, |faults| faults.crawl_ticks = 360);
    world.done(world.freeze(guest).await).await;
    world.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_peers_lose_sight_of_each_other_and_the_guest_stays_at_its_source() {
    let mut world = World::new(seed("cut", 14), 2).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    let far = world.id(1);
    for (stage, phase) in [(Stage::Copy, Phase::Copy), (Stage::HandOver, Phase::Switch)] {
        world.stall(stage, true);
        let id = world.migrate(guest, 1).await;
        world.phase(id, phase).await;
        lock(&world.ground).away.insert(far);
        let ended = world.end(id).await;
        assert_eq!(ended.phase, Phase::RolledBack);
        lock(&world.ground).away.remove(&far);
        world.stall(stage, false);
        world.settled().await;
        assert_eq!(world.place(guest).await, Some(0));
    }
    // After the switch there is only the way forward.
    world.stall(Stage::Fetch, true);
    let id = world.migrate(guest, 1).await;
    world.phase(id, Phase::Finish).await;
    lock(&world.ground).away.insert(far);
    world.stall(Stage::Fetch, false);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(world.operation(id).await.phase, Phase::Finish);
    lock(&world.ground).away.remove(&far);
    world.done(id).await;
    world.settled().await;
}
