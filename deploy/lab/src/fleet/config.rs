//! The settings files of the daemons in a lab: the one place that knows where a lab keeps what.

use std::net::Ipv4Addr;

use serde::Serialize;
use supercloud_scheduler::price::CheapestWithHysteresis;

use crate::addressing::LabIndex;
use crate::host_vm::Hypervisor;
use crate::site::{STORE_DIR, Site};

/// The controller's folder, inside its site.
pub const CONTROLLER_DIR: &str = "/var/lib/supercloud/controller";
/// The agent's folder, inside a host.
pub const AGENT_DIR: &str = "/var/lib/supercloud/agent";
/// Where an agent keeps its guests, inside a host.
pub const GUESTS_DIR: &str = "/var/lib/supercloud/agent/guests";
/// Settings, inside every site.
pub const SETTINGS_DIR: &str = "/etc/supercloud";
/// Logs, inside every site.
pub const LOG_DIR: &str = "/var/log/supercloud";
/// REST.
pub const API_PORT: u16 = 8443;
/// Agents' links.
pub const LINK_PORT: u16 = 8444;
/// Between agents.
pub const DATA_PORT: u16 = 8445;

/// How the price feed is replayed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct FeedStart {
    /// The feed's time at the start, milliseconds.
    pub start_ms: u64,
    /// Feed milliseconds per millisecond; 0 holds the clock.
    pub speed: f64,
}

#[derive(Serialize)]
struct ControllerFile {
    data_dir: &'static str,
    listen: String,
    link_listen: String,
    link_address: String,
    names: Vec<String>,
    log: String,
    feed: FeedFile,
}

#[derive(Serialize)]
struct FeedFile {
    file: String,
    #[serde(flatten)]
    start: FeedStart,
}

/// The controller's settings; it reads the feed from [`SETTINGS_DIR`]`/feed.csv`.
///
/// # Errors
/// Never in practice: all fields have a form in TOML.
pub fn controller(index: LabIndex, feed: FeedStart, log: &str) -> Result<String, toml::ser::Error> {
    let address = index.controller_address();
    toml::to_string(&ControllerFile {
        data_dir: CONTROLLER_DIR,
        listen: format!("0.0.0.0:{API_PORT}"),
        link_listen: format!("0.0.0.0:{LINK_PORT}"),
        link_address: format!("{address}:{LINK_PORT}"),
        names: vec![address.to_string(), "controller".into(), "localhost".into(), "127.0.0.1".into()],
        log: log.to_owned(),
        feed: FeedFile { file: format!("{SETTINGS_DIR}/feed.csv"), start: feed },
    })
}

#[derive(Serialize)]
struct AgentFile {
    data_dir: &'static str,
    run_dir: &'static str,
    store_dir: &'static str,
    controller_url: String,
    join_token_file: String,
    data_listen: String,
    data_address: String,
    overlay_address: Ipv4Addr,
    #[serde(skip_serializing_if = "Option::is_none")]
    back_end: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    qemu_user: Option<&'static str>,
    capacity: CapacityFile,
    ovs: OvsFile,
    #[serde(skip_serializing_if = "Option::is_none")]
    wireguard: Option<WireguardFile>,
}

#[derive(Serialize)]
struct WireguardFile {
    endpoint: String,
}

#[derive(Serialize)]
struct CapacityFile {
    vcpus: u32,
    memory_bytes: u64,
    disk_bytes: u64,
}

#[derive(Serialize)]
struct OvsFile {
    run_dir: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    datapath: Option<&'static str>,
    blocked: Vec<String>,
}

