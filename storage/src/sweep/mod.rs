//! The sweep: what no image, volume or freeze names any more leaves the store.
//!
//! What lives is known to the [`Authority`] alone (the controller's records): the manifests that happen to lie in a store
//! prove nothing. A sweep goes project by project:
//!
//! ```text
//!   1 clock     write an object, read its stamp: now, by the store's own clock
//!   2 ask       live roots, and since when the oldest operation writes  ->  horizon (plan)
//!   3 mark      open the manifests of all roots: every name they reach (reach)
//!   4 condemn   list the chunks; unreached and put before the horizon -> at most 256 names
//!   5 intent    write `<project>/sweep/intent` with the names, if absent
//!   6 ask again live roots now; mark what is new
//!   7 delete    each name that is still unreached and whose stamp is still before the horizon; remove the intent
//! ```
//!
//! **Why nothing that is needed goes.** A chunk is needed because a live root reaches it, or because somebody writes
//! content that will.
//! - *Reached when the sweep began, or at 6*: marked.
//! - *Being written*: every operation that writes content is told at 2 or began after 1, and whatever it puts, or finds and
//!   counts on, is refreshed then ([`ObjectStore::put_batch`]): younger than the horizon, so not deleted, unless 7 has read
//!   the stamp just before. For that, a writer looks for an intent *after* each put ([`put_chunks`]), and puts again when
//!   one that names the chunk is gone. Either its put came before the intent was written (then 7 sees the young stamp), or
//!   it sees the intent.
//! - *Found, not written* (what a guest stands on, when it comes back to a cloud in which it was before): its manifest is put
//!   first, then the chunks are refreshed, then an intent is looked for ([`count_on`]). A sweep that began before has them
//!   young, or the intent is seen; one that begins later finds the manifest, whose root a volume names.
//! - *Becomes live after 6 without having been written lately*: impossible but for a root that a writer publishes, see above.
//!
//! **Crashes.** A sweep that dies leaves at most its intent, which holds up only writers of the very chunks that it names.
//! No clock breaks it: a host that was cut off or suspended may come back and delete. It is removed by the next sweep of
//! the same holder (one process at a time sweeps under one name) or, when the authority says that the holder is gone for
//! good, by another's; in either case only after the store's [`ObjectStore::delete_tail`]. Without the authority (a host
//! that is cut off) nothing is condemned and nothing deleted.
//!
//! **An older authority.** Records that were brought back from a backup know nothing of what was made since. Each sweep
//! leaves a [`Mark`] of the records' history in the store, so does each host with what it [holds](hold), and all are shown
//! with each question: an authority whose history does not contain one of them refuses. What hosts hold lives in any case.

mod held;
mod intent;
pub mod plan;
mod reach;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use supercloud_ids::ProjectId;
use tokio_util::sync::CancellationToken;

use self::{
    held::Lists,
    intent::Intent,
    reach::{Reach, Tree},
};
pub use self::{
    held::{Held, hold, read_held},
    intent::{count_on, count_on_telling, put_chunks},
};
use crate::{
    backend::{ObjectEntry, ObjectKey, ObjectStore, PutOutcome, StoreError},
    key::{ChunkKind, ChunkName, ContentRoot},
};

/// Names in one intent.
const NAMES_AT_ONCE: usize = 256;
/// How long one intent stands at most while its sweep is well; the rest is for the next one.
const INTENT_BUDGET: Duration = Duration::from_secs(15);
/// Entries in one listing.
const LIST_AT_ONCE: usize = 1000;
/// The longest mark.
const MARK_BYTES: usize = 512;

/// A place in the history of the authority's records.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Mark {
    /// Number of an event.
    pub seq: u64,
    /// Its hash.
    pub hash: String,
}

/// What lives in a project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Live {
    /// Every root that anything names; true where this store is known to have to hold its manifest.
    pub roots: BTreeMap<ContentRoot, bool>,
    /// How long the oldest operation has been at work that may be writing content of this project.
    pub oldest_writer: Option<Duration>,
    /// The newest place in the records' history.
    pub mark: Mark,
    /// Of the holders that were asked about, those that are gone for good: they will never delete anything again, and need
    /// nothing.
    pub gone: BTreeSet<String>,
}

