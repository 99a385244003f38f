//! Publish: the volume's content at one moment becomes a manifest in a store, while the guest goes on.
//!
//! At the moment, every operation of the guest is complete or has not begun. From then on whoever changes a block that
//! is not uploaded yet first copies its old content to a side file (copy before write).

use std::{
    collections::HashSet,
    sync::{Arc, PoisonError},
};

use bytes::Bytes;
use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;

use super::{
    FetchLimit, Inner, Volume, VolumeError,
    disk::DiskFile,
    map::{BlockState, Entry},
    relock,
    role::Role,
};
use crate::{
    backend::{ObjectKey, ObjectStore},
    chunk, is_zero,
    key::{ChunkKind, ChunkName, ContentRoot},
    manifest::Manifest,
    process::control::PublishStatus,
    sweep,
};

const SIDE_NAME: &str = "snapshot";
/// Blocks sealed by one worker at a time: 2 MiB.
const RUN_BLOCKS: usize = 32;
const RUNS_AT_ONCE: usize = 3;

/// The content at the moment of a publish, as far as it is not uploaded.
pub(super) struct Snapshot {
    side: Arc<dyn DiskFile>,
    /// Local blocks that are not uploaded.
    waiting: HashSet<u32>,
    /// Of these, those whose content lies in the side file.
    saved: HashSet<u32>,
}

/// What a publish made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// The identity of the content.
    pub root: ContentRoot,
    /// Blocks that differ from the base.
    pub total_blocks: u64,
    /// Bytes of chunks that the store did not have.
    pub stored_bytes: u64,
}

/// Ends the snapshot also when the publish is dropped half way.
struct SnapshotGuard<'a>(&'a Inner);

impl Drop for SnapshotGuard<'_> {
    fn drop(&mut self) {
        *relock(&self.0.snapshot) = None;
        // Best effort: the next publish empties it.
        let _ = self.0.disk.remove(SIDE_NAME);
    }
}

impl Volume {
    /// Uploads the content of this moment and returns its manifest's root. Blocks of the base are not touched, chunks
    /// that the store has are not uploaded again, so a publish that failed goes on where it stopped. What is still at
    /// a source host is fetched first. For an active or a sealed volume.
    pub async fn publish(
        &self,
        store: &Arc<dyn ObjectStore>,
        cancel: &CancellationToken,
        mut progress: impl FnMut(PublishStatus) + Send,
    ) -> Result<Published, VolumeError> {
        let inner = &self.inner;
        let _one = inner.publishing.lock().await;
        if !matches!(self.role(), Role::Active { .. } | Role::Sealed { .. }) {
            let role = self.role();
            return Err(super::RoleError::Role { role, action: "be published" }.into());
        }
        tokio::select! {
            () = cancel.cancelled() => return Err(cancelled()),
            fetched = self.fetch_before_publish() => fetched?,
        }
        let _snapshot = SnapshotGuard(inner);
        let entries = inner.blocking(Inner::begin_snapshot).await?;
        let mut manifest = match &inner.base {
            // The same leaves, shared; sizes can differ when the volume was made larger than its image.
            Some(base) if base.size_bytes() == self.size_bytes() => base.clone(),
            base => {
                let mut manifest = Manifest::zeros(self.size_bytes())?;
                base.iter().flat_map(Manifest::chunks).for_each(|(block, name)| manifest.set(block, Some(name)));
                manifest
            }
        };
        let total_blocks = entries.len() as u64;
        let (mut done_blocks, mut stored_bytes) = (0, 0);
        progress(PublishStatus::Running { done_blocks, total_blocks });
        let runs: Vec<Vec<(u32, Entry)>> = entries.chunks(RUN_BLOCKS).map(<[_]>::to_vec).collect();
        let mut runs = std::pin::pin!(
            futures::stream::iter(runs)
                .map(|run| inner.blocking(move |inner| inner.seal_run(&run)))
                .buffered(RUNS_AT_ONCE)
        );
        while let Some(run) = tokio::select! {
            () = cancel.cancelled() => return Err(cancelled()),
            run = runs.next() => run,
        } {
            let mut objects = Vec::new();
            for (block, sealed) in run? {
                manifest.set(block, sealed.as_ref().map(|(name, _)| *name));
                done_blocks += 1;
                if let Some((name, bytes)) = sealed {
                    let key = ObjectKey::chunk(inner.keys.project(), &name);
                    if !store.exists(key.clone()).await? {
                        stored_bytes += bytes.len() as u64;
                    }
                    objects.push((key, bytes));
                }
            }
            // Also those that exist: their durability is the store's answer to the put.
            sweep::put_chunks(&**store, inner.keys.project(), objects).await?;
            progress(PublishStatus::Running { done_blocks, total_blocks });
        }
        let root = manifest.store(&inner.keys, &**store).await?;
        progress(PublishStatus::Done { root, total_blocks, stored_bytes });
        Ok(Published { root, total_blocks, stored_bytes })
    }

