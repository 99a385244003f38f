//! Orders that are said again: what is open often, what is settled rarely, and each host's queue shared fairly.
//!
//! A host may hold blocks of thousands of stopped guests, and only so many orders wait for a slow agent. So a holder that has nothing to
//! do is told when its agent connects and then rarely; what is open goes first; and where one round found a host's queue full, the next
//! begins.

use std::collections::HashMap;

use supercloud_api::{
    handover::{Order, OrderBody, SourceOrder},
    ids::{GuestId, HostId},
    link::Directive,
};
use tokio::time::Instant;

use super::{Engine, EngineError};
use crate::state::{GuestRecord, Stored};

/// One order of a round.
#[derive(Debug)]
struct Due<'a> {
    guest: &'a GuestRecord,
    order: Order,
    is_open: bool,
}

/// For each host whose queue was full: the guest whose order found it so, of open orders (true) and of settled ones.
type Next = HashMap<(HostId, bool), GuestId>;

/// What is kept from round to round.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    next: Next,
    settled_at: Option<Instant>,
}

/// Whether something is expected to come of the order. Nothing is of that to a holder whose blocks are still needed while nothing is
/// under way: it goes on holding them.
fn is_open(guest: &GuestRecord, order: &Order) -> bool {
    let holds_on = matches!(order.body, OrderBody::Source(SourceOrder::Elsewhere { needed: true, .. }));
    guest.owner.operation.is_some() || !holds_on
}

/// The orders of a round, by host.
fn due(guests: &[Stored<GuestRecord>], with_settled: bool) -> HashMap<HostId, Vec<Due<'_>>> {
    let mut due: HashMap<HostId, Vec<Due<'_>>> = HashMap::new();
    for guest in guests {
        let guest = &guest.value;
        for order in guest.owner.orders() {
            let is_open = is_open(guest, &order);
            if is_open || with_settled {
                due.entry(order.to).or_default().push(Due { guest, order, is_open });
            }
        }
    }
    due
}

/// What comes first in a host's queue: what is open, each part from where an earlier round found the queue full.
fn rank(next: &Next, host: HostId, is_open: bool, guest: GuestId) -> (bool, bool, GuestId) {
    let is_behind = next.get(&(host, is_open)).is_some_and(|next| guest < *next);
    (!is_open, is_behind, guest)
}

impl Engine {
    /// Says again what has had no effect yet.
    pub(super) async fn repeat_orders(&self, guests: &[Stored<GuestRecord>], rounds: &mut Rounds) {
        let now = Instant::now();
        let with_settled = rounds.settled_at.is_none_or(|at| now.duration_since(at) >= self.pace.settled);
        if with_settled {
            rounds.settled_at = Some(now);
        }
        for (host, mut orders) in due(guests, with_settled) {
            if !self.sessions.is_open(host) {
                rounds.next.retain(|(to, _), _| *to != host);
                continue;
            }
            orders.sort_by_key(|due| rank(&rounds.next, host, due.is_open, due.guest.guest.id));
            rounds.next.retain(|(to, is_open), _| *to != host || !(*is_open || with_settled));
            for Due { guest, order, is_open } in orders {
                let id = guest.guest.id;
                if let Some(directive) = self.directive_for(guest, order).await
                    && !self.sessions.send(host, directive)
                {
                    rounds.next.insert((host, is_open), id);
                    break;
                }
            }
        }
    }

    /// All orders for one host, after it has connected; waits for room in its queue.
    pub(crate) async fn send_orders_to(&self, host: HostId) -> Result<(), EngineError> {
        for guest in self.state.list::<GuestRecord>().await? {
            for order in guest.owner.orders().into_iter().filter(|order| order.to == host) {
                if let Some(directive) = self.directive_for(&guest.value, order).await {
                    self.sessions.send_waiting(host, directive).await;
                }
            }
            if guest.discarding.contains(&host) {
                self.sessions.send_waiting(host, Directive::Discard { guest: guest.guest.id }).await;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One round with a queue that takes `room`; what was told.
    fn round(next: &mut Next, host: HostId, orders: &[(GuestId, bool)], room: usize) -> Vec<GuestId> {
        let mut orders = orders.to_vec();
        orders.sort_by_key(|(guest, is_open)| rank(next, host, *is_open, *guest));
        next.clear();
        if let Some((guest, is_open)) = orders.get(room) {
            next.insert((host, *is_open), *guest);
        }
        orders.into_iter().take(room).map(|(guest, _)| guest).collect()
    }

    #[test]
    fn the_newest_guests_have_their_turn_however_many_there_are() {
        let host = HostId::generate();
        let settled: Vec<(GuestId, bool)> = (0..3000).map(|_| (GuestId::generate(), false)).collect();
        let mut next = Next::new();
        let mut told = std::collections::HashSet::new();
        for _ in 0..3 {
            told.extend(round(&mut next, host, &settled, 1024));
        }
        assert_eq!(told.len(), 3000);
        // What is open goes before, and many of that share the queue as well.
        let open: Vec<(GuestId, bool)> = (0..1500).map(|_| (GuestId::generate(), true)).collect();
        let all: Vec<_> = settled.iter().chain(&open).copied().collect();
        told.clear();
        for _ in 0..2 {
            told.extend(round(&mut next, host, &all, 1024));
        }
        assert!(open.iter().all(|(guest, _)| told.contains(guest)));
    }
}
