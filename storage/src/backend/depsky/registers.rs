//! Registers: small objects that change, written by several.
//!
//! A register is a row of numbered versions. Each version is an object of its own at each member, put there only when no other has its
//! number ([`ObjectStore::put_if_absent`]): nothing is overwritten, so that a request that arrives late harms nothing.
//!
//! Where versions lie and how they look: [`super::record`].
//!
//! *Read* (two round trips): list each member's newest version, get it; of n - f valid answers the newest counts. A completed write
//! left its version at f + 1 correct members, of which one is among any n - f. *Write* (two round trips, three when members differ):
//! find the newest number, put the next one everywhere; done when n - f have it. Contents are whole at every member (DepSky-A), as
//! they are small; sealed with a key that all who have the store's key derive.
//!
//! The paper numbers versions by a single writer's count. A number may then be used twice: a writer that died has left its version
//! at a few members, the next one does not see these. Here two versions of one number cannot both have n - f members; a reader that
//! is shown both asks all members and takes the one that more show, the later one when as many do. **Not borne** is that a writer died, a
//! member shows the dead one's version although it took the other, *and* another one is late: then a reader may see the version that was not
//! completed, until the next write. A guest's epoch, which fences writers of volumes, does not exist here: sweeps and hosts' lists belong
//! to no guest.
//!
//! *If absent* ([`Inner::put_register_if_absent`]): the first member that answers decides between those who come at once, the others
//! follow; who finds another's version there carries it to the others before saying so. When members are split, so that nobody has
//! n - f, everybody carries on, under the next number and after a random pause, with the version of somebody else that may
//! have been told of n - f (f + 1 members show it), else with his own (the paper's low-contention lock, without clocks). A version
//! keeps its token when it is carried: its owner knows it again. **Not borne** is this: several come at the same moment, *and* a member
//! tells more than one of them that they were first. Then two may be told that they have it, and readers see the version that is newest.
//! Sweeps, who alone need this, are sent one at a time by the controller.
//!
//! *Delete* puts a version that says so. It stays: without it, a member that rolls back would bring the register to life.
//! A member's older versions go when it has a newer one, never before: what a correct member shows only ever grows.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures::FutureExt as _;
use rand::Rng as _;
use tokio::{sync::mpsc, task::JoinSet, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    GRACE, Inner, MEND_GRACE, READ_BUDGET, WRITE_BUDGET, Wrong,
    keys::Keys,
    member::Member,
    record::{CONTENT_BYTES, RECORD_BYTES, Record, folder, new_token, number_of, version_key},
};
use crate::backend::{ObjectEntry, ObjectKey, PutOutcome, StoreError};

/// Versions of a member that are listed: the newest come first.
const VERSIONS_LISTED: usize = 16;
/// How often a member is asked anew for a version that was gone when it was read.
const LOOKS: usize = 3;
/// How long a write tries against others.
const CONTENTION_BUDGET: Duration = Duration::from_secs(60);
/// The first pause after others were in the way, in milliseconds; doubled up to the second.
const PAUSE_MS: u64 = 20;
const PAUSE_MOST_MS: u64 = 1000;
/// Registers of which it is remembered what each member has shown.
const SEEN_AT_MOST: usize = 4096;

/// What each member has shown or been given, by register: it must not show less later.
pub(super) struct Seen(Vec<Mutex<HashMap<ObjectKey, u64>>>);

impl Seen {
    pub(super) fn new(members: usize) -> Self {
        Self((0..members).map(|_| Mutex::default()).collect())
    }

    fn note(&self, index: usize, key: &ObjectKey, number: u64) {
        let mut seen = self.0[index].lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= SEEN_AT_MOST && !seen.contains_key(key) {
            seen.clear();
        }
        let newest = seen.entry(key.clone()).or_default();
        *newest = number.max(*newest);
    }

    fn newest(&self, index: usize, key: &ObjectKey) -> u64 {
        self.0[index].lock().unwrap_or_else(PoisonError::into_inner).get(key).copied().unwrap_or_default()
    }
}

/// What a quorum says of a register.
#[derive(Default)]
struct Reading {
    /// The newest version.
    best: Option<Record>,
    /// What each valid answer was.
    valid: Vec<(usize, Option<(Record, SystemTime)>)>,
    /// Whose answer was wrong.
    wrong: Vec<usize>,
}

