//! The listening side: TLS, the opening frame, admission, and then to whoever the connection is for.

use std::{sync::Arc, time::Duration};

use supercloud_api::{
    data::{self, Open, kind},
    frame::read_frame,
    tls, unix_ms,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
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

/// Connections that may be in their handshake at once; more wait in the system's queue.
const MAX_HANDSHAKES: usize = 64;

/// Where admitted connections go.
pub trait Router: Send + Sync {
    /// Takes an admitted connection, or refuses it. Must not block.
    fn route(&self, incoming: Incoming);
}

/// Serves the data plane's listener until `cancel`.
pub async fn listen(plane: DataPlane, listener: TcpListener, router: Arc<dyn Router>, cancel: CancellationToken) {
    let slots = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    let mut handshakes = JoinSet::new();
    loop {
        let slot = tokio::select! {
            () = cancel.cancelled() => return,
            slot = slots.clone().acquire_owned() => slot,
        };
        let accepted = tokio::select! {
            () = cancel.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        while handshakes.try_join_next().is_some() {}
        match accepted {
            Ok((tcp, from)) => {
                let (plane, router) = (plane.clone(), router.clone());
                handshakes.spawn(async move {
                    let _slot = slot;
                    match timeout(OPEN_BUDGET, open(&plane, tcp)).await {
                        Ok(Ok(incoming)) => router.route(incoming),
                        Ok(Err(error)) => tracing::debug!(%from, %error, "a data connection did not open"),
                        Err(_) => tracing::debug!(%from, "a data connection did not open in time"),
                    }
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: it gets better by itself.
                tracing::warn!(%error, "cannot take a data connection");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
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
