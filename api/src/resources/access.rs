//! Projects and tokens.

use serde::{Deserialize, Serialize};
use supercloud_ids::{GuestId, ProjectId, TokenId};
use utoipa::ToSchema;

use crate::{Name, Ref};

/// The tenant: owns guests, volumes, networks, tokens, keys, quota.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Project {
    /// Its id.
    pub id: ProjectId,
    /// Its name, unique in the whole system.
    pub name: Name,
    /// What it may use at once.
    pub quota: Quota,
    /// When it was made.
    pub created_at_ms: u64,
}

/// What a project may use at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quota {
    /// Guests, of any state.
    pub guests: u32,
    /// Virtual CPUs of running guests.
    pub vcpus: u32,
    /// Memory of running guests.
    pub memory_bytes: u64,
    /// Volumes' sizes.
    pub volume_bytes: u64,
}

impl Default for Quota {
    fn default() -> Self {
        Self { guests: 100, vcpus: 200, memory_bytes: 1 << 40, volume_bytes: 10 << 40 }
    }
}

/// Asks for a project.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProjectCreate {
    /// Its name.
    pub name: Name,
    /// What it may use; a default when absent.
    #[serde(default)]
    pub quota: Option<Quota>,
}

/// What a token's bearer may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Reads.
    Viewer,
    /// A policy daemon: reads, and moves guests.
    Policy,
    /// Reads and changes what belongs to the project.
    Operator,
    /// Everything, also hosts, clouds, projects and tokens.
    Admin,
}

/// An access token without its secret.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Token {
    /// Its id.
    pub id: TokenId,
    /// What it is for, in its maker's words.
    pub name: Name,
    /// The project it is good for; absent: all (`*`).
    pub project: Option<ProjectId>,
    /// The guest it is good for (migrate, freeze, mirror itself and nothing else); absent: not guest-scoped.
    pub guest: Option<GuestId>,
    /// What its bearer may do.
    pub role: Role,
    /// When it stops working; absent: never.
    pub expires_at_ms: Option<u64>,
    /// When it was made.
    pub created_at_ms: u64,
}

/// Asks for a token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenCreate {
    /// What it is for.
    pub name: Name,
    /// The project it is good for, or `*` for all.
    pub project: Ref,
    /// What its bearer may do.
    pub role: Role,
    /// How long it works, in seconds; absent: until deleted.
    #[serde(default)]
    pub expires_in_s: Option<u64>,
}

/// A new token with its secret, which is shown once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TokenSecret {
    /// The token.
    pub token: Token,
    /// The secret, for `Authorization: Bearer`.
    pub secret: String,
}

/// Who a token is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WhoAmI {
    /// The token.
    pub token: Token,
    /// The project's name, when it is good for one only.
    pub project_name: Option<Name>,
}
