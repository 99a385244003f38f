//! Ways between hosts, and the flows of ports.

use axum::extract::{Path, State};
use supercloud_api::{Code, Link, Page, Port, PortFlows, Ref, ids::HostId, link::FlowsOf};

use super::{Api, Asker, Failure, Reply};
use crate::{
    flows::FlowsError,
    paths::{self, Which},
    state::HostRecord,
};

/// Questions for flows that one token may have open at once.
const FLOWS_OF_ONE: usize = 4;

/// Where a page of links goes on: behind this one.
#[derive(Debug, Clone, Copy)]
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
    let which = Which { only, after: after.map(|After(from, to)| (from, to)), limit };
    let (items, is_more) = paths::links(&api.parts, which).await?;
    let next_page = items.last().filter(|_| is_more).map(|last| format!("{}.{}", last.from, last.to));
    Reply::ok(&Page { items, next_page })
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
/// up to five seconds, or less than a second ago.
#[utoipa::path(get, path = "/v1/ports/{port}/flows", tag = "networks", responses((status = 200, body = PortFlows)))]
pub async fn flows(State(api): State<Api>, asker: Asker, Path(port): Path<String>) -> Result<Reply, Failure> {
    let port = asker.find::<Port>(&api.parts, &Ref::from(port)).await?;
    let Some(host) = port.host else {
        return Err(Failure::new(Code::WrongState, "the port's guest runs nowhere: no switch holds flows for it"));
    };
    let too_many = || failure(&FlowsError::TooMany);
    let _share = api.flows.take(&asker.caller()?.token, FLOWS_OF_ONE).ok_or_else(too_many)?;
    let record = api.parts.state.need::<HostRecord>(&host).await?;
    let of = FlowsOf { port: port.id, network: port.network };
    let (asked_at_ms, told) = api.parts.flows.look(host, of).await.map_err(|error| failure(&error))?;
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
    use super::*;

    #[test]
    fn a_page_begins_behind_a_link_and_nothing_else() {
        let (from, to) = (HostId::generate(), HostId::generate());
        let After(a, b) = format!("{from}.{to}").parse().unwrap();
        assert_eq!((a, b), (from, to));
        for bad in ["x", "", ".", &from.to_string(), &format!("{from}.{to}.{to}")] {
            assert!(bad.parse::<After>().is_err(), "{bad:?}");
        }
    }
}
