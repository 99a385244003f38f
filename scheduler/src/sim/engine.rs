//! The replay itself: one policy, one fleet, one grid.

use std::{collections::BTreeMap, collections::HashMap};

use super::{Grid, Ledger, Line, LineKind, ledger::Lease, spares::Spare};
use crate::{
    evacuable::{self, Exit},
    interruptions::Learner,
    market::{End, HOUR_MS, Regime},
    money::NanoUsd,
    policy::{self, Action, Facts, Guest, MarketId, Place, Policy, View, Why},
    price::Quote,
};

/// What holds for a whole replay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// How long before it takes a host the provider says so, in milliseconds.
    pub notice_ms: u64,
    /// From a host that is ready to a guest that serves, when it has to boot, in milliseconds.
    pub restart_ms: u64,
    /// Memory that a host keeps for itself.
    pub host_reserve_bytes: u64,
}

/// What came of a replay.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// The policy's name.
    pub policy: String,
    /// Every payment.
    pub ledger: Ledger,
    /// Time that guests were asked to run, summed over the fleet.
    pub guest_ms: u64,
    /// Time that they did not.
    pub downtime_ms: u64,
    /// How often a guest's host was taken.
    pub interruptions: u64,
    /// How often a guest had not left in time: what was in its memory is lost.
    pub missed: u64,
    /// The most guests whose hosts were taken at one moment.
    pub most_at_once: u64,
    /// Moves that the policy wanted by itself.
    pub moves: u64,
    /// How often each reason led to a change of hosts.
    pub reasons: BTreeMap<Why, u64>,
    /// Guests for which no market of the trace is large enough.
    pub unplaceable: u64,
}

impl Outcome {
    /// What was paid.
    #[must_use]
    pub fn cost(&self) -> NanoUsd {
        self.ledger.total()
    }

    /// The share of guest time that was served.
    #[must_use]
    pub fn availability(&self) -> f64 {
        if self.guest_ms == 0 { 1.0 } else { 1.0 - self.downtime_ms.min(self.guest_ms) as f64 / self.guest_ms as f64 }
    }
}

/// What is believed of a pool before anything was seen: one interruption in so many hours.
const PRIOR_HOURS: u32 = 24;

/// A guest in the replay.
struct State<'a> {
    guest: &'a Guest,
    class: usize,
    lease: Option<Lease>,
    zone: Option<u32>,
    first: Option<MarketId>,
    last_move_ms: Option<u64>,
    has_checkpoints: bool,
}

/// Guests that fit the same markets see the same quotes.
pub(super) struct Class {
    pub fits: Vec<bool>,
    pub quotes: Vec<Quote<MarketId>>,
}

pub(super) struct Replay<'a> {
    pub grid: &'a Grid,
    pub settings: &'a Settings,
    pub policy: &'a dyn Policy,
    pub facts: Vec<Facts>,
    pub crowd: Vec<u32>,
    pub spares: Vec<Spare>,
    since_ms: Vec<u64>,
    fleet: u32,
    learner: Learner,
    /// For each market how many guests, in thousandths, are expected to lose their hosts with it; only for policies that ask.
    shared: Vec<u64>,
    out: Outcome,
}

/// Where a lease is at a time, as a policy sees it.
pub(super) fn lease_place(
    grid: &Grid,
    lease: Lease,
    zone: Option<u32>,
    last_move_ms: Option<u64>,
    now_ms: u64,
) -> Place {
    let into_hour = (now_ms - lease.from_ms) % HOUR_MS;
    let hour_start = ((now_ms - into_hour) / grid.tick_ms) as usize;
    let hour_price = grid.markets[lease.market as usize].price(hour_start);
    Place { market: lease.market, zone, hour_price, hour_left_ms: HOUR_MS - into_hour, last_move_ms }
}

/// Replays `policy` for a fleet. `progress` is told of every day that is done, in thousandths of the whole.
#[must_use]
pub fn run(
    grid: &Grid,
    guests: &[Guest],
    settings: &Settings,
    policy: &dyn Policy,
    mut progress: impl FnMut(u32),
) -> Outcome {
    let told = |permille| {
        progress(permille);
        true
    };
    // It is never given up.
    run_while(grid, guests, settings, policy, told).unwrap_or_default()
}

