//! Serving the pages that a move has left behind: out of the machine that stands still where it came from, or out of whatever else has
//! them ([`Feed`]).

use std::{
    ops::ControlFlow,
    os::{fd::BorrowedFd, unix::net::UnixStream},
    time::{Duration, Instant},
};

use supercloud_api::frame::{Frame, FrameError};
use vm_memory::GuestMemoryBackend as _;

use super::{
    FRAMES_A_TURN, Left, PageSet, SetReader, is_token, kind,
    link::Link,
    page_range,
    push::{Push, Window},
};
use crate::vmm::{
    Ram,
    memory::PAGE_BYTES,
    travel::{TravelError, pages::Packer},
    virtio::Wakers,
};

/// Pages of a machine's memory go in frames of about so many bytes: one that is waited for stands behind no more than one of them.
const FRAME_BYTES: usize = 16 << 10;
/// So many of them go before it is heard what is wanted now.
const SENT_A_TURN: usize = 4;
/// How often it looks whether it is still wanted, and the other end not silent.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Served {
    /// Pages that were missing when the connection began.
    pub missing_pages: u64,
    /// Pages that went.
    pub sent_pages: u64,
    /// Of those, such as somebody waited for, or that were asked for with them.
    pub wanted_pages: u64,
    /// Bytes of pages.
    pub sent_bytes: u64,
}

/// Where the pages are that one connection serves, and in which order they go.
pub trait Feed {
    /// The first number that no page has.
    fn end(&self) -> u64;

    /// These are missing at the other end: said once, before anything else is asked for.
    fn begin(&mut self, missing: PageSet);

    /// Somebody waits for a page; one that went already, or was never owed, comes anyway or never.
    fn want(&mut self, page: u64);

    /// The next frame of pages that can go now, each page once. What nobody waits for goes only if it `may_run_ahead`.
    ///
    /// # Errors
    /// When pages cannot be had any more.
    fn next(&mut self, may_run_ahead: bool, served: &mut Served) -> Result<Option<Vec<u8>>, TravelError>;

    /// What becomes readable when there may be a frame that was not there before; `None`: it is always known at once.
    fn bell(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Serves what is left of a machine's memory over one connection, until the other end says that it has all. Nothing goes before the
/// other end has shown that it has read the move's stream to its end. `watch` is called often; it can cancel.
///
/// # Errors
/// [`TravelError`]; the same can then be served over another connection.
pub fn serve(
    ram: &Ram,
    left: &Left,
    socket: UnixStream,
    watch: &mut dyn FnMut(&Served) -> ControlFlow<()>,
) -> Result<Served, TravelError> {
    let feed = Memory { ram, push: Push::new(PageSet::below(0)), packer: Packer::new()? };
    serve_from(feed, left, socket, watch)
}

/// Likewise, of whatever has the pages.
///
/// # Errors
/// As there, and those of the feed.
pub fn serve_from(
    feed: impl Feed,
    left: &Left,
    socket: UnixStream,
    watch: &mut dyn FnMut(&Served) -> ControlFlow<()>,
) -> Result<Served, TravelError> {
    let link = Link::new(socket)?;
    let (served, began) = (Served::default(), Instant::now());
    let mut server = Server { feed, left, link, stage: Stage::Silent, served, began };
    loop {
        let turn = server.go_on()?;
        let is_cancelled = watch(&server.served).is_break();
        let after = match turn {
            Turn::Over => return Ok(server.served),
            _ if is_cancelled => return Err(TravelError::Cancelled),
            Turn::More => Duration::ZERO,
            Turn::Waits => LOOK_EVERY,
        };
        // Nobody listens for more while there is no room for it.
        let bell = server.feed.bell().filter(|_| server.link.has_room()).map(|bell| (bell, libc::POLLIN));
        let wakers = Wakers { events: std::iter::once(server.link.poll()).chain(bell).collect(), after: Some(after) };
        wakers.wait(std::iter::empty())?;
    }
}

/// How far the other end is.
enum Stage {
    /// It has not shown who it is.
    Silent,
    /// It tells what it misses.
    Telling(SetReader),
    /// It is served.
    Served(Box<Window>),
}

/// How a turn of it ended.
enum Turn {
    /// There is more to hear or to send.
    More,
    /// The other end has to say something, or to take what was sent.
    Waits,
    /// The other end has all.
    Over,
}

struct Server<'a, F> {
    feed: F,
    left: &'a Left,
    link: Link,
    stage: Stage,
    served: Served,
    began: Instant,
}

impl<F: Feed> Server<'_, F> {
    /// Does some of what can be done now.
    fn go_on(&mut self) -> Result<Turn, TravelError> {
        let mut turn = Turn::More;
        for _ in 0..FRAMES_A_TURN {
            let Some(frame) = self.link.next()? else {
                turn = Turn::Waits;
                break;
            };
            if self.hear(frame)? {
                self.link.say(kind::BYE, Vec::new())?;
                self.link.flush()?;
                return Ok(Turn::Over);
            }
        }
        let now = self.began.elapsed();
        if let Stage::Served(window) = &mut self.stage {
            let mut sent = 0;
            while self.link.has_room()
                && let Some(payload) = self.feed.next(window.is_open(), &mut self.served)?
            {
                window.sent(payload.len() as u64, now);
                self.served.sent_bytes += payload.len() as u64;
                self.link.say(kind::PAGES, payload)?;
                // At once: one that is waited for shall not stand behind many.
                self.link.flush()?;
                sent += 1;
                if sent == SENT_A_TURN {
                    turn = Turn::More;
                    break;
                }
            }
        }
        self.link.flush()?;
        // Whoever has all says so.
        self.link.check_silence()?;
        Ok(turn)
    }

