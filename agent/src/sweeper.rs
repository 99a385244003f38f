//! Sweeps the cloud's chunk store when the controller says so; where the configuration wants it also now and then, and when a
//! freeze is over. What lives is asked of the controller; without it nothing is removed. What hosts [hold](crate::holdings)
//! lives besides. See [`supercloud_storage::sweep`].
//!
//! Where the cloud's store is a bucket, this host's folder is swept beside it: what lives may be there, and need not.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use rand::Rng as _;
use supercloud_api::{
    Code,
    link::{Answer, HistoryMark, ManifestPart, Query, StoreSwept},
};
use supercloud_ids::ProjectId;
use supercloud_storage::{
    backend::{ObjectStore, depsky::MemberHealth},
    key::{ChunkKind, ChunkName, ContentRoot},
    sweep::{self, Asked as Question, Authority, AuthorityError, Live, Mark, SweepError, SweepOptions, Swept},
};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    host::Host,
    link::{LinkHandle, QueryError},
};

/// How long the controller may take to answer.
const ANSWER_BUDGET: Duration = Duration::from_secs(30);
/// Between two batches of deletions.
const PAUSE: Duration = Duration::from_millis(50);
/// Freezes that end together are swept together.
const GATHER: Duration = Duration::from_secs(5);
/// After a start, before the first look: the time of a restart belongs to guests.
const FIRST_AFTER: Duration = Duration::from_secs(60);

/// What is asked of the sweeper. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct SweepBell(Arc<Bell>);

#[derive(Debug, Default)]
struct Bell {
    asked: Mutex<Asked>,
    ring: Notify,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Asked {
    all: bool,
    projects: BTreeSet<ProjectId>,
}

impl SweepBell {
    /// Everything is to be swept.
    pub fn all(&self) {
        self.with(|asked| asked.all = true);
        self.0.ring.notify_one();
    }

    /// A project is to be swept.
    pub fn project(&self, project: ProjectId) {
        self.with(|asked| {
            asked.projects.insert(project);
        });
        self.0.ring.notify_one();
    }

    fn with<T>(&self, work: impl FnOnce(&mut Asked) -> T) -> T {
        work(&mut self.0.asked.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Sweeps until cancelled.
pub async fn run(host: Arc<Host>, bell: SweepBell, cancel: CancellationToken) {
    let every = host.config.sweep.every();
    // Hosts that share a store come one after the other.
    let after = |time: Duration| Instant::now() + time.mul_f64(rand::rng().random_range(0.8..1.2));
    let mut next = every.map(|_| after(FIRST_AFTER));
    loop {
        let due = async {
            match next {
                Some(next) => tokio::time::sleep_until(next).await,
                None => std::future::pending().await,
            }
        };
        let asked = tokio::select! {
            () = cancel.cancelled() => return,
            () = due => {
                next = every.map(after);
                Asked { all: true, ..Asked::default() }
            }
            () = bell.0.ring.notified() => {
                tokio::select! {
                    () = cancel.cancelled() => return,
                    () = tokio::time::sleep(GATHER) => {}
                }
                let asked = bell.with(std::mem::take);
                if !asked.all && !host.config.sweep.after_freezes {
                    continue;
                }
                asked
            }
        };
        sweep_asked(&host, &asked, &cancel).await;
    }
}

async fn sweep_asked(host: &Host, asked: &Asked, cancel: &CancellationToken) {
    let authority = |is_home| LinkAuthority { link: host.link.clone(), is_home };
    sweep_store(host, host.store.home(), &authority(true), asked, cancel).await;
    if host.store.bucket().is_some() {
        sweep_store(host, Arc::new(host.store.near().clone()), &authority(false), asked, cancel).await;
    }
}

async fn sweep_store(
    host: &Host,
    store: Arc<dyn ObjectStore>,
    authority: &LinkAuthority,
    asked: &Asked,
    cancel: &CancellationToken,
) {
    let projects = match sweep::projects(&*store).await {
        Ok(projects) => projects,
        Err(error) => return tracing::warn!(error = crate::chain(&error), "the chunk store cannot be swept"),
    };
    let options = SweepOptions { holder: host.id.to_string(), grace: host.config.sweep.grace(), pause: PAUSE };
    for project in projects.into_iter().filter(|project| asked.all || asked.projects.contains(project)) {
        if cancel.is_cancelled() || !*host.link.connected().borrow() {
            return;
        }
        let done = sweep::sweep_project(&store, project, authority, &options, cancel).await;
        match &done {
            Ok(swept) => tracing::info!(%project, ?swept, "the chunk store is swept"),
            // Another host of this cloud is at it.
            Err(SweepError::Held { holder }) => {
                tracing::info!(%project, holder, "the chunk store is not swept: another sweep has not ended");
                continue;
            }
            Err(SweepError::Authority(AuthorityError::NotYourTurn(why))) => {
                tracing::info!(%project, why, "the chunk store is not swept by this host");
                return;
            }
            Err(SweepError::Cancelled) => return,
            Err(error) => tracing::warn!(%project, error = crate::chain(error), "the chunk store is not swept"),
        }
        if !authority.is_home {
            continue;
        }
        let wrong = host.store.clouds().map(|clouds| wrong_lately(&clouds.members())).unwrap_or_default();
        let query = Query::StoreSwept { swept: told(project, &done, wrong) };
        if let Err(error) = host.link.query(query, ANSWER_BUDGET).await {
            tracing::debug!(%project, error = crate::chain(&error), "the controller does not hear of the sweep");
        }
    }
}

/// Who of a cloud of clouds gave something wrong lately, and what.
fn wrong_lately(members: &[MemberHealth]) -> Vec<String> {
    let wrong = members.iter().filter(|member| member.is_wrong_lately);
    wrong
        .filter_map(|member| {
            let last = member.last_wrong.as_ref()?;
            Some(format!("{} {last} ({} wrong answers since this agent's start)", member.name, member.wrong))
        })
        .collect()
}

fn told(project: ProjectId, done: &Result<Swept, SweepError>, wrong: Vec<String>) -> StoreSwept {
    let swept = done.as_ref().copied().unwrap_or_default();
    StoreSwept {
        project,
        seen_chunks: swept.seen_chunks,
        seen_bytes: swept.seen_bytes,
        freed_chunks: swept.freed_chunks,
        freed_bytes: swept.freed_bytes,
        young_chunks: swept.young_chunks,
        problem: done.as_ref().err().map(|error| crate::chain(error)),
        wrong,
    }
}

/// The controller, over the link.
struct LinkAuthority {
    link: LinkHandle,
    /// Whether of the cloud's store; else of a folder that has to have nothing.
    is_home: bool,
}

impl fmt::Debug for LinkAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LinkAuthority(..)")
    }
}

fn unclear(what: &str) -> AuthorityError {
    AuthorityError::Refused(format!("the controller's answer is not understood: {what}"))
}

impl LinkAuthority {
    async fn ask(&self, query: Query) -> Result<Answer, AuthorityError> {
        let answer = self.link.query(query, ANSWER_BUDGET).await;
        answer.map_err(|error| match error {
            QueryError::Refused(problem) if problem.code == Code::OperationInProgress => {
                AuthorityError::NotYourTurn(problem.detail)
            }
            error => AuthorityError::Refused(crate::chain(&error)),
        })
    }

