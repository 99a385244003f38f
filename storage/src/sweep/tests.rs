//! Sweeps, writers and crashes, interleaved by seeds over a store in memory with a clock of its own.

use std::{
    collections::BTreeSet,
    sync::{Mutex, atomic::Ordering},
};

use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

use super::*;
use crate::{
    BLOCK_BYTES,
    backend::{StoreFuture, mem::MemStore},
    chunk,
    key::{DataKeys, ProjectKey},
    manifest::{self, Manifest},
};

/// The controller: what lives, who writes.
#[derive(Debug)]
struct Records {
    keys: Arc<DataKeys>,
    store: Arc<Chaos>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    roots: BTreeMap<ContentRoot, bool>,
    /// Operations that write, with the moment they began (the store's clock; the controller's differs by an offset only).
    writers: BTreeMap<u64, u64>,
    next: u64,
    history: Vec<String>,
    /// The last visit of content whose home is elsewhere.
    visits: BTreeMap<ContentRoot, u64>,
}

impl State {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// What this store must have.
    fn at_home(&self) -> Vec<ContentRoot> {
        self.roots.iter().filter(|(_, is_home)| **is_home).map(|(root, _)| *root).collect()
    }

    /// What users delete.
    fn keep(&mut self, mut keeps: impl FnMut() -> bool) {
        self.roots.retain(|_, _| keeps());
        let roots = &self.roots;
        self.visits.retain(|root, _| roots.contains_key(root));
    }
}

impl Authority for Records {
    fn live<'a>(&'a self, _: ProjectId, asked: &'a Asked) -> BoxFuture<'a, Result<Live, AuthorityError>> {
        Box::pin(async move {
            self.store.yield_some().await;
            let live = {
                let state = self.state.lock().unwrap();
                let is_known = |seen: &Mark| {
                    usize::try_from(seen.seq).ok().and_then(|seq| state.history.get(seq)) == Some(&seen.hash)
                };
                if !asked.seen.iter().all(is_known) {
                    return Err(AuthorityError::Refused("these records are older than the last sweep".into()));
                }
                let now = self.store.mem.clock_ms.load(Ordering::SeqCst);
                let oldest = state.writers.values().min();
                let seq = state.history.len() - 1;
                Live {
                    roots: state.roots.clone(),
                    oldest_writer: oldest.map(|began| Duration::from_millis(now - began)),
                    mark: Mark { seq: seq as u64, hash: state.history[seq].clone() },
                    gone: asked.holders.iter().filter(|holder| holder.starts_with("gone")).cloned().collect(),
                }
            };
            self.store.yield_some().await;
            Ok(live)
        })
    }

    fn names(
        &self,
        _: ProjectId,
        kind: ChunkKind,
        name: ChunkName,
        sealed: Option<Bytes>,
    ) -> BoxFuture<'_, Result<Option<Vec<ChunkName>>, AuthorityError>> {
        Box::pin(async move {
            self.store.yield_some().await;
            Ok(sealed.and_then(|sealed| manifest::names_of(&self.keys, kind, name, &sealed).ok()))
        })
    }
}

/// The store, in which every call takes its time, and which checks every deletion.
#[derive(Debug)]
struct Chaos {
    mem: MemStore,
    rng: Mutex<SmallRng>,
    records: Mutex<std::sync::Weak<Records>>,
}

impl Chaos {
    async fn yield_some(&self) {
        let turns = {
            let mut rng = self.rng.lock().unwrap();
            if rng.random_bool(0.1) { rng.random_range(0..60) } else { rng.random_range(0..4) }
        };
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
    }

    fn has(&self, project: ProjectId, name: &ChunkName) -> bool {
        self.mem.objects.lock().unwrap().contains_key(&ObjectKey::chunk(project, name))
    }
}

macro_rules! slowly {
    ($self:ident, $call:expr) => {
        Box::pin(async move {
            $self.yield_some().await;
            let done = $call.await;
            $self.yield_some().await;
            done
        })
    };
}

