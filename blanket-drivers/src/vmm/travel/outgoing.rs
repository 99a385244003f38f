//! Sending a machine while its guest runs.

use std::{
    io::Write,
    ops::ControlFlow,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use serde::Serialize;
use supercloud_api::frame::MAX_PAYLOAD_BYTES;

use super::{
    Hello, Round, StreamVersion, TravelError, VERSION, converge,
    converge::{Limits, Next, Seen},
    kind,
    left::{Leaves, Left, PageSet, page_range, written},
    pages::Forms,
    pages_out::PagesOut,
    wire::{STALL, STALL_AT_END, Wire},
};
use crate::{
    migrate::MemoryMode,
    vmm::{Machine, state},
};

/// What the state takes, as long as it is not known: a vCPU's share.
const STATE_BYTES_PER_VCPU: u64 = 24 << 10;
/// How often in a round it is asked what was written meanwhile.
const ASK_EVERY: Duration = Duration::from_millis(100);
/// A guest that waits with its pause is copied again after so long, and looked at this often: the word is heard at once.
const HELD_FOR: Duration = Duration::from_millis(500);
const HELD_LOOK: Duration = Duration::from_millis(5);
/// Rounds in which it must come to where it could stand still again.
const HELD_ROUNDS: u32 = 8;

/// Of a guest that waits with its pause: rounds that were made meanwhile, which are no attempts to come to an end, and the time that is
/// let pass before it is copied again. In that time it writes, and where that is more than may be left, it is shorter the next time.
#[derive(Debug)]
struct Held {
    rounds: u32,
    pause: Duration,
    /// Rounds since it could have stood still; `None`: it never could.
    since: Option<u32>,
}

impl Default for Held {
    fn default() -> Self {
        Self { rounds: 0, pause: HELD_FOR, since: None }
    }
}

impl Held {
    /// Takes what is to be done next; whether the guest still counts as one that waits.
    fn goes_on(&mut self, next: Next) -> bool {
        self.since = match (next, self.since) {
            (Next::Hold, _) => Some(0),
            (Next::Copy, Some(since)) if since < HELD_ROUNDS => {
                if since == 0 {
                    self.pause = (self.pause / 2).max(HELD_LOOK);
                }
                Some(since + 1)
            }
            _ => None,
        };
        self.rounds += u32::from(self.since.is_some());
        self.since.is_some()
    }
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// The round, from 1 on.
    pub round: u32,
    /// Bytes on the wire so far.
    pub sent_bytes: u64,
    /// Pages that are still to be sent in this round.
    pub left_pages: u64,
    /// Pages a second that the guest wrote in the last round; 0 in the first.
    pub dirty_pages_per_s: u64,
    /// The guest stands still, or is about to: this is the last round.
    pub is_last: bool,
    /// It could stand still now, and waits for the word ([`Limits::holds`]).
    pub is_holding: bool,
    /// By how much the guest is slowed down, percent.
    pub throttle_percent: u8,
    /// Pages by form.
    pub forms: Forms,
}

/// What a machine took on its way.
#[derive(Debug, Clone)]
pub struct Sent {
    /// As it was at the end.
    pub progress: Progress,
    /// Since the guest stands still.
    pub paused_for: Duration,
    /// Bytes of the state on the wire.
    pub state_bytes: u64,
    /// What was left behind, to be served from the machine's memory as it is ([`super::left::serve`]).
    pub left: Option<Left>,
}

/// Sends a machine. When it is through, the machine stands still and its whole content is on the wire, but for what [`Limits::memory`]
/// allows to be left behind; it is for the caller to find out who may run it. On an error the guest runs on, if it ran before, unless it was paused already: then
/// [`Machine::resume`] lets it run on.
///
/// `limits` is asked each time that it matters, so that they can be changed meanwhile. `watch` is called often; it can cancel. Where `to` gives a write up after a moment (`WouldBlock`, `TimedOut`; a socket with a
/// timeout), it is called meanwhile too, and a stream that takes nothing is given up after a while.
///
/// # Errors
/// [`TravelError`]. After those of which [`TravelError::leaves_stream_whole`] says so, the same stream can be used again.
pub fn send(
    machine: &mut Machine,
    to: impl Write,
    limits: &dyn Fn() -> Limits,
    watch: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
) -> Result<Sent, TravelError> {
    if limits().memory != MemoryMode::PostCopy {
        machine.note_writes(true)?;
    }
    let mut sender = Sender::new(machine, to, limits, watch)?;
    let outcome = sender.run(machine);
    // The guest may be standing still meanwhile: it is told in a moment or not at all.
    let outcome = outcome.map_err(|why| if why.leaves_stream_whole() { sender.give_up(why) } else { why });
    // When END is on the wire the machine is somebody else's to decide about, whatever becomes of the notes here.
    let _ = machine.note_writes(false);
    outcome
}

struct Sender<'a, W> {
    wire: Wire<W>,
    packer: PagesOut,
    /// Of the stream.
    version: StreamVersion,
    /// Pages that are known to be written since they were sent.
    written: PageSet,
    /// When it was asked for them last.
    asked_at: Instant,
    /// See [`Seen::link_bytes_per_s`].
    link_bytes_per_s: u64,
    progress: Progress,
    limits: &'a dyn Fn() -> Limits,
    /// Since the guest stands still: when it has stood still for long enough, and for how long that is.
    give_up_at: Option<(Instant, Duration)>,
    /// Nobody needs to be asked any more.
    is_given_up: bool,
    watch: &'a mut dyn FnMut(&Progress) -> ControlFlow<()>,
}

