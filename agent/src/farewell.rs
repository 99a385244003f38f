//! The end of a host that an operator has removed.
//!
//! Its guests were given up: they may run elsewhere from the blocks that are there. Whatever still runs here is a second copy
//! and must end; files are kept, because they may hold writes that nobody else has.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use supercloud_blanket::backend::StopMode;
use supercloud_ids::HostId;
use tokio_util::sync::CancellationToken;

use crate::{
    durable::{self, DurableError},
    guests,
    host::Host,
};

const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// What is kept of the controller's word.
#[derive(Debug, Serialize, Deserialize)]
struct Word {
    host: HostId,
}

fn path(host: &Host) -> PathBuf {
    host.config.data_dir.join("removed.json")
}

/// Keeps the word.
///
/// # Errors
/// When the file cannot be written.
pub async fn keep(host: &Host) -> Result<(), DurableError> {
    let (path, word) = (path(host), Word { host: host.id });
    tokio::task::spawn_blocking(move || durable::write_json(&path, &word)).await.unwrap_or(Ok(()))
}

/// Whether this host was told that it is removed. The word for an earlier identity does not count.
///
/// # Errors
/// When the file cannot be read.
pub async fn is_told(host: &Host) -> Result<bool, DurableError> {
    let path = path(host);
    let word = tokio::task::spawn_blocking(move || durable::read_json::<Word>(&path)).await.unwrap_or(Ok(None))?;
    Ok(word.is_some_and(|word| word.host == host.id))
}

/// Ends every guest, takes its ports from the switch, and ends the volume processes; again and again until all is gone or
/// `cancel`. No task of a guest may be there any more.
pub async fn end_guests(host: &Host, cancel: &CancellationToken) {
    loop {
        let left = end_once(host).await;
        // A pass that found nothing: what was being started when the word came has come up and was ended as well.
        if left == 0 {
            tracing::warn!("no guest runs here any more; their files are kept");
            return;
        }
        tracing::warn!(left, "not everything has ended yet");
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(RETRY_PAUSE) => {}
        }
    }
}

/// How many things were still there, or could not be ended.
async fn end_once(host: &Host) -> usize {
    let (mut found, mut left) = (0, 0);
    let mut failed = |what: &str, error: &dyn std::error::Error| {
        tracing::warn!(error = crate::chain(error), "{what} is not ended yet");
        left += 1;
    };
    match host.backend.list().await {
        Ok(guests) => {
            for info in guests {
                tracing::warn!(guest = %info.guest, epoch = %info.epoch, "a guest that was given up is ended");
                found += 1;
                if let Err(error) = host.backend.stop(info.guest, StopMode::Kill).await {
                    failed("a guest", &error);
                }
            }
        }
        Err(error) => failed("what the hypervisor has", &error),
    }
    match host.switch.attached().await {
        Ok(ports) => {
            for port in ports.keys() {
                if let Err(error) = host.switch.detach(*port).await {
                    failed("a port", &error);
                }
            }
        }
        Err(error) => failed("what the switch has", &error),
    }
    let (folder, run) = (host.config.guests_dir(), host.config.run_dir.clone());
    let read = tokio::task::spawn_blocking(move || guests::read_records(&folder, &run)).await;
    let (records, _unreadable) = read.unwrap_or_default();
    for record in records {
        for copy in [&record.current, &record.incoming].into_iter().flatten() {
            for home in copy.all_volumes() {
                if let Err(error) = host.runner.stop(home).await {
                    failed("a volume process", &error);
                }
            }
        }
    }
    left + found
}
