//! The flow compiler: a pure function from the overlay's view to the flow tables of one host.
//!
//! Isolation is by construction: a packet goes somewhere only because a flow of its own network says so.
//!
//! | table | holds | by default |
//! |---|---|---|
//! | 0 ingress | who may send what: per local port MAC, IPv4, IPv6, ARP, ND, DHCP pins; per peer's tunnel the MACs that live there; the metadata service's answers | drop |
//! | 1 ARP | answers to requests for known addresses of the network, its gateway, 169.254.169.254 | on to table 4 |
//! | 2 ND | answers to neighbour solicitations for known addresses | on to table 4 |
//! | 3 ND answer | the second half of an answer: its link-layer address | drop |
//! | 4 L2 | by destination: the local tap, the owner's tunnel, or a copy to each port of the segment | drop |
//!
//! Register 0 holds the network's VNI from table 0 on, register 1 where the packet came from (a local port or a
//! tunnel). What came from a tunnel never leaves by one (split horizon), with one exception: the source of a finished
//! move passes on what still arrives for the guest. Such a frame is marked by the top bit of the tunnel key
//! ([`FORWARDED`]); it is taken only from the tunnel of the move's source, only for the MAC that moved, goes only to
//! the local tap and is never forwarded again: no mix of views at the hosts makes a loop.

mod guest;
mod segment;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use serde::{Deserialize, Serialize};
use supercloud_ids::{HostId, NetworkId, PortId};

use crate::{
    addr::{Ipv4Prefix, MacAddr},
    flows::FlowTables,
    openflow::{Action, Field, Instruction, Match},
    view::{NetworkView, OverlayView, PortView, ViewError},
};

/// The bit of the tunnel key that marks a frame forwarded by the source of a move.
pub const FORWARDED: u32 = 0x80_0000;
/// Where guests find the metadata service.
pub const METADATA_ADDR: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The address of `md0` in the host, where the metadata service listens. Not the one that guests use: a rented host
/// needs that one for itself.
pub const MD_LISTEN: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 1);
/// Length of the prefix of `md0`: 169.254.64.0/18, clear of what clouds use (169.254.169.0/24, .0 and .1).
pub const MD_PREFIX_LEN: u8 = 18;
/// The metadata service's TCP port.
pub const METADATA_TCP_PORT: u16 = 80;
/// The highest switch port of a tap; tunnels begin at [`TUNNEL_OFPORT_BASE`].
pub const MAX_TAP_OFPORT: u32 = 990;
/// The switch port of `md0`.
pub const MD_OFPORT: u32 = 999;
/// The tunnel to host index n has the switch port 1000 + n.
pub const TUNNEL_OFPORT_BASE: u32 = 1000;
/// DHCP requests per second that one port may send.
pub const DHCP_RATE_PPS: u32 = 8;
/// DHCP requests that one port may send at once.
pub const DHCP_BURST: u32 = 16;

pub(crate) const INGRESS: u8 = 0;
pub(crate) const ARP: u8 = 1;
pub(crate) const ND: u8 = 2;
pub(crate) const ND_ANSWER: u8 = 3;
pub(crate) const L2: u8 = 4;
/// Register 1: the packet came from a local port.
pub(crate) const FROM_LOCAL: u128 = 1;
/// Register 1: the packet came by a tunnel.
pub(crate) const FROM_TUNNEL: u128 = 2;

/// The Ethernet address of every network's gateway and of the metadata service, as guests see it.
#[must_use]
pub const fn gateway_mac() -> MacAddr {
    MacAddr([0x02, 0x5c, 0xff, 0x00, 0x00, 0x01])
}

/// The Ethernet address of `md0`.
#[must_use]
pub const fn md_mac() -> MacAddr {
    MacAddr([0x02, 0x5c, 0xff, 0x00, 0x00, 0x02])
}

/// The address by which the metadata service sees the guest at a switch port (1 to [`MAX_TAP_OFPORT`]).
#[must_use]
pub fn md_addr(ofport: u32) -> Ipv4Addr {
    // 169.254.65.0 on, in the /18 of MD_LISTEN.
    Ipv4Addr::from(0xa9fe_4100 + ofport.min(MAX_TAP_OFPORT))
}

