//! Printing results and following operations.

use std::{io::IsTerminal as _, time::Duration};

use serde::Serialize;
use supercloud_api::{Operation, Phase, client::Client};
use supercloud_cli::{progress::Bar, table::Table};

use crate::{
    OperationFailed,
    arguments::{Output, Watch},
};

/// The longest that a watched operation is followed: a day.
const WATCH_BUDGET: Duration = Duration::from_secs(86_400);

/// Prints JSON, or a table made of it.
pub fn print<T: Serialize + ?Sized>(output: Output, value: &T, table: impl FnOnce() -> Table) -> anyhow::Result<()> {
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(value)?),
        Output::Table => print!("{}", table().render()),
    }
    Ok(())
}

/// Prints one thing: JSON as it is, or a `key: value` line per field.
pub fn print_one<T: Serialize>(output: Output, value: &T) -> anyhow::Result<()> {
    let value = serde_json::to_value(value)?;
    match (output, &value) {
        (Output::Table, serde_json::Value::Object(fields)) => {
            let width = fields.keys().map(String::len).max().unwrap_or(0);
            for (key, value) in fields {
                let text = match value {
                    serde_json::Value::String(text) => text.clone(),
                    serde_json::Value::Null => "-".into(),
                    other => other.to_string(),
                };
                println!("{key:<width$}  {text}");
            }
        }
        _ => println!("{}", serde_json::to_string_pretty(&value)?),
    }
    Ok(())
}

/// Follows an accepted operation as asked for, and prints what came of it.
pub async fn follow(client: &Client, output: Output, operation: Operation, watch: Watch) -> anyhow::Result<()> {
    let is_watched = watch.watch || (!watch.no_watch && std::io::stdout().is_terminal());
    if !is_watched {
        match output {
            Output::Json => println!("{}", serde_json::to_string_pretty(&operation)?),
            Output::Table => println!("{}", operation.id),
        }
        return Ok(());
    }
    let ended = watch_operation(client, operation).await?;
    if output == Output::Json {
        println!("{}", serde_json::to_string_pretty(&ended)?);
    }
    if ended.phase == Phase::Done { Ok(()) } else { Err(OperationFailed(Box::new(ended)).into()) }
}

/// Shows an operation's progress until it has ended.
pub async fn watch_operation(client: &Client, operation: Operation) -> anyhow::Result<Operation> {
    let mut bar = Bar::default();
    bar.show(&operation);
    let ended = client.wait(operation.id, WATCH_BUDGET, |state| bar.show(state)).await;
    bar.end();
    Ok(ended?)
}
