//! A controller on a real store with real links, hosts whose agents run the real ownership protocol on a pretended ground, and
//! what must hold of them.

pub mod agent;
pub mod check;
pub mod ground;
pub mod liar;
pub mod world;

/// Random numbers of a seed (SplitMix64, Steele et al. 2014).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap()
    }

    /// True in so many of a thousand cases.
    pub fn is_hit(&mut self, per_mille: u64) -> bool {
        per_mille > 0 && self.next() % 1000 < per_mille
    }
}

/// The seed of a run: given by `SUPERCLOUD_SEED`, else a fixed one; printed either way.
pub fn seed(name: &str, default: u64) -> u64 {
    let seed = std::env::var("SUPERCLOUD_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    println!("{name}: SUPERCLOUD_SEED={seed}");
    seed
}
