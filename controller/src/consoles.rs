//! Consoles that somebody looks at: which agent shows them, and who hears what they say.
//!
//! Nothing of a console is kept here. A reader that does not keep up is let go, a host that goes away ends its consoles.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use supercloud_api::{
    ids::{Epoch, GuestId, HostId},
    link::{ConsoleBytes, ConsoleNews, ConsoleOrder, Directive},
    unix_ms,
};
use tokio::sync::mpsc;

use crate::link::Sessions;

/// Pieces that wait for a slow reader before it is let go.
const PIECES: usize = 256;

/// Why a console cannot be shown, or typed into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConsoleError {
    /// The host is not connected, or its agent is too old to show consoles.
    #[error("the guest's host is not connected, or its agent cannot show consoles")]
    NotThere,
    /// It is shown to nobody.
    #[error("there is no such console; it is over, or another one of the guest's took its place")]
    Over,
}

struct Shown {
    host: HostId,
    guest: GuestId,
    pieces: mpsc::Sender<Bytes>,
}

#[derive(Default)]
struct Board {
    capable: HashSet<HostId>,
    shown: HashMap<u64, Shown>,
    next: u64,
}

/// All consoles that are shown now. Cheap to clone.
#[derive(Clone)]
pub struct Consoles {
    sessions: Sessions,
    board: Arc<Mutex<Board>>,
}

impl fmt::Debug for Consoles {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Consoles").field("shown", &self.board().shown.len()).finish_non_exhaustive()
    }
}

/// A console that is shown for as long as this lives.
#[derive(Debug)]
pub struct Console {
    /// Its number.
    pub number: u64,
    /// What it says; ends with it.
    pub pieces: mpsc::Receiver<Bytes>,
    consoles: Consoles,
}

impl Drop for Console {
    fn drop(&mut self) {
        self.consoles.close(self.number);
    }
}

