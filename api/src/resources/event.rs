//! Events: what happened, in the order of the store's revisions, each chained to the one before.

use serde::{Deserialize, Serialize};
use supercloud_ids::{GuestId, HostId, OperationId, ProjectId, RequestId};
use utoipa::ToSchema;

/// Something that happened. Written in the same transaction as the change it tells of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Its number: rises by one with each event.
    pub seq: u64,
    /// When.
    pub at_ms: u64,
    /// What: `guest.switched`, `operation.phase`, `host.up`, …
    pub kind: String,
    /// Who caused it: `token:<name>`, `guest:<id>`, `host:<id>`, `system`.
    pub actor: String,
    /// The request that caused it.
    pub request_id: RequestId,
    /// The project it belongs to; absent for what only admins see.
    pub project: Option<ProjectId>,
    /// The guest it tells of.
    pub guest: Option<GuestId>,
    /// The host it tells of.
    pub host: Option<HostId>,
    /// The operation it tells of.
    pub operation: Option<OperationId>,
    /// Details, by kind.
    #[schema(value_type = Object)]
    pub data: serde_json::Value,
    /// Hash of the event before (hex); 64 zeros for the first.
    pub previous_hash: String,
    /// BLAKE3 of this event's canonical JSON without `hash` (hex).
    pub hash: String,
}

impl Event {
    /// The hash that this event must carry: BLAKE3 over its JSON (fields in the order of the type) with an empty `hash`.
    ///
    /// # Panics
    /// Never: the type always serialises.
    #[must_use]
    pub fn expected_hash(&self) -> String {
        let bare = Event { hash: String::new(), ..self.clone() };
        let json = serde_json::to_vec(&bare).unwrap_or_default();
        blake3::hash(&json).to_hex().to_string()
    }

    /// Whether this event's hash holds and it follows `before` (`None`: it is the first).
    #[must_use]
    pub fn follows(&self, before: Option<&Event>) -> bool {
        let linked = match before {
            Some(before) => self.seq == before.seq + 1 && self.previous_hash == before.hash,
            None => self.seq == 1 && self.previous_hash == "0".repeat(64),
        };
        linked && self.hash == self.expected_hash()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(seq: u64, previous: &str) -> Event {
        let mut event = Event {
            seq,
            at_ms: 5,
            kind: "guest.switched".into(),
            actor: "system".into(),
            request_id: RequestId::generate(),
            project: None,
            guest: None,
            host: None,
            operation: None,
            data: serde_json::json!({"b": 1, "a": 2}),
            previous_hash: previous.into(),
            hash: String::new(),
        };
        event.hash = event.expected_hash();
        event
    }

    #[test]
    fn a_changed_event_breaks_the_chain() {
        let first = event(1, &"0".repeat(64));
        let second = event(2, &first.hash);
        assert!(first.follows(None) && second.follows(Some(&first)));
        let read_back: Event = serde_json::from_str(&serde_json::to_string(&second).unwrap()).unwrap();
        assert!(read_back.follows(Some(&first)), "the hash survives a round trip through JSON");
        let forged = Event { actor: "token:eve".into(), ..second.clone() };
        assert!(!forged.follows(Some(&first)));
        assert!(!second.follows(None));
    }
}
