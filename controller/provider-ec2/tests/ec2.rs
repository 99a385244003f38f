//! The driver against servers that speak EC2's API. Built with `--features sdk` only; `./deploy/test` does so where memory suffices.
//!
//! `moto` (an independent implementation, in server mode) is what `deploy/moto` installs and names: run the tests by it. What moto lacks is played by a test server of OURS, to AWS's documented answers: paging of price
//! histories, insufficient capacity, throttling, `CpuOptions`, client tokens on the wire, spot requests marked for termination.
#![cfg(feature = "sdk")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod ours;

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use ours::{Answer, Ours};
use supercloud_api::Tenure;
use supercloud_provider::{LaunchOrder, Nesting, NoticeKind, PriceQuery, Provider, ProviderError};
use supercloud_provider_ec2::{Ec2, Settings};
use supercloud_scheduler::money::NanoUsd;

/// Whether the environment that `deploy/moto` gives is there: credentials of no account, for the standard chain to find.
fn has_environment() -> bool {
    let is_there = ["SUPERCLOUD_MOTO", "AWS_ACCESS_KEY_ID"].iter().all(|name| std::env::var_os(name).is_some());
    assert!(is_there || std::env::var_os("SUPERCLOUD_REQUIRE").is_none(), "run it by deploy/moto");
    if !is_there {
        println!("skipped: run it by deploy/moto");
    }
    is_there
}

fn settings(endpoint: SocketAddr, image_id: &str) -> Settings {
    Settings {
        region: "us-east-1".into(),
        zone: None,
        endpoint_url: Some(format!("http://{endpoint}")),
        image_id: image_id.into(),
        subnet_id: None,
        security_group_ids: vec![],
        key_name: None,
        instance_profile: None,
        on_demand_usd_per_hour: BTreeMap::from([("m5.large".into(), "0.096".into())]),
        egress_usd_per_gib: BTreeMap::from([("*".into(), "0.09".into())]),
    }
}

fn order(token: &str) -> LaunchOrder {
    LaunchOrder {
        token: token.into(),
        owner: "controller-1".into(),
        name: "h1".into(),
        instance_type: "m5.large".into(),
        tenure: Tenure::Spot,
        max_price: Some(NanoUsd(50_000_000)),
        user_data: "#cloud-config\n".into(),
        taken: vec![],
    }
}

/// moto, ended with the test.
struct Moto(Child, SocketAddr);

impl Drop for Moto {
    fn drop(&mut self) {
        let _ended = self.0.kill().and_then(|()| self.0.wait());
    }
}

