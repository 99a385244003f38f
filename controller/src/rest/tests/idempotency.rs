//! The same request twice.

use reqwest::Method;
use supercloud_api::{Cloud, Code, Operation, TokenSecret};

use super::{TestController, guest, problem_of};

#[tokio::test]
async fn a_repeated_request_gets_the_same_answer_and_changes_nothing() {
    let test = TestController::start().await;
    let admin = test.admin_secret();
    let post = |key: &str, body: &'static str| {
        let request = test.raw(Method::POST, "/v1/clouds", Some(&admin)).header("Idempotency-Key", key);
        request.header("Content-Type", "application/json").body(body).send()
    };
    let first = post("k1", r#"{"name":"east","provider":"lab"}"#).await.unwrap();
    assert_eq!(first.status(), 201);
    let location = first.headers()["location"].clone();
    let first: Cloud = first.json().await.unwrap();
    let revision = test.state().health().await.unwrap().revision;
    let again = post("k1", r#"{"name":"east","provider":"lab"}"#).await.unwrap();
    assert_eq!((again.status().as_u16(), &again.headers()["location"]), (201, &location));
    assert_eq!(again.headers()["idempotent-replayed"], "true");
    assert_eq!(again.json::<Cloud>().await.unwrap(), first);
    let reused = problem_of(post("k1", r#"{"name":"west","provider":"lab"}"#).await.unwrap()).await;
    assert_eq!((reused.status, reused.code), (422, Code::IdempotencyKeyReused));
    assert_eq!(test.state().health().await.unwrap().revision, revision);
    // A refusal is not kept: the next try is judged anew.
    let taken = problem_of(post("k2", r#"{"name":"east","provider":"lab"}"#).await.unwrap()).await;
    assert_eq!(taken.code, Code::NameTaken);
    assert_eq!(post("k2", r#"{"name":"west","provider":"lab"}"#).await.unwrap().status(), 201);
    let long = "k".repeat(257);
    assert_eq!(problem_of(post(&long, "{}").await.unwrap()).await.code, Code::BadRequest);
    test.stop().await;
}

#[tokio::test]
async fn the_same_request_at_the_same_time_happens_once() {
    let test = TestController::start().await;
    let world = test.world().await;
    let body = serde_json::to_value(guest("web")).unwrap();
    let requests = (0..12).map(|_| {
        let request = test.raw(Method::POST, "/v1/guests", Some(&world.secret)).header("Idempotency-Key", "one");
        request.json(&body).send()
    });
    let mut ids = std::collections::HashSet::new();
    for response in futures::future::join_all(requests).await {
        let response = response.unwrap();
        assert_eq!(response.status(), 202);
        ids.insert(response.json::<Operation>().await.unwrap().id);
    }
    assert_eq!(ids.len(), 1);
    assert_eq!(world.client.guests().await.unwrap().len(), 1);
    test.stop().await;
}

#[tokio::test]
async fn a_secret_is_given_again_and_lies_nowhere_in_the_open() {
    let test = TestController::start().await;
    let admin = test.admin_secret();
    let post = || {
        let request = test.raw(Method::POST, "/v1/tokens", Some(&admin)).header("Idempotency-Key", "t");
        request.json(&serde_json::json!({"name": "ci", "project": "default", "role": "viewer"})).send()
    };
    let first: TokenSecret = post().await.unwrap().json().await.unwrap();
    let again: TokenSecret = post().await.unwrap().json().await.unwrap();
    assert_eq!(first, again);
    assert!(test.client(&again.secret).whoami().await.is_ok());
    let (all, _) = supercloud_store::list(&**test.state().store(), &supercloud_store::Prefix::all()).await.unwrap();
    for entry in all {
        let value = entry.value.as_bytes();
        let secret = first.secret.as_bytes();
        assert!(!value.windows(secret.len()).any(|window| window == secret), "{}", entry.key);
    }
    test.stop().await;
}

#[tokio::test]
async fn the_answer_is_there_after_a_restart() {
    let test = TestController::start().await;
    let admin = test.admin_secret();
    let post = |test: &TestController| {
        let request = test.raw(Method::POST, "/v1/clouds", Some(&admin)).header("Idempotency-Key", "k");
        request.json(&serde_json::json!({"name": "east", "provider": "lab"})).send()
    };
    let first: Cloud = post(&test).await.unwrap().json().await.unwrap();
    let test = TestController::start_in(test.stop().await).await;
    assert_eq!(post(&test).await.unwrap().json::<Cloud>().await.unwrap(), first);
    test.stop().await;
}
