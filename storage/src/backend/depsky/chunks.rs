//! Chunks: pieces that never change, in one round trip.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::FutureExt as _;
use tokio::{task::JoinSet, time::Instant};

use super::{
    GRACE, Inner, READ_BUDGET, Wrong,
    member::{Member, order},
    piece::{self, Encoding, Piece},
};
use crate::{
    backend::{ObjectEntry, ObjectKey, PutOutcome, StoreError},
    chunk::MAX_SEALED_BYTES,
};

/// Objects of one request to a member, and their bytes.
const OBJECTS_AT_ONCE: usize = 64;
const BYTES_AT_ONCE: usize = 4 << 20;
/// After how long without an answer another member is asked, when nothing is known of their pace, and the bounds when it is.
const HEDGE_UNKNOWN: Duration = Duration::from_millis(500);
const HEDGE_LEAST: Duration = Duration::from_millis(20);
const HEDGE_MOST: Duration = Duration::from_secs(2);
/// So many times the usual pace is slow.
const HEDGE_TIMES: u32 = 3;

/// What became of asking members for their pieces.
#[derive(Default)]
pub(super) struct Gathered {
    pub(super) by_encoding: HashMap<Encoding, Vec<Piece>>,
    /// Who has none.
    pub(super) absent: Vec<usize>,
    /// Who has a wrong one.
    pub(super) wrong: Vec<usize>,
    /// Who did not answer.
    pub(super) failed: Vec<(usize, StoreError)>,
}

/// What one member has.
pub(super) enum Found {
    Piece(Piece),
    Absent,
    Wrong,
    Failed(StoreError),
}

impl Gathered {
    fn add(&mut self, index: usize, found: Found) -> Option<Encoding> {
        match found {
            Found::Piece(piece) => {
                let encoding = piece.encoding();
                self.by_encoding.entry(encoding).or_default().push(piece);
                return Some(encoding);
            }
            Found::Absent => self.absent.push(index),
            Found::Wrong => self.wrong.push(index),
            Found::Failed(error) => self.failed.push((index, error)),
        }
        None
    }
}

impl Inner {
    /// Puts whole objects; pieces that are there are replaced.
    pub(super) async fn put_chunk(&self, key: ObjectKey, bytes: Bytes) -> Result<(), StoreError> {
        let pieces = self.cut(&key, bytes).await?;
        let len = pieces.first().map_or(0, Bytes::len);
        let put = |index: usize, member: Arc<Member>| {
            let (key, piece) = (key.clone(), pieces[index].clone());
            async move {
                member.check_stays([&key])?;
                member.store.put(key, piece).await
            }
            .boxed()
        };
        let answers = self.write_at(&self.all(), self.quorum.answers(), len, put).await;
        self.enough(answers, 0, "cannot put a chunk").await
    }

    /// At most one of concurrent callers is told that it stored the chunk; none, when they shared the members.
    pub(super) async fn put_chunk_if_absent(&self, key: ObjectKey, bytes: Bytes) -> Result<PutOutcome, StoreError> {
        let pieces = self.cut(&key, bytes).await?;
        let len = pieces.first().map_or(0, Bytes::len);
        let put = |index: usize, member: Arc<Member>| {
            let (key, piece) = (key.clone(), pieces[index].clone());
            async move {
                member.check_stays([&key])?;
                member.store.put_if_absent(key, piece).await
            }
            .boxed()
        };
        let mut answers = self.write_at(&self.all(), self.quorum.answers(), len, put).await;
        let (mut there, mut stored, mut failures) = (0, 0, Vec::new());
        while there < self.quorum.answers() {
            match answers.recv().await {
                Some((_, Ok(outcome))) => {
                    there += 1;
                    stored += usize::from(outcome == PutOutcome::Stored);
                }
                Some((index, Err(error))) => failures.push((index, error)),
                None => return Err(self.too_few("cannot put a chunk", there, &failures)),
            }
        }
        if stored >= self.quorum.answers() {
            return Ok(PutOutcome::Stored);
        }
        self.unite(&key, &pieces).await?;
        Ok(PutOutcome::AlreadyThere)
    }

