//! Chunks of the controller's own store (images), for agents that show a ticket.

use std::{sync::Arc, time::Duration};

use supercloud_api::{
    Code, Problem,
    data::{Channel, Open, Opened, VERSION, kind},
    frame::{Frame, read_frame, write_frame},
    ids::HostId,
    ticket::Ticket,
    unix_ms,
};
use supercloud_storage::{
    backend::ObjectStore,
    peer::chunks::{ServedProjects, serve_chunks},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::SemaphorePermit,
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

/// How long the opening frame may take.
const OPENING_BUDGET: Duration = Duration::from_secs(15);

/// Serves chunks. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ChunkServer {
    store: Arc<dyn ObjectStore>,
    ticket_key: Arc<str>,
    certificate_sha256: Arc<str>,
}

impl ChunkServer {
    /// A server of `store`; `ticket_key` (hex) checks tickets, `certificate_sha256` (hex) is this side's own certificate.
    #[must_use]
    pub fn new(store: Arc<dyn ObjectStore>, ticket_key: &str, certificate_sha256: &str) -> Self {
        Self { store, ticket_key: ticket_key.into(), certificate_sha256: certificate_sha256.into() }
    }

    /// The project that a connection may ask for.
    fn admit(&self, host: HostId, peer_sha256: &str, open: &Open) -> Result<supercloud_api::ids::ProjectId, Problem> {
        let forbidden = |why: String| Problem::new(Code::Forbidden, why);
        let Channel::Chunks { project } = open.channel else {
            return Err(forbidden("the controller serves chunks only".into()));
        };
        let ticket =
            Ticket::verify(&open.ticket, &self.ticket_key, unix_ms()).map_err(|error| forbidden(error.to_string()))?;
        ticket.check_peer(&self.certificate_sha256, peer_sha256).map_err(|error| forbidden(error.to_string()))?;
        if ticket.project != project || ticket.destination.host != Some(host) || ticket.source.host.is_some() {
            return Err(forbidden("the ticket is for something else".into()));
        }
        Ok(project)
    }

    /// Serves one connection to its end.
    pub(super) async fn serve<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
        &self,
        host: HostId,
        peer_sha256: &str,
        mut stream: S,
        opening: SemaphorePermit<'_>,
        cancel: CancellationToken,
    ) {
        let opened = async {
            let open: Open = read_frame(&mut stream).await?.parse_json(kind::OPEN, VERSION)?;
            let admitted = self.admit(host, peer_sha256, &open);
            let answer = Opened { error: admitted.as_ref().err().cloned() };
            write_frame(&mut stream, &Frame::json(kind::OPENED, VERSION, &answer)?).await?;
            Ok::<_, supercloud_api::frame::FrameError>(admitted)
        };
        let opened = tokio::select! {
            opened = tokio::time::timeout(OPENING_BUDGET, opened) => opened,
            () = cancel.cancelled() => return,
        };
        let admitted = match opened {
            Ok(Ok(Ok(project))) => project,
            Ok(Ok(Err(problem))) => return debug!(%host, "no chunks: {problem}"),
            Ok(Err(error)) => return debug!(%host, "no chunks: {error}"),
            Err(_) => return debug!(%host, "no chunks: the opening took too long"),
        };
        drop(opening);
        let projects = ServedProjects::default();
        projects.add(admitted);
        if let Err(error) = serve_chunks(Arc::clone(&self.store), projects, stream, &cancel).await {
            debug!(%host, "the chunk connection ended: {error}");
        }
    }
}
