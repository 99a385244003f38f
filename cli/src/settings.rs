//! Where the controller is: options, then environment, then the file in the user's configuration folder.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Args;
use serde::Deserialize;
use supercloud_api::client::{Client, ClientConfig};

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Connection {
    /// The controller's URL.
    #[arg(long, global = true, env = "SUPERCLOUD_URL")]
    pub url: Option<String>,
    /// A file that holds the token's secret.
    #[arg(long, global = true, env = "SUPERCLOUD_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
    /// The controller's CA (PEM).
    #[arg(long, global = true, env = "SUPERCLOUD_CA")]
    pub ca: Option<PathBuf>,
    /// The project for names and listings, when the token is good for all.
    #[arg(long, global = true, env = "SUPERCLOUD_PROJECT")]
    pub project: Option<String>,
}

/// `$XDG_CONFIG_HOME/supercloud/config.toml`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    url: Option<String>,
    token_file: Option<PathBuf>,
    ca: Option<PathBuf>,
    project: Option<String>,
}

fn file() -> anyhow::Result<File> {
    let folder = std::env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config")));
    let Some(path) = folder.map(|folder| folder.join("supercloud/config.toml")).filter(|path| path.exists()) else {
        return Ok(File::default());
    };
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("in {}", path.display()))
}

impl Connection {
    /// The client that these settings make.
    pub fn client(&self) -> anyhow::Result<Client> {
        let file = file()?;
        let Some(url) = self.url.clone().or(file.url) else {
            bail!(
                "no controller given: use --url, SUPERCLOUD_URL, or url = \"https://…\" in ~/.config/supercloud/config.toml"
            );
        };
        let read =
            |path: PathBuf| std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()));
        let token = match std::env::var("SUPERCLOUD_TOKEN") {
            Ok(token) => Some(token),
            Err(_) => self.token_file.clone().or(file.token_file).map(read).transpose()?,
        };
        let ca_pem = self.ca.clone().or(file.ca).map(read).transpose()?;
        Ok(Client::new(ClientConfig {
            url,
            token: token.map(|token| token.trim().to_owned()),
            ca_pem,
            project: self.project.clone().or(file.project),
        })?)
    }
}
