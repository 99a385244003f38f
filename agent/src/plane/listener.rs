//! The listening side: TLS, the opening frame, admission, and then to whoever the connection is for.

use std::{collections::HashMap, net::IpAddr, sync::Arc, time::Duration};

use supercloud_api::{
    data::{self, Open, kind},
    frame::read_frame,
    tls, unix_ms,
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::{
    DataPlane, DataStream, Incoming, OPEN_BUDGET,
    admission::{Live, admit},
    fingerprint,
};
use crate::socket;

/// Connections that may be in their handshake at once.
const MAX_HANDSHAKES: usize = 256;
/// Of these, from one address: a stranger that keeps connections open keeps nobody else out.
const MAX_HANDSHAKES_OF_ONE: usize = 16;

/// Where admitted connections go.
pub trait Router: Send + Sync {
    /// Takes an admitted connection, or refuses it. Must not block.
    fn route(&self, incoming: Incoming);
}

/// Serves the data plane's listener until `cancel`.
pub async fn listen(plane: DataPlane, listener: TcpListener, router: Arc<dyn Router>, cancel: CancellationToken) {
    let mut handshakes: JoinSet<IpAddr> = JoinSet::new();
    let mut from_address: HashMap<IpAddr, usize> = HashMap::new();
    loop {
        let accepted = tokio::select! {
            () = cancel.cancelled() => return,
            Some(ended) = handshakes.join_next() => {
                if let Ok(from) = ended
                    && let Some(count) = from_address.get_mut(&from)
                {
                    *count -= 1;
                }
                from_address.retain(|_, count| *count > 0);
                continue;
            }
            accepted = listener.accept() => accepted,
        };
        let (tcp, from) = match accepted {
            Ok((tcp, from)) => (tcp, from.ip()),
            Err(error) => {
                // Out of descriptors, most likely: it gets better by itself.
                tracing::warn!(%error, "cannot take a data connection");
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        let count = from_address.entry(from).or_default();
        if *count >= MAX_HANDSHAKES_OF_ONE || handshakes.len() >= MAX_HANDSHAKES {
            tracing::debug!(%from, "too many connections are being opened; one is closed");
            from_address.retain(|_, count| *count > 0);
            continue;
        }
        *count += 1;
        let (plane, router) = (plane.clone(), router.clone());
        handshakes.spawn(async move {
            match timeout(OPEN_BUDGET, open(&plane, tcp)).await {
                Ok(Ok(incoming)) => router.route(incoming),
                Ok(Err(error)) => tracing::debug!(%from, %error, "a data connection did not open"),
                Err(_) => tracing::debug!(%from, "a data connection did not open in time"),
            }
            from
        });
    }
}

#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error("TLS: {0}")]
    Tls(#[from] std::io::Error),
    #[error("{0}")]
    Frame(#[from] supercloud_api::frame::FrameError),
    #[error("no certificate was shown")]
    NoCertificate,
    #[error("refused: {0}")]
    Refused(String),
}

async fn open(plane: &DataPlane, tcp: TcpStream) -> Result<Incoming, OpenError> {
    socket::watch_over(&tcp)?;
    let material = plane.material.borrow().clone();
    let stream = TlsAcceptor::from(material.serve.clone()).accept(tcp).await?;
    let mut stream = DataStream::from(stream);
    let peer = {
        let (_, session) = stream.get_ref();
        let leaf = session.peer_certificates().and_then(|chain| chain.first()).ok_or(OpenError::NoCertificate)?;
        Live { host: tls::host_of_certificate(leaf), certificate_sha256: tls::fingerprint(leaf) }
    };
    debug_assert_eq!(fingerprint(&stream).as_ref(), Some(&peer.certificate_sha256));
    let me = Live { host: Some(plane.host), certificate_sha256: material.fingerprint.clone() };
    let body: Open = read_frame(&mut stream).await?.parse_json(kind::OPEN, data::VERSION)?;
    let key = plane.ticket_key.borrow().clone();
    match admit(&body, key.as_deref(), unix_ms(), &me, &peer) {
        Ok((ticket, role)) => Ok(Incoming { ticket, role, channel: body.channel, stream }),
        Err(problem) => {
            let detail = problem.detail.clone();
            // Whether the peer hears it does not matter.
            let _ = super::answer(&mut stream, Some(problem)).await;
            Err(OpenError::Refused(detail))
        }
    }
}