impl<'a, W: Write> Sender<'a, W> {
    fn new(
        machine: &Machine,
        to: W,
        limits: &'a dyn Fn() -> Limits,
        watch: &'a mut dyn FnMut(&Progress) -> ControlFlow<()>,
    ) -> Result<Self, TravelError> {
        let version = limits().stream;
        Ok(Self {
            wire: Wire::new(to),
            packer: PagesOut::new(version, machine.config().memory_bytes)?,
            version,
            written: PageSet::below(page_range(machine.ram())),
            asked_at: Instant::now(),
            link_bytes_per_s: 0,
            progress: Progress::default(),
            limits,
            give_up_at: None,
            is_given_up: false,
            watch,
        })
    }

    fn run(&mut self, machine: &mut Machine) -> Result<Sent, TravelError> {
        let config = machine.config();
        let hello = Hello { vcpus: config.vcpus, memory_bytes: config.memory_bytes, state_version: state::VERSION };
        self.json(kind::HELLO, &hello)?;
        let memory = (self.limits)().memory;
        let rounds = if memory == MemoryMode::PostCopy { None } else { Some(self.rounds(machine)?) };
        // Told before: who hears of it can make ready what comes next.
        self.progress.is_last = true;
        self.look()?;
        let paused = Instant::now();
        let longest = Duration::from_millis((self.limits)().longest_pause_ms());
        self.give_up_at = paused.checked_add(longest).map(|at| (at, longest));
        let state = machine.save()?;
        let left = match rounds {
            None => {
                self.round(machine, &[])?;
                written(machine.ram())?
            }
            Some((mut pages, leaves)) => {
                // What was written until then, and what devices finished while they were stopped.
                pages.extend(machine.take_written()?);
                pages.sort_unstable();
                pages.dedup();
                let mut left = PageSet::below(page_range(machine.ram()));
                if leaves {
                    for page in pages.drain(..) {
                        left.insert(page);
                    }
                }
                self.round(machine, &pages)?;
                left
            }
        };
        let secret = self.leave(&left)?;
        let before = self.progress.sent_bytes;
        let json = serde_json::to_vec(&state).map_err(std::io::Error::other)?;
        for piece in json.chunks(MAX_PAYLOAD_BYTES) {
            self.send(kind::STATE, piece)?;
        }
        let hash = self.wire.hash();
        self.send(kind::END, &hash)?;
        self.wire.flush()?;
        let state_bytes = self.progress.sent_bytes - before;
        let left = secret.map(|secret| Left::new(left, secret, hash));
        Ok(Sent { progress: self.progress, paused_for: paused.elapsed(), state_bytes, left })
    }

