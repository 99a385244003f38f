//! What a guest's processor can do: the CPU baseline of its compat class, as a set of features that can be compared.
//!
//! A guest keeps what it was told at its start for as long as it runs, so it only moves to hosts whose processors have all of
//! that. A baseline is made of what the hosts that it may visit have in common, so that it *can* move. Bits are those of CPUID
//! (Intel SDM volume 2, AMD APM volume 3) and of `IA32_ARCH_CAPABILITIES`; their names are Linux' (`/proc/cpuinfo`). The levels
//! are those of the x86-64 psABI (section 3.1.1). Pure.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

mod names;

pub use names::WORDS;
use names::{HIDDEN, NAMES};

/// How every baseline of this form begins; others (of other back ends) are only ever equal or not.
const PREFIX: &str = "x86";
/// Longest text of a baseline.
pub const MAX_BASELINE_BYTES: usize = 224;
/// The words of `IA32_ARCH_CAPABILITIES`, low and high, among the others.
pub const ARCH_CAPABILITIES: [usize; 2] = [17, 18];
/// Bits of its low word that say that a processor is *more* vulnerable: RSBA and RRSBA. A guest must know of them when any host
/// that it visits has them.
const WORSE: u32 = 1 << 2 | 1 << 19;

/// The levels of the x86-64 psABI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
pub enum CpuLevel {
    /// SSE 4.2, POPCNT, CMPXCHG16B.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// AVX2, BMI, FMA, LZCNT, MOVBE.
    #[serde(rename = "x86-64-v3")]
    V3,
    /// AVX-512 F, BW, CD, DQ, VL.
    #[serde(rename = "x86-64-v4")]
    V4,
}

/// What a guest's processor shall be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub enum CpuChoice {
    /// What the hosts that it may visit have in common, and nothing beyond `x86-64-v3`, so that hosts that come later take it too.
    #[default]
    #[serde(rename = "portable")]
    Portable,
    /// All that its first host has: it moves live only to hosts that have no less.
    #[serde(rename = "host")]
    Host,
    /// `x86-64-v2`, of hosts that have it.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// `x86-64-v3`, of hosts that have it.
    #[serde(rename = "x86-64-v3")]
    V3,
    /// `x86-64-v4`, of hosts that have it.
    #[serde(rename = "x86-64-v4")]
    V4,
}

impl CpuChoice {
    /// All, the narrowest first.
    pub const ALL: [Self; 5] = [Self::V2, Self::V3, Self::Portable, Self::V4, Self::Host];

    /// The level that hosts must have.
    #[must_use]
    pub const fn least(self) -> Option<CpuLevel> {
        match self {
            Self::Portable | Self::Host => None,
            Self::V2 => Some(CpuLevel::V2),
            Self::V3 => Some(CpuLevel::V3),
            Self::V4 => Some(CpuLevel::V4),
        }
    }

    /// The level beyond which nothing is given.
    #[must_use]
    pub const fn most(self) -> Option<CpuLevel> {
        match self {
            Self::Host => None,
            Self::V2 => Some(CpuLevel::V2),
            Self::Portable | Self::V3 => Some(CpuLevel::V3),
            Self::V4 => Some(CpuLevel::V4),
        }
    }

    /// Its name in REST and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Host => "host",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        }
    }

    /// Whether it is what is taken when nothing is said.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for CpuChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a text is no choice.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no CPU; it is one of portable, host, x86-64-v2, x86-64-v3, x86-64-v4")]
pub struct NoChoice(String);

impl FromStr for CpuChoice {
    type Err = NoChoice;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|choice| choice.name() == text);
        found.ok_or_else(|| NoChoice(text.chars().take(32).collect()))
    }
}

impl CpuLevel {
    /// All, the lowest first.
    pub const ALL: [Self; 3] = [Self::V2, Self::V3, Self::V4];

    const fn needs(self) -> &'static [&'static str] {
        match self {
            Self::V2 => &["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"],
            Self::V3 => &["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"],
            Self::V4 => &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"],
        }
    }

    /// What the next higher level has, and what else comes with that: instructions of programs. What kernels use for themselves
    /// (SMEP, PCID, ...) and what tells of faults in processors is of no level.
    const fn beyond(self) -> &'static [&'static str] {
        match self {
            Self::V2 => names::BEYOND_V2,
            Self::V3 => names::BEYOND_V3,
            Self::V4 => names::BEYOND_V4,
        }
    }
}

impl fmt::Display for CpuLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        })
    }
}

/// Who made a processor, as leaf 0 of CPUID says it (EBX, EDX, ECX): programs and kernels go by that too, so guests stay with one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Maker(pub [u8; 12]);

impl Maker {
    const KNOWN: [(&'static [u8; 12], &'static str); 3] =
        [(b"GenuineIntel", "intel"), (b"AuthenticAMD", "amd"), (b"HygonGenuine", "hygon")];
}

impl fmt::Display for Maker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Self::KNOWN.into_iter().find(|(bytes, _)| **bytes == self.0) {
            Some((_, name)) => f.write_str(name),
            None => f.write_str(&hex::encode(self.0)),
        }
    }
}

/// Features of a processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CpuBaseline {
    /// Who made it.
    pub maker: Maker,
    /// Bits of a physical address.
    pub physical_bits: u8,
    /// The registers of [`WORDS`], in their order.
    pub words: [u32; WORDS.len()],
}

/// Why a text is no baseline of this form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no features of a processor are read from '{0}'")]
pub struct NoBaseline(String);