/// The same for as long as `goes_on` says so, which is asked once a day with thousandths of the whole; `None` when it is given up.
#[must_use]
pub fn run_while(
    grid: &Grid,
    guests: &[Guest],
    settings: &Settings,
    policy: &dyn Policy,
    mut goes_on: impl FnMut(u32) -> bool,
) -> Option<Outcome> {
    let facts = grid.markets.iter().map(|market| Facts {
        zone: market.zone,
        is_on_demand: market.is_on_demand(),
        bid: market.bid,
        ..Facts::default()
    });
    let mut replay = Replay {
        grid,
        settings,
        policy,
        facts: facts.collect(),
        since_ms: vec![0; grid.markets.len()],
        crowd: vec![0; grid.markets.len()],
        spares: Vec::new(),
        fleet: u32::try_from(guests.len()).unwrap_or(u32::MAX).max(1),
        learner: Learner::new(grid.markets.len(), PRIOR_HOURS),
        shared: if policy.is_hedged() { vec![0; grid.markets.len()] } else { Vec::new() },
        out: Outcome { policy: policy.name().to_owned(), ..Outcome::default() },
    };
    let (mut classes, mut states) = replay.prepare(guests);
    let placed: Vec<_> = states.iter().enumerate().map(|(i, state)| (i as u32, state.class, state.guest)).collect();
    replay.plan_spares(&placed);
    for tick in 0..grid.ticks {
        if replay.watch(tick) {
            replay.quote(tick, &mut classes);
        }
        let before = replay.out.interruptions;
        for (index, state) in states.iter_mut().enumerate() {
            replay.step(tick, index as u32, state, &classes);
        }
        replay.out.most_at_once = replay.out.most_at_once.max(replay.out.interruptions - before);
        replay.tend_spares(tick, &classes);
        let per_day = (24 * HOUR_MS / grid.tick_ms) as usize;
        if tick.is_multiple_of(per_day) && !goes_on((tick as u64 * 1000 / grid.ticks as u64) as u32) {
            return None;
        }
    }
    for (index, state) in states.iter_mut().enumerate() {
        if let Some(lease) = state.lease.take() {
            replay.close(LineKind::Rent, index as u32, lease, grid.length_ms(), End::Returned);
        }
    }
    replay.close_spares();
    Some(replay.out)
}

impl<'a> Replay<'a> {
    fn prepare(&mut self, guests: &'a [Guest]) -> (Vec<Class>, Vec<State<'a>>) {
        let (mut classes, mut states, mut by_size) = (Vec::new(), Vec::new(), HashMap::new());
        for guest in guests {
            let size = (guest.vcpus, guest.load.memory_bytes.saturating_add(self.settings.host_reserve_bytes));
            let class = *by_size.entry(size).or_insert_with(|| {
                let mut fits = vec![false; self.grid.markets.len()];
                for id in self.grid.fitting(size.0, size.1) {
                    fits[id as usize] = true;
                }
                classes.push(Class { fits, quotes: Vec::new() });
                classes.len() - 1
            });
            if !classes[class].fits.contains(&true) {
                self.out.unplaceable += 1;
                continue;
            }
            states.push(State {
                guest,
                class,
                lease: None,
                zone: None,
                first: None,
                last_move_ms: None,
                has_checkpoints: false,
            });
        }
        (classes, states)
    }

    /// Looks at every market; true when a price or an opening changed.
    fn watch(&mut self, tick: usize) -> bool {
        let now_ms = tick as u64 * self.grid.tick_ms;
        let wall_ms = self.grid.start_ms + now_ms;
        let (mut is_changed, mut is_new) = (tick == 0, false);
        for (id, market) in self.grid.markets.iter().enumerate() {
            if market.is_on_demand() || tick < market.first_tick || tick == 0 {
                continue;
            }
            if market.price(tick) != market.price(tick - 1) {
                self.since_ms[id] = now_ms;
                is_changed = true;
            }
            is_changed |= market.is_open(tick) != market.is_open(tick - 1);
            let facts = &mut self.facts[id];
            if !market.is_taken(tick) {
                self.learner.watch(id, (wall_ms, self.grid.tick_ms), facts.up_ms, false);
                facts.watched_ms += self.grid.tick_ms;
                facts.up_ms = facts.up_ms.map(|up_ms| up_ms + self.grid.tick_ms);
            } else {
                if !market.is_taken(tick - 1) {
                    facts.interruptions += 1;
                    self.learner.watch(id, (wall_ms, 0), facts.up_ms, true);
                    is_new |= self.learner.went(id, wall_ms);
                }
                facts.up_ms = Some(0);
            }
        }
        if self.grid.regime == Regime::Capacity {
            for (id, facts) in self.facts.iter_mut().enumerate().filter(|(_, facts)| !facts.is_on_demand) {
                facts.hazard = Some(self.learner.hazard(id));
            }
        }
        if is_new {
            self.share();
        }
        is_changed
    }

