//! `supercloud apply`: makes everything as a file says. A pure planner ([`plan`]) finds the steps between what shall be
//! ([`fleet`]) and what is; they are shown, agreed to, and carried out ([`carry`]); then it is looked again, until nothing is left.

mod begun;
mod carry;
mod fleet;
mod made;
mod plan;

use std::{collections::BTreeSet, io::IsTerminal as _, path::PathBuf};

use anyhow::{Context as _, bail};
use clap::Args;
use futures::{StreamExt as _, TryStreamExt as _};
use supercloud_api::{
    Guest, ImageState, Name, OperationKind, Project,
    client::{Client, ClientConfig, ClientError},
    ids::OperationId,
};
use supercloud_cli::table::Table;

use self::{
    carry::Carrier,
    fleet::Fleet,
    made::Made,
    plan::{Action, Actual, Plan},
};
use crate::{arguments::Output, exit::NotApplied, show};

/// What follows what was waited for is looked at again so often; a fleet needs two or three.
const ROUNDS_AT_MOST: usize = 8;
/// Operations that are looked at at once.
const ASKED_AT_ONCE: usize = 8;
/// The project of what names none, as for the controller.
const DEFAULT_PROJECT: &str = "default";

/// Options of `apply`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  supercloud apply -f fleet.toml --dry-run     # what would change; exits with 6 when something would
  supercloud apply -f fleet.toml               # says what would change, asks, does it
  supercloud apply -f fleet.toml --yes --prune # also deletes what an earlier run made and the file has no more

deploy/examples/fleet.toml shows all keys. What was made is noted in fleet.toml.made.json beside the file: keep the two together.")]
pub struct ApplyArguments {
    /// What shall be there: TOML.
    #[arg(short, long)]
    pub file: PathBuf,
    /// Say what would change, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Do not ask; needed where there is no terminal to ask at.
    #[arg(short, long)]
    pub yes: bool,
    /// Delete what an earlier run of this file made and the file has no more; nothing else is ever deleted.
    #[arg(long)]
    pub prune: bool,
}

/// Makes everything as the file says.
pub async fn run(client: &Client, output: Output, arguments: &ApplyArguments) -> anyhow::Result<()> {
    let path = &arguments.file;
    let in_file = || format!("in {}", path.display());
    let text = Fleet::read(path)?;
    let said = Fleet::default_project(&text).with_context(in_file)?;
    if arguments.prune && said.is_none() {
        // Under another --project, context or token every thing of an earlier run would be one that the file has no more.
        anyhow::bail!(
            "--prune needs `default_project = \"NAME\"` in {}: without it the project at hand decides which guests are the file's",
            path.display()
        );
    }
    // The file names projects itself: listings are of all that the token sees.
    let everywhere = Client::new(ClientConfig { project: None, ..client.config().clone() })?;
    let project = match said {
        Some(project) => project,
        None => project_at_hand(client).await?,
    };
    let folder = path.parent().unwrap_or_else(|| std::path::Path::new("."));
    let fleet = Fleet::load(&text, folder, project).with_context(in_file)?;
    // Two runs of one file would each make what the other one makes, and forget what it made.
    let lock = std::fs::File::open(path).with_context(|| format!("opening {}", path.display()))?;
    lock.try_lock().with_context(|| format!("another apply of {} is under way", path.display()))?;
    let made_path = Made::path(path);
    let mut made = Made::read(&made_path)?;
    let mut changes = 0;
    for round in 0..ROUNDS_AT_MOST {
        let actual = look(&everywhere, &fleet, &made).await?;
        if round == 0 && !made.begun.is_empty() {
            begun::settle(&everywhere, &actual, &mut made).await?;
            made.write(&made_path)?;
        }
        let plan = plan::plan(&fleet, &actual, &made, arguments.prune);
        tell(output, &plan, round == 0)?;
        if !plan.refusals.is_empty() {
            return Err(NotApplied::Unchangeable(plan.refusals.len()).into());
        }
        if plan.steps.is_empty() {
            eprintln!(
                "{}",
                if changes == 0 {
                    "nothing to change".into()
                } else {
                    format!("{} done; all is as the file says", steps(changes))
                }
            );
            return Ok(());
        }
        if arguments.dry_run {
            return Err(NotApplied::WouldChange(plan.steps.len()).into());
        }
        if !arguments.yes {
            agree(plan.steps.len()).await?;
        }
        // Where what is made cannot be noted, nothing is made.
        made.write(&made_path)?;
        let mut carrier = Carrier::new(&everywhere, &fleet, &mut made, &made_path);
        tokio::select! {
            carried = carrier.carry(&plan.steps) => carried?,
            // Once somebody has listened for it, an interrupt ends nothing by itself any more.
            Ok(()) = tokio::signal::ctrl_c() => return Err(NotApplied::Interrupted.into()),
        }
        changes += plan.steps.len();
    }
    bail!("it is still not as the file says after {ROUNDS_AT_MOST} rounds; somebody else changes the same things")
}

