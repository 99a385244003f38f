//! `supercloud`: the operator's command.

#![forbid(unsafe_code)]

mod apply;
mod arguments;
mod console;
mod contexts;
mod direct;
mod exit;
mod explain;
mod exports;
mod goodness;
mod groups;
mod guests;
mod histories;
mod ledger;
mod links;
mod listings;
mod mirrors;
mod names;
mod plans;
mod rentings;
mod screen;
mod settings;
mod show;
mod simulate;
mod things;
mod top;
mod uploads;
mod values;
mod verbs;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::FromArgMatches as _;
use supercloud_api::client::{Client, ClientError, is_worth_a_retry};

use crate::arguments::{Arguments, Noun};

/// `supercloud ... | head` ends like any command when nobody reads on: Rust ignores SIGPIPE and has `println!` panic instead.
fn end_quietly_without_a_reader() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let said = panic.payload().downcast_ref::<String>().map_or("", String::as_str);
        if said.starts_with("failed printing to stdout") && said.contains("Broken pipe") {
            std::process::exit(i32::from(exit::NO_READER));
        }
        usual(panic);
    }));
}

fn main() -> ExitCode {
    end_quietly_without_a_reader();
    let matches = verbs::command().get_matches();
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    // Nothing but computing: no runtime, no controller.
    if let Noun::Simulate(simulate) = &arguments.noun {
        return match simulate::run(simulate, arguments.output) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => exit::tell(&error),
        };
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: no runtime: {error}");
            return ExitCode::from(exit::FAULT);
        }
    };
    match runtime.block_on(run(arguments, &matches)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::tell(&error),
    }
}

async fn run(arguments: Arguments, matches: &clap::ArgMatches) -> anyhow::Result<()> {
    if let Noun::Completion { shell } = arguments.noun {
        clap_complete::generate(shell, &mut verbs::command(), "supercloud", &mut std::io::stdout());
        return Ok(());
    }
    if let Noun::Explain { path } = &arguments.noun {
        return explain::run(path.as_deref());
    }
    if let Noun::Man { folder } = &arguments.noun {
        std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        return clap_mangen::generate_to(verbs::command(), folder)
            .with_context(|| format!("writing manual pages to {}", folder.display()));
    }
    if let Noun::Context(verb) = arguments.noun {
        return contexts::run(arguments.output, &arguments.connection, verb);
    }
    let asked = verbs::Asked::of(matches);
    let client = arguments.connection.client()?;
    if let Some(pause) = asked.again {
        return again(&client, matches, pause).await;
    }
    if asked.is_trial {
        once(&client.trying(), arguments).await?;
        eprintln!("only tried: nothing was done");
        return Ok(());
    }
    once(&client, arguments).await
}

/// Without an answer for so long, it is told how old the last one is; then each second.
const OVERDUE: std::time::Duration = std::time::Duration::from_secs(3);

/// The same again and again, until somebody ends it. A terminal shows the newest answer only.
async fn again(client: &Client, matches: &clap::ArgMatches, pause: std::time::Duration) -> anyhow::Result<()> {
    let mut screen = screen::Screen::take().context("catching what is printed")?;
    loop {
        let mut asked = std::pin::pin!(once(client, Arguments::from_arg_matches(matches)?));
        let mut patience = OVERDUE;
        let outcome = loop {
            tokio::select! {
                outcome = &mut asked => break outcome,
                () = tokio::time::sleep(patience) => screen.keep(None)?,
            }
            patience = std::time::Duration::from_secs(1);
        };
        match outcome {
            Ok(()) => screen.show()?,
            // It may be back the next time.
            Err(error) if error.downcast_ref::<ClientError>().is_some_and(is_worth_a_retry) => {
                screen.keep(Some(&format!("{error:#}")))?;
            }
            Err(error) => return Err(error),
        }
        tokio::time::sleep(pause).await;
    }
}

async fn once(client: &Client, arguments: Arguments) -> anyhow::Result<()> {
    let output = arguments.output;
    match arguments.noun {
        Noun::Api(call) => direct::run(client, output, call).await,
        Noun::Top(wanted) => top::run(client, &wanted).await,
        Noun::Apply(wanted) => apply::run(client, output, &wanted).await,
        Noun::Guest(verb) => guests::run(client, output, verb).await,
        Noun::Group(verb) => groups::run(client, output, verb).await,
        Noun::Console { name, read_only } => console::run(client, &name, read_only).await,
        other => things::run(client, output, other).await,
    }
}
