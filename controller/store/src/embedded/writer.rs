//! The one writer: a thread that takes transactions from a queue and commits as many as wait there with one flush.
//!
//! ```text
//! queue -> [txn, txn, txn] -> compare and stage, one after the other, each on top of those before
//!       -> one atomic sled batch -> flush + fdatasync -> readers and watchers see it -> answers
//! ```
//! Readers are locked out between the batch and the end of its flush, so nobody sees what is not durable. If the flush
//! fails, what the disk holds is unknown: the outcomes are reported as unknown, and the store answers nothing more.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::{
    Shared, State,
    folder::Folder,
    layout::{self, Meta, Place, Pointer, Record, RecordKind},
    view::{Fault, History, View},
};
use crate::{Key, Op, StoreError, Txn, TxnOutcome, Value, Versioned};

/// Most transactions under one flush.
const MAX_GROUP: usize = 256;
/// No more transactions join a group that has reached this size, in bytes.
const MAX_GROUP_BYTES: usize = 4 << 20;
/// Revisions dropped in one batch at most when history is compacted.
const MAX_TRIM_REVISIONS: u64 = 1024;
/// Revisions between two notes of the high-water mark.
const HIGH_WATER_STEP: u64 = 4096;

/// What the thread is asked for.
pub(super) enum Request {
    Txn { txn: Txn, reply: oneshot::Sender<Result<TxnOutcome, StoreError>>, _room: OwnedSemaphorePermit },
    Compact { revision: u64, reply: oneshot::Sender<Result<(), StoreError>> },
    Close { reply: oneshot::Sender<()> },
}

/// How much history is kept for watches.
#[derive(Debug, Clone, Copy)]
pub(super) struct Retention {
    pub revisions: usize,
    pub bytes: u64,
}

/// The thread's state.
pub(super) struct Writer {
    pub shared: Arc<Shared>,
    pub folder: Folder,
    pub db: sled::Db,
    pub meta: Meta,
    pub history: History,
    pub retention: Retention,
}

type TxnReply = oneshot::Sender<Result<TxnOutcome, StoreError>>;

impl Writer {
    /// Runs until the store is closed or dropped.
    pub(super) fn run(mut self, mut queue: mpsc::Receiver<Request>) {
        let mut closing = None;
        let mut next = None;
        while closing.is_none() {
            let Some(request) = next.take().or_else(|| queue.blocking_recv()) else { break };
            match request {
                Request::Txn { txn, reply, _room } => {
                    let (mut bytes, mut group) = (txn.size_bytes(), vec![(txn, reply)]);
                    while group.len() < MAX_GROUP && bytes < MAX_GROUP_BYTES {
                        match queue.try_recv() {
                            Ok(Request::Txn { txn, reply, _room }) => {
                                bytes += txn.size_bytes();
                                group.push((txn, reply));
                            }
                            Ok(other) => {
                                next = Some(other);
                                break;
                            }
                            Err(_) => break,
                        }
                    }
                    self.commit_group(group);
                }
                Request::Compact { revision, reply } => {
                    // A caller that went away wants no answer.
                    let _ = reply.send(self.compact(revision));
                }
                Request::Close { reply } => closing = Some(reply),
            }
        }
        self.shut_down();
        // What still waits was never begun: its callers see their replies dropped, and the store closed.
        drop(queue);
        if let Some(reply) = closing {
            let _ = reply.send(());
        }
    }

    fn shut_down(self) {
        let Self { shared, folder, db, meta, .. } = self;
        let healthy = {
            let mut state = shared.state_mut();
            let healthy = matches!(*state, State::Open { .. });
            if healthy {
                *state = State::Closed;
            }
            healthy
        };
        shared.end_watches();
        drop(db);
        if healthy && let Err(e) = folder.set_high_water(meta.revision) {
            tracing::warn!(path = %folder.path().display(), error = %e, "could not note the last revision");
        }
    }

    /// Stages a group, makes it durable, answers. Never panics out.
    fn commit_group(&mut self, group: Vec<(Txn, TxnReply)>) {
        if let Some(what) = self.shared.shortage() {
            for (_, reply) in group {
                let _ = reply.send(Err(StoreError::Unavailable { what, source: None }));
            }
            return;
        }
        if self.shared.refusal().is_some() {
            return; // The callers find the same refusal when their reply never comes.
        }
        let (txns, replies): (Vec<_>, Vec<_>) = group.into_iter().unzip();
        let outcome = catch_unwind(AssertUnwindSafe(|| self.commit(txns)));
        match outcome {
            Ok(Ok(answers)) => {
                for (reply, answer) in replies.into_iter().zip(answers) {
                    let _ = reply.send(Ok(answer));
                }
            }
            Ok(Err(Failure { written, error })) => {
                self.fail(error.to_string());
                for reply in replies {
                    let _ = reply.send(Err(if written {
                        StoreError::UnknownOutcome { source: Some(error.to_string().into()) }
                    } else {
                        StoreError::Failed { what: "read the store", source: Some(error.to_string().into()) }
                    }));
                }
            }
            Err(_) => {
                self.fail("the storage engine panicked".into());
                for reply in replies {
                    let source = Some("the storage engine panicked".into());
                    let _ = reply.send(Err(StoreError::UnknownOutcome { source }));
                }
            }
        }
    }

