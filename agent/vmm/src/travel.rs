//! Sending and receiving the guest: on a thread of its own, which has the machine meanwhile.

use std::{
    fs::File,
    net::Shutdown,
    ops::ControlFlow,
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use kvm_ioctls::Kvm;
use supercloud_blanket::vmm::{
    Incoming, Machine, MachineConfig, Outcome,
    legacy::Sink,
    memory::PAGE_BYTES,
    travel::{self, Limits, Sent, StreamVersion, TravelError, left::Fetch},
    virtio::Device,
};

use crate::{
    control::{Progress, Request},
    left,
    mirror::Standby,
    owner::Input,
};

/// How often it is asked, while the stream takes nothing, whether the guest is still to be sent.
pub const ASK_EVERY: Duration = Duration::from_millis(100);

/// How often a client hears how far it is.
pub const TELL_EVERY: Duration = Duration::from_millis(200);

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
    limits: Arc<Mutex<Limits>>,
    /// It ran when it was asked for.
    pub was_running: bool,
}

impl Sending {
    /// Begins, and takes the machine.
    ///
    /// # Errors
    /// When there is no thread or the stream is none; then the machine is not taken.
    pub fn start(
        machine: &mut Option<Machine>,
        stream: UnixStream,
        request: &Request,
        was_running: bool,
        inputs: Sender<Input>,
    ) -> anyhow::Result<Self> {
        let limits = Arc::new(Mutex::new(changed(Limits::default(), request)));
        let asked = Arc::clone(&limits);
        stream.set_write_timeout(Some(ASK_EVERY)).context("bounding the stream's patience")?;
        let is_cancelled = Arc::new(AtomicBool::new(false));
        let cancelled = Arc::clone(&is_cancelled);
        let (give, take) = std::sync::mpsc::channel::<Machine>();
        let work = move || {
            let Ok(mut machine) = take.recv() else { return };
            let (mut told, mut last) = (Instant::now(), (false, false));
            let mut watch = |progress: &travel::Progress| {
                let now = (progress.is_last, progress.is_holding);
                if told.elapsed() >= TELL_EVERY || now != last {
                    (told, last) = (Instant::now(), now);
                    let _ = inputs.send(Input::Progress(shown(progress, None)));
                }
                if cancelled.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            let limits = || *asked.lock().unwrap_or_else(PoisonError::into_inner);
            let outcome = travel::send(&mut machine, &stream, &limits, &mut watch);
            let _ = inputs.send(Input::Traveled(Box::new(Arrival { machine, outcome })));
        };
        std::thread::Builder::new().name("travel".to_owned()).spawn(work).context("beginning a thread")?;
        // The thread waits for it.
        let _ = give.send(machine.take().context("there is no machine")?);
        Ok(Self { is_cancelled, limits, was_running })
    }

    /// Changes what the request names of its limits.
    pub fn limit(&self, request: &Request) {
        let mut limits = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        *limits = changed(*limits, request);
    }

    /// Asks it to give up.
    pub fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Relaxed);
    }
}

fn changed(limits: Limits, request: &Request) -> Limits {
    Limits {
        max_downtime_ms: request.max_downtime_ms.unwrap_or(limits.max_downtime_ms),
        max_bytes_per_s: request.max_bytes_per_s.or(limits.max_bytes_per_s),
        may_throttle: request.may_throttle.unwrap_or(limits.may_throttle),
        holds: request.holds.unwrap_or(limits.holds),
        memory: request.memory.unwrap_or(limits.memory),
        stream: request.stream_version.map_or(limits.stream, StreamVersion::for_who_reads),
        ..limits
    }
}

/// What a machine is made of before it has come.
pub struct Parts {
    /// `/dev/userfaultfd`: without it all of its memory must come.
    pub userfaultfd: Option<File>,
    pub kvm: Kvm,
    pub config: MachineConfig,
    pub console: Sink,
    pub devices: Vec<Device>,
}

/// A guest that came, what tells how its run ends, and what fetches of its memory what was left behind; or why it did not come.
pub type Received = Result<(Machine, Receiver<Outcome>, Option<Fetch>), TravelError>;

/// A guest that is being received.
#[derive(Debug)]
pub struct Receiving {
    stream: UnixStream,
}

impl Receiving {
    /// Begins.
    ///
    /// # Errors
    /// When there is no thread, or no descriptor.
    pub fn start(stream: &UnixStream, parts: Parts, inputs: Sender<Input>) -> anyhow::Result<Self> {
        let copy = || stream.try_clone().context("copying a descriptor");
        let (from, stream) = (copy()?, copy()?);
        let Parts { userfaultfd, kvm, config, console, devices } = parts;
        let work = move || {
            let make = || Ok::<_, TravelError>(Incoming::new(kvm, config, console, devices)?);
            // What the other end says of the machine is compared with what it shall be.
            let came = travel::open(&from).and_then(|opened| make().map(|incoming| (opened, incoming)));
            let _ = match came {
                Ok((opened, incoming)) if opened.is_mirror() => {
                    let back = from.try_clone().map_err(TravelError::from);
                    let outcome = back.and_then(|back| Standby::receive(opened, incoming, back, &inputs));
                    inputs.send(Input::StandbyOver(outcome))
                }
                Ok((opened, incoming)) => {
                    let came = opened.receive_or_leave(incoming, userfaultfd.is_some());
                    let came = came.and_then(|(machine, told, left)| {
                        let fetch = left.zip(userfaultfd).map(|(left, device)| {
                            Fetch::start(&device, machine.ram(), machine.keep_memory(), left, left::teller(&inputs))
                        });
                        Ok((machine, told, fetch.transpose()?))
                    });
                    inputs.send(Input::Received(Box::new(came)))
                }
                Err(error) => inputs.send(Input::Received(Box::new(Err(error)))),
            };
        };
        std::thread::Builder::new().name("travel".to_owned()).spawn(work).context("beginning a thread")?;
        Ok(Self { stream })
    }

    /// Gives it up: it ends soon, as a stream that was cut off.
    pub fn cancel(&self) {
        // One that is closed already ends by itself.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// As a client is told.
pub fn shown(progress: &travel::Progress, paused_for: Option<Duration>) -> Progress {
    Progress {
        round: progress.round,
        sent_bytes: progress.sent_bytes,
        left_bytes: progress.left_pages.saturating_mul(PAGE_BYTES),
        dirty_bytes_per_s: progress.dirty_pages_per_s.saturating_mul(PAGE_BYTES),
        is_last: progress.is_last,
        is_holding: progress.is_holding,
        throttle_percent: progress.throttle_percent,
        paused_ms: paused_for.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        left_behind_bytes: None,
    }
}
