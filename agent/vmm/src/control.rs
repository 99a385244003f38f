//! The control socket: lines of JSON, a request and an answer each; what happens to the guest comes between them.
//!
//! ```text
//! > {"id": 1, "do": "resume"}          < {"id": 1, "state": "running"}
//! > {"id": 3, "do": "send", "max_downtime_ms": 200}      < {"id": 3, "state": "sending"}
//!                                      < {"event": "progress", "state": "sending", "progress": {...}}
//!                                      < {"event": "sent", "state": "sent", "progress": {...}}
//!                                      < {"event": "stream", "state": "running"}
//! > {"id": 2, "do": "dance"}           < {"error": "..."} and the connection is closed
//!                                      < {"event": "disk_lost", "state": "running", "disk": "root"}
//! > {"id": 4, "do": "disk", "disk": "root"} + a socket  < {"id": 4, "state": "running"}
//! > {"id": 5, "do": "mirror", "interval_ms": 100, "strict": true}    < {"id": 5, "state": "running"}
//!                                      < {"event": "progress", "state": "running", "mirror": {...}}
//!   at the standby:                    < {"event": "staged", "state": "arriving", "cut": 1}
//! > {"id": 6, "do": "commit", "cut": 1}                  < {"id": 6, "state": "arriving"}
//! > {"id": 7, "do": "promote"}         < {"id": 7, "state": "paused"}
//! > {"id": 9, "do": "lease", "lease_until_ms": 86400000} < {"id": 9, "state": "running", "lease_left_ms": 15000}
//!                                      < {"event": "powered_off", "state": "ended"}
//!   of a guest whose move has left memory behind, where it came from and where it runs:
//! > {"id": 8, "do": "serve"} + a socket                  < {"id": 8, "state": "sent", "connection": 1}
//!                                      < {"event": "served", "state": "sent", "connection": 1}
//! > {"id": 8, "do": "fetch"} + a socket                  < {"id": 8, "state": "running", "connection": 1}
//!                                      < {"event": "progress", "state": "running", "missing_bytes": 4096}
//!                                      < {"event": "fetched", "state": "running", "missing_bytes": 0}
//! ```
//!
//! With `lease` the guest runs until that time of the boot clock only (0: for as long as it wants), whoever is there then: its processors
//! stand still and its cards say nothing, whatever `state` is, until another `lease` puts the time off.
//!
//! With `disk`, `stream`, `serve` and `fetch` comes a connected unix socket (`SCM_RIGHTS`, unix(7), in the message that ends the line): the new way to
//! the volume process of a disk, the way by which the guest leaves or comes.
//!
//! The socket outlives its clients, so that an agent that was restarted finds the guest again; there is one client at a
//! time, a new one replaces the one before, and only the user that runs this process (or root) may be one.

use std::{
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::mpsc::Sender,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use supercloud_blanket::migrate::MemoryMode;
use vmm_sys_util::sock_ctrl_msg::ScmSocket as _;

use crate::owner::Input;

/// Longest request.
const MAX_LINE_BYTES: usize = 4096;
/// A client that does not read is dropped.
const WRITE_BUDGET: Duration = Duration::from_secs(5);

/// What a client may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verb {
    /// How it is.
    Status,
    /// Let the guest run.
    Resume,
    /// Stop it.
    Pause,
    /// Send it over the stream while it runs.
    Send,
    /// Change the limits of sending it, while it is being sent.
    Limits,
    /// Give up sending it; it runs on. Give up receiving it.
    Cancel,
    /// Take the socket that comes with this as the way by which the guest leaves or comes.
    Stream,
    /// Let that way go.
    HangUp,
    /// Press its reset button.
    Reset,
    /// Press its power button.
    PowerButton,
    /// Take the socket that comes with this as the way to a disk.
    Disk,
    /// Mirror it over the stream: copy it while it runs, then cut after cut.
    Mirror,
    /// End that, or what is left of it: all that its cards hold back goes.
    EndMirror,
    /// Take the cut of a mirror that is staged here for good.
    Commit,
    /// Make of the newest cut that was committed here a guest that has come.
    Promote,
    /// Serve what was left behind when the guest was sent, over the socket that comes with this.
    Serve,
    /// Fetch what was left behind when the guest came, over the socket that comes with this.
    Fetch,
    /// Let the guest run until this time, and no longer unless asked again.
    Lease,
    /// End the process.
    End,
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// By which its answer is known.
    pub id: u64,
    /// What.
    #[serde(rename = "do")]
    pub verb: Verb,
    /// Of `send` and `limits`: how long the guest may stand still, in milliseconds.
    pub max_downtime_ms: Option<u64>,
    /// Likewise: bytes per second on the stream at most.
    pub max_bytes_per_s: Option<u64>,
    /// Of `send`: the guest may be slowed down when else it would write faster than it is sent.
    pub may_throttle: Option<bool>,
    /// Of `send`: which memory may be left behind.
    pub memory: Option<MemoryMode>,
    /// Of `send`: the guest shall not stand still yet, although it could; of `limits`: whether that still holds.
    pub holds: Option<bool>,
    /// Of `send`: the newest version of a stream that the other end reads; the newest when it is not said.
    pub stream_version: Option<u16>,
    /// Of `disk`: its name.
    pub disk: Option<String>,
    /// Of `mirror`: milliseconds from the instant of one cut to that of the next.
    pub interval_ms: Option<u64>,
    /// Of `mirror`: what the guest's cards send waits until a cut that has it was acknowledged.
    pub strict: Option<bool>,
    /// Of `commit`: which.
    pub cut: Option<u64>,
    /// Of `lease`: until when, in milliseconds of this host's boot clock; 0: without end.
    pub lease_until_ms: Option<u64>,
}

