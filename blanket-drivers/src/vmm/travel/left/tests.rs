//! Both ends against peers that do what they must not.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    ops::ControlFlow,
    os::unix::{fs::FileExt as _, net::UnixStream},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use supercloud_api::frame::{Frame, read_frame_blocking};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};

use super::*;
use crate::vmm::{memory, travel::pages::Packer};

const BYTES: u64 = 4 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// Frames: kinds and payloads.
type Said = Vec<(u16, Vec<u8>)>;

fn ram() -> Ram {
    let ram = memory::map(memory::create(BYTES).unwrap(), BYTES).unwrap();
    for page in 0..BYTES / PAGE_BYTES {
        ram.write_obj(page + 1, GuestAddress(page * PAGE_BYTES)).unwrap();
    }
    ram
}

fn left(pages: &[u64]) -> Left {
    let mut set = PageSet::below(BYTES / PAGE_BYTES);
    pages.iter().for_each(|page| assert!(set.insert(*page)));
    Left::new(set, [7; 32], [9; 32])
}

fn fetching(ram: &Ram, left: &Left) -> Option<(Fetch, Receiver<News>)> {
    let device = match File::options().read(true).write(true).open("/dev/userfaultfd") {
        Ok(device) => device,
        Err(error) => {
            println!("SKIPPED: /dev/userfaultfd: {error}");
            return None;
        }
    };
    let (tell, news) = channel();
    let tell = Box::new(move |what| drop(tell.send(what)));
    Some((Fetch::start(&device, ram, None, left.clone(), tell).unwrap(), news))
}

fn connected(fetch: &Fetch, number: u64) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    fetch.connect(number, theirs).unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    ours
}

fn say(to: &mut UnixStream, kind: u16, payload: &[u8]) {
    let frame = Frame { kind, version: VERSION, payload: payload.to_vec() };
    // Who refuses hangs up, also in the middle.
    let _ = to.write_all(&frame.to_bytes().unwrap());
}

fn hear(from: &mut UnixStream, wanted: u16) -> Vec<u8> {
    loop {
        let frame = read_frame_blocking(from).unwrap();
        if frame.kind == wanted {
            return frame.payload;
        }
    }
}

fn packed(ram: &Ram, pages: &[u64]) -> Vec<u8> {
    let (mut packer, mut payload) = (Packer::new().unwrap(), Vec::new());
    pages.iter().for_each(|page| packer.pack(ram, *page, &mut payload).unwrap());
    payload
}

fn broken(news: &Receiver<News>) -> (u64, TravelError) {
    loop {
        match news.recv_timeout(PATIENCE).unwrap() {
            News::Broken(number, error) => return (number, error),
            News::Missing(_) => {}
            News::Spoilt(_, error) => panic!("{error}"),
            News::Fetched(_) => panic!("it was not fetched"),
        }
    }
}

