//! The controller: its durable record, its decisions, the defects that can be put into them, and the network.

use super::{check::raised, *};

impl Model {
    /// The controller's durable write, and what it sends after it.
    pub(super) fn write(&mut self, w: &mut World, record: OwnerRecord) {
        let orders = record.orders();
        if matches!(record.owner, Owner::Lost(_)) {
            w.lost = true;
        }
        w.record = self.records.id(record);
        self.send_orders(w, orders);
    }

    pub(super) fn write_abort(&mut self, w: &mut World, before: &OwnerRecord, mut after: OwnerRecord) {
        let orders = after.orders();
        if self.has(Mutation::AbortDoesNotBlock) {
            after = before.clone();
        }
        self.write(w, after);
        self.send_orders(w, orders);
    }

    pub(super) fn send_orders(&mut self, w: &mut World, orders: Vec<Order>) {
        for order in orders {
            self.send(w, Message::Order(order));
        }
    }

    pub(super) fn message(&mut self, message: Message) -> usize {
        let at = self.messages.id(message) as usize;
        assert!(self.lossy || at < NET_WORDS * 64, "more messages than the model has room for");
        at
    }

    pub(super) fn send(&mut self, w: &mut World, message: Message) {
        let at = self.message(message);
        if self.lossy {
            self.sent.push(at);
        } else {
            w.net[at / 64] |= 1 << (at % 64);
        }
    }

    pub(super) fn deliver(
        &mut self,
        w: &mut World,
        at: usize,
        when_open: WhenOpen,
        lose: bool,
    ) -> Result<bool, Violation> {
        match self.messages.get(at as u32).clone() {
            Message::Report { from, report } => {
                let mut before = self.record(w).clone();
                if self.has(Mutation::StandbyTakesOver)
                    && let (Report::RequestSwitch(_), Some(op)) = (&report, &mut before.operation)
                {
                    op.source_lost |= op.is_mirrored();
                }
                let mut accepted = accept(&before, host(from), &report, when_open);
                self.mutate_decision(&before, from, &report, &mut accepted);
                if self.has(Mutation::LostSourceNotTold) {
                    let is_told = |order: &Order| {
                        matches!(order.body, OrderBody::Destination(DestinationOrder::SourceLost { .. }))
                    };
                    accepted.orders.retain(|order| !is_told(order));
                }
                for alarm in accepted.alarms {
                    raised(w, alarm)?;
                }
                if let Some(record) = accepted.record.filter(|_| !lose) {
                    if self.has(Mutation::AbortDoesNotBlock)
                        && record.operation.as_ref().is_some_and(|op| matches!(op.verdict, Verdict::Aborted(_)))
                    {
                        self.write_abort(w, &before, record);
                    } else {
                        self.write(w, record);
                    }
                }
                self.send_orders(w, accepted.orders);
            }
            Message::Order(order) => {
                let n = (0..HOSTS).find(|n| host(*n) == order.to).unwrap();
                if w.hosts[n].down || w.hosts[n].dead {
                    return Ok(false);
                }
                self.step(w, n, order.body.into())?;
            }
            Message::Maps { operation, to, version } => {
                if w.hosts[to].down || w.hosts[to].dead {
                    return Ok(false);
                }
                return self.adopt(w, to, operation, version);
            }
        }
        Ok(true)
    }

    pub(super) fn mutate_decision(&self, before: &OwnerRecord, from: usize, report: &Report, accepted: &mut Accepted) {
        let Report::RequestSwitch(request) = report else { return };
        let Some(mutation) = self.scenario.mutation else { return };
        let granted = accepted.record.as_mut().filter(|next| next.stamp() != before.stamp());
        match (mutation, granted) {
            (Mutation::NoEpochCheck, None) if before.stamp() != (Stamp { owner: request.to, ..before.stamp() }) => {
                let mut record = before.clone();
                record.owner = Owner::Host(host(from));
                record.epoch = request.from.epoch.next();
                let (operation, owner, epoch) = (request.operation, record.owner, record.epoch);
                let turn = u64::from(self.index(operation)) + 1;
                let grant = Grant { guest: guest(), operation, turn, owner, epoch };
                let body = OrderBody::Destination(DestinationOrder::Granted(grant));
                accepted.orders.push(Order { to: host(from), body });
                accepted.record = Some(record);
            }
            (Mutation::SwitchGrantedTwice, Some(next)) => {
                if let (Some(op), Some(was)) = (&mut next.operation, &before.operation) {
                    (op.verdict, op.phase, op.source_open) = (Verdict::Open, was.phase, was.source_open);
                }
            }
            (Mutation::FreezeThawsTwice, Some(next)) if matches!(before.owner, Owner::Frozen(_)) => {
                next.owner = before.owner;
                next.epoch = before.epoch;
                next.operation = None;
            }
            (Mutation::SourceReleasedAtSwitch, Some(next)) => {
                for holder in &mut next.holders {
                    holder.needed = false;
                }
                accepted.orders.extend(next.orders());
            }
            _ => {}
        }
    }
}
