//! Networks and ports.

use std::net::Ipv4Addr;

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::HeaderMap,
};
use supercloud_api::{Code, Network, NetworkCreate, Page, Port, Ref, ids::NetworkId, unix_ms};
use supercloud_sdn::{addr::Ipv4Prefix, view::MAX_VNI, wireguard::NETWORK_MTU};

use super::{Api, Asker, Failure, Reply, body};
use crate::state::{Change, EventDraft, HostRecord, Named as _, keys, retry_conflicts};

/// What fits a tunnel on an underlay of 1500 bytes; where hosts encrypt, [`NETWORK_MTU`].
const MTU: u16 = 1450;
/// Most name servers of a network.
const MAX_DNS: usize = 8;
/// Where private networks may lie (RFC 1918).
const PRIVATE: [(Ipv4Addr, u8); 3] =
    [(Ipv4Addr::new(10, 0, 0, 0), 8), (Ipv4Addr::new(172, 16, 0, 0), 12), (Ipv4Addr::new(192, 168, 0, 0), 16)];

/// The prefix of a text, if a network may have it.
fn parse_cidr(text: &str) -> Result<Ipv4Prefix, Failure> {
    let prefix: Ipv4Prefix = text.parse().map_err(|error| Failure::bad(format!("cidr: {error}")))?;
    if !(8..=29).contains(&prefix.prefix_len()) {
        return Err(Failure::bad(format!("cidr is {prefix}; its length must be 8 to 29")));
    }
    let is_inside = PRIVATE.iter().any(|(network, len)| {
        Ipv4Prefix::new(*network, *len)
            .is_ok_and(|range| range.prefix_len() <= prefix.prefix_len() && range.contains(prefix.network()))
    });
    if !is_inside {
        return Err(Failure::bad(format!(
            "cidr is {prefix}; it must lie inside 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16"
        )));
    }
    Ok(prefix)
}

fn check_dns(servers: &[Ipv4Addr]) -> Result<(), Failure> {
    if servers.len() > MAX_DNS {
        return Err(Failure::bad(format!("dns has {} servers; at most {MAX_DNS} are taken", servers.len())));
    }
    let unusable = |ip: &&Ipv4Addr| ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast() || ip.is_loopback();
    match servers.iter().find(unusable) {
        Some(ip) => Err(Failure::bad(format!("dns: {ip} is no server's address"))),
        None => Ok(()),
    }
}

/// Networks.
#[utoipa::path(get, path = "/v1/networks", tag = "networks", responses((status = 200, body = Page<Network>)))]
pub async fn list(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let scope = asker.scope(&api.parts).await?;
    let keep = |network: &Network| scope.is_none_or(|project| network.project == project);
    let (items, next_page) = api.parts.state.page(asker.params.page()?.as_ref(), asker.params.limit()?, keep).await?;
    Reply::ok(&Page { items: items.into_iter().map(|network| network.value).collect(), next_page })
}

/// One network.
#[utoipa::path(get, path = "/v1/networks/{network}", tag = "networks", responses((status = 200, body = Network)))]
pub async fn read(State(api): State<Api>, asker: Asker, Path(network): Path<String>) -> Result<Reply, Failure> {
    let found = asker.find::<Network>(&api.parts, &Ref::from(network)).await?;
    Ok(Reply::ok(&found.value)?.at(found.revision))
}

