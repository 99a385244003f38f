//! Where the bytes of images and volumes lie, from the records and from what agents tell: nothing is guessed, and no store is read.

use std::collections::{BTreeMap, HashSet};

use supercloud_api::{
    Cloud, Freeze, Host, Image, ImagePart, ImageState, Site, SiteHolds, SiteKind, Volume, VolumeHistory,
    handover::{OperationKind, Owner},
    ids::{CloudId, HostId},
};

use crate::{
    app::Parts,
    state::{GuestRecord, HostRecord, LiveHosts, OperationRecord, StateError},
};

/// The names, and where hosts stand.
struct Places {
    hosts: BTreeMap<HostId, Host>,
    clouds: BTreeMap<CloudId, String>,
}

impl Places {
    async fn read(parts: &Parts) -> Result<Self, StateError> {
        let hosts = parts.state.list::<HostRecord>().await?;
        let clouds = parts.state.list::<Cloud>().await?;
        Ok(Self {
            hosts: hosts.iter().map(|record| (record.host.id, record.host.clone())).collect(),
            clouds: clouds.iter().map(|cloud| (cloud.id, cloud.name.to_string())).collect(),
        })
    }

    fn cloud_of(&self, host: HostId) -> Option<CloudId> {
        self.hosts.get(&host).map(|host| host.cloud)
    }

    fn at_host(&self, kind: SiteKind, holds: SiteHolds, host: HostId, detail: impl Into<String>) -> Site {
        let found = self.hosts.get(&host);
        Site {
            kind,
            holds,
            host: Some(host),
            cloud: found.map(|found| found.cloud),
            name: found.map_or_else(|| host.to_string(), |found| found.name.to_string()),
            bytes: None,
            missing_bytes: None,
            detail: detail.into(),
        }
    }

    fn in_store(&self, kind: SiteKind, holds: SiteHolds, cloud: Option<CloudId>, detail: impl Into<String>) -> Site {
        let named = |cloud: CloudId| self.clouds.get(&cloud).cloned().unwrap_or_else(|| cloud.to_string());
        Site {
            kind,
            holds,
            host: None,
            cloud,
            name: cloud.map_or_else(|| "controller".to_owned(), named),
            bytes: None,
            missing_bytes: None,
            detail: detail.into(),
        }
    }

    /// What a cloud has of what volumes of it stand on, told by their hosts; none where nobody has told.
    fn told(&self, kind: SiteKind, cloud: CloudId, missing_bytes: Option<u64>, detail: impl Into<String>) -> Site {
        let holds = match missing_bytes {
            Some(0) => SiteHolds::Whole,
            Some(_) => SiteHolds::Part,
            None => SiteHolds::NotKnown,
        };
        Site { missing_bytes, ..self.in_store(kind, holds, Some(cloud), detail) }
    }
}

/// The host that runs a guest, and what its cloud lacks of what the guest's volumes stand on.
fn running(guest: &GuestRecord, live: &LiveHosts) -> Option<(HostId, Option<u64>)> {
    let Owner::Host(host) = guest.owner.owner else { return None };
    Some((host, live.base_missing_bytes(host, guest.guest.id, guest.owner.epoch)))
}

/// Where an image lies: the controller's store, and the stores of clouds in which guests run from it.
///
/// # Errors
/// When the records cannot be read.
pub async fn of_image(parts: &Parts, image: &Image) -> Result<Vec<Site>, StateError> {
    let places = Places::read(parts).await?;
    let mut sites = Vec::new();
    if image.state == ImageState::Ready {
        let bytes = image.parts.iter().fold(0_u64, |sum, part| sum.saturating_add(part.stored_bytes));
        let own = places.in_store(SiteKind::Image, SiteHolds::Whole, None, "where it was imported");
        sites.push(Site { bytes: Some(bytes), ..own });
    }
    let disk = image.parts.iter().find(|part| part.part == ImagePart::Disk).map(|part| part.root.as_str());
    let volumes = parts.state.list::<Volume>().await?;
    let from_it = |volume: &Volume| volume.image == Some(image.id) && disk.is_some() && volume.base.as_deref() == disk;
    let users: HashSet<_> = volumes.iter().filter(|volume| from_it(volume)).filter_map(|volume| volume.guest).collect();
    // By cloud: how many guests run from it there, and the least that any of their hosts says is missing.
    let mut clouds: BTreeMap<CloudId, (u32, Option<u64>)> = BTreeMap::new();
    for guest in parts.state.list::<GuestRecord>().await?.iter().filter(|guest| users.contains(&guest.guest.id)) {
        let Some((host, missing)) = running(guest, &parts.hosts) else { continue };
        let Some(cloud) = places.cloud_of(host) else { continue };
        let (count, least) = clouds.entry(cloud).or_default();
        *count += 1;
        *least = (*least).into_iter().chain(missing).min();
    }
    for (cloud, (count, missing)) in clouds {
        let guests = if count == 1 { "1 guest runs".to_owned() } else { format!("{count} guests run") };
        sites.push(places.told(SiteKind::Image, cloud, missing, format!("{guests} from it there")));
    }
    Ok(sites)
}

