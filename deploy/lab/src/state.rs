//! The lab's state folder, its locks and its number: enough to take a lab down after any crash.
//!
//! ```text
//! /var/lib/supercloud-lab/<name>.lock     held while the lab goes up or down
//! /var/lib/supercloud-lab/<name>/lab.json the number and what was asked for; written before anything is made
//!                               /wan.sock, wan.json, logs/, hosts/<host>/...
//! /run/supercloud-lab/lock                held while a number is taken and while a machine-wide setting is changed
//! ```

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::addressing::{LabIndex, MAX_INDEX};
use crate::netns;
use crate::spec::LabSpec;

/// A state folder that cannot be used.
#[derive(Debug, Error)]
pub enum StateError {
    /// The file system refused.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// All numbers are taken.
    #[error("all {MAX_INDEX} lab numbers of this machine are taken: take a lab down first")]
    NoIndex,
    /// There is no such lab.
    #[error("there is no lab {0:?} here (`supercloud-lab up` makes one)")]
    NoLab(String),
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.display().to_string();
    move |source| StateError::Io { what, path, source }
}

/// What is written down about a lab.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LabRecord {
    /// Its number on this machine.
    pub index: u8,
    /// What was asked for.
    pub spec: LabSpec,
}

/// The folder in which all labs of the machine keep their state.
#[must_use]
pub fn default_root() -> PathBuf {
    std::env::var_os("SUPERCLOUD_LAB_STATE").map_or_else(|| PathBuf::from("/var/lib/supercloud-lab"), PathBuf::from)
}

/// Where the machine-wide lock and what it guards live.
const MACHINE_DIR: &str = "/run/supercloud-lab";

/// Paths of one lab.
#[derive(Debug, Clone)]
pub struct StateDir {
    root: PathBuf,
    name: String,
}

impl StateDir {
    /// The folder of the lab `name` below `root`; nothing is made.
    #[must_use]
    pub fn new(root: &Path, name: &str) -> Self {
        Self { root: root.to_owned(), name: name.to_owned() }
    }

    /// The lab's own folder.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.root.join(&self.name)
    }

    /// A file or folder of the lab.
    #[must_use]
    pub fn join(&self, part: &str) -> PathBuf {
        self.path().join(part)
    }

    /// The folder of a site (host or controller).
    #[must_use]
    pub fn site(&self, site: &str) -> PathBuf {
        self.join("hosts").join(site)
    }

    /// The WAN's control socket.
    #[must_use]
    pub fn wan_socket(&self) -> PathBuf {
        self.join("wan.sock")
    }

    /// Waits until nobody else takes this lab up or down.
    ///
    /// # Errors
    /// When the lock file cannot be made.
    pub fn lock(&self) -> Result<Lock, StateError> {
        make_dir(&self.root)?;
        Lock::take(&self.root.join(format!("{}.lock", self.name)))
    }

    /// What is written down, if a lab is there.
    ///
    /// # Errors
    /// When it cannot be read; a record that makes no sense counts as none.
    pub fn record(&self) -> Result<Option<LabRecord>, StateError> {
        let path = self.join("lab.json");
        match fs::read(&path) {
            Ok(text) => Ok(serde_json::from_slice(&text).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io("read", &path)(error)),
        }
    }

    /// Takes the smallest free number and writes it down, before anything of the lab is made.
    ///
    /// # Errors
    /// When no number is free or the folder cannot be written.
    pub fn create(&self, spec: &LabSpec) -> Result<LabIndex, StateError> {
        let _machine = machine_lock()?;
        let taken = self.taken_indices();
        let index = (1..=MAX_INDEX)
            .filter_map(LabIndex::new)
            .find(|index| !taken.contains(&index.get()) && netns::list(&index.namespace_prefix()).is_empty())
            .ok_or(StateError::NoIndex)?;
        make_dir(&self.path())?;
        for part in ["logs", "hosts"] {
            make_dir(&self.join(part))?;
        }
        let record = LabRecord { index: index.get(), spec: spec.clone() };
        let (path, new) = (self.join("lab.json"), self.join("lab.json.new"));
        let text = serde_json::to_vec_pretty(&record).map_err(|error| io("write", &path)(error.into()))?;
        fs::write(&new, text).map_err(io("write", &new))?;
        fs::rename(&new, &path).map_err(io("write", &path))?;
        Ok(index)
    }

    fn taken_indices(&self) -> Vec<u8> {
        labs(&self.root)
            .into_iter()
            .filter(|name| *name != self.name)
            .filter_map(|name| Self::new(&self.root, &name).record().ok()?)
            .map(|record| record.index)
            .collect()
    }

    /// Removes the folder; one that is not there is fine.
    ///
    /// # Errors
    /// When something in it cannot be removed.
    pub fn remove(&self) -> Result<(), StateError> {
        match fs::remove_dir_all(self.path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io("remove", &self.path())(error)),
            _ => Ok(()),
        }
    }
}

