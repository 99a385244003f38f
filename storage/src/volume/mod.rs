//! The engine of one writable volume on one host.
//!
//! A volume is a base manifest (or zeros) under a block map. Written blocks lie in a sparse data file; the map is
//! durable in the journal, and for the time between two flushes in the hot log:
//!
//! ```text
//!   write ─> data file (page cache) ─> hot log (page cache) ─> map (memory) ─> acknowledged
//!   flush ─> sync data file ─> append changed entries to the journal, sync ─> empty the old hot log
//! ```
//!
//! | after | what is there |
//! |---|---|
//! | `kill -9` of the process | every acknowledged write (journal + hot log; same boot id) |
//! | a power cut | every acknowledged write that a flush followed; a later one wholly, partly or not |
//!
//! The order is what makes it so: an entry reaches the journal only after the data that it speaks of is synced, so the
//! journal never points at data that is not there. Regions of the data file that are not local are holes.
//!
//! Locks, in the order in which they are taken: role (shared by every operation of the guest, exclusive for a change of
//! role) > stripe (one of 256, by block) > snapshots > map. All are held only around local work, never while something
//! is fetched.

mod base;
mod cut;
pub mod disk;
mod error;
mod flush;
mod follow;
mod habits;
mod handover;
mod hot;
mod io;
mod journal;
mod map;
mod peering;
mod publish;
mod recovery;
mod remote;
pub mod role;
#[cfg(test)]
mod sim;
mod snapshot;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeSet, HashSet},
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use supercloud_ids::{Epoch, ProjectId, VolumeId};
use tokio::sync::{Notify, watch};
use tokio_util::task::TaskTracker;

pub(crate) use self::error::chain;
use self::{
    base::{Cache, InFlight},
    disk::{Disk, DiskFile},
    habits::Habits,
    hot::HotLog,
    journal::{Journal, Record},
    role::{Role, RoleError},
    snapshot::Snapshots,
};
pub use self::{
    cut::{CutInfo, CutOf},
    error::VolumeError,
    handover::{Ahead, PreCopy},
    journal::{Identity, JournalError},
    map::{BlockMap, BlockState, Entry},
    peering::PeerBlock,
    publish::{POINT_RESERVE_BYTES, Published},
    remote::{BlockSource, FetchError, FetchFuture, FetchLimit, Fetched, MapEntry, MapPage, Priority},
};
use crate::{
    BLOCK_BYTES, block_count,
    key::{ChunkName, ContentRoot, DataKeys},
    manifest::Manifest,
    process::control::{Alarm, AlarmCode, SealedMap},
    source::ChunkReader,
};

/// The files of a volume in its folder, for who deletes it.
pub const FILE_NAMES: [&str; 11] = [
    "map.journal",
    "map.journal.new",
    "data",
    "hot.0",
    "hot.1",
    "snapshot",
    "cut",
    "stage",
    "lock",
    "trace",
    "trace.new",
];

/// Stripes of block locks.
const STRIPES: usize = 256;
/// Blocks that one piece of local work covers at most: 64 MiB.
const BLOCKS_PER_WORK: usize = 1024;

/// What a volume is opened with.
#[derive(Debug, Clone)]
pub struct VolumeParams {
    /// The volume.
    pub volume: VolumeId,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// What it starts from; its chunks are read through `reader`.
    pub base: Option<ContentRoot>,
    /// Reads chunks of the project; also holds its keys.
    pub reader: ChunkReader,
    /// The role when it is made new: `Standby` or `Active`.
    pub start: Role,
    /// Memory for decrypted base blocks, in bytes.
    pub cache_bytes: u64,
}

/// A writable volume. Cheap to clone; all clones are the same volume.
#[derive(Debug, Clone)]
pub struct Volume {
    inner: Arc<Inner>,
}

/// What changes with every write.
#[derive(Debug)]
struct MapState {
    map: BlockMap,
    /// Blocks whose entry differs from the journal's.
    pending: BTreeSet<u32>,
    hot: HotLog,
    next_version: u64,
    /// Versions below it may be given out.
    reserved: u64,
    /// Blocks that are remote as far as the journal knows.
    remote_on_disk: HashSet<u32>,
}

#[derive(Debug, Default)]
struct Counters {
    read: AtomicU64,
    written: AtomicU64,
    pulled_before: AtomicU64,
    pulled_after: AtomicU64,
    dirty: AtomicU64,
}

