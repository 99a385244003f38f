//! The agent's end of the link to the controller ([`supercloud_api::link`]): dials, introduces itself, carries notices,
//! queries and directives, and dials again when the connection breaks.
//!
//! Reports of the ownership protocol may get lost here: who sends them repeats them. So nothing is stored for a
//! controller that is away, except what is told only once ([`LinkHandle::tell_once`]).

mod session;

use std::{sync::Arc, time::Duration};

use supercloud_api::{
    Problem,
    link::{Answer, Directive, Hello, Notice, Query, Welcome},
};
use tokio::sync::{mpsc, oneshot, watch};

pub use session::run;

use crate::identity::Identity;

/// Notices and queries that may wait for the connection.
const QUEUE: usize = 256;

/// What the link asks of the agent.
pub trait Facts: Send + Sync {
    /// The introduction, as of now.
    fn hello(&self) -> Hello;
    /// A heartbeat, as of now.
    fn heartbeat(&self) -> Notice;
}

/// What the link tells the agent.
#[derive(Debug)]
pub enum LinkEvent {
    /// The controller is there (again).
    Up(Box<Welcome>),
    /// It is away.
    Down,
    /// It says something.
    Directive(Directive),
    /// An operator has removed this host; nobody dials any more.
    Removed(Problem),
}

/// Why a query has no answer.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// The controller did not answer in time; whether it did something is not known.
    #[error("the controller did not answer in time")]
    Deadline,
    /// Too much is waiting for it already.
    #[error("too many queries wait for the controller")]
    Busy,
    /// It refuses.
    #[error("the controller refuses")]
    Refused(#[source] Problem),
}

pub(crate) struct Pending {
    query: Query,
    deadline: tokio::time::Instant,
    reply: oneshot::Sender<Result<Answer, Problem>>,
}

/// The link, as the rest of the agent uses it. Cheap to clone.
#[derive(Clone)]
pub struct LinkHandle {
    notices: mpsc::Sender<Notice>,
    once: mpsc::Sender<Notice>,
    queries: mpsc::Sender<Pending>,
    connected: watch::Receiver<bool>,
}

/// The receiving ends of a [`LinkHandle`]: for [`run`].
pub struct LinkQueues {
    notices: mpsc::Receiver<Notice>,
    once: mpsc::Receiver<Notice>,
    queries: mpsc::Receiver<Pending>,
    connected: watch::Sender<bool>,
}

/// A handle and the queues that [`run`] serves.
#[must_use]
pub fn channel() -> (LinkHandle, LinkQueues) {
    let (notices, notices_rx) = mpsc::channel(QUEUE);
    let (once, once_rx) = mpsc::channel(QUEUE);
    let (queries, queries_rx) = mpsc::channel(QUEUE);
    let (connected, connected_rx) = watch::channel(false);
    (
        LinkHandle { notices, once, queries, connected: connected_rx },
        LinkQueues { notices: notices_rx, once: once_rx, queries: queries_rx, connected },
    )
}

impl LinkHandle {
    /// Tells something that is repeated by whoever says it: lost when the controller is away.
    pub fn tell(&self, notice: Notice) {
        if *self.connected.borrow()
            && let Err(error) = self.notices.try_send(notice)
        {
            tracing::debug!(%error, "a notice to the controller is dropped");
        }
    }

    /// Tells something that is said once: it waits for the controller, with at most 255 others.
    pub fn tell_once(&self, notice: Notice) {
        if let Err(error) = self.once.try_send(notice) {
            tracing::warn!(%error, "a notice to the controller is lost: too many wait for it");
        }
    }

    /// Asks; over broken connections, until `budget` is over. The controller may see the query more than once.
    ///
    /// # Errors
    /// No answer in time, or a refusal.
    pub async fn query(&self, query: Query, budget: Duration) -> Result<Answer, QueryError> {
        let deadline = tokio::time::Instant::now() + budget;
        let (reply, answer) = oneshot::channel();
        self.queries.try_send(Pending { query, deadline, reply }).map_err(|_| QueryError::Busy)?;
        match tokio::time::timeout_at(deadline, answer).await {
            Ok(Ok(Ok(answer))) => Ok(answer),
            Ok(Ok(Err(problem))) => Err(QueryError::Refused(problem)),
            Ok(Err(_)) | Err(_) => Err(QueryError::Deadline),
        }
    }

    /// Whether the controller is connected, and every change of that.
    #[must_use]
    pub fn connected(&self) -> watch::Receiver<bool> {
        self.connected.clone()
    }
}

/// Where the link gets its identity from: the newest one counts, a change makes it dial anew.
pub type IdentitySource = watch::Receiver<Arc<Identity>>;
