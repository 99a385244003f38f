//! The providers of the settings: `[[providers]]`.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use serde::Deserialize;
use supercloud_provider::{Bounded, Machine, OwnMachines};
use supercloud_provider_ec2::Settings;

/// A provider's settings.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ProviderConfig {
    /// What clouds name it by (`supercloud cloud create NAME --provider THIS`).
    pub name: String,
    /// A file with what a launched machine does at its first boot, with `{{join_token}}`, `{{host_name}}` and
    /// `{{controller_url}}` in it; a cloud-config for images with an agent when absent.
    #[serde(default)]
    pub user_data_file: Option<PathBuf>,
    /// What speaks with it.
    #[serde(flatten)]
    pub driver: DriverConfig,
}

/// The drivers and their settings.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "driver", rename_all = "snake_case", deny_unknown_fields)]
pub enum DriverConfig {
    /// Own machines by address.
    Static {
        /// The machines.
        machines: Vec<Machine>,
    },
    /// EC2, or a server that speaks its API; carried out by builds with the feature `ec2`.
    Ec2(Box<Settings>),
}

/// Why a provider's settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProviderConfigError {
    /// A field is wrong.
    #[error("provider {name}: {what}")]
    Field {
        /// Which provider.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// The first boot's script cannot be read.
    #[error("provider {name}: cannot read {path}")]
    UserData {
        /// Which provider.
        name: String,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// A provider that can be asked.
#[derive(Debug, Clone)]
pub struct Configured {
    /// It.
    pub provider: Bounded,
    /// The first boot's script, before names are filled in.
    pub user_data: Arc<str>,
}

/// The providers by name. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Providers(Arc<BTreeMap<String, Configured>>);

/// EC2 takes 16 KiB of user-data; the names that are filled in are short.
const USER_DATA_AT_MOST: usize = 14 << 10;

impl Providers {
    /// Opens what the settings name. Reads files: call it where blocking is allowed.
    ///
    /// # Errors
    /// What is wrong with which provider.
    pub fn open(configs: &[ProviderConfig]) -> Result<Self, ProviderConfigError> {
        let mut all = BTreeMap::new();
        for config in configs {
            let name = config.name.clone();
            let wrong = |what: String| ProviderConfigError::Field { name: name.clone(), what };
            let is_name = (1..=63).contains(&name.len())
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
            if !is_name {
                return Err(wrong("its name must be 1 to 63 lower-case letters, digits and dashes".to_owned()));
            }
            let user_data = match &config.user_data_file {
                None => super::text::USER_DATA.to_owned(),
                Some(path) => std::fs::read_to_string(path).map_err(|source| ProviderConfigError::UserData {
                    name: name.clone(),
                    path: path.clone(),
                    source,
                })?,
            };
            if user_data.len() > USER_DATA_AT_MOST {
                return Err(wrong("its user_data_file is larger than 14 KiB".to_owned()));
            }
            if !user_data.contains("{{join_token}}") {
                return Err(wrong("its user_data_file does not use {{join_token}}: no host would join".to_owned()));
            }
            let provider = match &config.driver {
                #[cfg(feature = "ec2")]
                DriverConfig::Ec2(settings) => {
                    let driver = supercloud_provider_ec2::Ec2::new((**settings).clone());
                    Bounded::new(Arc::new(driver.map_err(wrong)?))
                }
                #[cfg(not(feature = "ec2"))]
                DriverConfig::Ec2(settings) => {
                    settings.check().map_err(wrong)?;
                    let what = "this build has no EC2 client: build supercloud-controller with --features ec2";
                    return Err(wrong(what.to_owned()));
                }
                DriverConfig::Static { machines } => {
                    Bounded::new(Arc::new(OwnMachines::new(&name, machines.clone()).map_err(wrong)?))
                }
            };
            if all.insert(name.clone(), Configured { provider, user_data: user_data.into() }).is_some() {
                return Err(ProviderConfigError::Field { name, what: "there are two of this name".to_owned() });
            }
        }
        Ok(Self(Arc::new(all)))
    }

    /// These providers, with the usual script.
    #[must_use]
    pub fn of(providers: impl IntoIterator<Item = (String, Bounded)>) -> Self {
        let configured = |provider| Configured { provider, user_data: super::text::USER_DATA.into() };
        Self(Arc::new(providers.into_iter().map(|(name, provider)| (name, configured(provider))).collect()))
    }

    /// The provider of a name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Configured> {
        self.0.get(name)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Configured)> {
        self.0.iter().map(|(name, configured)| (name.as_str(), configured))
    }
}
