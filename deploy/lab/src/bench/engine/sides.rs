//! The two sides: our `supercloud-vmm` and QEMU, each moved once from process to process.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

use super::{
    processor::Meter,
    wire::{Door, Link, Relay, pause_until},
};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// Both are asked for the same.
pub const MAX_DOWNTIME_MS: u64 = 300;

/// The work of one case, the same for both.
#[derive(Debug, Clone)]
pub struct Work {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// What becomes memory.
    pub ramdisk: PathBuf,
    /// Guest memory.
    pub memory_mib: u64,
    /// Between the two processes.
    pub link: Link,
    /// Pages between two ticks.
    pub pages_per_tick: u32,
}

/// What a move took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moved {
    /// From the request to the first tick at the destination.
    pub total_ms: f64,
    /// The longest time without a tick, less the usual one between two; 1 at least.
    pub downtime_ms: f64,
    /// On the link.
    pub bytes: f64,
    /// What the guest wrote before the move.
    pub dirty_bytes_per_s: f64,
    /// Time of processors that both ends took meanwhile, without that of the guest.
    pub cpu_ms: f64,
}

/// The stream's newest version, and the one that a host reads that has not been upgraded.
pub const NEWEST: u16 = 2;
/// See [`NEWEST`].
pub const OLDER: u16 = 1;

/// How QEMU moves a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    /// As it is: pages raw or zero, one stream.
    Defaults,
    /// `multifd`: two streams, each compressed by zstd at QEMU's level.
    MultifdZstd,
    /// `xbzrle`: what changed of pages that are in a cache of 64 MiB.
    Xbzrle,
}

impl Setting {
    /// All.
    pub const ALL: [Self; 3] = [Self::Defaults, Self::MultifdZstd, Self::Xbzrle];

    /// For the table.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Defaults => "defaults",
            Self::MultifdZstd => "multifd zstd",
            Self::Xbzrle => "xbzrle",
        }
    }

    /// Asks one end for it.
    fn ask(self, qmp: &mut Qmp) -> anyhow::Result<()> {
        let (capability, parameters) = match self {
            Self::Defaults => return Ok(()),
            Self::MultifdZstd => ("multifd", json!({"multifd-channels": 2, "multifd-compression": "zstd"})),
            Self::Xbzrle => ("xbzrle", json!({"xbzrle-cache-size": 64 << 20})),
        };
        let on = json!({"capabilities": [{"capability": capability, "state": true}]});
        qmp.run("migrate-set-capabilities", &on)?;
        qmp.run("migrate-set-parameters", &parameters)
    }
}

/// When a guest ticked: heard on its serial port.
#[derive(Debug, Clone, Default)]
struct Ticks(Arc<Mutex<Vec<Instant>>>);

impl Ticks {
    fn listen(mut from: UnixStream) -> anyhow::Result<Self> {
        let ticks = Self::default();
        let heard = ticks.clone();
        std::thread::Builder::new().name("ticks".to_owned()).spawn(move || {
            let mut bytes = [0; 512];
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                let now = Instant::now();
                heard.0.lock().unwrap_or_else(PoisonError::into_inner).extend(std::iter::repeat_n(now, count));
            }
        })?;
        Ok(ticks)
    }

    fn all(&self) -> Vec<Instant> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn await_count(&self, count: usize) -> anyhow::Result<()> {
        let end = Instant::now() + PATIENCE;
        while self.all().len() < count {
            ensure!(Instant::now() < end, "the guest does not tick");
            pause_until(Instant::now() + Duration::from_millis(2));
        }
        Ok(())
    }
}

/// A process that ends with us.
#[derive(Debug)]
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What both sides' ticks say of a move that was asked for at `asked`.
fn judge(work: &Work, asked: Instant, ticks: [&Ticks; 2], bytes: u64, cpu: [Duration; 2]) -> anyhow::Result<Moved> {
    let [here, there] = ticks;
    let (here, there) = (here.all(), there.all());
    let before: Vec<Instant> = here.iter().copied().filter(|tick| *tick <= asked).collect();
    let [first, .., last] = before[..] else { bail!("the guest did not tick before the move") };
    let usual = (last - first).as_secs_f64() / (before.len() - 1) as f64;
    let (Some(left), Some(came)) = (here.last(), there.first()) else { bail!("the guest does not tick at both ends") };
    let gap = came.saturating_duration_since(*left).as_secs_f64();
    Ok(Moved {
        total_ms: (*came - asked).as_secs_f64() * 1000.0,
        // Less cannot be told by ticks, and nothing has no ratio.
        downtime_ms: ((gap - usual) * 1000.0).max(1.0),
        bytes: bytes as f64,
        dirty_bytes_per_s: f64::from(work.pages_per_tick) * 4096.0 / usual,
        cpu_ms: cpu[1].saturating_sub(cpu[0]).as_secs_f64() * 1000.0,
    })
}

