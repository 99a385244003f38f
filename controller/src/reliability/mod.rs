//! How good it was, out of the events: every one of them is looked at once, in its turn, and what matters of it is kept.
//!
//! Kept are the owners of each guest, when each host was silent, what moves came to, and what providers announced; for a year. All of it
//! is made anew from the events when the controller starts.

mod book;

use std::sync::Arc;

use supercloud_api::{
    Reliability,
    ids::{GuestId, ProjectId},
    unix_ms,
};
use tokio::sync::Mutex;

use crate::state::{State, StateError};

pub use book::Missed;

use book::Book;

/// So long it is kept, in milliseconds.
pub const KEPT_MS: u64 = 366 * 24 * 3_600_000;
/// Events that are read at once.
const PAGE: usize = 1000;

/// Of which guests, and of which time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// From when (wall clock).
    pub from_ms: u64,
    /// Until when.
    pub to_ms: u64,
    /// Only guests of this project.
    pub project: Option<ProjectId>,
    /// Only this guest.
    pub guest: Option<GuestId>,
}

/// What the events told. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct ReliabilityBook(Arc<Mutex<Book>>);

impl ReliabilityBook {
    /// How good it was, as of now.
    ///
    /// # Errors
    /// When the events cannot be read. What was read by then stays read.
    pub async fn read(&self, state: &State, window: Window) -> Result<Reliability, StateError> {
        let mut book = self.0.lock().await;
        loop {
            let (events, more) = state.events(book.seq(), PAGE).await?;
            for event in &events {
                book.see(event);
            }
            if !more {
                break;
            }
            // There may be many: others want the thread, too.
            tokio::task::yield_now().await;
        }
        book.settle(unix_ms());
        book.forget(unix_ms().saturating_sub(KEPT_MS));
        Ok(book.tell(&window))
    }

    /// What was missed ever, as of what was read last.
    pub async fn missed(&self) -> Missed {
        self.0.lock().await.missed()
    }
}
