//! Making a guest: its records, names, address and (unless it shall not start) the operation that starts it, in one
//! transaction.

use std::{collections::BTreeSet, net::Ipv4Addr};

use axum::{body::Bytes, extract::State, http::HeaderMap};
use supercloud_api::{
    Code, Durability, Guest, GuestCreate, GuestState, Image, ImagePart, ImageState, Network, Operation, OperationKind,
    Phase, PhaseTime, Port, Ref, Volume,
    handover::{self, BeginRequest, OwnerRecord},
    ids::{CloudId, Epoch, GuestId, OperationId, PortId, VolumeId},
    unix_ms,
};
use supercloud_sdn::addr::{Ipv4Prefix, MacAddr};

use super::{
    Api, Asker, Failure, Reply, body,
    guest_plan::{self, Picture, Route},
    histories,
};
use crate::{
    placement::Need,
    state::{Change, EventDraft, GuestRecord, GuestSeed, Named as _, Stored, Work, keys, retry_conflicts},
};

const MAX_USER_DATA_BYTES: usize = 64 << 10;
const MAX_CMDLINE_BYTES: usize = 1024;
/// Volumes are whole MiB: a round number for every back end.
const VOLUME_UNIT_BYTES: u64 = 1 << 20;

fn check(wanted: &GuestCreate) -> Result<(), Failure> {
    wanted.shape.check().map_err(Failure::bad)?;
    if let Some(data) = wanted.user_data.as_ref().filter(|data| data.len() > MAX_USER_DATA_BYTES) {
        return Err(Failure::bad(format!("user_data has {} bytes; at most {MAX_USER_DATA_BYTES}", data.len())));
    }
    if let Some(text) = &wanted.cmdline_extra {
        if text.len() > MAX_CMDLINE_BYTES {
            return Err(Failure::bad(format!("cmdline_extra has {} bytes; at most {MAX_CMDLINE_BYTES}", text.len())));
        }
        if text.chars().any(char::is_control) {
            return Err(Failure::bad("cmdline_extra has control characters"));
        }
    }
    if let Some(bytes) = wanted.disk_bytes.filter(|bytes| *bytes > supercloud_storage::MAX_VOLUME_BYTES) {
        return Err(Failure::bad(format!(
            "disk_bytes is {bytes}; at most {} are possible",
            supercloud_storage::MAX_VOLUME_BYTES
        )));
    }
    Ok(())
}

/// The volume's size: what was asked for, at least that of the image, whole MiB.
fn volume_size(wanted: Option<u64>, image_bytes: u64) -> u64 {
    let bytes = wanted.unwrap_or(0).max(image_bytes).max(1);
    bytes.div_ceil(VOLUME_UNIT_BYTES).saturating_mul(VOLUME_UNIT_BYTES).min(supercloud_storage::MAX_VOLUME_BYTES)
}

/// The address asked for, if the network can give it; else the first free one.
fn choose_address(
    network: &Network,
    wanted: Option<Ipv4Addr>,
    taken: &BTreeSet<Ipv4Addr>,
) -> Result<Ipv4Addr, Failure> {
    let prefix: Ipv4Prefix = network
        .cidr
        .parse()
        .map_err(|_| Failure::new(Code::Internal, format!("the network {} has no readable prefix", network.id)))?;
    let (first, last) = (u32::from(prefix.network()) + 1, u32::from(prefix.last()) - 1);
    if let Some(ip) = wanted {
        if !(first..=last).contains(&u32::from(ip)) || ip == network.gateway {
            return Err(Failure::bad(format!(
                "ipv4 is {ip}; it must be an address of {} other than the gateway {}",
                network.cidr, network.gateway
            )));
        }
        if taken.contains(&ip) {
            return Err(Failure::new(
                Code::WrongState,
                format!("the address {ip} is taken in network {}", network.name),
            ));
        }
        return Ok(ip);
    }
    let free = (first..=last).map(Ipv4Addr::from).find(|ip| *ip != network.gateway && !taken.contains(ip));
    free.ok_or_else(|| {
        Failure::new(Code::QuotaExceeded, format!("network {} ({}) has no free address", network.name, network.cidr))
    })
}