impl ObjectStore for Chaos {
    fn put(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, ()> {
        slowly!(self, self.mem.put(key, bytes))
    }
    fn put_if_absent(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, PutOutcome> {
        slowly!(self, self.mem.put_if_absent(key, bytes))
    }
    fn put_batch(&self, objects: Vec<(ObjectKey, Bytes)>) -> StoreFuture<'_, usize> {
        Box::pin(async move {
            let mut stored = 0;
            for object in objects {
                self.yield_some().await;
                stored += self.mem.put_batch(vec![object]).await?;
            }
            self.yield_some().await;
            Ok(stored)
        })
    }
    fn refresh(&self, keys: Vec<ObjectKey>) -> StoreFuture<'_, Vec<ObjectKey>> {
        slowly!(self, self.mem.refresh(keys))
    }
    fn get(&self, key: ObjectKey, cap: usize) -> StoreFuture<'_, Bytes> {
        slowly!(self, self.mem.get(key, cap))
    }
    fn exists(&self, key: ObjectKey) -> StoreFuture<'_, bool> {
        slowly!(self, self.mem.exists(key))
    }
    fn stat(&self, key: ObjectKey) -> StoreFuture<'_, Option<ObjectEntry>> {
        slowly!(self, self.mem.stat(key))
    }
    fn delete(&self, key: ObjectKey) -> StoreFuture<'_, bool> {
        Box::pin(async move {
            self.yield_some().await;
            let chunk = key.chunk_name();
            let done = self.mem.delete(key.clone()).await;
            if let Some(name) = chunk {
                let records = self.records.lock().unwrap().upgrade().unwrap();
                let live = records.state.lock().unwrap().at_home();
                for root in live {
                    assert!(!reached(&records, root).contains(&name), "{name} of the live {root} was deleted");
                }
            }
            self.yield_some().await;
            done
        })
    }
    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>, limit: usize) -> StoreFuture<'a, Vec<ObjectEntry>> {
        slowly!(self, self.mem.list(prefix, after, limit))
    }
    fn stamp_slack(&self) -> Duration {
        Duration::from_millis(1)
    }
}

/// Every chunk of a root, read at one instant; panics when a part of the manifest is missing.
fn reached(records: &Records, root: ContentRoot) -> BTreeSet<ChunkName> {
    let objects = records.store.mem.objects.lock().unwrap();
    let names = |kind, name: ChunkName| {
        let sealed = objects.get(&ObjectKey::chunk(records.keys.project(), &name));
        let sealed = sealed.unwrap_or_else(|| panic!("{name} of the live {root} is missing"));
        manifest::names_of(&records.keys, kind, name, sealed).unwrap()
    };
    let mut reached = BTreeSet::from([root.as_chunk()]);
    for leaf in names(ChunkKind::Root, root.as_chunk()) {
        reached.insert(leaf);
        reached.extend(names(ChunkKind::Leaf, leaf));
    }
    reached
}

fn records(seed: u64) -> Arc<Records> {
    let keys = Arc::new(DataKeys::derive(ProjectId::generate(), &ProjectKey::from_bytes([7; 32])));
    let rng = Mutex::new(SmallRng::seed_from_u64(seed));
    let store = Arc::new(Chaos { mem: MemStore::default(), rng, records: Mutex::default() });
    let state = Mutex::new(State { history: vec!["h0".into()], ..State::default() });
    let records = Arc::new(Records { keys, store: store.clone(), state });
    *store.records.lock().unwrap() = Arc::downgrade(&records);
    records
}