/// How the guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It comes over the stream, or a stream for it is waited for.
    Arriving,
    /// It does not run, and can.
    Paused,
    /// It runs.
    Running,
    /// It is being sent; until shortly before the end it runs.
    Sending,
    /// It was sent: all of it is on the stream, and it stands still.
    Sent,
    /// It switched itself off, or cannot go on.
    Ended,
}

/// What happened to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// It reset itself and boots again.
    Rebooted,
    /// It switched itself off.
    PoweredOff,
    /// It cannot go on.
    Broken,
    /// So far it is with sending it.
    Progress,
    /// It was sent.
    Sent,
    /// It was not sent, and runs on if it ran before and nobody asked for a pause meanwhile.
    NotSent,
    /// It has come over the stream, and waits.
    Arrived,
    /// It has not come, and nothing of it is here.
    NotArrived,
    /// There is a new stream.
    Stream,
    /// The way to a disk broke; what the guest wants of it waits for another.
    DiskLost,
    /// A disk answers with errors; what the guest wants of it is tried again and again.
    DiskRefused,
    /// It answers again.
    DiskAnswers,
    /// A cut of a mirror is whole here, and is not committed.
    Staged,
    /// Its mirror was ended.
    MirrorEnded,
    /// Its mirror does not go on: the stream is lost, or the other end is silent. What is held back stays so.
    MirrorBroken,
    /// All that was left behind is where the guest runs.
    Served,
    /// A connection over which it was served is over, and something is missing still.
    NotServed,
    /// Nothing is missing any more.
    Fetched,
    /// A connection over which it was fetched is over, and something is missing still: what the guest wants of it waits.
    NotFetched,
}

/// A line to the client.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Line {
    /// The request that is answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// What happened.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub event: Option<Event>,
    /// How the guest is now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<State>,
    /// How far it is with sending it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// Of an ended guest, in the answer to `status`: how it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended: Option<Event>,
    /// The disk that something happened to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// How far it is with mirroring it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mirror: Option<MirrorProgress>,
    /// Of a standby: the newest cut that is whole here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cut: Option<u64>,
    /// Of a standby, in the answer to `status`: the cut from which it could go on; 0: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub committed: Option<u64>,
    /// In the answer to `status`: whether it is being mirrored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub is_mirrored: Option<bool>,
    /// In the answers to `status` and `lease`: how long the guest may run yet, in milliseconds; 0: it stands still; absent: it needs no
    /// lease.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease_left_ms: Option<u64>,
    /// In the answer to `status`: this process knows `lease`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub takes_leases: Option<bool>,
    /// In the answer to `status`: this process knows `holds`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub takes_holds: Option<bool>,
    /// A connection over which memory is served or fetched: the one that was begun, or is over; in the answer to `status`, the one that
    /// goes on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection: Option<u64>,
    /// Bytes of memory that are missing here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing_bytes: Option<u64>,
    /// In the answer to `status`: the newest version of a stream that is written here; older ones are on request (`stream_version`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream_version: Option<u16>,
    /// In the answer to `status`: disks to which there is no way.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lost: Vec<String>,
    /// Why what was asked for was not done, or what happened.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// How far it is with sending a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// The round of copying.
    pub round: u32,
    /// Bytes on the stream so far.
    pub sent_bytes: u64,
    /// Bytes of guest memory that are left in this round.
    pub left_bytes: u64,
    /// Bytes of guest memory a second that the guest wrote in the last round.
    pub dirty_bytes_per_s: u64,
    /// The guest stands still, or is about to.
    pub is_last: bool,
    /// It could stand still now, and waits for the word.
    pub is_holding: bool,
    /// By how much the guest is slowed down, percent.
    pub throttle_percent: u8,
    /// How long the guest stood still until all was on the stream, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paused_ms: Option<u64>,
    /// Bytes of guest memory that were left behind.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub left_behind_bytes: Option<u64>,
}

