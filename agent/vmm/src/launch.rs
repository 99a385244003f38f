//! What is started, and with which descriptors.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
};

use serde::Deserialize;
use supercloud_blanket::{
    device::{Boot, Console, MachineSpec, SpecError},
    vmm::version::MachineVersion,
};

/// The back end's name in a guest's class.
pub const BACK_END: &str = "kvm";
/// Longest launch text.
pub const MAX_TEXT_BYTES: usize = 64 << 10;

/// Why a launch is refused.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// It is not what it should be.
    #[error("the launch is not valid")]
    Text(#[from] serde_json::Error),
    /// It is too long.
    #[error("the launch has {0} bytes; at most 65536 are read")]
    Long(usize),
    /// The guest cannot be run by anyone.
    #[error("the guest is not valid")]
    Spec(#[from] SpecError),
    /// The guest needs what this back end does not have.
    #[error("{0} is not there in back end 'kvm'")]
    Lacks(&'static str),
    /// A descriptor is missing, or there is one for nothing.
    #[error("descriptor '{name}': {why}")]
    Descriptor {
        /// Whose.
        name: String,
        /// Why it is refused.
        why: &'static str,
    },
    /// The system refused.
    #[error("descriptor '{name}'")]
    Io {
        /// Whose.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// A guest, and the numbers of its descriptors.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// What the guest sees; travels with it.
    pub spec: MachineSpec,
    /// What this host gives; does not.
    pub wiring: Wiring,
    /// The guest does not boot: it comes over the stream, and then waits for its `resume`.
    #[serde(default)]
    pub arrives: bool,
}

/// Numbers of descriptors.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wiring {
    /// `/dev/kvm`.
    pub kvm: RawFd,
    /// `/dev/userfaultfd`, where the guest may arrive with memory left behind.
    pub userfaultfd: Option<RawFd>,
    /// The kernel, of a guest that does not boot from its first disk.
    pub kernel: Option<RawFd>,
    /// The initial ramdisk.
    pub initrd: Option<RawFd>,
    /// Disks by their names: files, or connected sockets of volume processes, which speak NBD.
    #[serde(default)]
    pub disks: BTreeMap<String, RawFd>,
    /// Taps by the names of their cards: opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    #[serde(default)]
    pub taps: BTreeMap<String, RawFd>,
    /// Where the console's output goes.
    pub console_out: Option<RawFd>,
    /// Where its input comes from.
    pub console_in: Option<RawFd>,
    /// A listening unix socket: who connects to it reads and types along.
    pub console: Option<RawFd>,
    /// A listening unix socket.
    pub control: Option<RawFd>,
    /// A connected socket by which the guest comes and leaves.
    pub stream: Option<RawFd>,
    /// A listening unix socket: who connects to it is the stream from then on.
    pub streams: Option<RawFd>,
}

impl Launch {
    /// Reads and checks a launch.
    ///
    /// # Errors
    /// What is wrong with it, by name.
    pub fn parse(text: &str) -> Result<Self, LaunchError> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(LaunchError::Long(text.len()));
        }
        let launch: Self = serde_json::from_str(text)?;
        launch.spec.check()?;
        if launch.spec.class.back_end != BACK_END {
            return Err(LaunchError::Lacks("a class of another back end"));
        }
        let version = MachineVersion::named(&launch.spec.class.machine_version);
        let version = version.ok_or(LaunchError::Lacks("a machine of that version"))?;
        if launch.spec.devices.has_balloon && !version.has_balloon() {
            return Err(LaunchError::Lacks("the memory balloon of a machine of that version"));
        }
        let refuse = |name: &str, why| Err(LaunchError::Descriptor { name: name.to_owned(), why });
        let (has_kernel, has_initrd) = match &launch.spec.boot {
            Boot::Kernel { has_initrd, .. } => (true, *has_initrd),
            Boot::Disk => (false, false),
        };
        for (name, wanted, given) in
            [("kernel", has_kernel, launch.wiring.kernel), ("initrd", has_initrd, launch.wiring.initrd)]
        {
            if wanted != given.is_some() {
                return refuse(name, "it is there when the guest has none, or the other way round");
            }
        }
        if launch.arrives && launch.wiring.control.is_none() {
            return refuse("control", "a guest that arrives needs it to be let run");
        }
        if launch.wiring.console.is_some() && launch.spec.devices.console != Console::Serial {
            return refuse(
                "console",
                "it is for a serial console; a virtio console has 'console_in' and 'console_out'",
            );
        }
        let disks: BTreeSet<_> = launch.spec.devices.disks.iter().map(|disk| &disk.name).collect();
        let cards: BTreeSet<_> = launch.spec.devices.nics.iter().map(|nic| &nic.name).collect();
        for (kind, wanted, given) in [("disks", disks, &launch.wiring.disks), ("taps", cards, &launch.wiring.taps)] {
            if wanted != given.keys().collect() {
                return refuse(kind, "there must be one for each device, and no other");
            }
        }
        Ok(launch)
    }
}

