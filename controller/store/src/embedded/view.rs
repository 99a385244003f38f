//! Reading the store: keys, pages, history, and the check of all of it at opening.

use std::{
    collections::{HashMap, VecDeque},
    io,
    ops::Bound,
    path::Path,
};

use super::layout::{self, CHUNK_BYTES, Malformed, Meta, Place, Pointer, Record, RecordKind};
use crate::{Change, Key, MAX_PAGE_BYTES, MAX_PAGE_ITEMS, Page, Prefix, StoreError, Versioned};

/// Most log entries looked at in one go for a watch.
const MAX_SCAN_ENTRIES: usize = 4096;

/// Why a read failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error(transparent)]
    Sled(#[from] sled::Error),
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("{0}")]
    Inconsistent(String),
}

impl Fault {
    /// The fault as the caller sees it.
    pub(super) fn at(self, path: &Path, what: &'static str) -> StoreError {
        match self {
            Self::Sled(sled::Error::Io(e))
                if !matches!(e.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData) =>
            {
                super::folder::failed(what, e)
            }
            fault => StoreError::Damaged { path: path.to_owned(), reason: fault.to_string() },
        }
    }
}

/// What the store holds at one moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct View<'a> {
    pub db: &'a sled::Db,
    pub meta: Meta,
}

/// What a watch finds in the history.
#[derive(Debug)]
pub(super) enum Found {
    /// Whole revisions, and the next one to ask for.
    Changes { revisions: Vec<(u64, Vec<Change>)>, next: u64 },
    /// The history does not reach back so far.
    Compacted { oldest: u64 },
}