/// The project of what the file puts in none: `--project`, the token's, or the controller's default.
async fn project_at_hand(client: &Client) -> anyhow::Result<Name> {
    if let Some(project) = &client.config().project {
        return project.parse().context("the project at hand, which must be a name here");
    }
    let found = client.whoami().await?.project_name;
    found.map_or_else(|| DEFAULT_PROJECT.parse().context("the default project"), Ok)
}

/// What is there.
async fn look(client: &Client, fleet: &Fleet, made: &Made) -> Result<Actual, ClientError> {
    let (projects, networks, images, guests, ports, volumes, hosts, clouds) = tokio::try_join!(
        client.projects(),
        client.networks(),
        client.images(),
        client.guests(),
        client.ports(),
        client.volumes(),
        client.hosts(),
        client.clouds(),
    )?;
    let mut imports = Vec::new();
    if images.iter().any(|image| image.state == ImageState::Importing) {
        let operations = client.active_operations().await?;
        let running = operations.iter().filter(|one| one.kind == OperationKind::ImageImport);
        imports.extend(running.filter_map(|one| Some((one.image?, one.id))));
    }
    let mirrors = mirrors(client, &projects, &guests, fleet, made).await?;
    Ok(Actual { projects, networks, images, guests, ports, volumes, hosts, clouds, imports, mirrors })
}

/// Which of the operations that hold guests of this file are mirrors.
async fn mirrors(
    client: &Client,
    projects: &[Project],
    guests: &[Guest],
    fleet: &Fleet,
    made: &Made,
) -> Result<BTreeSet<OperationId>, ClientError> {
    let is_ours = |guest: &Guest| {
        let project = projects.iter().find(|project| project.id == guest.project);
        let key = project.map(|project| fleet::Key { project: project.name.clone(), name: guest.name.clone() });
        made.things.contains_key(&guest.id.to_string()) || key.is_some_and(|key| fleet.has(fleet::Kind::Guest, &key))
    };
    let held: Vec<OperationId> =
        guests.iter().filter(|guest| is_ours(guest)).filter_map(|guest| guest.operation).collect();
    let operations = futures::stream::iter(held).map(|id| client.operation(id)).buffer_unordered(ASKED_AT_ONCE);
    operations
        .try_filter_map(async |operation| Ok(plan::is_standing_mirror(&operation).then_some(operation.id)))
        .try_collect()
        .await
}

/// Says what would be done: the plan as it is, or for people a line for each thing. Only the first one is the command's result.
fn tell(output: Output, plan: &Plan, is_first: bool) -> anyhow::Result<()> {
    if !output.is_for_people() {
        return if is_first { show::print_one(output, plan) } else { Ok(()) };
    }
    let mut table = Table::new(["", "WHAT", "NAME", "STEP", "DETAIL"]);
    for step in &plan.steps {
        let sign = match step.action {
            Action::Create | Action::Import { goes_on: false } => "+",
            Action::Delete => "-",
            _ => "~",
        };
        let step_words = carry::words(&step.action).to_owned();
        table.row([sign.into(), step.kind.to_string(), step.key.to_string(), step_words, step.detail.clone()]);
    }
    for refusal in &plan.refusals {
        table.row([
            "!".into(),
            refusal.kind.to_string(),
            refusal.key.to_string(),
            refusal.field.into(),
            refusal.detail.clone(),
        ]);
    }
    if !plan.steps.is_empty() || !plan.refusals.is_empty() {
        if is_first { print!("{}", table.render()) } else { eprint!("{}", table.render()) }
    }
    if is_first && !plan.kept.is_empty() {
        eprintln!("no longer in the file, and kept (--prune deletes them): {}", plan.kept.join(", "));
    }
    Ok(())
}

fn steps(count: usize) -> String {
    if count == 1 { "1 step".into() } else { format!("{count} steps") }
}

/// Asks whether to go on.
async fn agree(count: usize) -> anyhow::Result<()> {
    if !std::io::stdin().is_terminal() {
        return Err(NotApplied::NobodyToAsk.into());
    }
    eprint!("do {}? [y/N] ", steps(count));
    let answer = tokio::task::spawn_blocking(|| {
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer).map(|_| answer)
    });
    let answer = tokio::select! {
        answer = answer => answer.context("asking")?.context("reading the answer")?,
        // The thread that reads the terminal cannot be called back: the process ends with it.
        Ok(()) = tokio::signal::ctrl_c() => std::process::exit(i32::from(crate::exit::INTERRUPTED)),
    };
    if matches!(answer.trim(), "y" | "Y" | "yes") { Ok(()) } else { Err(NotApplied::NotAgreed.into()) }
}