struct Inner {
    params: VolumeParams,
    keys: Arc<DataKeys>,
    blocks: u32,
    base: Option<Manifest>,
    cache: Cache,
    base_flights: InFlight<ChunkName>,
    remote_flights: InFlight<u32>,
    disk: Arc<dyn Disk>,
    data: Arc<dyn DiskFile>,
    journal: Journal,
    stripes: Box<[RwLock<()>]>,
    map: Mutex<MapState>,
    /// The role as operations see it. During `seal` it is sealed here before it is in the journal.
    role: RwLock<Role>,
    role_seen: watch::Sender<Role>,
    /// Held by one change of role, or adoption, at a time.
    transition: tokio::sync::Mutex<()>,
    flush_gate: tokio::sync::Mutex<()>,
    /// The same for the work itself, which goes on when its caller is gone.
    flush_lock: Mutex<()>,
    /// Operations that are complete, and up to which of them everything is durable.
    completed: AtomicU64,
    flushed: AtomicU64,
    flush_hint: Notify,
    has_failed: AtomicBool,
    is_released: AtomicBool,
    source: watch::Sender<Option<Arc<dyn BlockSource>>>,
    /// The map as the source told it, for adoption.
    source_map: tokio::sync::Mutex<handover::SourceMap>,
    snapshots: Snapshots,
    cuts: cut::Cuts,
    following: follow::Following,
    publishing: tokio::sync::Mutex<()>,
    alarm: watch::Sender<Option<Alarm>>,
    counters: Counters,
    habits: Habits,
    work: TaskTracker,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Inner({})", self.params.volume)
    }
}

