//! The records: what is kept, which is what the API shows and what it does not.

use std::{collections::BTreeSet, fmt::Display};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use supercloud_api::{
    Cloud, DiskFormat, FleetPlan, Freeze, Group, Guest, GuestState, Host, HostNoticeKind, HostState, Image, Name,
    Network, Operation, Port, Project, Renting, ThawMemory, Token, Volume, VolumeHistory,
    handover::{Owner, OwnerRecord},
    ids::{
        CloudId, FreezeId, GroupId, GuestId, HostId, ImageId, NetworkId, OperationId, PlanId, PortId, ProjectId,
        RentingId, RequestId, TokenId, VolumeId,
    },
    link::{Announced, MigrationOptions, MirrorOptions},
};

use super::LiveHosts;
use crate::ledger::OpenStay;

/// Something that is kept at `<folder>/<id>`.
pub trait Record: Serialize + DeserializeOwned + Clone + Send + Sync + 'static {
    /// What names it within its folder.
    type Id: Display + Clone + Send + Sync;
    /// Its folder.
    const FOLDER: &'static str;
    /// Its id.
    fn id(&self) -> Self::Id;
}

macro_rules! records {
    ($($name:ty, $id:ty, $folder:literal, $get:expr;)*) => {$(
        impl Record for $name {
            type Id = $id;
            const FOLDER: &'static str = $folder;
            fn id(&self) -> $id {
                let get: fn(&$name) -> $id = $get;
                get(self)
            }
        }
    )*};
}

records! {
    Cloud, CloudId, "clouds", |r| r.id;
    HostRecord, HostId, "hosts", |r| r.host.id;
    ProjectRecord, ProjectId, "projects", |r| r.project.id;
    TokenRecord, TokenId, "tokens", |r| r.token.id;
    Image, ImageId, "images", |r| r.id;
    Volume, VolumeId, "volumes", |r| r.id;
    VolumeHistory, VolumeId, "volume-histories", |r| r.volume;
    Network, NetworkId, "networks", |r| r.id;
    Port, PortId, "ports", |r| r.id;
    GuestRecord, GuestId, "guests", |r| r.guest.id;
    Group, GroupId, "groups", |r| r.id;
    GuestSeed, GuestId, "guest-seeds", |r| r.guest;
    DeletedGuest, GuestId, "deleted-guests", |r| r.guest;
    Freeze, FreezeId, "freezes", |r| r.id;
    OperationRecord, OperationId, "operations", |r| r.operation.id;
    JoinRecord, String, "join", |r| r.secret_sha256.clone();
    AcceptedMark, String, "accepted-marks", |r| AcceptedMark::key(r.seq, &r.hash);
    RentingRecord, RentingId, "rentings", |r| r.renting.id;
    PlanRecord, PlanId, "plans", |r| r.plan.id;
}

/// A host. Whether its agent is connected is not kept: see [`LiveHosts`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostRecord {
    /// What the API shows; `state`, `used` and `last_seen_ms` as they were when the record was last written.
    pub host: Host,
    /// It takes no new guests.
    pub is_cordoned: bool,
    /// It was removed: its certificate is denied.
    pub is_removed: bool,
    /// A notice that somebody has withdrawn: the same one again counts for nothing.
    #[serde(default)]
    pub withdrawn: Option<Announced>,
}

impl HostRecord {
    /// Whether its provider takes it back: nobody is to be placed there.
    #[must_use]
    pub fn is_taken_back(&self) -> bool {
        self.host.notice.is_some_and(|notice| notice.kind == HostNoticeKind::Interruption)
    }

    /// The host as the API shows it now.
    #[must_use]
    pub fn view(&self, live: &LiveHosts) -> Host {
        let mut host = self.host.clone();
        let now = live.get(host.id).filter(|_| !self.is_removed);
        host.state = match now {
            _ if self.is_removed => HostState::Removed,
            None => HostState::Unreachable,
            Some(_) if self.is_cordoned || self.is_taken_back() => HostState::Cordoned,
            Some(_) => HostState::Up,
        };
        if let Some(now) = now {
            host.used = now.used;
            host.last_seen_ms = now.last_seen_ms;
        }
        host
    }
}

/// A project with its key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProjectRecord {
    /// What the API shows.
    pub project: Project,
    /// Its key, sealed under the root key; hexadecimal. See [`super::State::project_key`].
    pub sealed_key: String,
}

/// A token with the hash of its secret.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// What the API shows.
    pub token: Token,
    /// SHA-256 of the secret, hexadecimal.
    pub secret_sha256: String,
}

/// That a guest was deleted: a host on which something of it is left may destroy that. Of a guest that is merely not known
/// (the store may be an older one, brought back) nothing is ever destroyed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeletedGuest {
    /// The guest; ids are never used again.
    pub guest: GuestId,
    /// When, in milliseconds since 1970.
    pub deleted_at_ms: u64,
}

/// A place in a history that is not this one, of which hosts were told before these records were brought back from a backup: an
/// operator has said that it does not stop sweeps any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcceptedMark {
    /// The event's number there.
    pub seq: u64,
    /// Its hash, hexadecimal.
    pub hash: String,
    /// When an operator said so, in milliseconds since 1970.
    pub accepted_at_ms: u64,
}

impl AcceptedMark {
    /// Where it is kept.
    #[must_use]
    pub fn key(seq: u64, hash: &str) -> String {
        format!("{seq:020}-{hash}")
    }
}

