//! Checks of volumes: passed on to the host that holds the volume; what it found is told in an event.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

use supercloud_api::{
    Problem, Volume,
    ids::{GuestId, HostId, RequestId, VolumeId},
    link::{Answer, Directive, VolumeChecked},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{Engine, EngineError, handler::internal};
use crate::state::{Change, Context, EventDraft};

/// The longest problem that is kept, in characters.
const PROBLEM_AT_MOST: usize = 500;
/// Names of lost chunks in an event.
const LOST_AT_MOST: usize = 20;
/// Checks that wait to be passed on, or for their answer.
const ASKED_AT_MOST: usize = 1000;

/// A check that a host is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// The host.
    pub host: HostId,
    /// Whose volume.
    pub guest: GuestId,
    /// How fast it may read, in bytes per second.
    pub bytes_per_s: u64,
}

#[derive(Debug, Default)]
struct Board {
    capable: HashSet<HostId>,
    new: BTreeMap<VolumeId, Asked>,
    /// Passed on: what is not in here and not asked for is no answer.
    under_way: BTreeMap<VolumeId, Asked>,
}

/// Where checks are asked for. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct CheckBoard(Arc<(Mutex<Board>, Notify)>);

impl CheckBoard {
    fn with<T>(&self, work: impl FnOnce(&mut Board) -> T) -> T {
        work(&mut self.0.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A volume is to be checked by its host; false when too many are.
    #[must_use]
    pub fn ask(&self, volume: VolumeId, asked: Asked) -> bool {
        let is_taken = self.with(|board| {
            let has_room = board.new.len() + board.under_way.len() < ASKED_AT_MOST;
            if has_room {
                board.new.insert(volume, asked);
            }
            has_room
        });
        self.0.1.notify_one();
        is_taken
    }

    /// Whether a host takes checks.
    #[must_use]
    pub fn takes(&self, host: HostId) -> bool {
        self.with(|board| board.capable.contains(&host))
    }

    /// What a host said of itself when it came. What it was asked before is lost.
    pub(crate) fn note_capable(&self, host: HostId, is_capable: bool) {
        self.with(|board| {
            board.under_way.retain(|_, asked| asked.host != host);
            if is_capable {
                board.capable.insert(host)
            } else {
                board.capable.remove(&host)
            };
        });
    }
}

impl Engine {
    /// Passes checks on until cancelled.
    pub(super) async fn send_checks(&self, cancel: CancellationToken) {
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                () = self.checks.0.1.notified() => {}
            }
            for (volume, asked) in self.checks.with(|board| std::mem::take(&mut board.new)) {
                let Asked { host, guest, bytes_per_s } = asked;
                self.checks.with(|board| board.under_way.insert(volume, asked));
                if !self.sessions.send(host, Directive::CheckVolume { guest, volume, bytes_per_s }) {
                    self.checks.with(|board| board.under_way.remove(&volume));
                }
            }
        }
    }

    /// A host has checked a volume.
    pub(super) async fn volume_checked(&self, host: HostId, checked: VolumeChecked) -> Result<Answer, Problem> {
        let is_asked = self.checks.with(|board| {
            let is_asked = board.under_way.get(&checked.volume).is_some_and(|asked| asked.host == host);
            if is_asked {
                board.under_way.remove(&checked.volume);
            }
            is_asked
        });
        // Nobody asked: a host does not fill the chain of events with it.
        if is_asked {
            self.tell_checked(host, checked).await.map_err(|error| internal(&error))?;
        }
        Ok(Answer::Noted)
    }

    async fn tell_checked(&self, host: HostId, checked: VolumeChecked) -> Result<(), EngineError> {
        let Some(volume) = self.state.read::<Volume>(&checked.volume).await? else { return Ok(()) };
        let found = checked.found;
        let is_hurt = found.missing + found.damaged > 0 || checked.problem.is_some();
        let is_name = |name: &String| name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
        let lost: Vec<String> = found.lost.into_iter().filter(is_name).take(LOST_AT_MOST).collect();
        let data = serde_json::json!({
            "volume": volume.name,
            "chunks": found.chunks,
            "sound_bytes": found.sound_bytes,
            "fetched_chunks": found.fetched,
            "repaired_chunks": found.repaired,
            "missing_chunks": found.missing,
            "damaged_chunks": found.damaged,
            "lost": lost,
            "problem": checked.problem.map(|problem| problem.chars().take(PROBLEM_AT_MOST).collect::<String>()),
        });
        let mut change = Change::new();
        let kind = if is_hurt { "volume.damaged" } else { "volume.sound" };
        change.event(EventDraft::new(kind).project(volume.project).guest(volume.guest).host(host).data(data));
        self.state.commit(&Context::actor(format!("host:{host}"), RequestId::generate()), change).await?;
        Ok(())
    }
}
