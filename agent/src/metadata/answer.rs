//! What a request means: pure.

use supercloud_api::{Code, GuestMigrate, Problem, guest_call::GuestCall};
use supercloud_ids::{GuestId, RequestId};

use super::{
    http::{Request, Response},
    session::{MAX_SECONDS, Sessions},
};
use crate::guest::GuestView;

/// The header in which a session token comes.
const TOKEN: &str = "x-aws-ec2-metadata-token";
/// The header in which its life is asked for.
const TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";

/// Where our own part begins.
const OURS: &str = "/supercloud/";
/// The longest idempotency key, in bytes.
const MAX_KEY_BYTES: usize = 256;

/// What is to be answered.
#[derive(Debug, PartialEq)]
pub enum Reply {
    /// This.
    Now(Response),
    /// What the controller gives for a token of the API.
    AskToken,
    /// What the controller says to this.
    Ask(GuestCall),
}

/// A refusal in the form that the path's readers know: bare as EC2's, or a problem.
pub fn refusal(path: &str, code: Code, detail: &str) -> Response {
    match path.starts_with(OURS) {
        true => Response::problem(&Problem::new(code, detail)),
        false => Response::error(code.status()),
    }
}

/// Decides about a request of `guest`.
pub fn respond(request: &Request, guest: GuestId, view: &GuestView, sessions: &Sessions, now_ms: u64) -> Reply {
    if ["x-forwarded-for", "forwarded", "via"].iter().any(|name| request.header(name).is_some()) {
        let detail = "a request that came through a proxy is not answered";
        return Reply::Now(refusal(&request.path, Code::Forbidden, detail));
    }
    let path = request.path.trim_end_matches('/');
    match (request.method.as_str(), path) {
        ("PUT", "/latest/api/token") => {
            let seconds = request.header(TTL).and_then(|ttl| ttl.parse::<u64>().ok());
            return Reply::Now(match seconds {
                Some(seconds) if (1..=MAX_SECONDS).contains(&seconds) => {
                    Response::text(sessions.make(guest, seconds, now_ms)).with(TTL, seconds.to_string())
                }
                _ => Response::error(400),
            });
        }
        ("GET", _) | ("POST", MIGRATE) => {}
        _ => return Reply::Now(not_allowed(path)),
    }
    if !request.header(TOKEN).is_some_and(|token| sessions.is_good(token, guest, now_ms)) {
        let detail = "send the session token that PUT /latest/api/token gives, in X-aws-ec2-metadata-token";
        return Reply::Now(refusal(path, Code::Unauthenticated, detail));
    }
    match (path, path.strip_prefix("/supercloud/v1/operations/")) {
        (MIGRATE, _) if request.method != "POST" => return Reply::Now(not_allowed(path)),
        (MIGRATE, _) => {
            return match migrate(request) {
                Ok(call) => Reply::Ask(call),
                Err(problem) => Reply::Now(Response::problem(&problem)),
            };
        }
        ("/supercloud/v1/token", _) => return Reply::AskToken,
        ("/supercloud/v1/guest", _) => return Reply::Ask(GuestCall::Look),
        (_, Some(id)) => {
            return match id.parse() {
                Ok(operation) => Reply::Ask(GuestCall::Operation { operation }),
                Err(_) => Reply::Now(refusal(path, Code::NotFound, "there is no such operation of this guest")),
            };
        }
        _ => {}
    }
    if path.starts_with(OURS) {
        return Reply::Now(refusal(path, Code::NotFound, "there is no such path"));
    }
    Reply::Now(content(path, guest, view).unwrap_or_else(|| Response::error(404)))
}

/// The path of a move.
const MIGRATE: &str = "/supercloud/v1/guest/migrate";

fn not_allowed(path: &str) -> Response {
    let allow = if path == MIGRATE { "POST" } else { "GET" };
    if !path.starts_with(OURS) {
        return Response::error(405);
    }
    let mut problem = Problem::new(Code::BadRequest, format!("this path takes: {allow}"));
    problem.status = 405;
    Response::problem(&problem).with("Allow", allow)
}

/// Reads the wish for a move, strictly.
fn migrate(request: &Request) -> Result<GuestCall, Problem> {
    let bad = |detail: String| Problem::new(Code::BadRequest, detail);
    let is_json = request.header("content-type").is_none_or(|kind| {
        kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
    });
    if !is_json {
        return Err(bad("the body must be application/json".to_owned()));
    }
    let wanted: GuestMigrate =
        serde_json::from_slice(&request.body).map_err(|error| bad(format!("the body: {error}")))?;
    let idempotency_key = match request.header("idempotency-key") {
        Some(key) if (1..=MAX_KEY_BYTES).contains(&key.len()) => key.to_owned(),
        Some(_) => return Err(bad(format!("Idempotency-Key must have 1 to {MAX_KEY_BYTES} bytes"))),
        // The link may carry the call twice.
        None => RequestId::generate().to_string(),
    };
    Ok(GuestCall::Migrate { wanted: Box::new(wanted), idempotency_key })
}

