//! Looks after a guest's volume processes: starts those anew that died, and tells how the volumes are.

use std::{sync::Arc, time::Duration};

use tokio::sync::{Mutex, mpsc};

use crate::{host::Host, volumes::VolumeHome};

/// How often volumes are looked at.
const EVERY: Duration = Duration::from_secs(2);

/// The volumes that should be served. Held over each look, so that nothing is started anew that is being removed.
pub type Watched = Arc<Mutex<Vec<VolumeHome>>>;

/// What a look found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Look {
    /// Something that people should know.
    pub alarm: Option<String>,
    /// Blocks, in bytes, that are still elsewhere.
    pub missing_bytes: u64,
    /// A process had died and was started anew.
    pub mended: bool,
}

/// Looks until it is dropped.
pub async fn run(host: Arc<Host>, watched: Watched, looks: mpsc::Sender<Look>) {
    loop {
        tokio::time::sleep(EVERY).await;
        let look = {
            let homes = watched.lock().await;
            look(&host, &homes).await
        };
        if looks.send(look).await.is_err() {
            return;
        }
    }
}

async fn look(host: &Host, homes: &[VolumeHome]) -> Look {
    let mut found = Look::default();
    for home in homes {
        let at = home.clone();
        let is_there = tokio::task::spawn_blocking(move || at.pid().is_some()).await.unwrap_or(true);
        let status = if is_there {
            home.client().with_budget(EVERY * 2).status().await.map_err(|error| crate::chain(&error))
        } else {
            tracing::warn!(volume = %home.volume, "a volume process is gone; it is started anew");
            found.mended = true;
            host.runner.ensure(home).await.map_err(|error| crate::chain(&error))
        };
        match status {
            Ok(status) => {
                found.missing_bytes += status.missing_bytes;
                if let Some(alarm) = status.alarm {
                    found.alarm = Some(alarm.message);
                }
            }
            Err(error) => found.alarm = Some(error),
        }
    }
    found
}
