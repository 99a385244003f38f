//! `supercloud link ...`, and ports and flows of networks: how hosts reach each other, and what their switches do.

use supercloud_api::{FlowPurpose, Link, LinkState, Port, PortFlows, client::Client};
use supercloud_cli::{
    fields::Names,
    table::{Table, bytes, time},
};

use crate::{
    arguments::{LinkVerb, Output},
    listings::word,
    names, show,
};

/// Carries out a verb of links.
pub async fn run(client: &Client, output: Output, verb: LinkVerb) -> anyhow::Result<()> {
    let LinkVerb::List { host } = verb;
    let links = match host {
        Some(host) => client.links_of(&host).await?,
        None => client.links().await?,
    };
    show::print(output, &links, || table(&links))
}

/// Microseconds for people.
fn round_trip(us: u32) -> String {
    match us {
        0..1000 => format!("{us} us"),
        1000..100_000 => format!("{:.1} ms", f64::from(us) / 1e3),
        _ => format!("{:.0} ms", f64::from(us) / 1e3),
    }
}

fn table(links: &[Link]) -> Table {
    let mut table = Table::new(["FROM", "TO", "STATE", "RTT", "LEAST", "LOSS"]).and_wide([
        "FROM CLOUD",
        "TO CLOUD",
        "PROBES",
        "ANSWERED",
        "PACKETS",
        "SENT AGAIN",
        "ANSWERED LAST",
        "WHY",
    ]);
    for link in links {
        let state = match link.state {
            LinkState::Answers => "answers",
            LinkState::Silent => "SILENT",
            LinkState::NotMeasured => "not measured",
        };
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let cells = [
            link.from_name.to_string(),
            link.to_name.to_string(),
            state.to_owned(),
            or_dash(link.rtt_us.map(round_trip)),
            or_dash(link.rtt_least_us.map(round_trip)),
            or_dash(link.loss.map(|loss| format!("{:.1} %", loss * 100.0))),
        ];
        let wide = [
            link.from_cloud_name.to_string(),
            link.to_cloud_name.to_string(),
            link.probes.to_string(),
            link.answered.to_string(),
            link.sent.to_string(),
            link.resent.to_string(),
            or_dash(link.answered_at_ms.map(time)),
            or_dash(link.why.clone()),
        ];
        table.row_wide(cells, wide);
    }
    table
}

/// Prints the ports of a network, or all.
pub async fn ports(client: &Client, output: Output, network: Option<&str>) -> anyhow::Result<()> {
    let mut ports = client.ports().await?;
    if let Some(network) = network {
        let network = client.network(network).await?.id;
        ports.retain(|port| port.network == network);
    }
    let names = match output.is_for_people() {
        true => names::of_ids_in(client, &serde_json::to_value(&ports)?).await,
        false => Names::new(),
    };
    show::print(output, &ports, || ports_table(&ports, &names))
}

fn ports_table(ports: &[Port], names: &Names) -> Table {
    let named = |id: String| names.get(&id).cloned().unwrap_or(id);
    let mut table =
        Table::new(["GUEST", "IPV4", "MAC", "HOST", "NETWORK"]).and_wide(["ID", "PREPARED AT", "MOVED FROM", "EPOCH"]);
    for port in ports {
        let or_dash = |id: Option<String>| id.map_or_else(|| "-".to_owned(), named);
        let cells = [
            named(port.guest.to_string()),
            port.ipv4.to_string(),
            port.mac.clone(),
            or_dash(port.host.map(|host| host.to_string())),
            named(port.network.to_string()),
        ];
        let wide = [
            port.id.to_string(),
            or_dash(port.prepared_at.map(|host| host.to_string())),
            or_dash(port.moved_from.map(|host| host.to_string())),
            port.epoch.to_string(),
        ];
        table.row_wide(cells, wide);
    }
    table
}

/// Prints what the switch of its host holds for a guest's port, or for the port of this id.
pub async fn flows(client: &Client, output: Output, of: &str) -> anyhow::Result<()> {
    let ports: Vec<String> = if of.parse::<supercloud_api::ids::PortId>().is_ok() {
        vec![of.to_owned()]
    } else {
        let guest = client.guest(of).await?.id;
        client.ports().await?.into_iter().filter(|port| port.guest == guest).map(|port| port.id.to_string()).collect()
    };
    anyhow::ensure!(!ports.is_empty(), "guest {of} has no port: it is in no network");
    let mut found = Vec::with_capacity(ports.len());
    for port in ports {
        found.push(client.port_flows(&port).await?);
    }
    show::print(output, &found, || flows_table(&found))?;
    if output.is_for_people() {
        for one in &found {
            let PortFlows { traffic, left_out, host_name, .. } = one;
            println!(
                "\n{host_name}: the guest sent {} ({} packets) and was given {} ({} packets); {} packets were dropped{}",
                bytes(traffic.sent_bytes),
                traffic.sent_packets,
                bytes(traffic.received_bytes),
                traffic.received_packets,
                traffic.dropped_packets,
                if *left_out > 0 { format!("; {left_out} more flows are not shown") } else { String::new() },
            );
        }
    }
    Ok(())
}

fn flows_table(ports: &[PortFlows]) -> Table {
    let mut table = Table::new(["PURPOSE", "TABLE", "PRIORITY", "PACKETS", "BYTES", "ACTIONS"])
        .and_wide(["HOST", "AGE S", "MATCH"]);
    for port in ports {
        for flow in &port.flows {
            let purpose = match flow.purpose {
                FlowPurpose::Flood => "broadcast".to_owned(),
                purpose => word(purpose),
            };
            let cells = [
                purpose,
                flow.table.to_string(),
                flow.priority.to_string(),
                flow.packets.to_string(),
                bytes(flow.bytes),
                flow.actions.clone(),
            ];
            table.row_wide(cells, [port.host_name.to_string(), flow.age_s.to_string(), flow.matching.clone()]);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_that_nobody_measures_has_no_figures() {
        let link: Link = serde_json::from_value(serde_json::json!({
            "from": supercloud_api::ids::HostId::generate(), "from_name": "a",
            "from_cloud": supercloud_api::ids::CloudId::generate(), "from_cloud_name": "home",
            "to": supercloud_api::ids::HostId::generate(), "to_name": "b",
            "to_cloud": supercloud_api::ids::CloudId::generate(), "to_cloud_name": "west",
            "state": "not_measured", "why": "a is not connected", "rtt_us": null, "rtt_least_us": null, "loss": null,
            "probes": 0, "answered": 0, "sent": 0, "resent": 0, "answered_at_ms": null, "told_at_ms": null,
        }))
        .unwrap();
        let there = Link {
            state: LinkState::Answers,
            why: None,
            rtt_us: Some(1250),
            rtt_least_us: Some(990),
            loss: Some(0.04),
            ..link.clone()
        };
        let text = table(&[link, there]).render();
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["a", "b", "not", "measured", "-", "-", "-"]);
        assert_eq!(lines[2], ["a", "b", "answers", "1.2", "ms", "990", "us", "4.0", "%"]);
        assert_eq!(round_trip(250_400), "250 ms");
    }
}
