//! What a volume was when it was last served: journal, hot log, boot id and data file brought together at open.

use std::{collections::HashSet, sync::Arc};

use super::{
    VolumeError,
    disk::{Disk, DiskFile},
    hot::HotLog,
    journal::{Identity, Journal, Record},
    map::{BlockMap, BlockState},
    role::Role,
    snapshot::Purpose,
};
use crate::{BLOCK_BYTES, block_count};

/// Versions are reserved in the journal this many at a time, so that after a power cut none is given out twice.
pub(super) const RESERVE_VERSIONS: u64 = 1 << 20;

const DATA_NAME: &str = "data";

/// What the engine starts with.
pub(super) struct Recovered {
    pub journal: Journal,
    pub hot: HotLog,
    pub data: Arc<dyn DiskFile>,
    pub map: BlockMap,
    pub role: Role,
    pub next_version: u64,
    pub reserved: u64,
    pub remote_on_disk: HashSet<u32>,
    pub is_released: bool,
}

/// The journal's view, built record by record.
struct Replay {
    map: BlockMap,
    role: Role,
    reserved: u64,
    boot: [u8; 16],
    is_closed: bool,
    is_released: bool,
}

impl Replay {
    fn apply(&mut self, record: Record) {
        match record {
            Record::Block(block, entry) => self.map.set(block, entry),
            Record::Role(role) => self.role = role,
            Record::Reserve(version) => self.reserved = self.reserved.max(version),
            Record::Opened(boot) => (self.boot, self.is_closed) = (boot, false),
            Record::Closed => self.is_closed = true,
            Record::Renumber(version) => renumber(&mut self.map, version),
            Record::Released(is_released) => self.is_released = is_released,
        }
    }

    /// A record of the hot log: newer than the journal's unless its version is lower. At the same version a block that
    /// was pulled beats the note that it is to be pulled.
    fn apply_hot(&mut self, record: Record) {
        if let Record::Block(block, entry) = record {
            let old = self.map.get(block);
            if entry.version > old.version || (entry.version == old.version && old.state == BlockState::Remote) {
                self.map.set(block, entry);
            }
        }
    }
}

fn renumber(map: &mut BlockMap, version: u64) {
    let local: Vec<_> = map.entries().filter(|(_, entry)| entry.state == BlockState::Local).collect();
    for (block, mut entry) in local {
        entry.version = version;
        entry.digest = None;
        map.set(block, entry);
    }
}

fn drop_entries(map: &mut BlockMap, is_dropped: impl Fn(BlockState) -> bool) {
    let dropped: Vec<_> = map.entries().filter(|(_, e)| is_dropped(e.state)).map(|(block, _)| block).collect();
    for block in dropped {
        map.set(block, super::map::Entry::default());
    }
}

/// Opens or makes the volume's files and finds its state. Blocking.
pub(super) fn recover(disk: &Arc<dyn Disk>, identity: Identity, start: Role) -> Result<Recovered, VolumeError> {
    let blocks = block_count(identity.size_bytes).ok_or(VolumeError::Size { size_bytes: identity.size_bytes })?;
    let disk_error = |what| move |source| VolumeError::Disk { what, source };
    let boot = disk.boot_id();
    let mut replay =
        Replay { map: BlockMap::new(blocks), role: start, reserved: 1, boot, is_closed: true, is_released: false };
    let first = [Record::Role(start), Record::Closed];
    let (journal, is_new) = Journal::open(disk.clone(), identity, &first, |record| replay.apply(record))?;

    let is_unclean = !replay.is_closed;
    let is_power_cut = is_unclean && replay.boot != boot;
    let (mut hot, records) =
        HotLog::open(&**disk, is_unclean && !is_power_cut).map_err(disk_error("open the hot log"))?;
    let has_hot = !records.is_empty();
    records.into_iter().for_each(|record| replay.apply_hot(record));

    let mut changes = Vec::new();
    if is_power_cut && replay.role.is_active() {
        // Some local blocks may hold newer, never flushed content than their durable version says. A peer that copied
        // that version must not take its copy for what the guest may have read here since: give all a new one.
        let version = replay.reserved;
        replay.reserved += 1;
        replay.apply(Record::Renumber(version));
        changes.push(Record::Renumber(version));
    }
    match replay.role {
        // Of an adoption that was not finished. What was pulled ahead is kept: where newer content lies under a durable
        // older version, the source is past that version, and no map that it will announce names it.
        Role::Standby => drop_entries(&mut replay.map, |state| state == BlockState::Remote),
        Role::Adopted { .. } | Role::Active { .. } | Role::Sealed { .. } => {}
    }

    // Of a publish, a cut or a mirror that ended with the process.
    let leftovers = Purpose::ALL.iter().map(|purpose| purpose.file_name()).chain([super::follow::STAGE_NAME]);
    for name in leftovers {
        disk.remove(name).map_err(disk_error("remove a file that is left"))?;
    }
    let data = disk.open(DATA_NAME, true).map_err(disk_error("open the data file"))?;
    let data =
        data.ok_or(VolumeError::Disk { what: "open the data file", source: std::io::ErrorKind::NotFound.into() })?;
    let data_len = u64::from(blocks) * BLOCK_BYTES as u64;
    let len = data.size().map_err(disk_error("stat the data file"))?;
    if len < data_len {
        if !is_new && len != 0 {
            return Err(VolumeError::DataFile { len, expected: data_len });
        }
        data.set_len(data_len).map_err(disk_error("size the data file"))?;
    }
    if is_unclean {
        discard_unmapped(&*data, &replay.map).map_err(disk_error("clean the data file"))?;
    }

    // From here on this boot's changes count, above every version that was ever given out.
    let next_version = replay.reserved.max(replay.map.highest_version() + 1);
    let reserved = next_version + RESERVE_VERSIONS;
    changes.extend([Record::Reserve(reserved), Record::Opened(boot)]);
    data.sync().map_err(disk_error("sync the data file"))?;
    disk.sync_names().map_err(disk_error("sync the volume's folder"))?;
    if has_hot || replay.role == Role::Standby {
        // The map differs from the journal in more than the changes: write it anew.
        let entries: Vec<_> = replay.map.entries().map(|(block, entry)| Record::Block(block, entry)).collect();
        let tail = [Record::Reserve(reserved), Record::Opened(boot)];
        journal.replace(entries.into_iter().chain(tail))?;
    } else {
        journal.append(&changes)?;
    }
    hot.clear().map_err(disk_error("empty the hot log"))?;

    let remote = replay.map.entries().filter(|(_, entry)| entry.state == BlockState::Remote);
    let remote_on_disk = remote.map(|(block, _)| block).collect();
    Ok(Recovered {
        journal,
        hot,
        data,
        role: replay.role,
        next_version,
        reserved,
        remote_on_disk,
        is_released: replay.is_released,
        map: replay.map,
    })
}

/// Makes true again that what is not local is a hole: data whose record was lost lies there.
fn discard_unmapped(data: &dyn DiskFile, map: &BlockMap) -> std::io::Result<()> {
    let block_bytes = BLOCK_BYTES as u64;
    let mut at = 0;
    while let Some(range) = data.next_data(at)? {
        let first = range.start / block_bytes;
        let end = range.end.div_ceil(block_bytes);
        for block in first..end {
            let is_local = u32::try_from(block).is_ok_and(|block| map.get(block).state == BlockState::Local);
            if !is_local {
                data.punch(block * block_bytes..(block + 1) * block_bytes)?;
            }
        }
        at = (end * block_bytes).max(at + 1);
    }
    Ok(())
}
