//! The open hosts of one kind, ordered so that the best with room is found without looking at all of them.

use std::collections::{BTreeMap, BTreeSet};

use super::{HostNumber, Load, Room};

/// Hosts that are looked at by free memory before the order by vCPUs is asked: usually the first one has
/// vCPUs too. (Few in tests, whose clusters are small.)
const FIRST_LOOKS: usize = if cfg!(test) { 2 } else { 8 };

/// (Free memory, complement of the number): the best is the greatest when spreading, the least when consolidating.
type Entry = (u64, u32);

#[derive(Debug, Clone, Default)]
pub(super) struct Open {
    by_memory: BTreeSet<Entry>,
    /// The same hosts by free vCPUs first.
    by_vcpus: BTreeMap<u32, BTreeSet<Entry>>,
}

impl Open {
    pub(super) fn is_empty(&self) -> bool {
        self.by_memory.is_empty()
    }

    pub(super) fn insert(&mut self, free: &Room, number: HostNumber) {
        let entry = (free.memory_bytes, !number);
        self.by_memory.insert(entry);
        self.by_vcpus.entry(free.vcpus).or_default().insert(entry);
    }

    pub(super) fn remove(&mut self, free: &Room, number: HostNumber) {
        let entry = (free.memory_bytes, !number);
        self.by_memory.remove(&entry);
        if let Some(these) = self.by_vcpus.get_mut(&free.vcpus) {
            these.remove(&entry);
            if these.is_empty() {
                self.by_vcpus.remove(&free.vcpus);
            }
        }
    }

    /// Free memory and number of each host with enough memory.
    pub(super) fn all(&self, need: &Room) -> impl Iterator<Item = (u64, HostNumber)> {
        self.by_memory.range((need.memory_bytes, 0)..).map(|(free, not_number)| (*free, !*not_number))
    }

    /// The best of those that pass, with its free memory: the emptiest, or the fullest. Only one for which `is_better` holds, which
    /// is so for all up to some place of the order.
    pub(super) fn best(
        &self,
        need: &Room,
        load: Load,
        is_better: impl Fn(u64, HostNumber) -> bool,
        passes: impl Fn(HostNumber) -> bool,
    ) -> Option<(u64, HostNumber)> {
        let mut looks = 0;
        let mut found = None;
        let with_memory = self.by_memory.range((need.memory_bytes, 0)..);
        // Whether the search is over; when it is not, by so many looks, vCPUs are asked first.
        let mut is_over = |entry: &Entry| {
            looks += 1;
            if !is_better(entry.0, !entry.1) {
                return true;
            }
            found = passes(!entry.1).then_some(*entry);
            found.is_some() || looks >= FIRST_LOOKS
        };
        let last = match load {
            Load::Spread => with_memory.rev().find(|entry| is_over(entry)),
            Load::Consolidate => with_memory.clone().find(|entry| is_over(entry)),
        };
        if found.is_none() && last.is_some_and(|last| is_better(last.0, !last.1)) {
            found = self.best_by_vcpus(need, load, &is_better, passes);
        }
        found.map(|(free, not_number)| (free, !not_number))
    }

    /// As [`Self::best`], among hosts with enough vCPUs only: the best of each number of free vCPUs, and of them the best.
    fn best_by_vcpus(
        &self,
        need: &Room,
        load: Load,
        is_better: impl Fn(u64, HostNumber) -> bool,
        passes: impl Fn(HostNumber) -> bool,
    ) -> Option<Entry> {
        let mut best: Option<Entry> = None;
        for these in self.by_vcpus.range(need.vcpus..).map(|(_, these)| these) {
            let with_memory = these.range((need.memory_bytes, 0)..);
            // From its better end, as long as it could be better than what is there.
            let found = match load {
                Load::Spread => (with_memory.rev())
                    .take_while(|entry| best.is_none_or(|best| **entry > best) && is_better(entry.0, !entry.1))
                    .find(|entry| passes(!entry.1)),
                Load::Consolidate => (with_memory.into_iter())
                    .take_while(|entry| best.is_none_or(|best| **entry < best) && is_better(entry.0, !entry.1))
                    .find(|entry| passes(!entry.1)),
            };
            best = found.copied().or(best);
        }
        best
    }
}