    /// Puts chunks that may be there; those are refreshed. Gives how many were new, by the word of at least one correct member.
    pub(super) async fn put_chunks(&self, objects: Vec<(ObjectKey, Bytes)>) -> Result<usize, StoreError> {
        let mut stored = 0;
        let mut rest = objects.into_iter().peekable();
        while rest.peek().is_some() {
            let (mut some, mut len) = (Vec::new(), 0);
            while some.len() < OBJECTS_AT_ONCE
                && let Some((key, bytes)) =
                    rest.next_if(|(_, bytes)| some.is_empty() || len + bytes.len() <= BYTES_AT_ONCE)
            {
                len += bytes.len();
                some.push((key, bytes));
            }
            stored += self.put_some(some).await?;
        }
        Ok(stored)
    }

    async fn put_some(&self, objects: Vec<(ObjectKey, Bytes)>) -> Result<usize, StoreError> {
        let mut by_member: Vec<Vec<(ObjectKey, Bytes)>> = vec![Vec::new(); self.quorum.n];
        let cut =
            objects.into_iter().map(|(key, bytes)| async move { Ok((key.clone(), self.cut(&key, bytes).await?)) });
        let cut = futures::future::try_join_all(cut).await?;
        for (key, pieces) in &cut {
            for (batch, piece) in by_member.iter_mut().zip(pieces) {
                batch.push((key.clone(), piece.clone()));
            }
        }
        let len = by_member.first().map_or(0, |batch| batch.iter().map(|(_, piece)| piece.len()).sum());
        let put = |index: usize, member: Arc<Member>| {
            let batch = std::mem::take(&mut by_member[index]);
            async move {
                member.check_stays(batch.iter().map(|(key, _)| key))?;
                member.store.put_batch(batch).await
            }
            .boxed()
        };
        let mut answers = self.write_at(&self.all(), self.quorum.answers(), len, put).await;
        let (mut new, mut failures) = (Vec::new(), Vec::new());
        while new.len() < self.quorum.answers() {
            match answers.recv().await {
                Some((_, Ok(count))) => new.push(count),
                Some((index, Err(error))) => failures.push((index, error)),
                None => return Err(self.too_few("cannot put chunks", new.len(), &failures)),
            }
        }
        // Nobody knows how what was there already is encoded.
        if new.iter().any(|count| *count < cut.len()) {
            futures::future::try_join_all(cut.iter().map(|(key, pieces)| self.unite(key, pieces))).await?;
        }
        new.sort_unstable();
        // f of them may say anything, and those who had missed a put before say too much.
        Ok(new[self.quorum.f])
    }

    /// Makes n - f members have pieces of one encoding when some had pieces before. Versions of this program may encode a content
    /// differently, and pieces of different encodings do not go together: that n - f have some piece says nothing. What can be read is
    /// kept, in the encoding of which most is there, as somebody may have been told that it is; else it becomes what `ours` are.
    async fn unite(&self, key: &ObjectKey, ours: &[Bytes]) -> Result<(), StoreError> {
        let gathered = self.gather_all(key, GRACE).await;
        let most = gathered.by_encoding.iter().max_by_key(|(encoding, pieces)| (pieces.len(), **encoding));
        let whole = most.map(|(_, pieces)| pieces).filter(|pieces| pieces.len() >= self.quorum.pieces());
        if whole.is_some_and(|whole| whole.len() >= self.quorum.answers()) {
            return Ok(());
        }
        let pieces = match whole.and_then(|pieces| piece::join(self.quorum, pieces)) {
            Some(bytes) => self.cut(key, bytes).await?,
            None => ours.to_vec(),
        };
        let sound: Vec<&Bytes> = gathered.by_encoding.values().flatten().map(Piece::bytes).collect();
        let lacking: Vec<usize> = self.all().into_iter().filter(|index| !sound.contains(&&pieces[*index])).collect();
        let have = self.quorum.n - lacking.len();
        let wanted = self.quorum.answers().saturating_sub(have);
        let (given, failures) = self.give(key, &pieces, &lacking, wanted).await;
        if given < wanted {
            return Err(self.too_few("cannot bring the pieces of a chunk together", have + given, &failures));
        }
        Ok(())
    }

