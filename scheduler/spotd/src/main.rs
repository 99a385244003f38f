//! `supercloud-spotd`: the spot-market policy daemon. A client of REST `/v1` and nothing else.

#![forbid(unsafe_code)]

mod config;
mod follow;
mod learned;
mod sun;
mod view;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use clap::Parser;
use supercloud_api::{
    Code, GuestMigrate, MemoryMode, Name, VERDICTS_AT_ONCE, VerdictsTold,
    client::{Client, ClientConfig, ClientError},
    unix_ms,
};
use tracing::{info, warn};

use crate::{
    config::{Config, PolicyName},
    follow::{Known, Verdict},
    learned::Learned,
    sun::Counted,
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
    let mut memory = Memory::default();
    loop {
        memory.reread(&arguments, &mut config).await;
        tokio::select! {
            looked = look(&config, &client, arguments.dry_run, &mut memory) => match looked {
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

/// How often rentings are learned from, and files looked at for changes.
const SLOWLY: Duration = Duration::from_secs(60);

/// What is kept from look to look. A daemon without it decides the same.
#[derive(Default)]
struct Memory {
    /// What was said last of each guest.
    said: HashMap<String, String>,
    /// What was told last, and when.
    told: Option<(Instant, Vec<supercloud_api::Verdict>)>,
    /// That the controller does not take it was said.
    said_untold: bool,
    /// That the token cannot read what is learned from was said.
    said_unlearned: bool,
    /// What was learned, and when.
    learned: Option<(Instant, Arc<Learned>)>,
    /// The counts of clients' requests.
    counted: Option<Arc<Counted>>,
    /// When the files were written that were read last.
    config_written: Option<SystemTime>,
    loads_written: Option<SystemTime>,
    looked_at_files: Option<Instant>,
}

/// When a file was written; `None`: it cannot be read.
async fn written(path: &Path) -> Option<SystemTime> {
    tokio::fs::metadata(path).await.ok()?.modified().ok()
}

impl Memory {
    /// Reads the settings and the counts again when they changed. What is wrong with them is said, and what was read before stays.
    async fn reread(&mut self, arguments: &Arguments, config: &mut Config) {
        let now = written(&arguments.config).await;
        if self.config_written.is_some() && now.is_some() && now != self.config_written {
            let path = arguments.config.clone();
            let read = tokio::task::spawn_blocking(move || Config::read(&path)).await;
            match read.unwrap_or_else(|error| Err(error.into())) {
                Ok(read) => {
                    let connection = (config.url.clone(), config.ca_file.clone(), config.token_file.clone());
                    *config = Config { policy_name: arguments.policy.unwrap_or(read.policy_name), ..read };
                    // The connection is the one that there is.
                    (config.url, config.ca_file, config.token_file) = connection;
                    self.loads_written = None;
                    self.looked_at_files = None;
                    info!(avoid = ?config.avoid, "the settings were read again; a changed url, CA or token wants a restart");
                }
                Err(error) => warn!("the settings stay as they were: {error:#}"),
            }
        }
        self.config_written = now.or(self.config_written);
        let Some(sun) = &config.sun else {
            self.counted = None;
            return;
        };
        if self.looked_at_files.is_some_and(|at| at.elapsed() < SLOWLY) {
            return;
        }
        self.looked_at_files = Some(Instant::now());
        let now = written(&sun.loads_file).await;
        if now.is_some() && now == self.loads_written {
            return;
        }
        let (sun, path) = (sun.clone(), sun.loads_file.display().to_string());
        let read = tokio::task::spawn_blocking(move || {
            let bytes = read_some(&sun.loads_file).map_err(|error| error.to_string())?;
            Counted::read(&bytes, &sun)
        });
        match read.await.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(counted) => {
                let hours = counted.period_ms().map(|ms| ms as f64 / 3_600_000.0);
                info!(file = path, period_hours = hours, "clients' requests were read");
                (self.counted, self.loads_written) = (Some(Arc::new(counted)), now);
            }
            Err(error) => warn!("clients' requests in {path} stay as they were: {error}"),
        }
    }

    /// Tells what was decided, where it has changed, or where it would soon count no more.
    async fn tell(
        &mut self,
        config: &Config,
        client: &Client,
        told: Vec<supercloud_api::Verdict>,
    ) -> Result<(), ClientError> {
        if self.told.as_ref().is_some_and(|(at, before)| at.elapsed() < SLOWLY && *before == told) {
            return Ok(());
        }
        let Ok(policy) = config.policy_name.name().parse::<Name>() else { return Ok(()) };
        for part in told.chunks(VERDICTS_AT_ONCE) {
            let body = VerdictsTold { policy: policy.clone(), items: part.to_vec() };
            match client.tell_verdicts(&body).await {
                Ok(_) => {}
                // A controller that knows none of it is told nothing: moves do not depend on it.
                Err(ClientError::Problem(problem)) => {
                    if !std::mem::replace(&mut self.said_untold, true) {
                        info!("what is decided cannot be shown by the controller: {problem}");
                    }
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        self.told = Some((Instant::now(), told));
        Ok(())
    }

    /// What is known now beside a look.
    async fn known(&mut self, config: &Config, client: &Client) -> Result<Known, ClientError> {
        let wall_ms = unix_ms();
        let learned = match self.learned.take() {
            Some((at, learned)) if at.elapsed() < SLOWLY => (at, learned),
            _ => {
                let rentings = match client.rentings().await {
                    Ok(rentings) => rentings,
                    // A token of one project: it moves that project's guests all the same.
                    Err(ClientError::Problem(problem)) if problem.code == Code::Forbidden => {
                        if !std::mem::replace(&mut self.said_unlearned, true) {
                            info!("interruptions are assumed by the settings, not learned from rentings: {problem}");
                        }
                        Vec::new()
                    }
                    Err(error) => return Err(error),
                };
                let learned = Learned::from(&rentings, config.smart_spot.prior_hours, wall_ms);
                (Instant::now(), Arc::new(learned))
            }
        };
        self.learned = Some(learned.clone());
        Ok(Known { learned: learned.1, counted: self.counted.clone(), wall_ms })
    }
}

/// A file, up to what a feed may have.
fn read_some(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(supercloud_feed::MAX_FEED_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Looks at the markets once and asks for the moves that are wanted.
async fn look(config: &Config, client: &Client, is_dry_run: bool, memory: &mut Memory) -> Result<(), ClientError> {
    let (markets, guests, hosts, operations) =
        tokio::try_join!(client.markets(), client.guests(), client.hosts(), client.operations())?;
    let known = memory.known(config, client).await?;
    let said = &mut memory.said;
    let verdicts = follow::decide(config, &markets, &guests, &hosts, &operations, &known);
    let told = follow::told(config, &markets, &guests, &hosts, &verdicts);
    for (_, verdict) in verdicts {
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
                    memory: MemoryMode::PreCopy,
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
    if is_dry_run { Ok(()) } else { memory.tell(config, client, told).await }
}
