//! The tables of listings: what everybody wants to see, and what `-o wide` shows besides.

use serde::Serialize;
use supercloud_api::{
    Cloud, Evacuation, EvacuationState, Event, Group, Guest, Host, HostNotice, HostNoticeKind, HostState, Image,
    ImageContent, Market, Network, Operation, Project, Site, SiteHolds, Tenure, Token, Volume,
};
use supercloud_cli::{
    fields::Names,
    progress::phase_name,
    table::{Table, bytes, duration, time, usd},
};

use crate::names::Rented;

/// A unit enum as the API writes it.
pub fn word<T: Serialize>(value: T) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

/// The name of what an id refers to; the id where it is not known.
fn named(names: &Names, id: &impl ToString) -> String {
    let id = id.to_string();
    names.get(&id).cloned().unwrap_or(id)
}

fn or_dash(text: Option<impl ToString>) -> String {
    text.map_or_else(|| "-".into(), |text| text.to_string())
}

fn yes_or_no(is: bool) -> String {
    if is { "yes" } else { "no" }.into()
}

/// Hosts, with what they cost now and whether their guests could leave in time.
pub fn hosts(hosts: &[Host], rented: &Rented, evacuations: &[Evacuation]) -> Table {
    let columns = ["NAME", "CLOUD", "STATE", "VCPUS", "MEMORY", "CLASS", "PRICE/H", "RISK", "SEEN"];
    let mut table = Table::new(columns).and_wide([
        "ID",
        "TYPE",
        "TENURE",
        "DISK",
        "DATA ADDRESS",
        "OVERLAY",
        "ENCRYPTED",
        "AGENT",
        "SINCE",
    ]);
    for host in hosts {
        let (renting, market) = rented.get(&host.id).map_or((None, None), |(r, m)| (Some(r), m.as_ref()));
        let cells = [
            host.name.to_string(),
            host.cloud_name.to_string(),
            word(host.state),
            format!("{}/{}", host.used.vcpus, host.capacity.vcpus),
            format!("{} / {}", bytes(host.used.memory_bytes), bytes(host.capacity.memory_bytes)),
            or_dash(host.compat_classes.first()),
            or_dash(market.map(|market| usd(market.price_nanousd_per_hour))),
            risk(renting.map(|renting| renting.tenure), host, evacuations),
            time(host.last_seen_ms),
        ];
        let wide = [
            host.id.to_string(),
            or_dash(renting.map(|renting| &renting.instance_type)),
            or_dash(renting.map(|renting| word(renting.tenure))),
            format!("{} / {}", bytes(host.used.disk_bytes), bytes(host.capacity.disk_bytes)),
            or_dash(host.data_address),
            or_dash(host.overlay_address),
            or_dash(host.overlay_encryption.as_ref().map(|_| "wireguard")),
            host.agent_version.clone(),
            time(host.created_at_ms),
        ];
        table.row_wide(cells, wide);
    }
    table
}

/// What its provider has announced for a host, or what may happen to its guests when it is taken back; `-` where nobody does that.
fn risk(tenure: Option<Tenure>, host: &Host, evacuations: &[Evacuation]) -> String {
    match host.notice.filter(|_| host.state != HostState::Removed) {
        Some(HostNotice { kind: HostNoticeKind::Interruption, at_ms: Some(at_ms), .. }) => {
            return format!("IS TAKEN BACK at {}", time(at_ms));
        }
        Some(HostNotice { kind: HostNoticeKind::Interruption, .. }) => return "IS TAKEN BACK soon".to_owned(),
        Some(HostNotice { kind: HostNoticeKind::Rebalance, .. }) => return "may be taken back soon".to_owned(),
        None => {}
    }
    let own: Vec<EvacuationState> = evacuations.iter().filter(|one| one.host == host.id).map(|one| one.state).collect();
    let count = |state| own.iter().filter(|own| **own == state).count();
    match (count(EvacuationState::Late), count(EvacuationState::Unknown)) {
        (0, 0) if own.is_empty() && tenure != Some(Tenure::Spot) => "-".to_owned(),
        (0, 0) => "taken back: all leave in time".to_owned(),
        (0, unknown) => format!("taken back: {unknown} of {} not measured", own.len()),
        (late, _) => format!("taken back: {late} of {} too late", own.len()),
    }
}

