//! Publish: the volume's content at one moment (a [snapshot](super::snapshot)) becomes a manifest in a store, while the guest goes
//! on. A publish for a freeze reads every changed block; one for a point of the volume's history only those that no digest is known
//! of or that the store lacks.

use std::{
    collections::HashSet,
    sync::{Arc, PoisonError},
    time::Instant,
};

use bytes::Bytes;
use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;

use super::{
    CutOf, FetchLimit, Inner, Volume, VolumeError,
    cut::TakenCut,
    map::{BlockMap, BlockState, Entry},
    relock,
    role::Role,
    snapshot::{Purpose, SnapshotId},
};
use crate::{
    BLOCK_BYTES,
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

/// Free space that a point of the history leaves where the store lies, in bytes: guests write to the same disk.
pub const POINT_RESERVE_BYTES: u64 = 256 << 20;

/// What a publish made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// The identity of the content.
    pub root: ContentRoot,
    /// Blocks that differ from the base.
    pub total_blocks: u64,
    /// Of them, those that were read and sealed; the others were in the store by their digests.
    pub sealed_blocks: u64,
    /// Bytes of chunks that the store did not have.
    pub stored_bytes: u64,
    /// The highest version that was given out before the moment.
    pub version: u64,
    /// The moment, by this process's clock: what was acknowledged before is in it, what begins later is not.
    pub at: Instant,
}

/// What a publish is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Aim {
    /// It will be all that is left of the volume: every block is read.
    Freeze,
    /// The volume goes on. Of this moment, or of that of a cut.
    Point(Option<CutOf>),
}

