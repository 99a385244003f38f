//! Long random runs: more operations, more faults, and a network that really loses what it loses. Each run ends with the
//! faults switched off and the network empty; then everything must come to rest, and one more operation must succeed.
//!
//! `SUPERCLOUD_HANDOVER_SEED` runs one seed and prints its way, `SUPERCLOUD_HANDOVER_RUNS` sets how many are run.

use supercloud_handover::{OperationKind, Owner, Phase, WhenOpen};

use crate::world::{Action, FREEZES, Faults, HOSTS, Model, Mutation, Scenario, World, freeze, host};

/// SplitMix64 (Steele, Lea, Flood 2014): good enough to choose by, and the same on every machine.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % sides as u64) as usize
    }
}

struct Run {
    model: Model,
    world: World,
    /// Sent and not yet delivered.
    pool: Vec<usize>,
    way: Vec<String>,
    verbose: bool,
    deadlines: usize,
}

impl Run {
    fn new(seed: u64, dice: &mut Dice, mutation: Option<Mutation>, verbose: bool) -> Self {
        let mut freezes = 0;
        let mut kinds = Vec::new();
        for _ in 0..8 {
            let to = host(dice.roll(HOSTS));
            kinds.push(match dice.roll(12) {
                10 | 11 => OperationKind::Mirror { to },
                0..=3 => OperationKind::Migrate { to, post_copy: dice.roll(3) == 0 },
                4 if freezes < FREEZES => {
                    freezes += 1;
                    OperationKind::Freeze { freeze: freeze(freezes - 1) }
                }
                5 | 6 => OperationKind::Thaw { freeze: freeze(freezes.saturating_sub(1)), to },
                7 => OperationKind::Stop,
                8 => OperationKind::RestartFromVolume { to },
                _ => OperationKind::Start { to },
            });
        }
        let faults = Faults {
            crashes: dice.roll(5) as u8,
            reboots: dice.roll(2) as u8,
            kills: u8::from(dice.roll(4) == 0),
            cancels: dice.roll(3) as u8,
            glitches: dice.roll(3) as u8,
        };
        let running = dice.roll(3) != 0;
        let scenario = Scenario {
            name: "random",
            running,
            kinds,
            faults,
            writes: 6,
            forgetful: true,
            coarse: false,
            leased: false,
            mutation,
        };
        let mut model = Model::new(scenario);
        model.lossy = true;
        let world = model.initial();
        if verbose {
            println!("seed {seed}: {:?}", model.scenario);
        }
        Self { model, world, pool: Vec::new(), way: Vec::new(), verbose, deadlines: 0 }
    }

    /// Whether the action was possible.
    fn apply(&mut self, action: Action) -> Result<bool, String> {
        let text = self.model.describe_action(action);
        let next = self.model.apply(&self.world, action);
        self.pool.append(&mut self.model.sent);
        let next = next.map_err(|text_of| format!("{text_of}, by {text}"))?;
        let Some(next) = next else { return Ok(false) };
        if next != self.world {
            if self.verbose {
                println!("  {text}");
            }
            self.way.push(text);
        }
        self.world = next;
        Ok(true)
    }

    fn one_random_step(&mut self, dice: &mut Dice) -> Result<(), String> {
        if !self.pool.is_empty() && dice.roll(3) > 0 {
            // Old messages are rare among many new ones: prefer neither.
            let at = dice.roll(self.pool.len());
            let message = self.pool[at];
            match dice.roll(10) {
                0 => drop(self.pool.swap_remove(at)),
                1 => drop(self.apply(Action::Deliver(message, WhenOpen::Abort))?),
                2 => {
                    self.pool.swap_remove(at);
                    self.apply(Action::Deliver(message, WhenOpen::Wait))?;
                }
                _ => {
                    self.pool.swap_remove(at);
                    self.apply(Action::Deliver(message, WhenOpen::Abort))?;
                }
            }
            return Ok(());
        }
        let mut actions = self.model.actions(&self.world);
        actions.push(Action::Nudge);
        let action = actions[dice.roll(actions.len())];
        // Rare, so that operations get somewhere.
        if action.is_fault() && !matches!(action, Action::Begin | Action::Write(_)) && dice.roll(12) > 0 {
            return Ok(());
        }
        if !self.apply(action)? && action == Action::Begin {
            self.model.skip(&mut self.world);
        }
        Ok(())
    }

    /// Everybody does what he can, in turn, and nothing goes wrong.
    fn come_to_rest(&mut self) -> Result<(), String> {
        for round in 0..200 {
            if self.model.is_settled(&self.world) {
                return Ok(());
            }
            // The agents' own deadlines: who waits for a peer that has nothing (more) to give says so in the end.
            if round % 20 == 19 {
                self.deadlines += 1;
                for n in 0..HOSTS {
                    for action in self.model.deadlines(&self.world, n) {
                        self.apply(action)?;
                    }
                }
            }
            for n in 0..HOSTS {
                for action in self.model.actions(&self.world) {
                    match action {
                        Action::Restart(m)
                        | Action::Converge(m)
                        | Action::SourcePaused(m)
                        | Action::StateReceived(m)
                        | Action::LocalMaps(m)
                        | Action::StreamBroken(m)
                        | Action::NothingMissing(m)
                        | Action::MemoryServed(m)
                        | Action::Stalled(m)
                        | Action::NoteLost(m)
                            if m == n =>
                        {
                            self.apply(action)?;
                        }
                        Action::LeavePlan | Action::EndMirror => drop(self.apply(action)?),
                        _ => {}
                    }
                }
                self.work_off(n)?;
            }
            for message in std::mem::take(&mut self.pool) {
                self.apply(Action::Deliver(message, WhenOpen::Abort))?;
                for n in 0..HOSTS {
                    self.work_off(n)?;
                }
            }
            if self.model.scenario.mutation != Some(Mutation::NobodyAsksAgain) {
                self.apply(Action::Nudge)?;
                for n in 0..HOSTS {
                    if self.model.actions(&self.world).contains(&Action::Tick(n)) {
                        self.apply(Action::Tick(n))?;
                    }
                }
            }
        }
        Err("does not come to rest".to_owned())
    }

