//! What is known of hosts only while their agents are connected: not durable, so that heartbeats cost no disk write and
//! nothing stale survives a restart.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use supercloud_api::{Room, ids::HostId};

/// A connected host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveHost {
    /// When its agent was last heard of (wall time, for people).
    pub last_seen_ms: u64,
    /// What guests and reservations take, as the agent counts it.
    pub used: Room,
}

/// The connected hosts. Cheap to clone; the link writes, everybody reads.
#[derive(Debug, Clone, Default)]
pub struct LiveHosts(Arc<RwLock<HashMap<HostId, LiveHost>>>);

impl LiveHosts {
    /// The agent was heard of.
    pub fn seen(&self, host: HostId, live: LiveHost) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(host, live);
    }

    /// The agent is away. Returns what was known last.
    pub fn gone(&self, host: HostId) -> Option<LiveHost> {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&host)
    }

    /// What is known, if the agent is connected.
    #[must_use]
    pub fn get(&self, host: HostId) -> Option<LiveHost> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&host).copied()
    }

    /// How many hosts are connected.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.read().unwrap_or_else(PoisonError::into_inner).len()
    }
}
