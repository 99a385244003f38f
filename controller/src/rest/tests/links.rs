//! Ways between hosts, flows of ports, sites of images and volumes, what was seen of markets.

use std::time::Duration;

use supercloud_api::{
    Code, Freeze, Link, LinkState, MarketSeen, MirrorStanding, Port, PortTraffic, Role, SiteHolds, SiteKind, Volume,
    VolumeHistory,
    handover::{self, Holder, Owner, Stamp, Verdict},
    ids::{Epoch, FreezeId, HostId, OperationId, RentingId},
    link::{Directive, FlowsTold, PathMeasured},
    unix_ms,
};

use super::{TestController, guest, problem};
use crate::state::{Change, Context, GuestRecord, OperationRecord, RentingRecord};

/// Measured well.
pub fn path(to: HostId) -> PathMeasured {
    PathMeasured {
        to,
        probes: 24,
        answered: 24,
        misses: 0,
        is_refused: false,
        sent: 25,
        resent: 1,
        rtt_us: Some(12_000),
        rtt_least_us: Some(11_000),
        answered_at_ms: Some(unix_ms()),
    }
}

#[tokio::test]
async fn agents_that_measure_are_told_whom_and_everybody_may_read_what_they_tell() {
    let test = TestController::start().await;
    let world = test.world().await;
    let [east, west] = [world.hosts[0].id, world.hosts[1].id];
    let mut orders = test.parts().sessions.open_for_tests(east);
    let _other = test.parts().sessions.open_for_tests(west);
    test.parts().paths.note_capable(east, true);
    let told = tokio::time::timeout(Duration::from_secs(60), orders.recv()).await.unwrap();
    let Some(Directive::MeasurePaths { peers }) = told else { panic!("{told:?}") };
    assert_eq!(peers.iter().map(|peer| peer.host).collect::<Vec<_>>(), [west]);
    let links = world.client.links().await.unwrap();
    assert_eq!(links.len(), 2);
    assert!(links.iter().all(|link| link.state == LinkState::NotMeasured && link.rtt_us.is_none()));

    test.parts().paths.told(east, vec![path(west), path(HostId::generate())], unix_ms());
    // A member of one project, too: hosts are shown by name.
    let viewer = test.client(&test.token("p", Role::Viewer).await.secret);
    let links = viewer.links_of("east-1").await.unwrap();
    let find = |from| links.iter().find(|link: &&Link| link.from == from).unwrap();
    assert_eq!(links.len(), 2, "both directions");
    let there = find(east);
    assert_eq!((there.state, there.rtt_us, there.loss), (LinkState::Answers, Some(12_000), Some(0.04)));
    assert_eq!((there.from_cloud_name.as_str(), there.to_cloud_name.as_str()), ("east", "west"));
    assert!(find(west).why.as_ref().unwrap().contains("version"), "{:?}", find(west));
    assert_eq!(problem(viewer.links_of("nowhere").await).code, Code::NotFound);
    let own = test.guest_token(world.project, supercloud_api::ids::GuestId::generate()).await;
    assert_eq!(problem(test.client(&own).links().await).code, Code::Forbidden);

    let all = test.token("*", Role::Viewer).await.secret;
    let metrics = test.raw(reqwest::Method::GET, "/metrics", Some(&all)).send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("supercloud_links{state=\"answers\"} 1"), "{metrics}");
    assert!(metrics.contains("supercloud_link_rtt_us{from=\"east\",to=\"west\"} 12000"));
    assert!(metrics.contains("supercloud_link_loss_ppm{from=\"east\",to=\"west\"} 40000"));
    test.stop().await;
}

#[tokio::test]
async fn flows_of_a_port_are_asked_of_its_host() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let port = world.client.ports().await.unwrap().remove(0);
    let flows = async || world.client.port_flows(&port.id.to_string()).await;
    assert!(problem(flows().await).detail.contains("runs nowhere"));
    let host = world.hosts[0].id;
    test.edit::<Port>(&port.id, |port| port.host = Some(host)).await;
    assert!(problem(flows().await).detail.contains("not connected"));
    let mut orders = test.parts().sessions.open_for_tests(host);
    test.parts().flows.note_capable(host, true);
    let answering = async {
        let asked = loop {
            match orders.recv().await {
                Some(Directive::TellFlows { asked, of }) if of.port == port.id && of.network == port.network => {
                    break asked;
                }
                Some(_) => {}
                None => panic!("the session is gone"),
            }
        };
        let traffic = PortTraffic { sent_packets: 7, ..PortTraffic::default() };
        test.parts().flows.told(host, asked, Ok(FlowsTold { traffic, flows: Vec::new(), left_out: 3 }));
    };
    let (told, ()) = tokio::join!(flows(), answering);
    let told = told.unwrap();
    assert_eq!((told.traffic.sent_packets, told.left_out, told.host), (7, 3, host));
    assert_eq!(told.host_name.as_str(), "east-1");
    let stranger = test.project("other").await.1;
    let seen = test.client(&stranger).port_flows(&port.id.to_string()).await;
    assert_eq!(problem(seen).code, Code::NotFound, "another project's port is none");
    test.stop().await;
}

