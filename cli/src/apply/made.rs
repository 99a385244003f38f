//! What an earlier `apply` of the same file has made. The API has no labels, so it is kept in a file beside the fleet's:
//! `fleet.toml.made.json`. Only what stands in it, by id, is ever deleted; what it lacks is never deleted.

use std::{
    collections::BTreeMap,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};
use supercloud_api::ids::RequestId;

use super::fleet::{Key, Kind};

/// The form of the file that this program writes.
const VERSION: u32 = 1;

/// What was made, by id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Made {
    version: u32,
    /// The things.
    pub things: BTreeMap<String, MadeThing>,
    /// Calls that make something, by their idempotency keys, of which no answer has come: written before they are sent, gone with
    /// their answers.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub begun: BTreeMap<RequestId, Begun>,
}

/// A call that makes something. It is repeated as it was sent: only then the controller knows it again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Begun {
    /// What it makes.
    #[serde(flatten)]
    pub thing: MadeThing,
    /// Where it goes to.
    pub path: String,
    /// What it says. That of a guest may have secrets (cloud-init): the file is for its owner's eyes.
    pub body: serde_json::Value,
}

/// A thing that was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MadeThing {
    /// What it is.
    pub kind: Kind,
    /// Its name.
    #[serde(flatten)]
    pub key: Key,
    /// Of a guest: the hash of what the API does not show (see `WantedGuest::hidden_inputs`). Of an image: which files it was
    /// uploaded from (see `WantedImage::files`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden_inputs: Option<String>,
}

impl Default for Made {
    fn default() -> Self {
        Self { version: VERSION, things: BTreeMap::new(), begun: BTreeMap::new() }
    }
}

impl Made {
    /// Where it is kept for a fleet's file.
    pub fn path(fleet: &Path) -> PathBuf {
        let mut name = fleet.file_name().unwrap_or_default().to_owned();
        name.push(".made.json");
        fleet.with_file_name(name)
    }

    /// What was made so far; nothing where the file is not there.
    ///
    /// # Errors
    /// When it cannot be read, or is of another form.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        let made: Self = serde_json::from_slice(&text).with_context(|| format!("in {}", path.display()))?;
        ensure!(
            made.version == VERSION,
            "{} is of form {}; this program knows {VERSION}",
            path.display(),
            made.version
        );
        Ok(made)
    }

    /// Notes a call that is about to be sent, and says with which key: its own, or that of the very same call of an earlier run.
    pub fn begin(&mut self, call: Begun) -> RequestId {
        if let Some((key, _)) = self.begun.iter().find(|(_, known)| **known == call) {
            return *key;
        }
        let key = RequestId::generate();
        self.begun.insert(key, call);
        key
    }

    /// Notes what a call has made.
    pub fn end(&mut self, key: RequestId, id: String) {
        if let Some(begun) = self.begun.remove(&key) {
            self.things.insert(id, begun.thing);
        }
    }

    /// Replaces the file as a whole, and is on the disk when it returns.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let failed = || format!("writing {}", path.display());
        let mut name = path.file_name().with_context(failed)?.to_owned();
        name.push(format!(".{}.new", std::process::id()));
        let new = path.with_file_name(name);
        let mut text = serde_json::to_string_pretty(self).with_context(failed)?;
        text.push('\n');
        let written = (|| {
            // A leftover of a process of this number that was killed may have other rights.
            let _not_there = std::fs::remove_file(&new);
            let mut file = std::fs::File::options().write(true).create_new(true).mode(0o600).open(&new)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&new, path)
        })();
        if written.is_err() {
            // Nothing half-written stays; what cannot be removed was not made.
            let _ignored = std::fs::remove_file(&new);
        }
        written.with_context(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_is_found_again_and_another_form_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = Made::path(&folder.path().join("fleet.toml"));
        assert_eq!(path.file_name().unwrap(), "fleet.toml.made.json");
        assert_eq!(Made::read(&path).unwrap(), Made::default());
        let mut made = Made::default();
        let key = Key { project: "shop".parse().unwrap(), name: "web".parse().unwrap() };
        made.things.insert("gst-1".into(), MadeThing { kind: Kind::Guest, key, hidden_inputs: Some("ab".into()) });
        let key = Key { project: "shop".parse().unwrap(), name: "db".parse().unwrap() };
        let thing = MadeThing { kind: Kind::Guest, key, hidden_inputs: Some("cd".into()) };
        let call = Begun { thing: thing.clone(), path: "/v1/guests".into(), body: serde_json::json!({ "a": 1 }) };
        let first = made.begin(call.clone());
        assert_eq!(made.begin(call.clone()), first, "the same call has one key");
        let other = made.begin(Begun { body: serde_json::json!({ "a": 2 }), ..call });
        assert_ne!(other, first);
        made.write(&path).unwrap();
        assert_eq!(Made::read(&path).unwrap(), made);
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions()) & 0o777, 0o600);
        made.end(first, "gst-2".into());
        assert_eq!((made.things.get("gst-2"), made.begun.len()), (Some(&thing), 1));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else stays");
        std::fs::write(&path, "{\"version\":2,\"things\":{}}").unwrap();
        assert!(Made::read(&path).unwrap_err().to_string().contains("form 2"));
    }
}
