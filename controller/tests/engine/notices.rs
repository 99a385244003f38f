//! Hosts that their providers take back: guests leave them by themselves, once, through deaths of the controller.

use supercloud_api::{HostNoticeKind, OperationKind, PlanKind, PlanState, link::Announced};
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
async fn guests_with_nowhere_to_go_stay_and_leave_when_there_is_room() {
    let mut world = World::new(seed("notice-full", 82), 2).await;
    let guests = guests_on(&mut world, 0, 1).await;
    world.kill_agent(1).await;
    world.until("one host", async |world| events(world, "host.unreachable").await > 0).await;
    world.faults(0, |faults| faults.announced = Some(TAKEN));
    world.until("somebody is told", async |world| events(world, "host.not_left").await == 1).await;
    assert_eq!(world.place(guests[0]).await, Some(0));
    world.start_agent(1);
    world.until("it leaves", async |world| world.place(guests[0]).await == Some(1)).await;
    assert_eq!(events(&world, "host.not_left").await, 1, "told once");
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
