//! The thread of a device.
//!
//! It serves rings until it is stopped, and can be stopped only between two rounds of bounded work; then it gives
//! handler and rings back, with nothing half done. Pausing, saving and resetting a device are all this one thing.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use vmm_sys_util::eventfd::EventFd;

use super::Ring;

/// What a device's thread does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Waits for a notification or its source.
    Wait,
    /// Serves again.
    Again,
}

/// What wakes a device's thread besides its queues.
#[derive(Debug, Default)]
pub struct Wakers<'a> {
    /// Descriptors, and the events of `poll(2)` that are waited for.
    pub events: Vec<(BorrowedFd<'a>, libc::c_short)>,
    /// It is woken after so long in any case.
    pub after: Option<Duration>,
}

impl<'a> Wakers<'a> {
    /// What can be read.
    #[must_use]
    pub fn readable(source: Option<BorrowedFd<'a>>) -> Self {
        Self { events: source.into_iter().map(|fd| (fd, libc::POLLIN)).collect(), after: None }
    }

    /// Waits for any of them, and for those of `also` to be readable; at most `after`.
    ///
    /// # Errors
    /// When the system cannot wait.
    pub(crate) fn wait<'b>(&self, also: impl Iterator<Item = BorrowedFd<'b>>) -> io::Result<()> {
        let also = also.map(|fd| (fd.as_raw_fd(), libc::POLLIN));
        let events = self.events.iter().map(|(fd, events)| (fd.as_raw_fd(), *events));
        let mut polled: Vec<_> =
            also.chain(events).map(|(fd, events)| libc::pollfd { fd, events, revents: 0 }).collect();
        let count = libc::nfds_t::try_from(polled.len()).unwrap_or(0);
        // Rounded up: who is woken too early would only wait again.
        let ms = |time: Duration| libc::c_int::try_from(time.as_micros().div_ceil(1000)).unwrap_or(libc::c_int::MAX);
        let timeout = self.after.map_or(-1, ms);
        // SAFETY: the pointer and the count are those of a vector that lives until the call returns.
        if unsafe { libc::poll(polled.as_mut_ptr(), count, timeout) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        // Woken for nothing: whoever waits looks again.
        if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) }
    }
}

/// What a device does with its queues. Not called while the device is paused.
pub trait Handler: Send {
    /// Hears which features were agreed, before the first [`Handler::serve`].
    fn begin(&mut self, features: u64) {
        let _ = features;
    }

    /// Serves what there is, at most about [`BUDGET`] requests. To wait for a ring it asks that ring for kicks.
    fn serve(&mut self, rings: &mut [Option<Ring>]) -> Next;

    /// What wakes the thread now, besides notifications of its queues.
    fn wakers(&self) -> Wakers<'_> {
        Wakers::default()
    }

    /// While it is not served: begins to have this cut of a mirror taken where it keeps what outlives it.
    ///
    /// # Errors
    /// When it cannot.
    fn begin_cut(&mut self, number: u64) -> io::Result<()> {
        let _ = number;
        Ok(())
    }

    /// Waits for what [`Handler::begin_cut`] began, until then at most.
    ///
    /// # Errors
    /// When there is no such cut there.
    fn await_cut(&mut self, rings: &mut [Option<Ring>], until: Instant) -> io::Result<()> {
        let _ = (rings, until);
        Ok(())
    }

    /// What it holds between two requests that is not in guest memory, when it is not served.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes over what another had saved; false when that cannot be.
    fn restore(&mut self, saved: &[u8]) -> bool {
        saved.is_empty()
    }

    /// Finishes what is in flight, or puts it aside until it is served again: nothing may touch guest memory after this.
    fn settle(&mut self, rings: &mut [Option<Ring>]) {
        let _ = rings;
    }

    /// Its queues are gone, and with them what was put aside.
    fn forget(&mut self) {}
}

/// Requests of one round: how long a device may not be stopped.
pub const BUDGET: usize = 64;

/// Everything that a stopped worker leaves.
pub(super) type Left = (Box<dyn Handler>, Vec<Option<Ring>>);

/// A running thread.
#[derive(Debug)]
pub(super) struct Worker {
    stop: EventFd,
    /// What is in flight is to be settled before it gives all back.
    settles: Arc<AtomicBool>,
    thread: JoinHandle<Left>,
}

impl std::fmt::Debug for dyn Handler {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Handler")
    }
}

impl Worker {
    /// Begins to serve; rings that are there are looked at once, whether they were kicked or not. On an error all is
    /// given back.
    pub(super) fn start(
        name: String,
        handler: Box<dyn Handler>,
        rings: Vec<Option<Ring>>,
        kicks: &[EventFd],
    ) -> Result<Self, (io::Error, Option<Left>)> {
        let prepared = || -> io::Result<(EventFd, EventFd, Vec<EventFd>)> {
            let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
            let kicks = kicks.iter().map(EventFd::try_clone).collect::<io::Result<_>>()?;
            Ok((stop.try_clone()?, stop, kicks))
        };
        let (stop, stopped, kicks) = match prepared() {
            Ok(prepared) => prepared,
            Err(error) => return Err((error, Some((handler, rings)))),
        };
        let settles = Arc::new(AtomicBool::new(true));
        let does_settle = Arc::clone(&settles);
        let live = move || live(handler, rings, &kicks, &stopped, &does_settle);
        match std::thread::Builder::new().name(name).spawn(live) {
            Ok(thread) => Ok(Self { stop, settles, thread }),
            Err(error) => Err((error, None)),
        }
    }

    /// Stops; `None` when the thread has panicked. If it does not settle, what is in flight stays so, and nobody looks after it.
    pub(super) fn stop(self, settles: bool) -> Option<Left> {
        self.settles.store(settles, Ordering::Release);
        // An eventfd takes 2^64 - 2 of these.
        let _ = self.stop.write(1);
        self.thread.join().ok()
    }
}

fn live(
    mut handler: Box<dyn Handler>,
    mut rings: Vec<Option<Ring>>,
    kicks: &[EventFd],
    stop: &EventFd,
    settles: &AtomicBool,
) -> Left {
    loop {
        // Taken before the rings are looked at: a later kick is for the next round.
        for kick in kicks {
            let _ = kick.read();
        }
        let next = handler.serve(&mut rings);
        if stop.read().is_ok() {
            break;
        }
        if next == Next::Wait {
            let fds = kicks.iter().chain([stop]).map(borrow);
            if handler.wakers().wait(fds).is_err() {
                break;
            }
        }
    }
    if settles.load(Ordering::Acquire) {
        handler.settle(&mut rings);
    }
    (handler, rings)
}

/// An event, to be waited for.
pub(crate) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the event lives, from which it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
