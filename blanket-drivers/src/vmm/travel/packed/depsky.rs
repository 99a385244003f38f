//! `depsky`: a cloud of clouds beside one bucket. Members are folders behind delays that are this benchmark's own: what is compared
//! is the protocol's work, not any provider's.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use supercloud_scheduler::sim::hazard::SplitMix;
use supercloud_storage::{
    backend::{
        DirStore, ObjectEntry, ObjectKey, ObjectStore, PutOutcome, StoreError, StoreFuture,
        depsky::{CloudOfClouds, ReadOrder, StoreKey},
    },
    key::ChunkName,
};

use super::Row;
use super::stats::Sample;
use crate::demo::tell::Teller;

/// Of each provider: a request's delay in milliseconds. A quarter more by chance; bytes besides at [`BYTES_PER_S`].
const DELAYS_MS: [u64; 4] = [20, 30, 45, 60];
const BYTES_PER_S: u64 = 25_000_000;
/// Of each provider, where round trips are counted.
const TRIP: Duration = Duration::from_millis(250);
/// Chunks, and the bytes of each: as sealed blocks of an image are.
const CHUNKS: u64 = 200;
const BYTES: [usize; 4] = [65_576, 52_000, 41_000, 25_000];
/// Reads and writes of a run; of these so many at once.
const READS: u64 = 400;
const WRITES: u64 = 100;
const AT_ONCE: u64 = 4;

/// List prices of a large provider in nano-dollars: a gigabyte kept for a month, a gigabyte that leaves, a thousand puts, a
/// thousand gets.
const KEPT: f64 = 23e6;
const LEAVES: f64 = 90e6;
const PUTS: f64 = 5e6;
const GETS: f64 = 0.4e6;

const WELL: u8 = 0;
const STOPPED: u8 = 1;
const LYING: u8 = 2;

/// A folder behind a delay.
#[derive(Debug)]
struct Provider {
    folder: DirStore,
    delay: Duration,
    mode: AtomicU8,
    calls: AtomicU64,
    puts: AtomicU64,
    gets: AtomicU64,
    kept: AtomicU64,
    left: AtomicU64,
}

impl Provider {
    fn open(path: &Path, delay: Duration) -> anyhow::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            folder: DirStore::open(path)?,
            delay,
            mode: AtomicU8::new(WELL),
            calls: AtomicU64::new(0),
            puts: AtomicU64::new(0),
            gets: AtomicU64::new(0),
            kept: AtomicU64::new(0),
            left: AtomicU64::new(0),
        }))
    }

    async fn pass(&self, bytes: usize) {
        if self.mode.load(Relaxed) == STOPPED {
            std::future::pending::<()>().await;
        }
        let chance = SplitMix(self.calls.fetch_add(1, Relaxed)).next_u64() % 256;
        let delay = self.delay + self.delay * u32::try_from(chance).unwrap_or(0) / 1024;
        tokio::time::sleep(delay + Duration::from_secs_f64(bytes as f64 / BYTES_PER_S as f64)).await;
    }

    async fn pass_put(&self, bytes: usize) {
        self.puts.fetch_add(1, Relaxed);
        self.kept.fetch_add(bytes as u64, Relaxed);
        self.pass(bytes).await;
    }
}

