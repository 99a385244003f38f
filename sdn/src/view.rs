//! What the controller tells each host about the overlay: hosts, networks and ports at one revision.
//!
//! A view is checked (`OverlayView::check`) before anything is compiled from it: a view that would break isolation
//! (two networks with one VNI, two ports with one address) is refused as a whole and the flows stay as they were.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
};

use serde::{Deserialize, Serialize};
use supercloud_ids::{Epoch, HostId, NetworkId, PortId, ProjectId};

use crate::{
    addr::{Ipv4Prefix, Ipv6Prefix, MacAddr},
    wireguard::End,
};

/// The largest VNI of a network. The top bit of the 24-bit field marks frames that the source of a move forwards
/// ([`crate::compile::FORWARDED`]), so that no frame is ever forwarded twice.
pub const MAX_VNI: u32 = 0x7f_ffff;
/// The largest index of a host: tunnels take the switch ports from 1000 on, and OpenFlow's port numbers end below 0xff00.
pub const MAX_HOST_INDEX: u16 = 63_000;
/// The largest number of hosts, networks or ports in one view.
pub const MAX_ITEMS: usize = 65_536;
/// The smallest MTU a network may have (RFC 8200: every IPv6 link).
pub const MIN_MTU: u16 = 1280;
/// What a VXLAN header takes from the underlay's MTU over IPv4: 14 + 20 + 8 + 8 bytes.
pub const TUNNEL_OVERHEAD: u16 = 50;

/// The overlay as one host needs to know it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct OverlayView {
    /// Counts changes; within one session with the controller it only grows.
    pub revision: u64,
    /// All hosts between which tunnels exist.
    pub hosts: Vec<HostView>,
    /// The networks that concern the host (more do no harm).
    pub networks: Vec<NetworkView>,
    /// The ports of these networks.
    pub ports: Vec<PortView>,
}

/// A host's place in the overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostView {
    /// The host.
    pub host: HostId,
    /// The address that tunnels end at (never a public one).
    pub overlay_addr: Ipv4Addr,
    /// A small number of its own, stable for the life of the host: names its tunnel at its peers.
    pub index: u16,
    /// How it encrypts its tunnels; absent: not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<End>,
}

/// A project's L2 segment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkView {
    /// The network.
    pub network: NetworkId,
    /// The tenant that owns it.
    pub project: ProjectId,
    /// Its number in tunnels, 1 to [`MAX_VNI`], of no other network.
    pub vni: u32,
    /// Where the ports' IPv4 addresses come from.
    pub cidr: Ipv4Prefix,
    /// Where the ports' IPv6 addresses come from.
    #[serde(default)]
    pub cidr6: Option<Ipv6Prefix>,
    /// The router's address, answered by the switch itself.
    pub gateway: Ipv4Addr,
    /// Name servers that guests learn by DHCP.
    #[serde(default)]
    pub dns: Vec<Ipv4Addr>,
    /// The guests' MTU in bytes: the underlay's less [`TUNNEL_OVERHEAD`].
    pub mtu: u16,
}

/// A guest's attachment to a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortView {
    /// The port.
    pub port: PortId,
    /// The network it is attached to.
    pub network: NetworkId,
    /// The guest's Ethernet address, of no other port of the network.
    pub mac: MacAddr,
    /// The guest's IPv4 address, of no other port of the network.
    pub ipv4: Ipv4Addr,
    /// The guest's IPv6 address besides the link-local one.
    #[serde(default)]
    pub ipv6: Option<Ipv6Addr>,
    /// The name that the guest learns by DHCP.
    #[serde(default)]
    pub hostname: Option<String>,
    /// The owner; none while the guest does not run.
    pub host: Option<HostId>,
    /// The ownership's generation.
    pub epoch: Epoch,
    /// The destination of a move that is being prepared: bound, but silent.
    #[serde(default)]
    pub prepared_at: Option<HostId>,
    /// The source of a finished move, which still forwards what arrives.
    #[serde(default)]
    pub moved_from: Option<HostId>,
}

