//! One connection to one libvirtd, shared, reopened when the daemon was away; and its events.
//!
//! libvirt's calls block, so each runs on a blocking thread, at most [`CALLS_AT_ONCE`] of them, each awaited no longer
//! than its budget. The library's event loop has a thread of its own for the whole process; it also answers keepalives,
//! so that a daemon that hangs is noticed (five unanswered ones, five seconds apart).
//!
//! A connection is more than a pipe: libvirtd destroys an *incoming* guest when the connection that prepared it closes
//! (see `migration`), so it is dropped only when it is dead.

use std::{
    collections::HashMap,
    ffi::{CStr, c_char, c_int, c_void},
    ptr,
    sync::{
        Arc, Mutex, Once, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use supercloud_blanket::{
    BackendError, BackendResult,
    backend::{BackendEvent, GuestEvent, PauseReason},
};
use supercloud_ids::GuestId;
use tokio::sync::{Semaphore, broadcast, watch};
use tracing::{debug, info, warn};
use virt::{connect::Connect, domain::Domain, sys};

use crate::{
    ffi::{LibError, LibResult},
    state, xml,
};

/// Blocking calls at once; long ones (copying, freezing) are not counted.
const CALLS_AT_ONCE: usize = 12;
const KEEPALIVE_INTERVAL_S: i32 = 5;
const KEEPALIVE_COUNT: u32 = 5;
/// Events kept for a receiver that is slow.
const EVENT_ROOM: usize = 1024;
/// Pauses remembered (oldest dropped) to tell how long a departed guest has stood still.
const PAUSES_KEPT: usize = 256;

/// What the event callbacks of one backend share with it.
pub(crate) struct EventSink {
    sender: broadcast::Sender<BackendEvent>,
    /// When each guest was last paused by the end of its copy.
    departed_at: Mutex<HashMap<GuestId, Instant>>,
    /// Counts those pauses.
    departures: watch::Sender<u64>,
}

impl EventSink {
    fn send(&self, event: BackendEvent) {
        // Nobody listening is fine.
        let _ = self.sender.send(event);
    }

    fn guest(&self, guest: GuestId, what: GuestEvent) {
        if what == GuestEvent::Paused(PauseReason::Departed) {
            let mut pauses = self.departed_at.lock().unwrap_or_else(PoisonError::into_inner);
            if pauses.len() >= PAUSES_KEPT
                && let Some(oldest) = pauses.iter().min_by_key(|(_, at)| **at).map(|(guest, _)| *guest)
            {
                pauses.remove(&oldest);
            }
            pauses.insert(guest, Instant::now());
            drop(pauses);
            self.departures.send_modify(|count| *count += 1);
        }
        self.send(BackendEvent::Guest { guest, what });
    }

    /// Changes whenever a guest is paused by the end of its copy.
    pub(crate) fn departures(&self) -> watch::Receiver<u64> {
        self.departures.subscribe()
    }

    /// Whether the guest was seen to be paused by the end of its copy.
    pub(crate) fn has_departed(&self, guest: GuestId) -> bool {
        self.departed_at.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&guest)
    }

    /// When the guest was paused by the end of its copy, if that was seen; forgets it.
    pub(crate) fn take_departed_at(&self, guest: GuestId) -> Option<Instant> {
        self.departed_at.lock().unwrap_or_else(PoisonError::into_inner).remove(&guest)
    }
}

/// An open connection with its event callbacks.
struct Open {
    connect: Connect,
    callbacks: Vec<c_int>,
}

impl Drop for Open {
    fn drop(&mut self) {
        for callback in &self.callbacks {
            // A callback holds a reference to its connection; without this a dead connection would never be freed.
            // SAFETY: connect is live; an id that is no longer known is an error that we do not mind.
            unsafe { sys::virConnectDomainEventDeregisterAny(self.connect.as_ptr(), *callback) };
        }
    }
}

/// The shared connection.
pub(crate) struct Connection {
    uri: String,
    open: Mutex<Option<Open>>,
    calls: Arc<Semaphore>,
    /// Counts the connections opened.
    generation: AtomicU64,
    pub(crate) sink: Arc<EventSink>,
}

impl Connection {
    pub(crate) fn new(uri: String) -> Arc<Self> {
        start_event_loop();
        let (sender, _) = broadcast::channel(EVENT_ROOM);
        let sink = Arc::new(EventSink { sender, departed_at: Mutex::default(), departures: watch::Sender::new(0) });
        Arc::new(Self {
            uri,
            open: Mutex::new(None),
            calls: Arc::new(Semaphore::new(CALLS_AT_ONCE)),
            generation: AtomicU64::new(0),
            sink,
        })
    }

    pub(crate) fn subscribe(&self) -> broadcast::Receiver<BackendEvent> {
        self.sink.sender.subscribe()
    }

    /// Which connection it is: changes whenever a new one was opened.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Which connection `at` is; `None` when it is not the present one any more.
    pub(crate) fn generation_of(&self, at: &Connect) -> Option<u64> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the pointers are only compared.
        let is_present = open.as_ref().is_some_and(|open| unsafe { open.connect.as_ptr() == at.as_ptr() });
        is_present.then(|| self.generation())
    }

    /// The live connection; opens one when there is none. Blocks.
    fn get(&self) -> LibResult<Connect> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = &*open {
            if there.connect.is_alive().unwrap_or(false) {
                return Ok(there.connect.clone());
            }
            info!(uri = %self.uri, "the connection to libvirtd is dead");
            *open = None;
        }
        let connect = Connect::open(Some(&self.uri))?;
        // The daemon's answers to keepalives are read by the event loop.
        connect.set_keep_alive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)?;
        let mut fresh = Open { connect: connect.clone(), callbacks: Vec::new() };
        register(&mut fresh, &self.sink)?;
        *open = Some(fresh);
        self.generation.fetch_add(1, Ordering::AcqRel);
        info!(uri = %self.uri, "connected to libvirtd");
        self.sink.send(BackendEvent::Resynchronise);
        Ok(connect)
    }

    /// Runs a call on a blocking thread. What it began it ends, even when the budget is over before.
    pub(crate) async fn call<T, F>(self: &Arc<Self>, what: &'static str, budget: Duration, work: F) -> BackendResult<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connect) -> LibResult<T> + Send + 'static,
    {
        let overdue = || BackendError::Deadline { what, budget_ms: millis(budget) };
        let run = async {
            let Ok(turn) = Arc::clone(&self.calls).acquire_owned().await else { return Err(overdue()) };
            self.run(what, move |at| {
                // Kept by the thread, not by who waits: calls that hang must not pile up.
                let _turn = turn;
                work(at)
            })
            .await
        };
        tokio::time::timeout(budget, run).await.unwrap_or_else(|_| Err(overdue()))
    }

    /// As [`Connection::call`], for work that lasts: no budget, not counted.
    pub(crate) async fn run<T, F>(self: &Arc<Self>, what: &'static str, work: F) -> BackendResult<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connect) -> LibResult<T> + Send + 'static,
    {
        let this = Arc::clone(self);
        let worker = tokio::task::spawn_blocking(move || {
            let connect = this.get().map_err(|error| BackendError::Away { what, detail: error.message })?;
            work(&connect).map_err(|error| {
                debug!(what, code = error.code, message = %error.message, "libvirt");
                if connect.is_alive().unwrap_or(false) {
                    classify(what, error)
                } else {
                    BackendError::Away { what, detail: error.message }
                }
            })
        });
        match worker.await {
            Ok(result) => result,
            Err(broken) => Err(BackendError::Failed { what, detail: broken.to_string() }),
        }
    }

    /// Keeps the connection up, so that events come even when nobody calls. Runs until dropped.
    pub(crate) async fn keep_open(self: Arc<Self>, every: Duration) {
        let mut was_away = false;
        loop {
            match self.call("connect", Duration::from_secs(30), |_| Ok(())).await {
                Ok(()) => was_away = false,
                Err(error) if !was_away => {
                    was_away = true;
                    warn!(uri = %self.uri, %error, "libvirtd cannot be reached; trying on");
                }
                Err(_) => {}
            }
            tokio::time::sleep(every).await;
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn classify(what: &'static str, error: LibError) -> BackendError {
    if error.is_aborted() {
        return BackendError::Cancelled { what };
    }
    BackendError::Failed { what, detail: error.message }
}

/// Starts the library's event loop, once for the process. It must be there before the first connection is opened.
fn start_event_loop() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // It would print every error to stderr besides returning it.
        virt::error::clear_error_callback();
        if let Err(error) = virt::event::event_register_default_impl() {
            warn!(%error, "libvirt's event loop cannot be set up: no events, no keepalives");
            return;
        }
        let started = std::thread::Builder::new().name("libvirt-events".to_owned()).spawn(|| {
            loop {
                if let Err(error) = virt::event::event_run_default_impl() {
                    warn!(%error, "libvirt's event loop");
                    #[expect(clippy::disallowed_methods, reason = "a thread of its own, outside the runtime")]
                    std::thread::sleep(Duration::from_millis(200));
                }
            }
        });
        if let Err(error) = started {
            warn!(%error, "libvirt's event loop cannot be started: no events, no keepalives");
        }
    });
}

type Generic = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);
type Lifecycle = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int;
type IoError = unsafe extern "C" fn(
    sys::virConnectPtr,
    sys::virDomainPtr,
    *const c_char,
    *const c_char,
    c_int,
    *const c_char,
    *mut c_void,
);

