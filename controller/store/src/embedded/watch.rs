//! A watch on the embedded store: reads the history in pieces, as fast as its consumer takes them.

use std::{collections::VecDeque, sync::Arc};

use futures::stream;
use tokio::sync::watch;

use super::{Shared, view::Found};
use crate::{Prefix, StoreError, WatchItem, WatchStream};

struct Cursor {
    shared: Arc<Shared>,
    prefix: Prefix,
    next: u64,
    ready: VecDeque<WatchItem>,
    progress: watch::Receiver<u64>,
    ended: bool,
}

/// Starts a watch. Nothing is held for it: history is read when the stream is polled.
pub(super) fn stream(shared: Arc<Shared>, prefix: Prefix, from: u64) -> WatchStream {
    let progress = shared.progress();
    let cursor = Cursor { shared, prefix, next: from, ready: VecDeque::new(), progress, ended: false };
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
        if self.next == 0 {
            return Err(StoreError::InvalidArgument { reason: "a watch starts at revision 1 or later".into() });
        }
        loop {
            if let Some(item) = self.ready.pop_front() {
                return Ok(item);
            }
            // Mark the newest revision as seen before reading, so that none after it is slept through.
            let newest = *self.progress.borrow_and_update();
            if newest < self.next {
                // Fails when the store was closed or failed; the read below then tells which.
                let _ = self.progress.wait_for(|revision| *revision >= self.next).await;
            }
            let (prefix, from) = (self.prefix.clone(), self.next);
            let found = super::read(&self.shared, "read the history", move |view| view.changes(&prefix, from)).await?;
            match found {
                Found::Compacted { oldest } => return Ok(WatchItem::Compacted { oldest }),
                Found::Changes { revisions, next } => {
                    self.next = next;
                    let items = revisions.into_iter();
                    self.ready.extend(items.map(|(revision, changes)| WatchItem::Changes { revision, changes }));
                }
            }
        }
    }
}
