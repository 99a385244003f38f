//! What moves were like: how fast bytes went from cloud to cloud, and how fast guests wrote meanwhile. Learned from operations that
//! have ended.

use std::collections::{BTreeMap, HashMap};

use supercloud_api::{
    Guest, Host, Operation, OperationKind, Phase,
    ids::{CloudId, GuestId, HostId},
};

use supercloud_scheduler::evacuable::{self, LiveMove, Load, Path};

use crate::paths::RoundTrips;

/// The newest moves between two clouds that count; the fastest of them is what the link carries.
const NEWEST: usize = 8;
/// A copy of less says nothing of a link.
const LEAST_BYTES: u64 = 1 << 20;

/// What is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Measured {
    links: HashMap<(CloudId, CloudId), u64>,
    dirty: HashMap<GuestId, u64>,
    pauses: HashMap<(CloudId, CloudId), u64>,
    round_trips: RoundTrips,
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
        let mut pauses: HashMap<(CloudId, CloudId), Vec<u64>> = HashMap::new();
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
            if let Some((clouds, pause_ms)) = clouds.zip(operation.progress.downtime_ms) {
                let pauses = pauses.entry(clouds).or_default();
                if pauses.len() < NEWEST {
                    pauses.push(pause_ms);
                }
            }
            if let Some(clouds) = clouds {
                let rates = rates.entry(clouds).or_default();
                if rates.len() < NEWEST {
                    rates.push(per_s(sent));
                }
            }
        }
        known.pauses = pauses
            .into_iter()
            .filter_map(|(clouds, mut pauses)| {
                pauses.sort_unstable();
                Some((clouds, *pauses.get(pauses.len() / 2)?))
            })
            .collect();
        known.links =
            rates.into_iter().filter_map(|(clouds, rates)| Some((clouds, rates.into_iter().max()?))).collect();
        known
    }

    /// With the times that agents measure between hosts.
    #[must_use]
    pub fn with_round_trips(self, round_trips: RoundTrips) -> Self {
        Self { round_trips, ..self }
    }

    /// The round-trip time between two hosts, in microseconds.
    #[must_use]
    pub fn round_trip_us(&self, from: &Host, to: &Host) -> Option<u64> {
        self.round_trips.between_us(from, to)
    }

    /// What a live move between two hosts is expected to take, at most so many bytes per second; `None` where no move between their
    /// clouds was measured. A guest that was never moved is taken for one that writes nothing.
    #[must_use]
    pub fn forecast(
        &self,
        guest: &Guest,
        from: &Host,
        to: &Host,
        limit: Option<u64>,
        max_downtime_ms: u64,
    ) -> Option<LiveMove> {
        let link = self.link(from.cloud, to.cloud)?;
        let memory_bytes = guest.shape.memory_bytes;
        let load = Load {
            memory_bytes,
            dirty_bytes_per_s: self.dirty_rate(guest.id).unwrap_or(0),
            working_set_bytes: memory_bytes,
            volume_dirty_bytes: 0,
        };
        let path = Path {
            link_bytes_per_s: limit.map_or(link, |limit| link.min(limit)),
            host_ready_ms: 0,
            max_downtime_ms,
            switch_ms: evacuable::switch_ms(self.round_trip_us(from, to)),
            checkpoint_ms: 0,
        };
        let live = evacuable::predict(&load, &path)?;
        // What hypervisors and disks there really take is in the pauses that were measured.
        let more_ms = self.pause_ms(from.cloud, to.cloud).unwrap_or(0).saturating_sub(live.downtime_ms);
        let (copy_ms, downtime_ms) = (live.copy_ms.saturating_add(more_ms), live.downtime_ms.saturating_add(more_ms));
        Some(LiveMove { copy_ms, downtime_ms, ..live })
    }

    /// The median pause of the newest moves from cloud to cloud, in milliseconds.
    fn pause_ms(&self, from: CloudId, to: CloudId) -> Option<u64> {
        self.pauses.get(&(from, to)).copied()
    }

    /// What a forecast rests on, and what it lacks; a sentence.
    #[must_use]
    pub fn basis(&self, guest: GuestId, from: &Host, to: &Host) -> String {
        let Some(link) = self.link(from.cloud, to.cloud) else {
            return format!("no move from {} to {} was measured yet", from.cloud_name, to.cloud_name);
        };
        let way = match self.round_trip_us(from, to) {
            Some(us) => format!("{} ms away", us.div_ceil(1000)),
            None => "of which the round trip is not measured".to_owned(),
        };
        let writes = match self.dirty_rate(guest) {
            Some(writes) => format!("the guest wrote {} MiB/s when it was moved last", writes >> 20),
            None => "it was never moved: how fast it writes is not known".to_owned(),
        };
        let paused = match self.pause_ms(from.cloud, to.cloud) {
            Some(ms) => format!("; moves there paused guests for {ms} ms"),
            None => String::new(),
        };
        format!("the link carries {} MiB/s to {}, {way}; {writes}{paused}", link >> 20, to.name)
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