/// What holds a disk's bytes.
#[derive(Debug)]
pub enum DiskEnd {
    /// A file or a block device.
    File(File),
    /// A volume process.
    Volume(UnixStream),
}

impl DiskEnd {
    fn new(file: File) -> Result<Self, LaunchError> {
        use std::os::unix::fs::FileTypeExt as _;
        let kind = file.metadata().map_err(|source| LaunchError::Io { name: "disks".to_owned(), source })?.file_type();
        Ok(if kind.is_socket() { Self::Volume(UnixStream::from(OwnedFd::from(file))) } else { Self::File(file) })
    }
}

/// All descriptors of the process, by what they are.
#[derive(Debug)]
pub struct Held {
    pub kvm: File,
    pub userfaultfd: Option<File>,
    pub kernel: Option<File>,
    pub initrd: Option<File>,
    pub disks: BTreeMap<String, DiskEnd>,
    pub taps: BTreeMap<String, File>,
    pub console_out: Option<File>,
    pub console_in: Option<File>,
    pub console: Option<OwnedFd>,
    pub control: Option<OwnedFd>,
    pub stream: Option<UnixStream>,
    pub streams: Option<OwnedFd>,
}

impl Held {
    /// Takes the descriptors that a launch names.
    ///
    /// # Errors
    /// When one is not open, or named twice (the console's two may be one).
    pub fn take(launch: &Launch) -> Result<Self, LaunchError> {
        let wiring = &launch.wiring;
        let mut taken = BTreeSet::new();
        let mut take = |name: &str, fd: RawFd| take_one(&mut taken, name, fd);
        let map = |all: &BTreeMap<String, RawFd>, take: &mut dyn FnMut(&str, RawFd) -> Result<File, LaunchError>| {
            all.iter().map(|(name, fd)| Ok((name.clone(), take(name, *fd)?))).collect::<Result<_, LaunchError>>()
        };
        let kvm = take("kvm", wiring.kvm)?;
        let userfaultfd = wiring.userfaultfd.map(|fd| take("userfaultfd", fd)).transpose()?;
        let kernel = wiring.kernel.map(|fd| take("kernel", fd)).transpose()?;
        let initrd = wiring.initrd.map(|fd| take("initrd", fd)).transpose()?;
        let disks: BTreeMap<String, File> = map(&wiring.disks, &mut take)?;
        let disks = disks.into_iter().map(|(name, file)| DiskEnd::new(file).map(|end| (name, end)));
        let disks = disks.collect::<Result<_, LaunchError>>()?;
        let taps: BTreeMap<String, File> = map(&wiring.taps, &mut take)?;
        let stream = wiring.stream.map(|fd| take("stream", fd)).transpose()?;
        let console = wiring.console.map(|fd| take("console", fd)).transpose()?.map(OwnedFd::from);
        let control = wiring.control.map(|fd| take("control", fd)).transpose()?;
        let streams = wiring.streams.map(|fd| take("streams", fd)).transpose()?;
        let console_out = wiring.console_out.map(|fd| take("console_out", fd)).transpose()?;
        let console_in = match (&console_out, wiring.console_in) {
            (Some(out), Some(fd)) if fd == out.as_raw_fd() => {
                Some(out.try_clone().map_err(|source| LaunchError::Io { name: "console_in".to_owned(), source })?)
            }
            (_, fd) => fd.map(|fd| take("console_in", fd)).transpose()?,
        };
        for file in taps.values().chain(&console_out).chain(&console_in) {
            set_nonblocking(file)?;
        }
        let (control, streams) = (control.map(OwnedFd::from), streams.map(OwnedFd::from));
        // Of another family it works as well: nothing is asked of it that not every stream socket does.
        let stream = stream.map(|socket| UnixStream::from(OwnedFd::from(socket)));
        Ok(Self {
            kvm,
            userfaultfd,
            kernel,
            initrd,
            disks,
            taps,
            console_out,
            console_in,
            console,
            control,
            stream,
            streams,
        })
    }
}

