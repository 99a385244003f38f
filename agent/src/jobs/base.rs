//! What a guest's volumes stand on (an image, a freeze), brought into the store of the guest's cloud while the guest runs.
//!
//! Blocks that nobody has written are read from the base on demand, so until all of it is here the guest needs the
//! controller, or the cloud from which it came, for as long as it lives.

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;
use supercloud_ids::GuestId;
use supercloud_storage::{
    BLOCK_BYTES,
    backend::{ObjectKey, ObjectStore as _, StoreError},
    key::{ChunkKind, ChunkName, ContentRoot},
    manifest::{Manifest, ManifestError},
    source::ChunkReader,
    sweep,
};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::prepare::{DISK_RESERVE_BYTES, keys};
use crate::{chunks::ChunkSources, config::free_disk_bytes, guest::record::CopyRecord, host::Host};

/// Chunks on their way at once: enough to fill a line of some latency, few enough to leave room for the guest's own reads.
const AT_ONCE: usize = 4;
/// Between attempts; doubled up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));

/// The work on one guest's bases. Ends when it is dropped.
pub struct BaseFetch {
    roots: Vec<ContentRoot>,
    missing: watch::Receiver<Option<u64>>,
    _task: AbortOnDropHandle<()>,
}

impl BaseFetch {
    /// Begins. Nothing is fetched twice: what the store has is left alone.
    #[must_use]
    pub fn begin(guest: GuestId, copy: &CopyRecord, sources: &Arc<ChunkSources>, host: &Arc<Host>) -> Self {
        let (told, missing) = watch::channel(None);
        let roots = roots(copy);
        let work = Work {
            guest,
            roots: roots.clone(),
            reader: sources.reader(keys(copy), &host.store),
            host: host.clone(),
            told,
        };
        Self { roots, missing, _task: AbortOnDropHandle::new(tokio::spawn(work.run())) }
    }

    /// Whether it is what this copy needs.
    #[must_use]
    pub fn is_for(&self, copy: &CopyRecord) -> bool {
        self.roots == roots(copy)
    }

    /// What the store still lacks, in bytes; none while that is not known.
    #[must_use]
    pub fn missing_bytes(&self) -> Option<u64> {
        *self.missing.borrow()
    }
}

fn roots(copy: &CopyRecord) -> Vec<ContentRoot> {
    copy.spec.volumes.iter().filter_map(|volume| volume.base_root.as_deref()?.parse().ok()).collect()
}

struct Work {
    guest: GuestId,
    roots: Vec<ContentRoot>,
    reader: ChunkReader,
    host: Arc<Host>,
    told: watch::Sender<Option<u64>>,
}

#[derive(Debug, thiserror::Error)]
enum BaseError {
    #[error("the list of its blocks cannot be had")]
    Manifest(#[from] ManifestError),
    #[error("this cloud's store does not answer")]
    Store(#[from] StoreError),
    #[error("{0} blocks cannot be had now")]
    Missing(usize),
    #[error("the disk is full but for its reserve")]
    Full,
    #[error("the store is being swept")]
    Swept,
}

impl Work {
    async fn run(self) {
        let mut pause = PAUSES.0;
        while let Err(error) = self.attempt().await {
            tracing::warn!(guest = %self.guest, error = crate::chain(&error), "what its volumes stand on is not all here yet");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    async fn attempt(&self) -> Result<(), BaseError> {
        let lacking = self.lacking().await?;
        let count = lacking.len();
        if count > 0 {
            self.tell(count);
        }
        let mut fetched = futures::stream::iter(lacking).map(|name| self.fetch(name)).buffer_unordered(AT_ONCE);
        let mut left = count;
        while let Some(result) = fetched.next().await {
            match result {
                Ok(true) => {
                    left -= 1;
                    // "Nothing is missing" lets the other cloud go for good: only a look into the store may say that.
                    self.tell(left.max(1));
                }
                Ok(false) => {}
                Err(full) => return Err(full),
            }
        }
        // Reading and keeping are two things: what counts is what is in the store now.
        let still = if count == 0 { 0 } else { self.lacking().await?.len() };
        // What was counted may have been condemned before this guest came; a sweep that begins later knows of it.
        if sweep::is_sweeping(&self.host.store, self.reader.keys().project()).await? {
            return Err(BaseError::Swept);
        }
        self.tell(still);
        match still {
            0 => Ok(()),
            still => Err(BaseError::Missing(still)),
        }
    }

    fn tell(&self, chunks: usize) {
        self.told.send_replace(Some((chunks as u64).saturating_mul(BLOCK_BYTES as u64)));
    }

    /// Whether the chunk came. An error ends the attempt.
    async fn fetch(&self, name: ChunkName) -> Result<bool, BaseError> {
        let folder = self.host.config.store_dir.clone();
        let free = tokio::task::spawn_blocking(move || free_disk_bytes(&folder)).await.unwrap_or(0);
        if free < DISK_RESERVE_BYTES {
            return Err(BaseError::Full);
        }
        match self.reader.read(ChunkKind::Data, name).await {
            Ok(_) => Ok(true),
            Err(error) => {
                tracing::debug!(guest = %self.guest, error = crate::chain(&error), "a block of the base cannot be had");
                Ok(false)
            }
        }
    }

    /// Chunks of the bases that the cloud's store has not, each once.
    async fn lacking(&self) -> Result<Vec<ChunkName>, BaseError> {
        let project = self.reader.keys().project();
        let mut lacking = Vec::new();
        for root in &self.roots {
            let manifest = Manifest::load(&self.reader, *root).await?;
            // The list itself is a part of what must be here.
            manifest.store(self.reader.keys(), &self.host.store).await?;
            for (_, name) in manifest.chunks() {
                if !self.host.store.exists(ObjectKey::chunk(project, &name)).await? {
                    lacking.push(name);
                }
            }
        }
        lacking.sort_unstable();
        lacking.dedup();
        Ok(lacking)
    }
}
