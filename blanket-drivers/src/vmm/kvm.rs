//! A VM of KVM: memory slots, interrupt chips inside the kernel, no timer of old (PIT): guests have kvmclock and their
//! local APIC's timer.

use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_msi};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _, MmapRegion};

use super::{Ram, VmmError, kvm_error, layout, memory};

/// What a machine cannot do without.
const NEEDED: [(Cap, &str); 8] = [
    (Cap::Irqchip, "interrupt chips"),
    (Cap::UserMemory, "memory slots"),
    (Cap::SetTssAddr, "place for a task state segment"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::SignalMsi, "message signalled interrupts"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::ExtCpuid, "CPUID"),
    (Cap::VcpuEvents, "vCPU events"),
];

/// A virtual machine in the kernel. It keeps the guest's memory mapped for as long as it lives.
#[derive(Debug)]
pub struct Vm {
    // Dropped before the memory, which the kernel uses until then.
    fd: VmFd,
    kvm: Kvm,
    ram: Arc<Ram>,
}

impl Vm {
    /// A VM with this memory.
    ///
    /// # Errors
    /// When `/dev/kvm` lacks something or refuses.
    pub fn new(kvm: Kvm, ram: Arc<Ram>) -> Result<Self, VmmError> {
        for (cap, name) in NEEDED {
            if !kvm.check_extension(cap) {
                return Err(VmmError::Lacks(name));
            }
        }
        let fd = kvm.create_vm().map_err(kvm_error("make a virtual machine"))?;
        // Before anything else: where Intel's processors run real mode from.
        fd.set_identity_map_address(layout::KVM_IDENTITY).map_err(kvm_error("place its identity map"))?;
        let tss = usize::try_from(layout::KVM_TSS).map_err(super::memory_error("KVM's own pages"))?;
        fd.set_tss_address(tss).map_err(kvm_error("place its task state segment"))?;
        fd.create_irq_chip().map_err(kvm_error("make interrupt chips"))?;
        for slot in memory::slots(&ram, 0) {
            // SAFETY: the slot is one mapping of `ram`, which this VM holds and which is unmapped after it.
            unsafe { fd.set_user_memory_region(slot) }.map_err(kvm_error("take a guest's memory"))?;
        }
        Ok(Self { fd, kvm, ram })
    }

    /// Begins, or ends, to note which pages are written; what was noted before is forgotten.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn note_writes(&self, is_wanted: bool) -> Result<(), VmmError> {
        for flags in [0, KVM_MEM_LOG_DIRTY_PAGES].into_iter().take(if is_wanted { 2 } else { 1 }) {
            for slot in memory::slots(&self.ram, flags) {
                // SAFETY: the slot as it is already, with other flags.
                unsafe { self.fd.set_user_memory_region(slot) }.map_err(kvm_error("note what a guest writes"))?;
            }
        }
        for region in self.ram.iter() {
            MmapRegion::bitmap(region).reset();
        }
        Ok(())
    }

    /// The pages that were written since the last call: by the guest, which KVM notes, and by devices, which we note.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn take_written(&self) -> Result<Vec<u64>, VmmError> {
        let mut pages = Vec::new();
        for (slot, region) in (0..).zip(self.ram.iter()) {
            let bytes = usize::try_from(region.len()).map_err(super::memory_error("its size"))?;
            let guest = self.fd.get_dirty_log(slot, bytes).map_err(kvm_error("tell what a guest wrote"))?;
            let ours = MmapRegion::bitmap(region).get_and_reset();
            let first = region.start_addr().0 / memory::PAGE_BYTES;
            let last = first + region.len() / memory::PAGE_BYTES;
            for (word, at) in (0..guest.len().max(ours.len())).zip((first..).step_by(64)) {
                let mut bits = guest.get(word).copied().unwrap_or(0) | ours.get(word).copied().unwrap_or(0);
                while bits != 0 {
                    pages.push(at + u64::from(bits.trailing_zeros()));
                    bits &= bits - 1;
                }
            }
            while pages.last().is_some_and(|page| *page >= last) {
                pages.pop();
            }
        }
        Ok(pages)
    }

    /// The guest's memory.
    #[must_use]
    pub const fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// KVM itself.
    #[must_use]
    pub const fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The VM's descriptor.
    #[must_use]
    pub const fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// The CPUID that KVM can give to guests here.
    ///
    /// # Errors
    /// When it does not say.
    pub fn supported_cpuid(&self) -> Result<CpuId, VmmError> {
        self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm_error("tell its CPUID"))
    }

    /// Makes a vCPU.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, VmmError> {
        self.fd.create_vcpu(index.into()).map_err(kvm_error("make a vCPU"))
    }

    /// Pulses the line of an edge-triggered interrupt of the I/O APIC.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn pulse(&self, irq: u32) -> Result<(), VmmError> {
        self.fd.set_irq_line(irq, true).map_err(kvm_error("raise an interrupt"))?;
        self.fd.set_irq_line(irq, false).map_err(kvm_error("lower an interrupt"))
    }

    /// Sends a message signalled interrupt as a device's MSI-X table says. The guest wrote address and data: the kernel
    /// drops what names no local APIC.
    pub fn signal_msi(&self, address: u64, data: u32) {
        #[expect(clippy::cast_possible_truncation, reason = "the two halves of an address")]
        let message =
            kvm_msi { address_lo: address as u32, address_hi: (address >> 32) as u32, data, ..kvm_msi::default() };
        // An interrupt that a guest sends nowhere is its own loss.
        let _ = self.fd.signal_msi(message);
    }
}
