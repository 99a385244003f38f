//! Checkpoints: points of a volume's history with the guest's memory and devices at the same instant, while it runs on.
//!
//! ```text
//! the volume:  begin a series of cuts       cut n      point of the cut n of the series
//! the guest:       first copy of memory ... cut n: all of one instant ... into this cloud's store
//! ```
//!
//! What is under way is given up for whatever else is done with the guest, and leaves nothing behind but chunks that are swept: a series
//! is begun anew each time, so that nobody takes another instant's disk for that of this memory.

use std::{io, os::unix::fs::MetadataExt as _, path::PathBuf, sync::Arc, time::Duration};

use supercloud_api::link::CheckpointContent;
use supercloud_blanket::{
    BackendError,
    checkpoint::{Checkpointed, Checkpointing},
};
use supercloud_ids::GuestId;
use supercloud_storage::{
    process::{ClientError, PointContent as TakenPoint},
    transfer::{DiskFormat, ImportOptions, Imported, TransferError, import_image},
    volume::POINT_RESERVE_BYTES,
};
use tokio_util::sync::CancellationToken;

use crate::{
    config::free_disk_bytes,
    guest::record::{CopyRecord, Places},
    host::Host,
    jobs::prepare::{self, DISK_RESERVE_BYTES},
    volumes::VolumeHome,
};