/// Guests on hosts that a provider may take back.
pub fn evacuations(evacuations: &[Evacuation], names: &Names) -> Table {
    let columns = ["GUEST", "HOST", "WOULD GO TO", "IN TIME", "NOTICE", "LEAVES IN", "WITH ALL", "PAUSE"];
    let mut table = Table::new(columns).and_wide(["WHY"]);
    for one in evacuations {
        let state = match one.state {
            EvacuationState::InTime => "yes",
            EvacuationState::Late => "NO",
            EvacuationState::Covered => "no; its standby goes on",
            EvacuationState::Unknown => "not measured",
            EvacuationState::NotNeeded => "-",
        };
        let cells = [
            named(names, &one.guest),
            one.host_name.to_string(),
            or_dash(one.destination_name.as_ref()),
            state.to_owned(),
            duration(one.notice_ms),
            or_dash(one.leave_ms.map(duration)),
            or_dash(one.leave_with_all_ms.map(duration)),
            or_dash(one.downtime_ms.map(duration)),
        ];
        table.row_wide(cells, [one.detail.clone()]);
    }
    table
}

/// Guests, with the names of where they are.
pub fn guests(guests: &[Guest], names: &Names) -> Table {
    let mut table = Table::new(["NAME", "STATE", "CLOUD", "HOST", "IPV4", "VCPUS", "MEMORY", "EPOCH", "ALARM"])
        .and_wide(["ID", "PROJECT", "IMAGE", "CLASS", "FOLLOWS PRICES", "STARTS", "OPERATION", "SINCE"]);
    for guest in guests {
        let cells = [
            guest.name.to_string(),
            word(guest.state),
            or_dash(guest.cloud_name.as_ref()),
            or_dash(guest.host_name.as_ref()),
            or_dash(guest.ipv4),
            guest.shape.vcpus.to_string(),
            bytes(guest.shape.memory_bytes),
            guest.epoch.to_string(),
            or_dash(guest.alarm.as_ref()),
        ];
        let wide = [
            guest.id.to_string(),
            named(names, &guest.project),
            named(names, &guest.image),
            or_dash(guest.compat_class.as_ref()),
            yes_or_no(guest.follow_prices),
            guest.starts.to_string(),
            or_dash(guest.operation),
            time(guest.created_at_ms),
        ];
        table.row_wide(cells, wide);
    }
    table
}

/// Clouds.
pub fn clouds(clouds: &[Cloud]) -> Table {
    let mut table = Table::new(["NAME", "PROVIDER", "SINCE"]).and_wide(["ID"]);
    for cloud in clouds {
        let cells = [cloud.name.to_string(), cloud.provider.clone(), time(cloud.created_at_ms)];
        table.row_wide(cells, [cloud.id.to_string()]);
    }
    table
}

/// Projects with their quotas.
pub fn projects(projects: &[Project]) -> Table {
    let mut table = Table::new(["NAME", "GUESTS AT MOST", "SINCE"]).and_wide([
        "ID",
        "VCPUS AT MOST",
        "MEMORY AT MOST",
        "VOLUMES AT MOST",
    ]);
    for project in projects {
        let cells = [project.name.to_string(), project.quota.guests.to_string(), time(project.created_at_ms)];
        let wide = [
            project.id.to_string(),
            project.quota.vcpus.to_string(),
            bytes(project.quota.memory_bytes),
            bytes(project.quota.volume_bytes),
        ];
        table.row_wide(cells, wide);
    }
    table
}

/// Tokens, without their secrets.
pub fn tokens(tokens: &[Token], names: &Names) -> Table {
    let mut table = Table::new(["ID", "NAME", "ROLE", "PROJECT", "EXPIRES"]).and_wide(["GUEST", "SINCE"]);
    for token in tokens {
        let cells = [
            token.id.to_string(),
            token.name.to_string(),
            word(token.role),
            token.project.map_or_else(|| "*".into(), |project| named(names, &project)),
            or_dash(token.expires_at_ms.map(time)),
        ];
        table.row_wide(
            cells,
            [or_dash(token.guest.as_ref().map(|guest| named(names, guest))), time(token.created_at_ms)],
        );
    }
    table
}

