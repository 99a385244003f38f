//! Ways between hosts, and the flows of ports.

use axum::extract::{Path, State};
use supercloud_api::{Code, Link, Page, Port, PortFlows, Ref, ids::HostId, link::FlowsOf, unix_ms};

use super::{Api, Asker, Failure, Reply};
use crate::{flows::FlowsError, paths, state::HostRecord};

/// Questions for flows that one token may have open at once.
const FLOWS_OF_ONE: usize = 4;

/// Where a page of links goes on: behind this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct After(HostId, HostId);

impl std::str::FromStr for After {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (from, to) = text.split_once('.').ok_or(())?;
        Ok(Self(from.parse().map_err(|_| ())?, to.parse().map_err(|_| ())?))
    }
}

/// Ways between hosts: round-trip times and loss, as the hosts' agents measure them now. With `host` only those from and to that
/// host. In a big fleet each host measures the ways to 64 others, some in each cloud.
#[utoipa::path(get, path = "/v1/links", tag = "hosts", responses((status = 200, body = Page<Link>)))]
pub async fn list(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let limit = asker.params.limit()?;
    let after = asker.params.page::<After>()?;
    let only = match &asker.params.host {
        Some(host) => Some(asker.find::<HostRecord>(&api.parts, &Ref::from(host.clone())).await?.host.id),
        None => None,
    };
    Reply::ok(&page(paths::links(&api.parts).await?, only, after, limit))
}

/// A page of those that concern a host; `all` is in the order of ids.
fn page(all: Vec<Link>, only: Option<HostId>, after: Option<After>, limit: usize) -> Page<Link> {
    let found = all.into_iter().filter(|link| {
        only.is_none_or(|host| [link.from, link.to].contains(&host))
            && after.is_none_or(|after| After(link.from, link.to) > after)
    });
    let mut items: Vec<Link> = found.take(limit + 1).collect();
    let is_more = items.len() > limit;
    items.truncate(limit);
    let next_page = items.last().filter(|_| is_more).map(|last| format!("{}.{}", last.from, last.to));
    Page { items, next_page }
}

fn failure(error: &FlowsError) -> Failure {
    let code = match error {
        // Not worth trying again at once, as far as this controller knows.
        FlowsError::NotThere | FlowsError::Refused(_) => Code::WrongState,
        FlowsError::Deadline => Code::HostUnavailable,
        FlowsError::TooMany => Code::TooManyRequests,
    };
    Failure::new(code, error.to_string())
}

/// The flows that the switch of a port's host holds for it, with what passed by each: asked of the host's agent now, which may take
/// up to five seconds.
#[utoipa::path(get, path = "/v1/ports/{port}/flows", tag = "networks", responses((status = 200, body = PortFlows)))]
pub async fn flows(State(api): State<Api>, asker: Asker, Path(port): Path<String>) -> Result<Reply, Failure> {
    let port = asker.find::<Port>(&api.parts, &Ref::from(port)).await?;
    let Some(host) = port.host else {
        return Err(Failure::new(Code::WrongState, "the port's guest runs nowhere: no switch holds flows for it"));
    };
    let too_many = || failure(&FlowsError::TooMany);
    let _share = api.flows.take(&asker.caller()?.token, FLOWS_OF_ONE).ok_or_else(too_many)?;
    let record = api.parts.state.need::<HostRecord>(&host).await?;
    let asked_at_ms = unix_ms();
    let of = FlowsOf { port: port.id, network: port.network };
    let told = api.parts.flows.ask(host, of).await.map_err(|error| failure(&error))?;
    Reply::ok(&PortFlows {
        port: port.id,
        network: port.network,
        host,
        host_name: record.host.name.clone(),
        asked_at_ms,
        traffic: told.traffic,
        flows: told.flows,
        left_out: told.left_out,
    })
}

#[cfg(test)]
mod tests {
    use supercloud_api::{LinkState, ids::CloudId};

    use super::*;

    fn link(from: HostId, to: HostId) -> Link {
        let (name, cloud): (supercloud_api::Name, _) = ("x".parse().unwrap(), CloudId::generate());
        Link {
            from,
            from_name: name.clone(),
            from_cloud: cloud,
            from_cloud_name: name.clone(),
            to,
            to_name: name.clone(),
            to_cloud: cloud,
            to_cloud_name: name,
            state: LinkState::NotMeasured,
            why: None,
            rtt_us: None,
            rtt_least_us: None,
            loss: None,
            probes: 0,
            answered: 0,
            sent: 0,
            resent: 0,
            answered_at_ms: None,
            told_at_ms: None,
        }
    }

    #[test]
    fn pages_hold_every_link_once_and_those_of_one_host_alone() {
        let mut hosts: Vec<HostId> = (0..4).map(|_| HostId::generate()).collect();
        hosts.sort_unstable();
        let all = || {
            let pairs = hosts.iter().flat_map(|from| hosts.iter().map(move |to| (*from, *to)));
            pairs.filter(|(from, to)| from != to).map(|(from, to)| link(from, to)).collect::<Vec<_>>()
        };
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            let found = page(all(), None, after, 5);
            assert!(found.items.len() <= 5);
            seen.extend(found.items);
            let Some(next) = found.next_page else { break };
            after = Some(next.parse().unwrap());
        }
        let pairs = |links: &[Link]| links.iter().map(|link| (link.from, link.to)).collect::<Vec<_>>();
        assert_eq!(pairs(&seen), pairs(&all()));
        let own = page(all(), Some(hosts[1]), None, 100).items;
        assert_eq!(own.len(), 6);
        assert!(own.iter().all(|link| link.from == hosts[1] || link.to == hosts[1]));
        assert!("x".parse::<After>().is_err());
    }
}