    /// Tells what is left behind, if anything is; the secret by which it is fetched.
    fn leave(&mut self, left: &PageSet) -> Result<Option<[u8; 32]>, TravelError> {
        if left.is_empty() {
            return Ok(None);
        }
        let (leaves, secret) = Leaves::new(left.len());
        self.json(kind::LEAVES, &leaves)?;
        let mut at = 0;
        while let Some((piece, next)) = left.piece(at)? {
            self.send(kind::LEFT, &piece)?;
            at = next;
        }
        Ok(Some(secret))
    }

    /// Copies memory while the guest runs, until it is to be paused; what was written since, and whether that is left behind.
    fn rounds(&mut self, machine: &mut Machine) -> Result<(Vec<u64>, bool), TravelError> {
        let config = machine.config();
        // What was never written is zeros at the other end as well.
        let mut pages = machine.pages_there()?;
        let is_running = machine.is_running();
        let mut held = Held::default();
        let mut began;
        loop {
            began = Instant::now();
            let before = (self.packer.forms(), self.progress.sent_bytes, self.wire.waited);
            match self.progress.throttle_percent {
                0 => self.round(machine, &pages)?,
                percent => {
                    let is_over = AtomicBool::new(false);
                    let slowed: &Machine = machine;
                    std::thread::scope(|scope| {
                        scope.spawn(|| slowed.slow_down(percent, &is_over));
                        let sent = self.round(slowed, &pages);
                        is_over.store(true, Ordering::Release);
                        sent
                    })?;
                }
            }
            // Pages of zeros take nothing; what a guest writes is rarely that.
            let filled = |forms: Forms| forms.raw + forms.compressed + forms.changed + forms.same;
            let sent_pages = filled(self.packer.forms()) - filled(before.0);
            let took_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX).max(1);
            self.ask(machine)?;
            pages = self.written.iter().collect();
            self.written.clear();
            let dirty_pages = pages.len() as u64;
            self.progress.dirty_pages_per_s = dirty_pages.saturating_mul(1_000_000) / took_us;
            let sent_bytes = self.progress.sent_bytes - before.1;
            let waited = self.wire.waited.saturating_sub(before.2);
            self.link_bytes_per_s = converge::link_bytes_per_s(self.link_bytes_per_s, sent_bytes, took_us, waited);
            let seen = Seen {
                rounds: self.progress.round - held.rounds,
                dirty_pages,
                dirty_bytes: self.packer.would_take(machine.ram(), &pages),
                sent_pages,
                sent_bytes,
                took_us,
                link_bytes_per_s: self.link_bytes_per_s,
                state_bytes: STATE_BYTES_PER_VCPU * u64::from(config.vcpus),
            };
            let limits = (self.limits)();
            let next = converge::next(&limits, &seen);
            self.progress.is_holding = held.goes_on(next);
            match next {
                Next::Hold => self.hold(held.pause)?,
                Next::Copy => {
                    let percent = converge::throttle(&limits, &seen, self.progress.throttle_percent);
                    // A guest that does not run is as slow as can be.
                    self.progress.throttle_percent = if is_running { percent } else { 0 };
                }
                Next::Switch => return Ok((pages, false)),
                Next::Leave => return Ok((pages, true)),
                Next::GiveUp(why) => return Err(TravelError::NoConvergence(why)),
            }
        }
    }

    /// Waits for a moment, or until the guest may stand still.
    #[expect(clippy::disallowed_methods, reason = "on the thread that sends")]
    fn hold(&mut self, pause: Duration) -> Result<(), TravelError> {
        self.wire.flush()?;
        let until = Instant::now() + pause;
        while Instant::now() < until && (self.limits)().holds {
            self.look()?;
            std::thread::sleep(HELD_LOOK);
        }
        Ok(())
    }

    fn round(&mut self, machine: &Machine, pages: &[u64]) -> Result<(), TravelError> {
        self.progress.round += 1;
        self.progress.left_pages = pages.len() as u64;
        let (mut left, is_first) = (pages.iter(), self.progress.round == 1);
        loop {
            let Self { packer, written, .. } = self;
            // What was written before it is sent needs not be sent again for that. It is read after this; what is written later is told later.
            let is_written = |page| written.remove(page) || !is_first;
            let frame = packer.pack(machine.ram(), &mut left, is_written)?;
            self.progress.left_pages = left.len() as u64;
            self.progress.forms = self.packer.forms();
            let Some(frame) = frame else { break };
            let before = (self.progress.sent_bytes, self.wire.waited);
            self.send(self.packer.kind(), &frame)?;
            let waited = self.wire.waited.saturating_sub(before.1);
            self.packer.sent(self.progress.sent_bytes - before.0, waited);
            self.look()?;
            if !self.progress.is_last && self.asked_at.elapsed() >= ASK_EVERY {
                self.ask(machine)?;
            }
        }
        self.look()?;
        self.json(kind::ROUND, &Round { number: self.progress.round })
    }

    /// Asks what was written since this was asked last.
    fn ask(&mut self, machine: &Machine) -> Result<(), TravelError> {
        for page in machine.take_written()? {
            self.written.insert(page);
            self.packer.was_written(page);
        }
        self.asked_at = Instant::now();
        Ok(())
    }

    /// Whether it is still wanted, and the guest does not stand still for too long.
    fn look(&mut self) -> Result<(), TravelError> {
        look(self.is_given_up, self.give_up_at, self.watch, &self.progress)
    }

    fn json(&mut self, kind: u16, body: &impl Serialize) -> Result<(), TravelError> {
        let body = serde_json::to_vec(body).map_err(std::io::Error::other)?;
        self.send(kind, &body)
    }

    fn send(&mut self, kind: u16, payload: &[u8]) -> Result<(), TravelError> {
        let patience = if self.is_given_up { STALL_AT_END } else { STALL };
        let Self { wire, watch, progress, give_up_at, is_given_up, .. } = self;
        let version = if kind == kind::HELLO { self.version.hello() } else { VERSION };
        let sent =
            wire.write(kind, version, payload, patience, &mut || look(*is_given_up, *give_up_at, watch, progress));
        progress.sent_bytes = wire.sent_bytes;
        sent?;
        // When END is out nothing may fail any more.
        if kind == kind::END || *is_given_up {
            return Ok(());
        }
        let limit = (self.limits)().max_bytes_per_s;
        wire.pace(limit, &mut || look(false, *give_up_at, watch, progress))
    }

    /// Tells the other end; why it was given up, or that the stream is cut off now.
    fn give_up(&mut self, why: TravelError) -> TravelError {
        self.is_given_up = true;
        self.send(kind::ABORT, &[]).err().unwrap_or(why)
    }
}

/// Whether it is still wanted, and the guest does not stand still for too long.
fn look(
    is_given_up: bool,
    give_up_at: Option<(Instant, Duration)>,
    watch: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
    progress: &Progress,
) -> Result<(), TravelError> {
    if is_given_up {
        return Ok(());
    }
    if watch(progress).is_break() {
        return Err(TravelError::Cancelled);
    }
    match give_up_at {
        Some((at, longest)) if Instant::now() >= at => Err(TravelError::Overdue(longest)),
        _ => Ok(()),
    }
}
