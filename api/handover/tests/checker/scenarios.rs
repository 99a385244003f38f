//! What is explored, and the defects that must be found by it.

use std::time::Instant;

use supercloud_handover::{OperationKind, Phase};

use crate::{
    explore::explore,
    world::{Faults, Mutation, Scenario, freeze, host},
};

/// Beyond this a scenario needs more memory than a small machine has.
const BOUND: usize = 8_000_000;

const NONE: Faults = Faults { crashes: 0, reboots: 0, kills: 0, cancels: 0, glitches: 0 };

fn migrate(to: usize) -> OperationKind {
    OperationKind::Migrate { to: host(to), post_copy: false }
}

fn post_copy(to: usize) -> OperationKind {
    OperationKind::Migrate { to: host(to), post_copy: true }
}

fn mirror(to: usize) -> OperationKind {
    OperationKind::Mirror { to: host(to) }
}

fn freeze_it(n: usize) -> OperationKind {
    OperationKind::Freeze { freeze: freeze(n) }
}

fn thaw(n: usize, to: usize) -> OperationKind {
    OperationKind::Thaw { freeze: freeze(n), to: host(to) }
}

fn start(to: usize) -> OperationKind {
    OperationKind::Start { to: host(to) }
}

fn restart(to: usize) -> OperationKind {
    OperationKind::RestartFromVolume { to: host(to) }
}

/// A guest that runs at host 0, and then.
fn of(name: &'static str, kinds: Vec<OperationKind>, faults: Faults) -> Scenario {
    Scenario {
        name,
        running: true,
        kinds,
        faults,
        writes: 1,
        forgetful: false,
        coarse: false,
        leased: false,
        mutation: None,
    }
}

/// With the effects of a step carried out at once.
fn coarse(scenario: Scenario) -> Scenario {
    Scenario { coarse: true, ..scenario }
}

/// With mirrors that are fenced by leases.
fn leased(scenario: Scenario) -> Scenario {
    coarse(Scenario { leased: true, ..scenario })
}

fn holds(scenario: Scenario) {
    let (name, start, faults) = (scenario.name, Instant::now(), scenario.faults);
    // After the switch only a dead host can make an operation fail; before it any fault rolls it back, but a stop goes on.
    let moves = scenario.kinds.iter().any(|kind| kind.destination().is_some());
    let may_fail = moves && faults.reboots + faults.kills > 0;
    let may_roll_back = scenario.kinds[0] != OperationKind::Stop || moves || faults.reboots > 0;
    let explored = explore(scenario, BOUND);
    if let Some(violation) = explored.violation {
        panic!("{violation}");
    }
    let (states, steps, settled) = (explored.states, explored.steps, explored.settled);
    println!("{name}: {states} states, {steps} steps, {settled} settled, {:.1?}", start.elapsed());
    let ends = &explored.ends;
    assert!(settled > 0 && ends.contains(&Phase::Done), "{name}: nothing is ever done: {ends:?}");
    assert_eq!(ends.contains(&Phase::Failed), may_fail, "{name}: {ends:?}");
    assert_eq!(ends.contains(&Phase::RolledBack), may_roll_back, "{name}: {ends:?}");
}

#[test]
fn migration_with_crashes_of_agents_and_a_cancel() {
    let faults = Faults { crashes: 2, cancels: 1, ..NONE };
    holds(of("migration, 2 crashes, cancel", vec![migrate(1)], faults));
}

#[test]
fn migration_with_copies_that_fail() {
    let faults = Faults { crashes: 1, glitches: 2, ..NONE };
    holds(of("migration, 2 glitches, crash", vec![migrate(1)], faults));
}

#[test]
fn migration_races_another_after_a_cancel() {
    let faults = Faults { crashes: 1, cancels: 1, ..NONE };
    let crash = of("two migrations, cancel, crash", vec![migrate(1), migrate(2)], faults);
    holds(coarse(Scenario { writes: 0, ..crash }));
    holds(of("two migrations, cancel", vec![migrate(1), migrate(2)], Faults { crashes: 0, ..faults }));
}

#[test]
fn migration_there_and_back() {
    let faults = Faults { cancels: 1, ..NONE };
    holds(coarse(of("there and back, cancel", vec![migrate(1), migrate(0)], faults)));
}

fn forgotten(name: &'static str, faults: Faults) -> Scenario {
    let scenario = coarse(of(name, vec![migrate(1), migrate(2)], faults));
    Scenario { forgetful: true, writes: 0, ..scenario }
}

#[test]
fn migration_of_a_guest_that_agents_forget() {
    holds(forgotten("two migrations, forgetful agents", NONE));
}

