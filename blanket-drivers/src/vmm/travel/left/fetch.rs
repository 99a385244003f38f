//! Fetching the pages that a move has left behind, while the guest runs: one thread per machine, for as long as some are missing.
//!
//! ```text
//!            +--- faults of vCPUs, devices, the kernel --> asked for, first of all
//!   thread --+--- the connection of the moment ---------> pages are put there; or it breaks: what is missing waits
//!            +--- connect(), forget() -----------------> another connection; nothing is needed any more
//! ```

use std::{
    fs::File,
    io,
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use supercloud_api::frame::FrameError;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::{FRAMES_A_TURN, Left, PageSet, faults::Faults, is_token, kind, link::Link, page_range, wants::Wants};
use crate::vmm::{
    Ram, VmmError, io_error,
    memory::PAGE_BYTES,
    travel::{TravelError, pages::Unpacker},
    virtio::{Wakers, balloon::Keep, borrow},
};

/// How often it looks whether the other end is silent, and tells how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long the other end may take to hear that nothing is missing any more.
const FAREWELL: Duration = Duration::from_secs(5);
/// Pages in one request: nobody has more to ask for at once, but after a break.
const MAX_WANTED: usize = 512;
/// Faults that are taken up before it is looked what else there is to do.
const FAULTS_A_TURN: usize = 256;

/// How it was, for who measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Figures {
    /// How many times somebody waited for a page that was missing.
    pub faults: u64,
    /// How long that took: how many took less than 2^n microseconds, and not less than half of it.
    pub stalls: [u64; 32],
    /// Bytes of pages on the wire, of all connections.
    pub received_bytes: u64,
}

/// What is told.
#[derive(Debug)]
pub enum News {
    /// So many bytes are missing still.
    Missing(u64),
    /// The connection of this number broke; another one is needed.
    Broken(u64, TravelError),
    /// What came on the connection of this number was there already, which it must not be: somebody else has filled the hole, and what
    /// the guest sees there is wrong. It must not go on, and nothing more is fetched.
    Spoilt(u64, TravelError),
    /// Nothing is missing any more.
    Fetched(Box<Figures>),
}

/// Who hears of it.
pub type Tell = Box<dyn FnMut(News) + Send>;

#[derive(Default)]
struct Asked {
    stream: Option<(u64, UnixStream)>,
    is_forgotten: bool,
}

struct Shared {
    asked: Mutex<Asked>,
    bell: EventFd,
    missing: AtomicU64,
}

/// The thread that fetches. It lives until nothing is missing any more, or the process ends: dropping this is no end of it.
pub struct Fetch(Arc<Shared>);

impl std::fmt::Debug for Fetch {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_tuple("Fetch").field(&self.missing_bytes()).finish()
    }
}

impl Fetch {
    /// Takes what is missing out of the memory of a machine that stands still, and has who touches it wait from now on. `keep` is
    /// [`crate::vmm::Machine::keep_memory`] of it: until nothing is missing, nobody else takes anything out.
    ///
    /// # Errors
    /// When `device`, which is `/dev/userfaultfd`, does not give what is needed; then the machine is of no use.
    pub fn start(device: &File, ram: &Ram, keep: Option<Keep>, left: Left, tell: Tell) -> Result<Self, VmmError> {
        let what = "fetching memory that was left behind";
        let bell = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(io_error(what))?;
        let unpacker = Unpacker::new().map_err(io_error(what))?;
        let faults = Faults::begin(device, ram, &left.pages).map_err(io_error(what))?;
        let missing = AtomicU64::new(left.pages.len().saturating_mul(PAGE_BYTES));
        let shared = Arc::new(Shared { asked: Mutex::default(), bell, missing });
        let (wants, missing) = (Wants::new(page_range(ram)), left.pages.clone());
        let held = Held { faults, wants, missing, figures: Figures::default(), began: Instant::now() };
        let pages = Pages { ram: ram.clone(), unpacker, held };
        let work =
            Work { shared: Arc::clone(&shared), keep, left, pages, talk: None, number: 0, has_failed: false, tell };
        std::thread::Builder::new().name("fetch".to_owned()).spawn(move || work.live()).map_err(io_error(what))?;
        Ok(Self(shared))
    }

    /// Fetches over this connection, which has this number, in place of the one before, of which nothing more is told.
    ///
    /// # Errors
    /// When the thread cannot be told.
    pub fn connect(&self, number: u64, stream: UnixStream) -> io::Result<()> {
        self.0.asked.lock().unwrap_or_else(PoisonError::into_inner).stream = Some((number, stream));
        self.0.bell.write(1)
    }

    /// Nobody will touch this memory any more: nothing of it is needed.
    ///
    /// # Errors
    /// When the thread cannot be told.
    pub fn forget(&self) -> io::Result<()> {
        self.0.asked.lock().unwrap_or_else(PoisonError::into_inner).is_forgotten = true;
        self.0.bell.write(1)
    }

    /// Bytes that are missing.
    #[must_use]
    pub fn missing_bytes(&self) -> u64 {
        self.0.missing.load(Ordering::Acquire)
    }
}

