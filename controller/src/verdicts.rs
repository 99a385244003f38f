//! What policies told of guests last. Nothing of it is durable: a policy that runs tells it again.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use supercloud_api::{
    GuestVerdict, Name, VERDICT_MS, Verdict,
    ids::{GuestId, ProjectId},
};

/// Verdicts that are kept at most: a fleet of that many guests is told of in parts.
const AT_MOST: usize = 100_000;

/// Who told, and when.
#[derive(Debug, Clone)]
pub struct Teller {
    /// The policy.
    pub policy: Name,
    /// As events name them.
    pub actor: String,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
}

/// What was told. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct VerdictBoard(Arc<Mutex<BTreeMap<GuestId, (ProjectId, GuestVerdict)>>>);

impl VerdictBoard {
    fn board(&self) -> MutexGuard<'_, BTreeMap<GuestId, (ProjectId, GuestVerdict)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes verdicts, each with its guest's name and project; how many were taken.
    pub fn take(&self, teller: &Teller, told: Vec<(Name, ProjectId, Verdict)>) -> usize {
        let mut board = self.board();
        board.retain(|_, (_, verdict)| counts(verdict, teller.at_ms));
        let mut taken = 0;
        for (guest_name, project, verdict) in told {
            if board.len() >= AT_MOST && !board.contains_key(&verdict.guest) {
                continue;
            }
            let Verdict { guest, market, chosen, runner_up, is_move, reason } = verdict;
            let kept = GuestVerdict {
                guest,
                guest_name,
                policy: teller.policy.clone(),
                actor: teller.actor.clone(),
                told_at_ms: teller.at_ms,
                market,
                chosen,
                runner_up,
                is_move,
                reason,
            };
            board.insert(guest, (project, kept));
            taken += 1;
        }
        taken
    }

    /// Those that count now, on guests of a project (`None`: of all), behind `after`; at most `limit`, and whether there are more.
    #[must_use]
    pub fn page(
        &self,
        project: Option<ProjectId>,
        after: Option<GuestId>,
        limit: usize,
        now_ms: u64,
    ) -> (Vec<GuestVerdict>, bool) {
        let board = self.board();
        let from = after.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        let found = board.range((from, std::ops::Bound::Unbounded)).map(|(_, kept)| kept);
        let visible =
            found.filter(|(of, verdict)| project.is_none_or(|wanted| *of == wanted) && counts(verdict, now_ms));
        let mut items: Vec<GuestVerdict> =
            visible.take(limit.saturating_add(1)).map(|(_, verdict)| verdict.clone()).collect();
        let is_more = items.len() > limit;
        items.truncate(limit);
        (items, is_more)
    }
}

const fn counts(verdict: &GuestVerdict, now_ms: u64) -> bool {
    now_ms.saturating_sub(verdict.told_at_ms) <= VERDICT_MS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(guest: GuestId, chosen: &str) -> Verdict {
        Verdict {
            guest,
            market: None,
            chosen: Some(chosen.to_owned()),
            runner_up: None,
            is_move: false,
            reason: "r".to_owned(),
        }
    }

    #[test]
    fn the_newest_counts_for_five_minutes_and_pages_hold_each_once() {
        let board = VerdictBoard::default();
        let (mine, other) = (ProjectId::generate(), ProjectId::generate());
        let mut guests: Vec<GuestId> = (0..5).map(|_| GuestId::generate()).collect();
        guests.sort();
        let teller = |at_ms| Teller { policy: "cheapest".parse().unwrap(), actor: "token:p".to_owned(), at_ms };
        let tell = |at_ms, guests: &[GuestId], project, chosen: &str| {
            let told = guests.iter().map(|guest| ("web".parse().unwrap(), project, verdict(*guest, chosen))).collect();
            board.take(&teller(at_ms), told)
        };
        assert_eq!(tell(1000, &guests, mine, "a/x/spot"), 5);
        assert_eq!(tell(2000, &guests[..1], other, "b/x/spot"), 1);
        let (first, is_more) = board.page(None, None, 3, 2000);
        assert_eq!((first.len(), is_more, first[0].chosen.as_deref()), (3, true, Some("b/x/spot")));
        let (rest, is_more) = board.page(None, Some(first[2].guest), 3, 2000);
        assert_eq!((rest.iter().map(|one| one.guest).collect::<Vec<_>>(), is_more), (guests[3..].to_vec(), false));
        assert_eq!(board.page(Some(mine), None, 10, 2000).0.len(), 4);
        assert_eq!(board.page(None, None, 10, 1000 + VERDICT_MS + 1).0.len(), 1);
        assert_eq!(board.page(None, None, 10, 2000 + VERDICT_MS + 1).0.len(), 0);
    }
}
