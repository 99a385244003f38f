//! The daemon's settings: a TOML file.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use serde::Deserialize;
use supercloud_api::Tenure;
use supercloud_scheduler::{market::Regime, money::NanoUsd, policy::SmartSpot, price::CheapestWithHysteresis};

use crate::sun::SunConfig;

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
    /// Which policy decides.
    #[serde(default)]
    pub policy_name: PolicyName,
    /// The settings of `cheapest`.
    #[serde(default)]
    pub policy: CheapestWithHysteresis,
    /// The settings of `smart-spot`.
    #[serde(default)]
    pub smart_spot: SmartSpot,
    /// Clouds that are left now and not gone to, by name, until they are taken off this list.
    #[serde(default)]
    pub avoid: Vec<String>,
    /// Guests that follow their clients over the day instead of prices.
    pub sun: Option<SunConfig>,
    /// What `smart-spot` and `greedy` assume where the API does not say it.
    #[serde(default)]
    pub assume: Assumptions,
}

/// The policies that the daemon runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyName {
    /// The cheapest market, with hysteresis.
    #[default]
    Cheapest,
    /// Price and expected cost of interruptions; moves that pay for themselves.
    SmartSpot,
    /// Whatever is cheapest at this moment.
    Greedy,
}

impl PolicyName {
    /// As settings and `--policy` write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cheapest => "cheapest",
            Self::SmartSpot => "smart-spot",
            Self::Greedy => "greedy",
        }
    }
}

/// What is not to be read from the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Assumptions {
    /// How the markets work.
    pub regime: Regime,
    /// The highest price that is paid, in thousandths of on-demand (auction regime).
    pub bid_permille: u32,
    /// How long before it takes a host a provider says so.
    pub notice_ms: u64,
    /// What a guest writes per second, in MiB.
    pub dirty_mib_per_s: u64,
    /// The share of its memory that a guest keeps writing, in thousandths.
    pub working_set_permille: u32,
    /// What a host's link carries, in Mbit/s.
    pub link_mbit_per_s: u64,
}

impl Default for Assumptions {
    fn default() -> Self {
        Self {
            regime: Regime::Capacity,
            bid_permille: 10_000,
            notice_ms: 120_000,
            dirty_mib_per_s: 10,
            working_set_permille: 250,
            link_mbit_per_s: 1000,
        }
    }
}

impl Assumptions {
    /// What is wrong, if anything: a sentence that names the field and its range.
    fn check(&self) -> Result<(), String> {
        for (field, value, least, most) in [
            ("bid_permille", u64::from(self.bid_permille), 1, 100_000),
            ("notice_ms", self.notice_ms, 0, 86_400_000),
            ("dirty_mib_per_s", self.dirty_mib_per_s, 0, 1 << 20),
            ("working_set_permille", u64::from(self.working_set_permille), 0, 1000),
            ("link_mbit_per_s", self.link_mbit_per_s, 1, 1 << 20),
        ] {
            if !(least..=most).contains(&value) {
                return Err(format!("{field} is {value}; it must be {least} to {most}"));
            }
        }
        Ok(())
    }
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
        if let Err(what) = config.smart_spot.check() {
            bail!("in {}: [smart_spot] {what}", path.display());
        }
        if let Err(what) = config.assume.check() {
            bail!("in {}: [assume] {what}", path.display());
        }
        if let Some(Err(what)) = config.sun.as_ref().map(SunConfig::check) {
            bail!("in {}: [sun] {what}", path.display());
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

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, String> {
        let config: Config = toml::from_str(text).map_err(|error| error.to_string())?;
        config.policy.check()?;
        config.smart_spot.check()?;
        config.assume.check()?;
        Ok(config)
    }

    #[test]
    fn the_example_is_read_and_says_the_defaults() {
        let example = read(include_str!("../../../deploy/examples/spotd.toml")).unwrap();
        assert_eq!((example.policy_name, example.assume), (PolicyName::Cheapest, Assumptions::default()));
        assert_eq!((example.policy, example.smart_spot), Default::default());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let least = "url = 'https://c'\ntoken_file = 't'\n";
        for (text, expected) in [
            ("policy_name = 'clever'", "clever"),
            ("[assume]\nlink_mbit_per_s = 0", "link_mbit_per_s is 0; it must be 1 to"),
            ("[assume]\nnotice = 3", "notice"),
            ("[smart_spot]\nhorizon_ms = 0", "horizon_ms is 0"),
        ] {
            let said = read(&format!("{least}{text}")).unwrap_err();
            assert!(said.contains(expected), "{said}");
        }
    }
}
