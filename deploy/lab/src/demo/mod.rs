//! The demo: a running guest moves between three clouds with its disk, its address and its connections, and what its
//! peer saw of it is told at the end.
//!
//! | part | what |
//! |---|---|
//! | [`story`] | what happens, in order |
//! | [`witness`] | listens to the guests and measures silences |
//! | [`verdict`] | judges what they said |
//! | [`prices`] | finds the points of the price feed at which the policy will move |
//! | [`report`] | table and JSON |

pub mod links;
pub mod prices;
pub mod report;
pub mod story;
pub mod tell;
pub mod verdict;
pub mod witness;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use self::links::LinkOption;
use self::report::Report;
use self::story::Story;
use self::tell::Teller;
use self::verdict::Outcome;
use crate::fleet::Fleet;
use crate::interrupt::{Ended, guarded, take_down};
use crate::spec::LabSpec;

const EXAMPLES: &str = "Examples:
  supercloud-lab demo                              the whole story, then everything is cleaned up
  supercloud-lab demo --keep                       leave it up to play with
  supercloud-lab demo --nested                     in hosts that are virtual machines themselves
  supercloud-lab demo --json result.json           the table and the verdict as JSON, too
  supercloud-lab demo --links aws-east:home=80/50/0.1
  supercloud-lab demo --sabotage writes            show that the verdict can fail

Exit status: 0 when everything was measured and nothing was lost; 1 otherwise.";

/// Options of the demo.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// Leave everything up afterwards and say how to go on
    #[arg(long)]
    pub keep: bool,
    /// Also write the moves and the verdict as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Let the served guest do something wrong once, which the verdict must show
    #[arg(long, value_enum)]
    pub sabotage: Option<Sabotage>,
    /// Links that differ from the usual ones: A:B=RTT_MS/MBIT[/LOSS_PERCENT]; may be given several times
    #[arg(long, value_name = "LINK", value_delimiter = ',')]
    pub links: Vec<LinkOption>,
    /// The lab's name (that of --lab when absent)
    #[arg(long)]
    pub name: Option<String>,
    /// Hosts that are virtual machines, each of other hardware, with our own VMM in them; slow: their processors are translated
    #[arg(long)]
    pub nested: bool,
    /// One live move only
    #[arg(long)]
    pub quick: bool,
}

/// A fault that the served guest makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Sabotage {
    /// It resets its connections
    Tcp,
    /// It sends a wrong byte
    Bytes,
    /// It acknowledges a write that never reached the disk
    Writes,
    /// It reboots
    Restart,
}

impl Sabotage {
    /// The word on the guest's kernel command line.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Bytes => "bytes",
            Self::Writes => "writes",
            Self::Restart => "restart",
        }
    }
}

/// Runs the demo in the lab `name`, and cleans up whatever happens.
///
/// # Errors
/// When the runtime cannot be started or the options make no sense.
pub fn run(name: &str, options: &Options) -> anyhow::Result<ExitCode> {
    let name = options.name.clone().unwrap_or_else(|| name.to_owned());
    let mut spec = if options.nested { LabSpec::three_clouds_of_vms(&name) } else { LabSpec::three_clouds(&name) };
    if options.nested
        && let Some(why) = crate::host_vm::missing()
    {
        anyhow::bail!("--nested: {why}");
    }
    options.links.iter().for_each(|link| link.apply(&mut spec));
    spec.check()?;
    if let Some(folder) = options.json.as_deref().and_then(Path::parent)
        && !folder.as_os_str().is_empty()
        && !folder.is_dir()
    {
        anyhow::bail!("--json: there is no folder {}", folder.display());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let code = runtime.block_on(supervise(spec, options.clone()));
    // What still blocks (a lab that was just being made) has been taken down above.
    runtime.shutdown_timeout(std::time::Duration::from_secs(20));
    code
}

async fn supervise(spec: LabSpec, options: Options) -> anyhow::Result<ExitCode> {
    let name = spec.name.clone();
    match guarded(&name, tell_story(spec, options.clone())).await? {
        Ended::Done(told) => finish(&name, &options, told).await,
        Ended::Signalled(status) => Ok(ExitCode::from(status)),
    }
}

/// What the story leaves.
struct Told {
    report: Report,
    fleet: Option<Fleet>,
    failure: Option<anyhow::Error>,
}

async fn tell_story(spec: LabSpec, options: Options) -> Told {
    let mut story = Story::new(spec, options);
    let failure = story.run().await.err();
    let (report, fleet) = story.into_parts();
    Told { report, fleet, failure }
}

async fn finish(name: &str, options: &Options, told: Told) -> anyhow::Result<ExitCode> {
    let tell = Teller::default();
    let Told { report, fleet, failure } = told;
    if !report.moves.is_empty() {
        tell.say(&format!("\n{}", report.table()));
    }
    // Before the guests ran there is nothing to judge.
    if failure.is_none() || !report.moves.is_empty() {
        report.verdict_lines().iter().for_each(|line| tell.say(line));
    }
    let is_good = failure.is_none() && report.outcome() == Outcome::Good;
    tell.say(match (&failure, report.outcome()) {
        (Some(_), _) => "\nThe story did not come to its end.",
        (None, Outcome::Good) => "\nVerdict: nothing was lost.",
        (None, Outcome::Bad) => "\nVerdict: FAILED, see the numbers above.",
        (None, Outcome::Unmeasured) => "\nVerdict: FAILED, something was not measured.",
    });
    if let Some(path) = &options.json {
        report.write(path).map_err(|error| anyhow::anyhow!("cannot write {}: {error}", path.display()))?;
    }
    if let Some(error) = &failure {
        eprintln!("error: {error:#}");
    }
    match fleet {
        Some(fleet) if options.keep => {
            tell.say(&story::how_to_go_on(&fleet)?);
            fleet.keep()?;
        }
        Some(fleet) => tell.step("cleaning up", fleet.down()).await?,
        None => take_down(name).await?,
    }
    Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
