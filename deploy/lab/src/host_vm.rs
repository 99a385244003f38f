//! A host that is a virtual machine itself, with a `/dev/kvm` of its own: QEMU translates, and emulates an AMD processor's
//! virtualization with nested paging. So our VMM can boot real kernels on any machine, slowly.
//!
//! ```text
//! this machine
//! └── QEMU (translation, -cpu EPYC), Debian's cloud kernel, an initramfs of busybox and ours
//!     ├── br0: tap0, and eth0 to another host VM
//!     └── supercloud-vmm on /dev/kvm: Debian's cloud kernel, the lean guest's initramfs and disk, tap0
//! ```
//!
//! What a host VM does are steps of `agent/vmm/examples/nest.rs`. What happens inside is told on its serial console: its own lines
//! begin with `@host `, those of the guest and of the witness with `@sc `.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    command::wait_for,
    image::{
        ImageError,
        cpio::Archive,
        io_at, kernel,
        lean::{self, LeanImage},
    },
};

/// The guest's address on its network with the host VMs. `nest` knows it too.
pub const GUEST_ADDRESS: &str = "10.0.0.1";

pub(crate) const BUSYBOX: &str = "/bin/busybox";
/// Memory of a host VM; its initramfs lies in it.
const HOST_MIB: u32 = 1024;

/// The machine itself: a translated processor.
pub(crate) const QEMU: [&str; 11] = [
    "qemu-system-x86_64",
    "-accel",
    "tcg,thread=multi",
    "-M",
    "q35",
    "-display",
    "none",
    "-nodefaults",
    "-no-reboot",
    "-monitor",
    "none",
];

/// What a host VM does, once it is up. `/plan` sets its address, its disk and its steps.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /bin /proc /sys /dev
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs devtmpfs /dev
for module in $(cat /modules.load); do insmod /modules/$module || echo "@host no $module"; done
. /plan
brctl addbr br0
ip address add $ADDRESS/24 dev br0
ip link set br0 up
if [ -e /sys/class/net/eth0 ]; then brctl addif br0 eth0; ip link set eth0 up; fi
until [ -e $DISK ]; do sleep 0.1; done
echo "@host up $(cut -d' ' -f1 /proc/uptime)"
if [ -e /dev/kvm ]; then echo "@host kvm"; else echo "@host no kvm"; fi
(until [ -e /sys/class/net/tap0 ]; do sleep 0.1; done; brctl addif br0 tap0; ip link set tap0 up) &
/nest $STEPS
echo "@host done $?"
poweroff -f
"#;

/// What runs the guests of a host VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hypervisor {
    /// Its kernel's KVM, by the processor's virtualization, which QEMU emulates.
    #[default]
    Kvm,
    /// Xen below its kernel, without any virtualization of the processor's.
    Xen,
}

impl Hypervisor {
    /// The processor, as QEMU is told. Xen's has no virtualization, and is an old one with some newer instructions: on QEMU's EPYC the first
    /// domain's kernel faults in its first instructions (Xen 4.17, QEMU 7.2). With other devices come other processors, as in other clouds:
    /// each lacks something that another one has.
    pub(crate) const fn processor(self, hardware: Hardware) -> &'static str {
        match (self, hardware) {
            (Self::Kvm, Hardware::Virtio) => "EPYC,-adx",
            (Self::Kvm, Hardware::Vmware) => "EPYC,-avx2,-bmi2",
            (Self::Kvm, Hardware::Intel) => "EPYC,-movbe",
            (Self::Xen, _) => "qemu64,-svm,+ssse3,+sse4.1,+sse4.2,+popcnt,+aes,+pclmulqdq,+rdrand",
        }
    }
}

/// The devices that a host VM is given by what runs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hardware {
    /// As in QEMU's own clouds: virtio-net, virtio-blk.
    Virtio,
    /// As in others: vmxnet3, NVMe.
    Vmware,
    /// As on a machine of Intel's chips: e1000e, AHCI. Kernels for clouds know neither.
    Intel,
}

impl Hardware {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Virtio, Self::Vmware, Self::Intel];

    /// Whether a kernel for clouds knows its devices.
    #[must_use]
    pub const fn is_of_clouds(self) -> bool {
        !matches!(self, Self::Intel)
    }

    pub(crate) const fn card(self) -> &'static str {
        match self {
            Self::Virtio => "virtio-net-pci",
            Self::Vmware => "vmxnet3",
            Self::Intel => "e1000e",
        }
    }

    pub(crate) const fn disk(self) -> &'static str {
        match self {
            Self::Virtio => "virtio-blk-pci",
            Self::Vmware => "nvme,serial=host",
            Self::Intel => "ide-hd,bus=ide.0",
        }
    }

    /// The disk inside.
    pub(crate) const fn disk_path(self) -> &'static str {
        match self {
            Self::Virtio => "/dev/vda",
            Self::Vmware => "/dev/nvme0n1",
            Self::Intel => "/dev/sda",
        }
    }
}

