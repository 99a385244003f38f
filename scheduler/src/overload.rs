//! Overload of memory: wait it out with memory that other hosts lend, or move the guest away? The decision alone.
//!
//! After Overdriver (Williams, Jamjoom, Liu, Weatherspoon: VEE 2011): most overloads are over within two minutes, and are best waited
//! out over memory of other hosts; sustained ones are worth a migration. How long a guest is waited for is learned from its own
//! overloads: a profile of how long they last.
//!
//! **Nothing lends memory yet**: no agent swaps to another host, and nothing asks for this decision. It is here with its replay
//! ([`crate::sim::overload`]), so that what carries it out can be judged against it.
//!
//! ## The threshold
//! Waiting loses `net_permille` of the time for as long as an overload lasts; a move loses [`Costs::move_lost_ms`] once. The loss of
//! waiting until `t` and moving then is expected to be `net * integral of S up to t + S(t) * move`, S being the chance that an
//! overload lasts longer. S is the product-limit estimate of Kaplan and Meier (1958), because an overload that was ended
//! by a move shows only that it lasted *at least* so long. A guest's own S counts more the more overloads it had; the rest is
//! that of all guests.
//!
//! A threshold that is gone by hides what would have come after it, so that one that is too short would confirm itself. Therefore
//! each guest's every tenth overload is waited out for as long as the promise lets.
//!
//! ## The promise
//! Whatever comes, an overload costs at most three times what one who knew its length would have paid: the threshold stays
//! between the break-even (where waiting has cost as much as a move) and twice that, whatever the profile says (ski rental,
//! after Karlin, Manasse, Rudolph and Sleator, 1988). It is never sooner, because a move burdens other guests, too.

use std::collections::VecDeque;

/// Overloads that are kept of a guest, and of all of them; the newest.
const OWN: usize = 256;
const ALL: usize = 512;
/// Of so many overloads of a guest one is waited out as long as may be.
const ONE_IN: u64 = 10;
/// As many overloads of its own make a guest's profile count half.
const OWN_WEIGHT: f64 = 10.0;

/// What waiting and moving lose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Costs {
    /// The share of time that is lost while pages come from other hosts, in thousandths (1 to 1000).
    pub net_permille: u32,
    /// What a move loses in all, in milliseconds: slower while it copies, and the pause.
    pub move_lost_ms: u64,
}

impl Costs {
    /// What waiting for so long loses, in milliseconds.
    #[must_use]
    pub fn waiting_ms(&self, ms: u64) -> u64 {
        (u128::from(ms) * u128::from(self.net_permille) / 1000) as u64
    }

    /// After how long waiting has lost as much as a move does, in milliseconds.
    #[must_use]
    pub fn break_even_ms(&self) -> u64 {
        let ms = u128::from(self.move_lost_ms) * 1000 / u128::from(self.net_permille.max(1));
        u64::try_from(ms).unwrap_or(u64::MAX)
    }
}

/// An overload that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Past {
    lasted_ms: u64,
    /// It ended by itself; else a move ended it.
    is_whole: bool,
}

/// How long overloads last.
#[derive(Debug, Clone, Default)]
pub struct Profile {
    past: VecDeque<Past>,
    /// How many there ever were.
    ever: u64,
}

/// A step of the chance to last: from so long on it is so high.
type Steps = Vec<(u64, f64)>;

impl Profile {
    fn add(&mut self, past: Past, most: usize) {
        if self.past.len() == most {
            self.past.pop_front();
        }
        self.past.push_back(past);
        self.ever += 1;
    }

    /// How many overloads are in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.past.len()
    }

    /// There were none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.past.is_empty()
    }

    /// The chance to last longer than each length at which one ended (Kaplan and Meier).
    fn lasting(&self) -> Steps {
        let mut past: Vec<Past> = self.past.iter().copied().collect();
        // Of the same length, those that ended come before those that were cut short.
        past.sort_unstable_by_key(|past| (past.lasted_ms, !past.is_whole));
        let (mut chance, mut steps) = (1.0, Vec::new());
        let mut at = 0;
        while at < past.len() {
            let lasted_ms = past[at].lasted_ms;
            let left = past.len() - at;
            let same = past[at..].iter().take_while(|past| past.lasted_ms == lasted_ms);
            let (count, ended) = same.fold((0, 0), |(n, ended), past| (n + 1, ended + usize::from(past.is_whole)));
            if ended > 0 {
                chance *= 1.0 - ended as f64 / left as f64;
                steps.push((lasted_ms, chance));
            }
            at += count;
        }
        steps
    }
}

