//! A disk that a volume process serves: the transmission phase of NBD on a unix socket.
//!
//! Bytes go between socket and guest memory without being kept in between. A link that breaks costs the guest time and
//! nothing else: requests wait, and are done again on the next link, which somebody else brings ([`NbdLink::replace`]). That
//! is right because nothing of them was answered, and a server ends all that a client asked for before it serves the next
//! one. What a server cannot do now (its disk is full, a block is away) is asked for again every second.
//!
//! A mirror's cut of the disk is a request of a type of our own, [`CMD_CUT`], with the cut's number for an offset and no data.

mod cut;
pub mod handshake;
mod reader;

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    io::{self, Read as _, Write as _},
    net::Shutdown,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use vm_memory::{GuestAddress, GuestMemoryBackend as _, ReadVolatile as _, VolatileMemoryError, WriteVolatile as _};
use vmm_sys_util::eventfd::EventFd;

use super::{
    Segment, Wakers,
    block::{BlockBackend, BlockOperation, Completion, Empties, RequestId},
};
use crate::vmm::Ram;
use cut::{Cuts, Sent};

pub use cut::CMD_CUT;
pub use reader::NbdReader;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const REQUEST_BYTES: usize = 28;
const REPLY_BYTES: usize = 16;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_FLUSH: u16 = 3;
const CMD_TRIM: u16 = 4;
const CMD_WRITE_ZEROES: u16 = 6;
/// Zeros shall take space as if they were written.
const FLAG_NO_HOLE: u16 = 1 << 1;
/// Error numbers of the protocol of which another try helps nobody: EPERM, EINVAL, EOVERFLOW, ENOTSUP.
const FINAL_ERRORS: [u32; 4] = [1, 22, 75, 95];

/// The pause before a request that failed is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// How long a device that is stopped waits for what is in flight; part of a guest's pause when it moves.
const DRAIN_BUDGET: Duration = Duration::from_secs(1);

/// What happens to a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkNews {
    /// It broke, or was given up: requests wait for another.
    Lost,
    /// The server answers with an error; the request is tried again.
    Refused {
        /// The protocol's error number.
        error: u32,
    },
    /// Requests are answered again.
    Answers,
}

/// Who hears of it.
type Tell = Box<dyn Fn(LinkNews) + Send + Sync>;

struct Shared {
    bytes: u64,
    empties: Empties,
    /// The link that is to be used next.
    next: Mutex<Option<UnixStream>>,
    /// Rings when there is one.
    bell: EventFd,
    tell: Tell,
}

impl Shared {
    fn next(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The way to a disk's server, for one device after the other.
#[derive(Clone)]
pub struct NbdLink(Arc<Shared>);

impl fmt::Debug for NbdLink {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("NbdLink").field("bytes", &self.0.bytes).finish_non_exhaustive()
    }
}

impl NbdLink {
    /// Shakes hands with the server at the other end. Blocking, ten seconds at most for each answer.
    ///
    /// # Errors
    /// When it does not serve a disk.
    pub fn new(stream: UnixStream, tell: Tell) -> io::Result<Self> {
        let export = handshake::negotiate(&stream)?;
        let (bytes, empties) = (export.bytes, export.empties());
        stream.set_nonblocking(true)?;
        let bell = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self(Arc::new(Shared { bytes, empties, next: Mutex::new(Some(stream)), bell, tell })))
    }