    pub(super) async fn cut(&self, key: &ObjectKey, bytes: Bytes) -> Result<Vec<Bytes>, StoreError> {
        if bytes.len() > MAX_SEALED_BYTES {
            return Err(StoreError::TooLarge { key: key.clone(), len: bytes.len() as u64, cap: MAX_SEALED_BYTES });
        }
        let (keys, name, quorum) = (Arc::clone(&self.keys), key.clone(), self.quorum);
        let cut = tokio::task::spawn_blocking(move || piece::cut(&keys, &name, quorum, &bytes)).await;
        cut.map_err(|join| StoreError::Io {
            what: "the store's worker died".into(),
            source: std::io::Error::other(join),
        })
    }

    /// Asks one member for its piece.
    fn fetch(&self, asking: &mut JoinSet<(usize, Found)>, index: usize, key: &ObjectKey) {
        let (member, keys, key, quorum) =
            (Arc::clone(&self.members[index]), Arc::clone(&self.keys), key.clone(), self.quorum);
        asking.spawn(async move {
            let wrong = |why: &str| {
                member.note_wrong(Wrong::Forged, &key, why);
                Found::Wrong
            };
            let got = member.store.get(key.clone(), piece::max_bytes(quorum));
            let found = match member.ask_read(READ_BUDGET, got).await {
                Ok(bytes) => match Piece::check(&keys, &key, quorum, index, bytes) {
                    Ok(piece) => Found::Piece(piece),
                    Err(why) => wrong(why),
                },
                Err(StoreError::NotFound { .. }) => Found::Absent,
                Err(StoreError::TooLarge { .. }) => wrong("it is too large for a piece"),
                Err(error) => Found::Failed(error),
            };
            (index, found)
        });
    }

    /// Reads a chunk from the members that are asked first, from others when it has to be.
    pub(super) async fn get_chunk(&self, key: &ObjectKey) -> Result<Bytes, StoreError> {
        let need = self.quorum.pieces();
        let mut next = order(&self.members, self.order).into_iter();
        let mut asking = JoinSet::new();
        let mut outstanding: Vec<(usize, Instant)> = Vec::new();
        let mut hedge = HEDGE_UNKNOWN;
        let mut ask_more = |asking: &mut JoinSet<_>, outstanding: &mut Vec<(usize, Instant)>, count: usize| {
            for index in next.by_ref().take(count) {
                self.fetch(asking, index, key);
                outstanding.push((index, Instant::now()));
            }
        };
        ask_more(&mut asking, &mut outstanding, need);
        let paces: Option<Vec<Duration>> = outstanding.iter().map(|(index, _)| self.members[*index].pace()).collect();
        if let Some(slowest) = paces.and_then(|paces| paces.into_iter().max()) {
            hedge = (slowest * HEDGE_TIMES).clamp(HEDGE_LEAST, HEDGE_MOST);
        }
        let mut slow = std::pin::pin!(tokio::time::sleep(hedge));
        let mut gathered = Gathered::default();
        loop {
            tokio::select! {
                joined = asking.join_next() => {
                    let (index, found) = match joined {
                        None => break,
                        Some(Ok(answer)) => answer,
                        // It panicked: whoever it was counts as silent, and another is asked instead.
                        Some(Err(_)) => {
                            ask_more(&mut asking, &mut outstanding, 1);
                            continue;
                        }
                    };
                    outstanding.retain(|(at, _)| *at != index);
                    let more = match &found {
                        Found::Piece(_) => 0,
                        // It may be nowhere: then the quickest is to ask all.
                        Found::Absent => self.quorum.n,
                        Found::Wrong | Found::Failed(_) => 1,
                    };
                    if let Some(encoding) = gathered.add(index, found) {
                        let pieces = &gathered.by_encoding[&encoding];
                        if pieces.len() >= need {
                            match piece::join(self.quorum, pieces) {
                                Some(bytes) => {
                                    self.note_outrun(&outstanding, &gathered);
                                    return Ok(bytes);
                                }
                                None => tracing::error!(%key, "signed pieces of one encoding do not go together"),
                            }
                        }
                        if asking.is_empty() {
                            // Of another encoding than those before.
                            ask_more(&mut asking, &mut outstanding, 1);
                        }
                    }
                    if gathered.absent.len() >= self.quorum.answers() {
                        return Err(StoreError::NotFound { key: key.clone() });
                    }
                    ask_more(&mut asking, &mut outstanding, more);
                }
                () = &mut slow => {
                    outstanding.iter().for_each(|(index, since)| self.members[*index].note_slow(since.elapsed()));
                    ask_more(&mut asking, &mut outstanding, 1);
                    slow.as_mut().reset(Instant::now() + hedge);
                }
            }
        }
        Err(self.not_gathered(key, &gathered))
    }