/// Images.
pub fn images(images: &[Image], names: &Names) -> Table {
    let mut table = Table::new(["NAME", "STATE", "SIZE", "STORED", "PARTS"]).and_wide(["ID", "PROJECT", "SINCE"]);
    for image in images {
        let sum = |size: fn(&ImageContent) -> u64| image.parts.iter().map(size).sum();
        let parts: Vec<String> = image.parts.iter().map(|part| word(part.part)).collect();
        let cells = [
            image.name.to_string(),
            word(image.state),
            bytes(sum(|part| part.size_bytes)),
            bytes(sum(|part| part.stored_bytes)),
            parts.join(" "),
        ];
        table.row_wide(cells, [image.id.to_string(), named(names, &image.project), time(image.created_at_ms)]);
    }
    table
}

/// Volumes.
pub fn volumes(volumes: &[Volume], names: &Names) -> Table {
    let mut table = Table::new(["NAME", "SIZE", "EPOCH", "MAP VERSION", "SOURCE NEEDED"]).and_wide([
        "ID",
        "PROJECT",
        "GUEST",
        "HOST",
        "NEEDED SOURCE",
        "PROPAGATION",
        "SINCE",
    ]);
    for volume in volumes {
        let cells = [
            volume.name.to_string(),
            bytes(volume.size_bytes),
            volume.epoch.to_string(),
            volume.map_version.to_string(),
            yes_or_no(volume.needed_source.is_some()),
        ];
        let wide = [
            volume.id.to_string(),
            named(names, &volume.project),
            or_dash(volume.guest.as_ref().map(|guest| named(names, guest))),
            or_dash(volume.host.as_ref().map(|host| named(names, host))),
            or_dash(volume.needed_source.as_ref().map(|host| named(names, host))),
            word(volume.propagation),
            time(volume.created_at_ms),
        ];
        table.row_wide(cells, wide);
    }
    table
}

/// Groups.
pub fn groups(groups: &[Group], names: &Names) -> Table {
    let mut table = Table::new(["NAME", "GUESTS", "OPERATION"]).and_wide(["ID", "PROJECT", "SINCE"]);
    for group in groups {
        let guests: Vec<String> = group.guests.iter().map(|guest| named(names, guest)).collect();
        let operation = group.operation.map(|operation| operation.to_string());
        let cells = [group.name.to_string(), guests.join(" "), or_dash(operation)];
        table.row_wide(cells, [group.id.to_string(), named(names, &group.project), time(group.created_at_ms)]);
    }
    table
}

/// Networks.
pub fn networks(networks: &[Network], names: &Names) -> Table {
    let mut table =
        Table::new(["NAME", "PREFIX", "GATEWAY", "VNI", "MTU"]).and_wide(["ID", "PROJECT", "NAME SERVERS", "SINCE"]);
    for network in networks {
        let cells = [
            network.name.to_string(),
            network.cidr.clone(),
            network.gateway.to_string(),
            network.vni.to_string(),
            network.mtu.to_string(),
        ];
        let servers: Vec<String> = network.dns.iter().map(ToString::to_string).collect();
        let wide = [
            network.id.to_string(),
            named(names, &network.project),
            or_dash((!servers.is_empty()).then(|| servers.join(" "))),
            time(network.created_at_ms),
        ];
        table.row_wide(cells, wide);
    }
    table
}

