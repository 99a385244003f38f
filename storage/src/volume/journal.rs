//! The map journal: what of the map is durable. Append-only batches, each synced before the next; compacted by atomic
//! replacement.
//!
//! ```text
//! header (512 bytes): "SCVM" version u32=1 | volume 16 | project 16 | size u64 | base? u8 | base 32 | nonce 16 | check 16
//! batch  (at multiples of 512): "SCVB" count u32 | sequence u64 | check 16 | count records of 48 bytes | zeros
//! record: tag u8 | state u8 | has digest u8 | 0 | block u32 | number u64 | digest 32
//! ```
//!
//! Checks are keyed with the file's nonce, so that nothing of an older file passes. A batch that fails its check is a
//! torn tail, unless a later batch is whole: then what was durable was damaged, and that is an error.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use supercloud_ids::{Epoch, ProjectId, VolumeId};

use super::{
    disk::{Disk, DiskFile},
    map::{BlockState, Entry},
    role::Role,
};
use crate::key::{ChunkName, ContentRoot};

const NAME: &str = "map.journal";
const NEW_NAME: &str = "map.journal.new";
const SECTOR: usize = 512;
const BATCH_HEADER: usize = 32;
pub(super) const RECORD: usize = 48;
/// Records per batch at most: 3 MiB.
const BATCH_RECORDS: usize = 65_536;
const CHECK_CONTEXT: &str = "supercloud storage v1: map journal";

/// Why a journal could not be opened or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The disk failed.
    #[error("the map journal cannot be {what}")]
    Io {
        /// What was done.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The header is damaged or of another version.
    #[error("the map journal's header is damaged, or of another version")]
    Header,
    /// The journal belongs to another volume, or one of another shape.
    #[error("the map journal is of another volume: its {0} differs")]
    Other(&'static str),
    /// A batch that was durable is damaged.
    #[error("the map journal is damaged at byte {offset}: a later part is whole")]
    Damaged {
        /// Where.
        offset: u64,
    },
    /// A batch passes its check but makes no sense.
    #[error("the map journal has a record that is not known at byte {offset}")]
    Record {
        /// Where.
        offset: u64,
    },
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> JournalError {
    move |source| JournalError::Io { what, source }
}

/// Which volume a journal is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The volume.
    pub volume: VolumeId,
    /// Its project.
    pub project: ProjectId,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// What it starts from.
    pub base: Option<ContentRoot>,
}

/// One change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Record {
    /// A block's entry.
    Block(u32, Entry),
    /// The role.
    Role(Role),
    /// Versions below this may have been given out.
    Reserve(u64),
    /// The volume was opened under this boot id and may have unsynced changes since.
    Opened([u8; 16]),
    /// It was closed with everything synced.
    Closed,
    /// Every local block has this version now: its content is not surely that of its last durable version.
    Renumber(u64),
    /// The destination has everything.
    Released(bool),
}

impl Record {
    pub(super) fn encode(self) -> [u8; RECORD] {
        let mut out = [0; RECORD];
        let mut put = |tag: u8, state: u8, block: u32, number: u64| {
            out[0] = tag;
            out[1] = state;
            out[4..8].copy_from_slice(&block.to_le_bytes());
            out[8..16].copy_from_slice(&number.to_le_bytes());
        };
        match self {
            Self::Block(block, entry) => {
                put(1, entry.state as u8, block, entry.version);
                if let Some(digest) = entry.digest {
                    out[2] = 1;
                    out[16..].copy_from_slice(&digest.0);
                }
            }
            Self::Role(role) => match role {
                Role::Standby => put(2, 1, 0, 0),
                Role::Adopted { sealed } => put(2, 2, 0, sealed.0),
                Role::Active { epoch } => put(2, 3, 0, epoch.0),
                Role::Sealed { epoch } => put(2, 4, 0, epoch.0),
            },
            Self::Reserve(version) => put(3, 0, 0, version),
            Self::Opened(boot) => {
                put(4, 0, 0, 0);
                out[16..32].copy_from_slice(&boot);
            }
            Self::Closed => put(5, 0, 0, 0),
            Self::Renumber(version) => put(6, 0, 0, version),
            Self::Released(is_released) => put(7, u8::from(is_released), 0, 0),
        }
        out
    }

    pub(super) fn decode(bytes: &[u8; RECORD]) -> Option<Self> {
        let block = u32::from_le_bytes(*bytes[4..8].first_chunk()?);
        let number = u64::from_le_bytes(*bytes[8..16].first_chunk()?);
        let record = match (bytes[0], bytes[1]) {
            (1, state) => {
                let digest = match bytes[2] {
                    0 => None,
                    1 => Some(ChunkName(*bytes[16..].first_chunk()?)),
                    _ => return None,
                };
                Self::Block(block, Entry { state: BlockState::from_byte(state)?, version: number, digest })
            }
            (2, 1) => Self::Role(Role::Standby),
            (2, 2) => Self::Role(Role::Adopted { sealed: Epoch(number) }),
            (2, 3) => Self::Role(Role::Active { epoch: Epoch(number) }),
            (2, 4) => Self::Role(Role::Sealed { epoch: Epoch(number) }),
            (3, 0) => Self::Reserve(number),
            (4, 0) => Self::Opened(*bytes[16..32].first_chunk()?),
            (5, 0) => Self::Closed,
            (6, 0) => Self::Renumber(number),
            (7, is_released @ (0 | 1)) => Self::Released(is_released == 1),
            _ => return None,
        };
        Some(record)
    }
}

