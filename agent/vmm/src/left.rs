//! Memory that a move has left behind: served by the process that has it, fetched by the one that runs the guest.
//!
//! What is fetched has a thread of its own, as long as something is missing ([`Fetch`]); what is served has one for each connection. A
//! connection takes the place of the one before, and has a number, by which its end is known.

use std::{
    ops::ControlFlow,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::Sender,
    },
    time::Instant,
};

use anyhow::Context as _;
use supercloud_blanket::vmm::{
    Machine, Outcome,
    memory::PAGE_BYTES,
    travel::{
        TravelError,
        left::{Fetch, Left, News, Served, fetch::Tell, serve},
    },
};

use crate::{control::Progress, owner::Input, travel::TELL_EVERY};

/// What comes to the owner of it.
#[derive(Debug)]
pub enum LeftNews {
    /// Of what is fetched here.
    Fetch(News),
    /// So far it is with serving.
    Serving(Progress),
    /// A connection over which it was served is over.
    Served(u64, Result<(), TravelError>),
    /// The machine of this boot, that waited for what is missing, is gone; how it had ended.
    Parted(u64, Outcome),
}

/// Tells the owner what is fetched.
pub fn teller(inputs: &Sender<Input>) -> Tell {
    let inputs = inputs.clone();
    // The owner is there as long as the process is.
    Box::new(move |news| drop(inputs.send(Input::Left(LeftNews::Fetch(news)))))
}

/// What was left behind here, and what is missing here.
#[derive(Debug, Default)]
pub struct Leavings {
    /// Of the guest that was sent, as long as it is not taken back.
    left: Option<Arc<Left>>,
    /// Of the guest that came, as long as something is missing.
    fetch: Option<Fetch>,
    /// How many connections there were.
    connections: u64,
    /// The one that goes on, and what tells it to end.
    current: Option<(u64, Arc<AtomicBool>)>,
    /// A machine that waits for what is missing is on its way out.
    is_parting: bool,
}

impl Leavings {
    /// Bytes that are missing here.
    pub fn missing_bytes(&self) -> u64 {
        self.fetch.as_ref().map_or(0, Fetch::missing_bytes)
    }

    /// Whether nobody can say when who touches the guest's memory comes back.
    pub const fn is_missing(&self) -> bool {
        self.fetch.is_some()
    }

    /// # Errors
    /// That something is missing.
    pub fn must_be_whole(&self) -> anyhow::Result<()> {
        let missing = self.missing_bytes();
        anyhow::ensure!(
            !self.is_missing(),
            "{missing} bytes of its memory are still to be fetched from where it came from"
        );
        Ok(())
    }

    /// The connection that goes on.
    pub fn connection(&self) -> Option<u64> {
        self.current.as_ref().map(|(number, _)| *number)
    }

    /// The guest was sent, and this was left behind; how many bytes.
    pub fn leave(&mut self, left: Option<Left>) -> u64 {
        let bytes = left.as_ref().map_or(0, |left| left.pages.len().saturating_mul(PAGE_BYTES));
        self.left = left.map(Arc::new);
        bytes
    }

    /// # Errors
    /// That something was left behind here, and nobody has decided that the guest runs on here.
    pub fn must_not_be_needed(&self) -> anyhow::Result<()> {
        let pages = self.left.as_ref().map_or(0, |left| left.pages.len());
        let bytes = pages.saturating_mul(PAGE_BYTES);
        anyhow::ensure!(
            pages == 0,
            "{bytes} bytes of its memory were left behind for where it was sent; resume it first"
        );
        Ok(())
    }

    /// The guest runs on here: nothing is served any more.
    pub fn take_back(&mut self) {
        self.left = None;
        self.stop();
    }

    fn stop(&mut self) {
        if let Some((_, is_over)) = self.current.take() {
            is_over.store(true, Ordering::Release);
        }
    }

