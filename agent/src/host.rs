//! What all guests of a host share: back end, switch, data plane, link, chunk store, room.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use supercloud_api::{Code, CompatClass, Problem, Room, Shape};
use supercloud_blanket::Backend;
use supercloud_ids::{GuestId, HostId};
use supercloud_storage::key::ContentRoot;

use crate::{
    accounts::Account, cloud_store::CloudStore, config::Config, guest::record::Places, holdings::Holdings,
    link::LinkHandle, plane::DataPlane, ports::Switch, volumes::VolumeRunner,
};

/// The services of a host.
pub struct Host {
    /// Its id.
    pub id: HostId,
    /// The configuration.
    pub config: Config,
    /// As whom the hypervisor's processes run.
    pub qemu: Account,
    /// The hypervisor.
    pub backend: Arc<dyn Backend>,
    /// What it can run, the preferred class first.
    pub classes: Vec<CompatClass>,
    /// The switch.
    pub switch: Arc<dyn Switch>,
    /// Volume processes.
    pub runner: VolumeRunner,
    /// Connections with other agents.
    pub plane: DataPlane,
    /// The controller.
    pub link: LinkHandle,
    /// The cloud's chunks.
    pub store: CloudStore,
    /// Who takes how much room.
    pub ledger: Ledger,
    /// What its guests stand on, to be said in the chunk store.
    pub holdings: Holdings,
    /// What freezes have brought into the cloud's store.
    pub brought: Brought,
}

/// Content that was brought into the cloud's store, or counted on there, by this process lately. It need not be looked for once
/// more while a guest stands still: no sweep takes within its grace what was refreshed, and a freeze is told to it besides.
#[derive(Debug, Default)]
pub struct Brought(Mutex<HashMap<ContentRoot, Instant>>);

impl Brought {
    /// Less than any sweep's grace; in a bucket what is younger than half an hour would only be looked at.
    const LATELY: Duration = Duration::from_secs(1200);

    /// All of these is there now.
    pub fn note(&self, roots: impl IntoIterator<Item = ContentRoot>) {
        let mut brought = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        brought.retain(|_, at| at.elapsed() < Self::LATELY);
        brought.extend(roots.into_iter().map(|root| (root, Instant::now())));
    }

    /// Whether it was there a moment ago.
    #[must_use]
    pub fn is_lately(&self, root: &ContentRoot) -> bool {
        let brought = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        brought.get(root).is_some_and(|at| at.elapsed() < Self::LATELY)
    }
}

impl Host {
    /// Where a guest's files and sockets are.
    #[must_use]
    pub fn places(&self, guest: GuestId) -> Places {
        Places::new(&self.config.guests_dir(), &self.config.run_dir, guest)
    }

    /// Kernels and initial RAM disks, by content.
    #[must_use]
    pub fn boot_cache(&self) -> PathBuf {
        self.config.data_dir.join("boot")
    }
}

/// Who takes how much of the host's room.
#[derive(Debug)]
pub struct Ledger {
    capacity: Room,
    taken: Mutex<HashMap<GuestId, Room>>,
}

impl Ledger {
    /// An empty ledger.
    #[must_use]
    pub fn new(capacity: Room) -> Self {
        Self { capacity, taken: Mutex::default() }
    }

    /// What there is.
    #[must_use]
    pub fn capacity(&self) -> Room {
        self.capacity
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<GuestId, Room>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is taken.
    #[must_use]
    pub fn used(&self) -> Room {
        sum(self.lock().values())
    }

    /// Takes room for a guest, instead of what it took before. A guest that is here already is never refused: it runs.
    ///
    /// # Errors
    /// `NoCapacity`, with what is missing.
    pub fn reserve(&self, guest: GuestId, shape: Shape, disk_bytes: u64) -> Result<(), Problem> {
        let wanted = Room { vcpus: shape.vcpus, memory_bytes: shape.memory_bytes, disk_bytes };
        let mut taken = self.lock();
        if taken.get(&guest) == Some(&wanted) {
            return Ok(());
        }
        let used = sum(taken.iter().filter(|(other, _)| **other != guest).map(|(_, room)| room));
        let rows = [
            ("vCPUs", u64::from(wanted.vcpus), u64::from(self.capacity.vcpus), u64::from(used.vcpus)),
            ("bytes of memory", wanted.memory_bytes, self.capacity.memory_bytes, used.memory_bytes),
            ("bytes of disk", wanted.disk_bytes, self.capacity.disk_bytes, used.disk_bytes),
        ];
        for (what, wanted, all, used) in rows {
            let free = all.saturating_sub(used);
            if wanted > free {
                return Err(Problem::new(
                    Code::NoCapacity,
                    format!("{wanted} {what} are wanted, {free} are free here"),
                ));
            }
        }
        taken.insert(guest, wanted);
        Ok(())
    }

    /// Notes what a guest takes that is here, whether there is room or not.
    pub fn note(&self, guest: GuestId, shape: Shape, disk_bytes: u64) {
        let room = Room { vcpus: shape.vcpus, memory_bytes: shape.memory_bytes, disk_bytes };
        self.lock().insert(guest, room);
    }

    /// A guest that keeps nothing but its volumes.
    pub fn note_volumes(&self, guest: GuestId, disk_bytes: u64) {
        self.lock().insert(guest, Room { vcpus: 0, memory_bytes: 0, disk_bytes });
    }

    /// Gives a guest's room back.
    pub fn release(&self, guest: GuestId) {
        self.lock().remove(&guest);
    }
}

fn sum<'a>(rooms: impl Iterator<Item = &'a Room>) -> Room {
    rooms.fold(Room::default(), |sum, room| Room {
        vcpus: sum.vcpus.saturating_add(room.vcpus),
        memory_bytes: sum.memory_bytes.saturating_add(room.memory_bytes),
        disk_bytes: sum.disk_bytes.saturating_add(room.disk_bytes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_taken_once_and_given_back() {
        let ledger = Ledger::new(Room { vcpus: 4, memory_bytes: 100, disk_bytes: 100 });
        let (a, b) = (GuestId::generate(), GuestId::generate());
        let shape = |memory_bytes| Shape { vcpus: 2, memory_bytes };
        ledger.reserve(a, shape(60), 10).unwrap();
        ledger.reserve(a, shape(60), 10).unwrap();
        let problem = ledger.reserve(b, shape(50), 10).unwrap_err();
        assert!(problem.detail.contains("memory") && problem.detail.contains("40"), "{problem}");
        ledger.reserve(b, shape(40), 10).unwrap();
        assert_eq!(ledger.used(), Room { vcpus: 4, memory_bytes: 100, disk_bytes: 20 });
        // It changes in place.
        ledger.reserve(a, shape(10), 10).unwrap();
        ledger.note_volumes(a, 10);
        ledger.release(b);
        assert_eq!(ledger.used(), Room { vcpus: 0, memory_bytes: 0, disk_bytes: 10 });
    }
}
