//! Following a folder: first everything that is there, then every change, healed over compactions and broken connections.

use std::{collections::VecDeque, marker::PhantomData, time::Duration};

use futures::StreamExt as _;
use supercloud_store::{Change, Prefix, WatchItem, WatchStream};

use super::{Record, State, StateError, Stored, keys, stored};

/// The pause before a follower tries a store again that failed.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// What a follower sees.
#[derive(Debug, Clone, PartialEq)]
pub enum Seen<T> {
    /// Everything is told anew from here (at the start, and after history was lost): forget what was known.
    Restart,
    /// A record that is there, or has changed.
    Put(Stored<T>),
    /// A record that is gone; its id as text.
    Gone(String),
    /// Everything that was there has been told; what follows are changes.
    CaughtUp,
}

/// Follows the records of a type, or one of them.
pub struct Follower<T> {
    state: State,
    prefix: Prefix,
    watch: Option<WatchStream>,
    queue: VecDeque<Result<Seen<T>, StateError>>,
    record: PhantomData<T>,
}

impl<T> std::fmt::Debug for Follower<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Follower").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl State {
    /// Follows all records of a type.
    #[must_use]
    pub fn follow<T: Record>(&self) -> Follower<T> {
        self.follow_prefix(keys::folder(T::FOLDER))
    }

    /// Follows one record.
    #[must_use]
    pub fn follow_one<T: Record>(&self, id: &T::Id) -> Follower<T> {
        let key = keys::record::<T>(id);
        self.follow_prefix(Prefix::new(key.as_str()).expect("every key is a prefix"))
    }

    fn follow_prefix<T: Record>(&self, prefix: Prefix) -> Follower<T> {
        Follower { state: self.clone(), prefix, watch: None, queue: VecDeque::new(), record: PhantomData }
    }
}

impl<T: Record> Follower<T> {
    /// The next thing to see; waits for it. A store that fails is tried again for ever, so the only errors are records that
    /// cannot be read (which are skipped: call again). Cancelling it loses nothing.
    ///
    /// # Errors
    /// [`StateError::Damaged`] for a record that cannot be read.
    pub async fn next(&mut self) -> Result<Seen<T>, StateError> {
        loop {
            if let Some(seen) = self.queue.pop_front() {
                return seen;
            }
            match &mut self.watch {
                None => match supercloud_store::list(&**self.state.store(), &self.prefix).await {
                    Ok((items, revision)) => {
                        self.queue.push_back(Ok(Seen::Restart));
                        self.queue.extend(items.iter().map(|item| stored(item).map(Seen::Put)));
                        self.queue.push_back(Ok(Seen::CaughtUp));
                        self.watch = Some(self.state.store().watch(self.prefix.clone(), revision + 1));
                    }
                    Err(error) => {
                        tracing::warn!(prefix = %self.prefix, error = %crate::chain(&error), "cannot list; trying again");
                        tokio::time::sleep(RETRY_PAUSE).await;
                    }
                },
                Some(watch) => match watch.next().await {
                    Some(Ok(WatchItem::Changes { changes, .. })) => {
                        self.queue.extend(changes.iter().map(|change| match change {
                            Change::Put(found) => stored(found).map(Seen::Put),
                            Change::Delete { key } => {
                                Ok(Seen::Gone(key.as_str().rsplit('/').next().unwrap_or_default().to_owned()))
                            }
                        }));
                    }
                    Some(Ok(WatchItem::Compacted { .. })) => self.watch = None,
                    Some(Err(error)) => {
                        tracing::warn!(prefix = %self.prefix, error = %crate::chain(&error), "the watch broke; listing again");
                        self.watch = None;
                        tokio::time::sleep(RETRY_PAUSE).await;
                    }
                    None => {
                        self.watch = None;
                        tokio::time::sleep(RETRY_PAUSE).await;
                    }
                },
            }
        }
    }
}
