//! A vCPU that stands between two instructions.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::refused;
use crate::vmm::{VmmError, kvm_error};

/// Most model specific registers of a vCPU; KVM knows some 150.
const MAX_MSRS: usize = 1024;
/// The timer's deadline counts by the TSC, so it is set when that is.
const TSC_DEADLINE: u32 = 0x6e0;
/// The time stamp counter.
const TSC: u32 = 0x10;
/// Millionths by which a TSC may be faster or slower than the one that a guest knows where it cannot be scaled: what a guest's
/// own correction of its clock can make up for (adjtimex(2)).
const TSC_TOLERANCE: u32 = 500;
/// The local APIC's base: part of the system registers, and to be set with them.
const APIC_BASE: u32 = 0x1b;

/// Memory types: firmware sets them, guests may, and KVM does not list them.
const MEMORY_TYPES: [std::ops::RangeInclusive<u32>; 6] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x277..=0x277, 0x2ff..=0x2ff];

/// Everything that a guest can see of a vCPU. Structures are KVM's own (Documentation/virt/kvm/api.rst), as bytes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// What the processor says of itself.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Ticks of its TSC in a millisecond; absent where KVM does not say.
    pub tsc_khz: Option<u32>,
    /// Running, halted or waiting for its start.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments and control registers.
    pub sregs: kvm_sregs,
    /// Debug registers.
    pub debugregs: kvm_debugregs,
    /// Floating point and vectors.
    pub xsave: kvm_xsave,
    /// Which of them are on.
    pub xcrs: kvm_xcrs,
    /// The local APIC.
    pub lapic: kvm_lapic_state,
    /// Model specific registers.
    pub msrs: Vec<kvm_msr_entry>,
    /// Interrupts and exceptions on their way.
    pub events: kvm_vcpu_events,
}

/// Reads a vCPU whose thread has ended, and which was given this CPUID.
///
/// # Errors
/// When KVM refuses.
pub fn save(kvm: &Kvm, vcpu: &VcpuFd, cpuid: Vec<kvm_cpuid_entry2>) -> Result<VcpuState, VmmError> {
    // First: reading it settles what is pending in the local APIC.
    let mp_state = vcpu.get_mp_state().map_err(kvm_error("tell whether a vCPU runs"))?;
    let read = "read a vCPU";
    Ok(VcpuState {
        mp_state,
        cpuid,
        tsc_khz: vcpu.get_tsc_khz().ok(),
        regs: vcpu.get_regs().map_err(kvm_error(read))?,
        sregs: vcpu.get_sregs().map_err(kvm_error(read))?,
        debugregs: vcpu.get_debug_regs().map_err(kvm_error(read))?,
        xsave: vcpu.get_xsave().map_err(kvm_error(read))?,
        xcrs: vcpu.get_xcrs().map_err(kvm_error(read))?,
        lapic: vcpu.get_lapic().map_err(kvm_error(read))?,
        msrs: read_msrs(kvm, vcpu)?,
        events: vcpu.get_vcpu_events().map_err(kvm_error(read))?,
    })
}

/// Reads the TSC of a vCPU that was read before, anew: at the moment at which the clock is read.
///
/// # Errors
/// When KVM refuses.
pub fn read_tsc(vcpu: &VcpuFd, into: &mut VcpuState) -> Result<(), VmmError> {
    let wanted = kvm_msr_entry { index: TSC, ..kvm_msr_entry::default() };
    let mut read = Msrs::from_entries(&[wanted]).map_err(|_| refused("more registers than KVM takes"))?;
    vcpu.get_msrs(&mut read).map_err(kvm_error("read a vCPU's TSC"))?;
    for (to, from) in into.msrs.iter_mut().filter(|msr| msr.index == TSC).zip(read.as_slice()) {
        to.data = from.data;
    }
    Ok(())
}

/// Whether a TSC of `here` kHz can stand for one of `wanted` kHz as it is.
fn is_near(wanted: u32, here: u32) -> bool {
    u64::from(wanted.abs_diff(here)) * 1_000_000 <= u64::from(wanted) * u64::from(TSC_TOLERANCE)
}

/// Where a TSC of so many kHz is after so many nanoseconds.
fn moved_on(tsc: u64, khz: u32, ns: u64) -> u64 {
    let ticks = u128::from(ns) * u128::from(khz) / 1_000_000;
    tsc.wrapping_add(u64::try_from(ticks).unwrap_or(0))
}

