//! Where a guest would go, and what every host says to it.

use std::collections::HashMap;

use axum::extract::{Path, State};
use supercloud_api::{Host, Placement, PlacementHost, PlacementScore, Ref, ids::HostId};
use supercloud_scheduler::{cluster::Score, placement::Refusal};

use super::{
    Api, Asker, Failure, Reply,
    guest_plan::{self, Picture},
};
use crate::{cpus, placement::Need, state::RentingRecord};

/// What [`crate::placement::choose`] goes by.
const OBJECTIVE: &str = "most free memory, then the name that sorts first";

/// Where a guest would be placed now; with `explain`, also why not elsewhere. A guest that runs is asked as for a move.
#[utoipa::path(get, path = "/v1/guests/{guest}/placement", tag = "guests", responses((status = 200, body = Placement)))]
pub async fn read(State(api): State<Api>, asker: Asker, Path(guest): Path<String>) -> Result<Reply, Failure> {
    let is_explained = asker.params.explain()?;
    let picture = Picture::take(&api.parts).await?;
    let found = asker.find_guest(&api.parts, &Ref::from(guest)).await?;
    let place = asker.params.place.clone().map(Ref::from);
    let place = guest_plan::resolve_place(&api.parts, place.as_ref()).await?;
    let guest = &found.guest;
    let need = Need {
        shape: guest.shape,
        disk_bytes: picture.disk_of(guest.id),
        class: guest.compat_class.clone(),
        not_at: guest.host,
    };
    let verdicts = picture.explain(&need, &place);
    let destination = verdicts.first().filter(|(_, verdict)| verdict.is_ok()).map(|(host, _)| *host);
    let hosts =
        if is_explained { (1u32..).zip(&verdicts).map(|(rank, one)| told(rank, one)).collect() } else { Vec::new() };
    let seen_from = guest.host.and_then(|host| picture.host(host)).or(destination).filter(|_| is_explained);
    let cpus = match seen_from {
        None => Vec::new(),
        Some(host) => {
            let rentings = api.parts.state.list::<RentingRecord>().await?;
            let types: HashMap<HostId, String> =
                rentings.into_iter().map(|one| (one.value.renting.host, one.value.renting.instance_type)).collect();
            let markets = api.parts.markets.board().markets();
            cpus::options(guest.cpu, host, &picture.hosts, &markets, |host| types.get(&host.id).cloned())
        }
    };
    Reply::ok(&Placement {
        guest: guest.id,
        host: guest.host,
        host_name: guest.host_name.clone(),
        destination: destination.map(|host| host.id),
        destination_name: destination.map(|host| host.name.clone()),
        objective: OBJECTIVE.to_owned(),
        hosts,
        cpus,
    })
}

fn told(rank: u32, (host, verdict): &(&Host, Result<Score, Refusal>)) -> PlacementHost {
    let (refusal, detail, score) = match verdict {
        Ok(score) => {
            // Spreading scores what is not free.
            let free_memory_bytes = u64::MAX - score.load;
            let cost_nanousd_per_hour = score.cost_nanousd_per_hour;
            let detail = format!("takes it; {} MiB of memory are free", free_memory_bytes >> 20);
            (None, detail, Some(PlacementScore { rank, cost_nanousd_per_hour, free_memory_bytes }))
        }
        Err(Refusal::Excluded) => (Some("excluded".to_owned()), "has the guest already".to_owned(), None),
        Err(refusal) => (Some(code(refusal)), refusal.to_string(), None),
    };
    PlacementHost {
        host: host.id,
        host_name: host.name.clone(),
        cloud_name: host.cloud_name.clone(),
        is_ok: verdict.is_ok(),
        refusal,
        detail,
        score,
    }
}

/// A refusal's name for programs.
fn code(refusal: &Refusal) -> String {
    let name = match refusal {
        Refusal::NotAskedFor => "not_asked_for",
        Refusal::Excluded => "excluded",
        Refusal::Down => "down",
        Refusal::Cordoned => "cordoned",
        Refusal::Class(_) => "class",
        Refusal::Vcpus { .. } => "vcpus",
        Refusal::Memory { .. } => "memory",
        Refusal::Disk { .. } => "disk",
        Refusal::NotAllowed(_) => "not_allowed",
        Refusal::Denied(_) => "denied",
        Refusal::Project => "project",
        Refusal::Latency { .. } => "latency",
        Refusal::Crowded { .. } => "crowded",
        Refusal::Elsewhere(_) => "elsewhere",
        Refusal::Quota => "quota",
    };
    name.to_owned()
}
