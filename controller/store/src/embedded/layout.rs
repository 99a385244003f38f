//! How the embedded store lays its data out in one sled tree. All numbers are big-endian.
//!
//! | key | value |
//! |---|---|
//! | `m` | [`Meta`]: the revision, and the oldest revision whose history is complete |
//! | `k` + key | [`Pointer`]: which log entry holds the key's current value |
//! | `l` + revision u64 + index u16 + chunk u16 | the log: chunk 0 a [`Record`] and the value's beginning, then the rest of the value |
//!
//! A value is written once, into the log, in chunks that keep sled's leaves (up to about 20 entries) below the size at
//! which sled moves them to files of their own, which it never syncs. A log entry lives as long as a watch may ask for
//! it (`revision >= oldest`) or it is the current value of its key.

use bytes::Bytes;

use crate::{Key, Value};

/// Bytes of a value in one log entry.
pub(super) const CHUNK_BYTES: usize = 8 << 10;
/// sled's segment size: a leaf may hold a quarter of it before sled moves it out to a file of its own.
pub(super) const SEGMENT_BYTES: usize = 1 << 20;

pub(super) const META: &[u8] = b"m";
const KV: u8 = b'k';
const LOG: u8 = b'l';

/// What an entry should have been.
#[derive(Debug, thiserror::Error)]
#[error("{what} is not readable")]
pub(super) struct Malformed {
    what: &'static str,
}

/// The store's counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Meta {
    /// The newest revision.
    pub revision: u64,
    /// The first revision from which history is complete.
    pub oldest: u64,
}

impl Meta {
    /// The empty store's, as in etcd: revision 1, at which nothing happened.
    pub(super) const EMPTY: Self = Self { revision: 1, oldest: 1 };

    pub(super) fn encode(self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..8].copy_from_slice(&self.revision.to_be_bytes());
        out[8..].copy_from_slice(&self.oldest.to_be_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader { bytes, what: "the meta entry" };
        let meta = Self { revision: reader.u64()?, oldest: reader.u64()? };
        if !reader.bytes.is_empty() || meta.revision == 0 || meta.oldest == 0 || meta.oldest > meta.revision + 1 {
            return Err(reader.malformed());
        }
        Ok(meta)
    }
}

/// Where a key's current value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pointer {
    pub mod_revision: u64,
    pub index: u16,
    /// Repeated here so that the log entries can be removed without reading them.
    pub value_len: u32,
}

impl Pointer {
    pub(super) fn encode(self) -> [u8; 14] {
        let mut out = [0; 14];
        out[..8].copy_from_slice(&self.mod_revision.to_be_bytes());
        out[8..10].copy_from_slice(&self.index.to_be_bytes());
        out[10..].copy_from_slice(&self.value_len.to_be_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader { bytes, what: "a key's entry" };
        let pointer = Self { mod_revision: reader.u64()?, index: reader.u16()?, value_len: reader.u32()? };
        if reader.bytes.is_empty() { Ok(pointer) } else { Err(reader.malformed()) }
    }

    /// The log keys of the value it points at.
    pub(super) fn log_keys(self) -> impl Iterator<Item = [u8; 13]> {
        (0..chunks(self.value_len as usize)).map(move |chunk| log_key(self.mod_revision, self.index, chunk))
    }
}

/// One change in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    /// How many changes the revision has.
    pub count: u16,
    pub key: Key,
    pub kind: RecordKind,
}

/// What a change did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum RecordKind {
    Put { create_revision: u64, version: u64, value_len: u32 },
    Delete,
}

impl Record {
    /// Size of the value that follows, over all chunks.
    pub(super) fn value_len(&self) -> u32 {
        match self.kind {
            RecordKind::Put { value_len, .. } => value_len,
            RecordKind::Delete => 0,
        }
    }

    /// The log entries of this change: chunk number and content.
    pub(super) fn encode(&self, value: &Value) -> impl Iterator<Item = (u16, Vec<u8>)> {
        let key = self.key.as_bytes();
        let mut head = Vec::with_capacity(25 + key.len() + value.len().min(CHUNK_BYTES));
        let (kind, create_revision, version) = match self.kind {
            RecordKind::Put { create_revision, version, .. } => (1, create_revision, version),
            RecordKind::Delete => (2, 0, 0),
        };
        head.push(kind);
        head.extend_from_slice(&self.count.to_be_bytes());
        head.extend_from_slice(&create_revision.to_be_bytes());
        head.extend_from_slice(&version.to_be_bytes());
        head.extend_from_slice(&self.value_len().to_be_bytes());
        head.extend_from_slice(&u16::try_from(key.len()).unwrap_or(u16::MAX).to_be_bytes());
        head.extend_from_slice(key);
        let (first, rest) = value.as_bytes().split_at(value.len().min(CHUNK_BYTES));
        head.extend_from_slice(first);
        let rest: Vec<_> = rest.chunks(CHUNK_BYTES).map(<[u8]>::to_vec).collect();
        (0..).zip(std::iter::once(head).chain(rest))
    }

    /// Reads chunk 0; also returns the value's beginning.
    pub(super) fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let mut reader = Reader { bytes, what: "a log entry" };
        let kind = reader.u8()?;
        let count = reader.u16()?;
        let (create_revision, version, value_len) = (reader.u64()?, reader.u64()?, reader.u32()?);
        let key_len = usize::from(reader.u16()?);
        let key = reader.take(key_len)?;
        let key = std::str::from_utf8(key).ok().and_then(|key| Key::new(key).ok()).ok_or(reader.malformed())?;
        let kind = match kind {
            1 if version > 0 => RecordKind::Put { create_revision, version, value_len },
            2 if value_len == 0 => RecordKind::Delete,
            _ => return Err(reader.malformed()),
        };
        let fits = reader.bytes.len() == (value_len as usize).min(CHUNK_BYTES);
        if !fits || count == 0 || value_len as usize > crate::MAX_VALUE_BYTES {
            return Err(reader.malformed());
        }
        Ok((Self { count, key, kind }, reader.bytes))
    }
}