fn chance_at(steps: &Steps, ms: u64) -> f64 {
    let next = steps.partition_point(|(at, _)| *at <= ms);
    next.checked_sub(1).map_or(1.0, |last| steps[last].1)
}

/// For how long an overload of a guest is waited out before it is moved, in milliseconds, see above.
#[must_use]
pub fn threshold_ms(own: &Profile, all: &Profile, costs: &Costs) -> u64 {
    let even = costs.break_even_ms();
    let (least, most) = (even, even.saturating_mul(2));
    if all.is_empty() && own.is_empty() {
        return even;
    }
    let (of_own, of_all) = (own.lasting(), all.lasting());
    let weight = own.len() as f64 / (own.len() as f64 + OWN_WEIGHT);
    let chance = |ms: u64| {
        let all = if of_all.is_empty() { chance_at(&of_own, ms) } else { chance_at(&of_all, ms) };
        weight * chance_at(&of_own, ms) + (1.0 - weight) * all
    };
    // Only where the chance falls can the loss have a new least.
    let ends = of_own.iter().chain(&of_all).map(|(at, _)| *at).filter(|at| (least..=most).contains(at));
    let mut candidates: Vec<u64> = ends.chain([least, most]).collect();
    candidates.sort_unstable();
    candidates.dedup();
    let (mut waited, mut from) = (0.0, least);
    let mut best = (f64::INFINITY, even);
    for at in candidates {
        // Waiting up to `least` is common to all.
        waited += chance(from) * (at - from) as f64 * f64::from(costs.net_permille) / 1000.0;
        from = at;
        let loss = waited + chance(at) * costs.move_lost_ms as f64;
        if loss < best.0 {
            best = (loss, at);
        }
    }
    best.1
}

/// Where a guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It has the memory that it needs.
    Calm,
    /// It lacks memory, and others lend theirs.
    Waiting {
        /// Since when, in milliseconds.
        since_ms: u64,
        /// For how long it is waited.
        threshold_ms: u64,
    },
    /// It is being moved.
    Moving,
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Nothing new.
    Nothing,
    /// Pages that do not fit go to memory of other hosts.
    Borrow,
    /// They are given back.
    GiveBack,
    /// Move it to a host with room.
    Move,
}

/// The guests of a fleet, by number.
#[derive(Debug, Clone, Default)]
pub struct Overloads {
    guests: Vec<(State, Profile)>,
    all: Profile,
}

impl Overloads {
    /// So many guests, of which nothing is known.
    #[must_use]
    pub fn new(guests: usize) -> Self {
        Self { guests: vec![(State::Calm, Profile::default()); guests], all: Profile::default() }
    }

    /// A guest's profile.
    #[must_use]
    pub fn profile(&self, guest: usize) -> Option<&Profile> {
        self.guests.get(guest).map(|(_, profile)| profile)
    }

    /// A guest's state.
    #[must_use]
    pub fn state(&self, guest: usize) -> Option<State> {
        self.guests.get(guest).map(|(state, _)| *state)
    }

    /// A guest was looked at: it lacks memory, or does not. Guests that are not there are ignored; a time that goes back counts as none.
    pub fn look(&mut self, guest: usize, now_ms: u64, is_overloaded: bool, costs: &Costs) -> Act {
        let Some((state, own)) = self.guests.get_mut(guest) else { return Act::Nothing };
        match (*state, is_overloaded) {
            (State::Calm, true) => {
                let threshold_ms = if own.ever % ONE_IN == ONE_IN - 1 {
                    costs.break_even_ms().saturating_mul(2)
                } else {
                    threshold_ms(own, &self.all, costs)
                };
                *state = State::Waiting { since_ms: now_ms, threshold_ms };
                Act::Borrow
            }
            (State::Waiting { since_ms, .. }, false) => {
                *state = State::Calm;
                let past = Past { lasted_ms: now_ms.saturating_sub(since_ms), is_whole: true };
                own.add(past, OWN);
                self.all.add(past, ALL);
                Act::GiveBack
            }
            (State::Waiting { since_ms, threshold_ms }, true) if now_ms.saturating_sub(since_ms) >= threshold_ms => {
                *state = State::Moving;
                let past = Past { lasted_ms: now_ms.saturating_sub(since_ms), is_whole: false };
                own.add(past, OWN);
                self.all.add(past, ALL);
                Act::Move
            }
            _ => Act::Nothing,
        }
    }

