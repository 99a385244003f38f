//! The lines between the agent and a guest's process (`agent/vmm/src/control.rs`), from the agent's side.

use std::{
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    path::Path,
};

use serde::{Deserialize, Serialize};
use supercloud_blanket::migrate::MemoryMode;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader, Interest},
    net::{UnixStream, unix::OwnedReadHalf, unix::OwnedWriteHalf},
};
use vmm_sys_util::sock_ctrl_msg::ScmSocket as _;

/// Longest line that is taken.
const MAX_LINE_BYTES: u64 = 64 << 10;

/// How a guest is, as its process says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
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
    /// It was sent, and stands still.
    Sent,
    /// It switched itself off, or cannot go on.
    Ended,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
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
    /// It was not sent.
    NotSent,
    /// It has come over the stream, and waits.
    Arrived,
    /// It has not come, and nothing of it is there.
    NotArrived,
    /// Somebody connected a stream.
    Stream,
    /// The way to a disk broke.
    DiskLost,
    /// A disk answers with errors.
    DiskRefused,
    /// It answers again.
    DiskAnswers,
    /// A cut of a mirror is whole there.
    Staged,
    /// Its mirror was ended.
    MirrorEnded,
    /// Its mirror does not go on.
    MirrorBroken,
    /// All that was left behind is where the guest runs.
    Served,
    /// A connection over which it was served is over.
    NotServed,
    /// Nothing is missing any more.
    Fetched,
    /// A connection over which it was fetched is over.
    NotFetched,
    /// What a newer process tells.
    #[serde(other)]
    Unknown,
}

/// How far it is with sending a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub struct Progress {
    /// The round of copying, from 1.
    pub round: u32,
    /// Bytes on the stream so far.
    pub sent_bytes: u64,
    /// Bytes of guest memory that are left in this round.
    pub left_bytes: u64,
    /// Bytes of guest memory a second that the guest wrote in the last round.
    pub dirty_bytes_per_s: u64,
    /// The guest stands still, or is about to.
    #[serde(default)]
    pub is_last: bool,
    /// It could stand still now, and waits for the word.
    #[serde(default)]
    pub is_holding: bool,
    /// By how much the guest is slowed down, percent.
    #[serde(default)]
    pub throttle_percent: u8,
    /// How long it stood still until all was on the stream, in milliseconds.
    pub paused_ms: Option<u64>,
    /// Bytes of guest memory that were left behind.
    pub left_behind_bytes: Option<u64>,
}

/// How far it is with mirroring a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub struct MirrorProgress {
    /// The newest cut that was begun.
    pub cut: u64,
    /// The newest that was committed.
    pub committed: u64,
    /// How long ago the guest was like that.
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

/// A line of the process's.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct Line {
    /// The request that is answered.
    pub id: Option<u64>,
    /// What happened.
    pub event: Option<Event>,
    /// How the guest is now.
    pub state: Option<State>,
    /// How far it is with sending it.
    pub progress: Option<Progress>,
    /// How far it is with mirroring it.
    pub mirror: Option<MirrorProgress>,
    /// Of a standby: the newest cut that is whole there.
    pub cut: Option<u64>,
    /// Of a standby: the cut from which it could go on; 0: none.
    pub committed: Option<u64>,
    /// Whether it is being mirrored.
    pub is_mirrored: Option<bool>,
    /// How long the guest may run yet; absent: it needs no lease.
    pub lease_left_ms: Option<u64>,
    /// Whether the process knows leases.
    pub takes_leases: Option<bool>,
    /// Whether the process can wait with the pause until it is told.
    pub takes_holds: Option<bool>,
    /// A connection over which memory is served or fetched.
    pub connection: Option<u64>,
    /// Bytes of memory that are missing there.
    pub missing_bytes: Option<u64>,
    /// The newest version of a stream that the process writes, if it can be told to write an older one.
    pub stream_version: Option<u16>,
    /// How an ended guest ended.
    pub ended: Option<Event>,
    /// The disk that something happened to.
    pub disk: Option<String>,
    /// Disks to which there is no way.
    #[serde(default)]
    pub lost: Vec<String>,
    /// Why what was asked for was not done, or what happened.
    pub error: Option<String>,
}

/// What is asked for; see the process's own description of its verbs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Request {
    /// By which its answer is known.
    pub id: u64,
    /// What.
    #[serde(rename = "do")]
    pub verb: &'static str,
    /// How long the guest may stand still.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_downtime_ms: Option<u64>,
    /// Bytes per second on the stream at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bytes_per_s: Option<u64>,
    /// The guest may be slowed down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub may_throttle: Option<bool>,
    /// Which memory may be left behind.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryMode>,
    /// The guest shall not stand still yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub holds: Option<bool>,
    /// The newest version of a stream that is read at the other end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream_version: Option<u16>,
    /// The disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// Milliseconds from cut to cut.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval_ms: Option<u64>,
    /// Cards are held back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strict: Option<bool>,
    /// The cut.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cut: Option<u64>,
    /// Until when the guest may run, on this host's boot clock; 0: without end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease_until_ms: Option<u64>,
}

