//! The volume process's configuration: one JSON file, read once at start.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use supercloud_ids::{Epoch, ProjectId, VolumeId};

use crate::{
    block_count,
    key::{ContentRoot, KeyError, ProjectKey},
};

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration {path}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is not a configuration.
    #[error("the configuration {path} is malformed")]
    Parse {
        /// The file.
        path: String,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A value is out of range.
    #[error("the configuration's {field} {why}")]
    Value {
        /// The field.
        field: &'static str,
        /// What is wrong.
        why: String,
    },
    /// The project's key could not be had.
    #[error("the project's key cannot be had")]
    Key(#[from] KeyError),
}

/// Where the project's key comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeySource {
    /// A file of mode 0600 (or stricter) with 64 hexadecimal digits.
    File(PathBuf),
    /// An inherited descriptor, read to its end.
    Fd(i32),
}

impl KeySource {
    /// Reads the key. Blocking.
    pub fn read(&self) -> Result<ProjectKey, ConfigError> {
        match self {
            Self::File(path) => Ok(ProjectKey::from_file(path)?),
            Self::Fd(fd) => {
                use std::io::Read as _;
                // Through /proc, so that a wrong number is an error and never somebody else's open file closed by us.
                let path = format!("/proc/self/fd/{fd}");
                let read = |source| ConfigError::Read { path: path.clone(), source };
                let mut text = String::new();
                std::fs::File::open(&path).map_err(read)?.take(256).read_to_string(&mut text).map_err(read)?;
                Ok(ProjectKey::from_hex(&text)?)
            }
        }
    }
}

/// The role of a volume that is made new; a volume that is there already has its role in its journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartRole {
    /// It is the only copy: writable at this epoch at once.
    Active {
        /// The guest's epoch.
        epoch: Epoch,
    },
    /// It is the destination of a move: it waits to be adopted and activated.
    Standby,
}

/// How the NBD socket treats a second client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum NbdMode {
    /// A second client is refused while one is connected.
    #[default]
    Exclusive,
    /// A new client replaces the old one, after what the old one had under way has ended: for QEMU with reconnect.
    Replace,
}

const fn default_cache_bytes() -> u64 {
    64 << 20
}

/// What a volume process is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeProcessConfig {
    /// The volume.
    pub volume: VolumeId,
    /// Its project.
    pub project: ProjectId,
    /// Its size in bytes: a multiple of 512, at most 2 TiB, at least the base's size.
    pub size_bytes: u64,
    /// The manifest that it starts from; zeros when none.
    #[serde(default)]
    pub base: Option<ContentRoot>,
    /// The role when it is made new.
    pub start: StartRole,
    /// The folder of its data and journal, on a disk that keeps what is synced. Made when not there (0700).
    pub data_folder: PathBuf,
    /// The folder of its sockets. Made when not there (0700).
    pub run_folder: PathBuf,
    /// The folder of this cloud's directory store: base chunks are read from it, published ones stored in it.
    pub store_folder: PathBuf,
    /// The project's key.
    pub key: KeySource,
    /// A socket that leads to the peer socket of the source of a move.
    #[serde(default)]
    pub peer_dial: Option<PathBuf>,
    /// A socket that leads to a chunk server for what the local store lacks.
    #[serde(default)]
    pub chunk_dial: Option<PathBuf>,
    /// How a second NBD client is treated.
    #[serde(default)]
    pub nbd: NbdMode,
    /// User ids that may connect to the NBD socket besides root and the process's own (QEMU's).
    #[serde(default)]
    pub nbd_uids: Vec<u32>,
    /// The agent's user: the only one besides root (and QEMU, at the NBD socket) that may connect. The process's own when
    /// absent; a process that runs as another user than the agent shares that user with other volumes' processes.
    #[serde(default)]
    pub agent_uid: Option<u32>,
    /// Memory for decrypted base blocks, in bytes.
    #[serde(default = "default_cache_bytes")]
    pub cache_bytes: u64,
}

impl VolumeProcessConfig {
    /// Reads and checks a configuration file. Blocking.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        use std::io::Read as _;
        let name = || path.display().to_string();
        let mut text = String::new();
        std::fs::File::open(path)
            .and_then(|file| file.take(1 << 20).read_to_string(&mut text))
            .map_err(|source| ConfigError::Read { path: name(), source })?;
        let config: Self = serde_json::from_str(&text).map_err(|source| ConfigError::Parse { path: name(), source })?;
        config.validate()?;
        Ok(config)
    }

    /// Checks what the types do not.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if block_count(self.size_bytes).is_none() {
            let why = format!("of {} is not a multiple of 512 up to 2 TiB", self.size_bytes);
            return Err(ConfigError::Value { field: "size_bytes", why });
        }
        if self.cache_bytes > 64 << 30 {
            return Err(ConfigError::Value { field: "cache_bytes", why: "is above 64 GiB".into() });
        }
        // sockaddr_un holds 107 bytes of path.
        if self.control_socket().as_os_str().len() > 107 {
            let why = format!("{} is too long for a unix socket's path", self.run_folder.display());
            return Err(ConfigError::Value { field: "run_folder", why });
        }
        Ok(())
    }

    /// The guest's disk.
    #[must_use]
    pub fn nbd_socket(&self) -> PathBuf {
        self.run_folder.join("nbd.sock")
    }

    /// Where the agent asks and orders.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.run_folder.join("control.sock")
    }

    /// Where another host's volume process reads map and blocks.
    #[must_use]
    pub fn peer_socket(&self) -> PathBuf {
        self.run_folder.join("peer.sock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VolumeProcessConfig {
        VolumeProcessConfig {
            volume: VolumeId::generate(),
            project: ProjectId::generate(),
            size_bytes: 1 << 20,
            base: None,
            start: StartRole::Active { epoch: Epoch(1) },
            data_folder: "/d".into(),
            run_folder: "/r".into(),
            store_folder: "/s".into(),
            key: KeySource::File("/k".into()),
            peer_dial: None,
            chunk_dial: None,
            nbd: NbdMode::Exclusive,
            nbd_uids: vec![],
            agent_uid: None,
            cache_bytes: 1 << 20,
        }
    }

    #[test]
    fn a_configuration_survives_its_file_and_unknown_fields_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let text = serde_json::to_string(&config()).unwrap();
        std::fs::write(&path, &text).unwrap();
        VolumeProcessConfig::from_file(&path).unwrap();
        std::fs::write(&path, text.replacen('{', "{\"typo\":1,", 1)).unwrap();
        assert!(matches!(VolumeProcessConfig::from_file(&path), Err(ConfigError::Parse { .. })));
    }

    #[test]
    fn sizes_and_paths_are_checked() {
        assert!(VolumeProcessConfig { size_bytes: 100, ..config() }.validate().is_err());
        assert!(VolumeProcessConfig { run_folder: "x".repeat(100).into(), ..config() }.validate().is_err());
        assert!(config().validate().is_ok());
    }
}
