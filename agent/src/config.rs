//! The agent's configuration: one TOML file. Every value is checked before anything is started.
//!
//! ```toml
//! controller_url = "https://controller.example:8443"
//! join_token_file = "/etc/supercloud/join-token"   # needed once
//! data_address = "203.0.113.7:8445"                # absent: behind a NAT, others cannot dial this host
//! overlay_address = "10.99.0.7"
//! store_dir = "/var/lib/supercloud-store"          # shared by the hosts of one cloud
//!
//! [ovs]
//! run_dir = "/run/openvswitch"
//!
//! [bucket]                                         # instead of a shared folder; see [`BucketConfig`]
//! bucket = "my-chunks"
//! prefix = "west-1"
//! endpoint = "https://s3.example"                  # none: AWS
//! credentials_file = "/etc/supercloud/bucket-credentials"
//!
//! [cloud_of_clouds]                                # instead of either; see [`CloudOfCloudsConfig`]
//! key_file = "/etc/supercloud/store-key"           # and four [[cloud_of_clouds.member]] or more
//!
//! [sweep]                                          # of store_dir: what nothing names any more is removed
//! every_s = 0                                      # how often; 0: only when somebody asks for it
//! after_freezes = false                            # also when a freeze is over
//! grace_s = 3600                                   # what was written more lately is left alone
//! ```

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use supercloud_api::Room;
use supercloud_sdn::{
    addr::Ipv4Prefix,
    switch::{Datapath, SwitchConfig, Underlay},
    tap, wireguard,
};

use supercloud_ids::HostId;
use supercloud_storage::backend::{BucketConfig, depsky::CloudOfCloudsConfig};

use crate::{
    accounts::{Account, AccountError},
    announced::ProviderNotices,
};

/// The longest `run_dir`, in bytes: what the sockets' names below it need is left of a unix socket's 107.
const MAX_RUN_DIR_BYTES: usize = 60;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration {path}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not TOML of the right form; the source names line and field.
    #[error("the configuration {path} is malformed")]
    Parse {
        /// The file.
        path: String,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value cannot be used.
    #[error("the configuration's {field} {why}")]
    Value {
        /// The field.
        field: &'static str,
        /// What is wrong and what to do.
        why: String,
    },
}

/// The agent's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What must outlive a restart: identity, guests, volumes.
    #[serde(default = "data_dir")]
    pub data_dir: PathBuf,
    /// Sockets; at most 60 bytes long.
    #[serde(default = "run_dir")]
    pub run_dir: PathBuf,
    /// The cloud's chunk store: a folder, shared by the hosts of one cloud. With a bucket: this host's own folder for what
    /// comes from it and goes there.
    #[serde(default = "store_dir")]
    pub store_dir: PathBuf,
    /// The bucket that is the cloud's chunk store; the same for all its hosts.
    #[serde(default)]
    pub bucket: Option<BucketConfig>,
    /// The stores of several providers that together are the cloud's chunk store; the same for all its hosts.
    #[serde(default)]
    pub cloud_of_clouds: Option<CloudOfCloudsConfig>,
    /// The controller's REST address, needed to join.
    pub controller_url: String,
    /// Where the controller takes agents' links (`host:port`); what the controller said at the join when absent.
    #[serde(default)]
    pub link_address: Option<String>,
    /// The CA's certificate, PEM. When absent, the one that the join token's fingerprint names is taken.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// A file with the one-time token; looked at only while this host has no identity.
    #[serde(default)]
    pub join_token_file: Option<PathBuf>,
    /// Where other agents' connections are taken.
    #[serde(default = "data_listen")]
    pub data_listen: SocketAddr,
    /// Where other agents can dial this host; absent: they cannot.
    #[serde(default)]
    pub data_address: Option<SocketAddr>,
    /// This host's end of the overlay's tunnels; absent: no networks.
    #[serde(default)]
    pub overlay_address: Option<Ipv4Addr>,
    /// Encrypts the overlay's tunnels: the overlay address is then that of an interface which the agent makes.
    #[serde(default)]
    pub wireguard: Option<Wireguard>,
    /// Tunnels are not encrypted without `wireguard`: outside of the lab's addresses (198.18.0.0/15) this must be said explicitly.
    #[serde(default)]
    pub insecure_overlay: bool,
    /// What runs guests here.
    #[serde(default)]
    pub back_end: BackEnd,
    /// The program that runs a guest of back end `kvm`; beside this one when absent.
    #[serde(default)]
    pub vmm_program: Option<PathBuf>,
    /// The program beside Xen's `xl` for back end `xen`; beside this one when absent.
    #[serde(default)]
    pub xen_program: Option<PathBuf>,
    /// libvirt's connection URI.
    #[serde(default = "libvirt_uri")]
    pub libvirt_uri: String,
    /// Where libvirtd writes its guests' pid files, to tell their processes.
    #[serde(default)]
    pub libvirt_pid_dir: Option<PathBuf>,
    /// The user as which guests' processes run (of back end `libvirt`: `user` in libvirtd's qemu.conf): disks, kernels and
    /// streams are made reachable for it alone.
    #[serde(default = "qemu_user")]
    pub qemu_user: String,
    /// The user that volume processes become; it needs no rights on this host, and no other use.
    #[serde(default = "volume_user")]
    pub volume_user: String,
    /// The program that serves a volume; beside this one when absent.
    #[serde(default)]
    pub volume_program: Option<PathBuf>,
    /// What is offered to guests; measured where absent.
    #[serde(default)]
    pub capacity: Capacity,
    /// The switch.
    #[serde(default)]
    pub ovs: Ovs,
    /// How the chunk store is swept.
    #[serde(default)]
    pub sweep: Sweep,
    /// Where it is heard what this machine's provider will do with it.
    #[serde(default)]
    pub provider_notices: ProviderNotices,
}

