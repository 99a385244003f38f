//! The thread of a device.
//!
//! It serves rings until it is stopped, and can be stopped only between two rounds of bounded work; then it gives
//! handler and rings back, with nothing half done. Pausing, saving and resetting a device are all this one thing.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
    thread::JoinHandle,
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

/// What a device does with its queues. Not called while the device is paused.
pub trait Handler: Send {
    /// Hears which features were agreed, before the first [`Handler::serve`].
    fn begin(&mut self, features: u64) {
        let _ = features;
    }

    /// Serves what there is, at most about [`BUDGET`] requests. To wait for a ring it asks that ring for kicks.
    fn serve(&mut self, rings: &mut [Option<Ring>]) -> Next;

    /// A descriptor that wakes the thread when it can be read, if one should now.
    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// What it holds between two requests that is not in guest memory, when it is not served.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes over what another had saved; false when that cannot be.
    fn restore(&mut self, saved: &[u8]) -> bool {
        saved.is_empty()
    }

    /// Finishes what is in flight: nothing may touch guest memory after this.
    fn settle(&mut self, rings: &mut [Option<Ring>]) {
        let _ = rings;
    }
}

/// Requests of one round: how long a device may not be stopped.
pub const BUDGET: usize = 64;

/// Everything that a stopped worker leaves.
pub(super) type Left = (Box<dyn Handler>, Vec<Option<Ring>>);

/// A running thread.
#[derive(Debug)]
pub(super) struct Worker {
    stop: EventFd,
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
        let live = move || live(handler, rings, &kicks, &stopped);
        match std::thread::Builder::new().name(name).spawn(live) {
            Ok(thread) => Ok(Self { stop, thread }),
            Err(error) => Err((error, None)),
        }
    }

    /// Stops; `None` when the thread has panicked.
    pub(super) fn stop(self) -> Option<Left> {
        // An eventfd takes 2^64 - 2 of these.
        let _ = self.stop.write(1);
        self.thread.join().ok()
    }
}

fn live(mut handler: Box<dyn Handler>, mut rings: Vec<Option<Ring>>, kicks: &[EventFd], stop: &EventFd) -> Left {
    loop {
        // Taken before the rings are looked at: a later kick is for the next round.
        for kick in kicks {
            let _ = kick.read();
        }
        let next = handler.serve(&mut rings);
        if stop.read().is_ok() {
            break;
        }
        if next == Next::Wait && wait(kicks, stop, handler.source()).is_err() {
            break;
        }
    }
    handler.settle(&mut rings);
    (handler, rings)
}

fn wait(kicks: &[EventFd], stop: &EventFd, source: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let fds = kicks.iter().chain([stop]).map(|event| event.as_raw_fd()).chain(source.map(|fd| fd.as_raw_fd()));
    let mut polled: Vec<libc::pollfd> = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    loop {
        let count = libc::nfds_t::try_from(polled.len()).unwrap_or(0);
        // SAFETY: the pointer and the count are those of a vector that lives until the call returns.
        if unsafe { libc::poll(polled.as_mut_ptr(), count, -1) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
