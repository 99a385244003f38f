//! The ledger's arithmetic: what a rented host cost, hour by hour, and whose share of it was whose.
//!
//! # Rules
//! - A host is paid from the moment it is rented until it costs nothing any more, by the millisecond, at the price that holds.
//! - The **billed interval** is the time in which one host is rented at one price. It is rounded up, once. What a part of it costs
//!   is the difference of what it has cost at the part's end and at its beginning, so that cutting time anywhere (an hour, a move, a
//!   restart, a page of a listing) changes no sum.
//! - Half of a host's price goes by memory and half by vCPUs. Who uses it pays for its share of what the host has; where more is
//!   promised than there is, for its share of what is promised. What nobody uses is the **idle** line. The lines of any time are
//!   exactly what the host cost in it. A user's own sum is exact to a nano-dollar for each kind of share and each change on its host.
//! - Where no price is known a line has none. It is never guessed, and never counts as zero in silence.

use std::collections::BTreeMap;

use crate::money::NanoUsd;

/// Milliseconds in an hour.
pub const HOUR_MS: u64 = 3_600_000;
/// Larger rooms count as this many vCPUs: sums of any number of them stay in range.
const VCPUS_AT_MOST: u32 = 1 << 20;
/// Larger rooms count as this many MiB.
const MEMORY_MIB_AT_MOST: u64 = 1 << 30;

/// From (inclusive) to (exclusive), in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    /// Its beginning.
    pub from_ms: u64,
    /// Its end.
    pub to_ms: u64,
}

impl Span {
    /// What is in both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        let from_ms = self.from_ms.max(other.from_ms);
        Self { from_ms, to_ms: self.to_ms.min(other.to_ms).max(from_ms) }
    }

    /// How long it is.
    #[must_use]
    pub const fn ms(self) -> u64 {
        self.to_ms.saturating_sub(self.from_ms)
    }
}

/// What a host has, or a user of it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Room {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// A price that holds from a time on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// From when.
    pub at_ms: u64,
    /// Per hour.
    pub per_hour: NanoUsd,
}

/// What is known of a market's price: steps in the order of time, the last of which is known to hold until `known_until_ms`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prices {
    /// The steps.
    pub steps: Vec<Step>,
    /// From here on nothing is known.
    pub known_until_ms: u64,
}

impl Prices {
    /// How many steps there are up to a time: the last of them holds. A number of its own where nothing is known any more.
    fn stage(&self, ms: u64) -> usize {
        if ms < self.known_until_ms { self.steps.partition_point(|step| step.at_ms <= ms) } else { usize::MAX }
    }

    /// The step that holds in a stage.
    fn step(&self, stage: usize) -> Option<usize> {
        stage.checked_sub(1).filter(|step| *step < self.steps.len())
    }

    /// What the rent since `rented_ms` costs in `span`, in which step `number` holds.
    fn cost(&self, number: usize, rented_ms: u64, span: Span) -> NanoUsd {
        let step = self.steps[number];
        let since_ms = step.at_ms.max(rented_ms);
        let until = |ms: u64| step.per_hour.per_hour_for(ms.saturating_sub(since_ms));
        NanoUsd(until(span.to_ms).0.saturating_sub(until(span.from_ms).0))
    }

    fn instants(&self) -> impl Iterator<Item = u64> + '_ {
        self.steps.iter().map(|step| step.at_ms).chain([self.known_until_ms])
    }
}

/// That somebody used part of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Use {
    /// When.
    pub span: Span,
    /// How much of it.
    pub room: Room,
}

/// A rented host.
#[derive(Debug, Clone, Copy)]
pub struct Account<'a> {
    /// For how long it has been rented.
    pub rented: Span,
    /// What it has, from when on; in the order of time.
    pub rooms: &'a [(u64, Room)],
    /// What is paid for it.
    pub paid: &'a Prices,
    /// What the same thing costs on demand.
    pub on_demand: &'a Prices,
    /// Who used it.
    pub uses: &'a [Use],
}

/// What one user, or nobody, cost in (a part of) an hour at one price.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// The user's number in [`Account::uses`]; `None`: what nobody used.
    pub user: Option<usize>,
    /// When.
    pub span: Span,
    /// The host's price.
    pub per_hour: Option<NanoUsd>,
    /// What was paid; unpriced when `None`.
    pub paid: Option<NanoUsd>,
    /// What it would have cost on demand, where that is known.
    pub on_demand: Option<NanoUsd>,
}

/// Sums of lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// What was paid.
    pub paid: NanoUsd,
    /// What was paid by the lines of which it is known what they would have cost on demand.
    pub comparable_paid: NanoUsd,
    /// What these would have cost on demand.
    pub on_demand: NanoUsd,
    /// Milliseconds of lines without a price.
    pub unpriced_ms: u64,
}

impl Totals {
    /// With one more line.
    pub fn add(&mut self, span_ms: u64, paid: Option<NanoUsd>, on_demand: Option<NanoUsd>) {
        match paid {
            None => self.unpriced_ms = self.unpriced_ms.saturating_add(span_ms),
            Some(paid) => {
                self.paid = self.paid + paid;
                if let Some(on_demand) = on_demand {
                    self.comparable_paid = self.comparable_paid + paid;
                    self.on_demand = self.on_demand + on_demand;
                }
            }
        }
    }
}

/// What bytes cost that leave a cloud: rounded up, once.
#[must_use]
pub fn egress(per_gib: NanoUsd, bytes: u64) -> NanoUsd {
    let exact = u128::from(per_gib.0) * u128::from(bytes);
    NanoUsd(u64::try_from(exact.div_ceil(1 << 30)).unwrap_or(u64::MAX))
}

