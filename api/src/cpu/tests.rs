use proptest::prelude::*;

use super::*;

fn any() -> impl Strategy<Value = CpuBaseline> {
    (prop::array::uniform19(any_word()), 32_u8..=57, prop::bool::ANY).prop_map(|(words, physical_bits, is_amd)| {
        let maker = Maker(if is_amd { *b"AuthenticAMD" } else { *b"GenuineIntel" });
        CpuBaseline { maker, physical_bits, words }.offered()
    })
}

/// Mostly ones, so that levels are reached now and then.
fn any_word() -> impl Strategy<Value = u32> {
    (prop::num::u32::ANY, prop::num::u32::ANY, prop::bool::ANY).prop_map(|(a, b, full)| if full { !0 } else { a | b })
}

fn of(maker: &[u8; 12], names: &[&str]) -> CpuBaseline {
    let mut words = [0; WORDS.len()];
    for name in names {
        let (word, bit) = word_and_bit(name).expect(name);
        words[word] |= bit;
    }
    CpuBaseline { maker: Maker(*maker), physical_bits: 46, words }
}

#[test]
fn names_are_there_once_and_those_of_levels_are_known() {
    for (at, (word, bit, name)) in NAMES.iter().enumerate() {
        assert!(*word < WORDS.len() && *bit < 32, "{name}");
        let twin = |(w, b, n): &&(usize, u32, &str)| (w == word && b == bit) || n == name;
        assert!(NAMES[at + 1..].iter().find(twin).is_none(), "{name}");
    }
    let levels = CpuLevel::ALL.iter().flat_map(|level| level.needs().iter().chain(level.beyond()));
    for name in levels.chain(HIDDEN) {
        assert!(word_and_bit(name).is_some(), "{name}");
    }
    for (index, level) in CpuLevel::ALL.iter().enumerate() {
        // No level takes away what it or one below it needs; each takes away what the next one needs.
        let needed = CpuLevel::ALL.iter().take(index + 1).flat_map(|one| one.needs());
        let all = of(b"GenuineIntel", &NAMES.iter().map(|(_, _, name)| *name).collect::<Vec<_>>()).up_to(*level);
        for name in needed {
            assert!(all.has(name), "{level} without {name}");
        }
        assert_eq!(all.level(), Some(*level));
    }
}

#[test]
fn what_is_missing_is_named_as_linux_does() {
    let new = of(b"GenuineIntel", &["pni", "avx2", "avx512f"]);
    let old = of(b"GenuineIntel", &["pni", "sse4_1"]);
    assert_eq!(new.beyond(&old), ["avx2", "avx512f"]);
    let mut nameless = old;
    nameless.words[5] |= 1 << 31;
    assert_eq!(nameless.beyond(&old), ["cpuid-7.1-eax-31"]);
    assert!(!old.covers(&new) && !new.covers(&old));
    assert!(new.covers(&of(b"GenuineIntel", &["pni"])) && !new.covers(&of(b"AuthenticAMD", &["pni"])));
}

#[test]
fn vulnerabilities_count_the_other_way_round_where_they_are_told() {
    let safe = of(b"GenuineIntel", &["arch_capabilities", "mds_no"]);
    let worse = of(b"GenuineIntel", &["arch_capabilities", "mds_no", "rrsba"]);
    // Who was told of it runs where it is not; who was not must not come to where it is.
    assert!(safe.covers(&worse) && !worse.covers(&safe));
    assert_eq!(safe.common(&worse), Some(worse));
    assert_eq!(safe.beyond(&worse), ["rrsba"]);
    let silent = of(b"GenuineIntel", &[]);
    assert!(worse.covers(&silent) && !silent.covers(&worse));
    assert_eq!(worse.common(&silent), Some(silent));
}

#[test]
fn texts_that_are_no_baseline_are_refused() {
    let good = of(b"AuthenticAMD", &["pni", "nx"]).to_string();
    assert_eq!(good, "x86.amd.46.1............100000");
    assert!(good.parse::<CpuBaseline>().is_ok());
    let long = format!("x86.amd.46{}", ".1".repeat(20));
    for bad in [
        "",
        "x86",
        "host-0123",
        "qemu64",
        "x86.amd",
        "x86.amd.7.1",
        "x86.amd.46.0",
        "x86.amd.46.01",
        "x86.amd.46.1.",
        "x86.amd.46.G",
        "x86.amd.46.+1",
        "x86.amd.46.1ffffffff",
        "x86.zz.46.1",
        "x86.amd.046.1",
        &long,
        &"x".repeat(9999),
    ] {
        assert!(bad.parse::<CpuBaseline>().is_err(), "{bad}");
    }
    for choice in CpuChoice::ALL {
        assert_eq!(choice.to_string().parse(), Ok(choice));
        assert_eq!(serde_json::to_value(choice).unwrap(), choice.name());
    }
    assert!("v3".parse::<CpuChoice>().is_err());
}

proptest! {
    #[test]
    fn texts_and_sets_are_the_same(one in any()) {
        let text = one.to_string();
        prop_assert!(text.len() <= MAX_BASELINE_BYTES, "{}", text);
        prop_assert!(text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'.'));
        prop_assert_eq!(text.parse(), Ok(one));
    }

    #[test]
    fn what_is_common_runs_on_both_and_nothing_more_would(a in any(), b in any()) {
        let Some(both) = a.common(&b) else {
            prop_assert_ne!(a.maker, b.maker);
            return Ok(());
        };
        prop_assert!(a.covers(&both) && b.covers(&both));
        prop_assert_eq!(b.common(&a), Some(both));
        prop_assert_eq!(a.covers(&b), both == b);
        prop_assert_eq!(a.covers(&b), a.maker == b.maker && a.physical_bits >= b.physical_bits && b.beyond(&a).is_empty());
    }

    #[test]
    fn a_level_is_part_of_all(one in any(), bits in any_word(), at in 0..WORDS.len()) {
        for level in CpuLevel::ALL {
            let limited = one.up_to(level);
            prop_assert!(one.covers(&limited));
            prop_assert!(limited.level() <= Some(level));
            prop_assert_eq!(limited.up_to(level), limited);
            prop_assert_eq!(limited.level(), one.level().min(Some(level)));
        }
        // One that has less reaches no higher level.
        let mut less = one;
        less.words[at] &= bits;
        prop_assert!(less.level() <= one.level());
    }
}
