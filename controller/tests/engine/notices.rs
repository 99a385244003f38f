//! Hosts that their providers take back: guests leave them by themselves, once, through deaths of the controller.

use supercloud_api::{GuestState, HostNoticeKind, OperationKind, Phase, PlanKind, PlanState, link::Announced, unix_ms};
use supercloud_controller::{
    plans::machine,
    state::{Change, Context, HostRecord, OperationRecord, PlanRecord, retry_conflicts},
};

use crate::{
    plans::guests_on,
    support::{
        agent::{Stage, lock},
        seed,
        world::World,
    },
};

const TAKEN: Announced = Announced { kind: HostNoticeKind::Interruption, at_ms: None };
const HINT: Announced = Announced { kind: HostNoticeKind::Rebalance, at_ms: None };

async fn events(world: &World, kind: &str) -> usize {
    let (events, _) = world.state().events(0, 10_000).await.unwrap();
    events.iter().filter(|event| event.kind == kind).count()
}

async fn host(world: &World, host: usize) -> HostRecord {
    world.state().need::<HostRecord>(&world.id(host)).await.unwrap().value
}

async fn moves(world: &World) -> usize {
    let operations = world.state().list::<OperationRecord>().await.unwrap();
    operations.iter().filter(|record| record.operation.kind == OperationKind::GuestMigrate).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_leave_a_host_that_is_taken_back_through_the_controllers_deaths() {
    let mut world = World::new(seed("notice", 81), 3).await;
    let guests = guests_on(&mut world, 0, 3).await;
    world.faults(0, |faults| faults.announced = Some(TAKEN));
    world.until("a plan", async |world| !world.state().list::<PlanRecord>().await.unwrap().is_empty()).await;
    world.kill_controller().await;
    world.start_controller().await;
    world
        .until("an empty host", async |world| {
            let mut empty = true;
            for guest in &guests {
                empty &= world.place(*guest).await.is_some_and(|place| place != 0);
            }
            empty
        })
        .await;
    world.settled().await;
    world
        .until("the plan's end", async |world| {
            let plans = world.state().list::<PlanRecord>().await.unwrap();
            plans.iter().all(|record| record.plan.state == PlanState::Done)
        })
        .await;
    assert_eq!(moves(&world).await, guests.len(), "each moved once");
    assert!(guests.iter().all(|guest| lock(&world.ground).boots[guest] == 1));
    let left = host(&world, 0).await;
    assert!(left.is_cordoned && left.host.notice.is_some_and(|notice| notice.kind == HostNoticeKind::Interruption));
    let plans = world.state().list::<PlanRecord>().await.unwrap();
    assert!(plans.iter().all(|record| record.plan.kind == PlanKind::Drain && record.actor == "notices"), "{plans:#?}");
    // Heartbeats repeat it; it is news once.
    assert_eq!(events(&world, "host.notice").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_with_nowhere_to_go_are_kept_and_go_on_when_there_is_room() {
    let mut world = World::new(seed("notice-full", 82), 2).await;
    let guests = guests_on(&mut world, 0, 1).await;
    world.kill_agent(1).await;
    world.until("one host", async |world| events(world, "host.unreachable").await > 0).await;
    world.faults(0, |faults| faults.announced = Some(TAKEN));
    world.until("somebody is told", async |world| events(world, "host.not_left").await == 1).await;
    // What the host takes with it is not lost: it is in the store by then.
    let is_kept = async |world: &World| {
        let record = world.record(guests[0]).await;
        record.guest.state == GuestState::Frozen && record.put_aside == record.guest.freeze
    };
    world.until("it is kept", is_kept).await;
    world.start_agent(1);
    world.until("it goes on", async |world| world.place(guests[0]).await == Some(1)).await;
    world.settled().await;
    assert_eq!(lock(&world.ground).boots[&guests[0]], 1, "where it was");
    assert_eq!(events(&world, "host.not_left").await, 1, "told once");
    // Somebody's own freeze is nobody else's to thaw.
    world.done(world.freeze(guests[0]).await).await;
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    assert_eq!(world.record(guests[0]).await.guest.state, GuestState::Frozen);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thaw_that_somebody_cancels_is_not_begun_again_by_itself() {
    let mut world = World::new(seed("notice-thaw", 83), 2).await;
    let guests = guests_on(&mut world, 0, 1).await;
    world.kill_agent(1).await;
    world.until("one host", async |world| events(world, "host.unreachable").await > 0).await;
    let soon = Announced { kind: HostNoticeKind::Interruption, at_ms: Some(unix_ms() + 30_000) };
    world.faults(0, |faults| faults.announced = Some(soon));
    // The freeze itself ends a step after its guest is frozen: only then is the next operation the thaw.
    let is_kept = async |world: &World| {
        let record = world.record(guests[0]).await;
        record.guest.state == GuestState::Frozen && record.guest.operation.is_none()
    };
    world.until("it is kept", is_kept).await;
    world.stall(Stage::Prepare, true);
    world.start_agent(1);
    let thaw = async |world: &World| world.record(guests[0]).await.guest.operation;
    world.until("a thaw", async |world| thaw(world).await.is_some()).await;
    let operation = thaw(&world).await.unwrap();
    world.cancel(operation).await;
    world.stall(Stage::Prepare, false);
    assert_eq!(world.end(operation).await.phase, Phase::RolledBack);
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    assert!(is_kept(&world).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_that_are_taken_back_together_send_nobody_to_each_other() {
    let mut world = World::new(seed("notice-two", 85), 3).await;
    let mut guests = guests_on(&mut world, 0, 2).await;
    guests.extend(guests_on(&mut world, 1, 2).await);
    // The second word comes when plans of the first are under way.
    world.stall(Stage::Copy, true);
    world.faults(0, |faults| faults.announced = Some(TAKEN));
    world.until("a move", async |world| moves(world).await > 0).await;
    world.faults(1, |faults| faults.announced = Some(TAKEN));
    world.until("both are known", async |world| host(world, 1).await.host.notice.is_some()).await;
    world.stall(Stage::Copy, false);
    world
        .until("all are at the third", async |world| {
            let mut all = true;
            for guest in &guests {
                all &= world.place(*guest).await == Some(2);
            }
            all
        })
        .await;
    assert!(guests.iter().all(|guest| lock(&world.ground).boots[guest] == 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_that_somebody_cancels_does_not_begin_again_by_itself() {
    let mut world = World::new(seed("notice-cancelled", 84), 2).await;
    let guests = guests_on(&mut world, 0, 1).await;
    world.stall(Stage::Copy, true);
    world.faults(0, |faults| faults.announced = Some(TAKEN));
    let plans = async |world: &World| world.state().list::<PlanRecord>().await.unwrap();
    world
        .until("a move", async |world| {
            plans(world).await.iter().any(|record| record.plan.steps.iter().any(|step| step.operation.is_some()))
        })
        .await;
    let found = plans(&world).await.pop().unwrap();
    retry_conflicts(|| async {
        let found = world.state().need::<PlanRecord>(&found.plan.id).await?;
        let mut now = found.value.clone();
        machine::cancel(&mut now.plan).unwrap();
        let mut change = Change::new();
        change.update_plan(&found, &mut now);
        world.state().commit(&Context::system(), change).await.map(drop)
    })
    .await
    .unwrap();
    world.until("it is cancelled", async |world| plans(world).await[0].plan.state == PlanState::Cancelled).await;
    world.stall(Stage::Copy, false);
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    assert_eq!((plans(&world).await.len(), world.place(guests[0]).await), (1, Some(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hint_is_told_of_and_nobody_moves() {
    let mut world = World::new(seed("hint", 83), 2).await;
    let guests = guests_on(&mut world, 0, 1).await;
    world.faults(0, |faults| faults.announced = Some(HINT));
    world.until("it is known", async |world| host(world, 0).await.host.notice.is_some()).await;
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    assert_eq!((moves(&world).await, world.place(guests[0]).await), (0, Some(0)));
    assert!(!host(&world, 0).await.is_cordoned);
    // Then it is taken.
    world.faults(0, |faults| faults.announced = Some(TAKEN));
    world.until("it leaves", async |world| world.place(guests[0]).await == Some(1)).await;
}
