//! Chunks of a cloud's store, asked of its agents: the controller dials where agents take each other's data connections, and
//! shows a ticket that names itself as the one who takes.

use std::{fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use rustls::ClientConfig;
use supercloud_api::{
    data::{Channel, Open, Opened, VERSION, kind},
    frame::{Frame, read_frame, write_frame},
    ids::{Epoch, HostId, ProjectId},
    ticket::{Party, Ticket},
    tls, unix_ms,
};
use supercloud_storage::peer::{Dial, DialFuture, Stream};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::{
    ca::{Authority, CaError},
    keys::Keys,
};

/// How long a connection may take to open.
const OPENING_BUDGET: Duration = Duration::from_secs(15);
/// A ticket is made for each connection, and shown at once.
const TICKET_MS: u64 = 60_000;

/// Why the controller cannot dial.
#[derive(Debug, thiserror::Error)]
pub enum CallerError {
    /// No certificate.
    #[error("the controller's certificate for agents")]
    Certificate(#[from] CaError),
    /// TLS.
    #[error("TLS towards agents cannot be set up")]
    Tls(#[from] tls::MaterialError),
}

/// What the controller shows when it dials agents: a key and certificate of their own, as every party has them.
#[derive(Clone)]
pub struct Caller {
    config: Arc<ClientConfig>,
    keys: Arc<Keys>,
    me: Party,
}

impl Caller {
    /// With a fresh certificate.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(authority: &Authority, keys: Arc<Keys>) -> Result<Self, CallerError> {
        let identity = authority.server_identity(&[])?;
        let certificate_sha256 = identity.chain.first().map(tls::fingerprint).unwrap_or_default();
        let config = tls::client_config(std::slice::from_ref(authority.certificate()), identity, tls::ALPN_DATA)?;
        Ok(Self { config: Arc::new(config), keys, me: Party { host: None, certificate_sha256 } })
    }
}

/// The way to the chunks of a project at one agent.
#[derive(Clone)]
pub struct AgentDial {
    /// What is shown.
    pub caller: Caller,
    /// The agent's host.
    pub host: HostId,
    /// SHA-256 of its certificate, hex: this one must answer.
    pub certificate_sha256: String,
    /// Where it takes data connections.
    pub address: SocketAddr,
    /// Whose chunks.
    pub project: ProjectId,
}

impl fmt::Debug for AgentDial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AgentDial({} at {} for {})", self.host, self.address, self.project)
    }
}

impl AgentDial {
    fn ticket(&self) -> String {
        self.caller.keys.tickets.0.sign(&Ticket {
            version: Ticket::VERSION,
            operation: None,
            project: self.project,
            guest: None,
            epoch: Epoch(0),
            source: Party { host: Some(self.host), certificate_sha256: self.certificate_sha256.clone() },
            destination: self.caller.me.clone(),
            volumes: Vec::new(),
            expires_at_ms: unix_ms() + TICKET_MS,
        })
    }

    async fn open(&self) -> io::Result<Box<dyn Stream>> {
        let tcp = TcpStream::connect(self.address).await?;
        tcp.set_nodelay(true)?;
        let connector = TlsConnector::from(Arc::clone(&self.caller.config));
        let mut stream = connector.connect(tls::host_server_name(self.host), tcp).await?;
        let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first).map(tls::fingerprint);
        if shown.as_deref() != Some(self.certificate_sha256.as_str()) {
            return Err(io::Error::other("it shows another certificate than the host's newest"));
        }
        let open = Open { ticket: self.ticket(), channel: Channel::Chunks { project: self.project } };
        let open = Frame::json(kind::OPEN, VERSION, &open).map_err(io::Error::other)?;
        write_frame(&mut stream, &open).await.map_err(io::Error::other)?;
        let answer = read_frame(&mut stream).await.map_err(io::Error::other)?;
        let opened: Opened = answer.parse_json(kind::OPENED, VERSION).map_err(io::Error::other)?;
        match opened.error {
            None => Ok(Box::new(stream)),
            Some(problem) => Err(io::Error::other(format!("it refuses: {problem}"))),
        }
    }
}

impl Dial for AgentDial {
    fn dial(&self) -> DialFuture<'_> {
        Box::pin(async move {
            match tokio::time::timeout(OPENING_BUDGET, self.open()).await {
                Ok(opened) => opened,
                Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the agent does not answer in time")),
            }
        })
    }
}
