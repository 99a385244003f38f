//! A store over n = 3f + 1 others, of different providers: all of it can be read and written while any f of them are down, slow,
//! delete, roll back or give wrong bytes, and no f of them together can read any of it.
//!
//! The protocol is DepSky's (Bessani et al., *DepSky: Dependable and Secure Storage in a Cloud-of-Clouds*, EuroSys 2011; here from the
//! algorithms as printed in the TClouds deliverables, section 6.3, with loops over all n clouds). What is kept differs by what an object is:
//!
//! **Chunks** never change: their name is the hash of their content. DepSky-CA writes a value under a new version's name, and then
//! signed metadata that names the version and the pieces' digests, in two round trips; a reader needs the metadata first to know which
//! version is the newest. A content-addressed object has one version for ever, so nothing has to be found out: each piece
//! carries its own signature over name, encoding and bytes ([`piece`]), and lies at its member under the chunk's own name.
//! *Write*: all pieces at once, done when n - f members have theirs: one round trip. *Read*: the f + 1 members that answer fastest
//! (or are listed first), others when one fails, lies or is slow: one round trip. Why this is safe: of the n - f that a completed
//! write reached at most f are faulty, so at least f + 1 correct members give a piece, and f + 1 pieces of one encoding make the
//! object; a wrong piece does not pass. Writers need no lock and no order: cutting is deterministic, two writers of one sealed content
//! write the same bytes. Other versions of this program may seal it to other bytes: who finds pieces there looks at them, and brings
//! n - f members to one encoding before it says that the chunk is there. A writer that dies leaves fewer pieces than make an object, or enough of
//! them; both are right for somebody who was told nothing.
//!
//! **Registers** are all other objects (a sweep's intent, mark and clock, hosts' lists): small, changed in place, and written by
//! several. They need the protocol: versions, found by a quorum, newer ones over older ones. See [`registers`].
//!
//! What is not the paper's: stamps. A sweep deletes what is old by the store's clock; here there are n clocks, of which f may lie.
//! See [`Inner::stamp`].

mod chunks;
mod config;
mod keys;
mod listing;
mod member;
mod mend;
mod piece;
mod record;
mod registers;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::{
    config::{CloudOfCloudsConfig, MemberConfig, ValueError},
    keys::StoreKey,
    member::{MemberHealth, ReadOrder, Wrong},
    mend::Mending,
};
use self::{keys::Keys, member::Member, registers::Seen};
use super::{
    BucketError, BucketStore, DirStore, ObjectEntry, ObjectKey, ObjectStore, PutOutcome, StoreError, StoreFuture,
};
use crate::key::KeyError;

/// How long one member may take to answer a look or a read.
const READ_BUDGET: Duration = Duration::from_secs(45);
/// How long one member may take to take something; what is written after the quorum has it is given up then.
const WRITE_BUDGET: Duration = Duration::from_secs(120);
/// After a quorum has answered, others may add to the answer for so long.
const GRACE: Duration = Duration::from_millis(500);
/// As [`GRACE`], for what is looked at for mending.
const MEND_GRACE: Duration = Duration::from_secs(5);
/// See [`ObjectStore::stamp_slack`]: half an hour for what is not refreshed while it is young, a quarter of an hour each for the
/// clocks of hosts and of members.
const SLACK: Duration = Duration::from_secs(3600);

/// How many there are, and how many of them may fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Quorum {
    n: usize,
    f: usize,
}

impl Quorum {
    /// Of n = 3f + 1 with f of at least 1.
    pub(super) fn of(n: usize) -> Option<Self> {
        (n >= 4 && n % 3 == 1 && n < 256).then(|| Self { n, f: (n - 1) / 3 })
    }

    /// Answers that count: n - f. Two such sets share f + 1 members, so a correct one.
    fn answers(self) -> usize {
        self.n - self.f
    }

    /// Pieces that make an object: f + 1.
    fn pieces(self) -> usize {
        self.f + 1
    }
}

