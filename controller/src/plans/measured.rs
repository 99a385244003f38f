//! What moves were like: how fast bytes went from cloud to cloud, and how fast guests wrote meanwhile. Learned from operations that
//! have ended.

use std::collections::{BTreeMap, HashMap};

use supercloud_api::{
    Operation, OperationKind, Phase,
    ids::{CloudId, GuestId, HostId},
};

/// The newest moves between two clouds that count; the fastest of them is what the link carries.
const NEWEST: usize = 8;
/// A copy of less says nothing of a link.
const LEAST_BYTES: u64 = 1 << 20;

/// What is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Measured {
    links: HashMap<(CloudId, CloudId), u64>,
    dirty: HashMap<GuestId, u64>,
}

impl Measured {
    /// Learns of moves that have ended well, in any order. `cloud_of` tells where a host stands.
    #[must_use]
    pub fn learn<'a>(
        operations: impl Iterator<Item = &'a Operation>,
        cloud_of: impl Fn(HostId) -> Option<CloudId>,
    ) -> Self {
        let moves = operations.filter(|one| one.kind == OperationKind::GuestMigrate && one.phase == Phase::Done);
        // Ids follow the time at which they were made.
        let moves: BTreeMap<_, _> = moves.map(|one| (one.id, one)).collect();
        let mut rates: HashMap<(CloudId, CloudId), Vec<u64>> = HashMap::new();
        let mut known = Self::default();
        for operation in moves.into_values().rev() {
            let entered = |phase| operation.phase_times.iter().find(|time| time.phase == phase).map(|time| time.at_ms);
            let copy_ms = entered(Phase::Switch).zip(entered(Phase::Copy)).map(|(to, from)| to.saturating_sub(from));
            let (sent, total) = (operation.progress.memory_sent_bytes, operation.progress.memory_total_bytes);
            let Some(copy_ms) = copy_ms.filter(|ms| *ms > 0 && sent >= LEAST_BYTES) else { continue };
            let per_s = |bytes: u64| u64::try_from(u128::from(bytes) * 1000 / u128::from(copy_ms)).unwrap_or(u64::MAX);
            if let Some(guest) = operation.guest {
                // What was sent more than once was written meanwhile. The newest move tells.
                known.dirty.entry(guest).or_insert_with(|| per_s(sent.saturating_sub(total)));
            }
            let clouds = operation.source.and_then(&cloud_of).zip(operation.destination.and_then(&cloud_of));
            if let Some(clouds) = clouds {
                let rates = rates.entry(clouds).or_default();
                if rates.len() < NEWEST {
                    rates.push(per_s(sent));
                }
            }
        }
        known.links =
            rates.into_iter().filter_map(|(clouds, rates)| Some((clouds, rates.into_iter().max()?))).collect();
        known
    }

    /// What the link from cloud to cloud carries, in bytes per second.
    #[must_use]
    pub fn link(&self, from: CloudId, to: CloudId) -> Option<u64> {
        self.links.get(&(from, to)).copied().filter(|rate| *rate > 0)
    }

    /// How fast a guest wrote its memory when it was moved last, in bytes per second.
    #[must_use]
    pub fn dirty_rate(&self, guest: GuestId) -> Option<u64> {
        self.dirty.get(&guest).copied()
    }
}
