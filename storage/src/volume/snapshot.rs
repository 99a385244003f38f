//! Snapshots: the content of one moment, kept while the guest goes on.
//!
//! At the moment, every operation of the guest is complete or has not begun. From then on whoever changes a block that a
//! snapshot still needs first copies its old content to the snapshot's side file (copy before write). A snapshot that
//! cannot be kept (the disk is full) is given up; the guest goes on.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    Inner, VolumeError, chain,
    disk::DiskFile,
    map::{BlockMap, BlockState, Entry},
    relock,
    role::Role,
};
use crate::BLOCK_BYTES;

/// What a snapshot is kept for. There is one of each at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A publish: of every block that differs from the base.
    Publish,
    /// A cut of a mirror: of the blocks that changed since the cut before.
    Cut,
}

impl Purpose {
    pub(super) const ALL: [Self; 2] = [Self::Publish, Self::Cut];

    /// The name of the side file.
    pub(super) const fn file_name(self) -> &'static str {
        match self {
            Self::Publish => "snapshot",
            Self::Cut => "cut",
        }
    }
}

/// Tells one snapshot from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SnapshotId(u64);

pub(super) struct Snapshot {
    id: SnapshotId,
    purpose: Purpose,
    /// A file without a name: it goes with the last who has it.
    side: Arc<dyn DiskFile>,
    /// The map of the moment. Digests that are computed later are put into it.
    map: BlockMap,
    /// Only what is above this version is kept.
    since: u64,
    /// Of it, what was taken already.
    taken: HashSet<u32>,
    /// What lies in the side file.
    saved: HashSet<u32>,
}

impl Snapshot {
    fn lacks(&self, block: u32) -> bool {
        let entry = self.map.get(block);
        entry.state == BlockState::Local
            && entry.version > self.since
            && !self.saved.contains(&block)
            && !self.taken.contains(&block)
    }
}

/// The snapshots of a volume.
#[derive(Default)]
pub(super) struct Snapshots {
    list: Mutex<Vec<Snapshot>>,
    next: AtomicU64,
}

/// A snapshot as it begins.
pub(super) struct Begun {
    pub id: SnapshotId,
    /// The map of the moment.
    pub map: BlockMap,
    /// The highest version that was given out before it.
    pub version: u64,
}

fn disk(what: &'static str) -> impl FnOnce(std::io::Error) -> VolumeError {
    move |source| VolumeError::Disk { what, source }
}

fn gone() -> VolumeError {
    VolumeError::Map { what: "the snapshot is gone".into() }
}

impl Inner {
    /// Marks the moment, if `judge` allows it in the volume's role; ends the snapshot of this purpose that was there before.
    pub(super) fn begin_snapshot(
        &self,
        purpose: Purpose,
        since: u64,
        judge: impl FnOnce(Role) -> Result<(), VolumeError>,
    ) -> Result<Begun, VolumeError> {
        let _before = self.end_snapshot(purpose);
        let side = self.disk.open(purpose.file_name(), true).map_err(disk("open the snapshot's file"))?;
        let side = side.ok_or_else(|| disk("open the snapshot's file")(std::io::ErrorKind::NotFound.into()))?;
        side.set_len(0).map_err(disk("empty the snapshot's file"))?;
        self.disk.remove(purpose.file_name()).map_err(disk("make the snapshot's file nameless"))?;
        let id = SnapshotId(self.snapshots.next.fetch_add(1, Ordering::Relaxed));
        // Exclusive: no operation of the guest is half done.
        let role = self.role.write().unwrap_or_else(PoisonError::into_inner);
        judge(*role)?;
        let mut list = relock(&self.snapshots.list);
        let (map, version) = {
            let state = relock(&self.map);
            (state.map.clone(), state.next_version - 1)
        };
        let snapshot =
            Snapshot { id, purpose, side, map: map.clone(), since, taken: HashSet::new(), saved: HashSet::new() };
        list.push(snapshot);
        Ok(Begun { id, map, version })
    }

    /// Ends the snapshot of this purpose, if there is one. Giving back what it took can take its time: drop it where nobody waits.
    pub(super) fn end_snapshot(&self, purpose: Purpose) -> Option<Snapshot> {
        let mut list = relock(&self.snapshots.list);
        let index = list.iter().position(|snapshot| snapshot.purpose == purpose)?;
        Some(list.swap_remove(index))
    }

    /// A cut's snapshot is a publish's from now on, in place of the one that was there, which is given.
    pub(super) fn keep_for_publish(&self, id: SnapshotId) -> Result<Option<Snapshot>, VolumeError> {
        let mut list = relock(&self.snapshots.list);
        let before = list.iter().position(|snapshot| snapshot.purpose == Purpose::Publish);
        let before = before.map(|index| list.swap_remove(index));
        let snapshot = list.iter_mut().find(|snapshot| snapshot.id == id).ok_or_else(gone)?;
        snapshot.purpose = Purpose::Publish;
        Ok(before)
    }

