//! The first process of a lab host: a pid namespace's init.
//!
//! A lab host is a set of namespaces (network, mounts, host name, pids, IPC) held by this process. It starts the host's
//! daemons when asked over a unix socket, reaps what ends, and remembers how. Because it is pid 1 of the host, killing it takes
//! every process of the host down in the same instant, whatever they did to hide: that is how a host loses power, and why nothing
//! survives a lab.
//!
//! ```text
//! supercloud-lab (any)  --spawn-->  stage one: unshare  --spawn-->  stage two: pid 1, mounts, serves its socket
//!                       <--pid----  (ends)
//! ```
//!
//! It is not bound to the life of whoever started it: a lab outlives the command that made it.
//!
//! In a host that is a VM the same is served by its first process, on a serial line ([`serve_channel`]), whose other end is a unix socket
//! of QEMU's. There a client may find what was left of another one's answer: requests and answers are lines that begin with a number.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::command::{pause, wait_for};
use crate::fleet::{config, console};

/// Longest line on the socket.
const LINE_CAP: u64 = 1 << 20;

/// What a host is made of.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostSetup {
    /// Host name inside.
    pub hostname: String,
    /// Name of the network namespace, which exists.
    pub namespace: String,
    /// The socket to serve, a path that the mounts below do not hide.
    pub socket: PathBuf,
    /// Folders or files laid over others inside: (what, where).
    pub binds: Vec<(PathBuf, PathBuf)>,
}

/// A daemon to be started in a host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// What it is called in status and when it is killed; one of a name runs at a time.
    pub name: String,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Added to the environment.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Where its standard output and error go, appended.
    pub log: PathBuf,
}

/// What can be asked of a host's init.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "snake_case", deny_unknown_fields)]
enum Request {
    Spawn { process: ProcessSpec },
    Status,
    Run { argv: Vec<String>, seconds: u64 },
    Write { path: PathBuf, text: String },
}

/// What a command inside did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Its exit status; that of a shell when it was killed by a signal.
    pub status: i32,
    /// What it wrote to its standard output; the first [`OUTPUT_CAP`] bytes.
    pub out: String,
    /// Likewise, its standard error.
    pub err: String,
}

/// What is kept of a command's output.
pub const OUTPUT_CAP: u64 = 128 << 10;

/// A daemon's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessStatus {
    /// Its pid inside the host.
    pub pid: i32,
    /// How it ended, when it has.
    pub ended: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Answer {
    Refused { error: String },
    Spawned { pid: i32 },
    Status { processes: BTreeMap<String, ProcessStatus> },
    Ran { ran: Outcome },
    Written { written: bool },
}

/// A host's init that does not do what it was asked.
#[derive(Debug, Error)]
pub enum HostError {
    /// It does not answer.
    #[error("the lab host's init does not answer at {path}")]
    Io {
        /// Its socket.
        path: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// It refuses.
    #[error("the lab host refuses: {0}")]
    Refused(String),
}

/// How long a request that only looks or starts something may take; a host that is translated is slow, and answers one at a time.
const PATIENCE: Duration = Duration::from_secs(30);

fn ask(socket: &Path, request: &Request, patience: Duration) -> Result<Answer, HostError> {
    let io = |source| HostError::Io { path: socket.display().to_string(), source };
    let mut stream = UnixStream::connect(socket).map_err(io)?;
    stream.set_read_timeout(Some(patience)).map_err(io)?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(io)?;
    let number = uuid::Uuid::new_v4().as_u64_pair().0;
    let text = serde_json::to_string(request).map_err(|error| io(error.into()))?;
    // What an earlier client may have left of a line is ended first.
    stream.write_all(format!("\n{number} {text}\n").as_bytes()).map_err(io)?;
    let mut lines = BufReader::new(stream.take(LINE_CAP));
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line).map_err(io)? == 0 {
            return Err(io(io::ErrorKind::UnexpectedEof.into()));
        }
        let Some(answer) = numbered(&line).filter(|(of, _)| *of == number).map(|(_, text)| text) else { continue };
        return match serde_json::from_str(answer) {
            Ok(Answer::Refused { error }) => Err(HostError::Refused(error)),
            Ok(answer) => Ok(answer),
            Err(error) => Err(io(error.into())),
        };
    }
}