struct File {
    file: Arc<dyn DiskFile>,
    check: [u8; 32],
    end: u64,
    sequence: u64,
    /// The last records of these tags: a replacement starts with them.
    role: Option<Record>,
    released: Option<Record>,
}

/// An open journal.
pub(super) struct Journal {
    disk: Arc<dyn Disk>,
    identity: Identity,
    inner: Mutex<File>,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Journal({})", self.identity.volume)
    }
}

fn check_of(key: &[u8; 32], parts: [&[u8]; 2]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    parts.iter().for_each(|part| {
        hasher.update(part);
    });
    let mut check = [0; 16];
    check.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    check
}

fn encode_header(identity: &Identity, nonce: [u8; 16]) -> [u8; SECTOR] {
    let mut out = [0; SECTOR];
    out[..4].copy_from_slice(b"SCVM");
    out[4..8].copy_from_slice(&1u32.to_le_bytes());
    out[8..24].copy_from_slice(identity.volume.uuid().as_bytes());
    out[24..40].copy_from_slice(identity.project.uuid().as_bytes());
    out[40..48].copy_from_slice(&identity.size_bytes.to_le_bytes());
    out[48] = u8::from(identity.base.is_some());
    out[49..81].copy_from_slice(&identity.base.map_or([0; 32], |base| base.0));
    out[81..97].copy_from_slice(&nonce);
    let check = check_of(&blake3::derive_key(CHECK_CONTEXT, &nonce), [&out[..97], &[]]);
    out[97..113].copy_from_slice(&check);
    out
}

