//! What a lab consists of: hosts in clouds, and the WAN links between them. Plain data, checked before anything is made.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::host_vm::{Hardware, Hypervisor};

/// The site name under which the controller is attached to the WAN.
pub const CONTROLLER: &str = "controller";

/// Most hosts in one lab: they are numbered in the last byte of their address.
pub const MAX_HOSTS: usize = 64;

/// A lab that cannot be made.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SpecError {
    /// A name that would not be safe in file, interface or namespace names.
    #[error("{what} {name:?} is not 1-{max} characters of a-z, 0-9 and '-', beginning with a letter")]
    BadName {
        /// What is named.
        what: &'static str,
        /// The name given.
        name: String,
        /// Longest allowed.
        max: usize,
    },
    /// Two hosts of one name.
    #[error("two hosts are named {0:?}")]
    Twice(String),
    /// No host, or too many.
    #[error("a lab has 1-{MAX_HOSTS} hosts, not {0}")]
    HostCount(usize),
    /// A host with Xen that is not a virtual machine.
    #[error("host {0:?} has Xen: it must be a virtual machine (vm = ...)")]
    XenWithoutVm(String),
    /// A link to a site that does not exist.
    #[error("there is no host {0:?} in this lab")]
    UnknownSite(String),
    /// A link from a site to itself.
    #[error("a link joins two different sites, not {0:?} with itself")]
    SelfLink(String),
    /// A number out of range.
    #[error("{what} of the link {a} - {b} is out of range: {value}")]
    OutOfRange {
        /// What number.
        what: &'static str,
        /// One end.
        a: String,
        /// The other end.
        b: String,
        /// The value given.
        value: String,
    },
}

/// One emulated WAN link, the same in both directions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinkSpec {
    /// One end: a host's name or [`CONTROLLER`].
    pub a: String,
    /// The other end.
    pub b: String,
    /// The shape of the link.
    #[serde(flatten)]
    pub shape: LinkShape,
}

/// Delay, rate, loss and queue of a link.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LinkShape {
    /// Round-trip time, milliseconds; each direction delays by half of it.
    pub rtt_ms: f64,
    /// Rate of each direction, Mbit/s; 0 is unlimited.
    pub rate_mbit: u32,
    /// Packets lost at random, per million, each direction.
    pub loss_ppm: u32,
    /// Bytes that may wait to be sent when the rate is exceeded; more is dropped from the tail.
    pub queue_bytes: u64,
}

impl Default for LinkShape {
    fn default() -> Self {
        Self { rtt_ms: 1.0, rate_mbit: 1000, loss_ppm: 0, queue_bytes: 2 << 20 }
    }
}

impl LinkShape {
    /// A lossless link of this round-trip time and rate.
    #[must_use]
    pub fn new(rtt_ms: f64, rate_mbit: u32) -> Self {
        Self { rtt_ms, rate_mbit, ..Self::default() }
    }

    /// Checks the ranges; the names are for the message.
    ///
    /// # Errors
    /// The first number out of range.
    pub fn check(&self, a: &str, b: &str) -> Result<(), SpecError> {
        let wrong = |what, value: String| Err(SpecError::OutOfRange { what, a: a.to_owned(), b: b.to_owned(), value });
        if !(0.0..=10_000.0).contains(&self.rtt_ms) {
            return wrong("rtt_ms", self.rtt_ms.to_string());
        }
        if self.rate_mbit > 100_000 {
            return wrong("rate_mbit", self.rate_mbit.to_string());
        }
        if self.loss_ppm > 1_000_000 {
            return wrong("loss_ppm", self.loss_ppm.to_string());
        }
        if !(2_000..=1 << 30).contains(&self.queue_bytes) {
            return wrong("queue_bytes", self.queue_bytes.to_string());
        }
        Ok(())
    }
}

/// A host of the lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostSpec {
    /// Its name, unique in the lab.
    pub name: String,
    /// The cloud that it is rented in.
    pub cloud: String,
    /// What it is made of when it is a virtual machine, and not a handful of this machine's namespaces.
    #[serde(default)]
    pub vm: Option<Hardware>,
    /// What its guests run on when it is a virtual machine.
    #[serde(default)]
    pub hypervisor: Hypervisor,
}

