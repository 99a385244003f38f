//! Networks and ports.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};
use supercloud_ids::{Epoch, GuestId, HostId, NetworkId, PortId, ProjectId};
use utoipa::ToSchema;

use crate::{Name, Ref};

/// A project's private L2 segment; spans all clouds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Network {
    /// Its id.
    pub id: NetworkId,
    /// The project it belongs to.
    pub project: ProjectId,
    /// Its name.
    pub name: Name,
    /// Its IPv4 prefix, for example `10.20.0.0/24`.
    pub cidr: String,
    /// The gateway's address: the first of the prefix.
    #[schema(value_type = String)]
    pub gateway: Ipv4Addr,
    /// Name servers told to guests.
    #[schema(value_type = Vec<String>)]
    pub dns: Vec<Ipv4Addr>,
    /// Its number on the wire (24 bits), never shared by two networks at a time.
    pub vni: u32,
    /// The MTU told to guests: it fits the tunnels.
    pub mtu: u16,
    /// When it was made.
    pub created_at_ms: u64,
}

/// Asks for a network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkCreate {
    /// Its name.
    pub name: Name,
    /// The project; that of the token when absent.
    #[serde(default)]
    pub project: Option<Ref>,
    /// Its IPv4 prefix, /8 to /29, inside 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16.
    pub cidr: String,
    /// Name servers told to guests.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub dns: Vec<Ipv4Addr>,
}

/// A guest's attachment to a network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Port {
    /// Its id.
    pub id: PortId,
    /// The network.
    pub network: NetworkId,
    /// The project of both.
    pub project: ProjectId,
    /// The guest.
    pub guest: GuestId,
    /// Its MAC address, `02:…`.
    pub mac: String,
    /// Its IPv4 address.
    #[schema(value_type = String)]
    pub ipv4: Ipv4Addr,
    /// The host that announces it; absent while its guest runs nowhere.
    pub host: Option<HostId>,
    /// The guest's epoch, which it inherits.
    pub epoch: Epoch,
    /// The destination at which it is bound silently during a migration.
    pub prepared_at: Option<HostId>,
    /// The source of the last move, which forwards what still arrives there until it is released.
    pub moved_from: Option<HostId>,
}
