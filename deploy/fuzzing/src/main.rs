//! `supercloud-fuzz`: runs fuzz targets for a while. `./deploy/fuzz` builds and calls it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use clap::Parser;
use supercloud_fuzz::engine::{self, Budget};
use supercloud_fuzz::targets::{TARGETS, Target};

const EXAMPLES: &str = "Examples:
  ./deploy/fuzz                          every target for 10 seconds
  ./deploy/fuzz openflow --seconds 600   one for ten minutes
  ./deploy/fuzz openflow --seed 7        the same inputs again";

/// Feeds mutated inputs to everything that reads what others wrote.
#[derive(Debug, Parser)]
#[command(version, about, after_help = EXAMPLES)]
struct Cli {
    /// Which targets; all when none is named
    targets: Vec<String>,
    /// How long each runs
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Where the random numbers begin; of the clock when it is not said
    #[arg(long)]
    seed: Option<u64>,
    /// Where inputs that do harm are kept
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus"))]
    corpus: PathBuf,
    /// Only say which targets there are
    #[arg(long)]
    list: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    if cli.list {
        for target in TARGETS {
            println!("{:<12} {}", target.name, target.about);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut chosen: Vec<&Target> = Vec::new();
    for name in &cli.targets {
        match TARGETS.iter().find(|target| target.name == name) {
            Some(target) => chosen.push(target),
            None => bail!("there is no target '{name}'; --list says which there are"),
        }
    }
    if chosen.is_empty() {
        chosen.extend(TARGETS);
    }
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let seed = cli.seed.unwrap_or(clock);
    println!("seed {seed}");
    let mut is_harmed = false;
    for target in chosen {
        match engine::run(target, seed, Budget::Time(Duration::from_secs(cli.seconds))) {
            Ok(inputs) => println!("{:<12} {inputs} inputs, no harm", target.name),
            Err(harm) => {
                is_harmed = true;
                let folder = cli.corpus.join(target.name);
                let path = folder.join(format!("{seed:x}-{}", harm.input.len()));
                std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
                std::fs::write(&path, &harm.input).with_context(|| format!("writing {}", path.display()))?;
                println!("{:<12} HARM: {}\n             kept as {}", target.name, harm.what, path.display());
            }
        }
    }
    Ok(if is_harmed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