/// A locally administered address made of the port's id: the claim on it makes sure that no two ports have the same.
fn mac_of(port: PortId) -> MacAddr {
    let hash = blake3::hash(port.uuid().as_bytes());
    let bytes = hash.as_bytes();
    MacAddr([0x02, bytes[0], bytes[1], bytes[2], bytes[3], bytes[4]])
}

struct Made {
    guest: GuestRecord,
    seed: GuestSeed,
    volume: Volume,
    port: Port,
}

/// What a guest's disk starts from.
struct Base {
    /// Root of its content.
    root: String,
    /// The size of the disk.
    size_bytes: u64,
    /// The cloud in whose store it lies, when it is not the image's.
    cloud: Option<CloudId>,
}

fn make(wanted: &GuestCreate, image: &Image, network: &Network, ip: Ipv4Addr, base: Base) -> Made {
    let (guest, volume, port) = (GuestId::generate(), VolumeId::generate(), PortId::generate());
    let created_at_ms = unix_ms();
    let project = image.project;
    Made {
        guest: GuestRecord {
            guest: Guest {
                id: guest,
                project,
                name: wanted.name.clone(),
                state: GuestState::Created,
                alarm: None,
                shape: wanted.shape,
                image: image.id,
                host: None,
                host_name: None,
                cloud: None,
                cloud_name: None,
                epoch: Epoch::ZERO,
                compat_class: None,
                cpu: wanted.cpu,
                volumes: vec![volume],
                ports: vec![port],
                ipv4: Some(ip),
                operation: None,
                freeze: None,
                follow_prices: wanted.follow_prices,
                on_loss: wanted.on_loss,
                kept_mirror: None,
                base_missing_bytes: None,
                starts: 0,
                created_at_ms,
            },
            owner: OwnerRecord::new(guest),
            discarding: std::collections::BTreeSet::new(),
            put_aside: None,
            stays: Vec::new(),
        },
        seed: GuestSeed { guest, user_data: wanted.user_data.clone(), cmdline_extra: wanted.cmdline_extra.clone() },
        volume: Volume {
            id: volume,
            project,
            name: wanted.name.clone(),
            size_bytes: base.size_bytes,
            base: Some(base.root),
            image: Some(image.id),
            guest: Some(guest),
            epoch: Epoch::ZERO,
            host: None,
            needed_source: None,
            base_cloud: base.cloud,
            map_root: None,
            map_version: 0,
            durability: Durability::Host,
            propagation: wanted.propagation,
            created_at_ms,
        },
        port: Port {
            id: port,
            network: network.id,
            project,
            guest,
            mac: mac_of(port).to_string(),
            ipv4: ip,
            host: None,
            epoch: Epoch::ZERO,
            prepared_at: None,
            moved_from: None,
        },
    }
}

/// The image's disk, if the image can be used.
fn usable_disk(image: &Image) -> Result<(&str, u64), Failure> {
    let disk = image.parts.iter().find(|part| part.part == ImagePart::Disk);
    match (image.state, disk) {
        (ImageState::Ready, Some(disk)) => Ok((&disk.root, disk.size_bytes)),
        _ => Err(Failure::new(Code::WrongState, format!("image {} is not ready; import its parts first", image.name))),
    }
}

/// Makes a guest and starts it.
#[utoipa::path(post, path = "/v1/guests", tag = "guests", request_body = GuestCreate, responses((status = 202, body = Operation), (status = 200, description = "Dry run", body = Operation)))]
pub async fn create(State(api): State<Api>, asker: Asker, headers: HeaderMap, bytes: Bytes) -> Result<Reply, Failure> {
    let wanted: GuestCreate = body(&headers, &bytes)?;
    check(&wanted)?;
    let project = asker.project(&api.parts, wanted.project.as_ref()).await?;
    // One at a time: they all pass the same guard, and would make each other decide anew.
    let _turn = api.placing.lock().await;
    retry_conflicts(|| attempt(&api, &asker, &wanted, project.project.id, project.project.quota)).await
}