/// Which packet engine the hosts' switches use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Datapath {
    /// Open vSwitch's own, in user space: works on every kernel.
    #[default]
    Userspace,
    /// The kernel module `openvswitch`, which must be there.
    Kernel,
}

/// A whole lab.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LabSpec {
    /// Its name; labs of different names live side by side.
    pub name: String,
    /// The hosts.
    pub hosts: Vec<HostSpec>,
    /// Links that differ from [`LinkShape::default`].
    #[serde(default)]
    pub links: Vec<LinkSpec>,
    /// The packet engine of the hosts' switches.
    #[serde(default)]
    pub datapath: Datapath,
    /// Whether hosts get a libvirtd.
    #[serde(default = "yes")]
    pub libvirt: bool,
    /// Whether hosts get an Open vSwitch.
    #[serde(default = "yes")]
    pub switch: bool,
    /// Seed of the links' losses, so that a run can be repeated.
    #[serde(default = "default_seed")]
    pub seed: u64,
}

fn yes() -> bool {
    true
}

fn default_seed() -> u64 {
    1
}

impl LabSpec {
    /// The demo's lab: `aws-east`, `gcp-west` and `home`, 40/90/140 ms apart at 200 Mbit/s; the controller sits near `home`.
    #[must_use]
    pub fn three_clouds(name: &str) -> Self {
        let host = |host: &str| HostSpec {
            name: host.to_owned(),
            cloud: host.to_owned(),
            vm: None,
            hypervisor: Hypervisor::Kvm,
        };
        let link = |a: &str, b: &str, rtt_ms| LinkSpec {
            a: a.to_owned(),
            b: b.to_owned(),
            shape: LinkShape::new(rtt_ms, 200),
        };
        Self {
            hosts: ["aws-east", "gcp-west", "home"].map(host).to_vec(),
            links: vec![
                link("aws-east", "home", 40.0),
                link("aws-east", "gcp-west", 90.0),
                link("gcp-west", "home", 140.0),
                link(CONTROLLER, "aws-east", 40.0),
                link(CONTROLLER, "gcp-west", 90.0),
                link(CONTROLLER, "home", 10.0),
            ],
            ..Self::empty(name)
        }
    }

    /// The same three clouds, each of other hardware, with a VM for a host in each.
    #[must_use]
    pub fn three_clouds_of_vms(name: &str) -> Self {
        let mut spec = Self::three_clouds(name);
        for (host, hardware) in spec.hosts.iter_mut().zip(Hardware::ALL) {
            host.vm = Some(hardware);
        }
        spec
    }

    /// Likewise, each with Xen between it and its hardware: its guests are paravirtual.
    #[must_use]
    pub fn three_clouds_of_xen(name: &str) -> Self {
        let mut spec = Self::three_clouds_of_vms(name);
        for host in &mut spec.hosts {
            host.hypervisor = Hypervisor::Xen;
        }
        spec
    }

    /// `count` hosts `h1`, `h2`, ... in one cloud each (`c1`, ...), joined by default links.
    #[must_use]
    pub fn plain(name: &str, count: usize) -> Self {
        let hosts = (1..=count)
            .map(|i| HostSpec { name: format!("h{i}"), cloud: format!("c{i}"), vm: None, hypervisor: Hypervisor::Kvm })
            .collect();
        Self { hosts, ..Self::empty(name) }
    }

