//! `supercloud-controller`: the controller's process.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Parser;
use supercloud_controller::{
    app::{Config, Controller},
    renting::Providers,
};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

const EXAMPLES: &str = "\
A minimal settings file:
  data_dir = \"/var/lib/supercloud\"
  names = [\"controller.example\"]     # in the certificate; the first one is told to agents and guests

Everything else has a default:
  listen = \"0.0.0.0:8443\"                # REST, https
  link_listen = \"0.0.0.0:8444\"           # agents
  link_address = \"controller.example:8444\"
  plain_http = false                     # true: REST without TLS, only on a loopback address
  store = \"sled\"                         # or { etcd = [\"http://127.0.0.1:2379\"] } where built with --features etcd
  log = \"info\"                           # as RUST_LOG, which goes before it
  log_json = false
  [[providers]]                          # who rents hosts to us; clouds name it: cloud create home --provider rack
  name = \"rack\"
  driver = \"static\"                      # own machines: renting one reserves it and shows a join token
  machines = [{ address = \"192.0.2.7\", type = \"big\", vcpus = 8, memory_gib = 32, usd_per_hour = \"0.05\" }]
  [feed]                                 # a price feed to replay
  file = \"/etc/supercloud/feed.csv\"
  start_ms = 0
  speed = 60.0

First steps:
  supercloud-controller --config /etc/supercloud/controller.toml
  # The name in the URL is one of `names`, and known to this machine (DNS or /etc/hosts).
  export SUPERCLOUD_URL=https://controller.example:8443 SUPERCLOUD_CA=/var/lib/supercloud/ca.pem
  export SUPERCLOUD_TOKEN_FILE=/var/lib/supercloud/admin.token
  supercloud cloud create home && supercloud host join-token h1 --cloud home";

/// Supercloud's controller: REST, state, operations and the links to the agents.
#[derive(Debug, Parser)]
// The settings in it are to be copied: not wrapped.
#[command(version, after_help = EXAMPLES, term_width = 0)]
struct Arguments {
    /// The settings file (TOML).
    #[arg(long, value_name = "FILE", env = "SUPERCLOUD_CONTROLLER_CONFIG")]
    config: PathBuf,
    /// Only check the settings file.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("supercloud-controller: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let config = Config::read(&arguments.config)?;
    let filter = match std::env::var("RUST_LOG") {
        Ok(filter) => EnvFilter::try_new(filter).context("in RUST_LOG")?,
        Err(_) => EnvFilter::try_new(&config.log).context("in the settings: log")?,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    if arguments.check {
        // Clients of providers are made in a runtime; none of them is asked anything.
        runtime.block_on(async { Providers::open(&config.providers).map(drop) })?;
        println!("{}: good", arguments.config.display());
        return Ok(());
    }
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if config.log_json {
        log.json().init();
    } else {
        log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init();
    }
    runtime.block_on(serve(config))
}

async fn serve(config: Config) -> anyhow::Result<()> {
    // Before anything that takes time, so that an early signal is not lost.
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let data_dir = config.data_dir.clone();
    let controller = tokio::select! {
        started = Controller::start(config) => started?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    tracing::info!(
        rest = %controller.rest_address,
        ca = %data_dir.join("ca.pem").display(),
        admin_token = %data_dir.join("admin.token").display(),
        "the controller serves"
    );
    let failed = tokio::select! {
        _ = terminate.recv() => false,
        _ = interrupt.recv() => false,
        () = controller.stopped() => true,
    };
    tracing::info!("the controller ends");
    tokio::select! {
        () = controller.shutdown() => {}
        // Asked a second time: at once. Nothing acknowledged is lost.
        _ = interrupt.recv() => anyhow::bail!("ended before everything was closed"),
    }
    anyhow::ensure!(!failed, "a part of the controller failed; see the log");
    Ok(())
}
