//! A watch on etcd that survives broken connections and restarts of the server.
//!
//! ```text
//! next = the first revision not yet delivered
//! connect, ask from next - 1 -> events below next are dropped; a revision is delivered when the one after it begins or
//!                               the response is complete -> next = its revision + 1
//! broken                     -> wait, connect again with the same next
//! ```

use std::{collections::VecDeque, time::Duration};

use etcd_client::{WatchClient, WatchOptions, WatchResponse, WatchStream as EtcdStream};
use futures::stream;
use supercloud_store::{Change, Prefix, StoreError, WatchItem, WatchStream};

use crate::{
    fault::{self, Meaning},
    translate::{Namespace, number},
};

/// Largest watch message, in bytes. etcd cuts its messages to its request limit, 1.5 MiB by default.
pub(crate) const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// Most changes of one revision: what a transaction of another program could hold at etcd's default limit, and room.
const MAX_CHANGES: usize = 1024;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Puts the pieces of revisions together; pure.
#[derive(Debug)]
struct Assembly {
    namespace: Namespace,
    prefix: Prefix,
    /// The first revision not yet delivered.
    next: u64,
    /// A revision that may not be complete.
    open: Option<(u64, Vec<Change>)>,
    ready: VecDeque<WatchItem>,
}

impl Assembly {
    /// Takes one event. A put has a version, a delete has none.
    fn event(&mut self, entry: etcd_client::KeyValue) -> Result<(), StoreError> {
        let revision = number(entry.mod_revision());
        if revision < self.next {
            return Ok(());
        }
        let change = if entry.version() == 0 {
            Change::Delete { key: self.namespace.read_key(entry.key())? }
        } else {
            Change::Put(self.namespace.read(entry)?)
        };
        if !self.prefix.matches(change.key()) {
            return Err(self.namespace.damaged("etcd tells of a key outside the watch".into()));
        }
        match &mut self.open {
            Some((open, _)) if revision < *open => {
                Err(self.namespace.damaged("etcd tells revisions out of order".into()))
            }
            Some((open, changes)) if revision == *open => {
                if changes.len() >= MAX_CHANGES {
                    return Err(self.namespace.damaged(format!("revision {revision} has too many changes")));
                }
                changes.push(change);
                Ok(())
            }
            _ => {
                self.complete();
                self.open = Some((revision, vec![change]));
                Ok(())
            }
        }
    }

    /// The open revision has ended.
    fn complete(&mut self) {
        if let Some((revision, mut changes)) = self.open.take() {
            changes.sort_by(|a, b| a.key().cmp(b.key()));
            self.next = revision + 1;
            self.ready.push_back(WatchItem::Changes { revision, changes });
        }
    }
}

/// What a response was.
enum Taken {
    Changes,
    Compacted {
        oldest: u64,
    },
    /// By the server, such as for want of a leader.
    Canceled {
        reason: String,
    },
}

struct Cursor {
    client: WatchClient,
    assembly: Assembly,
    stream: Option<EtcdStream>,
    call_budget: Duration,
    pause: Duration,
    ended: bool,
}

pub(crate) fn stream(
    client: WatchClient,
    namespace: Namespace,
    prefix: Prefix,
    from: u64,
    call_budget: Duration,
) -> WatchStream {
    let assembly = Assembly { namespace, prefix, next: from, open: None, ready: VecDeque::new() };
    let cursor = Cursor { client, assembly, stream: None, call_budget, pause: FIRST_PAUSE, ended: false };
    Box::pin(stream::unfold(cursor, |mut cursor| async move {
        if cursor.ended {
            return None;
        }
        let item = cursor.next_item().await;
        cursor.ended = !matches!(item, Ok(WatchItem::Changes { .. }));
        Some((item, cursor))
    }))
}

impl Cursor {
    async fn next_item(&mut self) -> Result<WatchItem, StoreError> {
        if self.assembly.next == 0 {
            return Err(StoreError::InvalidArgument { reason: "a watch starts at revision 1 or later".into() });
        }
        loop {
            if let Some(item) = self.assembly.ready.pop_front() {
                return Ok(item);
            }
            let Some(stream) = &mut self.stream else {
                self.start().await?;
                continue;
            };
            // No deadline: a quiet watch is a good one. A dead connection is noticed by its keep-alive.
            match stream.message().await {
                Ok(Some(response)) => match self.take(response)? {
                    Taken::Changes => self.pause = FIRST_PAUSE,
                    Taken::Compacted { oldest } => return Ok(WatchItem::Compacted { oldest }),
                    Taken::Canceled { reason } => self.broken(&reason).await,
                },
                Ok(None) => self.broken("the stream ended").await,
                Err(error) => {
                    let fault = fault::Fault::Etcd(error);
                    match fault.meaning() {
                        Meaning::Denied | Meaning::Refused | Meaning::AnswerTooLarge => {
                            return Err(fault.reading("watch etcd"));
                        }
                        _ => self.broken(&fault.to_string()).await,
                    }
                }
            }
        }
    }