/// An agent's settings.
///
/// # Errors
/// Never in practice.
pub fn agent(site: &Site) -> Result<String, toml::ser::Error> {
    let index = site.index;
    let lab = index.get();
    let is_vm = site.hardware().is_some();
    // A host VM holds its guests' memory, its own, and the agent's; a namespace host is this machine: what counts there is that a lab
    // fits into 8 GiB.
    let is_xen = site.hypervisor() == Hypervisor::Xen;
    // It takes a switch in the kernel, and a kernel that has WireGuard: this machine's may have neither.
    let encrypts = is_vm && !is_xen;
    let (vcpus, memory_bytes, disk_bytes) = match (is_vm, is_xen) {
        // What the first domain leaves, less what Xen needs for each guest.
        (true, true) => (4, 320 << 20, 2 << 30),
        (true, false) => (4, 512 << 20, 2 << 30),
        (false, _) => (8, 2 << 30, 20 << 30),
    };
    toml::to_string(&AgentFile {
        data_dir: AGENT_DIR,
        run_dir: "/run/supercloud",
        store_dir: STORE_DIR,
        controller_url: api_url(index),
        join_token_file: format!("{SETTINGS_DIR}/join-token"),
        data_listen: format!("0.0.0.0:{DATA_PORT}"),
        data_address: format!("{}:{DATA_PORT}", site.address()),
        overlay_address: if encrypts { index.encrypted_address(site.number) } else { site.overlay_address() },
        back_end: is_vm.then_some(if is_xen { "xen" } else { "kvm" }),
        // Everything of a domain is done by the superuser's own programs.
        qemu_user: is_xen.then_some("root"),
        capacity: CapacityFile { vcpus, memory_bytes, disk_bytes },
        ovs: OvsFile {
            run_dir: "/run/openvswitch",
            datapath: is_vm.then_some("system"),
            blocked: vec![format!("198.18.{lab}.0/24"), format!("198.19.{lab}.0/24")],
        },
        wireguard: encrypts.then(|| WireguardFile { endpoint: format!("{}:51820", site.overlay_address()) }),
    })
}

#[derive(Serialize)]
struct SpotdFile<'a> {
    url: String,
    ca_file: String,
    token_file: String,
    poll_ms: u64,
    move_nanousd_per_gib: u64,
    policy: &'a CheapestWithHysteresis,
}

/// The price daemon's settings; it runs beside the controller.
///
/// # Errors
/// Never in practice.
pub fn spotd(
    index: LabIndex,
    policy: &CheapestWithHysteresis,
    move_nanousd_per_gib: u64,
) -> Result<String, toml::ser::Error> {
    toml::to_string(&SpotdFile {
        url: api_url(index),
        ca_file: format!("{CONTROLLER_DIR}/ca.pem"),
        token_file: format!("{SETTINGS_DIR}/spotd.token"),
        poll_ms: 500,
        move_nanousd_per_gib,
        policy,
    })
}

/// The URL of the API, from inside the lab and from the machine itself.
#[must_use]
pub fn api_url(index: LabIndex) -> String {
    format!("https://{}:{API_PORT}", index.controller_address())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::LabSpec;
    use crate::state::StateDir;

    #[test]
    fn settings_are_toml_with_all_tables_at_the_end() {
        let index = LabIndex::new(7).unwrap();
        let text = controller(index, FeedStart { start_ms: 5, speed: 0.0 }, "info").unwrap();
        let table: toml::Table = text.parse().unwrap();
        assert_eq!(table["feed"]["start_ms"].as_integer(), Some(5));
        assert_eq!(table["link_address"].as_str(), Some("198.18.7.254:8444"));

        let spec = LabSpec::three_clouds("x");
        let site = Site::new(&spec, index, &StateDir::new(std::path::Path::new("/nowhere"), "x"), "home").unwrap();
        let table: toml::Table = agent(&site).unwrap().parse().unwrap();
        assert_eq!(table["overlay_address"].as_str(), Some("198.19.7.3"));
        assert_eq!(table["ovs"]["blocked"].as_array().map(Vec::len), Some(2));

        let spec = LabSpec::three_clouds_of_vms("x");
        let site = Site::new(&spec, index, &StateDir::new(std::path::Path::new("/nowhere"), "x"), "home").unwrap();
        let table: toml::Table = agent(&site).unwrap().parse().unwrap();
        assert_eq!((table["back_end"].as_str(), table["ovs"]["datapath"].as_str()), (Some("kvm"), Some("system")));
        assert_eq!(table["overlay_address"].as_str(), Some("198.19.7.131"));
        assert_eq!(table["wireguard"]["endpoint"].as_str(), Some("198.19.7.3:51820"));

        let spec = LabSpec::three_clouds_of_xen("x");
        let site = Site::new(&spec, index, &StateDir::new(std::path::Path::new("/nowhere"), "x"), "home").unwrap();
        let table: toml::Table = agent(&site).unwrap().parse().unwrap();
        assert_eq!((table["back_end"].as_str(), table["qemu_user"].as_str()), (Some("xen"), Some("root")));

        let policy = CheapestWithHysteresis::default();
        let table: toml::Table = spotd(index, &policy, 1).unwrap().parse().unwrap();
        assert_eq!(table["policy"].clone().try_into::<CheapestWithHysteresis>().unwrap(), policy);
    }
}