/// What runs guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackEnd {
    /// QEMU, by libvirtd: with hardware virtualization or without.
    #[default]
    Libvirt,
    /// Our own VMM on `/dev/kvm`.
    Kvm,
    /// Xen, on which this host's own system is the first domain: paravirtual guests, without any virtualization of the processor's.
    Xen,
}

/// How the cloud's chunk store is swept of what nothing names any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sweep {
    /// How often, in seconds; 0: only when somebody asks for it, as the controller does every hour unless it is told otherwise.
    #[serde(default)]
    pub every_s: u32,
    /// Whether the end of a freeze asks for it, too.
    #[serde(default)]
    pub after_freezes: bool,
    /// What was written more lately than so many seconds is left alone.
    #[serde(default = "an_hour")]
    pub grace_s: u32,
}

impl Default for Sweep {
    fn default() -> Self {
        Self { every_s: 0, after_freezes: false, grace_s: an_hour() }
    }
}

impl Sweep {
    /// How often.
    #[must_use]
    pub fn every(&self) -> Option<Duration> {
        (self.every_s > 0).then(|| Duration::from_secs(self.every_s.into()))
    }

    /// What is younger is left alone.
    #[must_use]
    pub fn grace(&self) -> Duration {
        Duration::from_secs(self.grace_s.into())
    }
}

/// What is offered to guests.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capacity {
    /// Virtual CPUs; four per processor when absent.
    #[serde(default)]
    pub vcpus: Option<u32>,
    /// Memory for guests; three quarters of the machine's when absent.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Disk for volumes; nine tenths of what is free under `data_dir` when absent.
    #[serde(default)]
    pub disk_bytes: Option<u64>,
}

/// Where the switch is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ovs {
    /// Open vSwitch's run directory.
    #[serde(default = "ovs_run_dir")]
    pub run_dir: PathBuf,
    /// The database's socket; `db.sock` in the run directory when absent.
    #[serde(default)]
    pub db_socket: Option<PathBuf>,
    /// The integration bridge. It belongs to the agent.
    #[serde(default = "bridge")]
    pub bridge: String,
    /// Which datapath.
    #[serde(default)]
    pub datapath: DatapathChoice,
    /// The bridge with the overlay address, where the agent is to make it.
    #[serde(default)]
    pub underlay_bridge: Option<String>,
    /// The interface from the underlay bridge to the wire.
    #[serde(default)]
    pub uplink: Option<String>,
    /// The interface of the metadata service; empty for none.
    #[serde(default = "metadata_port")]
    pub metadata_port: String,
    /// Destinations that guests must not reach: underlay, hosts, controllers.
    #[serde(default)]
    pub blocked: Vec<Ipv4Prefix>,
}

