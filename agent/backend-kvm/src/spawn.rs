//! The descriptors that a guest's process gets, and its start. Everything here blocks.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
        unix::{
            fs::OpenOptionsExt as _,
            net::{UnixListener, UnixStream},
            process::CommandExt as _,
        },
    },
    path::Path,
    process::{Command, Stdio},
};

use serde_json::json;
use supercloud_blanket::{
    BackendError, BackendResult, Launch, home,
    lasting::{self, Lasting},
    vmm::travel::left::offers_faults,
};

use crate::{
    KvmConfig,
    record::{self, Home},
};

/// `TUNSETIFF` of `linux/if_tun.h`.
const SET_INTERFACE: libc::Ioctl = 0x4004_54cau32 as libc::Ioctl;

/// What goes to the process; closed here when it was started.
#[derive(Default)]
struct Handed {
    all: Vec<Box<dyn AsFd + Send>>,
}

impl Handed {
    fn add(&mut self, fd: impl AsFd + Send + 'static) -> RawFd {
        let number = fd.as_fd().as_raw_fd();
        self.all.push(Box::new(fd));
        number
    }
}

fn cannot<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> BackendError + 'a {
    move |source| BackendError::File { what, path: path.to_owned(), source }
}

/// A process that has not heard yet what to do, and does nothing before; it ends when this is dropped.
pub struct Started {
    /// Which.
    pub process: Lasting,
    text: String,
    stdin: std::process::ChildStdin,
}

impl Started {
    /// Tells it.
    pub fn begin(mut self) -> BackendResult<()> {
        let detail = |error: io::Error| BackendError::Failed {
            what: "tell a guest's process what to run",
            detail: error.to_string(),
        };
        self.stdin.write_all(self.text.as_bytes()).map_err(detail)
    }
}

/// Starts the process of a guest, which then waits to be let run, or to come when it `arrives`.
pub fn start(config: &KvmConfig, home: &Home, launch: &Launch, arrives: bool) -> BackendResult<Started> {
    let mut handed = Handed::default();
    let kvm = Path::new("/dev/kvm");
    let opened = File::options().read(true).write(true).open(kvm).map_err(cannot("open", kvm))?;
    let mut wiring = json!({"kvm": handed.add(opened)});
    if arrives && let Ok(device) = open_userfaultfd() {
        wiring["userfaultfd"] = handed.add(device).into();
    }
    for (name, path) in [("kernel", &launch.host.kernel), ("initrd", &launch.host.initrd)] {
        if let Some(path) = path {
            wiring[name] = handed.add(File::open(path).map_err(cannot("open", path))?).into();
        }
    }
    let mut disks = BTreeMap::new();
    for disk in &launch.spec.devices.disks {
        if let Some(at) = launch.host.disks.get(&disk.name) {
            let stream = UnixStream::connect(&at.socket).map_err(cannot("reach the volume process at", &at.socket))?;
            disks.insert(&disk.name, handed.add(stream));
        }
    }
    wiring["disks"] = json!(disks);
    let mut taps = BTreeMap::new();
    for nic in &launch.spec.devices.nics {
        if let Some(tap) = launch.host.taps.get(&nic.name) {
            let opened = open_tap(tap).map_err(cannot("open the interface", Path::new(tap)))?;
            taps.insert(&nic.name, handed.add(opened));
        }
    }
    wiring["taps"] = json!(taps);
    let append = |path: &Path| File::options().create(true).append(true).mode(0o600).open(path);
    if let Some(path) = &launch.host.console_log {
        wiring["console_out"] = handed.add(append(path).map_err(cannot("open", path))?).into();
    }
    if let Some(path) = &launch.host.console_socket {
        let listener = home::listen(path).map_err(cannot("listen at", path))?;
        wiring["console"] = handed.add(listener).into();
    }
    let control = record::control_socket(home);
    let listener = UnixListener::bind(&control).map_err(cannot("listen at", &control))?;
    wiring["control"] = handed.add(listener).into();
    let text = json!({"spec": launch.spec, "arrives": arrives, "wiring": wiring}).to_string();

    let log_path = record::log_file(home);
    let log = append(&log_path).map_err(cannot("open", &log_path))?;
    let mut command = Command::new(&config.program);
    command
        .args(["--launch", "-"])
        .current_dir("/")
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(log.try_clone().map_err(cannot("open", &log_path))?)
        .stderr(log);
    // SAFETY: geteuid takes no arguments and cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        let (user, group) = config.user;
        command.uid(user).gid(group);
    }
    let kept: Vec<BorrowedFd<'_>> = handed.all.iter().map(|fd| fd.as_fd()).collect();
    lasting::detach(&mut command, &kept);
    // Not waited for any more: it outlives this agent, and while this agent lives, tokio reaps it.
    let child = tokio::process::Command::from(command).kill_on_drop(false).spawn();
    let mut child = child.map_err(cannot("start", &config.program))?;
    let failed = || {
        let detail = format!("it ended at once; it said: {}", last_words(home));
        BackendError::Failed { what: "start a guest's process", detail }
    };
    let process = child.id().and_then(Lasting::of).ok_or_else(failed)?;
    let stdin = child.stdin.take().ok_or_else(failed)?.into_owned_fd().map_err(cannot("reach", &config.program))?;
    // Blocking, as everything here; tokio had made it otherwise.
    let stdin = std::process::ChildStdin::from(stdin);
    Ok(Started { process, text, stdin })
}

/// What gives who has it faults on its own memory, the kernel's among them (since Linux 6.1).
pub fn open_userfaultfd() -> io::Result<File> {
    let device = File::options().read(true).write(true).open("/dev/userfaultfd")?;
    offers_faults(&device)?;
    Ok(device)
}

/// The end of what a process said.
pub fn last_words(home: &Home) -> String {
    let text = std::fs::read(record::log_file(home)).unwrap_or_default();
    let from = text.len().saturating_sub(400);
    String::from_utf8_lossy(&text[from..]).trim().replace('\n', " | ")
}

/// A descriptor of a tap that is there, as a guest's card needs it: no packet information, headers of virtio.
fn open_tap(name: &str) -> io::Result<File> {
    let tap = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: ifreq is a C structure of numbers and bytes, for which all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the descriptor is open, and the kernel reads and writes an ifreq.
    if unsafe { libc::ioctl(tap.as_raw_fd(), SET_INTERFACE, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tap)
}
