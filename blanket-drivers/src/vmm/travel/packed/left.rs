//! Memory that a move has left behind: what either end says to the other.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::time::Duration;

use supercloud_api::frame::{Frame, read_frame_blocking};
use supercloud_blanket::vmm::travel::left::{Fetch, Left, News, PageSet, serve};
use supercloud_blanket::vmm::travel::pages::Packer;
use supercloud_blanket::vmm::{Ram, memory};
use vm_memory::{Bytes as _, GuestAddress};

const RAM_BYTES: u64 = 2 << 20;
const PAGES: u64 = RAM_BYTES / memory::PAGE_BYTES;
/// Left behind: every page of these numbers.
const LEFT: std::ops::Range<u64> = 100..140;
/// No answer takes as long.
const PATIENCE: Duration = Duration::from_secs(4);

fn ram() -> Option<Ram> {
    let ram = memory::map(memory::create(RAM_BYTES).ok()?, RAM_BYTES).ok()?;
    (0..PAGES).try_for_each(|page| ram.write_obj(page + 1, GuestAddress(page * memory::PAGE_BYTES))).ok()?;
    Some(ram)
}

fn left_behind() -> Left {
    let mut pages = PageSet::below(PAGES);
    LEFT.for_each(|page| assert!(pages.insert(page)));
    Left::new(pages, [1; 32], [2; 32])
}

/// The first byte says which end is tried; the rest is what the other one says.
pub fn left(input: &[u8]) {
    let Some((end, said)) = input.split_first() else { return };
    match end % 2 {
        0 => drop(serving(said)),
        _ => drop(fetching(said)),
    }
}

/// Nothing goes but what was left behind, each page once, and nothing to who does not show that it may have it.
fn serving(said: &[u8]) -> Option<bool> {
    let (ours, mut peer) = UnixStream::pair().ok()?;
    peer.set_nonblocking(true).ok()?;
    peer.write_all(said).ok()?;
    let outcome = serve(&ram()?, &left_behind(), ours, &mut |_| ControlFlow::Break(()));
    let mut heard = Vec::new();
    peer.set_nonblocking(false).ok()?;
    peer.set_read_timeout(Some(PATIENCE)).ok()?;
    // A peer that had more to say than was heard is reset.
    let _ = peer.read_to_end(&mut heard);
    let shows = said.windows(32).any(|token| token == left_behind().asks().as_bytes());
    assert!(heard.is_empty() || shows, "something went to who is not known");
    let (mut from, mut gone) = (heard.as_slice(), BTreeSet::new());
    while let Ok(frame) = read_frame_blocking(&mut from) {
        if frame.kind == 2 {
            let mut payload = frame.payload.as_slice();
            // Of these pages none takes more than its words: number, form, length, data.
            while let Some((head, rest)) = payload.split_first_chunk::<11>() {
                let [n0, n1, n2, n3, n4, n5, n6, n7, form, l0, l1] = *head;
                assert_eq!(form, 2, "they can be compressed");
                let page = u64::from_le_bytes([n0, n1, n2, n3, n4, n5, n6, n7]);
                assert!(LEFT.contains(&page) && gone.insert(page), "page {page}");
                payload = rest.get(usize::from(u16::from_le_bytes([l0, l1]))..)?;
            }
        }
    }
    Some(outcome.is_ok())
}

/// What was not left behind stays as it is, and what does not come is still missing; how many bytes.
fn fetching(said: &[u8]) -> Option<u64> {
    let device = File::options().read(true).write(true).open("/dev/userfaultfd").ok()?;
    let (ram, (tell, news)) = (ram()?, channel());
    let fetch = Fetch::start(&device, &ram, left_behind(), Box::new(move |what| drop(tell.send(what)))).ok()?;
    let (ours, mut peer) = UnixStream::pair().ok()?;
    peer.set_nonblocking(true).ok()?;
    peer.write_all(said).ok()?;
    peer.shutdown(Shutdown::Write).ok()?;
    fetch.connect(1, ours).ok()?;
    let mut is_whole = false;
    loop {
        match news.recv_timeout(PATIENCE) {
            Ok(News::Missing(_)) => {}
            Ok(News::Broken(1, _)) => break,
            Ok(News::Fetched(_)) => {
                is_whole = true;
                break;
            }
            other => panic!("it is not over: {other:?}"),
        }
    }
    let missing = fetch.missing_bytes();
    assert_eq!(is_whole, missing == 0);
    if !is_whole {
        fetch.forget().ok()?;
    }
    for page in (0..PAGES).filter(|page| !LEFT.contains(page)) {
        let word: u64 = ram.read_obj(GuestAddress(page * memory::PAGE_BYTES)).ok()?;
        assert_eq!(word, page + 1, "a page that was not left behind");
    }
    Some(missing)
}

fn frames(end: u8, frames: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let frames = frames.iter().map(|(kind, payload)| Frame { kind: *kind, version: 1, payload: payload.clone() });
    std::iter::once(end).chain(frames.filter_map(|frame| frame.to_bytes().ok()).flatten()).collect()
}

/// A good conversation from each end, and the begin of it.
pub fn seeds() -> Vec<Vec<u8>> {
    let left = left_behind();
    let pages = || {
        let (ram, mut packer, mut bytes) = (ram()?, Packer::new().ok()?, Vec::new());
        LEFT.into_iter().try_for_each(|page| packer.pack(&ram, page, &mut bytes)).ok()?;
        Some(bytes)
    };
    let piece = left.pages.piece(0).ok().flatten().map(|(piece, _)| piece).unwrap_or_default();
    let asks = [
        (48, left.asks().as_bytes().to_vec()),
        (8, piece),
        (49, left.pages.len().to_le_bytes().to_vec()),
        (51, [120u64, 110].into_iter().flat_map(u64::to_le_bytes).collect()),
        (52, 0u64.to_le_bytes().to_vec()),
        (53, Vec::new()),
    ];
    let serves = [(50, left.serves().as_bytes().to_vec()), (2, pages().unwrap_or_default())];
    vec![frames(0, &asks), frames(0, &asks[..5]), frames(1, &serves), frames(1, &serves[..1])]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_conversations_reach_their_ends() {
        let seeds = seeds();
        assert_eq!((serving(&seeds[0][1..]), serving(&seeds[1][1..])), (Some(true), Some(false)));
        if !std::path::Path::new("/dev/userfaultfd").exists() {
            println!("SKIPPED: no /dev/userfaultfd");
            return;
        }
        let whole = LEFT.end - LEFT.start;
        assert_eq!((fetching(&seeds[2][1..]), fetching(&seeds[3][1..])), (Some(0), Some(whole * memory::PAGE_BYTES)));
    }
}
