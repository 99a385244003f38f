//! `supercloud-agent`: runs guests on this host, for its controller.

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use supercloud_agent::{
    agent::{self, AgentError, Parts},
    config::{BackEnd, Config},
    durable,
    identity::Identity,
    join, overlay_key,
    ports::{NoSwitch, OvsSwitch, Switch},
};
use supercloud_api::OverlayEncryption;
use supercloud_blanket::{
    Backend,
    probe::{self, ProbeReport},
};
use supercloud_kvm::{KvmBackend, KvmConfig};
use supercloud_libvirt::{Accelerator, LibvirtBackend, LibvirtConfig};
use supercloud_sdn::switch::{SwitchConfig, SwitchDriver, drop_other_tunnels};
use supercloud_storage::{backend::depsky::CloudOfClouds, volume::FetchLimit};
use supercloud_xen::{XenBackend, XenConfig};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// How long the probe may measure.
const PROBE_BUDGET: Duration = Duration::from_secs(5);
/// The pause after the switch could not be opened.
const SWITCH_RETRY: Duration = Duration::from_secs(2);
/// How often mending says how far it is.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// The exit status of an agent whose host was removed: starting it again is of no use.
const REMOVED: u8 = 77;

/// Runs guests on this host, for its controller.
///
/// SIGTERM ends the agent; guests, their disks and their network go on without it.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:\n  supercloud-agent --config /etc/supercloud/agent.toml\n  supercloud-agent probe\n\nThe first \
                  start needs join_token_file in the configuration: the token is what `supercloud host join-token \
                  NAME --cloud CLOUD` printed."
)]
struct Arguments {
    /// The configuration, TOML.
    #[arg(long, value_name = "FILE", default_value = "/etc/supercloud/agent.toml")]
    config: PathBuf,
    /// Tunnels between hosts may go unencrypted: the underlay is trusted (as insecure_overlay = true). Better: [wireguard].
    #[arg(long)]
    insecure_overlay: bool,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Measures what this host can offer to guests, prints it as JSON, and ends.
    Probe,
    /// Looks at every object of the configuration's cloud of clouds, puts anew what a store of it lacks or has wrong, says what was
    /// done, and ends. So is a store filled that takes another's place. Guests and agents go on meanwhile.
    MendStore {
        /// At most so many megabytes per second
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
        megabytes_per_s: Option<u32>,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr)
        .init();
    let done = match arguments.verb {
        Some(Verb::Probe) => print_probe(),
        Some(Verb::MendStore { megabytes_per_s }) => mend_store(&arguments, megabytes_per_s),
        None => run(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            match error.downcast_ref() {
                Some(AgentError::Removed { .. }) => ExitCode::from(REMOVED),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn print_probe() -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(&probe::probe(PROBE_BUDGET))?);
    Ok(())
}

fn mend_store(arguments: &Arguments, megabytes_per_s: Option<u32>) -> anyhow::Result<()> {
    let config = read_config(arguments)?;
    let clouds = config.cloud_of_clouds.as_ref().context("the configuration has no [cloud_of_clouds]")?;
    let store = CloudOfClouds::open(clouds)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no runtime can be made")?;
    let limit = FetchLimit::default();
    limit.set(megabytes_per_s.map(|megabytes| u64::from(megabytes) * 1_000_000));
    let mut told = Instant::now();
    let mended = runtime.block_on(store.mend_all(&limit, |mending| {
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            tracing::info!(mending.objects, mending.bytes, mending.mended, "mending");
        }
    }));
    for member in store.members() {
        let wrong = member.last_wrong.as_deref().unwrap_or("nothing");
        println!(
            "{}: {} pieces put anew, {} requests failed, {} answers were wrong (the last: {wrong})",
            member.name, member.mended, member.failed, member.wrong
        );
    }
    let mended = mended.context("not all of the store could be looked at")?;
    println!(
        "{} objects, {} bytes: {} pieces put anew, {} not, since their store does not answer; {} objects cannot be read (what a \
         write or deletion that did not end has left, if nothing is lost)",
        mended.objects, mended.bytes, mended.mended, mended.unanswered, mended.unreadable
    );
    if let Some(why) = mended.shortfall() {
        anyhow::bail!(why);
    }
    Ok(())
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut config = read_config(arguments)?;
    config.insecure_overlay |= arguments.insecure_overlay;
    supercloud_api::tls::install_provider();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no runtime can be made")?;
    let done = runtime.block_on(work(config));
    // A call into the hypervisor's library may hang; it must not keep the agent from leaving.
    runtime.shutdown_timeout(Duration::from_secs(2));
    done
}

fn read_config(arguments: &Arguments) -> anyhow::Result<Config> {
    if arguments.insecure_overlay {
        // The flag stands for a line of the file, which is checked as a whole.
        let path = &arguments.config;
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the configuration {}", path.display()))?;
        let mut config: Config =
            toml::from_str(&text).with_context(|| format!("the configuration {} is malformed", path.display()))?;
        config.insecure_overlay = true;
        config.check()?;
        return Ok(config);
    }
    Ok(Config::from_file(&arguments.config)?)
}

async fn work(config: Config) -> anyhow::Result<()> {
    let cancel = CancellationToken::new();
    let mut term = signal(SignalKind::terminate()).context("SIGTERM cannot be taken")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be taken")?;
    let living = live(config, cancel.clone());
    tokio::pin!(living);
    tokio::select! {
        ended = &mut living => return ended,
        _ = term.recv() => {}
        _ = interrupt.recv() => {}
    }
    cancel.cancel();
    living.await
}

async fn live(config: Config, cancel: CancellationToken) -> anyhow::Result<()> {
    let Some(identity) = unless(&cancel, identity(&config)).await.transpose()? else { return Ok(()) };
    let report = tokio::task::spawn_blocking(|| probe::probe(PROBE_BUDGET)).await.context("the probe died")?;
    tracing::info!(substrate = ?report.substrate, "probed");
    let Some(switch) = unless(&cancel, open_switch(&config, &identity)).await else { return Ok(()) };
    let Some(backend) = unless(&cancel, open_backend(&config, &report)).await.transpose()? else { return Ok(()) };
    let probe = serde_json::to_value(&report)?;
    agent::run(Parts { config, identity, backend, switch, probe }, cancel).await?;
    Ok(())
}

async fn unless<T>(cancel: &CancellationToken, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        () = cancel.cancelled() => None,
        done = work => Some(done),
    }
}