impl Default for Ovs {
    fn default() -> Self {
        Self {
            run_dir: ovs_run_dir(),
            db_socket: None,
            bridge: bridge(),
            datapath: DatapathChoice::default(),
            underlay_bridge: None,
            uplink: None,
            metadata_port: metadata_port(),
            blocked: Vec::new(),
        }
    }
}

/// The interface beneath the overlay's tunnels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wireguard {
    /// Where encrypted packets are taken (UDP).
    #[serde(default = "wireguard_port")]
    pub listen_port: u16,
    /// Where the other hosts send them: `data_address` with this port when absent, and nowhere without a `data_address`.
    #[serde(default)]
    pub endpoint: Option<SocketAddr>,
    /// The interface's name. It belongs to the agent.
    #[serde(default = "wireguard_interface")]
    pub interface: String,
}

fn wireguard_port() -> u16 {
    wireguard::LISTEN_PORT
}

fn wireguard_interface() -> String {
    wireguard::INTERFACE.to_owned()
}

/// Which datapath the integration bridge uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DatapathChoice {
    /// In the switch's own process: works on every kernel.
    #[default]
    Netdev,
    /// In the kernel.
    System,
    /// In the kernel where it is offered.
    Probe,
}

fn an_hour() -> u32 {
    3600
}

fn data_dir() -> PathBuf {
    "/var/lib/supercloud-agent".into()
}

fn run_dir() -> PathBuf {
    "/run/supercloud-agent".into()
}

fn store_dir() -> PathBuf {
    "/var/lib/supercloud-store".into()
}

fn data_listen() -> SocketAddr {
    (Ipv4Addr::UNSPECIFIED, 8445).into()
}

fn libvirt_uri() -> String {
    "qemu:///system".into()
}

fn qemu_user() -> String {
    "libvirt-qemu".into()
}

fn volume_user() -> String {
    "supercloud-volume".into()
}

fn ovs_run_dir() -> PathBuf {
    "/run/openvswitch".into()
}

fn bridge() -> String {
    "br-int".into()
}

fn metadata_port() -> String {
    "md0".into()
}