/// Why a view is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ViewError {
    /// More than [`MAX_ITEMS`] of one kind.
    #[error("the view has {count} {kind}, more than {MAX_ITEMS}")]
    TooMany {
        /// What there is too much of.
        kind: &'static str,
        /// How many.
        count: usize,
    },
    /// The same id, number or address twice.
    #[error("{what} {value} occurs twice in the view")]
    Twice {
        /// What must be unique.
        what: &'static str,
        /// The value.
        value: String,
    },
    /// A value outside its range.
    #[error("{what} {value} of {owner} is out of range")]
    Range {
        /// The field.
        what: &'static str,
        /// The value.
        value: String,
        /// Whose field it is.
        owner: String,
    },
    /// Something is named that the view does not hold.
    #[error("port {port} names {what} {value}, which the view does not hold")]
    Unknown {
        /// The port.
        port: PortId,
        /// What is named.
        what: &'static str,
        /// The name.
        value: String,
    },
}

fn unique<K: Ord + ToString>(seen: &mut BTreeSet<K>, what: &'static str, key: K) -> Result<(), ViewError> {
    let value = key.to_string();
    if seen.insert(key) { Ok(()) } else { Err(ViewError::Twice { what, value }) }
}

fn range(ok: bool, what: &'static str, value: &dyn ToString, owner: &dyn ToString) -> Result<(), ViewError> {
    if ok { Ok(()) } else { Err(ViewError::Range { what, value: value.to_string(), owner: owner.to_string() }) }
}

impl OverlayView {
    /// Checks everything that isolation rests on: unique ids, VNIs, MAC and IP addresses, ranges, and that every
    /// name is held by the view.
    pub fn check(&self) -> Result<(), ViewError> {
        for (kind, count) in
            [("hosts", self.hosts.len()), ("networks", self.networks.len()), ("ports", self.ports.len())]
        {
            if count > MAX_ITEMS {
                return Err(ViewError::TooMany { kind, count });
            }
        }
        let (mut ids, mut indices, mut addrs) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let mut keys = BTreeSet::new();
        for host in &self.hosts {
            unique(&mut ids, "host", host.host)?;
            unique(&mut indices, "host index", host.index)?;
            unique(&mut addrs, "overlay address", host.overlay_addr)?;
            range(host.index <= MAX_HOST_INDEX, "index", &host.index, &host.host)?;
            let addr = host.overlay_addr;
            let usable = !addr.is_unspecified() && !addr.is_broadcast() && !addr.is_multicast() && !addr.is_loopback();
            range(usable, "overlay address", &addr, &host.host)?;
            if let Some(end) = host.encryption {
                unique(&mut keys, "public key", end.public_key)?;
                let endpoint = end.endpoint.map_or_else(String::new, |at| at.to_string());
                range(end.is_usable(), "endpoint", &endpoint, &host.host)?;
            }
        }
        let (mut networks, mut vnis) = (BTreeMap::new(), BTreeSet::new());
        for net in &self.networks {
            if networks.insert(net.network, net).is_some() {
                return Err(ViewError::Twice { what: "network", value: net.network.to_string() });
            }
            unique(&mut vnis, "VNI", net.vni)?;
            range((1..=MAX_VNI).contains(&net.vni), "VNI", &net.vni, &net.network)?;
            range(net.mtu >= MIN_MTU, "MTU", &net.mtu, &net.network)?;
            range(net.dns.len() <= 8, "number of DNS servers", &net.dns.len(), &net.network)?;
            range(is_usable(&net.cidr, net.gateway), "gateway", &net.gateway, &net.network)?;
        }
        // What is encrypted would be encrypted again, without end.
        for (host, end) in self.hosts.iter().filter_map(|host| Some((host, host.encryption?))) {
            let is_inside = end.endpoint.is_some_and(|at| addrs.iter().any(|addr| at.ip().to_canonical() == *addr));
            range(!is_inside, "endpoint", &"inside the overlay", &host.host)?;
        }
        self.check_ports(&ids, &networks)
    }