/// Makes a network. Its gateway is the first address of the prefix.
#[utoipa::path(post, path = "/v1/networks", tag = "networks", request_body = NetworkCreate, responses((status = 201, body = Network)))]
pub async fn create(State(api): State<Api>, asker: Asker, headers: HeaderMap, bytes: Bytes) -> Result<Reply, Failure> {
    let wanted: NetworkCreate = body(&headers, &bytes)?;
    let prefix = parse_cidr(&wanted.cidr)?;
    check_dns(&wanted.dns)?;
    let project = asker.project(&api.parts, wanted.project.as_ref()).await?.project.id;
    let hosts = api.parts.state.list::<HostRecord>().await?;
    let encrypts = hosts.iter().any(|one| !one.value.is_removed && one.value.host.overlay_encryption.is_some());
    let mtu = if encrypts { NETWORK_MTU } else { MTU };
    retry_conflicts(|| async {
        if api.parts.state.find::<Network>(Some(project), &Ref::from(wanted.name.as_str())).await?.is_some() {
            return Err(Failure::name_taken(Network::NOUN, &wanted.name));
        }
        let network = Network {
            id: NetworkId::generate(),
            project,
            name: wanted.name.clone(),
            cidr: prefix.to_string(),
            gateway: Ipv4Addr::from(u32::from(prefix.network()) + 1),
            dns: wanted.dns.clone(),
            // Chosen at random: a number says nothing of others, and is not used again soon. A taken one conflicts.
            vni: rand::random_range(1..=MAX_VNI),
            mtu,
            created_at_ms: unix_ms(),
        };
        let mut change = Change::new();
        change.create_named(&network).claim(keys::vni(network.vni), network.id).event(
            EventDraft::new("network.created")
                .project(project)
                .data(serde_json::json!({ "network": network.id, "name": network.name, "cidr": network.cidr })),
        );
        let reply = Reply::created(format!("/v1/networks/{}", network.id), &network)?;
        asker.commit(&api.parts, project, change, reply).await
    })
    .await
}

/// Deletes a network without ports.
#[utoipa::path(delete, path = "/v1/networks/{network}", tag = "networks", responses((status = 204)))]
pub async fn remove(State(api): State<Api>, asker: Asker, Path(network): Path<String>) -> Result<Reply, Failure> {
    let reference = Ref::from(network);
    retry_conflicts(|| async {
        let found = asker.find::<Network>(&api.parts, &reference).await?;
        // Whoever makes a port there passes the same guard.
        let guard = keys::usage_guard(found.project);
        let guarded = api.parts.state.revision_of(guard.clone()).await?;
        let ports = api.parts.state.index(&keys::addresses(found.id)).await?.len();
        if ports > 0 {
            return Err(Failure::new(
                Code::WrongState,
                format!("the network has {ports} ports; delete their guests first"),
            ));
        }
        let mut change = Change::new();
        change.delete_named(&found).release(keys::vni(found.vni)).guard(guard, guarded).event(
            EventDraft::new("network.deleted")
                .project(found.project)
                .data(serde_json::json!({ "network": found.id, "name": found.name })),
        );
        asker.commit(&api.parts, found.project, change, Reply::nothing()).await
    })
    .await
}

/// Ports.
#[utoipa::path(get, path = "/v1/ports", tag = "networks", responses((status = 200, body = Page<Port>)))]
pub async fn list_ports(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let scope = asker.scope(&api.parts).await?;
    let keep = |port: &Port| scope.is_none_or(|project| port.project == project);
    let (items, next_page) = api.parts.state.page(asker.params.page()?.as_ref(), asker.params.limit()?, keep).await?;
    Reply::ok(&Page { items: items.into_iter().map(|port| port.value).collect(), next_page })
}

/// One port.
#[utoipa::path(get, path = "/v1/ports/{port}", tag = "networks", responses((status = 200, body = Port)))]
pub async fn read_port(State(api): State<Api>, asker: Asker, Path(port): Path<String>) -> Result<Reply, Failure> {
    let found = asker.find::<Port>(&api.parts, &Ref::from(port)).await?;
    Ok(Reply::ok(&found.value)?.at(found.revision))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_private_and_of_a_sane_length() {
        for good in ["10.20.0.0/24", "10.0.0.0/8", "172.31.255.0/29", "192.168.0.0/16"] {
            assert!(parse_cidr(good).is_ok(), "{good}");
        }
        for bad in ["8.8.8.0/24", "10.0.0.0/7", "10.0.0.0/30", "10.0.0.1/24", "172.16.0.0/11", "192.168.0.0/8", "x", ""]
        {
            assert!(parse_cidr(bad).is_err(), "{bad}");
        }
    }
}
