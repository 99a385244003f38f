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
//! | `GET /supercloud/v1/guest` | how it stands: name, state, host, cloud |
//! | `POST /supercloud/v1/guest/migrate` | begins its own live move |
//! | `GET /supercloud/v1/operations/{id}` | one of its own operations |
//! | `GET /supercloud/v1/token` | a token of the API, for this guest only |
//!
//! What the controller must answer goes to it as a typed query of this host for this guest ([`GuestCall`]), never as the guest's own
//! bytes; each guest has a share of that ([`share`]).

mod answer;
mod http;
mod session;
mod share;

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use supercloud_api::{
    Code, Problem,
    guest_call::GuestCall,
    link::{Answer, Query},
    unix_ms,
};
use supercloud_ids::{Epoch, GuestId, PortId};
use supercloud_sdn::compile::{MD_LISTEN, METADATA_TCP_PORT, md_ofport};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use self::{
    answer::{Reply, respond},
    http::{Request, Response},
    session::Sessions,
    share::{Kept, Share, Shares, Token},
};
use crate::{guest::GuestView, guests::Guests, host::Host, link::QueryError};

/// Connections at once, of all guests.
const CONNECTIONS: usize = 128;
/// Connections of one guest at once.
const CONNECTIONS_PER_GUEST: usize = 8;
/// Requests on one connection.
const REQUESTS: usize = 100;
/// How long a request may take to come, and an answer to leave.
const IO_BUDGET: Duration = Duration::from_secs(10);
/// How long the controller may take to answer.
const CALL_BUDGET: Duration = Duration::from_secs(15);
/// The same while there is no link to it: it may come back at any moment.
const AWAY_BUDGET: Duration = Duration::from_secs(2);
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
    let service = Arc::new(Service { host, guests, sessions: Sessions::new(), shares: Shares::default() });
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
        let Some((port, guest)) = service.who(from.ip()).await else { continue };
        let count = per_guest.entry(guest).or_default();
        if *count >= CONNECTIONS_PER_GUEST || connections.len() >= CONNECTIONS {
            continue;
        }
        *count += 1;
        let service = service.clone();
        connections.spawn(async move {
            if let Err(error) = service.converse(port, guest, stream).await {
                tracing::debug!(%guest, %error, "a metadata connection ended");
            }
            guest
        });
    }
}

/// What all connections share.
struct Service {
    host: Arc<Host>,
    guests: Arc<Guests>,
    sessions: Sessions,
    shares: Shares,
}

async fn port_of(switch: &dyn crate::ports::Switch, from: Ipv4Addr) -> Option<PortId> {
    let ofport = md_ofport(from)?;
    let attached = switch.attached().await.ok()?;
    attached.into_iter().find(|(_, (_, number))| *number == ofport).map(|(port, _)| port)
}

impl Service {
    /// The port and the guest behind an address of the switch.
    async fn who(&self, from: IpAddr) -> Option<(PortId, GuestId)> {
        let IpAddr::V4(from) = from else { return None };
        let port = port_of(&*self.host.switch, from).await?;
        Some((port, self.view(port)?.0))
    }

    fn view(&self, port: PortId) -> Option<(GuestId, GuestView)> {
        let view = self.guests.of_port(port)?;
        let guest = view.report.as_ref()?.guest;
        Some((guest, view))
    }

    async fn converse(&self, port: PortId, guest: GuestId, mut stream: TcpStream) -> std::io::Result<()> {
        let mut buffer = Vec::new();
        for _ in 0..REQUESTS {
            let read = timeout(IO_BUDGET, http::read(&mut stream, &mut buffer)).await;
            // As it is now: the connection may be older than the guest's epoch.
            let view = self.view(port).filter(|(now, _)| *now == guest);
            let (response, is_last) = match (read, view) {
                (Err(_) | Ok(Ok(None)), _) | (_, None) => return Ok(()),
                (Ok(Ok(Some(request))), Some((_, view))) => {
                    (self.decide(guest, &view, &request).await, request.wants_close)
                }
                (Ok(Err(http::HttpError::Io(error))), _) => return Err(error),
                (Ok(Err(http::HttpError::Refused(status))), _) => (Response::error(status), true),
            };
            let bytes = response.bytes(is_last);
            timeout(IO_BUDGET, stream.write_all(&bytes)).await.map_err(|_| std::io::ErrorKind::TimedOut)??;
            if is_last {
                break;
            }
        }
        stream.shutdown().await
    }