    /// Another link to the same disk, in place of the one before. Blocking likewise.
    ///
    /// # Errors
    /// When the server does not serve a disk of the same size, or cannot do what the first one could.
    pub fn replace(&self, stream: UnixStream) -> io::Result<()> {
        let export = handshake::negotiate(&stream)?;
        let (bytes, empties, ours) = (export.bytes, export.empties(), self.0.empties);
        let detail = if bytes != self.0.bytes {
            format!("that disk has {bytes} bytes, this one {}", self.0.bytes)
        } else if (ours.discards && !empties.discards) || (ours.zeroes && !empties.zeroes) {
            // The guest was told that it can.
            "of that disk no parts can be emptied, of this one they can".to_owned()
        } else {
            String::new()
        };
        if !detail.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, detail));
        }
        stream.set_nonblocking(true)?;
        *self.0.next() = Some(stream);
        self.0.bell.write(1)
    }

    /// Reads it, while there is no device.
    #[must_use]
    pub fn reader(&self) -> NbdReader {
        NbdReader(Arc::clone(&self.0))
    }

    /// A disk of it, for a new device. There is one at a time: the one before is gone.
    #[must_use]
    pub fn disk(&self) -> NbdDisk {
        NbdDisk {
            shared: Arc::clone(&self.0),
            socket: None,
            ram: None,
            pending: BTreeMap::new(),
            emptied: BTreeMap::new(),
            waiting: VecDeque::new(),
            sending: None,
            receiving: Receiving::default(),
            done: VecDeque::new(),
            refused_until: None,
            is_refused: false,
            cuts: Cuts::default(),
            is_still: false,
        }
    }
}

/// A request on its way to the server.
struct Sending {
    id: RequestId,
    header: [u8; REQUEST_BYTES],
    header_sent: usize,
    data: Place,
}

/// How far into a list of segments it is.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    segment: usize,
    bytes: u32,
}

impl Place {
    /// What comes next: where, and how much at once.
    fn next(self, segments: &[Segment]) -> Option<(GuestAddress, usize)> {
        let segment = segments.get(self.segment)?;
        let at = GuestAddress(segment.at.0.checked_add(self.bytes.into())?);
        Some((at, usize::try_from(segment.bytes.checked_sub(self.bytes)?).ok()?))
    }

    fn advance(&mut self, count: usize, segments: &[Segment]) {
        self.bytes = self.bytes.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
        if segments.get(self.segment).is_none_or(|segment| self.bytes >= segment.bytes) {
            *self = Self { segment: self.segment + 1, bytes: 0 };
        }
    }
}

/// An answer on its way from the server.
#[derive(Default)]
struct Receiving {
    header: [u8; REPLY_BYTES],
    header_read: usize,
    /// What is read now, when the header told.
    data: Option<(RequestId, Place)>,
}

/// A disk over a link.
pub struct NbdDisk {
    shared: Arc<Shared>,
    socket: Option<UnixStream>,
    ram: Option<Arc<Ram>>,
    /// Everything that is not done.
    pending: BTreeMap<RequestId, BlockOperation>,
    /// How many of a request's extents are empty, where it is one at least: each is a request to the server of its own.
    emptied: BTreeMap<RequestId, usize>,
    /// What of it is not on its way yet.
    waiting: VecDeque<RequestId>,
    sending: Option<Sending>,
    receiving: Receiving,
    done: VecDeque<Completion>,
    /// Nothing is sent before, because the server answered with an error.
    refused_until: Option<Instant>,
    is_refused: bool,
    cuts: Cuts,
    /// From the beginning of a cut until requests are served again, or there is none: nothing but it is sent, and nothing behind its
    /// answer is read. Else what is not in the cut could be answered to a guest that is saved with it.
    is_still: bool,
}

/// Why a link cannot be used any more; what there is to do is the same for all.
struct Broken;

impl From<io::Error> for Broken {
    fn from(_: io::Error) -> Self {
        Self
    }
}

