//! The daemon's settings: a TOML file.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde::Deserialize;
use supercloud_api::Tenure;
use supercloud_scheduler::{money::NanoUsd, price::CheapestWithHysteresis};

/// The whole file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The controller's URL.
    pub url: String,
    /// Its CA (PEM); needed with https.
    pub ca_file: Option<PathBuf>,
    /// A file that holds the token's secret; role `policy`.
    pub token_file: PathBuf,
    /// How hosts are rented, and so which market of a cloud counts.
    #[serde(default = "spot")]
    pub tenure: Tenure,
    /// Time between looks at the markets (wall time).
    #[serde(default = "one_second")]
    pub poll_ms: u64,
    /// What a move costs, in nano-dollars per GiB of the guest's memory (egress).
    #[serde(default = "egress")]
    pub move_nanousd_per_gib: u64,
    /// The policy.
    #[serde(default)]
    pub policy: CheapestWithHysteresis,
}

fn spot() -> Tenure {
    Tenure::Spot
}

fn one_second() -> u64 {
    1000
}

/// 0.02 USD per GiB: a list price between regions.
fn egress() -> u64 {
    20_000_000
}

impl Config {
    /// Reads and checks the file.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let config: Self = toml::from_str(&text).with_context(|| format!("in {}", path.display()))?;
        if let Err(what) = config.policy.check() {
            bail!("in {}: [policy] {what}", path.display());
        }
        if !(100..=3_600_000).contains(&config.poll_ms) {
            bail!("in {}: poll_ms is {}; it must be 100 to 3600000", path.display(), config.poll_ms);
        }
        Ok(config)
    }

    /// The cost of moving a guest with this much memory.
    pub fn move_cost(&self, memory_bytes: u64) -> NanoUsd {
        let cost = u128::from(self.move_nanousd_per_gib) * u128::from(memory_bytes) / (1 << 30);
        NanoUsd(u64::try_from(cost).unwrap_or(u64::MAX))
    }
}