impl fmt::Display for CpuBaseline {
    /// `x86.MAKER.BITS.WORD.WORD...`: hexadecimal, zeros left out, so also at the end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}.{}.{}", self.maker, self.physical_bits)?;
        let count = self.words.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
        for word in self.words.iter().take(count) {
            match word {
                0 => f.write_str(".")?,
                word => write!(f, ".{word:x}")?,
            }
        }
        Ok(())
    }
}

impl FromStr for CpuBaseline {
    type Err = NoBaseline;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let read = || {
            if text.len() > MAX_BASELINE_BYTES {
                return None;
            }
            let mut parts = text.split('.');
            if parts.next() != Some(PREFIX) {
                return None;
            }
            let maker = parts.next()?;
            let known = Maker::KNOWN.into_iter().find(|(_, name)| *name == maker).map(|(bytes, _)| *bytes);
            let maker = match known {
                Some(bytes) => bytes,
                None => {
                    let mut bytes = [0; 12];
                    hex::decode_to_slice(maker, &mut bytes).ok()?;
                    bytes
                }
            };
            let physical_bits = parts.next()?.parse().ok().filter(|bits| (32..=64).contains(bits))?;
            let mut words = [0; WORDS.len()];
            let mut left = words.iter_mut();
            for part in parts {
                let word = left.next()?;
                if !part.is_empty() {
                    *word = u32::from_str_radix(part, 16).ok()?;
                }
            }
            let read = Self { maker: Maker(maker), physical_bits, words };
            // One text for one set: classes are told apart by their texts.
            (read.to_string() == text).then_some(read)
        };
        read().ok_or_else(|| NoBaseline(text.chars().take(64).collect()))
    }
}

fn word_and_bit(name: &str) -> Option<(usize, u32)> {
    NAMES.iter().find(|(_, _, one)| *one == name).map(|(word, bit, _)| (*word, 1 << *bit))
}

impl CpuBaseline {
    /// What is offered of what a processor has: not what no guest of ours is told of (counters of performance, whose number
    /// differs from one to the next, SGX, tracing).
    #[must_use]
    pub fn offered(mut self) -> Self {
        for name in HIDDEN {
            self.remove(name);
        }
        // Nothing in a register of which nobody is told.
        self.turned().turned()
    }

    fn remove(&mut self, name: &str) {
        if let Some((word, bit)) = word_and_bit(name)
            && let Some(word) = self.words.get_mut(word)
        {
            *word &= !bit;
        }
    }

    /// Whether it has a feature of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        word_and_bit(name).is_some_and(|(word, bit)| self.words.get(word).is_some_and(|word| word & bit != 0))
    }

    /// The highest level that it reaches.
    #[must_use]
    pub fn level(&self) -> Option<CpuLevel> {
        let reaches = |level: &CpuLevel| level.needs().iter().all(|name| self.has(name));
        CpuLevel::ALL.into_iter().take_while(reaches).last()
    }

    /// The same without what is beyond a level.
    #[must_use]
    pub fn up_to(mut self, level: CpuLevel) -> Self {
        for level in CpuLevel::ALL.into_iter().filter(|one| *one >= level) {
            for name in level.beyond() {
                self.remove(name);
            }
        }
        self
    }

    /// The words as what is better the more bits there are; and back.
    fn turned(mut self) -> Self {
        // Who has no such register is told of nothing in it.
        let has_register = self.has("arch_capabilities");
        for (half, worse) in ARCH_CAPABILITIES.into_iter().zip([WORSE, 0]) {
            if let Some(word) = self.words.get_mut(half) {
                *word = if has_register { *word ^ worse } else { 0 };
            }
        }
        self
    }

    /// What both have; `None` when their makers differ.
    #[must_use]
    pub fn common(&self, other: &Self) -> Option<Self> {
        if self.maker != other.maker {
            return None;
        }
        let mut both = self.turned();
        for (word, with) in both.words.iter_mut().zip(other.turned().words) {
            *word &= with;
        }
        both.physical_bits = self.physical_bits.min(other.physical_bits);
        Some(both.turned())
    }

    /// Whether a guest that was told of `guest` can run on this.
    #[must_use]
    pub fn covers(&self, guest: &Self) -> bool {
        self.maker == guest.maker
            && self.physical_bits >= guest.physical_bits
            && self.turned().words.iter().zip(guest.turned().words).all(|(mine, wanted)| wanted & !mine == 0)
    }

    /// The names of features that this has and `other` has not (or, of vulnerabilities, the other way round); a bit without
    /// a name is named after its place.
    #[must_use]
    pub fn beyond(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        for (index, (mine, theirs)) in self.turned().words.into_iter().zip(other.turned().words).enumerate() {
            let more = mine & !theirs;
            for bit in (0..32).filter(|bit| more & (1 << bit) != 0) {
                let name = NAMES.iter().find(|(word, at, _)| *word == index && *at == bit).map(|(_, _, name)| *name);
                found.push(match (name, WORDS.get(index)) {
                    (Some(name), _) => name.to_owned(),
                    (None, Some((leaf, part, register))) => format!("cpuid-{leaf:x}.{part}-{register}-{bit}"),
                    (None, None) => continue,
                });
            }
        }
        found
    }

    /// For people: the maker, the level and the first digits of a BLAKE3 hash.
    #[must_use]
    pub fn short(&self) -> String {
        let level = match self.level() {
            None => "v1",
            Some(CpuLevel::V2) => "v2",
            Some(CpuLevel::V3) => "v3",
            Some(CpuLevel::V4) => "v4",
        };
        format!("{}-{level}-{}", self.maker, &blake3::hash(self.to_string().as_bytes()).to_hex()[..8])
    }
}

#[cfg(test)]
mod tests;