    fn check_ports(
        &self,
        hosts: &BTreeSet<HostId>,
        networks: &BTreeMap<NetworkId, &NetworkView>,
    ) -> Result<(), ViewError> {
        let (mut ids, mut macs, mut v4s, mut v6s) =
            (BTreeSet::new(), BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for port in &self.ports {
            let unknown = |what, value: String| ViewError::Unknown { port: port.port, what, value };
            unique(&mut ids, "port", port.port)?;
            let net = networks.get(&port.network).ok_or_else(|| unknown("network", port.network.to_string()))?;
            for host in [port.host, port.prepared_at, port.moved_from].into_iter().flatten() {
                if !hosts.contains(&host) {
                    return Err(unknown("host", host.to_string()));
                }
            }
            range(port.mac.is_station() && port.mac != crate::compile::gateway_mac(), "MAC", &port.mac, &port.port)?;
            if !macs.insert((port.network, port.mac)) {
                return Err(ViewError::Twice { what: "MAC", value: port.mac.to_string() });
            }
            range(is_usable(&net.cidr, port.ipv4) && port.ipv4 != net.gateway, "IPv4 address", &port.ipv4, &port.port)?;
            if !v4s.insert((port.network, port.ipv4)) {
                return Err(ViewError::Twice { what: "IPv4 address", value: port.ipv4.to_string() });
            }
            if let Some(v6) = port.ipv6 {
                range(net.cidr6.is_some_and(|c| c.contains(v6)), "IPv6 address", &v6, &port.port)?;
            }
            for v6 in port.ipv6.into_iter().chain([port.mac.link_local()]) {
                range(
                    !v6.is_unspecified() && !v6.is_multicast() && !v6.is_loopback(),
                    "IPv6 address",
                    &v6,
                    &port.port,
                )?;
                if !v6s.insert((port.network, v6)) {
                    return Err(ViewError::Twice { what: "IPv6 address", value: v6.to_string() });
                }
            }
            if let Some(name) = &port.hostname {
                range(is_hostname(name), "hostname", name, &port.port)?;
            }
        }
        Ok(())
    }

    /// Takes in what a host learnt earlier than the controller's next view tells it: the port now belongs to
    /// `owner` since `epoch`, and the former owner forwards. Older epochs change nothing. Returns whether it changed.
    pub fn note_switch(&mut self, port: PortId, owner: HostId, epoch: Epoch) -> bool {
        let Some(port) = self.ports.iter_mut().find(|p| p.port == port) else { return false };
        if epoch <= port.epoch {
            return false;
        }
        port.epoch = epoch;
        if port.host != Some(owner) {
            port.moved_from = port.host;
            port.host = Some(owner);
        }
        if port.prepared_at == Some(owner) {
            port.prepared_at = None;
        }
        true
    }

    /// Keeps the ownership of every port that `have` knows at a later epoch than this view does.
    pub(crate) fn keep_newer(&mut self, have: &OverlayView) {
        let newer: BTreeMap<PortId, &PortView> = have.ports.iter().map(|p| (p.port, p)).collect();
        for port in &mut self.ports {
            if let Some(known) = newer.get(&port.port).filter(|known| known.epoch > port.epoch) {
                port.epoch = known.epoch;
                port.host = known.host;
                port.prepared_at = known.prepared_at;
                port.moved_from = known.moved_from;
            }
        }
    }
}

fn is_usable(cidr: &Ipv4Prefix, addr: Ipv4Addr) -> bool {
    // A network of /31 or /32 has neither a network nor a broadcast address (RFC 3021).
    cidr.contains(addr)
        && (cidr.prefix_len() >= 31 || (addr != cidr.network() && addr != cidr.last()))
        && !addr.is_multicast()
        && !addr.is_unspecified()
        && !addr.is_link_local()
}

fn is_hostname(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}