impl View<'_> {
    /// A key's current value and where it is.
    pub(super) fn current(&self, key: &Key) -> Result<Option<(Versioned, Pointer)>, Fault> {
        let Some(pointer) = self.db.get(layout::kv_key(key.as_bytes()))? else { return Ok(None) };
        let pointer = Pointer::decode(&pointer)?;
        Ok(Some((self.read(key, pointer)?, pointer)))
    }

    fn read(&self, key: &Key, pointer: Pointer) -> Result<Versioned, Fault> {
        let dangling = || Fault::Inconsistent(format!("the value of '{key}' is missing from the log"));
        let (revision, index) = (pointer.mod_revision, pointer.index);
        let head = self.db.get(layout::log_key(revision, index, 0))?.ok_or_else(dangling)?;
        match self.decode(revision, index, &head)? {
            Change::Put(versioned) if versioned.key == *key => Ok(versioned),
            _ => Err(dangling()),
        }
    }

    /// One page of the keys.
    pub(super) fn page(&self, prefix: &Prefix, after: Option<&Key>, limit: usize) -> Result<Page, Fault> {
        let start = layout::kv_key(prefix.as_bytes());
        // Of a non-empty byte string that starts with 'k' there is always an end.
        let end = Prefix::end_of(&start).unwrap_or_else(|| vec![0xff]);
        let start = match after.map(|key| layout::kv_key(key.as_bytes())) {
            Some(after) if after >= end => {
                return Ok(Page { items: vec![], revision: self.meta.revision, more: false });
            }
            Some(after) if after >= start => Bound::Excluded(after),
            _ => Bound::Included(start),
        };
        self.filled(self.db.range((start, Bound::Excluded(end))), limit)
    }

    /// One page of the keys, the last one first.
    pub(super) fn page_back(&self, prefix: &Prefix, before: Option<&Key>, limit: usize) -> Result<Page, Fault> {
        let start = layout::kv_key(prefix.as_bytes());
        let end = Prefix::end_of(&start).unwrap_or_else(|| vec![0xff]);
        let end = before.map_or(end.clone(), |key| layout::kv_key(key.as_bytes()).min(end));
        if end <= start {
            return Ok(Page { items: vec![], revision: self.meta.revision, more: false });
        }
        self.filled(self.db.range(start..end).rev(), limit)
    }

    fn filled(
        &self,
        entries: impl Iterator<Item = sled::Result<(sled::IVec, sled::IVec)>>,
        limit: usize,
    ) -> Result<Page, Fault> {
        let (mut items, mut bytes, mut more) = (Vec::new(), 0, false);
        for entry in entries {
            let (key, pointer) = entry?;
            let pointer = Pointer::decode(&pointer)?;
            bytes += pointer.value_len as usize;
            let full = items.len() >= limit.min(MAX_PAGE_ITEMS) || bytes > MAX_PAGE_BYTES;
            if full && !items.is_empty() {
                more = true;
                break;
            }
            let Place::Kv(key) = Place::decode(&key)? else {
                return Err(Fault::Inconsistent("a foreign entry among the keys".into()));
            };
            items.push(self.read(&key, pointer)?);
        }
        Ok(Page { items, revision: self.meta.revision, more })
    }

    /// Part of the history from revision `from` on.
    pub(super) fn changes(&self, prefix: &Prefix, from: u64) -> Result<Found, Fault> {
        if from < self.meta.oldest {
            return Ok(Found::Compacted { oldest: self.meta.oldest });
        }
        let mut revisions: Vec<(u64, Vec<Change>)> = Vec::new();
        let (mut scanned, mut bytes, mut last) = (0, 0, None);
        for entry in self.db.range(layout::log_key(from, 0, 0)..layout::log_key(u64::MAX, 0, 0)) {
            let (place, head) = entry?;
            let Place::Log { revision, index, chunk } = Place::decode(&place)? else {
                return Err(Fault::Inconsistent("a foreign entry in the log".into()));
            };
            // Only whole revisions are handed out.
            if last != Some(revision) && (scanned >= MAX_SCAN_ENTRIES || bytes >= MAX_PAGE_BYTES) {
                return Ok(Found::Changes { revisions, next: revision });
            }
            last = Some(revision);
            scanned += 1;
            if chunk > 0 || !prefix.matches(&Record::decode(&head)?.0.key) {
                continue;
            }
            let change = self.decode(revision, index, &head)?;
            if let Change::Put(versioned) = &change {
                bytes += versioned.value.len();
            }
            match revisions.last_mut() {
                Some((at, changes)) if *at == revision => changes.push(change),
                _ => revisions.push((revision, vec![change])),
            }
        }
        Ok(Found::Changes { revisions, next: from.max(self.meta.revision + 1) })
    }

    /// Reads a change from its first log entry and, for the rest of a large value, the entries after it.
    fn decode(&self, revision: u64, index: u16, head: &[u8]) -> Result<Change, Fault> {
        let (record, first) = Record::decode(head)?;
        let RecordKind::Put { create_revision, version, value_len } = record.kind else {
            return Ok(Change::Delete { key: record.key });
        };
        let mut fault = None;
        let value = layout::join(first, value_len, |chunk| {
            self.db.get(layout::log_key(revision, index, chunk)).unwrap_or_else(|e| {
                fault = Some(e);
                None
            })
        });
        match (value, fault) {
            (_, Some(fault)) => Err(fault.into()),
            (None, None) => Err(Fault::Inconsistent(format!("the value of '{}' is cut off", record.key))),
            (Some(value), None) => {
                Ok(Change::Put(Versioned { key: record.key, value, create_revision, mod_revision: revision, version }))
            }
        }
    }
}

/// The size of each revision in the log, oldest first: what retention works on.
pub(super) type History = VecDeque<(u64, u64)>;

/// Reads the counters; `None` in a store that holds nothing at all.
pub(super) fn meta(db: &sled::Db) -> Result<Option<Meta>, Fault> {
    match db.get(layout::META)? {
        Some(bytes) => Ok(Some(Meta::decode(&bytes)?)),
        None if db.is_empty() => Ok(None),
        None => Err(Fault::Inconsistent("the counters are missing".into())),
    }
}

