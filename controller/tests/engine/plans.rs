//! Plans: carried out, cancelled and taken back, through deaths of the controller at every point.

use std::{collections::HashMap, time::Duration};

use supercloud_api::{
    CordonState, FleetPlan, Host, OperationKind, Phase, PlanState, PlanStepState, Problem,
    ids::{GuestId, PlanId},
};
use supercloud_controller::{
    plans::{
        machine,
        make::{self, Aim, Fleet, Target},
        measured::Measured,
    },
    state::{Change, Context, GuestRecord, HostRecord, OperationRecord, PlanRecord, StateError, retry_conflicts},
};

use crate::support::{
    Random,
    agent::{Stage, lock},
    seed,
    world::World,
};

/// A plan of what is, kept.
async fn propose(world: &World, aim: Aim) -> Result<PlanId, Problem> {
    let controller = world.controller.as_ref().unwrap();
    let hosts = world.state().list::<HostRecord>().await.unwrap();
    let hosts: Vec<Host> = hosts.iter().map(|record| record.view(&controller.live)).collect();
    let guests = world.state().list::<GuestRecord>().await.unwrap();
    let fleet = Fleet {
        hosts: &hosts,
        guests: guests.iter().map(|record| &record.value).collect(),
        disks: &HashMap::new(),
        measured: &Measured::default(),
        egress_per_gib: &HashMap::new(),
    };
    let context = Context::system();
    let plan = make::proposal(&aim, make::make(&aim, &fleet)?, None, &context);
    let record = PlanRecord { plan, actor: context.actor.clone(), request_id: context.request_id };
    let mut change = Change::new();
    change.create_plan(&record);
    world.state().commit(&context, change).await.unwrap();
    Ok(record.plan.id)
}

async fn turn(world: &World, plan: PlanId, how: fn(&mut FleetPlan) -> Result<(), Problem>) -> Result<(), Problem> {
    let turned = retry_conflicts(|| async {
        let found = world.state().need::<PlanRecord>(&plan).await?;
        let mut now = found.value.clone();
        if let Err(problem) = how(&mut now.plan) {
            return Ok(Err(problem));
        }
        let mut change = Change::new();
        change.update_plan(&found, &mut now);
        world.state().commit(&Context::system(), change).await?;
        Ok::<_, StateError>(Ok(()))
    });
    let turned = turned.await.unwrap();
    world.controller.as_ref().unwrap().plans_wake.notify_one();
    turned
}

async fn plan(world: &World, id: PlanId) -> FleetPlan {
    world.state().need::<PlanRecord>(&id).await.unwrap().value.plan
}

async fn comes_to(world: &World, id: PlanId, state: PlanState) -> FleetPlan {
    world
        .until(&format!("plan {id} at {state:?}"), async |world| {
            let now = plan(world, id).await;
            assert!(!now.state.is_at_rest() || now.state == state, "{now:#?}\n{}", world.picture().await);
            now.state == state
        })
        .await;
    plan(world, id).await
}

/// Moves that were ever begun, by guest.
async fn moves(world: &World) -> HashMap<GuestId, usize> {
    let mut moves = HashMap::new();
    for record in world.state().list::<OperationRecord>().await.unwrap() {
        if let (OperationKind::GuestMigrate, Some(guest)) = (record.operation.kind, record.operation.guest) {
            *moves.entry(guest).or_default() += 1;
        }
    }
    moves
}

async fn is_cordoned(world: &World, host: usize) -> bool {
    world.state().need::<HostRecord>(&world.id(host)).await.unwrap().is_cordoned
}

