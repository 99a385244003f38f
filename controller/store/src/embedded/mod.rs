//! The store embedded in the controller, on sled: durable, single-process, with history for watches.

mod folder;
mod layout;
mod view;
mod watch;
mod writer;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    task, time,
};

use self::{
    folder::Folder,
    layout::Meta,
    view::{Fault, View},
    writer::{Request, Retention, Writer},
};
use crate::{
    BoxFuture, Health, Key, MAX_TXN_BYTES, Page, Prefix, Store, StoreError, Txn, TxnOutcome, Versioned, WatchStream,
};

/// Most transactions that wait for the writer.
const QUEUE_LEN: usize = 1024;
/// Most bytes of transactions that wait, in KiB.
const QUEUE_KIB: u32 = 32 << 10;

/// How a [`SledStore`] is run.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SledOptions {
    /// Memory for cached pages, in bytes.
    pub cache_bytes: u64,
    /// Revisions of history kept for watches before the oldest are dropped.
    pub history_revisions: usize,
    /// Bytes of history kept for watches before the oldest revisions are dropped.
    pub history_bytes: u64,
    /// Free bytes on the disk below which transactions are refused, as [`StoreError::Unavailable`]: a write that fails half-way would
    /// end the store.
    pub min_free_bytes: u64,
    /// How long a call may wait for the disk before it is given up.
    pub call_budget: Duration,
}

impl Default for SledOptions {
    fn default() -> Self {
        Self {
            cache_bytes: 64 << 20,
            history_revisions: 50_000,
            history_bytes: 256 << 20,
            min_free_bytes: 64 << 20,
            call_budget: Duration::from_secs(30),
        }
    }
}

/// A [`Store`] in a folder of this machine. One process at a time.
///
/// Concurrent transactions share flushes, so throughput grows with concurrency. Close it with
/// [`close`](SledStore::close) to have the folder free at once; a dropped store finishes what it was asked for and
/// frees the folder a little later. `kill -9` at any time loses nothing that was answered.
#[derive(Debug)]
pub struct SledStore {
    shared: Arc<Shared>,
    requests: mpsc::Sender<Request>,
    room: Arc<Semaphore>,
}

/// What readers, watchers and the writer share.
#[derive(Debug)]
struct Shared {
    path: PathBuf,
    call_budget: Duration,
    min_free_bytes: u64,
    state: RwLock<State>,
    /// The newest durable revision; taken out when the store ends, which wakes the watchers.
    progress: RwLock<Option<tokio::sync::watch::Sender<u64>>>,
}

#[derive(Debug)]
enum State {
    Open {
        db: sled::Db,
        meta: Meta,
    },
    /// A write failed; the reason.
    Failed(String),
    Closed,
}

impl Shared {
    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    // A panic under the write lock is caught by the writer, which then marks the store as failed.
    fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the store takes no calls, if so.
    fn refusal(&self) -> Option<StoreError> {
        match &*self.state() {
            State::Open { .. } => None,
            State::Failed(reason) => Some(failed_earlier(reason)),
            State::Closed => Some(StoreError::Closed),
        }
    }

    /// Why nothing may be written now, if so.
    fn shortage(&self) -> Option<&'static str> {
        match folder::free_bytes(&self.path) {
            Ok(free) if free >= self.min_free_bytes => None,
            Ok(_) => Some("the disk is nearly full"),
            Err(_) => Some("the disk does not tell its free space"),
        }
    }

    fn announce(&self, revision: u64) {
        if let Some(progress) = &*self.progress.read().unwrap_or_else(PoisonError::into_inner) {
            progress.send_replace(revision);
        }
    }

    fn end_watches(&self) {
        self.progress.write().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn progress(&self) -> tokio::sync::watch::Receiver<u64> {
        match &*self.progress.read().unwrap_or_else(PoisonError::into_inner) {
            Some(progress) => progress.subscribe(),
            None => tokio::sync::watch::channel(0).1,
        }
    }
}

fn failed_earlier(reason: &str) -> StoreError {
    StoreError::Failed { what: "an earlier write failed", source: Some(reason.to_owned().into()) }
}