fn relock<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while it was held is a defect of ours; the volume's state is judged by the journal, not by the lock.
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Volume {
    /// Opens a volume on `disk`, making it when it is not there; reads the base's manifest.
    pub async fn open(disk: Arc<dyn Disk>, params: VolumeParams) -> Result<Self, VolumeError> {
        let size = VolumeError::Size { size_bytes: params.size_bytes };
        let blocks = block_count(params.size_bytes).ok_or(size)?;
        let base = match params.base {
            None => None,
            Some(root) => {
                let manifest = Manifest::load(&params.reader, root).await?;
                if manifest.size_bytes() > params.size_bytes {
                    return Err(VolumeError::Size { size_bytes: params.size_bytes });
                }
                Some(manifest)
            }
        };
        let keys = params.reader.keys().clone();
        let identity = Identity {
            volume: params.volume,
            project: keys.project(),
            size_bytes: params.size_bytes,
            base: params.base,
        };
        let (opened, start) = (disk.clone(), params.start);
        let recovered = tokio::task::spawn_blocking(move || recovery::recover(&opened, identity, start))
            .await
            .map_err(VolumeError::Worker)??;
        let inner = Inner {
            keys,
            blocks,
            base,
            cache: Cache::new(params.cache_bytes),
            base_flights: InFlight::default(),
            remote_flights: InFlight::default(),
            disk,
            data: recovered.data,
            journal: recovered.journal,
            stripes: std::iter::repeat_with(RwLock::default).take(STRIPES).collect(),
            map: Mutex::new(MapState {
                map: recovered.map,
                pending: BTreeSet::new(),
                hot: recovered.hot,
                next_version: recovered.next_version,
                reserved: recovered.reserved,
                remote_on_disk: recovered.remote_on_disk,
            }),
            role: RwLock::new(recovered.role),
            role_seen: watch::Sender::new(recovered.role),
            transition: tokio::sync::Mutex::default(),
            flush_gate: tokio::sync::Mutex::default(),
            flush_lock: Mutex::default(),
            completed: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            flush_hint: Notify::new(),
            has_failed: AtomicBool::new(false),
            is_released: AtomicBool::new(recovered.is_released),
            source: watch::Sender::new(None),
            source_map: tokio::sync::Mutex::new(handover::SourceMap::new(blocks)),
            snapshots: Snapshots::default(),
            cuts: cut::Cuts::default(),
            following: follow::Following::default(),
            publishing: tokio::sync::Mutex::default(),
            alarm: watch::Sender::new(None),
            counters: Counters::default(),
            habits: Habits::default(),
            work: TaskTracker::new(),
            params,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The volume's id.
    #[must_use]
    pub fn id(&self) -> VolumeId {
        self.inner.params.volume
    }

    /// The volume's project.
    #[must_use]
    pub fn project(&self) -> ProjectId {
        self.inner.keys.project()
    }

    /// The size in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.inner.params.size_bytes
    }

    /// What it starts from.
    #[must_use]
    pub fn base(&self) -> Option<ContentRoot> {
        self.inner.params.base
    }

    /// The role now.
    #[must_use]
    pub fn role(&self) -> Role {
        *self.inner.role_seen.borrow()
    }

    /// Tells every change of the role.
    #[must_use]
    pub fn watch_role(&self) -> watch::Receiver<Role> {
        self.inner.role_seen.subscribe()
    }

    /// Blocks that differ from the base.
    #[must_use]
    pub fn changed_blocks(&self) -> u64 {
        relock(&self.inner.map).map.len()
    }

    /// Blocks whose newest content is not durable on this host: the source may be released only at 0.
    #[must_use]
    pub fn missing(&self) -> u64 {
        relock(&self.inner.map).remote_on_disk.len() as u64
    }

    /// What an operator should know now.
    #[must_use]
    pub fn alarm(&self) -> Option<Alarm> {
        self.inner.alarm.borrow().clone()
    }

    /// Bytes of blocks pulled from the source: before the volume was activated, and after.
    #[must_use]
    pub fn pulled_bytes(&self) -> (u64, u64) {
        let counters = &self.inner.counters;
        (counters.pulled_before.load(Ordering::Relaxed), counters.pulled_after.load(Ordering::Relaxed))
    }

    /// Bytes that the guest read and wrote since the volume was opened.
    #[must_use]
    pub fn guest_bytes(&self) -> (u64, u64) {
        let counters = &self.inner.counters;
        (counters.read.load(Ordering::Relaxed), counters.written.load(Ordering::Relaxed))
    }

    /// Bytes acknowledged since the last flush.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        self.inner.counters.dirty.load(Ordering::Relaxed)
    }

    /// At a source: whether the destination has said that it has everything.
    #[must_use]
    pub fn is_released(&self) -> bool {
        self.inner.is_released.load(Ordering::Acquire)
    }

    /// Become the writer at `epoch`; durable when it returns.
    pub async fn activate(&self, epoch: Epoch) -> Result<(), VolumeError> {
        self.inner.habits.note_activation(self.role());
        self.inner.change_role(|role| role.activate(epoch)).await
    }

    /// Go on writing under the epoch that was sealed: the switch was refused.
    pub async fn unseal(&self, epoch: Epoch) -> Result<(), VolumeError> {
        self.inner.change_role(|role| role.unseal(epoch)).await
    }

    /// End writing under `epoch`. When it returns, everything acknowledged is durable, nothing is written under this
    /// epoch any more (unless it is unsealed), and what it returns identifies the content.
    pub async fn seal(&self, epoch: Epoch) -> Result<SealedMap, VolumeError> {
        let inner = &self.inner;
        // Most of what is dirty goes to the disk while the guest may still write.
        self.flush().await?;
        let _transition = inner.transition.lock().await;
        let before = inner.set_role(move |role| role.seal(epoch)).await?;
        let sealed = async {
            self.flush().await?;
            self.warm_digests().await?;
            // Not by the role before: an earlier seal may have been given up between the two.
            if inner.journal.role() != Some(Role::Sealed { epoch }) {
                inner.append(vec![Record::Role(Role::Sealed { epoch }), Record::Released(false)]).await?;
                inner.is_released.store(false, Ordering::Release);
            }
            let state = relock(&inner.map);
            let root = state.map.root(inner.params.size_bytes, inner.params.base);
            let root = root.ok_or_else(|| VolumeError::Map { what: "a digest is lacking".into() })?;
            Ok(SealedMap { epoch, root, version: state.map.highest_version(), blocks: state.map.len() })
        };
        let sealed = sealed.await;
        if sealed.is_err() {
            // Nobody was told that it is sealed: as it was.
            inner.set_role(move |_| Ok(before)).await?;
        }
        sealed
    }

    /// Where blocks at another host are pulled from; `None` ends that.
    pub fn set_source(&self, source: Option<Arc<dyn BlockSource>>) {
        self.inner.source.send_replace(source);
    }

    /// Notes, durably, that the destination has everything.
    pub async fn note_released(&self) -> Result<(), VolumeError> {
        if !matches!(self.role(), Role::Sealed { .. }) {
            return Err(RoleError::Role { role: self.role(), action: "be released" }.into());
        }
        self.inner.append(vec![Record::Released(true)]).await?;
        self.inner.is_released.store(true, Ordering::Release);
        Ok(())
    }

    /// Waits until no local work is under way that was begun before; for a front that lost its client.
    pub async fn quiesce(&self) {
        // Reopened at once: the tracker only counts.
        self.inner.work.close();
        self.inner.work.wait().await;
        self.inner.work.reopen();
    }

    /// Makes everything durable and notes that there is nothing to recover. The volume is of no use afterwards.
    pub async fn close(&self) -> Result<(), VolumeError> {
        // No guest operation from here on, also none that waits.
        let _transition = self.inner.transition.lock().await;
        self.flush().await?;
        self.quiesce().await;
        self.flush().await?;
        self.inner.append(vec![Record::Closed]).await?;
        // What would change now would not be found at the next start.
        self.inner.has_failed.store(true, Ordering::Release);
        Ok(())
    }
}

