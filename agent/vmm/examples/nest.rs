//! `nest STEP...`: does with `supercloud-vmm` what an agent would do, one step after the other; for tests in host VMs.
//!
//! | step | what |
//! |---|---|
//! | `boot` | starts a process and lets its guest run |
//! | `move` | to a second process on this host, over its stream; the first one is ended |
//! | `freeze:SECONDS` | into a file; the process is ended, and after so long another one takes the guest from the file |
//! | `to:ADDRESS` | to the host there, which does `from` |
//! | `from` | takes a guest that another host sends |
//! | `wall` | asks the guest for its wall time, and says how far that is from this host's |
//! | `prove` | has the guest check its whole disk, and says how it is |
//! | `witness` | a client in this host that holds a stream of the guest's, until the end |
//! | `hear` | waits until the guest answers |
//! | `idle` | does nothing more |
//! | `stay` | waits until the guest has ended |
//!
//! The guest is in `/spec.json`, `/kernel`, `/initrd`; its disk's device is in `DISK`. What happens is told in lines that begin with
//! `@host `; the guest's console comes between them.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

/// `TUNSETIFF`, `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR` of `linux/if_tun.h`.
const SET_INTERFACE: libc::Ioctl = 0x4004_54ca_u32 as libc::Ioctl;
const TAP_FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;
/// `BLKFLSBUF` of `linux/fs.h`: writes what is cached of a disk, and forgets it.
const FLUSH_CACHE: libc::Ioctl = 0x1261;

/// Where hosts wait for a guest's stream, and for the word that it is theirs.
const STREAM_PORT: u16 = 7777;
const WORD_PORT: u16 = 7778;
/// Where the guest tells how it is.
const GUEST: ([u8; 4], u16) = ([10, 0, 0, 1], 80);

/// Everything is slow in a host VM that is translated.
const PATIENCE: Duration = Duration::from_secs(180);
/// How long the guest may stand still, likewise.
const MAX_DOWNTIME_MS: u64 = 3000;

fn main() -> anyhow::Result<()> {
    let disk = std::env::var_os("DISK").context("DISK is not set")?.into();
    let mut nest = Nest { tap: open_tap("tap0")?, console: console()?, disk, started: 0 };
    let mut guest = None;
    for step in std::env::args().skip(1) {
        let (verb, argument) = step.split_once(':').unwrap_or((&step, ""));
        let begun = Instant::now();
        nest.step(verb, argument, &mut guest).with_context(|| format!("step '{step}'"))?;
        say(&format!("did {step} in {} ms", begun.elapsed().as_millis()));
    }
    Ok(())
}

fn say(what: &str) {
    let _ = io::stdout().write_all(format!("@host {what}\n").as_bytes());
}

fn open_tap(name: &str) -> anyhow::Result<File> {
    let tap = File::options().read(true).write(true).open("/dev/net/tun").context("opening /dev/net/tun")?;
    // struct ifreq: the name, then the flags.
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[libc::IFNAMSIZ..libc::IFNAMSIZ + 2].copy_from_slice(&TAP_FLAGS.to_le_bytes());
    // SAFETY: the kernel reads and writes a struct ifreq, which is not longer than the array.
    if unsafe { libc::ioctl(tap.as_raw_fd(), SET_INTERFACE, request.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("making tap {name}"));
    }
    Ok(tap)
}

/// Where processes write their guest's console, which goes on in the next one where it was in the one before. Only whole lines
/// come out, so that nothing of ours comes in between.
fn console() -> anyhow::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair().context("making a pair of sockets")?;
    std::thread::spawn(move || {
        for mut line in BufReader::new(ours).split(b'\n').map_while(Result::ok) {
            line.push(b'\n');
            let _ = io::stdout().write_all(&line);
        }
    });
    Ok(theirs)
}

struct Nest {
    tap: File,
    console: UnixStream,
    disk: PathBuf,
    started: u32,
}

