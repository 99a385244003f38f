//! Making guests.

use std::collections::HashSet;

use supercloud_api::{
    Code, GuestPatch, GuestState, NetworkCreate, OperationKind, Phase, ProjectCreate, Quota, Shape,
    client::{Client, ClientError},
    ids::RequestId,
};

use super::{TestController, guest, problem};
use crate::state::verify_chain;

#[tokio::test]
async fn a_guest_is_made_with_everything_that_belongs_to_it() {
    let test = TestController::start().await;
    let world = test.world().await;
    let mut wanted = guest("web");
    wanted.start = true;
    wanted.disk_bytes = Some(100 << 20);
    let operation = world.client.create_guest(&wanted).await.unwrap();
    assert_eq!((operation.kind, operation.phase), (OperationKind::GuestStart, Phase::Plan));
    assert_eq!(operation.destination, Some(world.hosts[0].id), "the host with most room");
    let made = world.client.guest("web").await.unwrap();
    assert_eq!((made.state, made.operation), (GuestState::Created, Some(operation.id)));
    let volume = world.client.volume("web").await.unwrap();
    assert_eq!((volume.guest, volume.size_bytes), (Some(made.id), 100 << 20));
    let ports = world.client.ports().await.unwrap();
    assert_eq!((ports.len(), ports[0].guest, Some(ports[0].ipv4)), (1, made.id, made.ipv4));
    assert_eq!(made.ipv4.unwrap().to_string(), "10.20.0.2");
    let events = test.admin_client().events_after(0).await.unwrap().items;
    let created = events.iter().find(|event| event.kind == "guest.created").unwrap();
    assert_eq!((created.guest, created.operation), (Some(made.id), Some(operation.id)));
    assert_eq!(created.request_id, operation.request_id);
    test.stop().await;
}

#[tokio::test]
async fn of_fifty_guests_of_one_name_exactly_one_is_made() {
    let test = TestController::start().await;
    let world = test.world().await;
    let tries = (0..50).map(|_| {
        let client = world.client.clone();
        async move { client.create_guest(&guest("web")).await }
    });
    let outcomes = futures::future::join_all(tries).await;
    let (won, lost): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!(won.len(), 1);
    for outcome in lost {
        assert_eq!(problem(outcome).code, Code::NameTaken);
    }
    assert_eq!(world.client.guests().await.unwrap().len(), 1);
    assert_eq!(world.client.volumes().await.unwrap().len(), 1);
    assert_eq!(world.client.ports().await.unwrap().len(), 1);
    assert_eq!(world.client.operations().await.unwrap().len(), 1);
    assert!(verify_chain(test.state()).await.unwrap().is_ok());
    test.stop().await;
}

#[tokio::test]
async fn guests_made_at_once_have_names_and_addresses_of_their_own() {
    let test = TestController::start().await;
    let world = test.world().await;
    let tries = (0..40).map(|n| {
        let client = world.client.clone();
        async move { client.create_guest(&guest(&format!("g{n}"))).await.unwrap() }
    });
    futures::future::join_all(tries).await;
    let ports = world.client.ports().await.unwrap();
    let ips: HashSet<_> = ports.iter().map(|port| port.ipv4).collect();
    let macs: HashSet<_> = ports.iter().map(|port| port.mac.clone()).collect();
    assert_eq!((ports.len(), ips.len(), macs.len()), (40, 40, 40));
    assert!(verify_chain(test.state()).await.unwrap().is_ok());
    test.stop().await;
}

#[tokio::test]
async fn quotas_hold_also_against_requests_at_once() {
    let test = TestController::start().await;
    let world = test.world().await;
    let admin = test.admin_client();
    let quota = Quota { guests: 3, vcpus: 100, memory_bytes: 1 << 40, volume_bytes: 1 << 40 };
    let small =
        admin.create_project(&ProjectCreate { name: "small".parse().unwrap(), quota: Some(quota) }).await.unwrap();
    test.image(small.id, "lean").await;
    let client = test.client(&test.token("small", supercloud_api::Role::Operator).await.secret);
    let lan = NetworkCreate { name: "lan".parse().unwrap(), project: None, cidr: "10.1.0.0/24".into(), dns: vec![] };
    client.create_network(&lan).await.unwrap();
    let tries = (0..8).map(|n| {
        let client = client.clone();
        async move { client.create_guest(&guest(&format!("g{n}"))).await }
    });
    let outcomes = futures::future::join_all(tries).await;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 3);
    for outcome in outcomes.into_iter().filter(Result::is_err) {
        let refused = problem(outcome);
        assert_eq!(refused.code, Code::QuotaExceeded);
        assert!(refused.detail.contains("3 in use"), "{}", refused.detail);
    }
    drop(world);
    test.stop().await;
}

