//! One agent's session.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use supercloud_api::{
    Code, Problem,
    frame::{Frame, FrameError, read_frame, write_frame},
    ids::HostId,
    link::{self, Answer, Directive, Envelope, Farewell, Hello, Notice, Outcome, Query, kind},
    pieces,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Semaphore, SemaphorePermit, mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::{LinkHandler, OPENING_BUDGET, Shared, Unwelcome};

/// A link that brought nothing for this long is dead; agents send heartbeats far more often.
const SILENCE_BUDGET: Duration = Duration::from_secs(30);
/// How long one frame may take to leave.
const WRITE_BUDGET: Duration = Duration::from_secs(20);
/// Answers that may wait to be written.
const ANSWERS_AT_MOST: usize = 64;
/// Queries of a host that are worked on at once; more are sent away.
const QUERIES_AT_ONCE: usize = 16;
/// As many for what its guests ask: they cannot take the host's own places.
const GUEST_QUERIES_AT_ONCE: usize = 8;
/// As many for its guests' leases, which no other question may keep waiting.
const LEASES_AT_ONCE: usize = 8;
/// Questions for leases that may wait for their turn: all guests of a host ask at once when it is linked again.
const LEASES_WAITING: usize = 1024;
/// For how long they wait: then the host asks anew, with a newer date.
const LEASE_TURN: Duration = Duration::from_secs(1);

/// The ends that others write to.
pub(super) struct Outbound {
    pub(super) directives: mpsc::Receiver<Directive>,
    pub(super) overlay: watch::Receiver<Option<(u64, serde_json::Value)>>,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("nothing was heard for {} s", SILENCE_BUDGET.as_secs())]
    Silent,
    #[error("it does not read what is sent")]
    NotReading,
    #[error("the session is closed from this side")]
    Closed,
    #[error("unexpected frame of kind {0}")]
    Kind(u16),
}

/// Runs a session to its end; the serial if it was ever open.
pub(super) async fn run<S: AsyncRead + AsyncWrite + Send>(
    shared: &Shared,
    host: HostId,
    fingerprint: String,
    stream: S,
    opening: SemaphorePermit<'_>,
    cancel: CancellationToken,
) -> Option<u64> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let first = tokio::select! {
        first = tokio::time::timeout(OPENING_BUDGET, read_frame(&mut reader)) => first,
        () = cancel.cancelled() => return None,
    };
    let hello = match first {
        Ok(Ok(frame)) => match frame.parse_json::<Hello>(kind::HELLO, link::VERSION) {
            Ok(hello) => hello,
            Err(error) => {
                warn!(%host, "the hello is not acceptable: {error}");
                return None;
            }
        },
        Ok(Err(error)) => {
            debug!(%host, "no hello: {error}");
            return None;
        }
        Err(_) => return None,
    };
    if hello.host != host {
        warn!(%host, claimed = %hello.host, "the hello names another host than the certificate");
        return None;
    }
    let agent_version = hello.agent_version.chars().take(64).collect::<String>();
    let welcomed = tokio::select! {
        welcomed = shared.handler.hello(host, fingerprint, hello) => welcomed,
        () = cancel.cancelled() => return None,
    };
    let welcome = match welcomed {
        Ok(welcome) => welcome,
        Err(Unwelcome::Refused(problem)) => {
            warn!(%host, "not welcome: {problem}");
            return None;
        }
        Err(Unwelcome::Removed(problem)) => {
            error!(%host, "a host that was removed is back: {problem}");
            let sent = async {
                let frame = Frame::json(kind::FAREWELL, link::VERSION, &Farewell { host, problem })?;
                write_frame(&mut writer, &frame).await
            };
            if let Ok(Err(_)) | Err(_) = tokio::time::timeout(WRITE_BUDGET, sent).await {
                debug!(%host, "it did not hear that it was removed; it is told again");
            }
            return None;
        }
    };
    let sent = async {
        let frame = Frame::json(kind::WELCOME, link::VERSION, &welcome)?;
        write_frame(&mut writer, &frame).await
    };
    if let Ok(Err(_)) | Err(_) = tokio::time::timeout(WRITE_BUDGET, sent).await {
        return None;
    }
    drop(opening);
    let (serial, outbound) = shared.sessions.open(host, cancel.clone());
    info!(%host, name = %welcome.host_name, agent_version, "agent connected");
    let (answers, answers_out) = mpsc::channel(ANSWERS_AT_MOST);
    let reading = async {
        shared.handler.opened(host).await;
        read(&shared.handler, host, &mut reader, answers).await
    };
    let why = tokio::select! {
        why = reading => why,
        why = write(host, &mut writer, outbound, answers_out) => why,
        () = cancel.cancelled() => Ended::Closed,
    };
    debug!(%host, "session ended: {why}");
    Some(serial)
}