    fn quote(&self, tick: usize, classes: &mut [Class]) {
        let mut all: Vec<Quote<MarketId>> = (self.grid.markets.iter().enumerate())
            .filter(|(_, market)| tick >= market.first_tick)
            .map(|(id, market)| Quote {
                market: id as u32,
                price: market.price(tick),
                since_ms: self.since_ms[id],
                is_open: market.is_open(tick),
            })
            .collect();
        all.sort_unstable_by_key(|quote| (quote.price, quote.market));
        for class in classes {
            class.quotes.clear();
            class.quotes.extend(all.iter().filter(|quote| class.fits[quote.market as usize]).cloned());
        }
    }

    fn step(&mut self, tick: usize, index: u32, state: &mut State<'_>, classes: &[Class]) {
        let now_ms = tick as u64 * self.grid.tick_ms;
        self.out.guest_ms += self.grid.tick_ms;
        let is_taken = state.lease.is_some_and(|lease| self.grid.markets[lease.market as usize].is_taken(tick));
        let place = state.lease.map(|lease| lease_place(self.grid, lease, state.zone, state.last_move_ms, now_ms));
        let spare = self.spare_for(tick, &classes[state.class]);
        let view = View {
            now_ms,
            wall_ms: self.grid.start_ms + now_ms,
            look_ms: self.grid.tick_ms,
            regime: self.grid.regime,
            guest: state.guest,
            place,
            first: state.first,
            is_leaving: is_taken,
            notice_ms: self.settings.notice_ms,
            has_spare: spare.is_some(),
            quotes: &classes[state.class].quotes,
            facts: &self.facts,
        };
        let plan = self.policy.decide(&view);
        let here = place.map(|place| place.market);
        let to = match plan.action {
            Action::Go(to) if self.grid.may_enter(to, tick, &classes[state.class].fits, here) => Some(to),
            _ => None,
        };
        let egress = to.map_or(NanoUsd(0), |to| view.egress(to));
        let move_ms = view.move_ms();
        match (state.lease, is_taken) {
            (Some(lease), true) => {
                let exit = if self.policy.is_live() {
                    policy::exit(state.guest, self.settings.notice_ms, spare.is_some(), state.has_checkpoints)
                } else {
                    Exit::Stranded { leave_ms: u64::MAX }
                };
                self.out.interruptions += 1;
                self.out.missed += u64::from(!exit.is_safe());
                self.leave(index, state, lease, now_ms + self.settings.notice_ms, End::Taken);
                let downtime_ms = match exit {
                    Exit::Live { downtime_ms, .. } | Exit::Frozen { downtime_ms, .. } => downtime_ms,
                    Exit::Stranded { .. } => self.restart_ms(state),
                };
                let way = |egress| if exit.is_safe() { egress } else { NanoUsd(0) };
                match (spare.and_then(|spare| self.take_spare(spare)), to) {
                    (Some((lease, zone)), _) => {
                        self.out.downtime_ms += downtime_ms;
                        let bytes = way_to(state, zone);
                        self.occupy(index, state, lease, zone, now_ms, way(bytes));
                    }
                    (None, Some(to)) => {
                        self.out.downtime_ms += downtime_ms;
                        self.enter(index, state, to, now_ms, way(egress));
                    }
                    (None, None) => self.out.downtime_ms += self.grid.tick_ms,
                }
            }
            (Some(lease), false) => {
                let Some(to) = to else {
                    state.has_checkpoints = plan.has_checkpoints;
                    return;
                };
                let live = evacuable::predict(&state.guest.load, &state.guest.path);
                match live.filter(|_| self.policy.is_live()) {
                    Some(live) => self.out.downtime_ms += live.downtime_ms,
                    None => self.out.downtime_ms += self.restart_ms(state),
                }
                self.out.moves += 1;
                self.leave(index, state, lease, now_ms.saturating_add(move_ms), End::Returned);
                self.enter(index, state, to, now_ms, if self.policy.is_live() { egress } else { NanoUsd(0) });
            }
            (None, _) => match to {
                Some(to) => {
                    // The very first start is not downtime.
                    if state.first.is_some() {
                        self.out.downtime_ms += self.restart_ms(state).min(self.grid.tick_ms);
                    }
                    self.enter(index, state, to, now_ms, NanoUsd(0));
                }
                None => self.out.downtime_ms += self.grid.tick_ms,
            },
        }
        state.has_checkpoints = plan.has_checkpoints;
        if to.is_some() {
            *self.out.reasons.entry(plan.reason).or_default() += 1;
        }
    }

