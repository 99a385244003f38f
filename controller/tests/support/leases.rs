//! Leases of mirrored guests: asked for, and handed on to their processes, which obey them whoever is there.

use supercloud_api::{
    handover::{OperationKind, SourceState},
    ids::{Epoch, GuestId},
    lease,
    link::{Answer, Envelope, Outcome, Query},
};

use super::{Agent, lock};

impl Agent {
    /// The lease by which a guest must run here.
    pub(super) fn lease_of(&self, guest: GuestId) -> Option<(Epoch, u64)> {
        let disk = lock(&self.seat.disk);
        let kept = disk.guests.get(&guest)?;
        let SourceState::Copying { plan, .. } = kept.machine.source().state() else { return None };
        let OperationKind::Mirror { .. } = plan.kind else { return None };
        Some((plan.epoch, kept.assignment.as_ref()?.mirror?.lease_ms?))
    }

    pub(super) fn has_lease(&self, guest: GuestId) -> bool {
        lock(&self.seat.ground).leases.contains_key(&(self.seat.host, guest))
    }

    pub(super) fn ask_for_leases(&mut self) {
        let guests: Vec<GuestId> = lock(&self.seat.disk).guests.keys().copied().collect();
        for guest in guests {
            match self.lease_of(guest) {
                Some((epoch, lease_ms)) => {
                    let (number, asked_ms) = (self.ticks, lease::boot_ms());
                    self.asked.insert(number, (guest, asked_ms));
                    let body = Query::RenewLease { guest, epoch, asked_ms, lease_ms };
                    self.queries.push_back(Envelope { number, body });
                }
                None => {
                    let machine = self.machine(guest);
                    let is_mine =
                        machine.is_some_and(|machine| matches!(machine.source().state(), SourceState::Running));
                    if is_mine {
                        lock(&self.seat.ground).leases.remove(&(self.seat.host, guest));
                    }
                }
            }
        }
    }

    pub(super) fn leased(&mut self, answer: Envelope<Outcome<Answer>>) {
        let Some((guest, asked_ms)) = self.asked.remove(&answer.number) else { return };
        let Ok(Answer::Lease { asked_ms: dated, lease_ms }) = answer.body.into() else { return };
        assert_eq!(dated, asked_ms);
        if self.lease_of(guest).is_some() {
            let mut ground = lock(&self.seat.ground);
            let until_ms = ground.leases.entry((self.seat.host, guest)).or_default();
            *until_ms = lease::holds_until_ms(asked_ms, lease_ms).max(*until_ms);
        }
    }
}