impl Reading {
    /// The newest version, and whether there are others of its number.
    fn newest(&self) -> (Option<Record>, bool) {
        let shown = || self.valid.iter().filter_map(|(_, has)| has.as_ref()).map(|(record, _)| record);
        let Some(number) = shown().map(|record| record.number).max() else { return (None, false) };
        let of_it = || shown().filter(|record| record.number == number);
        let times = |record: &Record| of_it().filter(|other| *other == record).count();
        let best = of_it().max_by_key(|record| (times(record), record.token)).cloned();
        let is_contested = of_it().any(|record| Some(record) != best.as_ref());
        (best, is_contested)
    }

    fn number(&self) -> u64 {
        self.best.as_ref().map_or(0, |record| record.number)
    }

    fn content(&self, keys: &Keys, key: &ObjectKey) -> Option<Bytes> {
        self.best.as_ref()?.content(keys, key)
    }

    fn stamps(&self) -> Vec<SystemTime> {
        let of_best =
            self.valid.iter().filter_map(|(_, has)| has.as_ref()).filter(|(r, _)| Some(r) == self.best.as_ref());
        of_best.map(|(_, modified)| *modified).collect()
    }
}

/// What one member has.
enum State {
    Has(Record, SystemTime),
    Nothing,
    Wrong,
}

/// The newest version that a member lists.
async fn head(member: &Member, key: &ObjectKey) -> Result<Option<(u64, SystemTime)>, StoreError> {
    let folder = folder(key);
    let listed = member.ask_read(READ_BUDGET, member.store.list(&folder, None, VERSIONS_LISTED)).await?;
    let versions = listed.iter().filter_map(|entry| Some((number_of(key, &entry.key)?, entry.modified)));
    Ok(versions.max_by_key(|(number, _)| *number))
}

async fn state(member: &Member, keys: &Keys, key: &ObjectKey) -> Result<State, StoreError> {
    let mut listed = 0;
    for _ in 0..LOOKS {
        let Some((number, modified)) = head(member, key).await? else { return Ok(State::Nothing) };
        listed = number;
        let wrong = |why| {
            member.note_wrong(Wrong::Forged, key, why);
            Ok(State::Wrong)
        };
        match member.ask(READ_BUDGET, member.store.get(version_key(key, number)?, RECORD_BYTES)).await {
            Ok(bytes) => match Record::check(keys, key, number, bytes) {
                Ok(record) => return Ok(State::Has(record, modified)),
                Err(why) => return wrong(why),
            },
            Err(StoreError::TooLarge { .. }) => return wrong("it is too large for a register"),
            // A newer one came meanwhile.
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    member.note_wrong(Wrong::Listing, key, &format!("version {listed} is listed and cannot be had"));
    Ok(State::Wrong)
}

/// What became of a claim at one member.
enum Taken {
    Ours,
    Theirs(Record),
    /// A newer one came meanwhile.
    Gone,
    Wrong,
}

/// What became of a claim.
enum Claimed {
    /// n - f members have it.
    Ours,
    /// n - f members have another.
    Theirs(Record),
    /// Nobody will have n - f, or somebody else may have been told so: the other version that most members show.
    Split {
        /// That version.
        other: Option<Record>,
        /// Whether it may have n - f, by what its owner was told.
        may_be_theirs: bool,
        /// Whether a member has got beyond this number.
        is_passed: bool,
    },
}

async fn claim_at(
    member: Arc<Member>,
    keys: Arc<Keys>,
    key: ObjectKey,
    record: Record,
    tidy: (TaskTracker, CancellationToken),
    is_exclusive: bool,
) -> Result<Taken, StoreError> {
    let at = version_key(&key, record.number)?;
    if member.store.put_if_absent(at.clone(), record.bytes.clone()).await? == PutOutcome::AlreadyThere {
        match member.store.get(at, RECORD_BYTES).await {
            // An attempt of ours whose answer was lost, or the same version, carried by another.
            Ok(bytes) if bytes == record.bytes => {}
            Ok(bytes) => match Record::check(&keys, &key, record.number, bytes) {
                Ok(theirs) => return Ok(Taken::Theirs(theirs)),
                Err(why) => {
                    member.note_wrong(Wrong::Forged, &key, why);
                    return Ok(Taken::Wrong);
                }
            },
            Err(StoreError::NotFound { .. }) => return Ok(Taken::Gone),
            Err(StoreError::TooLarge { .. }) => {
                member.note_wrong(Wrong::Forged, &key, "it is too large for a register");
                return Ok(Taken::Wrong);
            }
            Err(error) => return Err(error),
        }
    }
    // Where a newer one is, older ones are removed: that this number was free says nothing.
    if is_exclusive {
        match state(&member, &keys, &key).await? {
            State::Has(newest, _) if newest.number > record.number => return Ok(Taken::Gone),
            State::Has(..) | State::Nothing => {}
            State::Wrong => return Ok(Taken::Wrong),
        }
    }
    let (tasks, stop) = tidy;
    tasks.spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = remove_older(&member, &key, record.number) => {}
        }
    });
    Ok(Taken::Ours)
}

