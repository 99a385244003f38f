//! Leases, with time as what may have happened: a lease that was granted may run out at the host at any moment, and the controller's
//! count of it is over at some moment after that. That the second comes after the first is arithmetic (`supercloud_api::lease`), and
//! taken for granted here; everything else about it is not.

use super::*;

/// What a guest's process knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Lease {
    /// It needs none.
    #[default]
    Free,
    /// It runs by one.
    Valid,
    /// That is over: it stands still.
    Over,
}

/// All that there is of leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Leases {
    /// Of the process of the source's machine, at each host.
    pub at: [Lease; HOSTS],
    /// An answer is on its way that would still renew it.
    answers: [bool; HOSTS],
    /// Something that was granted may count, as far as the controller knows.
    may_count: bool,
    /// A standby took over from a source that may still be there.
    pub failed_over: bool,
}

impl Model {
    /// The mirror whose source host `n` is, while it may be taken over without its word.
    fn leased_mirror(&self, h: &Host) -> Option<SourcePlan> {
        match self.machine(h).source().state() {
            SourceState::Copying { plan, broken } if matches!(plan.kind, OperationKind::Mirror { .. }) => {
                // The defect: it takes a mirror that broke for one that is over.
                (!(*broken && self.has(Mutation::LeaseEndedEarly))).then_some(*plan)
            }
            _ => None,
        }
    }

    /// The guest is its own again.
    fn needs_no_lease(&self, h: &Host) -> bool {
        match self.machine(h).source().state() {
            SourceState::Running | SourceState::Resuming { .. } => true,
            SourceState::Copying { .. } => self.leased_mirror(h).is_none(),
            _ => false,
        }
    }

    /// Whether a process stands still by itself.
    pub(super) fn is_fenced(&self, w: &World, n: usize, p: &Process) -> bool {
        let is_of_source = p.epoch == epoch_of(self.machine(&w.hosts[n]).source());
        is_of_source && w.leases.at[n] == Lease::Over && !self.has(Mutation::ProcessRunsOn)
    }

    /// Whether a mirror of host `n` may take cuts: not before its guest obeys.
    pub(super) fn may_cut(&self, w: &World, n: usize) -> bool {
        !self.scenario.leased || w.leases.at[n] != Lease::Free || self.has(Mutation::MirrorsBeforeLease)
    }

    /// The host whose guest a standby may take over from now.
    fn due(&self, w: &World) -> Option<usize> {
        let op = self.record(w).operation.as_ref().filter(|op| op.is_mirrored() && !op.source_lost)?;
        let to = (0..HOSTS).find(|n| Some(host(*n)) == op.kind.destination())?;
        let is_whole = !w.hosts[to].down && !w.hosts[to].dead && self.can_take_over(w, to);
        let may = is_whole && (!w.leases.may_count || self.has(Mutation::FailsOverEarly));
        (0..HOSTS).find(|n| may && Some(host(*n)) == op.source())
    }

    pub(super) fn lease_actions(&self, w: &World, actions: &mut Vec<Action>) {
        if !self.scenario.leased {
            return;
        }
        let leases = &w.leases;
        for (n, h) in w.hosts.iter().enumerate() {
            let is_up = !h.down && !h.dead;
            if is_up && self.leased_mirror(h).is_some() {
                if !leases.answers[n] {
                    actions.push(Action::AskLease(n));
                } else {
                    actions.push(Action::TakeLease(n));
                }
            }
            if leases.answers[n] {
                actions.push(Action::AnswerTooLate(n));
            }
            if leases.at[n] == Lease::Valid {
                actions.push(Action::LeaseOver(n));
            }
            if is_up && leases.at[n] != Lease::Free && self.needs_no_lease(h) {
                actions.push(Action::EndLease(n));
            }
        }
        if leases.may_count {
            actions.push(Action::CountOver);
        }
        actions.push(Action::RestartController);
        if self.due(w).is_some() {
            actions.push(Action::FailOver);
        }
    }

    /// Whether it is possible, and was done.
    pub(super) fn act_on_lease(&mut self, w: &mut World, action: Action) -> bool {
        match action {
            Action::AskLease(n) => {
                let record = self.record(w);
                let epoch = self.machine(&w.hosts[n]).source().epoch();
                let is_lost = record.operation.as_ref().is_some_and(|op| op.is_mirrored() && op.source_lost);
                if !record.is_owned_by(host(n), epoch) || (is_lost && !self.has(Mutation::GrantsAfterDecision)) {
                    return false;
                }
                w.leases.answers[n] = true;
                w.leases.may_count = true;
            }
            Action::TakeLease(n) => {
                w.leases.answers[n] = false;
                w.leases.at[n] = Lease::Valid;
            }
            Action::AnswerTooLate(n) => w.leases.answers[n] = false,
            Action::LeaseOver(n) => w.leases.at[n] = Lease::Over,
            Action::EndLease(n) => w.leases.at[n] = Lease::Free,
            Action::CountOver => {
                if w.leases.at.contains(&Lease::Valid) || w.leases.answers.contains(&true) {
                    return false;
                }
                w.leases.may_count = false;
            }
            // It knows nothing of what it granted: anything may count.
            Action::RestartController => w.leases.may_count = !self.has(Mutation::RestartForgets),
            Action::FailOver => {
                let record = self.record(w).clone();
                let next = self.due(w).and_then(|n| note_host_lost(&record, host(n)).record);
                let Some(next) = next else { return false };
                w.leases.failed_over = true;
                self.write(w, next);
            }
            _ => return false,
        }
        true
    }

    /// A lease goes with its process; an agent without the process takes no answer for it.
    pub(super) fn tidy_leases(&self, w: &mut World) {
        for (n, h) in w.hosts.iter().enumerate() {
            if h.by_epoch(epoch_of(self.machine(h).source())).is_none() {
                w.leases.at[n] = Lease::Free;
            }
            if h.down || h.dead || self.leased_mirror(h).is_none() {
                w.leases.answers[n] = false;
            }
        }
    }
}
