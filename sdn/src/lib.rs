//! The overlay network: what turns networks and ports into what an Open vSwitch per host does.
//!
//! ```text
//!   OverlayView (controller) --+
//!                              +--> compile (pure) --> FlowTables --diff--> one atomic bundle --> switch
//!   LocalPorts (this host) ----+                          ^
//!                                                         +-- what the switch has (dump)
//! ```
//!
//! - [`view`]: what the controller tells; [`compile`]: the flow compiler; [`flows`]: tables and their differences.
//! - [`openflow`]: the wire codec; [`connection`]: requests, answers, bundles, packet-ins over it.
//! - [`ovsdb`]: bridges, ports, tunnels (RFC 7047).
//! - [`dhcp`]: the DHCPv4 responder; [`tap`]: guests' interfaces on the host.
//! - [`wireguard`]: encryption beneath the tunnels.
//! - [`switch`]: the driver that an agent owns; it composes all of these.
//!
//! Tunnels are VXLAN. Where a host does not encrypt them, overlay addresses must be reachable by the fleet's hosts only.

pub mod addr;
pub mod compile;
pub mod connection;
pub mod dhcp;
pub mod flows;
pub mod openflow;
pub mod ovsdb;
pub mod shown;
pub mod switch;
pub mod tap;
pub mod view;
pub mod wireguard;
