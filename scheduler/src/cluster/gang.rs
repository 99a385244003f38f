//! Gang placement: all guests of a group find a host, or none is placed.

use super::{Cluster, Demand, GuestNumber, HostNumber, Objective};

/// What came of placing a gang.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gang {
    /// Each has a host, in the order asked; the cluster holds them now.
    Placed(Vec<HostNumber>),
    /// There is no way; the cluster is as it was.
    Impossible,
    /// No way was found within the budget; the cluster is as it was.
    GaveUp,
}

/// How long to search when the first way fails: the number of guests that are put somewhere on trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GangBudget(pub u32);

impl Default for GangBudget {
    fn default() -> Self {
        Self(10_000)
    }
}

/// A guest on trial: the hosts that it may yet try, best last.
struct Trial {
    left: Vec<HostNumber>,
}

impl Cluster {
    /// Places all of these guests or none. Larger ones choose first. When taking the best host each time leads nowhere,
    /// other hosts are tried, depth first, within the budget; what is found is valid, but not always the cheapest.
    #[must_use]
    pub fn place_gang(&mut self, gang: &[(GuestNumber, Demand)], objective: &Objective, budget: GangBudget) -> Gang {
        let mut numbers: Vec<GuestNumber> = gang.iter().map(|(guest, _)| *guest).collect();
        numbers.sort_unstable();
        numbers.dedup();
        if numbers.len() < gang.len() || numbers.iter().any(|guest| self.guests.contains_key(guest)) {
            return Gang::Impossible;
        }
        let mut order: Vec<usize> = (0..gang.len()).collect();
        order.sort_by_key(|i| std::cmp::Reverse((gang[*i].1.room.memory_bytes, gang[*i].1.room.vcpus)));
        if self.take_best(gang, &order, objective) {
            return self.placed(gang);
        }
        self.search(gang, &order, objective, budget)
    }

    fn placed(&self, gang: &[(GuestNumber, Demand)]) -> Gang {
        let hosts: Option<Vec<HostNumber>> = gang.iter().map(|(guest, _)| self.host_of(*guest)).collect();
        hosts.map_or(Gang::Impossible, Gang::Placed)
    }

    fn undo(&mut self, gang: &[(GuestNumber, Demand)]) {
        for (guest, _) in gang {
            // Those that were not placed yet have nothing to give back.
            let _ = self.release(*guest);
        }
    }

    fn take_best(&mut self, gang: &[(GuestNumber, Demand)], order: &[usize], objective: &Objective) -> bool {
        for i in order {
            let (guest, demand) = &gang[*i];
            let Some(host) = self.place(demand, objective) else {
                self.undo(gang);
                return false;
            };
            if self.assign(*guest, demand, host).is_err() {
                self.undo(gang);
                return false;
            }
        }
        true
    }

    fn search(
        &mut self,
        gang: &[(GuestNumber, Demand)],
        order: &[usize],
        objective: &Objective,
        GangBudget(mut budget): GangBudget,
    ) -> Gang {
        let mut trials: Vec<Trial> = Vec::with_capacity(order.len());
        loop {
            let Some(i) = order.get(trials.len()) else { return self.placed(gang) };
            let found = self.best(&gang[*i].1, objective, false);
            trials.push(Trial { left: found.into_iter().rev().map(|(_, host)| host).collect() });
            // The last guest takes its next host; when it has none left, the one before it does.
            loop {
                let Some(depth) = trials.len().checked_sub(1) else { return Gang::Impossible };
                let (guest, demand) = &gang[order[depth]];
                let _ = self.release(*guest);
                if budget == 0 {
                    self.undo(gang);
                    return Gang::GaveUp;
                }
                match trials[depth].left.pop() {
                    Some(host) if self.assign(*guest, demand, host).is_ok() => {
                        budget -= 1;
                        break;
                    }
                    Some(_) => {}
                    None => {
                        trials.pop();
                    }
                }
            }
        }
    }
}
