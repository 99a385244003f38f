//! Frozen guests that run before their memory is here, in real processes: out of blocks that this test gives, refuses or damages.

use std::{
    collections::BTreeSet,
    fmt, io,
    os::unix::fs::FileExt as _,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use supercloud_blanket::{
    BoxFuture, LazyThaw, PostCopy as _,
    migrate::Transfer,
    thaw::{FROZEN_BLOCK_BYTES, FrozenBlocks},
};
use tokio::sync::Semaphore;

use super::{guest::CHECK, *};

/// A frozen guest in a file, whose blocks come as the test lets them.
struct Store {
    file: std::fs::File,
    bytes: u64,
    /// So many blocks may be read.
    open: Semaphore,
    is_down: AtomicBool,
    damaged: Mutex<BTreeSet<u64>>,
    read: Mutex<Vec<u64>>,
}

impl fmt::Debug for Store {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Store").finish_non_exhaustive()
    }
}

const ALL: usize = 1 << 20;

impl Store {
    fn of(path: PathBuf, open: usize) -> Arc<Self> {
        let file = std::fs::File::open(path).unwrap();
        let bytes = file.metadata().unwrap().len();
        let (is_down, open) = (AtomicBool::new(false), Semaphore::new(open));
        Arc::new(Self { file, bytes, open, is_down, damaged: Mutex::default(), read: Mutex::default() })
    }

    fn content(&self, block: u64) -> Vec<u8> {
        let mut content = vec![0; usize::try_from(FROZEN_BLOCK_BYTES).unwrap()];
        let at = block * FROZEN_BLOCK_BYTES;
        let length = usize::try_from(self.bytes.saturating_sub(at).min(FROZEN_BLOCK_BYTES)).unwrap();
        self.file.read_exact_at(&mut content[..length], at).unwrap();
        content
    }

    /// Blocks of memory that are no holes.
    fn blocks(&self) -> u64 {
        (1..self.bytes / FROZEN_BLOCK_BYTES).filter(|block| !self.is_hole(*block)).count() as u64
    }
}

impl FrozenBlocks for Store {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn is_hole(&self, block: u64) -> bool {
        self.content(block).iter().all(|byte| *byte == 0)
    }

    fn read(&self, block: u64) -> BoxFuture<'_, io::Result<Vec<u8>>> {
        Box::pin(async move {
            self.open.acquire().await.unwrap().forget();
            if self.is_down.load(Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(5)).await;
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            if self.damaged.lock().unwrap().contains(&block) {
                return Err(io::ErrorKind::InvalidData.into());
            }
            self.read.lock().unwrap().push(block);
            Ok(self.content(block))
        })
    }
}

/// A host whose guests check their memory all the time, and that can do this; says so if not.
async fn host(test: &str) -> Option<Host> {
    if !runs_guests(test) {
        return None;
    }
    let host = Host::new().await;
    if let Err(why) = host.back_end.offers() {
        println!("SKIPPED: {test}: {why}");
        return None;
    }
    let mut image = Vec::new();
    let mut kernel = elf(CHECK);
    kernel.rewind().unwrap();
    kernel.read_to_end(&mut image).unwrap();
    std::fs::write(host.path("kernel"), image).unwrap();
    Some(host)
}

/// Starts a guest, lets it write, and freezes it; its format.
async fn frozen(host: &Host, file: &str) -> (GuestId, String) {
    let guest = host.started().await;
    timeout(PATIENCE, host.echoes(b'a')).await.unwrap();
    let done = host.back_end.freeze(guest, host.path(file)).unwrap().done;
    let frozen = timeout(PATIENCE, done).await.unwrap().unwrap();
    assert_eq!(frozen.bytes, std::fs::metadata(host.path(file)).unwrap().len());
    assert_eq!(host.back_end.frozen_in(host.path(file)).await.unwrap(), Some(frozen.clone()));
    assert_eq!(host.state(guest).await, None);
    (guest, frozen.format)
}

fn missing(host: &Host, guest: GuestId) -> u64 {
    *host.back_end.missing_bytes(guest).unwrap().borrow()
}

