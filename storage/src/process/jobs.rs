//! What runs in the background on the agent's order: pre-copy, following, fetch, publish. One of each at most.

use std::{
    future::Future,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use supercloud_ids::Epoch;

use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use super::control::{PointStatus, PreCopyStatus, PublishStatus};
use crate::{
    backend::ObjectStore,
    volume::{Ahead, CutOf, FetchLimit, Published, Volume, VolumeError, chain, role::Role},
};

/// The pause after the source could not be asked.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// A task that is cancelled and waited for.
#[derive(Debug)]
struct Job {
    cancel: CancellationToken,
    handle: JoinHandle<()>,
}

impl Job {
    fn start<F: Future<Output = ()> + Send + 'static>(work: impl FnOnce(CancellationToken) -> F) -> Self {
        let cancel = CancellationToken::new();
        Self { handle: tokio::spawn(work(cancel.clone())), cancel }
    }

    fn is_running(&self) -> bool {
        !self.handle.is_finished()
    }

    async fn stop(self) {
        self.cancel.cancel();
        // An error means that it panicked, which was logged.
        let _ = self.handle.await;
    }
}

/// The background work of one volume.
#[derive(Debug)]
pub(super) struct Jobs {
    volume: Volume,
    store: Arc<dyn ObjectStore>,
    pre_copy: Option<Job>,
    follow: Option<Job>,
    fetch: Option<Job>,
    publish: Option<Job>,
    point: Option<Job>,
    trace: Option<Job>,
    pre_copy_limit: Arc<FetchLimit>,
    follow_limit: Arc<FetchLimit>,
    fetch_limit: Arc<FetchLimit>,
    pre_copy_status: Arc<watch::Sender<PreCopyStatus>>,
    publish_status: Arc<watch::Sender<PublishStatus>>,
    point_outcome: Arc<watch::Sender<PointOutcome>>,
}

/// What became of a point.
#[derive(Debug, Default)]
enum PointOutcome {
    #[default]
    None,
    /// Of a cut of this series, or of the moment at which it was begun.
    Running(Option<CutOf>),
    Done(Epoch, Published, Option<CutOf>),
    Failed(String),
}

fn is_running(job: Option<&Job>) -> bool {
    job.is_some_and(Job::is_running)
}

impl Jobs {
    pub(super) fn new(volume: Volume, store: Arc<dyn ObjectStore>) -> Self {
        Self {
            volume,
            store,
            pre_copy: None,
            follow: None,
            fetch: None,
            publish: None,
            point: None,
            trace: None,
            pre_copy_limit: Arc::default(),
            follow_limit: Arc::default(),
            fetch_limit: Arc::default(),
            pre_copy_status: Arc::new(watch::Sender::new(PreCopyStatus::default())),
            publish_status: Arc::new(watch::Sender::new(PublishStatus::None)),
            point_outcome: Arc::default(),
        }
    }

    pub(super) fn pre_copy_status(&self) -> PreCopyStatus {
        PreCopyStatus { is_running: is_running(self.pre_copy.as_ref()), ..*self.pre_copy_status.borrow() }
    }

    pub(super) fn publish_status(&self) -> PublishStatus {
        self.publish_status.borrow().clone()
    }

    pub(super) fn is_fetching(&self) -> bool {
        is_running(self.fetch.as_ref())
    }

    pub(super) fn start_pre_copy(&mut self, bytes_per_s: Option<u64>, ahead: Ahead) {
        self.pre_copy_limit.set(bytes_per_s);
        if is_running(self.pre_copy.as_ref()) {
            return;
        }
        let (volume, limit, status) = (self.volume.clone(), self.pre_copy_limit.clone(), self.pre_copy_status.clone());
        status.send_replace(PreCopyStatus::default());
        self.pre_copy = Some(Job::start(move |cancel| async move {
            until(&cancel, "pre-copy", || volume.pre_copy(&limit, &status, ahead)).await;
        }));
    }

    pub(super) async fn stop_pre_copy(&mut self) {
        if let Some(job) = self.pre_copy.take() {
            job.stop().await;
        }
    }

