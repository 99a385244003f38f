//! What guests say on their consoles: the one way by which a lab may look into a guest, since the overlay lets no packet through
//! from host to guest.
//!
//! The lean guest's program prints one line per half second, `@sc {...}`. A guest's console is a log on the host where it
//! runs, so that the lines of a guest that moves lie on several hosts; a line that was cut by the move is skipped.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write as _};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Longest line that is kept until its end comes.
const LINE_CAP: usize = 64 << 10;
/// Bytes read of one log in one look.
const READ_CAP: u64 = 4 << 20;
/// How often consoles are looked at in a host that is a VM.
const FORWARD_EVERY: std::time::Duration = std::time::Duration::from_millis(500);
/// Lines of other kinds that are kept, for messages.
const OTHER_CAP: usize = 12;

/// What the server in a guest says. Numbers count from its boot.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ServerStats {
    /// Which boot of it.
    pub boot_id: String,
    /// Milliseconds since that boot.
    pub t_ms: u64,
    /// Last number whose write was flushed.
    pub acked: u64,
    /// Records 1..=n read back from the disk.
    pub verified: u64,
    /// Records found wrong or missing when read back.
    pub verify_bad: u64,
    /// Failed writes or flushes.
    pub write_errors: u64,
    /// Pages of memory checked.
    pub mem_checked: u64,
    /// Pages of memory found wrong.
    pub mem_bad: u64,
    /// How often a clock went back.
    pub clock_back: u64,
    /// Faults that it was told to make and has made.
    #[serde(default)]
    pub sabotaged: u64,
}

impl ServerStats {
    /// What must hold of it in every line that it says.
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        self.verify_bad == 0 && self.write_errors == 0 && self.mem_bad == 0 && self.clock_back == 0
    }
}

/// What the client in a guest says.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ClientStats {
    /// Which boot of it.
    pub boot_id: String,
    /// Milliseconds since that boot.
    pub t_ms: u64,
    /// Whether the stream stands.
    pub connected: bool,
    /// Streams opened.
    pub connects: u64,
    /// Streams that ended, in any way.
    pub resets: u64,
    /// Bytes checked.
    pub bytes: u64,
    /// Bytes that were wrong.
    pub bad: u64,
    /// Arrivals of data.
    pub ticks: u64,
    /// The longest silence that ended, or still lasts, in this half second; milliseconds.
    pub gap_ms: u64,
    /// Status pages fetched.
    pub http_ok: u64,
    /// Status pages that could not be fetched.
    pub http_failed: u64,
    /// The newest number of which the server said that it is safely written.
    #[serde(default)]
    pub acked_seen: u64,
    /// Pages of memory checked.
    pub mem_checked: u64,
    /// Pages of memory found wrong.
    pub mem_bad: u64,
    /// How often a clock went back.
    pub clock_back: u64,
}

impl ClientStats {
    /// What must hold of it in every line that it says: one stream, not a byte wrong.
    #[must_use]
    pub const fn is_unharmed(&self) -> bool {
        self.resets == 0 && self.bad == 0 && self.mem_bad == 0 && self.clock_back == 0 && self.connects <= 1
    }
}

/// What the traveller in a guest says; a word is empty until it is known.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct TravellerStats {
    /// Which boot of it.
    pub boot_id: String,
    /// Milliseconds since that boot.
    pub t_ms: u64,
    /// The cloud in which it began.
    pub home: String,
    /// The cloud after its first move.
    pub there: String,
    /// The cloud after its second.
    pub back: String,
    /// The operation of the first move.
    pub operation_there: String,
    /// That of the second.
    pub operation_back: String,
    /// The operation that it was told when it said its first wish again, after the move.
    pub repeated: String,
    /// Requests made again.
    pub retries: u64,
    /// How often a clock went back.
    pub clock_back: u64,
    /// Why it travels no more.
    pub failed: String,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "role", rename_all = "lowercase")]
pub enum Said {
    /// By the server.
    Server(ServerStats),
    /// By the client.
    Client(ClientStats),
    /// By the traveller.
    Traveller(TravellerStats),
}

/// A line and where it was said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    /// The host.
    pub host: String,
    /// The line.
    pub said: Said,
}

/// Reads a line: of those that a cut has run together, the last.
fn parse(line: &str) -> Option<Said> {
    let at = line.rfind("@sc ")?;
    serde_json::from_str(line[at + 4..].trim_end()).ok()
}

/// One log that is followed: from its beginning, through cuts (it starts anew) and after it was deleted (what was
/// written before).
#[derive(Debug)]
struct Follower {
    host: String,
    path: PathBuf,
    /// Where the lines of several guests lie in one file: what this one's begin with.
    prefix: String,
    file: Option<(File, u64)>,
    offset: u64,
    rest: Vec<u8>,
}

