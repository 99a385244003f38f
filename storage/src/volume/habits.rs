//! What the guest does with its blocks, kept for the policies of [`crate::propagation`] and, when asked for, recorded.

use std::{
    collections::HashMap,
    sync::Mutex,
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{Volume, VolumeError, map::BlockState, relock, role::Role};
use crate::{
    BLOCK_BYTES,
    propagation::{
        History, Spare, Tuning, plan_ahead, plan_rest,
        trace::{Recorder, Touch, Trace},
    },
};

/// The clock begins so far from zero: what was told by another host happened before.
const EPOCH_MS: u64 = 1 << 33;
/// Blocks that are planned at once: what is not worth it any more when its turn would come is not pulled.
const PLANNED: usize = 128;
/// What a line is taken to carry before anything was seen of it: 200 Mbit/s.
const LINE_BYTES_PER_S: u64 = 25_000_000;

/// The guest's habits.
#[derive(Debug)]
pub(super) struct Habits {
    began: Instant,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    history: History,
    /// The history came from a source: the rest follows by it.
    is_foretold: bool,
    spare: Spare,
    bytes_per_s: Option<u64>,
    recorder: Option<Recorder>,
}

impl Default for Habits {
    fn default() -> Self {
        Self { began: Instant::now(), state: Mutex::default() }
    }
}

impl Habits {
    fn now_ms(&self) -> u64 {
        EPOCH_MS + u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX / 2)
    }

    /// The guest touches blocks.
    pub(super) fn note(&self, touches: impl Iterator<Item = (u32, Touch)>) {
        let now = self.now_ms();
        let mut state = relock(&self.state);
        for (block, touch) in touches {
            match touch {
                Touch::Read => state.history.read(block, now),
                Touch::Write | Touch::Fill => state.history.wrote(block, now),
            }
            if let Some(recorder) = &mut state.recorder {
                recorder.note(touch, block, now);
            }
        }
    }

    /// The guest, which runs here, waits for a block.
    pub(super) fn note_wait(&self, block: u32) {
        relock(&self.state).history.waited_for(block);
    }

    /// The volume becomes active: a guest that did not come from elsewhere boots.
    pub(super) fn note_activation(&self, before: Role) {
        if !matches!(before, Role::Adopted { .. }) {
            let now = self.now_ms();
            relock(&self.state).history.booted(now);
        }
    }

    /// The source's guest has written a block again.
    pub(super) fn note_rewrite(&self, block: u32) {
        let now = self.now_ms();
        relock(&self.state).history.wrote(block, now);
    }

    /// So many blocks came in this time.
    pub(super) fn note_rate(&self, blocks: usize, took: Duration) {
        let rate = (blocks * BLOCK_BYTES) as f64 / took.as_secs_f64().max(0.001);
        let mut state = relock(&self.state);
        let before = state.bytes_per_s.unwrap_or(rate as u64);
        state.bytes_per_s = Some(before / 2 + rate as u64 / 2);
    }

    /// What the source told.
    pub(super) fn take(&self, told: &[u8]) {
        let now = self.now_ms();
        let mut state = relock(&self.state);
        state.is_foretold = true;
        match History::decode(told, now) {
            Ok(history) => state.history = history,
            Err(error) if !told.is_empty() => {
                tracing::warn!(%error, "what the source tells of its blocks is not understood")
            }
            Err(_) => {}
        }
    }

    /// What of it is to be pulled now, and how many blocks there are.
    pub(super) fn plan(&self, lacking: Vec<(u32, u64)>) -> (Vec<(u32, u64)>, u64) {
        let now = self.now_ms();
        let versions: HashMap<u32, u64> = lacking.iter().copied().collect();
        let blocks: Vec<u32> = lacking.into_iter().map(|(block, _)| block).collect();
        let tuning = Tuning::default();
        let mut state = relock(&self.state);
        let line = state.bytes_per_s.unwrap_or(LINE_BYTES_PER_S);
        let spare = state.spare.take(now, line, &tuning);
        let plan = plan_ahead(&state.history, &blocks, now, &tuning, line, spare);
        state.spare.used(plan.spare.len());
        let chosen = plan.spare.into_iter().chain(plan.now).take(PLANNED);
        let chosen = chosen.filter_map(|block| Some((block, *versions.get(&block)?))).collect();
        (chosen, blocks.len() as u64)
    }

    /// The order in which blocks are to follow.
    pub(super) fn order_rest(&self, blocks: Vec<u32>) -> Vec<u32> {
        let now = self.now_ms();
        let state = relock(&self.state);
        if state.is_foretold { plan_rest(&state.history, &blocks, now, &Tuning::default()) } else { blocks }
    }
}

impl Volume {
    /// What the guest did with its blocks, for the destination of a move.
    ///
    /// # Errors
    /// When the role does not allow peers.
    pub async fn history_for_peer(&self) -> Result<Bytes, VolumeError> {
        self.check_serving()?;
        let told = self.inner.blocking(|inner| {
            let now = inner.habits.now_ms();
            Ok(relock(&inner.habits.state).history.encode(now))
        });
        Ok(told.await?.into())
    }

    /// Begins to record what the guest does with its blocks, in place of what was being recorded.
    pub fn begin_trace(&self) {
        let inner = &self.inner;
        let now = inner.habits.now_ms();
        let changed: Vec<u32> = {
            let state = relock(&inner.map);
            state.map.entries().filter(|(_, entry)| entry.state != BlockState::Base).map(|(block, _)| block).collect()
        };
        let recorder = Recorder::begin(inner.blocks, changed.into_iter(), now);
        relock(&inner.habits.state).recorder = Some(recorder);
    }

    /// What was recorded; none when nothing was begun.
    #[must_use]
    pub fn end_trace(&self) -> Option<Trace> {
        relock(&self.inner.habits.state).recorder.take().map(Recorder::end)
    }
}
