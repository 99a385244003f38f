//! Where the bytes of images and volumes lie.

use serde::{Deserialize, Serialize};
use supercloud_ids::{CloudId, HostId};
use utoipa::ToSchema;

/// What lies at a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SiteKind {
    /// The image's content in a chunk store.
    Image,
    /// The volume's newest blocks, on its host.
    Newest,
    /// A second copy that follows a running guest.
    Standby,
    /// Blocks that an earlier host still has and others may need.
    OlderBlocks,
    /// What the volume stands on (its image, or what it was thawed from), in a cloud's chunk store.
    Base,
    /// Points of the volume's history, in a cloud's chunk store.
    Points,
    /// What the guest was frozen into.
    Freeze,
}

/// How much of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SiteHolds {
    /// All of it.
    Whole,
    /// A part of it.
    Part,
    /// Nobody has told.
    NotKnown,
}

/// A place that has something of an image or a volume, as far as the controller knows: what its records say, and what agents tell of
/// their clouds' stores while guests run there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Site {
    /// What.
    pub kind: SiteKind,
    /// How much of it.
    pub holds: SiteHolds,
    /// The host; absent for a store.
    pub host: Option<HostId>,
    /// The cloud; absent for the controller's own store.
    pub cloud: Option<CloudId>,
    /// The name of the host, else of the cloud, else `controller`.
    pub name: String,
    /// Bytes that lie there, where known.
    pub bytes: Option<u64>,
    /// Bytes that it lacks, where known.
    pub missing_bytes: Option<u64>,
    /// By what it is known, or what it is for.
    pub detail: String,
}
