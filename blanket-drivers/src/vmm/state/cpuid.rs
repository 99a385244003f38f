//! Whether a host's processors can do what a guest was told that they can.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

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

/// A name for what processors can do: the same for two hosts whose features (and maker, and physical addresses) are the same.
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
        fn fewer_features_are_always_taken(bits: [u32; 4], mask: [u32; 4]) {
            let all: Vec<_> = FEATURES.iter().map(|(l, i, _)| leaf(*l, *i, bits)).collect();
            let fewer = [0, 1, 2, 3].map(|r: usize| bits[r] & mask[r]);
            let some: Vec<_> = FEATURES.iter().map(|(l, i, _)| leaf(*l, *i, fewer)).collect();
            prop_assert_eq!(lacking(&some, &all), None);
        }
    }
}
