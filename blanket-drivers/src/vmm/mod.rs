//! A virtual machine monitor of our own, as a library: threads and descriptors, no runtime.
//!
//! | module | what |
//! |---|---|
//! | [`layout`] | where what lies in the guest's physical address space |
//! | [`memory`] | the guest's memory, a sealed memfd |
//! | [`kvm`] | a VM of KVM with its interrupt chips inside the kernel |
//! | [`cpu`] | what a vCPU says of itself and how it starts |
//! | [`vcpu`] | a thread per vCPU that can be paused, resumed and ended |
//! | [`boot`] | kernels (bzImage, ELF with a PVH entry), initial ramdisk, command line |
//! | [`acpi`] | the tables by which the guest finds its devices |
//! | [`bus`] | which device answers at which address |
//! | [`legacy`] | serial port, power and reset registers, the old keyboard controller's reset |
//! | [`pci`] | one PCI bus, MSI-X |
//! | [`virtio`] | virtio 1.2 devices: disk, network card, console, entropy source |
//! | [`machine`] | all of it together |
//! | [`state`] | what a machine is beside its memory, saved and restored |
//! | [`travel`] | a machine on its way to another process or host, while its guest runs |
//!
//! Everything that a guest can write is hostile: each register access is a fixed number of bytes at a checked offset,
//! every address that comes out of guest memory goes through checked accessors, and nothing that a guest does makes us
//! allocate more than a fixed amount, panic or wait without bound.

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod cpu;
pub mod kvm;
pub mod layout;
pub mod lease;
pub mod legacy;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod state;
pub mod travel;
pub mod vcpu;
pub mod version;
pub mod virtio;

pub use lease::Lease;
pub use machine::{Incoming, Machine, MachineConfig, Outcome};
pub use memory::Ram;

use std::io;

/// Why a machine could not be made or driven.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// An operation of `/dev/kvm` failed.
    #[error("/dev/kvm cannot {what}")]
    Kvm {
        /// What it should do.
        what: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// A feature that this VMM needs is not there.
    #[error("/dev/kvm has no {0}, which is needed")]
    Lacks(&'static str),
    /// A number outside of its range.
    #[error("{what} is {value}; it must be {range}")]
    Range {
        /// What.
        what: &'static str,
        /// What it is.
        value: u64,
        /// What it may be, in words.
        range: &'static str,
    },
    /// The guest's memory could not be made, or does not reach where something has to go.
    #[error("guest memory: {what}")]
    Memory {
        /// What was to be done.
        what: &'static str,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A system call failed.
    #[error("{what}")]
    Io {
        /// What was to be done.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The kernel, the ramdisk or the command line cannot be loaded.
    #[error("the kernel cannot be loaded")]
    Boot(#[from] boot::BootError),
    /// Two devices want the same addresses.
    #[error("{name} wants addresses from {at:#x} on that another device has or that do not exist")]
    Overlap {
        /// The later device.
        name: &'static str,
        /// The first address that it wants.
        at: u64,
    },
    /// A saved state that cannot be restored here.
    #[error("the machine's state cannot be restored: {what}")]
    State {
        /// Why.
        what: String,
    },
    /// A vCPU did not come out of the kernel in time.
    #[error("vCPU {index} does not answer")]
    Stuck {
        /// Which.
        index: u8,
    },
    /// The machine has ended.
    #[error("the machine has ended")]
    Ended,
}

/// Says what `/dev/kvm` should have done.
pub(crate) fn kvm_error(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmmError {
    move |source| VmmError::Kvm { what, source }
}

/// Says what was to be done with guest memory.
pub(crate) fn memory_error<E>(what: &'static str) -> impl FnOnce(E) -> VmmError
where
    E: std::error::Error + Send + Sync + 'static,
{
    move |source| VmmError::Memory { what, source: Box::new(source) }
}

/// Says what was to be done.
pub(crate) fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> VmmError {
    move |source| VmmError::Io { what, source }
}
