use proptest::prelude::*;
use supercloud_api::{
    PlanCordon, PlanCost, PlanKind,
    ids::{GuestId, HostId, PlanId, ProjectId, RequestId},
};

use super::*;

fn step(n: usize) -> PlanStep {
    PlanStep {
        guest: GuestId::generate(),
        guest_name: format!("g{n}").parse().unwrap(),
        project: ProjectId::generate(),
        from: HostId::generate(),
        from_name: "a".parse().unwrap(),
        to: HostId::generate(),
        to_name: "b".parse().unwrap(),
        reason: String::new(),
        predicted_bytes: 1,
        predicted_ms: None,
        predicted_downtime_ms: None,
        egress_nanousd: None,
        state: PlanStepState::Pending,
        operation: None,
        undo_operation: None,
        error: None,
        waiting_since_ms: None,
    }
}

fn plan(steps: usize, cordons: usize, is_all_or_none: bool) -> FleetPlan {
    let cordon = |n: usize| PlanCordon {
        host: HostId::generate(),
        host_name: format!("h{n}").parse().unwrap(),
        state: CordonState::Pending,
    };
    FleetPlan {
        id: PlanId::generate(),
        kind: PlanKind::Drain,
        host: None,
        cloud: None,
        band_percent: None,
        is_all_or_none,
        state: PlanState::Proposed,
        cordons: (0..cordons).map(cordon).collect(),
        steps: (0..steps).map(step).collect(),
        stuck: Vec::new(),
        cost: PlanCost::default(),
        risks: Vec::new(),
        reason: None,
        actor: "test".into(),
        request_id: RequestId::generate(),
        created_at_ms: 0,
        updated_at_ms: 0,
        ended_at_ms: None,
    }
}

fn trouble() -> Problem {
    Problem::new(Code::NoCapacity, "full")
}

/// How the world treats one thing that is to be done.
#[derive(Debug, Clone, Copy)]
enum Luck {
    Well,
    Refused,
    PassedOver,
    RolledBack,
}

/// Does all that is to be done until nothing is, each with its luck; gives how often a move began.
fn carry_out(plan: &mut FleetPlan, mut luck: impl FnMut() -> Luck) -> usize {
    let mut begun_at_all = 0;
    for _ in 0..10_000 {
        let Some(first) = todo(plan).first().copied() else {
            let Some(i) = plan.steps.iter().position(|step| under_way(step).is_some()) else { return begun_at_all };
            let phase = if let Luck::RolledBack = luck() { Phase::RolledBack } else { Phase::Done };
            let is_cancelling = plan.state == PlanState::Cancelling;
            ended(&mut plan.steps[i], phase, Some(trouble()), is_cancelling);
            continue;
        };
        match first {
            Todo::Become(state) => become_state(plan, state),
            Todo::Cordon(i) => plan.cordons[i].state = CordonState::Cordoned,
            Todo::Uncordon(i) => plan.cordons[i].state = CordonState::Lifted,
            Todo::Begin(i) | Todo::TakeBack(i) => {
                let is_all_or_none = plan.is_all_or_none;
                let step = &mut plan.steps[i];
                match luck() {
                    Luck::Refused => gave_up(step, trouble()),
                    Luck::PassedOver => passed_over(step, trouble(), is_all_or_none),
                    Luck::Well | Luck::RolledBack => {
                        assert!(step.undo_operation.is_none() || step.state == PlanStepState::Done);
                        begun(step, OperationId::generate());
                        begun_at_all += 1;
                    }
                }
            }
            // The operation ends as it was asked to.
            Todo::Cancel(operation) => {
                let step = plan.steps.iter_mut().find(|step| under_way(step) == Some(operation)).unwrap();
                ended(step, Phase::RolledBack, Some(trouble()), true);
            }
        }
    }
    panic!("it never comes to rest: {plan:#?}");
}

