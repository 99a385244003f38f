//! One connection after the other.

use std::{collections::HashMap, sync::Arc, time::Duration};

use rand::Rng as _;
use supercloud_api::{
    frame::{Frame, FrameError, read_frame, write_frame},
    link::{self as wire, Answer, Envelope, Farewell, Hello, Outcome, Query, Welcome, kind},
    pieces::{Assembly, BadPiece},
    tls,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::mpsc,
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use super::{Facts, IdentitySource, LinkEvent, LinkQueues, Pending};
use crate::{identity::Identity, socket};

/// How long connecting, TLS and the introduction may take.
const OPEN_BUDGET: Duration = Duration::from_secs(15);
/// How long one frame may take to leave.
const WRITE_BUDGET: Duration = Duration::from_secs(20);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// The bounds within which the controller may set the heartbeat.
const HEARTBEAT_MS: std::ops::RangeInclusive<u64> = 200..=60_000;
/// Frames read ahead.
const READ_AHEAD: usize = 64;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("cannot reach the controller at {address}")]
    Dial {
        address: String,
        #[source]
        source: std::io::Error,
    },
    #[error("the identity cannot be used")]
    Identity(#[from] crate::identity::IdentityError),
    #[error("the controller did not {0} in time")]
    Deadline(&'static str),
    #[error("the link broke")]
    Frame(#[from] FrameError),
    #[error("the controller tells an overlay view in no order")]
    Piece(#[from] BadPiece),
    #[error("the agent's own queues are gone")]
    Gone,
    #[error("the controller has removed this host")]
    Removed(Box<Farewell>),
}

/// Keeps the link until `cancel`: dials, serves, dials again with growing pauses.
pub async fn run(
    facts: Arc<dyn Facts>,
    mut identity: IdentitySource,
    mut queues: LinkQueues,
    events: mpsc::Sender<LinkEvent>,
    cancel: CancellationToken,
) {
    let mut pause = FIRST_PAUSE;
    let mut book = Book::default();
    loop {
        let current = identity.borrow_and_update().clone();
        let began = Instant::now();
        let result = tokio::select! {
            () = cancel.cancelled() => break,
            result = session(&*facts, &current, &mut queues, &mut book, &events) => result,
            // A new certificate: dial with it.
            Ok(()) = identity.changed() => Ok(()),
        };
        queues.connected.send_replace(false);
        book.hang_up();
        if events.send(LinkEvent::Down).await.is_err() {
            break;
        }
        match result {
            Ok(()) => continue,
            Err(SessionError::Gone) => break,
            Err(SessionError::Removed(farewell)) => {
                let _ = events.send(LinkEvent::Removed(farewell.problem)).await;
                break;
            }
            Err(error) => tracing::warn!(error = %crate::chain(&error), "no link to the controller"),
        }
        if began.elapsed() > OPEN_BUDGET * 2 {
            pause = FIRST_PAUSE;
        }
        let jittered = pause.mul_f64(rand::rng().random_range(0.7..1.3));
        tokio::select! {
            () = cancel.cancelled() => break,
            () = tokio::time::sleep(jittered) => {}
        }
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// Queries that wait for an answer, over connections.
#[derive(Default)]
struct Book {
    next: u64,
    unsent: Vec<Pending>,
    asked: HashMap<u64, Pending>,
}

impl Book {
    /// The connection is gone: everything unanswered is to be asked again.
    fn hang_up(&mut self) {
        self.unsent.extend(self.asked.drain().map(|(_, pending)| pending));
    }

    fn forget_late(&mut self) {
        let now = Instant::now();
        let is_wanted = |pending: &Pending| pending.deadline > now && !pending.reply.is_closed();
        self.unsent.retain(is_wanted);
        self.asked.retain(|_, pending| is_wanted(pending));
    }

    /// The next query to be sent.
    fn take(&mut self) -> Option<Envelope<Query>> {
        let pending = self.unsent.pop()?;
        self.next += 1;
        let envelope = Envelope { number: self.next, body: pending.query.clone() };
        self.asked.insert(self.next, pending);
        Some(envelope)
    }

    fn answer(&mut self, envelope: Envelope<Outcome<Answer>>) {
        match self.asked.remove(&envelope.number) {
            // Whoever asked may have stopped waiting.
            Some(pending) => drop(pending.reply.send(envelope.body.into())),
            None => tracing::debug!(number = envelope.number, "an answer to no question"),
        }
    }
}

async fn session(
    facts: &dyn Facts,
    identity: &Identity,
    queues: &mut LinkQueues,
    book: &mut Book,
    events: &mpsc::Sender<LinkEvent>,
) -> Result<(), SessionError> {
    let hello = facts.hello();
    let open = open(identity, &hello);
    let (stream, welcome) = timeout(OPEN_BUDGET, open).await.map_err(|_| SessionError::Deadline("welcome us"))??;
    tracing::info!(host = %welcome.host_name, cloud = %welcome.cloud, "linked to the controller");
    let every = Duration::from_millis(welcome.heartbeat_ms.clamp(*HEARTBEAT_MS.start(), *HEARTBEAT_MS.end()));
    queues.connected.send_replace(true);
    events.send(LinkEvent::Up(Box::new(welcome))).await.map_err(|_| SessionError::Gone)?;

    let (reader, mut writer) = tokio::io::split(stream);
    let (frames, mut incoming) = mpsc::channel(READ_AHEAD);
    // Reading is not cancel-safe, so a task of its own does it; it ends with this scope.
    let mut tasks = JoinSet::new();
    tasks.spawn(read_all(reader, frames));
    let mut assembly = Assembly::default();
    let mut heartbeat = interval(every);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        while let Some(envelope) = book.take() {
            send(&mut writer, &Frame::json(kind::QUERY, wire::VERSION, &envelope)?).await?;
        }
        tokio::select! {
            frame = incoming.recv() => {
                let frame = frame.ok_or(FrameError::Closed)??;
                match frame.kind {
                    kind::ANSWER => book.answer(frame.parse_json(kind::ANSWER, wire::VERSION)?),
                    kind::DIRECTIVE => {
                        let directive = frame.parse_json(kind::DIRECTIVE, wire::VERSION)?;
                        if let Some(whole) = assembly.take(directive)? {
                            events.send(LinkEvent::Directive(whole)).await.map_err(|_| SessionError::Gone)?;
                        }
                    }
                    other => return Err(FrameError::UnexpectedKind(other).into()),
                }
            }
            notice = queues.notices.recv() => {
                let notice = notice.ok_or(SessionError::Gone)?;
                send(&mut writer, &Frame::json(kind::NOTICE, wire::VERSION, &notice)?).await?;
            }
            notice = queues.once.recv() => {
                let notice = notice.ok_or(SessionError::Gone)?;
                send(&mut writer, &Frame::json(kind::NOTICE, wire::VERSION, &notice)?).await?;
            }
            query = queues.queries.recv() => book.unsent.push(query.ok_or(SessionError::Gone)?),
            _ = heartbeat.tick() => {
                book.forget_late();
                send(&mut writer, &Frame::json(kind::NOTICE, wire::VERSION, &facts.heartbeat())?).await?;
            }
        }
    }
}

async fn open(
    identity: &Identity,
    hello: &Hello,
) -> Result<(tokio_rustls::client::TlsStream<TcpStream>, Welcome), SessionError> {
    let address = identity.link_address.clone();
    let dial = |source| SessionError::Dial { address: address.clone(), source };
    let material = identity.material()?;
    let tcp = TcpStream::connect(&address).await.map_err(dial)?;
    socket::watch_over(&tcp).map_err(dial)?;
    let mut stream =
        TlsConnector::from(material.link).connect(tls::controller_server_name(), tcp).await.map_err(dial)?;
    write_frame(&mut stream, &Frame::json(kind::HELLO, wire::VERSION, hello)?).await?;
    let frame = read_frame(&mut stream).await?;
    if frame.kind == kind::FAREWELL {
        let farewell: Farewell = frame.parse_json(kind::FAREWELL, wire::VERSION)?;
        if farewell.host == identity.host {
            return Err(SessionError::Removed(Box::new(farewell)));
        }
    }
    let welcome = frame.parse_json(kind::WELCOME, wire::VERSION)?;
    Ok((stream, welcome))
}

async fn read_all<R: AsyncRead + Unpin>(mut reader: R, frames: mpsc::Sender<Result<Frame, FrameError>>) {
    loop {
        let frame = read_frame(&mut reader).await;
        let is_end = frame.is_err();
        if frames.send(frame).await.is_err() || is_end {
            return;
        }
    }
}

async fn send<W: AsyncWrite + Unpin>(writer: &mut W, frame: &Frame) -> Result<(), SessionError> {
    match timeout(WRITE_BUDGET, write_frame(writer, frame)).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(SessionError::Deadline("take a frame")),
    }
}