/// Why the store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum CloudOfCloudsError {
    /// A value of the configuration.
    #[error(transparent)]
    Value(#[from] ValueError),
    /// The file with the secret.
    #[error("cloud_of_clouds: key_file cannot be used (64 hexadecimal digits, mode 0600)")]
    Key(#[from] KeyError),
    /// A member that is a folder.
    #[error("cloud_of_clouds: the folder of member '{member}' cannot be used")]
    Folder {
        /// Which.
        member: String,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// A member that is a bucket.
    #[error("cloud_of_clouds: the bucket of member '{member}' cannot be used")]
    Bucket {
        /// Which.
        member: String,
        /// Why.
        #[source]
        source: BucketError,
    },
}

/// A store over several others. Cheap to clone.
#[derive(Debug, Clone)]
pub struct CloudOfClouds {
    inner: Arc<Inner>,
}

struct Inner {
    members: Vec<Arc<Member>>,
    quorum: Quorum,
    keys: Arc<Keys>,
    order: ReadOrder,
    slack: Duration,
    delete_tail: Duration,
    seen: Seen,
    /// Writes that go on after a quorum has answered.
    tasks: TaskTracker,
    /// Deletions, to their end.
    late: TaskTracker,
    stop: CancellationToken,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.members).finish()
    }
}

/// What members said, one by one.
type Answers<T> = mpsc::UnboundedReceiver<(usize, Result<T, StoreError>)>;

impl CloudOfClouds {
    /// As configured. No request is made to buckets yet. Blocking: reads keys and credentials, makes folders.
    ///
    /// # Errors
    /// What of the configuration cannot be used.
    pub fn open(config: &CloudOfCloudsConfig) -> Result<Self, CloudOfCloudsError> {
        config.validate()?;
        let key = StoreKey::from_file(&config.key_file)?;
        let open = |member: &MemberConfig| {
            let name = member.name.clone();
            let store: Arc<dyn ObjectStore> = match (&member.bucket, &member.folder) {
                (Some(bucket), _) => Arc::new(
                    BucketStore::open(bucket)
                        .map_err(|source| CloudOfCloudsError::Bucket { member: name.clone(), source })?,
                ),
                (None, Some(folder)) => Arc::new(
                    DirStore::open(folder)
                        .map_err(|source| CloudOfCloudsError::Folder { member: name.clone(), source })?,
                ),
                (None, None) => {
                    let why = "needs either bucket = { ... } or folder = \"/...\"".into();
                    return Err(ValueError { at: format!("member '{name}'"), why }.into());
                }
            };
            Ok((name, store))
        };
        let members = config.members.iter().map(open).collect::<Result<Vec<_>, CloudOfCloudsError>>()?;
        Self::over(members, &key, config.read_order)
    }