/// The names of all labs below `root`.
#[must_use]
pub fn labs(root: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// Makes a folder that only root may enter (keys and tokens lie below).
///
/// # Errors
/// When it cannot be made.
pub fn make_dir(path: &Path) -> Result<(), StateError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io("make", path))
}

/// Makes a folder that everyone may enter.
///
/// # Errors
/// When it cannot be made.
pub fn make_dir_for_all(path: &Path) -> Result<(), StateError> {
    fs::create_dir_all(path).map_err(io("make", path))
}

/// Removes mount points that sites needed in the machine's own tree, where nothing is in them and no lab is up any more.
///
/// # Errors
/// When the machine-wide lock cannot be taken.
pub fn remove_mount_points(places: &[&str]) -> Result<(), StateError> {
    let _machine = machine_lock()?;
    if netns::list("scl-").is_empty() {
        for place in places {
            // Refused where something is in it: a real agent's data, say.
            let _ = fs::remove_dir(place);
        }
    }
    Ok(())
}

/// Writes a file that everyone may read.
///
/// # Errors
/// When it cannot be written.
pub fn write_public(path: &Path, text: &str) -> Result<(), StateError> {
    fs::write(path, text).map_err(io("write", path))
}

/// Writes a file that only root may read.
///
/// # Errors
/// When it cannot be written.
pub fn write_private(path: &Path, text: &str) -> Result<(), StateError> {
    fs::write(path, text).map_err(io("write", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(io("protect", path))
}

/// An exclusive lock that ends with this value or with the process.
#[derive(Debug)]
pub struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Waits for the lock on this file, which is made when it is not there.
    ///
    /// # Errors
    /// When the file cannot be made or locked.
    pub fn take(path: &Path) -> Result<Self, StateError> {
        loop {
            let file = File::options().create(true).append(true).open(path).map_err(io("open", path))?;
            // SAFETY: the descriptor is open.
            if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } < 0 {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(io("lock", path)(error));
                }
                continue;
            }
            let lock = Self { file, path: path.to_owned() };
            // Whoever held it before may have removed the file: then the lock is on nothing.
            if lock.is_of_its_path() {
                return Ok(lock);
            }
        }
    }

    fn is_of_its_path(&self) -> bool {
        let inode = |meta: io::Result<fs::Metadata>| meta.ok().map(|meta| (meta.dev(), meta.ino()));
        inode(self.file.metadata()).is_some_and(|own| inode(fs::metadata(&self.path)) == Some(own))
    }

    /// Removes the file with the lock.
    pub fn remove(self) {
        // One that cannot be removed only lies around.
        let _ = fs::remove_file(&self.path);
    }
}

/// Waits for the machine-wide lock, and puts right what a crashed holder left changed.
///
/// # Errors
/// When the lock cannot be made.
pub fn machine_lock() -> Result<Lock, StateError> {
    let dir = Path::new(MACHINE_DIR);
    make_dir(dir)?;
    let lock = Lock::take(&dir.join("lock"))?;
    let saved = dir.join("rmem_default");
    if let Ok(value) = fs::read_to_string(&saved) {
        fs::write(RMEM_DEFAULT, value).map_err(io("restore", Path::new(RMEM_DEFAULT)))?;
        fs::remove_file(&saved).map_err(io("remove", &saved))?;
    }
    Ok(lock)
}

const RMEM_DEFAULT: &str = "/proc/sys/net/core/rmem_default";

/// Open vSwitch's packet sockets take their receive buffer from this machine-wide default at their start; with less,
/// TCP through the overlay loses thousands of packets.
const SWITCH_RMEM_BYTES: u64 = 4 << 20;

/// Runs `work` (the start of a switch) while sockets are made with large receive buffers; restores the setting after it, or at the
/// next lock if this process dies meanwhile.
///
/// # Errors
/// When the lock or the setting fails, or `work` does.
pub fn with_large_receive_buffers<T, E: From<StateError>>(work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    let _machine = machine_lock()?;
    let setting = Path::new(RMEM_DEFAULT);
    let old = fs::read_to_string(setting).map_err(io("read", setting))?;
    if old.trim().parse::<u64>().is_ok_and(|bytes| bytes >= SWITCH_RMEM_BYTES) {
        return work();
    }
    let saved = Path::new(MACHINE_DIR).join("rmem_default");
    let part = saved.with_extension("new");
    fs::write(&part, &old).map_err(io("write", &part))?;
    fs::rename(&part, &saved).map_err(io("write", &saved))?;
    fs::write(setting, SWITCH_RMEM_BYTES.to_string()).map_err(io("set", setting))?;
    let result = work();
    fs::write(setting, &old).map_err(io("restore", setting))?;
    fs::remove_file(&saved).map_err(io("remove", &saved))?;
    result
}