    fn restart_ms(&self, state: &State<'_>) -> u64 {
        state.guest.path.host_ready_ms + self.settings.restart_ms
    }

    fn enter(&mut self, index: u32, state: &mut State<'_>, to: MarketId, now_ms: u64, egress: NanoUsd) {
        let market = &self.grid.markets[to as usize];
        let lease = Lease { market: to, is_on_demand: market.is_on_demand(), from_ms: now_ms };
        self.occupy(index, state, lease, market.zone, now_ms, egress);
    }

    fn occupy(
        &mut self,
        index: u32,
        state: &mut State<'_>,
        lease: Lease,
        zone: Option<u32>,
        now_ms: u64,
        egress: NanoUsd,
    ) {
        state.lease = Some(lease);
        // On-demand is in every zone: the guest stays in its own.
        state.zone = zone.or(state.zone);
        // The first start is no move.
        if state.first.is_some() {
            state.last_move_ms = Some(now_ms);
        }
        state.first.get_or_insert(lease.market);
        self.count(lease.market, 1);
        if egress > NanoUsd(0) {
            let at_ms = self.grid.start_ms + now_ms;
            let (market, kind) = (lease.market, LineKind::Egress);
            self.out.ledger.lines.push(Line { guest: index, market, at_ms, for_ms: 0, kind, paid: egress });
        }
    }

    fn leave(&mut self, index: u32, state: &mut State<'_>, lease: Lease, at_ms: u64, end: End) {
        state.lease = None;
        self.count(lease.market, -1);
        self.close(LineKind::Rent, index, lease, at_ms, end);
    }

    pub(super) fn close(&mut self, kind: LineKind, index: u32, lease: Lease, at_ms: u64, end: End) {
        let (grid, market) = (self.grid, &self.grid.markets[lease.market as usize]);
        self.out.ledger.book_lease((kind, index, grid.start_ms, grid.regime), lease, (at_ms, end), |at_ms| {
            market.price((at_ms / grid.tick_ms) as usize)
        });
    }

    fn count(&mut self, market: MarketId, by: i32) {
        let market = market as usize;
        self.crowd[market] = self.crowd[market].saturating_add_signed(by);
        let permille = u64::from(self.crowd[market]) * 1000 / u64::from(self.fleet);
        self.facts[market].crowd_permille = permille as u32;
        for other in 0..self.shared.len() {
            let chance = i64::from(self.learner.goes_with(other, market));
            self.shared[other] = self.shared[other].saturating_add_signed(chance * i64::from(by));
            self.facts[other].shared_permille = (self.shared[other] / u64::from(self.fleet)) as u32;
        }
    }

    /// Which pools go together was learned anew.
    fn share(&mut self) {
        let there: Vec<usize> = (0..self.crowd.len()).filter(|market| self.crowd[*market] > 0).collect();
        for (market, shared) in self.shared.iter_mut().enumerate() {
            let with = |other: &usize| u64::from(self.learner.goes_with(market, *other) * self.crowd[*other]);
            *shared = there.iter().map(with).sum();
            self.facts[market].shared_permille = (*shared / u64::from(self.fleet)) as u32;
        }
    }
}

/// What the bytes of the way to a host in `zone` cost.
fn way_to(state: &State<'_>, zone: Option<u32>) -> NanoUsd {
    match (state.zone, zone) {
        (Some(from), Some(to)) if from != to => policy::egress(state.guest),
        _ => NanoUsd(0),
    }
}

/// What the bytes of a move of `guest` between zones cost.
pub(super) fn move_egress(guest: &Guest) -> NanoUsd {
    policy::egress(guest)
}
