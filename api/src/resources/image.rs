//! Images, volumes, snapshots.

use serde::{Deserialize, Serialize};
use supercloud_ids::{CloudId, Epoch, GuestId, HostId, ImageId, ProjectId, VolumeId};
use utoipa::ToSchema;

use crate::{Name, Ref};

/// The format of bytes that are imported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// The disk's bytes as they are.
    Raw,
    /// QEMU's copy-on-write format, without backing or data file.
    Qcow2,
}

/// One file of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImagePart {
    /// The disk that a guest's volume starts from.
    Disk,
    /// A kernel to boot directly.
    Kernel,
    /// Its initial RAM disk.
    Initrd,
}

/// Whether an image can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImageState {
    /// Its parts are being uploaded.
    Uploading,
    /// Its parts are being read, checked and chunked.
    Importing,
    /// It can be used.
    Ready,
    /// The import failed; the operation tells why.
    Failed,
}

/// The stored content of one part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageContent {
    /// Which part.
    pub part: ImagePart,
    /// Merkle root of its content: its identity.
    pub root: String,
    /// Its size as a guest sees it.
    pub size_bytes: u64,
    /// What it takes in a store.
    pub stored_bytes: u64,
}

/// Immutable content a volume can start from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// Its id.
    pub id: ImageId,
    /// The project it belongs to.
    pub project: ProjectId,
    /// Its name.
    pub name: Name,
    /// Whether it can be used.
    pub state: ImageState,
    /// The kernel's command line, when a kernel is a part of it.
    pub cmdline: Option<String>,
    /// Its parts; `disk` is always among them once it is ready.
    pub parts: Vec<ImageContent>,
    /// Bytes uploaded so far, per part.
    pub uploaded: Vec<UploadedPart>,
    /// When it was made.
    pub created_at_ms: u64,
}

/// How much of a part has been uploaded; an upload goes on from here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UploadedPart {
    /// Which part.
    pub part: ImagePart,
    /// Bytes received and kept.
    pub bytes: u64,
}

/// What a stretch of an uploaded part is: for who goes on with an upload and wants to know that it is of the same file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UploadDigest {
    /// Which part.
    pub part: ImagePart,
    /// Where the stretch begins.
    pub offset: u64,
    /// How long it is: as much as was asked for, or less where the upload ends.
    pub bytes: u64,
    /// BLAKE3 of it, hex.
    pub blake3: String,
}

/// Asks for an image; its parts are uploaded afterwards by `PUT /v1/images/{id}/parts/{part}?offset=`, and
/// `POST /v1/images/{id}/import` starts the import.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageCreate {
    /// Its name.
    pub name: Name,
    /// The project; that of the token when absent.
    #[serde(default)]
    pub project: Option<Ref>,
    /// The kernel's command line, when a kernel is a part of it; at most 2048 bytes.
    #[serde(default)]
    pub cmdline: Option<String>,
}

/// Starts the import of an image's uploaded parts.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageImport {
    /// The disk's format; found by its first bytes when absent.
    #[serde(default)]
    pub format: Option<DiskFormat>,
}

/// When a flush of a volume is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// When it would survive a power cut of this host.
    #[default]
    Host,
}

/// How blocks follow a volume when its guest moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Propagation {
    /// When they are read, and in the background after the move.
    OnDemand,
    /// Before the switch, as far as they do not change any more; the rest as with `on-demand`.
    #[default]
    HotStandby,
    /// Before the switch those that will probably not be written again before it, by how the guest has used its blocks so far;
    /// then the rest, what it will probably touch soonest first. Where a host of the version before takes part: `hot-standby`.
    Predictive,
}

/// A guest's writable disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// Its id.
    pub id: VolumeId,
    /// The project it belongs to.
    pub project: ProjectId,
    /// Its name.
    pub name: Name,
    /// Its size.
    pub size_bytes: u64,
    /// The content it started from: root of a manifest.
    pub base: Option<String>,
    /// The image that this content came from, if it did.
    pub image: Option<ImageId>,
    /// The guest it is attached to.
    pub guest: Option<GuestId>,
    /// The guest's epoch, which it inherits while attached.
    pub epoch: Epoch,
    /// The host that holds its newest blocks.
    pub host: Option<HostId>,
    /// A host that still has blocks which the holder lacks: after a move, until the source is released.
    pub needed_source: Option<HostId>,
    /// The cloud in whose store `base` lies when it is not an image's (after a freeze).
    pub base_cloud: Option<CloudId>,
    /// Root of the newest published block map.
    pub map_root: Option<String>,
    /// Version of that map: rises with every write that it covers.
    pub map_version: u64,
    /// When a flush is acknowledged.
    pub durability: Durability,
    /// How blocks follow it.
    pub propagation: Propagation,
    /// When it was made.
    pub created_at_ms: u64,
}