fn numbered(line: &str) -> Option<(u64, &str)> {
    let (number, text) = line.trim().split_once(' ')?;
    Some((number.parse().ok()?, text))
}

/// Runs a command in the host whose init serves `socket`, to its end; killed there when it runs past `budget`.
///
/// # Errors
/// When the init does not answer or the command cannot be started.
pub fn run(socket: &Path, argv: &[String], budget: Duration) -> Result<Outcome, HostError> {
    let request = Request::Run { argv: argv.to_vec(), seconds: budget.as_secs().max(1) };
    match ask(socket, &request, budget + PATIENCE)? {
        Answer::Ran { ran } => Ok(ran),
        _ => Err(HostError::Refused("unexpected answer".to_owned())),
    }
}

/// Writes a small file in the host whose init serves `socket`, for its superuser only.
///
/// # Errors
/// When the init does not answer or it cannot be written.
pub fn write(socket: &Path, path: &Path, text: &str) -> Result<(), HostError> {
    match ask(socket, &Request::Write { path: path.to_owned(), text: text.to_owned() }, PATIENCE)? {
        Answer::Written { written: true } => Ok(()),
        _ => Err(HostError::Refused("unexpected answer".to_owned())),
    }
}

/// Starts a daemon in the host whose init serves `socket`; its pid inside the host.
///
/// # Errors
/// When the init does not answer, one of that name runs already, or the program cannot be started.
pub fn spawn(socket: &Path, process: ProcessSpec) -> Result<i32, HostError> {
    match ask(socket, &Request::Spawn { process }, PATIENCE)? {
        Answer::Spawned { pid } => Ok(pid),
        _ => Err(HostError::Refused("unexpected answer".to_owned())),
    }
}

/// The daemons of the host whose init serves `socket`.
///
/// # Errors
/// When the init does not answer.
pub fn status(socket: &Path) -> Result<BTreeMap<String, ProcessStatus>, HostError> {
    match ask(socket, &Request::Status, PATIENCE)? {
        Answer::Status { processes } => Ok(processes),
        _ => Err(HostError::Refused("unexpected answer".to_owned())),
    }
}

/// Stage one: leaves for new namespaces and starts stage two in them; gives its pid.
///
/// # Errors
/// When a namespace cannot be made or entered.
pub fn stage_one(setup_file: &Path) -> io::Result<u32> {
    let setup = read_setup(setup_file)?;
    crate::netns::enter(&setup.namespace)?;
    let flags = libc::CLONE_NEWNS | libc::CLONE_NEWUTS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC;
    // SAFETY: this process has one thread and goes on only to start the next stage.
    if unsafe { libc::unshare(flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("host-init").arg("--stage-two").arg(setup_file).stdin(Stdio::null()).stdout(Stdio::null());
    // Its own session: Ctrl-C at the terminal of `up` must not reach a host.
    // SAFETY: setsid is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            Ok(())
        });
    }
    Ok(command.spawn()?.id())
}

