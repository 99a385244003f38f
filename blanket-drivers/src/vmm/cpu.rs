//! What a vCPU says of itself (CPUID) and the state in which it starts.
//!
//! Formats: Intel SDM volume 2 (CPUID) and volume 3 chapter 3 (segments), AMD APM volume 3 appendix E, Linux'
//! `Documentation/arch/x86/boot.rst` (64-bit start) and Xen's `docs/misc/pvh.pandoc` (PVH start).

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_fpu, kvm_lapic_state,
    kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use supercloud_api::cpu::{ARCH_CAPABILITIES, CpuBaseline};
use vm_memory::{Bytes as _, GuestAddress};

use super::{Ram, VmmError, kvm_error, layout, memory_error, state, state::cpuid::ARCH_CAPABILITIES_MSR};

/// Most vCPUs: x2APIC ids below 255 need no interrupt remapping, and `MachineSpec` allows 64.
pub const MAX_VCPUS: u8 = 64;

/// Where and how the first vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit mode, the zero page in RSI.
    Linux64 {
        /// The first instruction.
        at: u64,
    },
    /// 32-bit protected mode without paging, the start information in EBX.
    Pvh {
        /// The first instruction.
        at: u32,
    },
}

/// Registers of CPUID as a guest sees them, for one vCPU of so many.
///
/// Everything is as KVM supports it, but: who the vCPU is among the others; nested virtualization is hidden (its state
/// does not move yet); and what KVM does itself and does not list is added (x2APIC, the timer's TSC deadline).
#[must_use]
pub fn cpuid(supported: &CpuId, index: u8, vcpus: u8, has_tsc_deadline: bool) -> Vec<kvm_cpuid_entry2> {
    const HYPERVISOR: u32 = 1 << 31;
    const TSC_DEADLINE: u32 = 1 << 24;
    const X2APIC: u32 = 1 << 21;
    const VMX: u32 = 1 << 5;
    const HTT: u32 = 1 << 28;
    const SVM: u32 = 1 << 2;
    let id = u32::from(index);
    let count = u32::from(vcpus);
    // Bits of the APIC id that number the cores of the one socket.
    let width = count.next_power_of_two().trailing_zeros();
    let mut entries = supported.as_slice().to_vec();
    // Topology is written anew below, so that there is one leaf of each kind whatever the host has.
    entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f));
    let mut max_basic = 0;
    for entry in &mut entries {
        match entry.function {
            0 => {
                entry.eax = entry.eax.max(0xb);
                max_basic = entry.eax;
            }
            1 => {
                entry.ebx = (entry.ebx & 0xffff) | (count << 16) | (id << 24);
                entry.ecx = (entry.ecx | HYPERVISOR | X2APIC) & !VMX;
                if has_tsc_deadline {
                    entry.ecx |= TSC_DEADLINE;
                }
                entry.edx = if count > 1 { entry.edx | HTT } else { entry.edx & !HTT };
            }
            // Cores that share a cache, and cores of the socket (Intel).
            4 if entry.eax & 0x1f != 0 => {
                let level = (entry.eax >> 5) & 7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | ((count - 1) << 26);
            }
            0x8000_0001 => entry.ecx &= !SVM,
            // Cores of the socket and bits of their ids (AMD).
            0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | (count - 1) | (width << 12),
            // Of leaf 0x8000_000a only SVM would make sense.
            0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = (entry.eax >> 5) & 7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
            }
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    // The extended topology: one thread a core, `count` cores, the id that an x2APIC has.
    for leaf in [0xb, 0x1f].into_iter().filter(|leaf| *leaf <= max_basic) {
        for (subleaf, shift, number, kind) in [(0, 0, 1, 1), (1, width, count, 2), (2, 0, 0, 0)] {
            entries.push(kvm_cpuid_entry2 {
                function: leaf,
                index: subleaf,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: number,
                ecx: subleaf | (kind << 8),
                edx: id,
                ..kvm_cpuid_entry2::default()
            });
        }
    }
    entries
}

/// What this host's processors can do, as part of guests' classes: their features, and the name that was given to them before
/// classes said those.
///
/// # Errors
/// When KVM does not say.
pub fn baseline(kvm: &Kvm) -> Result<(CpuBaseline, String), VmmError> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm_error("tell its CPUID"))?;
    let supported = supported.as_slice();
    Ok((state::cpuid::features(supported, arch_capabilities(kvm)), state::cpuid::baseline(supported)))
}