async fn attempt(
    api: &Api,
    asker: &Asker,
    wanted: &GuestCreate,
    project: supercloud_api::ids::ProjectId,
    quota: supercloud_api::Quota,
) -> Result<Reply, Failure> {
    let state = &api.parts.state;
    let picture = Picture::take(&api.parts).await?;
    let image: Stored<Image> = in_project(api, asker, project, &wanted.image).await?;
    let network: Stored<Network> = in_project(api, asker, project, &wanted.network).await?;
    let (image_root, image_bytes) = usable_disk(&image)?;
    let past = match &wanted.disk_from {
        None => None,
        Some(from) => {
            let volume: Stored<Volume> = in_project(api, asker, project, &from.volume).await?;
            let (history, meant) = histories::meant(api, &volume, from).await?;
            Some((volume, history, meant))
        }
    };
    for taken in [
        state.find::<GuestRecord>(Some(project), &Ref::from(wanted.name.as_str())).await?.is_some(),
        state.find::<Volume>(Some(project), &Ref::from(wanted.name.as_str())).await?.is_some(),
    ] {
        if taken {
            return Err(Failure::name_taken(GuestRecord::NOUN, &wanted.name));
        }
    }
    let least_bytes = past.as_ref().map_or(image_bytes, |(volume, ..)| volume.size_bytes);
    let size_bytes = volume_size(wanted.disk_bytes, least_bytes);
    let base = match &past {
        None => Base { root: image_root.to_owned(), size_bytes, cloud: None },
        Some((_, _, meant)) => Base { root: meant.point.root.clone(), size_bytes, cloud: Some(meant.point.cloud) },
    };
    let reason = past.as_ref().map(|(volume, _, meant)| {
        let (point, name) = (&meant.point, &volume.name);
        format!("disk: point {} of volume {name}, {} ms before the instant asked for", point.number, meant.older_ms)
    });
    let running = wanted.start.then_some(wanted.shape);
    let place = guest_plan::resolve_place(&api.parts, wanted.place.as_ref()).await?;
    let nobody = BTreeSet::new();
    let ip = choose_address(&network, wanted.ipv4, picture.addresses(network.id).unwrap_or(&nobody))?;
    let made = make(wanted, &image, &network, ip, base);
    let need = Need { shape: wanted.shape, disk_bytes: size_bytes, class: None, not_at: None };
    let id = OperationId::generate();
    let quota_check = picture.check_quota(project, quota, 1, running, size_bytes);
    let chosen = wanted.start.then(|| picture.choose_first(&need, &place, wanted.cpu));
    if asker.params.dry_run {
        let plan = match (quota_check, chosen) {
            (Err(failure), _) => guest_plan::failed_plan(&failure.problem()),
            (Ok(()), Some(Err(problem))) => guest_plan::failed_plan(&problem),
            (Ok(()), Some(Ok((host, checks, _)))) => guest_plan::plan_for(host, checks),
            (Ok(()), None) => supercloud_api::Plan {
                destination: None,
                destination_name: None,
                checks: Vec::new(),
                predicted_bytes: None,
                predicted_ms: None,
                predicted_downtime_ms: None,
                predicted_from: None,
            },
        };
        let route = Route { destination: plan.destination, plan: Some(plan), reason, ..Route::default() };
        return Reply::ok(&guest_plan::new_operation(asker, id, OperationKind::GuestStart, &made.guest.guest, route));
    }
    quota_check?;
    let mut change = Change::new();
    let mut guest = made.guest;
    let operation = match chosen.transpose()? {
        Some((host, checks, class)) => {
            guest.guest.compat_class = class;
            let kind = handover::OperationKind::Start { to: host.id };
            guest_plan::begin_on(&mut guest, &BeginRequest { operation: id, kind, group: None })?;
            picture.pass(&mut change, keys::room_guard(host.id));
            let plan = Some(guest_plan::plan_for(host, checks));
            let route = Route { destination: Some(host.id), plan, reason, ..Route::default() };
            let operation = guest_plan::new_operation(asker, id, OperationKind::GuestStart, &guest.guest, route);
            change.create_operation(&guest_plan::record(operation.clone(), Work::GuestStart));
            operation
        }
        None => made_only(asker, id, &guest.guest, reason, &mut change),
    };
    picture.pass(&mut change, keys::usage_guard(project));
    if let Some((_, history, _)) = &past {
        // What is thinned out meanwhile is no base any more.
        change.unchanged(history);
    }
    let disk_from = past.as_ref().map(|(volume, _, meant)| {
        serde_json::json!({ "volume": volume.name, "point": meant.point.number, "at_ms": meant.point.at_ms, "older_ms": meant.older_ms })
    });
    change
        .unchanged(&image)
        .unchanged(&network)
        .claim(keys::address(network.id, ip), made.port.id)
        .claim(keys::mac(&made.port.mac), made.port.id)
        .create(&made.port)
        .create_named(&made.volume)
        .create(&made.seed)
        .create_named(&guest)
        .event(EventDraft::new("guest.created").project(project).guest(guest.guest.id).operation(operation.id).data(
            serde_json::json!({
                "name": guest.guest.name, "image": image.id, "ipv4": ip, "mac": made.port.mac, "disk_from": disk_from,
            }),
        ));
    asker.commit(&api.parts, project, change, Reply::accepted(&operation)?).await
}

