//! Names: unique per project and kind (or in the whole system), and usable wherever ids are.

use std::str::FromStr;

use supercloud_api::{Cloud, Freeze, Group, Image, Name, Network, Port, Ref, Volume, ids::ProjectId};
use supercloud_store::Key;

use super::{
    GuestRecord, HostRecord, OperationRecord, ProjectRecord, Record, RentingRecord, State, StateError, Stored,
    TokenRecord, keys,
};

/// A record that people refer to by name or id.
pub trait Named: Record<Id: FromStr> {
    /// The kind in name keys; `None`: it has no unique name.
    const KIND: Option<&'static str>;
    /// What it is called in messages.
    const NOUN: &'static str;
    /// Whether names are unique per project; else in the whole system.
    const IS_PER_PROJECT: bool;
    /// Its name.
    fn name(&self) -> Option<&Name>;
    /// The project it belongs to, if it belongs to one.
    fn project(&self) -> Option<ProjectId>;

    /// The key that holds its name.
    fn name_key(&self) -> Option<Key> {
        Some(keys::name(self.project().filter(|_| Self::IS_PER_PROJECT), Self::KIND?, self.name()?.as_str()))
    }
}

macro_rules! named {
    ($($record:ty, $kind:expr, $noun:literal, $per_project:literal, $name:expr, $project:expr;)*) => {$(
        impl Named for $record {
            const KIND: Option<&'static str> = $kind;
            const NOUN: &'static str = $noun;
            const IS_PER_PROJECT: bool = $per_project;
            fn name(&self) -> Option<&Name> {
                let get: fn(&$record) -> Option<&Name> = $name;
                get(self)
            }
            fn project(&self) -> Option<ProjectId> {
                let get: fn(&$record) -> Option<ProjectId> = $project;
                get(self)
            }
        }
    )*};
}

named! {
    Cloud, Some("cloud"), "cloud", false, |r| Some(&r.name), |_| None;
    HostRecord, Some("host"), "host", false, |r| Some(&r.host.name), |_| None;
    ProjectRecord, Some("project"), "project", false, |r| Some(&r.project.name), |r| Some(r.project.id);
    TokenRecord, None, "token", false, |_| None, |r| r.token.project;
    Image, Some("image"), "image", true, |r| Some(&r.name), |r| Some(r.project);
    Volume, Some("volume"), "volume", true, |r| Some(&r.name), |r| Some(r.project);
    Network, Some("network"), "network", true, |r| Some(&r.name), |r| Some(r.project);
    Port, None, "port", false, |_| None, |r| Some(r.project);
    GuestRecord, Some("guest"), "guest", true, |r| Some(&r.guest.name), |r| Some(r.guest.project);
    Group, Some("group"), "group", true, |r| Some(&r.name), |r| Some(r.project);
    Freeze, None, "freeze", false, |_| None, |r| Some(r.project);
    RentingRecord, None, "renting", false, |_| None, |_| None;
    OperationRecord, None, "operation", false, |_| None, |r| r.operation.project;
}

impl State {
    /// The record that a reference means. An id is looked up as it is; a name in `project` (where names are per
    /// project, and nothing is found when `project` is `None`). Whether the caller may see it is the caller's to check.
    ///
    /// # Errors
    /// When the store does not answer or the record is damaged.
    pub async fn find<T: Named>(
        &self,
        project: Option<ProjectId>,
        reference: &Ref,
    ) -> Result<Option<Stored<T>>, StateError> {
        if let Ok(id) = reference.as_str().parse::<T::Id>() {
            return self.read(&id).await;
        }
        let (Some(kind), Ok(name)) = (T::KIND, reference.as_str().parse::<Name>()) else { return Ok(None) };
        if T::IS_PER_PROJECT && project.is_none() {
            return Ok(None);
        }
        let key = keys::name(project.filter(|_| T::IS_PER_PROJECT), kind, name.as_str());
        match self.read_index(key).await?.and_then(|id| id.parse::<T::Id>().ok()) {
            Some(id) => self.read(&id).await,
            None => Ok(None),
        }
    }
}
