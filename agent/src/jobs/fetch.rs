//! After the switch: the blocks that are still at the source follow, until nothing is missing.

use std::time::Duration;

use supercloud_api::Progress;
use supercloud_handover::{DestinationEvent, LocalEvent};
use supercloud_ids::Epoch;

use super::{Fact, Job, PROGRESS_EVERY};
use crate::volumes::VolumeHome;

/// The pause after a volume could not be asked: its process is being started anew.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Fetches until nothing is missing, however long it takes; tells `NothingMissing`.
pub async fn run(job: Job, epoch: Epoch, volumes: Vec<VolumeHome>, bandwidth_bytes_per_s: Option<u64>) {
    let fetched = async {
        while let Some(pause) = step(&job, &volumes, bandwidth_bytes_per_s).await {
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
async fn step(job: &Job, volumes: &[VolumeHome], limit: Option<u64>) -> Option<Duration> {
    let mut progress = Progress::default();
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
        progress.disk_bytes_before_resume += status.pulled_bytes_before;
        progress.disk_bytes_after_resume += status.pulled_bytes_after;
        progress.disk_missing_bytes += status.missing_bytes;
    }
    let is_done = progress.disk_missing_bytes == 0;
    progress.message = if is_done { String::new() } else { "the rest of the disk follows".to_owned() };
    job.show(progress);
    (!is_done).then_some(PROGRESS_EVERY)
}
