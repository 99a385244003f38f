//! Whether a host's processors can do what a guest was told that they can.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use supercloud_api::cpu::{ARCH_CAPABILITIES, CpuBaseline, Maker, WORDS};

/// What XSAVE writes of the oldest parts, and its header.
const XSAVE_LEGACY_BYTES: u32 = 576;
/// Configuration and data of tiles, among what XSAVE writes.
const XSAVE_TILES: u32 = 1 << 17 | 1 << 18;

/// A leaf of CPUID that lists features, and the registers that do: eax, ebx, ecx, edx.
const FEATURES: [(u32, u32, [bool; 4]); 11] = [
    (0x1, 0, [false, false, true, true]),
    (0x7, 0, [false, true, true, true]),
    (0x7, 1, [true, false, false, true]),
    (0x7, 2, [false, false, false, true]),
    // Registers that XSAVE saves, low and high half.
    (0xd, 0, [true, false, false, true]),
    (0xd, 1, [true, false, false, false]),
    (0x8000_0001, 0, [false, false, true, true]),
    (0x8000_0007, 0, [false, false, false, true]),
    (0x8000_0008, 0, [false, true, false, false]),
    (0x8000_0021, 0, [true, false, false, false]),
    // KVM's own: clocks and other services.
    (0x4000_0001, 0, [true, false, false, false]),
];

/// Bits that are not features of the processor: they follow what the guest does (OSXSAVE, OSPKE), KVM gives them everywhere
/// (hypervisor, x2APIC, TSC deadline) or they follow from the number of vCPUs (HTT).
const fn ignored(leaf: u32, register: usize) -> u32 {
    match (leaf, register) {
        (0x1, 2) => 1 << 31 | 1 << 27 | 1 << 24 | 1 << 21,
        (0x1, 3) => 1 << 28,
        (0x7, 2) => 1 << 4,
        _ => 0,
    }
}

fn registers(all: &[kvm_cpuid_entry2], leaf: u32, index: u32) -> [u32; 4] {
    // Of a leaf without parts the index means nothing.
    let part =
        |entry: &kvm_cpuid_entry2| if entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0 { entry.index } else { 0 };
    let found = all.iter().find(|entry| entry.function == leaf && part(entry) == index);
    found.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
}

/// The name that baselines had before they were made of features, under which guests may still run: the same for two hosts whose features (and maker, and physical addresses) are the same.
/// 12 digits of a BLAKE3 hash.
#[must_use]
pub fn baseline(supported: &[kvm_cpuid_entry2]) -> String {
    let mut hash = blake3::Hasher::new();
    let [_, maker @ ..] = registers(supported, 0, 0);
    for word in maker {
        hash.update(&word.to_le_bytes());
    }
    for (leaf, index, lists) in FEATURES {
        for (register, word) in registers(supported, leaf, index).into_iter().enumerate() {
            let word = if lists[register] { word & !ignored(leaf, register) } else { 0 };
            hash.update(&word.to_le_bytes());
        }
    }
    hash.update(&(registers(supported, 0x8000_0008, 0)[0] & 0xff).to_le_bytes());
    format!("host-{}", &hash.finalize().to_hex()[..12])
}

/// `IA32_ARCH_CAPABILITIES`, which tells of faults that a processor has or has not.
pub const ARCH_CAPABILITIES_MSR: u32 = 0x10a;

/// Which register of a leaf a word of a baseline is.
fn register_of(name: &str) -> Option<usize> {
    ["eax", "ebx", "ecx", "edx"].into_iter().position(|one| one == name)
}

/// What processors can do of which KVM says `supported`, and of `IA32_ARCH_CAPABILITIES` that.
#[must_use]
pub fn features(supported: &[kvm_cpuid_entry2], arch_capabilities: u64) -> CpuBaseline {
    let mut maker = [0; 12];
    let [_, ebx, ecx, edx] = registers(supported, 0, 0);
    for (to, from) in maker.chunks_exact_mut(4).zip([ebx, edx, ecx]) {
        to.copy_from_slice(&from.to_le_bytes());
    }
    let mut words = [0; WORDS.len()];
    for (word, (leaf, part, name)) in words.iter_mut().zip(WORDS) {
        if let Some(register) = register_of(name) {
            *word = registers(supported, leaf, part)[register] & !ignored(leaf, register);
        }
    }
    let [low, high] = ARCH_CAPABILITIES;
    (words[low], words[high]) = (arch_capabilities as u32, (arch_capabilities >> 32) as u32);
    // Without the leaf an x86-64 processor has 36 bits (AMD APM volume 3, appendix E).
    let physical_bits = match registers(supported, 0x8000_0008, 0)[0] & 0xff {
        0 => 36,
        bits => u8::try_from(bits.clamp(32, 64)).unwrap_or(64),
    };
    CpuBaseline { maker: Maker(maker), physical_bits, words }.offered()
}