    fn fail(&self, reason: String) {
        tracing::error!(path = %self.folder.path().display(), %reason, "the store failed");
        *self.shared.state_mut() = State::Failed(reason);
        self.shared.end_watches();
    }

    fn commit(&mut self, txns: Vec<Txn>) -> Result<Vec<TxnOutcome>, Failure> {
        let db = self.db.clone();
        let view = View { db: &db, meta: self.meta };
        let mut staged = Staged::new(view);
        let mut answers = Vec::with_capacity(txns.len());
        for txn in txns {
            answers.push(staged.apply(txn).map_err(Failure::reading)?);
        }
        if staged.added.is_empty() {
            return Ok(answers);
        }
        let revisions = self.history.len() + staged.added.len();
        let bytes: u64 = self.history.iter().chain(&staged.added).map(|(_, bytes)| bytes).sum();
        let trimmed = self.plan_trim(revisions, bytes, 2 * staged.added.len() as u64 + 16);
        if let Some(last) = trimmed {
            staged.trim(last).map_err(Failure::reading)?;
        }
        let (batch, meta, added) = staged.finish();
        self.write(batch, meta)?;
        self.history.extend(added);
        self.forget(meta.oldest);
        Ok(answers)
    }

    /// How far to drop history so that it fits, by at most `limit` revisions: the last revision to drop.
    fn plan_trim(&self, revisions: usize, mut bytes: u64, limit: u64) -> Option<u64> {
        let mut count = revisions;
        let mut last = None;
        for (revision, size) in self.history.iter().take(usize::try_from(limit).unwrap_or(usize::MAX)) {
            if count <= self.retention.revisions && bytes <= self.retention.bytes {
                break;
            }
            count -= 1;
            bytes -= size;
            last = Some(*revision);
        }
        last
    }

    fn forget(&mut self, oldest: u64) {
        while self.history.front().is_some_and(|(revision, _)| *revision < oldest) {
            self.history.pop_front();
        }
    }

    /// Makes a batch durable and then visible.
    fn write(&mut self, batch: sled::Batch, meta: Meta) -> Result<(), Failure> {
        {
            let mut state = self.shared.state_mut();
            self.db.apply_batch(batch).map_err(Failure::writing)?;
            self.db.flush().map_err(Failure::writing)?;
            self.folder.sync().map_err(|e| Failure::writing(sled::Error::Io(e)))?;
            if let State::Open { meta: visible, .. } = &mut *state {
                *visible = meta;
            }
        }
        let crossed = meta.revision / HIGH_WATER_STEP != self.meta.revision / HIGH_WATER_STEP;
        self.meta = meta;
        self.shared.announce(meta.revision);
        if crossed && let Err(e) = self.folder.set_high_water(meta.revision) {
            tracing::warn!(path = %self.folder.path().display(), error = %e, "could not note the revision");
        }
        Ok(())
    }

    fn compact(&mut self, revision: u64) -> Result<(), StoreError> {
        if let Some(error) = self.shared.refusal() {
            return Err(error);
        }
        if revision > self.meta.revision {
            let reason = format!("revision {revision} to compact lies after the newest, {}", self.meta.revision);
            return Err(StoreError::InvalidArgument { reason });
        }
        while self.meta.oldest <= revision {
            let last = revision.min(self.meta.oldest.saturating_add(MAX_TRIM_REVISIONS - 1));
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                let db = self.db.clone();
                let mut staged = Staged::new(View { db: &db, meta: self.meta });
                staged.trim(last).map_err(Failure::reading)?;
                let (batch, meta, _) = staged.finish();
                self.write(batch, meta)
            }));
            let error = match outcome {
                Ok(Ok(())) => {
                    self.forget(last + 1);
                    continue;
                }
                Ok(Err(Failure { error, .. })) => error.to_string(),
                Err(_) => "the storage engine panicked".to_owned(),
            };
            self.fail(error.clone());
            return Err(StoreError::Failed { what: "compact the history", source: Some(error.into()) });
        }
        Ok(())
    }
}

/// Why a group failed, and whether any of it may have reached the disk.
struct Failure {
    written: bool,
    error: Fault,
}

impl Failure {
    fn reading(error: Fault) -> Self {
        Self { written: false, error }
    }

    fn writing(error: sled::Error) -> Self {
        Self { written: true, error: error.into() }
    }
}

/// Changes on top of what is durable, not yet written.
struct Staged<'a> {
    view: View<'a>,
    meta: Meta,
    overlay: HashMap<Key, Option<(Versioned, Pointer)>>,
    batch: sled::Batch,
    added: History,
}

