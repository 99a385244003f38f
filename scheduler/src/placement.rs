//! Why a host does not take a guest. The decision itself is [`crate::cluster`]'s.

use serde::Serialize;

use crate::cluster::Domain;

/// Why a host was not chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// It is not the place that was asked for.
    #[error("is not the place asked for")]
    NotAskedFor,
    /// The guest is there already, or may not go there.
    #[error("is excluded")]
    Excluded,
    /// Its agent is away.
    #[error("its agent is not connected")]
    Down,
    /// It takes no new guests.
    #[error("is cordoned")]
    Cordoned,
    /// It does not offer the class.
    #[error("does not offer the compat class {0}")]
    Class(String),
    /// Too few virtual CPUs.
    #[error("has {free} vCPUs free, {need} are needed")]
    Vcpus {
        /// Free.
        free: u32,
        /// Needed.
        need: u32,
    },
    /// Too little memory.
    #[error("has {free_mib} MiB of memory free, {need_mib} are needed")]
    Memory {
        /// Free, in MiB.
        free_mib: u64,
        /// Needed, in MiB.
        need_mib: u64,
    },
    /// Its domain is not among those allowed.
    #[error("stands in a {0} that is not allowed")]
    NotAllowed(Domain),
    /// Its domain is ruled out.
    #[error("stands in a {0} that is ruled out")]
    Denied(Domain),
    /// It is kept for another project.
    #[error("is kept for another project")]
    Project,
    /// Too far from the clients; `ms` is unknown when nobody measured it.
    #[error("is {} from the place, {most_ms} ms are allowed", ms.map_or_else(|| "an unknown time".to_owned(), |ms| format!("{ms} ms")))]
    Latency {
        /// The round trip.
        ms: Option<u32>,
        /// The longest that is allowed.
        most_ms: u32,
    },
    /// Enough members of a group that keeps apart are there.
    #[error("stands in a {domain} in which {here} of the group's {most} are already")]
    Crowded {
        /// Which kind of domain.
        domain: Domain,
        /// Members there.
        here: u32,
        /// The most.
        most: u32,
    },
    /// The group that stays together is elsewhere.
    #[error("stands in another {0} than the rest of the group")]
    Elsewhere(Domain),
    /// The project's quota would be passed, wherever it goes.
    #[error("the project's quota is used up")]
    Quota,
    /// Too little disk.
    #[error("has {free_mib} MiB of disk free, {need_mib} are needed")]
    Disk {
        /// Free, in MiB.
        free_mib: u64,
        /// Needed, in MiB.
        need_mib: u64,
    },
}