    async fn decide(&self, guest: GuestId, view: &GuestView, request: &Request) -> Response {
        let asked = match respond(request, guest, view, &self.sessions, unix_ms()) {
            Reply::Now(response) => return response,
            Reply::AskToken => None,
            Reply::Ask(call) => Some(call),
        };
        let now = Instant::now();
        let share = self.shares.of(guest, now);
        let answered = if share.take(now) {
            match asked {
                Some(call) => self.call(&share, guest, view.epoch, call).await,
                None => self.token(&share, guest, view.epoch).await,
            }
        } else {
            Err(Problem::new(Code::TooManyRequests, "this guest asks too often; try again in a second"))
        };
        answered.unwrap_or_else(|problem| {
            tracing::debug!(%guest, %problem, "a guest's call is refused");
            Response::problem(&problem)
        })
    }

    async fn call(&self, share: &Share, guest: GuestId, epoch: Epoch, call: GuestCall) -> Result<Response, Problem> {
        let is_accepted = matches!(call, GuestCall::Migrate { .. });
        match self.ask(share, Query::GuestCall { guest, epoch, call }).await? {
            Answer::GuestStanding { standing } => Ok(Response::json(&json(&standing)?)),
            Answer::GuestOperation { operation } => {
                let response = Response::json(&json(&operation)?);
                Ok(match is_accepted {
                    true => response.accepted(format!("/supercloud/v1/operations/{}", operation.id)),
                    false => response,
                })
            }
            _ => Err(strange()),
        }
    }

    async fn token(&self, share: &Share, guest: GuestId, epoch: Epoch) -> Result<Response, Problem> {
        // Held over the query: two who ask at once get one token, for a second one would end the first.
        let mut kept = share.token.lock().await;
        match share::token(kept.as_ref(), epoch, Instant::now()) {
            Token::Kept(body) => return Ok(Response::json(&body)),
            Token::TooSoon => {
                let detail = "the last token was made less than a minute ago";
                return Err(Problem::new(Code::TooManyRequests, detail));
            }
            Token::Mint => {}
        }
        match self.ask(share, Query::GuestToken { guest, epoch }).await? {
            Answer::GuestToken { secret, api_url, ca_pem, life_ms } => {
                let body = serde_json::json!({ "secret": secret, "api_url": api_url, "ca_pem": ca_pem });
                let response = Response::json(&body);
                *kept = Some(Kept { epoch, body, since: Instant::now(), life: Duration::from_millis(life_ms) });
                Ok(response)
            }
            _ => Err(strange()),
        }
    }

    /// Asks the controller for a guest.
    async fn ask(&self, share: &Share, query: Query) -> Result<Answer, Problem> {
        let Ok(_place) = share.open.try_acquire() else {
            return Err(Problem::new(Code::TooManyRequests, "other calls of this guest wait for their answers"));
        };
        let is_linked = *self.host.link.connected().borrow();
        let budget = if is_linked { CALL_BUDGET } else { AWAY_BUDGET };
        self.host.link.query(query, budget).await.map_err(|error| match error {
            QueryError::Refused(problem) => problem,
            QueryError::Busy => Problem::new(Code::TooManyRequests, "the host is busy; try again in a second"),
            QueryError::Deadline => Problem::new(
                Code::StoreUnavailable,
                "the controller cannot be reached now; the guest runs on. Nothing is known of the outcome: try again with the \
                 same Idempotency-Key",
            ),
        })
    }
}

fn json(value: &impl serde::Serialize) -> Result<serde_json::Value, Problem> {
    serde_json::to_value(value).map_err(|error| Problem::new(Code::Internal, error.to_string()))
}

fn strange() -> Problem {
    Problem::new(Code::Internal, "the controller answered something else")
}
