//! Pictures of small fleets, as text.

use serde_json::json;
use supercloud_api::{
    Market,
    ids::{CloudId, GuestId, HostId, OperationId},
};

use super::*;

const NOW_MS: u64 = 1_769_862_900_000;

fn host(name: &str, state: &str) -> Host {
    serde_json::from_value(json!({
        "id": HostId::generate(), "name": name, "cloud": CloudId::generate(), "cloud_name": "aws-east", "state": state,
        "data_address": null, "overlay_address": null, "overlay_index": 1,
        "capacity": { "vcpus": 8, "memory_bytes": 8_u64 << 30, "disk_bytes": 0 },
        "used": { "vcpus": 1, "memory_bytes": 4_u64 << 30, "disk_bytes": 0 },
        "compat_classes": [], "probe": {}, "agent_version": "1", "certificate_sha256": "",
        "last_seen_ms": NOW_MS - 60_000, "created_at_ms": 0,
    }))
    .unwrap()
}

fn guest(name: &str, state: &str, at: &Host, alarm: Option<&str>) -> Guest {
    serde_json::from_value(json!({
        "id": GuestId::generate(), "project": "prj-01a1fea9-e622-75ca-b41b-c7d245b5cc2f", "name": name, "state": state,
        "alarm": alarm, "shape": { "vcpus": 2, "memory_bytes": 1_u64 << 30 },
        "image": "img-01a1fea9-e622-75ca-b41b-c7d245b5cc2f", "host": at.id, "host_name": at.name, "cloud": at.cloud,
        "cloud_name": at.cloud_name, "epoch": 3, "compat_class": null, "volumes": [], "ports": [], "ipv4": "10.20.0.5",
        "operation": null, "freeze": null, "follow_prices": false, "starts": 1, "created_at_ms": 0,
    }))
    .unwrap()
}

fn a_move(of: &Guest, from: &Host, to: &Host) -> Operation {
    serde_json::from_value(json!({
        "id": OperationId::generate(), "kind": "guest_migrate", "phase": "copy", "guest": of.id, "source": from.id,
        "destination": to.id, "is_cancel_requested": false, "actor": "token:a",
        "progress": { "memory_total_bytes": 1_u64 << 30, "memory_sent_bytes": 1_u64 << 29, "memory_remaining_bytes": 1_u64 << 29,
            "round": 1, "eta_max_ms": 12_000, "message": "" },
        "request_id": "req-01a1fea9-e617-7305-957c-ad553aef0867", "created_at_ms": 1, "updated_at_ms": 1,
    }))
    .unwrap()
}

fn market(name: &str, price: u64) -> Market {
    serde_json::from_value(json!({
        "name": name, "cloud": CloudId::generate(), "cloud_name": "aws-east", "instance_type": name.split('/').nth(1), "tenure": "spot",
        "price_nanousd_per_hour": price, "on_demand_nanousd_per_hour": null, "feed_time_ms": 0, "feed_now_ms": 0,
    }))
    .unwrap()
}

fn busy() -> Snapshot {
    let hosts = vec![host("h1", "up"), host("h2", "unreachable")];
    let web = guest("web", "running", &hosts[0], None);
    let guests = vec![
        guest("db", "running", &hosts[0], Some("slow\u{1b}[2J disk")),
        web.clone(),
        guest("old", "lost", &hosts[1], None),
    ];
    Snapshot {
        taken_at_ms: NOW_MS,
        url: "https://controller:8443".into(),
        operations: vec![a_move(&web, &hosts[0], &hosts[1])],
        markets: vec![market("aws-east/m/spot", 41_600_000), market("aws-east/l/spot", 9_000_000)],
        hosts,
        guests,
        ..Snapshot::default()
    }
}

#[test]
fn everything_is_on_a_small_screen() {
    let text = text(80, 24, &busy(), NOW_MS);
    assert_eq!(text.lines().count(), 24, "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    for part in [
        "https://controller:8443  2026-01-31 12:35:00 UTC",
        "hosts 1/2 up   guests 3, 2 running, 1 lost",
        "Alarms 3",
        "host h2 is unreachable since 2026-01-31 12:34:00",
        "guest old (lost): its host was lost",
        "guest db (running): slow [2J disk",
        "Moving 1",
        "move web h1 > h2",
        "copy",
        "█",
        "Hosts 2",
        "███░░░ ",
        "$0.0416",
        "Guests 3",
        "2x1.0GiB",
        "q quit",
    ] {
        assert!(text.contains(part), "{part:?} in\n{text}");
    }
    let cheap = text.find("aws-east/l ").unwrap();
    assert!(cheap < text.find("aws-east/m ").unwrap(), "the cheapest first: {text}");
    assert!(text.contains("512.0 MiB sent, ETA 12.0 s"), "{text}");
    assert!(
        text.lines().any(|line| line.contains("PRICE/H  MARKET") && line.ends_with("PRICE/H")),
        "nothing is cut off: {text}"
    );
}

#[test]
fn what_has_no_room_is_counted() {
    let mut snapshot = busy();
    let at = snapshot.hosts[0].clone();
    snapshot.guests.extend((0..100).map(|number| guest(&format!("g{number}"), "running", &at, None)));
    snapshot.hosts.extend((0..50).map(|number| host(&format!("x{number}"), "up")));
    let text = text(80, 24, &snapshot, NOW_MS);
    assert_eq!(text.matches("more").count(), 2, "{text}");
    let shown = text.lines().filter(|line| line.contains("10.20.0.5")).count();
    assert!(shown > 0 && text.contains(&format!("... {} more", 103 - shown)), "{shown} in\n{text}");
}

#[test]
fn an_old_picture_and_trouble_are_said() {
    let mut snapshot = busy();
    assert!(text(80, 24, &snapshot, NOW_MS + 20_000).contains("seen 20.0 s ago"));
    snapshot.trouble = Some("not seen: nobody answers".into());
    assert!(text(80, 24, &snapshot, NOW_MS).contains("not seen: nobody answers"));
}

#[test]
fn any_size_is_drawn() {
    for (width, height) in [(10, 10), (20, 12), (79, 3), (300, 100), (1, 1)] {
        for snapshot in [busy(), Snapshot::default()] {
            assert_eq!(text(width, height, &snapshot, NOW_MS).lines().count(), usize::from(height));
        }
    }
    let nothing = text(80, 24, &Snapshot::default(), NOW_MS);
    assert!(nothing.contains("No alarms") && nothing.contains("Nothing is moving"), "{nothing}");
}
