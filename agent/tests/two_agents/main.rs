//! Two and three agents in one process, over real TLS, with real volume processes; the hypervisor and the controller are test
//! doubles, the ownership protocol is the real one.

#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

mod buckets;
mod checkpoints;
mod checks;
mod consoles;
mod controller;
mod crashes;
mod freezes;
mod hypervisor;
mod lab;
mod lazily_thawing;
mod lazy_thaws;
mod leases;
mod mirroring;
mod mirrors;
mod moves;
mod nbd;
mod paths;
mod points;
mod post_copies;
mod post_copying;
mod sweeps;
mod wire;
