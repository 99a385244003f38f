//! Points of volumes' histories: the volume process brings the content of a moment into its folder of the cloud's store, the agent
//! all that this stands on; then the controller is told. Nothing is kept here: what the controller does not record is swept.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use supercloud_api::link::{PointContent, PointTaken, Query};
use supercloud_ids::{GuestId, VolumeId};
use supercloud_storage::process::{ClientError, PointContent as TakenPoint};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    checkpoints::{self, CheckpointError},
    chunks::{ChunkPlaces, ChunkSources},
    durable::DurableError,
    guest::record::GuestRecord,
    host::Host,
    jobs::{
        base::{BaseError, Bringing},
        prepare,
    },
};

/// Points that may wait.
const WAITING: usize = 256;
/// How long one may take: it must not hold up the others of this host for ever.
const POINT_BUDGET: Duration = Duration::from_secs(30 * 60);
/// How long the controller may take to hear of one.
const ANSWER_BUDGET: Duration = Duration::from_secs(30);

/// A point that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    /// Whose.
    pub guest: GuestId,
    /// Of which of its volumes.
    pub volume: VolumeId,
    /// With its memory: a checkpoint.
    pub memory: bool,
}

/// Why a point was not taken.
#[derive(Debug, thiserror::Error)]
enum PointError {
    #[error("the guest's record cannot be read")]
    Record(#[from] DurableError),
    #[error("the guest does not run here")]
    NotHere,
    #[error("the volume was not kept")]
    Volume(#[from] ClientError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("what it stands on cannot be brought into this cloud's store")]
    Base(#[from] BaseError),
    #[error("an earlier one had not ended")]
    Earlier,
    #[error("it took longer than {} minutes", POINT_BUDGET.as_secs() / 60)]
    Deadline,
    #[error("a worker died")]
    Worker(#[from] tokio::task::JoinError),
}

/// Where points are asked for, and where they are taken: give it to [`run`].
#[must_use]
pub fn queue() -> (mpsc::Sender<Point>, mpsc::Receiver<Point>) {
    mpsc::channel(WAITING)
}

/// Takes points, one after the other, until cancelled.
pub async fn run(host: Arc<Host>, mut points: mpsc::Receiver<Point>, cancel: CancellationToken) {
    loop {
        let asked = tokio::select! {
            () = cancel.cancelled() => return,
            asked = points.recv() => asked,
        };
        let Some(asked) = asked else { return };
        let taken = tokio::select! {
            () = cancel.cancelled() => return,
            taken = tokio::time::timeout(POINT_BUDGET, take(&host, asked)) => taken.unwrap_or(Err(PointError::Deadline)),
        };
        let (content, problem) = match taken {
            Ok((content, at)) => {
                tracing::info!(volume = %asked.volume, ?content, "a point is taken");
                let age_ms = u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX);
                (Some(PointContent { age_ms, ..content }), None)
            }
            Err(error) => {
                let problem = crate::chain(&error);
                tracing::warn!(volume = %asked.volume, error = problem, "a point is not taken");
                (None, Some(problem))
            }
        };
        let taken = PointTaken { guest: asked.guest, volume: asked.volume, content, problem };
        if let Err(error) = host.link.query(Query::PointTaken { taken }, ANSWER_BUDGET).await {
            let error = crate::chain(&error);
            tracing::warn!(volume = %asked.volume, error, "the controller does not hear of a point");
        }
    }
}

/// What a volume process gives for a question of now. It may still be at a point that was asked for before (by an agent that ended, or
/// gave up): that one's moment is not this one's, so when it has ended the question is put once more.
async fn taken_since_asked<F>(ask: impl Fn() -> F) -> Result<TakenPoint, PointError>
where
    F: Future<Output = Result<TakenPoint, ClientError>>,
{
    for _ in 0..2 {
        let asked = Instant::now();
        let taken = ask().await?;
        if taken.at >= asked {
            return Ok(taken);
        }
    }
    Err(PointError::Earlier)
}

/// The content, and its moment by this host's clock.
async fn take(host: &Arc<Host>, asked: Point) -> Result<(PointContent, Instant), PointError> {
    let places = host.places(asked.guest);
    let record = tokio::task::spawn_blocking(move || GuestRecord::load(&places)).await??;
    let copy = record.and_then(|record| record.current).ok_or(PointError::NotHere)?;
    let home = copy.volumes.iter().find(|home| home.volume == asked.volume).ok_or(PointError::NotHere)?;
    let (taken, memory) = if asked.memory {
        let (taken, memory) = checkpoints::take(host, asked.guest, &copy, home).await?;
        (taken, Some(memory))
    } else {
        (taken_since_asked(async || home.client().take_point().await).await?, None)
    };
    // The list of its blocks names those of the base, too: from now on all of them are looked for here.
    let places = ChunkPlaces::new(host.link.clone(), asked.guest);
    let sources = Arc::new(ChunkSources::new(host.plane.clone(), copy.spec.project, places, &host.store));
    let bringing = Bringing { guest: asked.guest, roots: vec![taken.root], keys: prepare::keys(&copy) };
    bringing.complete(Some(&sources), host, |_| ()).await?;
    let content = PointContent {
        root: taken.root.to_string(),
        epoch: taken.epoch,
        version: taken.version,
        age_ms: 0,
        total_blocks: taken.total_blocks,
        sealed_blocks: taken.sealed_blocks,
        stored_bytes: taken.stored_bytes,
        memory,
    };
    Ok((content, taken.at))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn taken(at: Instant) -> Result<TakenPoint, ClientError> {
        let root = "00".repeat(32).parse().unwrap();
        let epoch = supercloud_ids::Epoch(1);
        Ok(TakenPoint { root, epoch, version: 1, at, total_blocks: 0, sealed_blocks: 0, stored_bytes: 0 })
    }

    #[tokio::test]
    async fn an_earlier_points_moment_is_not_taken_for_this_ones() {
        let before = Instant::now().checked_sub(Duration::from_millis(1)).unwrap();
        let asked = AtomicUsize::new(0);
        let never = taken_since_asked(async || {
            asked.fetch_add(1, Ordering::SeqCst);
            taken(before)
        });
        assert!(matches!(never.await, Err(PointError::Earlier)));
        assert_eq!(asked.swap(0, Ordering::SeqCst), 2);
        // The earlier one has ended: the next is of now.
        let second = taken_since_asked(async || match asked.fetch_add(1, Ordering::SeqCst) {
            0 => taken(before),
            _ => taken(Instant::now()),
        });
        assert!(second.await.is_ok_and(|taken| taken.at > before));
    }
}