/// The identity that is kept, or the one that joining gives.
async fn identity(config: &Config) -> anyhow::Result<Identity> {
    let folder = config.data_dir.clone();
    let kept = tokio::task::spawn_blocking(move || {
        durable::make_passage(&folder)?;
        Identity::load(&folder).map_err(anyhow::Error::from)
    })
    .await
    .context("a worker died")??;
    if let Some(identity) = kept {
        return Ok(identity);
    }
    let path = config
        .join_token_file
        .as_ref()
        .context("this host has not joined yet, and the configuration names no join_token_file")?;
    let token = tokio::fs::read_to_string(path)
        .await
        .with_context(|| format!("cannot read the join token {}", path.display()))?;
    tracing::info!(controller = config.controller_url, "joining");
    let identity = join::join(&config.controller_url, &token, config.ca_file.as_deref()).await?;
    let (kept, folder) = (identity.clone(), config.data_dir.clone());
    tokio::task::spawn_blocking(move || kept.save(&folder)).await.context("a worker died")??;
    tracing::info!(host = %identity.host, "joined");
    Ok(identity)
}

async fn open_switch(config: &Config, identity: &Identity) -> Arc<dyn Switch> {
    let Some(switch) = config.switch(identity.host) else {
        tracing::warn!("no overlay_address is configured: guests here have no networks");
        return Arc::new(NoSwitch);
    };
    loop {
        match open_driver(config, switch.clone()).await {
            Ok((driver, encryption)) => return Arc::new(OvsSwitch::new(driver, identity.host, encryption)),
            Err(error) => {
                tracing::warn!("the switch is not there yet: {error:#}");
                tokio::time::sleep(SWITCH_RETRY).await;
            }
        }
    }
}

async fn open_driver(
    config: &Config,
    mut switch: SwitchConfig,
) -> anyhow::Result<(SwitchDriver, Option<OverlayEncryption>)> {
    drop_other_tunnels(&switch, config.wireguard.is_some()).await?;
    let (device, encryption) = overlay_key::load(config).await?.unzip();
    switch.encryption = device;
    Ok((SwitchDriver::open(switch).await?, encryption))
}

async fn open_backend(config: &Config, report: &ProbeReport) -> anyhow::Result<Arc<dyn Backend>> {
    match config.back_end {
        BackEnd::Libvirt => Ok(Arc::new(LibvirtBackend::new(libvirt_config(config, report)))),
        BackEnd::Kvm => {
            if !report.substrate.runs_plain_guests() {
                tracing::warn!(substrate = ?report.substrate, "guests will hardly run: this host's /dev/kvm is not what it should be");
            }
            let asked = config.clone();
            let account =
                tokio::task::spawn_blocking(move || asked.qemu_account()).await.context("a worker died")??;
            let run_dir = config.run_dir.join("vmm");
            let kvm = KvmConfig::new(config.vmm_program(), run_dir, (account.uid, account.gid));
            Ok(Arc::new(KvmBackend::open(kvm).await.context("back end 'kvm' cannot be used")?))
        }
        BackEnd::Xen => {
            let xen = XenConfig::new(config.xen_program(), config.run_dir.join("xen"));
            Ok(Arc::new(XenBackend::open(xen).await.context("back end 'xen' cannot be used")?))
        }
    }
}

fn libvirt_config(config: &Config, report: &ProbeReport) -> LibvirtConfig {
    let mut libvirt = LibvirtConfig::system(Accelerator::from_probe(report));
    libvirt.uri.clone_from(&config.libvirt_uri);
    if let Some(folder) = &config.libvirt_pid_dir {
        libvirt.pid_dir = Some(folder.clone());
    }
    libvirt
}
