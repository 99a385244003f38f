//! The metadata service: what a guest may ask its host at 169.254.169.254, and nothing else.
//!
//! It listens on the switch's internal port; the switch rewrites a guest's source address to one that names its switch port
//! ([`supercloud_sdn::compile::md_addr`]), so the guest is known by where it is plugged in, whatever it says. As with EC2's
//! IMDSv2, every answer wants a session token that was asked for by `PUT`, and a request that came through a proxy is refused: a
//! server inside a guest that can be talked into fetching URLs gives nothing away.
//!
//! | request | answer |
//! |---|---|
//! | `PUT /latest/api/token` | a session token |
//! | `GET /latest/meta-data/…` | `instance-id`, `local-hostname`, `local-ipv4`, `mac`, … as EC2 lays them out |
//! | `GET /latest/user-data` | the guest's user-data |
//! | `GET /supercloud/v1/guest` | id, name, epoch |
//! | `GET /supercloud/v1/token` | a token of the API, for this guest only |

mod answer;
mod http;
mod session;

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use supercloud_api::{
    link::{Answer, Query},
    unix_ms,
};
use supercloud_ids::GuestId;
use supercloud_sdn::compile::{MD_LISTEN, METADATA_TCP_PORT, md_ofport};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use self::{
    answer::{Reply, respond},
    http::{Request, Response},
    session::Sessions,
};
use crate::{guest::GuestView, guests::Guests, host::Host};

/// Connections at once, of all guests.
const CONNECTIONS: usize = 128;
/// Connections of one guest at once.
const CONNECTIONS_PER_GUEST: usize = 8;
/// Requests on one connection.
const REQUESTS: usize = 100;
/// How long a request may take to come, and an answer to leave.
const IO_BUDGET: Duration = Duration::from_secs(10);
/// How long the controller may take to give a token.
const TOKEN_BUDGET: Duration = Duration::from_secs(15);
/// The pause after the address could not be had: the switch is not there yet.
const BIND_RETRY: Duration = Duration::from_secs(3);

/// Serves guests until `cancel`.
pub async fn serve(host: Arc<Host>, guests: Arc<Guests>, cancel: CancellationToken) {
    if host.config.overlay_address.is_none() || host.config.ovs.metadata_port.is_empty() {
        return;
    }
    let address = SocketAddr::from((MD_LISTEN, METADATA_TCP_PORT));
    let mut is_told = false;
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) => {
                if !std::mem::replace(&mut is_told, true) {
                    tracing::warn!(%address, %error, "the metadata service has no address yet");
                }
                tokio::select! {
                    () = cancel.cancelled() => return,
                    () = tokio::time::sleep(BIND_RETRY) => {}
                }
            }
        }
    };
    let sessions = Arc::new(Sessions::new());
    let mut connections: JoinSet<GuestId> = JoinSet::new();
    let mut per_guest: HashMap<GuestId, usize> = HashMap::new();
    loop {
        let accepted = tokio::select! {
            () = cancel.cancelled() => return,
            Some(ended) = connections.join_next() => {
                if let Ok(guest) = ended
                    && let Some(count) = per_guest.get_mut(&guest)
                {
                    *count = count.saturating_sub(1);
                }
                per_guest.retain(|_, count| *count > 0);
                continue;
            }
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, from)) = accepted else {
            tokio::time::sleep(Duration::from_millis(200)).await;
            continue;
        };
        let Some((guest, view)) = who(&host, &guests, from.ip()).await else { continue };
        let count = per_guest.entry(guest).or_default();
        if *count >= CONNECTIONS_PER_GUEST || connections.len() >= CONNECTIONS {
            continue;
        }
        *count += 1;
        let (host, sessions) = (host.clone(), sessions.clone());
        connections.spawn(async move {
            if let Err(error) = converse(&host, &sessions, guest, &view, stream).await {
                tracing::debug!(%guest, %error, "a metadata connection ended");
            }
            guest
        });
    }
}

/// The guest behind an address of the switch.
async fn who(host: &Host, guests: &Guests, from: IpAddr) -> Option<(GuestId, GuestView)> {
    let IpAddr::V4(from) = from else { return None };
    let port = port_of(&*host.switch, from).await?;
    let view = guests.of_port(port)?;
    let guest = view.report.as_ref()?.guest;
    Some((guest, view))
}

async fn port_of(switch: &dyn crate::ports::Switch, from: Ipv4Addr) -> Option<supercloud_ids::PortId> {
    let ofport = md_ofport(from)?;
    let attached = switch.attached().await.ok()?;
    attached.into_iter().find(|(_, (_, number))| *number == ofport).map(|(port, _)| port)
}

async fn converse(
    host: &Host,
    sessions: &Sessions,
    guest: GuestId,
    view: &GuestView,
    mut stream: TcpStream,
) -> std::io::Result<()> {
    let mut buffer = Vec::new();
    for _ in 0..REQUESTS {
        let read = timeout(IO_BUDGET, http::read(&mut stream, &mut buffer)).await;
        let (response, is_last) = match read {
            Err(_) => return Ok(()),
            Ok(Ok(None)) => return Ok(()),
            Ok(Ok(Some(request))) => {
                let is_last = request.wants_close;
                (decide(host, sessions, guest, view, &request).await, is_last)
            }
            Ok(Err(http::HttpError::Io(error))) => return Err(error),
            Ok(Err(http::HttpError::Refused(status))) => (Response::error(status), true),
        };
        let bytes = response.bytes(is_last);
        timeout(IO_BUDGET, stream.write_all(&bytes)).await.map_err(|_| std::io::ErrorKind::TimedOut)??;
        if is_last {
            break;
        }
    }
    stream.shutdown().await
}

async fn decide(host: &Host, sessions: &Sessions, guest: GuestId, view: &GuestView, request: &Request) -> Response {
    match respond(request, guest, view, sessions, unix_ms()) {
        Reply::Now(response) => response,
        Reply::AskToken => {
            let query = Query::GuestToken { guest, epoch: view.epoch };
            match host.link.query(query, TOKEN_BUDGET).await {
                Ok(Answer::GuestToken { secret, api_url, ca_pem }) => {
                    let body = serde_json::json!({ "secret": secret, "api_url": api_url, "ca_pem": ca_pem });
                    Response::json(&body)
                }
                Ok(_) => Response::error(502),
                Err(error) => {
                    tracing::info!(%guest, error = crate::chain(&error), "a guest gets no token");
                    Response::error(503)
                }
            }
        }
    }
}