async fn thawed(host: &Host, guest: GuestId, store: &Arc<Store>, format: &str) {
    let launch = host.launch(guest, 2).await;
    // What is counted are blocks of memory: those of the state come in any case.
    store.open.add_permits(64);
    let info = host.back_end.thaw_lazily(launch, store.clone(), format.to_owned()).await.unwrap();
    store.open.forget_permits(usize::MAX);
    store.read.lock().unwrap().clear();
    assert_eq!((info.state, info.epoch), (RunState::Paused(PauseReason::Arrived), Epoch(2)));
    assert_eq!(missing(host, guest), store.blocks() * FROZEN_BLOCK_BYTES);
    assert!(host.back_end.is_lazy(guest).unwrap());
}

fn fetch(host: &Host, guest: GuestId, store: &Arc<Store>) -> Transfer<()> {
    host.back_end.fetch(guest, store.clone()).unwrap()
}

/// All is there, and as the guest left it.
async fn is_whole(host: &Host, guest: GuestId) {
    assert_eq!(missing(host, guest), 0);
    timeout(PATIENCE, host.echoes(b'z')).await.unwrap();
    let said = std::fs::read_to_string(host.path("console.log")).unwrap();
    assert!(!said.contains('!'), "a page is not as the guest left it: {said}");
    assert!(host.back_end.live_migration().unwrap().begin(guest).await.is_ok());
}