/// Stage two: as pid 1 of the host, lays the mounts and serves until killed.
///
/// # Errors
/// When the mounts or the socket cannot be made.
pub fn stage_two(setup_file: &Path) -> io::Result<()> {
    let setup = read_setup(setup_file)?;
    if std::process::id() != 1 {
        return Err(io::Error::other("stage two is pid 1 of a lab host"));
    }
    // SAFETY: plain system call with a pointer and its length.
    if unsafe { libc::sethostname(setup.hostname.as_ptr().cast(), setup.hostname.len()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    lay_mounts(&setup)?;
    match fs::remove_file(&setup.socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&setup.socket)?;
    fs::set_permissions(&setup.socket, fs::Permissions::from_mode(0o600))?;
    let table: &'static Table = Box::leak(Box::default());
    std::thread::spawn(|| table.reap_for_ever());
    for stream in listener.incoming().flatten() {
        // A client that hangs up or sends nonsense only loses its own connection.
        std::thread::spawn(move || serve(&stream, table));
    }
    Ok(())
}

fn read_setup(file: &Path) -> io::Result<HostSetup> {
    Ok(serde_json::from_slice(&fs::read(file)?)?)
}

fn lay_mounts(setup: &HostSetup) -> io::Result<()> {
    mount(None, Path::new("/"), None, libc::MS_REC | libc::MS_PRIVATE)?;
    // The copies of other labs' namespaces that this mount namespace was born with would keep them alive.
    let netns = c_path(Path::new("/run/netns"))?;
    // SAFETY: a valid C string; one that is not mounted is fine.
    while unsafe { libc::umount2(netns.as_ptr(), libc::MNT_DETACH) } == 0 {}
    // What a program in the host sees must be the host's: its processes, its interfaces.
    mount(None, Path::new("/proc"), Some("proc"), libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC)?;
    mount(None, Path::new("/sys"), Some("sysfs"), libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC)?;
    for (from, to) in &setup.binds {
        // /etc/resolv.conf may be a link, also a dangling one: then there is nothing to hide.
        let Ok(to) = fs::canonicalize(to) else { continue };
        mount(Some(from), &to, None, libc::MS_BIND)?;
    }
    Ok(())
}

fn mount(from: Option<&Path>, to: &Path, kind: Option<&str>, flags: libc::c_ulong) -> io::Result<()> {
    let source = c_path(from.unwrap_or(Path::new("none")))?;
    let target = c_path(to)?;
    let kind = kind.map(CString::new).transpose()?;
    let kind = kind.as_ref().map_or(std::ptr::null(), |kind| kind.as_ptr());
    // SAFETY: all pointers are C strings that outlive the call, or null where that is allowed.
    let done = unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind, flags, std::ptr::null()) };
    if done < 0 {
        let error = io::Error::last_os_error();
        return Err(io::Error::new(error.kind(), format!("mounting over {}: {error}", to.display())));
    }
    Ok(())
}