    /// Over stores that are open already, each with its name; see [`CloudOfCloudsConfig::members`] for how many.
    ///
    /// # Errors
    /// When their number is not 3f + 1.
    pub fn over(
        members: Vec<(String, Arc<dyn ObjectStore>)>,
        key: &StoreKey,
        order: ReadOrder,
    ) -> Result<Self, CloudOfCloudsError> {
        let Some(quorum) = Quorum::of(members.len()) else {
            let why = format!("has {} entries, not 3f + 1", members.len());
            return Err(ValueError { at: "member".into(), why }.into());
        };
        let members: Vec<Arc<Member>> =
            members.into_iter().map(|(name, store)| Arc::new(Member::new(name, store))).collect();
        let slack = members.iter().map(|member| member.store.stamp_slack()).max().unwrap_or_default().max(SLACK);
        let tail = members.iter().map(|member| member.store.delete_tail()).max().unwrap_or_default();
        let inner = Inner {
            quorum,
            // Begun for a sweep that died, a deletion waits for its turn and its answer for so long.
            delete_tail: tail + WRITE_BUDGET,
            keys: Arc::new(Keys::derive(key)),
            order,
            slack,
            seen: Seen::new(quorum.n),
            members,
            tasks: TaskTracker::new(),
            late: TaskTracker::new(),
            stop: CancellationToken::new(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// With other times than the usual ones.
    #[cfg(test)]
    fn with_times(mut self, slack: Duration, delete_tail: Duration) -> Self {
        let inner = Arc::get_mut(&mut self.inner).expect("nobody uses it yet");
        (inner.slack, inner.delete_tail) = (slack, delete_tail);
        self
    }

    /// How each member has behaved since the store was opened, in their order.
    #[must_use]
    pub fn members(&self) -> Vec<MemberHealth> {
        self.inner.members.iter().map(|member| member.health()).collect()
    }

    /// Waits until no write is under way any more that went on after its quorum had answered: as long as a member may take.
    pub async fn settle(&self) {
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
        self.inner.tasks.reopen();
    }
}

/// When a member's request may still be under way although nobody waits for it: kept alive by the store, not by the caller.
impl Inner {
    /// Makes a request of every member in `which` that has room for `bytes`, of at least `enough` of them. The answers come
    /// one by one; requests go on when nobody listens any more, until their budget is spent or the store is closed.
    async fn write_at<T: Send + 'static>(
        &self,
        which: &[usize],
        enough: usize,
        bytes: usize,
        mut request: impl FnMut(usize, Arc<Member>) -> BoxFuture<'static, Result<T, StoreError>>,
    ) -> Answers<T> {
        use futures::StreamExt as _;
        let (said, answers) = mpsc::unbounded_channel();
        let mut begin = |index: usize, room| {
            let member = Arc::clone(&self.members[index]);
            let (said, stop) = (said.clone(), self.stop.clone());
            let made = request(index, Arc::clone(&member));
            self.tasks.spawn(async move {
                let done = tokio::select! {
                    () = stop.cancelled() => return,
                    done = member.ask(WRITE_BUDGET, made) => done,
                };
                drop(room);
                // Nobody may be listening any more.
                let _ = said.send((index, done));
            });
        };
        let mut full = Vec::new();
        let mut begun = 0;
        for index in which.iter().copied() {
            match self.members[index].try_room(bytes) {
                Some(room) => {
                    begin(index, room);
                    begun += 1;
                }
                None => full.push(index),
            }
        }
        let mut waiting: futures::stream::FuturesUnordered<_> =
            full.iter().map(|index| async move { (*index, self.members[*index].room(bytes).await) }).collect();
        let mut late: Vec<usize> = full.clone();
        while begun < enough {
            let Some((index, Some(room))) = waiting.next().await else { break };
            begin(index, room);
            late.retain(|late| *late != index);
            begun += 1;
        }
        late.iter().for_each(|index| self.members[*index].note_left_out());
        answers
    }

    /// All members.
    fn all(&self) -> Vec<usize> {
        (0..self.quorum.n).collect()
    }

    /// Waits for n - f that did it, `already` of which are known to have.
    async fn enough(&self, mut answers: Answers<()>, already: usize, what: &str) -> Result<(), StoreError> {
        let (mut done, mut failures) = (already, Vec::new());
        while done < self.quorum.answers() {
            match answers.recv().await {
                Some((_, Ok(()))) => done += 1,
                Some((index, Err(error))) => failures.push((index, error)),
                None => return Err(self.too_few(what, done, &failures)),
            }
        }
        Ok(())
    }

    /// More members fail than may.
    fn too_few(&self, what: &str, done: usize, failures: &[(usize, StoreError)]) -> StoreError {
        let told: Vec<String> =
            failures.iter().map(|(index, error)| format!("{}: {error}", self.members[*index].name)).collect();
        let why = format!(
            "{what}: {done} of {} stores did, {} have to; {}",
            self.quorum.n,
            self.quorum.answers(),
            if told.is_empty() { "others have not answered".to_owned() } else { told.join("; ") }
        );
        StoreError::Unreachable { store: "the cloud of clouds".into(), why }
    }

    /// An object's stamp by those of the members that answered: `present` of those that have it, `answered` in all.
    ///
    /// It is never older than the object's last completed put or refresh, whatever f members say, up to the slack: of the n - f
    /// members that took part in that, f + 1 are correct and stamped it then; of these at least f + 1 - (n - answered) are among
    /// those that answered, so the stamp of that rank, from the youngest, is of then or later. With all n answers, f that claim
    /// youth do not keep an object for ever. A stamp from the future is none: at most now, by this host's clock.
    fn stamp(&self, mut present: Vec<SystemTime>, answered: usize) -> Option<SystemTime> {
        present.sort_unstable_by(|a, b| b.cmp(a));
        let rank = (self.quorum.f + 1).saturating_sub(self.quorum.n - answered.min(self.quorum.n)).max(1);
        // Fewer have it than a completed put leaves: nobody counts on it; the oldest.
        let stamp = present.get(rank - 1).or(present.last())?;
        Some((*stamp).min(SystemTime::now()))
    }
}

impl ObjectStore for CloudOfClouds {
    fn put(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            match key.chunk_name() {
                Some(_) => self.inner.put_chunk(key, bytes).await,
                None => self.inner.put_register(&key, bytes).await,
            }
        })
    }

