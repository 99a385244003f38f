//! `supercloud context ...`: controllers by name, in `contexts.toml` beside the settings file. Secrets are never in it: it names
//! the files that hold them.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use supercloud_api::{
    Name,
    client::{Client, ClientConfig},
};
use supercloud_cli::table::Table;

use crate::{
    arguments::Output,
    settings::{self, Connection},
    show,
};

/// No secret of ours is longer, in bytes.
const SECRET_AT_MOST: u64 = 4096;

/// Verbs of contexts.
#[derive(Debug, Subcommand)]
pub enum ContextVerb {
    /// All contexts; the one in use is marked.
    List,
    /// One context: the one in use when no name is given. Secrets are never shown.
    Show {
        /// Its name.
        name: Option<String>,
    },
    /// Uses a context from now on. `--url`, SUPERCLOUD_URL and `url` in config.toml still win.
    Use {
        /// Its name.
        name: String,
    },
    /// Makes a context of what the options --url, --ca, --token-file and --project, or their variables, say; the first one is
    /// used at once. The files stay where they are.
    #[command(
        after_help = "Examples:\n  supercloud context add home --url https://controller.example:8443 --ca ca.pem --token-file admin.token\n  \
        printf %s \"$SECRET\" | supercloud context add shop --url https://controller.example:8443 --ca ca.pem --project shop --token-stdin --use"
    )]
    Add(ContextAdd),
    /// Forgets a context, and the secret that was kept for it.
    Remove {
        /// Its name.
        name: String,
    },
}

/// A new context.
#[derive(Debug, Args)]
pub struct ContextAdd {
    /// Its name.
    pub name: String,
    /// Read the token's secret from standard input and keep it in a file of mode 0600 beside the settings.
    #[arg(long)]
    pub token_stdin: bool,
    /// Use it from now on.
    #[arg(long = "use")]
    pub is_used: bool,
}

/// A controller, and how it is spoken to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    /// The controller's URL.
    pub url: String,
    /// The file that holds the token's secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// The file of the controller's CA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// The project for names and listings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
}

/// `contexts.toml`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contexts {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    current: Option<String>,
    #[serde(default)]
    contexts: BTreeMap<String, Context>,
}

/// A context as it is shown.
#[derive(Debug, Serialize)]
struct Shown<'a> {
    name: &'a str,
    is_current: bool,
    #[serde(flatten)]
    context: &'a Context,
}

impl Contexts {
    /// The contexts in this folder.
    pub fn read(folder: &Path) -> anyhow::Result<Self> {
        settings::read_toml(&folder.join("contexts.toml"))
    }

    /// Replaces the file as a whole.
    fn write(&self, folder: &Path) -> anyhow::Result<()> {
        let text = toml::to_string(self).context("writing the contexts as TOML")?;
        write_private(&folder.join("contexts.toml"), text.as_bytes())
    }

    /// A context by name.
    pub fn get(&self, name: &str) -> anyhow::Result<&Context> {
        self.contexts.get(name).with_context(|| {
            let known: Vec<&str> = self.contexts.keys().map(String::as_str).collect();
            let known = if known.is_empty() { "none yet".into() } else { known.join(", ") };
            format!("there is no context '{name}' (known: {known})")
        })
    }

    /// The context in use, if there is one.
    pub fn current(&self) -> anyhow::Result<Option<&Context>> {
        self.current.as_deref().map(|name| self.get(name)).transpose()
    }

    fn shown(&self) -> Vec<Shown<'_>> {
        let is_current = |name: &str| self.current.as_deref() == Some(name);
        self.contexts.iter().map(|(name, context)| Shown { name, is_current: is_current(name), context }).collect()
    }
}

/// A file that only its owner reads, replaced as a whole: what was there is there until all of the new is.
fn write_private(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let failed = || format!("writing {}", path.display());
    let folder = path.parent().with_context(failed)?;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).with_context(failed)?;
    let mut name = path.file_name().with_context(failed)?.to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let new = path.with_file_name(name);
    let written = (|| {
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&new, path)
    })();
    if written.is_err() {
        // Nothing half-written stays; what cannot be removed was not made.
        let _ignored = std::fs::remove_file(&new);
    }
    written.with_context(failed)
}

fn secret_path(folder: &Path, name: &Name) -> PathBuf {
    folder.join("tokens").join(name.as_str())
}