/// Moves a guest of ours once, to where streams up to this version are read.
///
/// # Errors
/// When a part does not do what it shall.
pub fn ours(program: &Path, folder: &Path, work: &Work, reads: u16) -> anyhow::Result<Moved> {
    let (source_stream, relay_in) = UnixStream::pair()?;
    let (relay_out, far_stream) = UnixStream::pair()?;
    let mut relay = Relay::new(work.link);
    relay.connect(relay_in, relay_out)?;
    let start = |name: &str, stream: &UnixStream, arrives: bool| -> anyhow::Result<(Process, PathBuf, Ticks)> {
        let path = folder.join(name);
        let _ = std::fs::remove_file(&path);
        let control = UnixListener::bind(&path)?;
        let (ours, console) = UnixStream::pair()?;
        let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
        let (kernel, ramdisk) = (File::open(&work.kernel)?, File::open(&work.ramdisk)?);
        let all: [&dyn AsRawFd; 6] = [&kvm, &kernel, &ramdisk, &console, &control, stream];
        let fds: Vec<RawFd> = all.iter().map(|fd| inheritable(*fd)).collect::<anyhow::Result<_>>()?;
        let launch = json!({
            "spec": {
                "class": {"back_end": "kvm", "accelerator": "kvm", "machine_version": "1", "cpu_baseline": "host"},
                "vcpus": 1, "memory_bytes": work.memory_mib << 20,
                "boot": {"from": "kernel", "has_initrd": true, "cmdline": ""},
                "devices": {"disks": [], "nics": [], "has_balloon": false},
            },
            "wiring": {"kvm": fds[0], "kernel": fds[1], "initrd": fds[2], "console_out": fds[3], "control": fds[4], "stream": fds[5]},
            "arrives": arrives,
        });
        let child = Command::new(program).args(["--launch", &launch.to_string()]).stdin(Stdio::null()).spawn();
        for fd in fds {
            // SAFETY: the copies were made above and are nobody else's.
            unsafe { libc::close(fd) };
        }
        Ok((Process(child.with_context(|| format!("starting {}", program.display()))?), path, Ticks::listen(ours)?))
    };
    let (source, source_control, here) = start("here", &source_stream, false)?;
    let (far, far_control, there) = start("there", &far_stream, true)?;
    drop((source_stream, far_stream));
    let mut client = Lines::connect(&source_control)?;
    client.say(&json!({"id": 1, "do": "resume"}))?;
    here.await_count(40)?;
    let meter = Meter::start([&source.0, &far.0], "vcpu")?;
    let (before, asked) = (meter.taken()?, Instant::now());
    client.say(&json!({"id": 2, "do": "send", "max_downtime_ms": MAX_DOWNTIME_MS, "stream_version": reads}))?;
    // It is there when its other end says so; then it may run.
    let mut far = Lines::connect(&far_control)?;
    far.say(&json!({"id": 1, "do": "resume"}))?;
    loop {
        let line = client.next()?;
        ensure!(line["event"] != "not_sent", "it was not sent: {line}");
        if line["event"] == "sent" {
            break;
        }
    }
    there.await_count(20)?;
    let moved = judge(work, asked, [&here, &there], relay.bytes(), [before, meter.taken()?])?;
    drop(source);
    relay.join();
    Ok(moved)
}