/// A guest that is not to be started: the operation is done with the transaction that makes it.
fn made_only(asker: &Asker, id: OperationId, guest: &Guest, reason: Option<String>, change: &mut Change) -> Operation {
    let route = Route { reason, ..Route::default() };
    let mut operation = guest_plan::new_operation(asker, id, OperationKind::GuestStart, guest, route);
    let at_ms = operation.created_at_ms;
    operation.phase = Phase::Done;
    operation.ended_at_ms = Some(at_ms);
    operation.phase_times.push(PhaseTime { phase: Phase::Done, at_ms });
    operation.progress.message = "made, and not started".to_owned();
    change.create(&guest_plan::record(operation.clone(), Work::GuestStart));
    operation
}

/// An image or network of the project in which the guest is made.
async fn in_project<T: crate::state::Named>(
    api: &Api,
    asker: &Asker,
    project: supercloud_api::ids::ProjectId,
    reference: &Ref,
) -> Result<Stored<T>, Failure> {
    let found = api.parts.state.find::<T>(Some(project), reference).await?;
    let visible = found.filter(|found| {
        found.value.project() == Some(project)
            && asker.caller.as_ref().is_some_and(|caller| caller.sees_project(Some(project)))
    });
    visible.ok_or_else(|| Failure::not_found(T::NOUN, reference.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use supercloud_api::ids::{NetworkId, ProjectId};

    fn network(cidr: &str, gateway: &str) -> Network {
        Network {
            id: NetworkId::generate(),
            project: ProjectId::generate(),
            name: "n".parse().unwrap(),
            cidr: cidr.into(),
            gateway: gateway.parse().unwrap(),
            dns: vec![],
            vni: 1,
            mtu: 1450,
            created_at_ms: 0,
        }
    }

    #[test]
    fn addresses_are_given_in_order_until_none_is_left() {
        let network = network("10.0.0.0/29", "10.0.0.1");
        let mut taken = BTreeSet::new();
        for expected in 2..=6 {
            let ip = choose_address(&network, None, &taken).unwrap();
            assert_eq!(ip, Ipv4Addr::new(10, 0, 0, expected));
            taken.insert(ip);
        }
        let problem = choose_address(&network, None, &taken).unwrap_err().problem();
        assert_eq!(problem.code, Code::QuotaExceeded);
    }

    #[test]
    fn an_address_that_cannot_be_had_is_refused() {
        let network = network("10.0.0.0/29", "10.0.0.1");
        let taken = BTreeSet::from([Ipv4Addr::new(10, 0, 0, 3)]);
        for bad in ["10.0.0.0", "10.0.0.7", "10.0.0.1", "10.0.0.8", "192.168.0.2", "10.0.0.3"] {
            assert!(choose_address(&network, Some(bad.parse().unwrap()), &taken).is_err(), "{bad}");
        }
        assert!(choose_address(&network, Some("10.0.0.6".parse().unwrap()), &taken).is_ok());
    }

    #[test]
    fn sizes_are_whole_mebibytes_of_at_least_the_image() {
        assert_eq!(volume_size(None, 1), 1 << 20);
        assert_eq!(volume_size(Some(5), 3 << 20), 3 << 20);
        assert_eq!(volume_size(Some((3 << 20) + 1), 0), 4 << 20);
        assert_eq!(volume_size(Some(u64::MAX), 0), supercloud_storage::MAX_VOLUME_BYTES);
    }

    #[test]
    fn hardware_addresses_are_local_unicast() {
        for _ in 0..100 {
            let mac = mac_of(PortId::generate());
            assert!(mac.is_station() && mac.0[0] == 2);
        }
    }
}