async fn moto() -> Moto {
    let program = std::env::var_os("SUPERCLOUD_MOTO").unwrap();
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let port = address.port().to_string();
    let mut command = Command::new(program);
    let child = command.args(["-H", "127.0.0.1", "-p", &port]).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let moto = Moto(child.unwrap(), address);
    let began = Instant::now();
    while TcpStream::connect(address).is_err() {
        assert!(began.elapsed() < Duration::from_secs(120), "moto does not come up");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    moto
}

#[tokio::test(flavor = "multi_thread")]
async fn on_moto_it_keeps_what_every_driver_promises() {
    if !has_environment() {
        return;
    }
    let moto = moto().await;
    // One of the images that moto always knows.
    let ec2 = Ec2::new(settings(moto.1, "ami-12c6146b")).unwrap();
    supercloud_provider::conformance::check(&ec2, &order("t-1")).await;
    let on_demand = LaunchOrder { tenure: Tenure::OnDemand, max_price: None, ..order("t-2") };
    supercloud_provider::conformance::check(&ec2, &on_demand).await;
    let types = ec2.catalogue().await.unwrap();
    assert!(types.len() > 500, "all pages: {}", types.len());
    let nesting = |name: &str| types.iter().find(|of| of.name == name).map(|of| of.nesting);
    assert_eq!(nesting("m5.metal"), Some(Nesting::Always));
    assert_eq!(nesting("m5.large"), Some(Nesting::Never));
    assert_eq!(ec2.on_demand_price("m5.large").await.unwrap(), Some(NanoUsd(96_000_000)));
    assert_eq!(ec2.egress_price_per_gib("gcp"), Some(NanoUsd(90_000_000)));
}

#[tokio::test(flavor = "multi_thread")]
async fn on_our_server_price_histories_are_read_page_by_page() {
    if !has_environment() {
        return;
    }
    let ours = Ours::start(|call| match (call.action.as_str(), call.get("NextToken")) {
        ("DescribeSpotPriceHistory", None) => {
            Answer::ok(&ours::prices(&[("m5.large", "us-east-1a", "0.035000", "2026-01-01T02:00:00.000Z")], "next"))
        }
        ("DescribeSpotPriceHistory", Some("next")) => Answer::ok(&ours::prices(
            &[
                ("m5.large", "us-east-1a", "0.035000", "2026-01-01T02:00:00.000Z"),
                ("m5.large", "us-east-1a", "0.034100", "2026-01-01T01:00:00.000Z"),
                ("c5.large", "us-east-1b", "0.031000", "2026-01-01T01:00:00.000Z"),
            ],
            "",
        )),
        _ => Answer::error(400, "InvalidAction"),
    });
    let ec2 = Ec2::new(settings(ours.address, "ami-1")).unwrap();
    let query = PriceQuery { instance_types: vec![], from_ms: 1_767_225_600_000, to_ms: 1_767_240_000_000 };
    let series = ec2.spot_prices(&query).await.unwrap();
    assert_eq!(series.len(), 2);
    let m5 = series.iter().find(|one| one.instance_type == "m5.large").unwrap();
    let prices: Vec<u64> = m5.points.iter().map(|point| point.per_hour.0).collect();
    assert_eq!(prices, [34_100_000, 35_000_000]);
    assert_eq!(m5.points[1].at_ms - m5.points[0].at_ms, 3_600_000);
    assert_eq!(ours.calls().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn on_our_server_an_order_carries_token_tags_limits_and_nesting_from_its_first_byte() {
    if !has_environment() {
        return;
    }
    let ours = Ours::start(|call| match call.action.as_str() {
        "DescribeInstanceTypes" => Answer::ok(&ours::instance_type("c8i.large", "nested-virtualization")),
        "DescribeInstances" => Answer::ok("<reservationSet/>"),
        "RunInstances" => Answer::ok(&ours::launched("i-1", "c8i.large", "t-9")),
        _ => Answer::error(400, "InvalidAction"),
    });
    let ec2 = Ec2::new(settings(ours.address, "ami-1")).unwrap();
    let wanted = LaunchOrder { instance_type: "c8i.large".into(), ..order("t-9") };
    let launched = ec2.launch(&wanted).await.unwrap();
    assert_eq!((launched.id.as_str(), launched.token.as_str()), ("i-1", "t-9"));
    let calls = ours.calls();
    let run = calls.iter().find(|call| call.action == "RunInstances").unwrap();
    for (field, value) in [
        ("ClientToken", "t-9"),
        ("InstanceType", "c8i.large"),
        ("MaxCount", "1"),
        ("CpuOptions.NestedVirtualization", "enabled"),
        ("InstanceMarketOptions.MarketType", "spot"),
        ("InstanceMarketOptions.SpotOptions.MaxPrice", "0.050000000"),
        ("InstanceMarketOptions.SpotOptions.InstanceInterruptionBehavior", "terminate"),
        ("InstanceInitiatedShutdownBehavior", "terminate"),
        ("MetadataOptions.HttpTokens", "required"),
        ("TagSpecification.1.ResourceType", "instance"),
        ("TagSpecification.1.Tag.1.Key", "supercloud-owner"),
        ("TagSpecification.1.Tag.1.Value", "controller-1"),
        ("TagSpecification.1.Tag.2.Value", "t-9"),
        ("UserData", "I2Nsb3VkLWNvbmZpZwo="),
    ] {
        assert_eq!(run.get(field), Some(value), "{field} of {run:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn on_our_server_errors_are_data_and_throttling_is_waited_out() {
    if !has_environment() {
        return;
    }
    let ours = Ours::start(|call| match (call.action.as_str(), call.number) {
        ("DescribeInstanceTypes", _) => Answer::ok(&ours::instance_type("m5.large", "")),
        ("DescribeInstances", n) if n < 3 => Answer::error(503, "RequestLimitExceeded"),
        ("DescribeInstances", _) => Answer::ok("<reservationSet/>"),
        ("RunInstances", _) => Answer::error(500, "InsufficientInstanceCapacity"),
        ("TerminateInstances", _) => Answer::error(400, "InvalidInstanceID.NotFound"),
        ("DescribeSpotInstanceRequests", _) => Answer::error(403, "UnauthorizedOperation"),
        _ => Answer::error(400, "InvalidAction"),
    });
    let ec2 = Ec2::new(settings(ours.address, "ami-1")).unwrap();
    assert!(ec2.instances("controller-1").await.unwrap().is_empty(), "throttled twice, then answered");
    let refused = ec2.launch(&order("t")).await;
    assert!(matches!(refused, Err(ProviderError::NoCapacity { .. })), "{refused:?}");
    assert_eq!(ec2.terminate("i-gone").await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn on_our_server_interruptions_are_told_of_running_spot_machines() {
    if !has_environment() {
        return;
    }
    let ours = Ours::start(|call| match call.action.as_str() {
        "DescribeInstances" => Answer::ok(&format!(
            "<reservationSet><item>{}</item></reservationSet>",
            ours::launched("i-7", "m5.large", "t-7")
        )),
        "DescribeSpotInstanceRequests" => Answer::ok(
            "<spotInstanceRequestSet><item><spotInstanceRequestId>sir-1</spotInstanceRequestId><instanceId>i-7</instanceId>\
             <status><code>marked-for-termination</code></status></item></spotInstanceRequestSet>",
        ),
        _ => Answer::error(400, "InvalidAction"),
    });
    let ec2 = Ec2::new(settings(ours.address, "ami-1")).unwrap();
    let notices = ec2.notices("controller-1").await.unwrap();
    assert_eq!(notices.len(), 1);
    assert_eq!((notices[0].instance.as_str(), notices[0].kind), ("i-7", NoticeKind::Interruption { at_ms: None }));
}