    /// Called, with the block's stripe held, by whoever is about to change a local block.
    pub(super) fn save_for_snapshots(&self, block: u32) {
        let lacking: Vec<_> = {
            let list = relock(&self.snapshots.list);
            let lacking = list.iter().filter(|snapshot| snapshot.lacks(block));
            lacking.map(|snapshot| (snapshot.id, snapshot.purpose, snapshot.side.clone())).collect()
        };
        if lacking.is_empty() {
            return;
        }
        let data = self.read_block(block);
        for (id, purpose, side) in lacking {
            let saved = data
                .as_ref()
                .map_err(|error| chain(error))
                .and_then(|data| side.write_at(data, Self::offset(block)).map_err(|error| chain(&error)));
            let mut list = relock(&self.snapshots.list);
            let Some(index) = list.iter().position(|snapshot| snapshot.id == id) else { continue };
            match saved {
                Ok(()) => drop(list[index].saved.insert(block)),
                Err(error) => {
                    let given_up = list.swap_remove(index);
                    drop(list);
                    drop(given_up);
                    tracing::warn!(volume = %self.params.volume, ?purpose, error, "a snapshot cannot be kept");
                }
            }
        }
    }

    /// A block's entry at the snapshot's moment.
    pub(super) fn snapshot_entry(&self, id: SnapshotId, block: u32) -> Result<Entry, VolumeError> {
        let list = relock(&self.snapshots.list);
        let snapshot = list.iter().find(|snapshot| snapshot.id == id).ok_or_else(gone)?;
        Ok(snapshot.map.get(block))
    }

    /// The map of the snapshot's moment, with the digests that were computed meanwhile.
    pub(super) fn snapshot_map(&self, id: SnapshotId) -> Result<BlockMap, VolumeError> {
        let list = relock(&self.snapshots.list);
        let snapshot = list.iter().find(|snapshot| snapshot.id == id).ok_or_else(gone)?;
        Ok(snapshot.map.clone())
    }

    /// The content of a block that was local at the snapshot's moment; needs the block's stripe.
    pub(super) fn read_snapshot(&self, id: SnapshotId, block: u32) -> Result<Vec<u8>, VolumeError> {
        let (version, side) = {
            let list = relock(&self.snapshots.list);
            let snapshot = list.iter().find(|snapshot| snapshot.id == id).ok_or_else(gone)?;
            let side = snapshot.saved.contains(&block).then(|| snapshot.side.clone());
            (snapshot.map.get(block).version, side)
        };
        match side {
            Some(side) => {
                let mut data = vec![0; BLOCK_BYTES];
                side.read_at(&mut data, Self::offset(block)).map_err(disk("read the snapshot's file"))?;
                Ok(data)
            }
            // Who changes it saves it first, and waits for the stripe.
            None if self.entry(block).version == version => self.read_block(block),
            None => Err(VolumeError::Map { what: format!("block {block} is not kept by the snapshot") }),
        }
    }

    /// A block's entry at the snapshot's moment with its digest, computed when it is lacking; with `is_reading` also its
    /// data when it was local.
    pub(super) fn digested_snapshot(
        &self,
        id: SnapshotId,
        block: u32,
        is_reading: bool,
    ) -> Result<(Entry, Option<Vec<u8>>), VolumeError> {
        let _stripe = self.stripe(block).read().unwrap_or_else(PoisonError::into_inner);
        let mut entry = self.snapshot_entry(id, block)?;
        if entry.state != BlockState::Local || (entry.digest.is_some() && !is_reading) {
            return Ok((entry, None));
        }
        let data = self.read_snapshot(id, block)?;
        if entry.digest.is_none() {
            entry.digest = Some(self.keys.name(crate::key::ChunkKind::Data, &data));
            let mut list = relock(&self.snapshots.list);
            if let Some(snapshot) = list.iter_mut().find(|snapshot| snapshot.id == id) {
                snapshot.map.set(block, entry);
            }
            drop(list);
            let mut state = relock(&self.map);
            // The stripe is held: when the version is the same, so is the content.
            if state.map.get(block).version == entry.version {
                state.map.set(block, entry);
            }
        }
        Ok((entry, Some(data)))
    }

    /// The snapshot needs to keep this block no more.
    pub(super) fn take_from_snapshot(&self, id: SnapshotId, block: u32) {
        let mut list = relock(&self.snapshots.list);
        if let Some(snapshot) = list.iter_mut().find(|snapshot| snapshot.id == id) {
            snapshot.taken.insert(block);
        }
    }
}
