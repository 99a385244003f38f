//! Work with a deadline: so many hours of work that must be done by then, at least cost, on a host that the provider may take.
//!
//! The question is that of "Can't Be Late: Optimizing Spot Instance Savings under Deadlines" (NSDI 2024): spot is cheap and comes and
//! goes, on-demand is dear and always there, and each change of hosts costs time in which nothing is done. What was done is never
//! lost: a notice is enough to keep it. Time is in ticks; whatever a policy says, a **safety net** takes the job to on-demand while that
//! can still be in time, so a window that is long enough is never missed.

use serde::{Deserialize, Serialize};

use crate::money::NanoUsd;

mod optimum;
#[cfg(test)]
mod tests;

pub use optimum::optimum;

/// A job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    /// Work, in ticks on a host that is ready.
    pub work: usize,
    /// Ticks until the deadline.
    pub window: usize,
    /// Ticks from renting a host until the job goes on there; paid for.
    pub change: usize,
}

impl Job {
    /// Begun at once on on-demand it is done in time.
    #[must_use]
    pub const fn is_possible(&self) -> bool {
        self.work + self.change <= self.window
    }
}

/// Prices and capacity over a job's window.
#[derive(Debug, Clone, Copy)]
pub struct Pool<'a> {
    /// Whether spot capacity is there, tick by tick.
    pub is_open: &'a [bool],
    /// Spot, per hour.
    pub spot: NanoUsd,
    /// On-demand, per hour.
    pub on_demand: NanoUsd,
    /// The length of a tick, in milliseconds.
    pub tick_ms: u64,
}

/// Where a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum At {
    /// Nowhere: its state is kept, nothing is paid.
    Nowhere,
    /// On a spot host.
    Spot,
    /// On an on-demand host.
    OnDemand,
}

/// What a policy sees at the start of a tick.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct View {
    /// Where the job is now: nowhere, if its host was just taken.
    pub at: At,
    /// Ticks that the host which it is on still takes to be ready.
    pub changing: usize,
    /// The job.
    pub job: Job,
    /// Work left.
    pub left_work: usize,
    /// Ticks left.
    pub left_window: usize,
    /// Spot capacity is there now.
    pub is_open: bool,
    /// Spot, per hour.
    pub spot: NanoUsd,
    /// On-demand, per hour.
    pub on_demand: NanoUsd,
    /// How long spot capacity stayed on the average, as far as it was seen in this pool; in ticks.
    pub mean_up: Option<f64>,
}

impl View {
    /// Ticks that may be lost.
    #[must_use]
    pub const fn slack(&self) -> usize {
        self.left_window.saturating_sub(self.left_work)
    }

    /// After a tick of this, and whatever happens to spot then, on-demand is still in time.
    #[must_use]
    pub const fn is_safe(&self, to: At) -> bool {
        let change = self.job.change;
        match to {
            At::OnDemand => true,
            At::Nowhere => self.slack() > change,
            At::Spot => match self.at {
                At::Spot if self.changing == 0 => self.slack() >= change,
                At::Spot => self.slack() > change,
                // It may be taken when it is just ready.
                At::Nowhere | At::OnDemand => self.slack() >= 2 * change,
            },
        }
    }
}

/// A policy for work with a deadline.
pub trait DeadlinePolicy {
    /// Its name.
    fn name(&self) -> &'static str;
    /// Where the job is to be in this tick. Spot that is not there means nowhere.
    fn place(&self, view: &View) -> At;
}

/// Always on-demand.
#[derive(Debug, Clone, Copy, Default)]
pub struct OnDemandOnly;

/// Spot while it is there, else nothing, until the safety net takes it: then on-demand to the end.
#[derive(Debug, Clone, Copy, Default)]
pub struct LatestStart;

/// Uniform progress (NSDI 2024): on-demand whenever the work lags behind a straight line from start to deadline, until it is two
/// changes ahead of it; spot while it is there.
#[derive(Debug, Clone, Copy, Default)]
pub struct UniformProgress;

/// Ours: waits while more slack is left than a reserve for the changes that are to be expected, then works on on-demand, and goes back to
/// spot whenever that is there, in time, and expected to stay for longer than the change costs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Deadline {
    /// Changes for which slack is kept back, besides the one of the safety net.
    pub reserved_changes: usize,
    /// The same, for every hundred stays on spot that the work that is left would take.
    pub reserved_percent: usize,
    /// How long spot capacity is expected to stay before any was seen to go, in ticks.
    pub assumed_up: f64,
}

