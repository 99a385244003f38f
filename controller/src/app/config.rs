//! The controller's settings: a TOML file.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use serde::Deserialize;
use supercloud_api::Tenure;

use crate::{evacuation::EvacuableConfig, notices::NoticesConfig, renting::ProviderConfig};

/// The largest settings file, in bytes.
const MAX_FILE_BYTES: usize = 1 << 20;

/// The settings.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where everything is kept: keys, CA, the embedded store, images.
    pub data_dir: PathBuf,
    /// Where REST is served.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Where agents dial.
    #[serde(default = "default_link_listen")]
    pub link_listen: SocketAddr,
    /// What agents are told to dial (`host:port`); the first of `names` with the port of `link_listen` when absent.
    #[serde(default)]
    pub link_address: Option<String>,
    /// Host names and addresses in the REST certificate. The first one is told to guests.
    #[serde(default = "default_names")]
    pub names: Vec<String>,
    /// REST without TLS; only where `listen` is a loopback address.
    #[serde(default)]
    pub plain_http: bool,
    /// Where the state is kept.
    #[serde(default)]
    pub store: StoreConfig,
    /// A price feed to replay.
    #[serde(default)]
    pub feed: Option<FeedConfig>,
    /// How chunk stores are swept.
    #[serde(default)]
    pub sweep: SweepConfig,
    /// Who rents hosts to us.
    #[serde(default)]
    pub providers: Vec<ProviderConfig>,
    /// The notice that providers are counted on to give before they take a host back, in seconds: who would take longer to leave
    /// is told of.
    #[serde(default = "default_notice_s")]
    pub notice_s: u64,
    /// What is done when one takes a host back, or says that it may.
    #[serde(default)]
    pub notices: NoticesConfig,
    /// What is done for guests that could not leave in time.
    #[serde(default)]
    pub evacuable: EvacuableConfig,
    /// What is logged, in the syntax of `RUST_LOG` (which goes before this).
    #[serde(default = "default_log")]
    pub log: String,
    /// Log lines as JSON.
    #[serde(default)]
    pub log_json: bool,
}

/// Where the state is kept: `"sled"` (the default: `data_dir/state`) or `{ etcd = ["http://127.0.0.1:2379"] }`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoreConfig {
    /// Embedded.
    #[default]
    Sled,
    /// In these etcd servers of one cluster.
    Etcd(Vec<String>),
}

/// How chunk stores, the controller's own and those of clouds, are swept of what nothing names any more.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SweepConfig {
    /// How often, in seconds; 0: only when somebody asks for it.
    pub every_s: u32,
}

impl Default for SweepConfig {
    fn default() -> Self {
        Self { every_s: 3600 }
    }
}

impl SweepConfig {
    /// How often.
    #[must_use]
    pub fn every(&self) -> Option<std::time::Duration> {
        (self.every_s > 0).then(|| std::time::Duration::from_secs(self.every_s.into()))
    }
}

/// A price feed to replay.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeedConfig {
    /// The feed.
    pub file: PathBuf,
    /// The feed's time at the first start, in milliseconds; later ones go on from where it was.
    #[serde(default)]
    pub start_ms: u64,
    /// Milliseconds of the feed per millisecond of wall time; 0: it stands still.
    #[serde(default = "default_speed")]
    pub speed: f64,
    /// In the ledger, hosts that joined by themselves count as rented in their cloud's first market of this tenure.
    #[serde(default = "default_own_hosts")]
    pub own_hosts: Tenure,
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 8443))
}

fn default_link_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 8444))
}

fn default_names() -> Vec<String> {
    vec!["localhost".to_owned(), "127.0.0.1".to_owned()]
}

fn default_log() -> String {
    "info".to_owned()
}

const fn default_notice_s() -> u64 {
    120
}

fn default_own_hosts() -> Tenure {
    Tenure::Spot
}