/// What the authority is shown, and asked about.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Asked {
    /// All of it must be in the history of the records.
    pub seen: Vec<Mark>,
    /// Who of these is gone?
    pub holders: Vec<String>,
}

/// Why the authority does not answer.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// It cannot, or will not.
    #[error("{0}")]
    Refused(String),
    /// Somebody else is sweeping this store: nothing is wrong.
    #[error("{0}")]
    NotYourTurn(String),
}

/// Who knows what lives.
pub trait Authority: Send + Sync + fmt::Debug {
    /// What lives in a project now.
    fn live<'a>(&'a self, project: ProjectId, asked: &'a Asked) -> BoxFuture<'a, Result<Live, AuthorityError>>;

    /// The names in a part of a manifest: the leaves of a root, the data of a leaf. `sealed` is the chunk as the store has
    /// it; without it the authority looks in its own store. None when that has it not, or when `sealed` is damaged.
    fn names(
        &self,
        project: ProjectId,
        kind: ChunkKind,
        name: ChunkName,
        sealed: Option<Bytes>,
    ) -> BoxFuture<'_, Result<Option<Vec<ChunkName>>, AuthorityError>>;
}

/// How a store is swept.
#[derive(Debug, Clone)]
pub struct SweepOptions {
    /// Under which name: one process at a time may use it.
    pub holder: String,
    /// What was put or refreshed more lately than this is left alone.
    pub grace: Duration,
    /// Between two batches of deletions, to leave the store to others.
    pub pause: Duration,
}

/// What a sweep of a project did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Swept {
    /// Chunks that were there.
    pub seen_chunks: u64,
    /// Their bytes.
    pub seen_bytes: u64,
    /// Of these, chunks that were removed.
    pub freed_chunks: u64,
    /// Their bytes.
    pub freed_bytes: u64,
    /// Chunks that nothing names and that are too young to be removed.
    pub young_chunks: u64,
}

/// Why a project was not swept, or not to its end. What was removed before is gone rightly.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    /// The store.
    #[error("the store failed")]
    Store(#[from] StoreError),
    /// Nobody says what lives.
    #[error("what is needed is not known")]
    Authority(#[from] AuthorityError),
    /// Another sweep is at it, or one did not end.
    #[error("the sweep of {holder} has not ended")]
    Held {
        /// Who holds the intent.
        holder: String,
    },
    /// A part of a manifest that must be here cannot be read.
    #[error("chunk {chunk} of the live manifest {root} cannot be read: nothing is removed before it can")]
    Manifest {
        /// The manifest.
        root: ContentRoot,
        /// Its part.
        chunk: ChunkName,
    },
    /// It was asked to stop.
    #[error("the sweep was stopped")]
    Cancelled,
}

/// The projects that have anything in a store.
///
/// # Errors
/// When the store does not answer.
pub async fn projects(store: &dyn ObjectStore) -> Result<Vec<ProjectId>, StoreError> {
    let mut projects: Vec<ProjectId> = Vec::new();
    loop {
        // After every key of the last one: '~' is in none.
        let after = projects.last().map(|last| format!("{last}/~"));
        let Some(next) = store.list("", after.as_deref(), 1).await?.pop() else { return Ok(projects) };
        match next.key.project() {
            Some(project) if projects.last() != Some(&project) => projects.push(project),
            _ => return Ok(projects),
        }
    }
}

/// Sweeps one project of a store.
///
/// # Errors
/// See [`SweepError`]; the sweep can be tried again at once or later.
pub async fn sweep_project(
    store: &Arc<dyn ObjectStore>,
    project: ProjectId,
    authority: &dyn Authority,
    options: &SweepOptions,
    cancel: &CancellationToken,
) -> Result<Swept, SweepError> {
    Sweep::begin(&**store, project, authority, options, cancel).await?.run().await
}

struct Sweep<'a> {
    store: &'a dyn ObjectStore,
    project: ProjectId,
    authority: &'a dyn Authority,
    options: &'a SweepOptions,
    cancel: &'a CancellationToken,
    mark: Mark,
    lists: Lists,
    horizon: SystemTime,
    tree: Tree,
    swept: Swept,
}

fn sweep_key(project: ProjectId, what: &str) -> ObjectKey {
    ObjectKey::other(project, &format!("sweep/{what}")).expect("plain words make keys")
}