/// Removes what a member has of a register before the version that it has now. What fails is for the next write.
async fn remove_older(member: &Member, key: &ObjectKey, number: u64) {
    let folder = folder(key);
    let Ok(listed) = member.ask(WRITE_BUDGET, member.store.list(&folder, None, VERSIONS_LISTED)).await else { return };
    for entry in listed {
        if number_of(key, &entry.key).is_some_and(|older| older < number)
            && member.ask(WRITE_BUDGET, member.store.delete(entry.key)).await.is_err()
        {
            return;
        }
    }
}

/// Between two attempts of somebody who met others.
struct Patience {
    until: Instant,
    pause_ms: u64,
}

impl Patience {
    fn new() -> Self {
        Self { until: Instant::now() + CONTENTION_BUDGET, pause_ms: PAUSE_MS }
    }

    async fn pause(&mut self, key: &ObjectKey) -> Result<(), StoreError> {
        if Instant::now() >= self.until {
            let why = format!("others kept writing {key} for {} s", CONTENTION_BUDGET.as_secs());
            return Err(StoreError::Unreachable { store: "the cloud of clouds".into(), why });
        }
        let pause = rand::rng().random_range(self.pause_ms / 2..=self.pause_ms);
        self.pause_ms = (self.pause_ms * 2).min(PAUSE_MOST_MS);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        Ok(())
    }
}

/// What is said to who wanted to put a version with this token, when that one was decided upon.
fn told(decided: &Record, ours: &[u8; 16]) -> PutOutcome {
    if decided.token == *ours { PutOutcome::Stored } else { PutOutcome::AlreadyThere }
}

