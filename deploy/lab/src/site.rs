//! One site of the lab: its namespace, interfaces, folders, and (on hosts) its switch and libvirtd.
//!
//! Inside, a site looks like a machine of its own: `/run`, `/etc/libvirt`, `/var/lib/supercloud` and the like are the
//! site's (folders below the lab's state folder), `/proc` shows its processes, `/sys` its interfaces. What survives a power cut
//! of the host is what a disk would hold; `/run` starts empty.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

use crate::addressing::{LabIndex, Segment, mac_text};
use crate::command::{CommandError, Run, wait_for};
use crate::host_init::{self, HostError, HostSetup, ProcessSpec, ProcessStatus};
use crate::host_vm::{Hardware, Hypervisor};
use crate::image::ImageError;
use crate::netns;
use crate::process::{self, ProcessId};
use crate::spec::{CONTROLLER, Datapath, LabSpec};
use crate::state::{self, StateDir, StateError};

mod vm;

/// A site that cannot be set up.
#[derive(Debug, Error)]
pub enum SiteError {
    /// A program failed.
    #[error("{site}: {what}")]
    Command {
        /// The site.
        site: String,
        /// What was being done.
        what: &'static str,
        /// The program's failure.
        #[source]
        source: CommandError,
    },
    /// The site's init failed.
    #[error("{site}: {what}")]
    Host {
        /// The site.
        site: String,
        /// What was being done.
        what: &'static str,
        /// The init's failure.
        #[source]
        source: HostError,
    },
    /// A folder or file failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// The disk or kernel of a host that is a VM cannot be had.
    #[error("{site}: making its VM")]
    Image {
        /// The site.
        site: String,
        /// Why.
        #[source]
        source: Box<ImageError>,
    },
    /// A daemon did not come up.
    #[error("{site}: {name} did not come up: {said}")]
    Daemon {
        /// The site.
        site: String,
        /// The daemon.
        name: &'static str,
        /// The end of its log.
        said: String,
    },
}

/// Folders laid over the machine's own inside a site: (below the site's folder, where).
const FOLDERS: [(&str, &str); 11] = [
    ("run", "/run"),
    ("etc-libvirt", "/etc/libvirt"),
    ("lib-libvirt", "/var/lib/libvirt"),
    ("cache-libvirt", "/var/cache/libvirt"),
    ("log-libvirt", "/var/log/libvirt"),
    ("etc-openvswitch", "/etc/openvswitch"),
    ("lib-openvswitch", "/var/lib/openvswitch"),
    ("log-openvswitch", "/var/log/openvswitch"),
    ("etc-supercloud", "/etc/supercloud"),
    ("lib-supercloud", "/var/lib/supercloud"),
    ("log-supercloud", "/var/log/supercloud"),
];

/// Those of the places above that only our own programs use, so that no package owns them.
pub const OWN_MOUNT_POINTS: [&str; 4] = ["/etc/supercloud", "/var/lib/supercloud", "/var/log/supercloud", STORE_DIR];

/// The chunk store of a host's cloud, inside the host: one folder for all hosts of the cloud.
pub const STORE_DIR: &str = "/var/lib/supercloud-store";

/// Folders that `/run` has from the start.
const RUN_FOLDERS: [&str; 4] = ["libvirt", "openvswitch", "supercloud", "lock"];

/// The switch's database, inside the site.
const SWITCH_DB: &str = "/etc/openvswitch/conf.db";

/// How long a daemon may take to come up on a loaded machine.
const DAEMON_BUDGET: Duration = Duration::from_secs(60);

/// One site of a lab.
#[derive(Debug, Clone)]
pub struct Site {
    /// Its name.
    pub name: String,
    /// Its number in addresses.
    pub number: u8,
    /// The lab's number.
    pub index: LabIndex,
    /// Its network namespace.
    pub namespace: String,
    /// Its folder outside.
    pub dir: PathBuf,
    /// The folder of its cloud's chunk store, outside.
    store: Option<PathBuf>,
    datapath: Datapath,
    has_switch: bool,
    has_libvirt: bool,
    vm: Option<Hardware>,
    hypervisor: Hypervisor,
}