impl Default for Deadline {
    fn default() -> Self {
        Self { reserved_changes: 8, reserved_percent: 100, assumed_up: 12.0 }
    }
}

impl DeadlinePolicy for OnDemandOnly {
    fn name(&self) -> &'static str {
        "on-demand"
    }
    fn place(&self, _: &View) -> At {
        At::OnDemand
    }
}

impl DeadlinePolicy for LatestStart {
    fn name(&self) -> &'static str {
        "latest-start"
    }
    fn place(&self, view: &View) -> At {
        match view.at {
            At::OnDemand => At::OnDemand,
            _ if view.is_open => At::Spot,
            _ => At::Nowhere,
        }
    }
}

impl DeadlinePolicy for UniformProgress {
    fn name(&self) -> &'static str {
        "uniform-progress"
    }
    fn place(&self, view: &View) -> At {
        let Job { work, window, change } = view.job;
        let (done, elapsed) = (work - view.left_work, window - view.left_window);
        // done >= elapsed * work / window, without a division.
        let is_ahead_at = |elapsed: usize| done * window >= elapsed * work;
        match view.at {
            At::OnDemand if !is_ahead_at(elapsed + 2 * change) => At::OnDemand,
            _ if view.is_open => At::Spot,
            _ if is_ahead_at(elapsed) => At::Nowhere,
            _ => At::OnDemand,
        }
    }
}

impl DeadlinePolicy for Deadline {
    fn name(&self) -> &'static str {
        "deadline"
    }
    fn place(&self, view: &View) -> At {
        let stays = view.mean_up.unwrap_or(self.assumed_up);
        // On spot the work of its stay, less the change, is cheaper by the difference; the change itself is paid.
        let saves = stays - view.job.change as f64;
        let gain = saves * (view.on_demand.0.saturating_sub(view.spot.0)) as f64;
        let is_worth = gain > view.job.change as f64 * view.on_demand.0 as f64;
        let to_come = (view.left_work as f64 / stays.max(1.0)) as usize * self.reserved_percent / 100;
        let reserve = view.job.change * (1 + self.reserved_changes + to_come);
        match view.at {
            At::Spot if view.is_open => At::Spot,
            At::Nowhere if view.is_open && saves > 0.0 => At::Spot,
            At::OnDemand if view.is_open && is_worth => At::Spot,
            At::OnDemand => At::OnDemand,
            At::Nowhere | At::Spot if view.slack() <= reserve => At::OnDemand,
            At::Nowhere | At::Spot => At::Nowhere,
        }
    }
}

/// Many jobs over recorded capacity: where they begin, and what spot costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trial {
    /// Each job.
    pub job: Job,
    /// Ticks from the begin of one job to that of the next.
    pub every: usize,
    /// Spot, in thousandths of on-demand: recordings of capacity have no prices.
    pub spot_permille: u32,
    /// The length of a tick, in milliseconds.
    pub tick_ms: u64,
}

/// What came of many jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Jobs.
    pub jobs: u64,
    /// What was paid.
    pub paid: NanoUsd,
    /// Jobs that were late.
    pub missed: u64,
    /// Ticks on spot.
    pub on_spot: u64,
    /// Ticks on on-demand.
    pub on_demand: u64,
    /// Hosts that were rented.
    pub changes: u64,
}

impl Trial {
    /// The pools of the jobs that fit into a recording, tick by tick: one for each begin.
    fn windows<'a>(&self, is_open: &'a [bool]) -> impl Iterator<Item = Pool<'a>> {
        let on_demand = NanoUsd(1_000_000_000);
        let (spot, tick_ms) = (NanoUsd(u64::from(self.spot_permille) * 1_000_000), self.tick_ms);
        let windows = is_open.windows(self.job.window.max(1)).step_by(self.every.max(1));
        windows.map(move |is_open| Pool { is_open, spot, on_demand, tick_ms })
    }

    /// Runs a policy over recordings.
    #[must_use]
    pub fn run(&self, recordings: &[Vec<bool>], policy: &dyn DeadlinePolicy) -> Tally {
        let mut tally = Tally::default();
        for pool in recordings.iter().flat_map(|recording| self.windows(recording)) {
            let outcome = run(self.job, &pool, policy);
            tally.jobs += 1;
            tally.paid = tally.paid + outcome.paid;
            tally.missed += u64::from(!outcome.is_in_time);
            tally.on_spot += outcome.on_spot as u64;
            tally.on_demand += outcome.on_demand as u64;
            tally.changes += outcome.changes as u64;
        }
        tally
    }

    /// The least that all jobs can cost; `None` when one cannot be in time.
    #[must_use]
    pub fn optimum(&self, recordings: &[Vec<bool>]) -> Option<NanoUsd> {
        let pools = recordings.iter().flat_map(|recording| self.windows(recording));
        pools.map(|pool| optimum(self.job, &pool)).try_fold(NanoUsd(0), |sum, one| Some(sum + one?))
    }
}

