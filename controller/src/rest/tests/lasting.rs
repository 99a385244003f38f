//! What lasts, and what is seen from outside: restarts, metrics, health, TLS.

use reqwest::Method;
use supercloud_api::Role;

use super::{TestController, guest};
use crate::state::verify_chain;

#[tokio::test]
async fn everything_is_there_after_a_restart() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let admin = test.admin_client();
    let before = (
        admin.clouds().await.unwrap(),
        admin.guests().await.unwrap(),
        admin.volumes().await.unwrap(),
        admin.networks().await.unwrap(),
        admin.ports().await.unwrap(),
        admin.operations().await.unwrap(),
        admin.projects().await.unwrap(),
        admin.events_after(0).await.unwrap(),
    );
    let test = TestController::start_in(test.stop().await).await;
    let admin = test.admin_client();
    let after = (
        admin.clouds().await.unwrap(),
        admin.guests().await.unwrap(),
        admin.volumes().await.unwrap(),
        admin.networks().await.unwrap(),
        admin.ports().await.unwrap(),
        admin.operations().await.unwrap(),
        admin.projects().await.unwrap(),
        admin.events_after(0).await.unwrap(),
    );
    assert_eq!(before, after);
    let hosts = admin.hosts().await.unwrap();
    assert!(
        hosts.iter().all(|host| host.state == supercloud_api::HostState::Unreachable),
        "no agent has dialled in yet"
    );
    assert!(verify_chain(test.state()).await.unwrap().is_ok());
    assert!(test.client(&world.secret).whoami().await.is_ok());
    let key = test.state().project_key(&test.parts().keys.root, world.project).await.unwrap();
    assert_ne!(key, [0; 32]);
    test.stop().await;
}

#[tokio::test]
async fn metrics_health_and_the_document_are_served() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    for path in ["/healthz", "/readyz", "/v1/openapi.json"] {
        let answer = test.raw(Method::GET, path, None).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{path}");
        assert!(answer.headers().contains_key("x-request-id"));
    }
    let viewer = test.token("*", Role::Viewer).await.secret;
    let expected = [
        "supercloud_guests{state=\"created\"} 1",
        "supercloud_hosts{state=\"up\"} 2",
        "supercloud_volumes_with_needed_source 0",
        "supercloud_operations_ended_total{kind=\"guest_start\",phase=\"done\"} 1",
        "supercloud_moves_total 0",
        "supercloud_http_requests_total{route=\"/v1/guests\",method=\"POST\",status=\"202\"} 1",
        "supercloud_http_request_seconds_count{route=\"/v1/guests\"} 1",
    ];
    // The count of operations follows their records and may come a moment later.
    let text = loop {
        let text = test.raw(Method::GET, "/metrics", Some(&viewer)).send().await.unwrap().text().await.unwrap();
        if text.contains("supercloud_operations_ended_total{kind=\"guest_start\",phase=\"done\"} 1") {
            break text;
        }
        tokio::task::yield_now().await;
    };
    for line in expected {
        assert!(text.lines().any(|found| found == line), "no line '{line}' in\n{text}");
    }
    test.stop().await;
}

#[tokio::test]
async fn tls_is_ours_and_plain_text_is_not_answered() {
    let test = TestController::start().await;
    let url = format!("http://{}/healthz", test.address());
    let plain = reqwest::Client::builder().no_proxy().build().unwrap().get(url).send().await;
    assert!(plain.is_err() || !plain.unwrap().status().is_success());
    let url = format!("https://{}/healthz", test.address());
    let unpinned = reqwest::Client::builder().no_proxy().build().unwrap().get(url).send().await;
    assert!(unpinned.is_err(), "a client that does not know our CA refuses");
    test.stop().await;
}
