//! What there is: what any member has of chunks (so that what is to be deleted is seen), what can be read of registers.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use futures::{StreamExt as _, TryStreamExt as _};
use tokio::{task::JoinSet, time::Instant};

use super::{GRACE, Inner, READ_BUDGET, Wrong, record};
use crate::backend::{ObjectEntry, ObjectKey, StoreError};

/// Entries of one page of a member's.
const PAGE: usize = 1000;
/// Pages of registers of one project and member.
const REGISTER_PAGES: usize = 64;
/// Registers that are read at once.
const REGISTERS_AT_ONCE: usize = 8;
/// Projects that only liars list, passed over in one listing.
const SKIPPED_AT_MOST: usize = 1000;

/// Which entries are wanted.
struct Wanted<'a> {
    prefix: &'a str,
    after: &'a str,
}

impl Wanted<'_> {
    fn has(&self, key: &str) -> bool {
        key.starts_with(self.prefix) && key > self.after
    }
}

/// One page of every member that answers.
type Pages = Vec<(usize, Vec<ObjectEntry>)>;

impl Inner {
    pub(super) async fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<ObjectEntry>, StoreError> {
        let wanted = Wanted { prefix, after: after.unwrap_or_default() };
        let mut found = Vec::new();
        if let Some((project, _)) = prefix.split_once('/') {
            self.list_project(project, &wanted, limit, &mut found).await?;
            return Ok(found);
        }
        let mut next = self.next_project(prefix, wanted.after, true).await?;
        while let Some(project) = next.filter(|_| found.len() < limit) {
            self.list_project(&project, &wanted, limit, &mut found).await?;
            // After every key of it: '~' is in none.
            next = self.next_project(prefix, &format!("{project}/~"), false).await?;
        }
        Ok(found)
    }

    /// The first project after a key, or the key's own, that more than f members list.
    async fn next_project(&self, prefix: &str, after: &str, or_own: bool) -> Result<Option<String>, StoreError> {
        let mut after = after.to_owned();
        let mut own = after.split_once('/').map(|(project, _)| project.to_owned()).filter(|_| or_own);
        for _ in 0..SKIPPED_AT_MOST {
            if let Some(own) = own.take()
                && own.starts_with(prefix)
            {
                return Ok(Some(own));
            }
            let mut counts: BTreeMap<String, usize> = BTreeMap::new();
            for (_, page) in self.pages(prefix, &after, 1).await? {
                if let Some((project, _)) = page.first().and_then(|entry| entry.key.as_str().split_once('/')) {
                    *counts.entry(project.to_owned()).or_default() += 1;
                }
            }
            match counts.into_iter().next() {
                None => return Ok(None),
                Some((project, count)) if count >= self.quorum.pieces() => return Ok(Some(project)),
                // A sweep leaves its clock at all of them, so no project of which there is anything is passed over for good.
                Some((project, _)) => after = format!("{project}/~"),
            }
        }
        Err(StoreError::Unreachable {
            store: "the cloud of clouds".into(),
            why: format!("more than {SKIPPED_AT_MOST} projects are listed by too few stores"),
        })
    }

    async fn list_project(
        &self,
        project: &str,
        wanted: &Wanted<'_>,
        limit: usize,
        found: &mut Vec<ObjectEntry>,
    ) -> Result<(), StoreError> {
        let room = limit.saturating_sub(found.len());
        let inside = wanted.prefix.strip_prefix(&format!("{project}/")).unwrap_or_default();
        let (folder, is_folder) = match inside.split_once('/') {
            Some((folder, _)) => (folder, true),
            None => (inside, false),
        };
        let may_be_chunks = folder.len() <= 2 && folder.bytes().all(|b| b.is_ascii_hexdigit());
        // Such folders are for chunks alone.
        let may_be_registers = !(is_folder && may_be_chunks && folder.len() == 2);
        let mut all = Vec::new();
        if may_be_registers {
            all.extend(self.list_registers(project, inside, wanted).await?);
        }
        if may_be_chunks {
            all.extend(self.list_chunks(project, wanted, room).await?);
        }
        all.sort_by(|a, b| a.key.cmp(&b.key));
        all.truncate(room);
        found.append(&mut all);
        Ok(())
    }

    /// A page of each member, of n - f at least.
    async fn pages(&self, prefix: &str, after: &str, limit: usize) -> Result<Pages, StoreError> {
        let mut asking = JoinSet::new();
        for (index, member) in self.members.iter().enumerate() {
            let (member, prefix, after) = (Arc::clone(member), prefix.to_owned(), after.to_owned());
            asking.spawn(async move {
                let list = member.store.list(
                    &prefix,
                    Some(&after).filter(|after| !after.is_empty()).map(String::as_str),
                    limit,
                );
                let listed = member.ask(READ_BUDGET, list).await;
                let is_listing = |page: &Vec<ObjectEntry>| {
                    let is_wanted =
                        |entry: &ObjectEntry| Wanted { prefix: &prefix, after: &after }.has(entry.key.as_str());
                    page.len() <= limit && page.iter().all(is_wanted) && page.is_sorted_by(|a, b| a.key < b.key)
                };
                if let Ok(page) = &listed
                    && !is_listing(page)
                {
                    member.note_wrong(Wrong::Listing, &prefix, "it is out of order, or not what was asked for");
                    return (index, Ok(None));
                }
                (index, listed.map(Some))
            });
        }
        let (mut pages, mut failures, mut until) = (Pages::new(), Vec::new(), None);
        loop {
            let joined = match until {
                Some(until) => match tokio::time::timeout_at(until, asking.join_next()).await {
                    Ok(joined) => joined,
                    Err(_) => break,
                },
                None => asking.join_next().await,
            };
            match joined {
                Some(Ok((index, Ok(Some(page))))) => pages.push((index, page)),
                Some(Ok((index, Err(error)))) => failures.push((index, error)),
                Some(_) => {}
                None => break,
            }
            if pages.len() >= self.quorum.answers() {
                until.get_or_insert(Instant::now() + GRACE);
            }
        }
        if pages.len() < self.quorum.answers() {
            return Err(self.too_few("cannot list", pages.len(), &failures));
        }
        Ok(pages)
    }