impl Inner {
    fn check_register(&self, key: &ObjectKey, content: usize) -> Result<(), StoreError> {
        if content > CONTENT_BYTES {
            return Err(StoreError::TooLarge { key: key.clone(), len: content as u64, cap: CONTENT_BYTES });
        }
        let bad = |why| StoreError::Key { text: key.as_str().chars().take(80).collect(), why };
        let mut segments = key.as_str().split('/').skip(1);
        let first = segments.next().unwrap_or_default();
        if segments.next().is_some() && first.len() == 2 && first.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(bad("in a cloud of clouds, folders of two hexadecimal digits are for chunks"));
        }
        version_key(key, 0).map(drop).map_err(|_| bad("it is too long for a cloud of clouds"))
    }

    /// Asks all. With `grace`, those who are not among the first n - f have so long to answer, too.
    async fn read_register(&self, key: &ObjectKey, grace: Option<Duration>) -> Result<Reading, StoreError> {
        let (said, mut answers) = mpsc::unbounded_channel();
        for (index, member) in self.members.iter().enumerate() {
            let (member, keys, key) = (Arc::clone(member), Arc::clone(&self.keys), key.clone());
            let (said, stop) = (said.clone(), self.stop.clone());
            // What it had shown before it was asked.
            let newest = self.seen.newest(index, &key);
            // To its end, also when nobody waits any more: who lies is found out only then.
            self.tasks.spawn(async move {
                let state = tokio::select! {
                    () = stop.cancelled() => return,
                    state = state(&member, &keys, &key) => state,
                };
                let _ = said.send((index, newest, state));
            });
        }
        drop(said);
        let (mut reading, mut failures, mut until) = (Reading::default(), Vec::new(), None);
        loop {
            if reading.valid.len() >= self.quorum.answers() {
                let grace = grace.or_else(|| reading.newest().1.then_some(GRACE));
                let Some(grace) = grace else { break };
                until.get_or_insert(Instant::now() + grace);
            }
            let answer = match until {
                Some(until) => tokio::time::timeout_at(until, answers.recv()).await.ok().flatten(),
                None => answers.recv().await,
            };
            let Some((index, newest, said)) = answer else { break };
            let has = match said {
                Ok(State::Has(record, modified)) => Some((record, modified)),
                Ok(State::Nothing) => None,
                Ok(State::Wrong) => {
                    reading.wrong.push(index);
                    continue;
                }
                Err(error) => {
                    failures.push((index, error));
                    continue;
                }
            };
            let number = has.as_ref().map_or(0, |(record, _)| record.number);
            if number < newest {
                let why = format!("version {number}, and it had version {newest}");
                self.members[index].note_wrong(Wrong::RolledBack, key, &why);
                reading.wrong.push(index);
                continue;
            }
            if let Some((record, _)) = &has {
                self.seen.note(index, key, record.number);
            }
            reading.valid.push((index, has));
        }
        if reading.valid.len() < self.quorum.answers() {
            return Err(self.too_few("cannot read a register", reading.valid.len(), &failures));
        }
        reading.best = reading.newest().0;
        Ok(reading)
    }

    async fn quorum_of(&self, key: &ObjectKey) -> Result<Reading, StoreError> {
        self.read_register(key, None).await
    }

    /// The newest number: by the members' listings when they agree, else by what can be read.
    async fn newest_number(&self, key: &ObjectKey) -> Result<u64, StoreError> {
        let mut asking = JoinSet::new();
        for (index, member) in self.members.iter().enumerate() {
            let (member, key) = (Arc::clone(member), key.clone());
            asking.spawn(async move { (index, head(&member, &key).await) });
        }
        let (mut numbers, mut failures) = (Vec::new(), Vec::new());
        while numbers.len() < self.quorum.answers() {
            match asking.join_next().await {
                Some(Ok((_, Ok(head)))) => numbers.push(head.map_or(0, |(number, _)| number)),
                Some(Ok((index, Err(error)))) => failures.push((index, error)),
                Some(Err(_)) => {}
                None => return Err(self.too_few("cannot list a register", numbers.len(), &failures)),
            }
        }
        // n - f that say the same: f + 1 correct ones among them.
        match numbers.iter().min() == numbers.iter().max() {
            true => Ok(numbers.first().copied().unwrap_or_default()),
            false => Ok(self.quorum_of(key).await?.number()),
        }
    }

    /// Puts a version at members that are not known to have it; `have` are: then exclusively, so that a number that members have got
    /// beyond is not taken again.
    async fn claim(
        &self,
        key: &ObjectKey,
        record: &Record,
        which: &[usize],
        have: usize,
    ) -> Result<Claimed, StoreError> {
        let needed = self.quorum.answers();
        let claim = |_, member: Arc<Member>| {
            let tidy = (self.tasks.clone(), self.stop.clone());
            claim_at(member, Arc::clone(&self.keys), key.clone(), record.clone(), tidy, have > 0).boxed()
        };
        let enough = needed.saturating_sub(have).min(which.len());
        let mut answers = self.write_at(which, enough, record.bytes.len(), claim).await;
        let (mut ours, mut waiting) = (have, which.len());
        let mut theirs: Vec<(Record, usize)> = Vec::new();
        let (mut is_contested, mut is_passed, mut wrong) = (false, false, 0);
        let mut failures = Vec::new();
        loop {
            if ours >= needed {
                return Ok(Claimed::Ours);
            }
            if let Some((record, _)) = theirs.iter().find(|(_, count)| *count >= needed) {
                return Ok(Claimed::Theirs(record.clone()));
            }
            let most = theirs.iter().map(|(_, count)| *count).max().unwrap_or_default();
            if is_contested && ours.max(most) + waiting < needed {
                // Who does not answer, has not yet, or shows nothing that counts, may have it, too.
                let other = theirs.into_iter().max_by_key(|(record, count)| (*count, record.token));
                let may_be_theirs = most + failures.len() + wrong + waiting > self.quorum.f;
                return Ok(Claimed::Split { other: other.map(|(record, _)| record), may_be_theirs, is_passed });
            }
            let Some((index, said)) = answers.recv().await else {
                return Err(self.too_few("cannot write a register", ours, &failures));
            };
            waiting = waiting.saturating_sub(1);
            match said {
                Ok(Taken::Ours) => {
                    self.seen.note(index, key, record.number);
                    ours += 1;
                }
                Ok(Taken::Theirs(other)) => {
                    is_contested = true;
                    match theirs.iter_mut().find(|(record, _)| *record == other) {
                        Some((_, count)) => *count += 1,
                        None => theirs.push((other, 1)),
                    }
                }
                Ok(Taken::Gone) => (is_contested, is_passed) = (true, true),
                Ok(Taken::Wrong) => wrong += 1,
                Err(error) => failures.push((index, error)),
            }
        }
    }

    fn next_of(&self, key: &ObjectKey, number: u64) -> Result<u64, StoreError> {
        let next = number.checked_add(1).filter(|number| *number < u64::MAX);
        next.ok_or_else(|| StoreError::Damaged { key: key.clone(), why: "it has no further versions".into() })
    }

    fn next(&self, key: &ObjectKey, number: u64, content: Option<&[u8]>) -> Result<Record, StoreError> {
        Ok(Record::new(&self.keys, key, self.next_of(key, number)?, content))
    }

    pub(super) async fn put_register(&self, key: &ObjectKey, content: Bytes) -> Result<(), StoreError> {
        self.check_register(key, content.len())?;
        let mut patience = Patience::new();
        loop {
            let record = self.next(key, self.newest_number(key).await?, Some(&content))?;
            if let Claimed::Ours = self.claim(key, &record, &self.all(), 0).await? {
                return Ok(());
            }
            patience.pause(key).await?;
        }
    }

    pub(super) async fn put_register_if_absent(
        &self,
        key: &ObjectKey,
        content: Bytes,
    ) -> Result<PutOutcome, StoreError> {
        self.check_register(key, content.len())?;
        let mut patience = Patience::new();
        let ours = new_token();
        // What is carried on with after a split.
        let mut carried: Option<Record> = None;
        loop {
            let candidate = match carried.take() {
                Some(carried) => carried,
                None => {
                    let reading = self.quorum_of(key).await?;
                    match &reading.best {
                        Some(best) if !best.is_deleted && reading.stamps().len() >= self.quorum.answers() => {
                            return Ok(told(best, &ours));
                        }
                        // Its owner may have died: it is brought to the others first.
                        Some(best) if !best.is_deleted => best.clone(),
                        _ => {
                            let number = self.next_of(key, reading.number())?;
                            Record::with_token(&self.keys, key, number, ours, Some(&content))
                        }
                    }
                }
            };
            let Some((lead, candidate)) = self.lead(key, &candidate).await? else {
                patience.pause(key).await?;
                continue;
            };
            let others: Vec<usize> = self.all().into_iter().filter(|index| *index != lead).collect();
            let decided = match self.claim(key, &candidate, &others, 1).await? {
                Claimed::Ours => candidate,
                Claimed::Theirs(theirs) => theirs,
                // Looked at anew.
                Claimed::Split { is_passed: true, .. } => {
                    patience.pause(key).await?;
                    continue;
                }
                Claimed::Split { other, may_be_theirs, is_passed: false } => {
                    let on = other.filter(|_| may_be_theirs).unwrap_or(candidate);
                    let content = on.content(&self.keys, key);
                    let number = self.next_of(key, on.number)?;
                    carried = Some(Record::with_token(&self.keys, key, number, on.token, content.as_deref()));
                    patience.pause(key).await?;
                    continue;
                }
            };
            if !decided.is_deleted && decided.token != ours {
                return Ok(PutOutcome::AlreadyThere);
            }
            // Others may have got beyond this number meanwhile, and tidied it up before we came: then it is not the newest.
            let reading = self.quorum_of(key).await?;
            if let Some(best) = reading.best.filter(|best| !best.is_deleted) {
                return Ok(told(&best, &ours));
            }
            patience.pause(key).await?;
        }
    }

    /// Which version the first member that answers keeps under a number, and which member that is; none when it has got
    /// beyond it.
    async fn lead(&self, key: &ObjectKey, ours: &Record) -> Result<Option<(usize, Record)>, StoreError> {
        let mut failures = Vec::new();
        for (index, member) in self.members.iter().enumerate() {
            let tidy = (self.tasks.clone(), self.stop.clone());
            let claim = claim_at(Arc::clone(member), Arc::clone(&self.keys), key.clone(), ours.clone(), tidy, true);
            match member.ask(READ_BUDGET, claim).await {
                Ok(Taken::Ours) => {
                    self.seen.note(index, key, ours.number);
                    return Ok(Some((index, ours.clone())));
                }
                Ok(Taken::Theirs(theirs)) => return Ok(Some((index, theirs))),
                Ok(Taken::Gone) => return Ok(None),
                Ok(Taken::Wrong) => {}
                Err(error) => failures.push((index, error)),
            }
        }
        Err(self.too_few("cannot write a register", 0, &failures))
    }

    pub(super) async fn get_register(&self, key: &ObjectKey) -> Result<Bytes, StoreError> {
        let reading = self.quorum_of(key).await?;
        reading.content(&self.keys, key).ok_or_else(|| StoreError::NotFound { key: key.clone() })
    }

    pub(super) async fn stat_register(&self, key: &ObjectKey) -> Result<Option<ObjectEntry>, StoreError> {
        let reading = self.read_register(key, Some(GRACE)).await?;
        let Some(record) = reading.best.as_ref().filter(|record| !record.is_deleted) else { return Ok(None) };
        let modified = self.stamp(reading.stamps(), reading.valid.len());
        Ok(modified.map(|modified| ObjectEntry { key: key.clone(), len: record.content_bytes(), modified }))
    }

    /// False when there is none.
    pub(super) async fn refresh_register(&self, key: &ObjectKey) -> Result<bool, StoreError> {
        self.change_register(key, |reading| reading.content(&self.keys, key).map(Some)).await
    }

    /// False when there was none.
    pub(super) async fn delete_register(&self, key: &ObjectKey) -> Result<bool, StoreError> {
        self.change_register(key, |reading| reading.best.as_ref().filter(|best| !best.is_deleted).map(|_| None)).await
    }

    /// Puts what `change` makes of the newest version as the one after exactly that; false when it makes nothing of it.
    async fn change_register(
        &self,
        key: &ObjectKey,
        change: impl Fn(&Reading) -> Option<Option<Bytes>>,
    ) -> Result<bool, StoreError> {
        let mut patience = Patience::new();
        loop {
            let reading = self.quorum_of(key).await?;
            let Some(content) = change(&reading) else { return Ok(false) };
            let record = self.next(key, reading.number(), content.as_deref())?;
            if let Claimed::Ours = self.claim(key, &record, &self.all(), 0).await? {
                return Ok(true);
            }
            patience.pause(key).await?;
        }
    }

    /// Brings the newest version to all members that answer; gives the content, how many had to be given it, and how many do not
    /// answer.
    pub(super) async fn mend_register(&self, key: &ObjectKey) -> Result<(Bytes, u64, u64), StoreError> {
        let reading = self.read_register(key, Some(MEND_GRACE)).await?;
        let content = reading.content(&self.keys, key).ok_or_else(|| StoreError::NotFound { key: key.clone() })?;
        let Some(best) = reading.best else { return Err(StoreError::NotFound { key: key.clone() }) };
        let at = version_key(key, best.number)?;
        let lacking = reading.valid.iter().filter(|(_, has)| has.as_ref().is_none_or(|(has, _)| *has != best));
        // Another version of the same number was never completed.
        let is_other =
            |has: &Option<(Record, SystemTime)>| has.as_ref().is_some_and(|(has, _)| has.number == best.number);
        let lacking = lacking.map(|(index, has)| (*index, is_other(has)));
        let lacking = lacking.chain(reading.wrong.iter().map(|index| (*index, true)));
        let (mut mended, mut failed) = (0, (self.quorum.n - reading.valid.len() - reading.wrong.len()) as u64);
        for (index, is_wrong) in lacking {
            let member = &self.members[index];
            let put = async {
                match is_wrong {
                    // What is there is nothing that counts.
                    true => member.store.put(at.clone(), best.bytes.clone()).await,
                    false => member.store.put_if_absent(at.clone(), best.bytes.clone()).await.map(drop),
                }
            };
            match member.ask(WRITE_BUDGET, put).await {
                Ok(()) => {
                    member.note_mended(1);
                    mended += 1;
                }
                Err(_) => failed += 1,
            }
        }
        Ok((content, mended, failed))
    }
}