impl Site {
    /// The site of this name in a lab.
    #[must_use]
    pub fn new(spec: &LabSpec, index: LabIndex, state: &StateDir, name: &str) -> Option<Self> {
        let is_host = name != CONTROLLER;
        let host = spec.hosts.iter().find(|host| host.name == name);
        let vm = host.and_then(|host| host.vm);
        Some(Self {
            name: name.to_owned(),
            number: spec.site_number(name).ok()?,
            index,
            namespace: index.site_namespace(name),
            dir: state.site(name),
            store: spec
                .hosts
                .iter()
                .find(|host| host.name == name)
                .map(|host| state.join(&format!("clouds/{}/store", host.cloud))),
            datapath: spec.datapath,
            has_switch: is_host && spec.switch,
            has_libvirt: is_host && spec.libvirt && vm.is_none(),
            vm,
            hypervisor: host.map_or(Hypervisor::Kvm, |host| host.hypervisor),
        })
    }

    /// Its address for agents and controller.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.index.agent_address(self.number)
    }

    /// Where its tunnels end.
    #[must_use]
    pub fn overlay_address(&self) -> Ipv4Addr {
        self.index.overlay_address(self.number)
    }

    /// What runs the guests of a host that is a VM.
    #[must_use]
    pub fn hypervisor(&self) -> Hypervisor {
        self.hypervisor
    }

    /// The segments that the site is attached to.
    #[must_use]
    pub fn segments(&self) -> &'static [Segment] {
        if self.has_switch { &[Segment::Agents, Segment::Overlay] } else { &[Segment::Agents] }
    }

    fn command(&self, what: &'static str) -> impl Fn(CommandError) -> SiteError {
        let site = self.name.clone();
        move |source| SiteError::Command { site: site.clone(), what, source }
    }

    fn host(&self, what: &'static str) -> impl Fn(HostError) -> SiteError {
        let site = self.name.clone();
        move |source| SiteError::Host { site: site.clone(), what, source }
    }

    fn init_socket(&self) -> PathBuf {
        self.dir.join("init.sock")
    }

    /// A path inside the site as it is reachable from outside (the folders that are laid over the machine's own).
    #[must_use]
    pub fn outside(&self, inside: &str) -> Option<PathBuf> {
        FOLDERS.iter().find_map(|(own, place)| {
            let rest = inside.strip_prefix(place)?;
            (rest.is_empty() || rest.starts_with('/')).then(|| self.dir.join(own).join(rest.trim_start_matches('/')))
        })
    }

    /// Makes the namespace and the cables to the WAN's namespace (which exists).
    ///
    /// # Errors
    /// When `ip` or `ethtool` fails.
    pub fn cable(&self) -> Result<(), SiteError> {
        let failed = self.command("making its network");
        netns::add(&self.namespace).map_err(&failed)?;
        let wan = self.index.wan_namespace();
        for segment in self.segments() {
            let (near, far) = (segment.host_interface(), segment.wan_interface(self.number));
            // A VM's card has this address: its cable has another.
            let mac = self.index.mac(self.number, *segment);
            let address = if self.vm.is_some() { String::new() } else { format!("address {} ", mac_text(mac)) };
            let pair = format!("link add {near} {address}type veth peer name {far} netns {wan}");
            netns::ip(&self.namespace, &pair).map_err(&failed)?;
            netns::ip(&wan, &format!("link set {far} up")).map_err(&failed)?;
            for (namespace, interface) in [(&self.namespace, near), (&wan, far.as_str())] {
                // The relay must see frames as they would be on a wire, with checksums and no larger than the MTU.
                netns::run_in(namespace, "ethtool")
                    .args(["-K", interface])
                    .args(["tx", "off", "rx", "off", "sg", "off", "tso", "off", "gso", "off", "gro", "off"])
                    .text()
                    .map_err(&failed)?;
            }
        }
        Ok(())
    }

    /// Boots the site: addresses, init, and on hosts the switch and libvirtd. What an earlier life left (a power cut) is put
    /// right first.
    ///
    /// # Errors
    /// When a part does not come up.
    pub fn boot(&self, program: &Path, hosts_file: &str) -> Result<(), SiteError> {
        self.prepare_folders(hosts_file)?;
        self.configure_network()?;
        self.start_init(program)?;
        if let Some(hardware) = self.vm {
            return self.start_vm(hardware);
        }
        if self.has_switch {
            self.start_switch()?;
        }
        if self.has_libvirt {
            self.start_libvirtd()?;
        }
        Ok(())
    }

    fn prepare_folders(&self, hosts_file: &str) -> Result<(), SiteError> {
        // What lived in memory is gone after a power cut.
        let run = self.dir.join("run");
        if let Err(source) = fs::remove_dir_all(&run)
            && source.kind() != std::io::ErrorKind::NotFound
        {
            return Err(StateError::Io { what: "empty", path: run.display().to_string(), source }.into());
        }
        for (own, place) in FOLDERS {
            // Open to every user inside, as on any machine; outside, the lab's folder is closed.
            state::make_dir_for_all(&self.dir.join(own))?;
            state::make_dir_for_all(Path::new(place))?;
        }
        if let Some(store) = &self.store {
            state::make_dir(store)?;
            state::make_dir_for_all(Path::new(STORE_DIR))?;
        }
        for folder in RUN_FOLDERS {
            state::make_dir_for_all(&run.join(folder))?;
        }
        state::write_public(&self.dir.join("hosts"), hosts_file)?;
        for (own, place, more) in crate::libvirt_conf::ACCOUNTS {
            let text = fs::read_to_string(place).unwrap_or_default();
            let mut text = crate::libvirt_conf::with_accounts(text, more);
            // The superuser's own group is nobody else's.
            let kvm = fs::metadata("/dev/kvm").map(|device| device.gid()).unwrap_or(0);
            if own == "group" && kvm != 0 {
                text = crate::libvirt_conf::with_member(&text, "kvm", kvm, "libvirt-qemu");
            }
            state::write_public(&self.dir.join(own), &text)?;
        }
        if self.has_libvirt {
            for (path, text) in crate::libvirt_conf::files(self.index, self.number) {
                let path = self.dir.join("etc-libvirt").join(path);
                if let Some(parent) = path.parent() {
                    state::make_dir(parent)?;
                }
                state::write_private(&path, &text)?;
            }
        }
        Ok(())
    }

    fn configure_network(&self) -> Result<(), SiteError> {
        let failed = self.command("setting up its network");
        for link in self.links().map_err(&failed)? {
            // Taps and bridges of an earlier life; a real machine would have lost them with its power.
            if !["lo", "eth0", "ul0", "way-in"].contains(&link.as_str()) {
                netns::ip(&self.namespace, &format!("link del {link}")).map_err(&failed)?;
            }
        }
        if self.vm.is_some() {
            return self.bridge_vm();
        }
        netns::ip(&self.namespace, "addr flush dev eth0").map_err(&failed)?;
        netns::ip(&self.namespace, &format!("addr add {}/24 dev eth0", self.address())).map_err(&failed)?;
        netns::ip(&self.namespace, "link set eth0 up").map_err(&failed)?;
        if self.name == CONTROLLER {
            let back = format!("route replace {}/32 dev way-in src {}", self.index.root_address(), self.address());
            netns::ip(&self.namespace, "link set way-in up").map_err(&failed)?;
            netns::ip(&self.namespace, &back).map_err(&failed)?;
        }
        if self.has_switch {
            netns::ip(&self.namespace, "link set ul0 up").map_err(&failed)?;
            // The switch reads ul0 by a packet socket, which comes before this hook; the kernel's own stack must not
            // answer ARP or anything else there.
            let rules = "add table netdev lab; delete table netdev lab; add table netdev lab; \
                         add chain netdev lab underlay { type filter hook ingress device \"ul0\" priority 0; policy drop; }";
            netns::run_in(&self.namespace, "nft").arg(rules).ok().map_err(&failed)?;
        }
        Ok(())
    }

    /// The names of the interfaces in the site.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn links(&self) -> Result<Vec<String>, CommandError> {
        let text = netns::ip(&self.namespace, "-o link show")?;
        let name = |line: &str| Some(line.split(": ").nth(1)?.split('@').next()?.to_owned());
        Ok(text.lines().filter_map(name).collect())
    }

    fn start_init(&self, program: &Path) -> Result<(), SiteError> {
        let mut binds: Vec<(PathBuf, PathBuf)> =
            FOLDERS.iter().map(|(own, place)| (self.dir.join(own), PathBuf::from(place))).collect();
        binds.extend(self.store.iter().map(|store| (store.clone(), PathBuf::from(STORE_DIR))));
        binds.push((self.dir.join("hosts"), PathBuf::from("/etc/hosts")));
        let accounts = crate::libvirt_conf::ACCOUNTS;
        binds.extend(accounts.iter().map(|(own, place, _)| (self.dir.join(own), PathBuf::from(place))));
        // No name server is reachable: without this every look-up of a name stalls for seconds.
        binds.push((PathBuf::from("/dev/null"), PathBuf::from("/etc/resolv.conf")));
        let setup = HostSetup {
            hostname: self.name.clone(),
            namespace: self.namespace.clone(),
            socket: self.init_socket(),
            binds,
        };
        host_init::start(program, &setup, &self.dir.join("init.json"), &self.dir.join("init.log"))
            .map_err(self.host("starting its init"))?;
        Ok(())
    }

    /// Starts a daemon in the site; gives its pid inside. One of each name runs at a time.
    ///
    /// # Errors
    /// When one runs already or it cannot be started.
    pub fn spawn(&self, process: ProcessSpec) -> Result<i32, SiteError> {
        let (socket, process) = match self.vm {
            Some(_) => (self.channel(), Self::in_vm(process)),
            None => (self.init_socket(), process),
        };
        host_init::spawn(&socket, process).map_err(self.host("starting a daemon"))
    }

    /// The daemons that were started in the site, also those that have ended.
    ///
    /// # Errors
    /// When the site is down.
    pub fn daemons(&self) -> Result<BTreeMap<String, ProcessStatus>, SiteError> {
        let socket = if self.vm.is_some() { self.channel() } else { self.init_socket() };
        host_init::status(&socket).map_err(self.host("asking for its daemons"))
    }

    /// All processes of the site but its init, also those that its daemons have started.
    #[must_use]
    pub fn processes(&self) -> Vec<ProcessId> {
        let inodes = netns::inodes(std::slice::from_ref(&self.namespace));
        let mut found = process::in_network_namespaces(&inodes);
        found.retain(|process| process.inner_pid() != Some(1));
        found
    }

    /// The site's init, when it is up.
    #[must_use]
    pub fn init(&self) -> Option<ProcessId> {
        let inodes = netns::inodes(std::slice::from_ref(&self.namespace));
        process::in_network_namespaces(&inodes)
            .into_iter()
            .find(|process| process.inner_pid() == Some(1) && process.arguments().iter().any(|arg| arg == "host-init"))
    }

    /// A command inside the site, as root of that machine; killed there when it runs past `budget`.
    ///
    /// # Errors
    /// When the site is down.
    pub fn run(&self, argv: &[&str], budget: Duration) -> Result<Run, SiteError> {
        let gone = || SiteError::Daemon { site: self.name.clone(), name: "its init", said: "it is not running".into() };
        let init = self.init().ok_or_else(gone)?;
        if self.vm.is_some() {
            return Ok(self.run_in_vm(argv, budget));
        }
        // `timeout` runs inside too, so that the command itself ends, not only our way to it.
        Ok(Run::new("nsenter")
            .args(["-t", &init.pid.to_string(), "-m", "-u", "-i", "-n", "-p", "--"])
            .args(["timeout", "-k", "2", &budget.as_secs().max(1).to_string()])
            .args(argv)
            .budget(budget + Duration::from_secs(5)))
    }

    fn inside(&self, what: &'static str, line: &str) -> Result<String, SiteError> {
        let words: Vec<&str> = line.split_whitespace().collect();
        self.run(&words, Duration::from_secs(30))?.text().map_err(self.command(what))
    }

    fn log_tail(&self, file: &str) -> String {
        let text = fs::read_to_string(self.dir.join(file)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }

    fn daemon(&self, name: &str, log: &str, argv: &[&str]) -> ProcessSpec {
        ProcessSpec {
            name: name.to_owned(),
            argv: argv.iter().map(|arg| (*arg).to_owned()).collect(),
            env: vec![("LC_ALL".into(), "C.UTF-8".into())],
            log: self.dir.join(log),
        }
    }

    /// Starts the switch's database and the switch itself, and its bridge to the underlay with the tunnel address.
    ///
    /// # Errors
    /// When they do not come up.
    pub fn start_switch(&self) -> Result<(), SiteError> {
        let what = "starting its switch";
        if self.outside(SWITCH_DB).is_some_and(|path| !path.exists()) {
            self.inside(what, &format!("ovsdb-tool create {SWITCH_DB} /usr/share/openvswitch/vswitch.ovsschema"))?;
        }
        if !self.is_daemon_running("ovsdb-server") {
            let argv = [
                "ovsdb-server",
                SWITCH_DB,
                "--remote=punix:/run/openvswitch/db.sock",
                "--pidfile",
                "--log-file",
                "--no-chdir",
                "-vconsole:off",
            ];
            self.spawn(self.daemon("ovsdb-server", "log-openvswitch/ovsdb-server.out", &argv))?;
            self.await_daemon("ovsdb-server", "log-openvswitch/ovsdb-server.log", || {
                self.inside(what, "ovs-vsctl --timeout=5 --no-wait init").is_ok()
            })?;
        }
        self.start_vswitchd()
    }

    /// Starts ovs-vswitchd (again) and gives the underlay's bridge its address (again: it is lost with the process).
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_vswitchd(&self) -> Result<(), SiteError> {
        let what = "starting its switch";
        let kind = match self.datapath {
            Datapath::Userspace => "netdev",
            Datapath::Kernel => "system",
        };
        state::with_large_receive_buffers(|| {
            let argv = [
                "ovs-vswitchd",
                "unix:/run/openvswitch/db.sock",
                "--pidfile",
                "--log-file",
                "--no-chdir",
                "-vconsole:off",
            ];
            self.spawn(self.daemon("ovs-vswitchd", "log-openvswitch/ovs-vswitchd.out", &argv))?;
            // Always the same: neighbours remember it over a restart.
            let mac = mac_text(self.index.mac(self.number, Segment::Overlay));
            let bridge = format!(
                "ovs-vsctl --timeout=20 --may-exist add-br br-phy -- set bridge br-phy datapath_type={kind} \
                 fail_mode=standalone other_config:hwaddr=\"{mac}\" -- --may-exist add-port br-phy ul0"
            );
            self.inside(what, &bridge)?;
            let has_bridge = || self.links().is_ok_and(|links| links.iter().any(|link| link == "br-phy"));
            self.await_daemon("ovs-vswitchd", "log-openvswitch/ovs-vswitchd.log", has_bridge)
        })?;
        let failed = self.command(what);
        netns::ip(&self.namespace, &format!("addr replace {}/24 dev br-phy", self.overlay_address()))
            .map_err(&failed)?;
        netns::ip(&self.namespace, "link set br-phy up").map_err(&failed)?;
        Ok(())
    }

    /// Starts libvirtd and waits until it answers.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_libvirtd(&self) -> Result<(), SiteError> {
        // Without --listen there is no TCP listener, whatever the configuration says.
        let argv = ["libvirtd", "-p", "/run/libvirt/libvirtd.pid"];
        self.spawn(self.daemon("libvirtd", "log-libvirt/libvirtd.out", &argv))?;
        self.await_daemon("libvirtd", "log-libvirt/libvirtd.log", || {
            self.outside("/run/libvirt/libvirt-sock").is_some_and(|socket| {
                // The socket file is made by us or systemd elsewhere; only a connection proves a listener.
                std::os::unix::net::UnixStream::connect(socket).is_ok()
            })
        })
    }

    fn is_daemon_running(&self, name: &str) -> bool {
        self.daemons().is_ok_and(|all| all.get(name).is_some_and(|status| status.ended.is_none()))
    }

    fn await_daemon(&self, name: &'static str, log: &str, mut is_up: impl FnMut() -> bool) -> Result<(), SiteError> {
        let outcome = wait_for(DAEMON_BUDGET, || {
            if is_up() {
                return Some(true);
            }
            (!self.is_daemon_running(name)).then_some(false)
        });
        if outcome == Some(true) {
            return Ok(());
        }
        let ended = self.daemons().ok().and_then(|mut all| all.remove(name)?.ended).unwrap_or_else(|| "running".into());
        let said = format!("{ended}\n{}", self.log_tail(log));
        Err(SiteError::Daemon { site: self.name.clone(), name, said })
    }

    /// Ends every process of the site at once and takes its interfaces down: a power cut. The caller has taken the site
    /// off the WAN before, so that no last word of a dying process leaves it.
    ///
    /// # Errors
    /// When a process cannot be killed.
    pub fn cut_power(&self) -> Result<(), SiteError> {
        end_namespaces(std::slice::from_ref(&self.namespace), &self.name)?;
        let failed = self.command("cutting its power");
        let way_in = (self.name == CONTROLLER).then_some("way-in");
        for interface in self.segments().iter().map(|segment| segment.host_interface()).chain(way_in) {
            netns::ip(&self.namespace, &format!("link set {interface} down")).map_err(&failed)?;
        }
        Ok(())
    }
}

/// Kills every process in these namespaces and waits until none is left.
///
/// # Errors
/// When some do not end.
pub fn end_namespaces(names: &[String], site: &str) -> Result<(), SiteError> {
    let inodes = netns::inodes(names);
    let ended = wait_for(Duration::from_secs(20), || {
        let mut left = process::in_network_namespaces(&inodes);
        // Pid 1 of a host first: the kernel ends the rest of it in the same step.
        left.sort_by_key(|process| process.inner_pid() != Some(1));
        for process in &left {
            // One that has ended by itself is as good.
            let _ = process.signal(libc::SIGKILL);
        }
        left.is_empty().then_some(())
    });
    ended.ok_or_else(|| {
        let left: Vec<String> = process::in_network_namespaces(&inodes)
            .into_iter()
            .map(|process| format!("{} {}", process.pid, process.command_line()))
            .collect();
        SiteError::Daemon { site: site.to_owned(), name: "a process that does not end", said: left.join("; ") }
    })
}