impl Consoles {
    /// None shown yet.
    #[must_use]
    pub fn new(sessions: Sessions) -> Self {
        // Not the numbers that the controller before gave: an agent may still tell of those.
        let board = Board { next: unix_ms() << 8, ..Board::default() };
        Self { sessions, board: Arc::new(Mutex::new(board)) }
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a host's agent, which is connected now, shows consoles. Those that it showed before are over.
    pub fn note_capable(&self, host: HostId, is_capable: bool) {
        let mut board = self.board();
        board.shown.retain(|_, shown| shown.host != host);
        if is_capable {
            board.capable.insert(host);
        } else {
            board.capable.remove(&host);
        }
    }

    /// A host is away: its consoles are over.
    pub fn host_gone(&self, host: HostId) {
        self.note_capable(host, false);
    }

    /// Shows a guest's console.
    ///
    /// # Errors
    /// [`ConsoleError::NotThere`].
    pub fn open(&self, host: HostId, guest: GuestId, epoch: Epoch) -> Result<Console, ConsoleError> {
        let (sender, pieces) = mpsc::channel(PIECES);
        let number = {
            let mut board = self.board();
            if !board.capable.contains(&host) {
                return Err(ConsoleError::NotThere);
            }
            board.next += 1;
            let number = board.next;
            board.shown.insert(number, Shown { host, guest, pieces: sender });
            number
        };
        // Closed again when it is dropped.
        let console = Console { number, pieces, consoles: self.clone() };
        if self.order(host, number, ConsoleOrder::Open { guest, epoch }) {
            Ok(console)
        } else {
            Err(ConsoleError::NotThere)
        }
    }

    fn order(&self, host: HostId, console: u64, order: ConsoleOrder) -> bool {
        self.sessions.send(host, Directive::Console { console, order })
    }

    /// Types into a console of this guest's.
    ///
    /// # Errors
    /// [`ConsoleError`].
    pub fn typed(&self, guest: GuestId, number: u64, data: ConsoleBytes) -> Result<(), ConsoleError> {
        let host = self.board().shown.get(&number).filter(|shown| shown.guest == guest).map(|shown| shown.host);
        let host = host.ok_or(ConsoleError::Over)?;
        if self.order(host, number, ConsoleOrder::Type { data }) { Ok(()) } else { Err(ConsoleError::NotThere) }
    }

    /// A host tells of a console; of one that it does not show, nothing is taken.
    pub fn told(&self, host: HostId, number: u64, news: ConsoleNews) {
        let mut board = self.board();
        let Some(shown) = board.shown.get(&number).filter(|shown| shown.host == host) else { return };
        let is_over = match news {
            ConsoleNews::Said { data } => shown.pieces.try_send(Bytes::from(data.0)).is_err(),
            ConsoleNews::Closed { why } => {
                let text: String = why.chars().filter(|c| !c.is_control()).take(200).collect();
                let _ = shown.pieces.try_send(Bytes::from(format!("\r\n[{text}]\r\n")));
                board.shown.remove(&number);
                return;
            }
        };
        if is_over {
            board.shown.remove(&number);
            drop(board);
            self.order(host, number, ConsoleOrder::Close);
        }
    }

    /// Whether somebody looks at it.
    #[must_use]
    pub fn is_shown(&self, number: u64) -> bool {
        self.board().shown.contains_key(&number)
    }

    /// Shows it no more.
    pub fn close(&self, number: u64) {
        let shown = self.board().shown.remove(&number);
        if let Some(shown) = shown {
            self.order(shown.host, number, ConsoleOrder::Close);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(bytes: &[u8]) -> ConsoleNews {
        ConsoleNews::Said { data: ConsoleBytes(bytes.to_vec()) }
    }

    #[tokio::test]
    async fn only_the_host_that_shows_it_is_heard_and_it_ends_with_that_host() {
        let sessions = Sessions::default();
        let consoles = Consoles::new(sessions.clone());
        let (host, other, guest) = (HostId::generate(), HostId::generate(), GuestId::generate());
        assert_eq!(consoles.open(host, guest, Epoch(1)).unwrap_err(), ConsoleError::NotThere);
        consoles.note_capable(host, true);
        // It said so once, and is away.
        assert_eq!(consoles.open(host, guest, Epoch(1)).unwrap_err(), ConsoleError::NotThere);
        let mut orders = sessions.open_for_tests(host);
        let mut console = consoles.open(host, guest, Epoch(1)).unwrap();
        let number = console.number;
        assert!(matches!(
            orders.recv().await,
            Some(Directive::Console { console, order: ConsoleOrder::Open { .. } }) if console == number
        ));
        consoles.told(other, number, said(b"lies"));
        consoles.told(host, number + 1, said(b"stale"));
        consoles.told(host, number, said(b"truth"));
        assert_eq!(console.pieces.recv().await.unwrap(), "truth");
        let data = || ConsoleBytes(b"x".to_vec());
        assert_eq!(consoles.typed(GuestId::generate(), number, data()), Err(ConsoleError::Over));
        consoles.typed(guest, number, data()).unwrap();
        assert!(matches!(orders.recv().await, Some(Directive::Console { order: ConsoleOrder::Type { .. }, .. })));
        // Nobody reads: it is let go, and the agent is told.
        for _ in 0..=PIECES {
            consoles.told(host, number, said(b"more"));
        }
        assert!(matches!(orders.recv().await, Some(Directive::Console { order: ConsoleOrder::Close, .. })));
        assert_eq!(consoles.typed(guest, number, data()), Err(ConsoleError::Over));
        let second = consoles.open(host, guest, Epoch(1)).unwrap();
        orders.recv().await.unwrap();
        assert!(consoles.is_shown(second.number));
        drop(second);
        assert!(matches!(orders.recv().await, Some(Directive::Console { order: ConsoleOrder::Close, .. })));
        let mut third = consoles.open(host, guest, Epoch(1)).unwrap();
        consoles.told(host, third.number, ConsoleNews::Closed { why: "the guest\x1b[2J left".to_owned() });
        assert_eq!(third.pieces.recv().await.unwrap(), "\r\n[the guest[2J left]\r\n");
        assert_eq!(third.pieces.recv().await, None);
        let mut fourth = consoles.open(host, guest, Epoch(1)).unwrap();
        consoles.host_gone(host);
        assert_eq!(fourth.pieces.recv().await, None);
    }
}