    /// A guest's move is over: done (it has the room that it needs), or given up (an overload that goes on counts from now).
    pub fn moved(&mut self, guest: usize) {
        if let Some((state @ State::Moving, _)) = self.guests.get_mut(guest).map(|(state, profile)| (state, profile)) {
            *state = State::Calm;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const COSTS: Costs = Costs { net_permille: 300, move_lost_ms: 30_000 };

    fn profile(past: &[(u64, bool)]) -> Profile {
        let mut profile = Profile::default();
        for (s, is_whole) in past {
            profile.add(Past { lasted_ms: s * 1000, is_whole: *is_whole }, OWN);
        }
        profile
    }

    #[test]
    fn the_chance_to_last_counts_what_was_cut_short_as_at_least() {
        let steps = profile(&[(1, true), (2, false), (3, true), (4, true)]).lasting();
        assert_eq!(steps.len(), 3);
        for ((at, chance), (expected_at, expected)) in steps.iter().zip([(1000, 0.75), (3000, 0.375), (4000, 0.0)]) {
            assert!(*at == expected_at && (chance - expected).abs() < 1e-12, "{steps:?}");
        }
        assert_eq!(chance_at(&steps, 999), 1.0);
    }

    #[test]
    fn a_guest_whose_overloads_pass_is_waited_for_longer_than_one_whose_do_not() {
        let none = Profile::default();
        assert_eq!(COSTS.break_even_ms(), 100_000);
        assert_eq!(threshold_ms(&none, &none, &COSTS), 100_000, "nothing known: the break-even");
        let passing = profile(&[(130, true); 40]);
        assert_eq!(threshold_ms(&passing, &none, &COSTS), 130_000, "over at 130 s, each time");
        let lasting = profile(&[(100, false); 40]);
        assert_eq!(threshold_ms(&lasting, &none, &COSTS), 100_000, "as soon as is allowed");
        assert_eq!(threshold_ms(&none, &passing, &COSTS), 130_000, "a new guest is like the others");
        assert_eq!(threshold_ms(&lasting, &passing, &COSTS), 100_000, "its own counts more");
    }

    #[test]
    fn an_overload_is_waited_out_or_ended_by_a_move() {
        let mut guests = Overloads::new(1);
        let mut look = |s: u64, is_overloaded| guests.look(0, s * 1000, is_overloaded, &COSTS);
        assert_eq!(look(0, false), Act::Nothing);
        assert_eq!((look(1, true), look(50, true), look(60, false)), (Act::Borrow, Act::Nothing, Act::GiveBack));
        assert_eq!((look(100, true), look(400, true), look(401, true)), (Act::Borrow, Act::Move, Act::Nothing));
        assert_eq!(look(402, false), Act::Nothing, "the move goes on");
        guests.moved(0);
        assert_eq!((guests.state(0), guests.profile(0).map(Profile::len)), (Some(State::Calm), Some(2)));
        assert_eq!(guests.look(7, 0, true, &COSTS), Act::Nothing);
        guests.moved(7);
    }

    proptest! {
        /// Whatever was seen, and however long the next overload lasts: at most three times what knowing its length costs.
        #[test]
        fn no_overload_costs_more_than_three_times_the_least(
            own in prop::collection::vec((0u64..10_000, any::<bool>()), 0..40),
            all in prop::collection::vec((0u64..10_000, any::<bool>()), 0..40),
            net in 1u32..=1000, lost in 1000u64..1_000_000, lasts in 0u64..100_000_000,
        ) {
            let costs = Costs { net_permille: net, move_lost_ms: lost };
            let threshold = threshold_ms(&profile(&own), &profile(&all), &costs);
            let paid = if lasts < threshold { costs.waiting_ms(lasts) } else { costs.waiting_ms(threshold) + lost };
            let least = costs.waiting_ms(lasts).min(lost);
            prop_assert!(paid <= 3 * least + 3, "{paid} against {least}, threshold {threshold}");
        }
    }
}
