//! The sending end of a mirror.

use std::{
    io::{self, Read as _},
    ops::ControlFlow,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use serde::Serialize;
use supercloud_api::frame::{Frame, FrameError, HEADER_BYTES, MAX_PAYLOAD_BYTES};

use super::{Aside, MAX_CUT_BYTES, Number, Taken};
use crate::vmm::{
    MachineConfig, Ram,
    memory::Holes,
    state,
    travel::{
        Hello, Round, TravelError, VERSION, kind,
        pages::{FRAME_BYTES, Forms, MOST_BYTES, Packer},
        wire::{STALL, STALL_AT_END, Wire},
    },
};

/// Rounds of the first copy: the guest runs meanwhile, and what it wrote in the last one goes with the first cut.
const MAX_ROUNDS: u32 = 8;
/// So much may be left for the first cut without another round.
const FEW_PAGES: usize = 4096;
/// An acknowledgement may take so long, and so long may it go on that no cut gets through.
const LATE: Duration = Duration::from_secs(20);
/// The guest may stand still for so long until what could not be copied aside is sent; then the cut is abandoned.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How often it is looked whether the mirror is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// The pause before the next cut, after one that was abandoned, at least.
const PAUSE: Duration = Duration::from_millis(100);
/// zstd's level for the state.
const LEVEL: i32 = 1;

/// How often, and how fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// From the instant of a cut to that of the next, if that one is through by then.
    pub interval: Duration,
    /// Bytes per second on the stream; `None`: as fast as it takes them.
    pub max_bytes_per_s: Option<u64>,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// The newest cut that was begun; 0 during the first copy.
    pub cut: u64,
    /// The newest that was acknowledged.
    pub committed: u64,
    /// Its instant.
    pub committed_at: Option<Instant>,
    /// How long the guest stood still for the last one.
    pub stood_still: Duration,
    /// Bytes on the stream so far.
    pub sent_bytes: u64,
    /// Pages that were written between the last two cuts.
    pub dirty_pages: u64,
    /// Pages that are left in a round of the first copy.
    pub left_pages: u64,
    /// Pages by form.
    pub forms: Forms,
}

/// Pages, and the memory in which they are.
#[derive(Debug)]
pub struct Memory {
    /// The memory.
    pub ram: Ram,
    /// Their numbers.
    pub pages: Vec<u64>,
}

/// The machine that is mirrored, as its owner lets it be used.
pub trait Source {
    /// What it is made of.
    fn config(&self) -> MachineConfig;

    /// Begins to note what is written; all pages.
    ///
    /// # Errors
    /// When that is not possible.
    fn begin(&mut self) -> Result<Memory, TravelError>;

    /// What was written since this was asked last; nothing of it may be forgotten on an error.
    ///
    /// # Errors
    /// When it cannot be told.
    fn written(&mut self) -> Result<Memory, TravelError>;

    /// Takes a cut ([`super::take`]): of what was written since the last one, and what is `owed`. The guest runs on when this
    /// returns, unless something is [`Taken::left`].
    ///
    /// # Errors
    /// When there is none. The guest runs on, and nothing of what was written is forgotten.
    fn cut(&mut self, number: u64, owed: &[u64], aside: Aside) -> Result<Taken, TravelError>;

    /// What was left is copied, or is not wanted any more: the guest runs on.
    fn go(&mut self);

    /// A cut is at the other end for good.
    fn acknowledged(&mut self, number: u64);

    /// Hears how far it is, and says whether the mirror is still wanted. Called often.
    fn watch(&mut self, progress: &Progress) -> ControlFlow<()>;
}

/// Keeps a mirror up until it is not wanted any more (`Ok`) or is broken. The stream gives its writes up after a moment (a timeout).
///
/// # Errors
/// Why it is broken. The guest runs, as far as this is concerned.
pub fn keep(source: &mut dyn Source, stream: &UnixStream, pace: Pace) -> Result<(), TravelError> {
    let mut keeper = Keeper {
        source,
        stream,
        wire: Wire::new(stream),
        packer: Packer::new()?,
        frame: Vec::with_capacity(FRAME_BYTES + MOST_BYTES),
        pace,
        progress: Progress::default(),
        still_until: None,
        heard: Vec::new(),
    };
    match keeper.run() {
        // The other end finds out in any case.
        Err(TravelError::Cancelled) => {
            let _ = keeper.wire.write(kind::BYE, VERSION, &[], STALL_AT_END, &mut || Ok(()));
            Ok(())
        }
        Err(TravelError::Stalled(_)) if keeper.source.watch(&keeper.progress).is_break() => Ok(()),
        outcome => outcome,
    }
}

/// What came of a cut, when the stream goes on.
enum Came {
    /// It is at the other end for good.
    Through,
    /// It was abandoned; these pages are still owed.
    Abandoned(Vec<u64>, TravelError),
}