    fn next(&mut self) -> (u64, Arc<AtomicBool>) {
        self.stop();
        self.connections += 1;
        let next = (self.connections, Arc::new(AtomicBool::new(false)));
        self.current = Some((next.0, Arc::clone(&next.1)));
        next
    }

    /// Serves over this connection; its number.
    ///
    /// # Errors
    /// When nothing was left behind, or there is no thread.
    pub fn serve(
        &mut self,
        machine: Option<&Machine>,
        stream: Option<UnixStream>,
        inputs: &Sender<Input>,
    ) -> anyhow::Result<u64> {
        let left = Arc::clone(self.left.as_ref().context("nothing was left behind")?);
        let ram = machine.context("there is no machine")?.ram().clone();
        let stream = stream.context("no socket came with it")?;
        let (number, is_over) = self.next();
        let inputs = inputs.clone();
        let work = move || {
            let mut told = Instant::now();
            let mut watch = |served: &Served| {
                if told.elapsed() >= TELL_EVERY {
                    told = Instant::now();
                    let _ = inputs.send(Input::Left(LeftNews::Serving(shown(served))));
                }
                if is_over.load(Ordering::Acquire) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            let outcome = serve(&ram, &left, stream, &mut watch).map(drop);
            let _ = inputs.send(Input::Left(LeftNews::Served(number, outcome)));
        };
        std::thread::Builder::new().name("serve".to_owned()).spawn(work).context("beginning a thread")?;
        Ok(number)
    }

    /// Fetches over this connection; its number, or `None` when nothing is missing.
    ///
    /// # Errors
    /// When the thread that fetches cannot be told.
    pub fn fetch(&mut self, stream: Option<UnixStream>) -> anyhow::Result<Option<u64>> {
        if self.fetch.is_none() {
            return Ok(None);
        }
        let stream = stream.context("no socket came with it")?;
        let (number, _) = self.next();
        let fetch = self.fetch.as_ref().context("nothing is missing")?;
        fetch.connect(number, stream).context("telling who fetches")?;
        Ok(Some(number))
    }

    /// The guest came; what fetches what it has left behind.
    pub fn arrived(&mut self, fetch: Option<Fetch>) {
        self.fetch = fetch;
    }

    /// A connection is over.
    pub fn over(&mut self, number: u64) {
        self.current.take_if(|(current, _)| *current == number);
    }

    /// Nothing is missing any more.
    pub fn whole(&mut self) {
        (self.fetch, self.current) = (None, None);
    }

    /// Whether a machine that waits for what is missing is on its way out.
    pub const fn is_parting(&self) -> bool {
        self.is_parting
    }

    /// Lets a machine go that may wait for what is missing, beside: its devices end what they have begun, which may take until
    /// that has come. Nothing else may use their disks before.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn part(
        &mut self,
        machine: Machine,
        boot: u64,
        outcome: Outcome,
        inputs: &Sender<Input>,
    ) -> anyhow::Result<()> {
        let inputs = inputs.clone();
        let work = move || {
            drop(machine);
            let _ = inputs.send(Input::Left(LeftNews::Parted(boot, outcome)));
        };
        std::thread::Builder::new().name("parting".to_owned()).spawn(work).context("beginning a thread")?;
        self.is_parting = true;
        Ok(())
    }

    /// It is gone, and nobody will touch its memory again: what is missing of it is not needed.
    pub fn parted(&mut self) {
        self.is_parting = false;
        if let Some(fetch) = self.fetch.take() {
            // An event takes 2^64 - 2 of these.
            let _ = fetch.forget();
        }
    }
}

fn shown(served: &Served) -> Progress {
    Progress {
        round: 0,
        sent_bytes: served.sent_bytes,
        left_bytes: served.missing_pages.saturating_sub(served.sent_pages).saturating_mul(PAGE_BYTES),
        dirty_bytes_per_s: 0,
        is_last: true,
        is_holding: false,
        throttle_percent: 0,
        paused_ms: None,
        left_behind_bytes: None,
    }
}