/// What is missing of memory, and who waits for it.
struct Held {
    faults: Faults,
    wants: Wants,
    missing: PageSet,
    figures: Figures,
    began: Instant,
}

struct Pages {
    ram: Ram,
    unpacker: Unpacker,
    held: Held,
}

/// The connection of the moment.
struct Talk {
    link: Link,
    /// The next piece of what is missing that is to be told; `None`: all were.
    piece: Option<u32>,
    /// The other end has shown that it is who serves this move.
    is_known: bool,
    /// What was missing when it began and has not come on it.
    due: PageSet,
    /// To be asked for.
    wanted: Vec<u64>,
    /// Bytes of pages that came, and of those how many the other end was told of.
    got: u64,
    told: u64,
}

struct Work {
    shared: Arc<Shared>,
    keep: Option<Keep>,
    left: Left,
    pages: Pages,
    talk: Option<Talk>,
    /// That of the newest connection.
    number: u64,
    /// A page could not be put there: not too soon again.
    has_failed: bool,
    tell: Tell,
}

impl Work {
    fn live(mut self) {
        let mut told = (Instant::now(), self.pages.held.missing.len());
        loop {
            let _ = self.shared.bell.read();
            let asked = std::mem::take(&mut *self.shared.asked.lock().unwrap_or_else(PoisonError::into_inner));
            if let Some((number, stream)) = asked.stream {
                self.number = number;
                self.connect(stream);
            }
            if asked.is_forgotten {
                self.pages.held.missing.clear();
            }
            let heard = self.pages.held.hear(self.talk.as_mut());
            self.has_failed = heard.is_err();
            let talked = heard.and_then(|()| match &mut self.talk {
                Some(talk) => talk.go_on(&self.left, &mut self.pages),
                None => Ok(false),
            });
            let missing = self.pages.held.missing.len();
            self.shared.missing.store(missing.saturating_mul(PAGE_BYTES), Ordering::Release);
            if missing == 0 {
                return self.finish();
            }
            let is_more = *talked.as_ref().unwrap_or(&false);
            if let Err(error) = talked {
                self.talk = None;
                if matches!(error, TravelError::Spoilt(_)) {
                    // Who waits for what is missing waits on.
                    return (self.tell)(News::Spoilt(self.number, error));
                }
                (self.tell)(News::Broken(self.number, error));
            }
            if told.0.elapsed() >= LOOK_EVERY && told.1 != missing {
                told = (Instant::now(), missing);
                (self.tell)(News::Missing(missing.saturating_mul(PAGE_BYTES)));
            }
            self.wait(is_more);
        }
    }

    fn connect(&mut self, stream: UnixStream) {
        self.talk = None;
        match Talk::new(stream, &self.left, &mut self.pages.held) {
            Ok(talk) => self.talk = Some(talk),
            Err(error) => (self.tell)(News::Broken(self.number, error)),
        }
    }

    /// Until there is something to do; what was read and not heard is polled for by nobody.
    fn wait(&self, is_more: bool) {
        let is_busy = self.talk.is_some() || self.has_failed;
        let after = if is_more { Some(Duration::ZERO) } else { is_busy.then_some(LOOK_EVERY) };
        let mut wakers = Wakers { events: Vec::new(), after };
        if self.pages.held.wants.has_room() && !self.has_failed {
            wakers.events.push((self.pages.held.faults.as_fd(), libc::POLLIN));
        }
        wakers.events.extend(self.talk.iter().map(|talk| talk.link.poll()));
        // A poll that fails is one that ends at once: it is tried again.
        let _ = wakers.wait(std::iter::once(borrow(&self.shared.bell)));
    }

    /// Nothing is missing: who waits for zeros goes on, and the other end hears of it.
    fn finish(mut self) {
        let Held { faults, figures, .. } = self.pages.held;
        if let Err(error) = faults.end() {
            // Who waits for zeros of memory that was never written waits on, and nobody else can give them.
            return (self.tell)(News::Broken(self.number, error.into()));
        }
        if let Some(keep) = self.keep {
            keep.release();
        }
        // Before anybody is told: who carries the connection may let it go then.
        if let Some(mut talk) = self.talk {
            talk.take_leave();
        }
        (self.tell)(News::Fetched(Box::new(figures)));
    }
}

impl Held {
    /// Takes up who waits for pages; each is put there at once, or asked for.
    fn hear(&mut self, mut talk: Option<&mut Talk>) -> Result<(), TravelError> {
        for _ in 0..FAULTS_A_TURN {
            if !self.wants.has_room() {
                break;
            }
            let Some(page) = self.faults.next()? else { break };
            if !self.missing.contains(page) {
                // Never written where it comes from, or there by now.
                if let Err(error) = self.faults.put_zeros(page) {
                    self.faults.again(page)?;
                    if error.kind() != io::ErrorKind::AlreadyExists {
                        return Err(error.into());
                    }
                }
                continue;
            }
            self.figures.faults += 1;
            let wanted = self.wants.fault(page, &self.missing, self.began.elapsed());
            if let Some(talk) = &mut talk {
                talk.wanted.extend(wanted);
            }
        }
        Ok(())
    }