impl<'a> Sweep<'a> {
    async fn begin(
        store: &'a dyn ObjectStore,
        project: ProjectId,
        authority: &'a dyn Authority,
        options: &'a SweepOptions,
        cancel: &'a CancellationToken,
    ) -> Result<Self, SweepError> {
        let now = store_now(store, project).await?;
        let mut lists = Lists::default();
        lists.read(store, project).await?;
        let mut seen: Vec<Mark> = read_mark(store, project).await?.into_iter().chain(lists.marks().cloned()).collect();
        seen.sort();
        seen.dedup();
        end_former(store, project, authority, &seen, &options.holder, now).await?;
        // After the clock: who begins to write after this question puts after the horizon.
        let live = ask(store, project, authority, &mut lists, seen).await?;
        let mark = serde_json::to_vec(&live.mark).expect("a number and a text make JSON");
        store.put(sweep_key(project, "seen"), mark.into()).await?;
        let horizon = plan::horizon(now, live.oldest_writer, options.grace, store.stamp_slack());
        let mut sweep = Self {
            store,
            project,
            authority,
            options,
            cancel,
            mark: live.mark,
            lists,
            horizon,
            tree: Tree::default(),
            swept: Swept::default(),
        };
        sweep.add_roots(&live.roots).await?;
        Ok(sweep)
    }

    async fn add_roots(&mut self, roots: &BTreeMap<ContentRoot, bool>) -> Result<Vec<reach::Leaf>, SweepError> {
        self.tree.add(self.store, self.authority, self.project, roots).await
    }

    async fn run(mut self) -> Result<Swept, SweepError> {
        for bytes in plan::passes(self.tree.leaf_count()) {
            let mut reach = Reach::new(bytes.clone());
            self.tree.reach_all(self.store, self.authority, self.project, &mut reach).await?;
            let mut condemned = Vec::new();
            for byte in bytes {
                let folder = format!("{}/{byte:02x}/", self.project);
                let mut after: Option<String> = None;
                loop {
                    self.check_cancel()?;
                    let page = self.store.list(&folder, after.as_deref(), LIST_AT_ONCE).await?;
                    let is_last = page.len() < LIST_AT_ONCE;
                    after = page.last().map(|entry| entry.key.as_str().to_owned());
                    for entry in page {
                        condemned.extend(self.consider(&entry, &reach));
                        if condemned.len() >= NAMES_AT_ONCE {
                            self.remove(&mut condemned, &mut reach).await?;
                        }
                    }
                    if is_last {
                        break;
                    }
                }
            }
            self.remove(&mut condemned, &mut reach).await?;
        }
        Ok(self.swept)
    }

    fn check_cancel(&self) -> Result<(), SweepError> {
        if self.cancel.is_cancelled() { Err(SweepError::Cancelled) } else { Ok(()) }
    }

    /// The chunk of an entry if it is to go.
    fn consider(&mut self, entry: &ObjectEntry, reach: &Reach) -> Option<ChunkName> {
        let name = entry.key.chunk_name()?;
        self.swept.seen_chunks += 1;
        self.swept.seen_bytes += entry.len;
        match plan::verdict(reach.has(&name), entry.modified, self.horizon) {
            plan::Verdict::Needed => None,
            plan::Verdict::Young => {
                self.swept.young_chunks += 1;
                None
            }
            plan::Verdict::Condemned => Some(name),
        }
    }

    /// Removes what is condemned and still may go.
    async fn remove(&mut self, condemned: &mut Vec<ChunkName>, reach: &mut Reach) -> Result<(), SweepError> {
        while !condemned.is_empty() {
            self.check_cancel()?;
            let rest = condemned.split_off(condemned.len().min(NAMES_AT_ONCE));
            let names = std::mem::replace(condemned, rest);
            let intent = Intent::new(&self.options.holder, &names);
            let key = sweep_key(self.project, "intent");
            if self.store.put_if_absent(key.clone(), intent.to_bytes()).await? == PutOutcome::AlreadyThere {
                let held = intent::read(self.store, self.project).await?;
                let holder = held.map_or_else(|| "another host".to_owned(), |held| held.holder);
                return Err(SweepError::Held { holder });
            }
            // When this fails, what is left of the intent is for the next sweep.
            self.delete(&names, reach).await?;
            self.store.delete(key).await?;
            if !self.options.pause.is_zero() {
                tokio::time::sleep(self.options.pause).await;
            }
        }
        Ok(())
    }

