//! Failures with real guests: something dies, or is cut, at a moment of a move, a freeze, a thaw, a start or a stop; exactly one copy of the guest goes on, with
//! its connections and its writes, the operation ends truly, nothing is left behind, and a second attempt succeeds.
//!
//! One lab serves all cases, because it takes as long to make as some of them. Needs root and the packages of ./deploy/setup;
//! without them the test says why it does nothing.
//!
//! | environment | |
//! |---|---|
//! | `SUPERCLOUD_CASES=copy/wan,…` | these cases instead of the chosen ones ([`support::case`] and [`support::life`] have the names; `none` is none) |
//! | `SUPERCLOUD_SOAK=1` | every failure at every moment, then `SUPERCLOUD_SOAK_ROUNDS` (100) at random times |
//! | `SEED=…` | repeats the random ones; every run prints its seed |
//! | `SUPERCLOUD_LAB_KEEP=1` | leaves the lab up at the end |

mod support;

use std::fmt;
use std::str::FromStr;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};

use support::case::{Case, Dice};
use support::ground::{Ground, SEATS, is_possible};
use support::life::LifeCase;

/// The cases of the ordinary pass: each victim once, each moment at least once.
const CHOSEN: [&str; 13] = [
    "prepare/destination-agent",
    "copy/wan",
    "copy/destination-qemu",
    "copy/source-libvirtd",
    "before-switch/source-agent",
    "before-switch/controller",
    "after-switch/destination-agent",
    "after-switch/source-volume",
    "finish/destination-volume",
    "freeze-store/controller",
    "thaw/destination-agent",
    "start/destination-agent",
    "stop/source-agent",
];

/// A failure of a move, or of what is none.
#[derive(Debug, Clone, Copy)]
enum Asked {
    Move(Case),
    Life(LifeCase),
}

impl FromStr for Asked {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let life = text.parse().map(Self::Life);
        life.or_else(|_| text.parse().map(Self::Move)).map_err(anyhow::Error::msg)
    }
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Move(case) => case.fmt(f),
            Self::Life(case) => case.fmt(f),
        }
    }
}

fn asked_for() -> Result<Vec<Asked>> {
    match std::env::var("SUPERCLOUD_CASES") {
        Ok(none) if none == "none" => Ok(Vec::new()),
        Ok(list) => list.split(',').map(str::parse).collect(),
        Err(_) if is_soak() => Ok(Case::all().map(Asked::Move).chain(LifeCase::all().map(Asked::Life)).collect()),
        Err(_) => CHOSEN.into_iter().map(str::parse).collect(),
    }
}

fn is_soak() -> bool {
    std::env::var_os("SUPERCLOUD_SOAK").is_some()
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

async fn one(ground: &mut Ground, case: Asked) -> Result<()> {
    let began = Instant::now();
    let told = match case {
        Asked::Move(case) => {
            let told = ground.run_case(case).await?;
            ground.try_again().await?;
            told
        }
        // Has its second attempt within.
        Asked::Life(case) => ground.run_life_case(case).await?,
    };
    let acked = ground.check_all().await?;
    ground.say(&format!(
        "{case}: struck in {:?}, ended {:?} after {} ms; {} writes on the disk, {} s in all",
        told.seen,
        told.ended,
        told.took.as_millis(),
        acked,
        began.elapsed().as_secs()
    ));
    Ok(())
}

async fn pass(ground: &mut Ground) -> Result<()> {
    // A move in which nothing dies tells how each seat looks.
    let began = Instant::now();
    ground.move_well(SEATS[1]).await?;
    let usual_ms = u64::try_from(began.elapsed().as_millis())?;
    ground.settle_and_note(SEATS[1]).await?;
    ground.check_all().await.context("a move in which nothing dies")?;
    ground.say(&format!("a move in which nothing dies takes {usual_ms} ms"));

    if std::env::var_os("SUPERCLOUD_CASES").is_none() {
        ground.refuse_requests().await?;
        ground.refuse_a_viewer().await?;
        ground.refuse_a_small_destination().await?;
        ground.refuse_a_backing_file().await?;
        ground.refuse_a_flipped_bit().await?;
        ground.check_daemons()?;
        ground.check_all().await.context("after all that was refused")?;
    }
    for case in asked_for()? {
        one(ground, case).await.with_context(|| format!("SUPERCLOUD_CASES={case}"))?;
    }
    if is_soak() && std::env::var_os("SUPERCLOUD_CASES").is_none() {
        let clock = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
        let seed = number("SEED").unwrap_or(u64::try_from(clock)?);
        ground.say(&format!("random failures; SEED={seed} repeats them"));
        let mut dice = Dice(seed);
        for round in 0..number("SUPERCLOUD_SOAK_ROUNDS").unwrap_or(100) {
            let case = Asked::Move(dice.case(usual_ms));
            one(ground, case).await.with_context(|| format!("round {round} of SEED={seed}: {case}"))?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_guest_goes_on_whatever_dies() {
    if !is_possible() {
        return;
    }
    let mut ground = Ground::up().await.unwrap();
    if let Err(error) = pass(&mut ground).await {
        // Panics inside the ground's life, so that the logs are kept.
        panic!("{error:#}");
    }
    let leftovers = ground.down().await.unwrap();
    assert!(leftovers.is_empty(), "{leftovers:#?}");
}
