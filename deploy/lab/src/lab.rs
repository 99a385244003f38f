//! A lab as a whole: up, down, and what can be done to it while it runs.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use thiserror::Error;

use crate::addressing::{LabIndex, MAX_INDEX, mac_text};
use crate::command::{CommandError, Run, wait_for};
use crate::leftovers::{self, Snapshot};
use crate::netns;
use crate::process;
use crate::site::{Site, SiteError, end_namespaces};
use crate::spec::{CONTROLLER, LabSpec, LinkShape, SpecError};
use crate::state::{self, LabRecord, Lock, StateDir, StateError};
use crate::wan::control::{self, Answer, ControlError, Request};
use crate::wan::fabric::{FabricSpec, LinkStatus, PairSpec, PortSpec};

mod daemons;

/// A lab that cannot be made, changed or taken down.
#[derive(Debug, Error)]
pub enum LabError {
    /// The specification makes no sense.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The state folder failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// A site failed.
    #[error(transparent)]
    Site(#[from] SiteError),
    /// The WAN emulator failed.
    #[error(transparent)]
    Wan(#[from] ControlError),
    /// The WAN emulator did not start.
    #[error("the WAN emulator did not start: {0}")]
    WanStart(String),
    /// A program failed.
    #[error("{what}")]
    Command {
        /// What was being done.
        what: &'static str,
        /// The program's failure.
        #[source]
        source: CommandError,
    },
    /// A program is missing.
    #[error("the lab needs {missing}; ./deploy/setup installs what is needed")]
    Tools {
        /// What is not there.
        missing: String,
    },
    /// Not root.
    #[error("the lab makes network namespaces and interfaces: run it as root")]
    NotRoot,
    /// The lab's own program was not found.
    #[error("the program supercloud-lab is not at {0} (cargo build -p supercloud-lab)")]
    Program(String),
}

/// Which process of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// The agent.
    Agent,
    /// The volume processes.
    Volume,
    /// libvirtd.
    Libvirtd,
    /// The switch.
    Vswitchd,
    /// The hypervisor processes.
    Qemu,
    /// The controller (of the controller's site).
    Controller,
}

impl Which {
    fn matches(self, arguments: &[String]) -> bool {
        let Some(program) = arguments.first() else { return false };
        let program = Path::new(program).file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let is_volume = program == "supercloud-volume" || arguments.get(1).is_some_and(|arg| arg == "volume");
        match self {
            Self::Agent => program == "supercloud-agent" && !is_volume,
            Self::Volume => program.starts_with("supercloud-") && is_volume,
            Self::Libvirtd => program == "libvirtd",
            Self::Vswitchd => program == "ovs-vswitchd",
            Self::Qemu => program.starts_with("qemu-system"),
            Self::Controller => program == "supercloud-controller",
        }
    }
}

/// A running lab. One that was started by [`Lab::start`] is taken down when this value is dropped, unless [`Lab::keep`] was
/// called.
#[derive(Debug)]
pub struct Lab {
    spec: LabSpec,
    index: LabIndex,
    state: StateDir,
    program: PathBuf,
    start: Option<Snapshot>,
    is_owner: bool,
}

impl Drop for Lab {
    fn drop(&mut self) {
        let is_kept = !self.is_owner || std::env::var_os("SUPERCLOUD_LAB_KEEP").is_some();
        if !is_kept && let Err(error) = down(&state::default_root(), &self.spec.name) {
            eprintln!("taking the lab {} down: {}", self.spec.name, chain(&error));
        }
    }
}

/// An error with its causes on one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// The folder of our programs: beside this one (tests run one level below it), or `SUPERCLOUD_BIN_DIR`.
#[must_use]
pub fn program_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("SUPERCLOUD_BIN_DIR") {
        return PathBuf::from(dir);
    }
    let own = std::env::current_exe().unwrap_or_default();
    let dir = own.parent().unwrap_or(Path::new("."));
    if dir.ends_with("deps") { dir.parent().unwrap_or(dir).to_owned() } else { dir.to_owned() }
}

