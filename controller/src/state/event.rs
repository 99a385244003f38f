//! Events and their chain: each carries the hash of the one before, and is written in the transaction of what it tells of.

use serde::{Deserialize, Serialize};
use supercloud_api::{
    Event,
    ids::{GuestId, HostId, OperationId, ProjectId},
};
use supercloud_store::Store;

use super::{Context, State, StateError, decode, keys};

/// The newest event's number and hash; number 0 and 64 zeros before the first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Its number.
    pub seq: u64,
    /// Its hash.
    pub hash: String,
}

impl Default for Head {
    fn default() -> Self {
        Self { seq: 0, hash: "0".repeat(64) }
    }
}

/// A head with the revision of its key (0: absent).
#[derive(Debug, Clone, Default)]
pub(super) struct KnownHead {
    pub head: Head,
    pub revision: u64,
}

pub(super) async fn read_head(store: &dyn Store) -> Result<KnownHead, StateError> {
    match store.get(keys::events_head()).await? {
        Some(found) => Ok(KnownHead { head: decode(&found)?, revision: found.mod_revision }),
        None => Ok(KnownHead::default()),
    }
}

/// An event before it has its number. Who caused it comes from the [`Context`] of the change.
#[derive(Debug, Clone, PartialEq)]
pub struct EventDraft {
    kind: &'static str,
    project: Option<ProjectId>,
    guest: Option<GuestId>,
    host: Option<HostId>,
    operation: Option<OperationId>,
    data: serde_json::Value,
}

impl EventDraft {
    /// An event of a kind: `guest.created`, `operation.phase`, …
    #[must_use]
    pub fn new(kind: &'static str) -> Self {
        Self { kind, project: None, guest: None, host: None, operation: None, data: serde_json::json!({}) }
    }

    /// The project whose members see it; without one only admins do.
    #[must_use]
    pub fn project(mut self, project: impl Into<Option<ProjectId>>) -> Self {
        self.project = project.into();
        self
    }

    /// The guest it tells of.
    #[must_use]
    pub fn guest(mut self, guest: impl Into<Option<GuestId>>) -> Self {
        self.guest = guest.into();
        self
    }

    /// The host it tells of.
    #[must_use]
    pub fn host(mut self, host: impl Into<Option<HostId>>) -> Self {
        self.host = host.into();
        self
    }

    /// The operation it tells of.
    #[must_use]
    pub fn operation(mut self, operation: impl Into<Option<OperationId>>) -> Self {
        self.operation = operation.into();
        self
    }

    /// Details: a JSON object without floating-point numbers, small.
    #[must_use]
    pub fn data(mut self, data: serde_json::Value) -> Self {
        self.data = data;
        self
    }

    /// The event that follows `head`.
    pub(super) fn chain(&self, head: &Head, context: &Context, at_ms: u64) -> Event {
        let mut event = Event {
            seq: head.seq + 1,
            at_ms,
            kind: self.kind.to_owned(),
            actor: context.actor.clone(),
            request_id: context.request_id,
            project: self.project,
            guest: self.guest,
            host: self.host,
            operation: self.operation,
            data: self.data.clone(),
            previous_hash: head.hash.clone(),
            hash: String::new(),
        };
        event.hash = event.expected_hash();
        event
    }
}

/// Reads the whole chain and checks it: numbers without a gap, every hash, and that it ends at the head. Returns the
/// number of events, or the first one that does not hold.
///
/// # Errors
/// When the store does not answer or an event is damaged.
pub async fn verify_chain(state: &State) -> Result<Result<u64, u64>, StateError> {
    let mut last: Option<Event> = None;
    loop {
        // The head first: events that come while we read are then beyond it, not missing.
        let head = state.head().await?;
        let after = last.as_ref().map_or(0, |event| event.seq);
        let (events, more) = state.events(after, 1000).await?;
        for event in events {
            if !event.follows(last.as_ref()) {
                return Ok(Err(event.seq));
            }
            last = Some(event);
        }
        if !more {
            let seq = last.as_ref().map_or(0, |event| event.seq);
            let reaches = seq > head.seq || last.as_ref().map_or(Head::default().hash, |e| e.hash.clone()) == head.hash;
            return Ok(if reaches { Ok(seq) } else { Err(head.seq) });
        }
    }
}