/// Reads everything once and checks that it fits together: every key's value is in the log, every revision that a watch
/// may ask for is complete, the newest change of every key is its current state, and nothing else is there.
pub(super) fn verify(view: View<'_>) -> Result<History, Fault> {
    let broken = |what: String| Err(Fault::Inconsistent(what));
    let mut keys: HashMap<Key, Pointer> = HashMap::new();
    // For each key: its newest change in the log, and whether that is a put.
    let mut newest: HashMap<Key, (u64, u16, bool)> = HashMap::new();
    let mut history = History::new();
    let mut open = Entry::default();
    // Keys sort before the log.
    for entry in view.db.iter() {
        let (place, bytes) = entry?;
        match Place::decode(&place)? {
            Place::Meta => {}
            Place::Kv(key) => {
                keys.insert(key, Pointer::decode(&bytes)?);
            }
            Place::Log { revision, index, chunk: 0 } => {
                open.finish()?;
                let (record, _) = Record::decode(&bytes)?;
                let is_put = matches!(record.kind, RecordKind::Put { .. });
                let current = keys
                    .get(&record.key)
                    .is_some_and(|pointer| is_put && (pointer.mod_revision, pointer.index) == (revision, index));
                if revision > view.meta.revision {
                    return broken(format!(
                        "revision {revision} is in the log, but the store is at {}",
                        view.meta.revision
                    ));
                }
                if revision < view.meta.oldest && !current {
                    return broken(format!("revision {revision} of '{}' is in the log and should not be", record.key));
                }
                if revision >= view.meta.oldest {
                    let expected =
                        if history.back().is_some_and(|(last, _)| *last == revision) { open.index + 1 } else { 0 };
                    if index != expected || index >= record.count {
                        return broken(format!("revision {revision} is incomplete"));
                    }
                    if index == 0 {
                        let before = history.back().map_or(first_change(view.meta), |(last, _)| last + 1);
                        if revision != before || (!history.is_empty() && open.index + 1 != open.count) {
                            return broken(format!("the log has a gap before revision {revision}"));
                        }
                        history.push_back((revision, 0));
                    }
                }
                newest.insert(record.key.clone(), (revision, index, is_put));
                open = Entry { revision, index, count: record.count, value_len: record.value_len(), next_chunk: 1 };
                add_bytes(&mut history, revision, place.len() + bytes.len());
            }
            Place::Log { revision, index, chunk } => {
                if (open.revision, open.index, open.next_chunk) != (revision, index, chunk) || !open.takes(bytes.len())
                {
                    return broken(format!("a value of revision {revision} is incomplete"));
                }
                open.next_chunk += 1;
                add_bytes(&mut history, revision, place.len() + bytes.len());
            }
        }
    }
    open.finish()?;
    let last = history.back().map_or(view.meta.oldest.max(first_change(view.meta)) - 1, |(last, _)| *last);
    if last != view.meta.revision || (!history.is_empty() && open.index + 1 != open.count) {
        return broken(format!("the log ends at revision {last}, but the store is at {}", view.meta.revision));
    }
    for (key, (revision, index, is_put)) in &newest {
        let current = keys.remove(key).map(|pointer| (pointer.mod_revision, pointer.index));
        if current != is_put.then_some((*revision, *index)) {
            return broken(format!("the newest change of '{key}' is not its state"));
        }
    }
    match keys.into_keys().next() {
        Some(key) => broken(format!("the value of '{key}' is missing from the log")),
        None => Ok(history),
    }
}

/// The first revision that can have changes in the log: nothing ever happened at revision 1.
fn first_change(meta: Meta) -> u64 {
    meta.oldest.max(Meta::EMPTY.revision + 1)
}

fn add_bytes(history: &mut History, revision: u64, bytes: usize) {
    if let Some((last, sum)) = history.back_mut()
        && *last == revision
    {
        *sum += bytes as u64;
    }
}

/// The change whose log entries are being read.
#[derive(Default)]
struct Entry {
    revision: u64,
    index: u16,
    count: u16,
    value_len: u32,
    next_chunk: u16,
}

impl Entry {
    /// Whether the next chunk has this many bytes.
    fn takes(&self, bytes: usize) -> bool {
        let rest = (self.value_len as usize).saturating_sub(usize::from(self.next_chunk) * CHUNK_BYTES);
        rest > 0 && bytes == rest.min(CHUNK_BYTES)
    }

    fn finish(&self) -> Result<(), Fault> {
        if self.next_chunk != 0 && self.next_chunk != layout::chunks(self.value_len as usize) {
            return Err(Fault::Inconsistent(format!("a value of revision {} is cut off", self.revision)));
        }
        Ok(())
    }
}