impl ObjectStore for Provider {
    fn put(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            self.pass_put(bytes.len()).await;
            self.folder.put(key, bytes).await
        })
    }

    fn put_if_absent(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, PutOutcome> {
        Box::pin(async move {
            self.pass_put(bytes.len()).await;
            self.folder.put_if_absent(key, bytes).await
        })
    }

    fn put_batch(&self, objects: Vec<(ObjectKey, Bytes)>) -> StoreFuture<'_, usize> {
        Box::pin(async move {
            for (_, bytes) in &objects {
                self.pass_put(bytes.len()).await;
            }
            self.folder.put_batch(objects).await
        })
    }

    fn refresh(&self, keys: Vec<ObjectKey>) -> StoreFuture<'_, Vec<ObjectKey>> {
        Box::pin(async move {
            self.pass(0).await;
            self.folder.refresh(keys).await
        })
    }

    fn get(&self, key: ObjectKey, cap: usize) -> StoreFuture<'_, Bytes> {
        Box::pin(async move {
            let bytes = self.folder.get(key, cap).await?;
            self.pass(bytes.len()).await;
            self.gets.fetch_add(1, Relaxed);
            self.left.fetch_add(bytes.len() as u64, Relaxed);
            if self.mode.load(Relaxed) != LYING {
                return Ok(bytes);
            }
            let mut wrong = bytes.to_vec();
            let middle = wrong.len() / 2;
            wrong.iter_mut().skip(middle).take(1).for_each(|byte| *byte ^= 1);
            Ok(wrong.into())
        })
    }

    fn exists(&self, key: ObjectKey) -> StoreFuture<'_, bool> {
        Box::pin(async move {
            self.pass(0).await;
            self.folder.exists(key).await
        })
    }

    fn stat(&self, key: ObjectKey) -> StoreFuture<'_, Option<ObjectEntry>> {
        Box::pin(async move {
            self.pass(0).await;
            self.folder.stat(key).await
        })
    }

    fn delete(&self, key: ObjectKey) -> StoreFuture<'_, bool> {
        Box::pin(async move {
            self.pass(0).await;
            self.folder.delete(key).await
        })
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>, limit: usize) -> StoreFuture<'a, Vec<ObjectEntry>> {
        Box::pin(async move {
            self.pass(0).await;
            self.folder.list(prefix, after, limit).await
        })
    }
}

/// Content that does not compress, as sealed chunks do not.
fn chunk(number: u64) -> anyhow::Result<(ObjectKey, Bytes)> {
    let name = ChunkName(*blake3::hash(&number.to_le_bytes()).as_bytes());
    let project = "prj-00000000-0000-7000-8000-000000000001".parse().context("an id")?;
    let len = BYTES[usize::try_from(number % 4).unwrap_or(0)];
    let mut bytes = vec![0; len];
    blake3::Hasher::new_keyed(&name.0).finalize_xof().fill(&mut bytes);
    Ok((ObjectKey::chunk(project, &name), bytes.into()))
}

/// What some operations took, in milliseconds each.
async fn timed<F: Future<Output = Result<(), StoreError>> + Send + 'static>(
    count: u64,
    mut operation: impl FnMut(u64) -> F,
) -> anyhow::Result<Vec<f64>> {
    let mut all = Vec::new();
    let mut running = tokio::task::JoinSet::new();
    for number in 0..count + AT_ONCE {
        if number >= AT_ONCE {
            all.push(running.join_next().await.context("one is running")???);
        }
        if number < count {
            let work = operation(number);
            running.spawn(async move {
                let began = Instant::now();
                work.await.map(|()| began.elapsed().as_secs_f64() * 1000.0)
            });
        }
    }
    all.sort_by(f64::total_cmp);
    Ok(all)
}

