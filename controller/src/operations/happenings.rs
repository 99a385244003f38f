//! What guests do by themselves, on its way from the link into the chain of events.
//!
//! A guest may reset itself hundreds of times a second, and its host's one link carries the words of its neighbours too. So
//! nothing durable is done where the word is heard: it is counted here, and written beside the link, for each guest and kind at once
//! and then at most once per [`WINDOW`], with the number of times.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use supercloud_api::{
    ids::{Epoch, GuestId, HostId, ProjectId, RequestId},
    link::GuestEventKind,
};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Engine, EngineError};
use crate::{
    chain,
    state::{Change, Context, EventDraft, GuestRecord},
};

/// After an event, others of its guest and kind wait and count for so long.
const WINDOW: Duration = Duration::from_secs(10);

/// What counts as the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Happening {
    host: HostId,
    guest: GuestId,
    epoch: Epoch,
    kind: GuestEventKind,
}

#[derive(Debug)]
struct Counted {
    project: ProjectId,
    /// Not written yet.
    times: u64,
    /// When it was first heard after the last writing: what happened first is written first.
    turn: u64,
    written_at: Option<Instant>,
}

impl Counted {
    fn due_at(&self, now: Instant) -> Instant {
        self.written_at.map_or(now, |at| at + WINDOW)
    }
}

/// Counts; an entry is there for as long as its window, and only for guests that were found to be the teller's.
#[derive(Debug, Default)]
struct Board {
    counted: HashMap<Happening, Counted>,
    turns: u64,
}

impl Board {
    /// Counts; false when nothing of this is known yet.
    fn count(&mut self, what: &Happening, times: u64) -> bool {
        self.turns += 1;
        let Some(counted) = self.counted.get_mut(what) else { return false };
        if counted.times == 0 {
            counted.turn = self.turns;
        }
        counted.times = counted.times.saturating_add(times);
        true
    }

    fn begin(&mut self, what: Happening, project: ProjectId, times: u64) {
        if !self.count(&what, times) {
            self.counted.insert(what, Counted { project, times, turn: self.turns, written_at: None });
        }
    }

    /// What is to be written now, as it happened; it counts as written.
    fn take_due(&mut self, now: Instant) -> Vec<(Happening, ProjectId, u64)> {
        self.counted.retain(|_, counted| counted.times > 0 || counted.due_at(now) > now);
        let mut due: Vec<_> = self
            .counted
            .iter_mut()
            .filter(|(_, counted)| counted.times > 0 && counted.due_at(now) <= now)
            .map(|(what, counted)| {
                counted.written_at = Some(now);
                (counted.turn, (*what, counted.project, std::mem::take(&mut counted.times)))
            })
            .collect();
        due.sort_by_key(|(turn, _)| *turn);
        due.into_iter().map(|(_, happened)| happened).collect()
    }

    /// When there is something to do again.
    fn next(&self, now: Instant) -> Option<Instant> {
        self.counted.values().map(|counted| counted.due_at(now)).min()
    }
}

/// The board, and a bell for who writes.
#[derive(Debug, Default)]
pub(super) struct Happenings {
    board: Mutex<Board>,
    is_news: Notify,
}

impl Happenings {
    fn with<T>(&self, work: impl FnOnce(&mut Board) -> T) -> T {
        work(&mut self.board.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Engine {
    /// A guest did something by itself, so many times since this was last told.
    pub(super) async fn guest_event(
        &self,
        host: HostId,
        guest: GuestId,
        epoch: Epoch,
        kind: GuestEventKind,
        times: u64,
    ) -> Result<(), EngineError> {
        let what = Happening { host, guest, epoch, kind };
        if !self.happenings.with(|board| board.count(&what, times)) {
            let Some(record) = self.state.read::<GuestRecord>(&guest).await? else { return Ok(()) };
            if !record.owner.is_owned_by(host, epoch) {
                return Ok(());
            }
            self.happenings.with(|board| board.begin(what, record.guest.project, times));
            self.happenings.is_news.notify_one();
        }
        if kind == GuestEventKind::PoweredOff {
            self.stop_after_power_off(host, guest, epoch).await?;
        }
        Ok(())
    }

    /// Writes what was counted, until cancelled.
    pub(super) async fn write_happenings(&self, cancel: CancellationToken) {
        loop {
            let next = self.happenings.with(|board| board.next(Instant::now()));
            let due = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => {}
                () = self.happenings.is_news.notified() => {}
                () = cancel.cancelled() => return,
            }
            for (what, project, times) in self.happenings.with(|board| board.take_due(Instant::now())) {
                if let Err(error) = self.write_happening(&what, project, times).await {
                    warn!(guest = %what.guest, "what it did could not be written yet: {}", chain(&error));
                    // With what follows, after a window.
                    self.happenings.with(|board| board.begin(what, project, times));
                }
            }
        }
    }

    async fn write_happening(&self, what: &Happening, project: ProjectId, times: u64) -> Result<(), EngineError> {
        let Happening { host, guest, kind, .. } = *what;
        info!(%guest, %host, event = ?kind, times, "guest event");
        let mut change = Change::new();
        change.event(
            EventDraft::new("guest.event")
                .project(project)
                .guest(guest)
                .host(host)
                .data(serde_json::json!({ "event": kind, "times": times })),
        );
        self.state.commit(&Context::actor(format!("guest:{guest}"), RequestId::generate()), change).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_resets_in_a_loop_is_written_once_per_window_and_nothing_is_lost() {
        let mut board = Board::default();
        let what = |kind| Happening { host: HostId::generate(), guest: GuestId::generate(), epoch: Epoch(1), kind };
        let (rebooted, stalled) = (what(GuestEventKind::Rebooted), what(GuestEventKind::DiskStalled));
        let project = ProjectId::generate();
        let start = Instant::now();
        assert!(!board.count(&rebooted, 1), "whose it is must be looked up first");
        board.begin(rebooted, project, 1);
        let mut written = Vec::new();
        for step in 0..1000_u32 {
            let now = start + WINDOW * step / 100;
            written.extend(board.take_due(now).into_iter().map(|(_, _, times)| times));
            assert!(board.count(&rebooted, 1));
        }
        assert_eq!(written, [1, 100, 100, 100, 100, 100, 100, 100, 100, 100]);
        // Another kind does not wait for it; what happened first comes first.
        board.begin(stalled, project, 1);
        let now = start + WINDOW * 10;
        let kinds: Vec<_> = board.take_due(now).into_iter().map(|(what, _, times)| (what.kind, times)).collect();
        assert_eq!(kinds, [(GuestEventKind::Rebooted, 100), (GuestEventKind::DiskStalled, 1)]);
        assert_eq!(board.next(now), Some(now + WINDOW));
        assert!(board.take_due(now + WINDOW).is_empty());
        assert_eq!((board.counted.len(), board.next(now)), (0, None), "nothing is kept of guests that are still");
    }
}