/// How much went: `None` when nothing can go now.
fn moved(outcome: io::Result<usize>) -> Result<Option<usize>, Broken> {
    match outcome {
        Ok(0) => Err(Broken),
        Ok(count) => Ok(Some(count)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
        Err(_) => Err(Broken),
    }
}

/// One write, of which it is told how much went. (What memory itself offers goes on until all went, and does not tell how much
/// when the socket is full in between.)
fn write_once(stream: &UnixStream, ram: &Ram, at: GuestAddress, bytes: usize) -> io::Result<usize> {
    let slice = ram.get_slice(at, bytes).map_err(io::Error::other)?;
    stream.as_fd().write_volatile(&slice).map_err(io_of)
}

/// One read, likewise.
fn read_once(stream: &UnixStream, ram: &Ram, at: GuestAddress, bytes: usize) -> io::Result<usize> {
    let mut slice = ram.get_slice(at, bytes).map_err(io::Error::other)?;
    stream.as_fd().read_volatile(&mut slice).map_err(io_of)
}

fn io_of(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}

impl NbdDisk {
    /// Does what can be done now.
    fn pump(&mut self) {
        let _ = self.shared.bell.read();
        loop {
            let next = self.shared.next().take();
            if let Some(next) = next {
                self.take_link(next);
            }
            if self.socket.is_none() {
                return;
            }
            let went = self.send().and_then(|()| self.receive());
            if went.is_ok() {
                return;
            }
            self.lose();
        }
    }

    fn take_link(&mut self, link: UnixStream) {
        self.cut();
        self.socket = Some(link);
        // All of it again, in the order of their numbers: none of it was answered, so no order was promised.
        self.waiting = self.pending.keys().copied().collect();
        self.emptied.clear();
        self.refused_until = None;
    }

    fn cut(&mut self) {
        if let Some(old) = self.socket.take() {
            let _ = old.shutdown(Shutdown::Both);
        }
        self.sending = None;
        self.receiving = Receiving::default();
        self.cuts.lose();
    }

    fn lose(&mut self) {
        self.cut();
        (self.shared.tell)(LinkNews::Lost);
    }

    /// Nothing is half done, so that another device can use the link.
    fn is_clean(&self) -> bool {
        self.pending.is_empty() && self.sending.is_none() && self.receiving.header_read == 0 && self.cuts.are_answered()
    }

    fn send(&mut self) -> Result<(), Broken> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let mut stream = socket;
        loop {
            let Some(sending) = &mut self.sending else {
                // Before everything that waits, and whatever was refused.
                match self.cuts.send(|bytes| moved(stream.write(bytes)))? {
                    Sent::Whole => {}
                    Sent::InPart => return Ok(()),
                }
                if self.is_still {
                    return Ok(());
                }
                if self.refused_until.is_some_and(|until| Instant::now() < until) {
                    return Ok(());
                }
                self.refused_until = None;
                let Some(id) = self.waiting.pop_front() else { return Ok(()) };
                self.sending = self.pending.get(&id).map(|operation| Sending {
                    id,
                    header: header(id, operation, self.emptied.get(&id).copied().unwrap_or(0)),
                    header_sent: 0,
                    data: Place::default(),
                });
                continue;
            };
            if sending.header_sent < REQUEST_BYTES {
                match moved(stream.write(&sending.header[sending.header_sent..]))? {
                    Some(count) => sending.header_sent += count,
                    None => return Ok(()),
                }
                continue;
            }
            if let (Some(BlockOperation::Write { from, .. }), Some(ram)) = (self.pending.get(&sending.id), &self.ram)
                && let Some((at, bytes)) = sending.data.next(&from.0)
            {
                match moved(write_once(stream, ram, at, bytes))? {
                    Some(count) => sending.data.advance(count, &from.0),
                    None => return Ok(()),
                }
                continue;
            }
            self.sending = None;
        }
    }

    fn receive(&mut self) -> Result<(), Broken> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let mut stream = socket;
        loop {
            let receiving = &mut self.receiving;
            if let Some((id, place)) = &mut receiving.data {
                let id = *id;
                let (Some(BlockOperation::Read { to, .. }), Some(ram)) = (self.pending.get(&id), &self.ram) else {
                    return Err(Broken);
                };
                let Some((at, bytes)) = place.next(&to.0) else {
                    self.receiving = Receiving::default();
                    self.pending.remove(&id);
                    self.done.push_back(Completion { id, result: Ok(()) });
                    continue;
                };
                match moved(read_once(stream, ram, at, bytes))? {
                    Some(count) => place.advance(count, &to.0),
                    None => return Ok(()),
                }
                continue;
            }
            if self.is_still && self.cuts.is_answered() {
                return Ok(());
            }
            if receiving.header_read < REPLY_BYTES {
                match moved(stream.read(&mut receiving.header[receiving.header_read..]))? {
                    Some(count) => receiving.header_read += count,
                    None => return Ok(()),
                }
                continue;
            }
            let (error, cookie) = understand(&receiving.header).ok_or(Broken)?;
            if self.cuts.take(cookie, error) {
                *receiving = Receiving::default();
                continue;
            }
            let id = RequestId::try_from(cookie).map_err(|_| Broken)?;
            let is_on_its_way = self.waiting.contains(&id) || self.sending.as_ref().is_some_and(|it| it.id == id);
            let Some(operation) = self.pending.get(&id).filter(|_| !is_on_its_way) else { return Err(Broken) };
            if error == 0 && std::mem::take(&mut self.is_refused) {
                (self.shared.tell)(LinkNews::Answers);
            }
            match (error, operation) {
                (0, BlockOperation::Read { .. }) => receiving.data = Some((id, Place::default())),
                (0, operation) => {
                    *receiving = Receiving::default();
                    let emptied = self.emptied.remove(&id).unwrap_or(0) + 1;
                    if emptied < operation.extents().len() {
                        self.emptied.insert(id, emptied);
                        self.waiting.push_back(id);
                        continue;
                    }
                    self.pending.remove(&id);
                    self.done.push_back(Completion { id, result: Ok(()) });
                }
                (error, operation) if FINAL_ERRORS.contains(&error) => {
                    *receiving = Receiving::default();
                    let result = match operation {
                        // Nobody is promised anything by it.
                        BlockOperation::Discard { .. } => Ok(()),
                        _ => Err(io::Error::from_raw_os_error(i32::try_from(error).unwrap_or(libc::EIO))),
                    };
                    self.pending.remove(&id);
                    self.emptied.remove(&id);
                    self.done.push_back(Completion { id, result });
                }
                (error, _) => {
                    *receiving = Receiving::default();
                    self.waiting.push_back(id);
                    self.refused_until = Instant::now().checked_add(RETRY_AFTER);
                    if !std::mem::replace(&mut self.is_refused, true) {
                        (self.shared.tell)(LinkNews::Refused { error });
                    }
                }
            }
        }
    }
}

