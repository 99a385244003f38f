//! The client: one TCP stream to the server, every byte checked, every pause measured. A stream that ends is counted before
//! another one is opened.

use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::clock::{ClockWatch, boot_ms, sleep_ms};
use crate::memory::{self, MemoryStats};
use crate::report::{self, Report};
use crate::role::ClientOptions;
use crate::server::{REPORT_EVERY_MS, STREAM_PORT};
use crate::{http, pattern, sys};

/// How long the stream may be silent before it counts as dead: longer than any pause that a move may cause.
const SILENCE_CAP: Duration = Duration::from_secs(300);

/// The pauses seen, as seen from two sides: the console's half seconds and the windows of `/stats?mark=`.
#[derive(Debug, Default)]
struct Gaps {
    last_data_ms: Option<u64>,
    longest_ms: u64,
    window: String,
    window_longest_ms: u64,
}

impl Gaps {
    /// Data has arrived.
    fn data(&mut self, now_ms: u64) {
        self.look(now_ms);
        self.last_data_ms = Some(now_ms);
    }

    /// The stream ended: silence until the next one opens is no pause of a stream.
    fn ended(&mut self, now_ms: u64) {
        self.look(now_ms);
        self.last_data_ms = None;
    }

    /// Takes a pause that still lasts into account.
    fn look(&mut self, now_ms: u64) {
        let gap = self.last_data_ms.map_or(0, |last| now_ms.saturating_sub(last));
        self.longest_ms = self.longest_ms.max(gap);
        self.window_longest_ms = self.window_longest_ms.max(gap);
    }

    /// The longest pause since the last call.
    fn take(&mut self, now_ms: u64) -> u64 {
        self.look(now_ms);
        std::mem::take(&mut self.longest_ms)
    }

    /// The name and longest pause of the window; a new name begins a new one.
    fn window(&mut self, now_ms: u64, mark: Option<&str>) -> (String, u64) {
        self.look(now_ms);
        let old = (self.window.clone(), self.window_longest_ms);
        if let Some(mark) = mark {
            mark.clone_into(&mut self.window);
            self.window_longest_ms = 0;
        }
        old
    }
}

#[derive(Debug, Default)]
struct State {
    connects: AtomicU64,
    resets: AtomicU64,
    bytes: AtomicU64,
    bad: AtomicU64,
    ticks: AtomicU64,
    http_ok: AtomicU64,
    http_failed: AtomicU64,
    acked_seen: AtomicU64,
    gaps: Mutex<Gaps>,
    memory: MemoryStats,
    clocks: ClockWatch,
}

impl State {
    fn gaps(&self) -> std::sync::MutexGuard<'_, Gaps> {
        self.gaps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self) -> Report {
        let load = |number: &AtomicU64| number.load(Ordering::Relaxed);
        let (connects, resets) = (load(&self.connects), load(&self.resets));
        Report::new("client")
            .number("connected", connects > resets)
            .number("connects", connects)
            .number("resets", resets)
            .number("bytes", load(&self.bytes))
            .number("bad", load(&self.bad))
            .number("ticks", load(&self.ticks))
            .number("http_ok", load(&self.http_ok))
            .number("http_failed", load(&self.http_failed))
            .number("acked_seen", load(&self.acked_seen))
            .number("mem_checked", load(&self.memory.checked))
            .number("mem_bad", load(&self.memory.bad))
            .number("clock_back", self.clocks.times_back())
    }

    fn page(&self, path: &str) -> Option<String> {
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        let (window, gap_ms) = match path {
            "/" | "/stats" => self.gaps().window(boot_ms(), query.strip_prefix("mark=")),
            _ => return None,
        };
        Some(self.report().word("window", &window).number("window_gap_ms", gap_ms).finish())
    }
}

/// Checks until the machine ends.
pub fn run(options: &ClientOptions) -> ExitCode {
    let state = Arc::new(State::default());
    let (stream, pages, fetcher, worker) =
        (Arc::clone(&state), Arc::clone(&state), Arc::clone(&state), Arc::clone(&state));
    let peer = options.peer;
    std::thread::spawn(move || check_for_ever(SocketAddr::from((peer, STREAM_PORT)), &stream));
    std::thread::spawn(move || fetch_for_ever(SocketAddr::from((peer, 80)), &fetcher));
    if let Err(error) = http::serve(80, move |path| pages.page(path)) {
        report::print(&Report::new("client").word("failed", &error.to_string()).finish());
        return ExitCode::FAILURE;
    }
    let memory = options.memory.clone();
    std::thread::spawn(move || memory::work(&memory, &worker.memory));
    loop {
        sleep_ms(REPORT_EVERY_MS);
        state.clocks.look();
        let gap_ms = state.gaps().take(boot_ms());
        report::print(&state.report().number("gap_ms", gap_ms).finish());
    }
}