async fn read<R: AsyncRead + Unpin>(
    handler: &Arc<dyn LinkHandler>,
    host: HostId,
    reader: &mut R,
    answers: mpsc::Sender<Envelope<Outcome<Answer>>>,
) -> Ended {
    let mut queries = Queries::new(Arc::clone(handler), host, answers);
    loop {
        let frame = match tokio::time::timeout(SILENCE_BUDGET, read_frame(reader)).await {
            Ok(Ok(frame)) => frame,
            Ok(Err(error)) => return error.into(),
            Err(_) => return Ended::Silent,
        };
        match frame.kind {
            kind::NOTICE => match frame.parse_json::<Notice>(kind::NOTICE, link::VERSION) {
                Ok(notice) => handler.notice(host, notice).await,
                // A newer agent's notice is no reason to end its session.
                Err(FrameError::Payload { source, .. }) if is_of_a_later_version(&frame) => {
                    debug!(%host, "a notice that this controller does not know is left out: {source}");
                }
                Err(error) => return error.into(),
            },
            kind::QUERY => match frame.parse_json::<Envelope<serde_json::Value>>(kind::QUERY, link::VERSION) {
                Ok(envelope) => {
                    if let Err(ended) = queries.take(envelope) {
                        return ended;
                    }
                }
                Err(error) => return error.into(),
            },
            other => return Ended::Kind(other),
        }
    }
}

/// Notices that this version knows.
const NOTICES: [&str; 8] = ["report", "heartbeat", "progress", "guest_event", "discarded", "console", "paths", "flows"];

/// Whether a notice is whole and says that it is of a kind that this version does not know; one of a known kind is malformed.
fn is_of_a_later_version(frame: &Frame) -> bool {
    #[derive(serde::Deserialize)]
    struct Tagged {
        notice: String,
    }
    serde_json::from_slice::<Tagged>(&frame.payload).is_ok_and(|told| !NOTICES.contains(&&*told.notice))
}

/// A host's queries, each answered in a task of its own: a notice (a guest that is paused and waits for its switch) never queues behind
/// one. All end with the session.
struct Queries {
    host: HostId,
    handler: Arc<dyn LinkHandler>,
    answers: mpsc::Sender<Envelope<Outcome<Answer>>>,
    own: Arc<Semaphore>,
    of_guests: Arc<Semaphore>,
    leases: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    tasks: JoinSet<()>,
}

impl Queries {
    fn new(handler: Arc<dyn LinkHandler>, host: HostId, answers: mpsc::Sender<Envelope<Outcome<Answer>>>) -> Self {
        Self {
            host,
            handler,
            answers,
            own: Arc::new(Semaphore::new(QUERIES_AT_ONCE)),
            of_guests: Arc::new(Semaphore::new(GUEST_QUERIES_AT_ONCE)),
            leases: Arc::new(Semaphore::new(LEASES_AT_ONCE)),
            waiting: Arc::new(Semaphore::new(LEASES_WAITING)),
            tasks: JoinSet::new(),
        }
    }

    /// Begins to answer, or says at once why not.
    fn take(&mut self, envelope: Envelope<serde_json::Value>) -> Result<(), Ended> {
        while self.tasks.try_join_next().is_some() {}
        let Envelope { number, body } = envelope;
        // A newer agent's query is no reason to end its session.
        let Ok(query) = serde_json::from_value::<Query>(body) else {
            return self.refuse(number, Problem::new(Code::Unsupported, "this controller does not know such a query"));
        };
        if let Query::RenewLease { .. } = query {
            return self.take_in_turn(number, query);
        }
        let places = match query {
            Query::GuestToken { .. } | Query::GuestCall { .. } => &self.of_guests,
            Query::RenewLease { .. }
            | Query::ChunkSources { .. }
            | Query::StoreRoots { .. }
            | Query::StoreNames { .. }
            | Query::StoreSwept { .. }
            | Query::VolumeChecked { .. }
            | Query::PointTaken { .. }
            | Query::RenewCertificate { .. } => &self.own,
        };
        let Ok(place) = Arc::clone(places).try_acquire_owned() else {
            let detail = "too many queries of this host are being answered; try again in a second";
            return self.refuse(number, Problem::new(Code::TooManyRequests, detail));
        };
        let (host, handler, answers) = (self.host, Arc::clone(&self.handler), self.answers.clone());
        self.tasks.spawn(async move {
            let body = handler.query(host, query).await.into();
            // The writer has ended: so has the session.
            let _ = answers.send(Envelope { number, body }).await;
            drop(place);
        });
        Ok(())
    }

