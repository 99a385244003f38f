//! Many moves in one decision: hosts are emptied, or loads made even. What is decided is already so in the cluster
//! afterwards: who only asks gives a clone.
//!
//! The moves can be made one after the other, in the order given: each has room when those before it are done.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{Cluster, Demand, Gang, GangBudget, GuestNumber, HostNumber, Objective, Placed, Room, Rule};

/// A guest that goes from one host to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// The guest.
    pub guest: GuestNumber,
    /// Where it is.
    pub from: HostNumber,
    /// Where it goes.
    pub to: HostNumber,
}

/// What was decided.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Moves {
    /// The moves, in the order in which they have room.
    pub moves: Vec<Move>,
    /// Guests that should go and cannot: no host takes them, or takes all of those that stay together with them.
    pub stuck: Vec<GuestNumber>,
}

/// Hosts that are looked at for one guest when loads are made even, from the least loaded on.
const LOOKS: usize = 32;
/// Guests of a host that are tried when it is the most loaded one.
const TRIES: usize = 8;
/// A whole host, in the unit of loads: millionths.
const WHOLE: u64 = 1_000_000;

/// The larger share of vCPUs and memory that is taken, in millionths.
fn load(capacity: &Room, used: &Room) -> u64 {
    let share = |part: u64, whole: u64| {
        u64::try_from(u128::from(part) * u128::from(WHOLE) / u128::from(whole.max(1))).unwrap_or(u64::MAX)
    };
    share(used.memory_bytes, capacity.memory_bytes).max(share(u64::from(used.vcpus), u64::from(capacity.vcpus)))
}

/// Hosts by load, with the loads by host.
#[derive(Debug, Clone, Default)]
struct Loads {
    of: HashMap<HostNumber, u64>,
    ordered: BTreeSet<(u64, HostNumber)>,
    /// Those of which a guest may go.
    sources: BTreeSet<(u64, HostNumber)>,
}

impl Loads {
    fn set(&mut self, number: HostNumber, now: u64) {
        let before = self.of.insert(number, now);
        let was_source = before.is_none_or(|before| {
            self.ordered.remove(&(before, number));
            self.sources.remove(&(before, number))
        });
        self.ordered.insert((now, number));
        if was_source {
            self.sources.insert((now, number));
        }
    }

    fn mean(&self) -> u64 {
        let sum: u128 = self.ordered.iter().map(|(load, _)| u128::from(*load)).sum();
        u64::try_from(sum / (self.ordered.len() as u128).max(1)).unwrap_or(u64::MAX)
    }
}

impl Cluster {
    /// Moves everything off these hosts, which take no new guests from now on. Guests of groups that stay together go together or
    /// stay together; larger ones choose first. A guest without a demand stays and is told as stuck.
    pub fn drain(
        &mut self,
        hosts: &[HostNumber],
        demands: &HashMap<GuestNumber, Demand>,
        objective: &Objective,
        budget: GangBudget,
    ) -> Moves {
        let mut leaving: Vec<(GuestNumber, HostNumber)> = Vec::new();
        for host in hosts.iter().copied().collect::<BTreeSet<_>>() {
            if self.change_host(host, |spec| spec.is_cordoned = true).is_ok() {
                leaving.extend(self.guests_on(host).into_iter().map(|guest| (guest, host)));
            }
        }
        let mut done = Moves::default();
        for set in self.sets(&leaving) {
            let gang: Option<Vec<(GuestNumber, Demand)>> =
                set.iter().map(|(guest, _)| Some((*guest, demands.get(guest)?.clone()))).collect();
            match gang.and_then(|gang| self.move_all(&set, &gang, objective, budget)) {
                Some(moves) => done.moves.extend(moves),
                None => done.stuck.extend(set.iter().map(|(guest, _)| *guest)),
            }
        }
        done
    }

    /// Moves all of these or none.
    fn move_all(
        &mut self,
        set: &[(GuestNumber, HostNumber)],
        gang: &[(GuestNumber, Demand)],
        objective: &Objective,
        budget: GangBudget,
    ) -> Option<Vec<Move>> {
        let before: Vec<(GuestNumber, Placed)> =
            set.iter().filter_map(|(guest, _)| self.take_out(*guest).map(|placed| (*guest, placed))).collect();
        let placed = match gang {
            // Of one, the best host is the only question.
            [(guest, demand)] => {
                let host = self.place(demand, objective);
                host.filter(|host| self.assign(*guest, demand, *host).is_ok()).map(|host| vec![host])
            }
            _ => match self.place_gang(gang, objective, budget) {
                Gang::Placed(at) => Some(at),
                Gang::Impossible | Gang::GaveUp => None,
            },
        };
        let Some(at) = placed else {
            before.into_iter().for_each(|(guest, placed)| self.put_back(guest, placed));
            return None;
        };
        Some(set.iter().zip(at).map(|((guest, from), to)| Move { guest: *guest, from: *from, to }).collect())
    }

