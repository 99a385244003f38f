//! Simulations, and the list of guests that a provider may take, as REST gives them.

use reqwest::{Method, StatusCode};
use serde_json::json;
use supercloud_api::{Code, Evacuation, Page, Role, Simulation};

use super::{TestController, problem_of};

#[tokio::test]
async fn policies_are_tried_within_bounds_and_nothing_is_kept() {
    let test = TestController::start().await;
    let secret = test.token("*", Role::Policy).await.secret;
    let send = |body: serde_json::Value| test.raw(Method::POST, "/v1/simulations", Some(&secret)).json(&body).send();
    let events = test.admin_client().get::<serde_json::Value>("/v1/events?limit=1000").await.unwrap();
    let good = json!({"policies": [{"kind": "cheapest"}, {"kind": "cheapest", "settle_ms": 0}], "days": 1});
    let response = send(good).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let found: Simulation = response.json().await.unwrap();
    assert_eq!((found.hours, found.outcomes.len(), found.on_demand.policy.as_str()), (24, 2, "on-demand"));
    for bad in [
        json!({"policies": []}),
        json!({"policies": [{"kind": "cheapest"}], "days": 59}),
        json!({"policies": [{"kind": "cheapest", "guests_per_spare": 4}]}),
        json!({"policies": [{"kind": "mine"}]}),
        json!({"policies": [{"kind": "cheapest"}], "trace": "/etc/passwd"}),
    ] {
        let response = send(bad.clone()).await.unwrap();
        assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{bad}");
        assert_eq!(problem_of(response).await.code, Code::BadRequest, "{bad}");
    }
    assert_eq!(test.admin_client().get::<serde_json::Value>("/v1/events?limit=1000").await.unwrap(), events);
    let evacuations: Page<Evacuation> = test.admin_client().get("/v1/evacuations").await.unwrap();
    assert!(evacuations.items.is_empty());
    let wrong = test.raw(Method::GET, "/v1/evacuations?page=x", Some(&secret)).send().await.unwrap();
    assert_eq!(wrong.status(), StatusCode::BAD_REQUEST);
    test.stop().await;
}