    async fn all_live(&self, project: ProjectId, asked: &Question) -> Result<Live, AuthorityError> {
        let mut marks = asked.seen.iter().map(|mark| HistoryMark { seq: mark.seq, hash: mark.hash.clone() });
        let (seen, also_seen) = (marks.next(), marks.collect::<Vec<_>>());
        // As a controller of the version before understands it: of one holder.
        let holder = Some(asked.holders.clone()).filter(|holders| holders.len() == 1).and_then(|mut one| one.pop());
        let mut all_gone = BTreeSet::new();
        let mut all = BTreeMap::new();
        let mut after: Option<String> = None;
        // Of the first page too: who wrote then may have ended before the last, with a root that belongs on the first.
        let mut oldest_writer_ms: Option<u64> = None;
        loop {
            let query = Query::StoreRoots {
                project,
                seen: seen.clone(),
                holder: holder.clone(),
                after: after.clone(),
                also_seen: also_seen.clone(),
                holders: asked.holders.clone(),
            };
            let answer = self.ask(query).await?;
            let Answer::StoreRoots { roots, more, oldest_writer_ms: oldest, mark, is_holder_gone, gone } = answer
            else {
                return Err(unclear("something else"));
            };
            all_gone.extend(gone);
            all_gone.extend(holder.clone().filter(|_| is_holder_gone));
            oldest_writer_ms = oldest_writer_ms.max(oldest);
            let last = roots.last().map(|last| last.root.clone());
            for live in roots {
                let root: ContentRoot = live.root.parse().map_err(|_| unclear("a root"))?;
                all.insert(root, live.is_home && self.is_home);
            }
            if !more {
                return Ok(Live {
                    roots: all,
                    oldest_writer: oldest_writer_ms.map(Duration::from_millis),
                    mark: Mark { seq: mark.seq, hash: mark.hash },
                    gone: all_gone,
                });
            }
            // Else it would be asked for ever.
            if last.is_none() || last <= after {
                return Err(unclear("a page that leads nowhere"));
            }
            after = last;
        }
    }

    async fn names_in(
        &self,
        project: ProjectId,
        part: ManifestPart,
        name: ChunkName,
        sealed: Option<Bytes>,
    ) -> Result<Option<Vec<ChunkName>>, AuthorityError> {
        let query = Query::StoreNames { project, part, name: name.to_string(), sealed: sealed.map(hex::encode) };
        let Answer::StoreNames { names } = self.ask(query).await? else { return Err(unclear("something else")) };
        let Some(names) = names else { return Ok(None) };
        let names = hex::decode(names).map_err(|_| unclear("names"))?;
        let (names, rest) = names.as_chunks::<32>();
        if !rest.is_empty() {
            return Err(unclear("names"));
        }
        Ok(Some(names.iter().map(|name| ChunkName(*name)).collect()))
    }
}

impl Authority for LinkAuthority {
    fn live<'a>(&'a self, project: ProjectId, asked: &'a Question) -> BoxFuture<'a, Result<Live, AuthorityError>> {
        Box::pin(self.all_live(project, asked))
    }

    fn names(
        &self,
        project: ProjectId,
        kind: ChunkKind,
        name: ChunkName,
        sealed: Option<Bytes>,
    ) -> BoxFuture<'_, Result<Option<Vec<ChunkName>>, AuthorityError>> {
        Box::pin(async move {
            let part = match kind {
                ChunkKind::Root => ManifestPart::Root,
                ChunkKind::Leaf => ManifestPart::Leaf,
                ChunkKind::Data => return Ok(Some(Vec::new())),
            };
            self.names_in(project, part, name, sealed).await
        })
    }
}
