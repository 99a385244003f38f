//! Ways between hosts, and the flows of a port: read-only, as agents tell.

use serde::{Deserialize, Serialize};
use supercloud_ids::{CloudId, HostId, NetworkId, PortId};
use utoipa::ToSchema;

use crate::Name;

/// What is known of a way between two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LinkState {
    /// The other host answers.
    Answers,
    /// The last probes had no answer.
    Silent,
    /// Nobody has measured it.
    NotMeasured,
}

/// The way from one host to another, as the agent of the first measures it: it opens and closes a TCP connection to where the
/// other's agent takes moves, every five seconds; the last two minutes count. Each direction is a link of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Link {
    /// Who measures.
    pub from: HostId,
    /// Its name.
    pub from_name: Name,
    /// Its cloud.
    pub from_cloud: CloudId,
    /// That cloud's name.
    pub from_cloud_name: Name,
    /// To whom.
    pub to: HostId,
    /// Its name.
    pub to_name: Name,
    /// Its cloud.
    pub to_cloud: CloudId,
    /// That cloud's name.
    pub to_cloud_name: Name,
    /// What is known.
    pub state: LinkState,
    /// Why it is silent or not measured.
    pub why: Option<String>,
    /// Median round-trip time in microseconds.
    pub rtt_us: Option<u32>,
    /// The least of them.
    pub rtt_least_us: Option<u32>,
    /// The share of opening packets, 0 to 1, that got lost, or whose answers did, also of probes that nothing answered; absent
    /// below 20 packets.
    pub loss: Option<f64>,
    /// Probes that have ended.
    pub probes: u32,
    /// Of these, those that were answered.
    pub answered: u32,
    /// Opening packets of the probes, also of those that nothing answered.
    pub sent: u32,
    /// Of these, those that got lost, or whose answers did.
    pub resent: u32,
    /// When one was answered last, by the clock of the host that measures.
    pub answered_at_ms: Option<u64>,
    /// When this was told.
    pub told_at_ms: Option<u64>,
}

/// What passed by a port since its guest came to the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PortTraffic {
    /// Packets that the guest sent.
    pub sent_packets: u64,
    /// Bytes that the guest sent.
    pub sent_bytes: u64,
    /// Packets that it was given.
    pub received_packets: u64,
    /// Bytes that it was given.
    pub received_bytes: u64,
    /// Packets, both ways, that were dropped at the port.
    pub dropped_packets: u64,
}

/// What a flow is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FlowPurpose {
    /// What the guest may send.
    Guest,
    /// Its requests for an address, to the agent.
    Dhcp,
    /// Its talk with the metadata service.
    Metadata,
    /// What may come for it, or from it, by a tunnel.
    Tunnel,
    /// Delivery to it.
    Deliver,
    /// Transport to the host where it runs.
    Remote,
    /// What is passed on after a move.
    Forward,
    /// Broadcast and multicast of its network.
    Flood,
    /// Another.
    Other,
}

/// A flow in a host's switch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PortFlow {
    /// What it is for.
    pub purpose: FlowPurpose,
    /// Its table.
    pub table: u8,
    /// Its priority: higher ones win.
    pub priority: u16,
    /// Packets so far.
    pub packets: u64,
    /// Bytes so far.
    pub bytes: u64,
    /// Seconds since it was put in.
    pub age_s: u32,
    /// Which packets, as Open vSwitch's tools write it.
    pub matching: String,
    /// What happens to them.
    pub actions: String,
}

/// What the switch of a port's host holds for it at this moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PortFlows {
    /// The port.
    pub port: PortId,
    /// Its network.
    pub network: NetworkId,
    /// The host that was asked.
    pub host: HostId,
    /// Its name.
    pub host_name: Name,
    /// When.
    pub asked_at_ms: u64,
    /// What passed by the port.
    pub traffic: PortTraffic,
    /// The flows, in the order in which packets meet them.
    pub flows: Vec<PortFlow>,
    /// How many more there are.
    pub left_out: u32,
}
