//! What a guest's volumes stand on (an image, a freeze), brought into the store of the guest's cloud while the guest runs.
//!
//! Blocks that nobody has written are read from the base on demand, so until all of it is here the guest needs the
//! controller, or the cloud from which it came, for as long as it lives.

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;
use supercloud_ids::GuestId;
use supercloud_storage::{
    BLOCK_BYTES,
    backend::StoreError,
    key::{ChunkKind, ChunkName, ContentRoot, DataKeys},
    manifest::{Manifest, ManifestError},
    source::ChunkReader,
    sweep,
};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::prepare::{DISK_RESERVE_BYTES, keys};
use crate::{
    chunks::{ChunkSources, home_sources},
    config::free_disk_bytes,
    guest::record::CopyRecord,
    host::Host,
};

/// Chunks on their way at once: enough to fill a line of some latency, few enough to leave room for the guest's own reads.
const AT_ONCE: usize = 4;
/// Between attempts; doubled up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));
/// How often a freeze tries.
const ATTEMPTS: u32 = 3;

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
            reader: sources.home_reader(keys(copy), &host.store),
            host: host.clone(),
            told,
            looked: watch::Sender::new((0, 0)),
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

/// What the volumes of a copy stand on.
#[must_use]
pub fn roots(copy: &CopyRecord) -> Vec<ContentRoot> {
    copy.spec.volumes.iter().filter_map(|volume| volume.base_root.as_deref()?.parse().ok()).collect()
}

struct Work {
    guest: GuestId,
    roots: Vec<ContentRoot>,
    reader: ChunkReader,
    host: Arc<Host>,
    told: watch::Sender<Option<u64>>,
    /// How many chunks the store was asked for, of how many.
    looked: watch::Sender<(usize, usize)>,
}

/// What is told while a base is brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Telling {
    /// The store was asked for so many chunks, of so many: in a bucket that takes its time.
    Looked(usize, usize),
    /// So many bytes are missing.
    Missing(u64),
}

/// Why not all of a base is here.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// Its manifest, or the place for it.
    #[error("the list of its blocks cannot be had")]
    Manifest(#[from] ManifestError),
    /// The place for its blocks.
    #[error("this cloud's store does not answer")]
    Store(#[from] StoreError),
    /// So many of its blocks.
    #[error("{0} blocks cannot be had now")]
    Missing(usize),
    /// Room for it.
    #[error("the disk is full but for its reserve")]
    Full,
}

/// Content that a freeze is made of.
pub struct Bringing {
    /// Whose.
    pub guest: GuestId,
    /// What.
    pub roots: Vec<ContentRoot>,
    /// What it is read with.
    pub keys: Arc<DataKeys>,
}

impl Bringing {
    /// Brings all of it into what counts as this cloud's store, which is where it is looked for from the freeze on.
    ///
    /// # Errors
    /// When it cannot be had after some attempts.
    pub async fn complete(
        self,
        sources: Option<&Arc<ChunkSources>>,
        host: &Arc<Host>,
        tell: impl Fn(Telling),
    ) -> Result<(), BaseError> {
        let Self { guest, roots, keys } = self;
        let reader = match sources {
            Some(sources) => sources.home_reader(keys, &host.store),
            None => {
                let sources = home_sources(keys.project(), &host.store);
                ChunkReader::new(keys, sources)
            }
        };
        let (told, mut missing) = watch::channel(None);
        let (looked, mut looking) = watch::channel((0, 0));
        let work = Work { guest, roots, reader, host: host.clone(), told, looked };
        let attempts = async {
            for _ in 1..ATTEMPTS {
                match work.attempt().await {
                    Ok(()) => return Ok(()),
                    Err(error) => tracing::warn!(%guest, error = crate::chain(&error), "its base is not all here yet"),
                }
                tokio::time::sleep(PAUSES.0).await;
            }
            work.attempt().await
        };
        let show = async {
            // The senders live as long as the attempts.
            loop {
                tokio::select! {
                    Ok(()) = missing.changed() => if let Some(bytes) = *missing.borrow_and_update() {
                        tell(Telling::Missing(bytes));
                    },
                    Ok(()) = looking.changed() => {
                        let (looked, all) = *looking.borrow_and_update();
                        tell(Telling::Looked(looked, all));
                    }
                    else => break std::future::pending::<std::convert::Infallible>().await,
                }
            }
        };
        tokio::select! {
            done = attempts => done,
            never = show => match never {},
        }
    }
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
        if self.host.store.bucket().is_none() {
            let folder = self.host.config.store_dir.clone();
            let free = tokio::task::spawn_blocking(move || free_disk_bytes(&folder)).await.unwrap_or(0);
            if free < DISK_RESERVE_BYTES {
                return Err(BaseError::Full);
            }
        }
        match self.reader.read(ChunkKind::Data, name).await {
            Ok(_) => Ok(true),
            Err(error) => {
                tracing::debug!(guest = %self.guest, error = crate::chain(&error), "a block of the base cannot be had");
                Ok(false)
            }
        }
    }

    /// Chunks of the bases that the cloud's store has not, each once; no sweep takes the others.
    async fn lacking(&self) -> Result<Vec<ChunkName>, BaseError> {
        let store = self.host.store.home();
        let mut names = Vec::new();
        for root in &self.roots {
            let manifest = Manifest::load(&self.reader, *root).await?;
            // The list itself is a part of what must be here, and comes first: by it sweeps know what is needed.
            manifest.store(self.reader.keys(), &*store).await?;
            names.extend(manifest.chunks().map(|(_, name)| name));
        }
        names.sort_unstable();
        names.dedup();
        let tell = |looked| {
            self.looked.send_replace((looked, names.len()));
        };
        Ok(sweep::count_on_telling(&*store, self.reader.keys().project(), &names, tell).await?)
    }
}
