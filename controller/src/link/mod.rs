//! The agents' end of the world: one TLS listener for agent links and for chunks, told apart by ALPN.
//!
//! Each agent link is one session with two tasks' worth of work in one task group: a reader that hands every notice to the
//! [`LinkHandler`] in order and every query beside it (a bounded number at once), and a writer that owns the sending half. Nothing a peer sends can exhaust the controller:
//! frames are at most 1 MiB, handshakes and hellos have deadlines, outbound queues are bounded (a peer that does not
//! drain its queue is dropped and comes back), and a newer connection of a host replaces the older one.

mod chunks;
mod reach_out;
mod session;

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::future::BoxFuture;
use supercloud_api::{
    Problem,
    ids::HostId,
    link::{Answer, Directive, Hello, Notice, Query, Welcome},
    tls,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub use chunks::ChunkServer;
pub use reach_out::{AgentDial, Caller, CallerError};

/// How long a handshake and the first frame may take.
const OPENING_BUDGET: Duration = Duration::from_secs(15);
/// Connections that may be in their opening at once: strangers cannot hold more.
const OPENINGS_AT_ONCE: usize = 64;
/// Directives that may wait for a slow agent.
const OUTBOUND_AT_MOST: usize = 1024;

/// Why a host's hello is not answered by a welcome.
#[derive(Debug)]
pub enum Unwelcome {
    /// It may try again; it is told nothing.
    Refused(Problem),
    /// An operator has removed it: it is told so, in order that its copies of guests end.
    Removed(Problem),
}

impl From<Problem> for Unwelcome {
    fn from(problem: Problem) -> Self {
        Self::Refused(problem)
    }
}

/// What the link needs of the rest of the controller.
pub trait LinkHandler: Send + Sync + 'static {
    /// Whether a host that shows a certificate of our CA still belongs to us: certificates outlive a removal.
    fn is_member(&self, host: HostId) -> BoxFuture<'_, bool>;
    /// A host has dialled in and its certificate names it. An error ends the connection.
    fn hello(
        &self,
        host: HostId,
        certificate_sha256: String,
        hello: Hello,
    ) -> BoxFuture<'_, Result<Welcome, Unwelcome>>;
    /// The session is open: what must be told again may be sent now.
    fn opened(&self, host: HostId) -> BoxFuture<'_, ()>;
    /// The agent tells something.
    fn notice(&self, host: HostId, notice: Notice) -> BoxFuture<'_, ()>;
    /// The agent asks something.
    fn query(&self, host: HostId, query: Query) -> BoxFuture<'_, Result<Answer, Problem>>;
    /// The host's last session ended.
    fn closed(&self, host: HostId) -> BoxFuture<'_, ()>;
}

/// A session as others see it.
#[derive(Debug)]
struct Handle {
    serial: u64,
    directives: mpsc::Sender<Directive>,
    overlay: watch::Sender<Option<(u64, serde_json::Value)>>,
    cancel: CancellationToken,
}

/// The open sessions. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Sessions(Arc<Mutex<Open>>);

#[derive(Debug, Default)]
struct Open {
    by_host: HashMap<HostId, Handle>,
    next_serial: u64,
}

