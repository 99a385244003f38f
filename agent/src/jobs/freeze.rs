//! A guest freezes: its memory goes into a file of this host, the volumes are sealed, and then everything goes into the
//! cloud's store. Until the controller has recorded the freeze the file can be thawed here again.

use std::{sync::Arc, time::Duration};

use supercloud_api::{
    FrozenVolume, Progress,
    link::{FrozenContent, FrozenMemory},
};
use supercloud_handover::{LocalEvent, SourceEvent};
use supercloud_ids::FreezeId;
use supercloud_storage::{
    backend::ObjectStore,
    transfer::{DiskFormat, ImportOptions, import_image},
};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{Fact, Job, JobError, PROGRESS_EVERY, depart, prepare};
use crate::guest::record::{CopyRecord, Spooled};

/// What a saved memory may take beyond the guest's memory: device state, the hypervisor's own header.
const EXTRA_BYTES: u64 = 64 << 20;

/// Suspends the guest into a file; tells `GuestPaused` or `CopyFailed`.
pub async fn suspend(job: Job, copy: CopyRecord) {
    let operation = job.operation;
    match save(&job, &copy).await {
        Ok(spooled) => {
            job.tell(Fact::Spooled(spooled)).await;
            job.tell(Fact::Event(LocalEvent::Source(SourceEvent::GuestPaused { operation }))).await;
        }
        Err(JobError::Cancelled) => {}
        Err(error) => fail(&job, &error).await,
    }
}

async fn fail(job: &Job, error: &JobError) {
    let operation = job.operation;
    tracing::warn!(guest = %job.guest, %operation, error = crate::chain(error), "the guest cannot be frozen");
    job.tell(Fact::Problem(Box::new(error.problem()))).await;
    job.tell(Fact::Event(LocalEvent::Source(SourceEvent::CopyFailed { operation }))).await;
}

async fn save(job: &Job, copy: &CopyRecord) -> Result<Spooled, JobError> {
    prepare::check_disk(job, copy.spec.shape.memory_bytes.saturating_add(EXTRA_BYTES)).await?;
    let path = job.places.memory();
    // Left by an operation that did not succeed; a guest that is in a file is not frozen again.
    let _ = tokio::fs::remove_file(&path).await;
    let mut transfer = job.host.backend.freeze(job.guest, path)?;
    let mut ticks = interval(PROGRESS_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Not given up in the middle: what the hypervisor has begun ends one way or the other, and both are told.
    let frozen = loop {
        tokio::select! {
            frozen = &mut transfer.done => break frozen?,
            _ = ticks.tick() => {
                let mut progress = depart::progress(&transfer.progress.borrow());
                progress.message = "saving the guest's memory".to_owned();
                job.show(progress);
            }
        }
    };
    Ok(Spooled { operation: job.operation, format: frozen.format, bytes: frozen.bytes })
}

/// Brings memory and volumes into the store; tells `FreezeStored` or `CopyFailed`. Can be repeated: what is stored already
/// is found.
pub async fn store(job: Job, copy: CopyRecord, spooled: Spooled, freeze: FreezeId) {
    let operation = job.operation;
    match job.unless_cancelled(store_all(&job, &copy, &spooled, freeze)).await {
        Ok(content) => {
            job.tell(Fact::Frozen(Box::new(content))).await;
            job.tell(Fact::Event(LocalEvent::Source(SourceEvent::FreezeStored { operation }))).await;
        }
        Err(JobError::Cancelled) => {}
        Err(error) => fail(&job, &error).await,
    }
}

async fn store_all(
    job: &Job,
    copy: &CopyRecord,
    spooled: &Spooled,
    freeze: FreezeId,
) -> Result<FrozenContent, JobError> {
    let mut volumes = Vec::new();
    for home in &copy.volumes {
        let client = home.client();
        let published = client
            .publish(|done, total| {
                job.show(Progress {
                    message: format!("storing the disk: block {done} of {total}"),
                    ..Progress::default()
                });
            })
            .await
            .map_err(|source| JobError::Volume { what: "go into the store", source })?;
        let (root, stored_bytes) = (published.root.to_string(), published.stored_bytes);
        volumes.push(FrozenVolume { volume: home.volume, root, stored_bytes });
    }
    let path = job.places.memory();
    let options = ImportOptions {
        // Never looked into: whatever a guest had in its memory is no disk image.
        format: Some(DiskFormat::Raw),
        work_folder: job.places.folder.clone(),
        convert_budget: Duration::from_secs(1),
    };
    let store: Arc<dyn ObjectStore> = Arc::new(job.host.store.clone());
    let mut shown = Instant::now();
    let imported = import_image(&path, &options, prepare::keys(copy), store, &job.cancel, |progress| {
        if shown.elapsed() >= PROGRESS_EVERY {
            shown = Instant::now();
            job.show(Progress {
                memory_total_bytes: progress.total_bytes,
                memory_sent_bytes: progress.done_bytes,
                memory_remaining_bytes: progress.total_bytes.saturating_sub(progress.done_bytes),
                message: "storing the guest's memory".to_owned(),
                ..Progress::default()
            });
        }
    })
    .await;
    let imported =
        imported.map_err(|source| JobError::Content { what: "a place for the memory", source: Box::new(source) })?;
    let memory =
        FrozenMemory { freeze, root: imported.root.to_string(), bytes: spooled.bytes, format: spooled.format.clone() };
    Ok(FrozenContent { memory, volumes })
}
