//! A guest freezes: its memory goes into a file of this host, the volumes are sealed, and then everything goes into the
//! cloud's store. Until the controller has recorded the freeze the file can be thawed here again.

use std::{sync::Arc, time::Duration};

use supercloud_api::{
    FrozenVolume, Progress,
    link::{FrozenContent, FrozenMemory},
};
use supercloud_blanket::{BackendError, backend::RunState};
use supercloud_handover::{LocalEvent, SourceEvent};
use supercloud_ids::FreezeId;
use supercloud_storage::{
    key::ContentRoot,
    transfer::{DiskFormat, ImportOptions, import_image},
};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{Fact, Job, JobError, Outcome, PROGRESS_EVERY, base, depart, prepare};
use crate::{
    chunks::ChunkSources,
    guest::record::{CopyRecord, Spooled},
};

/// What a saved memory may take beyond the guest's memory: device state, the hypervisor's own header.
const EXTRA_BYTES: u64 = 64 << 20;

/// Suspends the guest into a file; tells `GuestPaused` or `CopyFailed`, and what became of the guest.
pub async fn suspend(job: Job, copy: CopyRecord, sources: Option<Arc<ChunkSources>>) -> Outcome {
    let operation = job.operation;
    let saved = save(&job, &copy, sources.as_ref()).await;
    let outcome = match &saved {
        Ok(spooled) => Outcome::Saved(spooled.clone()),
        Err(error) => not_saved(&job, error).await,
    };
    job.tell(Fact::Outcome(operation, outcome.clone())).await;
    match saved {
        Ok(_) => job.tell(Fact::Event(LocalEvent::Source(SourceEvent::GuestPaused { operation }))).await,
        Err(JobError::Cancelled) => {}
        Err(error) => fail(&job, &error).await,
    }
    outcome
}

/// After a save that failed: the guest is where it was, or nobody knows yet.
async fn not_saved(job: &Job, error: &JobError) -> Outcome {
    if matches!(error, JobError::Refused(_) | JobError::Base { .. }) {
        return Outcome::NotSaved;
    }
    match job.host.backend.status(job.guest).await {
        Ok(Some(info)) if info.state == RunState::Running => Outcome::NotSaved,
        _ => Outcome::Nothing,
    }
}

async fn fail(job: &Job, error: &JobError) {
    let operation = job.operation;
    tracing::warn!(guest = %job.guest, %operation, error = crate::chain(error), "the guest cannot be frozen");
    job.tell(Fact::Problem(Box::new(error.problem()))).await;
    job.tell(Fact::Event(LocalEvent::Source(SourceEvent::CopyFailed { operation }))).await;
}

async fn save(job: &Job, copy: &CopyRecord, sources: Option<&Arc<ChunkSources>>) -> Result<Spooled, JobError> {
    prepare::check_disk(job, copy.spec.shape.memory_bytes.saturating_add(EXTRA_BYTES)).await?;
    // While the guest still runs: it may take long, and may fail.
    job.unless_cancelled(bring_base(job, copy, sources)).await?;
    if job.cancel.is_cancelled() {
        return Err(JobError::Cancelled);
    }
    let mut transfer = job.host.backend.freeze(job.guest, job.places.memory())?;
    let mut ticks = interval(PROGRESS_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut is_cancelled = false;
    // Its end is always awaited: a save that is cancelled too late has the guest in the file all the same.
    let frozen = loop {
        tokio::select! {
            frozen = &mut transfer.done => break frozen,
            () = job.cancel.cancelled(), if !is_cancelled => {
                is_cancelled = true;
                depart::cancel(job).await;
            }
            _ = ticks.tick() => {
                let mut progress = depart::progress(&transfer.progress.borrow());
                progress.message = "saving the guest's memory".to_owned();
                job.show(progress);
            }
        }
    };
    let frozen = match frozen {
        Err(BackendError::Cancelled { .. }) => return Err(JobError::Cancelled),
        frozen => frozen?,
    };
    Ok(Spooled { operation: job.operation, format: frozen.format, bytes: frozen.bytes })
}

/// The freeze makes this cloud's store the place of all that the volumes are made of, also of what they stand on.
async fn bring_base(job: &Job, copy: &CopyRecord, sources: Option<&Arc<ChunkSources>>) -> Result<(), JobError> {
    bring(job, copy, base::roots(copy), sources, "what the disk stands on").await
}

async fn bring(
    job: &Job,
    copy: &CopyRecord,
    roots: Vec<ContentRoot>,
    sources: Option<&Arc<ChunkSources>>,
    what: &'static str,
) -> Result<(), JobError> {
    if roots.iter().all(|root| job.host.brought.is_lately(root)) {
        return Ok(());
    }
    let tell = |telling| {
        let message = match telling {
            base::Telling::Looked(looked, all) => {
                format!("looking for {what} in this cloud's store: chunk {looked} of {all}")
            }
            base::Telling::Missing(bytes) => format!("bringing {what} into this cloud's store: {bytes} bytes to go"),
        };
        job.show(Progress { message, ..Progress::default() });
    };
    let brought = roots.clone();
    let bringing = base::Bringing { guest: job.guest, roots, keys: prepare::keys(copy) };
    bringing
        .complete(sources, &job.host, tell)
        .await
        .map_err(|source| JobError::Base { what, source: Box::new(source) })?;
    job.host.brought.note(brought);
    Ok(())
}

/// Brings memory and volumes into the store; tells `FreezeStored` or `CopyFailed`. Can be repeated: what is stored already
/// is found.
pub async fn store(job: Job, copy: CopyRecord, spooled: Spooled, freeze: FreezeId, sources: Option<Arc<ChunkSources>>) {
    let operation = job.operation;
    let work = async {
        // Once more: it may be another agent's run, and long after.
        bring_base(&job, &copy, sources.as_ref()).await?;
        store_all(&job, &copy, &spooled, freeze, sources.as_ref()).await
    };
    match job.unless_cancelled(work).await {
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
    sources: Option<&Arc<ChunkSources>>,
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
        if job.host.store.bucket().is_some() {
            // A volume process knows this host's folder only.
            bring(job, copy, vec![published.root], sources, "the disk").await?;
        }
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
    let store = job.host.store.home();
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