fn check_for_ever(peer: SocketAddr, state: &State) {
    loop {
        let Ok(stream) = TcpStream::connect_timeout(&peer, Duration::from_secs(10)) else {
            sleep_ms(200);
            continue;
        };
        state.connects.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = ask_whether_alive(&stream) {
            report::print(&Report::new("client").word("failed", &error.to_string()).finish());
        }
        // However it ends, it should not have.
        let _ = check(&stream, state);
        state.resets.fetch_add(1, Ordering::Relaxed);
        state.gaps().ended(boot_ms());
        sleep_ms(200);
    }
}

/// Lets the kernel ask a silent server whether it still knows the stream: one that has started anew says no, which is a
/// reset; a server that is being moved says nothing, which is none.
fn ask_whether_alive(stream: &TcpStream) -> io::Result<()> {
    let options: [(libc::c_int, libc::c_int, libc::c_int); 4] = [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 2),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 2),
        // More than the silence that is allowed anyway.
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 127),
    ];
    for (level, option, value) in options {
        let length = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: the value is a c_int of the length given.
        sys::check(unsafe { libc::setsockopt(stream.as_raw_fd(), level, option, (&raw const value).cast(), length) })?;
    }
    Ok(())
}

fn check(mut stream: &TcpStream, state: &State) -> io::Result<()> {
    stream.set_read_timeout(Some(SILENCE_CAP))?;
    let mut buffer = vec![0; 65_536];
    let mut position = 0;
    loop {
        let got = stream.read(&mut buffer)?;
        if got == 0 {
            return Ok(());
        }
        state.gaps().data(boot_ms());
        state.bad.fetch_add(pattern::count_wrong(position, &buffer[..got]), Ordering::Relaxed);
        position += got as u64;
        state.bytes.fetch_add(got as u64, Ordering::Relaxed);
        state.ticks.fetch_add(1, Ordering::Relaxed);
    }
}

/// The number up to which the server says that its writes are safe.
fn acknowledged(page: &str) -> u64 {
    let digits = page.split_once("\"acked\":").map_or("", |(_, rest)| rest);
    digits.split(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

fn fetch_for_ever(peer: SocketAddr, state: &State) {
    loop {
        // Before the server is up there is nothing to fail.
        let is_counted = state.connects.load(Ordering::Relaxed) > 0;
        let counter = match http::request(peer, "GET", "/writes", &[], "", SILENCE_CAP) {
            Ok((200, page)) => {
                state.acked_seen.fetch_max(acknowledged(&page), Ordering::Relaxed);
                &state.http_ok
            }
            _ => &state.http_failed,
        };
        if is_counted {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        sleep_ms(1000);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_says_is_safe_is_read() {
        assert_eq!(acknowledged("{\"acked\":417}"), 417);
        assert_eq!(acknowledged("{\"acked\":}"), 0);
        assert_eq!(acknowledged("nothing"), 0);
    }

    #[test]
    fn a_pause_is_seen_in_every_half_second_that_it_touches() {
        let mut gaps = Gaps::default();
        assert_eq!(gaps.take(900), 0, "before the first data there is no pause");
        gaps.data(1000);
        gaps.data(1020);
        assert_eq!(gaps.take(1050), 30);
        assert_eq!(gaps.take(1550), 530, "it still lasts");
        gaps.data(1600);
        gaps.data(1620);
        assert_eq!(gaps.take(1630), 580);
        assert_eq!(gaps.take(1640), 20);
    }

    #[test]
    fn windows_begin_at_their_mark() {
        let mut gaps = Gaps::default();
        gaps.data(0);
        gaps.data(700);
        assert_eq!(gaps.window(710, Some("move-1")), (String::new(), 700));
        gaps.data(720);
        assert_eq!(gaps.window(730, None), ("move-1".to_owned(), 20));
        gaps.ended(800);
        gaps.data(5000);
        assert_eq!(gaps.window(5000, None).1, 80, "the time between two streams is no pause of one");
    }
}