/// What a saved memory may take beyond the guest's memory: device state.
const EXTRA_BYTES: u64 = 64 << 20;
/// How long it may take, until its content is in the store.
const BUDGET: Duration = Duration::from_secs(25 * 60);
/// The pause after which it is seen whether there is room still.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Why there is no checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The back end takes none, or did not take this one.
    #[error("the guest's memory was not kept")]
    Backend(#[from] BackendError),
    /// The disk.
    #[error("the volume was not kept")]
    Volume(#[from] ClientError),
    /// One instant of several volumes cannot be kept in the history of one of them.
    #[error("the guest has {0} volumes; a checkpoint is of one")]
    Volumes(usize),
    /// Room for it.
    #[error("{needed_bytes} bytes of disk are needed for the guest's memory, {free_bytes} are free {place}")]
    NoRoom {
        /// How much it takes.
        needed_bytes: u64,
        /// How much there is.
        free_bytes: u64,
        /// Where.
        place: &'static str,
    },
    /// Its file.
    #[error("the file of the guest's memory")]
    File(#[source] io::Error),
    /// The store's part.
    #[error("the guest's memory cannot be brought into this cloud's store")]
    Store(#[from] TransferError),
    /// It took too long.
    #[error("it took longer than {} minutes", BUDGET.as_secs() / 60)]
    Deadline,
    /// A worker died.
    #[error("a worker died")]
    Worker(#[from] tokio::task::JoinError),
}

/// The file, for as long as it is needed.
struct Spool(PathBuf);

impl Drop for Spool {
    fn drop(&mut self) {
        let path = std::mem::take(&mut self.0);
        // A large file takes a moment to go.
        let remove = move || {
            let _ = std::fs::remove_file(path);
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(remove)),
            Err(_) => remove(),
        }
    }
}

/// Removes what an agent that ended has left of a checkpoint.
pub fn remove_left(places: &Places) {
    let _ = std::fs::remove_file(places.checkpoint());
}

/// Takes a checkpoint: the disk's point, and the memory's content.
///
/// # Errors
/// Why there is none. The guest runs on in any case.
pub async fn take(
    host: &Arc<Host>,
    guest: GuestId,
    copy: &CopyRecord,
    home: &VolumeHome,
) -> Result<(TakenPoint, CheckpointContent), CheckpointError> {
    let backend = host.backend.checkpointing()?;
    if copy.volumes.len() != 1 {
        return Err(CheckpointError::Volumes(copy.volumes.len()));
    }
    let places = host.places(guest);
    let needed_bytes = copy.spec.shape.memory_bytes.saturating_add(EXTRA_BYTES);
    must_have_room(host, needed_bytes).await?;
    let left = places.clone();
    tokio::task::spawn_blocking(move || remove_left(&left)).await?;
    // Never 0, which is a mirror's.
    let series = rand::random::<u64>() | 1;
    home.client().begin_cuts(series).await?;
    let taken = tokio::time::timeout(BUDGET, take_cut(host, backend, guest, copy, (home, series))).await;
    let taken = taken.unwrap_or(Err(CheckpointError::Deadline));
    if taken.is_err() {
        // What is kept of a cut that nobody takes costs disk.
        drop(home.client().end_cuts_of(series).await);
    }
    taken
}

/// The same, when the volume knows of which series the cuts are.
async fn take_cut(
    host: &Host,
    backend: &dyn Checkpointing,
    guest: GuestId,
    copy: &CopyRecord,
    (home, series): (&VolumeHome, u64),
) -> Result<(TakenPoint, CheckpointContent), CheckpointError> {
    let places = host.places(guest);
    let spool = Spool(places.checkpoint());
    let run = backend.checkpoint(guest, spool.0.clone())?;
    let taken = spooled(host, run.done).await?;
    tracing::info!(%guest, stood_still_us = taken.stood_still.as_micros(), bytes = taken.bytes, "a checkpoint is taken");
    // Both at once: while the disk's instant is kept, what the guest writes is copied aside first.
    let point = async { Ok(home.client().take_point_of_cut(series, taken.cut).await?) };
    let (point, imported) = tokio::try_join!(point, store(host, copy, &places, &spool))?;
    let memory = CheckpointContent {
        root: imported.root.to_string(),
        bytes: taken.bytes,
        format: taken.format,
        stored_blocks: imported.new_chunks,
        filled_blocks: imported.chunks,
        stood_still_us: u64::try_from(taken.stood_still.as_micros()).unwrap_or(u64::MAX),
    };
    Ok((point, memory))
}

async fn must_have_room(host: &Host, needed_bytes: u64) -> Result<(), CheckpointError> {
    let folder = host.config.data_dir.clone();
    let free_bytes = tokio::task::spawn_blocking(move || free_disk_bytes(&folder)).await?;
    if free_bytes < needed_bytes.saturating_add(DISK_RESERVE_BYTES) {
        return Err(CheckpointError::NoRoom { needed_bytes, free_bytes, place: "here" });
    }
    Ok(())
}

/// Waits for the file; others may fill the disk meanwhile, who need it more.
async fn spooled(
    host: &Host,
    mut done: impl Future<Output = Result<Checkpointed, BackendError>> + Unpin,
) -> Result<Checkpointed, CheckpointError> {
    let mut looks = tokio::time::interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            done = &mut done => return Ok(done?),
            _ = looks.tick() => must_have_room(host, 0).await?,
        }
    }
}

/// Brings the memory into the cloud's store. What did not change since an earlier checkpoint is there.
async fn store(host: &Host, copy: &CopyRecord, places: &Places, spool: &Spool) -> Result<Imported, CheckpointError> {
    let store = host.store.home();
    let path = spool.0.clone();
    let measured = tokio::task::spawn_blocking(move || std::fs::metadata(path)).await?;
    // As if none of it were there, and none could be compressed.
    let needed_bytes = measured.map_err(CheckpointError::File)?.blocks().saturating_mul(512);
    if let Some(free_bytes) = store.free_bytes().await.map_err(TransferError::Store)?
        && free_bytes < needed_bytes.saturating_add(POINT_RESERVE_BYTES)
    {
        return Err(CheckpointError::NoRoom { needed_bytes, free_bytes, place: "in this cloud's store" });
    }
    let options = ImportOptions {
        // Never looked into: whatever a guest had in its memory is no disk image.
        format: Some(DiskFormat::Raw),
        work_folder: places.folder.clone(),
        convert_budget: Duration::from_secs(1),
    };
    let never = CancellationToken::new();
    Ok(import_image(&spool.0, &options, prepare::keys(copy), store, &never, |_| ()).await?)
}
