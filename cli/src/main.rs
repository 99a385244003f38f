//! `supercloud`: the operator's command.

#![forbid(unsafe_code)]

mod arguments;
mod direct;
mod explain;
mod guests;
mod ledger;
mod rentings;
mod settings;
mod show;
mod simulate;
mod things;
mod values;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser as _};
use supercloud_api::{Operation, client::ClientError};

use crate::arguments::{Arguments, Noun};

/// An operation that did not end as it should.
#[derive(Debug)]
struct OperationFailed(Box<Operation>);

impl std::fmt::Display for OperationFailed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Operation { id, phase, .. } = &*self.0;
        write!(f, "operation {id} ended as {}", supercloud_cli::progress::phase_name(*phase))?;
        match self.0.failure() {
            Some(problem) => write!(f, ": {}", problem.detail),
            None => Ok(()),
        }
    }
}

impl std::error::Error for OperationFailed {}

/// `supercloud ... | head` ends like any command when nobody reads on: Rust ignores SIGPIPE and has `println!` panic instead.
fn end_quietly_without_a_reader() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let said = panic.payload().downcast_ref::<String>().map_or("", String::as_str);
        if said.starts_with("failed printing to stdout") && said.contains("Broken pipe") {
            // As the shell tells of a process that SIGPIPE ended.
            std::process::exit(141);
        }
        usual(panic);
    }));
}

fn main() -> ExitCode {
    end_quietly_without_a_reader();
    let arguments = Arguments::parse();
    // Nothing but computing: no runtime, no controller.
    if let Noun::Simulate(simulate) = &arguments.noun {
        return match simulate::run(simulate, arguments.output) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: {error:#}");
                ExitCode::from(1)
            }
        };
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: no runtime: {error}");
            return ExitCode::from(1);
        }
    };
    match runtime.block_on(run(arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(exit_code(&error))
        }
    }
}

/// The documented exit codes.
fn exit_code(error: &anyhow::Error) -> u8 {
    if error.downcast_ref::<OperationFailed>().is_some() {
        return 4;
    }
    if error.downcast_ref::<show::WatchLeft>().is_some() {
        // As the shell tells of a process that SIGINT ended.
        return 130;
    }
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Problem(problem)) => {
            if problem.retryable {
                eprintln!("hint: this may pass by itself; try again later");
            }
            3
        }
        _ => 1,
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    if let Noun::Completion { shell } = arguments.noun {
        clap_complete::generate(shell, &mut Arguments::command(), "supercloud", &mut std::io::stdout());
        return Ok(());
    }
    if let Noun::Explain { path } = &arguments.noun {
        return explain::run(path.as_deref());
    }
    if let Noun::Man { folder } = &arguments.noun {
        std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        return clap_mangen::generate_to(Arguments::command(), folder)
            .with_context(|| format!("writing manual pages to {}", folder.display()));
    }
    let client = arguments.connection.client()?;
    let output = arguments.output;
    match arguments.noun {
        Noun::Api(call) => direct::run(&client, output, call).await,
        Noun::Guest(verb) => guests::run(&client, output, verb).await,
        other => things::run(&client, output, other).await,
    }
}
