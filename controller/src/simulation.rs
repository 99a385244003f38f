//! Policies tried on a market that is generated on the spot: the replay that `supercloud simulate` makes, within bounds that a
//! controller can afford.
//!
//! ## The market
//! Prices are those of [`recorded::sample`]. Where interruptions are asked for, capacity of each pool comes and goes: times up are
//! drawn from an exponential distribution with the mean that was asked for, times away evenly between ten minutes and two hours,
//! both for some series that pools then follow as they would follow recorded ones ([`CapacityRuns`]).

use supercloud_api::{SimulatedKind, SimulatedOutcome, SimulatedPolicy, Simulation, SimulationCreate};
use supercloud_feed::recorded;
use supercloud_scheduler::{
    money::NanoUsd,
    policy::{Cheapest, Greedy, OnDemand, Policy, SmartSpot},
    price::CheapestWithHysteresis,
    sim::{
        self, Grid, Outcome, Settings,
        fleet::Fleet,
        hazard::{CapacityRuns, Runs, SplitMix},
    },
};

const HOUR_MS: u64 = 3_600_000;
const DAY_MS: u64 = 24 * HOUR_MS;
const TICK_MS: u64 = 300_000;
/// The generated trace has 60 days, of which the first shows what prices there are.
const MOST_DAYS: u32 = 58;
const DEFAULT_DAYS: u32 = 28;
const DEFAULT_SEED: u64 = 12;
const DEFAULT_NOTICE_S: u32 = 120;
/// Drawn series of capacity that pools follow, and runs in each.
const SERIES: usize = 6;
const RUNS: usize = 64;

/// Why nothing can be simulated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SimulationError {
    /// The request asks for what is not there.
    #[error("{0}")]
    Request(String),
    /// It was given up: it took too long, or nobody waits for it any more.
    #[error("the simulation took too long and was given up; ask for fewer days")]
    GivenUp,
    /// What ships does not fit together.
    #[error("the market cannot be generated: {0}")]
    Market(String),
}

fn wrong(what: impl Into<String>) -> SimulationError {
    SimulationError::Request(what.into())
}

/// A request that can be carried out.
pub struct Trial {
    policies: Vec<(String, Box<dyn Policy>)>,
    days: u32,
    seed: u64,
    interruption_hours: Option<u32>,
    notice_ms: u64,
}

impl std::fmt::Debug for Trial {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Trial").field("days", &self.days).field("seed", &self.seed).finish_non_exhaustive()
    }
}

fn policy(wanted: &SimulatedPolicy) -> Result<(String, Box<dyn Policy>), SimulationError> {
    let SimulatedPolicy {
        kind,
        min_saving_permille,
        horizon_ms,
        cool_down_ms,
        settle_ms,
        max_pool_permille,
        guests_per_spare,
    } = *wanted;
    let has_common =
        min_saving_permille.is_some() || horizon_ms.is_some() || cool_down_ms.is_some() || settle_ms.is_some();
    let has_pools = max_pool_permille.is_some() || guests_per_spare.is_some();
    Ok(match kind {
        SimulatedKind::SmartSpot | SimulatedKind::SmartSpotSpares => {
            let (name, base) = match kind {
                SimulatedKind::SmartSpot => ("smart-spot", SmartSpot::default()),
                _ => ("smart-spot-spares", SmartSpot::with_spares()),
            };
            let policy = SmartSpot {
                min_saving_permille: min_saving_permille.unwrap_or(base.min_saving_permille),
                horizon_ms: horizon_ms.unwrap_or(base.horizon_ms),
                cool_down_ms: cool_down_ms.unwrap_or(base.cool_down_ms),
                settle_ms: settle_ms.unwrap_or(base.settle_ms),
                max_pool_permille: max_pool_permille.unwrap_or(base.max_pool_permille),
                guests_per_spare: guests_per_spare.unwrap_or(base.guests_per_spare),
                ..base
            };
            policy.check().map_err(|what| wrong(format!("{name}: {what}")))?;
            (name.to_owned(), Box::new(policy))
        }
        SimulatedKind::Cheapest if !has_pools => {
            let base = CheapestWithHysteresis::default();
            let policy = CheapestWithHysteresis {
                min_saving_permille: min_saving_permille.unwrap_or(base.min_saving_permille),
                horizon_ms: horizon_ms.unwrap_or(base.horizon_ms),
                cool_down_ms: cool_down_ms.unwrap_or(base.cool_down_ms),
                settle_ms: settle_ms.unwrap_or(base.settle_ms),
            };
            policy.check().map_err(|what| wrong(format!("cheapest: {what}")))?;
            ("cheapest".to_owned(), Box::new(Cheapest(policy)))
        }
        SimulatedKind::Cheapest => return Err(wrong("cheapest has no max_pool_permille and no guests_per_spare")),
        SimulatedKind::Greedy if !has_common && !has_pools => ("greedy".to_owned(), Box::new(Greedy)),
        SimulatedKind::Greedy => return Err(wrong("greedy has no settings")),
    })
}