fn content(path: &str, guest: GuestId, view: &GuestView) -> Option<Response> {
    let spec = view.spec.as_deref()?;
    let name = spec.name.as_str();
    if let Some(rest) = path.strip_prefix("/latest/meta-data") {
        let port = spec.ports.first();
        let mac = |port: &supercloud_api::link::PortSpec| port.mac.to_ascii_lowercase();
        return Some(Response::text(match rest {
            "" => {
                let mut list = vec!["hostname", "instance-id", "local-hostname"];
                if port.is_some() {
                    list.extend(["local-ipv4", "mac", "network/"]);
                }
                list.join("\n")
            }
            "/instance-id" => guest.to_string(),
            "/hostname" | "/local-hostname" => name.to_owned(),
            "/local-ipv4" => port?.ipv4.to_string(),
            "/mac" => mac(port?),
            "/network" => "interfaces/".to_owned(),
            "/network/interfaces" => "macs/".to_owned(),
            "/network/interfaces/macs" => {
                spec.ports.iter().map(|port| format!("{}/", mac(port))).collect::<Vec<_>>().join("\n")
            }
            _ => {
                let rest = rest.strip_prefix("/network/interfaces/macs/")?;
                let (wanted, leaf) = rest.split_once('/').unwrap_or((rest, ""));
                let (index, port) = spec.ports.iter().enumerate().find(|(_, port)| mac(port) == wanted)?;
                match leaf {
                    "" => "device-number\nlocal-ipv4s\nmac".to_owned(),
                    "device-number" => index.to_string(),
                    "local-ipv4s" => port.ipv4.to_string(),
                    "mac" => mac(port),
                    _ => return None,
                }
            }
        }));
    }
    match path {
        "/latest" => Some(Response::text(match spec.user_data {
            Some(_) => "meta-data\nuser-data",
            None => "meta-data",
        })),
        "/latest/user-data" => spec.user_data.clone().map(Response::text),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use supercloud_ids::Epoch;

    use super::*;
    use crate::guest::machine::tests::spec;

    fn request(method: &str, path: &str, headers: &[(&str, &str)]) -> Request {
        Request {
            method: method.into(),
            path: path.into(),
            headers: headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect(),
            wants_close: false,
            body: Vec::new(),
        }
    }

    fn view(guest: GuestId) -> GuestView {
        let mut spec = spec(guest);
        spec.user_data = Some("#!/bin/sh\n".into());
        GuestView { spec: Some(Arc::new(spec)), epoch: Epoch(3), ..GuestView::default() }
    }

    fn now(reply: Reply) -> Response {
        match reply {
            Reply::Now(response) => response,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn nothing_is_told_without_a_session_token_of_this_guest() {
        let (guest, other, sessions) = (GuestId::generate(), GuestId::generate(), Sessions::new());
        let view = view(guest);
        let ask = |headers: &[(&str, &str)]| {
            now(respond(&request("GET", "/latest/user-data", headers), guest, &view, &sessions, 0)).status
        };
        assert_eq!(ask(&[]), 401);
        assert_eq!(ask(&[(TOKEN, "1.2")]), 401);
        assert_eq!(ask(&[(TOKEN, &sessions.make(other, 60, 0))]), 401);
        let good = sessions.make(guest, 60, 0);
        assert_eq!(ask(&[(TOKEN, &good)]), 200);
        assert_eq!(ask(&[(TOKEN, &good), ("x-forwarded-for", "10.0.0.1")]), 403);
        let api = respond(&request("GET", "/supercloud/v1/token", &[(TOKEN, &good)]), guest, &view, &sessions, 0);
        assert_eq!(api, Reply::AskToken);
    }

    #[test]
    fn a_session_begins_with_put_and_a_bounded_life() {
        let (guest, sessions) = (GuestId::generate(), Sessions::new());
        let view = view(guest);
        let put =
            |ttl: &str| now(respond(&request("PUT", "/latest/api/token", &[(TTL, ttl)]), guest, &view, &sessions, 0));
        for bad in ["0", "21601", "x", "-1"] {
            assert_eq!(put(bad).status, 400, "{bad}");
        }
        let token = String::from_utf8(put("60").body).unwrap();
        assert!(sessions.is_good(&token, guest, 59_999));
        for method in ["POST", "DELETE", "CONNECT"] {
            let reply = respond(&request(method, "/latest/api/token", &[]), guest, &view, &sessions, 0);
            assert_eq!(now(reply).status, 405);
        }
    }

    #[test]
    fn a_guest_asks_for_its_own_move_and_nothing_else() {
        let (guest, sessions) = (GuestId::generate(), Sessions::new());
        let view = view(guest);
        let token = sessions.make(guest, 60, 0);
        let ask = |method: &str, path: &str, headers: &[(&str, &str)], body: &str| {
            let headers: Vec<(&str, &str)> = headers.iter().copied().chain([(TOKEN, token.as_str())]).collect();
            let request = Request { body: body.into(), ..request(method, path, &headers) };
            respond(&request, guest, &view, &sessions, 0)
        };
        let Reply::Ask(GuestCall::Migrate { wanted, idempotency_key }) =
            ask("POST", MIGRATE, &[("idempotency-key", "k1")], r#"{"to":"gcp-west"}"#)
        else {
            panic!("a move is asked for");
        };
        assert_eq!((wanted.to.as_str(), idempotency_key.as_str()), ("gcp-west", "k1"));
        let keyless = || match ask("POST", MIGRATE, &[], r#"{"to":"x"}"#) {
            Reply::Ask(GuestCall::Migrate { idempotency_key, .. }) => idempotency_key,
            other => panic!("{other:?}"),
        };
        assert_ne!(keyless(), keyless(), "two wishes are two");
        let long = "k".repeat(MAX_KEY_BYTES + 1);
        for (headers, body) in [
            (vec![], ""),
            (vec![], "{}"),
            (vec![], r#"{"to":"x","guest":"other"}"#),
            (vec![], "[[[[[[[["),
            (vec![("idempotency-key", "")], r#"{"to":"x"}"#),
            (vec![("idempotency-key", long.as_str())], r#"{"to":"x"}"#),
            (vec![("content-type", "text/plain")], r#"{"to":"x"}"#),
        ] {
            let response = now(ask("POST", MIGRATE, &headers, body));
            let problem: Problem = serde_json::from_slice(&response.body).unwrap();
            assert_eq!((response.status, problem.code), (400, Code::BadRequest), "{body}");
        }
        let operation = supercloud_ids::OperationId::generate();
        let path = format!("/supercloud/v1/operations/{operation}");
        assert_eq!(ask("GET", &path, &[], ""), Reply::Ask(GuestCall::Operation { operation }));
        assert_eq!(ask("GET", "/supercloud/v1/guest", &[], ""), Reply::Ask(GuestCall::Look));
        for (method, path, status) in [
            ("GET", MIGRATE, 405),
            ("POST", "/supercloud/v1/guest", 405),
            ("POST", "/supercloud/v1/operations/x/cancel", 405),
            ("GET", "/supercloud/v1/operations/x", 404),
            ("GET", "/supercloud/v1/hosts", 404),
        ] {
            let response = now(ask(method, path, &[], r#"{"to":"x"}"#));
            let problem: Problem = serde_json::from_slice(&response.body).unwrap();
            assert_eq!((response.status, problem.status), (status, status), "{method} {path}");
        }
        // Without the session token nothing, and what it says tells how to get one.
        let request = Request { body: br#"{"to":"x"}"#.to_vec(), ..request("POST", MIGRATE, &[]) };
        let response = now(respond(&request, guest, &view, &sessions, 0));
        let problem: Problem = serde_json::from_slice(&response.body).unwrap();
        assert_eq!((response.status, problem.code), (401, Code::Unauthenticated));
    }

    #[test]
    fn a_guest_reads_what_it_is() {
        let (guest, sessions) = (GuestId::generate(), Sessions::new());
        let view = view(guest);
        let token = sessions.make(guest, 60, 0);
        let get = |path: &str| {
            let response = now(respond(&request("GET", path, &[(TOKEN, &token)]), guest, &view, &sessions, 0));
            (response.status, String::from_utf8(response.body).unwrap())
        };
        assert_eq!(get("/latest/meta-data/instance-id"), (200, guest.to_string()));
        assert_eq!(get("/latest/meta-data/local-ipv4"), (200, "10.0.0.2".into()));
        assert!(get("/latest/meta-data/").1.contains("local-hostname"));
        let macs = "/latest/meta-data/network/interfaces/macs";
        assert_eq!(get(macs).1, "02:00:00:00:00:01/");
        assert_eq!(get(&format!("{macs}/02:00:00:00:00:01/local-ipv4s")).1, "10.0.0.2");
        assert_eq!(get("/latest/user-data").1, "#!/bin/sh\n");
        for nothing in ["/", "/latest/meta-data/iam", "/etc/passwd", "/latest/meta-data/../user-data"] {
            assert_eq!(get(nothing).0, 404, "{nothing}");
        }
    }
}