/// What asks for an operation, or for the next part of it when some of its extents are empty already.
fn header(id: RequestId, operation: &BlockOperation, emptied: usize) -> [u8; REQUEST_BYTES] {
    let data: u64 = operation.segments().iter().map(|segment| u64::from(segment.bytes)).sum();
    // At most about 16 MiB (see BlockBackend::submit).
    let data = u32::try_from(data).unwrap_or(0);
    // There is one more, or it would be done.
    let extent = operation.extents().get(emptied).copied();
    let (offset, bytes, keeps_space) = extent.map_or((0, 0, false), |it| (it.offset, it.bytes, it.keeps_space));
    match operation {
        BlockOperation::Read { offset, .. } => request(CMD_READ, id.into(), *offset, data),
        BlockOperation::Write { offset, .. } => request(CMD_WRITE, id.into(), *offset, data),
        BlockOperation::Flush => request(CMD_FLUSH, id.into(), 0, 0),
        BlockOperation::Discard { .. } => request(CMD_TRIM, id.into(), offset, bytes),
        BlockOperation::Zero { .. } => {
            let mut header = request(CMD_WRITE_ZEROES, id.into(), offset, bytes);
            let flags = if keeps_space { FLAG_NO_HOLE } else { 0 };
            header[4..6].copy_from_slice(&flags.to_be_bytes());
            header
        }
    }
}

