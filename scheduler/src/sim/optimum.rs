//! The offline optimum: what a policy with full knowledge of the future would have paid, and the floor below it.
//!
//! **Optimum**: dynamic programming over (market, ticks into the instance-hour), with the policies' own action set: the same
//! ticks, bids, bills, double pay and egress. It never uses what a provider gives away: an hour that is cut short is
//! charged in full here, while a policy gets it free, so that in the auction regime a policy may pay less than this.
//! Where a figure cannot be exact it is rounded in the optimum's favour.
//!
//! **Floor**: at every moment the cheapest price that any lease could have then (a price is kept for an instance-hour, so
//! the lowest of the last hour), by the millisecond, with moves that are free and instant and nothing ever taken.

use std::collections::HashMap;

use super::{Grid, GridMarket, Settings, engine::move_egress};
use crate::{
    evacuable,
    market::{HOUR_MS, Regime},
    money::NanoUsd,
    policy::Guest,
};

/// No way to be there.
const NEVER: u64 = u64::MAX;

/// Guests that are the same in all that matters, and how many there are.
fn kinds(guests: &[Guest]) -> Vec<(&Guest, u64)> {
    let mut counts: HashMap<&Guest, u64> = HashMap::new();
    for guest in guests {
        *counts.entry(guest).or_default() += 1;
    }
    counts.into_iter().collect()
}

/// What the optimum pays for the fleet; guests that fit nowhere are left out.
#[must_use]
pub fn optimum(grid: &Grid, guests: &[Guest], settings: &Settings, mut progress: impl FnMut(u32)) -> NanoUsd {
    let kinds = kinds(guests);
    let all = kinds.len() as u32;
    let costs = kinds.into_iter().enumerate().map(|(done, (guest, count))| {
        let cost = of_guest(grid, guest, settings).unwrap_or(0);
        progress((done as u32 + 1) * 1000 / all);
        NanoUsd(cost.saturating_mul(count))
    });
    costs.sum()
}

/// What nobody can pay less than who keeps every guest running and is given no free hours.
#[must_use]
pub fn floor(grid: &Grid, guests: &[Guest], settings: &Settings) -> NanoUsd {
    let of_kind = |guest: &Guest| {
        let fits = fitting(grid, guest, settings);
        let now = |tick| fits.iter().filter(|m| tick >= m.first_tick).map(|m| m.price(tick).0).min().unwrap_or(0);
        let now: Vec<u64> = (0..grid.ticks).map(now).collect();
        let phases = (HOUR_MS / grid.tick_ms) as usize;
        let cheapest = |tick: usize| now[(tick + 1).saturating_sub(phases)..=tick].iter().copied().min().unwrap_or(0);
        let sum: u128 = (0..grid.ticks).map(|tick| u128::from(cheapest(tick))).sum();
        u64::try_from(sum * u128::from(grid.tick_ms) / u128::from(HOUR_MS)).unwrap_or(u64::MAX)
    };
    kinds(guests).into_iter().map(|(guest, count)| NanoUsd(of_kind(guest).saturating_mul(count))).sum()
}

fn fitting<'a>(grid: &'a Grid, guest: &Guest, settings: &Settings) -> Vec<&'a GridMarket> {
    let memory = guest.load.memory_bytes.saturating_add(settings.host_reserve_bytes);
    grid.fitting(guest.vcpus, memory).into_iter().map(|id| &grid.markets[id as usize]).collect()
}

/// A price for a time, rounded down.
fn part(price: NanoUsd, ms: u64) -> u64 {
    (u128::from(price.0) * u128::from(ms) / u128::from(HOUR_MS)) as u64
}

fn of_guest(grid: &Grid, guest: &Guest, settings: &Settings) -> Option<u64> {
    let markets = fitting(grid, guest, settings);
    if markets.is_empty() {
        return None;
    }
    let phases = (HOUR_MS / grid.tick_ms) as usize;
    let zones = markets.iter().filter_map(|market| market.zone).max().map_or(0, |zone| zone as usize + 1);
    let egress = move_egress(guest).0;
    let copy_ms = evacuable::predict(&guest.load, &guest.path).map_or(HOUR_MS, |live| live.copy_ms);
    let move_ms = guest.path.host_ready_ms.saturating_add(copy_ms);
    // cost[market * phases + phase]: the least that was paid when a tick begins there.
    let mut cost = vec![NEVER; markets.len() * phases];
    let mut next = cost.clone();
    for tick in 0..grid.ticks {
        // The cheapest way to leave each zone; the last entry is on-demand's, which is in every zone.
        let mut leave = vec![NEVER; zones + 1];
        next.fill(NEVER);
        for (m, market) in markets.iter().enumerate() {
            let is_taken = market.is_taken(tick);
            let slots = &cost[m * phases..(m + 1) * phases];
            let zone = market.zone.map_or(zones, |zone| zone as usize);
            for (phase, &so_far) in slots.iter().enumerate().filter(|(_, so_far)| **so_far != NEVER) {
                let hour_price = market.price(tick - phase.min(tick));
                let away = so_far.saturating_add(leaving(grid, market, tick, phase, is_taken, move_ms, settings));
                leave[zone] = leave[zone].min(away);
                if is_taken {
                    continue;
                }
                let stay = match grid.regime {
                    Regime::Auction if phase == 0 => market.price(tick).0,
                    Regime::Auction => 0,
                    Regime::Capacity => part(hour_price, grid.tick_ms),
                };
                let slot = &mut next[m * phases + (phase + 1) % phases];
                *slot = (*slot).min(so_far.saturating_add(stay));
            }
        }
        let least = leave.iter().copied().min().unwrap_or(NEVER);
        for (m, market) in markets.iter().enumerate().filter(|(_, market)| market.is_open(tick)) {
            let arrive = if tick == 0 {
                0
            } else {
                match market.zone {
                    // From on-demand the zone is not known here: free, in the optimum's favour.
                    Some(zone) => leave[zone as usize].min(leave[zones]).min(least.saturating_add(egress)),
                    None => least,
                }
            };
            if arrive == NEVER {
                continue;
            }
            let first = match grid.regime {
                Regime::Auction => market.price(tick).0,
                Regime::Capacity => part(market.price(tick), grid.tick_ms),
            };
            let slot = &mut next[m * phases + 1 % phases];
            *slot = (*slot).min(arrive.saturating_add(first));
        }
        std::mem::swap(&mut cost, &mut next);
    }
    cost.into_iter().min().filter(|cost| *cost != NEVER)
}

/// What is still paid for a host after the guest began to leave it.
fn leaving(
    grid: &Grid,
    market: &GridMarket,
    tick: usize,
    phase: usize,
    is_taken: bool,
    move_ms: u64,
    settings: &Settings,
) -> u64 {
    let over_ms = if is_taken { settings.notice_ms } else { move_ms };
    let now = market.price(tick);
    match grid.regime {
        Regime::Capacity => {
            // The rest of the hour at its price, what lies beyond at a price that is not known here: the lower of both.
            part(now.min(market.price(tick - phase.min(tick))), over_ms)
        }
        // A host that is taken: its last hour is paid already, and one that would begin now is free.
        Regime::Auction if is_taken => 0,
        Regime::Auction => {
            let left_ms = if phase == 0 { 0 } else { HOUR_MS - phase as u64 * grid.tick_ms };
            now.0.saturating_mul(over_ms.saturating_sub(left_ms).div_ceil(HOUR_MS))
        }
    }
}