struct Keeper<'a> {
    source: &'a mut dyn Source,
    stream: &'a UnixStream,
    wire: Wire<&'a UnixStream>,
    packer: Packer,
    frame: Vec<u8>,
    pace: Pace,
    progress: Progress,
    /// While the guest stands still.
    still_until: Option<Instant>,
    /// What came back, up to the next whole frame.
    heard: Vec<u8>,
}

impl Keeper<'_> {
    fn run(&mut self) -> Result<(), TravelError> {
        let config = self.source.config();
        let hello = Hello { vcpus: config.vcpus, memory_bytes: config.memory_bytes, state_version: state::VERSION };
        self.json(kind::MIRROR, &hello)?;
        let mut owed = self.first_copy()?;
        let mut aside = Aside::default();
        let mut failing_since = None;
        loop {
            let begun = Instant::now();
            match self.cut(owed, &mut aside)? {
                Came::Through => {
                    owed = Vec::new();
                    failing_since = None;
                }
                Came::Abandoned(pages, why) => {
                    owed = pages;
                    if failing_since.get_or_insert(begun).elapsed() >= LATE {
                        return Err(TravelError::Silent { after: LATE, source: Some(Box::new(why)) });
                    }
                    self.wait_until(Instant::now() + PAUSE)?;
                }
            }
            self.wait_until(begun + self.pace.interval)?;
        }
    }

    /// Rounds over memory until little is left; what is.
    fn first_copy(&mut self) -> Result<Vec<u64>, TravelError> {
        let mut memory = self.source.begin()?;
        for number in 1.. {
            self.send_ram(&memory)?;
            self.json(kind::ROUND, &Round { number })?;
            memory = self.source.written()?;
            if number >= MAX_ROUNDS || memory.pages.len() <= FEW_PAGES {
                break;
            }
        }
        Ok(memory.pages)
    }

    /// One cut, up to its acknowledgement.
    fn cut(&mut self, owed: Vec<u64>, aside: &mut Aside) -> Result<Came, TravelError> {
        self.progress.cut += 1;
        let number = self.progress.cut;
        let taken = match self.source.cut(number, &owed, std::mem::take(aside)) {
            Ok(taken) => taken,
            // Nothing of it is on the stream, and perhaps the next one can be taken.
            Err(why) => return Ok(Came::Abandoned(owed, why)),
        };
        let Taken { state, aside: copied, left, ram, stopped, stood_still } = taken;
        self.progress.stood_still = stood_still;
        let pages = copied.pages().iter().map(|page| page.0).chain(left.iter().copied());
        let pages: Vec<u64> = pages.collect();
        self.progress.dirty_pages = pages.len() as u64;
        if !left.is_empty() {
            self.still_until = stopped.checked_add(LONGEST_PAUSE);
        }
        let before = self.wire.sent_bytes;
        let sent = self.send_cut(number, &state, &copied, Memory { ram, pages: left }, stopped);
        if self.still_until.take().is_some() {
            self.source.go();
            self.progress.stood_still = stopped.elapsed();
        }
        *aside = copied;
        let is_too_large = self.wire.sent_bytes - before > MAX_CUT_BYTES as u64;
        match sent {
            Ok(()) => {}
            Err(why @ TravelError::Overdue(_)) => {
                self.json(kind::ABANDONED, &Number { number })?;
                return Ok(Came::Abandoned(pages, why));
            }
            Err(why) => return Err(why),
        }
        if is_too_large {
            return Err(TravelError::Malformed("the guest writes more between two cuts than a cut may have"));
        }
        let hash = self.wire.hash();
        self.send(kind::CUT_END, &hash)?;
        self.await_acknowledgement(number)?;
        self.progress.committed = number;
        self.progress.committed_at = Some(stopped);
        self.source.acknowledged(number);
        self.look()?;
        Ok(Came::Through)
    }

    fn send_cut(
        &mut self,
        number: u64,
        state: &state::MachineState,
        copied: &Aside,
        left: Memory,
        stopped: Instant,
    ) -> Result<(), TravelError> {
        self.json(kind::CUT, &Number { number })?;
        if !left.pages.is_empty() {
            // The guest waits for these.
            self.send_ram(&left)?;
            drop(left);
            self.still_until = None;
            self.source.go();
            self.progress.stood_still = stopped.elapsed();
        }
        let json = serde_json::to_vec(state).map_err(io::Error::other)?;
        for piece in zstd::bulk::compress(&json, LEVEL)?.chunks(MAX_PAYLOAD_BYTES) {
            self.send(kind::CUT_STATE, piece)?;
        }
        let mut pages = copied.pages().iter();
        self.send_pages(&mut pages, |packer, page, out| copied.pack(packer, page, out))
    }

    /// Sends pages that may be written meanwhile.
    fn send_ram(&mut self, memory: &Memory) -> Result<(), TravelError> {
        let mut holes = Holes::new(&memory.ram);
        self.send_pages(&mut memory.pages.iter(), |packer, page, out| {
            packer.pack_or_hole(&memory.ram, &mut holes, page, out)
        })
    }

    fn send_pages<T: Copy>(
        &mut self,
        pages: &mut std::slice::Iter<'_, T>,
        mut pack: impl FnMut(&mut Packer, T, &mut Vec<u8>) -> Result<(), TravelError>,
    ) -> Result<(), TravelError> {
        let mut frame = std::mem::take(&mut self.frame);
        loop {
            frame.clear();
            self.packer.fill(pages, &mut frame, &mut pack)?;
            (self.progress.left_pages, self.progress.forms) = (pages.len() as u64, self.packer.forms);
            if frame.is_empty() {
                break;
            }
            self.send(kind::PAGES, &frame)?;
            self.look()?;
        }
        self.frame = frame;
        Ok(())
    }

    /// Whether it is still wanted, and the guest does not stand still for too long.
    fn look(&mut self) -> Result<(), TravelError> {
        look(&mut *self.source, &self.progress, self.still_until)
    }

    fn json(&mut self, kind: u16, body: &impl Serialize) -> Result<(), TravelError> {
        let body = serde_json::to_vec(body).map_err(io::Error::other)?;
        self.send(kind, &body)
    }

    fn send(&mut self, kind: u16, payload: &[u8]) -> Result<(), TravelError> {
        let Self { wire, source, progress, still_until, pace, .. } = self;
        // A frame that is on its way is finished, whatever becomes of the cut.
        let sent = wire.write(kind, VERSION, payload, STALL, &mut || look(&mut **source, progress, None));
        progress.sent_bytes = wire.sent_bytes;
        sent?;
        wire.pace(pace.max_bytes_per_s, &mut || look(&mut **source, progress, *still_until))
    }

    fn await_acknowledgement(&mut self, number: u64) -> Result<(), TravelError> {
        let late = Instant::now() + LATE;
        while Instant::now() < late {
            match self.hear(LOOK_EVERY)? {
                Some(said) if said == number => return Ok(()),
                Some(_) => return Err(TravelError::Malformed("an acknowledgement of another cut")),
                None => self.look()?,
            }
        }
        Err(TravelError::Silent { after: LATE, source: None })
    }

    /// Waits, and finds out meanwhile when the other end goes.
    fn wait_until(&mut self, until: Instant) -> Result<(), TravelError> {
        loop {
            self.look()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            if self.hear(left.min(LOOK_EVERY))?.is_some() {
                return Err(TravelError::Malformed("an acknowledgement of no cut"));
            }
        }
    }

    /// The next acknowledgement, if one comes meanwhile.
    fn hear(&mut self, patience: Duration) -> Result<Option<u64>, TravelError> {
        const LONGEST: usize = HEADER_BYTES + 64;
        if let Some(number) = acknowledged(&mut self.heard)? {
            return Ok(Some(number));
        }
        // Zero would be for ever.
        self.stream.set_read_timeout(Some(patience.max(Duration::from_millis(1))))?;
        let mut piece = [0; LONGEST];
        match (&mut &*self.stream).read(&mut piece) {
            Ok(0) => Err(FrameError::Closed.into()),
            Ok(count) => {
                self.heard.extend(&piece[..count]);
                if self.heard.len() > 2 * LONGEST {
                    return Err(TravelError::Malformed("more acknowledgements than cuts"));
                }
                acknowledged(&mut self.heard)
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error.into()),
            },
        }
    }
}

