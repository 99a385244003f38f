//! One PCI bus, reached by its memory-mapped configuration space (ECAM, PCI Express Base 7.2.2), without bridges.
//!
//! Each function has its registers in one memory BAR at an address that we chose and that a guest cannot change: what
//! it writes there only asks for the BAR's size. So no guest can move a device over another, over memory, or over the
//! address at which the kernel listens for it.

pub mod config;
pub mod msix;

use std::sync::{Arc, Mutex, PoisonError};

pub use config::{Capability, ConfigSpace, Identity};
pub use msix::{MessageSink, Msix, MsixState};

use super::{VmmError, bus::Registers, layout};

/// Devices on the bus, the host bridge included.
pub const SLOTS: usize = 32;
/// What each function's BAR takes of the window.
pub const BAR_BYTES: u64 = 0x8000;

/// A PCI function.
pub trait Function: Send {
    /// Reads its configuration space; the access is aligned and within 4 KiB.
    fn read_config(&mut self, offset: u16, data: &mut [u8]);
    /// Writes its configuration space; the access is aligned and within 4 KiB.
    fn write_config(&mut self, offset: u16, data: &[u8]);
}

/// Where a slot's BAR is.
#[must_use]
pub const fn bar_address(slot: u8) -> u64 {
    layout::PCI_WINDOW + slot as u64 * BAR_BYTES
}

/// The bus as a range of registers.
#[derive(Default)]
pub struct Ecam {
    functions: Vec<Option<Arc<Mutex<dyn Function>>>>,
}

impl std::fmt::Debug for Ecam {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Ecam").field("slots", &self.functions.len()).finish()
    }
}

impl Ecam {
    /// A bus with nothing but its host bridge.
    #[must_use]
    pub fn new() -> Self {
        let bridge: Arc<Mutex<dyn Function>> = Arc::new(Mutex::new(HostBridge(ConfigSpace::new(Identity {
            // Red Hat's generic host bridge, as QEMU's gpex has it.
            vendor: 0x1b36,
            device: 0x0008,
            class: 0x06_0000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        }))));
        Self { functions: vec![Some(bridge)] }
    }

    /// The slot that the next function gets.
    ///
    /// # Errors
    /// When there is none left.
    pub fn next_slot(&self) -> Result<u8, VmmError> {
        let value = self.functions.len();
        u8::try_from(value).ok().filter(|_| value < SLOTS).ok_or(VmmError::Range {
            what: "PCI devices",
            value: value as u64,
            range: "at most 31",
        })
    }

    /// Puts a function in the next slot.
    pub fn add(&mut self, function: Arc<Mutex<dyn Function>>) {
        self.functions.push(Some(function));
    }

    /// The function and the offset in its configuration space; `None` for accesses that PCI does not have.
    fn find(&self, offset: u64, bytes: usize) -> Option<(&Mutex<dyn Function>, u16)> {
        let is_good = matches!(bytes, 1 | 2 | 4) && offset.is_multiple_of(bytes as u64);
        let (slot, function) = (offset >> 15, (offset >> 12) & 7);
        if !is_good || function != 0 {
            return None;
        }
        let found = self.functions.get(usize::try_from(slot).ok()?)?.as_deref()?;
        Some((found, u16::try_from(offset & 0xfff).ok()?))
    }
}

impl Registers for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match self.find(offset, data.len()) {
            Some((function, offset)) => {
                function.lock().unwrap_or_else(PoisonError::into_inner).read_config(offset, data);
            }
            // Nobody there: all bits set.
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some((function, offset)) = self.find(offset, data.len()) {
            function.lock().unwrap_or_else(PoisonError::into_inner).write_config(offset, data);
        }
    }
}

struct HostBridge(ConfigSpace);

impl Function for HostBridge {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.0.write(offset, data);
    }
}
