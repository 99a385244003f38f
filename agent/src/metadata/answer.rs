//! What a request means: pure.

use supercloud_ids::GuestId;

use super::{
    http::{Request, Response},
    session::{MAX_SECONDS, Sessions},
};
use crate::guest::GuestView;

/// The header in which a session token comes.
const TOKEN: &str = "x-aws-ec2-metadata-token";
/// The header in which its life is asked for.
const TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";

/// What is to be answered.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// This.
    Now(Response),
    /// What the controller gives for a token of the API.
    AskToken,
}

/// Decides about a request of `guest`.
pub fn respond(request: &Request, guest: GuestId, view: &GuestView, sessions: &Sessions, now_ms: u64) -> Reply {
    if ["x-forwarded-for", "forwarded", "via"].iter().any(|name| request.header(name).is_some()) {
        return Reply::Now(Response::error(403));
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
        ("GET", _) => {}
        _ => return Reply::Now(Response::error(405)),
    }
    if !request.header(TOKEN).is_some_and(|token| sessions.is_good(token, guest, now_ms)) {
        return Reply::Now(Response::error(401));
    }
    if path == "/supercloud/v1/token" {
        return Reply::AskToken;
    }
    Reply::Now(content(path, guest, view).unwrap_or_else(|| Response::error(404)))
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
        "/supercloud/v1/guest" => {
            Some(Response::json(&serde_json::json!({ "id": guest, "name": name, "epoch": view.epoch })))
        }
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
            Reply::AskToken => panic!("a token is asked for"),
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
