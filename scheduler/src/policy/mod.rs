//! Policies: what to do with a guest, given prices, notices, its load and what moves cost.
//!
//! A policy is pure: it sees a [`View`] and gives a [`Plan`] with its reason. Everything that it must remember is in the
//! view. The daemon and the simulator run the same code.

mod baseline;
mod smart_spot;
#[cfg(test)]
mod tests;

pub use baseline::{Cheapest, Greedy, OnDemand, Restart, Single};
pub use smart_spot::{Belief, SmartSpot};

use crate::{
    evacuable::{self, Exit, Load, Path},
    interruptions::Hazard,
    market::{HOUR_MS, Regime},
    money::NanoUsd,
    price::Quote,
};

/// A market's number in a view: the index into [`View::facts`].
pub type MarketId = u32;

/// A guest as a policy sees it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Guest {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// What must be moved.
    pub load: Load,
    /// How it can leave.
    pub path: Path,
    /// What a byte that leaves its zone costs, in nano-dollars per GB (10^9 bytes).
    pub egress_nanousd_per_gb: u64,
}

/// What is known of a market besides its price.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Facts {
    /// Its zone's number; `None` for on-demand, which is in every zone.
    pub zone: Option<u32>,
    /// On-demand: never taken away, the price does not move.
    pub is_on_demand: bool,
    /// The highest price that is paid here (auction regime).
    pub bid: NanoUsd,
    /// How often it was taken away so far.
    pub interruptions: u32,
    /// For how long it was watched with capacity there, in milliseconds.
    pub watched_ms: u64,
    /// For how long capacity has been there without a break, in milliseconds; `None`: never seen away.
    pub up_ms: Option<u64>,
    /// Which share of the fleet is there, in thousandths.
    pub crowd_permille: u32,
    /// Which share of the fleet is expected to lose its host when this pool is taken, in thousandths: those that are there, and
    /// those in pools that went with it before, by their chance.
    pub shared_permille: u32,
    /// What is believed of its interruptions; `None`: nothing was learned but their number.
    pub hazard: Option<Hazard>,
}

/// Where a guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The market.
    pub market: MarketId,
    /// The zone in which the host stands.
    pub zone: Option<u32>,
    /// The price of the present instance-hour.
    pub hour_price: NanoUsd,
    /// What is left of the present instance-hour, in milliseconds (above zero).
    pub hour_left_ms: u64,
    /// When a policy last moved it.
    pub last_move_ms: Option<u64>,
}

/// What a policy sees.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// The feed's clock.
    pub now_ms: u64,
    /// The time by which interruptions were learned, milliseconds since 1970 (UTC): their hours of day are its.
    pub wall_ms: u64,
    /// Time between two looks, in milliseconds.
    pub look_ms: u64,
    /// How the markets work.
    pub regime: Regime,
    /// The guest.
    pub guest: &'a Guest,
    /// Where it is; `None`: nowhere.
    pub place: Option<Place>,
    /// The market in which it first was.
    pub first: Option<MarketId>,
    /// Its host goes away after [`View::notice_ms`] from now.
    pub is_leaving: bool,
    /// How long before it takes a host a provider says so, in milliseconds.
    pub notice_ms: u64,
    /// A host that fits it is kept ready: it need not wait for one when a notice comes.
    pub has_spare: bool,
    /// The markets that fit the guest, cheapest first.
    pub quotes: &'a [Quote<MarketId>],
    /// What is known of each market, by its number.
    pub facts: &'a [Facts],
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Leave it where it is (or nowhere).
    Stay,
    /// Rent in this market and move the guest there.
    Go(MarketId),
}

/// What to do with a guest, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// What to do.
    pub action: Action,
    /// Keep background checkpoints, so that it stays evacuable.
    pub has_checkpoints: bool,
    /// Why.
    pub reason: Why,
}

/// Why a policy decided as it did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, thiserror::Error)]
pub enum Why {
    /// As the policy of that kind always does.
    #[error("this policy stays where it is")]
    Fixed,
    /// It has no host yet.
    #[error("it needs a host")]
    First,
    /// A notice.
    #[error("its host goes away")]
    Notice,
    /// Cheaper elsewhere by more than the move costs.
    #[error("elsewhere is cheaper by more than a move costs")]
    Saving,
    /// The price nears the bid within a paid hour.
    #[error("the price nears the bid")]
    NearBid,
    /// It could not leave in time here.
    #[error("it could not leave within the notice")]
    NotEvacuable,
    /// Nothing cheaper by enough.
    #[error("no market is cheaper by enough")]
    Content,
    /// The paid hour is not used up yet.
    #[error("the hour is paid for")]
    PaidHour,
    /// Moved a short while ago.
    #[error("it was moved a short while ago")]
    CoolDown,
    /// A price is too young to be trusted.
    #[error("the cheaper price has not settled yet")]
    NotSettled,
    /// Nothing is open.
    #[error("no market that fits it is open")]
    NoMarket,
}

