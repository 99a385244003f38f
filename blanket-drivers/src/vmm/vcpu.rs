//! A thread per vCPU that can be paused, resumed and ended.
//!
//! ```text
//!            resume()              pause()
//!   parked ----------> running ----------------> parked      end(): from either; the thread returns
//!                        |  an exit is handled
//!                        +--> again
//! ```
//!
//! What is wanted of all threads is one value under a lock. To get a thread out of `KVM_RUN` it is signalled; the
//! signal's handler sets `immediate_exit` in the page that the thread shares with the kernel, so that a signal that
//! comes just before `KVM_RUN` is not lost either. A thread whose guest's lease is over parks as if that had been asked for. A thread parks only after KVM has finished the access of the exit
//! before (one `KVM_RUN` with `immediate_exit` set), so that what is saved then is whole.

use std::{
    cell::Cell,
    os::unix::thread::JoinHandleExt as _,
    ptr,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{
    VmmError,
    bus::Bus,
    io_error,
    lease::{Holds, Lease},
    machine::{Endings, Outcome},
};
use crate::signal;

/// How long a thread may take to park or end.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is signalled meanwhile. The first signal is enough; a thread that has just begun does not yet listen.
const SIGNAL_EVERY: Duration = Duration::from_millis(20);

/// Most exits that one access may take to finish: a page of bytes, each on its own.
const MAX_ACCESS_EXITS: u32 = 4096;

thread_local! {
    /// This vCPU's `immediate_exit`; null elsewhere. Without a destructor, so that a signal's handler may read it.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// What the signal does to a vCPU's thread.
pub(crate) fn on_signal() {
    let at = IMMEDIATE_EXIT.get();
    if !at.is_null() {
        // SAFETY: the pointer is set by the thread that is interrupted, to a byte in a page that is mapped until it
        // sets null again; the kernel reads the byte, and this thread writes it by volatile accesses only.
        unsafe { at.write_volatile(1) };
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Parked,
    Running,
    Ended,
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    /// Threads that run the guest, or are about to.
    active: Vec<bool>,
    /// For how long the guest may run.
    lease: Option<Arc<Lease>>,
}

impl State {
    /// What is wanted, as far as the lease lets it be.
    fn allowed(&self) -> Wanted {
        match self.wanted {
            Wanted::Running if self.lease.as_ref().is_some_and(|lease| lease.is_over()) => Wanted::Parked,
            wanted => wanted,
        }
    }
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads, as the lease knows them. None of them is joined before it is taken out of here.
#[derive(Debug)]
struct Runners {
    shared: Arc<Shared>,
    threads: Mutex<Vec<libc::pthread_t>>,
}

impl Runners {
    fn lock(&self) -> MutexGuard<'_, Vec<libc::pthread_t>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Holds for Runners {
    fn stop(&self) {
        let threads = self.lock();
        let state = self.shared.lock();
        for (thread, is_active) in threads.iter().zip(&state.active) {
            if *is_active && let Some(signal) = signal::kick() {
                // SAFETY: the thread was neither joined nor detached: it would not be in the list, whose lock is held.
                unsafe { libc::pthread_kill(*thread, signal) };
            }
        }
    }

    fn wake(&self) {
        // Not between a thread's look and its sleep.
        drop(self.shared.lock());
        self.shared.changed.notify_all();
    }
}

/// The ports and registers that a guest's accesses go to.
#[derive(Debug, Clone)]
pub struct Buses {
    /// Ports.
    pub ports: Arc<Bus>,
    /// Memory-mapped registers.
    pub registers: Arc<Bus>,
}

/// All vCPUs of a machine.
#[derive(Debug)]
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<VcpuFd>>,
    runners: Arc<Runners>,
}

impl Vcpus {
    /// Begins a thread for each vCPU; all are parked.
    ///
    /// # Errors
    /// When no thread or no signal is to be had.
    pub fn start(vcpus: Vec<VcpuFd>, buses: &Buses, outcomes: &Endings) -> Result<Self, VmmError> {
        if signal::kick().is_none() {
            return Err(io_error("claiming a signal")(std::io::Error::other("none is free")));
        }
        let state = State { wanted: Wanted::Parked, active: vec![false; vcpus.len()], lease: None };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let runners = Arc::new(Runners { shared: Arc::clone(&shared), threads: Mutex::default() });
        let mut all = Self { shared: Arc::clone(&shared), threads: Vec::new(), runners };
        for (index, fd) in vcpus.into_iter().enumerate() {
            let thread =
                Thread { index, fd, buses: buses.clone(), outcomes: outcomes.clone(), shared: Arc::clone(&shared) };
            let spawned = std::thread::Builder::new().name(format!("vcpu-{index}")).spawn(move || thread.live());
            // Those that live already end when `all` is dropped.
            all.threads.push(spawned.map_err(io_error("beginning a vCPU's thread"))?);
        }
        Ok(all)
    }

    /// From now on the guest runs only as long as its lease lets it.
    pub fn obey(&self, lease: &Arc<Lease>) {
        *self.runners.lock() = self.threads.iter().map(JoinHandle::as_pthread_t).collect();
        self.shared.lock().lease = Some(Arc::clone(lease));
        let runners: Weak<Runners> = Arc::downgrade(&self.runners);
        lease.hold(runners);
    }

    /// Lets the guest run.
    pub fn resume(&self) {
        let mut state = self.shared.lock();
        if state.wanted != Wanted::Ended {
            state.wanted = Wanted::Running;
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Stops the guest; returns when no vCPU runs and none has an access half done.
    ///
    /// # Errors
    /// [`VmmError::Stuck`] when one does not come out of the kernel.
    pub fn pause(&self) -> Result<(), VmmError> {
        self.demand(Wanted::Parked)
    }

    /// Whether the guest runs, or will as soon as its threads have heard of it.
    #[must_use]
    pub fn are_wanted(&self) -> bool {
        matches!(self.shared.lock().wanted, Wanted::Running)
    }

    /// Whether no vCPU runs.
    #[must_use]
    pub fn are_parked(&self) -> bool {
        !self.shared.lock().active.contains(&true)
    }

    /// Ends all threads and gives their vCPUs back, stopped between two instructions.
    ///
    /// # Errors
    /// [`VmmError::Stuck`] when one does not come out of the kernel; its thread is left behind.
    pub fn end(mut self) -> Result<Vec<VcpuFd>, VmmError> {
        self.runners.lock().clear();
        self.demand(Wanted::Ended)?;
        std::mem::take(&mut self.threads).into_iter().map(|thread| thread.join().map_err(|_| VmmError::Ended)).collect()
    }

    fn demand(&self, wanted: Wanted) -> Result<(), VmmError> {
        let give_up = Instant::now() + PATIENCE;
        let mut state = self.shared.lock();
        if state.wanted != Wanted::Ended {
            state.wanted = wanted;
        }
        self.shared.changed.notify_all();
        loop {
            let Some(busy) = state.active.iter().position(|is_active| *is_active) else { return Ok(()) };
            if Instant::now() >= give_up {
                return Err(VmmError::Stuck { index: u8::try_from(busy).unwrap_or(u8::MAX) });
            }
            for (thread, is_active) in self.threads.iter().zip(&state.active) {
                if *is_active && let Some(signal) = signal::kick() {
                    // SAFETY: the thread was neither joined nor detached, so its id is valid.
                    unsafe { libc::pthread_kill(thread.as_pthread_t(), signal) };
                }
            }
            state = self.shared.changed.wait_timeout(state, SIGNAL_EVERY).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.runners.lock().clear();
        if self.demand(Wanted::Ended).is_ok() {
            for thread in std::mem::take(&mut self.threads) {
                let _ = thread.join();
            }
        }
    }
}

struct Thread {
    index: usize,
    fd: VcpuFd,
    buses: Buses,
    outcomes: Endings,
    shared: Arc<Shared>,
}

impl Thread {
    fn live(mut self) -> VcpuFd {
        IMMEDIATE_EXIT.set(&raw mut self.fd.get_kvm_run().immediate_exit);
        while self.await_run() {
            if let Some(outcome) = self.run() {
                // The others run on until the machine's owner has heard of it; this one has nothing more to run.
                self.outcomes.tell(outcome);
                self.leave();
                self.await_end();
                break;
            }
        }
        IMMEDIATE_EXIT.set(ptr::null_mut());
        self.fd
    }

    /// Waits until the guest may run; false when the thread shall end.
    fn await_run(&mut self) -> bool {
        // Cleared before what is wanted is looked at: a signal from now on is for what comes after.
        self.set_immediate_exit(0);
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        if state.allowed() != Wanted::Running && state.active[self.index] {
            drop(state);
            self.finish_access();
            self.set_immediate_exit(0);
            state = shared.lock();
        }
        loop {
            match state.allowed() {
                Wanted::Running => {
                    if !state.active[self.index] {
                        // A guest that watches its own progress shall know why there was none; one without kvmclock cannot.
                        let _ = self.fd.kvmclock_ctrl();
                    }
                    state.active[self.index] = true;
                    return true;
                }
                Wanted::Parked | Wanted::Ended => {
                    if state.active[self.index] {
                        state.active[self.index] = false;
                        shared.changed.notify_all();
                    }
                    if state.wanted == Wanted::Ended {
                        return false;
                    }
                    state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Not running any more, whatever is wanted.
    fn leave(&self) {
        self.shared.lock().active[self.index] = false;
        self.shared.changed.notify_all();
    }

    fn await_end(&self) {
        let mut state = self.shared.lock();
        while state.wanted != Wanted::Ended {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn set_immediate_exit(&mut self, value: u8) {
        // Volatile, as the handler of a signal may write it between any two instructions.
        // SAFETY: the byte is in the page that the vCPU's descriptor keeps mapped.
        unsafe { (&raw mut self.fd.get_kvm_run().immediate_exit).write_volatile(value) };
    }

    /// Lets KVM finish the access of the last exit without running the guest.
    fn finish_access(&mut self) {
        // EINTR is the expected answer; another exit (an access in several parts) is handled like any. Bounded, as
        // the guest chooses how long a string of accesses is.
        for _ in 0..MAX_ACCESS_EXITS {
            self.set_immediate_exit(1);
            let Ok(exit) = self.fd.run() else { break };
            if handle(&self.buses, exit).is_some() {
                break;
            }
        }
    }

    /// Runs until the next exit or signal.
    fn run(&mut self) -> Option<Outcome> {
        match self.fd.run() {
            Ok(exit) => handle(&self.buses, exit),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => None,
            Err(error) => Some(Outcome::Broken { reason: format!("a vCPU cannot run: {error}") }),
        }
    }
}

/// Answers an exit; `Some` when the guest cannot go on.
fn handle(buses: &Buses, exit: VcpuExit<'_>) -> Option<Outcome> {
    match exit {
        // Devices at ports are a byte wide: wider accesses and strings are one access after the other.
        VcpuExit::IoOut(port, data) => data.iter().for_each(|byte| buses.ports.write(port.into(), &[*byte])),
        VcpuExit::IoIn(port, data) => {
            data.iter_mut().for_each(|byte| buses.ports.read(port.into(), std::slice::from_mut(byte)));
        }
        VcpuExit::MmioRead(at, data) => buses.registers.read(at, data),
        VcpuExit::MmioWrite(at, data) => buses.registers.write(at, data),
        VcpuExit::Intr => {}
        // A triple fault: on a real machine, a reset.
        VcpuExit::Shutdown => return Some(Outcome::Reset),
        VcpuExit::FailEntry(reason, _) => {
            return Some(Outcome::Broken { reason: format!("the processor refuses the guest's state ({reason:#x})") });
        }
        VcpuExit::InternalError => return Some(Outcome::Broken { reason: "KVM cannot emulate the guest".to_owned() }),
        other => return Some(Outcome::Broken { reason: format!("KVM ended a vCPU by {other:?}") }),
    }
    None
}