    async fn delete(&mut self, names: &[ChunkName], reach: &mut Reach) -> Result<(), SweepError> {
        let began = Instant::now();
        let asked = self.look_again(reach).await;
        if asked.is_err() {
            // Nothing was deleted under this intent.
            self.store.delete(sweep_key(self.project, "intent")).await?;
        }
        asked?;
        for name in names {
            if self.cancel.is_cancelled() || began.elapsed() > INTENT_BUDGET {
                return Ok(());
            }
            let key = ObjectKey::chunk(self.project, name);
            let Some(entry) = self.store.stat(key.clone()).await? else { continue };
            match plan::verdict(reach.has(name), entry.modified, self.horizon) {
                plan::Verdict::Condemned if self.store.delete(key).await? => {
                    self.swept.freed_chunks += 1;
                    self.swept.freed_bytes += entry.len;
                }
                plan::Verdict::Young => self.swept.young_chunks += 1,
                plan::Verdict::Condemned | plan::Verdict::Needed => {}
            }
        }
        Ok(())
    }

    /// What lives now; what is new is marked, in this pass and in those that follow.
    async fn look_again(&mut self, reach: &mut Reach) -> Result<(), SweepError> {
        self.lists.read(self.store, self.project).await?;
        let seen = std::iter::once(&self.mark).chain(self.lists.marks()).cloned().collect();
        let live = ask(self.store, self.project, self.authority, &mut self.lists, seen).await?;
        for leaf in self.add_roots(&live.roots).await? {
            self.tree.reach_leaf(self.store, self.authority, self.project, leaf, reach).await?;
        }
        self.tree.reach_trees(reach);
        Ok(())
    }
}

/// What lives: by the authority's word, and by that of those who hold it.
async fn ask(
    store: &dyn ObjectStore,
    project: ProjectId,
    authority: &dyn Authority,
    lists: &mut Lists,
    seen: Vec<Mark>,
) -> Result<Live, SweepError> {
    let holders: Vec<String> = lists.holders().cloned().collect();
    let mut live = authority.live(project, &Asked { seen, holders: holders.clone() }).await?;
    for gone in holders.iter().filter(|holder| live.gone.contains(*holder)) {
        lists.forget(store, project, gone).await?;
    }
    for root in lists.roots() {
        live.roots.entry(root).or_insert(false);
    }
    Ok(live)
}

/// Now, by the store's clock.
async fn store_now(store: &dyn ObjectStore, project: ProjectId) -> Result<SystemTime, StoreError> {
    let key = sweep_key(project, "clock");
    store.put(key.clone(), Bytes::from_static(b"now")).await?;
    let entry = store.stat(key.clone()).await?;
    entry.map(|entry| entry.modified).ok_or(StoreError::NotFound { key })
}

async fn read_mark(store: &dyn ObjectStore, project: ProjectId) -> Result<Option<Mark>, SweepError> {
    match store.get(sweep_key(project, "seen"), MARK_BYTES).await {
        Ok(bytes) => {
            let mark = serde_json::from_slice(&bytes);
            Ok(Some(mark.map_err(|_| AuthorityError::Refused("the mark of the last sweep is damaged".into()))?))
        }
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Removes the intent of a sweep that died, if that may be.
async fn end_former(
    store: &dyn ObjectStore,
    project: ProjectId,
    authority: &dyn Authority,
    seen: &[Mark],
    holder: &str,
    now: SystemTime,
) -> Result<(), SweepError> {
    let key = sweep_key(project, "intent");
    let Some(former) = intent::read(store, project).await? else { return Ok(()) };
    let asked = Asked { seen: seen.to_vec(), holders: vec![former.holder.clone()] };
    let is_over = former.holder == holder || authority.live(project, &asked).await?.gone.contains(&former.holder);
    let Some(entry) = store.stat(key.clone()).await? else { return Ok(()) };
    let age = now.duration_since(entry.modified).unwrap_or_default();
    if !is_over || age < store.delete_tail() {
        return Err(SweepError::Held { holder: former.holder });
    }
    tracing::info!(%project, holder = former.holder, "the intent of a sweep that did not end is removed");
    store.delete(key).await?;
    Ok(())
}
