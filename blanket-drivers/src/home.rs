//! What a back end whose guests outlive its agent keeps of each, for who comes after: a folder below its run directory.
//!
//! ```text
//! <run_dir>/<guest>/record.json   what the guest is here, in the back end's own words
//! <run_dir>/ended/<guest>         how it ended
//! ```

use std::{
    fs, io,
    os::unix::{fs::DirBuilderExt as _, net::UnixListener},
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};
use supercloud_ids::GuestId;

use crate::backend::StopReason;

/// Where things of one guest are.
#[derive(Debug, Clone)]
pub struct Home {
    /// Which guest.
    pub guest: GuestId,
    /// Its folder.
    pub folder: PathBuf,
    ended: PathBuf,
}

/// Listens at a guest's socket, for this user and root alone; what lay there before is removed.
///
/// # Errors
/// What the file system says.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt as _;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

const ENDED: &str = "ended";

impl Home {
    /// Those of a guest below a back end's run directory.
    #[must_use]
    pub fn new(run_dir: &Path, guest: GuestId) -> Self {
        Self { guest, folder: run_dir.join(guest.to_string()), ended: run_dir.join(ENDED).join(guest.to_string()) }
    }

    /// Makes the folder of all guests; those that have one there. Blocking, as all of these.
    ///
    /// # Errors
    /// What the file system says.
    pub fn all(run_dir: &Path) -> io::Result<Vec<Self>> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(run_dir.join(ENDED))?;
        let mut all = Vec::new();
        for entry in fs::read_dir(run_dir)? {
            let name = entry?.file_name();
            if let Some(guest) = name.to_str().and_then(|name| name.parse().ok()) {
                all.push(Self::new(run_dir, guest));
            }
        }
        Ok(all)
    }

    /// An empty folder; what was there before is gone.
    ///
    /// # Errors
    /// What the file system says.
    pub fn make(&self) -> io::Result<()> {
        self.remove()?;
        fs::DirBuilder::new().mode(0o700).create(&self.folder)
    }

    /// How it ended before is forgotten: it is there.
    ///
    /// # Errors
    /// What the file system says.
    pub fn begin(&self) -> io::Result<()> {
        gone(fs::remove_file(&self.ended))
    }

    /// Removes the folder.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove(&self) -> io::Result<()> {
        gone(fs::remove_dir_all(&self.folder))
    }

    /// Keeps a record, whole or not at all.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self, record: &impl Serialize) -> io::Result<()> {
        write(&self.folder.join("record.json"), &serde_json::to_vec(record)?)
    }

    /// The record; `None` when there is none.
    ///
    /// # Errors
    /// What the file system says, or when it is not such a record.
    pub fn read<R: DeserializeOwned>(&self) -> io::Result<Option<R>> {
        match fs::read(self.folder.join("record.json")) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Remembers how it ended, for who was not there to hear of it.
    ///
    /// # Errors
    /// What the file system says.
    pub fn note_end(&self, reason: StopReason) -> io::Result<()> {
        write(&self.ended, word(reason).as_bytes())
    }

    /// How it ended, as far as it was noted.
    ///
    /// # Errors
    /// What the file system says.
    pub fn how_it_ended(&self) -> io::Result<Option<StopReason>> {
        match fs::read_to_string(&self.ended) {
            Ok(text) => Ok(REASONS.into_iter().find(|reason| word(*reason) == text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

const REASONS: [StopReason; 6] = [
    StopReason::PoweredOff,
    StopReason::Killed,
    StopReason::Crashed,
    StopReason::Departed,
    StopReason::Frozen,
    StopReason::Failed,
];

const fn word(reason: StopReason) -> &'static str {
    match reason {
        StopReason::PoweredOff => "powered off",
        StopReason::Killed => "killed",
        StopReason::Crashed => "crashed",
        StopReason::Departed => "departed",
        StopReason::Frozen => "frozen",
        StopReason::Failed => "failed",
    }
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    removed.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

/// Whole or not at all, for who reads it while this host is up.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, bytes)?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn homes_are_found_and_ends_are_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let guest = GuestId::generate();
        assert!(Home::all(folder.path()).unwrap().is_empty());
        let home = Home::new(folder.path(), guest);
        home.make().unwrap();
        fs::write(folder.path().join("else"), b"").unwrap();
        let found: Vec<_> = Home::all(folder.path()).unwrap().into_iter().map(|home| home.guest).collect();
        assert_eq!(found, [guest]);
        assert_eq!((home.read::<u32>().unwrap(), home.how_it_ended().unwrap()), (None, None));
        home.write(&7).unwrap();
        assert_eq!(home.read().unwrap(), Some(7));
        for reason in REASONS {
            home.note_end(reason).unwrap();
            assert_eq!(home.how_it_ended().unwrap(), Some(reason));
        }
        home.begin().unwrap();
        home.begin().unwrap();
        assert_eq!(home.how_it_ended().unwrap(), None);
        fs::write(home.folder.join("record.json"), b"{}").unwrap();
        assert!(home.read::<u32>().is_err());
        home.remove().unwrap();
        home.remove().unwrap();
        assert!(Home::all(folder.path()).unwrap().is_empty());
    }
}
