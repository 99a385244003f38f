//! The process that serves one volume on one host; started by the agent, which it outlives.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Parser;
use supercloud_agent::{accounts::Account, confinement};
use supercloud_storage::process::{self, VolumeProcessConfig};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Serves one volume: an NBD socket for the guest, a control socket for the agent, a peer socket for other hosts.
///
/// Started by supercloud-agent. SIGTERM makes everything acknowledged durable and leaves.
#[derive(Debug, Parser)]
#[command(name = "supercloud-volume", version)]
struct Arguments {
    /// The configuration, JSON.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// The user to become once configuration and key are read, when started as root
    #[arg(long, requires = "gid")]
    uid: Option<u32>,
    /// Its group
    #[arg(long, requires = "uid")]
    gid: Option<u32>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr).init();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let config = VolumeProcessConfig::from_file(&arguments.config)?;
    let key = config.key.read()?;
    let user = arguments.uid.zip(arguments.gid).map(|(uid, gid)| Account { uid, gid });
    // Before the first thread, and before anything that others send is looked at.
    confinement::confine(user)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("no runtime can be made")?;
    runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let mut term = signal(SignalKind::terminate()).context("SIGTERM cannot be taken")?;
        // A terminal's Ctrl-C is not for a process that serves a running guest's disk.
        let _ignored = signal(SignalKind::interrupt()).context("SIGINT cannot be taken")?;
        let serving = process::run(config, key, shutdown.clone());
        tokio::pin!(serving);
        tokio::select! {
            ended = &mut serving => return Ok(ended?),
            _ = term.recv() => shutdown.cancel(),
        }
        Ok(serving.await?)
    })
}