fn read_msrs(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, VmmError> {
    let list = kvm.get_msr_index_list().map_err(kvm_error("list the model specific registers"))?;
    let mut wanted: Vec<u32> = list.as_slice().iter().copied().filter(|index| *index != APIC_BASE).collect();
    wanted.extend(MEMORY_TYPES.into_iter().flatten());
    wanted.sort_unstable_by_key(|index| (*index == TSC_DEADLINE, *index));
    wanted.dedup();
    let mut entries: Vec<_> =
        wanted.into_iter().map(|index| kvm_msr_entry { index, ..kvm_msr_entry::default() }).collect();
    let mut found = Vec::with_capacity(entries.len());
    // KVM stops at a register that this processor does not have; it is left out.
    while !entries.is_empty() {
        let mut some = Msrs::from_entries(&entries).map_err(|_| refused("more registers than KVM takes"))?;
        let count = vcpu.get_msrs(&mut some).map_err(kvm_error("read model specific registers"))?;
        found.extend(some.as_slice().iter().take(count));
        entries.drain(..entries.len().min(count + 1));
    }
    Ok(found)
}

fn write_msrs(vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<(), VmmError> {
    let mut left = msrs;
    while !left.is_empty() {
        let some = Msrs::from_entries(left).map_err(|_| refused("more registers than KVM takes"))?;
        let count = vcpu.set_msrs(&some).map_err(kvm_error("set model specific registers"))?;
        let Some(bad) = left.get(count) else { break };
        // A register that this host does not have is no loss while it holds nothing.
        if bad.data != 0 {
            return Err(refused(format!("register {:#x} cannot be {:#x} here", bad.index, bad.data)));
        }
        left = &left[count + 1..];
    }
    Ok(())
}

impl VcpuState {
    /// Makes a vCPU that has just been made into this one, which was read `age_ns()` nanoseconds ago: its TSC has counted
    /// meanwhile, like the guests' clock, so that a guest that tells the time by it is right too.
    ///
    /// # Errors
    /// [`VmmError::State`] when it is not possible here, else when KVM refuses.
    pub fn restore(&self, kvm: &Kvm, vcpu: &VcpuFd, age_ns: impl Fn() -> u64) -> Result<(), VmmError> {
        if self.cpuid.len() > KVM_MAX_CPUID_ENTRIES || self.msrs.len() > MAX_MSRS {
            return Err(refused("a vCPU has more registers than there are"));
        }
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| refused("it has more CPUID than KVM takes"))?;
        vcpu.set_cpuid2(&cpuid).map_err(kvm_error("give a vCPU its CPUID"))?;
        if let (Some(khz), Ok(here)) = (self.tsc_khz, vcpu.get_tsc_khz())
            && here != khz
        {
            // Without scaling KVM takes a faster one too, but makes up for it by jumps.
            let is_scaled = kvm.check_extension(Cap::TscControl) && vcpu.set_tsc_khz(khz).is_ok();
            if !is_scaled && !is_near(khz, here) {
                let why = format!("its TSC counts {khz} kHz, and this processor's {here} kHz cannot be scaled to that");
                return Err(refused(why));
            }
        }
        let write = "set a vCPU";
        vcpu.set_mp_state(self.mp_state).map_err(kvm_error(write))?;
        vcpu.set_regs(&self.regs).map_err(kvm_error(write))?;
        // Before the local APIC, whose base and mode it holds.
        vcpu.set_sregs(&self.sregs).map_err(kvm_error(write))?;
        // SAFETY: the kernel reads the 4096 bytes of the structure. It reads more only of a guest to which features of a
        // larger area were given on request (KVM_CAP_XSAVE2), and nobody here asks for them.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(kvm_error(write))?;
        vcpu.set_xcrs(&self.xcrs).map_err(kvm_error(write))?;
        vcpu.set_debug_regs(&self.debugregs).map_err(kvm_error(write))?;
        vcpu.set_lapic(&self.lapic).map_err(kvm_error(write))?;
        let mut msrs = self.msrs.clone();
        for msr in msrs.iter_mut().filter(|msr| msr.index == TSC) {
            msr.data = moved_on(msr.data, self.tsc_khz.unwrap_or(0), age_ns());
        }
        write_msrs(vcpu, &msrs)?;
        vcpu.set_vcpu_events(&self.events).map_err(kvm_error(write))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tsc_that_is_moved_on_counts_at_its_own_rate_and_is_not_lost_in_years() {
        assert_eq!(moved_on(5, 2_000_000, 0), 5);
        assert_eq!(moved_on(5, 2_000_000, 3_000), 5 + 6_000);
        // Ten years at 4 GHz.
        assert_eq!(moved_on(0, 4_000_000, 315_360_000_000_000_000), 1_261_440_000_000_000_000);
        assert_eq!(moved_on(7, 0, u64::MAX), 7);
        assert!(is_near(2_000_000, 2_001_000) && is_near(2_000_000, 1_999_000) && !is_near(2_000_000, 2_001_001));
    }
}