/// Programs that every lab needs, and what a switch or a libvirtd needs more.
fn check_tools(spec: &LabSpec) -> Result<(), LabError> {
    // SAFETY: plain system call.
    if unsafe { libc::geteuid() } != 0 {
        return Err(LabError::NotRoot);
    }
    let mut tools = vec!["ip", "nsenter", "ethtool", "nft", "timeout"];
    if spec.switch {
        tools.extend(["ovs-vswitchd", "ovsdb-server", "ovsdb-tool", "ovs-vsctl"]);
    }
    if spec.libvirt && spec.hosts.iter().any(|host| host.vm.is_none()) {
        tools.push("libvirtd");
    }
    if spec.hosts.iter().any(|host| host.vm.is_some()) {
        tools.extend(["qemu-system-x86_64", "mmdebstrap", "mke2fs", "strip"]);
    }
    let path = crate::command::path_with_sbin();
    let is_there = |tool: &str| path.split(':').any(|dir| Path::new(dir).join(tool).is_file());
    let missing: Vec<&str> = tools.into_iter().filter(|tool| !is_there(tool)).collect();
    if missing.is_empty() { Ok(()) } else { Err(LabError::Tools { missing: missing.join(", ") }) }
}

impl Lab {
    /// Makes the lab: takes down what is left of one of that name, then namespaces, WAN, hosts. The controller and the
    /// agents are started by their own calls.
    ///
    /// # Errors
    /// When a part does not come up; what was made until then is taken down again.
    pub fn start(spec: LabSpec) -> Result<Self, LabError> {
        spec.check()?;
        check_tools(&spec)?;
        let program = program_dir().join("supercloud-lab");
        if !program.is_file() {
            return Err(LabError::Program(program.display().to_string()));
        }
        let state = StateDir::new(&state::default_root(), &spec.name);
        let lock = state.lock()?;
        take_down(&state, &lock)?;
        let index = state.create(&spec)?;
        let mut lab = Self { spec, index, state, program, start: None, is_owner: true };
        let made = lab.make();
        drop(lock);
        made?;
        lab.start = Some(Snapshot::settled(&lab));
        Ok(lab)
    }

