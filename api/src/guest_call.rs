//! What an application inside a guest may ask by its host's metadata service, as it travels over the agent link
//! ([`crate::link::Query::GuestCall`]): about its own guest only, which its host knows by the switch port.

use serde::{Deserialize, Serialize};
use supercloud_ids::{Epoch, GuestId, OperationId};

use crate::{GuestMigrate, GuestState, Name};

/// What is asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "call")]
pub enum GuestCall {
    /// How the guest stands.
    Look,
    /// Its own live move.
    Migrate {
        /// As in `POST /v1/guests/{guest}/migrate`.
        wanted: Box<GuestMigrate>,
        /// The same key again gets the same answer and begins nothing, also from another host. The agent makes one when the guest
        /// gave none: a query may be sent twice.
        idempotency_key: String,
    },
    /// An operation on this guest.
    Operation {
        /// Which.
        operation: OperationId,
    },
}

/// How a guest stands, as it is told itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStanding {
    /// Its id.
    pub id: GuestId,
    /// Its name.
    pub name: Name,
    /// Its state.
    pub state: GuestState,
    /// Grows with every change of its owner.
    pub epoch: Epoch,
    /// The host where it runs.
    pub host: Option<Name>,
    /// The cloud in which that host stands.
    pub cloud: Option<Name>,
    /// The operation that holds it now.
    pub operation: Option<OperationId>,
}