impl std::fmt::Display for Hardware {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Virtio => "virtio-net + virtio-blk",
            Self::Vmware => "vmxnet3 + NVMe",
            Self::Intel => "e1000e + AHCI",
        })
    }
}

/// The end of a cable to another host VM.
#[derive(Debug, Clone, Copy)]
pub struct Cable<'a> {
    /// A unix socket, the same at both ends.
    pub socket: &'a Path,
    /// Whether this end makes it; it must be started first.
    pub is_first: bool,
}

/// A host VM to be booted.
#[derive(Debug, Clone, Copy)]
pub struct HostPlan<'a> {
    /// Of its files.
    pub name: &'a str,
    /// What it sees of this machine.
    pub hardware: Hardware,
    /// Its address on the guest's network; the last byte is also that of its MAC.
    pub address: [u8; 4],
    /// To another one.
    pub cable: Option<Cable<'a>>,
    /// The guest's disk, raw; hosts may share it, each reads and writes it only while the guest is there.
    pub disk: &'a Path,
    /// What it does: steps of `nest`.
    pub steps: &'a str,
}

/// A running host VM.
#[derive(Debug)]
pub struct HostVm {
    qemu: Child,
    console: PathBuf,
}

impl Drop for HostVm {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Why a host VM cannot be had here, if so.
#[must_use]
pub fn missing() -> Option<&'static str> {
    if Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_err() {
        return Some("qemu-system-x86_64 is not installed");
    }
    let is_static = fs::read(BUSYBOX).is_ok_and(|bytes| lean::is_static(&bytes));
    (!is_static).then_some("busybox-static is not installed")
}

/// A disk for the guest, with its system on it.
///
/// # Errors
/// When it cannot be made.
pub fn guest_disk(folder: &Path) -> Result<PathBuf, ImageError> {
    let image = lean::ensure()?;
    let disk = folder.join("guest.raw");
    fs::copy(&image.disk, &disk).map_err(io_at("copy", &image.disk))?;
    Ok(disk)
}

impl HostVm {
    /// Boots a host VM; its files go to a folder.
    ///
    /// # Errors
    /// When an image cannot be made or QEMU cannot be started.
    pub fn boot(folder: &Path, plan: &HostPlan<'_>) -> Result<Self, ImageError> {
        let image = lean::ensure()?;
        let host = kernel::cloud_for_hosts()?;
        let initrd = folder.join(format!("{}.initrd", plan.name));
        write(&initrd, &initramfs(&host, &image, plan)?)?;
        let console = folder.join(format!("{}.console", plan.name));
        write(&console, b"")?;
        let [program, options @ ..] = QEMU;
        let mut command = Command::new(program);
        command
            .args(options)
            .args(["-cpu", Hypervisor::Kvm.processor(Hardware::Virtio), "-m", &HOST_MIB.to_string()])
            .arg("-kernel")
            .arg(host.image())
            .arg("-initrd")
            .arg(&initrd)
            .args(["-append", &cmdline()])
            .args(["-serial", &format!("file:{}", console.display())]);
        // Two hosts may have it open.
        let drive = format!("file={},if=none,id=disk,format=raw,cache=none,file.locking=off", plan.disk.display());
        command.args(["-drive", &drive, "-device", &format!("{},drive=disk", plan.hardware.disk())]);
        if let Some(Cable { socket, is_first }) = plan.cable {
            let server = if is_first { "on" } else { "off" };
            let end = format!("stream,id=cable,server={server},addr.type=unix,addr.path={}", socket.display());
            let [.., last] = plan.address;
            let card = format!("{},netdev=cable,mac=52:54:00:5c:01:{last:02x}", plan.hardware.card());
            command.args(["-netdev", &end, "-device", &card]);
        }
        let qemu = command
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(io_at("start", Path::new("qemu-system-x86_64")))?;
        if let Some(Cable { socket, is_first: true }) = plan.cable {
            // Who finds none does not try again.
            wait_for(Duration::from_secs(30), || socket.exists().then_some(()))
                .ok_or_else(|| ImageError::Missing(format!("QEMU makes no {}", socket.display())))?;
        }
        Ok(Self { qemu, console })
    }