    fn put_if_absent(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, PutOutcome> {
        Box::pin(async move {
            match key.chunk_name() {
                Some(_) => self.inner.put_chunk_if_absent(key, bytes).await,
                None => self.inner.put_register_if_absent(&key, bytes).await,
            }
        })
    }

    fn put_batch(&self, objects: Vec<(ObjectKey, Bytes)>) -> StoreFuture<'_, usize> {
        Box::pin(async move {
            let (chunks, others): (Vec<_>, Vec<_>) =
                objects.into_iter().partition(|(key, _)| key.chunk_name().is_some());
            let mut stored = self.inner.put_chunks(chunks).await?;
            for (key, bytes) in others {
                match self.inner.put_register_if_absent(&key, bytes).await? {
                    PutOutcome::Stored => stored += 1,
                    PutOutcome::AlreadyThere => drop(self.inner.refresh_register(&key).await?),
                }
            }
            Ok(stored)
        })
    }

    fn refresh(&self, keys: Vec<ObjectKey>) -> StoreFuture<'_, Vec<ObjectKey>> {
        Box::pin(async move {
            let (chunks, others): (Vec<_>, Vec<_>) = keys.into_iter().partition(|key| key.chunk_name().is_some());
            let mut missing = self.inner.refresh_chunks(chunks).await?;
            for key in others {
                if !self.inner.refresh_register(&key).await? {
                    missing.push(key);
                }
            }
            Ok(missing)
        })
    }

    fn get(&self, key: ObjectKey, cap: usize) -> StoreFuture<'_, Bytes> {
        Box::pin(async move {
            let bytes = match key.chunk_name() {
                Some(_) => self.inner.get_chunk(&key).await?,
                None => self.inner.get_register(&key).await?,
            };
            match bytes.len() {
                len if len > cap => Err(StoreError::TooLarge { key, len: len as u64, cap }),
                _ => Ok(bytes),
            }
        })
    }

    fn exists(&self, key: ObjectKey) -> StoreFuture<'_, bool> {
        Box::pin(async move {
            match key.chunk_name() {
                Some(_) => self.inner.has_chunk(&key).await,
                None => Ok(self.inner.stat_register(&key).await?.is_some()),
            }
        })
    }

    fn stat(&self, key: ObjectKey) -> StoreFuture<'_, Option<ObjectEntry>> {
        Box::pin(async move {
            match key.chunk_name() {
                Some(_) => self.inner.stat_chunk(&key).await,
                None => self.inner.stat_register(&key).await,
            }
        })
    }

    fn delete(&self, key: ObjectKey) -> StoreFuture<'_, bool> {
        Box::pin(async move {
            match key.chunk_name() {
                Some(_) => self.inner.delete_chunk(&key).await,
                None => self.inner.delete_register(&key).await,
            }
        })
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>, limit: usize) -> StoreFuture<'a, Vec<ObjectEntry>> {
        Box::pin(self.inner.list(prefix, after, limit))
    }

    fn check(&self, key: ObjectKey, cap: usize) -> StoreFuture<'_, (Bytes, u64)> {
        Box::pin(async move {
            let (bytes, mending) = self.inner.mend(&key).await?;
            match bytes.len() {
                len if len > cap => Err(StoreError::TooLarge { key, len: len as u64, cap }),
                _ => Ok((bytes, mending.mended)),
            }
        })
    }

    fn stamp_slack(&self) -> Duration {
        self.inner.slack
    }

    fn delete_tail(&self) -> Duration {
        self.inner.delete_tail
    }
}
