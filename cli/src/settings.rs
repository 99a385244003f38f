//! Where the controller is: options, then environment, then the settings file, then the context in use.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Args;
use serde::Deserialize;
use supercloud_api::client::{Client, ClientConfig};

use crate::contexts::{Context, Contexts};

/// Options of every command.
#[derive(Debug, Clone, Default, Args)]
pub struct Connection {
    /// The controller's URL.
    #[arg(long, global = true, help_heading = "Controller", env = "SUPERCLOUD_URL")]
    pub url: Option<String>,
    /// A file that holds the token's secret.
    #[arg(long, global = true, help_heading = "Controller", env = "SUPERCLOUD_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
    /// The controller's CA (PEM).
    #[arg(long, global = true, help_heading = "Controller", env = "SUPERCLOUD_CA")]
    pub ca: Option<PathBuf>,
    /// The project for names and listings, when the token is good for all.
    #[arg(long, global = true, help_heading = "Controller", env = "SUPERCLOUD_PROJECT")]
    pub project: Option<String>,
    /// The context for this command, instead of the one in use (see `supercloud context`).
    #[arg(long, global = true, help_heading = "Controller", env = "SUPERCLOUD_CONTEXT", value_name = "NAME")]
    pub context: Option<String>,
}

/// `config.toml` in the folder of settings.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    url: Option<String>,
    token_file: Option<PathBuf>,
    ca: Option<PathBuf>,
    project: Option<String>,
}

/// `$XDG_CONFIG_HOME/supercloud`, or `~/.config/supercloud`.
///
/// # Errors
/// When neither variable is set.
pub fn folder() -> anyhow::Result<PathBuf> {
    let base = std::env::var_os("XDG_CONFIG_HOME")
        .filter(|base| !base.is_empty())
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config")));
    base.map(|base| base.join("supercloud")).context("neither XDG_CONFIG_HOME nor HOME is set: where are the settings?")
}

/// What stands in a TOML file; what is the default where there is none.
pub fn read_toml<T: Default + serde::de::DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    match std::fs::read_to_string(path) {
        Ok(text) => toml::from_str(&text).with_context(|| format!("in {}", path.display())),
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            Ok(T::default())
        }
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// What a client is made of; the secret is not read yet.
#[derive(Debug, PartialEq, Eq)]
struct Settings {
    url: String,
    token_file: Option<PathBuf>,
    ca: Option<PathBuf>,
    project: Option<String>,
}

/// A context counts as a whole and only where nothing else says where the controller is, so that its token goes nowhere else.
fn settle(options: &Connection, file: File, contexts: &Contexts) -> anyhow::Result<Settings> {
    let context = match (&options.context, &options.url) {
        (Some(name), Some(url)) => {
            bail!(
                "both a context ({name}) and a URL ({url}) are given: leave out one (--context, SUPERCLOUD_CONTEXT, --url, SUPERCLOUD_URL)"
            )
        }
        (Some(name), None) => return Ok(settings_of(options, contexts.get(name)?.clone())),
        (None, Some(_)) => None,
        (None, None) if file.url.is_some() => None,
        (None, None) => contexts.current()?,
    };
    if let Some(context) = context {
        let File { token_file, ca, project, .. } = file;
        let context = Context {
            url: context.url.clone(),
            token_file: token_file.or_else(|| context.token_file.clone()),
            ca: ca.or_else(|| context.ca.clone()),
            project: project.or_else(|| context.project.clone()),
        };
        return Ok(settings_of(options, context));
    }
    let Some(url) = options.url.clone().or(file.url) else {
        bail!(
            "no controller given: use --url, SUPERCLOUD_URL, `supercloud context add`, or url = \"https://…\" in ~/.config/supercloud/config.toml"
        );
    };
    Ok(settings_of(options, Context { url, token_file: file.token_file, ca: file.ca, project: file.project }))
}