/// Operations.
pub fn operations(operations: &[Operation], names: &Names) -> Table {
    let mut table = Table::new(["ID", "KIND", "PHASE", "BY", "AT", "ERROR"]).and_wide([
        "GUEST",
        "FROM",
        "TO",
        "PAUSED MS",
        "REASON",
        "ENDED",
    ]);
    for operation in operations {
        let cells = [
            operation.id.to_string(),
            word(operation.kind),
            phase_name(operation.phase).into(),
            operation.actor.clone(),
            time(operation.created_at_ms),
            or_dash(operation.error.as_ref().map(|problem| &problem.detail)),
        ];
        let wide = [
            or_dash(operation.guest.as_ref().map(|guest| named(names, guest))),
            or_dash(operation.source.as_ref().map(|host| named(names, host))),
            or_dash(operation.destination.as_ref().map(|host| named(names, host))),
            or_dash(operation.progress.downtime_ms),
            or_dash(operation.reason.as_ref()),
            or_dash(operation.ended_at_ms.map(time)),
        ];
        table.row_wide(cells, wide);
    }
    table
}

/// Events.
pub fn events(events: &[Event], names: &Names) -> Table {
    let mut table =
        Table::new(["SEQ", "AT", "KIND", "ABOUT", "ACTOR", "DATA"]).and_wide(["GUEST", "HOST", "OPERATION", "REQUEST"]);
    for event in events {
        let about = match (event.guest, event.host) {
            (Some(guest), _) => named(names, &guest),
            (None, Some(host)) => named(names, &host),
            (None, None) => "-".to_owned(),
        };
        let (seq, at) = (event.seq.to_string(), time(event.at_ms));
        let cells = [seq, at, event.kind.clone(), about, event.actor.clone(), event.data.to_string()];
        let wide = [or_dash(event.guest), or_dash(event.host), or_dash(event.operation), event.request_id.to_string()];
        table.row_wide(cells, wide);
    }
    table
}

/// How often machines of ours were taken back on a spot market; what is rented on demand is not.
fn seen_risk(market: &Market) -> String {
    if market.tenure == Tenure::OnDemand {
        return "-".to_owned();
    }
    let Some(seen) = market.seen else { return "not measured".to_owned() };
    let announced = if seen.announced > 0 { format!(", {} ANNOUNCED", seen.announced) } else { String::new() };
    format!("{} taken in {}{announced}", seen.taken, duration(seen.ran_ms))
}

/// Sites of an image or a volume.
pub fn sites(sites: &[Site]) -> Table {
    let mut table = Table::new(["WHAT", "WHERE", "HOLDS", "BYTES", "LACKS", "DETAIL"]);
    for site in sites {
        let place = match (site.host, site.cloud) {
            (Some(_), _) => format!("host {}", site.name),
            (None, Some(_)) => format!("store of {}", site.name),
            (None, None) => "controller's store".to_owned(),
        };
        let holds = match site.holds {
            SiteHolds::Whole => "all",
            SiteHolds::Part => "part",
            SiteHolds::NotKnown => "not known",
        };
        table.row([
            word(site.kind).replace('_', " "),
            place,
            holds.to_owned(),
            or_dash(site.bytes.map(bytes)),
            or_dash(site.missing_bytes.map(bytes)),
            site.detail.clone(),
        ]);
    }
    table
}

/// Markets with their prices now, and what befell our machines there; wide: how much of the on-demand price that is.
pub fn markets(markets: &[Market]) -> Table {
    let mut table = Table::new(["MARKET", "PRICE/H", "ON DEMAND/H", "RISK"]).and_wide([
        "CLOUD",
        "TYPE",
        "TENURE",
        "OF ON DEMAND",
        "PRICE SINCE (FEED MS)",
        "FEED NOW MS",
    ]);
    for market in markets {
        let price = market.price_nanousd_per_hour;
        let on_demand = market.on_demand_nanousd_per_hour;
        let share =
            on_demand.filter(|most| *most > 0).map(|most| format!("{:.0} %", price as f64 * 100.0 / most as f64));
        let wide = [
            market.cloud_name.to_string(),
            market.instance_type.clone(),
            word(market.tenure),
            or_dash(share),
            market.feed_time_ms.to_string(),
            market.feed_now_ms.to_string(),
        ];
        let cells = [market.name.clone(), usd(price), or_dash(on_demand.map(usd)), seen_risk(market)];
        table.row_wide(cells, wide);
    }
    table
}