/// Takes from what a vCPU would be told all that is not of a baseline.
pub fn mask(entries: &mut [kvm_cpuid_entry2], baseline: &CpuBaseline) {
    let part =
        |entry: &kvm_cpuid_entry2| if entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0 { entry.index } else { 0 };
    let word_of = |leaf: u32, index: u32, register: usize| {
        let at = WORDS.iter().position(|(l, p, name)| (*l, *p) == (leaf, index) && register_of(name) == Some(register));
        at.map(|at| baseline.words[at])
    };
    let saved = word_of(0xd, 0, 0).unwrap_or(0);
    // Where each part of the area that XSAVE writes ends: its size and its offset.
    let ends = |entry: &kvm_cpuid_entry2| entry.eax.saturating_add(entry.ebx);
    let area = entries
        .iter()
        .filter(|entry| entry.function == 0xd && (2..32).contains(&entry.index) && saved & (1 << entry.index) != 0)
        .map(ends)
        .fold(XSAVE_LEGACY_BYTES, u32::max);
    for entry in entries {
        let (leaf, index) = (entry.function, part(entry));
        let all = [&mut entry.eax, &mut entry.ebx, &mut entry.ecx, &mut entry.edx];
        for (register, value) in all.into_iter().enumerate() {
            if let Some(word) = word_of(leaf, index, register) {
                *value &= word | ignored(leaf, register);
            }
        }
        match (leaf, index) {
            // Bytes of what may be saved. (Of what is switched on, KVM fills in EBX itself.)
            (0xd, 0) => entry.ecx = area,
            // No state of the system's own: its parts differ from one processor to the next.
            (0xd, 1) => (entry.ecx, entry.edx) = (0, 0),
            (0xd, 2..32) if saved & (1 << index) == 0 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            (0xd, 32..) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            // Counters of performance (Intel, AMD), tracing, last branches, tiles; SGX.
            (0xa | 0x8000_0022 | 0x12 | 0x14 | 0x1b | 0x1c, _) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            (0x1d | 0x1e, _) if saved & XSAVE_TILES == 0 => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            (0x8000_0008, _) => {
                let bits = (entry.eax & 0xff).min(baseline.physical_bits.into());
                entry.eax = (entry.eax & !0xff) | bits;
            }
            _ => {}
        }
    }
}