/// A recording of steps `(time in ms, is there)` on ticks; its last step closes it. Capacity is there in a tick if it is so all of it.
#[must_use]
pub fn on_ticks(points: &[(u64, bool)], tick_ms: u64) -> Vec<bool> {
    let (Some((first, _)), Some((last, _))) = (points.first(), points.last()) else { return Vec::new() };
    let ticks = usize::try_from(last.saturating_sub(*first) / tick_ms.max(1)).unwrap_or(0);
    let mut is_open = vec![true; ticks];
    for pair in points.windows(2).filter(|pair| !pair[0].1) {
        let tick_of = |ms: u64| usize::try_from(ms.saturating_sub(*first) / tick_ms.max(1)).unwrap_or(usize::MAX);
        if pair[1].0 > pair[0].0 {
            let (from, to) = (tick_of(pair[0].0), tick_of(pair[1].0 - 1).saturating_add(1).min(ticks));
            is_open.get_mut(from..to.max(from)).into_iter().flatten().for_each(|open| *open = false);
        }
    }
    is_open
}

/// What came of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobOutcome {
    /// What was paid.
    pub paid: NanoUsd,
    /// It was done in time.
    pub is_in_time: bool,
    /// Ticks on spot.
    pub on_spot: usize,
    /// Ticks on on-demand.
    pub on_demand: usize,
    /// Hosts that were rented.
    pub changes: usize,
}

/// Runs a job from the start of a pool's time. Past its deadline, or the pool's end, it goes on on on-demand until it is done.
#[must_use]
pub fn run(job: Job, pool: &Pool<'_>, policy: &dyn DeadlinePolicy) -> JobOutcome {
    let mut outcome = JobOutcome { paid: NanoUsd(0), is_in_time: false, on_spot: 0, on_demand: 0, changes: 0 };
    let (mut at, mut changing, mut left_work) = (At::Nowhere, 0_usize, job.work);
    let (mut seen_up, mut seen_ends, mut was_open) = (0_usize, 0_usize, false);
    let mut tick = 0;
    while left_work > 0 {
        let is_open = pool.is_open.get(tick).copied().unwrap_or(false);
        seen_ends += usize::from(was_open && !is_open);
        if at == At::Spot && !is_open {
            (at, changing) = (At::Nowhere, 0);
        }
        let view = View {
            at,
            changing,
            job,
            left_work,
            left_window: job.window.saturating_sub(tick),
            is_open,
            spot: pool.spot,
            on_demand: pool.on_demand,
            mean_up: (seen_ends > 0).then(|| seen_up as f64 / seen_ends as f64),
        };
        let wanted = match policy.place(&view) {
            At::Spot if !is_open => At::Nowhere,
            wanted => wanted,
        };
        let to = if tick < job.window && view.is_safe(wanted) { wanted } else { At::OnDemand };
        if to != at {
            changing = if to == At::Nowhere { 0 } else { job.change };
            outcome.changes += usize::from(to != At::Nowhere);
            at = to;
        }
        match at {
            At::Nowhere => {}
            At::Spot => {
                outcome.on_spot += 1;
                outcome.paid = outcome.paid + pool.spot.per_hour_for(pool.tick_ms);
            }
            At::OnDemand => {
                outcome.on_demand += 1;
                outcome.paid = outcome.paid + pool.on_demand.per_hour_for(pool.tick_ms);
            }
        }
        match changing.checked_sub(1) {
            Some(less) => changing = less,
            None => left_work -= usize::from(at != At::Nowhere),
        }
        seen_up += usize::from(is_open);
        was_open = is_open;
        tick += 1;
    }
    outcome.is_in_time = tick <= job.window;
    outcome
}
