//! Ways between hosts, as agents measure them, and what a host's switch holds for a port.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use supercloud_ids::{HostId, NetworkId, PortId};

use crate::{PortFlow, PortTraffic};

/// Peers that a host is given to measure, at most.
pub const MAX_PATH_PEERS: usize = 64;
/// Flows of one port that are told, at most.
pub const MAX_PORT_FLOWS: usize = 512;

/// A host to which the way is to be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathPeer {
    /// The host.
    pub host: HostId,
    /// Where its agent is dialled.
    pub address: SocketAddr,
}

/// What was measured of the way to one host, over the last probes (about two minutes).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathMeasured {
    /// The host.
    pub to: HostId,
    /// Probes that have ended.
    pub probes: u16,
    /// Of these, those that were answered.
    pub answered: u16,
    /// The newest ones that were not answered, in a row.
    pub misses: u16,
    /// Of the newest one that was not: the machine refused the connection, so it is there.
    pub is_refused: bool,
    /// Opening packets of the probes, also of those that nothing answered.
    pub sent: u32,
    /// Of these, those that got lost, or whose answers did: they went again, or nothing came at all.
    pub resent: u32,
    /// Median round-trip time, in microseconds, of the answered ones without loss.
    pub rtt_us: Option<u32>,
    /// The least of them.
    pub rtt_least_us: Option<u32>,
    /// When one was answered last, in milliseconds since 1970 by the host's clock.
    pub answered_at_ms: Option<u64>,
}

/// What a host's switch holds for a port.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FlowsTold {
    /// What has passed by the port.
    pub traffic: PortTraffic,
    /// At most [`MAX_PORT_FLOWS`].
    pub flows: Vec<PortFlow>,
    /// How many more there are.
    pub left_out: u32,
}

/// Whose flows are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowsOf {
    /// The port.
    pub port: PortId,
    /// Its network: broadcasts reach the port by flows of that.
    pub network: NetworkId,
}
