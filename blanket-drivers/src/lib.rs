//! One uniform virtual machine on any substrate.
//!
//! A guest sees the same processors, devices, disks and addresses wherever it runs. This crate says what that machine
//! is, what a back end must be able to do with it, and measures what a host can offer:
//!
//! | module | what |
//! |---|---|
//! | [`device`] | the guest-facing machine as plain data ([`MachineSpec`]): travels with the guest, never names a host's file |
//! | [`host`] | where a host's own files, sockets and taps are ([`HostArgs`]): never travels |
//! | [`backend`] | [`Backend`]: start, stop, pause, find again, freeze, thaw; typed errors; refusal by name |
//! | [`migrate`] | [`LiveMigration`]: the two halves of a live move, with the caller's decision between them |
//! | [`post_copy`] | [`PostCopy`]: memory that a move has left behind, fetched while the guest runs |
//! | [`thaw`] | [`LazyThaw`]: a frozen guest that runs before its memory is here |
//! | [`mirror`] | [`Mirroring`]: a standby that is kept by cuts, with the caller's commit between them |
//! | [`checkpoint`] | [`checkpoint::Checkpointing`]: a running guest in a file, while it runs on |
//! | [`probe`] | what the substrate really is, by measuring |
//! | [`home`] | what is kept of a guest for an agent that comes after |
//! | [`lasting`] | processes that outlive who starts them, and are found again |
//! | [`vmm`] | a virtual machine monitor of our own on `/dev/kvm`, as a library |
//!
//! ```text
//!            MachineSpec (travels)        HostArgs (stays)
//!                      \                     /
//!                       v                   v
//!   agent ---> dyn Backend: libvirt + QEMU | our VMM on /dev/kvm | Xen (PV)
//! ```

pub mod backend;
pub mod checkpoint;
pub mod device;
pub mod home;
pub mod host;
pub mod lasting;
pub mod migrate;
pub mod mirror;
pub mod post_copy;
pub mod probe;
mod signal;
pub mod thaw;
#[cfg(target_arch = "x86_64")]
pub mod vmm;

pub use backend::{Backend, BackendError, BackendResult, BoxFuture};
pub use device::MachineSpec;
pub use host::{HostArgs, Launch};
pub use migrate::LiveMigration;
pub use mirror::Mirroring;
pub use post_copy::PostCopy;
/// What a back end can run; a guest moves live inside its class only.
pub use supercloud_api::CompatClass;
pub use thaw::LazyThaw;