/// A policy.
pub trait Policy: Send + Sync {
    /// Its name in reports.
    fn name(&self) -> &str;
    /// What to do with one guest now. The same view gives the same plan.
    fn decide(&self, view: &View<'_>) -> Plan;
    /// It moves guests live; without, each change of hosts is a restart that loses what was in memory.
    fn is_live(&self) -> bool {
        true
    }
    /// It looks at [`Facts::shared_permille`].
    fn is_hedged(&self) -> bool {
        false
    }
    /// For how many guests one host is kept ready and empty, in case a provider takes theirs; 0: none is kept.
    fn guests_per_spare(&self, _notice_ms: u64, _host_ready_ms: u64) -> u32 {
        0
    }
}

/// The guests whose sizes the spare hosts of a fleet have: each spare is as large as the largest of the guests that it
/// stands for, and a larger one does for a smaller guest too. `guests` are (index, memory) of those that can be placed.
#[must_use]
pub fn spare_sizes(guests: &[(usize, u64)], guests_per_spare: u32) -> Vec<usize> {
    let mut by_size = guests.to_vec();
    by_size.sort_by_key(|(index, memory)| (std::cmp::Reverse(*memory), *index));
    let step = usize::try_from(guests_per_spare).unwrap_or(usize::MAX);
    if step == 0 { Vec::new() } else { by_size.iter().step_by(step).map(|(index, _)| *index).collect() }
}

impl View<'_> {
    /// From asking for the new host until the old one can be returned, in milliseconds: for so long both are paid.
    #[must_use]
    pub fn move_ms(&self) -> u64 {
        let copy = evacuable::predict(&self.guest.load, &self.guest.path).map_or(u64::MAX, |live| live.copy_ms);
        self.guest.path.host_ready_ms.saturating_add(copy)
    }

    /// What the bytes of a move to `market` cost.
    #[must_use]
    pub fn egress(&self, market: MarketId) -> NanoUsd {
        let from = self.place.and_then(|place| place.zone);
        let to = self.facts.get(market as usize).and_then(|facts| facts.zone);
        match (from, to) {
            (Some(from), Some(to)) if from != to => egress(self.guest),
            _ => NanoUsd(0),
        }
    }

    /// What a move away costs besides the new rent: the bytes, and the rent of the old host until it can be returned
    /// (in the auction regime only what reaches beyond the paid hour, which is then a whole one).
    #[must_use]
    pub fn move_cost(&self, to: MarketId) -> NanoUsd {
        let Some(place) = self.place else { return NanoUsd(0) };
        let move_ms = self.move_ms();
        let rent = match self.regime {
            Regime::Capacity => place.hour_price.per_hour_for(move_ms),
            Regime::Auction => {
                let hours = move_ms.saturating_sub(place.hour_left_ms).div_ceil(HOUR_MS);
                NanoUsd(place.hour_price.0.saturating_mul(hours))
            }
        };
        self.egress(to) + rent
    }

    /// The quote of the market in which the guest is.
    #[must_use]
    pub fn here(&self) -> Option<&Quote<MarketId>> {
        let place = self.place?;
        self.quotes.iter().find(|quote| quote.market == place.market)
    }

    /// The cheapest open market that passes `is_good` and is not the one in which the guest is.
    #[must_use]
    pub fn cheapest(&self, is_good: impl Fn(&Quote<MarketId>, &Facts) -> bool) -> Option<&Quote<MarketId>> {
        let here = self.place.map(|place| place.market);
        self.quotes.iter().find(|quote| {
            quote.is_open
                && Some(quote.market) != here
                && self.facts.get(quote.market as usize).is_some_and(|facts| is_good(quote, facts))
        })
    }

    /// How the guest leaves when its host is taken.
    #[must_use]
    pub fn exit(&self, has_checkpoints: bool) -> Exit {
        exit(self.guest, self.notice_ms, self.has_spare, has_checkpoints)
    }
}

/// How a guest leaves when its host is taken; at once when a host is kept ready for it.
#[must_use]
pub fn exit(guest: &Guest, notice_ms: u64, has_spare: bool, has_checkpoints: bool) -> Exit {
    let host_ready_ms = if has_spare { 0 } else { guest.path.host_ready_ms };
    let path = Path { host_ready_ms, ..guest.path.clone() };
    evacuable::exit(&guest.load, &path, notice_ms, has_checkpoints)
}

/// What the bytes of one live move cost when they leave the zone.
#[must_use]
pub fn egress(guest: &Guest) -> NanoUsd {
    let bytes = evacuable::predict(&guest.load, &guest.path).map_or(0, |live| live.bytes);
    let cost = (u128::from(bytes) * u128::from(guest.egress_nanousd_per_gb)).div_ceil(1_000_000_000);
    NanoUsd(u64::try_from(cost).unwrap_or(u64::MAX))
}

impl Plan {
    /// Stay.
    #[must_use]
    pub fn stay(reason: Why) -> Self {
        Self { action: Action::Stay, has_checkpoints: false, reason }
    }

    /// Go.
    #[must_use]
    pub fn go(to: MarketId, reason: Why) -> Self {
        Self { action: Action::Go(to), has_checkpoints: false, reason }
    }

    /// To this market if there is one.
    #[must_use]
    pub fn go_to(quote: Option<&Quote<MarketId>>, reason: Why) -> Self {
        quote.map_or(Self::stay(Why::NoMarket), |quote| Self::go(quote.market, reason))
    }
}