    /// Guests that must go together, the set with the largest member first; most sets have one member.
    fn sets(&self, leaving: &[(GuestNumber, HostNumber)]) -> Vec<Vec<(GuestNumber, HostNumber)>> {
        let is_together =
            |group: &u32| matches!(self.groups.get(group).and_then(|there| there.rule), Some(Rule::Together { .. }));
        let mut sets: BTreeMap<usize, Vec<(GuestNumber, HostNumber)>> = BTreeMap::new();
        let mut set_of: HashMap<u32, usize> = HashMap::new();
        for (i, one) in leaving.iter().enumerate() {
            let groups: Vec<u32> = (self.guests.get(&one.0).into_iter())
                .flat_map(|placed| placed.groups.iter().copied().filter(is_together))
                .collect();
            let joined: BTreeSet<usize> = groups.iter().filter_map(|group| set_of.get(group).copied()).collect();
            let mut members: Vec<(GuestNumber, HostNumber)> =
                joined.iter().filter_map(|set| sets.remove(set)).flatten().collect();
            members.push(*one);
            set_of.values_mut().filter(|set| joined.contains(set)).for_each(|set| *set = i);
            set_of.extend(groups.into_iter().map(|group| (group, i)));
            sets.insert(i, members);
        }
        let size =
            |guest: &GuestNumber| self.guests.get(guest).map(|placed| (placed.room.memory_bytes, placed.room.vcpus));
        let mut sets: Vec<_> = sets.into_values().collect();
        sets.sort_by_key(|set| {
            (std::cmp::Reverse(set.iter().map(|(guest, _)| size(guest)).max()), set.first().copied())
        });
        sets
    }

    fn take_out(&mut self, guest: GuestNumber) -> Option<Placed> {
        let placed = self.guests.get(&guest).cloned()?;
        self.release(guest).ok().map(|_| placed)
    }

    fn put_back(&mut self, guest: GuestNumber, placed: Placed) {
        let Placed { host, room, project, groups } = placed;
        // The host is there, and the guest nowhere: this is not refused.
        let _ = self.assign(guest, &Demand { room, project, groups, ..Demand::default() }, host);
    }

    /// Moves guests from loaded hosts to less loaded ones until the most and the least loaded of the open hosts are at most
    /// `band_permille` of a host apart, or no guest can go. A load is the larger share of vCPUs and memory that is taken.
    /// No guest moves twice, and none to a host that then is as loaded as the one that it left was. At most `most` moves.
    pub fn rebalance(
        &mut self,
        band_permille: u32,
        most: usize,
        demands: &HashMap<GuestNumber, Demand>,
        objective: &Objective,
    ) -> Moves {
        let band = u64::from(band_permille) * (WHOLE / 1000);
        let mut loads = Loads::default();
        for (number, host) in self.hosts.iter().filter(|(_, host)| host.is_open()) {
            loads.set(*number, load(&host.spec.capacity, &host.used));
        }
        let mean = loads.mean();
        let mut moved: BTreeSet<GuestNumber> = BTreeSet::new();
        let mut done = Moves::default();
        while done.moves.len() < most {
            let (Some((high, from)), Some((low, _))) = (loads.sources.last().copied(), loads.ordered.first()) else {
                break;
            };
            if high.saturating_sub(*low) <= band {
                break;
            }
            let Some(one) = self.relieve(from, high.saturating_sub(mean), &loads, &moved, demands, objective) else {
                loads.sources.remove(&(high, from));
                continue;
            };
            moved.insert(one.guest);
            done.moves.push(one);
            for number in [one.from, one.to] {
                if let Some(host) = self.hosts.get(&number) {
                    loads.set(number, load(&host.spec.capacity, &host.used));
                }
            }
        }
        done
    }

    /// Moves one guest off a host: the largest that is not more than the excess, or else the smallest.
    fn relieve(
        &mut self,
        from: HostNumber,
        excess: u64,
        loads: &Loads,
        moved: &BTreeSet<GuestNumber>,
        demands: &HashMap<GuestNumber, Demand>,
        objective: &Objective,
    ) -> Option<Move> {
        let capacity = self.hosts.get(&from)?.spec.capacity;
        let high = *loads.of.get(&from)?;
        let guests = self.on_host.get(&from)?.iter().filter(|guest| !moved.contains(guest));
        let mut shares: Vec<(u64, GuestNumber)> = guests
            .filter(|guest| demands.contains_key(guest))
            .filter_map(|guest| Some((load(&capacity, &self.guests.get(guest)?.room), *guest)))
            .filter(|(share, _)| *share > 0)
            .collect();
        shares.sort_by_key(|(share, guest)| {
            let is_more = *share > excess;
            (is_more, if is_more { *share } else { WHOLE.saturating_sub(*share) }, *guest)
        });
        for (_, guest) in shares.into_iter().take(TRIES) {
            let demand = demands.get(&guest)?;
            let placed = self.take_out(guest)?;
            match self.lighter(demand, high, from, loads, objective) {
                Some(to) if self.assign(guest, demand, to).is_ok() => return Some(Move { guest, from, to }),
                _ => self.put_back(guest, placed),
            }
        }
        None
    }

    /// Of the least loaded hosts that take the guest and stay below `high`: the first that costs nothing to get to, or the
    /// cheapest.
    fn lighter(
        &self,
        demand: &Demand,
        high: u64,
        from: HostNumber,
        loads: &Loads,
        objective: &Objective,
    ) -> Option<HostNumber> {
        let least = loads.ordered.iter().filter(|(_, number)| *number != from).take(LOOKS);
        let mut best: Option<(u64, u64, HostNumber)> = None;
        for (_, number) in least {
            let host = self.hosts.get(number)?;
            let after = load(&host.spec.capacity, &host.used.plus(&demand.room));
            if after < high && self.refuse(demand, *number, host).is_none() {
                let found = (self.cost(demand, objective, &self.kinds[host.kind]), after, *number);
                best = Some(best.map_or(found, |best| best.min(found)));
                // Those that follow are more loaded, and none is cheaper.
                if found.0 == 0 {
                    break;
                }
            }
        }
        best.map(|(_, _, number)| number)
    }
}
