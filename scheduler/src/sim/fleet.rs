//! Fleets of guests to replay, and the one that ships.

use serde::{Deserialize, Serialize};

use crate::{
    evacuable::{Load, Path},
    policy::Guest,
};

/// Guests of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kind {
    /// What they are called.
    pub name: String,
    /// How many there are.
    pub count: u32,
    /// Virtual CPUs of each.
    pub vcpus: u32,
    /// Memory of each, in MiB.
    pub memory_mib: u64,
    /// Memory written per second, in MiB.
    pub dirty_mib_per_s: u64,
    /// The memory that it keeps writing, in MiB.
    pub working_set_mib: u64,
    /// Volume blocks that are nowhere else when a notice comes, in MiB.
    pub volume_dirty_mib: u64,
    /// What its host's link carries, in Mbit/s.
    pub link_mbit_per_s: u64,
}

/// A fleet, and what holds for all of its guests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fleet {
    /// Memory that a host keeps for itself, in MiB.
    #[serde(default = "host_reserve_mib")]
    pub host_reserve_mib: u64,
    /// From asking for a host until it takes guests, in seconds.
    #[serde(default = "host_ready_s")]
    pub host_ready_s: u64,
    /// From a host that is ready to a guest that serves, when it has to boot, in seconds.
    #[serde(default = "restart_s")]
    pub restart_s: u64,
    /// The downtime at which a live move switches, in milliseconds.
    #[serde(default = "max_downtime_ms")]
    pub max_downtime_ms: u64,
    /// What a switch costs whatever its size, in milliseconds.
    #[serde(default = "switch_ms")]
    pub switch_ms: u64,
    /// Time between background checkpoints, in seconds.
    #[serde(default = "checkpoint_s")]
    pub checkpoint_s: u64,
    /// What a GB (10^9 bytes) costs that leaves its zone, in nano-dollars, both ways together.
    #[serde(default = "egress_nanousd_per_gb")]
    pub egress_nanousd_per_gb: u64,
    /// The guests.
    #[serde(rename = "guests")]
    pub kinds: Vec<Kind>,
}

fn host_reserve_mib() -> u64 {
    256
}
fn host_ready_s() -> u64 {
    60
}
fn restart_s() -> u64 {
    60
}
fn max_downtime_ms() -> u64 {
    300
}
fn switch_ms() -> u64 {
    200
}
fn checkpoint_s() -> u64 {
    30
}
/// Between two zones of one region: 0.01 USD each way (AWS list price).
fn egress_nanousd_per_gb() -> u64 {
    20_000_000
}

/// The most guests in a fleet.
pub const MAX_GUESTS: u64 = 10_000;

impl Default for Fleet {
    /// 56 guests of 1 to 64 GiB: web front ends, application servers, data bases and caches.
    fn default() -> Self {
        let kind = |name: &str, (count, vcpus), memory_mib, dirty, set, volume, link| Kind {
            name: name.into(),
            count,
            vcpus,
            memory_mib,
            dirty_mib_per_s: dirty,
            working_set_mib: set,
            volume_dirty_mib: volume,
            link_mbit_per_s: link,
        };
        Self {
            host_reserve_mib: host_reserve_mib(),
            host_ready_s: host_ready_s(),
            restart_s: restart_s(),
            max_downtime_ms: max_downtime_ms(),
            switch_ms: switch_ms(),
            checkpoint_s: checkpoint_s(),
            egress_nanousd_per_gb: egress_nanousd_per_gb(),
            kinds: vec![
                kind("front", (16, 1), 1 << 10, 2, 128, 16, 750),
                kind("worker", (12, 1), 2 << 10, 10, 512, 64, 750),
                kind("app", (10, 1), 3 << 10, 20, 1024, 128, 1000),
                kind("service", (8, 2), 7 << 10, 30, 2048, 256, 2000),
                kind("cache", (4, 2), 14 << 10, 60, 6144, 64, 2500),
                kind("database", (3, 4), 30 << 10, 80, 8192, 512, 5000),
                kind("warehouse", (2, 8), 60 << 10, 120, 12_288, 512, 5000),
                kind("model", (1, 8), 64 << 10, 40, 4096, 128, 5000),
            ],
        }
    }
}

impl Fleet {
    /// What is wrong with the fleet, if anything.
    ///
    /// # Errors
    /// A sentence that names the field and its range.
    pub fn check(&self) -> Result<(), String> {
        let count: u64 = self.kinds.iter().map(|kind| u64::from(kind.count)).sum();
        if !(1..=MAX_GUESTS).contains(&count) {
            return Err(format!("the fleet has {count} guests; it must have 1 to {MAX_GUESTS}"));
        }
        for kind in &self.kinds {
            let name: String = kind.name.chars().take(40).collect();
            for (field, value, least, most) in [
                ("vcpus", u64::from(kind.vcpus), 1, 4096),
                ("memory_mib", kind.memory_mib, 1, 1 << 26),
                ("dirty_mib_per_s", kind.dirty_mib_per_s, 0, 1 << 20),
                ("working_set_mib", kind.working_set_mib, 0, kind.memory_mib),
                ("volume_dirty_mib", kind.volume_dirty_mib, 0, 1 << 26),
                ("link_mbit_per_s", kind.link_mbit_per_s, 1, 1 << 20),
            ] {
                if !(least..=most).contains(&value) {
                    return Err(format!("guests '{name}': {field} is {value}; it must be {least} to {most}"));
                }
            }
        }
        for (field, value) in [
            ("host_ready_s", self.host_ready_s),
            ("restart_s", self.restart_s),
            ("checkpoint_s", self.checkpoint_s),
            ("max_downtime_ms", self.max_downtime_ms / 1000),
            ("switch_ms", self.switch_ms / 1000),
        ] {
            if value > 86_400 {
                return Err(format!("{field} is longer than a day"));
            }
        }
        if self.host_reserve_mib > 1 << 26 || self.egress_nanousd_per_gb > 1_000_000_000_000 {
            return Err("host_reserve_mib or egress_nanousd_per_gb is out of range".into());
        }
        Ok(())
    }

    /// The guests, one by one.
    #[must_use]
    pub fn guests(&self) -> Vec<Guest> {
        const MIB: u64 = 1 << 20;
        let guest = |kind: &Kind| Guest {
            vcpus: kind.vcpus,
            load: Load {
                memory_bytes: kind.memory_mib * MIB,
                dirty_bytes_per_s: kind.dirty_mib_per_s * MIB,
                working_set_bytes: kind.working_set_mib * MIB,
                volume_dirty_bytes: kind.volume_dirty_mib * MIB,
            },
            path: Path {
                link_bytes_per_s: kind.link_mbit_per_s * 125_000,
                host_ready_ms: self.host_ready_s * 1000,
                max_downtime_ms: self.max_downtime_ms,
                switch_ms: self.switch_ms,
                checkpoint_ms: self.checkpoint_s * 1000,
            },
            egress_nanousd_per_gb: self.egress_nanousd_per_gb,
        };
        self.kinds.iter().flat_map(|kind| std::iter::repeat_n(guest(kind), kind.count as usize)).collect()
    }
}
