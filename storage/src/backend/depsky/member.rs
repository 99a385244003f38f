//! One of the stores, what is known of how it behaves, and who is asked first.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use crate::backend::{ObjectKey, ObjectStore, StoreError};

/// Requests to one member under way at once.
const AT_ONCE: usize = 64;
/// KiB of pieces that may be waiting for one member, or be on their way to it. More than that waits, or goes without it.
const BACKLOG_KIB: u32 = 64 * 1024;
/// How long one that failed is asked last, doubled with each further failure.
const SUSPECT_FIRST: Duration = Duration::from_secs(2);
const SUSPECT_AT_MOST: Duration = Duration::from_secs(120);
/// How long one that gave something wrong is asked last.
const LIAR_FOR: Duration = Duration::from_secs(600);
/// Slower than this is all the same.
const PACE_AT_MOST: Duration = Duration::from_secs(60);
/// What counts as lately: two sweeps.
const WRONG_LATELY: Duration = Duration::from_secs(2 * 3600);
/// The same wrong is told again after so long.
const TELL_EVERY: Duration = Duration::from_secs(60);
/// Names that only it has, in a listing: so many are looked at in an hour.
const STRAYS_AT_MOST: u64 = 100_000;
const STRAYS_FOR: Duration = Duration::from_secs(3600);

/// Who is asked first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReadOrder {
    /// Who has answered fastest of late.
    #[default]
    Fastest,
    /// As they are listed: the cheapest first, say.
    Listed,
}

/// What a member did wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Wrong {
    /// It gave something that nobody who has the store's key wrote there.
    Forged,
    /// It gave an older state than it had.
    RolledBack,
    /// Its listing cannot be.
    Listing,
}

impl Wrong {
    const ALL: usize = 3;

    const fn text(self) -> &'static str {
        match self {
            Self::Forged => "gave bytes that were not written there",
            Self::RolledBack => "gave an older state than it had",
            Self::Listing => "gave a listing that cannot be",
        }
    }
}

/// How a member has behaved since the store was opened.
#[derive(Debug, Clone, PartialEq)]
pub struct MemberHealth {
    /// Its name in the configuration.
    pub name: String,
    /// Whether it is asked after all others.
    pub is_suspect: bool,
    /// Requests that were answered.
    pub answered: u64,
    /// Requests that failed, or were not answered in time.
    pub failed: u64,
    /// Writes that went without it because too much was waiting for it.
    pub left_out: u64,
    /// Wrong answers.
    pub wrong: u64,
    /// Whether the last one was in the last two hours.
    pub is_wrong_lately: bool,
    /// The last one: what, and of which object.
    pub last_wrong: Option<String>,
    /// Pieces that were put anew there because they were missing or wrong.
    pub mended: u64,
    /// How long a read takes, lately.
    pub read_ms: Option<f64>,
}

#[derive(Debug, Default)]
struct Known {
    answered: u64,
    failed: u64,
    failed_in_a_row: u32,
    left_out: u64,
    wrong: u64,
    last_wrong: Option<String>,
    wrong_at: Option<Instant>,
    mended: u64,
    /// Of reads: smoothed, and when the last one was.
    read: Option<(Duration, Instant)>,
    suspect_until: Option<Instant>,
    told: [Option<Instant>; Wrong::ALL],
    strays: u64,
    strays_since: Option<Instant>,
}

/// One of the stores.
pub(super) struct Member {
    pub(super) name: String,
    pub(super) store: Arc<dyn ObjectStore>,
    permits: Semaphore,
    backlog: Arc<Semaphore>,
    known: Mutex<Known>,
    /// Deletions that were asked for and have not been answered, by object.
    deleting: Mutex<BTreeMap<ObjectKey, usize>>,
}

/// A deletion is under way at a member.
pub(super) struct Deleting {
    member: Arc<Member>,
    key: ObjectKey,
}

impl Drop for Deleting {
    fn drop(&mut self) {
        let mut deleting = self.member.deleting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = deleting.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                deleting.remove(&self.key);
            }
        }
    }
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:?}", self.name, self.store)
    }
}

impl Member {
    pub(super) fn new(name: String, store: Arc<dyn ObjectStore>) -> Self {
        Self {
            name,
            store,
            permits: Semaphore::new(AT_ONCE),
            backlog: Arc::new(Semaphore::new(BACKLOG_KIB as usize)),
            known: Mutex::default(),
            deleting: Mutex::default(),
        }
    }

    /// Notes a deletion until what is returned is dropped: when it has been answered, however late.
    pub(super) fn begin_deletion(self: &Arc<Self>, key: &ObjectKey) -> Deleting {
        let mut deleting = self.deleting.lock().unwrap_or_else(PoisonError::into_inner);
        *deleting.entry(key.clone()).or_default() += 1;
        Deleting { member: Arc::clone(self), key: key.clone() }
    }

