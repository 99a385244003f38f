//! Dry runs: every change says what it would do, and does nothing.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use supercloud_api::{Role, unix_ms};

use super::{TestController, guest, problem_of};
use crate::auth::ROUTES;

#[tokio::test]
async fn every_change_that_says_it_can_be_tried_stores_nothing() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let admin = test.admin_secret();
    let token = test.token("p", Role::Viewer).await.token.id;
    test.image(world.project, "spare").await;
    let tried = [
        (Method::POST, "/v1/clouds", json!({ "name": "north", "provider": "lab" })),
        (Method::POST, "/v1/projects", json!({ "name": "q" })),
        (Method::POST, "/v1/tokens", json!({ "name": "t", "project": "p", "role": "viewer" })),
        (Method::DELETE, &*format!("/v1/tokens/{token}"), Value::Null),
        (Method::POST, "/v1/join-tokens", json!({ "host_name": "h9", "cloud": "east", "expires_in_s": 60 })),
        (Method::PATCH, "/v1/hosts/east-1", json!({ "cordoned": true })),
        (Method::POST, "/v1/networks", json!({ "name": "lan2", "cidr": "10.9.0.0/24", "project": "p" })),
        (Method::POST, "/v1/images", json!({ "name": "new", "project": "p" })),
        (Method::DELETE, "/v1/images/spare?project=p", Value::Null),
        (
            Method::POST,
            "/v1/guests",
            json!(guest("two"))
                .as_object_mut()
                .map(|body| {
                    body.insert("project".into(), json!("p"));
                    Value::Object(body.clone())
                })
                .unwrap(),
        ),
        (Method::PATCH, "/v1/guests/web?project=p", json!({ "follow_prices": true })),
        (Method::DELETE, "/v1/guests/web?project=p", Value::Null),
        (Method::POST, "/v1/verdicts", json!({ "policy": "cheapest", "items": [] })),
        (Method::POST, "/v1/stores/controller/sweep", Value::Null),
    ];
    let before = test.state().health().await.unwrap().revision;
    for (method, path, body) in tried {
        let path = format!("{path}{}dry_run=true", if path.contains('?') { '&' } else { '?' });
        let response = test.raw(method.clone(), &path, Some(&admin)).json(&body).send().await.unwrap();
        let (status, location) = (response.status(), response.headers().get("location").cloned());
        let text = response.text().await.unwrap();
        assert!(matches!(status, StatusCode::OK | StatusCode::NO_CONTENT), "{method} {path}: {status} {text}");
        assert_eq!(location, None, "{method} {path}: what was not made is nowhere");
        assert!(!text.contains("secret") && !text.contains("scj"), "{method} {path} tells a secret: {text}");
    }
    assert_eq!(test.state().health().await.unwrap().revision, before, "nothing was stored");
    // What would be refused is.
    let response = test
        .raw(Method::POST, "/v1/clouds?dry_run=true", Some(&admin))
        .json(&json!({ "name": "east", "provider": "lab" }));
    assert_eq!(response.send().await.unwrap().status(), StatusCode::CONFLICT);
    test.stop().await;
}

#[tokio::test]
async fn what_cannot_be_tried_is_not_done_in_earnest() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let admin = test.admin_secret();
    let before = test.state().health().await.unwrap().revision;
    let changes = ROUTES.iter().filter(|route| route.method != Method::GET && route.path.starts_with("/v1/"));
    let not_tried: Vec<_> = changes.filter(|route| !route.is_triable()).collect();
    assert!(not_tried.len() >= 5, "{not_tried:?}");
    for route in not_tried {
        let path = route.path.replace("{image}", "lean").replace("{guest}", "web").replace("{part}", "disk");
        let path = format!("{}?dry_run=true", path.replace(['{', '}'], ""));
        let response = test.raw(route.method.clone(), &path, Some(&admin)).body("{}").send().await.unwrap();
        let problem = problem_of(response).await;
        assert!(problem.detail.contains("cannot be tried"), "{} {}: {problem:?}", route.method, route.path);
    }
    assert_eq!(test.state().health().await.unwrap().revision, before);
    test.stop().await;
}

#[tokio::test]
async fn verdicts_are_taken_from_policies_and_shown_to_who_sees_the_guest() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let id = world.client.guest("web").await.unwrap().id;
    let policy = test.token("p", Role::Policy).await.secret;
    let other = { test.project("q").await.1 };
    let verdict = |guest: &str| json!({ "guest": guest, "market": "east/x/spot", "chosen": "west/x/spot", "runner_up": "east/x/spot", "is_move": true, "reason": "cheaper" });
    let tell = async |secret: &str, body: Value| {
        test.raw(Method::POST, "/v1/verdicts", Some(secret)).json(&body).send().await.unwrap()
    };
    let stranger = supercloud_api::ids::GuestId::generate().to_string();
    let told =
        tell(&policy, json!({ "policy": "cheapest", "items": [verdict(&id.to_string()), verdict(&stranger)] })).await;
    assert_eq!(told.json::<Value>().await.unwrap(), json!({ "taken": 1 }));
    let found = world.client.verdicts().await.unwrap();
    assert_eq!((found.len(), found[0].guest, found[0].chosen.as_deref()), (1, id, Some("west/x/spot")));
    assert!(
        found[0].actor.starts_with("token:")
            && found[0].told_at_ms <= unix_ms()
            && found[0].guest_name.as_str() == "web"
    );
    assert!(test.client(&other).verdicts().await.unwrap().is_empty());
    // Another project's policy says nothing of it.
    let theirs = test.token("q", Role::Policy).await.secret;
    let told = tell(&theirs, json!({ "policy": "cheapest", "items": [verdict(&id.to_string())] })).await;
    assert_eq!(told.json::<Value>().await.unwrap(), json!({ "taken": 0 }));
    let mut long = verdict(&id.to_string());
    long["reason"] = "x".repeat(513).into();
    let mut odd = verdict(&id.to_string());
    odd["chosen"] = "a\nb".into();
    let many: Vec<Value> = (0..1001).map(|_| verdict(&id.to_string())).collect();
    for items in [vec![long], vec![odd], many] {
        let told = tell(&policy, json!({ "policy": "cheapest", "items": items })).await;
        assert_eq!(told.status(), StatusCode::BAD_REQUEST);
    }
    test.stop().await;
}

#[tokio::test]
async fn how_good_it_was_is_told_of_what_the_asker_sees() {
    let test = TestController::start().await;
    let world = test.world().await;
    let told = world.client.reliability("").await.unwrap();
    assert_eq!((told.guests, told.availability_ppm, told.downtime_p50_ms), (0, None, None));
    assert!(told.to_ms - told.from_ms == 30 * 86_400_000 && told.to_ms <= unix_ms());
    let ask = async |query: &str| {
        test.raw(Method::GET, &format!("/v1/reliability?{query}"), Some(&world.secret)).send().await.unwrap().status()
    };
    for bad in ["from_ms=7&to_ms=3", "from_ms=0", "guest=nobody"] {
        assert!(ask(bad).await.is_client_error(), "{bad}");
    }
    assert_eq!(ask("guest=gst-01a1fea9-e622-75ca-b41b-c7d245b5cc2f").await, StatusCode::OK, "of one that is gone");
    test.stop().await;
}