    /// Who lacks a piece that others have.
    fn note_outrun(&self, outstanding: &[(usize, Instant)], gathered: &Gathered) {
        if !gathered.absent.is_empty() || !gathered.wrong.is_empty() {
            let of = |which: &[usize]| which.iter().map(|index| self.members[*index].name.as_str()).collect::<Vec<_>>();
            tracing::debug!(absent = ?of(&gathered.absent), wrong = ?of(&gathered.wrong), outstanding = outstanding.len(),
                "a chunk was read from the others");
        }
    }

    /// Why there are too few pieces of one encoding. That there is no object is said only when, but for f members, all have said so
    /// or have a piece that is one of too few: a completed put leaves f + 1 at the others. Who was not heard of counts among these f.
    pub(super) fn not_gathered(&self, key: &ObjectKey, gathered: &Gathered) -> StoreError {
        let pieces: usize = gathered.by_encoding.values().map(Vec::len).sum();
        let faulty = self.quorum.n.saturating_sub(gathered.absent.len() + pieces);
        if faulty <= self.quorum.f && pieces <= self.quorum.f {
            return StoreError::NotFound { key: key.clone() };
        }
        if faulty == gathered.wrong.len() {
            let (wrong, encodings, n) = (gathered.wrong.len(), gathered.by_encoding.len(), self.quorum.n);
            let why = format!("{pieces} stores of {n} have pieces, of {encodings} encodings, {wrong} have wrong ones");
            return StoreError::Damaged { key: key.clone(), why };
        }
        self.too_few("cannot read a chunk", pieces, &gathered.failed)
    }

    /// What all members have of a chunk: from n - f answers on, the others have a while to answer, too.
    pub(super) async fn gather_all(&self, key: &ObjectKey, grace: Duration) -> Gathered {
        let mut asking = JoinSet::new();
        (0..self.quorum.n).for_each(|index| self.fetch(&mut asking, index, key));
        let (mut gathered, mut waiting, mut until) = (Gathered::default(), self.all(), None);
        loop {
            let joined = match until {
                Some(until) => match tokio::time::timeout_at(until, asking.join_next()).await {
                    Ok(joined) => joined,
                    Err(_) => break,
                },
                None => asking.join_next().await,
            };
            match joined {
                Some(Ok((index, found))) => {
                    waiting.retain(|at| *at != index);
                    gathered.add(index, found);
                }
                Some(Err(_)) => {}
                None => break,
            }
            if waiting.len() <= self.quorum.f {
                until.get_or_insert(Instant::now() + grace);
            }
        }
        let late = |index: usize| {
            let why = "no answer in time".to_owned();
            (index, StoreError::Unreachable { store: self.members[index].name.clone(), why })
        };
        gathered.failed.extend(waiting.into_iter().map(late));
        gathered
    }