impl Config {
    /// Reads and checks a file. Blocking.
    ///
    /// # Errors
    /// The first thing that is wrong, by field.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let name = || path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: name(), source })?;
        let config: Self =
            toml::from_str(&text).map_err(|source| ConfigError::Parse { path: name(), source: Box::new(source) })?;
        config.check()?;
        Ok(config)
    }

    /// Checks what the types do not.
    ///
    /// # Errors
    /// The first thing that is wrong, by field.
    pub fn check(&self) -> Result<(), ConfigError> {
        let wrong = |field, why: String| Err(ConfigError::Value { field, why });
        for (field, path) in [("data_dir", &self.data_dir), ("run_dir", &self.run_dir), ("store_dir", &self.store_dir)]
        {
            // What QEMU and libvirt are given must be plain: see supercloud_blanket::host.
            let is_plain =
                |text: &str| text.bytes().all(|b| (0x21..0x7f).contains(&b) && !matches!(b, b',' | b':' | b'"'));
            if !path.is_absolute() || !path.to_str().is_some_and(is_plain) {
                return wrong(field, format!("'{}' must be an absolute path of plain characters", path.display()));
            }
        }
        if let Some(bucket) = &self.bucket
            && let Err(error) = bucket.validate()
        {
            return wrong("bucket", crate::chain(&error));
        }
        if let Some(clouds) = &self.cloud_of_clouds {
            if self.bucket.is_some() {
                let why = "stands beside cloud_of_clouds, and a cloud has one store: make it one of its members, or remove it";
                return wrong("bucket", why.into());
            }
            if let Err(error) = clouds.validate() {
                return wrong("cloud_of_clouds", format!("{} {}", error.at, error.why));
            }
        }
        if let Err(why) = self.provider_notices.check() {
            return wrong("provider_notices.endpoint", why);
        }
        if self.run_dir.as_os_str().len() > MAX_RUN_DIR_BYTES {
            return wrong("run_dir", format!("must have at most {MAX_RUN_DIR_BYTES} bytes: sockets lie below it"));
        }
        if let Some(address) = self.data_address
            && (address.ip().is_unspecified() || address.port() == 0)
        {
            return wrong("data_address", format!("{address} is none that others can dial"));
        }
        if let Some(wireguard) = &self.wireguard {
            self.check_wireguard(wireguard)?;
        }
        if let Some(address) = self.overlay_address {
            let in_lab = matches!(address.octets(), [198, 18 | 19, ..]);
            let is_secret = self.wireguard.is_some();
            if !in_lab && !is_secret && !self.insecure_overlay && !IpAddr::V4(address).is_loopback() {
                return wrong(
                    "overlay_address",
                    format!(
                        "{address} is outside of the lab, and tunnels between hosts are not encrypted: add a section [wireguard], \
                         or use a private, trusted network and say insecure_overlay = true (--insecure-overlay)"
                    ),
                );
            }
        }
        Ok(())
    }

    fn check_wireguard(&self, asked: &Wireguard) -> Result<(), ConfigError> {
        let wrong = |field: &'static str, why: String| Err(ConfigError::Value { field, why });
        if self.overlay_address.is_none() {
            return wrong(
                "overlay_address",
                "is missing, and [wireguard] is there: say a private address of its own for each host".into(),
            );
        }
        if self.ovs.datapath == DatapathChoice::Netdev {
            let why =
                "must be \"system\" with [wireguard]: the switch's own process does not send through its interface";
            return wrong("ovs.datapath", why.into());
        }
        if asked.listen_port == 0 {
            return wrong("wireguard.listen_port", "must be 1 to 65535".into());
        }
        let name = &asked.interface;
        if !tap::is_interface_name(name) {
            return wrong(
                "wireguard.interface",
                format!("'{name}' is no name of an interface: 1 to 15 letters, digits, - and _"),
            );
        }
        let Some(endpoint) = self.wireguard_endpoint() else { return Ok(()) };
        if !wireguard::is_machine(endpoint) {
            return wrong("wireguard.endpoint", format!("{endpoint} is none that others can send to"));
        }
        if self.overlay_address.is_some_and(|address| endpoint.ip().to_canonical() == address) {
            let why = "is the address at which others reach this host: with [wireguard] it is another one, private, which no interface has";
            return wrong("overlay_address", why.into());
        }
        Ok(())
    }

    /// The user as which guests' processes run. Blocking.
    ///
    /// # Errors
    /// When this machine has none of that name.
    pub fn qemu_account(&self) -> Result<Account, AccountError> {
        let remedy = match self.back_end {
            BackEnd::Libvirt => "install libvirt-daemon-system, or say the `user` of libvirt's qemu.conf",
            BackEnd::Kvm | BackEnd::Xen => "make it (adduser --system --group NAME), or say another one",
        };
        Account::named("qemu_user", &self.qemu_user, remedy)
    }

    /// The user that volume processes become. Blocking.
    ///
    /// # Errors
    /// When this machine has none of that name.
    pub fn volume_account(&self) -> Result<Account, AccountError> {
        let remedy =
            "make it (systemd-sysusers with deploy/sysusers/supercloud.conf, or adduser --system --group NAME)";
        Account::named("volume_user", &self.volume_user, remedy)
    }

    /// Where the other hosts send what is encrypted for this one.
    #[must_use]
    pub fn wireguard_endpoint(&self) -> Option<SocketAddr> {
        let wireguard = self.wireguard.as_ref()?;
        wireguard.endpoint.or_else(|| Some(SocketAddr::new(self.data_address?.ip(), wireguard.listen_port)))
    }

    /// The switch driver's configuration; none without an overlay address.
    #[must_use]
    pub fn switch(&self, host: HostId) -> Option<SwitchConfig> {
        let ovs = &self.ovs;
        let mut config = SwitchConfig::new(host, &ovs.run_dir, self.overlay_address?);
        if let Some(socket) = &ovs.db_socket {
            config.ovsdb_socket.clone_from(socket);
        }
        config.mgmt_socket = ovs.run_dir.join(format!("{}.mgmt", ovs.bridge));
        config.bridge.clone_from(&ovs.bridge);
        config.datapath = match ovs.datapath {
            DatapathChoice::Netdev => Datapath::Netdev,
            DatapathChoice::System => Datapath::System,
            DatapathChoice::Probe => Datapath::Probe,
        };
        config.underlay = ovs.underlay_bridge.clone().map(|bridge| Underlay { bridge, uplink: ovs.uplink.clone() });
        config.metadata_port = Some(ovs.metadata_port.clone()).filter(|name| !name.is_empty());
        config.blocked.clone_from(&ovs.blocked);
        Some(config)
    }

    /// What is offered to guests: what is configured, else measured. Blocking.
    #[must_use]
    pub fn room(&self) -> Room {
        let processors = std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
        Room {
            vcpus: self.capacity.vcpus.unwrap_or_else(|| processors.saturating_mul(4)),
            memory_bytes: self.capacity.memory_bytes.unwrap_or_else(|| total_memory_bytes() / 4 * 3),
            disk_bytes: self.capacity.disk_bytes.unwrap_or_else(|| free_disk_bytes(&self.data_dir) / 10 * 9),
        }
    }

    /// The folder of guests.
    #[must_use]
    pub fn guests_dir(&self) -> PathBuf {
        self.data_dir.join("guests")
    }

    /// The program that serves a volume.
    #[must_use]
    pub fn volume_program(&self) -> PathBuf {
        self.volume_program.clone().unwrap_or_else(|| beside("supercloud-volume"))
    }

    /// The program that runs a guest of back end `kvm`.
    #[must_use]
    pub fn vmm_program(&self) -> PathBuf {
        self.vmm_program.clone().unwrap_or_else(|| beside("supercloud-vmm"))
    }

    /// The program beside Xen's `xl`.
    #[must_use]
    pub fn xen_program(&self) -> PathBuf {
        self.xen_program.clone().unwrap_or_else(|| beside("supercloud-xen"))
    }
}

