//! The relay's loop: one thread waits for frames, for the next due instant and for requests, and feeds the pure [`Fabric`].

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::control::{Answer, LINE_CAP, Request};
use super::fabric::{Fabric, FabricSpec};
use super::packet::{BATCH, Buffers, PacketSocket};

/// Requests that may wait at once; connections beyond it are closed.
const CONNECTIONS_CAP: usize = 32;

/// Batches taken from one port before the others have their turn.
const BATCHES_PER_TURN: usize = 4;

/// Priority among real-time threads: below the kernel's own (50 and above are its interrupt threads).
const REALTIME_PRIORITY: libc::c_int = 40;

struct Asked {
    request: Request,
    answer: Sender<Answer>,
}

/// Runs the WAN in the namespace of the calling process until it is killed.
///
/// # Errors
/// When an interface of the specification is not there or the control socket cannot be made.
pub fn run(spec: FabricSpec, control: &Path) -> io::Result<()> {
    let fabric = Fabric::new(spec).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    let sockets =
        fabric.ports().iter().map(|port| PacketSocket::open(&port.interface)).collect::<io::Result<Vec<_>>>()?;
    let wake = Arc::new(event_fd()?);
    let timer = timer_fd()?;
    let epoll = epoll_fd()?;
    for (at, socket) in sockets.iter().enumerate() {
        watch(&epoll, socket.as_raw_fd(), at)?;
    }
    let (timer_token, wake_token) = (sockets.len(), sockets.len() + 1);
    watch(&epoll, timer.as_raw_fd(), timer_token)?;
    watch(&epoll, wake.as_raw_fd(), wake_token)?;

    let requests = serve_control(control, Arc::clone(&wake))?;
    let realtime = take_realtime();
    let outgoing = fabric.ports().iter().map(|_| Vec::new()).collect();
    let mut relay = Relay { fabric, sockets, outgoing, realtime, unsent_frames: 0 };
    let mut buffers = Buffers::default();
    let mut armed = None;
    loop {
        for token in wait(&epoll)? {
            if token == timer_token {
                swallow(&timer);
                armed = None;
            } else if token == wake_token {
                swallow(&wake);
                for asked in requests.try_iter() {
                    // Whoever asked may have gone away.
                    let _ = asked.answer.send(relay.answer(asked.request));
                }
            } else {
                relay.receive(token, &mut buffers);
            }
        }
        relay.deliver();
        let next = relay.fabric.next_due_ns();
        if next != armed && next.is_some() {
            arm(&timer, next.unwrap_or(0))?;
            armed = next;
        }
    }
}

struct Relay {
    fabric: Fabric,
    sockets: Vec<PacketSocket>,
    outgoing: Vec<Vec<Vec<u8>>>,
    realtime: bool,
    unsent_frames: u64,
}

impl Relay {
    fn receive(&mut self, port: usize, buffers: &mut Buffers) {
        for _ in 0..BATCHES_PER_TURN {
            let now = now_ns();
            let fabric = &mut self.fabric;
            // An error is told once (the interface went down) and clears itself.
            let got = self.sockets[port].receive(buffers, |frame| fabric.ingress(now, port, frame)).unwrap_or(0);
            if got < BATCH {
                return;
            }
        }
    }

    fn deliver(&mut self) {
        let outgoing = &mut self.outgoing;
        self.fabric.deliver_due(now_ns(), |port, frame| outgoing[port].push(frame));
        for (socket, frames) in self.sockets.iter().zip(outgoing) {
            if !frames.is_empty() {
                self.unsent_frames += (frames.len() - socket.send(frames)) as u64;
                frames.clear();
            }
        }
    }

    fn answer(&mut self, request: Request) -> Answer {
        let done = match request {
            Request::Link { a, b, rtt_ms, rate_mbit, loss_ppm, queue_bytes } => {
                self.fabric.shape(&a, &b).map_err(|error| error.to_string()).and_then(|old| {
                    let shape = Request::changed(old, rtt_ms, rate_mbit, loss_ppm, queue_bytes);
                    shape.check(&a, &b).map_err(|error| error.to_string())?;
                    self.fabric.set_shape(&a, &b, shape).map_err(|error| error.to_string())
                })
            }
            Request::Cut { a, b } => self.fabric.set_link_up(&a, &b, false).map_err(|error| error.to_string()),
            Request::Heal { a, b } => self.fabric.set_link_up(&a, &b, true).map_err(|error| error.to_string()),
            Request::HealAll => {
                self.fabric.heal_all();
                Ok(())
            }
            Request::Site { site, up } => self.fabric.set_site_up(&site, up).map_err(|error| error.to_string()),
            Request::Status => {
                let (realtime, unsent_frames) = (self.realtime, self.unsent_frames);
                return Answer::Status { realtime, unsent_frames, links: self.fabric.status() };
            }
        };
        match done {
            Ok(()) => Answer::Done { ok: true },
            Err(error) => Answer::Refused { error },
        }
    }
}

