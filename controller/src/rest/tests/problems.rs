//! Every refusal is a clear problem, and changes nothing.

use reqwest::Method;
use serde_json::json;
use supercloud_api::{Code, Role, TokenCreate};

use super::{TestController, guest, problem, problem_of};

/// What, verb, path, token, body, and then: status, code, words of the detail.
type Case<'a> = (&'a str, Method, &'a str, Option<&'a str>, serde_json::Value, u16, Code, &'a str);

#[tokio::test]
async fn refusals_say_what_is_wrong_and_change_nothing() {
    let test = TestController::start().await;
    let world = test.world().await;
    let (_, stranger) = test.project("other").await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let expired = {
        // Not long ago: what has expired for a day is removed.
        let now = supercloud_api::unix_ms();
        let (record, secret) =
            crate::auth::new_token("old".parse().unwrap(), Some(world.project), None, Role::Admin, Some(now - 1));
        let mut change = crate::state::Change::new();
        record.store_in(&mut change);
        test.state().commit(&crate::state::Context::system(), change).await.unwrap();
        secret
    };
    let before = test.state().health().await.unwrap().revision;
    let own = Some(world.secret.as_str());
    let guest_body = |change: serde_json::Value| {
        let mut body = serde_json::to_value(guest("new")).unwrap();
        for (field, value) in change.as_object().unwrap() {
            body[field] = value.clone();
        }
        body
    };
    let big = "x".repeat(65 << 10);
    let cases: Vec<Case> = vec![
        (
            "unknown image",
            Method::POST,
            "/v1/guests",
            own,
            guest_body(json!({"image": "nope"})),
            404,
            Code::NotFound,
            "image 'nope'",
        ),
        (
            "unknown network",
            Method::POST,
            "/v1/guests",
            own,
            guest_body(json!({"network": "nope"})),
            404,
            Code::NotFound,
            "network 'nope'",
        ),
        (
            "unknown place",
            Method::POST,
            "/v1/guests",
            own,
            guest_body(json!({"place": "mars"})),
            404,
            Code::NotFound,
            "host or cloud 'mars'",
        ),
        (
            "name taken",
            Method::POST,
            "/v1/guests",
            own,
            guest_body(json!({"name": "web"})),
            409,
            Code::NameTaken,
            "'web'",
        ),
        (
            "bad name",
            Method::POST,
            "/v1/guests",
            own,
            guest_body(json!({"name": "Web_1"})),
            400,
            Code::BadRequest,
            "Web_1",
        ),
        (
            "no memory",
            Method::POST,
            "/v1/guests",
            own,
            guest_body(json!({"shape": {"vcpus": 1, "memory_bytes": 5}})),
            400,
            Code::BadRequest,
            "memory_bytes",
        ),
        (
            "too many vcpus",
            Method::POST,
            "/v1/guests",
            own,
            guest_body(json!({"shape": {"vcpus": 65, "memory_bytes": 67108864}})),
            400,
            Code::BadRequest,
            "vcpus",
        ),
        (
            "foreign address",
            Method::POST,
            "/v1/guests",
            own,
            guest_body(json!({"ipv4": "10.99.0.5"})),
            400,
            Code::BadRequest,
            "10.99.0.5",
        ),
        (
            "gateway's address",
            Method::POST,
            "/v1/guests",
            own,
            guest_body(json!({"ipv4": "10.20.0.1"})),
            400,
            Code::BadRequest,
            "gateway",
        ),
        (
            "taken address",
            Method::POST,
            "/v1/guests",
            own,
            guest_body(json!({"ipv4": "10.20.0.2"})),
            409,
            Code::WrongState,
            "taken",
        ),
        (
            "too much user data",
            Method::POST,
            "/v1/guests",
            own,
            guest_body(json!({"user_data": big})),
            400,
            Code::BadRequest,
            "user_data",
        ),
        (
            "line break for the kernel",
            Method::POST,
            "/v1/guests",
            own,
            guest_body(json!({"cmdline_extra": "a\nb"})),
            400,
            Code::BadRequest,
            "control",
        ),
        (
            "huge disk",
            Method::POST,
            "/v1/guests",
            own,
            guest_body(json!({"disk_bytes": u64::MAX})),
            400,
            Code::BadRequest,
            "disk_bytes",
        ),
        (
            "unknown field",
            Method::POST,
            "/v1/guests",
            own,
            guest_body(json!({"colour": "red"})),
            400,
            Code::BadRequest,
            "colour",
        ),
        (
            "too large a guest",
            Method::POST,
            "/v1/guests",
            own,
            guest_body(json!({"start": true, "shape": {"vcpus": 1, "memory_bytes": 137438953472u64}})),
            409,
            Code::NoCapacity,
            "east-1 has 65536 MiB of memory free, 131072 are needed",
        ),
        (
            "other's project",
            Method::POST,
            "/v1/guests",
            own,
            guest_body(json!({"project": "other"})),
            404,
            Code::NotFound,
            "project 'other'",
        ),
        (
            "other's guest",
            Method::GET,
            "/v1/guests/web?project=p",
            Some(&stranger),
            json!(null),
            404,
            Code::NotFound,
            "p",
        ),
        (
            "other's guest by name",
            Method::GET,
            "/v1/guests/web",
            Some(&stranger),
            json!(null),
            404,
            Code::NotFound,
            "guest 'web'",
        ),
        ("no token", Method::GET, "/v1/guests", None, json!(null), 401, Code::Unauthenticated, "Authorization"),
        (
            "wrong token",
            Method::GET,
            "/v1/guests",
            Some("sct_0123456789012345678901234567890123456789012"),
            json!(null),
            401,
            Code::Unauthenticated,
            "not known",
        ),
        ("no token at all", Method::GET, "/v1/guests", Some("x"), json!(null), 401, Code::Unauthenticated, "not known"),
        ("old token", Method::GET, "/v1/guests", Some(&expired), json!(null), 401, Code::Unauthenticated, "expired"),
        ("not an admin", Method::POST, "/v1/projects", own, json!({"name": "mine"}), 403, Code::Forbidden, "Operator"),
        ("unknown path", Method::GET, "/v2/guests", own, json!(null), 404, Code::NotFound, "openapi"),
        ("unknown verb", Method::PUT, "/v1/guests", own, json!({}), 405, Code::BadRequest, "GET, POST"),
        ("unknown parameter", Method::GET, "/v1/guests?colour=red", own, json!(null), 400, Code::BadRequest, "colour"),
        ("bad limit", Method::GET, "/v1/guests?limit=0", own, json!(null), 400, Code::BadRequest, "limit"),
        ("limit no number", Method::GET, "/v1/guests?limit=many", own, json!(null), 400, Code::BadRequest, "query"),
        ("bad page", Method::GET, "/v1/guests?page=2", own, json!(null), 400, Code::BadRequest, "page"),
        (
            "bad wait",
            Method::GET,
            "/v1/operations/opn-01900000-0000-7000-8000-000000000000?wait=long",
            own,
            json!(null),
            404,
            Code::NotFound,
            "operation",
        ),
        ("no operation", Method::POST, "/v1/operations/x/cancel", own, json!({}), 404, Code::NotFound, "operation 'x'"),
        (
            "guest that does not run",
            Method::POST,
            "/v1/guests/web/migrate",
            own,
            json!({"to": "west"}),
            409,
            Code::WrongState,
            "created",
        ),
        ("move without target", Method::POST, "/v1/guests/web/migrate", own, json!({}), 400, Code::BadRequest, "to"),
        (
            "stop what does not run",
            Method::POST,
            "/v1/guests/web/stop",
            own,
            json!({}),
            409,
            Code::WrongState,
            "created",
        ),
        (
            "thaw what is not frozen",
            Method::POST,
            "/v1/guests/web/thaw",
            own,
            json!({}),
            409,
            Code::WrongState,
            "created",
        ),
        (
            "force with grace",
            Method::POST,
            "/v1/guests/web/stop",
            own,
            json!({"force": true, "grace_ms": 1}),
            400,
            Code::BadRequest,
            "force",
        ),
        (
            "public network",
            Method::POST,
            "/v1/networks",
            own,
            json!({"name": "n", "cidr": "8.8.8.0/24"}),
            400,
            Code::BadRequest,
            "8.8.8.0/24",
        ),
        (
            "network with host bits",
            Method::POST,
            "/v1/networks",
            own,
            json!({"name": "n", "cidr": "10.0.0.1/24"}),
            400,
            Code::BadRequest,
            "cidr",
        ),
        ("network in use", Method::DELETE, "/v1/networks/lan", own, json!(null), 409, Code::WrongState, "1 ports"),
        ("image in use", Method::DELETE, "/v1/images/lean", own, json!(null), 409, Code::WrongState, "guest web"),
        (
            "import of a ready image",
            Method::POST,
            "/v1/images/lean/import",
            own,
            json!({}),
            409,
            Code::WrongState,
            "ready",
        ),
        (
            "no such part",
            Method::PUT,
            "/v1/images/lean/parts/bios?offset=0",
            own,
            json!({}),
            400,
            Code::BadRequest,
            "disk, kernel or initrd",
        ),
        ("market without name", Method::GET, "/v1/prices", own, json!(null), 400, Code::BadRequest, "market"),
        ("no such market", Method::GET, "/v1/prices?market=x", own, json!(null), 404, Code::NotFound, "market 'x'"),
    ];
    for (what, method, path, secret, body, status, code, text) in cases {
        let mut request = test.raw(method, path, secret);
        if !body.is_null() {
            request = request.json(&body);
        }
        let found = problem_of(request.send().await.unwrap()).await;
        assert_eq!((found.status, found.code), (status, code), "{what}: {found:?}");
        assert!(found.detail.contains(text), "{what}: {}", found.detail);
        let after = test.state().health().await.unwrap().revision;
        assert_eq!(after, before, "{what}: something changed");
    }
    test.stop().await;
}

