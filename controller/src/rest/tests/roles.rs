//! The role table, walked: every route with every kind of token.

use reqwest::{Method, StatusCode};
use supercloud_api::{Problem, Role};

use super::{TestController, guest};
use crate::auth::{Access, Caller, ROUTES, token_of_secret};

#[tokio::test]
async fn every_route_takes_exactly_the_tokens_of_the_table() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let own = world.client.guest("web").await.unwrap();
    let mut secrets = vec![test.guest_token(world.project, own.id).await];
    for project in ["*", "p"] {
        for role in [Role::Viewer, Role::Policy, Role::Operator, Role::Admin] {
            secrets.push(test.token(project, role).await.secret);
        }
    }
    for route in ROUTES {
        // Names that do not exist: what is allowed fails with another problem and changes nothing.
        let path: Vec<&str> = route
            .path
            .split('/')
            .map(|part| {
                if part == "{part}" {
                    "disk"
                } else if part.starts_with('{') {
                    "nobody"
                } else {
                    part
                }
            })
            .collect();
        let path = path.join("/");
        let send = |secret: Option<&str>| {
            let request = test.raw(route.method.clone(), &path, secret);
            let request = if route.method == Method::GET { request } else { request.body("{\"nonsense\": 1}") };
            request.header("Content-Type", "application/json").send()
        };
        let what = format!("{} {}", route.method, route.path);
        let is_there = |status: StatusCode, problem: Option<&Problem>| {
            assert_ne!(status, StatusCode::METHOD_NOT_ALLOWED, "{what}");
            assert!(!problem.is_some_and(|p| p.detail.contains("there is no such path")), "{what} is not served");
        };
        let response = send(None).await.unwrap();
        let status = response.status();
        assert_eq!(
            status == StatusCode::UNAUTHORIZED && route.path != "/v1/join",
            route.access != Access::Open,
            "{what} without token: {status}"
        );
        for secret in &secrets {
            let token = token_of_secret(test.state(), secret, 0).await.unwrap().unwrap();
            let expected = Caller { token: token.clone() }.check(route).is_ok();
            let response = send(Some(secret)).await.unwrap();
            let status = response.status();
            let problem = match status.is_success() {
                // The body of a stream does not end.
                true => None,
                false => response.json::<Problem>().await.ok(),
            };
            is_there(status, problem.as_ref());
            let by_role = problem.as_ref().is_some_and(|p| p.detail.starts_with("the role "));
            assert_eq!(!by_role, expected, "{what} as {:?} of {:?}: {problem:?}", token.role, token.project);
        }
    }
    test.stop().await;
}

#[tokio::test]
async fn a_guests_own_token_reaches_its_guest_and_nothing_else() {
    let test = TestController::start().await;
    let world = test.world().await;
    for name in ["web", "peer"] {
        world.client.create_guest(&guest(name)).await.unwrap();
    }
    let (web, peer) = (world.client.guest("web").await.unwrap(), world.client.guest("peer").await.unwrap());
    test.run_on(web.id, &world.hosts[0]).await;
    let own = test.client(&test.guest_token(world.project, web.id).await);
    assert_eq!(own.guest("web").await.unwrap().id, web.id);
    assert_eq!(super::problem(own.guest("peer").await).status, 404);
    assert_eq!(super::problem(own.guest(&peer.id.to_string()).await).status, 404);
    assert_eq!(super::problem(own.guests().await).status, 403);
    assert_eq!(super::problem(own.delete_guest("web").await).status, 403);
    let body = supercloud_api::GuestFreeze { reason: Some("night".into()) };
    let operation = own.freeze_guest("web", &body).await.unwrap();
    assert_eq!(operation.actor, format!("guest:{}", web.id));
    assert_eq!(own.operation(operation.id).await.unwrap().reason.as_deref(), Some("night"));
    let others = world.client.operations().await.unwrap();
    let other = others.iter().find(|o| o.guest == Some(peer.id)).unwrap();
    assert_eq!(super::problem(own.operation(other.id).await).status, 404);
    test.stop().await;
}