#[test]
fn a_plan_goes_its_way_and_back() {
    let mut plan = plan(3, 1, false);
    assert!(todo(&plan).is_empty(), "nothing happens before it is applied");
    assert!(undo(&mut plan).is_err());
    apply(&mut plan).unwrap();
    assert_eq!(todo(&plan), [Todo::Cordon(0)], "no step before the cordon");
    plan.cordons[0].state = CordonState::Cordoned;
    assert_eq!(todo(&plan), [Todo::Begin(0), Todo::Begin(1)]);
    assert_eq!(carry_out(&mut plan, || Luck::Well), 3);
    assert_eq!(plan.state, PlanState::Done);
    assert!(apply(&mut plan).is_err() && cancel(&mut plan).is_err());
    undo(&mut plan).unwrap();
    plan.cordons[0].state = CordonState::Lifted;
    assert_eq!(todo(&plan), [Todo::TakeBack(2), Todo::TakeBack(1)], "the last first");
    carry_out(&mut plan, || Luck::Well);
    assert_eq!(plan.state, PlanState::Undone);
    assert!(undo(&mut plan).is_err());
}

#[test]
fn what_could_not_be_taken_back_can_be_tried_again() {
    let mut plan = plan(2, 0, false);
    apply(&mut plan).unwrap();
    carry_out(&mut plan, || Luck::Well);
    undo(&mut plan).unwrap();
    carry_out(&mut plan, || Luck::RolledBack);
    assert_eq!(plan.state, PlanState::Failed);
    assert!(plan.steps.iter().all(|step| step.state == PlanStepState::NotUndone));
    undo(&mut plan).unwrap();
    carry_out(&mut plan, || Luck::Well);
    assert_eq!(plan.state, PlanState::Undone);
}

#[test]
fn a_plan_of_nothing_is_not_applied() {
    assert!(apply(&mut plan(0, 0, false)).is_err());
    let mut cordons_only = plan(0, 1, false);
    apply(&mut cordons_only).unwrap();
    carry_out(&mut cordons_only, || Luck::Well);
    assert_eq!(cordons_only.state, PlanState::Done);
}

#[test]
fn a_step_that_waits_says_why_until_it_begins() {
    let mut one = step(0);
    (one.error, one.waiting_since_ms) = (Some(trouble()), Some(5));
    begun(&mut one, OperationId::generate());
    assert_eq!((one.error, one.waiting_since_ms), (None, None));
}

proptest! {
    /// Whatever goes wrong and whenever somebody cancels or takes back: it comes to rest, nothing is to be done at rest, a guest is
    /// moved at most once and back at most once per wish, and of all or none nothing half done is left unless a way back failed.
    #[test]
    fn every_plan_comes_to_rest(
        steps in 0usize..6, cordons in 0usize..3, is_all_or_none: bool, lucks in prop::collection::vec(0u8..12, 1..40),
        wishes in prop::collection::vec(0u8..3, 0..6),
    ) {
        let mut plan = plan(steps, cordons, is_all_or_none);
        let mut next = lucks.iter().cycle();
        let mut luck = || match next.next().unwrap() {
            0 => Luck::Refused,
            1 => Luck::PassedOver,
            2 => Luck::RolledBack,
            _ => Luck::Well,
        };
        for wish in std::iter::once(0).chain(wishes) {
            let is_turned = match wish {
                0 => apply(&mut plan).is_ok(),
                1 => undo(&mut plan).is_ok(),
                _ => {
                    // In the middle: after one thing was done.
                    if let Some(Todo::Begin(i) | Todo::TakeBack(i)) = todo(&plan).first().copied() {
                        begun(&mut plan.steps[i], OperationId::generate());
                    }
                    cancel(&mut plan).is_ok()
                }
            };
            let begun_now = carry_out(&mut plan, &mut luck);
            prop_assert!(is_turned || begun_now == 0, "nothing begins by itself");
            prop_assert!(begun_now <= 2 * steps);
            prop_assert!(plan.state.is_at_rest() && todo(&plan).is_empty());
            let is = |state| plan.steps.iter().filter(move |step| step.state == state).count();
            let open = is(PlanStepState::Running) + is(PlanStepState::Undoing);
            prop_assert_eq!(open, 0);
            match plan.state {
                PlanState::Done => prop_assert_eq!(is(PlanStepState::Done) + is(PlanStepState::Skipped), steps),
                PlanState::Undone => prop_assert_eq!(is(PlanStepState::Done) + is(PlanStepState::NotUndone), 0),
                PlanState::Cancelled => prop_assert_eq!(is(PlanStepState::Pending), 0),
                _ => {}
            }
            if is_all_or_none && plan.state == PlanState::Failed {
                prop_assert!(is(PlanStepState::NotUndone) > 0);
            }
        }
    }
}