/// What KVM can tell guests of faults of this processor; nothing where it tells nothing.
fn arch_capabilities(kvm: &Kvm) -> u64 {
    let entry = kvm_msr_entry { index: ARCH_CAPABILITIES_MSR, ..kvm_msr_entry::default() };
    let Ok(mut msrs) = Msrs::from_entries(&[entry]) else { return 0 };
    match kvm.get_msrs(&mut msrs) {
        Ok(1) => msrs.as_slice().first().map_or(0, |entry| entry.data),
        _ => 0,
    }
}

/// Gives a vCPU its CPUID, which it answers, and what firmware would have set: MTRRs, floating point, the local APIC's lines.
/// With a baseline it is told of nothing else; without one of all that KVM has.
///
/// # Errors
/// [`VmmError::State`] when this processor has less than the baseline; else when KVM refuses.
pub fn prepare(
    kvm: &Kvm,
    vcpu: &VcpuFd,
    supported: &CpuId,
    index: u8,
    vcpus: u8,
    baseline: Option<&CpuBaseline>,
) -> Result<Vec<kvm_cpuid_entry2>, VmmError> {
    let mut entries = cpuid(supported, index, vcpus, kvm.check_extension(Cap::TscDeadlineTimer));
    if let Some(baseline) = baseline {
        let here = state::cpuid::features(supported.as_slice(), arch_capabilities(kvm));
        if !here.covers(baseline) {
            let missing = baseline.beyond(&here).join(", ");
            return Err(state::refused(format!(
                "this processor ({}) lacks of the guest's ({}): {missing}",
                here.short(),
                baseline.short()
            )));
        }
        state::cpuid::mask(&mut entries, baseline);
    }
    let refused = || VmmError::Range {
        what: "entries of CPUID",
        value: entries.len() as u64,
        range: "as many as KVM takes (256)",
    };
    let cpuid = CpuId::from_entries(&entries).map_err(|_| refused())?;
    vcpu.set_cpuid2(&cpuid).map_err(kvm_error("give a vCPU its CPUID"))?;

    const MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRINGS: u64 = 1;
    const MTRR_DEFAULT: u32 = 0x2ff;
    const MTRR_ENABLED_WRITE_BACK: u64 = (1 << 11) | 6;
    let arch = baseline.map_or(0, |baseline| {
        let [low, high] = ARCH_CAPABILITIES.map(|at| u64::from(baseline.words[at]));
        low | high << 32
    });
    let arch = baseline.is_some().then_some((ARCH_CAPABILITIES_MSR, arch));
    let firmware = [(MTRR_DEFAULT, MTRR_ENABLED_WRITE_BACK), (MISC_ENABLE, FAST_STRINGS)];
    for (index, data) in firmware.into_iter().chain(arch) {
        let entry = kvm_msr_entry { index, data, ..kvm_msr_entry::default() };
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| refused())?;
        // A processor without one of them does without.
        let _ = vcpu.set_msrs(&msrs);
    }
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..kvm_fpu::default() };
    vcpu.set_fpu(&fpu).map_err(kvm_error("set a vCPU's floating point"))?;

    let mut lapic = vcpu.get_lapic().map_err(kvm_error("read a vCPU's local APIC"))?;
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    const EXTERNAL: u32 = 7;
    const NMI: u32 = 4;
    set_delivery(&mut lapic, LINT0, EXTERNAL);
    set_delivery(&mut lapic, LINT1, NMI);
    vcpu.set_lapic(&lapic).map_err(kvm_error("set a vCPU's local APIC"))?;
    Ok(entries)
}

fn set_delivery(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let mut bytes = [0; 4];
    for (byte, from) in bytes.iter_mut().zip(&lapic.regs[register..]) {
        *byte = from.cast_unsigned();
    }
    let value = (u32::from_le_bytes(bytes) & !0x700) | (mode << 8);
    for (to, byte) in lapic.regs[register..].iter_mut().zip(value.to_le_bytes()) {
        *to = byte.cast_signed();
    }
}

