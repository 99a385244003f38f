//! The control socket: lines of JSON, a request and an answer each; what happens to the guest comes between them.
//!
//! ```text
//! > {"id": 1, "do": "resume"}          < {"id": 1, "state": "running"}
//! > {"id": 3, "do": "send", "max_downtime_ms": 200}      < {"id": 3, "state": "sending"}
//!                                      < {"event": "progress", "state": "sending", "progress": {...}}
//!                                      < {"event": "sent", "state": "sent", "progress": {...}}
//!                                      < {"event": "stream", "state": "running"}
//! > {"id": 2, "do": "dance"}           < {"error": "..."} and the connection is closed
//!                                      < {"event": "powered_off", "state": "ended"}
//! ```
//!
//! The socket outlives its clients, so that an agent that was restarted finds the guest again; there is one client at a
//! time, a new one replaces the one before, and only the user that runs this process (or root) may be one.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::mpsc::Sender,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::owner::Input;

/// Longest request.
const MAX_LINE_BYTES: u64 = 4096;
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
    /// Give up sending it; it runs on. Give up receiving it.
    Cancel,
    /// End the process.
    End,
}

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// By which its answer is known.
    pub id: u64,
    /// What.
    #[serde(rename = "do")]
    pub verb: Verb,
    /// Of `send`: how long the guest may stand still, in milliseconds.
    pub max_downtime_ms: Option<u64>,
    /// Of `send`: bytes per second on the stream at most.
    pub max_bytes_per_s: Option<u64>,
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
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
    /// How long the guest stood still until all was on the stream, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paused_ms: Option<u64>,
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

fn accept(name: &str, socket: OwnedFd, mut take: impl FnMut(UnixStream) + Send + 'static) -> io::Result<()> {
    let listener = UnixListener::from(socket);
    listener.local_addr()?;
    let accept = move || {
        // Each error is one of a client's; the owner of the process ends it when there is nothing to listen to any more.
        while let Ok((stream, _)) = listener.accept() {
            if is_ours(&stream) {
                take(stream);
            }
        }
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(accept).map(drop)
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
    let Ok(back) = stream.try_clone() else { return };
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        let Ok(count) = reader.by_ref().take(MAX_LINE_BYTES).read_line(&mut line) else { break };
        if count == 0 {
            break;
        }
        match serde_json::from_str::<Request>(&line) {
            Ok(request) => {
                if inputs.send(Input::Request(number, request)).is_err() {
                    break;
                }
            }
            Err(error) => {
                let line = Line { error: Some(error.to_string()), ..Line::default() };
                let mut text = serde_json::to_vec(&line).unwrap_or_default();
                text.push(b'\n');
                let _ = (&back).write_all(&text);
                break;
            }
        }
    }
    let _ = back.shutdown(std::net::Shutdown::Both);
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
    fn requests_are_read_strictly() {
        let good = serde_json::from_str::<Request>(r#"{"id": 7, "do": "pause"}"#).unwrap();
        assert_eq!(good, Request { id: 7, verb: Verb::Pause, max_downtime_ms: None, max_bytes_per_s: None });
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