impl Inner {
    /// Runs local work on a thread that may block; counted, so that it can be waited for even when its caller is gone.
    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, VolumeError> + Send + 'static,
    ) -> Result<T, VolumeError> {
        let (inner, token) = (self.clone(), self.work.token());
        let task = tokio::task::spawn_blocking(move || {
            let result = work(&inner);
            drop(token);
            result
        });
        task.await.map_err(VolumeError::Worker)?
    }

    async fn append(self: &Arc<Self>, records: Vec<Record>) -> Result<(), VolumeError> {
        self.blocking(move |inner| {
            let result = inner.journal.append(&records);
            if result.is_err() {
                inner.fail();
            }
            Ok(result?)
        })
        .await
    }

    /// Sets the role that operations see, waiting for those under way; gives the one before.
    async fn set_role(
        self: &Arc<Self>,
        change: impl FnOnce(Role) -> Result<Role, RoleError> + Send + 'static,
    ) -> Result<Role, VolumeError> {
        self.blocking(move |inner| {
            let mut role = inner.role.write().unwrap_or_else(PoisonError::into_inner);
            let before = *role;
            *role = change(before)?;
            inner.role_seen.send_replace(*role);
            Ok(before)
        })
        .await
    }

    /// A change of role that must be durable before anything happens under it.
    async fn change_role(
        self: &Arc<Self>,
        change: impl FnOnce(Role) -> Result<Role, RoleError>,
    ) -> Result<(), VolumeError> {
        let _transition = self.transition.lock().await;
        if self.has_failed.load(Ordering::Acquire) {
            return Err(VolumeError::Failed);
        }
        let before = *self.role_seen.borrow();
        let next = change(before)?;
        if next != before || self.journal.role() != Some(next) {
            self.append(vec![Record::Role(next)]).await?;
            self.set_role(move |_| Ok(next)).await?;
        }
        Ok(())
    }

    fn entry(&self, block: u32) -> Entry {
        relock(&self.map).map.get(block)
    }

    fn stripe(&self, block: u32) -> &RwLock<()> {
        &self.stripes[block as usize % STRIPES]
    }

    const fn offset(block: u32) -> u64 {
        block as u64 * BLOCK_BYTES as u64
    }

    /// The bytes of a block that lie inside the volume: fewer than a block only in the last one.
    fn block_len(&self, block: u32) -> usize {
        let left = self.params.size_bytes.saturating_sub(Self::offset(block));
        usize::try_from(left).unwrap_or(BLOCK_BYTES).min(BLOCK_BYTES)
    }

    fn raise(&self, code: AlarmCode, message: String) {
        tracing::warn!(volume = %self.params.volume, ?code, message, "alarm");
        self.alarm.send_replace(Some(Alarm { code, message }));
    }

    /// Takes back an alarm of this kind.
    fn calm(&self, code: AlarmCode) {
        self.alarm.send_if_modified(|alarm| {
            let is_it = alarm.as_ref().is_some_and(|alarm| alarm.code == code);
            if is_it {
                *alarm = None;
            }
            is_it
        });
    }

    /// After a failed sync nobody knows what is durable: from here on everything is refused.
    fn fail(&self) {
        if !self.has_failed.swap(true, Ordering::AcqRel) {
            self.raise(AlarmCode::DiskFailed, "the local disk failed to make something durable".into());
        }
    }
}