impl Trial {
    /// Looks at a request.
    ///
    /// # Errors
    /// [`SimulationError::Request`].
    pub fn of(wanted: &SimulationCreate) -> Result<Self, SimulationError> {
        if !(1..=2).contains(&wanted.policies.len()) {
            return Err(wrong(format!("{} policies are named; it must be one or two", wanted.policies.len())));
        }
        let days = wanted.days.unwrap_or(DEFAULT_DAYS);
        if !(1..=MOST_DAYS).contains(&days) {
            return Err(wrong(format!("days is {days}; it must be 1 to {MOST_DAYS}")));
        }
        if let Some(hours) = wanted.interruption_hours.filter(|hours| !(1..=1000).contains(hours)) {
            return Err(wrong(format!("interruption_hours is {hours}; it must be 1 to 1000")));
        }
        let notice_s = wanted.notice_s.unwrap_or(DEFAULT_NOTICE_S);
        if notice_s > 3600 {
            return Err(wrong(format!("notice_s is {notice_s}; it must be at most 3600")));
        }
        Ok(Self {
            policies: wanted.policies.iter().map(policy).collect::<Result<_, _>>()?,
            days,
            seed: wanted.seed.unwrap_or(DEFAULT_SEED),
            interruption_hours: wanted.interruption_hours,
            notice_ms: u64::from(notice_s) * 1000,
        })
    }

    fn grid(&self) -> Result<Grid, SimulationError> {
        let market = |error: &dyn std::error::Error| SimulationError::Market(crate::chain(error));
        let types = recorded::catalogue(recorded::CATALOGUE).map_err(|error| market(&error))?;
        let trace = recorded::sample(&types, self.seed);
        let (first, _) = trace.span().ok_or_else(|| SimulationError::Market("it has no prices".into()))?;
        let span = (first + DAY_MS, first + DAY_MS + u64::from(self.days) * DAY_MS);
        let runs = self.interruption_hours.map(|hours| capacity(hours, self.seed));
        Grid::new(&trace, span, TICK_MS, 10_000, runs.as_ref().map(|runs| (runs, self.seed)))
            .map_err(|error| market(&error))
    }

    /// Replays, for as long as `goes_on` says so; it is asked at every simulated day. Takes all of a core for some seconds.
    ///
    /// # Errors
    /// [`SimulationError::GivenUp`], [`SimulationError::Market`].
    pub fn run(&self, goes_on: impl Fn() -> bool) -> Result<Simulation, SimulationError> {
        let fleet = Fleet::default();
        let guests = fleet.guests();
        let grid = self.grid()?;
        let settings = Settings {
            notice_ms: self.notice_ms,
            restart_ms: fleet.restart_s * 1000,
            host_reserve_bytes: fleet.host_reserve_mib << 20,
        };
        let play = |name: &str, policy: &dyn Policy| {
            let outcome = sim::run_while(&grid, &guests, &settings, policy, |_| goes_on());
            outcome.map(|outcome| told(name, &grid, &outcome)).ok_or(SimulationError::GivenUp)
        };
        let outcomes = self.policies.iter().map(|(name, policy)| play(name, policy.as_ref()));
        let mut notes = vec![
            "Prices are generated: they swing about a mean by the hour of the day, with noise. No recorded market is behind them.".to_owned(),
        ];
        notes.push(match self.interruption_hours {
            Some(hours) => format!(
                "Interruptions are drawn: each pool is taken once in {hours} hours on average, and is back after ten minutes to two hours."
            ),
            None => "No host is ever taken: what a policy does for availability costs here and brings nothing.".to_owned(),
        });
        Ok(Simulation {
            guests: u32::try_from(guests.len()).unwrap_or(u32::MAX),
            spot_markets: u32::try_from(grid.markets.iter().filter(|market| !market.is_on_demand()).count())
                .unwrap_or(u32::MAX),
            hours: grid.length_ms() / HOUR_MS,
            seed: self.seed,
            outcomes: outcomes.collect::<Result<_, _>>()?,
            on_demand: play("on-demand", &OnDemand)?,
            notes,
        })
    }
}

/// Times for which pools are there and away: see the module.
fn capacity(mean_hours: u32, seed: u64) -> CapacityRuns {
    let mut random = SplitMix(seed ^ 0x00ca_9ac1_7700);
    let mut series = || {
        let mut runs = Runs::default();
        for _ in 0..RUNS {
            // Above 0 and at most 1.
            let part = (random.below(1 << 24) + 1) as f64 / f64::from(1 << 24);
            let up = -part.ln() * f64::from(mean_hours) * HOUR_MS as f64;
            runs.up_ms.push((up as u64).max(TICK_MS));
            runs.down_ms.push(600_000 + random.below(6_600_000) as u64);
        }
        runs
    };
    CapacityRuns { series: (0..SERIES).map(|_| series()).collect() }
}

