//! What an agent that comes after must know of a guest's process.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
pub use supercloud_blanket::home::Home;
use supercloud_blanket::{Launch, lasting::Lasting};
use supercloud_ids::Epoch;

/// What the guest here is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It runs here by right, or did until it was sent.
    Owner,
    /// It came here, or comes; nobody has said yet that it may run.
    Incoming,
    /// It is being frozen into this file.
    Freezing(PathBuf),
}

/// A guest's process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What was started.
    pub launch: Launch,
    /// Under which epoch it is here.
    pub epoch: Epoch,
    /// What it is.
    pub role: Role,
    /// Its process.
    pub process: Lasting,
}

/// Where a guest's process listens.
pub fn control_socket(home: &Home) -> PathBuf {
    home.folder.join("control")
}

/// What it says.
pub fn log_file(home: &Home) -> PathBuf {
    home.folder.join("log")
}
