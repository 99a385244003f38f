//! A browser's session: a cookie instead of a bearer, and what a foreign page cannot do with it.

use reqwest::{Method, StatusCode, header};
use supercloud_api::{Role, WhoAmI};

use super::TestController;
use crate::auth::CSRF_HEADER;

async fn sign_in(test: &TestController, secret: &str) -> (String, WhoAmI) {
    let response = test.raw(Method::POST, "/v1/session", Some(secret)).send().await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let cookie = response.headers()[header::SET_COOKIE].to_str().unwrap().to_owned();
    assert!(cookie.starts_with("__Host-supercloud=") && cookie.contains("; Secure"), "{cookie}");
    assert!(!cookie.contains(secret), "the cookie holds no secret of the token");
    (cookie.split(';').next().unwrap().to_owned(), response.json().await.unwrap())
}

#[tokio::test]
async fn a_cookie_is_worth_its_token_and_no_more() {
    let test = TestController::start().await;
    test.project("p").await;
    let viewer = test.token("p", Role::Viewer).await;
    let (cookie, who) = sign_in(&test, &viewer.secret).await;
    assert_eq!((who.token.id, who.project_name.as_ref().map(ToString::to_string)), (viewer.token.id, Some("p".into())));
    let send = async |method: Method, path: &str, headers: &[(&str, &str)]| {
        let mut request = test.raw(method, path, None).header(header::COOKIE, &cookie);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.send().await.unwrap().status()
    };
    let csrf = (CSRF_HEADER, "1");
    assert_eq!(send(Method::GET, "/v1/guests", &[]).await, StatusCode::OK);
    // The role is the token's.
    assert_eq!(send(Method::POST, "/v1/guests", &[csrf]).await, StatusCode::FORBIDDEN);
    // A foreign page has the browser's cookie, at worst, but not the header, and browsers tell where it comes from.
    for from in ["cross-site", "same-site"] {
        assert_eq!(send(Method::GET, "/v1/guests", &[("sec-fetch-site", from)]).await, StatusCode::FORBIDDEN);
    }
    assert_eq!(send(Method::GET, "/v1/guests", &[("sec-fetch-site", "same-origin")]).await, StatusCode::OK);
    assert_eq!(send(Method::DELETE, "/v1/session", &[]).await, StatusCode::FORBIDDEN);
    // It does not prolong itself.
    assert_eq!(send(Method::POST, "/v1/session", &[csrf]).await, StatusCode::FORBIDDEN);
    let out = test.raw(Method::DELETE, "/v1/session", None).header(header::COOKIE, &cookie).header(csrf.0, csrf.1);
    let out = out.send().await.unwrap();
    assert_eq!(out.status(), StatusCode::NO_CONTENT);
    assert!(out.headers()[header::SET_COOKIE].to_str().unwrap().contains("Max-Age=0"));
    // A deleted token ends its sessions at once.
    test.admin_client().delete_token(&viewer.token.id.to_string()).await.unwrap();
    assert_eq!(send(Method::GET, "/v1/guests", &[]).await, StatusCode::UNAUTHORIZED);
    let forged = cookie.replace(|character: char| character.is_ascii_digit(), "0");
    let request = test.raw(Method::GET, "/v1/guests", None).header(header::COOKIE, forged);
    assert_eq!(request.send().await.unwrap().status(), StatusCode::UNAUTHORIZED);
    test.stop().await;
}

#[tokio::test]
async fn an_operators_cookie_changes_things_with_the_header_only() {
    let test = TestController::start().await;
    let (_, secret) = test.project("p").await;
    let (cookie, _) = sign_in(&test, &secret).await;
    let create = |with_header: bool| {
        let request = test.raw(Method::POST, "/v1/networks?project=p", None).header(header::COOKIE, &cookie);
        let request = request.body(r#"{"name":"lan","cidr":"10.9.0.0/24"}"#).header("content-type", "application/json");
        if with_header { request.header(CSRF_HEADER, "1") } else { request }
    };
    assert_eq!(create(false).send().await.unwrap().status(), StatusCode::FORBIDDEN);
    assert!(test.admin_client().networks().await.unwrap().is_empty());
    let made = create(true).send().await.unwrap().status();
    assert!(made.is_success(), "{made}");
    test.stop().await;
}

#[tokio::test]
async fn the_page_is_served_to_all_and_the_newest_events_can_be_asked_for() {
    let test = TestController::start().await;
    let page = test.raw(Method::GET, "/", None).send().await.unwrap();
    assert_eq!(page.status(), StatusCode::OK);
    assert!(page.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap().contains("default-src 'none'"));
    for name in ["one", "two", "three"] {
        test.project(name).await;
    }
    let ask = async |query: &str| {
        let answer = test.raw(Method::GET, &format!("/v1/events{query}"), Some(&test.admin_secret())).send().await;
        let answer = answer.unwrap();
        (answer.status(), answer.json::<serde_json::Value>().await.unwrap())
    };
    let (_, all) = ask("").await;
    let all = all["items"].as_array().unwrap().clone();
    let (_, newest) = ask("?last=2").await;
    assert_eq!(newest["items"].as_array().unwrap().as_slice(), &all[all.len() - 2..]);
    assert_eq!(ask("?last=100000").await.1["items"].as_array().unwrap().len(), all.len());
    assert_eq!(ask("?last=1&after=1").await.0, StatusCode::BAD_REQUEST);
    test.stop().await;
}