    fn empty(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            hosts: Vec::new(),
            links: Vec::new(),
            datapath: Datapath::default(),
            libvirt: true,
            switch: true,
            seed: default_seed(),
        }
    }

    /// Checks names, ends and numbers.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), SpecError> {
        check_name("the lab", &self.name, 24)?;
        if self.hosts.is_empty() || self.hosts.len() > MAX_HOSTS {
            return Err(SpecError::HostCount(self.hosts.len()));
        }
        for (at, host) in self.hosts.iter().enumerate() {
            check_name("host", &host.name, 24)?;
            check_name("cloud", &host.cloud, 40)?;
            if host.name == CONTROLLER || self.hosts[..at].iter().any(|other| other.name == host.name) {
                return Err(SpecError::Twice(host.name.clone()));
            }
            if host.hypervisor == Hypervisor::Xen && host.vm.is_none() {
                return Err(SpecError::XenWithoutVm(host.name.clone()));
            }
        }
        for link in &self.links {
            for end in [&link.a, &link.b] {
                self.site_number(end)?;
            }
            if link.a == link.b {
                return Err(SpecError::SelfLink(link.a.clone()));
            }
            link.shape.check(&link.a, &link.b)?;
        }
        Ok(())
    }

    /// The number of a site in addresses: hosts count from 1, the controller is 254.
    ///
    /// # Errors
    /// When there is no such site.
    pub fn site_number(&self, site: &str) -> Result<u8, SpecError> {
        if site == CONTROLLER {
            return Ok(254);
        }
        self.hosts
            .iter()
            .position(|host| host.name == site)
            .and_then(|at| u8::try_from(at + 1).ok())
            .ok_or_else(|| SpecError::UnknownSite(site.to_owned()))
    }

    /// All sites: the hosts, then the controller.
    pub fn sites(&self) -> impl Iterator<Item = &str> {
        self.hosts.iter().map(|host| host.name.as_str()).chain([CONTROLLER])
    }
}

/// Names end up in namespaces, interfaces, files and host names.
pub(crate) fn check_name(what: &'static str, name: &str, max: usize) -> Result<(), SpecError> {
    let plain = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    let first = name.chars().next().is_some_and(|c| c.is_ascii_lowercase());
    if plain && first && name.len() <= max && !name.ends_with('-') {
        Ok(())
    } else {
        Err(SpecError::BadName { what, name: name.to_owned(), max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_lab_is_good() {
        assert_eq!(LabSpec::three_clouds("demo").check(), Ok(()));
        assert_eq!(LabSpec::plain("x", MAX_HOSTS).check(), Ok(()));
        assert_eq!(LabSpec::three_clouds_of_xen("x").check(), Ok(()));
    }

    #[test]
    fn wrong_labs_are_refused_by_name() {
        let good = LabSpec::plain("x", 2);
        let with = |change: &dyn Fn(&mut LabSpec)| {
            let mut spec = good.clone();
            change(&mut spec);
            spec.check().unwrap_err()
        };
        assert!(matches!(with(&|s| s.name = "../x".into()), SpecError::BadName { what: "the lab", .. }));
        assert!(matches!(with(&|s| s.name = String::new()), SpecError::BadName { .. }));
        assert!(matches!(with(&|s| s.hosts[0].name = "h 1".into()), SpecError::BadName { what: "host", .. }));
        assert_eq!(with(&|s| s.hosts[1].name = "h1".into()), SpecError::Twice("h1".into()));
        assert_eq!(with(&|s| s.hosts[1].name = CONTROLLER.into()), SpecError::Twice(CONTROLLER.into()));
        assert_eq!(with(&|s| s.hosts.clear()), SpecError::HostCount(0));
        assert_eq!(with(&|s| s.hosts[1].hypervisor = Hypervisor::Xen), SpecError::XenWithoutVm("h2".into()));
        let link = |a: &str, b: &str, shape| LinkSpec { a: a.into(), b: b.into(), shape };
        let shape = LinkShape::default();
        assert_eq!(with(&|s| s.links = vec![link("h1", "h9", shape)]), SpecError::UnknownSite("h9".into()));
        assert_eq!(with(&|s| s.links = vec![link("h1", "h1", shape)]), SpecError::SelfLink("h1".into()));
        for bad in [
            LinkShape { rtt_ms: f64::NAN, ..shape },
            LinkShape { rtt_ms: -1.0, ..shape },
            LinkShape { loss_ppm: 1_000_001, ..shape },
            LinkShape { queue_bytes: 0, ..shape },
        ] {
            let error = with(&|s| s.links = vec![link("h1", CONTROLLER, bad)]);
            assert!(matches!(error, SpecError::OutOfRange { .. }), "{error}");
        }
    }
}
