//! Replays traces against the policies: what a move would have cost, with each of them and with one that knows the future.
//!
//! A move copies blocks from [`Move::begin_ms`] on, and the guest runs at the destination from [`Move::switch_ms`] on. The line
//! carries one block after the other; a block that the guest waits for goes before all others and takes a round trip more.
//! The guest's own time does not stretch while it waits (the same touches come at the same times in every run), and the line
//! carries nothing else. Blocks of the base are in the cloud's store and are no part of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{
    History, Spare, Tuning, plan_ahead, plan_rest,
    trace::{Event, Touch, Trace},
};
use crate::BLOCK_BYTES;

/// The pause of a pass that found nothing to send.
const IDLE_MS: f64 = 500.0;
/// How much is planned at once by `predictive`.
const PLANNED_MS: f64 = 500.0;
/// The clock's beginning, so that there is a time before it.
const EPOCH_MS: u64 = 1 << 33;

/// Which policy moves the blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Policy {
    /// Nothing before the switch.
    OnDemand,
    /// All, again and again.
    HotStandby,
    /// See [`super`].
    Predictive(Tuning),
    /// Knows when a block is written for the last time before the switch, and when it is touched after it.
    Clairvoyant,
}

/// The line between the two hosts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Line {
    /// What it carries.
    pub bytes_per_s: u64,
    /// How long a question and its answer take.
    pub rtt_ms: f64,
}

impl Line {
    fn block_ms(&self) -> f64 {
        BLOCK_BYTES as f64 * 1000.0 / self.bytes_per_s.max(1) as f64
    }
}

/// When a guest moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// Blocks may be copied from here on.
    pub begin_ms: u64,
    /// The guest runs at the destination.
    pub switch_ms: u64,
}

/// What a move cost.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Outcome {
    /// Bytes of blocks sent before the switch.
    pub bytes_before: u64,
    /// And after it.
    pub bytes_after: u64,
    /// How often the guest had to wait for a block.
    pub remote_reads: u64,
    /// For how long, all together.
    pub stall_ms: f64,
    /// From the switch until nothing was missing.
    pub independent_ms: f64,
}

impl Outcome {
    /// All bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes_before + self.bytes_after
    }
}

/// The future, as the clairvoyant sees it.
struct Future {
    /// The last write before the switch.
    last_write: HashMap<u32, f64>,
    /// The first touch after it.
    first_touch: HashMap<u32, (u64, Touch)>,
}

impl Future {
    fn of(trace: &Trace, when: Move) -> Self {
        let (mut last_write, mut first_touch) = (HashMap::new(), HashMap::new());
        for event in &trace.events {
            if event.at_ms >= when.switch_ms {
                first_touch.entry(event.block).or_insert((event.at_ms, event.touch));
            } else if event.touch != Touch::Read {
                last_write.insert(event.block, event.at_ms as f64);
            }
        }
        Self { last_write, first_touch }
    }

    /// What is overwritten before it is read need never travel.
    fn is_needed(&self, block: u32) -> bool {
        self.first_touch.get(&block).is_none_or(|(_, touch)| *touch != Touch::Fill)
    }

    fn deadline(&self, block: u32) -> u64 {
        self.first_touch.get(&block).map_or(u64::MAX, |(at_ms, _)| *at_ms)
    }
}

struct Run<'a> {
    line: Line,
    when: Move,
    policy: Policy,
    future: Future,
    events: std::iter::Peekable<std::slice::Iter<'a, Event>>,
    history: History,
    spare: Spare,
    /// Blocks that differ from the base, with their versions.
    source: BTreeMap<u32, u64>,
    destination: HashMap<u32, u64>,
    outcome: Outcome,
}

