//! Plans as REST makes, applies and stops them.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use supercloud_api::{
    Code, CordonState, Evacuation, EvacuationState, FleetPlan, FleetPlanCreate, HostPatch, OperationKind, Phase,
    PhaseTime, PlanKind, PlanState, PlanStepState, Role,
    ids::{OperationId, PlanId},
    link::MigrationOptions,
};

use super::{TestController, World, guest, problem, problem_of};
use crate::{
    plans::AT_MOST_KEPT,
    state::{Change, Context, HostRecord, OperationRecord, PlanRecord, Work},
};

fn wanted(kind: PlanKind) -> FleetPlanCreate {
    FleetPlanCreate { kind, host: None, cloud: None, guests: vec![], to: None, band_percent: None, reason: None }
}

fn drain(host: &str) -> FleetPlanCreate {
    FleetPlanCreate { host: Some(host.into()), reason: Some("disk".into()), ..wanted(PlanKind::Drain) }
}

/// Three guests on east-1.
async fn fleet(test: &TestController) -> World {
    let world = test.world().await;
    for name in ["a", "b", "c"] {
        world.client.create_guest(&guest(name)).await.unwrap();
        let id = world.client.guest(name).await.unwrap().id;
        test.run_on(id, &world.hosts[0]).await;
    }
    world
}

