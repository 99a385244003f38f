//! The fleet in memory: what placements, quotas and addresses are decided on, kept in step with the store by what has changed since
//! it was last looked at. So a decision costs what changed, and not the fleet.
//!
//! ```text
//!   State::fleet:  nothing known     -> list the folders, guards first; watch from the guards' revision on
//!                  known up to r     -> take from the watch until the newest change that this process knows of is in it
//!                  watch broke, lags -> nothing known
//! ```
//! All folders are followed by ONE watch, in revision order: who passes a guard as it is known here decides on everything that
//! was changed under that guard before. What another controller changes without a guard is seen when the watch tells of it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::Ipv4Addr,
    sync::Arc,
    time::Duration,
};

use futures::StreamExt as _;
use supercloud_api::{
    GuestState, Room, Volume,
    ids::{GuestId, HostId, NetworkId, ProjectId, VolumeId},
};
use supercloud_store::{Change, Key, Prefix, Versioned, WatchItem, WatchStream};

use super::{GuestRecord, HostRecord, Record, State, StateError, Stored, keys, stored};
use crate::placement;

/// How long a look waits for the watch to tell of what is known to have happened, before it lists everything anew.
const WATCH_BUDGET: Duration = Duration::from_secs(2);
const GUARDS: &str = "guards";
const ADDRESSES: &str = "addresses";

/// What a project uses: guests of any state with their disks, vCPUs and memory of those that run or are about to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Guests.
    pub guests: u64,
    /// vCPUs.
    pub vcpus: u64,
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// Size of the guests' volumes, in bytes.
    pub volume_bytes: u64,
}

/// Sums that grow and shrink by the same amounts, so they must never saturate: 64-bit sizes of up to 2^64 guests fit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Sum {
    guests: u64,
    vcpus: u128,
    memory_bytes: u128,
    disk_bytes: u128,
}

impl Sum {
    fn of(room: Room) -> Self {
        let (vcpus, memory_bytes, disk_bytes) =
            (u128::from(room.vcpus), u128::from(room.memory_bytes), u128::from(room.disk_bytes));
        Self { guests: 1, vcpus, memory_bytes, disk_bytes }
    }

    const fn add(&mut self, other: Self) {
        self.guests += other.guests;
        self.vcpus += other.vcpus;
        self.memory_bytes += other.memory_bytes;
        self.disk_bytes += other.disk_bytes;
    }

    const fn take(&mut self, other: Self) {
        self.guests -= other.guests;
        self.vcpus -= other.vcpus;
        self.memory_bytes -= other.memory_bytes;
        self.disk_bytes -= other.disk_bytes;
    }
}

fn clamp(sum: u128) -> u64 {
    u64::try_from(sum).unwrap_or(u64::MAX)
}

/// The fleet at one revision. Cheap to hold: a copy is made only when it changes while somebody looks at it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Fleet {
    guards: HashMap<String, u64>,
    hosts: BTreeMap<HostId, Arc<Stored<HostRecord>>>,
    guests: BTreeMap<GuestId, Arc<Stored<GuestRecord>>>,
    /// The guest that each volume is attached to, its size in bytes, and the revision of that.
    volumes: HashMap<VolumeId, (Option<GuestId>, u64, u64)>,
    disks: HashMap<GuestId, u64>,
    addresses: HashMap<NetworkId, BTreeSet<Ipv4Addr>>,
    reserved: HashMap<HostId, Sum>,
    usage: HashMap<ProjectId, Sum>,
}

impl Fleet {
    /// The revision of a guard; 0: nobody has passed it.
    #[must_use]
    pub fn guard(&self, guard: &Key) -> u64 {
        self.guards.get(guard.as_str()).copied().unwrap_or(0)
    }

    /// The hosts, in the order of their ids.
    pub fn hosts(&self) -> impl Iterator<Item = &HostRecord> {
        self.hosts.values().map(|record| &record.value)
    }

    /// The guests, likewise.
    pub fn guests(&self) -> impl Iterator<Item = &GuestRecord> {
        self.guests.values().map(|record| &record.value)
    }

    /// The disk of each guest that has one, in bytes.
    #[must_use]
    pub const fn disks(&self) -> &HashMap<GuestId, u64> {
        &self.disks
    }

    /// What guests take of each host by the records: owned there, or on their way there.
    #[must_use]
    pub fn reserved(&self) -> HashMap<HostId, Room> {
        let room = |sum: &Sum| Room {
            vcpus: u32::try_from(sum.vcpus).unwrap_or(u32::MAX),
            memory_bytes: clamp(sum.memory_bytes),
            disk_bytes: clamp(sum.disk_bytes),
        };
        self.reserved.iter().map(|(host, sum)| (*host, room(sum))).collect()
    }