#[tokio::test]
async fn sites_are_what_records_and_hosts_tell() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let volume = world.client.volumes().await.unwrap().remove(0);
    let image = world.client.images().await.unwrap().remove(0);
    let (web, [east, west]) = (volume.guest.unwrap(), &world.hosts);
    let of_image = async || world.client.image_sites("lean").await.unwrap();
    let of_volume = async || world.client.volume_sites(volume.name.as_str()).await.unwrap();
    let first = of_image().await;
    assert_eq!(first.len(), 1);
    assert_eq!((first[0].name.as_str(), first[0].holds, first[0].cloud), ("controller", SiteHolds::Whole, None));
    assert!(first[0].bytes.is_some());
    let sites = of_volume().await;
    assert!(sites.iter().all(|site| site.kind == SiteKind::Base && site.cloud.is_none()), "{sites:?}");

    test.run_on(web, east).await;
    test.edit::<Volume>(&volume.id, |volume| volume.host = Some(east.id)).await;
    let epoch = test.state().need::<GuestRecord>(&web).await.unwrap().owner.epoch;
    let in_cloud = |sites: &[supercloud_api::Site]| sites.iter().find(|site| site.cloud == Some(east.cloud)).cloned();
    assert_eq!(in_cloud(&of_image().await).unwrap().holds, SiteHolds::NotKnown, "its host has told nothing");
    let tell = |missing| test.parts().hosts.note_bases(east.id, [(web, epoch, missing)], std::time::Instant::now());
    tell(5000);
    let part = in_cloud(&of_image().await).unwrap();
    assert_eq!((part.holds, part.missing_bytes, part.name.as_str()), (SiteHolds::Part, Some(5000), "east"));
    tell(0);
    assert_eq!(in_cloud(&of_image().await).unwrap().holds, SiteHolds::Whole);
    let kinds = |sites: &[supercloud_api::Site]| sites.iter().map(|site| site.kind).collect::<Vec<_>>();
    assert_eq!(kinds(&of_volume().await), [SiteKind::Newest, SiteKind::Base, SiteKind::Base]);

    // After a move from the west the old host still has blocks that are needed.
    test.edit::<Volume>(&volume.id, |volume| volume.needed_source = Some(west.id)).await;
    test.edit::<GuestRecord>(&web, |record| {
        record.owner.holders = vec![Holder { host: west.id, epoch: Epoch(1), needed: true, lost: false }];
    })
    .await;
    let sites = of_volume().await;
    assert_eq!(sites[0].holds, SiteHolds::Part);
    assert_eq!((sites[1].kind, sites[1].host), (SiteKind::OlderBlocks, Some(west.id)));

    // A standby holds all from its first whole cut on.
    let host_of = |sites: &[supercloud_api::Site]| {
        let found = sites.iter().find(|site| site.kind == SiteKind::Standby).cloned();
        found.map(|site| (site.host, site.holds))
    };
    assert_eq!(host_of(&of_volume().await), None);
    let operation = OperationId::generate();
    test.edit::<GuestRecord>(&web, |record| {
        record.guest.operation = Some(operation);
        record.owner.operation = Some(handover::Operation {
            id: operation,
            turn: 1,
            kind: handover::OperationKind::Mirror { to: west.id },
            phase: handover::Phase::Copy,
            from: Stamp { owner: Owner::Host(east.id), epoch },
            verdict: Verdict::Open,
            group: None,
            source_open: true,
            destination_open: true,
            source_lost: false,
        });
    })
    .await;
    assert_eq!(host_of(&of_volume().await), Some((Some(west.id), SiteHolds::Part)), "nothing is told of it");
    let mut record = test.state().list::<OperationRecord>().await.unwrap().remove(0).value;
    record.operation.id = operation;
    record.operation.progress.mirror = Some(MirrorStanding::default());
    let mut change = Change::new();
    change.create(&record);
    test.state().commit(&Context::system(), change).await.unwrap();
    assert_eq!(host_of(&of_volume().await), Some((Some(west.id), SiteHolds::Part)), "its first cut is under way");
    test.edit::<OperationRecord>(&operation, |record| {
        record.operation.progress.mirror = Some(MirrorStanding { cut: 2, committed: 1, ..MirrorStanding::default() });
    })
    .await;
    assert_eq!(host_of(&of_volume().await), Some((Some(west.id), SiteHolds::Whole)));
    test.edit::<GuestRecord>(&web, |record| {
        record.guest.operation = None;
        record.owner.operation = None;
    })
    .await;

    // Frozen in the west: nothing runs, the freeze is one more site.
    let freeze = Freeze {
        id: FreezeId::generate(),
        guest: web,
        project: world.project,
        epoch,
        cloud: west.cloud,
        memory_root: "0".repeat(64),
        memory_bytes: 1,
        memory_format: "x".into(),
        volumes: Vec::new(),
        is_consumed: false,
        created_at_ms: 0,
        point: None,
    };
    let policy = serde_json::from_value(serde_json::json!({"keep": [{"for_s": 3600, "every_s": 60}]})).unwrap();
    let mut history = VolumeHistory::begin(volume.id, world.project, policy, None, 1);
    let point = serde_json::json!({
        "number": 1, "at_ms": 1, "tick": 0, "epoch": 1, "version": 1, "root": "0".repeat(64), "cloud": east.cloud,
        "stored_bytes": 77, "hash": "0".repeat(64),
    });
    history.points.push(serde_json::from_value(point).unwrap());
    let mut change = Change::new();
    change.create(&freeze).create(&history);
    test.state().commit(&Context::system(), change).await.unwrap();
    test.edit::<GuestRecord>(&web, |record| {
        record.owner.owner = Owner::Frozen(freeze.id);
        record.owner.holders.clear();
    })
    .await;
    test.edit::<Volume>(&volume.id, |volume| {
        volume.host = None;
        volume.needed_source = None;
    })
    .await;
    let sites = of_volume().await;
    assert_eq!(kinds(&sites), [SiteKind::Base, SiteKind::Freeze, SiteKind::Points]);
    assert_eq!((sites[1].name.as_str(), sites[2].name.as_str(), sites[2].bytes), ("west", "east", Some(77)));
    let stranger = test.client(&test.project("other").await.1);
    assert_eq!(problem(stranger.volume_sites(&volume.id.to_string()).await).code, Code::NotFound);
    assert_eq!(problem(stranger.image_sites(&image.id.to_string()).await).code, Code::NotFound);
    test.stop().await;
}

