//! Providers that fail in every way the store has to bear, over stores in memory.

mod encodings;
mod faults;
mod requests;
mod sweeps;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use supercloud_ids::ProjectId;

use super::*;
use crate::{
    backend::{StoreFuture, conformance::conforms, mem::MemStore},
    key::ChunkName,
};

/// How a provider behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Well,
    /// Refuses everything.
    Down,
    /// Answers nothing, ever.
    Hanging,
    /// Does everything, late.
    Slow(Duration),
    /// Gives wrong bytes, of the right length.
    Lying,
    /// Gives the bytes of another object.
    Swapping,
    /// Has lost all, and says that it keeps what it is given.
    Forgetful,
    /// Shows what it had when it was told so, and says that it does what is asked.
    RolledBack,
    /// Does everything and says that it failed.
    Ungrateful,
    /// Does not delete as long as it is so, but then.
    HangingOnDelete,
    /// Lists what is nowhere, and old things as new.
    Inventing,
}

pub(super) const FAULTS: [Mode; 9] = [
    Mode::Down,
    Mode::Hanging,
    Mode::Slow(Duration::from_secs(5)),
    Mode::Lying,
    Mode::Swapping,
    Mode::Forgetful,
    Mode::RolledBack,
    Mode::Ungrateful,
    Mode::Inventing,
];

/// What crashes a writer: requests that change something have an effect as long as there are some left; then nobody hears of
/// anything any more.
#[derive(Debug, Default)]
pub(super) struct Fuse(pub AtomicI64);

impl Fuse {
    pub(super) fn long() -> Arc<Self> {
        Arc::new(Self(AtomicI64::new(i64::MAX)))
    }

    async fn burn(&self) {
        if self.0.fetch_sub(1, Ordering::SeqCst) <= 0 {
            std::future::pending::<()>().await;
        }
    }
}

/// A provider.
#[derive(Debug)]
pub(super) struct Provider {
    pub mem: Arc<MemStore>,
    pub mode: Mutex<Mode>,
    /// What it had when it began to roll back.
    before: Mutex<BTreeMap<ObjectKey, Bytes>>,
    rng: Mutex<SmallRng>,
    /// The longest a request takes, in milliseconds.
    pub latency_ms: AtomicU64,
    /// Requests, and bytes that came and went.
    pub requests: AtomicU64,
    pub bytes: AtomicU64,
    fuse: Arc<Fuse>,
}

impl Provider {
    pub(super) fn new(mem: Arc<MemStore>, seed: u64, fuse: Arc<Fuse>) -> Self {
        Self {
            mem,
            mode: Mutex::new(Mode::Well),
            before: Mutex::default(),
            rng: Mutex::new(SmallRng::seed_from_u64(seed)),
            latency_ms: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            fuse,
        }
    }

    pub(super) fn set(&self, mode: Mode) {
        *self.before.lock().unwrap() = self.mem.objects.lock().unwrap().clone();
        *self.mode.lock().unwrap() = mode;
    }

    async fn begin(&self) -> Result<Mode, StoreError> {
        let mode = *self.mode.lock().unwrap();
        self.requests.fetch_add(1, Ordering::SeqCst);
        let latency = self.latency_ms.load(Ordering::SeqCst);
        match mode {
            Mode::Down => {
                return Err(StoreError::Unreachable { store: "a provider".into(), why: "told to be down".into() });
            }
            Mode::Hanging => std::future::pending().await,
            Mode::Slow(time) => tokio::time::sleep(time).await,
            _ if latency > 0 => tokio::time::sleep(Duration::from_millis(latency)).await,
            _ => {
                let turns = self.rng.lock().unwrap().random_range(0..6);
                for _ in 0..turns {
                    tokio::task::yield_now().await;
                }
            }
        }
        Ok(mode)
    }

    /// What is done with the answer to something that changes things.
    fn end<T>(mode: Mode, done: Result<T, StoreError>) -> Result<T, StoreError> {
        match mode {
            Mode::Ungrateful => {
                Err(StoreError::Unreachable { store: "a provider".into(), why: "the answer was lost".into() })
            }
            _ => done,
        }
    }

    /// Whether it says that it keeps whatever it is given, to everybody.
    pub(super) fn is_deaf(mode: Mode) -> bool {
        matches!(mode, Mode::Forgetful | Mode::RolledBack)
    }
}

