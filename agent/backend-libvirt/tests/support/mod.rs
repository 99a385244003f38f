//! Two hosts on one machine: a network and mount namespace with its own libvirtd each, and a disk that both can reach.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use supercloud_blanket::{
    CompatClass, Launch, MachineSpec,
    device::{Boot, Clock, Console, Disk, GuestDevices, Mac, Nic},
    host::{HostArgs, NbdSocket},
};
use supercloud_ids::{Epoch, GuestId};
use supercloud_libvirt::{Accelerator, LibvirtConfig};

pub const TAP: &str = "lvttap0";

/// Why the tests cannot run here; `None` when they can.
pub fn obstacle() -> Option<String> {
    // SAFETY: no arguments, no failure.
    if unsafe { libc::geteuid() } != 0 {
        return Some("needs root".to_owned());
    }
    ["libvirtd", "qemu-system-x86_64", "qemu-nbd", "ip", "nsenter", "unshare", "busybox", "apt-get"]
        .into_iter()
        .find(|tool| !run_quietly("sh", &["-c", &format!("command -v {tool}")]))
        .map(|tool| format!("{tool} is not installed"))
}

fn run_quietly(program: &str, args: &[&str]) -> bool {
    let status = Command::new(program).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

fn must(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Kernel and initial ramdisk, made once.
pub fn guest_image() -> PathBuf {
    let home = std::env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from);
    let folder = home.join(".cache/supercloud/test-guest");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/guest.sh");
    must("bash", &[&script.to_string_lossy(), &folder.to_string_lossy()]);
    folder
}

/// One host.
pub struct Host {
    pub name: &'static str,
    pub dir: PathBuf,
    netns: String,
    libvirtd: Option<Child>,
    nbd: Option<Child>,
    disk: PathBuf,
}

pub struct Lab {
    pub dir: PathBuf,
    pub a: Host,
    pub b: Host,
    image: PathBuf,
}

const LIBVIRTD_CONF: &str = "auth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\nunix_sock_group = \"root\"\n\
    unix_sock_rw_perms = \"0700\"\nlog_outputs = \"3:file:/var/log/libvirt/libvirtd.log\"\n";
const QEMU_CONF: &str = "user = \"root\"\ngroup = \"root\"\ndynamic_ownership = 0\nremember_owner = 0\n\
    security_driver = \"none\"\ncgroup_controllers = []\nnamespaces = []\nstdio_handler = \"file\"\n";

impl Lab {
    pub fn up() -> Self {
        let image = guest_image();
        // Short: a unix socket's path has 107 bytes.
        let dir = PathBuf::from(format!("/tmp/lvt{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let disk = dir.join("disk.raw");
        fs::File::create(&disk).unwrap().set_len(16 << 20).unwrap();
        add_names(&dir);
        let a = Host::new("a", &dir, &disk);
        let b = Host::new("b", &dir, &disk);
        let mut lab = Self { dir, a, b, image };
        for host in [&mut lab.a, &mut lab.b] {
            host.start_nbd();
            host.start_libvirtd();
        }
        lab
    }

    /// The guest as `host` would run it.
    pub fn launch(&self, host: &Host, guest: GuestId, epoch: Epoch) -> Launch {
        Launch {
            guest,
            epoch,
            spec: MachineSpec {
                class: CompatClass {
                    back_end: supercloud_libvirt::BACK_END.to_owned(),
                    accelerator: "tcg".to_owned(),
                    machine_version: "pc-i440fx-7.2".to_owned(),
                    cpu_baseline: "qemu64".to_owned(),
                },
                vcpus: 1,
                memory_bytes: 192 << 20,
                boot: Boot::Kernel { has_initrd: true, cmdline: "console=ttyS0 quiet".to_owned() },
                clock: Clock::Utc,
                devices: GuestDevices {
                    disks: vec![Disk { name: "root".to_owned(), is_read_only: false }],
                    nics: vec![Nic { name: "eth0".to_owned(), mac: Mac([0x52, 0x54, 0, 1, 2, 3]), mtu: 1450 }],
                    console: Console::Serial,
                    has_rng: true,
                    has_balloon: true,
                },
            },
            host: HostArgs {
                kernel: Some(self.image.join("vmlinuz")),
                initrd: Some(self.image.join("initrd.gz")),
                disks: [("root".to_owned(), NbdSocket { socket: host.nbd_socket(), export: "root".to_owned() })].into(),
                taps: [("eth0".to_owned(), TAP.to_owned())].into(),
                console_socket: Some(host.dir.join("console.sock")),
                console_log: Some(host.console_log()),
            },
        }
    }

    /// What is still there of the lab's guests: their processes' command lines.
    pub fn leftovers(&self) -> Vec<String> {
        let mark = self.dir.to_string_lossy().into_owned();
        processes()
            .into_iter()
            .filter(|(_, line)| line.contains("qemu-system") && line.contains(&mark))
            .map(|(pid, line)| format!("{pid}: {}", line.chars().take(120).collect::<String>()))
            .collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let mark = self.dir.to_string_lossy().into_owned();
        for host in [&mut self.a, &mut self.b] {
            host.kill_libvirtd();
            host.kill_nbd();
        }
        for (pid, line) in processes() {
            if line.contains("qemu-system") && line.contains(&mark) {
                // SAFETY: a process of this lab, by the lab's own folder in its command line.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
        }
        for host in [&self.a, &self.b] {
            run_quietly("ip", &["netns", "del", &host.netns]);
        }
        if std::thread::panicking() {
            for host in [&self.a, &self.b] {
                let log = fs::read_to_string(host.dir.join("log/libvirtd.log")).unwrap_or_default();
                let tail: Vec<&str> = log.lines().filter(|line| !line.contains("ethtool")).collect();
                println!("--- libvirtd {}\n{}", host.name, tail[tail.len().saturating_sub(15)..].join("\n"));
            }
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// `(pid, command line)` of every process.
pub fn processes() -> Vec<(i32, String)> {
    let Ok(all) = fs::read_dir("/proc") else { return Vec::new() };
    all.flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            Some((pid, String::from_utf8_lossy(&line).replace('\0', " ")))
        })
        .collect()
}

/// libvirtd's QEMU driver wants the user and group that Debian's `libvirt-daemon-system` makes; give it both without
/// changing the machine.
fn add_names(dir: &Path) {
    let add = |from: &str, to: &str, names: &[(&str, &str)]| {
        let mut text = fs::read_to_string(from).unwrap();
        for (name, line) in names {
            if !text.lines().any(|have| have.starts_with(&format!("{name}:"))) {
                text.push_str(line);
            }
        }
        fs::write(dir.join(to), text).unwrap();
    };
    let user = "libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin\n";
    add("/etc/passwd", "passwd", &[("libvirt-qemu", user)]);
    add("/etc/group", "group", &[("libvirt-qemu", "libvirt-qemu:x:64055:\n"), ("kvm", "kvm:x:64056:\n")]);
}

impl Host {
    fn new(name: &'static str, lab: &Path, disk: &Path) -> Self {
        let dir = lab.join(name);
        for folder in
            ["run", "lib", "etc/qemu", "etc/hooks", "etc/nwfilter", "etc/storage", "etc/secrets", "cache", "log"]
        {
            fs::create_dir_all(dir.join(folder)).unwrap();
        }
        let uuid = format!("host_uuid = \"00000000-0000-4000-8000-0000000000a{name}\"\n");
        fs::write(dir.join("etc/libvirtd.conf"), format!("{LIBVIRTD_CONF}{uuid}")).unwrap();
        fs::write(dir.join("etc/qemu.conf"), QEMU_CONF).unwrap();
        fs::write(dir.join("etc/libvirt.conf"), "").unwrap();
        fs::write(dir.join("hosts"), format!("127.0.0.1 localhost lvt-{name}\n")).unwrap();
        let netns = format!("lvt{}{name}", std::process::id());
        must("ip", &["netns", "add", &netns]);
        must("ip", &["-n", &netns, "link", "set", "lo", "up"]);
        must("ip", &["-n", &netns, "tuntap", "add", "mode", "tap", TAP]);
        Self { name, dir, netns, libvirtd: None, nbd: None, disk: disk.to_owned() }
    }

    pub fn config(&self) -> LibvirtConfig {
        let config = LibvirtConfig::for_socket(&self.dir.join("run/libvirt-sock"), vec![Accelerator::Tcg]);
        LibvirtConfig { log_dir: Some(self.dir.join("log/qemu")), ..config }
    }

    pub fn nbd_socket(&self) -> PathBuf {
        self.dir.join("disk.sock")
    }

    pub fn console_log(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    pub fn start_libvirtd(&mut self) {
        let dir = self.dir.to_string_lossy().into_owned();
        let lab = self.dir.parent().unwrap().to_string_lossy().into_owned();
        let name = self.name;
        let binds = [
            (format!("{dir}/run"), "/run/libvirt"),
            (format!("{dir}/lib"), "/var/lib/libvirt"),
            (format!("{dir}/etc"), "/etc/libvirt"),
            (format!("{dir}/cache"), "/var/cache/libvirt"),
            (format!("{dir}/log"), "/var/log/libvirt"),
            (format!("{dir}/hosts"), "/etc/hosts"),
            // Else every call waits for a name server that is not there.
            ("/dev/null".to_owned(), "/etc/resolv.conf"),
            (format!("{lab}/passwd"), "/etc/passwd"),
            (format!("{lab}/group"), "/etc/group"),
        ];
        let mut script = format!("set -e; hostname lvt-{name}\n");
        script.push_str("mkdir -p /run/libvirt /var/lib/libvirt /etc/libvirt /var/cache/libvirt /var/log/libvirt\n");
        for (from, to) in binds {
            script.push_str(&format!("mount --bind {from} {to}\n"));
        }
        script.push_str("exec libvirtd -p /run/libvirt/libvirtd.pid\n");
        let child = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", self.netns))
            .args(["unshare", "-m", "-u", "--propagation", "private", "bash", "-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.libvirtd = Some(child);
    }

    pub fn kill_libvirtd(&mut self) {
        if let Some(mut child) = self.libvirtd.take() {
            // nsenter, unshare and bash each exec the next: the child is the daemon.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    pub fn start_nbd(&mut self) {
        let _ = fs::remove_file(self.nbd_socket());
        let child = Command::new("qemu-nbd")
            .args(["-f", "raw", "--persistent", "--shared", "8", "--cache", "none", "-x", "root", "-k"])
            .arg(self.nbd_socket())
            .arg(&self.disk)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        self.nbd = Some(child);
        for _ in 0..100 {
            if self.nbd_socket().exists() {
                return;
            }
            pause(50);
        }
        panic!("qemu-nbd does not listen");
    }

    pub fn kill_nbd(&mut self) {
        if let Some(mut child) = self.nbd.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// What the guest said here so far.
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.console_log()).unwrap_or_default()).into_owned()
    }

    /// The number of the last whole tick that the guest said here.
    pub fn last_tick(&self) -> u64 {
        let text = self.said();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole
            .lines()
            .rev()
            .find_map(|line| line.trim().strip_prefix("@tick ")?.split(' ').next()?.parse().ok())
            .unwrap_or(0)
    }

    pub fn forget_console(&self) {
        let _ = fs::OpenOptions::new().write(true).truncate(true).open(self.console_log());
    }
}

pub fn pause(ms: u64) {
    #[expect(clippy::disallowed_methods, reason = "a test's own thread")]
    std::thread::sleep(Duration::from_millis(ms));
}