/// A program that lies where this one does.
fn beside(name: &str) -> PathBuf {
    std::env::current_exe().unwrap_or_default().with_file_name(name)
}

fn total_memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok());
    kib.unwrap_or(0_u64) * 1024
}

/// Bytes that are free on the file system of `path` (or of the nearest folder above that is there). Blocking.
#[must_use]
pub fn free_disk_bytes(path: &Path) -> u64 {
    use std::os::unix::ffi::OsStrExt as _;
    let Some(there) = path.ancestors().find(|path| path.exists()) else { return 0 };
    let Ok(name) = std::ffi::CString::new(there.as_os_str().as_bytes()) else { return 0 };
    // SAFETY: statvfs is a C structure of numbers, for which all zeros is a valid value.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the name ends with a zero and lives over the call; the kernel writes one statvfs.
    let rc = unsafe { libc::statvfs(name.as_ptr(), &raw mut stat) };
    if rc != 0 {
        return 0;
    }
    stat.f_bavail.saturating_mul(stat.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Config::from_file(file.path())
    }

    #[test]
    fn the_shortest_configuration_is_complete() {
        let config = parse("controller_url = 'https://c:8443'").unwrap();
        assert_eq!(config.data_dir, data_dir());
        assert!(config.switch(HostId::generate()).is_none());
        let room = config.room();
        assert!(room.vcpus > 0 && room.memory_bytes > 0 && room.disk_bytes > 0, "{room:?}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let with = |line: &str| format!("controller_url = 'https://c:8443'\n{line}");
        for (line, field) in [
            ("data_dir = 'x'", "data_dir"),
            ("store_dir = '/a b'", "store_dir"),
            ("data_address = '0.0.0.0:1'", "data_address"),
            ("[bucket]\nbucket = 'a/b'", "bucket"),
            ("[bucket]\nbucket = 'abc'\nendpoint = 'http://s3.example'", "bucket"),
            ("[cloud_of_clouds]\nkey_file = '/k'", "cloud_of_clouds"),
            ("[bucket]\nbucket = 'abc'\n[cloud_of_clouds]\nkey_file = '/k'", "bucket"),
            ("overlay_address = '10.0.0.1'", "overlay_address"),
            (&format!("run_dir = '/{}'", "r".repeat(60)), "run_dir"),
        ] {
            match parse(&with(line)) {
                Err(ConfigError::Value { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{line}: {other:?}"),
            }
        }
        let error = parse(&with("typo = 1")).unwrap_err();
        assert!(
            matches!(&error, ConfigError::Parse { source, .. } if source.to_string().contains("typo")),
            "{error:?}"
        );
        parse(&with("overlay_address = '10.0.0.1'\ninsecure_overlay = true")).unwrap();
        parse(&with("overlay_address = '198.19.3.1'")).unwrap();
        let encrypted = |more: &str| with(&format!("overlay_address = '10.0.0.1'\n{more}"));
        let config =
            parse(&encrypted("data_address = '192.0.2.1:8445'\n[ovs]\ndatapath = 'system'\n[wireguard]")).unwrap();
        assert_eq!(config.wireguard_endpoint(), Some("192.0.2.1:51820".parse().unwrap()));
        let config = parse(&encrypted("[ovs]\ndatapath = 'probe'\n[wireguard]\nlisten_port = 7")).unwrap();
        assert_eq!(config.wireguard_endpoint(), None, "behind a NAT");
        for (text, field) in [
            (with("[ovs]\ndatapath = 'system'\n[wireguard]"), "overlay_address"),
            (encrypted("[wireguard]"), "ovs.datapath"),
            (encrypted("[ovs]\ndatapath = 'system'\n[wireguard]\nlisten_port = 0"), "wireguard.listen_port"),
            (encrypted("[ovs]\ndatapath = 'system'\n[wireguard]\ninterface = '-f'"), "wireguard.interface"),
            (encrypted("[ovs]\ndatapath = 'system'\n[wireguard]\nendpoint = '0.0.0.0:1'"), "wireguard.endpoint"),
            (encrypted("data_address = '10.0.0.1:8445'\n[ovs]\ndatapath = 'system'\n[wireguard]"), "overlay_address"),
        ] {
            assert!(matches!(parse(&text), Err(ConfigError::Value { field: found, .. }) if found == field), "{text}");
        }
        let four: String = (0..4)
            .map(|i| {
                format!("[[cloud_of_clouds.member]]\nname = 'p-{i}'\nbucket = {{ bucket = 'abc', prefix = 'p{i}' }}\n")
            })
            .collect();
        let clouds = |more: &str| format!("[cloud_of_clouds]\nkey_file = '/etc/store-key'\n{four}{more}");
        let config = parse(&with(&clouds(""))).unwrap().cloud_of_clouds.unwrap();
        assert_eq!((config.members.len(), config.members[3].name.as_str()), (4, "p-3"));
        let error = parse(&with(&clouds("[[cloud_of_clouds.member]]\nname = 'p-4'\nfolder = '/x'\n"))).unwrap_err();
        assert!(error.to_string().contains("member has 5 entries: list 4 stores"), "{error}");
        // What is misspelt is told.
        let error = parse(&with(&clouds("bukket = 1"))).unwrap_err();
        assert!(
            matches!(&error, ConfigError::Parse { source, .. } if source.to_string().contains("bukket")),
            "{error:?}"
        );
        let bucket = parse(&with("[bucket]\nbucket = 'abc'\nprefix = 'west-1'")).unwrap().bucket.unwrap();
        assert_eq!((bucket.region.as_str(), bucket.credentials_file), ("us-east-1", None));
    }
}