/// Replays one move.
#[must_use]
pub fn replay(trace: &Trace, line: Line, when: Move, policy: Policy) -> Outcome {
    let source = trace.changed.iter().flat_map(|(first, len)| *first..first + len).map(|block| (block, 0)).collect();
    let mut run = Run {
        line,
        when,
        policy,
        future: Future::of(trace, when),
        events: trace.events.iter().peekable(),
        history: History::default(),
        spare: Spare::default(),
        source,
        destination: HashMap::new(),
        outcome: Outcome::default(),
    };
    run.before();
    run.after();
    run.outcome
}

impl Run<'_> {
    /// The guest's touches up to a moment, at the source.
    fn live_until(&mut self, now: f64) {
        while let Some(event) =
            self.events.next_if(|event| (event.at_ms as f64) <= now && event.at_ms < self.when.switch_ms)
        {
            if event.touch == Touch::Read {
                self.history.read(event.block, EPOCH_MS + event.at_ms);
            } else {
                self.history.wrote(event.block, EPOCH_MS + event.at_ms);
                *self.source.entry(event.block).or_default() += 1;
            }
        }
    }

    fn lacking(&self) -> Vec<u32> {
        let lacks = |(block, version): (&u32, &u64)| (self.destination.get(block) != Some(version)).then_some(*block);
        self.source.iter().filter_map(lacks).collect()
    }

    /// What is to be sent next, before the switch.
    fn pass(&mut self, now: f64) -> Vec<u32> {
        let lacking = self.lacking();
        let clock = EPOCH_MS + now as u64;
        let at_once = (PLANNED_MS / self.line.block_ms()).ceil() as usize;
        match self.policy {
            Policy::OnDemand => Vec::new(),
            Policy::HotStandby => lacking,
            Policy::Predictive(tuning) => {
                let spare = self.spare.take(clock, self.line.bytes_per_s, &tuning);
                let plan = plan_ahead(&self.history, &lacking, clock, &tuning, self.line.bytes_per_s, spare);
                self.spare.used(plan.spare.len());
                // The spare ones too: else they would wait behind what fills the line for long.
                let room = at_once.max(1);
                let plan: Vec<u32> = plan.spare.into_iter().chain(plan.now).take(room).collect();
                plan
            }
            Policy::Clairvoyant => {
                let is_final = |block: &u32| self.future.last_write.get(block).is_none_or(|last| *last <= now);
                let needed = |block: &u32| is_final(block) && self.future.is_needed(*block);
                let mut blocks: Vec<u32> = lacking.into_iter().filter(needed).collect();
                blocks.sort_by_key(|block| (self.future.deadline(*block), *block));
                blocks.truncate(at_once.max(1));
                blocks
            }
        }
    }

    fn before(&mut self) {
        let (mut now, end) = (self.when.begin_ms as f64, self.when.switch_ms as f64);
        self.live_until(now);
        while now < end {
            let pass = self.pass(now);
            if pass.is_empty() {
                now += IDLE_MS;
                self.live_until(now);
            }
            for block in pass {
                if now + self.line.block_ms() > end {
                    now = end;
                    break;
                }
                let version = self.source.get(&block).copied();
                // What the source has when it is asked.
                assert_ne!(self.destination.get(&block).copied(), version, "block {block} is sent again unchanged");
                self.destination.insert(block, version.unwrap_or_default());
                self.outcome.bytes_before += BLOCK_BYTES as u64;
                now += self.line.block_ms();
                self.live_until(now);
            }
        }
        self.live_until(end);
    }

    fn after(&mut self) {
        let missing = self.lacking();
        let begin = self.when.switch_ms as f64;
        let order = match self.policy {
            Policy::OnDemand | Policy::HotStandby => missing.clone(),
            Policy::Predictive(tuning) => plan_rest(&self.history, &missing, EPOCH_MS + self.when.switch_ms, &tuning),
            Policy::Clairvoyant => {
                let mut order = missing.clone();
                // What will be overwritten comes last: it may not have to come at all.
                order.sort_by_key(|block| (!self.future.is_needed(*block), self.future.deadline(*block), *block));
                order
            }
        };
        let mut missing: BTreeSet<u32> = missing.into_iter().collect();
        let mut order = order.into_iter();
        // When the line is free again.
        let mut free = begin;
        let events: Vec<Event> = self.events.by_ref().copied().collect();
        let block_ms = self.line.block_ms();
        let mut send = |missing: &mut BTreeSet<u32>, free: &mut f64, until: f64, outcome: &mut Outcome| {
            while !missing.is_empty() && *free + block_ms <= until {
                let Some(block) = order.next() else { return };
                if missing.remove(&block) {
                    *free += block_ms;
                    outcome.bytes_after += BLOCK_BYTES as u64;
                    outcome.independent_ms = *free - begin;
                }
            }
        };
        for event in events {
            let now = event.at_ms as f64;
            send(&mut missing, &mut free, now, &mut self.outcome);
            if missing.is_empty() || !missing.remove(&event.block) {
                continue;
            }
            if event.touch != Touch::Fill {
                self.outcome.remote_reads += 1;
                self.outcome.stall_ms += self.line.rtt_ms + block_ms;
                self.outcome.bytes_after += BLOCK_BYTES as u64;
                free = free.max(now) + block_ms;
                self.outcome.independent_ms = free - begin;
            }
        }
        send(&mut missing, &mut free, f64::MAX, &mut self.outcome);
        assert!(missing.is_empty(), "all blocks come in the end");
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::trace::{Kind, generate},
        *,
    };

    const LINE: Line = Line { bytes_per_s: 12_500_000, rtt_ms: 40.0 };
    const WHEN: Move = Move { begin_ms: 120_000, switch_ms: 160_000 };

    #[test]
    fn nobody_sends_less_or_stalls_less_than_who_knows_the_future() {
        for (kind, seed) in Kind::ALL.into_iter().zip(1..) {
            let trace = generate(kind, seed);
            let of = |policy| replay(&trace, LINE, WHEN, policy);
            let best = of(Policy::Clairvoyant);
            for policy in [Policy::OnDemand, Policy::HotStandby, Policy::Predictive(Tuning::default())] {
                let outcome = of(policy);
                assert!(outcome.bytes() >= best.bytes(), "{kind:?} {policy:?}: {outcome:?}, at best {best:?}");
                assert!(outcome.stall_ms >= best.stall_ms, "{kind:?} {policy:?}: {outcome:?}, at best {best:?}");
            }
            let nothing = of(Policy::OnDemand);
            assert_eq!(nothing.bytes_before, 0);
            assert!(nothing.remote_reads > 0 || kind == Kind::Boot);
        }
    }

    #[test]
    fn a_small_move_is_counted_by_hand() {
        let event = |at_ms, touch, block| Event { at_ms, touch, block };
        let trace = Trace {
            blocks: 10,
            changed: vec![(0, 3)],
            events: vec![
                event(0, Touch::Write, 5),
                event(1_500, Touch::Write, 5),
                event(9_900, Touch::Write, 5),
                event(10_000, Touch::Read, 5),
                event(10_000, Touch::Fill, 1),
                event(10_000, Touch::Read, 0),
            ],
        };
        // One block in 100 ms.
        let line = Line { bytes_per_s: 655_360, rtt_ms: 40.0 };
        let when = Move { begin_ms: 1_000, switch_ms: 10_000 };
        let of = |policy| replay(&trace, line, when, policy);
        let block = BLOCK_BYTES as u64;
        let none = of(Policy::OnDemand);
        assert_eq!((none.bytes_before, none.bytes_after, none.remote_reads), (0, 3 * block, 2));
        assert_eq!((none.stall_ms, none.independent_ms), (280.0, 300.0));
        // 0, 1, 2, 5 at once, 5 again after the second write, and after the switch.
        let all = of(Policy::HotStandby);
        assert_eq!((all.bytes_before, all.bytes_after, all.remote_reads), (5 * block, block, 1));
        let best = of(Policy::Clairvoyant);
        assert_eq!((best.bytes_before, best.bytes_after, best.remote_reads), (2 * block, block, 1));
    }
}
