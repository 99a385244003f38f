//! `supercloud-spotd`: the spot-market policy daemon. A client of REST `/v1` and nothing else.

#![forbid(unsafe_code)]

mod config;
mod follow;
mod view;

use std::{collections::HashMap, path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::Parser;
use supercloud_api::{
    GuestMigrate,
    client::{Client, ClientConfig, ClientError},
};
use tracing::{info, warn};

use crate::{
    config::{Config, PolicyName},
    follow::Verdict,
};

/// Follows spot prices: moves guests that may follow prices to where a policy wants them.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:\n  supercloud-spotd --config /etc/supercloud/spotd.toml\n  supercloud-spotd --config spotd.toml --once --dry-run   # what would be moved now, and why"
)]
struct Arguments {
    /// The settings (TOML).
    #[arg(long, env = "SUPERCLOUD_SPOTD_CONFIG")]
    config: PathBuf,
    /// Which policy decides, instead of the settings' `policy_name` (`cheapest` without it).
    #[arg(long, value_enum)]
    policy: Option<PolicyName>,
    /// Look once and leave.
    #[arg(long)]
    once: bool,
    /// Say what would be moved; move nothing.
    #[arg(long)]
    dry_run: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()))
        .with_writer(std::io::stderr)
        .init();
    let mut config = Config::read(&arguments.config)?;
    config.policy_name = arguments.policy.unwrap_or(config.policy_name);
    let client = client(&config)?;
    info!(
        url = config.url,
        tenure = follow::tenure_name(config.tenure),
        policy = ?config.policy_name,
        "following prices"
    );
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut said = HashMap::new();
    loop {
        tokio::select! {
            looked = look(&config, &client, arguments.dry_run, &mut said) => match looked {
                Ok(()) => {}
                Err(error) if arguments.once => return Err(error.into()),
                Err(error) => warn!("{error}; trying again"),
            },
            _ = terminate.recv() => break,
            _ = tokio::signal::ctrl_c() => break,
        }
        if arguments.once {
            break;
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(config.poll_ms)) => {}
            _ = terminate.recv() => break,
            _ = tokio::signal::ctrl_c() => break,
        }
    }
    Ok(())
}

fn client(config: &Config) -> anyhow::Result<Client> {
    let read = |path: &PathBuf| std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()));
    Ok(Client::new(ClientConfig {
        url: config.url.clone(),
        token: Some(read(&config.token_file)?.trim().to_owned()),
        ca_pem: config.ca_file.as_ref().map(read).transpose()?,
        project: None,
    })?)
}

/// Looks at the markets once and asks for the moves that are wanted.
async fn look(
    config: &Config,
    client: &Client,
    is_dry_run: bool,
    said: &mut HashMap<String, String>,
) -> Result<(), ClientError> {
    let (markets, guests, hosts, operations) =
        tokio::try_join!(client.markets(), client.guests(), client.hosts(), client.operations())?;
    for verdict in follow::decide(config, &markets, &guests, &hosts, &operations) {
        match verdict {
            Verdict::Stay { name, why } => {
                // Said once, and again when it changes.
                if said.get(&name) != Some(&why) {
                    info!(guest = name, "stays: {why}");
                    said.insert(name, why);
                }
            }
            Verdict::Move(wanted) if is_dry_run => {
                info!(guest = wanted.name, to = wanted.to, "would move: {}", wanted.reason)
            }
            Verdict::Move(wanted) => {
                let body = GuestMigrate {
                    to: wanted.to.as_str().into(),
                    bandwidth_bps: None,
                    max_downtime_ms: None,
                    auto_converge: true,
                    deadline_ms: None,
                    reason: Some(wanted.reason.clone()),
                };
                match client.migrate_guest(&wanted.guest.to_string(), &body).await {
                    Ok(operation) => {
                        info!(guest = wanted.name, to = wanted.to, operation = %operation.id, "{}", wanted.reason);
                        said.remove(&wanted.name);
                    }
                    // One guest's refusal must not keep the others from being looked at.
                    Err(ClientError::Problem(problem)) => warn!(guest = wanted.name, "not moved: {problem}"),
                    Err(error) => return Err(error),
                }
            }
        }
    }
    Ok(())
}