    async fn fetch_before_publish(&self) -> Result<(), VolumeError> {
        if self.missing() == 0 {
            return Ok(());
        }
        match self.fetch_all(&FetchLimit::default()).await {
            // Everything is here; that the source could not be told is not this caller's matter.
            Err(VolumeError::Source(_)) if self.missing() == 0 => Ok(()),
            other => other,
        }
    }
}

fn cancelled() -> VolumeError {
    VolumeError::Store(crate::backend::StoreError::Io {
        what: "publishing was cancelled".into(),
        source: std::io::ErrorKind::Interrupted.into(),
    })
}

type SealedBlock = (u32, Option<(ChunkName, Bytes)>);

impl Inner {
    /// Marks the moment; gives the blocks that differ from the base.
    fn begin_snapshot(&self) -> Result<Vec<(u32, Entry)>, VolumeError> {
        let disk = |what| move |source| VolumeError::Disk { what, source };
        let side = self.disk.open(SIDE_NAME, true).map_err(disk("open the snapshot's file"))?;
        let side = side.ok_or_else(|| disk("open the snapshot's file")(std::io::ErrorKind::NotFound.into()))?;
        side.set_len(0).map_err(disk("empty the snapshot's file"))?;
        // Exclusive: no operation of the guest is half done.
        let _role = self.role.write().unwrap_or_else(PoisonError::into_inner);
        let mut snapshot = relock(&self.snapshot);
        let state = relock(&self.map);
        let entries: Vec<_> = state.map.entries().collect();
        if let Some((block, _)) = entries.iter().find(|(_, entry)| entry.state == BlockState::Remote) {
            return Err(VolumeError::Map { what: format!("block {block} is still at the source") });
        }
        let local = entries.iter().filter(|(_, entry)| entry.state == BlockState::Local);
        let waiting = local.map(|(block, _)| *block).collect();
        *snapshot = Some(Snapshot { side, waiting, saved: HashSet::new() });
        Ok(entries)
    }

    /// Called, with the block's stripe held, by whoever is about to change a block.
    pub(super) fn save_for_snapshot(&self, block: u32) -> Result<(), VolumeError> {
        let mut guard = relock(&self.snapshot);
        let Some(snapshot) = guard.as_mut() else { return Ok(()) };
        if !snapshot.waiting.contains(&block) || snapshot.saved.contains(&block) {
            return Ok(());
        }
        let data = self.read_block(block)?;
        snapshot
            .side
            .write_at(&data, Self::offset(block))
            .map_err(|source| VolumeError::Disk { what: "write the snapshot's file", source })?;
        snapshot.saved.insert(block);
        Ok(())
    }

    fn seal_run(&self, run: &[(u32, Entry)]) -> Result<Vec<SealedBlock>, VolumeError> {
        run.iter().map(|(block, entry)| Ok((*block, self.seal_block(*block, *entry)?))).collect()
    }

    fn seal_block(&self, block: u32, entry: Entry) -> Result<Option<(ChunkName, Bytes)>, VolumeError> {
        if entry.state == BlockState::Zero {
            return Ok(None);
        }
        let data = {
            let _stripe = self.stripe(block).read().unwrap_or_else(PoisonError::into_inner);
            let mut guard = relock(&self.snapshot);
            let snapshot = guard.as_mut().filter(|snapshot| snapshot.waiting.contains(&block));
            let snapshot = snapshot.ok_or_else(|| VolumeError::Map { what: "the snapshot is gone".into() })?;
            let data = if snapshot.saved.contains(&block) {
                let mut data = vec![0; crate::BLOCK_BYTES];
                snapshot
                    .side
                    .read_at(&mut data, Self::offset(block))
                    .map_err(|source| VolumeError::Disk { what: "read the snapshot's file", source })?;
                data
            } else {
                self.read_block(block)?
            };
            snapshot.waiting.remove(&block);
            data
        };
        if is_zero(&data) {
            return Ok(None);
        }
        let name = self.keys.name(ChunkKind::Data, &data);
        Ok(Some((name, chunk::seal_named(&self.keys, ChunkKind::Data, &name, &data))))
    }
}