fn encode_batch(key: &[u8; 32], sequence: u64, records: &[Record]) -> Vec<u8> {
    let len = (BATCH_HEADER + records.len() * RECORD).next_multiple_of(SECTOR);
    let mut out = Vec::with_capacity(len);
    out.extend_from_slice(b"SCVB");
    out.extend_from_slice(&u32::try_from(records.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(&sequence.to_le_bytes());
    out.extend_from_slice(&[0; 16]);
    for record in records {
        out.extend_from_slice(&record.encode());
    }
    let check = check_of(key, [&out[..16], &out[BATCH_HEADER..]]);
    out[16..BATCH_HEADER].copy_from_slice(&check);
    out.resize(len, 0);
    out
}

/// What is at an offset.
enum Found {
    Batch { sequence: u64, records: Vec<u8>, len: u64 },
    Nothing,
}

fn read_batch(file: &dyn DiskFile, key: &[u8; 32], offset: u64, end: u64) -> io::Result<Found> {
    if offset + BATCH_HEADER as u64 > end {
        return Ok(Found::Nothing);
    }
    let mut header = [0; BATCH_HEADER];
    file.read_at(&mut header, offset)?;
    let count = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
    if &header[..4] != b"SCVB" || count > BATCH_RECORDS {
        return Ok(Found::Nothing);
    }
    let len = ((BATCH_HEADER + count * RECORD).next_multiple_of(SECTOR)) as u64;
    if offset + len > end {
        return Ok(Found::Nothing);
    }
    let mut records = vec![0; count * RECORD];
    file.read_at(&mut records, offset + BATCH_HEADER as u64)?;
    if check_of(key, [&header[..16], &records]) != header[16..] {
        return Ok(Found::Nothing);
    }
    let sequence = header[8..16].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
    Ok(Found::Batch { sequence, records, len })
}

impl Journal {
    /// Opens the journal and hands every record to `each`, in order; makes a new one with `first` when there is none.
    /// Gives the journal and whether it is new.
    pub(super) fn open(
        disk: Arc<dyn Disk>,
        identity: Identity,
        first: &[Record],
        mut each: impl FnMut(Record),
    ) -> Result<(Self, bool), JournalError> {
        // A replacement that was not finished.
        disk.remove(NEW_NAME).map_err(failed("opened"))?;
        let Some(file) = disk.open(NAME, false).map_err(failed("opened"))? else {
            let inner = Self::write_new(&*disk, &identity, &mut first.iter().copied())?;
            first.iter().copied().for_each(each);
            return Ok((Self { disk, identity, inner: Mutex::new(inner) }, true));
        };
        let end = file.size().map_err(failed("read"))?;
        let mut header = [0; SECTOR];
        file.read_at(&mut header, 0).map_err(failed("read"))?;
        let key = Self::judge_header(&header, &identity)?;
        let (mut at, mut sequence) = (SECTOR as u64, 0);
        let (mut role, mut released) = (None, None);
        loop {
            match read_batch(&*file, &key, at, end).map_err(failed("read"))? {
                Found::Batch { sequence: found, records, len } if found == sequence => {
                    for record in records.chunks_exact(RECORD) {
                        let record = record.first_chunk().and_then(Record::decode);
                        let record = record.ok_or(JournalError::Record { offset: at })?;
                        match record {
                            Record::Role(_) => role = Some(record),
                            Record::Released(_) => released = Some(record),
                            _ => {}
                        }
                        each(record);
                    }
                    at += len;
                    sequence += 1;
                }
                _ => break,
            }
        }
        Self::judge_tail(&*file, &key, at, end, sequence)?;
        if end > at {
            // The torn tail goes before anything is appended: a remnant of it must not follow a shorter batch.
            file.set_len(at).and_then(|()| file.sync()).map_err(failed("repaired"))?;
        }
        let inner = File { file, check: key, end: at, sequence, role, released };
        Ok((Self { disk, identity, inner: Mutex::new(inner) }, false))
    }

    fn judge_header(header: &[u8; SECTOR], identity: &Identity) -> Result<[u8; 32], JournalError> {
        let nonce: [u8; 16] = header[81..97].first_chunk().copied().ok_or(JournalError::Header)?;
        let key = blake3::derive_key(CHECK_CONTEXT, &nonce);
        if &header[..4] != b"SCVM"
            || header[4..8] != 1u32.to_le_bytes()
            || check_of(&key, [&header[..97], &[]]) != header[97..113]
        {
            return Err(JournalError::Header);
        }
        let ours = encode_header(identity, nonce);
        for (field, range) in [("volume", 8..24), ("project", 24..40), ("size", 40..48), ("base", 48..81)] {
            if header[range.clone()] != ours[range] {
                return Err(JournalError::Other(field));
            }
        }
        Ok(key)
    }

    /// A batch is appended only after the one before is durable. So a whole batch of a higher number behind a bad one
    /// means that the bad one was good once.
    fn judge_tail(file: &dyn DiskFile, key: &[u8; 32], at: u64, end: u64, sequence: u64) -> Result<(), JournalError> {
        let mut probe = at + SECTOR as u64;
        while probe < end {
            if let Found::Batch { sequence: found, .. } = read_batch(file, key, probe, end).map_err(failed("read"))?
                && found > sequence
            {
                return Err(JournalError::Damaged { offset: at });
            }
            probe += SECTOR as u64;
        }
        Ok(())
    }

    /// Writes a whole new journal beside the old and puts it in its place.
    fn write_new(
        disk: &dyn Disk,
        identity: &Identity,
        records: &mut dyn Iterator<Item = Record>,
    ) -> Result<File, JournalError> {
        let nonce: [u8; 16] = rand::random();
        let check = blake3::derive_key(CHECK_CONTEXT, &nonce);
        let file = disk.open(NEW_NAME, true).map_err(failed("made"))?;
        let file = file.ok_or(JournalError::Io { what: "made", source: io::ErrorKind::NotFound.into() })?;
        file.set_len(0).map_err(failed("made"))?;
        file.write_at(&encode_header(identity, nonce), 0).map_err(failed("written"))?;
        let mut new = File { file, check, end: SECTOR as u64, sequence: 0, role: None, released: None };
        let mut records = records.peekable();
        while records.peek().is_some() {
            let batch: Vec<_> = records.by_ref().take(BATCH_RECORDS).collect();
            new.write(&batch)?;
        }
        new.file.sync().map_err(failed("synced"))?;
        disk.rename(NEW_NAME, NAME).map_err(failed("put in place"))?;
        disk.sync_names().map_err(failed("put in place"))?;
        Ok(new)
    }

    fn lock(&self) -> MutexGuard<'_, File> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends records and makes them durable. The last batch counts: records before it may be there without it after
    /// a power cut, so what must be all or nothing ends with a record that says so.
    pub(super) fn append(&self, records: &[Record]) -> Result<(), JournalError> {
        let mut file = self.lock();
        for batch in records.chunks(BATCH_RECORDS) {
            file.write(batch)?;
            // Each before the next: see `judge_tail`.
            file.file.sync().map_err(failed("synced"))?;
        }
        Ok(())
    }

    /// Replaces the journal by one that holds its last role and release, and `records`.
    pub(super) fn replace(&self, records: impl Iterator<Item = Record>) -> Result<(), JournalError> {
        let mut file = self.lock();
        let kept = [file.role, file.released].into_iter().flatten();
        *file = Self::write_new(&*self.disk, &self.identity, &mut kept.chain(records))?;
        Ok(())
    }

    /// The role that was written last.
    pub(super) fn role(&self) -> Option<Role> {
        match self.lock().role {
            Some(Record::Role(role)) => Some(role),
            _ => None,
        }
    }

    /// The journal's length in bytes.
    pub(super) fn len(&self) -> u64 {
        self.lock().end
    }
}

impl File {
    fn write(&mut self, records: &[Record]) -> Result<(), JournalError> {
        let batch = encode_batch(&self.check, self.sequence, records);
        self.file.write_at(&batch, self.end).map_err(failed("written"))?;
        self.end += batch.len() as u64;
        self.sequence += 1;
        for record in records {
            match record {
                Record::Role(_) => self.role = Some(*record),
                Record::Released(_) => self.released = Some(*record),
                _ => {}
            }
        }
        Ok(())
    }
}