    pub(super) async fn start_follow(&mut self, bytes_per_s: Option<u64>) -> Result<(), VolumeError> {
        self.follow_limit.set(bytes_per_s);
        if is_running(self.follow.as_ref()) {
            return Ok(());
        }
        self.stop_pre_copy().await;
        self.volume.begin_follow().await?;
        let (volume, limit) = (self.volume.clone(), self.follow_limit.clone());
        self.follow = Some(Job::start(move |cancel| async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                Err(error) = volume.follow(&limit) => {
                    tracing::error!(volume = %volume.id(), error = chain(&error), "following ended");
                }
            }
        }));
        Ok(())
    }

    pub(super) async fn stop_follow(&mut self) {
        if let Some(job) = self.follow.take() {
            job.stop().await;
        }
    }

    pub(super) fn start_fetch(&mut self, bytes_per_s: Option<u64>) {
        self.fetch_limit.set(bytes_per_s);
        if is_running(self.fetch.as_ref()) {
            return;
        }
        let (volume, limit) = (self.volume.clone(), self.fetch_limit.clone());
        self.fetch = Some(Job::start(move |cancel| async move {
            until(&cancel, "background fetch", || volume.fetch_all(&limit)).await;
        }));
    }

    pub(super) async fn stop_fetch(&mut self) {
        if let Some(job) = self.fetch.take() {
            job.stop().await;
        }
    }

    pub(super) fn point_status(&self) -> PointStatus {
        match &*self.point_outcome.borrow() {
            PointOutcome::None => PointStatus::None,
            PointOutcome::Running(_) => PointStatus::Running,
            PointOutcome::Failed(message) => PointStatus::Failed { message: message.clone() },
            PointOutcome::Done(epoch, done, cut) => PointStatus::Done {
                root: done.root,
                epoch: *epoch,
                version: done.version,
                age_ms: age_ms(done.at),
                total_blocks: done.total_blocks,
                sealed_blocks: done.sealed_blocks,
                stored_bytes: done.stored_bytes,
                series: cut.map(|cut| cut.series),
            },
        }
    }

    /// Takes a point, unless one is being taken.
    pub(super) fn start_point(&mut self) {
        if !is_running(self.point.as_ref()) {
            self.begin_point(None);
        }
    }

    /// Takes a point of a cut, in place of the one that is being taken.
    pub(super) async fn start_point_of_cut(&mut self, cut: CutOf) {
        let is_known = match &*self.point_outcome.borrow() {
            PointOutcome::Running(now) | PointOutcome::Done(_, _, now) => *now == Some(cut),
            PointOutcome::None | PointOutcome::Failed(_) => false,
        };
        if !is_known {
            self.stop_point().await;
            self.begin_point(Some(cut));
        }
    }

    fn begin_point(&mut self, cut: Option<CutOf>) {
        let (volume, store, outcome) = (self.volume.clone(), self.store.clone(), self.point_outcome.clone());
        outcome.send_replace(PointOutcome::Running(cut));
        self.point = Some(Job::start(move |cancel| async move {
            let before = volume.role();
            let taken = match cut {
                Some(cut) => volume.point_of_cut(cut, &store, &cancel, |_| ()).await,
                None => volume.point(&store, &cancel, |_| ()).await,
            };
            outcome.send_replace(match (taken, before, volume.role()) {
                // Of one epoch all the while: a writer that was fenced meanwhile has had its last moment before.
                (Ok(done), Role::Active { epoch }, now) if now == before => PointOutcome::Done(epoch, done, cut),
                (Ok(_), _, now) => PointOutcome::Failed(format!("the volume changed hands meanwhile: it is {now:?}")),
                (Err(error), ..) => PointOutcome::Failed(chain(&error)),
            });
        }));
    }

    async fn stop_point(&mut self) {
        if let Some(job) = self.point.take() {
            job.stop().await;
        }
    }

    pub(super) async fn start_publish(&mut self) {
        if is_running(self.publish.as_ref()) {
            return;
        }
        // A guest may be standing still for it.
        self.stop_point().await;
        let (volume, store, status) = (self.volume.clone(), self.store.clone(), self.publish_status.clone());
        status.send_replace(PublishStatus::Running { done_blocks: 0, total_blocks: volume.changed_blocks() });
        self.publish = Some(Job::start(move |cancel| async move {
            let told = status.clone();
            // `Done` is told once, by us: what it is told with must be all there is.
            let progress = move |progress: PublishStatus| {
                if matches!(progress, PublishStatus::Running { .. }) {
                    told.send_replace(progress);
                }
            };
            status.send_replace(match volume.publish(&store, &cancel, progress).await {
                Ok(done) => PublishStatus::Done {
                    root: done.root,
                    total_blocks: done.total_blocks,
                    stored_bytes: done.stored_bytes,
                },
                Err(error) => PublishStatus::Failed { message: chain(&error) },
            });
        }));
    }

    pub(super) async fn stop_publish(&mut self) {
        if let Some(job) = self.publish.take() {
            job.stop().await;
        }
    }

    /// Records for so long, then writes the trace into `folder`.
    pub(super) async fn start_trace(&mut self, folder: PathBuf, length: Duration) {
        if let Some(job) = self.trace.take() {
            job.stop().await;
        }
        let volume = self.volume.clone();
        volume.begin_trace();
        self.trace = Some(Job::start(move |cancel| async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = tokio::time::sleep(length) => {}
            }
            let Some(trace) = volume.end_trace() else { return };
            if cancel.is_cancelled() {
                return;
            }
            let events = trace.events.len();
            let written = tokio::task::spawn_blocking(move || {
                let (new, path) = (folder.join("trace.new"), folder.join("trace"));
                std::fs::write(&new, trace.encode()?)?;
                std::fs::rename(new, path)
            });
            match written.await {
                Ok(Ok(())) => tracing::info!(events, "a trace was recorded"),
                Ok(Err(error)) => tracing::warn!(%error, "a trace cannot be written"),
                Err(_) => {}
            }
        }));
    }

    pub(super) async fn stop_all(&mut self) {
        if let Some(job) = self.trace.take() {
            job.stop().await;
        }
        self.stop_pre_copy().await;
        self.stop_follow().await;
        self.stop_fetch().await;
        self.stop_publish().await;
        self.stop_point().await;
    }
}

fn age_ms(at: Instant) -> u64 {
    u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Runs work again and again while the source cannot be asked; ends when it is done, refused or cancelled.
async fn until<F>(cancel: &CancellationToken, what: &str, work: impl Fn() -> F)
where
    F: Future<Output = Result<(), VolumeError>>,
{
    loop {
        let result = tokio::select! {
            () = cancel.cancelled() => return,
            result = work() => result,
        };
        match result {
            Ok(()) => return,
            Err(error @ (VolumeError::Source(_) | VolumeError::NoSource | VolumeError::Map { .. })) => {
                tracing::warn!(error = chain(&error), "{what} will be tried again");
            }
            Err(error) => {
                tracing::error!(error = chain(&error), "{what} ended");
                return;
            }
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(RETRY_PAUSE) => {}
        }
    }
}