#[tokio::test]
async fn room_is_not_given_twice() {
    let test = TestController::start().await;
    let world = test.world().await;
    let big = |name: &str| {
        let mut wanted = guest(name);
        wanted.start = true;
        wanted.place = Some("west".into());
        wanted.shape = Shape { vcpus: 1, memory_bytes: 20 << 30 };
        wanted
    };
    let outcomes = futures::future::join_all(["a", "b", "c"].map(|name| {
        let (client, wanted) = (world.client.clone(), big(name));
        async move { client.create_guest(&wanted).await }
    }))
    .await;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1, "32 GiB take one of 20");
    let refused = problem(outcomes.into_iter().find(Result::is_err).unwrap());
    assert_eq!(refused.code, Code::NoCapacity);
    assert!(refused.detail.contains("west-1 has 12288 MiB of memory free, 20480 are needed"), "{}", refused.detail);
    test.stop().await;
}

async fn post<T: serde::de::DeserializeOwned>(
    client: &Client,
    path: &str,
    body: &impl serde::Serialize,
) -> Result<T, ClientError>
where
{
    let value = serde_json::to_value(body).unwrap();
    client.call(reqwest::Method::POST, path, &value).await
}

#[tokio::test]
async fn a_dry_run_tells_and_leaves_nothing() {
    let test = TestController::start().await;
    let world = test.world().await;
    let before = test.state().health().await.unwrap().revision;
    let mut wanted = guest("web");
    wanted.start = true;
    let told: supercloud_api::Operation = post(&world.client, "/v1/guests?dry_run=true", &wanted).await.unwrap();
    let plan = told.plan.unwrap();
    assert_eq!(plan.destination_name.unwrap().as_str(), "east-1");
    assert!(plan.checks.iter().all(|check| check.is_ok) && !plan.checks.is_empty());
    wanted.shape = Shape { vcpus: 1, memory_bytes: 1 << 40 };
    let told: supercloud_api::Operation = post(&world.client, "/v1/guests?dry_run=true", &wanted).await.unwrap();
    let plan = told.plan.unwrap();
    assert!(plan.destination.is_none() && plan.checks.iter().any(|check| !check.is_ok));
    assert_eq!(test.state().health().await.unwrap().revision, before);
    assert!(problem(world.client.operation(told.id).await).code == Code::NotFound);
    test.stop().await;
}

#[tokio::test]
async fn a_change_needs_the_etag_that_was_read_if_one_is_given() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let read = test.raw(reqwest::Method::GET, "/v1/guests/web", Some(&world.secret)).send().await.unwrap();
    let etag = read.headers()["etag"].clone();
    let patch = |tag: reqwest::header::HeaderValue, follow: bool| {
        let request = test.raw(reqwest::Method::PATCH, "/v1/guests/web", Some(&world.secret)).header("If-Match", tag);
        request.json(&GuestPatch { follow_prices: Some(follow), ..GuestPatch::default() }).send()
    };
    assert_eq!(patch(etag.clone(), true).await.unwrap().status(), 200);
    let stale = super::problem_of(patch(etag, false).await.unwrap()).await;
    assert_eq!((stale.status, stale.code), (412, Code::PreconditionFailed));
    assert!(world.client.guest("web").await.unwrap().follow_prices);
    test.stop().await;
}

#[tokio::test]
async fn listings_come_in_pages_of_ones_own() {
    let test = TestController::start().await;
    let world = test.world().await;
    let (_, stranger) = test.project("other").await;
    for n in 0..7 {
        world.client.create_guest(&guest(&format!("g{n}"))).await.unwrap();
    }
    let mut names = Vec::new();
    let mut page = String::new();
    loop {
        let path = format!("/v1/guests?limit=3{page}");
        let answer: supercloud_api::Page<supercloud_api::Guest> = world.client.get(&path).await.unwrap();
        assert!(answer.items.len() <= 3);
        names.extend(answer.items.into_iter().map(|guest| guest.name.to_string()));
        let Some(next) = answer.next_page else { break };
        page = format!("&page={next}");
    }
    assert_eq!(names, (0..7).map(|n| format!("g{n}")).collect::<Vec<_>>());
    assert!(test.client(&stranger).guests().await.unwrap().is_empty());
    let admin = test.admin_client();
    assert_eq!(admin.guests().await.unwrap().len(), 7);
    let other: supercloud_api::Page<supercloud_api::Guest> = admin.get("/v1/guests?project=other").await.unwrap();
    assert!(other.items.is_empty());
    assert_ne!(RequestId::generate(), RequestId::generate());
    test.stop().await;
}