/// Writes some of sixteen possible blocks as content, and makes it live; dropped half way: a crash.
async fn write(records: &Records, blocks: Vec<u8>) {
    let project = records.keys.project();
    let writer = {
        let mut state = records.state.lock().unwrap();
        let writer = state.number();
        state.writers.insert(writer, records.store.mem.clock_ms.load(Ordering::SeqCst));
        writer
    };
    let mut manifest = Manifest::zeros(16 * BLOCK_BYTES as u64).unwrap();
    for some in blocks.chunks(3) {
        let mut objects = Vec::new();
        for block in some {
            let (name, sealed) = chunk::seal(&records.keys, ChunkKind::Data, &[*block + 1; 64]).unwrap();
            manifest.set(u32::from(*block), Some(name));
            objects.push((ObjectKey::chunk(project, &name), sealed));
        }
        put_chunks(&*records.store, project, objects).await.unwrap();
        let long = records.store.rng.lock().unwrap().random_range(0..1500);
        crash_after(long, std::future::pending::<()>()).await;
    }
    let root = manifest.store(&records.keys, &*records.store).await.unwrap();
    records.store.yield_some().await;
    {
        let mut state = records.state.lock().unwrap();
        state.writers.remove(&writer);
        state.roots.insert(root, true);
        let event = format!("h{}", state.history.len());
        state.history.push(event);
    }
    // What has just become live is whole.
    for name in reached(records, root) {
        assert!(records.store.has(project, &name), "{name} of {root} is missing at its commit");
    }
}

/// How a visit finds out what the store has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Counting {
    /// As it must be.
    CountOn,
    /// By looking only, which is not enough.
    Exists,
}

/// Content of another place is brought here, because a guest that stands on it has come; when all of it is here, here is its
/// home. No operation tells of it. Dropped half way: a crash.
async fn visit(records: &Records, blocks: Vec<u8>, counting: Counting) {
    let (keys, store, project) = (&records.keys, &*records.store, records.keys.project());
    let mut manifest = Manifest::zeros(16 * BLOCK_BYTES as u64).unwrap();
    let mut elsewhere = BTreeMap::new();
    for block in blocks {
        let (name, sealed) = chunk::seal(keys, ChunkKind::Data, &[block + 1; 64]).unwrap();
        manifest.set(block.into(), Some(name));
        elsewhere.insert(name, sealed);
    }
    let (root, _) = manifest.seal(keys).unwrap();
    let number = {
        let mut state = records.state.lock().unwrap();
        let number = state.number();
        state.roots.entry(root).or_insert(false);
        state.visits.insert(root, number);
        number
    };
    let names: Vec<ChunkName> = elsewhere.keys().copied().collect();
    loop {
        store.yield_some().await;
        manifest.store(keys, store).await.unwrap();
        let mut lacking = Vec::new();
        match counting {
            Counting::CountOn => lacking = count_on(store, project, &names).await.unwrap(),
            Counting::Exists => {
                for name in &names {
                    if !store.exists(ObjectKey::chunk(project, name)).await.unwrap() {
                        lacking.push(*name);
                    }
                }
            }
        }
        if lacking.is_empty() {
            break;
        }
        for name in lacking {
            store.put(ObjectKey::chunk(project, &name), elsewhere[&name].clone()).await.unwrap();
        }
    }
    // The word that all of it is here takes its time.
    store.yield_some().await;
    {
        let mut state = records.state.lock().unwrap();
        if state.visits.get(&root) != Some(&number) {
            return;
        }
        state.roots.insert(root, true);
    }
    for name in reached(records, root) {
        assert!(store.has(project, &name), "{name} of {root}, which was found here, is missing");
    }
}

fn options(holder: &str, grace_ms: u64) -> SweepOptions {
    SweepOptions { holder: holder.into(), grace: Duration::from_millis(grace_ms), pause: Duration::ZERO }
}

async fn sweep(records: &Records, holder: &str, grace_ms: u64) -> Result<Swept, SweepError> {
    let store: Arc<dyn ObjectStore> = records.store.clone();
    let never = CancellationToken::new();
    sweep_project(&store, records.keys.project(), records, &options(holder, grace_ms), &never).await
}