/// A guest with its ownership.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuestRecord {
    /// What the API shows. Keep it in step with `owner`: [`GuestRecord::set_owner`].
    pub guest: Guest,
    /// Who owns it and what is under way: the ownership protocol's record.
    pub owner: OwnerRecord,
    /// The guest is being deleted: hosts that have yet to say that nothing is left of it there.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub discarding: BTreeSet<HostId>,
    /// It was frozen because its host was taken back and nobody else had room: this freeze is thawed as soon as somebody has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub put_aside: Option<FreezeId>,
    /// Where it takes room now, for the ledger: changes with `owner`, by [`crate::ledger::keep_stays`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stays: Vec<OpenStay>,
}

impl GuestRecord {
    /// Takes a new ownership record and brings what the API shows (state, epoch, host, operation, freeze) in step with it.
    /// `host` is the record of the owning host, if a host owns it.
    pub fn set_owner(&mut self, owner: OwnerRecord, host: Option<&Host>) {
        let guest = &mut self.guest;
        guest.epoch = owner.epoch;
        guest.operation = owner.operation.as_ref().map(|operation| operation.id);
        guest.freeze = None;
        guest.state = match owner.owner {
            Owner::Unowned => GuestState::Created,
            Owner::Host(_) => GuestState::Running,
            Owner::Frozen(freeze) => {
                guest.freeze = Some(freeze);
                GuestState::Frozen
            }
            Owner::Stopped => GuestState::Stopped,
            Owner::Lost(_) => GuestState::Lost,
        };
        let host = host.filter(|host| matches!(owner.owner, Owner::Host(id) | Owner::Lost(id) if id == host.id));
        guest.host = host.map(|host| host.id);
        guest.host_name = host.map(|host| host.name.clone());
        guest.cloud = host.map(|host| host.cloud);
        guest.cloud_name = host.map(|host| host.cloud_name.clone());
        self.owner = owner;
    }
}

/// What a guest is started with and the API does not show.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestSeed {
    /// The guest.
    pub guest: GuestId,
    /// cloud-init user-data.
    pub user_data: Option<String>,
    /// Appended to the image's kernel command line.
    pub cmdline_extra: Option<String>,
}

/// An operation with what is needed to carry it out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OperationRecord {
    /// What the API shows.
    pub operation: Operation,
    /// What is to be done.
    pub work: Work,
}

/// What an operation does, with what was asked for. Hosts are in [`Operation::source`] and [`Operation::destination`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "work")]
pub enum Work {
    /// Reads, checks and chunks an image's uploaded parts.
    ImageImport {
        /// The disk's format; found by its first bytes when absent.
        format: Option<DiskFormat>,
    },
    /// Starts a guest cold (also one that was lost: from its volumes).
    GuestStart,
    /// Stops a guest.
    GuestStop {
        /// How long it may take before the plug is pulled; 0: at once.
        grace_ms: u64,
    },
    /// Deletes a guest with its volumes and ports.
    GuestDelete,
    /// Moves a running guest.
    GuestMigrate {
        /// How.
        options: MigrationOptions,
    },
    /// Keeps a second copy of a running guest.
    GuestMirror {
        /// How.
        options: MirrorOptions,
        /// Its host is dead, an operator says: the copy is to take over.
        #[serde(default)]
        is_failing_over: bool,
    },
    /// Suspends a guest into the store.
    GuestFreeze {
        /// The freeze that is made.
        freeze: FreezeId,
    },
    /// Resumes a frozen guest.
    GuestThaw {
        /// The freeze that is consumed.
        freeze: FreezeId,
        /// Whether the guest waits for its memory, if that was said.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        memory: Option<ThawMemory>,
    },
    /// Does to all guests of a group what its parts say, or to none.
    Group,
    /// Rents a host; the renting names this operation.
    HostRent,
    /// Gives a rented host back; the renting names this operation.
    HostReturn,
}

/// A rented host with the secret that its machine is given.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RentingRecord {
    /// What the API shows.
    pub renting: Renting,
    /// The secret of its join token, sealed under the root key; hexadecimal. Kept so that a repeated order is the same order.
    pub sealed_secret: String,
}

/// A plan, with who had it carried out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanRecord {
    /// What the API shows.
    pub plan: FleetPlan,
    /// In whose name its operations are made: who applied it, or had it taken back.
    pub actor: String,
    /// By which request.
    pub request_id: RequestId,
}

/// A one-time token for a host to join with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRecord {
    /// SHA-256 of the secret, hexadecimal.
    pub secret_sha256: String,
    /// The host's id to be.
    pub host: HostId,
    /// The name that it will have; claimed when it joins.
    pub host_name: Name,
    /// The cloud in which it stands.
    pub cloud: CloudId,
    /// When the token stops working (wall time).
    pub expires_at_ms: u64,
    /// SHA-256 of the key that it was used for, hexadecimal: the same request gets the same answer, another none.
    #[serde(default)]
    pub used_for_key: Option<String>,
}

/// The answer to a request with an `Idempotency-Key`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AnswerRecord {
    /// BLAKE3 of method, path, query and body; hexadecimal.
    pub request_hash: String,
    /// When it was given.
    pub created_at_ms: u64,
    /// HTTP status.
    pub status: u16,
    /// `Location`.
    pub location: Option<String>,
    /// The body: JSON text; sealed under the root key and hexadecimal when `is_sealed`, because it holds a secret.
    pub body: String,
    /// See `body`.
    pub is_sealed: bool,
}