/// The first features that a guest has and that are not supported (or more physical memory than can be), in words; `None` when there are none.
#[must_use]
pub fn lacking(guest: &[kvm_cpuid_entry2], supported: &[kvm_cpuid_entry2]) -> Option<String> {
    for (leaf, index, lists) in FEATURES {
        let (has, can) = (registers(guest, leaf, index), registers(supported, leaf, index));
        for (register, name) in ["eax", "ebx", "ecx", "edx"].into_iter().enumerate() {
            let missing = has[register] & !can[register] & !ignored(leaf, register);
            if lists[register] && missing != 0 {
                return Some(format!("CPUID {leaf:#x}.{index} {name} bits {missing:#x}"));
            }
        }
    }
    let width = |all: &[kvm_cpuid_entry2]| registers(all, 0x8000_0008, 0)[0] & 0xff;
    let (has, can) = (width(guest), width(supported));
    (has > can).then(|| format!("physical addresses of {has} bits; it has {can}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_baseline_is_named_after_features_and_nothing_else() {
        let entry = |function, eax, ecx| kvm_cpuid_entry2 { function, eax, ecx, ..kvm_cpuid_entry2::default() };
        let plain = [entry(0, 7, 1), entry(1, 5, 1 << 19), entry(0x8000_0008, 48, 0)];
        let name = baseline(&plain);
        assert_eq!(name.len(), 17);
        // Stepping, APIC bits and the number of leaves are no features; a feature, the maker and the width are.
        assert_eq!(baseline(&[entry(0, 9, 1), entry(1, 6, 1 << 19 | 1 << 27), entry(0x8000_0008, 48, 0)]), name);
        for other in [
            [entry(0, 7, 2), entry(1, 5, 1 << 19), entry(0x8000_0008, 48, 0)],
            [entry(0, 7, 1), entry(1, 5, 1 << 20), entry(0x8000_0008, 48, 0)],
            [entry(0, 7, 1), entry(1, 5, 1 << 19), entry(0x8000_0008, 46, 0)],
        ] {
            assert_ne!(baseline(&other), name);
        }
    }

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..kvm_cpuid_entry2::default() }
    }

    #[test]
    fn what_is_told_is_what_the_baseline_has() {
        let other = |function, eax| kvm_cpuid_entry2 { function, eax, ..kvm_cpuid_entry2::default() };
        let supported = [
            kvm_cpuid_entry2 { ebx: 0x756e_6547, ecx: 0x6c65_746e, edx: 0x4965_6e69, ..other(0, 0x1b) },
            leaf(1, 0, [1, 2, 1 << 28 | 1 << 31 | 1 << 15 | 1, 1 << 28 | 1]),
            leaf(7, 0, [2, 1 << 16 | 1 << 5, 0, 1 << 29]),
            leaf(0xa, 0, [1, 2, 3, 4]),
            leaf(0xd, 0, [0xe7, 832, 2696, 0]),
            leaf(0xd, 1, [0xf, 832, 0x1800, 0]),
            leaf(0xd, 2, [256, 576, 0, 0]),
            leaf(0xd, 5, [64, 1088, 0, 0]),
            leaf(0xd, 7, [1024, 1664, 0, 0]),
            leaf(0xd, 11, [16, 0, 1, 0]),
            other(0x8000_0008, 0x3030),
        ];
        let all = features(&supported, 1 << 5);
        assert_eq!((all.maker, all.physical_bits), (Maker(*b"GenuineIntel"), 48));
        assert!(all.has("avx512f") && all.has("xstate_zmm_hi256") && all.has("mds_no") && !all.has("pdcm"));
        let mut told = supported.to_vec();
        let wanted = CpuBaseline { physical_bits: 46, ..all.up_to(supercloud_api::CpuLevel::V3) };
        mask(&mut told, &wanted);
        let get = |leaf, index| registers(&told, leaf, index);
        assert_eq!(get(1, 0), [1, 2, 1 << 28 | 1 << 31 | 1, 1 << 28 | 1], "what follows from elsewhere stays");
        assert_eq!(get(7, 0)[1], 1 << 5);
        assert_eq!(get(0xa, 0), [0; 4]);
        // AVX is the last that is left: its 256 bytes end at 832.
        assert_eq!(get(0xd, 0), [7, 832, 832, 0]);
        assert_eq!(get(0xd, 1), [1, 832, 0, 0]);
        assert_eq!((get(0xd, 2), get(0xd, 7), get(0xd, 11)), ([256, 576, 0, 0], [0; 4], [0; 4]));
        assert_eq!(get(0x8000_0008, 0)[0], 0x302e);
        // Who is told no more than a baseline has is one of that baseline.
        assert_eq!(features(&told, 1 << 5), wanted);
        assert_eq!(lacking(&told, &supported), None);
    }

    #[test]
    fn a_feature_that_is_not_there_is_named() {
        let supported = [leaf(1, 0, [9, 9, 0b0110, 1]), leaf(7, 0, [1, 0xff, 0, 0])];
        assert_eq!(lacking(&supported, &supported), None);
        // What is no feature may differ: the model, the APIC's id, what the guest switched on.
        assert_eq!(lacking(&[leaf(1, 0, [1, 2, 0x8920_0010 & !0x10 | 0b0110, 1 << 28])], &supported), None);
        let said = lacking(&[leaf(7, 0, [0, 0x1_00ff, 0, 0])], &supported);
        assert_eq!(said.as_deref(), Some("CPUID 0x7.0 ebx bits 0x10000"));
        assert!(lacking(&supported, &[]).is_some());
        let wide = |bits: u32| [leaf(0x8000_0008, 0, [0x3000 + bits, 0, 0, 0])];
        assert_eq!(lacking(&wide(39), &wide(46)), None);
        assert!(lacking(&wide(46), &wide(39)).is_some_and(|said| said.contains("46 bits")));
    }

    proptest! {
        #[test]
        fn a_mask_makes_a_baseline_of_any_host(bits: [[u32; 4]; FEATURES.len()], mask_bits: [u32; 4], arch: u64) {
            let all: Vec<_> = FEATURES.iter().zip(bits).map(|((l, i, _), bits)| leaf(*l, *i, bits)).collect();
            let host = features(&all, arch);
            let mut wanted = host;
            for (word, mask) in wanted.words.iter_mut().zip(mask_bits.into_iter().cycle()) {
                *word &= mask;
            }
            let wanted = wanted.offered();
            let mut told = all.clone();
            mask(&mut told, &wanted);
            let low = u64::from(wanted.words[ARCH_CAPABILITIES[0]]);
            let high = u64::from(wanted.words[ARCH_CAPABILITIES[1]]);
            prop_assert_eq!(features(&told, low | high << 32), wanted);
            prop_assert_eq!(lacking(&told, &all), None);
        }

        #[test]
        fn fewer_features_are_always_taken(bits: [u32; 4], mask: [u32; 4]) {
            let all: Vec<_> = FEATURES.iter().map(|(l, i, _)| leaf(*l, *i, bits)).collect();
            let fewer = [0, 1, 2, 3].map(|r: usize| bits[r] & mask[r]);
            let some: Vec<_> = FEATURES.iter().map(|(l, i, _)| leaf(*l, *i, fewer)).collect();
            prop_assert_eq!(lacking(&some, &all), None);
        }
    }
}