/// Running guests on one host.
pub async fn guests_on(world: &mut World, host: usize, count: usize) -> Vec<GuestId> {
    let mut guests = Vec::new();
    for _ in 0..count {
        let guest = world.guest().await;
        world.done(world.start(guest, host).await).await;
        guests.push(guest);
    }
    world.settled().await;
    guests
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_and_its_undo_survive_the_controllers_death_in_every_phase_of_a_move() {
    let mut world = World::new(seed("plan-deaths", 60), 3).await;
    let guests = guests_on(&mut world, 0, 3).await;
    let stages = [
        (Stage::Prepare, Phase::Prepare),
        (Stage::Copy, Phase::Copy),
        (Stage::HandOver, Phase::Switch),
        (Stage::Run, Phase::Resume),
        (Stage::Fetch, Phase::Finish),
        (Stage::Release, Phase::Finish),
    ];
    for (n, (stage, phase)) in stages.into_iter().enumerate() {
        world.stall(stage, true);
        let id = propose(&world, Aim::Drain(world.id(0))).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!is_cordoned(&world, 0).await, "nothing happens before it is applied");
        turn(&world, id, machine::apply).await.unwrap();
        world.until("a step", async |world| plan(world, id).await.steps[0].operation.is_some()).await;
        let first = plan(&world, id).await.steps[0].operation.unwrap();
        world.phase(first, phase).await;
        world.kill_controller().await;
        world.stall(stage, false);
        world.start_controller().await;
        let done = comes_to(&world, id, PlanState::Done).await;
        assert!(done.steps.iter().all(|step| step.state == PlanStepState::Done), "{done:#?}");
        assert_eq!(done.cordons[0].state, CordonState::Cordoned);
        assert!(is_cordoned(&world, 0).await);
        world.settled().await;
        for guest in &guests {
            assert_ne!(world.place(*guest).await, Some(0));
            assert_eq!(moves(&world).await[guest], 2 * n + 1, "each moved once");
        }
        // And back, with another death on the way.
        world.stall(stage, true);
        turn(&world, id, machine::undo).await.unwrap();
        world
            .until("a step back", async |world| {
                plan(world, id).await.steps.iter().any(|step| step.undo_operation.is_some())
            })
            .await;
        world.kill_controller().await;
        world.stall(stage, false);
        world.start_controller().await;
        comes_to(&world, id, PlanState::Undone).await;
        assert!(!is_cordoned(&world, 0).await);
        world.settled().await;
        for guest in &guests {
            assert_eq!(world.place(*guest).await, Some(0));
            assert_eq!(moves(&world).await[guest], 2 * n + 2, "each moved back once");
        }
        assert!(turn(&world, id, machine::undo).await.is_err(), "nothing is left of it");
    }
    assert!(guests.iter().all(|guest| lock(&world.ground).boots[guest] == 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_dies_again_and_again_moves_each_guest_once() {
    let seed = seed("plan-storm", 61);
    let mut random = Random::new(seed);
    let mut world = World::new(seed, 3).await;
    let guests = guests_on(&mut world, 1, 5).await;
    let id = propose(&world, Aim::Drain(world.id(1))).await.unwrap();
    turn(&world, id, machine::apply).await.unwrap();
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(random.next() % 150)).await;
        world.kill_controller().await;
        world.start_controller().await;
    }
    comes_to(&world, id, PlanState::Done).await;
    world.settled().await;
    for guest in &guests {
        assert_ne!(world.place(*guest).await, Some(1));
        assert_eq!(moves(&world).await[guest], 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_cancelled_plan_begins_again_by_itself() {
    let mut world = World::new(seed("plan-cancel", 62), 2).await;
    let guests = guests_on(&mut world, 0, 4).await;
    world.stall(Stage::Copy, true);
    let id = propose(&world, Aim::Drain(world.id(0))).await.unwrap();
    turn(&world, id, machine::apply).await.unwrap();
    world
        .until("two steps", async |world| {
            plan(world, id).await.steps.iter().filter(|step| step.operation.is_some()).count() == machine::AT_ONCE
        })
        .await;
    turn(&world, id, machine::cancel).await.unwrap();
    // It dies while the moves are being cancelled.
    world.restart_controller().await;
    world.stall(Stage::Copy, false);
    let ended = comes_to(&world, id, PlanState::Cancelled).await;
    assert!(ended.steps.iter().all(|step| step.state == PlanStepState::Cancelled), "{ended:#?}");
    world.settled().await;
    let begun = moves(&world).await;
    world.restart_controller().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(moves(&world).await, begun, "nothing has begun again");
    for guest in &guests {
        assert_eq!(world.place(*guest).await, Some(0));
    }
    assert!(turn(&world, id, machine::apply).await.is_err());
    // Its cordon is there until it is taken back.
    assert!(is_cordoned(&world, 0).await);
    turn(&world, id, machine::undo).await.unwrap();
    comes_to(&world, id, PlanState::Undone).await;
    assert!(!is_cordoned(&world, 0).await);
    assert_eq!(moves(&world).await, begun);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_guests_that_are_gathered_all_go_or_none() {
    let mut world = World::new(seed("plan-gather", 63), 2).await;
    let guests = guests_on(&mut world, 0, 3).await;
    let there = Target::Host(world.id(1));
    let id = propose(&world, Aim::Gather(guests.clone(), there)).await.unwrap();
    // The last one cannot go when its turn comes.
    let last = plan(&world, id).await.steps.last().unwrap().guest;
    world.done(world.stop(last).await).await;
    turn(&world, id, machine::apply).await.unwrap();
    let ended = comes_to(&world, id, PlanState::Undone).await;
    let states: Vec<PlanStepState> = ended.steps.iter().map(|step| step.state).collect();
    assert_eq!(states, [PlanStepState::Undone, PlanStepState::Undone, PlanStepState::Failed], "{ended:#?}");
    world.settled().await;
    for guest in guests.iter().filter(|guest| **guest != last) {
        assert_eq!((world.place(*guest).await, moves(&world).await[guest]), (Some(0), 2));
    }
    // Without a place for all of them there is no plan at all.
    let refused = propose(&world, Aim::Gather(guests.clone(), there)).await.unwrap_err();
    assert!(refused.detail.contains("does not run"), "{}", refused.detail);
    world.done(world.start(last, 0).await).await;
    world.settled().await;
    let id = propose(&world, Aim::Gather(guests.clone(), there)).await.unwrap();
    turn(&world, id, machine::apply).await.unwrap();
    comes_to(&world, id, PlanState::Done).await;
    for guest in &guests {
        assert_eq!(world.place(*guest).await, Some(1));
    }
    world.settled().await;
}
