//! The data plane: TLS connections between agents, one per channel ([`supercloud_api::data`]).
//!
//! ```text
//!   listener ── TLS, Open ──> admission (pure) ──> Incoming ──> the guest's task ──> accept / refuse
//!   DataPlane::dial ── TLS, Open, Opened ──> DataStream
//!   meeting: the two agents of one operation, whoever can dial; bridge: TLS <-> unix socket
//! ```

pub mod admission;
pub mod bridge;
mod listener;
pub mod meeting;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use rustls::{
    DigitallySignedStruct, Error as TlsError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use supercloud_api::{
    Code, Problem,
    data::{self, Channel, Open, Opened, kind},
    frame::{Frame, FrameError, read_frame, write_frame},
    link::{ChunkSource, Peer},
    ticket::Ticket,
    tls,
};
use supercloud_ids::HostId;
use tokio::{net::TcpStream, sync::watch, time::timeout};
use tokio_rustls::TlsConnector;

pub use listener::{Router, listen};

use crate::{identity::Material, socket};

/// How long TCP, TLS and the opening frames may take, each way.
pub const OPEN_BUDGET: Duration = Duration::from_secs(15);

/// A connection of the data plane after its opening frames.
pub type DataStream = tokio_rustls::TlsStream<TcpStream>;

/// Why a channel could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum PlaneError {
    /// The other side cannot be reached.
    #[error("cannot reach {peer} at {address}")]
    Dial {
        /// Who.
        peer: String,
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It has no address that can be dialled, and neither has this host.
    #[error("neither {0} nor this host has an address that the other can dial (data_address)")]
    NoAddress(String),
    /// The certificate that answered is not the one that was named.
    #[error("{peer} shows another certificate than the controller named")]
    OtherCertificate {
        /// Who.
        peer: String,
    },
    /// The opening frames went wrong.
    #[error("opening a channel to {peer} broke")]
    Frame {
        /// Who.
        peer: String,
        /// How.
        #[source]
        source: FrameError,
    },
    /// It did not answer.
    #[error("{peer} did not answer in time")]
    Deadline {
        /// Who.
        peer: String,
    },
    /// It refuses.
    #[error("{peer} refuses the channel")]
    Refused {
        /// Who.
        peer: String,
        /// Why.
        #[source]
        problem: Problem,
    },
    /// The meeting is over.
    #[error("the operation's connection is over")]
    Over,
}

/// What the data plane must know; cheap to clone.
#[derive(Clone)]
pub struct DataPlane {
    /// This host.
    pub host: HostId,
    /// Where others can dial this host.
    pub address: Option<SocketAddr>,
    /// The newest identity.
    pub material: watch::Receiver<Arc<Material>>,
    /// The controller's ticket key, hex; none before the first welcome.
    pub ticket_key: watch::Receiver<Option<String>>,
}

impl DataPlane {
    /// Opens a channel to another agent.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn dial(&self, peer: &Peer, ticket: &str, channel: Channel) -> Result<DataStream, PlaneError> {
        let name = peer.name.to_string();
        let address = peer.data_address.ok_or_else(|| PlaneError::NoAddress(name.clone()))?;
        let config = self.material.borrow().dial.clone();
        let target = Target {
            name,
            address,
            server_name: tls::host_server_name(peer.host),
            certificate_sha256: &peer.certificate_sha256,
        };
        open(config, target, Open { ticket: ticket.to_owned(), channel }).await
    }

    /// Opens a chunk channel.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn dial_chunks(
        &self,
        source: &ChunkSource,
        project: supercloud_ids::ProjectId,
    ) -> Result<DataStream, PlaneError> {
        // A chunk source is named by address and certificate alone: the very certificate must answer.
        let config = pinned(&self.material.borrow().dial, &source.certificate_sha256);
        let target = Target {
            name: format!("the chunk source {}", source.address),
            address: source.address,
            // Only a word for the handshake; what answers is checked by its certificate.
            server_name: tls::controller_server_name(),
            certificate_sha256: &source.certificate_sha256,
        };
        open(config, target, Open { ticket: source.ticket.clone(), channel: Channel::Chunks { project } }).await
    }
}

