//! Groups: guests that are moved, frozen and thawed together, all or none.

use serde::{Deserialize, Serialize};
use supercloud_ids::{GroupId, GuestId, OperationId, ProjectId};
use utoipa::ToSchema;

use super::ThawMemory;
use crate::{Name, Ref};

/// Guests of a project that go together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Group {
    /// Its id.
    pub id: GroupId,
    /// The project it belongs to.
    pub project: ProjectId,
    /// Its name.
    pub name: Name,
    /// Its members, in the order in which they were named; 1 to 8.
    pub guests: Vec<GuestId>,
    /// What is done with all of them now.
    pub operation: Option<OperationId>,
    /// When it was made.
    pub created_at_ms: u64,
}

/// Asks for a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupCreate {
    /// Its name.
    pub name: Name,
    /// The project; that of the token when absent.
    #[serde(default)]
    pub project: Option<Ref>,
    /// Its members, by name or id: 1 to 8 guests of the project, each in no other group.
    pub guests: Vec<Ref>,
}

/// A change of a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupUpdate {
    /// Its members from now on: all of them.
    pub guests: Vec<Ref>,
}

/// Where the guests of a frozen group are resumed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupThaw {
    /// A host or a cloud; anywhere with room when absent.
    #[serde(default)]
    pub to: Option<Ref>,
    /// As a guest's: whether they wait for their memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<ThawMemory>,
    /// Why, for the audit trail; at most 256 bytes.
    #[serde(default)]
    pub reason: Option<String>,
}