impl Sessions {
    fn with<T>(&self, work: impl FnOnce(&mut Open) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether a host's agent is connected.
    #[must_use]
    pub fn is_open(&self, host: HostId) -> bool {
        self.with(|open| open.by_host.contains_key(&host))
    }

    /// The hosts that are connected, each with the serial of its session: a new one after every reconnect.
    #[must_use]
    pub fn hosts(&self) -> Vec<(HostId, u64)> {
        self.with(|open| open.by_host.iter().map(|(host, handle)| (*host, handle.serial)).collect())
    }

    /// Sends a directive if the host is connected. What is lost here is told again: orders are repeated.
    pub fn send(&self, host: HostId, directive: Directive) -> bool {
        self.with(|open| {
            let Some(handle) = open.by_host.get(&host) else { return false };
            match directive {
                // Only the newest view matters.
                Directive::Overlay { revision, view } => {
                    handle.overlay.send_replace(Some((revision, view)));
                    true
                }
                // An agent that reads nothing is found out by the time that one frame takes; a full queue alone only means that
                // there is much to say, and all of it is said again.
                other => {
                    let is_sent = handle.directives.try_send(other).is_ok();
                    if !is_sent {
                        debug!(%host, "too much waits for the agent; a directive is left out until it is repeated");
                    }
                    is_sent
                }
            }
        })
    }

    /// As [`Sessions::send`], but waits for room. False when the session ended.
    pub async fn send_waiting(&self, host: HostId, directive: Directive) -> bool {
        let queue = self.with(|open| open.by_host.get(&host).map(|handle| handle.directives.clone()));
        match queue {
            Some(queue) => queue.send(directive).await.is_ok(),
            None => false,
        }
    }

    /// Ends a host's session, for a removed host.
    pub fn drop_host(&self, host: HostId) {
        self.with(|open| {
            if let Some(handle) = open.by_host.get(&host) {
                handle.cancel.cancel();
            }
        });
    }

    fn open(&self, host: HostId, cancel: CancellationToken) -> (u64, session::Outbound) {
        let (directives, directives_out) = mpsc::channel(OUTBOUND_AT_MOST);
        let (overlay, overlay_out) = watch::channel(None);
        self.with(|open| {
            open.next_serial += 1;
            let serial = open.next_serial;
            if let Some(older) = open.by_host.insert(host, Handle { serial, directives, overlay, cancel }) {
                older.cancel.cancel();
            }
            (serial, session::Outbound { directives: directives_out, overlay: overlay_out })
        })
    }

    /// A session that nobody has dialled; what is sent to it.
    #[cfg(test)]
    pub(crate) fn open_for_tests(&self, host: HostId) -> mpsc::Receiver<Directive> {
        self.open(host, CancellationToken::new()).1.directives
    }

    /// Forgets a session; true when it was the host's newest.
    fn close(&self, host: HostId, serial: u64) -> bool {
        self.with(|open| {
            let is_newest = open.by_host.get(&host).is_some_and(|handle| handle.serial == serial);
            if is_newest {
                open.by_host.remove(&host);
            }
            is_newest
        })
    }
}

/// What every connection shares.
struct Shared {
    acceptor: tokio_rustls::TlsAcceptor,
    sessions: Sessions,
    handler: Arc<dyn LinkHandler>,
    chunks: ChunkServer,
    openings: Semaphore,
}

/// Takes connections until cancelled; returns when all of them have ended.
pub async fn serve(
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    sessions: Sessions,
    handler: Arc<dyn LinkHandler>,
    chunks: ChunkServer,
    cancel: CancellationToken,
) {
    let shared = Arc::new(Shared {
        acceptor: tls.into(),
        sessions,
        handler,
        chunks,
        openings: Semaphore::new(OPENINGS_AT_ONCE),
    });
    // Dropped with this future: no connection outlives its listener.
    let mut tasks = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = tasks.join_next() => continue,
            () = cancel.cancelled() => break,
        };
        match accepted {
            Ok((stream, from)) => {
                let (shared, end) = (Arc::clone(&shared), cancel.clone());
                tasks.spawn(async move { connection(&shared, stream, from, &end).await });
            }
            Err(error) => {
                // Out of descriptors, most likely: give others the time to close.
                warn!("the link listener cannot accept: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    while tasks.join_next().await.is_some() {}
}

/// One connection from its first byte to its last. `end`: the listener ends.
async fn connection(shared: &Shared, stream: TcpStream, from: SocketAddr, end: &CancellationToken) {
    let Ok(opening) = shared.openings.try_acquire() else {
        debug!(%from, "too many connections are being opened; dropped");
        return;
    };
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%from, "no TCP_NODELAY: {error}");
    }
    let shaken = tokio::select! {
        shaken = tokio::time::timeout(OPENING_BUDGET, shared.acceptor.accept(stream)) => shaken,
        () = end.cancelled() => return,
    };
    let stream = match shaken {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return debug!(%from, "the TLS handshake failed: {error}"),
        Err(_) => return debug!(%from, "the TLS handshake took too long"),
    };
    let (_, tls) = stream.get_ref();
    let Some(certificate) = tls.peer_certificates().and_then(<[_]>::first) else { return };
    let Some(host) = tls::host_of_certificate(certificate) else {
        return warn!(%from, "a certificate of our CA names no host");
    };
    let fingerprint = tls::fingerprint(certificate);
    let is_data = tls.alpn_protocol() == Some(tls::ALPN_DATA);
    let is_agent = tls.alpn_protocol() == Some(tls::ALPN_AGENT);
    if is_data {
        if !shared.handler.is_member(host).await {
            return debug!(%from, %host, "no member (any more)");
        }
        shared.chunks.serve(host, &fingerprint, stream, opening, end.clone()).await;
    } else if is_agent {
        let serial = session::run(shared, host, fingerprint, stream, opening, end.child_token()).await;
        if let Some(serial) = serial
            && shared.sessions.close(host, serial)
            // The end of this side is not the agent's.
            && !end.is_cancelled()
        {
            info!(%host, "agent disconnected");
            shared.handler.closed(host).await;
        }
    } else {
        debug!(%from, %host, "no protocol of ours");
    }
}
