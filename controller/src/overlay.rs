//! The overlay as each host must know it: made from the records, a pure function.
//!
//! A host is told only the networks in which it has a port (or is preparing one, or still forwards for one): what it is
//! not told it cannot leak.

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
};

use supercloud_api::{
    Guest, Host, HostState, Name, Network, OverlayEncryption, Port,
    ids::{GuestId, HostId},
    link::Hello,
};
use supercloud_sdn::{
    view::{HostView, NetworkView, OverlayView, PortView},
    wireguard::End,
};

/// Why a record cannot be part of a view.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} of {owner} is '{value}', which is not acceptable in an overlay")]
pub struct BadRecord {
    what: &'static str,
    owner: String,
    value: String,
}

/// Whether a port concerns a host.
fn concerns(port: &Port, host: HostId) -> bool {
    port.host == Some(host) || port.prepared_at == Some(host) || port.moved_from == Some(host)
}

/// How a host says that it encrypts; none when what it says is of no use.
fn end_of(record: &Host) -> Option<Option<End>> {
    record.overlay_encryption.as_ref().map_or(Some(None), |said| usable(said).map(Some))
}

/// Why a host has no place in the overlay.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoPlace {
    /// Somebody else came first.
    #[error("its {what} is that of the host {of}")]
    Taken {
        /// What.
        what: &'static str,
        /// Whose.
        of: Name,
    },
    /// Its key or endpoint is none.
    #[error("what it says of its encryption is no key, or no address that others can send to")]
    Encryption,
}

/// Whether what an agent says of its place in the overlay is nobody else's: who has an address or a key keeps it against whoever says the
/// same later.
///
/// # Errors
/// Whose it is, or what is wrong with it.
pub fn is_free<'a>(hello: &Hello, mut others: impl Iterator<Item = &'a Host>) -> Result<(), NoPlace> {
    let said = hello.overlay_encryption.as_ref();
    if said.is_some_and(|said| usable(said).is_none()) {
        return Err(NoPlace::Encryption);
    }
    let taken = others.find_map(|other| {
        let is_key = |said: &OverlayEncryption| {
            other.overlay_encryption.as_ref().is_some_and(|theirs| theirs.public_key == said.public_key)
        };
        if hello.overlay_address.is_some() && other.overlay_address == hello.overlay_address {
            Some(("overlay address", other))
        } else {
            said.is_some_and(is_key).then_some(("public key", other))
        }
    });
    taken.map_or(Ok(()), |(what, other)| Err(NoPlace::Taken { what, of: other.name.clone() }))
}

fn usable(said: &OverlayEncryption) -> Option<End> {
    let end = End { public_key: said.public_key.parse().ok()?, endpoint: said.endpoint };
    end.is_usable().then_some(end)
}

/// The hosts that have a place in the overlay. What an agent says of its address and its key is not trusted: one that cannot be an
/// end of a tunnel, or that an older host has, counts as none (the switches would refuse the view as a whole).
fn reachable_hosts(hosts: &[Host]) -> Vec<HostView> {
    let mut views: Vec<HostView> = hosts
        .iter()
        .filter(|record| record.state != HostState::Removed)
        .filter_map(|record| {
            let overlay_addr = record.overlay_address?;
            let is_usable = !overlay_addr.is_unspecified()
                && !overlay_addr.is_broadcast()
                && !overlay_addr.is_multicast()
                && !overlay_addr.is_loopback();
            let encryption = end_of(record)?;
            is_usable.then_some(HostView { host: record.id, overlay_addr, index: record.overlay_index, encryption })
        })
        .collect();
    // Ids grow with time: the host that joined first keeps the address, and the key.
    views.sort_by_key(|view| view.host);
    let mut taken = BTreeSet::new();
    views.retain(|view| taken.insert(view.overlay_addr));
    let mut keys = BTreeSet::new();
    views.retain(|view| view.encryption.is_none_or(|end| keys.insert(end.public_key)));
    // What is encrypted is not sent into the overlay again.
    let is_outside = |at: SocketAddr| taken.iter().all(|addr| at.ip().to_canonical() != *addr);
    views.retain(|view| view.encryption.and_then(|end| end.endpoint).is_none_or(is_outside));
    views
}