    /// Chunks of which any member has a piece.
    async fn list_chunks(
        &self,
        project: &str,
        wanted: &Wanted<'_>,
        limit: usize,
    ) -> Result<Vec<ObjectEntry>, StoreError> {
        let mut found = Vec::new();
        let mut after = wanted.after.to_owned();
        // Folders of registers come after all folders of chunks.
        let end = format!("{project}/{}", record::FOLDER);
        let prefix = if wanted.prefix.contains('/') { wanted.prefix.to_owned() } else { format!("{project}/") };
        while found.len() < limit {
            let size = (limit - found.len()).clamp(1, PAGE);
            let mut by_key: BTreeMap<ObjectKey, Vec<(usize, ObjectEntry)>> = BTreeMap::new();
            // Up to where all that answered have told everything.
            let mut told: Option<String> = None;
            let pages = self.pages(&prefix, &after, size).await?;
            let answered = pages.len();
            for (index, page) in pages {
                if let Some(last) = page.last().filter(|last| page.len() == size && last.key.as_str() < end.as_str())
                    && told.as_deref().is_none_or(|told| last.key.as_str() < told)
                {
                    told = Some(last.key.as_str().to_owned());
                }
                for entry in page.into_iter().filter(|entry| entry.key.chunk_name().is_some()) {
                    by_key.entry(entry.key.clone()).or_default().push((index, entry));
                }
            }
            by_key.retain(|key, _| told.as_deref().is_none_or(|told| key.as_str() <= told));
            let strayed = self.strayed(&by_key);
            // Whose entries do not count has said nothing.
            let answered = answered - strayed.len();
            for (key, entries) in by_key {
                let entries: Vec<_> = entries.into_iter().filter(|(index, _)| !strayed.contains(index)).collect();
                let stamps = entries.iter().map(|(_, entry)| entry.modified).collect();
                let Some(modified) = self.stamp(stamps, answered) else { continue };
                let len = self.likely_len(entries.iter().map(|(_, entry)| entry.len));
                found.push(ObjectEntry { key, len, modified });
            }
            match told {
                Some(told) => after = told,
                None => break,
            }
        }
        found.truncate(limit);
        Ok(found)
    }

    /// Members that list more names that hardly anybody else has than is plausible: without end, they would keep a sweep busy for
    /// ever. Some such names are what a write or a deletion left that did not come to its end.
    fn strayed(&self, by_key: &BTreeMap<ObjectKey, Vec<(usize, ObjectEntry)>>) -> BTreeSet<usize> {
        let mut strays: BTreeMap<usize, u64> = BTreeMap::new();
        for entries in by_key.values().filter(|entries| entries.len() <= self.quorum.f) {
            entries.iter().for_each(|(index, _)| *strays.entry(*index).or_default() += 1);
        }
        let too_many = strays.into_iter().filter(|(index, count)| !self.members[*index].may_stray(*count));
        too_many
            .map(|(index, _)| {
                // No lie yet: one that was away while much was swept lists just that when it is back.
                tracing::debug!(member = self.members[index].name, "too many of what it lists is nowhere else");
                index
            })
            .collect()
    }

    /// Registers that are not deleted.
    async fn list_registers(
        &self,
        project: &str,
        inside: &str,
        wanted: &Wanted<'_>,
    ) -> Result<Vec<ObjectEntry>, StoreError> {
        let prefix = format!("{project}/{}/{}", record::FOLDER, record::escaped(inside));
        let mut names = BTreeSet::new();
        let mut after = String::new();
        for _ in 0..REGISTER_PAGES {
            let mut told: Option<String> = None;
            for (_, page) in self.pages(&prefix, &after, PAGE).await? {
                if let Some(last) = page.last().filter(|_| page.len() == PAGE)
                    && told.as_deref().is_none_or(|told| last.key.as_str() < told)
                {
                    told = Some(last.key.as_str().to_owned());
                }
                names.extend(page.iter().filter_map(|entry| record::register_of(&entry.key)));
            }
            let Some(told) = told else {
                let wanted = names.into_iter().filter(|key| wanted.has(key.as_str()));
                let stats = wanted.map(|key| async move { self.stat_register(&key).await });
                let stats = futures::stream::iter(stats).buffered(REGISTERS_AT_ONCE);
                return stats.try_filter_map(|entry| std::future::ready(Ok(entry))).try_collect().await;
            };
            after = told;
        }
        Err(StoreError::Unreachable {
            store: "the cloud of clouds".into(),
            why: format!("project {project} has more than {} versions of registers", REGISTER_PAGES * PAGE),
        })
    }
}