/// How far it is with mirroring a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MirrorProgress {
    /// The newest cut that was begun; 0 during the first copy.
    pub cut: u64,
    /// The newest that was committed.
    pub committed: u64,
    /// How long ago the guest was like that, in milliseconds.
    pub committed_age_ms: u64,
    /// How long the guest stood still for the last cut, in microseconds.
    pub pause_us: u64,
    /// Bytes on the stream so far.
    pub sent_bytes: u64,
    /// Bytes of guest memory that were written between the last two cuts.
    pub dirty_bytes: u64,
    /// Bytes of guest memory that are left in a round of the first copy.
    pub left_bytes: u64,
}

/// The way to the client, if there is one.
#[derive(Debug, Default)]
pub struct Client {
    stream: Option<UnixStream>,
    number: u64,
}

impl Client {
    /// A new client replaces the one before; what that one still asks for counts for nothing.
    pub fn replace(&mut self, number: u64, stream: UnixStream) {
        self.number = number;
        if let Some(old) = self.stream.replace(stream) {
            let _ = old.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Whether this is the client that is there now.
    #[must_use]
    pub const fn is(&self, number: u64) -> bool {
        self.number == number
    }

    /// Tells the client; one that cannot be told is dropped.
    pub fn tell(&mut self, line: &Line) {
        let Some(stream) = &mut self.stream else { return };
        let mut text = serde_json::to_vec(line).unwrap_or_default();
        text.push(b'\n');
        if stream.write_all(&text).is_err() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
            self.stream = None;
        }
    }
}

/// Accepts clients and reads their requests, on threads of its own, for as long as the process lives.
///
/// # Errors
/// When there is no thread, or the socket does not listen.
pub fn listen(socket: OwnedFd, inputs: &Sender<Input>) -> io::Result<()> {
    let inputs = inputs.clone();
    let mut number = 0;
    accept("control", socket, move |stream| {
        number += 1;
        greet(number, stream, &inputs);
    })
}

/// Accepts streams by which the guest comes and leaves, likewise.
///
/// # Errors
/// As [`listen`].
pub fn listen_for_streams(socket: OwnedFd, inputs: &Sender<Input>) -> io::Result<()> {
    let inputs = inputs.clone();
    accept("streams", socket, move |stream| {
        // The owner is there as long as the process is.
        let _ = inputs.send(Input::Stream(stream));
    })
}

/// Hands over who connects, if it is one of ours, on a thread of its own.
///
/// # Errors
/// When there is no thread, or the socket does not listen.
pub fn accept(name: &str, socket: OwnedFd, mut take: impl FnMut(UnixStream) + Send + 'static) -> io::Result<()> {
    let listener = UnixListener::from(socket);
    listener.local_addr()?;
    let accept = move || {
        loop {
            match listener.accept() {
                Ok((stream, _)) if is_ours(&stream) => take(stream),
                Ok(_) => {}
                // Out of descriptors or memory for a moment, or a client that went: there is nobody else who could listen.
                Err(_) => pause(),
            }
        }
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(accept).map(drop)
}

#[expect(clippy::disallowed_methods, reason = "a thread that accepts clients and does nothing else")]
fn pause() {
    std::thread::sleep(Duration::from_millis(100));
}

fn greet(number: u64, stream: UnixStream, inputs: &Sender<Input>) {
    let Ok(writer) = stream.try_clone() else { return };
    if writer.set_write_timeout(Some(WRITE_BUDGET)).is_err() {
        return;
    }
    if inputs.send(Input::Client(number, writer)).is_err() {
        return;
    }
    let inputs = inputs.clone();
    let read = move || read_requests(number, stream, &inputs);
    // Without a thread the client hears nothing and goes.
    let _ = std::thread::Builder::new().name("client".to_owned()).spawn(read);
}

fn read_requests(number: u64, stream: UnixStream, inputs: &Sender<Input>) {
    let mut lines = Lines { stream, bytes: Vec::new(), socket: None };
    while let Some((line, socket)) = lines.next() {
        match serde_json::from_slice::<Request>(&line) {
            Ok(request) => {
                if inputs.send(Input::Request(number, request, socket)).is_err() {
                    break;
                }
            }
            Err(error) => {
                let line = Line { error: Some(error.to_string()), ..Line::default() };
                let mut text = serde_json::to_vec(&line).unwrap_or_default();
                text.push(b'\n');
                let _ = (&lines.stream).write_all(&text);
                break;
            }
        }
    }
    let _ = lines.stream.shutdown(std::net::Shutdown::Both);
}

/// Lines, and the sockets that came with them.
struct Lines {
    stream: UnixStream,
    bytes: Vec<u8>,
    /// The last that came, with the end of the bytes with which it came: a line before is none of its.
    socket: Option<(usize, File)>,
}

impl Lines {
    /// The next line, with the last socket that came in it or with its end; a line that is too long is cut there.
    fn next(&mut self) -> Option<(Vec<u8>, Option<UnixStream>)> {
        loop {
            let end = self.bytes.iter().position(|byte| *byte == b'\n').map(|at| at + 1);
            if let Some(end) = end.or_else(|| (self.bytes.len() >= MAX_LINE_BYTES).then_some(MAX_LINE_BYTES)) {
                let rest = self.bytes.split_off(end);
                let line = std::mem::replace(&mut self.bytes, rest);
                // One that is no socket fails at its first use.
                let socket = self.socket.take_if(|(at, _)| *at <= end);
                if let Some((at, _)) = &mut self.socket {
                    *at -= end;
                }
                return Some((line, socket.map(|(_, file)| UnixStream::from(OwnedFd::from(file)))));
            }
            let mut piece = [0; 1024];
            let (count, socket) = match self.stream.recv_with_fd(&mut piece) {
                Ok(got) => got,
                Err(error) if error.errno() == libc::EINTR => continue,
                Err(_) => return None,
            };
            if count == 0 {
                return None;
            }
            self.bytes.extend_from_slice(&piece[..count]);
            if let Some(socket) = socket {
                // What is received at once ends with what came with it (unix(7)).
                self.socket = Some((self.bytes.len(), socket));
            }
        }
    }
}

/// Whether the client runs as our own user, or as root.
fn is_ours(stream: &UnixStream) -> bool {
    let mut who = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = libc::socklen_t::try_from(size_of::<libc::ucred>()).unwrap_or(0);
    // SAFETY: the pointers are to locals of the lengths that are told.
    let got = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut who).cast(),
            &raw mut length,
        )
    };
    // SAFETY: no arguments.
    got == 0 && (who.uid == 0 || who.uid == unsafe { libc::geteuid() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_its_own_lines_also_when_lines_come_at_once() {
        let (here, there) = UnixStream::pair().unwrap();
        let (other, _far) = UnixStream::pair().unwrap();
        (&there).write_all(b"first\nsec").unwrap();
        (&there).write_all(b"ond").unwrap();
        there.send_with_fd(&b"\n"[..], other.as_raw_fd()).unwrap();
        (&there).write_all(b"third\nfourth").unwrap();
        there.send_with_fd(&b"\n"[..], other.as_raw_fd()).unwrap();
        drop(there);
        let mut lines = Lines { stream: here, bytes: Vec::new(), socket: None };
        let all: Vec<_> = std::iter::from_fn(|| lines.next()).map(|(line, socket)| (line, socket.is_some())).collect();
        let told = |line: &[u8], has_socket| (line.to_vec(), has_socket);
        assert_eq!(
            all,
            [told(b"first\n", false), told(b"second\n", true), told(b"third\n", false), told(b"fourth\n", true)]
        );
    }

    #[test]
    fn requests_are_read_strictly() {
        let good = serde_json::from_str::<Request>(r#"{"id": 7, "do": "pause"}"#).unwrap();
        assert_eq!(
            good,
            Request {
                id: 7,
                verb: Verb::Pause,
                max_downtime_ms: None,
                holds: None,
                max_bytes_per_s: None,
                may_throttle: None,
                memory: None,
                stream_version: None,
                disk: None,
                interval_ms: None,
                strict: None,
                cut: None,
                lease_until_ms: None,
            }
        );
        let send = serde_json::from_str::<Request>(r#"{"id": 7, "do": "send", "max_downtime_ms": 20}"#).unwrap();
        assert_eq!(send.max_downtime_ms, Some(20));
        for bad in [
            r#"{"id": 7}"#,
            r#"{"id": -1, "do": "pause"}"#,
            r#"{"id": 7, "do": "dance"}"#,
            r#"{"id":7,"do":"end","x":1}"#,
        ] {
            assert!(serde_json::from_str::<Request>(bad).is_err(), "{bad}");
        }
    }
}