impl ObjectStore for Provider {
    fn put(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            let mode = self.begin().await?;
            self.fuse.burn().await;
            self.bytes.fetch_add(bytes.len() as u64, Ordering::SeqCst);
            if Self::is_deaf(mode) {
                return Ok(());
            }
            Self::end(mode, self.mem.put(key, bytes).await)
        })
    }

    fn put_if_absent(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, PutOutcome> {
        Box::pin(async move {
            let mode = self.begin().await?;
            self.fuse.burn().await;
            self.bytes.fetch_add(bytes.len() as u64, Ordering::SeqCst);
            if Self::is_deaf(mode) {
                return Ok(PutOutcome::Stored);
            }
            Self::end(mode, self.mem.put_if_absent(key, bytes).await)
        })
    }

    fn put_batch(&self, objects: Vec<(ObjectKey, Bytes)>) -> StoreFuture<'_, usize> {
        Box::pin(async move {
            let mode = self.begin().await?;
            let mut new = 0;
            for (key, bytes) in objects {
                self.fuse.burn().await;
                self.bytes.fetch_add(bytes.len() as u64, Ordering::SeqCst);
                if !Self::is_deaf(mode) {
                    new += self.mem.put_batch(vec![(key, bytes)]).await?;
                }
            }
            Self::end(mode, Ok(new))
        })
    }

    fn refresh(&self, keys: Vec<ObjectKey>) -> StoreFuture<'_, Vec<ObjectKey>> {
        Box::pin(async move {
            let mode = self.begin().await?;
            if Self::is_deaf(mode) {
                return Ok(Vec::new());
            }
            Self::end(mode, self.mem.refresh(keys).await)
        })
    }

    fn get(&self, key: ObjectKey, cap: usize) -> StoreFuture<'_, Bytes> {
        Box::pin(async move {
            let mode = self.begin().await?;
            let not_found = || StoreError::NotFound { key: key.clone() };
            let got = match mode {
                Mode::Forgetful => Err(not_found()),
                Mode::RolledBack => self.before.lock().unwrap().get(&key).cloned().ok_or_else(not_found),
                Mode::Swapping => {
                    let objects = self.mem.objects.lock().unwrap();
                    let like = |other: &&ObjectKey| {
                        **other != key && other.chunk_name().is_some() == key.chunk_name().is_some()
                    };
                    let other = objects.keys().find(like).unwrap_or(&key);
                    objects.get(other).cloned().ok_or_else(not_found)
                }
                _ => self.mem.get(key, cap).await,
            };
            let mut bytes = got?;
            if mode == Mode::Lying && !bytes.is_empty() {
                let mut bad = bytes.to_vec();
                let at = self.rng.lock().unwrap().random_range(0..bad.len());
                bad[at] ^= 1 << self.rng.lock().unwrap().random_range(0..8);
                bytes = bad.into();
            }
            self.bytes.fetch_add(bytes.len() as u64, Ordering::SeqCst);
            Ok(bytes)
        })
    }

    fn exists(&self, key: ObjectKey) -> StoreFuture<'_, bool> {
        Box::pin(async move { Ok(self.stat(key).await?.is_some()) })
    }

    fn stat(&self, key: ObjectKey) -> StoreFuture<'_, Option<ObjectEntry>> {
        Box::pin(async move {
            match self.begin().await? {
                Mode::Forgetful => Ok(None),
                Mode::Inventing => {
                    let modified = SystemTime::now() + Duration::from_secs(1_000_000);
                    Ok(Some(ObjectEntry { key, len: 7, modified }))
                }
                _ => self.mem.stat(key).await,
            }
        })
    }

    fn delete(&self, key: ObjectKey) -> StoreFuture<'_, bool> {
        Box::pin(async move {
            let mode = self.begin().await?;
            self.fuse.burn().await;
            while *self.mode.lock().unwrap() == Mode::HangingOnDelete {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            if Self::is_deaf(mode) {
                return Ok(true);
            }
            Self::end(mode, self.mem.delete(key).await)
        })
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>, limit: usize) -> StoreFuture<'a, Vec<ObjectEntry>> {
        Box::pin(async move {
            let mode = self.begin().await?;
            let mut page = self.mem.list(prefix, after, limit).await?;
            match mode {
                Mode::Forgetful => page.clear(),
                Mode::RolledBack => {
                    let before = self.before.lock().unwrap();
                    page.retain(|entry| before.contains_key(&entry.key));
                }
                Mode::Inventing => {
                    if let Some((project, _)) = prefix.split_once('/') {
                        let invented = match prefix.ends_with('/') {
                            // A register's newest version of all.
                            true => format!("{prefix}{:016x}", 5),
                            false => {
                                format!("{project}/00/{}", hex::encode([self.rng.lock().unwrap().random::<u8>(); 32]))
                            }
                        };
                        if let Ok(key) = invented.parse::<ObjectKey>()
                            && key.as_str().starts_with(prefix)
                            && after.is_none_or(|after| key.as_str() > after)
                        {
                            page.insert(0, ObjectEntry { key, len: 100, modified: SystemTime::UNIX_EPOCH });
                            page.sort_by(|a, b| a.key.cmp(&b.key));
                            page.dedup_by(|a, b| a.key == b.key);
                            page.truncate(limit);
                        }
                    }
                }
                _ => {}
            }
            Ok(page)
        })
    }

    fn stamp_slack(&self) -> Duration {
        Duration::ZERO
    }
}