    /// What members say of an object's entry: from n - f on, others may add to it for a moment.
    async fn entries(&self, key: &ObjectKey) -> Result<Vec<(usize, Option<ObjectEntry>)>, StoreError> {
        let mut asking = JoinSet::new();
        for (index, member) in self.members.iter().enumerate() {
            let (member, key) = (Arc::clone(member), key.clone());
            asking.spawn(async move { (index, member.ask(READ_BUDGET, member.store.stat(key)).await) });
        }
        let (mut said, mut failures) = (Vec::new(), Vec::new());
        let mut until = None;
        loop {
            let joined = match until {
                Some(until) => match tokio::time::timeout_at(until, asking.join_next()).await {
                    Ok(joined) => joined,
                    Err(_) => break,
                },
                None => asking.join_next().await,
            };
            match joined {
                Some(Ok((index, Ok(entry)))) => said.push((index, entry)),
                Some(Ok((index, Err(error)))) => failures.push((index, error)),
                Some(Err(_)) => {}
                None => break,
            }
            if said.len() >= self.quorum.answers() {
                until.get_or_insert(Instant::now() + GRACE);
            }
        }
        if said.len() < self.quorum.answers() {
            return Err(self.too_few("cannot look at a chunk", said.len(), &failures));
        }
        Ok(said)
    }

    /// An entry of every chunk of which any piece is there: what is to be deleted must be seen.
    pub(super) async fn stat_chunk(&self, key: &ObjectKey) -> Result<Option<ObjectEntry>, StoreError> {
        let said = self.entries(key).await?;
        let there: Vec<&ObjectEntry> = said.iter().filter_map(|(_, entry)| entry.as_ref()).collect();
        let stamps = there.iter().map(|entry| entry.modified).collect();
        let Some(modified) = self.stamp(stamps, said.len()) else { return Ok(None) };
        Ok(Some(ObjectEntry { key: key.clone(), len: self.likely_len(there.iter().map(|entry| entry.len)), modified }))
    }

    /// The length of an object by what members say of its pieces: the middle of what they say.
    pub(super) fn likely_len(&self, pieces: impl Iterator<Item = u64>) -> u64 {
        let mut lens: Vec<u64> = pieces.collect();
        lens.sort_unstable();
        lens.get(lens.len() / 2).map_or(0, |len| piece::object_bytes(*len, self.quorum))
    }

    /// Whether a chunk can be read, by the word of more than f.
    pub(super) async fn has_chunk(&self, key: &ObjectKey) -> Result<bool, StoreError> {
        let said = self.entries(key).await?;
        Ok(said.iter().filter(|(_, entry)| entry.is_some()).count() >= self.quorum.pieces())
    }

