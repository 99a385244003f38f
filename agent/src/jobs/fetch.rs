//! After the switch: the blocks that are still at the source follow, until nothing is missing.

use std::{sync::Arc, time::Duration};

use supercloud_api::Progress;
use supercloud_handover::{DestinationEvent, LocalEvent};
use supercloud_ids::Epoch;

use super::{Fact, Job, PROGRESS_EVERY};
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

/// Fetches until nothing is missing, however long it takes; tells `NothingMissing`.
pub async fn run(job: Job, epoch: Epoch, volumes: Vec<VolumeHome>, origin: Origin, bandwidth_bytes_per_s: Option<u64>) {
    let fetched = async {
        while let Some(pause) = step(&job, &volumes, &origin, bandwidth_bytes_per_s).await {
            tokio::time::sleep(pause).await;
        }
    };
    tokio::select! {
        () = job.cancel.cancelled() => return,
        () = fetched => {}
    }
    job.tell(Fact::Event(LocalEvent::Destination(DestinationEvent::NothingMissing { epoch }))).await;
}

/// Looks at the volumes; the time after which to look again, or `None` when everything is here.
async fn step(job: &Job, volumes: &[VolumeHome], origin: &Origin, limit: Option<u64>) -> Option<Duration> {
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
    progress.message = if is_done { String::new() } else { "the rest of the disk follows".to_owned() };
    job.show(progress);
    (!is_done).then_some(PROGRESS_EVERY)
}
