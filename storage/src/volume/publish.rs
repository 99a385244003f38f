//! Publish: the volume's content at one moment (a [snapshot](super::snapshot)) becomes a manifest in a store, while the guest goes
//! on.

use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;

use super::{
    FetchLimit, Inner, Volume, VolumeError,
    map::{BlockState, Entry},
    role::Role,
    snapshot::{Purpose, SnapshotId},
};
use crate::{
    backend::{ObjectKey, ObjectStore},
    chunk, is_zero,
    key::{ChunkKind, ChunkName, ContentRoot},
    manifest::Manifest,
    process::control::PublishStatus,
    sweep,
};

/// Blocks sealed by one worker at a time: 2 MiB.
const RUN_BLOCKS: usize = 32;
const RUNS_AT_ONCE: usize = 3;

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
        drop(self.0.end_snapshot(Purpose::Publish));
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
        let (snapshot, entries) = inner.blocking(Inner::begin_publish).await?;
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
                .map(|run| inner.blocking(move |inner| inner.seal_run(snapshot, &run)))
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
    fn begin_publish(&self) -> Result<(SnapshotId, Vec<(u32, Entry)>), VolumeError> {
        let begun = self.begin_snapshot(Purpose::Publish, 0, |_| Ok(()))?;
        let entries: Vec<_> = begun.map.entries().collect();
        if let Some((block, _)) = entries.iter().find(|(_, entry)| entry.state == BlockState::Remote) {
            return Err(VolumeError::Map { what: format!("block {block} is still at the source") });
        }
        Ok((begun.id, entries))
    }

    fn seal_run(&self, snapshot: SnapshotId, run: &[(u32, Entry)]) -> Result<Vec<SealedBlock>, VolumeError> {
        run.iter().map(|(block, entry)| Ok((*block, self.seal_block(snapshot, *block, *entry)?))).collect()
    }

    fn seal_block(
        &self,
        snapshot: SnapshotId,
        block: u32,
        entry: Entry,
    ) -> Result<Option<(ChunkName, Bytes)>, VolumeError> {
        if entry.state == BlockState::Zero {
            return Ok(None);
        }
        let data = {
            let _stripe = self.stripe(block).read().unwrap_or_else(PoisonError::into_inner);
            let data = self.read_snapshot(snapshot, block)?;
            self.take_from_snapshot(snapshot, block);
            data
        };
        if is_zero(&data) {
            return Ok(None);
        }
        let name = self.keys.name(ChunkKind::Data, &data);
        Ok(Some((name, chunk::seal_named(&self.keys, ChunkKind::Data, &name, &data))))
    }
}