impl Follower {
    fn new(host: String, path: PathBuf, prefix: String) -> Self {
        Self { host, path, prefix, file: None, offset: 0, rest: Vec::new() }
    }

    fn look(&mut self, mut line: impl FnMut(&str)) -> io::Result<()> {
        let there = std::fs::metadata(&self.path).ok().map(|meta| meta.ino());
        if self.file.as_ref().map(|(_, inode)| *inode) != there || self.file.is_none() {
            // The last words of the one that was there before.
            self.read(&mut line)?;
            if let Ok(file) = File::open(&self.path) {
                let inode = file.metadata()?.ino();
                self.file = Some((file, inode));
                self.offset = 0;
                self.rest.clear();
            }
        }
        self.read(&mut line)
    }

    fn read(&mut self, line: &mut impl FnMut(&str)) -> io::Result<()> {
        let Some((file, _)) = &mut self.file else { return Ok(()) };
        if file.metadata()?.len() < self.offset {
            self.offset = 0;
            self.rest.clear();
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let got = file.take(READ_CAP).read_to_end(&mut self.rest)?;
        self.offset += got as u64;
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let whole: Vec<u8> = self.rest.drain(..=end).collect();
            if let Some(own) = String::from_utf8_lossy(&whole).strip_prefix(&self.prefix) {
                line(own.trim_end());
            }
        }
        if self.rest.len() > LINE_CAP {
            self.rest.clear();
        }
        Ok(())
    }
}

/// A guest's console, wherever it is said.
#[derive(Debug)]
pub struct Console {
    logs: Vec<Follower>,
    other: VecDeque<String>,
    transcript: Option<File>,
}

impl Console {
    /// Follows these logs: (host, path). None of them need be there yet.
    #[must_use]
    pub fn new(logs: impl IntoIterator<Item = (String, PathBuf)>) -> Self {
        let logs = logs.into_iter().map(|(host, path)| Follower::new(host, path, String::new()));
        Self { logs: logs.collect(), other: VecDeque::new(), transcript: None }
    }

    /// Also follows this log.
    #[must_use]
    pub fn with_log(mut self, host: String, path: PathBuf) -> Self {
        self.logs.push(Follower::new(host, path, String::new()));
        self
    }

    /// Also follows what a host that is a VM forwards of this guest's console ([`forward`]).
    #[must_use]
    pub fn with_forwarded(mut self, host: String, path: PathBuf, guest: &str) -> Self {
        self.logs.push(Follower::new(host, path, format!("{guest} ")));
        self
    }

    /// Also writes every line down, with its host before it: an agent deletes a console with its guest's copy.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn with_transcript(mut self, path: &Path) -> io::Result<Self> {
        self.transcript = Some(File::create(path)?);
        Ok(self)
    }

    /// What was said since the last call. Blocks for as long as reading some files takes.
    pub fn poll(&mut self) -> Vec<Heard> {
        let mut heard = Vec::new();
        let (other, transcript) = (&mut self.other, &mut self.transcript);
        for log in &mut self.logs {
            let host = log.host.clone();
            // A log that cannot be read now is read at the next look.
            let _ = log.look(|line| {
                if let Some(file) = transcript {
                    // It is for people who look for a fault; without it everything works.
                    let _ = writeln!(file, "{host}: {line}");
                }
                match parse(line) {
                    Some(said) => heard.push(Heard { host: host.clone(), said }),
                    None if line.trim().is_empty() => {}
                    None => {
                        other.truncate(OTHER_CAP - 1);
                        other.push_front(format!("{host}: {line}"));
                    }
                }
            });
        }
        heard
    }

    /// The last lines of other kinds: the kernel's, the start of the program.
    #[must_use]
    pub fn other_lines(&self) -> Vec<String> {
        self.other.iter().rev().cloned().collect()
    }

    /// The logs.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.logs.iter().map(|log| log.path.as_path())
    }
}

/// Writes the lines of all consoles of guests (`<guests>/<guest>/console.log`) to `to`, each after its guest's name, from now on and
/// for ever: a host that is a VM has no other way to show them while they are said.
pub fn forward(guests: &Path, to: &mut impl io::Write) {
    let mut known: BTreeMap<String, Follower> = BTreeMap::new();
    loop {
        for entry in std::fs::read_dir(guests).into_iter().flatten().flatten() {
            let guest = entry.file_name().to_string_lossy().into_owned();
            let log = || Follower::new(String::new(), entry.path().join("console.log"), String::new());
            known.entry(guest).or_insert_with(log);
        }
        for (guest, log) in &mut known {
            // One that cannot be read or told now: the next look tries again, or it was the last.
            let _ = log.look(|line| drop(to.write_all(format!("{guest} {line}\n").as_bytes())));
        }
        known.retain(|guest, _| guests.join(guest).exists());
        crate::command::pause(FORWARD_EVERY);
    }
}