/// A context with what options and environment say instead.
fn settings_of(options: &Connection, context: Context) -> Settings {
    Settings {
        url: context.url,
        token_file: options.token_file.clone().or(context.token_file),
        ca: options.ca.clone().or(context.ca),
        project: options.project.clone().or(context.project),
    }
}

impl Connection {
    /// The client that these settings make.
    pub fn client(&self) -> anyhow::Result<Client> {
        let folder = folder().ok();
        let (file, contexts) = match &folder {
            Some(folder) => (read_toml(&folder.join("config.toml"))?, Contexts::read(folder)?),
            None => (File::default(), Contexts::default()),
        };
        let settings = settle(self, file, &contexts)?;
        let read =
            |path: &PathBuf| std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()));
        let token = match std::env::var("SUPERCLOUD_TOKEN") {
            Ok(token) => Some(token),
            Err(_) => settings.token_file.as_ref().map(read).transpose()?,
        };
        Ok(Client::new(ClientConfig {
            url: settings.url,
            token: token.map(|token| token.trim().to_owned()),
            ca_pem: settings.ca.as_ref().map(read).transpose()?,
            project: settings.project,
        })?)
    }

    /// What says where the controller is before any context in use does.
    pub fn beats_contexts(&self) -> anyhow::Result<Option<&'static str>> {
        let file: File = read_toml(&folder()?.join("config.toml"))?;
        Ok(match (&self.url, file.url) {
            (Some(_), _) => Some("--url or SUPERCLOUD_URL"),
            (None, Some(_)) => Some("url in config.toml"),
            (None, None) => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contexts() -> Contexts {
        toml::from_str(
            "current = \"home\"\n[contexts.home]\nurl = \"https://home\"\ntoken_file = \"/t/home\"\nca = \"/c/home\"\n\
             [contexts.work]\nurl = \"https://work\"\ntoken_file = \"/t/work\"\nproject = \"shop\"\n",
        )
        .unwrap()
    }

    fn options(url: Option<&str>, context: Option<&str>) -> Connection {
        Connection { url: url.map(Into::into), context: context.map(Into::into), ..Connection::default() }
    }

    #[test]
    fn the_context_in_use_counts_where_nothing_else_says_where() {
        let found = settle(&options(None, None), File::default(), &contexts()).unwrap();
        assert_eq!((found.url.as_str(), found.token_file), ("https://home", Some("/t/home".into())));
        let found = settle(&options(None, Some("work")), File::default(), &contexts()).unwrap();
        assert_eq!((found.url.as_str(), found.project), ("https://work", Some("shop".into())));
        let more = Connection { project: Some("other".into()), ..options(None, Some("work")) };
        assert_eq!(settle(&more, File::default(), &contexts()).unwrap().project, Some("other".into()));
    }

    #[test]
    fn a_contexts_token_never_goes_where_the_context_does_not_say() {
        let file = || File { url: Some("https://file".into()), ..File::default() };
        for (options, file) in [(options(Some("https://there"), None), File::default()), (options(None, None), file())]
        {
            let found = settle(&options, file, &contexts()).unwrap();
            assert_eq!((found.token_file, found.ca, found.project), (None, None, None), "{}", found.url);
        }
        assert!(settle(&options(Some("https://there"), Some("work")), File::default(), &contexts()).is_err());
    }

    #[test]
    fn without_a_context_it_is_as_before() {
        let file = File { url: Some("https://file".into()), token_file: Some("/t/file".into()), ..File::default() };
        let found = settle(&options(Some("https://there"), None), file.clone(), &Contexts::default()).unwrap();
        assert_eq!((found.url.as_str(), found.token_file), ("https://there", Some("/t/file".into())));
        assert_eq!(settle(&options(None, None), file, &Contexts::default()).unwrap().url, "https://file");
        assert!(settle(&options(None, None), File::default(), &Contexts::default()).is_err());
        assert!(settle(&options(None, Some("none")), File::default(), &contexts()).is_err());
    }
}
