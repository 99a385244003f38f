//! Encryption beneath the tunnels: a WireGuard interface (Donenfeld, NDSS 2017) with the address at which this host's tunnels end.
//!
//! ```text
//!   guest -> br-int -> VXLAN, from and to overlay addresses -> route to the peer's -> sc-wg: encrypted, UDP -> the wire
//! ```
//!
//! Every host of the view is a peer that may use its overlay address only; who speaks from another one is not heard. A routing table of
//! its own leads tunnels' packets, and nothing else, to the interface: what a peer says of its address never diverts anything
//! else of this host. Packet rules see to it that a tunnel's packet leaves and enters by the interface or not at all, and that nothing
//! else does: should the interface or a route vanish, guests are cut off rather than overheard. What the kernel holds is told it by
//! `ip`, `wg` and `nft`; the plans of what to tell ([`settings`], [`routes`], [`rules`]) are pure.
//!
//! It takes the switch's kernel datapath: the one in the switch's own process looks for its peers on its own bridges only.

mod device;
mod key;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use serde::{Deserialize, Serialize};
use supercloud_ids::HostId;

pub use device::{Device, WireguardError, make_key, public_key, remove_others};
pub use key::{BadKey, PrivateKey, PublicKey};

use crate::view::OverlayView;

/// The port at which a host takes encrypted packets, where nothing else is said.
pub const LISTEN_PORT: u16 = 51_820;
/// The interface.
pub const INTERFACE: &str = "sc-wg";
/// What the interface takes at once, in bytes: full packets of a network made before its hosts encrypted (MTU 1450 and
/// [`crate::view::TUNNEL_OVERHEAD`]) still pass; what comes out is then cut into two on the wire.
pub const DEVICE_MTU: u16 = 1500;
/// What a network's MTU may be so that nothing is cut on a wire of 1500 bytes. WireGuard pads to 16 bytes (never beyond the interface's
/// MTU) and takes 80 over IPv6: 1408 bytes are a whole number of them, and 1488 on the wire. VXLAN takes its part of the 1408.
pub const NETWORK_MTU: u16 = 1408 - crate::view::TUNNEL_OVERHEAD;
/// The UDP port of tunnels (RFC 7348).
const VXLAN_PORT: u16 = 4789;
/// The routing table that tunnels' packets follow, the priority of the rule that says so, and the group of interfaces that are ours.
const TABLE: u32 = 47_890;
const PRIORITY: u32 = 4789;
const GROUP: u32 = 47_890;
/// The packet rules' table.
const RULES: &str = "inet supercloud_overlay";
/// How often a host that nobody can dial speaks, so that its NAT remembers it. Seconds.
const KEEPALIVE_S: u32 = 25;

/// How others reach a host that encrypts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Its key.
    pub public_key: PublicKey,
    /// Where it takes encrypted packets; absent behind a NAT: then it speaks first.
    #[serde(default)]
    pub endpoint: Option<SocketAddr>,
}

impl End {
    /// Whether its endpoint, if it says one, can be an address of a machine.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.endpoint.is_none_or(is_machine)
    }
}

/// Whether this can be where a machine takes encrypted packets.
#[must_use]
pub fn is_machine(endpoint: SocketAddr) -> bool {
    let ip = endpoint.ip().to_canonical();
    let is_broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
    !matches!(endpoint.port(), 0 | VXLAN_PORT)
        && !ip.is_unspecified()
        && !ip.is_loopback()
        && !ip.is_multicast()
        && !is_broadcast
}

/// This host's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireguardConfig {
    /// The interface's name.
    pub interface: String,
    /// Where encrypted packets are taken.
    pub listen_port: u16,
    /// This host's key.
    pub private_key: PrivateKey,
    /// Where others find this host; absent behind a NAT.
    pub endpoint: Option<SocketAddr>,
}

/// A host to speak with: what it may use as its address, and how it is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// The address at which its tunnels end.
    pub overlay_addr: Ipv4Addr,
    /// Its key and endpoint.
    pub end: End,
}