/// Some providers, and stores over them.
pub(super) struct Market {
    pub mems: Vec<Arc<MemStore>>,
    pub providers: Vec<Arc<Provider>>,
}

pub(super) const KEY: [u8; 32] = [42; 32];

impl Market {
    pub(super) fn new(n: usize, seed: u64) -> Self {
        // Clocks that agree, as providers' do within the slack.
        let clock = Arc::new(AtomicU64::new(0));
        let mem = |_| Arc::new(MemStore { clock_ms: clock.clone(), ..MemStore::default() });
        let mems = (0..n).map(mem).collect();
        Self::over(mems, seed, &Fuse::long())
    }

    /// Other ways to the same stores.
    pub(super) fn over(mems: Vec<Arc<MemStore>>, seed: u64, fuse: &Arc<Fuse>) -> Self {
        let provider =
            |(mem, i): (&Arc<MemStore>, u64)| Arc::new(Provider::new(mem.clone(), seed * 100 + i, fuse.clone()));
        let providers = mems.iter().zip(0..).map(provider).collect();
        Self { mems, providers }
    }

    /// A process that uses them.
    pub(super) fn open(&self) -> CloudOfClouds {
        let members = self.providers.iter().enumerate();
        let members = members.map(|(i, p)| (format!("provider-{i}"), p.clone() as Arc<dyn ObjectStore>)).collect();
        let key = StoreKey::from_bytes(KEY);
        CloudOfClouds::over(members, &key, ReadOrder::Listed)
            .unwrap()
            .with_times(Duration::from_millis(100), Duration::ZERO)
    }
}

/// A store whose writes are waited for at all members, so that stamps stay what they are.
#[derive(Debug)]
struct Settled(CloudOfClouds);

macro_rules! settled {
    ($self:ident, $call:expr) => {
        Box::pin(async move {
            let done = $call.await;
            $self.0.settle().await;
            done
        })
    };
}

impl ObjectStore for Settled {
    fn put(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, ()> {
        settled!(self, self.0.put(key, bytes))
    }
    fn put_if_absent(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, PutOutcome> {
        settled!(self, self.0.put_if_absent(key, bytes))
    }
    fn put_batch(&self, objects: Vec<(ObjectKey, Bytes)>) -> StoreFuture<'_, usize> {
        settled!(self, self.0.put_batch(objects))
    }
    fn refresh(&self, keys: Vec<ObjectKey>) -> StoreFuture<'_, Vec<ObjectKey>> {
        settled!(self, self.0.refresh(keys))
    }
    fn get(&self, key: ObjectKey, cap: usize) -> StoreFuture<'_, Bytes> {
        self.0.get(key, cap)
    }
    fn exists(&self, key: ObjectKey) -> StoreFuture<'_, bool> {
        self.0.exists(key)
    }
    fn stat(&self, key: ObjectKey) -> StoreFuture<'_, Option<ObjectEntry>> {
        self.0.stat(key)
    }
    fn delete(&self, key: ObjectKey) -> StoreFuture<'_, bool> {
        settled!(self, self.0.delete(key))
    }
    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>, limit: usize) -> StoreFuture<'a, Vec<ObjectEntry>> {
        self.0.list(prefix, after, limit)
    }
    fn stamp_slack(&self) -> Duration {
        self.0.stamp_slack()
    }
}