#[test]
fn who_serves_and_does_what_it_must_not_is_left_and_nothing_is_lost() {
    let (there, here) = (ram(), ram());
    let left = left(&[3, 4, 5, 200]);
    let Some((fetch, news)) = fetching(&here, &left) else { return };
    let good = left.serves().as_bytes().to_vec();
    let page = |pages: &[u64]| packed(&there, pages);
    let zero = |number: u64| [&number.to_le_bytes()[..], &[0]].concat();
    let cases: Vec<(&str, Said)> = vec![
        ("another move's", vec![(kind::SERVES, left.asks().as_bytes().to_vec())]),
        ("a token that is cut off", vec![(kind::SERVES, good[..31].to_vec())]),
        ("pages before it is known", vec![(kind::PAGES, page(&[3]))]),
        ("a page that was never left", vec![(kind::SERVES, good.clone()), (kind::PAGES, page(&[6]))]),
        ("a page beyond memory", vec![(kind::SERVES, good.clone()), (kind::PAGES, zero(BYTES / PAGE_BYTES))]),
        ("a page far beyond", vec![(kind::SERVES, good.clone()), (kind::PAGES, zero(u64::MAX))]),
        (
            "a page in an unknown form",
            vec![(kind::SERVES, good.clone()), (kind::PAGES, [&4u64.to_le_bytes()[..], &[9]].concat())],
        ),
        ("a page that is cut off", vec![(kind::SERVES, good.clone()), (kind::PAGES, page(&[4])[..12].to_vec())]),
        ("no page", vec![(kind::SERVES, good.clone()), (kind::PAGES, Vec::new())]),
        ("itself twice", vec![(kind::SERVES, good.clone()), (kind::SERVES, good.clone())]),
        ("a frame of another kind", vec![(kind::SERVES, good.clone()), (kind::WANT, Vec::new())]),
        ("a frame that is too long", vec![(kind::SERVES, good.clone()), (kind::PAGES, vec![0; 1 << 20])]),
        ("nothing more", Vec::new()),
    ];
    let mut number = 0;
    for (what, frames) in cases {
        number += 1;
        let mut peer = connected(&fetch, number);
        assert_eq!(hear(&mut peer, kind::ASKS), left.asks().as_bytes());
        assert_eq!(hear(&mut peer, kind::READY), 4u64.to_le_bytes(), "{what}");
        frames.iter().for_each(|(kind, payload)| say(&mut peer, *kind, payload));
        if frames.is_empty() {
            drop(peer);
        }
        let (broken, why) = broken(&news);
        assert_eq!(broken, number, "{what}");
        if what == "another move's" || what == "a token that is cut off" {
            assert!(matches!(why, TravelError::Malformed("it serves another move")), "{what}: {why:?}");
        }
        assert_eq!(fetch.missing_bytes(), 4 * PAGE_BYTES, "{what}");
    }
    // A page that comes twice, after the guest has written it.
    let mut peer = connected(&fetch, 77);
    hear(&mut peer, kind::READY);
    say(&mut peer, kind::SERVES, &good);
    say(&mut peer, kind::PAGES, &page(&[3]));
    hear(&mut peer, kind::GOT);
    here.write_obj(0xaaaa_u64, GuestAddress(3 * PAGE_BYTES)).unwrap();
    say(&mut peer, kind::PAGES, &page(&[3]));
    assert_eq!(broken(&news).0, 77);
    assert_eq!(fetch.missing_bytes(), 3 * PAGE_BYTES);
    // Who touches what is missing waits through all of it, and gets what there is, once it comes. One who lies about
    // being another connection's server is one more that is left.
    let toucher = {
        let here = here.clone();
        std::thread::spawn(move || here.read_obj::<u64>(GuestAddress(200 * PAGE_BYTES)).unwrap())
    };
    let mut peer = connected(&fetch, 78);
    hear(&mut peer, kind::READY);
    assert!(hear(&mut peer, kind::WANT).starts_with(&200u64.to_le_bytes()));
    drop(peer);
    assert_eq!(broken(&news).0, 78);
    assert!(!toucher.is_finished());
    let (ours, theirs) = UnixStream::pair().unwrap();
    fetch.connect(79, theirs).unwrap();
    let served = serve(&there, &left, ours, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!((served.missing_pages, served.sent_pages), (3, 3));
    assert_eq!(toucher.join().unwrap(), 201);
    let fetched =
        std::iter::from_fn(|| news.recv_timeout(PATIENCE).ok()).find(|news| !matches!(news, News::Missing(_)));
    assert!(matches!(fetched, Some(News::Fetched(_))), "{fetched:?}");
    let word = |page: u64| here.read_obj::<u64>(GuestAddress(page * PAGE_BYTES)).unwrap();
    assert_eq!([3, 4, 5, 6].map(word), [0xaaaa, 5, 6, 7]);
}

#[test]
fn a_page_that_was_filled_while_it_was_missing_ends_it() {
    let (there, here) = (ram(), ram());
    let left = left(&[3, 4, 200]);
    let Some((fetch, news)) = fetching(&here, &left) else { return };
    let file = here.iter().next().unwrap().file_offset().unwrap().file();
    // Not through the mapping: nobody is asked.
    file.write_all_at(&[0; 8], 4 * PAGE_BYTES).unwrap();
    let toucher = {
        let here = here.clone();
        std::thread::spawn(move || here.read_obj::<u64>(GuestAddress(200 * PAGE_BYTES)))
    };
    let mut peer = connected(&fetch, 5);
    hear(&mut peer, kind::WANT);
    say(&mut peer, kind::SERVES, left.serves().as_bytes());
    say(&mut peer, kind::PAGES, &packed(&there, &[3, 4, 200]));
    let told = news.iter().find(|news| !matches!(news, News::Missing(_)));
    assert!(matches!(told, Some(News::Spoilt(5, TravelError::Spoilt(4)))), "{told:?}");
    assert!(news.recv().is_err(), "it is over");
    assert_ne!(fetch.missing_bytes(), 0);
    assert!(!toucher.is_finished(), "who waits gets nothing in its place");
}

#[test]
fn who_fetches_and_does_what_it_must_not_is_left() {
    let there = ram();
    let left = left(&[3, 4, 5, 200]);
    let piece = left.pages.piece(0).unwrap().unwrap().0;
    let asks = left.asks().as_bytes().to_vec();
    let ready = |count: u64| (kind::READY, count.to_le_bytes().to_vec());
    let known =
        |more: &[(u16, Vec<u8>)]| [&[(kind::ASKS, asks.clone()), (kind::LEFT, piece.clone()), ready(4)], more].concat();
    let want = |page: u64| (kind::WANT, page.to_le_bytes().to_vec());
    let mut more = PageSet::below(BYTES / PAGE_BYTES);
    more.insert(6);
    let cases: Vec<(&str, Said)> = vec![
        ("another move's", vec![(kind::ASKS, left.serves().as_bytes().to_vec())]),
        ("no token", vec![(kind::WANT, 3u64.to_le_bytes().to_vec())]),
        ("a page that was not left", vec![(kind::ASKS, asks.clone()), (kind::LEFT, more.piece(0).unwrap().unwrap().0)]),
        ("fewer than it says", vec![(kind::ASKS, asks.clone()), (kind::LEFT, piece.clone()), ready(5)]),
        ("it wants what was not left", known(&[want(6)])),
        ("it wants what is beyond memory", known(&[want(u64::MAX)])),
        ("it wants nothing", known(&[(kind::WANT, Vec::new())])),
        ("a number that is cut off", known(&[(kind::WANT, vec![3, 0, 0])])),
        ("it has more than was sent", known(&[(kind::GOT, u64::MAX.to_le_bytes().to_vec())])),
        ("it asks again", known(&[(kind::ASKS, asks.clone())])),
        ("pages", known(&[(kind::PAGES, Vec::new())])),
    ];
    let good = [known(&[want(200), want(200)]), vec![(kind::DONE, Vec::new())]].concat();
    for (what, frames) in cases.into_iter().chain([("", good)]) {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        frames.iter().for_each(|(kind, payload)| say(&mut peer, *kind, payload));
        let outcome = serve(&there, &left, ours, &mut |_| ControlFlow::Continue(()));
        assert_eq!(outcome.is_err(), !what.is_empty(), "{what}: {outcome:?}");
        if what == "another move's" {
            assert!(matches!(outcome, Err(TravelError::Malformed("it asks for another move"))), "{outcome:?}");
        }
        let mut said = Vec::new();
        let _ = peer.read_to_end(&mut said);
        let is_known = frames.len() > 3;
        assert!(is_known || said.is_empty(), "nothing goes to who is not known: {what}");
    }
    // What is cancelled ends, whatever the other end does.
    let (ours, _peer) = UnixStream::pair().unwrap();
    let cancelled = serve(&there, &left, ours, &mut |_| ControlFlow::Break(()));
    assert!(matches!(cancelled, Err(TravelError::Cancelled)), "{cancelled:?}");
    // Also amidst a flood of what may come any number of times: what stands behind it was not heard yet.
    for flood in [want(3), (kind::GOT, 0u64.to_le_bytes().to_vec())] {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        let frames = known(&[vec![flood; 200], vec![want(6)]].concat());
        let flooded: Vec<u8> = frames
            .into_iter()
            .flat_map(|(kind, payload)| Frame { kind, version: VERSION, payload }.to_bytes().unwrap())
            .collect();
        peer.write_all(&flooded).unwrap();
        let cancelled = serve(&there, &left, ours, &mut |_| ControlFlow::Break(()));
        assert!(matches!(cancelled, Err(TravelError::Cancelled)), "{cancelled:?}");
    }
}

#[test]
fn pages_that_somebody_waits_for_go_before_the_rest() {
    let there = ram();
    let all: Vec<u64> = (0..1024).collect();
    let left = left(&all);
    let (ours, mut peer) = UnixStream::pair().unwrap();
    say(&mut peer, kind::ASKS, left.asks().as_bytes());
    say(&mut peer, kind::LEFT, &left.pages.piece(0).unwrap().unwrap().0);
    say(&mut peer, kind::READY, &1024u64.to_le_bytes());
    say(&mut peer, kind::WANT, &700u64.to_le_bytes());
    let server = std::thread::spawn(move || serve(&there, &left, ours, &mut |_| ControlFlow::Continue(())));
    let first = hear(&mut peer, kind::PAGES);
    assert_eq!(first[..8], 700u64.to_le_bytes());
    let next = hear(&mut peer, kind::PAGES);
    assert_eq!(next[..8], 701u64.to_le_bytes());
    drop(peer);
    assert!(server.join().unwrap().is_err());
}