/// One interleaving; gives the chunks that were freed.
async fn interleave(seed: u64, counting: Counting) -> u64 {
    let mut rng = SmallRng::seed_from_u64(seed);
    let records = records(seed ^ 0x5eed);
    let mut freed = 0;
    let mut writers = tokio::task::JoinSet::new();
    for _ in 0..rng.random_range(6..16) {
        for _ in 0..rng.random_range(1..4) {
            let blocks: BTreeSet<u8> = (0..rng.random_range(1..8)).map(|_| rng.random_range(0..16)).collect();
            let (records, turns) = (records.clone(), rng.random_bool(0.2).then(|| rng.random_range(0..4000)));
            // Some begin when the sweep is at its deletions.
            let late = rng.random_range(0..4000);
            let is_visit = rng.random_bool(0.4);
            writers.spawn(async move {
                crash_after(late, std::future::pending::<()>()).await;
                let blocks = blocks.into_iter().collect();
                let work = async {
                    if is_visit { visit(&records, blocks, counting).await } else { write(&records, blocks).await }
                };
                match turns {
                    None => work.await,
                    Some(turns) => crash_after(turns, work).await.unwrap_or(()),
                }
            });
        }
        if rng.random_bool(0.7) {
            // What was deleted by users meanwhile.
            let mut state = records.state.lock().unwrap();
            let share = rng.random_range(0.0..1.0);
            state.keep(|| rng.random_bool(share));
        }
        if rng.random_bool(0.3) {
            // The operations of writers that died have been given up, but those of the living go on.
            freed += settle(&records, &mut writers).await;
            records.state.lock().unwrap().writers.clear();
        }
        if rng.random_bool(0.5) {
            records.store.mem.clock_ms.fetch_add(20, Ordering::SeqCst);
        }
        let swept = match rng.random_range(0..4u8) {
            0 => crash_after(rng.random_range(0..4000), sweep(&records, "a", 0)).await,
            1 => crash_after(rng.random_range(0..4000), sweep(&records, "gone-b", 3)).await,
            _ => Some(sweep(&records, "a", 0).await),
        };
        match swept {
            Some(Ok(swept)) => freed += swept.freed_chunks,
            // One that died holds it, and may come back for all that the other knows.
            Some(Err(SweepError::Held { .. })) => {}
            Some(Err(error)) => panic!("seed {seed}: {error}"),
            None => {}
        }
        records.store.mem.clock_ms.fetch_add(rng.random_range(0..20), Ordering::SeqCst);
    }
    freed += settle(&records, &mut writers).await;
    {
        let mut state = records.state.lock().unwrap();
        state.writers.clear();
        // Of what did not come whole the store may have anything.
        state.roots.retain(|_, is_home| *is_home);
    }
    records.store.mem.clock_ms.fetch_add(10, Ordering::SeqCst);
    freed += sweep(&records, "a", 0).await.unwrap().freed_chunks;
    let project = records.keys.project();
    let live: Vec<ContentRoot> = records.state.lock().unwrap().roots.keys().copied().collect();
    let needed: BTreeSet<ChunkName> = live.iter().flat_map(|root| reached(&records, *root)).collect();
    let there: BTreeSet<ChunkName> =
        records.store.mem.objects.lock().unwrap().keys().filter_map(ObjectKey::chunk_name).collect();
    assert_eq!(there, needed, "seed {seed}: what is left is what is needed");
    assert!(intent::read(&*records.store, project).await.unwrap().is_none());
    freed
}

/// Waits for the writers. A sweep that died may hold what they write: another one ends it.
async fn settle(records: &Records, writers: &mut tokio::task::JoinSet<()>) -> u64 {
    let mut freed = 0;
    while !writers.is_empty() {
        match tokio::time::timeout(Duration::from_secs(1), writers.join_next()).await {
            Ok(ended) => ended.unwrap().unwrap(),
            Err(_) => freed += sweep(records, "a", 0).await.unwrap().freed_chunks,
        }
    }
    freed
}

