use proptest::prelude::*;

use super::*;

const HOUR_MS: u64 = 3_600_000;

fn pool(is_open: &[bool]) -> Pool<'_> {
    Pool { is_open, spot: NanoUsd(3), on_demand: NanoUsd(10), tick_ms: HOUR_MS }
}

fn policies() -> [Box<dyn DeadlinePolicy>; 4] {
    [Box::new(OnDemandOnly), Box::new(LatestStart), Box::new(UniformProgress), Box::new(Deadline::default())]
}

#[test]
fn a_pool_that_is_always_there_is_used_alone() {
    let open = [true; 20];
    let job = Job { work: 10, window: 20, change: 1 };
    for policy in &policies()[1..] {
        let outcome = run(job, &pool(&open), policy.as_ref());
        assert_eq!((outcome.paid, outcome.is_in_time, outcome.changes), (NanoUsd(33), true, 1), "{}", policy.name());
    }
    assert_eq!(optimum(job, &pool(&open)), Some(NanoUsd(33)));
    assert_eq!(run(job, &pool(&open), &OnDemandOnly).paid, NanoUsd(110));
}

#[test]
fn a_pool_that_never_comes_costs_on_demand_and_is_in_time() {
    let job = Job { work: 10, window: 14, change: 2 };
    for policy in policies() {
        let outcome = run(job, &pool(&[]), policy.as_ref());
        assert_eq!((outcome.paid, outcome.is_in_time), (NanoUsd(120), true), "{}", policy.name());
    }
    assert_eq!(optimum(job, &pool(&[])), Some(NanoUsd(120)));
    let impossible = Job { window: 11, ..job };
    assert!(!impossible.is_possible() && optimum(impossible, &pool(&[])).is_none());
    assert!(!run(impossible, &pool(&[]), &Deadline::default()).is_in_time, "it is done all the same, late");
}

#[test]
fn ours_goes_back_to_spot_where_a_latest_start_stays_on_on_demand() {
    // Nothing for long, then spot to the end: the slack is used up by then but for the reserve.
    let open: Vec<bool> = (0..40).map(|tick| tick >= 20).collect();
    let job = Job { work: 24, window: 40, change: 1 };
    let little = Deadline { reserved_changes: 2, reserved_percent: 0, ..Deadline::default() };
    let (ours, latest) = (run(job, &pool(&open), &little), run(job, &pool(&open), &LatestStart));
    assert!(ours.is_in_time && latest.is_in_time);
    assert!(ours.on_spot > 15 && latest.on_spot == 0, "{ours:?} {latest:?}");
    assert!(ours.paid < latest.paid);
}

#[test]
fn recordings_become_ticks_that_are_open_all_the_time() {
    assert_eq!(on_ticks(&[], 10), Vec::<bool>::new());
    let points = [(5, true), (24, false), (26, true), (45, false), (65, true), (69, true)];
    // 5-15 is open; 15-25 and 25-35 lack a moment each; 45-55 and 55-65 are away.
    assert_eq!(on_ticks(&points, 10), [true, false, false, true, false, false]);
    let trial = Trial { job: Job { work: 1, window: 2, change: 0 }, every: 2, spot_permille: 300, tick_ms: HOUR_MS };
    let recordings = [on_ticks(&points, 10), vec![true]];
    let tally = trial.run(&recordings, &Deadline { reserved_changes: 0, ..Deadline::default() });
    assert_eq!((tally.jobs, tally.missed, tally.on_spot, tally.on_demand), (3, 0, 2, 1));
    assert_eq!(trial.optimum(&recordings), Some(tally.paid));
    assert_eq!(tally.paid, NanoUsd(1_600_000_000));
}

/// The least cost by trying every way.
fn every_way(job: Job, pool: &Pool<'_>, tick: usize, at: At, changing: usize, left: usize) -> Option<u64> {
    if left == 0 {
        return Some(0);
    }
    if tick == job.window {
        return None;
    }
    let is_open = pool.is_open.get(tick).copied().unwrap_or(false);
    let (at, changing) = if at == At::Spot && !is_open { (At::Nowhere, 0) } else { (at, changing) };
    let ways = [At::Nowhere, At::Spot, At::OnDemand].into_iter().filter(|to| *to != At::Spot || is_open);
    ways.filter_map(|to| {
        let before = if to == at { changing } else { job.change };
        let price = match to {
            At::Nowhere => 0,
            At::Spot => pool.spot.0,
            At::OnDemand => pool.on_demand.0,
        };
        let (changing, left) = match (to, before.checked_sub(1)) {
            (At::Nowhere, _) => (0, left),
            (_, Some(less)) => (less, left),
            (_, None) => (0, left - 1),
        };
        Some(price + every_way(job, pool, tick + 1, to, changing, left)?)
    })
    .min()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever capacity does, a job that is possible is in time, and nobody pays less than the optimum.
    #[test]
    fn no_deadline_that_can_be_kept_is_missed(
        open in prop::collection::vec(any::<bool>(), 0..120), work in 1usize..60, more in 0usize..60, change in 0usize..5,
        reserved_changes in 0usize..6, reserved_percent in 0usize..500,
    ) {
        let job = Job { work, window: work + change + more, change };
        let pool = pool(&open);
        let least = optimum(job, &pool).unwrap();
        let ours: Box<dyn DeadlinePolicy> = Box::new(Deadline { reserved_changes, reserved_percent, ..Deadline::default() });
        for policy in policies().into_iter().chain([ours]) {
            let outcome = run(job, &pool, policy.as_ref());
            prop_assert!(outcome.is_in_time, "{}: {outcome:?}", policy.name());
            prop_assert!(outcome.paid >= least, "{} pays {} of {least}", policy.name(), outcome.paid);
        }
    }

    /// The dynamic programming finds what trying every way finds.
    #[test]
    fn the_optimum_is_the_least_of_all_ways(
        open in prop::collection::vec(any::<bool>(), 0..9), work in 1usize..5, window in 1usize..9, change in 0usize..3,
    ) {
        let job = Job { work, window, change };
        let all = every_way(job, &pool(&open), 0, At::Nowhere, 0, work);
        prop_assert_eq!(optimum(job, &pool(&open)).map(|paid| paid.0), all);
    }
}
