//! How far operations are, between two writes of their records. Agents tell several times a second; the store hears of it
//! once a second at most, REST sees the newest.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use supercloud_api::{Progress, ids::OperationId, unix_ms};

/// The newest progress of each operation under way. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct ProgressBoard(Arc<Mutex<HashMap<OperationId, Entry>>>);

#[derive(Debug, Default)]
struct Entry {
    progress: Progress,
    is_unwritten: bool,
    /// When it last got on (wall time), as far as was heard.
    moved_at_ms: Option<u64>,
}

/// Merges what a side tells into what is known: counters never go back; what describes the moment is taken as it is, if
/// the side says something about it.
pub fn merge(known: &mut Progress, told: &Progress) {
    known.memory_total_bytes = known.memory_total_bytes.max(told.memory_total_bytes);
    known.memory_sent_bytes = known.memory_sent_bytes.max(told.memory_sent_bytes);
    known.round = known.round.max(told.round);
    known.disk_bytes_before_resume = known.disk_bytes_before_resume.max(told.disk_bytes_before_resume);
    known.disk_bytes_after_resume = known.disk_bytes_after_resume.max(told.disk_bytes_after_resume);
    known.downtime_ms = known.downtime_ms.max(told.downtime_ms);
    if told.memory_total_bytes > 0 {
        // The source speaks: it alone knows what remains and how fast it goes.
        known.memory_remaining_bytes = told.memory_remaining_bytes;
        known.dirty_bytes_per_s = told.dirty_bytes_per_s;
        known.bandwidth_bytes_per_s = told.bandwidth_bytes_per_s;
        known.is_holding = told.is_holding;
        known.eta_min_ms = told.eta_min_ms;
        known.eta_max_ms = told.eta_max_ms;
    }
    if told.disk_missing_bytes > 0 || told.disk_bytes_after_resume.is_some() {
        known.disk_missing_bytes = told.disk_missing_bytes;
    }
    known.memory_missing_bytes = match (known.memory_missing_bytes, told.memory_missing_bytes) {
        (Some(known), Some(told)) => Some(known.min(told)),
        (known, told) => known.or(told),
    };
    if let Some(mirror) = &told.mirror {
        // Of one source, which counts forward.
        known.mirror = Some(mirror.clone());
    }
    if !told.message.is_empty() {
        known.message = told.message.chars().take(200).collect();
    }
}

/// Whether something was done between the two, not merely told: a rate or an estimate that changes moves nothing.
fn has_moved(before: &Progress, now: &Progress) -> bool {
    let done = |progress: &Progress| Progress {
        dirty_bytes_per_s: 0,
        bandwidth_bytes_per_s: 0,
        eta_min_ms: None,
        eta_max_ms: None,
        ..progress.clone()
    };
    done(before) != done(now)
}

/// What is left of the moment when an operation has ended: nothing.
pub fn settle(progress: &mut Progress) {
    progress.memory_remaining_bytes = 0;
    progress.dirty_bytes_per_s = 0;
    progress.bandwidth_bytes_per_s = 0;
    progress.is_holding = false;
    progress.eta_min_ms = None;
    progress.eta_max_ms = None;
    progress.message.clear();
}

impl ProgressBoard {
    /// Takes what a side tells.
    pub fn tell(&self, operation: OperationId, told: &Progress) {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = entries.entry(operation).or_default();
        let before = entry.progress.clone();
        merge(&mut entry.progress, told);
        entry.is_unwritten = true;
        if has_moved(&before, &entry.progress) {
            entry.moved_at_ms = Some(unix_ms());
        }
    }

    /// When the operation was last heard to get on (wall time); absent: not since this controller runs.
    #[must_use]
    pub fn moved_at_ms(&self, operation: OperationId) -> Option<u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&operation)?.moved_at_ms
    }

    /// The record's progress brought up to what is known.
    pub fn apply(&self, operation: OperationId, progress: &mut Progress) {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.get(&operation) {
            merge(progress, &entry.progress);
        }
    }

    /// The operations of which more is known than is written; they count as written from here.
    #[must_use]
    pub fn take_unwritten(&self) -> Vec<OperationId> {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries
            .iter_mut()
            .filter_map(|(operation, entry)| std::mem::take(&mut entry.is_unwritten).then_some(*operation))
            .collect()
    }

    /// Forgets an operation that has ended.
    pub fn forget(&self, operation: OperationId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&operation);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_never_go_back_and_each_side_speaks_for_itself() {
        let board = ProgressBoard::default();
        let operation = OperationId::generate();
        let source = Progress {
            memory_total_bytes: 100,
            memory_sent_bytes: 60,
            memory_remaining_bytes: 40,
            round: 2,
            ..Progress::default()
        };
        board.tell(operation, &source);
        board.tell(operation, &Progress { disk_bytes_before_resume: Some(7), ..Progress::default() });
        board.tell(operation, &Progress { memory_sent_bytes: 50, round: 1, ..source.clone() });
        let mut seen = Progress::default();
        board.apply(operation, &mut seen);
        assert_eq!((seen.memory_sent_bytes, seen.round, seen.disk_bytes_before_resume), (60, 2, Some(7)));
        assert_eq!(seen.memory_remaining_bytes, 40);
        assert_eq!(seen.disk_bytes_after_resume, None, "nobody has told of it");
        for (told, shown) in [(None, None), (Some(9), Some(9)), (None, Some(9)), (Some(7), Some(7)), (Some(8), Some(7))]
        {
            board.tell(operation, &Progress { memory_missing_bytes: told, ..Progress::default() });
            board.apply(operation, &mut seen);
            assert_eq!(seen.memory_missing_bytes, shown);
        }
        assert_eq!(board.take_unwritten(), vec![operation]);
        assert!(board.take_unwritten().is_empty());
        assert!(board.moved_at_ms(operation).is_some());
        let rates = Progress { bandwidth_bytes_per_s: 9, eta_max_ms: Some(1), dirty_bytes_per_s: 3, ..source.clone() };
        assert!(!has_moved(&source, &rates), "it only tells, and does nothing");
        assert!(has_moved(&source, &Progress { message: "storing the disk: block 2 of 9".into(), ..source.clone() }));
        assert!(has_moved(&source, &Progress { memory_remaining_bytes: 39, ..source.clone() }));
        seen.message = "copying".to_owned();
        settle(&mut seen);
        assert_eq!((seen.memory_sent_bytes, seen.memory_remaining_bytes, seen.message.as_str()), (60, 0, ""));
    }
}