fn default_speed() -> f64 {
    1.0
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// It is no settings file: the text names line, column and field.
    #[error("{path}: {what}")]
    Syntax {
        /// The file.
        path: String,
        /// What is wrong where.
        what: String,
    },
    /// A field is out of range.
    #[error("{field} is {value}: {what}")]
    Field {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        what: &'static str,
    },
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// What is wrong, with line or field.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, &path.display().to_string())
    }

    /// Parses and checks a text; `name` is what errors call it.
    ///
    /// # Errors
    /// What is wrong, with line or field.
    pub fn parse(text: &str, name: &str) -> Result<Self, ConfigError> {
        let syntax = |what: String| ConfigError::Syntax { path: name.to_owned(), what };
        if text.len() > MAX_FILE_BYTES {
            return Err(syntax("larger than 1 MiB".to_owned()));
        }
        let config: Self = toml::from_str(text).map_err(|error| syntax(error.to_string().trim_end().to_owned()))?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let wrong =
            |field, value: &dyn ToString, what| Err(ConfigError::Field { field, value: value.to_string(), what });
        if !self.data_dir.is_absolute() {
            return wrong("data_dir", &self.data_dir.display(), "it must be an absolute path");
        }
        if self.plain_http && !self.listen.ip().is_loopback() {
            return wrong("listen", &self.listen, "plain_http is for loopback addresses only");
        }
        if self.names.is_empty() || self.names.len() > 64 {
            return wrong("names", &self.names.len(), "1 to 64 names or addresses are needed");
        }
        for name in &self.names {
            if !is_host(name) {
                return wrong("names", name, "a host name or an IP address is needed");
            }
        }
        if let Some(address) = &self.link_address {
            let parts = address.rsplit_once(':');
            let good = parts.is_some_and(|(host, port)| {
                is_host(host.trim_start_matches('[').trim_end_matches(']')) && port.parse::<u16>().is_ok_and(|p| p > 0)
            });
            if !good {
                return wrong("link_address", address, "it must be host:port");
            }
        }
        if let StoreConfig::Etcd(servers) = &self.store
            && servers.is_empty()
        {
            return wrong("store.etcd", &"empty", "at least one server is needed");
        }
        if let Some(feed) = &self.feed
            && !(0.0..=1e6).contains(&feed.speed)
        {
            return wrong("feed.speed", &feed.speed, "it must be 0 to 1000000");
        }
        Ok(())
    }

    /// What agents are told to dial.
    #[must_use]
    pub fn link_address(&self) -> String {
        self.link_address.clone().unwrap_or_else(|| host_port(&self.names[0], self.link_listen.port()))
    }

    /// The API's URL as told to guests.
    #[must_use]
    pub fn api_url(&self) -> String {
        let scheme = if self.plain_http { "http" } else { "https" };
        format!("{scheme}://{}", host_port(&self.names[0], self.listen.port()))
    }

    /// Where the embedded store lives.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.data_dir.join("state")
    }

    /// Where parts of images lie until they are imported: `<image>/<part>`.
    #[must_use]
    pub fn uploads_dir(&self) -> PathBuf {
        self.data_dir.join("uploads")
    }

    /// The controller's own chunk store: images live there.
    #[must_use]
    pub fn chunks_dir(&self) -> PathBuf {
        self.data_dir.join("store")
    }
}

fn host_port(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn is_host(name: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.parse::<IpAddr>().is_ok() || (name.len() <= 253 && name.split('.').all(is_label))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minimal_file_gets_defaults() {
        let config = Config::parse("data_dir = '/var/lib/x'\n", "c").unwrap();
        assert_eq!(config.listen.port(), 8443);
        assert_eq!(config.link_address(), "localhost:8444");
        assert_eq!(config.api_url(), "https://localhost:8443");
        assert_eq!(config.store, StoreConfig::Sled);
        assert_eq!(config.sweep.every().map(|every| every.as_secs()), Some(3600));
        let never = Config::parse("data_dir = '/x'\n[sweep]\nevery_s = 0\n", "c").unwrap();
        assert_eq!(never.sweep.every(), None);
    }

    #[test]
    fn stores_and_feeds_are_read() {
        let text =
            "data_dir = '/x'\nstore = { etcd = ['http://127.0.0.1:2379'] }\n[feed]\nfile = 'f.csv'\nspeed = 60.0\n";
        let config = Config::parse(text, "c").unwrap();
        assert_eq!(config.store, StoreConfig::Etcd(vec!["http://127.0.0.1:2379".into()]));
        assert_eq!(config.feed.unwrap().speed, 60.0);
        assert_eq!(Config::parse("data_dir='/x'\nstore='sled'", "c").unwrap().store, StoreConfig::Sled);
    }

    #[test]
    fn errors_name_line_or_field() {
        let cases = [
            ("data_dir = '/x'\nlisten = 'here'\n", "line 2"),
            ("data_dir = '/x'\nlissten = '127.0.0.1:1'\n", "lissten"),
            ("listen = '127.0.0.1:1'\n", "data_dir"),
            ("data_dir = 'x'", "data_dir is x"),
            ("data_dir = '/x'\nplain_http = true\n", "listen is 0.0.0.0:8443"),
            ("data_dir = '/x'\nnames = []\n", "names"),
            ("data_dir = '/x'\nnames = ['a b']\n", "names is a b"),
            ("data_dir = '/x'\nlink_address = 'host'\n", "link_address is host"),
            ("data_dir = '/x'\n[feed]\nfile = 'x'\nspeed = -1.0\n", "feed.speed"),
            ("data_dir = '/x'\nstore = { etcd = [] }\n", "store.etcd"),
        ];
        for (text, expected) in cases {
            let error = Config::parse(text, "c.toml").unwrap_err().to_string();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }
}