struct Target<'a> {
    name: String,
    address: SocketAddr,
    server_name: ServerName<'static>,
    certificate_sha256: &'a str,
}

async fn open(config: Arc<rustls::ClientConfig>, target: Target<'_>, body: Open) -> Result<DataStream, PlaneError> {
    let Target { name, address, server_name, certificate_sha256 } = target;
    let peer = || name.clone();
    let dial = |source| PlaneError::Dial { peer: name.clone(), address, source };
    let work = async {
        let tcp = TcpStream::connect(address).await.map_err(dial)?;
        socket::watch_over(&tcp).map_err(dial)?;
        let stream = TlsConnector::from(config).connect(server_name, tcp).await.map_err(dial)?;
        let mut stream = DataStream::from(stream);
        if fingerprint(&stream).as_deref() != Some(certificate_sha256) {
            return Err(PlaneError::OtherCertificate { peer: peer() });
        }
        let frame = |source| PlaneError::Frame { peer: name.clone(), source };
        let open = Frame::json(kind::OPEN, data::VERSION, &body).map_err(frame)?;
        write_frame(&mut stream, &open).await.map_err(frame)?;
        let opened: Opened = read_frame(&mut stream)
            .await
            .and_then(|answer| answer.parse_json(kind::OPENED, data::VERSION))
            .map_err(frame)?;
        match opened.error {
            None => Ok(stream),
            Some(problem) => Err(PlaneError::Refused { peer: peer(), problem }),
        }
    };
    timeout(OPEN_BUDGET, work).await.map_err(|_| PlaneError::Deadline { peer: peer() })?
}

/// SHA-256 of the certificate that the peer showed in the handshake, hex.
fn fingerprint(stream: &DataStream) -> Option<String> {
    let (_, session) = stream.get_ref();
    session.peer_certificates().and_then(|chain| chain.first()).map(tls::fingerprint)
}

/// A connection that another agent has opened, admitted but not answered yet.
pub struct Incoming {
    /// What permits it.
    pub ticket: Ticket,
    /// What this host is by the ticket.
    pub role: admission::Role,
    /// What it is for.
    pub channel: Channel,
    stream: DataStream,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incoming").field("channel", &self.channel).field("role", &self.role).finish_non_exhaustive()
    }
}

impl Incoming {
    /// Takes it: from here on the stream is the channel's.
    ///
    /// # Errors
    /// When the peer is gone.
    pub async fn accept(mut self) -> Result<DataStream, PlaneError> {
        answer(&mut self.stream, None).await?;
        Ok(self.stream)
    }

    /// Refuses it, and says why.
    pub async fn refuse(mut self, problem: Problem) {
        tracing::debug!(%problem, channel = ?self.channel, "a data connection is refused");
        // Whether the peer hears it does not matter.
        let _ = answer(&mut self.stream, Some(problem)).await;
    }
}

/// A refusal for what this host has no part in.
#[must_use]
pub fn not_here(detail: impl Into<String>) -> Problem {
    Problem::new(Code::NotFound, detail)
}

async fn answer(stream: &mut DataStream, error: Option<Problem>) -> Result<(), PlaneError> {
    let peer = || "the peer".to_owned();
    let frame = |source| PlaneError::Frame { peer: peer(), source };
    let opened = Frame::json(kind::OPENED, data::VERSION, &Opened { error }).map_err(frame)?;
    match timeout(OPEN_BUDGET, write_frame(stream, &opened)).await {
        Ok(result) => result.map_err(frame),
        Err(_) => Err(PlaneError::Deadline { peer: peer() }),
    }
}

/// The same client, but trusting one certificate, whatever its name.
fn pinned(config: &rustls::ClientConfig, sha256: &str) -> Arc<rustls::ClientConfig> {
    let mut config = config.clone();
    let provider = config.crypto_provider().clone();
    config.dangerous().set_certificate_verifier(Arc::new(Pinned { sha256: sha256.to_owned(), provider }));
    Arc::new(config)
}

/// Trusts exactly the certificate that the controller named over its own authenticated link.
#[derive(Debug)]
struct Pinned {
    sha256: String,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        if tls::fingerprint(end_entity) == self.sha256 {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(TlsError::General("it shows another certificate than the controller named".to_owned()))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