    /// Whether all is over.
    fn hear(&mut self, frame: Frame) -> Result<bool, TravelError> {
        let Frame { kind, payload, .. } = frame;
        let bad = || TravelError::from(FrameError::UnexpectedKind(kind));
        self.stage = match (std::mem::replace(&mut self.stage, Stage::Silent), kind) {
            (Stage::Silent, kind::ASKS) if is_token(&payload, self.left.asks()) => {
                Stage::Telling(SetReader::below(self.feed.end()))
            }
            (Stage::Silent, kind::ASKS) => return Err(TravelError::Malformed("it asks for another move")),
            (Stage::Telling(mut reader), kind::LEFT) => {
                reader.take(&payload, |page| self.left.pages.contains(page))?;
                Stage::Telling(reader)
            }
            (Stage::Telling(reader), kind::READY) => {
                let missing: PageSet = reader.finish(number(&payload)?)?;
                self.served.missing_pages = missing.len();
                self.link.say(kind::SERVES, self.left.serves().as_bytes().to_vec())?;
                self.feed.begin(missing);
                Stage::Served(Box::default())
            }
            (Stage::Served(window), kind::WANT) => {
                let (wanted, rest) = payload.as_chunks::<8>();
                if wanted.is_empty() || !rest.is_empty() {
                    return Err(TravelError::Malformed("no page's number, or one that is cut off"));
                }
                for page in wanted.iter().map(|page| u64::from_le_bytes(*page)) {
                    if !self.left.pages.contains(page) {
                        return Err(TravelError::Malformed("a page is wanted that was not left"));
                    }
                    self.feed.want(page);
                }
                Stage::Served(window)
            }
            (Stage::Served(mut window), kind::GOT) => {
                window.got(number(&payload)?, self.began.elapsed())?;
                Stage::Served(window)
            }
            // Also of one that needs no more than it has: its guest was reset.
            (Stage::Telling(_) | Stage::Served(_), kind::DONE) => return Ok(true),
            _ => return Err(bad()),
        };
        Ok(false)
    }
}

fn number(payload: &[u8]) -> Result<u64, TravelError> {
    payload.try_into().map(u64::from_le_bytes).map_err(|_| TravelError::Malformed("a frame that is no number"))
}

/// The memory of a machine that stands still.
struct Memory<'a> {
    ram: &'a Ram,
    push: Push,
    packer: Packer,
}

impl Feed for Memory<'_> {
    fn end(&self) -> u64 {
        page_range(self.ram)
    }

    fn begin(&mut self, missing: PageSet) {
        self.push = Push::new(missing);
    }

    fn want(&mut self, page: u64) {
        self.push.want(page);
    }

    fn next(&mut self, may_run_ahead: bool, served: &mut Served) -> Result<Option<Vec<u8>>, TravelError> {
        let (mut payload, is_urgent) = (Vec::new(), self.push.is_urgent());
        if !is_urgent && !may_run_ahead {
            return Ok(None);
        }
        while payload.len() < FRAME_BYTES
            && let Some(page) = if is_urgent { self.push.urgent() } else { self.push.rest() }
        {
            self.packer.pack(self.ram, page, &mut payload)?;
            served.sent_pages += 1;
            served.wanted_pages += u64::from(is_urgent);
        }
        Ok(Some(payload).filter(|payload| !payload.is_empty()))
    }
}

/// The pages of a machine that were ever written: the others are zeros, here and where nothing came for them.
///
/// # Errors
/// When the system does not say.
pub fn written(ram: &Ram) -> std::io::Result<PageSet> {
    use std::{io, os::fd::AsRawFd as _};
    use vm_memory::GuestMemoryRegion as _;
    let mut set = PageSet::below(page_range(ram));
    for region in ram.iter() {
        let file = region.file_offset().ok_or_else(|| io::Error::other("memory without a file"))?;
        let (start, bytes) = (file.start(), region.len());
        let seek = |at: u64, whence| {
            let at = libc::off_t::try_from(at).map_err(io::Error::other)?;
            // SAFETY: a plain system call on a descriptor of ours; nobody reads or writes at its place.
            let found = unsafe { libc::lseek(file.file().as_raw_fd(), at, whence) };
            match u64::try_from(found) {
                Ok(found) => Ok(Some(found)),
                Err(_) => match io::Error::last_os_error() {
                    error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
                    error => Err(error),
                },
            }
        };
        let (mut at, end) = (start, start + bytes);
        while at < end
            && let Some(data) = seek(at, libc::SEEK_DATA)?.filter(|data| *data < end)
        {
            let hole = seek(data, libc::SEEK_HOLE)?.unwrap_or(end).min(end);
            let page_of = |at: u64| (region.start_addr().0 + (at - start)) / PAGE_BYTES;
            let last = page_of(hole.saturating_sub(1).max(data));
            for page in page_of(data)..=last {
                set.insert(page);
            }
            at = hole.max(data + 1);
        }
    }
    Ok(set)
}
