//! What this host's guests stand on, said in the chunk stores it uses: see [`supercloud_storage::sweep::Held`].
//!
//! The controller's records are what sweeps go by. When an older copy of them is brought back, what was started since is in this
//! list alone; and the place in the controller's history that stands beside it shows that they are older.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use supercloud_api::link::HistoryMark;
use supercloud_ids::{GuestId, ProjectId};
use supercloud_storage::{
    backend::ObjectStore,
    key::ContentRoot,
    sweep::{self, Held, Mark, SweepError},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{
    guest::record::{CopyRecord, GuestRecord},
    guests::read_records,
    host::Host,
    jobs::base,
};

/// Changes that come together are written together.
const GATHER: Duration = Duration::from_secs(2);
/// The records are looked at this often also when nothing is told: what is no longer held is let go.
const LOOK_EVERY: Duration = Duration::from_secs(600);
/// The pause after a store could not be written.
const RETRY: Duration = Duration::from_secs(10);
/// What a guest that comes will stand on counts so long without being in a record.
const FRESH_FOR: Duration = Duration::from_secs(3600);

/// What is to be said. Cheap to tell; written by [`run`].
#[derive(Debug, Default)]
pub struct Holdings {
    news: Mutex<News>,
    ring: Notify,
}

#[derive(Debug, Default)]
struct News {
    mark: Option<Mark>,
    touched: BTreeSet<GuestId>,
    fresh: HashMap<GuestId, Fresh>,
}

#[derive(Debug, Clone)]
struct Fresh {
    project: ProjectId,
    roots: BTreeSet<ContentRoot>,
    at: Instant,
}

impl Holdings {
    fn with<T>(&self, work: impl FnOnce(&mut News) -> T) -> T {
        work(&mut self.news.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The controller ordered something about a guest, when its history had come so far.
    pub fn note(&self, guest: GuestId, mark: HistoryMark) {
        self.with(|news| {
            news.touched.insert(guest);
            // Never back: a controller whose records are older than what this host was told must not have its way.
            if news.mark.as_ref().is_none_or(|before| before.seq <= mark.seq) {
                news.mark = Some(Mark { seq: mark.seq, hash: mark.hash });
            }
        });
        self.ring.notify_one();
    }

    /// A copy of a guest is being made here.
    pub fn expect(&self, copy: &CopyRecord) {
        let fresh =
            Fresh { project: copy.spec.project, roots: base::roots(copy).into_iter().collect(), at: Instant::now() };
        self.with(|news| news.fresh.insert(copy.spec.guest, fresh));
        self.ring.notify_one();
    }

    /// Nothing is left of a guest here.
    pub fn forget(&self, guest: GuestId) {
        self.with(|news| news.fresh.remove(&guest));
        self.ring.notify_one();
    }
}

/// What was said last.
#[derive(Debug, Default)]
struct Book {
    has_begun: bool,
    said: BTreeMap<ProjectId, Held>,
    projects: HashMap<GuestId, ProjectId>,
    due: BTreeSet<ProjectId>,
}

impl Book {
    /// What is to be said of each project now. Where guests' records cannot be read nothing that was said is taken back.
    fn look(
        &mut self,
        found: BTreeMap<GuestId, (ProjectId, BTreeSet<ContentRoot>)>,
        keeps_all: bool,
        mark: Option<&Mark>,
        touched: &BTreeSet<GuestId>,
    ) -> BTreeMap<ProjectId, Held> {
        let mut held: BTreeMap<ProjectId, BTreeSet<ContentRoot>> = BTreeMap::new();
        for (guest, (project, roots)) in found {
            self.projects.insert(guest, project);
            held.entry(project).or_default().extend(roots);
        }
        let touched: BTreeSet<ProjectId> =
            touched.iter().filter_map(|guest| self.projects.get(guest).copied()).collect();
        let projects: BTreeSet<ProjectId> =
            held.keys().chain(self.said.keys()).chain(&touched).chain(&self.due).copied().collect();
        let mut news = BTreeMap::new();
        for project in projects {
            let before = self.said.get(&project);
            let mut roots = held.remove(&project).unwrap_or_default();
            if keeps_all {
                roots.extend(before.iter().flat_map(|before| before.roots.iter().copied()));
            }
            let is_changed = before.is_none_or(|before| before.roots != roots);
            if is_changed || touched.contains(&project) || self.due.contains(&project) {
                let known = before.and_then(|before| before.mark.clone());
                // The later of both: an earlier agent of this host may have been told more.
                let mark = known.into_iter().chain(mark.cloned()).max_by_key(|mark| mark.seq);
                news.insert(project, Held { mark, roots });
            }
        }
        news
    }
}

/// Says what is held, at once and whenever that changes, until cancelled.
pub async fn run(host: Arc<Host>, cancel: CancellationToken) {
    let mut book = Book::default();
    loop {
        let pause = match say(&host, &mut book).await {
            Ok(()) => LOOK_EVERY,
            Err(error) => {
                tracing::warn!(
                    error = crate::chain(&error),
                    "what this host's guests stand on cannot be said in the store"
                );
                RETRY
            }
        };
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
            () = host.holdings.ring.notified() => tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(GATHER) => {}
            }
        }
    }
}

fn stores(host: &Host) -> Vec<Arc<dyn ObjectStore>> {
    let near: Arc<dyn ObjectStore> = Arc::new(host.store.near().clone());
    std::iter::once(near).chain(host.store.bucket().cloned()).collect()
}

async fn say(host: &Host, book: &mut Book) -> Result<(), SweepError> {
    let holder = host.id.to_string();
    if !book.has_begun {
        for store in stores(host) {
            for project in sweep::projects(&*store).await? {
                if let Some(held) = sweep::read_held(&*store, project, &holder).await? {
                    let known = book.said.entry(project).or_default();
                    known.roots.extend(held.roots);
                    known.mark = known.mark.take().into_iter().chain(held.mark).max_by_key(|mark| mark.seq);
                }
            }
        }
        book.has_begun = true;
    }
    let (mark, touched, fresh) = host.holdings.with(|news| {
        news.fresh.retain(|_, fresh| fresh.at.elapsed() < FRESH_FOR);
        (news.mark.clone(), std::mem::take(&mut news.touched), news.fresh.clone())
    });
    let (guests, run) = (host.config.guests_dir(), host.config.run_dir.clone());
    let read = move || {
        let (records, unreadable) = read_records(&guests, &run);
        let found: BTreeMap<_, _> = records.iter().filter_map(of_record).collect();
        (found, !unreadable.is_empty())
    };
    let Ok((mut found, keeps_all)) = tokio::task::spawn_blocking(read).await else { return Ok(()) };
    for (guest, fresh) in fresh {
        found.entry(guest).or_insert_with(|| (fresh.project, BTreeSet::new())).1.extend(fresh.roots);
    }
    for (project, held) in book.look(found, keeps_all, mark.as_ref(), &touched) {
        // Until it is said everywhere.
        book.due.insert(project);
        for store in stores(host) {
            sweep::hold(&*store, project, &holder, &held).await?;
        }
        book.due.remove(&project);
        book.said.insert(project, held);
    }
    Ok(())
}

/// What the copies of a guest stand on: what their records say, and what the volumes' own configurations do (a seed disk that an
/// earlier version put into the cloud's store is in no record).
fn of_record(record: &GuestRecord) -> Option<(GuestId, (ProjectId, BTreeSet<ContentRoot>))> {
    let copies = || record.current.iter().chain(&record.incoming);
    let project = copies().next()?.spec.project;
    let mut roots: BTreeSet<ContentRoot> = copies().flat_map(base::roots).collect();
    for home in copies().flat_map(CopyRecord::all_volumes) {
        roots.extend(home.base());
    }
    Some((record.guest(), (project, roots)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(byte: u8) -> ContentRoot {
        ContentRoot([byte; 32])
    }

    fn mark(seq: u64) -> Mark {
        Mark { seq, hash: format!("h{seq}") }
    }

    #[test]
    fn what_is_held_is_said_once_and_taken_back_when_it_is_held_no_more() {
        let (project, guest) = (ProjectId::generate(), GuestId::generate());
        let mut book = Book::default();
        let found = |bytes: &[u8]| {
            let roots: BTreeSet<ContentRoot> = bytes.iter().map(|byte| root(*byte)).collect();
            BTreeMap::from([(guest, (project, roots))])
        };
        let nobody = BTreeSet::new();
        let held = |mark: Option<u64>, bytes: &[u8]| {
            let roots = bytes.iter().map(|byte| root(*byte)).collect();
            BTreeMap::from([(project, Held { mark: mark.map(self::mark), roots })])
        };
        let said = book.look(found(&[1, 2]), false, None, &nobody);
        assert_eq!(said, held(None, &[1, 2]));
        book.said.extend(said);
        assert!(book.look(found(&[1, 2]), false, Some(&mark(5)), &nobody).is_empty(), "others' marks are not its own");
        let said = book.look(found(&[1, 2]), false, Some(&mark(5)), &BTreeSet::from([guest]));
        assert_eq!(said, held(Some(5), &[1, 2]));
        book.said.extend(said);
        // Never back, and of a guest that is gone the mark stays.
        let said = book.look(BTreeMap::new(), false, Some(&mark(4)), &BTreeSet::from([guest]));
        assert_eq!(said, held(Some(5), &[]));
        assert_eq!(book.look(BTreeMap::new(), true, None, &BTreeSet::from([guest])), held(Some(5), &[1, 2]));
        book.due.insert(project);
        assert_eq!(book.look(found(&[1, 2]), false, None, &nobody), held(Some(5), &[1, 2]), "it was not written");
    }

    #[test]
    fn the_newest_place_in_the_history_counts() {
        let (holdings, guest) = (Holdings::default(), GuestId::generate());
        for seq in [3, 9, 4] {
            holdings.note(guest, HistoryMark { seq, hash: format!("h{seq}") });
        }
        assert_eq!(holdings.with(|news| news.mark.clone()), Some(mark(9)));
    }
}