/// Divides an amount by weights; what is left of `whole` is the second value. Every part is exact to one unit, all together are the
/// amount.
fn divide(amount: u64, weights: impl Iterator<Item = u64> + Clone, whole: u64) -> (Vec<u64>, u64) {
    let promised: u128 = weights.clone().map(u128::from).sum();
    let all = promised.max(u128::from(whole)).max(1);
    let (mut sum, mut given) = (0_u128, 0_u64);
    let mut parts = Vec::new();
    for weight in weights {
        sum += u128::from(weight);
        // At most the amount itself.
        let until = u64::try_from(u128::from(amount) * sum / all).unwrap_or(amount);
        parts.push(until - given);
        given = until;
    }
    (parts, amount - given)
}

/// An amount shared out among those who use a host, and nobody.
fn share(amount: NanoUsd, users: &[Room], has: Room) -> (Vec<NanoUsd>, NanoUsd) {
    let by_memory = amount.0 / 2;
    let memory = users.iter().map(|room| room.memory_mib.min(MEMORY_MIB_AT_MOST));
    let vcpus = users.iter().map(|room| u64::from(room.vcpus.min(VCPUS_AT_MOST)));
    let (memory, idle_memory) = divide(by_memory, memory, has.memory_mib.min(MEMORY_MIB_AT_MOST));
    let (vcpus, idle_vcpus) = divide(amount.0 - by_memory, vcpus, u64::from(has.vcpus.min(VCPUS_AT_MOST)));
    let parts = memory.iter().zip(&vcpus).map(|(memory, vcpus)| NanoUsd(memory + vcpus)).collect();
    (parts, NanoUsd(idle_memory + idle_vcpus))
}

/// What makes two pieces of time one line: its user (nobody last), its beginning in whole `cut_ms`, and the prices.
type Place = (usize, u64, usize, usize);

/// The lines of a host in a window, cut at every multiple of `cut_ms` and where its price changes; by user, then by time. Their sums
/// are what the host cost in the window, whatever the window and the cuts are.
#[must_use]
pub fn lines(account: &Account<'_>, window: Span, cut_ms: u64) -> Vec<Line> {
    let window = window.and(account.rented);
    let cut_ms = cut_ms.max(1);
    let mut instants: Vec<u64> = account
        .paid
        .instants()
        .chain(account.on_demand.instants())
        .chain(account.rooms.iter().map(|(from_ms, _)| *from_ms))
        .chain(account.uses.iter().flat_map(|one| [one.span.from_ms, one.span.to_ms]))
        .filter(|ms| (window.from_ms..window.to_ms).contains(ms))
        .chain([window.from_ms, window.to_ms])
        .collect();
    let first_cut = (window.from_ms / cut_ms).saturating_add(1);
    instants.extend((first_cut..=window.to_ms / cut_ms).map(|number| number * cut_ms));
    instants.sort_unstable();
    instants.dedup();

    let mut by_start: Vec<usize> = (0..account.uses.len()).filter(|i| account.uses[*i].span.ms() > 0).collect();
    by_start.sort_by_key(|i| account.uses[*i].span.from_ms);
    let mut coming = by_start.into_iter().peekable();
    let mut here: Vec<usize> = Vec::new();
    let mut found: BTreeMap<Place, Line> = BTreeMap::new();
    for pair in instants.windows(2) {
        let span = Span { from_ms: pair[0], to_ms: pair[1] };
        while let Some(user) = coming.next_if(|i| account.uses[*i].span.from_ms <= span.from_ms) {
            here.push(user);
        }
        here.retain(|i| account.uses[*i].span.to_ms > span.from_ms);
        // Always in the same order, so that the same time is always divided in the same way.
        here.sort_unstable();
        let rooms: Vec<Room> = here.iter().map(|i| account.uses[*i].room).collect();
        let after = account.rooms.partition_point(|(from_ms, _)| *from_ms <= span.from_ms);
        let has = after.checked_sub(1).map_or_else(Room::default, |i| account.rooms[i].1);
        let shares = |prices: &Prices| {
            let stage = prices.stage(span.from_ms);
            let step = prices.step(stage);
            (stage, step.map(|step| share(prices.cost(step, account.rented.from_ms, span), &rooms, has)))
        };
        let ((paid_stage, paid), (on_demand_stage, on_demand)) = (shares(account.paid), shares(account.on_demand));
        for (at, user) in here.iter().map(|i| Some(*i)).chain([None]).enumerate() {
            let part = |of: &Option<(Vec<NanoUsd>, NanoUsd)>| {
                of.as_ref().map(|(parts, idle)| parts.get(at).copied().unwrap_or(*idle))
            };
            let place = (user.unwrap_or(usize::MAX), span.from_ms / cut_ms, paid_stage, on_demand_stage);
            let line = found.entry(place).or_insert(Line {
                user,
                span: Span { from_ms: span.from_ms, to_ms: span.from_ms },
                per_hour: account.paid.step(paid_stage).map(|step| account.paid.steps[step].per_hour),
                paid: paid.as_ref().map(|_| NanoUsd(0)),
                on_demand: on_demand.as_ref().map(|_| NanoUsd(0)),
            });
            line.span.to_ms = span.to_ms;
            let add = |sum: Option<NanoUsd>, part: Option<NanoUsd>| sum.zip(part).map(|(sum, part)| sum + part);
            (line.paid, line.on_demand) = (add(line.paid, part(&paid)), add(line.on_demand, part(&on_demand)));
        }
    }
    found.into_values().collect()
}

#[cfg(test)]
mod tests;