async fn comes_to(test: &TestController, id: PlanId, is_so: impl Fn(&FleetPlan) -> bool) -> FleetPlan {
    let come = async {
        loop {
            let plan = test.admin_client().plan(id).await.unwrap();
            if is_so(&plan) {
                return plan;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), come).await.expect("the plan comes to it")
}

#[tokio::test]
async fn a_plan_is_looked_at_applied_cancelled_and_taken_back() {
    let test = TestController::start().await;
    let world = fleet(&test).await;
    let admin = test.admin_client();
    let tried = admin.create_plan(&drain("east-1"), true).await.unwrap();
    assert_eq!((tried.state, tried.steps.len(), tried.stuck.len()), (PlanState::Proposed, 3, 0));
    assert!(tried.steps.iter().all(|step| step.to == world.hosts[1].id && step.predicted_bytes == 256 << 20));
    assert!(admin.plans().await.unwrap().is_empty(), "a dry run is not kept");

    let plan = admin.create_plan(&drain("east-1"), false).await.unwrap();
    assert_eq!((plan.reason.as_deref(), plan.host), (Some("disk"), Some(world.hosts[0].id)));
    assert_eq!(admin.plans().await.unwrap(), std::slice::from_ref(&plan));
    assert!(admin.host("east-1").await.unwrap().state != supercloud_api::HostState::Cordoned);
    assert_eq!(problem(admin.undo_plan(plan.id, false).await).code, Code::WrongState);
    assert_eq!(admin.apply_plan(plan.id, true).await.unwrap().state, PlanState::Running);
    assert_eq!(admin.plan(plan.id).await.unwrap().state, PlanState::Proposed, "that was a dry run");

    assert_eq!(admin.apply_plan(plan.id, false).await.unwrap().state, PlanState::Running);
    let begun =
        comes_to(&test, plan.id, |plan| plan.steps.iter().filter(|one| one.operation.is_some()).count() == 2).await;
    assert_eq!(begun.cordons[0].state, CordonState::Cordoned);
    assert!(test.state().need::<HostRecord>(&world.hosts[0].id).await.unwrap().is_cordoned);
    let operation = begun.steps[0].operation.unwrap();
    let record = test.state().need::<OperationRecord>(&operation).await.unwrap();
    assert!(matches!(&record.work, Work::GuestMigrate { options } if options.auto_converge));
    assert!(record.operation.reason.as_ref().unwrap().contains(&plan.id.to_string()));
    assert_eq!(record.operation.actor, plan.actor);
    assert_eq!(problem(admin.apply_plan(plan.id, false).await).code, Code::WrongState);
    assert_eq!(problem(admin.undo_plan(plan.id, false).await).code, Code::WrongState);

    admin.cancel_plan(plan.id).await.unwrap();
    let stopped = comes_to(&test, plan.id, |plan| plan.state == PlanState::Cancelling).await;
    assert_eq!(stopped.steps[2].state, PlanStepState::Cancelled, "it never begins");
    // The moves are asked to end; that they do takes agents.
    for step in &stopped.steps[..2] {
        let id = step.operation.unwrap();
        let asked = async {
            while !test.state().need::<OperationRecord>(&id).await.unwrap().operation.is_cancel_requested {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), asked).await.expect("it is asked to end");
    }
    let kinds: Vec<String> = admin
        .get::<supercloud_api::Page<supercloud_api::Event>>("/v1/events?limit=1000")
        .await
        .unwrap()
        .items
        .into_iter()
        .filter(|event| event.kind.starts_with("plan."))
        .map(|event| format!("{} {}", event.kind, event.data["state"].as_str().unwrap_or_default()))
        .collect();
    assert_eq!(kinds, ["plan.proposed proposed", "plan.state running", "plan.state cancelling",]);
    test.stop().await;
}

#[tokio::test]
async fn what_a_plan_cannot_be_is_refused() {
    let test = TestController::start().await;
    let world = fleet(&test).await;
    let admin = test.admin_client();
    let named = |guests: &[&str]| guests.iter().map(|name| (*name).into()).collect::<Vec<supercloud_api::Ref>>();
    let id = world.client.guest("a").await.unwrap().id.to_string();
    let cases = [
        (wanted(PlanKind::Drain), Code::BadRequest),
        (drain("mars"), Code::NotFound),
        (drain("east"), Code::BadRequest),
        (FleetPlanCreate { cloud: Some("east".into()), ..drain("east-1") }, Code::BadRequest),
        (FleetPlanCreate { cloud: Some("mars".into()), ..wanted(PlanKind::Evacuate) }, Code::NotFound),
        (FleetPlanCreate { band_percent: Some(0), ..wanted(PlanKind::Rebalance) }, Code::BadRequest),
        (FleetPlanCreate { guests: named(&[&id]), ..wanted(PlanKind::Gather) }, Code::BadRequest),
        (
            FleetPlanCreate { to: Some("west".into()), guests: named(&[id.as_str(); 201]), ..wanted(PlanKind::Gather) },
            Code::BadRequest,
        ),
        (
            FleetPlanCreate { to: Some("west".into()), guests: named(&["nobody"]), ..wanted(PlanKind::Gather) },
            Code::NotFound,
        ),
        (FleetPlanCreate { reason: Some("x".repeat(300)), ..drain("east-1") }, Code::BadRequest),
    ];
    for (body, code) in cases {
        let refused = problem(admin.create_plan(&body, false).await);
        assert_eq!(refused.code, code, "{body:?}: {refused:?}");
    }
    test.edit::<HostRecord>(&world.hosts[1].id, |record| record.host.capacity.memory_bytes = 600 << 20).await;
    let gather = FleetPlanCreate {
        to: Some("west".into()),
        guests: named(&[
            &id,
            &world.client.guest("b").await.unwrap().id.to_string(),
            &world.client.guest("c").await.unwrap().id.to_string(),
        ]),
        ..wanted(PlanKind::Gather)
    };
    assert_eq!(problem(admin.create_plan(&gather, false).await).code, Code::NoCapacity, "all or none");
    // Two of them fit, and the drain tells of the third.
    let plan = admin.create_plan(&drain("east-1"), false).await.unwrap();
    assert_eq!((plan.steps.len(), plan.stuck.len()), (2, 1));
    assert!(admin.plans().await.unwrap().len() == 1);

    let operator = test.token("*", Role::Operator).await.secret;
    let answer = test.raw(Method::POST, &format!("/v1/plans/{}/apply", plan.id), Some(&operator)).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::FORBIDDEN);
    let answer = test.raw(Method::GET, "/v1/plans", Some(&operator)).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    for path in ["/v1/plans/pln-x", &format!("/v1/plans/{}", PlanId::generate())] {
        let answer = test.raw(Method::GET, path, Some(&test.admin_secret())).send().await.unwrap();
        assert_eq!(problem_of(answer).await.code, Code::NotFound);
    }
    test.stop().await;
}

