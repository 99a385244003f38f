//! Second copies of running guests: begun, and looked at.

use std::{io::IsTerminal as _, time::Duration};

use anyhow::bail;
use supercloud_api::{Fencing, GuestMirror, Mirror, MirrorMode, Phase, client::Client};
use supercloud_cli::table::{Table, bytes, duration};

use crate::{arguments::Output, names, show};

/// How often it is asked how far the first copy is.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// Begins a mirror and waits, where people look on, until its standby has a whole cut.
///
/// # Errors
/// When it cannot be begun, or ends before it has one.
pub async fn begin(
    client: &Client,
    output: Output,
    guest: &str,
    body: &GuestMirror,
    waits: bool,
) -> anyhow::Result<()> {
    let operation = client.mirror_guest(guest, body).await?;
    if !output.is_for_people() {
        return show::print_one(output, &operation);
    }
    if !waits || !std::io::stdout().is_terminal() {
        println!("{}", operation.id);
        return Ok(());
    }
    let mut last = String::new();
    loop {
        let now = client.operation(operation.id).await?;
        if now.phase.is_terminal() {
            let why = now.error.map_or_else(|| "it was ended".to_owned(), |problem| problem.detail);
            bail!("the mirror ended before it had a whole cut: {why}");
        }
        let standing = now.progress.mirror.unwrap_or_default();
        if now.phase == Phase::Copy && standing.committed > 0 {
            println!("{guest} has a standby that could take over; the mirror goes on by itself until you end it:");
            println!("  supercloud operation cancel {}", operation.id);
            return Ok(());
        }
        if now.progress.message != last && !now.progress.message.is_empty() {
            last.clone_from(&now.progress.message);
            println!("{last}");
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// Lists a guest's mirrors.
///
/// # Errors
/// When they cannot be had.
pub async fn list(client: &Client, output: Output, guest: &str) -> anyhow::Result<()> {
    let mirrors = client.mirrors(guest).await?;
    let names = names::of_ids_in(client, &serde_json::to_value(&mirrors)?).await;
    show::print(output, &mirrors, || {
        let mut table =
            Table::new(["FROM", "TO", "MODE", "FENCING", "STATE", "CUT", "AGE", "PAUSE", "WRITTEN", "OPERATION"]);
        for mirror in &mirrors {
            let host = |id: Option<supercloud_api::ids::HostId>| {
                id.map_or_else(
                    || "-".to_owned(),
                    |id| names.get(&id.to_string()).cloned().unwrap_or_else(|| id.to_string()),
                )
            };
            let mode = match mirror.mode {
                MirrorMode::Async => "async",
                MirrorMode::Strict => "strict",
            };
            table.row([
                host(mirror.source),
                host(mirror.destination),
                mode.to_owned(),
                fencing(mirror),
                state(mirror).to_owned(),
                mirror.standing.committed.to_string(),
                duration(mirror.standing.committed_age_ms),
                duration(mirror.standing.pause_ms),
                bytes(mirror.standing.dirty_bytes),
                mirror.operation.to_string(),
            ]);
        }
        table
    })
}

fn fencing(mirror: &Mirror) -> String {
    match (mirror.fencing, mirror.lease_ms) {
        (Fencing::Lease, Some(lease_ms)) => format!("lease {}", duration(lease_ms)),
        (Fencing::Lease, None) => "lease".to_owned(),
        (Fencing::Manual, _) => "manual".to_owned(),
    }
}

const fn state(mirror: &Mirror) -> &'static str {
    if mirror.is_failing_over {
        "taking over"
    } else if mirror.is_protected {
        "protected"
    } else {
        "first copy"
    }
}