#[tokio::test]
async fn what_the_fleet_rents_is_shown_to_those_who_see_all_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let feed = folder.path().join("feed.csv");
    let rows = "# supercloud-feed 1\nfeed_ms,cloud,instance_type,tenure,usd_per_hour\n0,east,m,spot,0.04\n0,west,m,spot,0.02\n";
    std::fs::write(&feed, rows).unwrap();
    let test = TestController::start_with(folder, &format!("[feed]\nfile = '{}'\nspeed = 0.0\n", feed.display())).await;
    let world = test.world().await;
    let renting = serde_json::json!({
        "renting": {
            "id": RentingId::generate(), "cloud": world.hosts[0].cloud, "cloud_name": "east", "provider": "p",
            "host": HostId::generate(), "host_name": "h", "instance_type": "m", "tenure": "spot",
            "max_price_nanousd_per_hour": null, "state": "ended", "end": "taken", "instance": null, "address": null,
            "is_started_by_hand": false, "ending_as": null, "error": null, "rent_operation": OperationId::generate(),
            "return_operation": null, "created_at_ms": 0, "launched_at_ms": 100, "up_at_ms": null, "ended_at_ms": 400,
        },
        "sealed_secret": "",
    });
    let renting: RentingRecord = serde_json::from_value(renting).unwrap();
    let mut change = Change::new();
    change.create(&renting);
    test.state().commit(&Context::system(), change).await.unwrap();
    let seen = async |secret: &str| {
        let markets = test.client(secret).markets().await.unwrap();
        assert_eq!(markets.len(), 2);
        markets.into_iter().filter_map(|market| Some((market.cloud, market.seen?))).collect::<Vec<_>>()
    };
    let all = seen(&test.token("*", Role::Viewer).await.secret).await;
    let expected = MarketSeen { machines: 1, ran_ms: 300, taken: 1, announced: 0 };
    assert_eq!(all, [(world.hosts[0].cloud, expected)]);
    assert_eq!(seen(&test.token("p", Role::Viewer).await.secret).await, []);
    assert_eq!(seen(&test.token("p", Role::Operator).await.secret).await, []);
    test.stop().await;
}