    /// The whole lines that were told so far.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        // A serial line is bytes: what is no text is not ours.
        let bytes = fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| line.trim_end_matches('\r').to_owned()).collect()
    }

    /// The first line after the first `from` lines that `is_it` takes something from.
    ///
    /// # Errors
    /// The last lines, when none came in time or the host VM has ended without one.
    pub fn await_line<T>(&mut self, from: usize, budget: Duration, is_it: impl Fn(&str) -> Option<T>) -> io::Result<T> {
        let mut has_ended = false;
        let found = wait_for(budget, || {
            // Looked at before the lines are: the last ones come before the end.
            let ended = !matches!(self.qemu.try_wait(), Ok(None));
            let found = self.lines().iter().skip(from).find_map(|line| is_it(line));
            has_ended = ended && found.is_none();
            if has_ended { Some(None) } else { found.map(Some) }
        });
        found.flatten().ok_or_else(|| {
            let lines = self.lines();
            let last = lines[lines.len().saturating_sub(15)..].join("\n");
            let why = if has_ended { "the host VM has ended" } else { "no such line came" };
            io::Error::other(format!("{why}; the console ends with\n{last}"))
        })
    }
}

/// The host VM's kernel. On a busy machine it would come to distrust the translated processor's TSC, and measure it wrongly: it is
/// this machine's own, and is told what that counts.
pub(crate) fn cmdline() -> String {
    let told = tsc_khz().map_or_else(String::new, |khz| format!(" tsc_early_khz={khz} hpet=disable pmtmr=0"));
    format!("console=ttyS0 quiet loglevel=5 mitigations=off panic=-1 tsc=reliable{told}")
}

/// What this machine's TSC counts in a millisecond.
fn tsc_khz() -> Option<u64> {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: the instruction reads a counter, which every processor of this architecture has.
        let read = || (std::time::Instant::now(), unsafe { std::arch::x86_64::_rdtsc() });
        let (begin, first) = read();
        crate::command::pause(Duration::from_millis(100));
        let (end, last) = read();
        let us = u64::try_from((end - begin).as_micros()).ok()?;
        last.checked_sub(first)?.checked_mul(1000)?.checked_div(us)
    }
    #[cfg(not(target_arch = "x86_64"))]
    None
}

pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), ImageError> {
    fs::write(path, bytes).map_err(io_at("write", path))
}

/// The host VM's own initramfs.
fn initramfs(host: &kernel::Kernel, image: &LeanImage, plan: &HostPlan<'_>) -> Result<Vec<u8>, ImageError> {
    let read = |path: &Path| fs::read(path).map_err(io_at("read", path));
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "sys", "bin", "modules"] {
        archive.folder(folder);
    }
    archive.device("dev/console", 5, 1);
    archive.file("init", INIT.as_bytes());
    let [a, b, c, d] = plan.address;
    let (disk, steps) = (plan.hardware.disk_path(), plan.steps);
    archive.file("plan", format!("ADDRESS={a}.{b}.{c}.{d}\nexport DISK={disk}\nSTEPS='{steps}'\n").as_bytes());
    archive.file("bin/busybox", &read(Path::new(BUSYBOX))?);
    for (folder, place, name, which) in [
        ("../../agent/vmm", "supercloud-vmm", "supercloud-vmm", ["--bin", "supercloud-vmm"].as_slice()),
        ("../../agent/vmm", "nest", "examples/nest", &["--example", "nest"]),
        ("../guest", "supercloud-guest", "supercloud-guest", &[]),
    ] {
        archive.file(place, &read(&lean::static_program(folder, name, which)?)?);
    }
    archive.file("kernel", &read(&image.kernel)?);
    archive.file("initrd", &read(&image.initrd)?);
    let cmdline = format!("{} sc.address={GUEST_ADDRESS}/24 sc.role=server", image.cmdline);
    archive.file("spec.json", spec(&cmdline).to_string().as_bytes());
    let modules = host.modules()?;
    for name in &modules {
        archive.file(&format!("modules/{name}"), &read(&host.dir.join("modules").join(name))?);
    }
    archive.file("modules.load", (modules.join("\n") + "\n").as_bytes());
    Ok(archive.finish())
}

/// The guest.
fn spec(cmdline: &str) -> Value {
    json!({
        "class": {"back_end": "kvm", "accelerator": "kvm", "machine_version": "1", "cpu_baseline": "host"},
        "vcpus": 1,
        "memory_bytes": 128u64 << 20,
        "boot": {"from": "kernel", "has_initrd": true, "cmdline": cmdline},
        "devices": {
            "disks": [{"name": "root"}],
            "nics": [{"name": "eth0", "mac": "52:54:00:5c:00:01", "mtu": 1450}],
            "has_balloon": false,
        },
    })
}
