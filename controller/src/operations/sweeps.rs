//! Sweeps of chunk stores: tells hosts what lives, sweeps the controller's own store, and keeps count.
//!
//! What lives in a project is what its records name: parts of images, what volumes stand on, freezes that no thaw has
//! consumed, points of volumes' histories (these in their own cloud's store alone). All of it counts for every store: the cloud of a volume may be another one's only source.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use supercloud_api::{
    Cloud, Code, Freeze, Image, Problem, Volume, VolumeHistory,
    ids::{CloudId, HostId, ProjectId, RequestId},
    link::{Answer, Directive, HistoryMark, ManifestPart, StoreRoot, StoreSwept},
    unix_ms,
};
use supercloud_storage::{
    backend::{ObjectKey, ObjectStore, StoreError},
    chunk::MAX_SEALED_BYTES,
    key::{ChunkKind, ChunkName, ContentRoot, DataKeys, ProjectKey},
    manifest,
    sweep::{self, Asked, Authority, AuthorityError, Live, Mark, SweepError, SweepOptions},
};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Engine, EngineError, handler::internal, sweep_guard::Guard};
use crate::{
    chain,
    state::{Change, Context, EventDraft, Head, HostRecord, OperationRecord, ProjectRecord, Work},
};

/// Hosts of which one store may tell.
const HOLDERS_AT_MOST: usize = 1001;
/// Roots in one answer: with their JSON less than half a frame.
const ROOTS_AT_ONCE: usize = 4000;
/// What was written to the controller's own store more lately than this is left alone.
const OWN_GRACE: Duration = Duration::from_secs(3600);
/// Between two batches of deletions.
const PAUSE: Duration = Duration::from_millis(50);
/// Events of one host's sweeps of one project are not written more often.
const EVENT_EVERY: Duration = Duration::from_secs(5);
/// The longest problem that is kept, in characters.
const PROBLEM_AT_MOST: usize = 500;
/// Stores of one that gave something wrong and are named: it has no more members.
const WRONG_AT_MOST: usize = 16;

/// Whose store it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum StoreOf {
    /// The controller's own: images.
    Controller,
    /// A cloud's.
    Cloud(CloudId),
}

/// What sweeps of one store have found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreCount {
    /// Bytes of chunks of each project after its last sweep.
    pub bytes: BTreeMap<ProjectId, u64>,
    /// Bytes that were removed since the controller's start.
    pub freed_bytes: u64,
    /// Sweeps that did not come to their end since the controller's start.
    pub failures: u64,
}

#[derive(Debug, Default)]
struct Board {
    asked: BTreeSet<StoreOf>,
    counts: BTreeMap<StoreOf, StoreCount>,
    /// Hosts that take orders to sweep, as they said when they came.
    capable: HashSet<HostId>,
    told: HashMap<(HostId, ProjectId), Instant>,
    guard: Guard,
    /// Which of a cloud's hosts was asked last.
    rounds: HashMap<CloudId, HostId>,
}

/// What a host asks about the roots of a project.
#[derive(Debug, Default)]
pub(super) struct RootsAsked {
    pub(super) seen: Vec<HistoryMark>,
    pub(super) holder: Option<String>,
    pub(super) holders: Vec<String>,
    pub(super) after: Option<String>,
}

/// Where sweeps are asked for, and counted. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct SweepBoard(Arc<(Mutex<Board>, Notify)>);

impl SweepBoard {
    /// A store is to be swept now.
    pub fn ask(&self, store: StoreOf) {
        self.with(|board| board.asked.insert(store));
        self.0.1.notify_one();
    }

