//! Virtio 1.2 devices over PCI.
//!
//! | module | what |
//! |---|---|
//! | [`phase`] | which operation is legal when: one table, obeyed by the transport and by the fuzzer's model |
//! | [`transport`] | the registers: configuration space, common configuration, notifications, MSI-X |
//! | [`ring`] | a queue's chains as checked segments of guest memory |
//! | [`worker`] | the thread of a device; stopping it between two requests is how a device is paused and reset |
//! | [`block`], [`net`], [`console`], [`rng`], [`balloon`] | the devices |
//! | [`outputs`] | what cards send, held back for a mirror |
//! | [`nbd`] | a disk's bytes, where a volume process serves them |

pub mod balloon;
pub mod block;
pub mod console;
pub mod nbd;
pub mod net;
pub mod outputs;
pub mod phase;
pub mod ring;
pub mod rng;
pub mod transport;
pub mod worker;

#[cfg(test)]
mod tests;

pub use balloon::Balloon;
pub use outputs::Outputs;
pub use ring::{Ring, Segment, Segments};
pub use transport::VirtioPci;
pub(crate) use worker::borrow;
pub use worker::{Handler, Next, Wakers};

/// Feature bit: virtio 1.0 or later, which is the only kind that we speak.
pub const F_VERSION_1: u64 = 1 << 32;
/// Feature bit: chains in tables of their own.
pub const F_INDIRECT: u64 = 1 << 28;
/// Feature bit: notifications are asked for by index.
pub const F_EVENT_INDEX: u64 = 1 << 29;

/// A device as its transport sees it.
pub struct Device {
    /// Its virtio device number (5.1 to 5.20 of the specification).
    pub number: u16,
    /// Its PCI class.
    pub class: u32,
    /// Features of the device itself; the transport adds those of queues.
    pub features: u64,
    /// Most entries of each queue: powers of two.
    pub queues: Vec<u16>,
    /// Its configuration, which does not change and cannot be written, but for a balloon's.
    pub config: Vec<u8>,
    /// Of a balloon: what the machine's owner has of it, and whose configuration counts.
    pub balloon: Option<std::sync::Arc<balloon::Balloon>>,
    /// What does the work.
    pub handler: Box<dyn Handler>,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Device").field("number", &self.number).field("queues", &self.queues).finish_non_exhaustive()
    }
}