/// The view of one host.
///
/// # Errors
/// When a record holds an address that is none: a fault of ours, for the log.
pub fn view_for(
    host: HostId,
    revision: u64,
    hosts: &[Host],
    networks: &[Network],
    ports: &[Port],
    guests: &[Guest],
) -> Result<OverlayView, BadRecord> {
    let mine: BTreeSet<_> = ports.iter().filter(|port| concerns(port, host)).map(|port| port.network).collect();
    let ports: Vec<&Port> = ports.iter().filter(|port| mine.contains(&port.network)).collect();
    let needed: BTreeSet<HostId> =
        ports.iter().flat_map(|port| [port.host, port.prepared_at, port.moved_from]).flatten().chain([host]).collect();
    let known_hosts = reachable_hosts(hosts);
    // Who encrypts has no tunnel to who does not: guests' packets never go in the clear because of the other end.
    let encrypts = hosts.iter().any(|record| record.id == host && record.overlay_encryption.is_some());
    let hosts = known_hosts
        .into_iter()
        .filter(|view| needed.contains(&view.host) && (view.host == host || view.encryption.is_some() == encrypts))
        .collect::<Vec<_>>();
    let known: BTreeSet<HostId> = hosts.iter().map(|host| host.host).collect();
    let networks = networks
        .iter()
        .filter(|network| mine.contains(&network.id))
        .map(|network| {
            Ok(NetworkView {
                network: network.id,
                project: network.project,
                vni: network.vni,
                cidr: network.cidr.parse().map_err(|_| BadRecord {
                    what: "cidr",
                    owner: network.id.to_string(),
                    value: network.cidr.clone(),
                })?,
                cidr6: None,
                gateway: network.gateway,
                dns: network.dns.clone(),
                mtu: network.mtu,
            })
        })
        .collect::<Result<_, BadRecord>>()?;
    // A host without an overlay address has no tunnel: a port there is as good as nowhere.
    let reachable = |host: Option<HostId>| host.filter(|host| known.contains(host));
    let names: HashMap<GuestId, &Guest> = guests.iter().map(|guest| (guest.id, guest)).collect();
    let ports = ports
        .into_iter()
        .map(|port| {
            Ok(PortView {
                port: port.id,
                network: port.network,
                mac: port.mac.parse().map_err(|_| BadRecord {
                    what: "mac",
                    owner: port.id.to_string(),
                    value: port.mac.clone(),
                })?,
                ipv4: port.ipv4,
                ipv6: None,
                hostname: names.get(&port.guest).map(|guest| guest.name.to_string()),
                host: reachable(port.host),
                epoch: port.epoch,
                prepared_at: reachable(port.prepared_at),
                moved_from: reachable(port.moved_from),
            })
        })
        .collect::<Result<_, BadRecord>>()?;
    Ok(OverlayView { revision, hosts, networks, ports })
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use supercloud_api::ids::{CloudId, GuestId, NetworkId, PortId, ProjectId};

    use super::*;

    fn host(index: u16) -> Host {
        serde_json::from_value(json!({
            "id": HostId::generate(), "name": format!("h{index}"), "cloud": CloudId::generate(), "cloud_name": "c",
            "state": "up", "data_address": null, "overlay_address": format!("198.19.1.{index}"), "overlay_index": index,
            "capacity": {"vcpus": 1, "memory_bytes": 1, "disk_bytes": 1},
            "used": {"vcpus": 0, "memory_bytes": 0, "disk_bytes": 0}, "compat_classes": [], "probe": {},
            "agent_version": "", "certificate_sha256": "", "last_seen_ms": 0, "created_at_ms": 0,
        }))
        .unwrap()
    }

    fn network(vni: u32) -> Network {
        serde_json::from_value(json!({
            "id": NetworkId::generate(), "project": ProjectId::generate(), "name": "lan", "cidr": "10.1.0.0/24",
            "gateway": "10.1.0.1", "dns": [], "vni": vni, "mtu": 1450, "created_at_ms": 0,
        }))
        .unwrap()
    }

    fn port(network: &Network, last: u8, host: Option<&Host>) -> Port {
        serde_json::from_value(json!({
            "id": PortId::generate(), "network": network.id, "project": network.project, "guest": GuestId::generate(),
            "mac": format!("02:00:00:00:00:{last:02x}"), "ipv4": format!("10.1.0.{last}"), "host": host.map(|h| h.id),
            "epoch": 1, "prepared_at": null, "moved_from": null,
        }))
        .unwrap()
    }

    #[test]
    fn a_host_is_told_only_the_networks_it_has_a_part_in() {
        let hosts = [host(1), host(2), host(3)];
        let nets = [network(10), network(11)];
        let ports = [
            port(&nets[0], 2, Some(&hosts[0])),
            port(&nets[0], 3, Some(&hosts[1])),
            port(&nets[1], 2, Some(&hosts[2])),
        ];
        let view = |i: usize| view_for(hosts[i].id, 7, &hosts, &nets, &ports, &[]).unwrap();
        let first = view(0);
        assert!(first.check().is_ok());
        assert_eq!((first.networks.len(), first.ports.len(), first.hosts.len()), (1, 2, 2));
        assert_eq!(view(2).networks[0].vni, 11);
        assert_eq!(view(2).ports.len(), 1);
    }

    #[test]
    fn an_address_that_another_host_has_or_that_is_none_is_nobodys() {
        let mut hosts = [host(1), host(2), host(3)];
        hosts[1].overlay_address = hosts[0].overlay_address;
        hosts[2].overlay_address = Some(std::net::Ipv4Addr::LOCALHOST);
        let nets = [network(10)];
        let ports: Vec<_> = (0..3).map(|i| port(&nets[0], 2 + i, Some(&hosts[usize::from(i)]))).collect();
        let view = view_for(hosts[0].id, 1, &hosts, &nets, &ports, &[]).unwrap();
        assert_eq!(view.check(), Ok(()));
        assert_eq!(view.hosts.iter().map(|view| view.host).collect::<Vec<_>>(), [hosts[0].id]);
        assert_eq!(view.ports.iter().filter(|port| port.host.is_some()).count(), 1);
    }

    #[test]
    fn who_encrypts_has_no_tunnel_to_who_does_not() {
        let key = |first: char| format!("{first}Igo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=");
        let says = |public_key: String, endpoint: Option<&str>| {
            let endpoint = endpoint.map(|at| at.parse().unwrap());
            Some(supercloud_api::OverlayEncryption { public_key, endpoint })
        };
        let mut hosts = [host(1), host(2), host(3), host(4), host(5), host(6), host(7)];
        hosts[0].overlay_encryption = says(key('H'), Some("203.0.113.1:51820"));
        hosts[1].overlay_encryption = says(key('J'), None);
        // Another one's key, no key, no address: nobody's.
        hosts[3].overlay_encryption = says(key('H'), None);
        hosts[4].overlay_encryption = says("secret".into(), None);
        hosts[5].overlay_encryption = says(key('K'), Some("0.0.0.0:51820"));
        hosts[6].overlay_encryption = says(key('L'), Some("198.19.1.2:51820"));
        let nets = [network(10)];
        let ports: Vec<_> = (0..7).map(|i| port(&nets[0], 2 + i, Some(&hosts[usize::from(i)]))).collect();
        let told = |own: usize| {
            let view = view_for(hosts[own].id, 1, &hosts, &nets, &ports, &[]).unwrap();
            assert_eq!(view.check(), Ok(()));
            view.hosts
                .iter()
                .map(|view| hosts.iter().position(|host| host.id == view.host).unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(told(0), [0, 1]);
        assert_eq!(told(1), [0, 1]);
        assert_eq!(told(2), [2], "the one that does not encrypt");
        assert_eq!(told(4), [0, 1], "its own key is none; the others are told of nobody without one");
        let view = view_for(hosts[0].id, 1, &hosts, &nets, &ports, &[]).unwrap();
        assert_eq!(
            view.ports.iter().filter(|port| port.host.is_some()).count(),
            2,
            "ports elsewhere are as good as nowhere"
        );
    }

    #[test]
    fn who_says_an_address_or_a_key_first_keeps_it() {
        let hosts = [host(1), host(2)];
        let key = "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=";
        let mut first = hosts[0].clone();
        first.overlay_encryption =
            Some(OverlayEncryption { public_key: key.into(), endpoint: Some("203.0.113.1:51820".parse().unwrap()) });
        let hello = |address: &str, key: Option<&str>, endpoint: &str| -> Hello {
            let encryption = key.map(|key| json!({ "public_key": key, "endpoint": endpoint }));
            serde_json::from_value(json!({
                "host": HostId::generate(), "agent_version": "1", "data_address": null, "overlay_address": address,
                "overlay_encryption": encryption, "capacity": {"vcpus": 1, "memory_bytes": 1, "disk_bytes": 1},
                "compat_classes": [], "probe": {}, "guests": [], "volumes": [], "view_revision": 0,
            }))
            .unwrap()
        };
        let free = |hello: &Hello| is_free(hello, [&first, &hosts[1]].into_iter());
        let taken = |what, of: &Host| Err(NoPlace::Taken { what, of: of.name.clone() });
        assert_eq!(free(&hello("198.19.1.3", None, "")), Ok(()));
        assert_eq!(free(&hello("198.19.1.2", None, "")), taken("overlay address", &hosts[1]));
        assert_eq!(free(&hello("198.19.1.3", Some(key), "203.0.113.9:51820")), taken("public key", &first));
        let other = key.replace('H', "J");
        assert_eq!(free(&hello("198.19.1.3", Some(&other), "203.0.113.9:51820")), Ok(()));
        assert_eq!(free(&hello("198.19.1.3", Some("key"), "203.0.113.9:51820")), Err(NoPlace::Encryption));
        assert_eq!(free(&hello("198.19.1.3", Some(&other), "127.0.0.1:51820")), Err(NoPlace::Encryption));
    }

    #[test]
    fn the_destination_of_a_move_and_its_source_stay_in_the_picture() {
        let hosts = [host(1), host(2)];
        let nets = [network(10)];
        let mut ports = [port(&nets[0], 2, Some(&hosts[0]))];
        ports[0].prepared_at = Some(hosts[1].id);
        assert_eq!(view_for(hosts[1].id, 1, &hosts, &nets, &ports, &[]).unwrap().ports.len(), 1);
        ports[0] =
            Port { host: Some(hosts[1].id), prepared_at: None, moved_from: Some(hosts[0].id), ..ports[0].clone() };
        let source = view_for(hosts[0].id, 2, &hosts, &nets, &ports, &[]).unwrap();
        assert_eq!(source.ports[0].moved_from, Some(hosts[0].id));
        assert_eq!(source.hosts.len(), 2);
    }
}