    fn make(&mut self) -> Result<(), LabError> {
        let network = |source| LabError::Command { what: "making the WAN's namespace", source };
        netns::add(&self.index.wan_namespace()).map_err(network)?;
        let sites: Vec<Site> = self.sites().collect();
        for site in &sites {
            site.cable()?;
        }
        self.start_wan(&sites)?;
        self.make_way_in().map_err(|source| LabError::Command { what: "making the way in", source })?;
        let hosts_file = self.hosts_file();
        std::thread::scope(|scope| {
            let boots: Vec<_> =
                sites.iter().map(|site| scope.spawn(|| site.boot(&self.program, &hosts_file))).collect();
            boots.into_iter().try_for_each(|boot| boot.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })?;
        Ok(())
    }

    fn start_wan(&self, sites: &[Site]) -> Result<(), LabError> {
        let failed = |error: io::Error| LabError::WanStart(error.to_string());
        let names: Vec<String> = self.spec.sites().map(String::from).collect();
        let at = |name: &str| names.iter().position(|site| site == name).unwrap_or(usize::MAX);
        let ports = sites.iter().flat_map(|site| {
            site.segments().iter().map(|segment| PortSpec {
                interface: segment.wan_interface(site.number),
                site: at(&site.name),
                segment: *segment,
            })
        });
        let links = self.spec.links.iter().map(|link| PairSpec { a: at(&link.a), b: at(&link.b), shape: link.shape });
        let fabric =
            FabricSpec { ports: ports.collect(), links: links.collect(), sites: names.clone(), seed: self.spec.seed };
        let config = self.state.join("wan.json");
        fs::write(&config, serde_json::to_vec_pretty(&fabric).map_err(|error| failed(error.into()))?)
            .map_err(failed)?;
        let log_path = self.state.join("logs/wan.log");
        let log = fs::File::create(&log_path).map_err(failed)?;
        let mut command = Command::new(&self.program);
        command.arg("wan").arg("--config").arg(&config).arg("--control").arg(self.state.wan_socket());
        command.arg("--namespace").arg(self.index.wan_namespace());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        // Its own session: it outlives the command that made the lab.
        // SAFETY: setsid is async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                Ok(())
            });
        }
        let mut child = command.spawn().map_err(failed)?;
        let answered = wait_for(Duration::from_secs(20), || {
            if matches!(child.try_wait(), Ok(Some(_))) {
                return Some(false);
            }
            self.wan(&Request::Status).is_ok().then_some(true)
        });
        // When this process is the longer-lived one, the ended relay must not stay a zombie that looks alive.
        std::thread::spawn(move || child.wait());
        match answered {
            Some(true) => Ok(()),
            _ => Err(LabError::WanStart(fs::read_to_string(&log_path).unwrap_or_default())),
        }
    }

    /// A cable from the machine's own namespace to the controller, and nothing else.
    fn make_way_in(&self) -> Result<(), CommandError> {
        let (near, inside) = (self.index.root_interface(), self.index.controller_namespace());
        let (root, controller) = (self.index.root_address(), self.index.controller_address());
        Run::line(&format!("ip link add {near} type veth peer name way-in netns {inside}")).ok()?;
        Run::line(&format!("ip addr add {root}/32 dev {near}")).ok()?;
        Run::line(&format!("ip link set {near} up")).ok()?;
        Run::line(&format!("ip route add {controller}/32 dev {near} src {root}")).ok()
    }

    fn hosts_file(&self) -> String {
        let mut text = "127.0.0.1 localhost\n".to_owned();
        for site in self.sites() {
            text.push_str(&format!("{} {}\n", site.address(), site.name));
        }
        text
    }

    /// A handle on a lab that is up; dropping it takes nothing down.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn attach(name: &str) -> Result<Self, LabError> {
        let state = StateDir::new(&state::default_root(), name);
        let no_lab = || StateError::NoLab(name.to_owned());
        let LabRecord { index, spec } = state.record()?.ok_or_else(no_lab)?;
        let index = LabIndex::new(index).ok_or_else(no_lab)?;
        Ok(Self { spec, index, state, program: program_dir().join("supercloud-lab"), start: None, is_owner: false })
    }

    /// Leaves the lab up when this value is dropped.
    pub fn keep(&mut self) {
        self.is_owner = false;
    }

    /// Takes the lab down now and says what failed.
    ///
    /// # Errors
    /// When something of it could not be removed.
    pub fn stop(mut self) -> Result<(), LabError> {
        self.is_owner = false;
        down(&state::default_root(), &self.spec.name)
    }

    /// What the lab was made from.
    #[must_use]
    pub fn spec(&self) -> &LabSpec {
        &self.spec
    }

    /// Its number, from which addresses follow.
    #[must_use]
    pub fn index(&self) -> LabIndex {
        self.index
    }

    /// A file or folder in the lab's state folder.
    #[must_use]
    pub fn path(&self, part: &str) -> PathBuf {
        self.state.join(part)
    }

    /// A host, or the controller's site by the name [`CONTROLLER`].
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn host(&self, name: &str) -> Result<Site, LabError> {
        Site::new(&self.spec, self.index, &self.state, name)
            .ok_or_else(|| SpecError::UnknownSite(name.to_owned()).into())
    }

    /// The hosts and the controller's site.
    pub fn sites(&self) -> impl Iterator<Item = Site> {
        self.spec.sites().filter_map(|name| Site::new(&self.spec, self.index, &self.state, name))
    }

    fn wan(&self, request: &Request) -> Result<Answer, LabError> {
        Ok(control::ask(&self.state.wan_socket(), request)?)
    }

    /// Cuts the link of two sites; what is under way is lost.
    ///
    /// # Errors
    /// When a site is not there or the WAN does not answer.
    pub fn partition(&self, a: &str, b: &str) -> Result<(), LabError> {
        self.wan(&Request::Cut { a: a.to_owned(), b: b.to_owned() }).map(drop)
    }

    /// Heals the link of two sites.
    ///
    /// # Errors
    /// As [`Lab::partition`].
    pub fn heal(&self, a: &str, b: &str) -> Result<(), LabError> {
        self.wan(&Request::Heal { a: a.to_owned(), b: b.to_owned() }).map(drop)
    }

    /// Heals all links.
    ///
    /// # Errors
    /// When the WAN does not answer.
    pub fn heal_all(&self) -> Result<(), LabError> {
        self.wan(&Request::HealAll).map(drop)
    }

    /// Gives the link of two sites a new shape.
    ///
    /// # Errors
    /// As [`Lab::partition`], or when a number is out of range.
    pub fn set_link(&self, a: &str, b: &str, shape: LinkShape) -> Result<(), LabError> {
        self.change_link(&Request::Link {
            a: a.to_owned(),
            b: b.to_owned(),
            rtt_ms: Some(shape.rtt_ms),
            rate_mbit: Some(shape.rate_mbit),
            loss_ppm: Some(shape.loss_ppm),
            queue_bytes: Some(shape.queue_bytes),
        })
    }

    /// Changes only what the request gives of a link.
    ///
    /// # Errors
    /// As [`Lab::set_link`].
    pub fn change_link(&self, request: &Request) -> Result<(), LabError> {
        self.wan(request).map(drop)
    }

    /// All links with their counters, and whether the emulator has real-time priority.
    ///
    /// # Errors
    /// When the WAN does not answer.
    pub fn links(&self) -> Result<(Vec<LinkStatus>, bool), LabError> {
        match self.wan(&Request::Status)? {
            Answer::Status { links, realtime, .. } => Ok((links, realtime)),
            other => Err(ControlError::Answer(format!("{other:?}")).into()),
        }
    }

    /// A host loses power: it falls silent and everything in it ends in the same instant. Its disk stays.
    ///
    /// # Errors
    /// When there is no such host or a process does not end.
    pub fn kill_host(&self, name: &str) -> Result<(), LabError> {
        let site = self.host(name)?;
        self.wan(&Request::Site { site: name.to_owned(), up: false })?;
        Ok(site.cut_power()?)
    }

    /// Boots a host that lost power; the agent is started by [`Lab::spawn`].
    ///
    /// # Errors
    /// When a part does not come up.
    pub fn boot_host(&self, name: &str) -> Result<(), LabError> {
        let site = self.host(name)?;
        if site.init().is_some() {
            return Err(
                SiteError::Daemon { site: name.to_owned(), name: "init", said: "it is up already".into() }.into()
            );
        }
        self.wan(&Request::Site { site: name.to_owned(), up: true })?;
        Ok(site.boot(&self.program, &self.hosts_file())?)
    }

    /// Sends a signal to processes of a host; how many there were.
    ///
    /// # Errors
    /// When there is no such host.
    pub fn kill_process(&self, host: &str, which: Which, signal: i32) -> Result<usize, LabError> {
        let site = self.host(host)?;
        let hit = site.processes().into_iter().filter(|process| which.matches(&process.arguments()));
        Ok(hit.filter(|process| process.signal(signal).unwrap_or(false)).count())
    }

    /// Restarts the switch's daemon of a host after it was killed.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn restart_vswitchd(&self, host: &str) -> Result<(), LabError> {
        let site = self.host(host)?;
        self.end_daemon(&site, "ovs-vswitchd")?;
        Ok(site.start_vswitchd()?)
    }

    /// Restarts libvirtd of a host after it was killed.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn restart_libvirtd(&self, host: &str) -> Result<(), LabError> {
        let site = self.host(host)?;
        self.end_daemon(&site, "libvirtd")?;
        Ok(site.start_libvirtd()?)
    }

    /// Runs a command inside a host to its end, as root of that machine, and gives what it printed.
    ///
    /// # Errors
    /// When the host is down, or the command fails or runs past `budget`.
    pub fn exec(&self, host: &str, argv: &[&str], budget: Duration) -> Result<String, LabError> {
        let run = self.host(host)?.run(argv, budget)?;
        run.text().map_err(|source| LabError::Command { what: "a command inside a lab host failed", source })
    }

    /// What there is now: processes, namespaces, interfaces, flows, sockets.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot::take(self)
    }

    /// What is there now and was not when the lab had started (or is missing), one line each. What ends by itself within some
    /// seconds is not left.
    #[must_use]
    pub fn leftovers(&self) -> Vec<String> {
        self.start.as_ref().map(|start| self.leftovers_since(start)).unwrap_or_default()
    }

    /// What is there now and was not in `before` (or is missing), one line each.
    #[must_use]
    pub fn leftovers_since(&self, before: &Snapshot) -> Vec<String> {
        let mut left = Vec::new();
        let clean = wait_for(leftovers::SETTLE_BUDGET, || {
            left = before.differences(&self.snapshot());
            left.is_empty().then(Vec::new)
        });
        clean.unwrap_or(left)
    }

    /// The addresses of all sites, for people.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = String::new();
        for site in self.sites() {
            let what =
                if site.name == CONTROLLER { String::new() } else { format!("  tunnels {}", site.overlay_address()) };
            let mac = mac_text(self.index.mac(site.number, crate::addressing::Segment::Agents));
            let is_up = if site.init().is_some() { "up" } else { "DOWN" };
            text.push_str(&format!("{:<24} {:<5} {:<14} {mac}{what}\n", site.name, is_up, site.address().to_string()));
        }
        text
    }
}