impl Nest {
    fn step(&mut self, verb: &str, argument: &str, guest: &mut Option<Guest>) -> anyhow::Result<()> {
        match verb {
            "boot" => {
                let mut new = self.start(false)?;
                new.control.ask("resume")?;
                *guest = Some(new);
            }
            "move" => {
                let mut here = guest.take().context("there is no guest")?;
                let mut there = self.start(true)?;
                let relay = relay(here.stream()?, there.stream()?);
                let sent = here.send()?;
                there.control.event("arrived")?;
                here.end(relay)?;
                there.control.ask("resume")?;
                say(&format!("moved {sent}"));
                *guest = Some(there);
            }
            "freeze" => {
                let mut here = guest.take().context("there is no guest")?;
                let (stream, path) = (here.stream()?, "/frozen");
                let relay = relay(stream, File::create(path).context("making a file")?);
                let sent = here.send()?;
                here.end(relay)?;
                say(&format!("frozen {sent}"));
                let seconds = argument.parse().context("reading the seconds")?;
                pause(Duration::from_secs(seconds));
                let mut there = self.start(true)?;
                let relay = self::relay(File::open(path).context("opening the file")?, there.stream()?);
                there.control.event("arrived")?;
                relay.join().ok().context("relaying the stream")??;
                there.control.ask("resume")?;
                say(&format!("thawed {}", fs::metadata(path).context("measuring the file")?.len()));
                *guest = Some(there);
            }
            "to" => {
                let mut here = guest.take().context("there is no guest")?;
                let relay = relay(here.stream()?, dial(argument, STREAM_PORT)?);
                let mut word = dial(argument, WORD_PORT)?;
                let sent = here.send()?;
                self.flush_cache()?;
                word.write_all(b"yours\n").context("handing it over")?;
                let mut answer = String::new();
                BufReader::new(&word).read_line(&mut answer).context("hearing that it was taken")?;
                ensure!(answer == "mine\n", "it was not taken: '{answer}'");
                here.end(relay)?;
                say(&format!("sent {sent}"));
            }
            "from" => {
                let (streams, words) = (listen(STREAM_PORT)?, listen(WORD_PORT)?);
                let mut there = self.start(true)?;
                say("waits");
                let (stream, _) = streams.accept().context("waiting for a guest's stream")?;
                let relay = relay(stream, there.stream()?);
                let (word, _) = words.accept().context("waiting for a word")?;
                there.control.event("arrived")?;
                let mut asked = String::new();
                BufReader::new(&word).read_line(&mut asked).context("hearing that it is ours")?;
                ensure!(asked == "yours\n", "it is not ours: '{asked}'");
                // What this host's kernel has read of the disk may be old.
                self.flush_cache()?;
                there.control.ask("resume")?;
                (&word).write_all(b"mine\n").context("telling that it is taken")?;
                relay.join().ok().context("relaying the stream")??;
                *guest = Some(there);
            }
            "wall" => say(&format!("wall {}", wall_error_ms()?)),
            "prove" => say(&format!("proved {}", ask_guest("/verify")?)),
            "witness" => {
                let name = format!("peer={}", std::net::Ipv4Addr::from(GUEST.0));
                let client = Command::new("/supercloud-guest").args(["client", &name]).stdin(Stdio::null()).spawn();
                client.context("starting the witness")?;
            }
            "hear" => {
                let give_up = Instant::now() + PATIENCE;
                while let Err(error) = wall_error_ms() {
                    ensure!(Instant::now() < give_up, "the guest does not answer: {error:#}");
                    pause(Duration::from_millis(500));
                }
            }
            "idle" => loop {
                pause(PATIENCE);
            },
            "stay" => {
                let mut guest = guest.take().context("there is no guest")?;
                let code = guest.child.wait().context("waiting for the guest's process")?;
                say(&format!("ended {code}"));
            }
            _ => bail!("there is no such step"),
        }
        Ok(())
    }

