//! The server: numbered writes to the disk, the checked stream, the status pages.

use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock::{ClockWatch, boot_ms, sleep_ms, wall_ms};
use crate::journal::{Journal, Verdict};
use crate::memory::{self, MemoryStats};
use crate::report::{self, Report};
use crate::role::ServerOptions;
use crate::sabotage::Faults;
use crate::{http, pattern, sys};

/// The port of the checked stream.
pub const STREAM_PORT: u16 = 7000;

/// Time between two numbered writes.
const WRITE_EVERY_MS: u64 = 100;

/// Time between two pieces of the stream: the resolution with which a client sees a pause.
const TICK_MS: u64 = 20;

/// Bytes per piece: 100 kB/s.
const TICK_BYTES: usize = 2000;

/// Time between two lines on the console.
pub const REPORT_EVERY_MS: u64 = 500;

/// Lines between two checks of the disk.
const VERIFY_EVERY_REPORTS: u64 = 10;

/// Streams served at once.
const STREAMS_CAP: u64 = 32;

#[derive(Debug, Default)]
struct State {
    acked: AtomicU64,
    write_errors: AtomicU64,
    verified: AtomicU64,
    verify_bad: AtomicU64,
    streams: AtomicU64,
    memory: MemoryStats,
    clocks: ClockWatch,
    faults: Faults,
}

impl State {
    fn report(&self) -> String {
        let load = |number: &AtomicU64| number.load(Ordering::Relaxed);
        Report::new("server")
            .number("acked", load(&self.acked))
            .number("verified", load(&self.verified))
            .number("verify_bad", load(&self.verify_bad))
            .number("write_errors", load(&self.write_errors))
            .number("streams", load(&self.streams))
            .number("mem_checked", load(&self.memory.checked))
            .number("mem_bad", load(&self.memory.bad))
            .number("clock_back", self.clocks.times_back())
            .number("wall_ms", wall_ms())
            .number("sabotaged", self.faults.made())
            .finish()
    }

    /// Checks the disk. What was acknowledged before the check began must be in it.
    fn verify(&self) {
        let acked = self.acked.load(Ordering::Relaxed);
        let Verdict { good, bad } = Journal::verify(&log_path()).unwrap_or_default();
        let lost = acked.saturating_sub(good);
        self.verified.store(good, Ordering::Relaxed);
        self.verify_bad.store(bad.max(lost), Ordering::Relaxed);
    }
}

fn log_path() -> PathBuf {
    PathBuf::from(std::env::var_os("SC_DATA").unwrap_or_else(|| "/data".into())).join("log")
}

/// Serves until the machine ends.
pub fn run(options: &ServerOptions) -> ExitCode {
    let state = Arc::new(State::default());
    if let Err(error) = start(options, &state) {
        report::print(&Report::new("server").word("failed", &error.to_string()).finish());
        return ExitCode::FAILURE;
    }
    for count in 0_u64.. {
        state.clocks.look();
        if count.is_multiple_of(VERIFY_EVERY_REPORTS) {
            state.verify();
        }
        report::print(&state.report());
        sleep_ms(REPORT_EVERY_MS);
    }
    ExitCode::SUCCESS
}

fn start(options: &ServerOptions, state: &Arc<State>) -> io::Result<()> {
    let path = log_path();
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let journal = Journal::open(&path)?;
    state.acked.store(journal.last(), Ordering::Relaxed);
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, STREAM_PORT))?;
    let pages = Arc::clone(state);
    http::serve(80, move |path| match path {
        "/" => Some(pages.report()),
        "/writes" => Some(format!("{{\"acked\":{}}}", pages.acked.load(Ordering::Relaxed))),
        "/verify" => {
            pages.verify();
            Some(pages.report())
        }
        _ => None,
    })?;
    let (writer, streams, worker) = (Arc::clone(state), Arc::clone(state), Arc::clone(state));
    std::thread::spawn(move || write_numbers(journal, &writer));
    std::thread::spawn(move || serve_streams(&listener, &streams));
    if let (Some(plan), Some(folder)) = (options.sabotage, path.parent().map(Path::to_owned)) {
        let state = Arc::clone(state);
        std::thread::spawn(move || state.faults.carry_out(plan, &folder));
    }
    let options = options.clone();
    std::thread::spawn(move || memory::work(&options, &worker.memory));
    Ok(())
}

fn write_numbers(mut journal: Journal, state: &State) {
    loop {
        match journal.append() {
            Ok(number) => state.acked.store(number, Ordering::Relaxed),
            Err(_) => {
                state.write_errors.fetch_add(1, Ordering::Relaxed);
            }
        }
        if state.faults.take_record() && journal.lose_last().is_err() {
            state.write_errors.fetch_add(1, Ordering::Relaxed);
        }
        sleep_ms(WRITE_EVERY_MS);
    }
}

fn serve_streams(listener: &TcpListener, state: &Arc<State>) {
    for stream in listener.incoming().flatten() {
        if state.streams.load(Ordering::Relaxed) >= STREAMS_CAP {
            continue;
        }
        state.streams.fetch_add(1, Ordering::Relaxed);
        let state = Arc::clone(state);
        std::thread::spawn(move || {
            // The client counts the end of its stream; here it is only one stream less.
            let _ = stream_for_ever(&stream, &state.faults);
            state.streams.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn stream_for_ever(mut stream: &TcpStream, faults: &Faults) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; TICK_BYTES];
    let mut position = 0;
    let mut next_ms = boot_ms();
    loop {
        pattern::fill(position, &mut buffer);
        if faults.take_byte() {
            buffer[0] ^= 1;
        }
        if faults.take_stream() {
            return sys::reset_on_close(stream.as_raw_fd());
        }
        stream.write_all(&buffer)?;
        position += TICK_BYTES as u64;
        // What a pause has missed is not sent in a burst afterwards.
        let now = boot_ms();
        next_ms = (next_ms + TICK_MS).max(now);
        sleep_ms(next_ms - now);
    }
}