/// Puts the first vCPU at its first instruction; the others wait for it (KVM starts them so).
///
/// # Errors
/// When KVM refuses, or guest memory is too small.
pub fn enter(vcpu: &VcpuFd, ram: &Ram, entry: Entry) -> Result<(), VmmError> {
    let mut sregs = vcpu.get_sregs().map_err(kvm_error("read a vCPU's registers"))?;
    let regs = match entry {
        Entry::Linux64 { at } => {
            write_gdt(ram, &mut sregs, true)?;
            write_page_tables(ram)?;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 |= 0x20; // PAE
            sregs.cr0 |= 0x8000_0001; // PG, PE
            sregs.efer |= 0x500; // LME, LMA
            kvm_regs { rip: at, rsi: layout::ZERO_PAGE, rflags: 2, ..kvm_regs::default() }
        }
        Entry::Pvh { at } => {
            write_gdt(ram, &mut sregs, false)?;
            sregs.cr0 = 1; // PE
            sregs.cr4 = 0;
            kvm_regs { rip: at.into(), rbx: layout::PVH_INFO, rflags: 2, ..kvm_regs::default() }
        }
    };
    vcpu.set_sregs(&sregs).map_err(kvm_error("set a vCPU's registers"))?;
    vcpu.set_regs(&regs).map_err(kvm_error("set a vCPU's registers"))
}

/// Flat segments at the selectors that Linux' boot protocol names (code 0x10, data 0x18), a task state segment at 0x20.
fn write_gdt(ram: &Ram, sregs: &mut kvm_sregs, is_64: bool) -> Result<(), VmmError> {
    let flat = kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..kvm_segment::default() };
    let code = kvm_segment { selector: 0x10, type_: 0xb, l: u8::from(is_64), db: u8::from(!is_64), ..flat };
    let data = kvm_segment { selector: 0x18, type_: 3, db: 1, ..flat };
    let task = kvm_segment { selector: 0x20, type_: 0xb, limit: 0x67, present: 1, ..kvm_segment::default() };
    let table = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task)];
    for (at, entry) in (layout::GDT..).step_by(8).zip(table) {
        ram.write_obj(entry, GuestAddress(at)).map_err(memory_error("the GDT"))?;
    }
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 5 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;
    Ok(())
}

/// A segment as it stands in a GDT (all of ours begin at 0).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.type_) | u64::from(segment.s) << 4 | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    (limit & 0xffff) | access << 40 | ((limit >> 16) & 0xf) << 48 | flags << 52
}

/// The first 4 GiB at their own addresses, in pages of 2 MiB.
fn write_page_tables(ram: &Ram) -> Result<(), VmmError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 0x80;
    let put = |at: u64, value: u64| ram.write_obj(value, GuestAddress(at)).map_err(memory_error("page tables"));
    let directories = layout::PAGE_TABLES + 0x1000;
    put(layout::PAGE_TABLES, directories | PRESENT_WRITABLE)?;
    for gib in 0..4 {
        let pages = directories + 0x1000 * (gib + 1);
        put(directories + 8 * gib, pages | PRESENT_WRITABLE)?;
        for page in 0..512 {
            put(pages + 8 * page, ((gib << 30) + (page << 21)) | PRESENT_WRITABLE | LARGE)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, eax: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ecx, ..kvm_cpuid_entry2::default() }
    }

    #[test]
    fn each_vcpu_has_a_number_of_its_own_and_no_nested_virtualization() {
        let all =
            [leaf(0, 0xd, 0), leaf(1, 0, 1 << 5), leaf(0xb, 9, 9), leaf(0x8000_0001, 0, 4), leaf(0x8000_001e, 0, 0)];
        let supported = CpuId::from_entries(&all).unwrap();
        for index in 0..3 {
            let seen = cpuid(&supported, index, 3, true);
            let get = |function| seen.iter().find(|entry| entry.function == function).unwrap();
            assert_eq!(get(1).ebx >> 24, u32::from(index));
            assert_eq!((get(1).ebx >> 16) & 0xff, 3);
            assert_eq!(get(1).ecx, (1 << 31) | (1 << 24) | (1 << 21));
            assert_eq!(get(0x8000_0001).ecx, 0);
            assert_eq!(get(0x8000_001e).eax, u32::from(index));
            let topology: Vec<_> = seen.iter().filter(|entry| entry.function == 0xb).collect();
            assert_eq!(topology.len(), 3);
            assert!(topology.iter().all(|entry| entry.edx == u32::from(index)));
            // Three cores need two bits.
            assert_eq!((topology[1].eax, topology[1].ebx), (2, 3));
            assert!(!seen.iter().any(|entry| entry.function == 0x1f));
        }
        assert_eq!(cpuid(&supported, 0, 1, false)[1].ecx & (1 << 24), 0);
    }

    #[test]
    fn descriptors_are_those_of_the_manual() {
        let flat = kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, type_: 0xb, ..kvm_segment::default() };
        assert_eq!(descriptor(&kvm_segment { l: 1, ..flat }), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&kvm_segment { db: 1, ..flat }), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&kvm_segment { db: 1, type_: 3, ..flat }), 0x00cf_9300_0000_ffff);
    }
}