pub(super) fn chunk(project: ProjectId, number: u64, len: usize) -> (ObjectKey, Bytes) {
    let mut rng = SmallRng::seed_from_u64(number);
    let mut bytes = vec![0; len];
    rng.fill(&mut bytes[..]);
    (ObjectKey::chunk(project, &ChunkName(*blake3::hash(&number.to_le_bytes()).as_bytes())), bytes.into())
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_a_store() {
    for n in [4, 7] {
        conforms(Arc::new(Settled(Market::new(n, 1).open())), Duration::ZERO, false).await;
    }
}

/// With any one provider failing, it is one still; but for one that tells several at once that they were first: see [`super::registers`].
#[tokio::test(start_paused = true)]
async fn it_is_a_store_with_any_one_failing() {
    for fault in FAULTS.into_iter().filter(|fault| !Provider::is_deaf(*fault)) {
        for failing in 0..4 {
            let market = Market::new(4, 2);
            market.providers[failing].set(fault);
            let store = market.open();
            println!("{failing} is {fault:?}");
            conforms(Arc::new(Settled(store)), Duration::ZERO, false).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_a_store_over_folders() {
    let folder = tempfile::tempdir().unwrap();
    let open = |i: usize| {
        let store = DirStore::open(&folder.path().join(i.to_string())).unwrap();
        (format!("folder-{i}"), Arc::new(store) as Arc<dyn ObjectStore>)
    };
    let key = StoreKey::from_bytes(KEY);
    let store = CloudOfClouds::over((0..4).map(open).collect(), &key, ReadOrder::Fastest).unwrap();
    conforms(
        Arc::new(Settled(store.with_times(Duration::from_secs(1), Duration::ZERO))),
        Duration::from_millis(20),
        false,
    )
    .await;
}

/// What conformance asks of registers, of chunks.
#[tokio::test(start_paused = true)]
async fn chunks_come_and_go() {
    for n in [4, 7] {
        let market = Market::new(n, 3);
        let store = market.open();
        let project = ProjectId::generate();
        let all: Vec<_> = (0..150).map(|i| chunk(project, i, 100 + 37 * usize::try_from(i).unwrap())).collect();
        assert!(matches!(store.get(all[0].0.clone(), 1000).await, Err(StoreError::NotFound { .. })));
        assert!(
            !store.exists(all[0].0.clone()).await.unwrap() && store.stat(all[0].0.clone()).await.unwrap().is_none()
        );
        assert_eq!(store.put_batch(all[..140].to_vec()).await.unwrap(), 140);
        assert_eq!(store.put_batch(all.clone()).await.unwrap(), 10);
        store.settle().await;
        let mut keys: Vec<_> = all.iter().map(|(key, _)| key.clone()).collect();
        let absent = chunk(project, 999, 1).0;
        keys.push(absent.clone());
        assert_eq!(store.refresh(keys).await.unwrap(), [absent]);
        for (key, bytes) in &all {
            assert_eq!(store.get(key.clone(), bytes.len()).await.unwrap(), bytes);
            let error = store.get(key.clone(), bytes.len() - 1).await.unwrap_err();
            assert!(matches!(error, StoreError::TooLarge { .. }), "{error}");
            let entry = store.stat(key.clone()).await.unwrap().unwrap();
            assert!(entry.len >= bytes.len() as u64 && entry.len < bytes.len() as u64 + 20, "{entry:?}");
        }
        store.put(ObjectKey::other(project, "sweep/x_y").unwrap(), Bytes::from_static(b"x")).await.unwrap();
        for limit in [1, 7, 1000] {
            let (mut listed, mut after) = (Vec::new(), None::<String>);
            loop {
                let page = store.list("", after.as_deref(), limit).await.unwrap();
                let Some(last) = page.last() else { break };
                after = Some(last.key.as_str().to_owned());
                listed.extend(page);
            }
            assert_eq!(listed.len(), 151, "{limit}");
            assert!(listed.is_sorted_by(|a, b| a.key < b.key));
        }
        assert!(store.delete(all[3].0.clone()).await.unwrap() && !store.delete(all[3].0.clone()).await.unwrap());
        assert!(!store.exists(all[3].0.clone()).await.unwrap());
        assert!(market.mems.iter().all(|mem| !mem.objects.lock().unwrap().contains_key(&all[3].0)));
        let outcome = store.put_if_absent(all[3].0.clone(), all[3].1.clone()).await.unwrap();
        assert_eq!(outcome, PutOutcome::Stored);
        let outcome = store.put_if_absent(all[3].0.clone(), all[3].1.clone()).await.unwrap();
        assert_eq!(outcome, PutOutcome::AlreadyThere);
        let odd = ObjectKey::other(project, "ab/register").unwrap();
        assert!(matches!(store.put(odd, Bytes::new()).await, Err(StoreError::Key { .. })));
    }
}
