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

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::command::pause;

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
}

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

fn ask(socket: &Path, request: &Request) -> Result<Answer, HostError> {
    let io = |source| HostError::Io { path: socket.display().to_string(), source };
    let mut stream = UnixStream::connect(socket).map_err(io)?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).map_err(io)?;
    stream.set_write_timeout(Some(Duration::from_secs(10))).map_err(io)?;
    let mut line = serde_json::to_string(request).map_err(|error| io(error.into()))?;
    line.push('\n');
    stream.write_all(line.as_bytes()).map_err(io)?;
    let mut text = String::new();
    BufReader::new(stream.take(LINE_CAP)).read_line(&mut text).map_err(io)?;
    match serde_json::from_str(&text) {
        Ok(Answer::Refused { error }) => Err(HostError::Refused(error)),
        Ok(answer) => Ok(answer),
        Err(error) => Err(io(error.into())),
    }
}

/// Starts a daemon in the host whose init serves `socket`; its pid inside the host.
///
/// # Errors
/// When the init does not answer, one of that name runs already, or the program cannot be started.
pub fn spawn(socket: &Path, process: ProcessSpec) -> Result<i32, HostError> {
    match ask(socket, &Request::Spawn { process })? {
        Answer::Spawned { pid } => Ok(pid),
        _ => Err(HostError::Refused("unexpected answer".to_owned())),
    }
}

/// The daemons of the host whose init serves `socket`.
///
/// # Errors
/// When the init does not answer.
pub fn status(socket: &Path) -> Result<BTreeMap<String, ProcessStatus>, HostError> {
    match ask(socket, &Request::Status)? {
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
    let mut line = String::new();
    BufReader::new(stream.take(LINE_CAP)).read_line(&mut line).ok()?;
    let answer = match serde_json::from_str(&line) {
        Ok(Request::Spawn { process }) => match table.spawn(&process) {
            Ok(pid) => Answer::Spawned { pid },
            Err(error) => Answer::Refused { error },
        },
        Ok(Request::Status) => Answer::Status { processes: table.lock().clone() },
        Err(error) => Answer::Refused { error: format!("not a request: {error}") },
    };
    let mut text = serde_json::to_string(&answer).ok()?;
    text.push('\n');
    let mut writer = stream;
    writer.write_all(text.as_bytes()).ok()
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