    /// A process of a guest that waits to be let run, or arrives.
    fn start(&mut self, arrives: bool) -> anyhow::Result<Guest> {
        self.started += 1;
        let bind = |kind: &str| -> anyhow::Result<(PathBuf, UnixListener)> {
            let path = PathBuf::from(format!("/{kind}-{}", self.started));
            let listener = UnixListener::bind(&path).with_context(|| format!("binding {}", path.display()))?;
            Ok((path, listener))
        };
        let (control_path, control) = bind("control")?;
        let (streams_path, streams) = bind("streams")?;
        let open = |path: &str| File::open(path).with_context(|| format!("opening {path}"));
        let write =
            |path: &str| File::options().read(true).write(true).open(path).with_context(|| format!("opening {path}"));
        let (kvm, kernel, initrd) = (write("/dev/kvm")?, open("/kernel")?, open("/initrd")?);
        let disk = write(&self.disk.to_string_lossy())?;
        let all: [&dyn AsRawFd; 8] = [&kvm, &kernel, &initrd, &disk, &self.tap, &control, &streams, &self.console];
        let fds: Vec<OwnedFd> = all.iter().map(|fd| inheritable(*fd)).collect::<anyhow::Result<_>>()?;
        let number: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let spec: Value = serde_json::from_slice(&fs::read("/spec.json").context("reading /spec.json")?)?;
        let launch = json!({"spec": spec, "arrives": arrives, "wiring": {
            "kvm": number[0], "kernel": number[1], "initrd": number[2], "disks": {"root": number[3]},
            "taps": {"eth0": number[4]}, "control": number[5], "streams": number[6], "console_out": number[7],
        }});
        let child =
            Command::new("/supercloud-vmm").args(["--launch", &launch.to_string()]).stdin(Stdio::null()).spawn();
        let child = child.context("starting supercloud-vmm")?;
        drop(fds);
        let stream = UnixStream::connect(&control_path).context("connecting to the control socket")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut control = Control { lines: BufReader::new(stream), asked: 0 };
        // From the first answer on it hears of what happens.
        control.ask("status")?;
        Ok(Guest { child, control, streams: streams_path })
    }

    /// A disk that another host reads or has written: nothing of it stays in this host's memory.
    fn flush_cache(&self) -> anyhow::Result<()> {
        let disk = File::options().read(true).write(true).open(&self.disk).context("opening the disk")?;
        disk.sync_all().context("writing what is cached of the disk")?;
        // SAFETY: this one has no argument.
        if unsafe { libc::ioctl(disk.as_raw_fd(), FLUSH_CACHE, 0) } < 0 {
            return Err(io::Error::last_os_error()).context("forgetting what is cached of the disk");
        }
        Ok(())
    }
}

/// A guest's process.
struct Guest {
    child: Child,
    control: Control,
    streams: PathBuf,
}

impl Guest {
    /// A new stream of its.
    fn stream(&mut self) -> anyhow::Result<UnixStream> {
        let stream = UnixStream::connect(&self.streams).context("connecting a stream")?;
        self.control.event("stream")?;
        Ok(stream)
    }

    /// Sends the guest; what it took.
    fn send(&mut self) -> anyhow::Result<Value> {
        self.control.say(&json!({"id": 1000, "do": "send", "max_downtime_ms": MAX_DOWNTIME_MS}))?;
        Ok(self.control.event("sent")?["progress"].clone())
    }

    /// Ends the process, and with it its stream.
    fn end(mut self, relay: Relay) -> anyhow::Result<()> {
        self.control.ask("end")?;
        self.child.wait().context("waiting for the guest's process")?;
        relay.join().ok().context("relaying the stream")?
    }
}

struct Control {
    lines: BufReader<UnixStream>,
    asked: u64,
}

impl Control {
    fn say(&mut self, request: &Value) -> anyhow::Result<()> {
        self.lines.get_mut().write_all(format!("{request}\n").as_bytes()).context("asking the guest's process")
    }

