//! What hosts hold: each keeps a list, in the store itself, of what its guests' volumes stand on.
//!
//! The authority's records are what a sweep goes by. They may be an older copy that was brought back, which knows nothing of what
//! was started since. So every host that uses a store says there, before it relies on anything, which roots it needs and which
//! place in the records' history it has been told of last: a sweep takes the roots for live whatever the authority says, and an
//! authority in whose history that place is not answers nothing. A list counts, also while its host is away, until the
//! authority says that the host was removed.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use supercloud_ids::ProjectId;

use super::{AuthorityError, Mark, SweepError, sweep_key};
use crate::{
    backend::{ObjectStore, StoreError},
    key::ContentRoot,
};

/// The longest list: a hundred thousand roots.
const HELD_BYTES: usize = 8 << 20;
/// Lists of one project: more hosts than that share no store.
const HOLDERS_AT_MOST: usize = 1000;
const LIST_AT_ONCE: usize = 1000;
/// What the names of lists begin with.
const PREFIX: &str = "held-";

/// What a host holds of a project.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The newest place in the records' history that it has been told of.
    pub mark: Option<Mark>,
    /// What its guests' volumes stand on.
    pub roots: BTreeSet<ContentRoot>,
}

#[derive(Serialize, Deserialize)]
struct HeldV1 {
    version: u16,
    #[serde(flatten)]
    held: Held,
}

/// Says in a store what a holder holds of a project, in place of what it said before. When it returns, every sweep that has not
/// looked for the last time goes by it.
///
/// # Errors
/// When the store fails.
pub async fn hold(store: &dyn ObjectStore, project: ProjectId, holder: &str, held: &Held) -> Result<(), StoreError> {
    let key = sweep_key(project, &format!("{PREFIX}{holder}"));
    let bytes = serde_json::to_vec(&HeldV1 { version: 1, held: held.clone() }).expect("texts and numbers make JSON");
    if bytes.len() > HELD_BYTES {
        return Err(StoreError::TooLarge { key, len: bytes.len() as u64, cap: HELD_BYTES });
    }
    store.put(key, Bytes::from(bytes)).await
}

/// What a holder has said; none when it never said anything.
///
/// # Errors
/// When the store fails, or when what it said is not understood.
pub async fn read_held(store: &dyn ObjectStore, project: ProjectId, holder: &str) -> Result<Option<Held>, SweepError> {
    let bytes = match store.get(sweep_key(project, &format!("{PREFIX}{holder}")), HELD_BYTES).await {
        Ok(bytes) => bytes,
        Err(StoreError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    match serde_json::from_slice::<HeldV1>(&bytes) {
        Ok(HeldV1 { version: 1, held }) => Ok(Some(held)),
        // Not to be passed over: it names what somebody needs.
        Ok(_) | Err(_) => Err(AuthorityError::Refused(format!(
            "what {holder} holds here is not in words that this version understands"
        ))
        .into()),
    }
}

/// The lists of one project, as they were read last.
#[derive(Debug, Default)]
pub(super) struct Lists(BTreeMap<String, Held>);

impl Lists {
    /// Reads them anew: all of them each time, for a store's stamps may be too coarse to tell that one has changed.
    pub(super) async fn read(&mut self, store: &dyn ObjectStore, project: ProjectId) -> Result<(), SweepError> {
        let prefix = sweep_key(project, PREFIX);
        let mut lists = BTreeMap::new();
        let mut after: Option<String> = None;
        loop {
            let page = store.list(prefix.as_str(), after.as_deref(), LIST_AT_ONCE).await?;
            let is_last = page.len() < LIST_AT_ONCE;
            after = page.last().map(|entry| entry.key.as_str().to_owned());
            for entry in page {
                let Some(holder) = entry.key.as_str().strip_prefix(prefix.as_str()) else { continue };
                if let Some(held) = read_held(store, project, holder).await? {
                    lists.insert(holder.to_owned(), held);
                }
                if lists.len() > HOLDERS_AT_MOST {
                    return Err(AuthorityError::Refused(format!(
                        "more than {HOLDERS_AT_MOST} hosts hold something here"
                    ))
                    .into());
                }
            }
            if is_last {
                self.0 = lists;
                return Ok(());
            }
        }
    }

    /// Who holds anything.
    pub(super) fn holders(&self) -> impl Iterator<Item = &String> {
        self.0.keys()
    }

    /// The places in the history that they were told of.
    pub(super) fn marks(&self) -> impl Iterator<Item = &Mark> {
        self.0.values().filter_map(|held| held.mark.as_ref())
    }

    /// What they need.
    pub(super) fn roots(&self) -> impl Iterator<Item = ContentRoot> {
        self.0.values().flat_map(|held| held.roots.iter().copied())
    }

    /// Removes the list of a holder that is gone for good.
    pub(super) async fn forget(
        &mut self,
        store: &dyn ObjectStore,
        project: ProjectId,
        holder: &str,
    ) -> Result<(), StoreError> {
        if self.0.remove(holder).is_some() {
            tracing::info!(%project, holder, "what a removed host held is let go");
            store.delete(sweep_key(project, &format!("{PREFIX}{holder}"))).await?;
        }
        Ok(())
    }
}