#[tokio::test]
async fn bodies_that_are_no_json_or_too_large_are_refused() {
    let test = TestController::start().await;
    let admin = test.admin_secret();
    let post = |kind: &str, body: Vec<u8>| {
        test.raw(Method::POST, "/v1/clouds", Some(&admin)).header("Content-Type", kind).body(body).send()
    };
    let before = test.state().health().await.unwrap().revision;
    for body in [&b"{"[..], b"[]", b"null", b"\"x\"", b"{\"name\": 5}", b"{\"name\":\"a\"} x", b"\xff\xfe", b"{}"] {
        let found = problem_of(post("application/json", body.to_vec()).await.unwrap()).await;
        assert_eq!(found.code, Code::BadRequest, "{body:?}");
    }
    let found = problem_of(post("text/xml", b"{\"name\":\"a\"}".to_vec()).await.unwrap()).await;
    assert!(found.detail.contains("application/json"), "{}", found.detail);
    let found = problem_of(post("application/json", vec![b' '; super::super::MAX_JSON_BYTES + 1]).await.unwrap()).await;
    assert_eq!((found.status, found.code), (413, Code::TooLarge));
    let deep = [b"{\"name\":".to_vec(), b"[".repeat(100_000)].concat();
    assert_eq!(problem_of(post("application/json", deep).await.unwrap()).await.code, Code::BadRequest);
    assert_eq!(test.state().health().await.unwrap().revision, before);
    let good = post("application/json; charset=utf-8", b"{\"name\":\"a\"}".to_vec()).await.unwrap();
    assert_eq!(good.status(), 201);
    test.stop().await;
}

