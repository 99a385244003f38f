//! What an operator says of EC2.

use std::collections::BTreeMap;

use serde::Deserialize;
use supercloud_scheduler::money::NanoUsd;

/// The settings of one region or zone.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The region, for example `eu-central-1`.
    pub region: String,
    /// Only this zone of it.
    #[serde(default)]
    pub zone: Option<String>,
    /// A server that speaks EC2's API, in place of EC2's own.
    #[serde(default)]
    pub endpoint_url: Option<String>,
    /// The image that hosts start from: with an agent installed, or with a first boot's script that installs it.
    pub image_id: String,
    /// The subnet; the default one of the zone when absent.
    #[serde(default)]
    pub subnet_id: Option<String>,
    /// Security groups.
    #[serde(default)]
    pub security_group_ids: Vec<String>,
    /// A key pair for people to log in with.
    #[serde(default)]
    pub key_name: Option<String>,
    /// The profile of rights that hosts have.
    #[serde(default)]
    pub instance_profile: Option<String>,
    /// On-demand prices per hour in USD by type: EC2's own API does not tell them.
    #[serde(default)]
    pub on_demand_usd_per_hour: BTreeMap<String, String>,
    /// What a GiB costs in USD that leaves for other clouds, by their names; `"*"` for all others.
    #[serde(default)]
    pub egress_usd_per_gib: BTreeMap<String, String>,
}

impl Settings {
    /// Prices of a table, exact.
    ///
    /// # Errors
    /// Which entry is no amount.
    pub(crate) fn amounts(table: &BTreeMap<String, String>, field: &str) -> Result<BTreeMap<String, NanoUsd>, String> {
        table
            .iter()
            .map(|(name, text)| {
                let amount = NanoUsd::parse_usd(text).map_err(|error| format!("{field}: {name}: {error}"))?;
                Ok((name.clone(), amount))
            })
            .collect()
    }

    /// Checks what can be checked without asking.
    ///
    /// # Errors
    /// A sentence that names the field.
    pub fn check(&self) -> Result<(), String> {
        let is_word = |text: &str| (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
        if !is_word(&self.region) {
            return Err("region must be a word like eu-central-1".to_owned());
        }
        if let Some(zone) = self.zone.as_deref().filter(|zone| !zone.starts_with(&self.region)) {
            return Err(format!("zone {zone} is not in region {}", self.region));
        }
        if !self.image_id.starts_with("ami-") {
            return Err(format!("image_id is '{}'; an AMI's id like ami-0123456789abcdef0 is needed", self.image_id));
        }
        Self::amounts(&self.on_demand_usd_per_hour, "on_demand_usd_per_hour")?;
        Self::amounts(&self.egress_usd_per_gib, "egress_usd_per_gib")?;
        Ok(())
    }
}