fn request(command: u16, cookie: u64, offset: u64, bytes: u32) -> [u8; REQUEST_BYTES] {
    let mut header = [0; REQUEST_BYTES];
    header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    header[6..8].copy_from_slice(&command.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header[16..24].copy_from_slice(&offset.to_be_bytes());
    header[24..].copy_from_slice(&bytes.to_be_bytes());
    header
}

/// Error number and cookie of a simple reply.
fn understand(header: &[u8; REPLY_BYTES]) -> Option<(u32, u64)> {
    let [m0, m1, m2, m3, e0, e1, e2, e3, cookie @ ..] = *header;
    let is_reply = u32::from_be_bytes([m0, m1, m2, m3]) == REPLY_MAGIC;
    is_reply.then_some((u32::from_be_bytes([e0, e1, e2, e3]), u64::from_be_bytes(cookie)))
}

fn bell(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the event lives, from which it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

impl BlockBackend for NbdDisk {
    fn bytes(&self) -> u64 {
        self.shared.bytes
    }

    fn empties(&self) -> Empties {
        self.shared.empties
    }

    fn submit(&mut self, id: RequestId, operation: BlockOperation, ram: &Arc<Ram>) {
        if self.ram.is_none() {
            self.ram = Some(Arc::clone(ram));
        }
        self.is_still = false;
        self.pending.insert(id, operation);
        self.waiting.push_back(id);
        self.pump();
    }

    fn done(&mut self) -> Option<Completion> {
        self.is_still = false;
        if self.done.is_empty() {
            self.pump();
        }
        self.done.pop_front()
    }

    fn done_before_cut(&mut self) -> Option<Completion> {
        self.done.pop_front()
    }

    fn wakers(&self) -> Wakers<'_> {
        let mut events = vec![(bell(&self.shared.bell), libc::POLLIN)];
        let until = self.refused_until.map(|until| until.saturating_duration_since(Instant::now()));
        if let Some(socket) = &self.socket {
            let may_send = until.is_none() && !self.is_still;
            let wants_room = self.sending.is_some() || self.cuts.has_more() || (may_send && !self.waiting.is_empty());
            let room = if wants_room { libc::POLLOUT } else { 0 };
            events.push((socket.as_fd(), libc::POLLIN | room));
        }
        Wakers { events, after: until.filter(|_| !self.waiting.is_empty() && !self.is_still) }
    }

    fn pending(&self) -> Vec<(RequestId, BlockOperation)> {
        self.pending.iter().map(|(id, operation)| (*id, operation.clone())).collect()
    }

    fn begin_cut(&mut self, number: u64) -> io::Result<()> {
        self.pump();
        if self.socket.is_none() {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "there is no way to the disk"));
        }
        self.cuts.begin(number)?;
        self.is_still = true;
        self.pump();
        Ok(())
    }

    fn await_cut(&mut self, until: Instant) -> io::Result<()> {
        loop {
            self.pump();
            if let Some(outcome) = self.cuts.outcome() {
                self.is_still = outcome.is_ok();
                return outcome;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.is_still = false;
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the volume process has not taken the cut in time",
                ));
            }
            let mut wakers = self.wakers();
            wakers.after = Some(wakers.after.unwrap_or(left).min(left));
            wakers.wait(std::iter::empty())?;
        }
    }

    fn drain(&mut self) -> Vec<(RequestId, BlockOperation)> {
        self.is_still = false;
        let end = Instant::now() + DRAIN_BUDGET;
        loop {
            self.pump();
            let left = end.saturating_duration_since(Instant::now());
            if self.pending.is_empty() || self.socket.is_none() || left.is_zero() {
                break;
            }
            let mut wakers = self.wakers();
            wakers.after = Some(wakers.after.unwrap_or(left).min(left));
            if wakers.wait(std::iter::empty()).is_err() {
                break;
            }
        }
        if !self.pending.is_empty() && self.socket.is_some() {
            // Without the link nobody touches guest memory for them.
            self.lose();
        }
        self.waiting.clear();
        self.emptied.clear();
        std::mem::take(&mut self.pending).into_iter().collect()
    }
}

impl Drop for NbdDisk {
    fn drop(&mut self) {
        let is_clean = self.is_clean();
        let Some(socket) = self.socket.take() else { return };
        let mut next = self.shared.next();
        match &*next {
            None if is_clean => *next = Some(socket),
            None => {
                let _ = socket.shutdown(Shutdown::Both);
                drop(next);
                (self.shared.tell)(LinkNews::Lost);
            }
            Some(_) => {
                let _ = socket.shutdown(Shutdown::Both);
            }
        }
    }
}