/// Seeded mutations of good bodies: never a fault of ours, never a hang.
#[tokio::test]
async fn mutated_bodies_never_make_a_fault() {
    use rand::{Rng as _, SeedableRng as _};
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_121u64);
    println!("SEED={seed}");
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let test = TestController::start().await;
    let world = test.world().await;
    let good = [
        ("/v1/guests", serde_json::to_vec(&guest("new")).unwrap()),
        ("/v1/networks", br#"{"name":"n","cidr":"10.9.0.0/24","dns":["1.1.1.1"]}"#.to_vec()),
        ("/v1/images", br#"{"name":"i","cmdline":"quiet"}"#.to_vec()),
        ("/v1/guests/x/migrate", br#"{"to":"west","bandwidth_bps":1000000,"max_downtime_ms":5}"#.to_vec()),
    ];
    for round in 0..400 {
        let (path, body) = &good[round % good.len()];
        let mut body = body.clone();
        for _ in 0..random.random_range(1..4) {
            let at = random.random_range(0..body.len());
            match random.random_range(0..4) {
                0 => body[at] = random.random(),
                1 => drop(body.remove(at)),
                2 => body.insert(at, random.random()),
                _ => body.truncate(at.max(1)),
            }
        }
        let request = test.raw(Method::POST, path, Some(&world.secret)).header("Content-Type", "application/json");
        let status = request.body(body.clone()).send().await.unwrap().status().as_u16();
        assert!(status < 500, "SEED={seed}: {status} of {:?}", String::from_utf8_lossy(&body));
    }
    test.stop().await;
}

#[tokio::test]
async fn a_token_of_one_project_makes_none_for_all_and_dies_when_deleted() {
    let test = TestController::start().await;
    test.project("p").await;
    let own = test.token("p", Role::Admin).await;
    let client = test.client(&own.secret);
    let wanted = |project: &str| TokenCreate {
        name: "x".parse().unwrap(),
        project: project.into(),
        role: Role::Admin,
        expires_in_s: None,
    };
    assert_eq!(problem(client.create_token(&wanted("*")).await).code, Code::Forbidden);
    assert_eq!(problem(client.create_token(&wanted("default")).await).code, Code::NotFound);
    let made = client.create_token(&wanted("p")).await.unwrap();
    let listed = client.tokens().await.unwrap();
    assert!(listed.iter().all(|token| token.project == own.token.project) && listed.len() >= 2);
    assert!(test.client(&made.secret).whoami().await.is_ok());
    client.delete_token(&made.token.id.to_string()).await.unwrap();
    assert_eq!(problem(test.client(&made.secret).whoami().await).code, Code::Unauthenticated);
    test.stop().await;
}