    fn put(&mut self, page: u64, content: &[u8]) -> Result<(), TravelError> {
        let is_zero = content.iter().all(|byte| *byte == 0);
        let put = if is_zero { self.faults.put_zeros(page) } else { self.faults.put(page, content) };
        put.map_err(|error| match error.kind() {
            // It was taken out, and nobody but this puts it back: the guest has something else in its place.
            io::ErrorKind::AlreadyExists => TravelError::Spoilt(page),
            _ => error.into(),
        })?;
        self.missing.remove(page);
        if let Some(since) = self.wants.came(page) {
            let stall = self.began.elapsed().saturating_sub(since).as_micros();
            let place = (u128::BITS - stall.leading_zeros()) as usize;
            if let Some(count) = self.figures.stalls.get_mut(place.min(31)) {
                *count += 1;
            }
        }
        Ok(())
    }
}

impl Pages {
    /// Takes a frame of pages that are due on a connection.
    fn take(&mut self, payload: &[u8], due: &mut PageSet) -> Result<(), TravelError> {
        let Self { ram, unpacker, held } = self;
        held.figures.received_bytes += payload.len() as u64;
        unpacker.each(ram, payload, false, |GuestAddress(at), content| {
            let page = at / PAGE_BYTES;
            if !due.remove(page) {
                return Err(TravelError::Malformed("a page that was not missing, or that came already"));
            }
            held.put(page, content)
        })
    }
}

impl Talk {
    fn new(stream: UnixStream, left: &Left, held: &mut Held) -> Result<Self, TravelError> {
        let mut link = Link::new(stream)?;
        link.say(kind::ASKS, left.asks().as_bytes().to_vec())?;
        let (due, wanted) = (held.missing.clone(), held.wants.reconnected());
        Ok(Self { link, piece: Some(0), is_known: false, due, wanted, got: 0, told: 0 })
    }

    /// Says and hears what there is; whether there may be more.
    fn go_on(&mut self, left: &Left, pages: &mut Pages) -> Result<bool, TravelError> {
        let mut is_more = true;
        for _ in 0..FRAMES_A_TURN {
            let Some(frame) = self.link.next()? else {
                is_more = false;
                break;
            };
            match (frame.kind, self.is_known) {
                (kind::SERVES, false) if is_token(&frame.payload, left.serves()) => self.is_known = true,
                (kind::SERVES, false) => return Err(TravelError::Malformed("it serves another move")),
                (kind::PAGES, true) if frame.payload.is_empty() => return Err(TravelError::Malformed("no page in it")),
                (kind::PAGES, true) => {
                    pages.take(&frame.payload, &mut self.due)?;
                    self.got += frame.payload.len() as u64;
                    // Those who wait are looked after between two frames, too.
                    pages.held.hear(Some(self))?;
                    if !self.wanted.is_empty() {
                        self.say()?;
                        self.link.flush()?;
                    }
                }
                (other, _) => return Err(FrameError::UnexpectedKind(other).into()),
            }
        }
        self.say()?;
        self.link.flush()?;
        self.link.check_silence()?;
        Ok(is_more)
    }

    fn say(&mut self) -> Result<(), TravelError> {
        while let (Some(piece), true) = (self.piece, self.link.has_room()) {
            // What came meanwhile came on this connection: nothing, before all pieces have gone.
            match self.due.piece(piece)? {
                Some((frame, next)) => {
                    self.link.say(kind::LEFT, frame)?;
                    self.piece = Some(next);
                }
                None => {
                    self.link.say(kind::READY, self.due.len().to_le_bytes().to_vec())?;
                    self.link.is_its_turn();
                    self.piece = None;
                }
            }
        }
        while self.piece.is_none() && !self.wanted.is_empty() && self.link.has_room() {
            let some: Vec<u64> = self.wanted.drain(..self.wanted.len().min(MAX_WANTED)).collect();
            let due = some.into_iter().filter(|page| self.due.contains(*page));
            let payload: Vec<u8> = due.flat_map(u64::to_le_bytes).collect();
            if !payload.is_empty() {
                self.link.say(kind::WANT, payload)?;
            }
        }
        if self.got > self.told && self.link.has_room() {
            self.link.say(kind::GOT, self.got.to_le_bytes().to_vec())?;
            self.told = self.got;
        }
        Ok(())
    }

    /// Says that nothing is missing any more, and waits a moment for that to be heard: for nothing that matters here.
    fn take_leave(&mut self) {
        let until = Instant::now() + FAREWELL;
        let mut is_said = false;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            if !is_said && self.link.has_room() {
                is_said = self.link.say(kind::DONE, Vec::new()).is_ok();
            }
            let heard = self.link.flush().and_then(|()| self.link.next());
            match heard {
                // What is on its way still is of no use.
                Ok(Some(frame)) if frame.kind != kind::BYE => {}
                Ok(None) => {
                    let wakers = Wakers { events: vec![self.link.poll()], after: Some(left) };
                    if wakers.wait(std::iter::empty()).is_err() {
                        return;
                    }
                }
                Ok(Some(_)) | Err(_) => return,
            }
        }
    }
}
