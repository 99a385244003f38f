//! The hot log: changes of the map that are acknowledged but not flushed yet, so that they survive `kill -9` of the
//! process. It is written without any sync: as long as the machine is up, the page cache has it, with the data that
//! it speaks of. After a power cut (another boot id) it is ignored: then the journal alone tells what is durable.
//!
//! Two files take turns: a flush turns to the other one and, when the journal is durable, empties the old.
//!
//! ```text
//! header (64 bytes): "SCVH" 0 u32 | boot id 16 | generation u64 | zeros | check 8
//! record (64 bytes): journal record 48 | generation u64 | check 8
//! ```

use std::{io, sync::Arc};

use super::{
    disk::{Disk, DiskFile},
    journal::{RECORD, Record},
};

const NAMES: [&str; 2] = ["hot.0", "hot.1"];
const SLOT: usize = 64;
const CHECK_CONTEXT: &str = "supercloud storage v1: hot log";
/// Reads of a log at open.
const READ_BYTES: usize = SLOT * 4096;

pub(super) struct HotLog {
    files: [Arc<dyn DiskFile>; 2],
    key: [u8; 32],
    boot: [u8; 16],
    current: usize,
    end: u64,
    generation: u64,
}

impl std::fmt::Debug for HotLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HotLog(generation {}, {} bytes)", self.generation, self.end)
    }
}

fn check_of(key: &[u8; 32], slot: &[u8; SLOT]) -> [u8; 8] {
    let mut check = [0; 8];
    check.copy_from_slice(&blake3::keyed_hash(key, &slot[..SLOT - 8]).as_bytes()[..8]);
    check
}

impl HotLog {
    /// Opens the logs. With `is_replaying`, gives the records that were written under this boot id, in order.
    pub(super) fn open(disk: &dyn Disk, is_replaying: bool) -> io::Result<(Self, Vec<Record>)> {
        let open = |name| disk.open(name, true)?.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound));
        let files = [open(NAMES[0])?, open(NAMES[1])?];
        let boot = disk.boot_id();
        let key = blake3::derive_key(CHECK_CONTEXT, &boot);
        let mut found: Vec<(u64, Vec<Record>)> = Vec::new();
        for file in files.iter().filter(|_| is_replaying) {
            found.extend(read_log(&**file, &key, &boot)?);
        }
        found.sort_by_key(|(generation, _)| *generation);
        let generation = found.last().map_or(0, |(generation, _)| *generation);
        let records = found.into_iter().flat_map(|(_, records)| records).collect();
        Ok((Self { files, key, boot, current: 0, end: 0, generation }, records))
    }

    /// Empties both logs: everything in them is durable, or not wanted any more.
    pub(super) fn clear(&mut self) -> io::Result<()> {
        self.files[1 - self.current].set_len(0)?;
        self.start()
    }

    /// Turns to the other log, which must be empty or done with.
    pub(super) fn turn(&mut self) -> io::Result<()> {
        self.current = 1 - self.current;
        self.start()
    }

    /// Empties the log that is not in use: what it told is durable now.
    pub(super) fn forget_old(&mut self) -> io::Result<()> {
        self.files[1 - self.current].set_len(0)
    }

    fn start(&mut self) -> io::Result<()> {
        let file = &self.files[self.current];
        file.set_len(0)?;
        self.generation += 1;
        let mut header = [0; SLOT];
        header[..4].copy_from_slice(b"SCVH");
        header[8..24].copy_from_slice(&self.boot);
        header[24..32].copy_from_slice(&self.generation.to_le_bytes());
        let check = check_of(&self.key, &header);
        header[SLOT - 8..].copy_from_slice(&check);
        file.write_at(&header, 0)?;
        self.end = SLOT as u64;
        Ok(())
    }

    pub(super) fn append(&mut self, record: Record) -> io::Result<()> {
        let mut slot = [0; SLOT];
        slot[..RECORD].copy_from_slice(&record.encode());
        slot[RECORD..RECORD + 8].copy_from_slice(&self.generation.to_le_bytes());
        let check = check_of(&self.key, &slot);
        slot[SLOT - 8..].copy_from_slice(&check);
        self.files[self.current].write_at(&slot, self.end)?;
        self.end += SLOT as u64;
        Ok(())
    }

    /// The bytes in the log in use.
    pub(super) const fn len(&self) -> u64 {
        self.end
    }
}

fn read_log(file: &dyn DiskFile, key: &[u8; 32], boot: &[u8; 16]) -> io::Result<Option<(u64, Vec<Record>)>> {
    let len = file.size()?;
    let mut header = [0; SLOT];
    file.read_at(&mut header, 0)?;
    let is_whole = &header[..4] == b"SCVH" && header[8..24] == *boot && check_of(key, &header) == header[SLOT - 8..];
    if !is_whole || len < SLOT as u64 {
        return Ok(None);
    }
    let generation = header[24..32].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
    let mut records = Vec::new();
    let mut at = SLOT as u64;
    while at < len {
        let mut buffer = vec![0; READ_BYTES.min(usize::try_from(len - at).unwrap_or(READ_BYTES))];
        file.read_at(&mut buffer, at)?;
        at += buffer.len() as u64;
        for slot in buffer.chunks(SLOT) {
            // The process died in the middle of the last one, which therefore was not acknowledged.
            let Some(slot) = slot.first_chunk::<SLOT>() else { return Ok(Some((generation, records))) };
            let is_ours = slot[RECORD..RECORD + 8] == generation.to_le_bytes();
            let record = slot.first_chunk().and_then(Record::decode);
            match record {
                Some(record) if is_ours && check_of(key, slot) == slot[SLOT - 8..] => records.push(record),
                _ => return Ok(Some((generation, records))),
            }
        }
    }
    Ok(Some((generation, records)))
}