#[tokio::test]
async fn a_cordon_of_somebody_else_stays_and_old_plans_make_way() {
    let test = TestController::start().await;
    let world = test.world().await;
    let admin = test.admin_client();
    admin.patch_host("east-1", &HostPatch { cordoned: Some(true) }).await.unwrap();
    let plan = admin.create_plan(&drain("east-1"), false).await.unwrap();
    admin.apply_plan(plan.id, false).await.unwrap();
    let done = comes_to(&test, plan.id, |plan| plan.state == PlanState::Done).await;
    assert_eq!(done.cordons[0].state, CordonState::LeftAlone);
    assert_eq!(problem(admin.undo_plan(plan.id, false).await).code, Code::WrongState, "nothing of it is left");
    assert!(test.state().need::<HostRecord>(&world.hosts[0].id).await.unwrap().is_cordoned);
    for _ in 0..AT_MOST_KEPT {
        admin.create_plan(&drain("west-1"), false).await.unwrap();
    }
    let kept = admin.plans().await.unwrap();
    assert_eq!(kept.len(), AT_MOST_KEPT);
    assert!(kept.iter().all(|one| one.id != plan.id), "the oldest has made way");
    assert!(test.state().list::<PlanRecord>().await.unwrap().iter().all(|one| one.plan.state == PlanState::Proposed));
    test.stop().await;
}

#[tokio::test]
async fn a_guest_is_told_whether_it_could_leave_in_time() {
    let test = TestController::start_with(tempfile::tempdir().unwrap(), "notice_s = 60").await;
    let world = fleet(&test).await;
    let found: Evacuation = world.client.get("/v1/guests/a/evacuation").await.unwrap();
    assert_eq!((found.state, found.notice_ms), (EvacuationState::NotNeeded, 60_000), "own machines are not taken back");
    assert_eq!((found.destination, found.leave_ms), (Some(world.hosts[1].id), None));
    assert!(found.detail.contains("no move from east to west"), "{}", found.detail);
    // A move of it was seen: 256 MiB in a second.
    let (from, to) = (world.hosts[0].id, world.hosts[1].id);
    let mut seen = Context::system().planned(OperationId::generate(), OperationKind::GuestMigrate);
    (seen.guest, seen.source, seen.destination, seen.phase) = (Some(found.guest), Some(from), Some(to), Phase::Done);
    seen.phase_times =
        [(Phase::Copy, 1000), (Phase::Switch, 2000)].map(|(phase, at_ms)| PhaseTime { phase, at_ms }).into();
    (seen.progress.memory_sent_bytes, seen.progress.memory_total_bytes) = (256 << 20, 256 << 20);
    let mut change = Change::new();
    change.create(&OperationRecord {
        operation: seen,
        work: Work::GuestMigrate { options: MigrationOptions::default() },
    });
    test.state().commit(&Context::system(), change).await.unwrap();
    let found: Evacuation = world.client.get("/v1/guests/a/evacuation").await.unwrap();
    assert_eq!((found.leave_ms, found.downtime_ms), (Some(1150), Some(150)));
    let other: Evacuation = world.client.get("/v1/guests/b/evacuation").await.unwrap();
    assert!(other.leave_ms.is_none() && other.detail.contains("never moved"), "{}", other.detail);
    world.client.create_guest(&guest("off")).await.unwrap();
    let refused = world.client.get::<Evacuation>("/v1/guests/off/evacuation").await;
    assert_eq!(problem(refused).code, Code::WrongState);
    let metrics =
        test.raw(Method::GET, "/metrics", Some(&test.admin_secret())).send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("supercloud_guests_evacuable{state=\"late\"} 0"), "{metrics}");
    test.stop().await;
}
