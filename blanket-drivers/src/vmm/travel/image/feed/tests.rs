//! A machine's memory out of an image, to a real destination: userfaultfd and all.

use std::{
    fs::File,
    io::Read as _,
    ops::ControlFlow,
    os::{fd::AsFd as _, unix::net::UnixStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, channel},
    },
};

use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::vmm::{
    MachineConfig, Ram, memory,
    travel::{
        left::{Fetch, Left, News, serve_from},
        pages::Unpacker,
    },
};

const CONFIG: MachineConfig = MachineConfig { vcpus: 1, memory_bytes: 4 << 20 };
const PAGES: u64 = CONFIG.memory_bytes / PAGE_BYTES;
const BLOCKS: u64 = CONFIG.memory_bytes / BLOCK_BYTES;

/// Blocks in memory; each page begins with its number and one.
struct Store {
    asked: Mutex<Vec<u64>>,
    is_down: AtomicBool,
    /// A block that is never what was written.
    damaged: AtomicU64,
}

impl Store {
    fn new() -> Arc<Self> {
        Arc::new(Self { asked: Mutex::default(), is_down: AtomicBool::new(false), damaged: AtomicU64::new(u64::MAX) })
    }

    fn content(block: u64) -> Vec<u8> {
        let page = |page: u64| {
            let mut bytes = vec![0; 4096];
            bytes[..8].copy_from_slice(&(page + 1).to_le_bytes());
            bytes
        };
        let first = (block - 1) * 16;
        (first..first + 16).flat_map(page).collect()
    }
}

/// Brings them at once, or when it is looked for them.
struct Shelf {
    store: Arc<Store>,
    on_way: VecDeque<u64>,
    bell: UnixStream,
    _other: UnixStream,
}

fn shelf(store: &Arc<Store>) -> Shelf {
    let (bell, other) = UnixStream::pair().unwrap();
    Shelf { store: Arc::clone(store), on_way: VecDeque::new(), bell, _other: other }
}

impl Blocks for Shelf {
    fn bring(&mut self, block: u64) {
        self.store.asked.lock().unwrap().push(block);
        self.on_way.push_back(block);
    }

    fn come(&mut self) -> Option<(u64, Option<Vec<u8>>)> {
        let block = self.on_way.pop_front()?;
        let is_had = !self.store.is_down.load(Ordering::SeqCst) && self.store.damaged.load(Ordering::SeqCst) != block;
        Some((block, is_had.then(|| Store::content(block))))
    }

    fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

fn lay(hot: &[u64]) -> Lay {
    let mut set = PageSet::below(BLOCKS);
    hot.iter().for_each(|block| assert!(set.insert(*block)));
    let head = format!(
        "{{\"version\":1,\"vcpus\":1,\"memory_bytes\":{},\"state_version\":1,\"state_bytes\":10}}",
        CONFIG.memory_bytes
    );
    let mut first = [&b"supercloud-image"[..], head.as_bytes()].concat();
    first.extend(super::super::hot::record(&set, BLOCKS, first.len()));
    first.resize(usize::try_from(BLOCK_BYTES).unwrap(), 0);
    Lay::read(&first, BLOCK_BYTES * (BLOCKS + 1) + 10).unwrap()
}

fn all() -> PageSet {
    let mut set = PageSet::below(PAGES);
    (0..PAGES).for_each(|page| assert!(set.insert(page)));
    set
}

/// All frames, as they would go; each page's number, in that order.
fn order(feed: &mut ImageFeed<Shelf>, most: usize) -> Vec<u64> {
    let (mut served, mut pages, mut unpacker) = (Served::default(), Vec::new(), Unpacker::new().unwrap());
    let ram = memory::map(memory::create(CONFIG.memory_bytes).unwrap(), CONFIG.memory_bytes).unwrap();
    while pages.len() < most {
        let Some(frame) = feed.next(true, &mut served).unwrap() else {
            match feed.on_way.is_empty() {
                true => break,
                // What was asked for comes when it is looked again.
                false => continue,
            }
        };
        unpacker
            .each(&ram, &frame, false, |at, content| {
                let page = at.0 / PAGE_BYTES;
                assert_eq!(content[..8], (page + 1).to_le_bytes());
                pages.push(page);
                Ok(())
            })
            .unwrap();
    }
    assert_eq!(served.sent_pages, pages.len() as u64);
    pages
}

#[test]
fn what_is_waited_for_goes_first_then_what_is_hot_then_the_rest() {
    let store = Store::new();
    let mut feed = ImageFeed::new(&lay(&[40, 7]), shelf(&store));
    feed.begin(all());
    feed.want(20 * 16 + 5);
    let pages = order(&mut feed, usize::MAX);
    assert_eq!(pages.len() as u64, PAGES);
    assert_eq!(pages[0], 20 * 16 + 5);
    let asked = store.asked.lock().unwrap().clone();
    // Blocks of the image: one more. Beside what is waited for, what is hot; then from behind that on, and round.
    assert_eq!(asked[..5], [21, 8, 41, 22, 23]);
    assert_eq!(asked.last(), Some(&20));
    // Without a record: from the beginning.
    let store = Store::new();
    let mut feed = ImageFeed::new(&lay(&[]), shelf(&store));
    feed.begin(all());
    assert_eq!(order(&mut feed, usize::MAX), (0..PAGES).collect::<Vec<_>>());
    assert!(feed.next(true, &mut Served::default()).unwrap().is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn each_page_that_is_missing_goes_once_whatever_is_wanted(
        missing in proptest::collection::btree_set(0..PAGES, 1..300), hot in proptest::collection::btree_set(0..BLOCKS, 0..20),
        wants in proptest::collection::vec((0..PAGES, 0usize..40), 0..30),
    ) {
        let store = Store::new();
        let mut feed = ImageFeed::new(&lay(&hot.into_iter().collect::<Vec<_>>()), shelf(&store));
        let mut set = PageSet::below(PAGES);
        missing.iter().for_each(|page| assert!(set.insert(*page)));
        feed.begin(set);
        let mut sent = Vec::new();
        for (page, then) in wants {
            feed.want(page);
            sent.extend(order(&mut feed, then));
        }
        sent.extend(order(&mut feed, usize::MAX));
        sent.sort_unstable();
        prop_assert_eq!(sent, missing.into_iter().collect::<Vec<_>>());
    }
}

/// Fetches into this memory; serves from the store until it is over, over one connection.
struct Place {
    ram: Ram,
    fetch: Fetch,
    news: Receiver<News>,
    left: Left,
}

fn place(test: &str) -> Option<Place> {
    let device = match File::options().read(true).write(true).open("/dev/userfaultfd") {
        Ok(device) => device,
        Err(error) => {
            println!("SKIPPED: {test}: /dev/userfaultfd: {error}");
            return None;
        }
    };
    let ram = memory::map(memory::create(CONFIG.memory_bytes).unwrap(), CONFIG.memory_bytes).unwrap();
    let left = Left::new(all(), [7; 32], [9; 32]);
    let (tell, news) = channel();
    let tell = Box::new(move |what| drop(tell.send(what)));
    let fetch = Fetch::start(&device, &ram, None, left.clone(), tell).unwrap();
    Some(Place { ram, fetch, news, left })
}

impl Place {
    fn serve(
        &self,
        number: u64,
        store: &Arc<Store>,
        is_over: &Arc<AtomicBool>,
    ) -> std::thread::JoinHandle<Result<Served, TravelError>> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.fetch.connect(number, theirs).unwrap();
        let (left, feed, is_over) = (self.left.clone(), ImageFeed::new(&lay(&[3]), shelf(store)), Arc::clone(is_over));
        std::thread::spawn(move || {
            let mut watch = |_: &Served| match is_over.load(Ordering::SeqCst) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            };
            serve_from(feed, &left, ours, &mut watch)
        })
    }