/// Accepts control connections on threads of their own, so that a slow client never delays a frame.
fn serve_control(path: &Path, wake: Arc<OwnedFd>) -> io::Result<Receiver<Asked>> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let (sender, receiver) = channel();
    let open = Arc::new(AtomicUsize::new(0));
    std::thread::Builder::new().name("control".into()).spawn(move || {
        for stream in listener.incoming().flatten() {
            if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_CAP {
                open.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let (sender, wake, open) = (sender.clone(), Arc::clone(&wake), Arc::clone(&open));
            std::thread::spawn(move || {
                // A client that hangs up or sends nonsense only loses its own connection.
                let _ = serve_client(&stream, &sender, &wake);
                open.fetch_sub(1, Ordering::Relaxed);
            });
        }
    })?;
    Ok(receiver)
}

fn serve_client(stream: &UnixStream, requests: &Sender<Asked>, wake: &OwnedFd) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    loop {
        let mut line = String::new();
        if reader.by_ref().take(LINE_CAP).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let answer = match serde_json::from_str(&line) {
            Ok(request) => {
                let (answer, answered) = channel();
                requests.send(Asked { request, answer }).map_err(|_| io::ErrorKind::BrokenPipe)?;
                add_one(wake)?;
                answered.recv_timeout(Duration::from_secs(5)).map_err(|_| io::ErrorKind::TimedOut)?
            }
            Err(error) => Answer::Refused { error: format!("not a request: {error}") },
        };
        let mut text = serde_json::to_string(&answer)?;
        text.push('\n');
        writer.write_all(text.as_bytes())?;
    }
}

/// The monotonic clock, on which timers are armed, in nanoseconds.
fn now_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec; CLOCK_MONOTONIC always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: callers pass a descriptor that they have just made and keep nowhere else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn event_fd() -> io::Result<OwnedFd> {
    // SAFETY: plain system call.
    owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })
}

fn timer_fd() -> io::Result<OwnedFd> {
    // SAFETY: plain system call.
    owned(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK) })
}

fn epoll_fd() -> io::Result<OwnedFd> {
    // SAFETY: plain system call.
    owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })
}

fn watch(epoll: &OwnedFd, fd: RawFd, token: usize) -> io::Result<()> {
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: token as u64 };
    // SAFETY: both descriptors are open, the event is valid for the call.
    let done = unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn wait(epoll: &OwnedFd) -> io::Result<impl Iterator<Item = usize>> {
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 64];
    // SAFETY: room for 64 events.
    let got = unsafe { libc::epoll_wait(epoll.as_raw_fd(), events.as_mut_ptr(), 64, -1) };
    let got = match usize::try_from(got) {
        Ok(got) => got,
        Err(_) => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => 0,
            error => return Err(error),
        },
    };
    Ok(events.into_iter().take(got).map(|event| usize::try_from(event.u64).unwrap_or(usize::MAX)))
}

fn swallow(fd: &OwnedFd) {
    let mut count = 0_u64;
    // SAFETY: eventfd and timerfd give 8 bytes; an empty one gives EAGAIN, which is as good.
    unsafe { libc::read(fd.as_raw_fd(), (&raw mut count).cast(), 8) };
}

fn add_one(fd: &OwnedFd) -> io::Result<()> {
    let one = 1_u64;
    // SAFETY: an eventfd takes 8 bytes.
    let done = unsafe { libc::write(fd.as_raw_fd(), (&raw const one).cast(), 8) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn arm(timer: &OwnedFd, at_ns: u64) -> io::Result<()> {
    // Zero would disarm it.
    let at_ns = at_ns.max(1);
    let value = libc::timespec {
        tv_sec: libc::time_t::try_from(at_ns / 1_000_000_000).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::try_from(at_ns % 1_000_000_000).unwrap_or(0),
    };
    let spec = libc::itimerspec { it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
    // SAFETY: `spec` is valid for the call; the old value is not asked for.
    let done = unsafe {
        libc::timerfd_settime(timer.as_raw_fd(), libc::TFD_TIMER_ABSTIME, &raw const spec, std::ptr::null_mut())
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Asks for real-time priority and exact timers for this thread; whether it got the priority.
fn take_realtime() -> bool {
    let parameters = libc::sched_param { sched_priority: REALTIME_PRIORITY };
    // SAFETY: plain system calls on the calling thread.
    unsafe {
        libc::prctl(libc::PR_SET_TIMERSLACK, 1_u64);
        libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) == 0
    }
}