    /// Refuses to count on an object that a deletion without an answer may still take.
    pub(super) fn check_stays<'a>(&self, keys: impl IntoIterator<Item = &'a ObjectKey>) -> Result<(), StoreError> {
        let deleting = self.deleting.lock().unwrap_or_else(PoisonError::into_inner);
        match keys.into_iter().find(|key| deleting.contains_key(key)) {
            None => Ok(()),
            Some(key) => Err(StoreError::Unreachable {
                store: self.name.clone(),
                why: format!("a deletion of {key} has not been answered and may still happen"),
            }),
        }
    }

    fn with<T>(&self, work: impl FnOnce(&mut Known) -> T) -> T {
        work(&mut self.known.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes a request, within `budget`, the wait for its turn included.
    pub(super) async fn ask<T>(
        &self,
        budget: Duration,
        request: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let turn = async {
            let permit = self.permits.acquire().await;
            debug_assert!(permit.is_ok(), "nobody closes it");
            request.await
        };
        let done = match tokio::time::timeout(budget, turn).await {
            Ok(done) => done,
            Err(_) => Err(StoreError::Unreachable {
                store: self.name.clone(),
                why: format!("no answer within {} s", budget.as_secs()),
            }),
        };
        self.with(|known| match &done {
            // That something is not there, or is too large, is an answer.
            Ok(_) | Err(StoreError::NotFound { .. } | StoreError::TooLarge { .. }) => {
                known.answered += 1;
                known.failed_in_a_row = 0;
            }
            Err(_) => {
                known.failed += 1;
                known.failed_in_a_row = known.failed_in_a_row.saturating_add(1);
                let pause = SUSPECT_FIRST * 2_u32.pow((known.failed_in_a_row - 1).min(6));
                let until = Instant::now() + pause.min(SUSPECT_AT_MOST);
                known.suspect_until = known.suspect_until.max(Some(until));
            }
        });
        if let Err(error) = &done {
            tracing::debug!(member = self.name, %error, "a store of the cloud of clouds does not serve");
        }
        done
    }

    /// As [`Member::ask`], for a read whose time counts for the order.
    pub(super) async fn ask_read<T>(
        &self,
        budget: Duration,
        request: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let began = Instant::now();
        let done = self.ask(budget, request).await;
        if done.is_ok() {
            let took = began.elapsed();
            self.with(|known| {
                let smoothed = known.read.map_or(took, |(before, _)| before.mul_f64(0.8) + took.mul_f64(0.2));
                known.read = Some((smoothed, Instant::now()));
            });
        }
        done
    }

    /// A read that began `before` has not been answered yet, and somebody else was asked for it.
    pub(super) fn note_slow(&self, before: Duration) {
        self.with(|known| {
            let worse = known.read.map_or(before, |(smoothed, _)| smoothed.max(before)).saturating_mul(2);
            known.read = Some((worse.min(PACE_AT_MOST), Instant::now()));
        });
    }

    /// Something that it gave is wrong: it is named.
    pub(super) fn note_wrong(&self, wrong: Wrong, what: &dyn fmt::Display, why: &str) {
        let is_news = self.with(|known| {
            known.wrong += 1;
            known.wrong_at = Some(Instant::now());
            known.last_wrong = Some(format!("{}: {what}: {why}", wrong.text()));
            known.suspect_until = Some(Instant::now() + LIAR_FOR);
            let told = &mut known.told[wrong as usize];
            let is_news = told.is_none_or(|at| at.elapsed() >= TELL_EVERY);
            if is_news {
                *told = Some(Instant::now());
            }
            is_news
        });
        if is_news {
            tracing::warn!(member = self.name, object = %what, why, "a store of the cloud of clouds {}", wrong.text());
        }
    }

    pub(super) fn note_mended(&self, pieces: u64) {
        self.with(|known| known.mended += pieces);
    }

    /// Room for so many bytes that wait for it, if there is some now.
    pub(super) fn try_room(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.backlog).try_acquire_many_owned(kib(bytes)).ok()
    }

    /// Room for so many bytes, when there is some.
    pub(super) async fn room(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.backlog).acquire_many_owned(kib(bytes)).await.ok()
    }

    pub(super) fn note_left_out(&self) {
        self.with(|known| known.left_out += 1);
    }

    /// Whether so many more names that only it lists are to be looked at.
    pub(super) fn may_stray(&self, names: u64) -> bool {
        self.with(|known| {
            if known.strays_since.is_none_or(|since| since.elapsed() >= STRAYS_FOR) {
                known.strays_since = Some(Instant::now());
                known.strays = 0;
            }
            known.strays = known.strays.saturating_add(names);
            known.strays <= STRAYS_AT_MOST
        })
    }

    /// What reads take lately; what was learnt long ago counts for less, so that who was slow is tried again.
    pub(super) fn pace(&self) -> Option<Duration> {
        self.with(|known| known.read.map(|(smoothed, at)| smoothed.div_f64(1.0 + at.elapsed().as_secs_f64() / 60.0)))
    }

    pub(super) fn is_suspect(&self) -> bool {
        self.with(|known| known.suspect_until.is_some_and(|until| Instant::now() < until))
    }

    pub(super) fn health(&self) -> MemberHealth {
        let is_suspect = self.is_suspect();
        self.with(|known| MemberHealth {
            name: self.name.clone(),
            is_suspect,
            answered: known.answered,
            failed: known.failed,
            left_out: known.left_out,
            wrong: known.wrong,
            is_wrong_lately: known.wrong_at.is_some_and(|at| at.elapsed() < WRONG_LATELY),
            last_wrong: known.last_wrong.clone(),
            mended: known.mended,
            read_ms: known.read.map(|(smoothed, _)| smoothed.as_secs_f64() * 1000.0),
        })
    }
}

/// At most all that there is: one piece always fits.
fn kib(bytes: usize) -> u32 {
    u32::try_from(bytes / 1024 + 1).unwrap_or(BACKLOG_KIB).min(BACKLOG_KIB)
}

/// The members, in the order in which they are asked.
pub(super) fn order(members: &[Arc<Member>], order: ReadOrder) -> Vec<usize> {
    let mut all: Vec<usize> = (0..members.len()).collect();
    all.sort_by_key(|index| {
        let member = &members[*index];
        let pace = match order {
            ReadOrder::Fastest => member.pace().unwrap_or_default(),
            ReadOrder::Listed => Duration::ZERO,
        };
        (member.is_suspect(), pace, *index)
    });
    all
}