/// Lines that come.
pub struct Lines(BufReader<OwnedReadHalf>, Vec<u8>);

impl Lines {
    /// The next one; `None` when the process has hung up. Can be given up and asked again: nothing is lost.
    ///
    /// # Errors
    /// When the connection breaks, or something else than a line of ours comes.
    pub async fn next(&mut self) -> io::Result<Option<Line>> {
        let left = MAX_LINE_BYTES.saturating_sub(self.1.len() as u64);
        (&mut self.0).take(left).read_until(b'\n', &mut self.1).await?;
        if self.1.is_empty() {
            return Ok(None);
        }
        if self.1.last() != Some(&b'\n') {
            let kind = io::ErrorKind::UnexpectedEof;
            return Err(io::Error::new(kind, "a line was cut off"));
        }
        let line = serde_json::from_slice(&self.1).map_err(io::Error::from);
        self.1.clear();
        line.map(Some)
    }
}

/// Where requests go.
pub struct Requests {
    half: OwnedWriteHalf,
    /// The same socket, for descriptors to go with what is said.
    plain: StdUnixStream,
}

impl Requests {
    /// Says a request; a descriptor goes with its end.
    ///
    /// # Errors
    /// When the process has gone.
    pub async fn say(&self, request: &Request, socket: Option<OwnedFd>) -> io::Result<()> {
        let mut text = serde_json::to_vec(request).map_err(io::Error::from)?;
        text.push(b'\n');
        let stream: &UnixStream = self.half.as_ref();
        let mut left = text.as_slice();
        while let Some((last, _)) = left.split_last() {
            let send = || match &socket {
                // The end of the line goes by itself, so that the descriptor is there when it is.
                Some(socket) if left.len() == 1 => {
                    self.plain.send_with_fd(&[*last][..], socket.as_raw_fd()).map_err(io::Error::from)
                }
                Some(_) => stream.try_write(&left[..left.len() - 1]),
                None => stream.try_write(left),
            };
            let count = stream.async_io(Interest::WRITABLE, send).await?;
            left = &left[count..];
        }
        Ok(())
    }
}

/// Connects to a process.
///
/// # Errors
/// When nobody listens.
pub async fn connect(socket: &Path) -> io::Result<(Requests, Lines)> {
    let stream = UnixStream::connect(socket).await?.into_std()?;
    let plain = stream.try_clone()?;
    let (read, half) = UnixStream::from_std(stream)?.into_split();
    Ok((Requests { half, plain }, Lines(BufReader::new(read), Vec::new())))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[tokio::test]
    async fn requests_go_with_their_descriptors_and_lines_come() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut text = Vec::new();
            let mut got = None;
            while text.last() != Some(&b'\n') {
                let mut piece = [0; 64];
                let (count, file) = stream.recv_with_fd(&mut piece).unwrap();
                text.extend_from_slice(&piece[..count]);
                got = got.or(file);
            }
            let mut said = String::new();
            StdUnixStream::from(OwnedFd::from(got.unwrap())).read_to_string(&mut said).unwrap();
            let lines = "{\"id\": 7, \"state\": \"running\"}\n{\"event\": \"something new\", \"disk\": \"a\"}\nhm\n";
            io::Write::write_all(&mut &stream, lines.as_bytes()).unwrap();
            (String::from_utf8(text).unwrap(), said)
        });
        let (requests, mut lines) = connect(&path).await.unwrap();
        let (mut ours, theirs) = StdUnixStream::pair().unwrap();
        let request = Request { id: 7, verb: "disk", disk: Some("a".into()), ..Request::default() };
        requests.say(&request, Some(theirs.into())).await.unwrap();
        io::Write::write_all(&mut ours, b"hello").unwrap();
        drop(ours);
        let first = lines.next().await.unwrap().unwrap();
        assert_eq!((first.id, first.state), (Some(7), Some(State::Running)));
        let second = lines.next().await.unwrap().unwrap();
        assert_eq!((second.event, second.disk.as_deref()), (Some(Event::Unknown), Some("a")));
        assert!(lines.next().await.is_err());
        let (text, said) = server.join().unwrap();
        assert_eq!((text.as_str(), said.as_str()), ("{\"id\":7,\"do\":\"disk\",\"disk\":\"a\"}\n", "hello"));
    }
}