    /// The first line that is it.
    fn line(&mut self, is_it: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        loop {
            let mut line = String::new();
            let count = self.lines.read_line(&mut line).context("hearing from the guest's process")?;
            ensure!(count > 0, "the guest's process has hung up");
            let line: Value = serde_json::from_str(&line)?;
            ensure!(line["error"].is_null(), "{line}");
            if is_it(&line) {
                return Ok(line);
            }
        }
    }

    fn event(&mut self, name: &str) -> anyhow::Result<Value> {
        self.line(|line| line["event"] == name)
    }

    fn ask(&mut self, verb: &str) -> anyhow::Result<Value> {
        self.asked += 1;
        let id = self.asked;
        self.say(&json!({"id": id, "do": verb}))?;
        self.line(|line| line["id"] == id)
    }
}

/// A copy that a child inherits.
fn inheritable(fd: &dyn AsRawFd) -> anyhow::Result<OwnedFd> {
    // SAFETY: a plain system call on a descriptor that is open.
    let copy = unsafe { libc::dup(fd.as_raw_fd()) };
    ensure!(copy >= 0, "copying a descriptor: {}", io::Error::last_os_error());
    // SAFETY: the copy is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

type Relay = JoinHandle<anyhow::Result<()>>;

/// Copies until the end, which it hands on.
fn relay(mut from: impl io::Read + Send + 'static, mut to: impl Sink) -> Relay {
    std::thread::spawn(move || {
        io::copy(&mut from, &mut to).context("relaying a stream")?;
        to.close();
        Ok(())
    })
}

/// What a stream is copied to.
trait Sink: io::Write + Send + 'static {
    /// No more will come.
    fn close(&mut self) {}
}

impl Sink for File {}

impl Sink for UnixStream {
    fn close(&mut self) {
        let _ = self.shutdown(Shutdown::Write);
    }
}

impl Sink for TcpStream {
    fn close(&mut self) {
        let _ = self.shutdown(Shutdown::Write);
    }
}

fn listen(port: u16) -> anyhow::Result<TcpListener> {
    TcpListener::bind(SocketAddr::from(([0; 4], port))).with_context(|| format!("listening on port {port}"))
}

/// The other host may not be up yet.
fn dial(address: &str, port: u16) -> anyhow::Result<TcpStream> {
    let to: SocketAddr = format!("{address}:{port}").parse().context("reading an address")?;
    let give_up = Instant::now() + PATIENCE;
    loop {
        match TcpStream::connect_timeout(&to, Duration::from_secs(5)) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= give_up => return Err(error).with_context(|| format!("dialling {to}")),
            Err(_) => pause(Duration::from_millis(200)),
        }
    }
}

/// What the guest's server says of itself at this path.
fn ask_guest(path: &str) -> anyhow::Result<Value> {
    let mut stream =
        TcpStream::connect_timeout(&SocketAddr::from(GUEST), Duration::from_secs(5)).context("asking the guest")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).context("asking the guest")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("hearing from the guest")?;
    let (_, body) = answer.split_once("\r\n\r\n").context("the guest's answer has no end of its head")?;
    serde_json::from_str(body.trim()).context("reading the guest's answer")
}

/// How far the guest's wall time lies outside of the time in which it was asked, in milliseconds.
fn wall_error_ms() -> anyhow::Result<u64> {
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map(|since| since.as_millis());
    let before = now()?;
    let said = ask_guest("/")?;
    let after = now()?;
    let wall = u128::from(said["wall_ms"].as_u64().context("the guest's answer has no wall time")?);
    Ok(u64::try_from(before.saturating_sub(wall).max(wall.saturating_sub(after)))?)
}

#[expect(clippy::disallowed_methods, reason = "a program of threads")]
fn pause(time: Duration) {
    std::thread::sleep(time);
}