#[test]
#[ignore = "minutes and gigabytes: for soak runs"]
fn migration_of_a_guest_that_agents_forget_with_faults() {
    let glitch = Faults { glitches: 1, ..NONE };
    holds(forgotten("two migrations, glitch, forgetful agents", glitch));
    let cancel = Faults { cancels: 1, ..NONE };
    holds(forgotten("two migrations, cancel, forgetful agents", cancel));
}

#[test]
fn migration_with_a_restart_of_a_host() {
    let faults = Faults { reboots: 1, crashes: 1, ..NONE };
    holds(of("migration, reboot, crash", vec![migrate(1)], faults));
}

#[test]
fn migration_with_a_lost_host_and_a_restart_from_the_volume() {
    let faults = Faults { kills: 1, ..NONE };
    holds(of("migration, kill, restart", vec![migrate(1), restart(2)], faults));
}

#[test]
fn migration_with_a_restarted_host_and_a_restart_from_the_volume() {
    let faults = Faults { reboots: 1, ..NONE };
    holds(coarse(of("migration, reboot, restart at source", vec![migrate(1), restart(0)], faults)));
    holds(coarse(of("migration, reboot, restart at destination", vec![migrate(1), restart(1)], faults)));
    holds(coarse(of("migration, reboot, restart elsewhere", vec![migrate(1), restart(2)], faults)));
}

#[test]
fn post_copy_with_crashes_and_a_restart_of_a_host() {
    holds(of("post-copy, 2 crashes, cancel", vec![post_copy(1)], Faults { crashes: 2, cancels: 1, ..NONE }));
    holds(coarse(of("post-copy, kill, crash", vec![post_copy(1)], Faults { crashes: 1, kills: 1, ..NONE })));
    holds(of("post-copy, reboot, crash", vec![post_copy(1)], Faults { crashes: 1, reboots: 1, ..NONE }));
}

/// Explores a mirror's scenario: nothing is violated, and it ends in a fail-over as well as in being given up.
fn ends_both_ways(scenario: Scenario) {
    let name = scenario.name;
    let explored = explore(scenario, BOUND);
    if let Some(violation) = explored.violation {
        panic!("{violation}");
    }
    let (states, steps, settled) = (explored.states, explored.steps, explored.settled);
    println!("{name}: {states} states, {steps} steps, {settled} settled, ends {:?}", explored.ends);
    assert!(
        explored.ends.contains(&Phase::Done) && explored.ends.contains(&Phase::RolledBack),
        "{name}: {:?}",
        explored.ends
    );
}

#[test]
fn a_mirror_ends_or_goes_on_without_its_source() {
    // Without a lost source it is never more than ended.
    let explored = explore(
        coarse(of("mirror, crash, glitch", vec![mirror(1)], Faults { crashes: 1, glitches: 1, ..NONE })),
        BOUND,
    );
    assert!(explored.violation.is_none(), "{}", explored.violation.unwrap_or_default());
    assert!(!explored.ends.contains(&Phase::Done) && explored.ends.contains(&Phase::RolledBack), "{:?}", explored.ends);
    let kill = Faults { kills: 1, ..NONE };
    for scenario in [
        coarse(of("mirror, kill", vec![mirror(1)], kill)),
        coarse(of("mirror, 2 crashes, kill", vec![mirror(1)], Faults { crashes: 2, ..kill })),
        coarse(of("mirror, reboot", vec![mirror(1)], Faults { reboots: 1, ..NONE })),
        coarse(Scenario { writes: 0, ..of("mirror, kill, restart", vec![mirror(1), restart(2)], kill) }),
        coarse(Scenario { writes: 0, ..of("mirror, kill, mirror again", vec![mirror(1), mirror(2)], kill) }),
    ] {
        ends_both_ways(scenario);
    }
}

#[test]
fn a_leased_mirror_goes_on_by_itself_and_never_while_its_source_may_run() {
    let kill = Faults { kills: 1, ..NONE };
    for scenario in [
        // The source is only cut off: nobody dies, and messages come whenever they like.
        leased(of("leased mirror", vec![mirror(1)], NONE)),
        leased(of("leased mirror, cancel", vec![mirror(1)], Faults { cancels: 1, ..NONE })),
        leased(of("leased mirror, 2 crashes", vec![mirror(1)], Faults { crashes: 2, ..NONE })),
        leased(of("leased mirror, crash, kill", vec![mirror(1)], Faults { crashes: 1, ..kill })),
        leased(Scenario { writes: 0, ..of("leased mirror, mirror again", vec![mirror(1), mirror(2)], NONE) }),
    ] {
        ends_both_ways(scenario);
    }
}