/// Why a view cannot be put in force.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeersError {
    /// Its packets would go unencrypted.
    #[error("{0} does not encrypt its tunnels, and this host does: nothing is sent to it")]
    Plain(HostId),
    /// It would not hear.
    #[error(
        "{0} encrypts its tunnels, and this host does not ([wireguard] in its configuration): nothing is sent to it"
    )]
    Encrypted(HostId),
}

/// The peers that a view means for `own`, if this host encrypts; that there is none that would have to, if it does not.
///
/// # Errors
/// When a host of the view is of the other kind.
pub fn peers(view: &OverlayView, own: HostId, encrypts: bool) -> Result<Vec<Peer>, PeersError> {
    let others = view.hosts.iter().filter(|host| host.host != own);
    others
        .filter_map(|host| match (host.encryption, encrypts) {
            (Some(end), true) => Some(Ok(Peer { overlay_addr: host.overlay_addr, end })),
            (None, true) => Some(Err(PeersError::Plain(host.host))),
            (Some(_), false) => Some(Err(PeersError::Encrypted(host.host))),
            (None, false) => None,
        })
        .collect()
}

/// What `wg syncconf` is told (wg(8), "CONFIGURATION FILE FORMAT"). Peers in the order of their keys.
#[must_use]
pub fn settings(config: &WireguardConfig, peers: &[Peer]) -> String {
    let mut text =
        format!("[Interface]\nPrivateKey = {}\nListenPort = {}\n", config.private_key.reveal(), config.listen_port);
    let by_key: BTreeMap<PublicKey, &Peer> = peers.iter().map(|peer| (peer.end.public_key, peer)).collect();
    for (key, peer) in by_key {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n[Peer]\nPublicKey = {key}\nAllowedIPs = {}/32\n", peer.overlay_addr);
        if let Some(endpoint) = peer.end.endpoint {
            let _ = writeln!(text, "Endpoint = {endpoint}");
            if config.endpoint.is_none() {
                let _ = writeln!(text, "PersistentKeepalive = {KEEPALIVE_S}");
            }
        }
    }
    text
}

/// The differences of routes: which to make, which to remove, in `ip -batch`'s words.
///
/// `have` are the destinations that lead to the interface.
#[must_use]
pub fn routes(interface: &str, have: &BTreeSet<Ipv4Addr>, peers: &[Peer]) -> (String, String) {
    let want: BTreeSet<Ipv4Addr> = peers.iter().map(|peer| peer.overlay_addr).collect();
    let line = |verb, to: &Ipv4Addr| format!("route {verb} {to}/32 dev {interface} table {TABLE}\n");
    let made = want.difference(have).map(|to| line("replace", to)).collect();
    let removed = have.difference(&want).map(|to| line("delete", to)).collect();
    (made, removed)
}

/// The packet rules (nft(8)): tunnels' packets of this host's overlay address pass by the interface only, and only they do.
#[must_use]
pub fn rules(interface: &str, overlay_addr: Ipv4Addr) -> String {
    let is_in = format!("ip daddr {overlay_addr} udp dport {VXLAN_PORT}");
    let is_out = format!("ip saddr {overlay_addr} udp dport {VXLAN_PORT}");
    format!(
        "add table {RULES}\ndelete table {RULES}\ntable {RULES} {{\n\
         chain incoming {{ type filter hook input priority -10; policy accept;\n\
         iifname \"{interface}\" {is_in} accept\n\
         iifname \"{interface}\" counter drop\n\
         {is_in} counter drop\n}}\n\
         chain outgoing {{ type filter hook output priority -10; policy accept;\n\
         oifname \"{interface}\" {is_out} accept\n\
         oifname \"{interface}\" counter drop\n\
         {is_out} counter drop\n}}\n\
         chain forwarded {{ type filter hook forward priority -10; policy accept;\n\
         iifname \"{interface}\" counter drop\n\
         oifname \"{interface}\" counter drop\n}}\n}}\n"
    )
}

#[cfg(test)]
mod tests;
