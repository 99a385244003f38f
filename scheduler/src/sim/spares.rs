//! Hosts that are kept ready and empty, so that a guest whose host is taken need not wait for a new one.
//!
//! A policy says for how many guests one is kept; it is rented as the policy would rent for a guest of that size, away from
//! the pools in which guests are (these are taken as a whole). A guest that takes it takes over its lease; another one is
//! rented at the next tick.

use super::{
    LineKind,
    engine::{Class, Replay, lease_place},
    ledger::Lease,
};
use crate::{
    evacuable::Load,
    market::End,
    policy::{self, Action, Guest, View},
    price::Quote,
};

/// A spare host.
pub(super) struct Spare {
    /// The guest that it is as large as, with nothing to move.
    ghost: Guest,
    index: u32,
    class: usize,
    lease: Option<Lease>,
    zone: Option<u32>,
    ready_ms: u64,
    last_move_ms: Option<u64>,
}

impl Replay<'_> {
    /// The spares that the policy wants for these guests, given as (index, class, guest).
    pub(super) fn plan_spares(&mut self, guests: &[(u32, usize, &Guest)]) {
        let host_ready_ms = guests.iter().map(|(_, _, guest)| guest.path.host_ready_ms).max().unwrap_or(0);
        let each = self.policy.guests_per_spare(self.settings.notice_ms, host_ready_ms);
        let sizes: Vec<_> = guests.iter().enumerate().map(|(i, (_, _, guest))| (i, guest.load.memory_bytes)).collect();
        let spares = policy::spare_sizes(&sizes, each).into_iter().map(|i| {
            let (index, class, guest) = guests[i];
            let nothing = Load { memory_bytes: 0, dirty_bytes_per_s: 0, working_set_bytes: 0, volume_dirty_bytes: 0 };
            let ghost = Guest { load: nothing, egress_nanousd_per_gb: 0, ..guest.clone() };
            Spare { ghost, index, class, lease: None, zone: None, ready_ms: 0, last_move_ms: None }
        });
        self.spares = spares.collect();
    }

    /// Rents what is missing, and moves what is too dear.
    pub(super) fn tend_spares(&mut self, tick: usize, classes: &[Class]) {
        let mut spares = std::mem::take(&mut self.spares);
        for spare in &mut spares {
            self.tend(tick, spare, &classes[spare.class]);
        }
        self.spares = spares;
    }

    fn tend(&mut self, tick: usize, spare: &mut Spare, class: &Class) {
        let now_ms = tick as u64 * self.grid.tick_ms;
        if let Some(lease) = spare.lease.filter(|lease| self.grid.markets[lease.market as usize].is_taken(tick)) {
            self.close(LineKind::Spare, spare.index, lease, now_ms + self.settings.notice_ms, End::Taken);
            spare.lease = None;
        }
        let place = spare.lease.map(|lease| lease_place(self.grid, lease, spare.zone, spare.last_move_ms, now_ms));
        let here = place.map(|place| place.market);
        // A pool into which guests came is left: it would be taken with them.
        let is_apart = |quote: &&Quote<u32>| {
            let market = quote.market as usize;
            self.crowd[market] == 0 || self.grid.markets[market].is_on_demand()
        };
        let apart: Vec<_> = class.quotes.iter().filter(is_apart).cloned().collect();
        let decide = |quotes: &[Quote<u32>]| {
            let plan = self.policy.decide(&View {
                now_ms,
                wall_ms: self.grid.start_ms + now_ms,
                look_ms: self.grid.tick_ms,
                regime: self.grid.regime,
                guest: &spare.ghost,
                place,
                first: here,
                is_leaving: false,
                notice_ms: self.settings.notice_ms,
                has_spare: false,
                quotes,
                facts: &self.facts,
            });
            match plan.action {
                Action::Go(to) if self.grid.may_enter(to, tick, &class.fits, here) => Some(to),
                _ => None,
            }
        };
        let to = decide(&apart).or_else(|| if here.is_none() { decide(&class.quotes) } else { None });
        let Some(to) = to else { return };
        let ready_ms = now_ms.saturating_add(spare.ghost.path.host_ready_ms);
        if let Some(old) = spare.lease.take() {
            self.close(LineKind::Spare, spare.index, old, ready_ms, End::Returned);
            spare.last_move_ms = Some(now_ms);
        }
        let market = &self.grid.markets[to as usize];
        spare.lease = Some(Lease { market: to, is_on_demand: market.is_on_demand(), from_ms: now_ms });
        spare.zone = market.zone.or(spare.zone);
        spare.ready_ms = ready_ms;
    }

    /// The smallest spare that is ready and fits guests of a class.
    pub(super) fn spare_for(&self, tick: usize, class: &Class) -> Option<usize> {
        let now_ms = tick as u64 * self.grid.tick_ms;
        let is_good = |spare: &&(usize, &Spare)| {
            spare.1.ready_ms <= now_ms
                && spare.1.lease.is_some_and(|lease| {
                    class.fits[lease.market as usize] && !self.grid.markets[lease.market as usize].is_taken(tick)
                })
        };
        let size = |lease: Option<Lease>| {
            lease.map(|lease| self.grid.markets[lease.market as usize].instance.memory_bytes).unwrap_or(u64::MAX)
        };
        let spares = self.spares.iter().enumerate();
        spares.filter(|spare| is_good(&spare)).min_by_key(|(_, spare)| size(spare.lease)).map(|(i, _)| i)
    }

    /// Gives a spare's lease and its zone away.
    pub(super) fn take_spare(&mut self, spare: usize) -> Option<(Lease, Option<u32>)> {
        let spare = self.spares.get_mut(spare)?;
        Some((spare.lease.take()?, spare.zone.take()))
    }

    /// Returns all spares.
    pub(super) fn close_spares(&mut self) {
        for spare in std::mem::take(&mut self.spares) {
            if let Some(lease) = spare.lease {
                self.close(LineKind::Spare, spare.index, lease, self.grid.length_ms(), End::Returned);
            }
        }
    }
}