fn take_one(taken: &mut BTreeSet<RawFd>, name: &str, fd: RawFd) -> Result<File, LaunchError> {
    let refuse = |why| LaunchError::Descriptor { name: name.to_owned(), why };
    if fd < 0 || !taken.insert(fd) {
        return Err(refuse("it is negative, or another one has it"));
    }
    // Whether it is open; and it is for no child.
    // SAFETY: plain system calls on a number; a wrong one is an error.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(refuse("it is not open"));
    }
    // SAFETY: it is open, was handed to this process by its starter, and is taken only once (see `taken`).
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn set_nonblocking(file: &File) -> Result<(), LaunchError> {
    let fd = file.as_raw_fd();
    // SAFETY: plain system calls on a descriptor of ours.
    let is_set = unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        flags >= 0 && libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) >= 0
    };
    if is_set {
        return Ok(());
    }
    Err(LaunchError::Io { name: fd.to_string(), source: io::Error::last_os_error() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(change: impl FnOnce(&mut serde_json::Value)) -> String {
        let mut value = serde_json::json!({
            "spec": {
                "class": {"back_end": "kvm", "accelerator": "kvm", "machine_version": "1", "cpu_baseline": "host"},
                "vcpus": 1, "memory_bytes": 128 << 20, "boot": {"from": "kernel", "has_initrd": false, "cmdline": ""},
                "devices": {"disks": [{"name": "root"}], "nics": [], "has_balloon": false},
            },
            "wiring": {"kvm": 3, "kernel": 4, "disks": {"root": 5}},
        });
        change(&mut value);
        value.to_string()
    }

    #[test]
    fn what_this_back_end_lacks_is_refused_by_name() {
        assert!(Launch::parse(&text(|_| {})).is_ok());
        type Spoil = fn(&mut serde_json::Value);
        let cases: [(&str, Spoil); 9] = [
            ("control", |v| v["arrives"] = true.into()),
            ("another back end", |v| v["spec"]["class"]["back_end"] = "libvirt".into()),
            ("balloon", |v| v["spec"]["devices"]["has_balloon"] = true.into()),
            ("version", |v| v["spec"]["class"]["machine_version"] = "3".into()),
            ("kernel", |v| v["spec"]["boot"] = serde_json::json!({"from": "disk"})),
            ("initrd", |v| v["wiring"]["initrd"] = 6.into()),
            ("disks", |v| v["wiring"]["disks"] = serde_json::json!({"root": 5, "more": 6})),
            ("taps", |v| v["wiring"]["taps"] = serde_json::json!({"eth0": 7})),
            ("the guest", |v| v["spec"]["vcpus"] = 0.into()),
        ];
        for (word, spoil) in cases {
            let said = Launch::parse(&text(spoil)).expect_err(word).to_string();
            assert!(said.contains(word), "{said} should name {word}");
        }
        let second = Launch::parse(&text(|v| {
            v["spec"]["devices"]["has_balloon"] = true.into();
            v["spec"]["class"]["machine_version"] = "2".into();
        }));
        assert!(second.is_ok(), "{second:?}");
        assert!(Launch::parse(&text(|v| v["wiring"]["more"] = 1.into())).is_err());
        assert!(Launch::parse(&" ".repeat(MAX_TEXT_BYTES + 1)).is_err());
    }

    #[test]
    fn descriptors_that_are_not_there_or_named_twice_are_refused() {
        let launch = |fd: RawFd, other: RawFd| {
            Launch::parse(&text(|v| {
                v["wiring"] = serde_json::json!({"kvm": fd, "kernel": other, "disks": {"root": -1}});
            }))
            .unwrap()
        };
        let file = tempfile::tempfile().unwrap();
        let open = OwnedFd::from(file);
        let free = 1_000_000;
        let said = Held::take(&launch(free, free + 1)).expect_err("not open").to_string();
        assert!(said.contains("'kvm'") && said.contains("not open"), "{said}");
        // From here on the descriptor is the launch's.
        let number = std::os::fd::IntoRawFd::into_raw_fd(open);
        let said = Held::take(&launch(number, number)).expect_err("twice").to_string();
        assert!(said.contains("'kernel'") && said.contains("another"), "{said}");
    }
}
