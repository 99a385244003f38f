//! Sending the guest: on a thread of its own, which has the machine meanwhile.

use std::{
    fs::File,
    ops::ControlFlow,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::Sender,
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use supercloud_blanket::vmm::{
    Machine,
    memory::PAGE_BYTES,
    travel::{self, Limits, Sent, TravelError},
};

use crate::{
    control::{Progress, Request},
    owner::Input,
};

/// A stream that takes nothing for so long is given up: the guest may be standing still.
const STALL: Duration = Duration::from_secs(10);

/// How often a client hears how far it is.
const TELL_EVERY: Duration = Duration::from_millis(200);

/// What came of it, with the machine.
#[derive(Debug)]
pub struct Arrival {
    /// It is whole, whatever came of it.
    pub machine: Machine,
    /// What came of it.
    pub outcome: Result<Sent, TravelError>,
}

/// A guest that is being sent.
#[derive(Debug)]
pub struct Sending {
    is_cancelled: Arc<AtomicBool>,
    /// It ran when it was asked for.
    pub was_running: bool,
}

impl Sending {
    /// Begins.
    ///
    /// # Errors
    /// When there is no thread; then the machine is gone.
    pub fn start(
        mut machine: Machine,
        stream: File,
        request: &Request,
        was_running: bool,
        inputs: Sender<Input>,
    ) -> anyhow::Result<Self> {
        let usual = Limits::default();
        let limits = Limits {
            max_downtime_ms: request.max_downtime_ms.unwrap_or(usual.max_downtime_ms),
            max_bytes_per_s: request.max_bytes_per_s,
            ..usual
        };
        let stream = UnixStream::from(OwnedFd::from(stream));
        stream.set_write_timeout(Some(STALL)).context("bounding the stream's patience")?;
        let is_cancelled = Arc::new(AtomicBool::new(false));
        let cancelled = Arc::clone(&is_cancelled);
        let work = move || {
            let mut told = Instant::now();
            let mut watch = |progress: &travel::Progress| {
                if told.elapsed() >= TELL_EVERY {
                    told = Instant::now();
                    let _ = inputs.send(Input::Progress(shown(progress, None)));
                }
                if cancelled.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            let outcome = travel::send(&mut machine, &stream, &limits, &mut watch);
            let _ = inputs.send(Input::Traveled(Box::new(Arrival { machine, outcome })));
        };
        std::thread::Builder::new().name("travel".to_owned()).spawn(work).context("beginning a thread")?;
        Ok(Self { is_cancelled, was_running })
    }

    /// Asks it to give up.
    pub fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Relaxed);
    }
}

/// As a client is told.
pub fn shown(progress: &travel::Progress, paused_for: Option<Duration>) -> Progress {
    Progress {
        round: progress.round,
        sent_bytes: progress.sent_bytes,
        left_bytes: progress.left_pages.saturating_mul(PAGE_BYTES),
        dirty_bytes_per_s: progress.dirty_pages_per_s.saturating_mul(PAGE_BYTES),
        paused_ms: paused_for.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
    }
}
