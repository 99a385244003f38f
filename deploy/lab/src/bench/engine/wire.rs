//! What both sides' streams go through: a relay of unix sockets that lets so many bytes per second pass, after so long.

use std::{
    collections::VecDeque,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
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

/// A relay that runs until its source closes.
#[derive(Debug)]
pub struct Relay {
    passed: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Relay {
    /// Relays what comes from `from` to `to`; nothing goes back.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn start(mut from: UnixStream, mut to: UnixStream, link: Link) -> std::io::Result<Self> {
        let passed = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&passed);
        // At most so much is under way: the product of bandwidth and delay, and a little.
        let room = usize::try_from(link.bits_per_s / 8 * u64::try_from(link.delay.as_millis()).unwrap_or(0) / 1000)
            .unwrap_or(0)
            / CHUNK_BYTES
            + 2;
        let (sender, receiver) = std::sync::mpsc::sync_channel::<(Instant, Vec<u8>)>(room);
        let reader = std::thread::Builder::new().name("relay-in".to_owned()).spawn(move || {
            let mut free_at = Instant::now();
            loop {
                let mut chunk = vec![0; CHUNK_BYTES];
                let Ok(count @ 1..) = from.read(&mut chunk) else { return };
                chunk.truncate(count);
                counted.fetch_add(count as u64, Ordering::Relaxed);
                let takes = Duration::from_secs_f64(count as f64 * 8.0 / link.bits_per_s as f64);
                free_at = free_at.max(Instant::now()) + takes;
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
        Ok(Self { passed, threads: vec![reader, writer] })
    }

    /// Bytes that came in so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }

    /// Waits for its end, when its source was closed.
    pub fn join(self) {
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

/// Waits, on a thread of its own.
#[expect(clippy::disallowed_methods, reason = "a thread of its own")]
pub fn pause_until(at: Instant) {
    std::thread::sleep(at.saturating_duration_since(Instant::now()));
}