    fn work_off(&mut self, n: usize) -> Result<(), String> {
        while self.model.actions(&self.world).contains(&Action::Execute(n)) {
            self.apply(Action::Execute(n))?;
        }
        Ok(())
    }

    /// Whether one more operation was there to be tried.
    fn second_attempt(&mut self) -> Result<bool, String> {
        let record = self.model.record(&self.world).clone();
        if matches!(record.owner, Owner::Host(_)) && !record.holders.is_empty() {
            // It misses blocks that died with a host, and says so.
            return Ok(false);
        }
        let to = host(
            (0..HOSTS)
                .find(|n| self.model.is_alive(&self.world, *n) && record.owner != Owner::Host(host(*n)))
                .ok_or("all hosts are dead")?,
        );
        let kind = match record.owner {
            Owner::Host(_) => OperationKind::Migrate { to, post_copy: false },
            Owner::Frozen(freeze) => OperationKind::Thaw { freeze, to },
            Owner::Lost(_) => OperationKind::RestartFromVolume { to },
            Owner::Unowned | Owner::Stopped => OperationKind::Start { to },
        };
        // A guest that was stopped where a host died since has its blocks nowhere.
        if record.owner == Owner::Stopped && record.holders.iter().any(|holder| holder.lost) {
            return Ok(false);
        }
        self.model.scenario.kinds.push(kind);
        while self.model.unbegun(&self.world) > 1 {
            self.model.skip(&mut self.world);
        }
        if !self.apply(Action::Begin)? {
            return Err(format!("{kind:?} cannot begin"));
        }
        self.come_to_rest()?;
        let last = self.model.record(&self.world).last;
        match last.map(|last| last.phase) {
            Some(Phase::Done) => Ok(true),
            // From what only dead hosts held nothing complete can be made.
            _ if self.world.used.kills > 0 => Ok(false),
            phase => Err(format!("the second attempt ended as {phase:?}")),
        }
    }
}

#[derive(Debug, Default)]
struct Seen {
    runs: usize,
    steps: usize,
    done: usize,
    rolled_back: usize,
    failed: usize,
    lost: usize,
    second_attempts: usize,
    deadlines: usize,
}

fn run(seed: u64, mutation: Option<Mutation>, verbose: bool, seen: &mut Seen) -> Result<(), String> {
    let mut dice = Dice(seed);
    let mut run = Run::new(seed, &mut dice, mutation, verbose);
    let mut last = None;
    let outcome = (|| {
        for _ in 0..100 + dice.roll(1500) {
            run.one_random_step(&mut dice)?;
            let ended = run.model.record(&run.world).last;
            if ended != last {
                last = ended;
                match ended.map(|ended| ended.phase) {
                    Some(Phase::Done) => seen.done += 1,
                    Some(Phase::RolledBack) => seen.rolled_back += 1,
                    _ => seen.failed += 1,
                }
            }
        }
        // What is under way when the faults end is lost: only those who ask again get on.
        run.pool.clear();
        run.come_to_rest()?;
        seen.lost += usize::from(run.world.lost);
        seen.second_attempts += usize::from(run.second_attempt()?);
        Ok(())
    })();
    seen.runs += 1;
    seen.deadlines += run.deadlines;
    seen.steps += run.way.len();
    outcome.map_err(|text: String| {
        let tail: Vec<_> = run.way.iter().rev().take(60).rev().cloned().collect();
        format!("seed {seed}: {text}\n{}\n{}", tail.join("\n"), run.model.describe(&run.world))
    })
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn random_runs_come_to_rest() {
    let mut seen = Seen::default();
    let (first, runs, verbose) = match number("SUPERCLOUD_HANDOVER_SEED") {
        Some(seed) => (seed, 1, true),
        None => (1, number("SUPERCLOUD_HANDOVER_RUNS").unwrap_or(10_000), false),
    };
    println!("seeds {first}..{}", first + runs);
    for seed in first..first + runs {
        if let Err(text) = run(seed, None, verbose, &mut seen) {
            panic!("{text}");
        }
    }
    println!("{seen:?}");
    if runs >= 1000 {
        let Seen { done, rolled_back, failed, lost, second_attempts, .. } = seen;
        for (what, count) in [
            ("done", done),
            ("rolled back", rolled_back),
            ("failed", failed),
            ("lost", lost),
            ("tried again", second_attempts),
        ] {
            assert!(count > 0, "no operation was {what}: the runs prove little");
        }
    }
}

#[test]
fn mutants_are_caught_by_chance_too() {
    for mutation in [
        Mutation::NobodyAsksAgain,
        Mutation::NoEpochCheck,
        Mutation::SwitchGrantedTwice,
        Mutation::ResumesBeforeGrant,
        Mutation::SourceResumesByItself,
        Mutation::AbortDoesNotBlock,
        Mutation::FreezeThawsTwice,
        Mutation::PersistsTooLate,
        Mutation::SourceReleasedAtSwitch,
        Mutation::MapsBeforeSeal,
    ] {
        let seed = (1..2000).find(|seed| run(*seed, Some(mutation), false, &mut Seen::default()).is_err());
        println!("{mutation:?} caught by seed {seed:?}");
        assert!(seed.is_some(), "{mutation:?} was not caught");
    }
}