fn register(open: &mut Open, sink: &Arc<EventSink>) -> LibResult<()> {
    // SAFETY: libvirt casts each callback back to the type that belongs to its event id (virConnectDomainEventCallback
    // and virConnectDomainEventIOErrorReasonCallback); these are those types.
    let (lifecycle, io_error) = unsafe {
        (std::mem::transmute::<Lifecycle, Generic>(on_lifecycle), std::mem::transmute::<IoError, Generic>(on_io_error))
    };
    let wanted = [
        (sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle),
        (sys::VIR_DOMAIN_EVENT_ID_REBOOT, on_reboot as Generic),
        (sys::VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON, io_error),
    ];
    for (event, callback) in wanted {
        let opaque = Arc::into_raw(Arc::clone(sink)).cast_mut().cast::<c_void>();
        // SAFETY: connect is live; a null domain means all; opaque is an Arc's raw pointer, which libvirt gives to the
        // callback and, once, to `free_sink` when the callback is removed.
        let id = unsafe {
            sys::virConnectDomainEventRegisterAny(
                open.connect.as_ptr(),
                ptr::null_mut(),
                c_int::try_from(event).unwrap_or(0),
                Some(callback),
                opaque,
                Some(free_sink),
            )
        };
        if id < 0 {
            let error = LibError::from(virt::error::Error::last_error());
            // SAFETY: libvirt does not call the free function of a callback that it did not take.
            unsafe { free_sink(opaque) };
            return Err(error);
        }
        open.callbacks.push(id);
    }
    Ok(())
}

