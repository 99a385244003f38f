//! What a policy sees of the world that the REST API shows.
//!
//! A cloud is a zone with one market, the first of the tenure in which its hosts are rented. Hosts are up already, so that
//! nobody waits for one; what the API does not say is assumed by the settings. Interruptions are learned from the rentings
//! ([`Learned`]): of a cloud whose hosts nobody rents through the controller, the policy's prior is believed.

use std::collections::HashMap;

use supercloud_api::{Guest, Market, ids::CloudId};
use supercloud_scheduler::{
    evacuable::{Load, Path},
    market::HOUR_MS,
    money::NanoUsd,
    policy::{self, Action, Facts, Greedy, Place, Policy, View},
    price::Quote,
};

use crate::{
    config::{Config, PolicyName},
    learned::Learned,
};

/// The markets with what is known of them, and the guests' shares.
pub struct World<'a> {
    config: &'a Config,
    policy: Box<dyn Policy>,
    markets: Vec<&'a Market>,
    facts: Vec<Facts>,
    now_ms: u64,
    wall_ms: u64,
}

impl<'a> World<'a> {
    /// Puts together what holds for all guests.
    pub fn new(
        config: &'a Config,
        markets: &[&'a Market],
        guests: &[Guest],
        now_ms: u64,
        (learned, wall_ms): (&Learned, u64),
    ) -> Self {
        let mut of_cloud: Vec<&Market> = Vec::new();
        for market in markets {
            if of_cloud.iter().all(|other| other.cloud != market.cloud) {
                of_cloud.push(market);
            }
        }
        let mut there: HashMap<CloudId, u64> = HashMap::new();
        let followers: Vec<CloudId> = guests.iter().filter(|g| g.follow_prices).filter_map(|g| g.cloud).collect();
        for cloud in &followers {
            *there.entry(*cloud).or_default() += 1;
        }
        let all = followers.len().max(1) as u64;
        let facts = of_cloud.iter().enumerate().map(|(zone, market)| {
            let listed = market.on_demand_nanousd_per_hour.unwrap_or(market.price_nanousd_per_hour);
            let bid = u128::from(listed) * u128::from(config.assume.bid_permille) / 1000;
            let crowd = there.get(&market.cloud).copied().unwrap_or(0) * 1000 / all;
            let known = learned.of(market, wall_ms);
            let shared = of_cloud.iter().map(|other| {
                there.get(&other.cloud).copied().unwrap_or(0) * u64::from(learned.goes_with(market, other)) / all
            });
            Facts {
                zone: u32::try_from(zone).ok(),
                bid: NanoUsd(u64::try_from(bid).unwrap_or(u64::MAX)),
                crowd_permille: u32::try_from(crowd).unwrap_or(1000),
                shared_permille: u32::try_from(shared.sum::<u64>()).unwrap_or(1000),
                interruptions: known.interruptions,
                watched_ms: known.watched_ms,
                up_ms: known.since_taken_ms,
                hazard: Some(known.hazard),
                ..Facts::default()
            }
        });
        let policy: Box<dyn Policy> = match config.policy_name {
            PolicyName::Greedy => Box::new(Greedy),
            PolicyName::Cheapest => Box::new(policy::Cheapest(config.policy.clone())),
            PolicyName::SmartSpot => Box::new(config.smart_spot.clone()),
        };
        Self { config, policy, facts: facts.collect(), markets: of_cloud, now_ms, wall_ms }
    }

    /// Where a guest that is in the market `here` shall go, if anywhere, and why.
    pub fn decide(
        &self,
        guest: &Guest,
        here: &Market,
        last_move_ms: Option<u64>,
        is_open: impl Fn(&Market) -> bool,
    ) -> (Option<&'a Market>, String) {
        let Some(at) = self.markets.iter().position(|market| market.cloud == here.cloud) else {
            return (None, "its own market has no price".into());
        };
        let mut quotes: Vec<Quote<u32>> = (0u32..)
            .zip(&self.markets)
            .map(|(id, market)| Quote {
                market: id,
                price: NanoUsd(market.price_nanousd_per_hour),
                since_ms: market.feed_time_ms,
                is_open: is_open(market),
            })
            .collect();
        quotes.sort_by_key(|quote| (quote.price, quote.market));
        // Nobody tells when the lease began: the paid hour is counted from the last move, else from the feed's full hours.
        let into_hour = self.now_ms.saturating_sub(last_move_ms.unwrap_or(0)) % HOUR_MS;
        let at_id = u32::try_from(at).unwrap_or(u32::MAX);
        let place = Place {
            market: at_id,
            zone: self.facts[at].zone,
            hour_price: NanoUsd(here.price_nanousd_per_hour),
            hour_left_ms: HOUR_MS - into_hour,
            last_move_ms,
        };
        let subject = self.subject(guest);
        let plan = self.policy.decide(&View {
            now_ms: self.now_ms,
            wall_ms: self.wall_ms,
            look_ms: self.config.poll_ms,
            regime: self.config.assume.regime,
            guest: &subject,
            place: Some(place),
            first: Some(at_id),
            is_leaving: false,
            notice_ms: self.config.assume.notice_ms,
            has_spare: true,
            quotes: &quotes,
            facts: &self.facts,
        });
        match plan.action {
            Action::Go(to) => (self.markets.get(to as usize).copied(), plan.reason.to_string()),
            Action::Stay => (None, plan.reason.to_string()),
        }
    }

    /// What a policy sees of a guest.
    pub fn subject(&self, guest: &Guest) -> policy::Guest {
        const MIB: u64 = 1 << 20;
        let (assume, memory_bytes) = (&self.config.assume, guest.shape.memory_bytes);
        let working_set = u128::from(memory_bytes) * u128::from(assume.working_set_permille) / 1000;
        let per_gb = u128::from(self.config.move_nanousd_per_gib) * 1_000_000_000 / (1 << 30);
        policy::Guest {
            vcpus: guest.shape.vcpus,
            load: Load {
                memory_bytes,
                dirty_bytes_per_s: assume.dirty_mib_per_s.saturating_mul(MIB),
                working_set_bytes: u64::try_from(working_set).unwrap_or(u64::MAX),
                volume_dirty_bytes: 0,
            },
            path: Path {
                link_bytes_per_s: assume.link_mbit_per_s.saturating_mul(125_000),
                host_ready_ms: 0,
                max_downtime_ms: 300,
                switch_ms: 600,
                checkpoint_ms: 30_000,
            },
            egress_nanousd_per_gb: u64::try_from(per_gb).unwrap_or(u64::MAX),
        }
    }
}