    /// What a project uses.
    #[must_use]
    pub fn usage(&self, project: ProjectId) -> Usage {
        let sum = self.usage.get(&project).copied().unwrap_or_default();
        Usage {
            guests: sum.guests,
            vcpus: clamp(sum.vcpus),
            memory_bytes: clamp(sum.memory_bytes),
            volume_bytes: clamp(sum.disk_bytes),
        }
    }

    /// The addresses of a network that are taken.
    #[must_use]
    pub fn addresses(&self, network: NetworkId) -> Option<&BTreeSet<Ipv4Addr>> {
        self.addresses.get(&network)
    }

    /// Takes one change, if it is of a folder that counts. What is older than what is known changes nothing: a list may be ahead
    /// of the watch that follows it.
    fn take(&mut self, change: &Change) -> Result<(), StateError> {
        let path = change.key().as_str();
        let Some((folder, rest)) = path.split_once('/') else { return Ok(()) };
        let put = match change {
            Change::Put(found) => Some(found),
            Change::Delete { .. } => None,
        };
        match folder {
            GUARDS => {
                match put {
                    Some(found) => self.guards.insert(path.to_owned(), found.mod_revision),
                    None => self.guards.remove(path),
                };
            }
            ADDRESSES => self.take_address(rest, put.is_some()),
            HostRecord::FOLDER => take_record(&mut self.hosts, rest, put)?,
            GuestRecord::FOLDER => {
                let Ok(id) = rest.parse::<GuestId>() else { return Ok(()) };
                let now = newer(self.guests.get(&id).map(|known| known.revision), put)?;
                if let Some(now) = now {
                    self.recounted(id, |fleet| match now {
                        Some(record) => fleet.guests.insert(id, Arc::new(record)),
                        None => fleet.guests.remove(&id),
                    });
                }
            }
            Volume::FOLDER => {
                let Ok(id) = rest.parse::<VolumeId>() else { return Ok(()) };
                let now = newer::<Volume>(self.volumes.get(&id).map(|known| known.2), put)?;
                if let Some(now) = now {
                    self.take_volume(id, now.as_ref());
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn take_address(&mut self, rest: &str, is_taken: bool) {
        let Some((network, ip)) = rest.split_once('/') else { return };
        let (Ok(network), Ok(ip)) = (network.parse::<NetworkId>(), ip.parse::<Ipv4Addr>()) else { return };
        if is_taken {
            self.addresses.entry(network).or_default().insert(ip);
        } else if let Some(taken) = self.addresses.get_mut(&network) {
            taken.remove(&ip);
            if taken.is_empty() {
                self.addresses.remove(&network);
            }
        }
    }

    fn take_volume(&mut self, id: VolumeId, now: Option<&Stored<Volume>>) {
        if let Some((Some(guest), bytes, _)) = self.volumes.remove(&id) {
            self.recounted(guest, |fleet| {
                let left = fleet.disks.get(&guest).map_or(0, |disk| disk.saturating_sub(bytes));
                match left {
                    0 => fleet.disks.remove(&guest),
                    left => fleet.disks.insert(guest, left),
                }
            });
        }
        let Some(now) = now else { return };
        self.volumes.insert(id, (now.guest, now.size_bytes, now.revision));
        if let Some(guest) = now.guest {
            self.recounted(guest, |fleet| {
                let disk = fleet.disks.entry(guest).or_default();
                *disk = disk.saturating_add(now.size_bytes);
            });
        }
    }

    /// Changes a guest or its disk, and the sums with it.
    fn recounted<T>(&mut self, guest: GuestId, change: impl FnOnce(&mut Self) -> T) {
        self.count(guest, Sum::take);
        change(self);
        self.count(guest, Sum::add);
    }

    fn count(&mut self, guest: GuestId, count: impl Fn(&mut Sum, Sum)) {
        let Some(record) = self.guests.get(&guest) else { return };
        let disk_bytes = self.disks.get(&guest).copied().unwrap_or(0);
        for (host, room) in placement::takes(record, disk_bytes) {
            count_in(&mut self.reserved, host, |sum| count(sum, Sum::of(room)));
        }
        let starts = record.owner.operation.as_ref().is_some_and(|op| op.kind.destination().is_some());
        let is_running = starts || record.guest.state == GuestState::Running;
        let (vcpus, memory_bytes) =
            if is_running { (record.guest.shape.vcpus, record.guest.shape.memory_bytes) } else { (0, 0) };
        let used = Sum::of(Room { vcpus, memory_bytes, disk_bytes });
        count_in(&mut self.usage, record.guest.project, |sum| count(sum, used));
    }
}

fn count_in<K: std::hash::Hash + Eq>(sums: &mut HashMap<K, Sum>, key: K, count: impl FnOnce(&mut Sum)) {
    let mut entry = match sums.entry(key) {
        std::collections::hash_map::Entry::Occupied(entry) => entry,
        std::collections::hash_map::Entry::Vacant(entry) => entry.insert_entry(Sum::default()),
    };
    count(entry.get_mut());
    if *entry.get() == Sum::default() {
        entry.remove();
    }
}

/// What becomes of a record that is known at a revision: `None`: what comes is older. `Some(None)`: it is gone.
#[expect(clippy::option_option, reason = "nothing new, or that it is gone: both are told apart only here")]
fn newer<T: Record>(known: Option<u64>, put: Option<&Versioned>) -> Result<Option<Option<Stored<T>>>, StateError> {
    match put {
        None => Ok(Some(None)),
        Some(found) if known.is_some_and(|known| known >= found.mod_revision) => Ok(None),
        Some(found) => Ok(Some(Some(stored(found)?))),
    }
}

fn take_record<T: Record<Id: Ord + std::str::FromStr>>(
    records: &mut BTreeMap<T::Id, Arc<Stored<T>>>,
    id: &str,
    put: Option<&Versioned>,
) -> Result<(), StateError> {
    let Ok(id) = id.parse::<T::Id>() else { return Ok(()) };
    match newer(records.get(&id).map(|known| known.revision), put)? {
        None => {}
        Some(Some(record)) => drop(records.insert(id, Arc::new(record))),
        Some(None) => drop(records.remove(&id)),
    }
    Ok(())
}

/// The fleet with the watch that keeps it in step.
struct Followed {
    fleet: Arc<Fleet>,
    watch: WatchStream,
    /// All changes up to this revision are in it.
    up_to: u64,
}

/// Of one process: the fleet once it was asked for.
#[derive(Default)]
pub(super) struct KeptFleet(tokio::sync::Mutex<Option<Followed>>);

impl State {
    /// The fleet, with all that this process has changed and all events that any has written.
    ///
    /// # Errors
    /// When the store does not answer or a record is damaged.
    pub async fn fleet(&self) -> Result<Arc<Fleet>, StateError> {
        let least = self.newest_change().await?;
        let mut kept = self.fleet.0.lock().await;
        if let Some(followed) = kept.as_mut() {
            // Cancelled in between it goes on later: whatever was taken from the watch is in the fleet.
            let advanced = tokio::time::timeout(WATCH_BUDGET, followed.advance(least)).await;
            match advanced {
                Ok(Ok(true)) => return Ok(Arc::clone(&followed.fleet)),
                Ok(Ok(false)) => {}
                Ok(Err(error)) => {
                    *kept = None;
                    return Err(error);
                }
                Err(_) => tracing::warn!(least, up_to = followed.up_to, "the watch lags; the fleet is listed anew"),
            }
            *kept = None;
        }
        Ok(Arc::clone(&kept.insert(self.list_fleet().await?).fleet))
    }

    /// The revision of the newest change that this process knows of: its own, and those of events.
    async fn newest_change(&self) -> Result<u64, StateError> {
        let own = self.committed.load(std::sync::atomic::Ordering::Acquire);
        Ok(own.max(self.revision_of(keys::events_head()).await?))
    }

    async fn list_fleet(&self) -> Result<Followed, StateError> {
        let mut fleet = Fleet::default();
        let (guards, up_to) = supercloud_store::list(&*self.store, &keys::folder(GUARDS)).await?;
        for item in guards {
            fleet.take(&Change::Put(item))?;
        }
        for folder in [Volume::FOLDER, HostRecord::FOLDER, GuestRecord::FOLDER, ADDRESSES] {
            let (items, _) = supercloud_store::list(&*self.store, &keys::folder(folder)).await?;
            for item in items {
                fleet.take(&Change::Put(item))?;
            }
        }
        let watch = self.store.watch(Prefix::all(), up_to + 1);
        Ok(Followed { fleet: Arc::new(fleet), watch, up_to })
    }
}

impl Followed {
    /// Takes changes until all up to a revision are in; `false`: the watch cannot tell them any more.
    async fn advance(&mut self, least: u64) -> Result<bool, StateError> {
        while self.up_to < least {
            match self.watch.next().await {
                Some(Ok(WatchItem::Changes { revision, changes })) => {
                    let fleet = Arc::make_mut(&mut self.fleet);
                    for change in &changes {
                        fleet.take(change)?;
                    }
                    self.up_to = revision;
                }
                Some(Ok(WatchItem::Compacted { .. })) | Some(Err(_)) | None => return Ok(false),
            }
        }
        Ok(true)
    }
}
