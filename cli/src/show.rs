//! Printing results and following operations.

use std::{io::IsTerminal as _, time::Duration};

use serde::Serialize;
use supercloud_api::{Operation, Phase, client::Client};
use supercloud_cli::{fields, progress::Bar, table::Table, yaml};

use crate::{
    arguments::{Output, Watch},
    exit::{OperationFailed, WatchLeft},
    names,
};

/// The longest that a watched operation is followed: a day.
const WATCH_BUDGET: Duration = Duration::from_secs(86_400);

/// Prints JSON, or a table made of it.
pub fn print<T: Serialize + ?Sized>(output: Output, value: &T, table: impl FnOnce() -> Table) -> anyhow::Result<()> {
    match output {
        Output::Table => print!("{}", table().render()),
        Output::Wide => print!("{}", table().render_wide()),
        // Fields in the order of the type.
        Output::Json => println!("{}", serde_json::to_string_pretty(value)?),
        Output::Ndjson | Output::Yaml => print_value(output, &serde_json::to_value(value)?)?,
    }
    Ok(())
}

/// Prints what REST answered; where a table was asked for, as JSON.
pub fn print_value(output: Output, value: &serde_json::Value) -> anyhow::Result<()> {
    match (output, value) {
        (Output::Ndjson, serde_json::Value::Array(items)) => items.iter().for_each(|item| println!("{item}")),
        (Output::Ndjson, one) => println!("{one}"),
        (Output::Yaml, value) => print!("{}", yaml::render(value)),
        (Output::Json | Output::Table | Output::Wide, value) => println!("{}", serde_json::to_string_pretty(value)?),
    }
    Ok(())
}

/// Prints one thing: JSON as it is, or a line per field.
pub fn print_one<T: Serialize>(output: Output, value: &T) -> anyhow::Result<()> {
    print_fields(output, &serde_json::to_value(value)?, &fields::Names::new())
}

/// Prints one thing; for people with the names of what it refers to.
pub async fn print_named<T: Serialize>(client: &Client, output: Output, value: &T) -> anyhow::Result<()> {
    let value = serde_json::to_value(value)?;
    let names = if output.is_for_people() { names::of_ids_in(client, &value).await } else { fields::Names::new() };
    print_fields(output, &value, &names)
}

fn print_fields(output: Output, value: &serde_json::Value, names: &fields::Names) -> anyhow::Result<()> {
    match value {
        serde_json::Value::Object(_) if output.is_for_people() => print!("{}", fields::render_named(value, names)),
        _ => print_value(output, value)?,
    }
    Ok(())
}

/// Follows an accepted operation as asked for, and prints what came of it.
pub async fn follow(client: &Client, output: Output, operation: Operation, watch: Watch) -> anyhow::Result<()> {
    if client.is_trying() {
        return print_one(output, &operation);
    }
    let is_watched = watch.watch || (!watch.no_watch && std::io::stdout().is_terminal());
    if !is_watched {
        match output {
            Output::Table | Output::Wide => println!("{}", operation.id),
            _ => print_one(output, &operation)?,
        }
        return Ok(());
    }
    let ended = watch_operation(client, operation).await?;
    if !output.is_for_people() {
        print_one(output, &ended)?;
    }
    if ended.phase == Phase::Done { Ok(()) } else { Err(OperationFailed(Box::new(ended)).into()) }
}

/// Shows an operation's progress until it has ended.
pub async fn watch_operation(client: &Client, operation: Operation) -> anyhow::Result<Operation> {
    let mut bar = Bar::default();
    bar.show(&operation);
    let ended = tokio::select! {
        ended = client.wait(operation.id, WATCH_BUDGET, |state| bar.show(state)) => Some(ended),
        // Without a handler of signals it ends as any program does.
        Ok(()) = tokio::signal::ctrl_c() => None,
    };
    bar.end();
    match ended {
        Some(ended) => Ok(ended?),
        None => Err(WatchLeft(operation.id).into()),
    }
}