/// Runs `work`; drops it when it has had so many turns.
async fn crash_after<T>(turns: u32, work: impl Future<Output = T>) -> Option<T> {
    let bomb = async {
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        biased;
        done = work => Some(done),
        () = bomb => None,
    }
}

#[test]
fn no_interleaving_of_writers_sweeps_and_crashes_takes_what_is_needed() {
    let seeds = if std::env::var_os("SUPERCLOUD_SOAK").is_some() { 2000 } else { 40 };
    let mut freed = 0;
    for seed in 0..seeds {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        println!("seed {seed}");
        freed += runtime.block_on(interleave(seed, Counting::CountOn));
    }
    println!("{seeds} interleavings, {freed} chunks freed");
    assert!(freed > seeds, "the sweeps did something: {freed}");
}

#[test]
fn who_only_looks_what_is_there_loses_it_to_a_sweep() {
    let is_lost = |seed| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        std::panic::catch_unwind(|| runtime.block_on(interleave(seed, Counting::Exists))).is_err()
    };
    let lost = (0..200).find(|seed| is_lost(*seed));
    assert!(
        lost.is_some(),
        "no interleaving shows why who counts on a chunk refreshes it and then looks for an intent"
    );
}

/// A sweep that has read that content is not here, and condemned what it is made of; then a guest comes that stands on it.
#[tokio::test(start_paused = true)]
async fn what_comes_back_while_it_is_condemned_stays() {
    let records = records(5);
    write(&records, vec![1, 2, 3]).await;
    let root = *records.state.lock().unwrap().roots.first_key_value().unwrap().0;
    let project = records.keys.project();
    records.store.mem.objects.lock().unwrap().remove(&ObjectKey::chunk(project, &root.as_chunk())).unwrap();
    records.state.lock().unwrap().roots.insert(root, false);
    records.store.mem.clock_ms.fetch_add(1000, Ordering::SeqCst);
    let store: Arc<dyn ObjectStore> = records.store.clone();
    let never = CancellationToken::new();
    let options = options("a", 0);
    let begun = Sweep::begin(&*store, project, &*records, &options, &never).await.unwrap();
    // Between its mark and its deletions; the old root is read again, also before here is its home.
    visit(&records, vec![1, 2, 3], Counting::Exists).await;
    records.state.lock().unwrap().roots.insert(root, false);
    let swept = begun.run().await.unwrap();
    assert_eq!(swept.freed_chunks, 0, "{swept:?}");
    assert_eq!(reached(&records, root).len(), 5);
}

#[tokio::test(start_paused = true)]
async fn young_chunks_and_those_of_a_long_operation_stay() {
    let records = records(1);
    write(&records, vec![1, 2, 3]).await;
    records.state.lock().unwrap().roots.clear();
    let spared = sweep(&records, "a", 1_000_000).await.unwrap();
    assert_eq!((spared.freed_chunks, spared.young_chunks), (0, 5));
    records.state.lock().unwrap().writers.insert(9, 0);
    records.store.mem.clock_ms.fetch_add(1000, Ordering::SeqCst);
    assert_eq!(sweep(&records, "a", 1).await.unwrap().freed_chunks, 0);
    records.state.lock().unwrap().writers.clear();
    let swept = sweep(&records, "a", 1).await.unwrap();
    assert_eq!((swept.freed_chunks, swept.young_chunks, swept.seen_chunks), (5, 0, 5));
    assert!(swept.freed_bytes > 0);
    assert_eq!(projects(&*records.store).await.unwrap(), [records.keys.project()]);
}

#[tokio::test(start_paused = true)]
async fn records_older_than_the_last_sweep_are_not_believed() {
    let records = records(2);
    write(&records, vec![1]).await;
    sweep(&records, "a", 0).await.unwrap();
    {
        // The backup knew nothing of it; things have gone on differently since.
        let mut state = records.state.lock().unwrap();
        state.roots.clear();
        state.history = vec!["h0".into(), "other".into(), "other2".into()];
    }
    records.store.mem.clock_ms.fetch_add(1000, Ordering::SeqCst);
    let error = sweep(&records, "a", 0).await.unwrap_err();
    assert!(matches!(error, SweepError::Authority(_)), "{error}");
    assert_eq!(records.store.mem.objects.lock().unwrap().keys().filter_map(ObjectKey::chunk_name).count(), 3);
}