fn c_path(path: &Path) -> io::Result<CString> {
    use std::os::unix::ffi::OsStrExt;
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// The daemons of this host. The lock is held while one is started and while one is reaped, so that an end is never
/// seen before the start is written down.
#[derive(Default)]
struct Table {
    processes: Mutex<BTreeMap<String, ProcessStatus>>,
}

impl Table {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, ProcessStatus>> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(&self, process: &ProcessSpec) -> Result<i32, String> {
        let mut processes = self.lock();
        if processes.get(&process.name).is_some_and(|status| status.ended.is_none()) {
            return Err(format!("{} runs already", process.name));
        }
        let (program, args) = process.argv.split_first().ok_or("no program given")?;
        let start = || -> io::Result<i32> {
            let log = OpenOptions::new().create(true).append(true).open(&process.log)?;
            let mut command = Command::new(program);
            command.args(args).envs(process.env.iter().cloned()).env("PATH", crate::command::path_with_sbin());
            command.current_dir("/").stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
            // SAFETY: setsid is async-signal-safe.
            unsafe {
                command.pre_exec(|| {
                    libc::setsid();
                    Ok(())
                });
            }
            let child = command.spawn()?;
            i32::try_from(child.id()).map_err(io::Error::other)
        };
        let pid = start().map_err(|error| format!("cannot start {}: {error}", process.argv.join(" ")))?;
        processes.insert(process.name.clone(), ProcessStatus { pid, ended: None });
        Ok(pid)
    }

    /// Runs a command to its end. Who reaps it is [`Table::reap_for_ever`], like everything else; so it is remembered as a process of a
    /// name of its own until then.
    fn run(&self, argv: &[String], budget: Duration) -> Result<Outcome, String> {
        let name = format!("run-{}", uuid::Uuid::new_v4());
        let [out, err] = ["out", "err"].map(|kind| std::env::temp_dir().join(format!("{name}.{kind}")));
        let limited = ["timeout", "-k", "2"].map(str::to_owned).into_iter().chain([budget.as_secs().to_string()]);
        let shell = ["sh", "-c", "out=$1; shift; exec \"$@\" >$out", "sh"].map(str::to_owned).into_iter();
        let argv = shell.chain([out.display().to_string()]).chain(limited).chain(argv.iter().cloned());
        let process = ProcessSpec { name: name.clone(), argv: argv.collect(), env: Vec::new(), log: err.clone() };
        self.spawn(&process)?;
        let ended = wait_for(budget + Duration::from_secs(10), || self.lock().get(&name)?.ended.clone());
        self.lock().remove(&name);
        let said = |path: &Path| {
            let mut bytes = Vec::new();
            let read = File::open(path).and_then(|file| file.take(OUTPUT_CAP).read_to_end(&mut bytes));
            // It lies in memory, and goes with the host at the latest.
            let _ = fs::remove_file(path);
            read.map_or_else(|error| error.to_string(), |_| String::from_utf8_lossy(&bytes).into_owned())
        };
        let (out, err) = (said(&out), said(&err));
        let ended = ended.ok_or_else(|| format!("it does not end; it said {out}{err}"))?;
        let number = |prefix: &str| ended.strip_prefix(prefix)?.parse::<i32>().ok();
        let status = number("exit status ").or_else(|| number("killed by signal ").map(|signal| 128 + signal));
        Ok(Outcome { status: status.unwrap_or(1), out, err })
    }

    /// Reaps the host's daemons and all orphans.
    fn reap_for_ever(&self) {
        loop {
            // SAFETY: all-zero is a valid siginfo_t.
            let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
            // Only looks: the child is taken under the lock, since starting a program also waits for children.
            // SAFETY: `info` is valid for the call.
            let seen = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, libc::WEXITED | libc::WNOWAIT) };
            if seen < 0 {
                pause(Duration::from_millis(20));
                continue;
            }
            let mut processes = self.lock();
            // SAFETY: waitid has filled it in for an ended child.
            let pid = unsafe { info.si_pid() };
            let mut status = 0;
            // SAFETY: `status` is valid for the call.
            if unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) } != pid {
                continue;
            }
            let ended = describe_end(status);
            if let Some(known) = processes.values_mut().find(|known| known.pid == pid && known.ended.is_none()) {
                known.ended = Some(ended);
            }
        }
    }
}

fn describe_end(status: libc::c_int) -> String {
    if libc::WIFSIGNALED(status) {
        format!("killed by signal {}", libc::WTERMSIG(status))
    } else {
        format!("exit status {}", libc::WEXITSTATUS(status))
    }
}

fn serve(stream: &UnixStream, table: &Table) -> Option<()> {
    stream.set_read_timeout(Some(Duration::from_secs(30))).ok()?;
    stream.set_write_timeout(Some(Duration::from_secs(10))).ok()?;
    for line in BufReader::new(stream.take(LINE_CAP)).lines() {
        if let Some(answer) = answer(&line.ok()?, table) {
            let mut writer = stream;
            return writer.write_all(answer.as_bytes()).ok();
        }
    }
    None
}

/// The answer to a line, with its end; none to a line without a number.
fn answer(line: &str, table: &Table) -> Option<String> {
    let (number, text) = numbered(line)?;
    let refused = |error: String| Answer::Refused { error };
    let answer = match serde_json::from_str(text) {
        Ok(Request::Spawn { process }) => table.spawn(&process).map_or_else(refused, |pid| Answer::Spawned { pid }),
        Ok(Request::Status) => Answer::Status { processes: table.lock().clone() },
        Ok(Request::Run { argv, seconds }) => {
            table.run(&argv, Duration::from_secs(seconds)).map_or_else(refused, |ran| Answer::Ran { ran })
        }
        Ok(Request::Write { path, text }) => write_file(&path, &text)
            .map_or_else(|error| refused(error.to_string()), |()| Answer::Written { written: true }),
        Err(error) => refused(format!("not a request: {error}")),
    };
    Some(format!("{number} {}\n", serde_json::to_string(&answer).ok()?))
}

