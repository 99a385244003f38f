//! The simple policies: what others do, and what the clever ones are measured against.

use super::{Plan, Policy, View, Why};
use crate::price::{CheapestWithHysteresis, Decision, Position, Reason};

/// On-demand only: the cheapest type that fits, for ever.
#[derive(Debug, Clone, Default)]
pub struct OnDemand;

impl Policy for OnDemand {
    fn name(&self) -> &'static str {
        "on-demand"
    }
    fn decide(&self, view: &View<'_>) -> Plan {
        if view.place.is_some() {
            return Plan::stay(Why::Fixed);
        }
        Plan::go_to(view.cheapest(|_, facts| facts.is_on_demand), Why::First)
    }
}

/// The spot market that is cheapest at the start, for ever: when it is taken away, the guest waits until it is back
/// and starts again there.
#[derive(Debug, Clone, Default)]
pub struct Single;

impl Policy for Single {
    fn name(&self) -> &'static str {
        "single-market"
    }
    fn decide(&self, view: &View<'_>) -> Plan {
        if view.place.is_some() && !view.is_leaving {
            return Plan::stay(Why::Fixed);
        }
        match view.first {
            None => Plan::go_to(view.cheapest(|_, facts| !facts.is_on_demand), Why::First),
            Some(first) => {
                let back = view.quotes.iter().find(|quote| quote.market == first && quote.is_open);
                Plan::go_to(back.filter(|_| !view.is_leaving), Why::First)
            }
        }
    }
    fn is_live(&self) -> bool {
        false
    }
}

/// The cheapest spot market when it starts; stays until it is taken away; then starts again in the cheapest that is
/// open (on-demand when nothing else is). What managed spot fleets do: eager fail-over by restart.
#[derive(Debug, Clone, Default)]
pub struct Restart;

impl Policy for Restart {
    fn name(&self) -> &'static str {
        "spot-restart"
    }
    fn decide(&self, view: &View<'_>) -> Plan {
        if view.place.is_some() && !view.is_leaving {
            return Plan::stay(Why::Fixed);
        }
        let spot = view.cheapest(|_, facts| !facts.is_on_demand);
        Plan::go_to(spot.or_else(|| view.cheapest(|_, _| true)), if view.is_leaving { Why::Notice } else { Why::First })
    }
    fn is_live(&self) -> bool {
        false
    }
}

/// Whatever is cheapest at this moment, at any cost of moving (SpotCheck's greedy choice of pools).
#[derive(Debug, Clone, Default)]
pub struct Greedy;

impl Policy for Greedy {
    fn name(&self) -> &'static str {
        "greedy"
    }
    fn decide(&self, view: &View<'_>) -> Plan {
        let best = view.cheapest(|_, _| true);
        match (view.here(), best) {
            (Some(here), Some(best)) if !view.is_leaving && here.price <= best.price => Plan::stay(Why::Content),
            (Some(_), None) if !view.is_leaving => Plan::stay(Why::NoMarket),
            _ => Plan::go_to(best, if view.is_leaving { Why::Notice } else { Why::Saving }),
        }
    }
}

/// The daemon's simple policy: the cheapest market with hysteresis.
#[derive(Debug, Clone, Default)]
pub struct Cheapest(pub CheapestWithHysteresis);

impl Policy for Cheapest {
    fn name(&self) -> &'static str {
        "cheapest"
    }
    fn decide(&self, view: &View<'_>) -> Plan {
        let Some(place) = view.place.filter(|_| !view.is_leaving) else {
            return Plan::go_to(view.cheapest(|_, _| true), if view.is_leaving { Why::Notice } else { Why::First });
        };
        let best = view.cheapest(|_, _| true).map_or(place.market, |quote| quote.market);
        let position =
            Position { market: place.market, last_move_ms: place.last_move_ms, move_cost: view.move_cost(best) };
        match self.0.decide(view.now_ms, &position, view.quotes) {
            Decision::Move { to, .. } => Plan::go(to, Why::Saving),
            Decision::Stay(Reason::CoolDown) => Plan::stay(Why::CoolDown),
            Decision::Stay(Reason::NotSettled) => Plan::stay(Why::NotSettled),
            Decision::Stay(_) => Plan::stay(Why::Content),
        }
    }
}
