//! After the switch: the blocks, and the memory, that are still at the source follow, until nothing is missing.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use supercloud_api::Progress;
use supercloud_handover::{DestinationEvent, LocalEvent};
use supercloud_ids::Epoch;

use super::{Fact, Job, PROGRESS_EVERY, memory, thawed};
use crate::{chunks::ChunkSources, volumes::VolumeHome};

/// The pause after a volume could not be asked: its process is being started anew.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Where the disk comes from, and with it who counts what came.
#[derive(Debug)]
pub enum Origin {
    /// The host that the guest has left hands blocks over; the volume processes count.
    Peer,
    /// Chunks of other clouds, read when they are needed.
    Chunks {
        /// They count.
        sources: Arc<ChunkSources>,
        /// Bytes that had come when the guest began to run.
        before: u64,
    },
    /// Nobody who was there from the beginning.
    Uncounted,
}

impl Origin {
    /// Bytes that came before the guest ran and afterwards, by what the volumes count together.
    fn count(&self, pulled: (u64, u64)) -> Option<(u64, u64)> {
        match self {
            Self::Peer => Some(pulled),
            Self::Chunks { sources, before } => Some((*before, sources.served_bytes().saturating_sub(*before))),
            Self::Uncounted => None,
        }
    }
}

/// What is fetched.
pub struct Wants {
    /// The epoch at which the guest runs here.
    pub epoch: Epoch,
    /// Its volumes.
    pub volumes: Vec<VolumeHome>,
    /// Where their blocks come from.
    pub origin: Origin,
    /// At most this much of the link for blocks, bytes per second.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// Memory, where some may be missing.
    pub memory: Option<Memory>,
}

/// Where memory that is missing comes from.
pub enum Memory {
    /// The host that the guest has left.
    Left(memory::Fetch),
    /// What was frozen.
    Frozen(Box<thawed::Fetch>),
}

/// Fetches until nothing is missing, however long it takes; tells `NothingMissing`.
pub async fn run(job: Job, wants: Wants) {
    let Wants { epoch, volumes, origin, bandwidth_bytes_per_s, memory } = wants;
    let is_memory_missing = match &memory {
        Some(Memory::Left(memory)) => Arc::clone(&memory.is_missing),
        Some(Memory::Frozen(memory)) => Arc::clone(&memory.is_missing),
        None => Arc::default(),
    };
    let blocks = async {
        while let Some(pause) = step(&job, &volumes, &origin, bandwidth_bytes_per_s, &is_memory_missing).await {
            tokio::time::sleep(pause).await;
        }
        Ok(())
    };
    let memory = async {
        match memory {
            Some(Memory::Left(with)) => memory::fetch(&job, with).await.then_some(()).ok_or(()),
            Some(Memory::Frozen(with)) => thawed::fetch(&job, *with).await.then_some(()).ok_or(()),
            None => Ok(()),
        }
    };
    tokio::select! {
        () = job.cancel.cancelled() => return,
        fetched = futures::future::try_join(blocks, memory) => {
            if fetched.is_err() {
                // The guest is no more, as was told.
                return;
            }
        }
    }
    job.tell(Fact::Event(LocalEvent::Destination(DestinationEvent::NothingMissing { epoch }))).await;
}

/// Looks at the volumes; the time after which to look again, or `None` when everything is here.
async fn step(
    job: &Job,
    volumes: &[VolumeHome],
    origin: &Origin,
    limit: Option<u64>,
    is_memory_missing: &AtomicBool,
) -> Option<Duration> {
    let mut progress = Progress::default();
    let mut pulled = (0, 0);
    for home in volumes {
        let client = home.client();
        let status = match client.status().await {
            Ok(status) => status,
            Err(error) => {
                tracing::debug!(volume = %home.volume, %error, "a volume does not answer");
                return Some(RETRY_PAUSE);
            }
        };
        if status.missing_blocks > 0
            && !status.is_fetching
            && let Err(error) = client.start_background_fetch(limit).await
        {
            tracing::warn!(volume = %home.volume, error = crate::chain(&error), "a volume does not fetch");
            return Some(RETRY_PAUSE);
        }
        pulled.0 += status.pulled_bytes_before;
        pulled.1 += status.pulled_bytes_after;
        progress.disk_missing_bytes += status.missing_bytes;
    }
    (progress.disk_bytes_before_resume, progress.disk_bytes_after_resume) = origin.count(pulled).unzip();
    let is_done = progress.disk_missing_bytes == 0;
    // Memory matters more, and is told of by who fetches it.
    let is_silent = is_done || is_memory_missing.load(Ordering::Acquire);
    progress.message = if is_silent { String::new() } else { "the rest of the disk follows".to_owned() };
    job.show(progress);
    (!is_done).then_some(PROGRESS_EVERY)
}
