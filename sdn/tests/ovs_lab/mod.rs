//! Hosts as network namespaces, each with an Open vSwitch of its own (userspace datapath), and guests as namespaces
//! behind veth pairs. Everything has the process id in its name and goes when the lab is dropped; what a killed run
//! left is removed by the next.

use std::{
    fs,
    future::Future,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::Arc,
    time::Duration,
};

use supercloud_ids::HostId;
use supercloud_sdn::switch::{SwitchConfig, SwitchDriver};

const PREFIX: &str = "sdt-";

pub fn run(command: &str) -> Output {
    Command::new("sh").args(["-c", command]).stdin(Stdio::null()).output().unwrap()
}

pub fn must(command: &str) -> String {
    let out = run(command);
    assert!(out.status.success(), "{command}\n{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Why the lab cannot run here.
pub fn missing() -> Option<String> {
    // SAFETY: takes nothing and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return Some("not root".into());
    }
    let tools = ["ip", "ovsdb-server", "ovs-vswitchd", "ovsdb-tool", "ovs-vsctl", "ovs-ofctl", "ethtool", "busybox"];
    tools.into_iter().find(|t| !run(&format!("command -v {t}")).status.success()).map(|t| format!("no {t}"))
}

pub struct Host {
    pub id: HostId,
    pub index: u16,
    pub ns: String,
    pub overlay_addr: Ipv4Addr,
    pub rundir: PathBuf,
    rt: Option<tokio::runtime::Runtime>,
}

impl Host {
    /// Runs a future in the host's network namespace.
    pub fn on<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> T {
        let rt = self.rt.as_ref().unwrap();
        rt.block_on(rt.spawn(async { tokio::time::timeout(Duration::from_secs(120), future).await }))
            .unwrap()
            .expect("within two minutes")
    }

    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.rt.as_ref().unwrap().spawn(future);
    }

    fn environment(&self) -> String {
        let dir = self.rundir.display();
        format!("env OVS_RUNDIR={dir} OVS_DBDIR={dir} OVS_LOGDIR={dir} OVS_SYSCONFDIR={dir}")
    }

    pub fn start_vswitchd(&self) {
        let (ns, dir, env) = (&self.ns, self.rundir.display(), self.environment());
        must(&format!(
            "ip netns exec {ns} {env} ovs-vswitchd unix:{dir}/db.sock --unixctl={dir}/vsw.ctl --pidfile={dir}/vsw.pid \
             --log-file={dir}/vsw.log --detach --no-chdir -vconsole:off"
        ));
    }

    pub fn ofctl(&self, arguments: &str) -> String {
        must(&format!("{} ovs-ofctl -O OpenFlow13 {arguments}", self.environment()))
    }

    pub fn config(&self) -> SwitchConfig {
        let mut config = SwitchConfig::new(self.id, &self.rundir, self.overlay_addr);
        config.blocked = vec!["198.18.0.0/15".parse().unwrap()];
        config
    }

    pub fn driver(&self) -> Arc<SwitchDriver> {
        let config = self.config();
        Arc::new(self.on(async move { SwitchDriver::open(config).await.unwrap() }))
    }
}

pub struct Lab {
    pub tag: String,
    dir: PathBuf,
    pub hosts: Vec<Host>,
    namespaces: Vec<String>,
}

impl Lab {
    pub fn start(count: u16) -> Self {
        remove_stale();
        let pid = std::process::id();
        let tag = format!("{PREFIX}{pid}-");
        let dir = PathBuf::from(format!("/tmp/{PREFIX}{pid}"));
        fs::create_dir_all(&dir).unwrap();
        let mut lab = Lab { tag: tag.clone(), dir, hosts: vec![], namespaces: vec![] };
        let wan = lab.namespace("wan");
        must(&format!("ip -n {wan} link add br0 type bridge && ip -n {wan} link set br0 up"));
        for n in 1..=count {
            lab.add_host(n, &wan);
        }
        lab
    }

    pub fn namespace(&mut self, name: &str) -> String {
        let ns = format!("{}{name}", self.tag);
        self.namespaces.push(ns.clone());
        must(&format!("ip netns add {ns} && ip -n {ns} link set lo up"));
        ns
    }