    fn word(&self, page: u64) -> u64 {
        self.ram.read_obj(GuestAddress(page * PAGE_BYTES)).unwrap()
    }
}

#[test]
fn a_store_that_is_away_or_lies_stalls_who_wants_something_and_all_is_right_in_the_end() {
    let Some(it) = place("a_store_that_is_away_or_lies_stalls_who_wants_something_and_all_is_right_in_the_end") else {
        return;
    };
    let (store, never) = (Store::new(), Arc::new(AtomicBool::new(false)));
    store.is_down.store(true, Ordering::SeqCst);
    let serving = it.serve(1, &store, &never);
    let toucher = {
        let ram = it.ram.clone();
        std::thread::spawn(move || ram.read_obj::<u64>(GuestAddress(600 * PAGE_BYTES)).unwrap())
    };
    while store.asked.lock().unwrap().len() < 4 {
        std::thread::yield_now();
    }
    assert!(!toucher.is_finished());
    assert_eq!(it.fetch.missing_bytes(), CONFIG.memory_bytes);
    // It is back, but for one block, which is damaged: everything else comes, and who wants that one waits.
    store.damaged.store(600 / 16 + 1, Ordering::SeqCst);
    store.is_down.store(false, Ordering::SeqCst);
    while it.fetch.missing_bytes() > BLOCK_BYTES {
        std::thread::yield_now();
    }
    assert!(!toucher.is_finished(), "nothing in its place");
    let asked = store.asked.lock().unwrap().len();
    while store.asked.lock().unwrap().len() < asked + 2 {
        std::thread::yield_now();
    }
    assert!(!toucher.is_finished(), "it was tried again, and is as damaged");
    store.damaged.store(u64::MAX, Ordering::SeqCst);
    assert_eq!(toucher.join().unwrap(), 601);
    let served = serving.join().unwrap().unwrap();
    assert_eq!(served.sent_pages, PAGES);
    assert!(served.wanted_pages >= 1);
    assert!(it.news.iter().any(|news| matches!(news, News::Fetched(_))));
    assert!((0..PAGES).all(|page| it.word(page) == page + 1));
}

#[test]
fn who_serves_can_be_another_one_at_any_time() {
    let Some(it) = place("who_serves_can_be_another_one_at_any_time") else { return };
    let store = Store::new();
    for number in 1..4 {
        let (over, before) = (Arc::new(AtomicBool::new(false)), it.fetch.missing_bytes());
        let serving = it.serve(number, &store, &over);
        while it.fetch.missing_bytes() == before {
            std::thread::yield_now();
        }
        over.store(true, Ordering::SeqCst);
        let _ = serving.join().unwrap();
    }
    // One that serves something else is left before anything comes.
    let missing = it.fetch.missing_bytes();
    if missing > 0 {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        it.fetch.connect(9, theirs).unwrap();
        ours.read_exact(&mut [0; 8]).unwrap();
        drop(ours);
        let serving = it.serve(10, &store, &Arc::new(AtomicBool::new(false)));
        serving.join().unwrap().unwrap();
    }
    assert!(it.news.iter().any(|news| matches!(news, News::Fetched(_))));
    assert!((0..PAGES).all(|page| it.word(page) == page + 1));
}