    /// The same for a lease, which waits a moment for its turn.
    fn take_in_turn(&mut self, number: u64, query: Query) -> Result<(), Ended> {
        const BUSY: &str = "too many leases of this host's guests are being renewed; try again in a second";
        let Ok(waiting) = Arc::clone(&self.waiting).try_acquire_owned() else {
            return self.refuse(number, Problem::new(Code::TooManyRequests, BUSY));
        };
        let (host, handler, answers) = (self.host, Arc::clone(&self.handler), self.answers.clone());
        let leases = Arc::clone(&self.leases);
        self.tasks.spawn(async move {
            let body = match tokio::time::timeout(LEASE_TURN, leases.acquire_owned()).await {
                Ok(Ok(_turn)) => handler.query(host, query).await.into(),
                Ok(Err(_)) | Err(_) => Outcome::Err(Problem::new(Code::TooManyRequests, BUSY)),
            };
            let _ = answers.send(Envelope { number, body }).await;
            drop(waiting);
        });
        Ok(())
    }

    fn refuse(&self, number: u64, problem: Problem) -> Result<(), Ended> {
        let body = Outcome::Err(problem);
        self.answers.try_send(Envelope { number, body }).map_err(|_| Ended::NotReading)
    }
}

async fn write<W: AsyncWrite + Unpin>(
    host: HostId,
    writer: &mut W,
    mut outbound: Outbound,
    mut answers: mpsc::Receiver<Envelope<Outcome<Answer>>>,
) -> Ended {
    // Of the newest view; orders and answers go between them.
    let mut pieces = VecDeque::new();
    loop {
        let frame = tokio::select! {
            biased;
            directive = outbound.directives.recv() => match directive {
                Some(directive) => Frame::json(kind::DIRECTIVE, link::VERSION, &directive),
                None => return Ended::Closed,
            },
            Ok(()) = outbound.overlay.changed() => {
                let Some((revision, view)) = outbound.overlay.borrow_and_update().clone() else { continue };
                match pieces::cut(revision, view) {
                    Ok(cut) => pieces = cut.into(),
                    Err(error) => error!(%host, "its switch keeps older flows: {error}"),
                }
                continue;
            }
            Some(answer) = answers.recv() => Frame::json(kind::ANSWER, link::VERSION, &answer),
            Some(piece) = async { pieces.pop_front() } => Frame::json(kind::DIRECTIVE, link::VERSION, &piece),
        };
        let frame = match frame {
            // Nothing a new connection could mend: the agent would come back for ever and hear nothing else.
            Err(FrameError::TooLong(bytes)) => {
                error!(%host, bytes, "a message is over the limit and cannot be sent");
                continue;
            }
            frame => frame,
        };
        let written = async { write_frame(writer, &frame?).await };
        match tokio::time::timeout(WRITE_BUDGET, written).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return error.into(),
            Err(_) => return Ended::NotReading,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::future::BoxFuture;
    use supercloud_api::{
        ids::{Epoch, GuestId},
        link::Welcome,
    };

    use super::*;

    /// Never answers a guest's query, answers a host's own at once, counts notices.
    #[derive(Default)]
    struct Slow(AtomicUsize);

    impl LinkHandler for Slow {
        fn is_member(&self, _: HostId) -> BoxFuture<'_, bool> {
            Box::pin(async { true })
        }
        fn hello(&self, _: HostId, _: String, _: Hello) -> BoxFuture<'_, Result<Welcome, Unwelcome>> {
            Box::pin(async { Err(Unwelcome::from(Problem::new(Code::Forbidden, "not asked here"))) })
        }
        fn opened(&self, _: HostId) -> BoxFuture<'_, ()> {
            Box::pin(async {})
        }
        fn notice(&self, _: HostId, _: Notice) -> BoxFuture<'_, ()> {
            Box::pin(async {
                self.0.fetch_add(1, Ordering::Relaxed);
            })
        }
        fn query(&self, _: HostId, query: Query) -> BoxFuture<'_, Result<Answer, Problem>> {
            Box::pin(async move {
                match query {
                    Query::GuestToken { .. } => std::future::pending().await,
                    _ => Ok(Answer::Certificate { certificate_pem: "x".into() }),
                }
            })
        }
        fn closed(&self, _: HostId) -> BoxFuture<'_, ()> {
            Box::pin(async {})
        }
    }

    #[tokio::test]
    async fn notices_and_the_hosts_own_queries_do_not_wait_for_those_of_its_guests() {
        let slow = Arc::new(Slow::default());
        let handler: Arc<dyn LinkHandler> = slow.clone();
        let (mut agent, mut controller) = tokio::io::duplex(1 << 20);
        let (answers, mut answered) = mpsc::channel(ANSWERS_AT_MOST);
        let query = |number: u64, body: serde_json::Value| {
            Frame::json(kind::QUERY, link::VERSION, &Envelope { number, body }).unwrap()
        };
        let token = Query::GuestToken { guest: GuestId::generate(), epoch: Epoch(1) };
        let token = serde_json::to_value(token).unwrap();
        let flood = u64::try_from(GUEST_QUERIES_AT_ONCE).unwrap() + 1;
        for number in 1..=flood {
            write_frame(&mut agent, &query(number, token.clone())).await.unwrap();
        }
        let notice = Notice::Discarded { guest: GuestId::generate() };
        write_frame(&mut agent, &Frame::json(kind::NOTICE, link::VERSION, &notice).unwrap()).await.unwrap();
        let own = serde_json::to_value(Query::RenewCertificate { csr_pem: String::new() }).unwrap();
        write_frame(&mut agent, &query(100, own)).await.unwrap();
        write_frame(&mut agent, &query(101, serde_json::json!({"query": "of_a_later_version"}))).await.unwrap();
        let listening = async {
            let mut codes = std::collections::BTreeMap::new();
            while codes.len() < 3 {
                let Envelope { number, body } = answered.recv().await.unwrap();
                codes.insert(number, Result::from(body).err().map(|problem: Problem| problem.code));
            }
            codes
        };
        let codes = tokio::select! {
            ended = read(&handler, HostId::generate(), &mut controller, answers) => panic!("{ended}"),
            codes = listening => codes,
        };
        assert_eq!(slow.0.load(Ordering::Relaxed), 1, "the notice was heard");
        let expected =
            [(flood, Some(Code::TooManyRequests)), (100, None), (101, Some(Code::Unsupported))].into_iter().collect();
        assert_eq!(codes, expected);
    }

    /// The notices whose kinds [`NOTICES`] must hold; a new one does not compile without its line here.
    fn kind_of(notice: &Notice) -> &'static str {
        match notice {
            Notice::Report { .. } => "report",
            Notice::Heartbeat { .. } => "heartbeat",
            Notice::Progress { .. } => "progress",
            Notice::GuestEvent { .. } => "guest_event",
            Notice::Discarded { .. } => "discarded",
            Notice::Console { .. } => "console",
            Notice::Paths { .. } => "paths",
            Notice::Flows { .. } => "flows",
        }
    }

    #[tokio::test]
    async fn a_notice_of_a_later_version_is_left_out_and_a_malformed_one_ends_the_session() {
        let known = [Notice::Paths { paths: Vec::new() }, Notice::Discarded { guest: GuestId::generate() }];
        for notice in &known {
            let said = serde_json::to_value(notice).unwrap();
            assert_eq!(said["notice"], kind_of(notice));
            assert!(NOTICES.contains(&kind_of(notice)));
        }
        // What the parser itself says that it knows is the list.
        let unknown = serde_json::from_value::<Notice>(serde_json::json!({"notice": "?"})).unwrap_err().to_string();
        let expected = NOTICES.map(|kind| format!("`{kind}`"));
        assert_eq!(unknown.matches('`').count(), 2 * (NOTICES.len() + 1), "{unknown}");
        assert!(expected.iter().all(|kind| unknown.contains(kind)), "{unknown}");

        let raw = |body: &str| Frame { kind: kind::NOTICE, version: link::VERSION, payload: body.as_bytes().to_vec() };
        for (bad, is_left_out) in [
            (r#"{"notice": "of_a_later_version", "more": [1]}"#, true),
            (r#"{"notice": "paths", "paths": 7}"#, false),
            (r#"{"notice": 7}"#, false),
            (r#"{"more": 1}"#, false),
            (r#"{"notice": "of_a_later_version""#, false),
            ("", false),
        ] {
            let slow = Arc::new(Slow::default());
            let handler: Arc<dyn LinkHandler> = slow.clone();
            let (mut agent, mut controller) = tokio::io::duplex(1 << 20);
            let (answers, _answered) = mpsc::channel(ANSWERS_AT_MOST);
            write_frame(&mut agent, &raw(bad)).await.unwrap();
            let good = Frame::json(kind::NOTICE, link::VERSION, &known[1]).unwrap();
            write_frame(&mut agent, &good).await.unwrap();
            drop(agent);
            let ended = read(&handler, HostId::generate(), &mut controller, answers).await;
            assert_eq!(slow.0.load(Ordering::Relaxed), usize::from(is_left_out), "{bad}: {ended}");
        }
    }
}