/// The switch port of the guest that the metadata service sees at this address.
#[must_use]
pub fn md_ofport(addr: Ipv4Addr) -> Option<u32> {
    u32::from(addr).checked_sub(0xa9fe_4100).filter(|p| (1..=MAX_TAP_OFPORT).contains(p))
}

/// What only the host knows: which switch port is what.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LocalPorts {
    /// The switch port of each local tap.
    pub taps: BTreeMap<PortId, u32>,
    /// The switch port of the tunnel to each peer.
    pub tunnels: BTreeMap<HostId, u32>,
    /// The switch port of `md0`, where there is a metadata service.
    pub md0: Option<u32>,
    /// Destinations that guests must not reach: underlay, hosts, controllers. Link-local is always one.
    pub blocked: Vec<Ipv4Prefix>,
    /// Whether the switch can rewrite neighbour discovery (the userspace datapath can). Else solicitations go through
    /// the segment and their target answers.
    pub nd_responder: bool,
    /// Whether the switch has meters, to limit each port's DHCP requests.
    pub meters: bool,
}

/// What a flow is for; the second byte of its cookie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CookieKind {
    /// A table's default.
    Default = 1,
    /// What a local port may send.
    Guest = 2,
    /// DHCP requests of a local port, to the agent.
    Dhcp = 3,
    /// Metadata requests and answers of a local port.
    Metadata = 4,
    /// What may come by a tunnel.
    Tunnel = 5,
    /// An answer to ARP or ND.
    Answer = 6,
    /// Delivery to a local port.
    Deliver = 7,
    /// Transport to the owner's host.
    Remote = 8,
    /// Passing on what arrives for a guest that moved away.
    Forward = 9,
    /// Broadcast and multicast of a network.
    Flood = 10,
    /// Destinations that guests must not reach.
    Blocked = 11,
}

impl CookieKind {
    /// Every kind.
    const ALL: [Self; 11] = [
        Self::Default,
        Self::Guest,
        Self::Dhcp,
        Self::Metadata,
        Self::Tunnel,
        Self::Answer,
        Self::Deliver,
        Self::Remote,
        Self::Forward,
        Self::Flood,
        Self::Blocked,
    ];
}

/// The mark of a flow: `0x5c`, the kind, and 48 bits of a hash of the port or network that it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cookie(pub u64);

impl Cookie {
    /// The mark for a kind of flow of the thing with this UUID.
    #[must_use]
    pub fn new(kind: CookieKind, id: &[u8]) -> Self {
        // FNV-1a, 64 bits (draft-eastlake-fnv): stable over runs and versions, which the std hasher is not.
        let hash = id.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
        Cookie(0x5c << 56 | u64::from(kind as u8) << 48 | (hash ^ hash >> 48) & 0xffff_ffff_ffff)
    }

    /// The bits that say what a flow is for, and not of what kind it is.
    pub const OWNER_BITS: u64 = 0xff00_ffff_ffff_ffff;

    /// Of what kind it is; none for foreign flows.
    #[must_use]
    pub fn kind(self) -> Option<CookieKind> {
        CookieKind::ALL.into_iter().find(|kind| self.is(*kind))
    }

    /// Whether a flow with this cookie is one of ours of this kind.
    #[must_use]
    pub fn is(self, kind: CookieKind) -> bool {
        self.0 >> 48 == 0x5c << 8 | u64::from(kind as u8)
    }
}

