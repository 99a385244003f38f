//! What is known of hosts only while their agents are connected: not durable, so that heartbeats cost no disk write and
//! nothing stale survives a restart.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use supercloud_api::{
    Room,
    ids::{Epoch, GuestId, HostId},
};

/// A connected host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveHost {
    /// When its agent was last heard of (wall time, for people).
    pub last_seen_ms: u64,
    /// What guests and reservations take, as the agent counts it.
    pub used: Room,
}

/// For the guests of one host, at which epoch: bytes that its cloud lacks of what their volumes stand on.
type Bases = HashMap<GuestId, (Epoch, u64)>;

#[derive(Debug, Default)]
struct Live {
    hosts: HashMap<HostId, LiveHost>,
    bases: HashMap<HostId, Bases>,
}

/// The connected hosts. Cheap to clone; the link writes, everybody reads.
#[derive(Debug, Clone, Default)]
pub struct LiveHosts(Arc<RwLock<Live>>);

impl LiveHosts {
    /// The agent was heard of.
    pub fn seen(&self, host: HostId, live: LiveHost) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).hosts.insert(host, live);
    }

    /// The agent is away. Returns what was known last.
    pub fn gone(&self, host: HostId) -> Option<LiveHost> {
        let mut live = self.0.write().unwrap_or_else(PoisonError::into_inner);
        live.bases.remove(&host);
        live.hosts.remove(&host)
    }

    /// What is known, if the agent is connected.
    #[must_use]
    pub fn get(&self, host: HostId) -> Option<LiveHost> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).hosts.get(&host).copied()
    }

    /// How many hosts are connected.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.read().unwrap_or_else(PoisonError::into_inner).hosts.len()
    }

    /// What a host tells of what its guests' volumes stand on; of guests that are not named nothing is known any more.
    pub fn note_bases(&self, host: HostId, told: impl IntoIterator<Item = (GuestId, Epoch, u64)>) {
        let bases: Bases = told.into_iter().map(|(guest, epoch, missing)| (guest, (epoch, missing))).collect();
        self.0.write().unwrap_or_else(PoisonError::into_inner).bases.insert(host, bases);
    }

    /// Bytes that the cloud of a guest's owner lacks of what the volumes stand on; none when that owner has not told.
    #[must_use]
    pub fn base_missing_bytes(&self, owner: HostId, guest: GuestId, epoch: Epoch) -> Option<u64> {
        let live = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let (at, missing) = live.bases.get(&owner)?.get(&guest)?;
        (*at == epoch).then_some(*missing)
    }
}