    /// Deletes all pieces that there are. A member that cannot even be asked keeps its piece, for a later sweep; one of which it
    /// is not known whether it will still delete makes this fail, as a piece put there afterwards would be in danger.
    pub(super) async fn delete_chunk(&self, key: &ObjectKey) -> Result<bool, StoreError> {
        let said = self.entries(key).await?;
        let which: Vec<usize> = said.into_iter().filter(|(_, entry)| entry.is_some()).map(|(index, _)| index).collect();
        let delete = |_, member: Arc<Member>| {
            let (key, late, stop) = (key.clone(), self.late.clone(), self.stop.clone());
            async move {
                // A folder does it whenever it can, also when nobody waits for it any more: it is watched to its end.
                let (done, heard) = tokio::sync::oneshot::channel();
                let (deleting, name) = (member.begin_deletion(&key), member.name.clone());
                late.spawn(async move {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        // Nobody may be listening any more.
                        deleted = member.store.delete(key) => drop(done.send(deleted)),
                    }
                    drop(deleting);
                });
                let unheard = StoreError::Unreachable { store: name, why: "the store is closed".into() };
                heard.await.unwrap_or(Err(unheard))
            }
            .boxed()
        };
        let mut answers = self.write_at(&which, which.len(), 0, delete).await;
        let mut was_there = false;
        let mut failure = None;
        while let Some((index, deleted)) = answers.recv().await {
            match deleted {
                Ok(deleted) => was_there |= deleted,
                Err(error) => failure = Some((index, error)),
            }
        }
        match failure {
            None => Ok(was_there),
            Some((index, error)) => {
                let why = format!("a deletion may not have happened yet: {error}");
                Err(StoreError::Unreachable { store: self.members[index].name.clone(), why })
            }
        }
    }

    /// Refreshes what is there; gives what is not. A chunk that fewer than n - f have is completed.
    pub(super) async fn refresh_chunks(&self, keys: Vec<ObjectKey>) -> Result<Vec<ObjectKey>, StoreError> {
        let mut missing = Vec::new();
        for some in keys.chunks(4 * OBJECTS_AT_ONCE) {
            missing.extend(self.refresh_some(some).await?);
        }
        Ok(missing)
    }

    async fn refresh_some(&self, keys: &[ObjectKey]) -> Result<Vec<ObjectKey>, StoreError> {
        let refresh = |_, member: Arc<Member>| {
            let keys = keys.to_vec();
            async move {
                member.check_stays(&keys)?;
                member.store.refresh(keys).await
            }
            .boxed()
        };
        let mut answers = self.write_at(&self.all(), self.quorum.answers(), 0, refresh).await;
        let positions: HashMap<&ObjectKey, usize> = keys.iter().enumerate().map(|(at, key)| (key, at)).collect();
        // By key: who has it not.
        let mut lacking: Vec<Vec<usize>> = vec![Vec::new(); keys.len()];
        let (mut said, mut failures) = (Vec::new(), Vec::new());
        let is_settled = |lacking: &[Vec<usize>], said: usize| {
            let is_settled = |lacking: &Vec<usize>| {
                said - lacking.len() >= self.quorum.answers() || lacking.len() >= self.quorum.answers()
            };
            said >= self.quorum.answers() && lacking.iter().all(is_settled)
        };
        while !is_settled(&lacking, said.len()) {
            match answers.recv().await {
                Some((index, Ok(absent))) => {
                    said.push(index);
                    for key in absent {
                        if let Some(at) = positions.get(&key)
                            && !lacking[*at].contains(&index)
                        {
                            lacking[*at].push(index);
                        }
                    }
                }
                Some((index, Err(error))) => failures.push((index, error)),
                None => break,
            }
        }
        if said.len() < self.quorum.answers() {
            return Err(self.too_few("cannot refresh chunks", said.len(), &failures));
        }
        let mut missing = Vec::new();
        for (key, lacking) in keys.iter().zip(lacking) {
            let have = said.len() - lacking.len();
            if have >= self.quorum.answers() {
                continue;
            }
            if lacking.len() >= self.quorum.answers() {
                missing.push(key.clone());
                continue;
            }
            match self.get_chunk(key).await {
                Ok(bytes) => self.complete(key, bytes, &lacking, have).await?,
                // What does not make an object is put anew by who has it.
                Err(StoreError::NotFound { .. } | StoreError::Damaged { .. }) => missing.push(key.clone()),
                Err(error) => return Err(error),
            }
        }
        Ok(missing)
    }

    /// Completes a chunk that `have` members have, fewer than n - f.
    async fn complete(&self, key: &ObjectKey, bytes: Bytes, lacking: &[usize], have: usize) -> Result<(), StoreError> {
        let pieces = self.cut(key, bytes).await?;
        let wanted = self.quorum.answers().saturating_sub(have);
        let (given, failures) = self.give(key, &pieces, lacking, wanted).await;
        if given < wanted {
            return Err(self.too_few("cannot complete a chunk", have + given, &failures));
        }
        Ok(())
    }

    /// Gives members the pieces that they lack: how many have taken theirs when `wanted` have or all have answered, and who has not.
    pub(super) async fn give(
        &self,
        key: &ObjectKey,
        pieces: &[Bytes],
        lacking: &[usize],
        wanted: usize,
    ) -> (usize, Vec<(usize, StoreError)>) {
        let len = pieces.first().map_or(0, Bytes::len);
        let put = |index: usize, member: Arc<Member>| {
            let (key, piece) = (key.clone(), pieces[index].clone());
            async move {
                member.check_stays([&key])?;
                member.store.put(key, piece).await?;
                member.note_mended(1);
                Ok(())
            }
            .boxed()
        };
        let mut answers = self.write_at(lacking, wanted.min(lacking.len()), len, put).await;
        let (mut given, mut failures) = (0, Vec::new());
        while given < wanted
            && let Some((index, put)) = answers.recv().await
        {
            match put {
                Ok(()) => given += 1,
                Err(error) => failures.push((index, error)),
            }
        }
        (given, failures)
    }
}
