//! The one-machine lab: several clouds, each with a host of its own, joined by an emulated WAN.
//!
//! A lab host is not a container of somebody's making but a handful of namespaces with a small init
//! ([`host_init`]); in it run a real Open vSwitch, a real libvirtd and our agent, as on a rented machine. The WAN between
//! hosts is a relay of our own ([`wan`]). Everything is found again from the lab's state folder and its number, so that a lab can
//! be taken down after any crash, and a second start always works.
//!
//! ```no_run
//! # use supercloud_lab::{Lab, LabSpec, Which};
//! let lab = Lab::start(LabSpec::three_clouds("trial"))?;
//! lab.partition("aws-east", "home")?;
//! lab.kill_process("gcp-west", Which::Libvirtd, libc::SIGKILL)?;
//! lab.restart_libvirtd("gcp-west")?;
//! lab.heal_all()?;
//! assert!(lab.leftovers().is_empty());
//! lab.stop()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! All calls block; on an async runtime use `spawn_blocking`.

pub mod addressing;
pub mod bench;
pub mod command;
pub mod demo;
pub mod fleet;
pub mod host_init;
pub mod host_vm;
pub mod image;
pub mod interrupt;
pub mod lab;
pub mod leftovers;
pub mod libvirt_conf;
pub mod netns;
pub mod process;
pub mod require;
pub mod site;
pub mod spec;
pub mod state;
pub mod wan;

pub use host_init::ProcessSpec;
pub use lab::{Lab, LabError, Which, down};
pub use site::Site;
pub use spec::{CONTROLLER, Datapath, HostSpec, LabSpec, LinkShape, LinkSpec};