fn write_file(path: &Path, text: &str) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// Where daemons of a host that is a VM write what [`serve_channel`] forwards: in memory, so that it is new in each life.
pub const FORWARDED_LOG: &str = "/run/agent.log";

/// Serves a host on a serial line until it is switched off, and tells the agent's log and what its guests say on two others.
///
/// # Errors
/// When a line cannot be opened or ends.
pub fn serve_channel(line: &Path, log: &Path, told: &Path) -> io::Result<()> {
    let device = open_line(line)?;
    let (mut log, mut told) = (open_line(log)?, open_line(told)?);
    std::thread::spawn(move || console::forward_log(Path::new(FORWARDED_LOG), &mut log));
    std::thread::spawn(move || console::forward(Path::new(config::GUESTS_DIR), &mut told));
    let table: &'static Table = Box::leak(Box::default());
    std::thread::spawn(|| table.reap_for_ever());
    let writer: &'static Mutex<File> = Box::leak(Box::new(Mutex::new(device.try_clone()?)));
    let mut reader = BufReader::new(device);
    loop {
        let mut text = Vec::new();
        if (&mut reader).take(LINE_CAP).read_until(b'\n', &mut text)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // A long command does not keep others waiting.
        std::thread::spawn(move || {
            let answer = answer(&String::from_utf8_lossy(&text), table)?;
            writer.lock().unwrap_or_else(PoisonError::into_inner).write_all(answer.as_bytes()).ok()
        });
    }
}

/// A serial line that carries bytes as they are: no echo, no editing, no control characters, and no hanging up.
fn open_line(line: &Path) -> io::Result<File> {
    // It must not become this process' terminal.
    let device = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(line)?;
    // SAFETY: all-zero is a valid termios, which the call fills in.
    let mut terms: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and `terms` is valid for the calls.
    let done = unsafe {
        if libc::tcgetattr(device.as_raw_fd(), &raw mut terms) < 0 {
            return Err(io::Error::last_os_error());
        }
        libc::cfmakeraw(&raw mut terms);
        terms.c_cflag |= libc::CLOCAL | libc::CREAD;
        libc::tcsetattr(device.as_raw_fd(), libc::TCSANOW, &raw const terms)
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(device) }
}

/// Starts a host's init with the lab's own program and waits until it serves its socket; its pid as seen from here.
///
/// # Errors
/// When stage one fails or the socket does not come up.
pub fn start(program: &Path, setup: &HostSetup, setup_file: &Path, log: &Path) -> Result<i32, HostError> {
    let io = |source| HostError::Io { path: setup.socket.display().to_string(), source };
    fs::write(setup_file, serde_json::to_vec(setup).map_err(|error| io(error.into()))?).map_err(io)?;
    let log_file = File::create(log).map_err(io)?;
    let output = Command::new(program)
        .args(["host-init", "--stage-one"])
        .arg(setup_file)
        .stdin(Stdio::null())
        .stderr(log_file)
        .output()
        .map_err(io)?;
    let pid: Option<i32> = String::from_utf8_lossy(&output.stdout).trim().parse().ok();
    let served = || crate::command::wait_for(Duration::from_secs(20), || status(&setup.socket).ok());
    match pid {
        Some(pid) if output.status.success() && served().is_some() => Ok(pid),
        _ => {
            let said = fs::read_to_string(log).unwrap_or_default();
            Err(HostError::Refused(format!("it did not start ({}): {}", output.status, said.trim())))
        }
    }
}