#[tokio::test(start_paused = true)]
async fn anothers_intent_is_left_alone_until_its_holder_is_gone() {
    let records = records(3);
    write(&records, vec![1]).await;
    let project = records.keys.project();
    let names: Vec<ChunkName> =
        records.store.mem.objects.lock().unwrap().keys().filter_map(ObjectKey::chunk_name).collect();
    let intent = |holder: &str| Intent::new(holder, &names).to_bytes();
    records.store.put(sweep_key(project, "intent"), intent("b")).await.unwrap();
    let error = sweep(&records, "a", 0).await.unwrap_err();
    assert!(matches!(&error, SweepError::Held { holder } if holder == "b"), "{error}");
    // Who writes what it names waits, and then is told by whom it is held up; others write on.
    let (name, sealed) = chunk::seal(&records.keys, ChunkKind::Data, b"new").unwrap();
    put_chunks(&*records.store, project, vec![(ObjectKey::chunk(project, &name), sealed.clone())]).await.unwrap();
    let held = put_chunks(&*records.store, project, vec![(ObjectKey::chunk(project, &names[0]), sealed)]).await;
    assert!(held.unwrap_err().to_string().contains("sweep of b"));
    records.store.put(sweep_key(project, "intent"), intent("gone-b")).await.unwrap();
    sweep(&records, "a", 0).await.unwrap();
    records.store.put(sweep_key(project, "intent"), Bytes::from_static(b"{}")).await.unwrap();
    assert!(matches!(sweep(&records, "a", 0).await.unwrap_err(), SweepError::Store(StoreError::Io { .. })));
}

#[tokio::test(start_paused = true)]
async fn nothing_goes_while_a_manifest_that_must_be_here_cannot_be_read() {
    let records = records(4);
    write(&records, vec![1, 2]).await;
    write(&records, vec![3]).await;
    let roots: Vec<ContentRoot> = records.state.lock().unwrap().roots.keys().copied().collect();
    let leaf = reached(&records, roots[0]).into_iter().find(|name| {
        let sealed = &records.store.mem.objects.lock().unwrap()[&ObjectKey::chunk(records.keys.project(), name)];
        manifest::names_of(&records.keys, ChunkKind::Leaf, *name, sealed).is_ok()
    });
    let key = ObjectKey::chunk(records.keys.project(), &leaf.unwrap());
    let sealed = records.store.mem.objects.lock().unwrap().remove(&key).unwrap();
    let other = reached(&records, roots[1]).len() as u64;
    records.state.lock().unwrap().roots.remove(&roots[1]);
    records.store.mem.clock_ms.fetch_add(1000, Ordering::SeqCst);
    let error = sweep(&records, "a", 0).await.unwrap_err();
    assert!(matches!(&error, SweepError::Manifest { root, .. } if *root == roots[0]), "{error}");
    records.store.mem.objects.lock().unwrap().insert(key, sealed);
    assert_eq!(sweep(&records, "a", 0).await.unwrap().freed_chunks, other);
    // Of what is at home elsewhere a store may have anything or nothing.
    records.state.lock().unwrap().roots.insert(ContentRoot([9; 32]), false);
    sweep(&records, "a", 0).await.unwrap();
}

/// Everything by which a sweep knows what lives, taken at one moment and brought back later.
fn backup(records: &Records) -> State {
    let state = records.state.lock().unwrap();
    State { roots: state.roots.clone(), history: state.history.clone(), next: state.next, ..State::default() }
}