/// Reads a consistent, durable picture, off the runtime.
async fn read<T, F>(shared: &Arc<Shared>, what: &'static str, f: F) -> Result<T, StoreError>
where
    T: Send + 'static,
    F: FnOnce(View<'_>) -> Result<T, Fault> + Send + 'static,
{
    let budget = shared.call_budget;
    let shared = Arc::clone(shared);
    let reading = task::spawn_blocking(move || match &*shared.state() {
        State::Open { db, meta } => f(View { db, meta: *meta }).map_err(|fault| fault.at(&shared.path, what)),
        State::Failed(reason) => Err(failed_earlier(reason)),
        State::Closed => Err(StoreError::Closed),
    });
    match time::timeout(budget, reading).await {
        Ok(Ok(result)) => result,
        Ok(Err(panicked)) => Err(StoreError::Failed { what, source: Some(panicked.into()) }),
        Err(_) => Err(StoreError::Unavailable { what: "the disk takes too long", source: None }),
    }
}

impl SledStore {
    /// Opens the store in `path`, making it if the folder is absent or empty. Reads all of it once and checks it: anything that is
    /// not as it was written is [`StoreError::Damaged`].
    pub async fn open(path: impl Into<PathBuf>, options: SledOptions) -> Result<Self, StoreError> {
        let path = path.into();
        let opening = task::spawn_blocking(move || Self::open_blocking(&path, &options));
        opening.await.unwrap_or_else(|e| Err(StoreError::Failed { what: "open the store", source: Some(e.into()) }))
    }

    fn open_blocking(path: &Path, options: &SledOptions) -> Result<Self, StoreError> {
        let mut folder = Folder::open(path)?;
        let high_water = folder.high_water()?;
        // sled panics on some kinds of damage.
        let opened = catch_unwind(AssertUnwindSafe(|| -> Result<_, Fault> {
            let db = sled::Config::new()
                .path(folder.sled())
                .cache_capacity(options.cache_bytes)
                .segment_size(layout::SEGMENT_BYTES)
                .flush_every_ms(None)
                .open()?;
            let meta = match (view::meta(&db)?, high_water) {
                (Some(meta), high_water) if meta.revision >= high_water.unwrap_or(0) => meta,
                (None, None) => {
                    db.insert(layout::META, &Meta::EMPTY.encode())?;
                    Meta::EMPTY
                }
                (meta, high_water) => {
                    let (has, had) = (meta.map_or(0, |m| m.revision), high_water.unwrap_or(0));
                    return Err(Fault::Inconsistent(format!("it was at revision {had} and is at {has} now")));
                }
            };
            let history = view::verify(View { db: &db, meta })?;
            Ok((db, meta, history))
        }));
        let (db, meta, history) = match opened {
            Ok(Ok(opened)) => opened,
            Ok(Err(fault)) => return Err(fault.at(folder.path(), "open the database")),
            Err(_) => return Err(folder.damaged("the storage engine cannot read it".into())),
        };
        // What recovery brought back may not have been flushed before the crash; and new files need to last.
        db.flush().map_err(|e| Fault::from(e).at(folder.path(), "flush the database"))?;
        folder.sync().map_err(|e| folder::failed("sync the database", e))?;
        folder.set_high_water(meta.revision).map_err(|e| folder::failed("write high-water", e))?;

        let shared = Arc::new(Shared {
            path: folder.path().to_owned(),
            call_budget: options.call_budget,
            min_free_bytes: options.min_free_bytes,
            state: RwLock::new(State::Open { db: db.clone(), meta }),
            progress: RwLock::new(Some(tokio::sync::watch::channel(meta.revision).0)),
        });
        let retention = Retention { revisions: options.history_revisions, bytes: options.history_bytes };
        let writer = Writer { shared: Arc::clone(&shared), folder, db, meta, history, retention };
        let (requests, queue) = mpsc::channel(QUEUE_LEN);
        // The thread ends when the queue closes, which is when the store is dropped or closed.
        std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || writer.run(queue))
            .map_err(|e| folder::failed("start the writer thread", e))?;
        let room = Arc::new(Semaphore::new(QUEUE_KIB as usize));
        Ok(Self { shared, requests, room })
    }

    /// Finishes what was asked for, closes the database and frees the folder. Later calls get [`StoreError::Closed`].
    pub async fn close(&self) {
        let (reply, closed) = oneshot::channel();
        if self.requests.send(Request::Close { reply }).await.is_ok() {
            // An error means that somebody else's close came first; the writer is gone then.
            let _ = closed.await;
        }
        self.requests.closed().await;
    }

    /// Sends a request and waits for the answer; `late` is the error if that takes too long.
    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Request,
        late: impl FnOnce() -> StoreError,
    ) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        let busy = || StoreError::Unavailable { what: "the writer's queue is full", source: None };
        match self.requests.send_timeout(request(reply), self.shared.call_budget).await {
            Ok(()) => {}
            Err(mpsc::error::SendTimeoutError::Timeout(_)) => return Err(busy()),
            Err(mpsc::error::SendTimeoutError::Closed(_)) => return Err(self.ended()),
        }
        match time::timeout(self.shared.call_budget, answer).await {
            Ok(Ok(answer)) => answer,
            // The writer answers whatever it has begun; this it never began.
            Ok(Err(_)) => Err(self.ended()),
            Err(_) => Err(late()),
        }
    }

    fn ended(&self) -> StoreError {
        self.shared.refusal().unwrap_or(StoreError::Closed)
    }
}