fn told(name: &str, grid: &Grid, outcome: &Outcome) -> SimulatedOutcome {
    let days = grid.length_ms().div_ceil(DAY_MS) as usize;
    let mut by_day = vec![NanoUsd(0); days];
    for line in &outcome.ledger.lines {
        let day = (line.at_ms.saturating_sub(grid.start_ms) / DAY_MS) as usize;
        if let Some(sum) = by_day.get_mut(day.min(days.saturating_sub(1))) {
            *sum = *sum + line.paid;
        }
    }
    let running = by_day.iter().scan(0u64, |sum, paid| {
        *sum = sum.saturating_add(paid.0);
        Some(*sum)
    });
    SimulatedOutcome {
        policy: name.to_owned(),
        paid_nanousd: outcome.cost().0,
        paid_by_day_nanousd: running.collect(),
        availability: grid.has_interruptions.then(|| outcome.availability()),
        interruptions: outcome.interruptions,
        missed: outcome.missed,
        moves: outcome.moves,
        changes_by_reason: outcome.reasons.iter().map(|(why, count)| (why.to_string(), *count)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn plain(kind: SimulatedKind) -> SimulatedPolicy {
        SimulatedPolicy {
            kind,
            min_saving_permille: None,
            horizon_ms: None,
            cool_down_ms: None,
            settle_ms: None,
            max_pool_permille: None,
            guests_per_spare: None,
        }
    }

    fn wanted(policies: &[SimulatedPolicy]) -> SimulationCreate {
        SimulationCreate {
            policies: policies.to_vec(),
            days: Some(2),
            seed: None,
            interruption_hours: Some(6),
            notice_s: None,
        }
    }

    #[test]
    fn two_policies_meet_the_same_market_and_the_same_request_has_the_same_answer() {
        let request = wanted(&[plain(SimulatedKind::SmartSpot), plain(SimulatedKind::Greedy)]);
        let first = Trial::of(&request).unwrap().run(|| true).unwrap();
        assert_eq!(first, Trial::of(&request).unwrap().run(|| true).unwrap());
        assert_eq!((first.guests, first.hours, first.outcomes.len()), (56, 48, 2));
        let [smart, greedy] = &first.outcomes[..] else { panic!("{first:?}") };
        assert_eq!((smart.policy.as_str(), greedy.policy.as_str()), ("smart-spot", "greedy"));
        assert!(smart.interruptions > 0 && smart.availability.unwrap() < 1.0, "pools are taken every six hours");
        assert_eq!((first.on_demand.interruptions, first.on_demand.availability), (0, Some(1.0)));
        for one in first.outcomes.iter().chain([&first.on_demand]) {
            assert_eq!(one.paid_by_day_nanousd.len(), 2);
            assert_eq!(one.paid_by_day_nanousd.last(), Some(&one.paid_nanousd));
        }
        assert!(smart.paid_nanousd < first.on_demand.paid_nanousd);
        let calm = SimulationCreate { interruption_hours: None, ..request };
        let calm = Trial::of(&calm).unwrap().run(|| true).unwrap();
        assert_eq!((calm.outcomes[0].availability, calm.outcomes[0].interruptions), (None, 0));
    }

    #[test]
    fn settings_are_the_policys_own() {
        let eager = SimulatedPolicy {
            min_saving_permille: Some(1),
            cool_down_ms: Some(0),
            settle_ms: Some(0),
            ..plain(SimulatedKind::Cheapest)
        };
        let found = Trial::of(&wanted(&[plain(SimulatedKind::Cheapest), eager])).unwrap().run(|| true).unwrap();
        // Who moves for every saving pays less here: a move costs little beside a day's rent.
        assert!(found.outcomes[1].paid_nanousd < found.outcomes[0].paid_nanousd, "{found:?}");
    }

    #[test]
    fn it_ends_when_nobody_waits_any_more() {
        let asked = Cell::new(0);
        let goes_on = || {
            asked.set(asked.get() + 1);
            asked.get() < 2
        };
        let trial = Trial::of(&wanted(&[plain(SimulatedKind::Cheapest)])).unwrap();
        assert_eq!(trial.run(goes_on), Err(SimulationError::GivenUp));
        assert_eq!(asked.get(), 2);
    }

    #[test]
    fn what_is_out_of_bounds_is_refused() {
        let good = wanted(&[plain(SimulatedKind::Greedy)]);
        let refused = [
            SimulationCreate { policies: vec![], ..good.clone() },
            SimulationCreate { policies: vec![plain(SimulatedKind::Greedy); 3], ..good.clone() },
            SimulationCreate { days: Some(0), ..good.clone() },
            SimulationCreate { days: Some(59), ..good.clone() },
            SimulationCreate { interruption_hours: Some(0), ..good.clone() },
            SimulationCreate { notice_s: Some(3601), ..good.clone() },
            wanted(&[SimulatedPolicy { horizon_ms: Some(1), ..plain(SimulatedKind::Greedy) }]),
            wanted(&[SimulatedPolicy { guests_per_spare: Some(1), ..plain(SimulatedKind::Cheapest) }]),
            wanted(&[SimulatedPolicy { horizon_ms: Some(0), ..plain(SimulatedKind::SmartSpot) }]),
        ];
        for request in refused {
            assert!(matches!(Trial::of(&request), Err(SimulationError::Request(_))), "{request:?}");
        }
    }
}
