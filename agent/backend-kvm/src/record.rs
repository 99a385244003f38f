//! What an agent that comes after must know of a guest's process.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
pub use supercloud_blanket::home::Home;
use supercloud_blanket::{
    Launch,
    lasting::Lasting,
    vmm::travel::left::{Left, PageSet},
};
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
    /// It was thawed before its memory was here, and some of that may be missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<Proof>,
}

/// By which the process of a guest that was thawed before its memory was here knows who serves that memory; see [`Left`].
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    secret: [u8; 32],
    whole: [u8; 32],
}

impl std::fmt::Debug for Proof {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // For no log.
        out.debug_struct("Proof").finish_non_exhaustive()
    }
}

impl Proof {
    /// Of what was left.
    pub fn of(left: &Left) -> Self {
        let (secret, whole) = left.proof();
        Self { secret, whole }
    }

    /// The same again, with these pages.
    pub const fn left(&self, pages: PageSet) -> Left {
        Left::new(pages, self.secret, self.whole)
    }
}

/// Where a guest's process listens.
pub fn control_socket(home: &Home) -> PathBuf {
    home.folder.join("control")
}

/// What it says.
pub fn log_file(home: &Home) -> PathBuf {
    home.folder.join("log")
}