/// It was frozen somewhere in a round: it may end that one, and answer, without what lies before that place. Then it goes round all of its
/// memory before it says a word.
async fn has_ended_its_round(host: &Host) -> usize {
    let said = || std::fs::read_to_string(host.path("console.log")).unwrap().len();
    let mut before = said();
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        match said() {
            now if now == before => return now,
            now => before = now,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thawed_guest_runs_before_its_memory_is_here_and_waits_for_what_cannot_be_had() {
    let Some(mut host) = host("a_thawed_guest_runs_before_its_memory_is_here_and_waits_for_what_cannot_be_had").await
    else {
        return;
    };
    let (guest, format) = frozen(&host, "frozen").await;
    let store = Store::of(host.path("frozen"), 0);
    thawed(&host, guest, &store, &format).await;
    let all = missing(&host, guest);
    // A connection begins with a look at how it is laid out. It runs, with some of its memory.
    let fetching = tokio::spawn(fetch(&host, guest, &store).done);
    host.back_end.resume(guest, Epoch(2)).await.unwrap();
    assert_eq!(host.state(guest).await, Some(RunState::Running));
    store.open.add_permits(12);
    let mut told = host.back_end.missing_bytes(guest).unwrap();
    timeout(PATIENCE, told.wait_for(|left| *left < all)).await.unwrap().unwrap();
    assert!(missing(&host, guest) > 0);
    // What needs all of its memory says so.
    let wants = |refused: Result<(), BackendError>| {
        let said = refused.unwrap_err().to_string();
        assert!(said.contains("left behind"), "{said}");
    };
    wants(host.back_end.live_migration().unwrap().begin(guest).await.map(drop));
    wants(host.back_end.pause(guest).await);
    wants(host.back_end.freeze(guest, host.path("again")).unwrap().done.await.map(drop));
    let checkpoint = host.back_end.checkpointing().unwrap().checkpoint(guest, host.path("point")).unwrap();
    wants(checkpoint.done.await.map(drop));
    // The agent is killed, and with it who serves; the next one goes on.
    fetching.abort();
    let _ = fetching.await;
    let before = missing(&host, guest);
    host.restart().await;
    assert_eq!(host.state(guest).await, Some(RunState::Running));
    assert!(host.back_end.is_lazy(guest).unwrap());
    assert!(missing(&host, guest) > 0 && missing(&host, guest) <= before);
    // While the store is away the guest waits: it goes round all of its memory, and says nothing before it has.
    store.is_down.store(true, Ordering::SeqCst);
    store.open.add_permits(ALL);
    let away = timeout(PATIENCE, fetch(&host, guest, &store).done).await.unwrap();
    assert!(matches!(away, Err(BackendError::Failed { .. })), "{away:?}");
    let said = has_ended_its_round(&host).await;
    let before = missing(&host, guest);
    host.types(b'b').await;
    assert_eq!(std::fs::read_to_string(host.path("console.log")).unwrap().len(), said, "it has no page to go on with");
    assert_eq!((missing(&host, guest), host.state(guest).await), (before, Some(RunState::Running)));
    // It is back, but one block of what the guest wants is not what was written.
    let first = 1 + (4 << 20) / FROZEN_BLOCK_BYTES;
    let read = store.read.lock().unwrap().clone();
    let wanted = (first..first + (4 << 20) / FROZEN_BLOCK_BYTES).find(|block| !read.contains(block)).unwrap();
    store.damaged.lock().unwrap().insert(wanted);
    store.is_down.store(false, Ordering::SeqCst);
    let fetching = tokio::spawn(fetch(&host, guest, &store).done);
    let mut told = host.back_end.missing_bytes(guest).unwrap();
    timeout(PATIENCE, told.wait_for(|left| *left == FROZEN_BLOCK_BYTES)).await.unwrap().unwrap();
    let said = has_ended_its_round(&host).await;
    host.types(b'b').await;
    assert_eq!(std::fs::read_to_string(host.path("console.log")).unwrap().len(), said, "it was given something else");
    store.damaged.lock().unwrap().clear();
    timeout(PATIENCE, fetching).await.unwrap().unwrap().unwrap();
    is_whole(&host, guest).await;
    assert!(!host.back_end.is_lazy(guest).unwrap());
    // Each block once.
    let mut read = store.read.lock().unwrap().clone();
    read.retain(|block| *block > 0);
    let unique: BTreeSet<u64> = read.iter().copied().collect();
    assert_eq!(unique.len() as u64, store.blocks());
    // Nothing is missing: at once, and the store is asked for nothing.
    store.read.lock().unwrap().clear();
    timeout(PATIENCE, fetch(&host, guest, &store).done).await.unwrap().unwrap();
    assert!(store.read.lock().unwrap().is_empty());
    host.back_end.stop(guest, StopMode::Kill).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_guest_was_writing_when_it_was_frozen_comes_before_the_rest() {
    let Some(host) = host("what_the_guest_was_writing_when_it_was_frozen_comes_before_the_rest").await else { return };
    let (guest, format) = frozen(&host, "frozen").await;
    let store = Store::of(host.path("frozen"), 0);
    thawed(&host, guest, &store, &format).await;
    // It stands still: nobody wants anything.
    store.open.add_permits(ALL);
    timeout(PATIENCE, fetch(&host, guest, &store).done).await.unwrap().unwrap();
    let read = store.read.lock().unwrap().clone();
    // It goes round these, and was written to while it was copied; what lies below was written when it was loaded.
    let first = 1 + (4 << 20) / FROZEN_BLOCK_BYTES;
    let is_hot = |block: &u64| (first..first + (4 << 20) / FROZEN_BLOCK_BYTES).contains(block);
    assert!(read.iter().any(|block| *block > 0 && *block < first), "{read:?}");
    let hot = read.iter().filter(|block| is_hot(block)).count();
    // Its stack and its counter may be among them, which lie lower.
    let among_first = read[1..=hot + 2].iter().filter(|block| is_hot(block)).count();
    assert!(among_first * 10 >= hot * 9, "{read:?}");
    host.back_end.resume(guest, Epoch(2)).await.unwrap();
    is_whole(&host, guest).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_image_or_is_not_whole_leaves_nothing() {
    let Some(host) = host("what_is_no_image_or_is_not_whole_leaves_nothing").await else { return };
    let (guest, format) = frozen(&host, "frozen").await;
    let store = Store::of(host.path("frozen"), ALL);
    let thaw = async |store: &Arc<Store>, format: &str| {
        let launch = host.launch(guest, 2).await;
        host.back_end.thaw_lazily(launch, store.clone(), format.to_owned()).await.map(drop)
    };
    let refused = thaw(&store, "supercloud-kvm-stream/2").await;
    assert!(matches!(&refused, Err(BackendError::Unsupported { option, .. }) if option.contains("stream/2")));
    // The state does not come, or is another one's.
    let state = (store.bytes - 1) / FROZEN_BLOCK_BYTES;
    store.damaged.lock().unwrap().insert(state);
    assert!(thaw(&store, &format).await.is_err());
    store.damaged.lock().unwrap().clear();
    std::fs::copy(host.path("frozen"), host.path("spoilt")).unwrap();
    let spoilt = std::fs::File::options().write(true).open(host.path("spoilt")).unwrap();
    spoilt.write_all_at(b"~~~~", state * FROZEN_BLOCK_BYTES).unwrap();
    assert!(thaw(&Store::of(host.path("spoilt"), ALL), &format).await.is_err());
    spoilt.set_len(store.bytes - 1).unwrap();
    assert!(thaw(&Store::of(host.path("spoilt"), ALL), &format).await.is_err());
    assert_eq!((host.state(guest).await, host.back_end.list().await.unwrap()), (None, Vec::new()));
    // What is missing of a guest that ends is needed no more.
    thawed(&host, guest, &store, &format).await;
    host.back_end.resume(guest, Epoch(2)).await.unwrap();
    timeout(PATIENCE, host.back_end.stop(guest, StopMode::Kill)).await.unwrap().unwrap();
    assert!(matches!(host.back_end.fetch(guest, store.clone()), Err(BackendError::NoSuchGuest { .. })));
    // And all of it from the file, as ever.
    let info = host.back_end.thaw(host.launch(guest, 3).await, host.path("frozen"), format).await.unwrap();
    assert_eq!(info.state, RunState::Paused(PauseReason::Arrived));
    assert!(!host.back_end.is_lazy(guest).unwrap());
    host.back_end.resume(guest, Epoch(3)).await.unwrap();
    is_whole(&host, guest).await;
}

/// How soon a guest runs: `cargo test --workspace --test back_end -- how_soon --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn how_soon_a_thawed_guest_runs() {
    let Some(host) = host("how_soon_a_thawed_guest_runs").await else { return };
    let (guest, format) = frozen(&host, "frozen").await;
    let store = Store::of(host.path("frozen"), ALL);
    let (mut whole, mut lazy, mut fetched) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..9 {
        let began = Instant::now();
        // As an agent does: out of the store into a file, and from there.
        let launch = host.launch(guest, 2).await;
        let path = host.path("copy");
        let blocks = store.bytes.div_ceil(FROZEN_BLOCK_BYTES);
        let copy = std::fs::File::create(&path).unwrap();
        for block in (0..blocks).filter(|block| !store.is_hole(*block)) {
            copy.write_all_at(&store.read(block).await.unwrap(), block * FROZEN_BLOCK_BYTES).unwrap();
        }
        copy.set_len(store.bytes).unwrap();
        host.back_end.thaw(launch, path, format.clone()).await.unwrap();
        host.back_end.resume(guest, Epoch(2)).await.unwrap();
        whole.push(began.elapsed());
        host.back_end.stop(guest, StopMode::Kill).await.unwrap();
        let began = Instant::now();
        let launch = host.launch(guest, 2).await;
        host.back_end.thaw_lazily(launch, store.clone(), format.clone()).await.unwrap();
        let fetching = tokio::spawn(fetch(&host, guest, &store).done);
        host.back_end.resume(guest, Epoch(2)).await.unwrap();
        lazy.push(began.elapsed());
        fetching.await.unwrap().unwrap();
        fetched.push(began.elapsed());
        host.back_end.stop(guest, StopMode::Kill).await.unwrap();
    }
    for times in [&mut whole, &mut lazy, &mut fetched] {
        times.sort_unstable();
    }
    let median = |times: &[Duration]| times[times.len() / 2].as_secs_f64() * 1e3;
    println!(
        "{} blocks of memory; it runs after {:.1} ms whole, {:.1} ms lazy ({:.2}); all of it is there after {:.1} ms",
        store.blocks(),
        median(&whole),
        median(&lazy),
        median(&lazy) / median(&whole),
        median(&fetched)
    );
}