    fn add_host(&mut self, n: u16, wan: &str) {
        let ns = self.namespace(&format!("h{n}"));
        let rundir = self.dir.join(format!("h{n}"));
        fs::create_dir_all(&rundir).unwrap();
        must(&format!(
            "ip -n {ns} link add ul0 type veth peer name ul{n} netns {wan} && ip -n {ns} link set ul0 up && \
             ip -n {wan} link set ul{n} master br0 up && ip netns exec {ns} ethtool -K ul0 tx off"
        ));
        let overlay_addr = Ipv4Addr::new(198, 19, 200, n as u8);
        let path = format!("/run/netns/{ns}");
        let rt = std::thread::spawn(move || {
            let file = fs::File::open(path).unwrap();
            // SAFETY: the descriptor is open; only this thread and those it starts change their namespace.
            let rc = unsafe { libc::setns(std::os::fd::AsRawFd::as_raw_fd(&file), libc::CLONE_NEWNET) };
            assert_eq!(rc, 0, "setns");
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
        })
        .join()
        .unwrap();
        let host = Host { id: HostId::generate(), index: n, ns: ns.clone(), overlay_addr, rundir, rt: Some(rt) };
        let (dir, env) = (host.rundir.display().to_string(), host.environment());
        self.hosts.push(host);
        must(&format!(
            "ovsdb-tool create {dir}/conf.db /usr/share/openvswitch/vswitch.ovsschema && ip netns exec {ns} {env} \
             ovsdb-server {dir}/conf.db --remote=punix:{dir}/db.sock --unixctl={dir}/ovsdb.ctl \
             --pidfile={dir}/ovsdb-server.pid --log-file={dir}/ovsdb.log --detach --no-chdir -vconsole:off && \
             {env} ovs-vsctl --db=unix:{dir}/db.sock --no-wait init"
        ));
        self.hosts.last().unwrap().start_vswitchd();
        must(&format!(
            "{env} ovs-vsctl --db=unix:{dir}/db.sock -- add-br br-phy -- set bridge br-phy datapath_type=netdev \
             fail_mode=standalone -- add-port br-phy ul0"
        ));
        must(&format!("ip -n {ns} addr add {overlay_addr}/24 dev br-phy && ip -n {ns} link set br-phy up"));
    }

    /// A guest's namespace with `eth0` at a host; returns the namespace.
    pub fn guest(&mut self, name: &str, host: usize, tap: &str, mac: &str) -> String {
        let ns = self.namespace(name);
        self.wire(&ns, "eth0", host, tap, mac);
        ns
    }

    /// An interface of a guest at a host.
    pub fn wire(&self, ns: &str, interface: &str, host: usize, tap: &str, mac: &str) {
        let at = &self.hosts[host].ns;
        must(&format!(
            "ip -n {at} link add {tap} type veth peer name {interface} netns {ns} && ip -n {at} link set {tap} up && \
             ip -n {ns} link set {interface} address {mac} mtu 1450 up && \
             ip netns exec {ns} ethtool -K {interface} tx off >/dev/null"
        ));
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for host in &mut self.hosts {
            if let Some(rt) = host.rt.take() {
                rt.shutdown_timeout(Duration::from_secs(5));
            }
        }
        remove(&self.dir, &self.namespaces);
    }
}

fn remove(dir: &Path, namespaces: &[String]) {
    for host in fs::read_dir(dir).into_iter().flatten().flatten() {
        for pidfile in ["vsw.pid", "ovsdb-server.pid"] {
            if let Ok(pid) = fs::read_to_string(host.path().join(pidfile)) {
                let pid = pid.trim();
                // A number that was given to another process since must not be killed.
                let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                if comm.starts_with("ovs") {
                    run(&format!("kill -9 {pid}"));
                }
            }
        }
    }
    for ns in namespaces {
        run(&format!("ip netns pids {ns} | xargs -r kill -9; ip netns del {ns}"));
    }
    let _ = fs::remove_dir_all(dir);
}

/// Removes labs of processes that are gone.
fn remove_stale() {
    let names = String::from_utf8_lossy(&run("ip netns list").stdout).into_owned();
    let dead = |text: &str| {
        let pid = text.strip_prefix(PREFIX)?.split('-').next()?.parse::<u32>().ok()?;
        (!Path::new(&format!("/proc/{pid}")).exists()).then_some(pid)
    };
    let mut pids: Vec<u32> = names.lines().filter_map(dead).collect();
    for entry in fs::read_dir("/tmp").into_iter().flatten().flatten() {
        pids.extend(entry.file_name().to_str().and_then(dead));
    }
    pids.sort_unstable();
    pids.dedup();
    for pid in pids {
        let tag = format!("{PREFIX}{pid}-");
        let list: Vec<String> = names
            .lines()
            .filter(|l| l.starts_with(&tag))
            .filter_map(|l| l.split_whitespace().next().map(str::to_owned))
            .collect();
        remove(Path::new(&format!("/tmp/{PREFIX}{pid}")), &list);
    }
}
