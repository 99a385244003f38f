//! What both sides' streams go through: a relay of unix sockets that lets so many bytes per second pass, after so long.

use std::{
    collections::VecDeque,
    io::{Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// A link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Bits per second.
    pub bits_per_s: u64,
    /// One way.
    pub delay: Duration,
}

/// Bytes that are on their way at most: what a sender sees as the link's buffer.
const CHUNK_BYTES: usize = 16 << 10;

/// A relay that runs until its sources close. All connections share the link.
#[derive(Debug)]
pub struct Relay {
    link: Link,
    passed: Arc<AtomicU64>,
    /// When the link has room for the next byte.
    free_at: Arc<Mutex<Instant>>,
    threads: Vec<JoinHandle<()>>,
}

impl Relay {
    /// A relay without a connection yet.
    #[must_use]
    pub fn new(link: Link) -> Self {
        Self { link, passed: Arc::default(), free_at: Arc::new(Mutex::new(Instant::now())), threads: Vec::new() }
    }

    /// Relays what comes from `from` to `to`; nothing goes back.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn connect(&mut self, mut from: UnixStream, mut to: UnixStream) -> std::io::Result<()> {
        let link = self.link;
        let (counted, free_at) = (Arc::clone(&self.passed), Arc::clone(&self.free_at));
        // At most so much is under way: the product of bandwidth and delay, and a little.
        let room = usize::try_from(link.bits_per_s / 8 * u64::try_from(link.delay.as_millis()).unwrap_or(0) / 1000)
            .unwrap_or(0)
            / CHUNK_BYTES
            + 2;
        let (sender, receiver) = std::sync::mpsc::sync_channel::<(Instant, Vec<u8>)>(room);
        let reader = std::thread::Builder::new().name("relay-in".to_owned()).spawn(move || {
            loop {
                let mut chunk = vec![0; CHUNK_BYTES];
                let Ok(count @ 1..) = from.read(&mut chunk) else { return };
                chunk.truncate(count);
                counted.fetch_add(count as u64, Ordering::Relaxed);
                let takes = Duration::from_secs_f64(count as f64 * 8.0 / link.bits_per_s as f64);
                let free_at = {
                    let mut free_at = free_at.lock().unwrap_or_else(PoisonError::into_inner);
                    *free_at = (*free_at).max(Instant::now()) + takes;
                    *free_at
                };
                pause_until(free_at);
                if sender.send((free_at + link.delay, chunk)).is_err() {
                    return;
                }
            }
        })?;
        let writer = std::thread::Builder::new().name("relay-out".to_owned()).spawn(move || {
            let mut waiting = VecDeque::new();
            while let Some((due, chunk)) = waiting.pop_front().or_else(|| receiver.recv().ok()) {
                waiting.extend(receiver.try_iter());
                pause_until(due);
                if to.write_all(&chunk).is_err() {
                    return;
                }
            }
        })?;
        self.threads.extend([reader, writer]);
        Ok(())
    }

    /// Bytes that came in so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }

    /// Waits for its end, when its sources were closed.
    pub fn join(self) {
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

/// Who brings a relay each connection that comes to a socket, until this is ended.
#[derive(Debug)]
pub struct Door {
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<std::io::Result<Relay>>,
    passed: Arc<AtomicU64>,
}

impl Door {
    /// Brings what comes to `listener` to who listens at `to`.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn open(listener: UnixListener, to: PathBuf, mut relay: Relay) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        let is_over = Arc::new(AtomicBool::new(false));
        let (ends, passed) = (Arc::clone(&is_over), Arc::clone(&relay.passed));
        let thread = std::thread::Builder::new().name("relay-door".to_owned()).spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((from, _)) => {
                        from.set_nonblocking(false)?;
                        relay.connect(from, UnixStream::connect(&to)?)?;
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                        pause_until(Instant::now() + Duration::from_millis(1));
                    }
                    Err(error) => return Err(error),
                }
            }
            Ok(relay)
        })?;
        Ok(Self { is_over, thread, passed })
    }

    /// Bytes that came in so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }

    /// Takes no more connections; the relay of those that came.
    ///
    /// # Errors
    /// Why one could not be brought.
    pub fn close(self) -> std::io::Result<Relay> {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|_| Err(std::io::Error::other("the relay's door broke")))
    }
}

/// Waits, on a thread of its own.
#[expect(clippy::disallowed_methods, reason = "a thread of its own")]
pub fn pause_until(at: Instant) {
    std::thread::sleep(at.saturating_duration_since(Instant::now()));
}
