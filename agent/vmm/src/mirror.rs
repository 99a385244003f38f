//! A guest that is mirrored, and a standby: the owner's part of both.
//!
//! The stream has a thread of its own at either end. The source's asks the owner for all that it does with the machine ([`Ask`]): so
//! the machine has one owner, who answers clients meanwhile. The standby's hands over each cut that is whole; it counts when a client
//! says so.

use std::{
    ops::ControlFlow,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, Sender, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use supercloud_blanket::vmm::{
    Incoming, Machine, MachineConfig, Outcome, VmmError,
    memory::PAGE_BYTES,
    state::MachineState,
    travel::{
        Opened, TravelError,
        mirror::{self, Aside, Memory, News, Pace, Progress, StagedCut, Staging, Taken},
    },
    virtio::Outputs,
};

use crate::{
    control::{MirrorProgress, Request},
    owner::Input,
    travel::{ASK_EVERY, TELL_EVERY},
};

/// From cut to cut, where nobody says.
const INTERVAL_MS: u64 = 100;
/// No shorter one is kept: the guest would stand still more than it runs.
const LEAST_INTERVAL_MS: u64 = 10;
/// An acknowledgement is a few bytes; a stream that does not take them is gone.
const ACKNOWLEDGE_BUDGET: Duration = Duration::from_secs(1);

/// Where an answer goes.
type Answer<T> = SyncSender<Result<T, TravelError>>;

/// What the source's thread asks of the machine's owner.
#[derive(Debug)]
pub enum Ask {
    /// To begin to note what is written.
    Begin(Answer<Memory>),
    /// What was written.
    Written(Answer<Memory>),
    /// A cut: its number, the pages that are owed, and room for copies.
    Cut(u64, Vec<u64>, Aside, Answer<Taken>),
    /// The guest need not stand still any more.
    Go,
}

/// The owner, as the source's thread sees it.
struct Remote {
    config: MachineConfig,
    inputs: Sender<Input>,
    outputs: Arc<Outputs>,
    is_over: Arc<AtomicBool>,
    told: Option<(Instant, u64)>,
}

impl Remote {
    fn ask<T>(&self, ask: impl FnOnce(Answer<T>) -> Ask) -> Result<T, TravelError> {
        let (answer, answered) = sync_channel(1);
        // The owner is there as long as the process is.
        let gone = |_| TravelError::Machine(VmmError::Ended);
        self.inputs.send(Input::Mirror(ask(answer))).map_err(|_| TravelError::Machine(VmmError::Ended))?;
        answered.recv().map_err(gone)?
    }
}

impl mirror::Source for Remote {
    fn config(&self) -> MachineConfig {
        self.config
    }

    fn begin(&mut self) -> Result<Memory, TravelError> {
        self.ask(Ask::Begin)
    }

    fn written(&mut self) -> Result<Memory, TravelError> {
        self.ask(Ask::Written)
    }

    fn cut(&mut self, number: u64, owed: &[u64], aside: Aside) -> Result<Taken, TravelError> {
        let owed = owed.to_vec();
        self.ask(|answer| Ask::Cut(number, owed, aside, answer))
    }

    fn go(&mut self) {
        let _ = self.inputs.send(Input::Mirror(Ask::Go));
    }

    fn acknowledged(&mut self, number: u64) {
        self.outputs.acknowledge(number);
    }

    fn watch(&mut self, progress: &Progress) -> ControlFlow<()> {
        let is_due = self.told.is_none_or(|(at, _)| at.elapsed() >= TELL_EVERY);
        if is_due || self.told.is_some_and(|(_, committed)| committed == 0 && progress.committed > 0) {
            self.told = Some((Instant::now(), progress.committed));
            let _ = self.inputs.send(Input::MirrorProgress(shown(progress)));
        }
        if self.is_over.load(Ordering::Acquire) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn shown(progress: &Progress) -> MirrorProgress {
    MirrorProgress {
        cut: progress.cut,
        committed: progress.committed,
        committed_age_ms: progress.committed_at.map_or(0, |at| milliseconds(at.elapsed())),
        pause_us: u64::try_from(progress.stood_still.as_micros()).unwrap_or(u64::MAX),
        sent_bytes: progress.sent_bytes,
        dirty_bytes: progress.dirty_pages.saturating_mul(PAGE_BYTES),
        left_bytes: progress.left_pages.saturating_mul(PAGE_BYTES),
    }
}

/// The source's side: what the owner knows of its guest's mirror.
#[derive(Debug, Default)]
pub struct Mirrored {
    outputs: Arc<Outputs>,
    /// While the thread is there: tells it to stop.
    is_over: Option<Arc<AtomicBool>>,
    is_strict: bool,
    /// The guest stands still until the thread has what it copies.
    is_still: bool,
    /// The machine is another one than that of the last cut: all of its memory is to go with the next.
    is_new: bool,
    /// Who waits for its end: client and request.
    waiting: Vec<(u64, u64)>,
}

impl Mirrored {
    /// What holds the guest's cards back.
    pub const fn outputs(&self) -> &Arc<Outputs> {
        &self.outputs
    }

    /// Whether its thread is there.
    pub const fn is_on(&self) -> bool {
        self.is_over.is_some()
    }

    /// Whether there is one, or the guest's cards are still held back because of one.
    pub fn is_there(&self) -> bool {
        self.is_on() || self.outputs.are_held()
    }

    /// Whether the guest must not run just now.
    pub const fn is_still(&self) -> bool {
        self.is_still
    }

    /// Begins.
    ///
    /// # Errors
    /// When there is one already, or no thread.
    pub fn start(
        &mut self,
        config: MachineConfig,
        stream: UnixStream,
        request: &Request,
        inputs: &Sender<Input>,
    ) -> anyhow::Result<()> {
        anyhow::ensure!(!self.is_there(), "it is mirrored, or was and is still held back; end that first");
        stream.set_write_timeout(Some(ASK_EVERY)).context("bounding the stream's patience")?;
        let interval_ms = request.interval_ms.unwrap_or(INTERVAL_MS).max(LEAST_INTERVAL_MS);
        let pace = Pace { interval: Duration::from_millis(interval_ms), max_bytes_per_s: request.max_bytes_per_s };
        let is_over = Arc::new(AtomicBool::new(false));
        let mut remote = Remote {
            config,
            inputs: inputs.clone(),
            outputs: Arc::clone(&self.outputs),
            is_over: Arc::clone(&is_over),
            told: None,
        };
        let work = move || {
            let outcome = mirror::keep(&mut remote, &stream, pace);
            let _ = remote.inputs.send(Input::MirrorOver(outcome));
        };
        std::thread::Builder::new().name("mirror".to_owned()).spawn(work).context("beginning a thread")?;
        self.is_over = Some(is_over);
        (self.is_strict, self.is_new) = (request.strict.unwrap_or(false), false);
        Ok(())
    }

    /// The guest boots again, in another machine: the mirror goes on with that.
    pub fn renew(&mut self, machine: &Machine) -> Result<(), VmmError> {
        self.is_still = false;
        if self.is_on() {
            self.is_new = true;
            machine.note_writes(true)?;
        }
        Ok(())
    }

    /// Does what the thread asks for; whether the guest shall run is `is_running`.
    pub fn answer(&mut self, ask: Ask, machine: Option<&mut Machine>, is_running: bool) {
        let none = || TravelError::Machine(VmmError::Ended);
        // Who asked may have gone.
        match (ask, machine) {
            (Ask::Begin(answer), Some(machine)) => {
                self.is_new = false;
                // What was never written is zeros at the standby as well.
                let begun = machine.note_writes(true).and_then(|()| machine.pages_there());
                let begun = begun.map(|pages| Memory { ram: machine.ram().clone(), pages });
                drop(answer.send(begun.map_err(TravelError::from)));
            }
            (Ask::Written(answer), Some(machine)) => {
                let written = machine.take_written().map_err(TravelError::from).map(|written| {
                    let pages = if std::mem::take(&mut self.is_new) { machine.page_numbers() } else { written };
                    Memory { ram: machine.ram().clone(), pages }
                });
                drop(answer.send(written));
            }
            (Ask::Cut(number, owed, aside, answer), Some(machine)) => {
                let taken = self.cut(machine, number, owed, aside);
                self.is_still = taken.as_ref().is_ok_and(|taken| !taken.left.is_empty());
                let is_gone = answer.send(taken).is_err();
                if is_gone {
                    self.is_still = false;
                }
                self.let_run(machine, is_running);
            }
            (Ask::Begin(answer) | Ask::Written(answer), None) => drop(answer.send(Err(none()))),
            (Ask::Cut(.., answer), None) => drop(answer.send(Err(none()))),
            (Ask::Go, machine) => {
                self.is_still = false;
                if let Some(machine) = machine {
                    self.let_run(machine, is_running);
                }
            }
        }
    }

    fn cut(
        &mut self,
        machine: &mut Machine,
        number: u64,
        mut owed: Vec<u64>,
        aside: Aside,
    ) -> Result<Taken, TravelError> {
        // Ended meanwhile: nothing may be held back again.
        if self.is_over.as_ref().is_none_or(|is_over| is_over.load(Ordering::Acquire)) {
            return Err(TravelError::Cancelled);
        }
        if self.is_new {
            owed = machine.page_numbers();
        }
        let taken = mirror::take(machine, number, &owed, aside)?;
        self.is_new = false;
        if self.is_strict {
            self.outputs.cut(number);
        }
        Ok(taken)
    }

    /// After a cut: as it was before.
    fn let_run(&self, machine: &Machine, is_running: bool) {
        match (is_running, self.is_still) {
            (true, false) => machine.resume(),
            (true, true) => {}
            // It stands still for longer: what its disks have in hand is settled. (Its vCPUs have stopped already.)
            (false, _) => drop(machine.pause()),
        }
    }

    /// Ends it: what was held back goes. Whether that is all, or its thread is still there.
    pub fn end(&mut self, asked: (u64, u64)) -> bool {
        self.stop();
        self.outputs.let_go();
        if self.is_on() {
            self.waiting.push(asked);
        }
        !self.is_on()
    }

    /// Tells its thread to stop.
    pub fn stop(&mut self) {
        if let Some(is_over) = &self.is_over {
            is_over.store(true, Ordering::Release);
        }
    }

    /// Its thread is over; who waited for that.
    pub fn over(&mut self) -> Vec<(u64, u64)> {
        (self.is_over, self.is_still, self.is_new) = (None, false, false);
        std::mem::take(&mut self.waiting)
    }
}

/// The standby's side: a machine that waits, and what it would go on with.
#[derive(Debug)]
pub struct Standby {
    incoming: Incoming,
    has: mirror::Standby,
    committed: Arc<AtomicU64>,
    /// For acknowledgements.
    back: UnixStream,
}

impl Standby {
    /// Receives a mirror to its end, on the thread that has read its first frame.
    ///
    /// # Errors
    /// Why nothing more will come.
    pub fn receive(
        opened: Opened<&UnixStream>,
        incoming: Incoming,
        back: UnixStream,
        inputs: &Sender<Input>,
    ) -> Result<(), TravelError> {
        back.set_write_timeout(Some(ACKNOWLEDGE_BUDGET))?;
        let mut staging = Staging::new(opened, &incoming)?;
        let has = mirror::Standby::new(incoming.ram().clone())?;
        let committed = Arc::new(AtomicU64::new(0));
        let newest = Arc::clone(&committed);
        // The owner is there as long as the process is.
        let _ = inputs.send(Input::Standby(Box::new(Self { incoming, has, committed, back })));
        loop {
            match staging.next(&|| newest.load(Ordering::Acquire))? {
                News::Staged(cut) => drop(inputs.send(Input::Staged(cut))),
                News::Over => return Ok(()),
            }
        }
    }

    /// Keeps a cut that is whole; its number.
    ///
    /// # Errors
    /// When it does not fit this machine.
    pub fn stage(&mut self, cut: StagedCut) -> Result<u64, TravelError> {
        let fits = |state: &MachineState| Ok(self.incoming.check(state)?);
        self.has.stage(cut, fits)
    }

    /// The newest cut that is whole.
    pub fn staged(&self) -> u64 {
        self.has.staged()
    }

    /// The cut from which it could go on; 0: none.
    pub fn committed(&self) -> u64 {
        if self.has.can_be_promoted() { self.has.committed() } else { 0 }
    }

    /// Takes a cut for good, and says so to the other end, if that is there.
    ///
    /// # Errors
    /// When it is not here.
    pub fn commit(&mut self, number: u64) -> Result<(), TravelError> {
        let before = self.has.committed();
        self.has.commit(number)?;
        if self.has.committed() > before {
            self.committed.store(number, Ordering::Release);
            // A source that does not hear of it holds on to what it has.
            let _ = mirror::acknowledge(&self.back, number);
        }
        Ok(())
    }

    /// Whether there is something to promote.
    pub const fn can_be_promoted(&self) -> bool {
        self.has.can_be_promoted()
    }

    /// The machine of the newest committed cut.
    ///
    /// # Errors
    /// When it cannot be made; then nothing of it is left.
    pub fn promote(self) -> anyhow::Result<(Machine, Receiver<Outcome>)> {
        let state = self.has.promote().context("no cut was committed")?;
        Ok(self.incoming.finish(&state)?)
    }
}