/// Moves a guest of QEMU once.
///
/// # Errors
/// When a part does not do what it shall.
pub fn qemu(folder: &Path, work: &Work, setting: Setting) -> anyhow::Result<Moved> {
    let path = |name: &str| folder.join(name);
    let start = |name: &str, arrives: bool| -> anyhow::Result<(Process, Qmp, Ticks)> {
        let (serial, qmp) = (path(&format!("{name}.serial")), path(&format!("{name}.qmp")));
        for socket in [&serial, &qmp] {
            let _ = std::fs::remove_file(socket);
        }
        let (on_serial, on_qmp) = (UnixListener::bind(&serial)?, UnixListener::bind(&qmp)?);
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "kvm", "-M", "microvm,acpi=off", "-nodefaults", "-no-user-config", "-display", "none"]);
        command.arg("-m").arg(work.memory_mib.to_string());
        command.arg("-kernel").arg(&work.kernel).arg("-initrd").arg(&work.ramdisk);
        command.arg("-serial").arg(format!("unix:{}", serial.display()));
        command.arg("-qmp").arg(format!("unix:{}", qmp.display()));
        // Its threads have names then: the guest's are told from its own.
        command.args(["-name", "guest,debug-threads=on"]);
        if arrives {
            command.args(["-incoming", "defer"]);
        }
        let child =
            command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().context("starting qemu-system-x86_64")?;
        let child = Process(child);
        let ticks = Ticks::listen(accept(&on_serial)?)?;
        Ok((child, Qmp::greet(accept(&on_qmp)?)?, ticks))
    };
    let (enter, leave) = (path("enter"), path("leave"));
    let _ = std::fs::remove_file(&enter);
    let _ = std::fs::remove_file(&leave);
    let on_leave = UnixListener::bind(&leave)?;
    let (far, mut far_qmp, there) = start("there", true)?;
    let (source, mut qmp, here) = start("here", false)?;
    for end in [&mut far_qmp, &mut qmp] {
        setting.ask(end)?;
    }
    far_qmp.run("migrate-incoming", &json!({"uri": format!("unix:{}", enter.display())}))?;
    qmp.run("migrate-set-parameters", &json!({"downtime-limit": MAX_DOWNTIME_MS}))?;
    here.await_count(40)?;
    let door = Door::open(on_leave, enter, Relay::new(work.link))?;
    let meter = Meter::start([&source.0, &far.0], "CPU ")?;
    let (before, asked) = (meter.taken()?, Instant::now());
    qmp.run("migrate", &json!({"uri": format!("unix:{}", leave.display())}))?;
    there.await_count(20)?;
    let moved = judge(work, asked, [&here, &there], door.bytes(), [before, meter.taken()?])?;
    far_qmp.run("query-status", &json!({}))?;
    drop(source);
    door.close()?.join();
    Ok(moved)
}

/// A copy of a descriptor that the next child inherits.
fn inheritable(fd: &dyn AsRawFd) -> anyhow::Result<RawFd> {
    // SAFETY: a plain system call on an open descriptor; the copy has no close-on-exec flag.
    let copy = unsafe { libc::dup(fd.as_raw_fd()) };
    ensure!(copy >= 0, "copying a descriptor: {}", std::io::Error::last_os_error());
    Ok(copy)
}

fn accept(listener: &UnixListener) -> anyhow::Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let end = Instant::now() + PATIENCE;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                ensure!(Instant::now() < end, "nobody connects");
                pause_until(Instant::now() + Duration::from_millis(1));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Lines of JSON.
struct Lines(BufReader<UnixStream>);

impl Lines {
    fn new(stream: UnixStream) -> anyhow::Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    fn connect(path: &Path) -> anyhow::Result<Self> {
        Self::new(UnixStream::connect(path)?)
    }

    fn say(&mut self, line: &Value) -> anyhow::Result<()> {
        Ok(self.0.get_mut().write_all(format!("{line}\n").as_bytes())?)
    }

    fn next(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        ensure!(self.0.read_line(&mut line)? > 0, "the process ended");
        Ok(serde_json::from_str(&line)?)
    }
}

/// QEMU's monitor.
struct Qmp(Lines);

impl Qmp {
    fn greet(stream: UnixStream) -> anyhow::Result<Self> {
        let mut qmp = Self(Lines::new(stream)?);
        qmp.0.next().context("QEMU's greeting")?;
        qmp.run("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn run(&mut self, what: &str, arguments: &Value) -> anyhow::Result<()> {
        self.0.say(&json!({"execute": what, "arguments": arguments}))?;
        loop {
            let line = self.0.next()?;
            ensure!(line["error"].is_null(), "QEMU refuses {what}: {line}");
            if !line["return"].is_null() {
                return Ok(());
            }
        }
    }
}
