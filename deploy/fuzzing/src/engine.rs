//! Runs a target over mutated inputs until it does harm, or the time is over.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::memory::{CAP_BYTES, take_largest};
use crate::mutate::{Random, mutate};
use crate::targets::Target;

/// One input may take as long on a busy machine.
pub const SLOW: Duration = Duration::from_secs(5);
/// Inputs that are kept to be mutated further.
const POOL: usize = 256;

/// Held while an input is tried: what is asked for is counted for the whole process, and must be this input's alone.
static TRIAL: Mutex<()> = Mutex::new(());

/// When to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Budget {
    /// After so many inputs.
    Rounds(u64),
    /// After this time.
    Time(Duration),
}

/// What an input did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Harm {
    /// The input.
    pub input: Vec<u8>,
    /// What.
    pub what: String,
}

/// Tries one input; one at a time, whoever asks.
pub fn try_one(target: &Target, input: &[u8]) -> Option<Harm> {
    let harm = |what: String| Some(Harm { input: input.to_vec(), what });
    let trial = TRIAL.lock().unwrap_or_else(PoisonError::into_inner);
    let _before = take_largest();
    let began = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    let (took, largest) = (began.elapsed(), take_largest());
    drop(trial);
    if let Err(panic) = outcome {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        return harm(format!("panicked: {}", text.unwrap_or_default()));
    }
    if took > SLOW {
        return harm(format!("took {} ms", took.as_millis()));
    }
    if largest > CAP_BYTES {
        return harm(format!("asked for {largest} bytes at once"));
    }
    None
}

/// Runs a target from a seed; gives the number of inputs, or the first that does harm.
///
/// # Errors
/// The harm.
pub fn run(target: &Target, seed: u64, budget: Budget) -> Result<u64, Box<Harm>> {
    let mut random = Random::new(seed);
    let seeds = (target.seeds)();
    for input in &seeds {
        if let Some(harm) = try_one(target, input) {
            return Err(Box::new(harm));
        }
    }
    let mut pool = seeds.clone();
    let began = Instant::now();
    let mut round = 0;
    loop {
        let is_over = match budget {
            Budget::Rounds(rounds) => round >= rounds,
            Budget::Time(time) => began.elapsed() >= time,
        };
        if is_over {
            return Ok(round);
        }
        round += 1;
        let mut input = match pool.is_empty() {
            true => Vec::new(),
            false => pool[random.below(pool.len())].clone(),
        };
        mutate(&mut random, &mut input, &seeds);
        if let Some(harm) = try_one(target, &input) {
            return Err(Box::new(harm));
        }
        // Now and then one is mutated further; the seeds themselves stay.
        if random.below(16) == 0 {
            if pool.len() < POOL {
                pool.push(input);
            } else if pool.len() > seeds.len() {
                let at = seeds.len() + random.below(pool.len() - seeds.len());
                pool[at] = input;
            }
        }
    }
}