fn at(sorted: &[f64], share: f64) -> f64 {
    let index = ((sorted.len() as f64 * share) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(index).copied().unwrap_or_default()
}

async fn reads(store: &Arc<dyn ObjectStore>, seed: u64) -> anyhow::Result<Vec<f64>> {
    let mut random = SplitMix(seed);
    let chunks: Vec<_> = (0..CHUNKS).map(chunk).collect::<anyhow::Result<_>>()?;
    timed(READS, |_| {
        let at = usize::try_from(random.next_u64() % CHUNKS).unwrap_or(0);
        let ((key, bytes), store) = (chunks[at].clone(), Arc::clone(store));
        async move {
            let read = store.get(key.clone(), 1 << 20).await?;
            if read == bytes { Ok(()) } else { Err(StoreError::Damaged { key, why: "other bytes were read".into() }) }
        }
    })
    .await
}

async fn writes(store: &Arc<dyn ObjectStore>, from: u64) -> anyhow::Result<Vec<f64>> {
    let chunks: Vec<_> = (from..from + WRITES).map(chunk).collect::<anyhow::Result<_>>()?;
    timed(WRITES, |number| {
        let ((key, bytes), store) = (chunks[usize::try_from(number).unwrap_or(0)].clone(), Arc::clone(store));
        async move { store.put(key, bytes).await }
    })
    .await
}

fn over(providers: &[Arc<Provider>]) -> anyhow::Result<CloudOfClouds> {
    let members = providers.iter().enumerate();
    let members = members.map(|(i, p)| (format!("provider-{i}"), Arc::clone(p) as Arc<dyn ObjectStore>)).collect();
    Ok(CloudOfClouds::over(members, &StoreKey::from_bytes([7; 32]), ReadOrder::Fastest)?)
}

/// How many times a member's delay something takes, the slowest of three.
async fn trips(folder: &Path) -> anyhow::Result<[u64; 4]> {
    let providers: Vec<_> =
        (0..4).map(|i| Provider::open(&folder.join(format!("trips-{i}")), TRIP)).collect::<anyhow::Result<_>>()?;
    let store = over(&providers)?;
    let register: ObjectKey = "prj-00000000-0000-7000-8000-000000000001/sweep/seen".parse()?;
    let mut most = [0; 4];
    for number in 0..3 {
        let (key, bytes) = chunk(10_000 + number)?;
        let counted = |began: Instant| (began.elapsed().as_secs_f64() / TRIP.as_secs_f64() / 1.25).round() as u64;
        let began = Instant::now();
        store.put(key.clone(), bytes).await?;
        most[0] = most[0].max(counted(began));
        let began = Instant::now();
        store.get(key, 1 << 20).await?;
        most[1] = most[1].max(counted(began));
        let began = Instant::now();
        store.put(register.clone(), Bytes::from_static(b"x")).await?;
        most[2] = most[2].max(counted(began));
        store.settle().await;
        let began = Instant::now();
        store.get(register.clone(), 100).await?;
        most[3] = most[3].max(counted(began));
    }
    Ok(most)
}

/// Measures in a folder of its own.
///
/// # Errors
/// When something is read that was not written, or a store cannot be used.
pub async fn run(runs: u32) -> anyhow::Result<Vec<Row>> {
    let folder = std::env::temp_dir().join(format!("supercloud-bench-depsky-{}", std::process::id()));
    let measured = measure(&folder, runs).await;
    std::fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    measured
}

#[derive(Default)]
struct Percentiles {
    median: Sample,
    high: Sample,
}

impl Percentiles {
    fn push(&mut self, sorted: &[f64]) {
        self.median.push(at(sorted, 0.5));
        self.high.push(at(sorted, 0.99));
    }
}

async fn measure(folder: &Path, runs: u32) -> anyhow::Result<Vec<Row>> {
    let open = |name: &str, ms| Provider::open(&folder.join(name), Duration::from_millis(ms));
    let providers: Vec<_> =
        DELAYS_MS.iter().map(|ms| open(&format!("member-{ms}"), *ms)).collect::<anyhow::Result<_>>()?;
    let ours = over(&providers)?;
    let clouds: Arc<dyn ObjectStore> = Arc::new(ours.clone());
    let one = open("one", DELAYS_MS[0])?;
    let bucket: Arc<dyn ObjectStore> = Arc::clone(&one) as _;
    let mut bytes = 0;
    for number in 0..CHUNKS {
        let (key, content) = chunk(number)?;
        bytes += content.len() as u64;
        bucket.put(key.clone(), content.clone()).await?;
        clouds.put(key, content).await?;
    }
    ours.settle().await;
    let sum = |of: fn(&Provider) -> &AtomicU64| -> f64 { providers.iter().map(|p| of(p).load(Relaxed) as f64).sum() };
    let stored = sum(|p| &p.kept);

    let (mut read, mut write, mut one_read, mut one_write) =
        (Percentiles::default(), Percentiles::default(), Percentiles::default(), Percentiles::default());
    let left_before =
        (sum(|p| &p.left), sum(|p| &p.gets), one.left.load(Relaxed) as f64, one.gets.load(Relaxed) as f64);
    for run in 0..u64::from(runs) {
        read.push(&reads(&clouds, run).await?);
        one_read.push(&reads(&bucket, run).await?);
    }
    let left = (
        sum(|p| &p.left) - left_before.0,
        sum(|p| &p.gets) - left_before.1,
        one.left.load(Relaxed) as f64 - left_before.2,
        one.gets.load(Relaxed) as f64 - left_before.3,
    );
    for run in 0..u64::from(runs) {
        let from = 100_000 + run * WRITES;
        write.push(&writes(&clouds, from).await?);
        one_write.push(&writes(&bucket, from).await?);
        ours.settle().await;
    }
    // A month in which everything is kept, was put once, and is read as often as above.
    let month = |kept: f64, puts: f64, left: f64, gets: f64| {
        kept / 1e9 * KEPT + puts / 1000.0 * PUTS + left / 1e9 * LEAVES + gets / 1000.0 * GETS
    };
    let our_month = month(stored, 4.0 * CHUNKS as f64, left.0, left.1);
    let one_month = month(bytes as f64, CHUNKS as f64, left.2, left.3);

    let fast = &providers[0];
    let mut failing = Vec::new();
    for (name, mode) in [("one_stopped", STOPPED), ("one_lies", LYING)] {
        fast.mode.store(mode, Relaxed);
        let began = Instant::now();
        let (key, _) = chunk(0)?;
        clouds.get(key, 1 << 20).await?;
        let first = began.elapsed().as_secs_f64() * 1000.0;
        let mut failed = (Percentiles::default(), Percentiles::default());
        for run in 0..u64::from(runs) {
            failed.0.push(&reads(&clouds, 1000 + run).await?);
            let from = 500_000 + (u64::from(mode) * u64::from(runs) + run) * WRITES;
            failed.1.push(&writes(&clouds, from).await?);
        }
        Teller::default().say(&format!("{name}: the first read after it took {first:.0} ms; no read or write failed"));
        failing.push((name, failed));
        if mode == LYING {
            let named =
                ours.members().iter().filter(|member| member.wrong > 0).map(|m| m.name.clone()).collect::<Vec<_>>();
            ensure!(named == ["provider-0"], "the liar is not named alone: {named:?}");
        }
        fast.mode.store(WELL, Relaxed);
    }
    let trips = trips(folder).await?;

    let peer = "one bucket, the fastest";
    let mut rows = vec![
        Row::no_slower("depsky/read_ms", &read.median, &one_read.median, peer),
        Row::no_slower("depsky/read_p99_ms", &read.high, &one_read.high, peer),
        Row::no_slower("depsky/write_ms", &write.median, &one_write.median, peer),
        Some(Row::computed("depsky/stored_bytes", stored, bytes as f64, "one bucket", 2.05)),
        Some(Row::computed("depsky/month_nanousd", our_month, one_month, "one bucket", 2.05)),
    ];
    for (name, trips) in ["chunk_write", "chunk_read", "register_write", "register_read"].into_iter().zip(trips) {
        let sample: Sample = [trips as f64; 3].into_iter().collect();
        rows.push(Row::no_more(&format!("depsky/{name}/round_trips"), &sample, 2.0));
    }
    for (name, (failed_read, failed_write)) in &failing {
        let well = "all well";
        rows.push(Row::at_most(&format!("depsky/{name}/read_p99_ms"), &failed_read.high, &read.high, well, 1.5));
        rows.push(Row::at_most(&format!("depsky/{name}/write_p99_ms"), &failed_write.high, &write.high, well, 1.5));
    }
    rows.into_iter().collect::<Option<Vec<_>>>().context("too few runs")
}