/// Number of log entries of a value; an empty one has one too.
pub(super) fn chunks(value_len: usize) -> u16 {
    // At most 1 MiB / 8 KiB = 128.
    u16::try_from(value_len.div_ceil(CHUNK_BYTES).max(1)).unwrap_or(u16::MAX)
}

pub(super) fn kv_key(key: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 + key.len());
    out.push(KV);
    out.extend_from_slice(key);
    out
}

pub(super) fn log_key(revision: u64, index: u16, chunk: u16) -> [u8; 13] {
    let mut out = [LOG; 13];
    out[1..9].copy_from_slice(&revision.to_be_bytes());
    out[9..11].copy_from_slice(&index.to_be_bytes());
    out[11..].copy_from_slice(&chunk.to_be_bytes());
    out
}

/// An entry's place, read back from its sled key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    Meta,
    Kv(Key),
    Log { revision: u64, index: u16, chunk: u16 },
}

impl Place {
    pub(super) fn decode(key: &[u8]) -> Result<Self, Malformed> {
        let malformed = Malformed { what: "a sled key" };
        match key.split_first() {
            Some((b'm', [])) => Ok(Self::Meta),
            Some((&KV, rest)) => {
                let key = std::str::from_utf8(rest).ok().and_then(|key| Key::new(key).ok());
                key.map(Self::Kv).ok_or(malformed)
            }
            Some((&LOG, rest)) => {
                let mut reader = Reader { bytes: rest, what: "a log key" };
                let place = Self::Log { revision: reader.u64()?, index: reader.u16()?, chunk: reader.u16()? };
                if reader.bytes.is_empty() { Ok(place) } else { Err(malformed) }
            }
            _ => Err(malformed),
        }
    }
}

/// Joins a value from its chunks.
pub(super) fn join(first: &[u8], len: u32, mut rest: impl FnMut(u16) -> Option<sled::IVec>) -> Option<Value> {
    let len = len as usize;
    let mut bytes = Vec::with_capacity(len);
    bytes.extend_from_slice(first);
    for chunk in 1..chunks(len) {
        bytes.extend_from_slice(&rest(chunk)?);
    }
    if bytes.len() == len { Value::new(Bytes::from(bytes)).ok() } else { None }
}

struct Reader<'a> {
    bytes: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    fn malformed(&self) -> Malformed {
        Malformed { what: self.what }
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self.bytes.split_at_checked(n).ok_or(self.malformed())?;
        self.bytes = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let malformed = self.malformed();
        self.take(N)?.try_into().map_err(|_| malformed)
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        self.array().map(u8::from_be_bytes)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(value: &Value) -> Record {
        let value_len = u32::try_from(value.len()).unwrap();
        let kind = RecordKind::Put { create_revision: 3, version: 2, value_len };
        Record { count: 7, key: Key::new("a/b").unwrap(), kind }
    }

    #[test]
    fn values_of_every_size_come_back() {
        for len in [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, crate::MAX_VALUE_BYTES] {
            let value = Value::new(vec![len.to_le_bytes()[0]; len]).unwrap();
            let entries: Vec<_> = record(&value).encode(&value).collect();
            assert_eq!(entries.len(), usize::from(chunks(len)), "{len}");
            let (back, first) = Record::decode(&entries[0].1).unwrap();
            assert_eq!(back, record(&value));
            let joined = join(first, back.value_len(), |n| entries.get(usize::from(n)).map(|e| e.1.as_slice().into()));
            assert_eq!(joined, Some(value));
        }
    }

    #[test]
    fn places_and_counters_come_back() {
        let key = Key::new("x/y").unwrap();
        assert_eq!(Place::decode(&kv_key(key.as_bytes())).unwrap(), Place::Kv(key));
        let place = Place::Log { revision: 9, index: 4, chunk: 2 };
        assert_eq!(Place::decode(&log_key(9, 4, 2)).unwrap(), place);
        let meta = Meta { revision: 9, oldest: 10 };
        assert_eq!(Meta::decode(&meta.encode()).unwrap(), meta);
        let pointer = Pointer { mod_revision: 5, index: 1, value_len: 20_000 };
        assert_eq!(Pointer::decode(&pointer.encode()).unwrap(), pointer);
        assert_eq!(pointer.log_keys().count(), 3);
    }

    /// Entries come from a disk that may lie: no decoder panics, and none takes a cut-off entry.
    #[test]
    fn damaged_entries_are_refused() {
        let value = Value::new(vec![1; 100]).unwrap();
        let good = record(&value).encode(&value).next().unwrap().1;
        for cut in 0..good.len() {
            assert!(Record::decode(&good[..cut]).is_err(), "cut at {cut}");
        }
        let mut state: u64 = 0x5eed;
        for _ in 0..20_000 {
            let mut bytes = good.clone();
            for _ in 0..3 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let [at, bit, ..] = (state >> 33).to_le_bytes();
                let at = usize::from(at) % bytes.len();
                bytes[at] ^= 1 << (bit % 8);
            }
            let _ = (Record::decode(&bytes), Meta::decode(&bytes[..16]), Pointer::decode(&bytes[..14]));
            let _ = Place::decode(&bytes[..13]);
        }
    }
}