/// Takes the lab `name` down, from its state folder alone, after any crash. One that is not there is fine.
///
/// # Errors
/// When something of it could not be removed; it can be tried again.
pub fn down(root: &Path, name: &str) -> Result<(), LabError> {
    crate::spec::check_name("the lab", name, 24)?;
    let state = StateDir::new(root, name);
    let lock = state.lock()?;
    take_down(&state, &lock)?;
    lock.remove();
    Ok(())
}

/// Takes all labs of the machine down, also those whose state folder was lost.
///
/// # Errors
/// When something could not be removed; it can be tried again.
pub fn down_all(root: &Path) -> Result<(), LabError> {
    for name in state::labs(root) {
        down(root, &name)?;
    }
    for index in (1..=MAX_INDEX).filter_map(LabIndex::new) {
        while sweep(index)? {}
    }
    Ok(state::remove_mount_points(&crate::site::OWN_MOUNT_POINTS)?)
}

fn take_down(state: &StateDir, _held: &Lock) -> Result<(), LabError> {
    if let Some(index) = state.record()?.and_then(|record| LabIndex::new(record.index)) {
        // Until a pass finds nothing any more.
        if wait_for(Duration::from_secs(30), || matches!(sweep(index), Ok(false)).then_some(())).is_none() {
            // Tells what does not go away.
            sweep(index)?;
        }
    }
    state.remove()?;
    // Also puts a machine-wide setting right that a crash has left changed.
    Ok(state::remove_mount_points(&crate::site::OWN_MOUNT_POINTS)?)
}

/// Removes what there is of a lab once; whether there was anything.
fn sweep(index: LabIndex) -> Result<bool, LabError> {
    let prefix = index.namespace_prefix();
    // A killed `up` may leave a command behind that is just making the next namespace or cable.
    let makers = process::all().into_iter().filter(|process| {
        let ours = ["ip", "nsenter", "supercloud-lab"].contains(&process.program().as_str());
        ours && process.is_running() && process.arguments().iter().any(|arg| arg.starts_with(&prefix))
    });
    // The kernel's answer does not matter: the next pass looks again.
    let found_makers = makers.filter(|process| process.signal(libc::SIGKILL).unwrap_or(true)).count();
    let names = netns::list(&prefix);
    end_namespaces(&names, "the lab")?;
    let gone = |source| LabError::Command { what: "removing the lab's network", source };
    let way_in = index.root_interface();
    let has_way_in = Path::new("/sys/class/net").join(&way_in).exists();
    if has_way_in {
        Run::line(&format!("ip link del {way_in}")).ok().map_err(gone)?;
    }
    for name in &names {
        netns::delete(name).map_err(gone)?;
    }
    Ok(found_makers > 0 || has_way_in || !names.is_empty())
}
