//! Memory of a guest that was thawed before it was here: it comes out of the stores in which the frozen guest lies, while the guest runs.
//!
//! What the guest wants of it waits for as long as the stores cannot be reached, or give something else than was written; nothing else is
//! put in its place. Until nothing is missing the thaw is not over, and what was frozen is not let go.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use supercloud_api::{Progress, link::FrozenMemory};
use supercloud_blanket::BackendError;
use supercloud_storage::{source::ChunkReader, transfer::TransferError};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{Fact, Job, JobError, PROGRESS_EVERY, prepare};
use crate::frozen::StoredBlocks;

const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// How long nothing may come before it is an alarm.
const STALL_AFTER: Duration = Duration::from_secs(10);

/// What memory is fetched with.
pub struct Fetch {
    /// What was frozen.
    pub frozen: FrozenMemory,
    /// From where it is read.
    pub reader: ChunkReader,
    /// Told while memory is missing.
    pub is_missing: Arc<AtomicBool>,
}

/// Opens what was frozen.
///
/// # Errors
/// When the list of its blocks cannot be had.
pub async fn open(frozen: &FrozenMemory, reader: ChunkReader) -> Result<StoredBlocks, JobError> {
    let root = prepare::parse_root(&frozen.root)?;
    let opened = StoredBlocks::open(reader, root, frozen.bytes).await;
    opened.map_err(|source| JobError::Content {
        what: "the frozen memory",
        source: Box::new(TransferError::Manifest(source)),
    })
}

/// Why it does not go on.
#[derive(Default)]
struct Standing {
    image: Option<Arc<StoredBlocks>>,
    error: Option<String>,
}

/// Until nothing is missing; `false` when the guest's process has ended, which is told by who looks after it.
pub(super) async fn fetch(job: &Job, with: Fetch) -> bool {
    let standing = Mutex::new(Standing::default());
    let work = fetch_all(job, &with, &standing);
    tokio::pin!(work);
    let mut ticks = interval(PROGRESS_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut last, mut moved_at, mut is_said) = (None, Instant::now(), false);
    let mut most = missing(job).unwrap_or(0);
    let is_whole = loop {
        tokio::select! {
            biased;
            is_whole = &mut work => break is_whole,
            _ = ticks.tick() => {
                let Some(left) = missing(job) else { continue };
                with.is_missing.store(left > 0, Ordering::Release);
                most = most.max(left);
                job.show(shown(left, most));
                if last.replace(left) != Some(left) {
                    moved_at = Instant::now();
                }
                let is_stalled = left > 0 && moved_at.elapsed() > STALL_AFTER;
                if is_stalled != is_said {
                    is_said = is_stalled;
                    job.tell(Fact::MemoryStalled(is_stalled.then(|| text(left, &standing)))).await;
                }
            }
        }
    };
    with.is_missing.store(false, Ordering::Release);
    if is_whole {
        // All of it, for certain: it is what is left to see when the thaw is over.
        job.tell(Fact::Progress(Box::new(shown(0, most)))).await;
    }
    job.tell(Fact::MemoryStalled(None)).await;
    is_whole
}

fn missing(job: &Job) -> Option<u64> {
    let missing = job.host.backend.post_copy().and_then(|post_copy| post_copy.missing_bytes(job.guest));
    missing.ok().map(|missing| *missing.borrow())
}

/// `most`: what was missing when it was looked first.
fn shown(missing: u64, most: u64) -> Progress {
    let message = if missing > 0 { "the rest of its memory comes out of the store" } else { "" };
    Progress {
        memory_total_bytes: most,
        memory_sent_bytes: most.saturating_sub(missing),
        memory_remaining_bytes: missing,
        memory_missing_bytes: Some(missing),
        message: message.to_owned(),
        ..Progress::default()
    }
}

fn text(left: u64, standing: &Mutex<Standing>) -> String {
    let standing = standing.lock().unwrap_or_else(PoisonError::into_inner);
    let trouble = standing.image.as_ref().and_then(|image| image.trouble()).or_else(|| standing.error.clone());
    let why = trouble.map_or_else(String::new, |why| format!(" ({why})"));
    format!(
        "{left} bytes of the guest's memory are in the store in which it was frozen, and do not come: it waits for what it wants of \
         them{why}"
    )
}

async fn fetch_all(job: &Job, with: &Fetch, standing: &Mutex<Standing>) -> bool {
    let mut pause = PAUSES.0;
    let mut left = None;
    loop {
        match fetch_once(job, with, standing).await {
            Ok(()) => return true,
            Err(JobError::Backend(BackendError::NoSuchGuest { .. })) => return false,
            Err(error) => {
                tracing::info!(guest = %job.guest, error = crate::chain(&error), "memory is not fetched just now");
                standing.lock().unwrap_or_else(PoisonError::into_inner).error = Some(crate::chain(&error));
            }
        }
        if left != missing(job) {
            (left, pause) = (missing(job), PAUSES.0);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

async fn fetch_once(job: &Job, with: &Fetch, standing: &Mutex<Standing>) -> Result<(), JobError> {
    let lazy = job.host.backend.lazy_thaw()?;
    if !lazy.is_lazy(job.guest)? {
        return Ok(());
    }
    let known = standing.lock().unwrap_or_else(PoisonError::into_inner).image.clone();
    let image = match known {
        Some(image) => image,
        None => {
            let image = Arc::new(open(&with.frozen, with.reader.clone()).await?);
            standing.lock().unwrap_or_else(PoisonError::into_inner).image.insert(image).clone()
        }
    };
    lazy.fetch(job.guest, image)?.done.await?;
    Ok(())
}