/// An older copy of the records is brought back after the last sweep's mark was made: its history has the mark, and it knows
/// nothing of what came since.
#[tokio::test(start_paused = true)]
async fn what_hosts_hold_outlives_records_that_do_not_know_it() {
    let records = records(6);
    let project = records.keys.project();
    write(&records, vec![1, 2]).await;
    sweep(&records, "a", 0).await.unwrap();
    let old = backup(&records);
    write(&records, vec![3, 4, 5]).await;
    let new = *records.state.lock().unwrap().roots.keys().find(|root| !old.roots.contains_key(root)).unwrap();
    let needed = reached(&records, new);
    let held = |mark| Held { mark, roots: BTreeSet::from([new]) };
    hold(&*records.store, project, "b", &held(None)).await.unwrap();
    *records.state.lock().unwrap() = old;
    records.store.mem.clock_ms.fetch_add(1000, Ordering::SeqCst);
    // The history goes on, otherwise than before.
    write(&records, vec![6]).await;
    records.store.mem.clock_ms.fetch_add(1000, Ordering::SeqCst);
    assert_eq!(sweep(&records, "a", 0).await.unwrap().freed_chunks, 0);
    assert!(needed.iter().all(|name| records.store.has(project, name)));

    // One that was told of a place that is not in this history stops the sweep, whatever it needs.
    let mark = |seq, hash: &str| Some(Mark { seq, hash: hash.into() });
    for foreign in [mark(2, "other"), mark(900, "h900")] {
        hold(&*records.store, project, "b", &Held { mark: foreign, roots: BTreeSet::new() }).await.unwrap();
        let error = sweep(&records, "a", 0).await.unwrap_err();
        assert!(matches!(error, SweepError::Authority(_)), "{error}");
    }
    hold(&*records.store, project, "b", &held(mark(1, "h1"))).await.unwrap();
    assert_eq!(sweep(&records, "a", 0).await.unwrap().freed_chunks, 0);

    // It is no part of a manifest that must be here.
    let elsewhere = Held { mark: None, roots: BTreeSet::from([ContentRoot([7; 32])]) };
    hold(&*records.store, project, "c", &elsewhere).await.unwrap();
    sweep(&records, "a", 0).await.unwrap();
    // What cannot be read is not passed over.
    records.store.put(sweep_key(project, "held-c"), Bytes::from_static(b"{}")).await.unwrap();
    assert!(matches!(sweep(&records, "a", 0).await.unwrap_err(), SweepError::Authority(_)));
    records.store.delete(sweep_key(project, "held-c")).await.unwrap();

    // A host that was removed needs nothing; its list goes.
    hold(&*records.store, project, "gone-d", &held(None)).await.unwrap();
    hold(&*records.store, project, "b", &Held::default()).await.unwrap();
    let swept = sweep(&records, "a", 0).await.unwrap();
    assert_eq!(swept.freed_chunks, needed.len() as u64);
    assert_eq!(read_held(&*records.store, project, "gone-d").await.unwrap(), None);
    assert_eq!(read_held(&*records.store, project, "b").await.unwrap(), Some(Held::default()));
}

/// A host says what it holds between a sweep's first look and its deletions.
#[tokio::test(start_paused = true)]
async fn what_is_held_while_it_is_condemned_stays() {
    let records = records(7);
    let project = records.keys.project();
    write(&records, vec![1, 2, 3]).await;
    let root = *records.state.lock().unwrap().roots.first_key_value().unwrap().0;
    records.state.lock().unwrap().roots.clear();
    records.store.mem.clock_ms.fetch_add(1000, Ordering::SeqCst);
    let store: Arc<dyn ObjectStore> = records.store.clone();
    let (never, options) = (CancellationToken::new(), options("a", 0));
    let begun = Sweep::begin(&*store, project, &*records, &options, &never).await.unwrap();
    hold(&*store, project, "b", &Held { mark: None, roots: BTreeSet::from([root]) }).await.unwrap();
    assert_eq!(begun.run().await.unwrap().freed_chunks, 0);
    assert_eq!(reached(&records, root).len(), 5);
}
