//! Ways between hosts, flows of ports, sites of images and volumes, what was seen of markets.

use std::time::Duration;

use supercloud_api::{
    Code, Freeze, Link, LinkState, Port, PortTraffic, Role, SiteHolds, SiteKind, Volume, VolumeHistory,
    handover::{Holder, Owner},
    ids::{Epoch, FreezeId, HostId},
    link::{Directive, FlowsTold, PathMeasured},
    unix_ms,
};

use super::{TestController, guest, problem};
use crate::state::{Change, Context, GuestRecord};

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