    /// What is known of each store since the controller's start.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<StoreOf, StoreCount> {
        self.with(|board| board.counts.clone())
    }

    /// What a host said of itself when it came.
    pub(super) fn note_capable(&self, host: HostId, is_capable: bool) {
        self.with(|board| if is_capable { board.capable.insert(host) } else { board.capable.remove(&host) });
    }

    /// Whether a host takes orders to sweep.
    #[must_use]
    pub fn takes_orders(&self, host: HostId) -> bool {
        self.with(|board| board.capable.contains(&host))
    }

    /// What is known of the fleet.
    pub(super) fn guard<T>(&self, work: impl FnOnce(&mut Guard) -> T) -> T {
        self.with(|board| work(&mut board.guard))
    }

    /// Hosts were told of places that are in no history of ours.
    pub(crate) fn note_foreign(&self, marks: impl Iterator<Item = HistoryMark>) {
        self.guard(|guard| guard.note_foreign(marks));
    }

    /// Places in other histories that hosts were told of and that do not count any more, because an operator says so.
    #[must_use]
    pub fn take_foreign(&self) -> Vec<HistoryMark> {
        self.guard(Guard::take_foreign)
    }

    fn with<T>(&self, work: impl FnOnce(&mut Board) -> T) -> T {
        work(&mut self.0.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn count(&self, store: StoreOf, swept: &StoreSwept) {
        self.with(|board| {
            let count = board.counts.entry(store).or_default();
            count.freed_bytes = count.freed_bytes.saturating_add(swept.freed_bytes);
            if swept.problem.is_some() {
                count.failures += 1;
            } else {
                count.bytes.insert(swept.project, swept.seen_bytes.saturating_sub(swept.freed_bytes));
            }
        });
    }

    /// Whether an event of this host and project may be written again.
    fn is_news(&self, host: HostId, project: ProjectId) -> bool {
        self.with(|board| {
            board.told.retain(|_, at| at.elapsed() < EVENT_EVERY);
            let is_news = !board.told.contains_key(&(host, project));
            if is_news {
                board.told.insert((host, project), Instant::now());
            }
            is_news
        })
    }
}

fn root(text: &str, of: &str) -> Result<ContentRoot, EngineError> {
    // Passed over, its content would be taken for garbage.
    text.parse().map_err(|_| EngineError::Broken(format!("{of} names a root that is none")))
}

impl Engine {
    /// What lives in a project, and whether it must be in the store of `here`; how long the oldest operation has been at
    /// work that may be writing content.
    async fn live_content(
        &self,
        project: ProjectId,
        here: StoreOf,
    ) -> Result<(BTreeMap<ContentRoot, bool>, Option<Duration>), EngineError> {
        // Before the roots: an operation that ends meanwhile has left its root by then.
        let mut oldest: Option<u64> = None;
        for id in self.state.active_operations().await? {
            let Some(record) = self.state.read::<OperationRecord>(&id).await? else { continue };
            // Who starts, thaws or moves a guest brings what it stands on into the store of the cloud to which it comes.
            let writes = match record.work {
                Work::ImageImport { .. }
                | Work::GuestFreeze { .. }
                | Work::GuestThaw { .. }
                | Work::GuestStart
                | Work::GuestMigrate { .. } => true,
                // For weeks, perhaps: what its standby stands on is told by its host, as of every guest.
                Work::GuestMirror { .. } => false,
                // Its parts do.
                Work::Group => false,
                Work::GuestStop { .. } | Work::GuestDelete | Work::HostRent | Work::HostReturn => false,
            };
            if writes && record.operation.project == Some(project) {
                let age = unix_ms().saturating_sub(record.operation.created_at_ms);
                oldest = oldest.max(Some(age));
            }
        }
        // Nor is a point of a volume on its way an operation.
        oldest = oldest.max(self.points.oldest_ms(project));
        let mut roots: BTreeMap<ContentRoot, bool> = BTreeMap::new();
        let mut add = |root: ContentRoot, is_home: bool| *roots.entry(root).or_default() |= is_home;
        // Freezes twice: a thaw moves a root from a freeze to volumes, a freeze the other way.
        for _ in 0..2 {
            for freeze in self.state.list::<Freeze>().await? {
                if freeze.project != project || freeze.is_consumed {
                    continue;
                }
                let is_home = here == StoreOf::Cloud(freeze.cloud);
                add(root(&freeze.memory_root, "a freeze")?, is_home);
                for volume in &freeze.volumes {
                    add(root(&volume.root, "a freeze")?, is_home);
                }
            }
            for image in self.state.list::<Image>().await? {
                if image.project == project {
                    for part in &image.parts {
                        add(root(&part.root, "an image")?, here == StoreOf::Controller);
                    }
                }
            }
            // Before the volumes: a clone takes a root from a history to a volume, and the point may be thinned out after that.
            for history in self.state.list::<VolumeHistory>().await? {
                let points = history.points.iter().filter(|point| here == StoreOf::Cloud(point.cloud));
                for point in points.filter(|_| history.project == project) {
                    add(root(&point.root, "a point of a volume")?, true);
                    if let Some(memory) = point.memory.as_ref().filter(|memory| memory.is_kept) {
                        add(root(&memory.root, "a checkpoint")?, true);
                    }
                }
            }
            for volume in self.state.list::<Volume>().await? {
                if let (true, Some(base)) = (volume.project == project, &volume.base) {
                    let is_home = volume.base_cloud.is_some_and(|cloud| here == StoreOf::Cloud(cloud));
                    add(root(base, "a volume")?, is_home);
                }
            }
        }
        Ok((roots, oldest.map(Duration::from_millis)))
    }

    /// Whether a mark is in this history.
    pub(super) async fn is_in_history(&self, mark: &HistoryMark) -> Result<bool, EngineError> {
        if mark.seq == 0 {
            return Ok(mark.hash == Head::default().hash);
        }
        let (events, _) = self.state.events(mark.seq - 1, 1).await?;
        Ok(events.first().is_some_and(|event| event.seq == mark.seq && event.hash == mark.hash))
    }

    /// What a host must know to sweep its cloud's store.
    pub(super) async fn store_roots(
        &self,
        host: HostId,
        project: ProjectId,
        asked: RootsAsked,
    ) -> Result<Answer, Problem> {
        let RootsAsked { seen, holder, holders, after } = asked;
        if seen.len().max(holders.len()) > HOLDERS_AT_MOST {
            return Err(Problem::new(Code::BadRequest, "too many hosts hold something in this store"));
        }
        let cloud = self.take_turn(host).await?;
        let mut gone = Vec::new();
        for name in holders.into_iter().chain(holder.clone()) {
            if let Ok(host) = name.parse::<HostId>()
                && self.is_removed(host).await.map_err(|error| internal(&error))?
            {
                gone.push(name);
            }
        }
        let is_gone = holder.is_some_and(|holder| gone.contains(&holder));
        let (roots, oldest, mark) = self.live_checked(project, StoreOf::Cloud(cloud), &seen).await?;
        let after = match after.map(|after| after.parse::<ContentRoot>()) {
            Some(Err(_)) => return Err(Problem::new(Code::BadRequest, "after: this is no root")),
            Some(Ok(after)) => Some(after),
            None => None,
        };
        let mut rest = roots.into_iter().filter(|(root, _)| after.is_none_or(|after| *root > after));
        let page = rest.by_ref().take(ROOTS_AT_ONCE);
        let roots = page.map(|(root, is_home)| StoreRoot { root: root.to_string(), is_home }).collect();
        Ok(Answer::StoreRoots {
            roots,
            more: rest.next().is_some(),
            oldest_writer_ms: oldest.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
            mark,
            is_holder_gone: is_gone,
            gone,
        })
    }

    async fn is_removed(&self, host: HostId) -> Result<bool, EngineError> {
        // One of which nothing is known may be known again when the right records are back.
        Ok(self.state.read::<HostRecord>(&host).await?.is_some_and(|record| record.is_removed))
    }

    async fn live_checked(
        &self,
        project: ProjectId,
        here: StoreOf,
        seen: &[HistoryMark],
    ) -> Result<(BTreeMap<ContentRoot, bool>, Option<Duration>, HistoryMark), Problem> {
        let read = async {
            if let Some(doubt) = self.doubt().await? {
                return Ok(Err(doubt));
            }
            if let Some(foreign) = self.foreign(seen).await?.first() {
                return Ok(Err(format!(
                    "event {} of which hosts of this store were told is not in this controller's history (an older copy of \
                     its records was brought back?): nothing is removed. When every guest that runs is known again, say \
                     `supercloud store sweep NAME --accept-records`",
                    foreign.seq
                )));
            }
            // A project that is merely not known (see above) keeps everything.
            if self.state.read::<ProjectRecord>(&project).await?.is_none() {
                return Ok(Err("this project is not known: nothing of it is removed".to_owned()));
            }
            let head = self.state.head().await?;
            let (roots, oldest) = self.live_content(project, here).await?;
            Ok::<_, EngineError>(Ok((roots, oldest, HistoryMark { seq: head.seq, hash: head.hash })))
        };
        match read.await {
            Ok(Ok(live)) => Ok(live),
            Ok(Err(why)) => Err(Problem::new(Code::WrongState, why)),
            Err(error) => Err(internal(&error)),
        }
    }

    /// The names in a part of a manifest.
    pub(super) async fn store_names(
        &self,
        host: HostId,
        project: ProjectId,
        part: ManifestPart,
        name: &str,
        sealed: Option<String>,
    ) -> Result<Answer, Problem> {
        // Only to the host that sweeps: nobody else has any use for it.
        self.take_turn(host).await?;
        let bad = |what: &str| Problem::new(Code::BadRequest, format!("{what}: not hexadecimal, or of a wrong length"));
        let name: ChunkName = name.parse().map_err(|_| bad("name"))?;
        let sealed = sealed.map(hex::decode).transpose().map_err(|_| bad("sealed"))?;
        let kind = match part {
            ManifestPart::Root => ChunkKind::Root,
            ManifestPart::Leaf => ChunkKind::Leaf,
        };
        let names =
            self.names_in(project, kind, name, sealed.map(Bytes::from)).await.map_err(|error| internal(&error))?;
        let names = names.map(|names| names.iter().map(|name| name.to_string()).collect());
        Ok(Answer::StoreNames { names })
    }

    async fn names_in(
        &self,
        project: ProjectId,
        kind: ChunkKind,
        name: ChunkName,
        sealed: Option<Bytes>,
    ) -> Result<Option<Vec<ChunkName>>, EngineError> {
        let key = self.state.project_key(&self.keys.root, project).await?;
        let keys = DataKeys::derive(project, &ProjectKey::from_bytes(key));
        let sealed = match sealed {
            Some(sealed) => sealed,
            None => match self.store.get(ObjectKey::chunk(project, &name), MAX_SEALED_BYTES).await {
                Ok(sealed) => sealed,
                Err(StoreError::NotFound { .. }) => return Ok(None),
                Err(error) => return Err(EngineError::Broken(chain(&error))),
            },
        };
        let opened = tokio::task::spawn_blocking(move || manifest::names_of(&keys, kind, name, &sealed)).await;
        // Damaged, or not what it is said to be: for who asks the same as absent.
        Ok(opened.ok().and_then(Result::ok))
    }

    /// A host has swept.
    pub(super) async fn store_swept(&self, host: HostId, mut swept: StoreSwept) -> Result<Answer, Problem> {
        let record = self.state.need::<HostRecord>(&host).await.map_err(|error| internal(&error.into()))?;
        let cut = |text: String| text.chars().take(PROBLEM_AT_MOST).collect::<String>();
        swept.problem = swept.problem.map(cut);
        swept.wrong = swept.wrong.into_iter().take(WRONG_AT_MOST).map(cut).collect();
        self.sweeps.count(StoreOf::Cloud(record.host.cloud), &swept);
        if self.sweeps.is_news(host, swept.project) {
            self.tell_swept(Some(&record.host), &swept).await.map_err(|error| internal(&error))?;
        }
        Ok(Answer::Noted)
    }

    async fn tell_swept(&self, host: Option<&supercloud_api::Host>, swept: &StoreSwept) -> Result<(), EngineError> {
        // One that found nothing to do is no news.
        if swept.freed_chunks == 0 && swept.problem.is_none() && swept.wrong.is_empty() {
            return Ok(());
        }
        if self.state.read::<ProjectRecord>(&swept.project).await?.is_none() {
            return Ok(());
        }
        let store = host.map_or("controller", |host| host.cloud_name.as_str());
        let mut change = Change::new();
        if !swept.wrong.is_empty() {
            let data = serde_json::json!({ "store": store, "wrong": swept.wrong });
            let draft = EventDraft::new("store.wrong").project(swept.project);
            change.event(draft.host(host.map(|host| host.id)).data(data));
        }
        let data = serde_json::json!({
            "store": store,
            "freed_chunks": swept.freed_chunks,
            "freed_bytes": swept.freed_bytes,
            "left_bytes": swept.seen_bytes.saturating_sub(swept.freed_bytes),
            "young_chunks": swept.young_chunks,
            "problem": swept.problem,
        });
        let kind = if swept.problem.is_none() { "store.swept" } else { "store.not_swept" };
        if swept.freed_chunks > 0 || swept.problem.is_some() {
            change.event(EventDraft::new(kind).project(swept.project).host(host.map(|host| host.id)).data(data));
        }
        let context = match host {
            Some(host) => Context::actor(format!("host:{}", host.id), RequestId::generate()),
            None => Context::system(),
        };
        self.state.commit(&context, change).await?;
        Ok(())
    }

    /// Sweeps the controller's own store, and has hosts sweep those of their clouds, when that is asked for and now and then,
    /// until cancelled.
    pub(super) async fn sweep_stores(self: &Arc<Self>, cancel: CancellationToken) {
        let mut next = self.pace.sweep.map(|every| Instant::now() + every);
        loop {
            let due = async {
                match next {
                    Some(next) => tokio::time::sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            let asked = tokio::select! {
                () = cancel.cancelled() => return,
                () = self.sweeps.0.1.notified() => self.sweeps.with(|board| std::mem::take(&mut board.asked)),
                () = due => {
                    next = self.pace.sweep.map(|every| Instant::now() + every);
                    match self.state.list::<Cloud>().await {
                        Ok(clouds) => {
                            let clouds = clouds.iter().map(|cloud| StoreOf::Cloud(cloud.id));
                            std::iter::once(StoreOf::Controller).chain(clouds).collect()
                        }
                        Err(error) => {
                            warn!("which stores there are cannot be read: {}", chain(&error));
                            continue;
                        }
                    }
                }
            };
            for store in asked {
                match store {
                    StoreOf::Controller => {
                        self.sweep_own(OWN_GRACE, &cancel).await;
                    }
                    StoreOf::Cloud(cloud) => {
                        if let Err(error) = self.send_sweep(cloud).await {
                            warn!(%cloud, "its hosts cannot be told to sweep: {}", chain(&error));
                        }
                    }
                }
            }
        }
    }

    async fn send_sweep(&self, cloud: CloudId) -> Result<(), EngineError> {
        let hosts = self.state.list::<HostRecord>().await?;
        let is_able = |host: HostId| self.sweeps.takes_orders(host) && self.sessions.is_open(host);
        let able: BTreeSet<HostId> = hosts
            .iter()
            .map(|host| &host.host)
            .filter(|host| host.cloud == cloud && is_able(host.id))
            .map(|host| host.id)
            .collect();
        // One at a time, in turn: one that cannot reach the store must not be the only one that tries.
        let last = self.sweeps.with(|board| board.rounds.get(&cloud).copied());
        let next = able.iter().find(|host| last.is_none_or(|last| **host > last)).or(able.first());
        if let Some(next) = next {
            self.sweeps.with(|board| board.rounds.insert(cloud, *next));
            self.sessions.send(*next, Directive::SweepStore);
        }
        Ok(())
    }

    /// Sweeps the controller's own store.
    pub async fn sweep_own(self: &Arc<Self>, grace: Duration, cancel: &CancellationToken) {
        let doubt = match self.own_doubt().await {
            Ok(doubt) => doubt,
            Err(error) => Some(chain(&error)),
        };
        if let Some(doubt) = doubt {
            warn!("the controller's chunks are not swept: {doubt}");
            if let Err(error) = self.tell_own_doubt(&doubt).await {
                warn!("that chunks were not swept cannot be written: {}", chain(&error));
            }
            return;
        }
        let store: Arc<dyn ObjectStore> = Arc::clone(&self.store) as _;
        let projects = match sweep::projects(&*store).await {
            Ok(projects) => projects,
            Err(error) => return warn!("the controller's chunks cannot be swept: {}", chain(&error)),
        };
        let authority = OwnRecords(Arc::clone(self));
        let options = SweepOptions { holder: "controller".into(), grace, pause: PAUSE };
        for project in projects {
            let done = sweep::sweep_project(&store, project, &authority, &options, cancel).await;
            if matches!(done, Err(SweepError::Cancelled)) {
                return;
            }
            let swept = done.as_ref().copied().unwrap_or_default();
            let swept = StoreSwept {
                project,
                seen_chunks: swept.seen_chunks,
                seen_bytes: swept.seen_bytes,
                freed_chunks: swept.freed_chunks,
                freed_bytes: swept.freed_bytes,
                young_chunks: swept.young_chunks,
                problem: done.as_ref().err().map(|error| chain(error)),
                wrong: Vec::new(),
            };
            info!(?swept, "the controller's chunks were swept");
            self.sweeps.count(StoreOf::Controller, &swept);
            if let Err(error) = self.tell_swept(None, &swept).await {
                warn!("that chunks were swept cannot be written: {}", chain(&error));
            }
        }
    }
}

/// The records, for the sweep of the controller's own store.
struct OwnRecords(Arc<Engine>);

impl fmt::Debug for OwnRecords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OwnRecords(..)")
    }
}

impl Authority for OwnRecords {
    fn live<'a>(&'a self, project: ProjectId, asked: &'a Asked) -> BoxFuture<'a, Result<Live, AuthorityError>> {
        Box::pin(async move {
            let marks = asked.seen.iter();
            let seen: Vec<HistoryMark> =
                marks.map(|mark| HistoryMark { seq: mark.seq, hash: mark.hash.clone() }).collect();
            let live = self.0.live_checked(project, StoreOf::Controller, &seen).await;
            let (roots, oldest_writer, mark) = live.map_err(|problem| AuthorityError::Refused(problem.detail))?;
            let mark = Mark { seq: mark.seq, hash: mark.hash };
            Ok(Live { roots, oldest_writer, mark, gone: BTreeSet::new() })
        })
    }

    fn names(
        &self,
        project: ProjectId,
        kind: ChunkKind,
        name: ChunkName,
        sealed: Option<Bytes>,
    ) -> BoxFuture<'_, Result<Option<Vec<ChunkName>>, AuthorityError>> {
        Box::pin(async move {
            let names = self.0.names_in(project, kind, name, sealed).await;
            names.map_err(|error| AuthorityError::Refused(chain(&error)))
        })
    }
}