impl Aim {
    const fn is_point(self) -> bool {
        matches!(self, Self::Point(_))
    }
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
        progress: impl FnMut(PublishStatus) + Send,
    ) -> Result<Published, VolumeError> {
        self.bring(Aim::Freeze, store, cancel, progress).await
    }

    /// As [`Volume::publish`], for a point of the history of an active volume that goes on: blocks whose digest is known and whose
    /// chunk the store has are counted on and not read, so the cost goes with what was written since the point before. Fetches
    /// nothing from a source host: while blocks are there, it is refused.
    pub async fn point(
        &self,
        store: &Arc<dyn ObjectStore>,
        cancel: &CancellationToken,
        progress: impl FnMut(PublishStatus) + Send,
    ) -> Result<Published, VolumeError> {
        self.bring(Aim::Point(None), store, cancel, progress).await
    }

    /// As [`Volume::point`], of the moment of a cut that is the newest of its series, and was not taken yet: it is taken by this.
    pub async fn point_of_cut(
        &self,
        cut: CutOf,
        store: &Arc<dyn ObjectStore>,
        cancel: &CancellationToken,
        progress: impl FnMut(PublishStatus) + Send,
    ) -> Result<Published, VolumeError> {
        self.bring(Aim::Point(Some(cut)), store, cancel, progress).await
    }

    async fn bring(
        &self,
        aim: Aim,
        store: &Arc<dyn ObjectStore>,
        cancel: &CancellationToken,
        mut progress: impl FnMut(PublishStatus) + Send,
    ) -> Result<Published, VolumeError> {
        let inner = &self.inner;
        let _one = tokio::select! {
            () = cancel.cancelled() => return Err(cancelled()),
            one = inner.publishing.lock() => one,
        };
        let role = self.role();
        let is_right = match aim {
            Aim::Freeze => matches!(role, Role::Active { .. } | Role::Sealed { .. }),
            Aim::Point(_) => role.is_active(),
        };
        if !is_right {
            return Err(super::RoleError::Role { role, action: "be published" }.into());
        }
        match aim {
            Aim::Freeze => tokio::select! {
                () = cancel.cancelled() => return Err(cancelled()),
                fetched = self.fetch_before_publish() => fetched?,
            },
            Aim::Point(None) if self.missing() > 0 => {
                // All may be here, and only not durable yet.
                self.flush().await?;
                if self.missing() > 0 {
                    return Err(VolumeError::Map { what: "blocks are still at the host that it came from".into() });
                }
            }
            // At a cut all was here.
            Aim::Point(_) => {}
        }
        let _snapshot = SnapshotGuard(inner);
        let (begun, at) = match aim {
            Aim::Point(Some(cut)) => inner.blocking(move |inner| inner.begin_publish_of(cut)).await?,
            Aim::Freeze | Aim::Point(None) => inner.blocking(Inner::begin_publish).await?,
        };
        let (snapshot, version, entries) = begun;
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
        let entries = match aim {
            Aim::Freeze => entries,
            Aim::Point(_) => {
                let unknown = tokio::select! {
                    () = cancel.cancelled() => return Err(cancelled()),
                    unknown = self.count_on_known(snapshot, &**store, &mut manifest, entries) => unknown?,
                };
                done_blocks = total_blocks - unknown.len() as u64;
                progress(PublishStatus::Running { done_blocks, total_blocks });
                unknown
            }
        };
        let sealed_blocks = entries.len() as u64;
        if aim.is_point() {
            // All of them, as if none could be compressed.
            has_room(&**store, sealed_blocks.saturating_mul(BLOCK_BYTES as u64)).await?;
        }
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
            if aim.is_point() {
                // Others fill the disk, too.
                has_room(&**store, objects.iter().map(|(_, bytes)| bytes.len() as u64).sum()).await?;
            }
            // Also those that exist: their durability is the store's answer to the put.
            sweep::put_chunks(&**store, inner.keys.project(), objects).await?;
            progress(PublishStatus::Running { done_blocks, total_blocks });
        }
        let root = manifest.store(&inner.keys, &**store).await?;
        progress(PublishStatus::Done { root, total_blocks, stored_bytes });
        Ok(Published { root, total_blocks, sealed_blocks, stored_bytes, version, at })
    }

    /// Sets the names of blocks whose content is known by its digest and is in the store, where no sweep takes it from now on; gives
    /// the others.
    async fn count_on_known(
        &self,
        snapshot: SnapshotId,
        store: &dyn ObjectStore,
        manifest: &mut Manifest,
        entries: Vec<(u32, Entry)>,
    ) -> Result<Vec<(u32, Entry)>, VolumeError> {
        let inner = &self.inner;
        let zeros = inner.keys.name(ChunkKind::Data, &[0; BLOCK_BYTES]);
        let mut names: Vec<ChunkName> = entries.iter().filter_map(|(_, entry)| known(*entry)).collect();
        names.sort_unstable();
        names.dedup();
        names.retain(|name| *name != zeros);
        let lacking = sweep::count_on(store, inner.keys.project(), &names).await?;
        let lacking: HashSet<ChunkName> = lacking.into_iter().collect();
        let mut unknown = Vec::new();
        for (block, entry) in entries {
            match known(entry) {
                Some(name) if name == zeros => manifest.set(block, None),
                Some(name) if !lacking.contains(&name) => manifest.set(block, Some(name)),
                _ if entry.state == BlockState::Zero => manifest.set(block, None),
                _ => {
                    unknown.push((block, entry));
                    continue;
                }
            }
            inner.take_from_snapshot(snapshot, block);
        }
        Ok(unknown)
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

/// Refuses a point for which a store's disk has no room beside its reserve.
async fn has_room(store: &dyn ObjectStore, needed_bytes: u64) -> Result<(), VolumeError> {
    match store.free_bytes().await? {
        Some(free_bytes) if free_bytes < needed_bytes.saturating_add(POINT_RESERVE_BYTES) => {
            Err(VolumeError::NoRoom { needed_bytes, free_bytes })
        }
        _ => Ok(()),
    }
}

fn cancelled() -> VolumeError {
    VolumeError::Store(crate::backend::StoreError::Io {
        what: "publishing was cancelled".into(),
        source: std::io::ErrorKind::Interrupted.into(),
    })
}

/// The name of a local block's content, when it was computed.
fn known(entry: Entry) -> Option<ChunkName> {
    entry.digest.filter(|_| entry.state == BlockState::Local)
}

type SealedBlock = (u32, Option<(ChunkName, Bytes)>);
/// The snapshot, its version and its blocks.
type BegunPublish = (SnapshotId, u64, Vec<(u32, Entry)>);

/// The blocks that differ from the base.
fn all_here(map: &BlockMap) -> Result<Vec<(u32, Entry)>, VolumeError> {
    let entries: Vec<_> = map.entries().collect();
    match entries.iter().find(|(_, entry)| entry.state == BlockState::Remote) {
        Some((block, _)) => Err(VolumeError::Map { what: format!("block {block} is still at the source") }),
        None => Ok(entries),
    }
}

impl Inner {
    /// Marks the moment; gives the blocks that differ from the base, and the moment.
    fn begin_publish(&self) -> Result<(BegunPublish, Instant), VolumeError> {
        let mut at = Instant::now();
        let begun = self.begin_snapshot(Purpose::Publish, 0, |_| {
            // No operation of the guest is half done now.
            at = Instant::now();
            Ok(())
        })?;
        Ok(((begun.id, begun.version, all_here(&begun.map)?), at))
    }

    /// Likewise, of the moment of a cut.
    fn begin_publish_of(&self, cut: CutOf) -> Result<(BegunPublish, Instant), VolumeError> {
        let TakenCut { snapshot, version, at } = self.take_cut(cut)?;
        Ok(((snapshot, version, all_here(&self.snapshot_map(snapshot)?)?), at))
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
        let (data, name) = {
            let _stripe = self.stripe(block).read().unwrap_or_else(PoisonError::into_inner);
            let data = self.read_snapshot(snapshot, block)?;
            self.take_from_snapshot(snapshot, block);
            let name = self.keys.name(ChunkKind::Data, &data);
            if entry.digest.is_none() {
                let mut state = relock(&self.map);
                let now = state.map.get(block);
                // The stripe is held: when the version is the same, so is the content. The next point need not read it.
                if now.version == entry.version && now.state == BlockState::Local {
                    state.map.set(block, Entry { digest: Some(name), ..now });
                }
            }
            (data, name)
        };
        if is_zero(&data) {
            return Ok(None);
        }
        Ok(Some((name, chunk::seal_named(&self.keys, ChunkKind::Data, &name, &data))))
    }
}