/// Runs a verb.
pub fn run(output: Output, connection: &Connection, verb: ContextVerb) -> anyhow::Result<()> {
    let folder = settings::folder()?;
    let mut contexts = Contexts::read(&folder)?;
    match verb {
        ContextVerb::List => {
            let shown = contexts.shown();
            show::print(output, &shown, || table(&shown))?;
            note_what_wins(connection)
        }
        ContextVerb::Show { name } => {
            let Some(name) = name.as_ref().or(contexts.current.as_ref()) else {
                bail!("no context is in use; `supercloud context list` lists them");
            };
            let context = contexts.get(name)?;
            show::print_one(output, &Shown { name, is_current: contexts.current.as_ref() == Some(name), context })
        }
        ContextVerb::Use { name } => {
            contexts.get(&name)?;
            contexts.current = Some(name);
            contexts.write(&folder)?;
            note_what_wins(connection)
        }
        ContextVerb::Add(wanted) => add(&folder, contexts, connection, &wanted),
        ContextVerb::Remove { name } => {
            contexts.get(&name)?;
            contexts.contexts.remove(&name);
            contexts.current.take_if(|current| *current == name);
            contexts.write(&folder)?;
            // Only the secret that `add` kept: a file that was only named is somebody else's.
            match std::fs::remove_file(secret_path(&folder, &name.parse()?)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).context("removing its secret"),
                _ => Ok(()),
            }
        }
    }
}

fn table(shown: &[Shown<'_>]) -> Table {
    let mut table = Table::new(["IN USE", "NAME", "URL", "PROJECT"]).and_wide(["TOKEN FILE", "CA"]);
    for one in shown {
        let path = |path: &Option<PathBuf>| path.as_ref().map_or_else(|| "-".into(), |path| path.display().to_string());
        let cells = [
            if one.is_current { "*" } else { "" }.into(),
            one.name.to_owned(),
            one.context.url.clone(),
            one.context.project.clone().unwrap_or_else(|| "-".into()),
        ];
        table.row_wide(cells, [path(&one.context.token_file), path(&one.context.ca)]);
    }
    table
}

fn note_what_wins(connection: &Connection) -> anyhow::Result<()> {
    if let Some(what) = connection.beats_contexts()? {
        eprintln!("note: {what} says where the controller is, and wins over the context in use");
    }
    Ok(())
}

fn add(folder: &Path, mut contexts: Contexts, from: &Connection, wanted: &ContextAdd) -> anyhow::Result<()> {
    let name: Name = wanted.name.parse()?;
    let url = from.url.clone().context("no controller given: use --url or SUPERCLOUD_URL")?;
    ensure!(from.token_file.is_none() || !wanted.token_stdin, "the secret is in a file or on standard input, not both");
    ensure!(!contexts.contexts.contains_key(name.as_str()), "there is a context '{name}' already; remove it first");
    let found = |path: &PathBuf| path.canonicalize().with_context(|| format!("opening {}", path.display()));
    let ca = from.ca.as_ref().map(found).transpose()?;
    let referenced = from.token_file.as_ref().map(found).transpose()?;
    let read_ca = |path: &PathBuf| std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()));
    // What makes no client is told now, not at the next command.
    Client::new(ClientConfig {
        url: url.clone(),
        token: None,
        ca_pem: ca.as_ref().map(read_ca).transpose()?,
        project: None,
    })?;
    let token_file = match referenced {
        Some(path) => {
            let mode = path.metadata().with_context(|| format!("reading {}", path.display()))?.permissions().mode();
            if mode & 0o077 != 0 {
                eprintln!("note: others may read {}: chmod 600 it", path.display());
            }
            Some(path)
        }
        None if wanted.token_stdin => {
            let mut secret = String::new();
            std::io::stdin()
                .lock()
                .take(SECRET_AT_MOST + 1)
                .read_to_string(&mut secret)
                .context("reading the secret")?;
            let secret = secret.trim();
            ensure!(!secret.is_empty(), "standard input has no secret");
            ensure!(secret.len() as u64 <= SECRET_AT_MOST, "what standard input has is no secret of a token");
            let path = secret_path(folder, &name);
            write_private(&path, secret.as_bytes())?;
            Some(path)
        }
        None => None,
    };
    let context = Context { url, token_file, ca, project: from.project.clone() };
    if wanted.is_used || contexts.contexts.is_empty() {
        contexts.current = Some(name.to_string());
    }
    contexts.contexts.insert(name.to_string(), context);
    contexts.write(folder)
}