fn look(source: &mut dyn Source, progress: &Progress, still_until: Option<Instant>) -> Result<(), TravelError> {
    if source.watch(progress).is_break() {
        return Err(TravelError::Cancelled);
    }
    match still_until {
        Some(until) if Instant::now() >= until => Err(TravelError::Overdue(LONGEST_PAUSE)),
        _ => Ok(()),
    }
}

/// Takes a whole acknowledgement off the front of what was heard, if there is one.
fn acknowledged(heard: &mut Vec<u8>) -> Result<Option<u64>, TravelError> {
    let Some((head, rest)) = heard.split_first_chunk::<HEADER_BYTES>() else { return Ok(None) };
    let [k0, k1, v0, v1, length @ ..] = *head;
    let (kind, version) = (u16::from_le_bytes([k0, k1]), u16::from_le_bytes([v0, v1]));
    let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
    if length > 64 {
        return Err(TravelError::Malformed("an acknowledgement that is too long"));
    }
    let Some(payload) = rest.get(..length) else { return Ok(None) };
    let frame = Frame { kind, version, payload: payload.to_vec() };
    let Number { number } = frame.parse_json(kind::ACKNOWLEDGED, VERSION)?;
    heard.drain(..HEADER_BYTES + length);
    Ok(Some(number))
}