impl<'a> Staged<'a> {
    fn new(view: View<'a>) -> Self {
        let (overlay, batch, added) = (HashMap::new(), sled::Batch::default(), History::new());
        Self { view, meta: view.meta, overlay, batch, added }
    }

    fn current(&self, key: &Key) -> Result<Option<(Versioned, Pointer)>, Fault> {
        match self.overlay.get(key) {
            Some(staged) => Ok(staged.clone()),
            None => self.view.current(key),
        }
    }

    fn apply(&mut self, txn: Txn) -> Result<TxnOutcome, Fault> {
        let mut current = Vec::with_capacity(txn.compares.len());
        for compare in &txn.compares {
            current.push(self.current(&compare.key)?.map(|(versioned, _)| versioned));
        }
        if !txn.compares.iter().zip(&current).all(|(compare, has)| compare.condition.holds(has.as_ref())) {
            return Ok(TxnOutcome::Conflict { current });
        }
        let mut changes = Vec::with_capacity(txn.ops.len());
        for op in txn.ops {
            let before = self.current(op.key())?;
            // A delete of what is absent is no change.
            if before.is_some() || matches!(op, Op::Put { .. }) {
                changes.push((op, before));
            }
        }
        if changes.is_empty() {
            return Ok(TxnOutcome::Committed { revision: self.meta.revision });
        }
        changes.sort_by(|(a, _), (b, _)| a.key().cmp(b.key()));
        let revision = self.meta.revision + 1;
        let count = u16::try_from(changes.len()).unwrap_or(u16::MAX);
        let mut bytes = 0;
        for (index, (op, before)) in (0..).zip(changes) {
            bytes += self.stage(revision, index, count, op, before);
        }
        self.meta.revision = revision;
        self.added.push_back((revision, bytes));
        Ok(TxnOutcome::Committed { revision })
    }

    /// Stages one change; returns the bytes it adds to the log.
    fn stage(&mut self, revision: u64, index: u16, count: u16, op: Op, before: Option<(Versioned, Pointer)>) -> u64 {
        // What history no longer needs goes when it stops being current.
        if let Some((_, pointer)) = &before
            && pointer.mod_revision < self.meta.oldest
        {
            pointer.log_keys().for_each(|key| self.batch.remove(&key));
        }
        let (record, value) = match op {
            Op::Delete { key } => {
                self.batch.remove(layout::kv_key(key.as_bytes()));
                self.overlay.insert(key.clone(), None);
                (Record { count, key, kind: RecordKind::Delete }, Value::default())
            }
            Op::Put { key, value } => {
                let value_len = u32::try_from(value.len()).unwrap_or(u32::MAX);
                let (create_revision, version) =
                    before.map_or((revision, 1), |(before, _)| (before.create_revision, before.version + 1));
                let pointer = Pointer { mod_revision: revision, index, value_len };
                self.batch.insert(layout::kv_key(key.as_bytes()), &pointer.encode());
                let versioned = Versioned {
                    key: key.clone(),
                    value: value.clone(),
                    create_revision,
                    mod_revision: revision,
                    version,
                };
                self.overlay.insert(key.clone(), Some((versioned, pointer)));
                (Record { count, key, kind: RecordKind::Put { create_revision, version, value_len } }, value)
            }
        };
        let mut bytes = 0;
        for (chunk, entry) in record.encode(&value) {
            let place = layout::log_key(revision, index, chunk);
            bytes += place.len() + entry.len();
            self.batch.insert(&place, entry);
        }
        bytes as u64
    }

    /// Stages dropping the history of `last`, which is durable already, and all before it.
    fn trim(&mut self, last: u64) -> Result<(), Fault> {
        let range = layout::log_key(self.meta.oldest, 0, 0)..layout::log_key(last + 1, 0, 0);
        let mut keep = false;
        for entry in self.view.db.range(range) {
            let (place, bytes) = entry?;
            let Place::Log { revision, index, chunk } = Place::decode(&place)? else {
                return Err(Fault::Inconsistent("a foreign entry in the log".into()));
            };
            if chunk == 0 {
                let key = Record::decode(&bytes)?.0.key;
                let current = match self.overlay.get(&key) {
                    Some(staged) => staged.as_ref().map(|(_, pointer)| *pointer),
                    None => {
                        let pointer = self.view.db.get(layout::kv_key(key.as_bytes()))?;
                        pointer.map(|bytes| Pointer::decode(&bytes)).transpose()?
                    }
                };
                keep = current.is_some_and(|pointer| (pointer.mod_revision, pointer.index) == (revision, index));
            }
            if !keep {
                self.batch.remove(place);
            }
        }
        self.meta.oldest = last + 1;
        Ok(())
    }

    fn finish(mut self) -> (sled::Batch, Meta, History) {
        self.batch.insert(layout::META, &self.meta.encode());
        (self.batch, self.meta, self.added)
    }
}