/// Writes the lines of a log to `to`, from now on and for ever.
pub fn forward_log(log: &Path, to: &mut impl io::Write) {
    let mut log = Follower::new(String::new(), log.to_owned(), String::new());
    loop {
        // As above.
        let _ = log.look(|line| drop(to.write_all(format!("{line}\n").as_bytes())));
        crate::command::pause(FORWARD_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: &str = r#"@sc {"role":"server","boot_id":"b","t_ms":T,"acked":3,"verified":2,"verify_bad":0,"write_errors":0,"streams":1,"mem_checked":9,"mem_bad":0,"clock_back":0}"#;
    const CLIENT: &str = r#"@sc {"role":"client","boot_id":"c","t_ms":7,"connected":true,"connects":1,"resets":0,"bytes":1000,"bad":0,"ticks":50,"http_ok":1,"http_failed":0,"mem_checked":1,"mem_bad":0,"clock_back":0,"gap_ms":23}"#;

    fn server(t_ms: u64) -> String {
        SERVER.replace('T', &t_ms.to_string())
    }

    fn times(heard: &[Heard]) -> Vec<u64> {
        let time = |heard: &Heard| match &heard.said {
            Said::Server(stats) => stats.t_ms,
            Said::Client(stats) => stats.t_ms,
            Said::Traveller(stats) => stats.t_ms,
        };
        heard.iter().map(time).collect()
    }

    #[test]
    fn lines_are_typed() {
        let Some(Said::Client(stats)) = parse(CLIENT) else { panic!("no client") };
        assert!(stats.connected && stats.gap_ms == 23 && stats.bytes == 1000);
        let Some(Said::Server(stats)) = parse(&server(5)) else { panic!("no server") };
        assert_eq!((stats.acked, stats.sabotaged), (3, 0));
        let traveller = r#"@sc {"role":"traveller","boot_id":"t","t_ms":9,"home":"a","there":"b","back":"","operation_there":"op-1","operation_back":"","repeated":"","retries":2,"clock_back":0,"failed":""}"#;
        assert!(matches!(parse(traveller), Some(Said::Traveller(stats)) if stats.there == "b" && stats.retries == 2));
        assert_eq!(parse("@sc {\"role\":\"init\",\"waiting\":\"no DHCP answer\"}"), None);
        assert_eq!(parse("[    0.1] Linux version"), None);
    }

    #[test]
    fn forwarded_lines_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("told");
        std::fs::write(&path, format!("g1 {}\ng11 {}\ng1 boot\n", server(1), server(2))).unwrap();
        let mut console = Console::new([]).with_forwarded("a".into(), path, "g1");
        assert_eq!(times(&console.poll()), [1]);
        assert_eq!(console.other_lines(), ["a: boot"]);
    }

    #[test]
    fn a_guest_is_followed_over_hosts_cuts_and_deletions() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let append = |name: &str, text: &str| {
            File::options().create(true).append(true).open(path(name)).unwrap().write_all(text.as_bytes()).unwrap();
        };
        let mut console = Console::new([("a".into(), path("a")), ("b".into(), path("b"))]);
        assert!(console.poll().is_empty());

        append("a", &format!("boot\r\n{}\r\n{}", server(1), &server(2)[..40]));
        assert_eq!(times(&console.poll()), [1]);
        // The rest of the line comes out at the other host: skipped there.
        append("b", &format!("{}\n{}\n", &server(2)[40..], server(3)));
        let heard = console.poll();
        assert_eq!((times(&heard), heard[0].host.as_str()), (vec![3], "b"));
        // Back at the first, behind the half line.
        append("a", &format!("{}\n", server(4)));
        assert_eq!(times(&console.poll()), [4]);
        // Cut under our hands.
        File::options().write(true).open(path("a")).unwrap().set_len(0).unwrap();
        append("a", &format!("{}\n", server(5)));
        assert_eq!(times(&console.poll()), [5]);
        // Deleted with its guest after a last word, and made anew.
        append("a", &format!("{}\n", server(6)));
        std::fs::remove_file(path("a")).unwrap();
        assert_eq!(times(&console.poll()), [6]);
        append("a", &format!("{}\n", server(7)));
        assert_eq!(times(&console.poll()), [7]);
        assert_eq!(console.other_lines()[0], "a: boot");
    }
}