unsafe extern "C" fn free_sink(opaque: *mut c_void) {
    // SAFETY: `register` made it from an Arc; called once.
    drop(unsafe { Arc::from_raw(opaque.cast::<EventSink>().cast_const()) });
}

/// The guest that a callback is about; `None` when it is not ours.
///
/// # Safety
/// `domain` is live for the call.
unsafe fn guest_of(domain: sys::virDomainPtr) -> Option<GuestId> {
    // SAFETY: domain is live, its name lives as long.
    let name = unsafe { sys::virDomainGetName(domain) };
    if name.is_null() {
        return None;
    }
    // SAFETY: a zero-terminated string of libvirt's.
    unsafe { CStr::from_ptr(name) }.to_str().ok()?.parse().ok()
}

unsafe extern "C" fn on_lifecycle(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: libvirt gives a live domain and our opaque, which lives until `free_sink`.
    let (guest, sink) = unsafe { (guest_of(domain), &*opaque.cast::<EventSink>()) };
    if let Some(guest) = guest
        && let (Ok(event), Ok(detail)) = (u32::try_from(event), u32::try_from(detail))
        && let Some(what) = state::lifecycle(event, detail)
    {
        sink.guest(guest, what);
    }
    0
}

unsafe extern "C" fn on_reboot(_connect: sys::virConnectPtr, domain: sys::virDomainPtr, opaque: *mut c_void) {
    // SAFETY: as in `on_lifecycle`.
    let (guest, sink) = unsafe { (guest_of(domain), &*opaque.cast::<EventSink>()) };
    if let Some(guest) = guest {
        sink.guest(guest, GuestEvent::Rebooted);
    }
}

unsafe extern "C" fn on_io_error(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _path: *const c_char,
    alias: *const c_char,
    _action: c_int,
    _reason: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: as in `on_lifecycle`; alias is a zero-terminated string or null.
    let (guest, sink, alias) = unsafe {
        let alias = if alias.is_null() { None } else { CStr::from_ptr(alias).to_str().ok() };
        (guest_of(domain), &*opaque.cast::<EventSink>(), alias)
    };
    if let Some(guest) = guest {
        let alias = alias.unwrap_or_default();
        let disk = alias.strip_prefix(xml::DISK_ALIAS).unwrap_or(alias).to_owned();
        sink.guest(guest, GuestEvent::DiskError { disk });
    }
}

/// The guest's machine; `None` when it is not here.
pub(crate) fn find(connect: &Connect, guest: GuestId) -> LibResult<Option<Domain>> {
    match connect.lookup_domain_by_name(&guest.to_string()).map_err(LibError::from) {
        Ok(domain) => Ok(Some(domain)),
        Err(error) if error.is_no_domain() => Ok(None),
        Err(error) => Err(error),
    }
}
