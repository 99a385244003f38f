//! Which namespaces, interfaces and addresses belong to which lab: everything follows from the lab's index.
//!
//! | thing | lab `L`, host `N` (1..=64), controller 254 |
//! |---|---|
//! | namespaces | `scl-L-<host>`, `scl-L-_ctl`, `scl-L-_wan` |
//! | agents' traffic | `eth0` `198.18.L.N/24` |
//! | overlay underlay | `ul0` in the bridge `br-phy`, which has `198.19.L.N/24` |
//! | the same, encrypted | `sc-wg` in hosts that are VMs, `198.19.L.(128+N)/32`; what it encrypts goes by `ul0` |
//! | way in for people | `sclLr` in the machine's own namespace, `198.18.L.253/32`, to `198.18.L.254` only |
//!
//! The addresses are those that RFC 2544 keeps for tests; nothing in a lab has a route out.

use std::net::Ipv4Addr;

/// Largest index of a lab on one machine.
pub const MAX_INDEX: u8 = 63;

/// The lab's number on this machine, from which names and addresses follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LabIndex(u8);

impl LabIndex {
    /// Checks the range 1..=63.
    #[must_use]
    pub fn new(index: u8) -> Option<Self> {
        (1..=MAX_INDEX).contains(&index).then_some(Self(index))
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u8 {
        self.0
    }

    /// What all namespaces of the lab begin with.
    #[must_use]
    pub fn namespace_prefix(self) -> String {
        format!("scl-{}-", self.0)
    }

    /// The namespace of a host.
    #[must_use]
    pub fn host_namespace(self, host: &str) -> String {
        format!("scl-{}-{host}", self.0)
    }

    /// The namespace of the controller; the underscore keeps it apart from every host's name.
    #[must_use]
    pub fn controller_namespace(self) -> String {
        format!("scl-{}-_ctl", self.0)
    }

    /// The namespace of the WAN emulator.
    #[must_use]
    pub fn wan_namespace(self) -> String {
        format!("scl-{}-_wan", self.0)
    }

    /// The namespace of a site, host or controller.
    #[must_use]
    pub fn site_namespace(self, site: &str) -> String {
        if site == crate::spec::CONTROLLER { self.controller_namespace() } else { self.host_namespace(site) }
    }

    /// The address of a site's `eth0`.
    #[must_use]
    pub fn agent_address(self, site: u8) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, self.0, site)
    }

    /// The address of a host's `br-phy`, where its tunnels end.
    #[must_use]
    pub fn overlay_address(self, site: u8) -> Ipv4Addr {
        Ipv4Addr::new(198, 19, self.0, site)
    }

    /// The address of the interface that encrypts a host's tunnels, where they end then.
    #[must_use]
    pub fn encrypted_address(self, site: u8) -> Ipv4Addr {
        Ipv4Addr::new(198, 19, self.0, 128 | site)
    }

    /// The controller's address.
    #[must_use]
    pub fn controller_address(self) -> Ipv4Addr {
        self.agent_address(254)
    }

    /// The machine's own end of the way in to the controller.
    #[must_use]
    pub fn root_address(self) -> Ipv4Addr {
        self.agent_address(253)
    }

    /// The name of the machine's own end of the way in to the controller.
    #[must_use]
    pub fn root_interface(self) -> String {
        format!("scl{}r", self.0)
    }

    /// The Ethernet address of a site's interface.
    #[must_use]
    pub fn mac(self, site: u8, segment: Segment) -> [u8; 6] {
        [0x02, 0x5c, 0x4c, self.0, site, segment as u8]
    }
}

/// The two Ethernet segments that the WAN carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Segment {
    /// Agents, controller: `eth0`.
    Agents = 1,
    /// Tunnels of the overlay: `ul0`.
    Overlay = 2,
}

impl Segment {
    /// The interface in a host.
    #[must_use]
    pub fn host_interface(self) -> &'static str {
        match self {
            Self::Agents => "eth0",
            Self::Overlay => "ul0",
        }
    }

    /// The other end, in the WAN's namespace.
    #[must_use]
    pub fn wan_interface(self, site: u8) -> String {
        match self {
            Self::Agents => format!("a{site}"),
            Self::Overlay => format!("o{site}"),
        }
    }
}

/// An Ethernet address as text.
#[must_use]
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_do_not_clash() {
        let index = LabIndex::new(MAX_INDEX).unwrap();
        assert!(index.root_interface().len() <= 15);
        assert!(LabIndex::new(0).is_none() && LabIndex::new(64).is_none());
        // Host names never begin with an underscore.
        assert!(crate::spec::check_name("host", "_ctl", 24).is_err());
        assert_eq!(mac_text(index.mac(254, Segment::Overlay)), "02:5c:4c:3f:fe:02");
        // Lab 1's prefix is no prefix of lab 11's.
        assert!(!LabIndex(11).host_namespace("a").starts_with(&LabIndex(1).namespace_prefix()));
    }
}