#[test]
fn mutants_of_leases_are_caught() {
    let plain = || leased(of("leased mirror", vec![mirror(1)], NONE));
    caught(Mutation::FailsOverEarly, plain());
    caught(Mutation::ProcessRunsOn, plain());
    caught(Mutation::RestartForgets, plain());
    caught(Mutation::GrantsAfterDecision, plain());
    caught(Mutation::MirrorsBeforeLease, plain());
    let crash = Faults { crashes: 1, ..NONE };
    caught(Mutation::LeaseEndedEarly, leased(of("leased mirror, crash", vec![mirror(1)], crash)));
}

#[test]
fn freeze_thaws_once() {
    let faults = Faults { crashes: 1, cancels: 1, ..NONE };
    holds(of("freeze, thaw, thaw, crash, cancel", vec![freeze_it(0), thaw(0, 1), thaw(0, 2)], faults));
}

#[test]
fn freeze_with_failing_store_and_restarted_host() {
    let faults = Faults { crashes: 1, glitches: 1, reboots: 1, ..NONE };
    holds(of("freeze, crash, glitch, reboot", vec![freeze_it(0)], faults));
}

#[test]
fn first_start_with_crashes_and_cancel() {
    let faults = Faults { crashes: 2, cancels: 1, glitches: 1, ..NONE };
    holds(Scenario { running: false, ..of("start, 2 crashes, cancel, glitch", vec![start(0)], faults) });
}

#[test]
fn a_guest_that_is_lost_or_stopped_is_set_back_to_a_checkpoint() {
    let faults = Faults { kills: 1, ..NONE };
    holds(of("migration, kill, set back", vec![migrate(1), thaw(0, 2)], faults));
    let faults = Faults { crashes: 1, cancels: 1, ..NONE };
    holds(of("stop, set back elsewhere, crash, cancel", vec![OperationKind::Stop, thaw(0, 1)], faults));
}

#[test]
fn stop_and_start_again_here_and_elsewhere() {
    let faults = Faults { crashes: 1, cancels: 1, ..NONE };
    holds(of("stop, start here, crash, cancel", vec![OperationKind::Stop, start(0)], faults));
    holds(of("stop, start elsewhere, crash, cancel", vec![OperationKind::Stop, start(1)], faults));
    holds(of("stop, reboot", vec![OperationKind::Stop], Faults { crashes: 1, reboots: 1, ..NONE }));
}

fn caught(mutation: Mutation, scenario: Scenario) {
    let explored = explore(Scenario { mutation: Some(mutation), ..scenario }, BOUND);
    let violation = explored.violation.unwrap_or_else(|| panic!("{mutation:?} was not caught"));
    println!("{mutation:?} caught: {}", violation.lines().next().unwrap_or_default());
}

#[test]
fn mutants_are_caught() {
    let cancel = Faults { cancels: 1, ..NONE };
    let crash = Faults { crashes: 1, ..NONE };
    let two = || of("two migrations", vec![migrate(1), migrate(2)], cancel);
    caught(Mutation::NoEpochCheck, two());
    caught(Mutation::SwitchGrantedTwice, two());
    caught(Mutation::ResumesBeforeGrant, of("migration", vec![migrate(1)], NONE));
    caught(Mutation::SourceResumesByItself, of("migration", vec![migrate(1)], NONE));
    caught(Mutation::AbortDoesNotBlock, of("migration", vec![migrate(1)], cancel));
    caught(Mutation::FreezeThawsTwice, of("freeze", vec![freeze_it(0), thaw(0, 1), thaw(0, 2)], NONE));
    caught(Mutation::PersistsTooLate, of("migration", vec![migrate(1)], crash));
    caught(Mutation::AnswersBeforeWrite, of("migration", vec![migrate(1)], NONE));
    caught(Mutation::SourceReleasedAtSwitch, of("migration", vec![migrate(1)], NONE));
    let lost = Faults { kills: 1, crashes: 1, ..NONE };
    caught(Mutation::StandbyTakesOver, coarse(of("mirror", vec![mirror(1)], lost)));
    caught(Mutation::SpeaksTooEarly, coarse(of("mirror", vec![mirror(1)], lost)));
    caught(Mutation::StandbyForgotten, coarse(of("mirror", vec![mirror(1)], lost)));
    caught(Mutation::StandbyFromOlderCut, coarse(of("mirror", vec![mirror(1)], lost)));
    caught(Mutation::LostSourceNotTold, coarse(of("post-copy", vec![post_copy(1)], Faults { kills: 1, ..NONE })));
    caught(Mutation::MapsBeforeSeal, of("migration", vec![migrate(1)], NONE));
}