/// Where a volume lies: hosts that have blocks of it, and stores that have what it stands on and what was kept of it.
///
/// # Errors
/// When the records cannot be read.
pub async fn of_volume(parts: &Parts, volume: &Volume) -> Result<Vec<Site>, StateError> {
    let places = Places::read(parts).await?;
    let guest = match volume.guest {
        Some(guest) => parts.state.read::<GuestRecord>(&guest).await?,
        None => None,
    };
    let history = parts.state.read::<VolumeHistory>(&volume.id).await?;
    // Of one that is being thawed, too: until nothing of its memory is missing it is needed.
    let thawing = guest.as_ref().and_then(|guest| guest.owner.operation.as_ref()).and_then(|op| match op.kind {
        OperationKind::Thaw { freeze, .. } => Some(freeze),
        _ => None,
    });
    let freeze = match guest.as_ref().map(|guest| guest.owner.owner) {
        Some(Owner::Frozen(freeze)) => parts.state.read::<Freeze>(&freeze).await?,
        _ => match thawing {
            Some(freeze) => parts.state.read::<Freeze>(&freeze).await?.filter(|freeze| !freeze.is_consumed),
            None => None,
        },
    };
    let mirror = match guest.as_ref().and_then(|guest| guest.guest.operation) {
        Some(operation) => parts.state.read::<OperationRecord>(&operation).await?,
        None => None,
    };
    let mirror = mirror.and_then(|record| record.value.operation.progress.mirror);
    let (guest, history) = (guest.as_deref(), history.as_deref());
    let mut sites = on_hosts(&places, volume, guest, mirror.is_some_and(|standing| standing.committed > 0));
    sites.extend(in_stores(&places, volume, guest.and_then(|guest| running(guest, &parts.hosts))));
    if let Some(freeze) = freeze {
        let detail = match thawing {
            Some(_) => format!("freeze {}, needed until the guest's memory is there", freeze.id),
            None => format!("freeze {}", freeze.id),
        };
        sites.push(places.in_store(SiteKind::Freeze, SiteHolds::Whole, Some(freeze.cloud), detail));
    }
    sites.extend(history.into_iter().flat_map(|history| points(&places, history)));
    Ok(sites)
}

/// `is_mirror_whole`: the guest's mirror has committed a cut, so that its standby has all.
fn on_hosts(places: &Places, volume: &Volume, guest: Option<&GuestRecord>, is_mirror_whole: bool) -> Vec<Site> {
    let mut sites = Vec::new();
    if let Some(host) = volume.host {
        let (holds, detail) = match volume.needed_source {
            None => (SiteHolds::Whole, "all blocks that were written".to_owned()),
            Some(_) => (SiteHolds::Part, "the rest of the blocks still comes".to_owned()),
        };
        sites.push(places.at_host(SiteKind::Newest, holds, host, detail));
    }
    let Some(guest) = guest else { return sites };
    let standby = guest.owner.operation.as_ref().filter(|operation| operation.is_mirrored());
    if let Some(host) = standby.and_then(|operation| operation.kind.destination()) {
        let (holds, detail) = match is_mirror_whole {
            true => (SiteHolds::Whole, "takes over when the guest's host dies"),
            false => (SiteHolds::Part, "has no whole copy yet: it cannot take over"),
        };
        sites.push(places.at_host(SiteKind::Standby, holds, host, detail));
    }
    for holder in guest.owner.holders.iter().filter(|holder| Some(holder.host) != volume.host && !holder.lost) {
        let detail = match holder.needed {
            true => format!("sealed at epoch {}, still needed", holder.epoch),
            false => format!("sealed at epoch {}, being released", holder.epoch),
        };
        sites.push(places.at_host(SiteKind::OlderBlocks, SiteHolds::Part, holder.host, detail));
    }
    sites
}

fn in_stores(places: &Places, volume: &Volume, running: Option<(HostId, Option<u64>)>) -> Vec<Site> {
    if volume.base.is_none() {
        return Vec::new();
    }
    let mut sites = Vec::new();
    let own = running.and_then(|(host, missing)| Some((places.cloud_of(host)?, missing)));
    if let Some((cloud, missing)) = own {
        sites.push(places.told(SiteKind::Base, cloud, missing, "what it stands on, as its host tells"));
    }
    match volume.base_cloud {
        Some(cloud) if own.is_none_or(|(own, _)| own != cloud) => {
            let detail = "what it was thawed or cloned from";
            sites.push(places.in_store(SiteKind::Base, SiteHolds::Whole, Some(cloud), detail));
        }
        Some(_) => {}
        None => {
            sites.push(places.in_store(SiteKind::Base, SiteHolds::Whole, None, "its image, where it was imported"));
        }
    }
    sites
}

fn points(places: &Places, history: &VolumeHistory) -> Vec<Site> {
    let mut clouds: BTreeMap<CloudId, (usize, u64)> = BTreeMap::new();
    for point in &history.points {
        let (count, bytes) = clouds.entry(point.cloud).or_default();
        *count += 1;
        *bytes = bytes.saturating_add(point.stored_bytes);
    }
    let site = |(cloud, (count, bytes)): (CloudId, (usize, u64))| {
        let detail =
            if count == 1 { "1 point of its history".to_owned() } else { format!("{count} points of its history") };
        Site { bytes: Some(bytes), ..places.in_store(SiteKind::Points, SiteHolds::Whole, Some(cloud), detail) }
    };
    clouds.into_iter().map(site).collect()
}
