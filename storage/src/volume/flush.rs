//! Flush: making what was acknowledged durable, many waiters for one sync.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use super::{
    Inner, Volume, VolumeError,
    journal::Record,
    map::{BlockState, Entry},
    recovery::RESERVE_VERSIONS,
    relock,
};

/// A hot log above this size asks for a flush.
const HOT_LOG_BYTES: u64 = 4 << 20;
/// A journal is compacted when it is longer than this and than three times what it would be.
const COMPACT_BYTES: u64 = 8 << 20;
/// Without a flush of the guest's, one is made this often: it bounds what a power cut takes from a guest that never
/// flushes, and what `seal` has left to do.
const IDLE_FLUSH: Duration = Duration::from_secs(5);

impl Volume {
    /// When it returns, every operation that was complete when it was called survives a power cut.
    pub async fn flush(&self) -> Result<(), VolumeError> {
        self.inner.flush().await
    }

    /// Flushes every few seconds, and when much is unflushed, until cancelled.
    pub async fn flush_in_background(&self, cancel: &CancellationToken) {
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                () = self.inner.flush_hint.notified() => {}
                () = tokio::time::sleep(IDLE_FLUSH) => {}
            }
            if let Err(error) = self.flush().await {
                tracing::error!(volume = %self.id(), error = super::chain(&error), "background flush failed");
                // The alarm is up; without a pause a broken disk would be hammered.
                tokio::time::sleep(IDLE_FLUSH).await;
            }
        }
    }
}

impl Inner {
    pub(super) async fn flush(self: &Arc<Self>) -> Result<(), VolumeError> {
        let wanted = self.completed.load(Ordering::Acquire);
        if self.has_failed.load(Ordering::Acquire) {
            return Err(VolumeError::Failed);
        }
        let _gate = self.flush_gate.lock().await;
        // Who waited at the gate finds, as a rule, that the flush before has done its work.
        if self.flushed.load(Ordering::Acquire) >= wanted && !self.has_failed.load(Ordering::Acquire) {
            return Ok(());
        }
        self.blocking(|inner| {
            let result = inner.flush_now();
            if result.is_err() {
                inner.fail();
            }
            result
        })
        .await
    }

    /// The work of a flush. Who calls it calls [`Inner::fail`] when it fails.
    pub(super) fn flush_now(&self) -> Result<(), VolumeError> {
        if self.has_failed.load(Ordering::Acquire) {
            return Err(VolumeError::Failed);
        }
        let disk = |what| move |source| VolumeError::Disk { what, source };
        let _one = relock(&self.flush_lock);
        // In this order: what is complete before the count is read is in the data file before the sync.
        let completed = self.completed.load(Ordering::Acquire);
        let dirty = self.counters.dirty.swap(0, Ordering::Relaxed);
        let is_dirty = completed != self.flushed.load(Ordering::Acquire);
        let journal_len = self.journal.len();
        let (records, whole) = {
            let mut state = relock(&self.map);
            let is_reserve_low = state.reserved - state.next_version < RESERVE_VERSIONS / 2;
            if state.pending.is_empty() && !is_reserve_low && !is_dirty {
                return Ok(());
            }
            let pending = std::mem::take(&mut state.pending);
            let mut records: Vec<_> = pending.iter().map(|&b| Record::Block(b, state.map.get(b))).collect();
            if is_reserve_low {
                state.reserved = state.next_version + RESERVE_VERSIONS;
                records.push(Record::Reserve(state.reserved));
            }
            let live = state.map.len() * 48;
            let is_long = journal_len > COMPACT_BYTES && journal_len > 3 * live;
            let whole = is_long.then(|| (state.map.clone(), state.reserved));
            state.hot.turn().map_err(disk("turn the hot log"))?;
            (records, whole)
        };
        if is_dirty || !records.is_empty() {
            self.data.sync().map_err(disk("sync the data file"))?;
        }
        if let Some((map, reserved)) = whole {
            let tail = [Record::Reserve(reserved), Record::Opened(self.disk.boot_id())];
            let entries: Vec<_> = map.entries().map(|(block, entry)| Record::Block(block, entry)).collect();
            self.journal.replace(entries.into_iter().chain(tail))?;
        } else {
            self.journal.append(&records)?;
        }
        let mut state = relock(&self.map);
        for record in &records {
            if let Record::Block(block, Entry { state: now, .. }) = record
                && *now != BlockState::Remote
            {
                state.remote_on_disk.remove(block);
            }
        }
        state.hot.forget_old().map_err(disk("empty the hot log"))?;
        self.flushed.fetch_max(completed, Ordering::AcqRel);
        tracing::trace!(dirty, records = records.len(), "flushed");
        Ok(())
    }

    /// Asks for a flush when much is unflushed.
    pub(super) fn hint_flush(&self, hot_len: u64) {
        if hot_len > HOT_LOG_BYTES {
            self.flush_hint.notify_one();
        }
    }
}