impl Store for SledStore {
    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnOutcome, StoreError>> {
        Box::pin(async move {
            txn.validate()?;
            let kib = u32::try_from(txn.size_bytes().min(MAX_TXN_BYTES).div_ceil(1024)).unwrap_or(QUEUE_KIB).max(1);
            let busy = || StoreError::Unavailable { what: "too many transactions wait", source: None };
            let room = time::timeout(self.shared.call_budget, Arc::clone(&self.room).acquire_many_owned(kib));
            let room = room.await.map_err(|_| busy())?.map_err(|_| StoreError::Closed)?;
            let late = || StoreError::UnknownOutcome { source: Some("the disk takes too long".into()) };
            self.ask(|reply| Request::Txn { txn, reply, _room: room }, late).await
        })
    }

    fn get(&self, key: Key) -> BoxFuture<'_, Result<Option<Versioned>, StoreError>> {
        Box::pin(async move {
            let found = read(&self.shared, "read a key", move |view| view.current(&key)).await?;
            Ok(found.map(|(versioned, _)| versioned))
        })
    }

    fn range(&self, prefix: Prefix, after: Option<Key>, limit: usize) -> BoxFuture<'_, Result<Page, StoreError>> {
        Box::pin(async move {
            if limit == 0 {
                return Err(StoreError::InvalidArgument { reason: "a page's limit is 1 or more".into() });
            }
            read(&self.shared, "read a page", move |view| view.page(&prefix, after.as_ref(), limit)).await
        })
    }

    fn range_back(&self, prefix: Prefix, before: Option<Key>, limit: usize) -> BoxFuture<'_, Result<Page, StoreError>> {
        Box::pin(async move {
            if limit == 0 {
                return Err(StoreError::InvalidArgument { reason: "a page's limit is 1 or more".into() });
            }
            read(&self.shared, "read a page", move |view| view.page_back(&prefix, before.as_ref(), limit)).await
        })
    }

    fn watch(&self, prefix: Prefix, from_revision: u64) -> WatchStream {
        watch::stream(Arc::clone(&self.shared), prefix, from_revision)
    }

    fn compact(&self, revision: u64) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            // A compaction that is given up goes on, and may be repeated.
            let late = || StoreError::Unavailable { what: "compaction takes long", source: None };
            self.ask(|reply| Request::Compact { revision, reply }, late).await
        })
    }

    fn health(&self) -> BoxFuture<'_, Result<Health, StoreError>> {
        Box::pin(async move {
            let shared = Arc::clone(&self.shared);
            let health = read(&self.shared, "read the store's counters", move |view| {
                // From sled, so that a dead engine shows.
                view::meta(view.db)?;
                let size_bytes = Some(view.db.size_on_disk()?);
                let health = Health { backend: "sled", revision: view.meta.revision, size_bytes };
                Ok(match shared.shortage() {
                    None => Ok(health),
                    Some(what) => Err(StoreError::Unavailable { what, source: None }),
                })
            });
            health.await?
        })
    }
}
