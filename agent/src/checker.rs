//! Checks of volumes: all that a volume stands on is read in the cloud's store, and mended from wherever else it can be had.
//! See [`supercloud_storage::scrub`].

use std::{sync::Arc, time::Duration};

use supercloud_api::link::{ChunksChecked, Query, VolumeChecked};
use supercloud_ids::{GuestId, VolumeId};
use supercloud_storage::{
    manifest::ManifestError,
    scrub::{Scrubbed, scrub},
    volume::FetchLimit,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    chunks::{ChunkPlaces, ChunkSources},
    durable::DurableError,
    guest::record::{CopyRecord, GuestRecord},
    host::Host,
    jobs::prepare,
};

/// Checks that may wait.
const WAITING: usize = 64;
/// How long the controller may take to hear what was found.
const ANSWER_BUDGET: Duration = Duration::from_secs(30);

/// A check that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Check {
    /// Whose.
    pub guest: GuestId,
    /// Which of its volumes.
    pub volume: VolumeId,
    /// How fast it may read.
    pub bytes_per_s: u64,
}

/// Why a check did not come to its end.
#[derive(Debug, thiserror::Error)]
enum CheckError {
    #[error("the guest's record cannot be read")]
    Record(#[from] DurableError),
    #[error("nothing is here of that volume")]
    NotHere,
    #[error("what it stands on cannot be told")]
    Manifest(#[from] ManifestError),
    #[error("a worker died")]
    Worker(#[from] tokio::task::JoinError),
}

/// Where checks are asked for, and where they are carried out: give it to [`run`].
#[must_use]
pub fn queue() -> (mpsc::Sender<Check>, mpsc::Receiver<Check>) {
    mpsc::channel(WAITING)
}

/// Carries checks out, one after the other, until cancelled.
pub async fn run(host: Arc<Host>, mut checks: mpsc::Receiver<Check>, cancel: CancellationToken) {
    loop {
        let asked = tokio::select! {
            () = cancel.cancelled() => return,
            asked = checks.recv() => asked,
        };
        let Some(asked) = asked else { return };
        let done = tokio::select! {
            () = cancel.cancelled() => return,
            done = check(&host, asked) => done,
        };
        match &done {
            Ok(found) => tracing::info!(volume = %asked.volume, ?found, "the volume is checked"),
            Err(error) => {
                tracing::warn!(volume = %asked.volume, error = crate::chain(error), "the volume is not checked")
            }
        }
        let problem = done.as_ref().err().map(|error| crate::chain(error));
        let found = done.as_ref().map(told).unwrap_or_default();
        let checked = VolumeChecked { guest: asked.guest, volume: asked.volume, found, problem };
        if let Err(error) = host.link.query(Query::VolumeChecked { checked }, ANSWER_BUDGET).await {
            let error = crate::chain(&error);
            tracing::warn!(volume = %asked.volume, error, "the controller does not hear of the check");
        }
    }
}

async fn check(host: &Arc<Host>, asked: Check) -> Result<Scrubbed, CheckError> {
    let places = host.places(asked.guest);
    let record = tokio::task::spawn_blocking(move || GuestRecord::load(&places)).await??;
    let record = record.ok_or(CheckError::NotHere)?;
    let mut copies = record.current.iter().chain(&record.incoming);
    let has_it = |copy: &&CopyRecord| copy.spec.volumes.iter().any(|volume| volume.volume == asked.volume);
    let copy = copies.find(has_it).ok_or(CheckError::NotHere)?;
    let volumes = copy.spec.volumes.iter().filter(|volume| volume.volume == asked.volume);
    let roots: Vec<_> = volumes.filter_map(|volume| volume.base_root.as_deref()?.parse().ok()).collect();
    let places = ChunkPlaces::new(host.link.clone(), asked.guest);
    let sources = Arc::new(ChunkSources::new(host.plane.clone(), copy.spec.project, places, &host.store));
    let reader = sources.home_reader(prepare::keys(copy), &host.store);
    let limit = FetchLimit::default();
    limit.set(Some(asked.bytes_per_s));
    Ok(scrub(&host.store.home(), &reader, &roots, &limit, |_| ()).await?)
}

fn told(found: &Scrubbed) -> ChunksChecked {
    ChunksChecked {
        chunks: found.chunks,
        sound_bytes: found.sound_bytes,
        fetched: found.fetched,
        repaired: found.repaired,
        missing: found.missing,
        damaged: found.damaged,
        lost: found.lost.iter().map(ToString::to_string).collect(),
    }
}