    async fn start(&mut self) -> Result<(), StoreError> {
        // One early, and at least 1, because 0 means "from now on": see the crate's docs.
        let Ok(start) = i64::try_from(self.assembly.next.saturating_sub(1).max(1)) else {
            // Beyond what etcd can count to nothing will ever happen.
            return std::future::pending().await;
        };
        let (key, end) = self.assembly.namespace.range(&self.assembly.prefix);
        let options = WatchOptions::new().with_range(end).with_start_revision(start).with_fragment();
        match fault::within(self.call_budget, self.client.watch(key, Some(options))).await {
            Ok(stream) => self.stream = Some(stream),
            Err(fault) => match fault.meaning() {
                Meaning::Denied | Meaning::Refused => return Err(fault.reading("watch etcd")),
                _ => self.broken(&fault.to_string()).await,
            },
        }
        Ok(())
    }

    /// Forgets the connection and what it had begun to tell, and waits a little.
    async fn broken(&mut self, reason: &str) {
        tracing::debug!(prefix = %self.assembly.prefix, next = self.assembly.next, reason, "watch interrupted");
        self.stream = None;
        self.assembly.open = None;
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    fn take(&mut self, response: WatchResponse) -> Result<Taken, StoreError> {
        let response = response.0;
        if response.compact_revision > 0 {
            return Ok(Taken::Compacted { oldest: number(response.compact_revision) + 1 });
        }
        if response.canceled {
            let reason: String = response.cancel_reason.chars().take(200).collect();
            if reason.contains("permission") || reason.contains("auth") {
                return Err(StoreError::Denied { what: "watch etcd", source: Some(reason.into()) });
            }
            return Ok(Taken::Canceled { reason });
        }
        for event in response.events {
            if let Some(entry) = event.kv {
                self.assembly.event(etcd_client::KeyValue(entry))?;
            }
        }
        if !response.fragment {
            self.assembly.complete();
        }
        Ok(Taken::Changes)
    }
}

#[cfg(test)]
mod tests {
    use etcd_client::{KeyValue, proto::PbKeyValue};

    use super::*;

    fn assembly(next: u64) -> Assembly {
        let (namespace, prefix) = (Namespace::new("n"), Prefix::new("a/").unwrap());
        Assembly { namespace, prefix, next, open: None, ready: VecDeque::new() }
    }

    fn put(path: &str, revision: i64) -> KeyValue {
        let key = format!("n/{path}").into_bytes();
        KeyValue(PbKeyValue { key, create_revision: 1, mod_revision: revision, version: 1, ..PbKeyValue::default() })
    }

    fn delete(path: &str, revision: i64) -> KeyValue {
        KeyValue(PbKeyValue { key: format!("n/{path}").into_bytes(), mod_revision: revision, ..PbKeyValue::default() })
    }

    fn ready(assembly: &mut Assembly) -> Vec<(u64, Vec<String>)> {
        let items = assembly.ready.drain(..).map(|item| match item {
            WatchItem::Changes { revision, changes } => {
                (revision, changes.iter().map(|change| change.key().to_string()).collect())
            }
            WatchItem::Compacted { .. } => panic!("never from events"),
        });
        items.collect()
    }

    #[test]
    fn a_revision_in_pieces_is_put_together() {
        let mut assembly = assembly(5);
        assembly.event(put("a/old", 4)).unwrap();
        assembly.event(put("a/2", 5)).unwrap();
        assert_eq!(ready(&mut assembly), [], "more of it may come");
        assembly.event(delete("a/1", 5)).unwrap();
        assembly.event(put("a/3", 8)).unwrap();
        assert_eq!(ready(&mut assembly), [(5, vec!["a/1".into(), "a/2".into()])]);
        assert_eq!(assembly.next, 6);
        assembly.complete();
        assert_eq!(ready(&mut assembly), [(8, vec!["a/3".into()])]);
    }

    #[test]
    fn a_cut_off_revision_is_read_again_as_a_whole() {
        let mut assembly = assembly(5);
        assembly.event(put("a/1", 5)).unwrap();
        assembly.open = None; // the connection broke
        assembly.event(put("a/1", 5)).unwrap();
        assembly.event(put("a/2", 5)).unwrap();
        assembly.complete();
        assert_eq!(ready(&mut assembly), [(5, vec!["a/1".into(), "a/2".into()])]);
    }

    #[test]
    fn nonsense_is_refused() {
        let mut assembly = assembly(5);
        assert!(assembly.event(put("b/1", 6)).is_err(), "outside the prefix");
        assert!(assembly.event(put("a/", 6)).is_err(), "no key");
        assembly.event(put("a/1", 7)).unwrap();
        assert!(assembly.event(put("a/2", 6)).is_err(), "backwards");
        let many = (0..=MAX_CHANGES).try_for_each(|i| assembly.event(put(&format!("a/{i}"), 9)));
        assert!(many.is_err(), "endless");
    }
}
