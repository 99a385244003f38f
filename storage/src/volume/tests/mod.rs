//! The engine against a model, against power cuts, and in hand-over.

mod handover;
mod mirror;
mod model;
mod points;
mod roles;

use std::sync::Arc;

use supercloud_ids::{Epoch, ProjectId, VolumeId};

use super::{Volume, VolumeError, VolumeParams, disk::Disk, role::Role};
use crate::{
    BLOCK_BYTES,
    backend::{ObjectKey, ObjectStore, mem::MemStore},
    chunk,
    key::{ChunkKind, ContentRoot, DataKeys, ProjectKey},
    manifest::Manifest,
    source::ChunkReader,
};

pub(super) const SECTOR: usize = 512;
/// Seven blocks, the last one short.
pub(super) const SIZE: usize = 6 * BLOCK_BYTES + 3 * SECTOR;

/// A project, a store with a base image, and the base's content.
#[derive(Clone)]
pub(super) struct World {
    pub keys: Arc<DataKeys>,
    pub store: Arc<MemStore>,
    pub base: Option<ContentRoot>,
    pub content: Vec<u8>,
    pub volume: VolumeId,
}

impl World {
    pub(super) async fn new(has_base: bool) -> Self {
        let keys = Arc::new(DataKeys::derive(ProjectId::generate(), &ProjectKey::generate()));
        let store = Arc::new(MemStore::default());
        let mut content = vec![0; SIZE];
        let mut base = None;
        if has_base {
            // Smaller than the volume; some blocks are zeros.
            let size = 5 * BLOCK_BYTES + 4 * SECTOR;
            let mut manifest = Manifest::zeros(size as u64).unwrap();
            for block in [0u32, 1, 3, 5] {
                let at = block as usize * BLOCK_BYTES;
                let end = (at + BLOCK_BYTES).min(size);
                for (sector, bytes) in content[at..end].chunks_mut(SECTOR).enumerate() {
                    stamp(bytes, 1_000_000 + u64::from(block) * 1000 + sector as u64);
                }
                let mut plain = content[at..end].to_vec();
                plain.resize(BLOCK_BYTES, 0);
                let (name, sealed) = chunk::seal(&keys, ChunkKind::Data, &plain).unwrap();
                store.put(ObjectKey::chunk(keys.project(), &name), sealed).await.unwrap();
                manifest.set(block, Some(name));
            }
            base = Some(manifest.store(&keys, &*store).await.unwrap());
        }
        Self { keys, store, base, content, volume: VolumeId::generate() }
    }

    pub(super) fn params(&self, start: Role) -> VolumeParams {
        VolumeParams {
            volume: self.volume,
            size_bytes: SIZE as u64,
            base: self.base,
            reader: ChunkReader::of_store(self.keys.clone(), self.store.clone()),
            start,
            cache_bytes: 3 * BLOCK_BYTES as u64,
        }
    }

    pub(super) async fn open(&self, disk: Arc<dyn Disk>, start: Role) -> Result<Volume, VolumeError> {
        Volume::open(disk, self.params(start)).await
    }

    pub(super) async fn active(&self, disk: Arc<dyn Disk>) -> Volume {
        self.open(disk, Role::Active { epoch: Epoch(1) }).await.unwrap()
    }
}

/// Fills a sector with a number: what is read back tells which write it is of.
pub(super) fn stamp(sector: &mut [u8], number: u64) {
    sector.chunks_mut(8).for_each(|bytes| bytes.copy_from_slice(&number.to_le_bytes()[..bytes.len()]));
}

/// The number in a sector; `None` when it is not one whole write's.
pub(super) fn stamp_of(sector: &[u8]) -> Option<u64> {
    let number = u64::from_le_bytes(*sector.first_chunk()?);
    sector.chunks(8).all(|bytes| bytes == number.to_le_bytes()).then_some(number)
}

pub(super) async fn read_all(volume: &Volume) -> Vec<u8> {
    volume.read(0, SIZE).await.unwrap().to_vec()
}

/// Waits for something that must come; a test that would wait for ever fails instead.
pub(super) async fn until(what: &str, mut is_there: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(30);
    while !is_there() {
        assert!(tokio::time::Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
}