/// A network with what this host has to do with it.
pub(crate) struct Segment<'a> {
    pub net: &'a NetworkView,
    /// All ports of the network.
    pub ports: Vec<&'a PortView>,
    /// Ports that run here, with their switch port.
    pub owned: Vec<(&'a PortView, u32)>,
    /// Ports that are being moved here, with their switch port.
    pub prepared: Vec<(&'a PortView, u32)>,
    /// Ports that moved away from here, with their new owner.
    pub departed: Vec<(&'a PortView, HostId)>,
}

pub(crate) struct Compiler<'a> {
    pub host: HostId,
    pub local: &'a LocalPorts,
    pub out: FlowTables,
}

/// The flow tables of a host. Fails only when the view does not pass [`OverlayView::check`].
pub fn compile(view: &OverlayView, host: HostId, local: &LocalPorts) -> Result<FlowTables, ViewError> {
    view.check()?;
    let mut by_network: BTreeMap<NetworkId, Vec<&PortView>> = BTreeMap::new();
    for port in &view.ports {
        by_network.entry(port.network).or_default().push(port);
    }
    let mut c = Compiler { host, local, out: FlowTables::default() };
    c.defaults();
    for net in &view.networks {
        let mut ports = by_network.remove(&net.network).unwrap_or_default();
        ports.sort_by_key(|p| p.port);
        let segment = c.segment(net, ports);
        c.network(&segment);
    }
    Ok(c.out)
}

impl<'a> Compiler<'a> {
    fn segment(&self, net: &'a NetworkView, ports: Vec<&'a PortView>) -> Segment<'a> {
        let mut segment = Segment { net, ports, owned: vec![], prepared: vec![], departed: vec![] };
        for port in &segment.ports {
            let tap = self.local.taps.get(&port.port).copied();
            match (port.host, tap) {
                (Some(owner), Some(tap)) if owner == self.host => segment.owned.push((port, tap)),
                (_, Some(tap)) if port.prepared_at == Some(self.host) => segment.prepared.push((port, tap)),
                (Some(owner), _) if port.moved_from == Some(self.host) && owner != self.host => {
                    segment.departed.push((port, owner));
                }
                _ => {}
            }
        }
        segment
    }

    fn defaults(&mut self) {
        let cookie = Cookie::new(CookieKind::Default, &[]);
        self.put(INGRESS, 0, Match::any(), cookie, vec![]);
        self.put(ARP, 0, Match::any(), cookie, vec![Instruction::GotoTable(L2)]);
        self.put(ND, 0, Match::any(), cookie, vec![Instruction::GotoTable(L2)]);
        self.put(ND_ANSWER, 0, Match::any(), cookie, vec![]);
        self.put(L2, 0, Match::any(), cookie, vec![]);
        let mut blocked: BTreeSet<(u32, u32)> =
            self.local.blocked.iter().map(|p| (p.network().into(), p.netmask().into())).collect();
        blocked.insert((0xa9fe_0000, 0xffff_0000));
        let cookie = Cookie::new(CookieKind::Blocked, &[]);
        for (addr, mask) in blocked {
            let matching = Match::any().with(Field::EthType, 0x0800_u16).with_mask(Field::Ipv4Dst, addr, mask.into());
            // A destination of any address would block everything: a prefix of length 0 is a mistake, not a wish.
            if mask != 0 {
                self.put(INGRESS, 95, matching, cookie, vec![]);
            }
        }
        self.md0_arp();
    }

    fn network(&mut self, segment: &Segment<'_>) {
        if segment.owned.is_empty() && segment.prepared.is_empty() && segment.departed.is_empty() {
            return;
        }
        for (port, tap) in &segment.owned {
            self.guest(segment.net, port, *tap);
        }
        if !segment.owned.is_empty() {
            self.answers(segment);
        }
        self.accept_tunnels(segment);
        self.deliver(segment);
        self.flood(segment);
    }

    pub(crate) fn put(
        &mut self,
        table: u8,
        priority: u16,
        matching: Match,
        cookie: Cookie,
        instructions: Vec<Instruction>,
    ) {
        self.out.add(table, priority, matching, cookie.0, instructions);
    }
}

pub(crate) fn port_cookie(kind: CookieKind, port: &PortView) -> Cookie {
    Cookie::new(kind, port.port.uuid().as_bytes())
}

pub(crate) fn network_cookie(kind: CookieKind, net: &NetworkView) -> Cookie {
    Cookie::new(kind, net.network.uuid().as_bytes())
}

/// Notes network and origin, and goes on in a table.
pub(crate) fn enter(net: &NetworkView, origin: u128, table: u8) -> Vec<Instruction> {
    vec![
        Instruction::Apply(vec![Action::SetField(Field::Reg0, net.vni.into()), Action::SetField(Field::Reg1, origin)]),
        Instruction::GotoTable(table),
    ]
}

pub(crate) fn apply(actions: Vec<Action>) -> Vec<Instruction> {
    vec![Instruction::Apply(actions)]
}
