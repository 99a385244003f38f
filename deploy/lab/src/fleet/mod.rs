//! A lab with our control plane in it: controller, agents, clouds, a project, and what a test or demo does with them.
//!
//! ```no_run
//! # use supercloud_lab::{LabSpec, fleet::{Fleet, FleetError, FleetSpec, GuestSpec}};
//! # async fn trial() -> Result<(), FleetError> {
//! let fleet = Fleet::up(FleetSpec::new(LabSpec::three_clouds("trial"))).await?;
//! fleet.import_lean_image("lean").await?;
//! fleet.create_network("lan", "10.20.0.0/24").await?;
//! let web = fleet.create_guest(&GuestSpec::new("web", "lean", "lan", "sc.role=server").at("aws-east")).await?;
//! let done = fleet.migrate(&web.name.to_string(), "home", |operation| println!("{:?}", operation.phase)).await?;
//! fleet.down().await
//! # }
//! ```
//!
//! Every wait has a deadline, and every error says which log to read, with its last lines. A fleet that is dropped takes its lab
//! down, unless [`Fleet::keep`] was called.

pub mod config;
pub mod console;
pub mod error;
pub mod programs;
mod work;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use supercloud_api::client::{Client, ClientConfig, ClientError};
use supercloud_api::{
    CloudCreate, Host, HostState, JoinTokenCreate, Name, ProjectCreate, Role, TokenCreate, ids::GuestId,
};
use supercloud_scheduler::price::CheapestWithHysteresis;

pub use config::FeedStart;
pub use console::{ClientStats, Console, Heard, Said, ServerStats, TravellerStats};
pub use error::{FleetError, LogTail, LogTails};
pub use work::GuestSpec;

use crate::host_init::ProcessSpec;
use crate::lab::{Lab, LabError, program_dir};
use crate::site::Site;
use crate::spec::{CONTROLLER, LabSpec};
use crate::state;

/// The generated price feed that is shipped; its model stands in its head.
pub const FEED: &str = include_str!("../../feed/three-markets.csv");

/// The project that guests belong to.
pub const PROJECT: &str = "demo";

/// How long a daemon may take to come up on a loaded machine.
const DAEMON_BUDGET: Duration = Duration::from_secs(60);
/// How many times longer everything may take where hosts are VMs that are translated.
const VM_PATIENCE: u32 = 5;
/// How often the first process of such a host is asked.
const VM_LOOK_EVERY: Duration = Duration::from_secs(2);
/// How often something is looked at that cannot be waited for.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(100);

type Result<T, E = FleetError> = std::result::Result<T, E>;

/// What a fleet is made from.
#[derive(Debug, Clone)]
pub struct FleetSpec {
    /// The lab.
    pub lab: LabSpec,
    /// How the shipped price feed is replayed; by default its clock stands at the start.
    pub feed: FeedStart,
    /// What controller and agents log, in the syntax of `RUST_LOG`.
    pub log: String,
}

impl FleetSpec {
    /// Defaults for a lab.
    #[must_use]
    pub fn new(lab: LabSpec) -> Self {
        let log = std::env::var("RUST_LOG").unwrap_or_else(|_| "info".to_owned());
        Self { lab, feed: FeedStart { start_ms: 0, speed: 0.0 }, log }
    }
}

/// A lab with controller and agents.
#[derive(Debug)]
pub struct Fleet {
    lab: Arc<Lab>,
    log: String,
    admin: Client,
    client: Client,
}

impl Fleet {
    /// Starts everything and waits until all hosts are up: [`Fleet::start_lab`], then [`Fleet::join_hosts`].
    ///
    /// # Errors
    /// When a part does not come up; what was made until then is taken down again.
    pub async fn up(spec: FleetSpec) -> Result<Self> {
        let fleet = Self::start(spec).await?;
        fleet.join_hosts().await?;
        Ok(fleet)
    }

    /// Starts the lab and the controller in it, and makes clouds, project and tokens known; no agent yet.
    ///
    /// # Errors
    /// As [`Fleet::up`].
    pub async fn start(spec: FleetSpec) -> Result<Self> {
        let lab = Self::start_lab(spec.lab.clone()).await?;
        Self::start_controller(lab, &spec).await
    }

    /// The lab alone.
    ///
    /// # Errors
    /// As [`Lab::start`].
    pub async fn start_lab(spec: LabSpec) -> Result<Arc<Lab>> {
        Ok(Arc::new(tokio::task::spawn_blocking(move || Lab::start(spec)).await??))
    }

    /// The controller in a lab that is up, with clouds, project and tokens.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn start_controller(lab: Arc<Lab>, spec: &FleetSpec) -> Result<Self> {
        let site = lab.host(CONTROLLER)?;
        let settings = Settings(&site);
        settings.write("feed.csv", FEED)?;
        settings.write("controller.toml", &config::controller(lab.index(), spec.feed, &spec.log)?)?;
        let url = config::api_url(lab.index());
        spawn(&lab, CONTROLLER, daemon("controller", "supercloud-controller", "controller.toml", &site, &spec.log))
            .await?;

        let token_file = controller_file(&site, "admin.token");
        let ca_file = controller_file(&site, "ca.pem");
        let mut waiting = Waiting::new("the controller", DAEMON_BUDGET);
        let admin = loop {
            // Both files are there before anything listens.
            if let (Ok(token), Ok(ca)) = (std::fs::read_to_string(&token_file), std::fs::read_to_string(&ca_file)) {
                let client = connect(&url, token.trim(), &ca, None)
                    .map_err(|source| call("the controller's client", source, &lab))?;
                if client.whoami().await.is_ok() {
                    break client;
                }
            }
            check_running(&lab, CONTROLLER, "controller").await?;
            waiting.pause(|| log_of(&lab, CONTROLLER, "controller")).await?;
        };

        let ca = read(&ca_file)?;
        let failed = |what: &str| {
            let (what, lab) = (what.to_owned(), Arc::clone(&lab));
            move |source| call(&what, source, &lab)
        };
        for cloud in clouds(lab.spec()) {
            let body = CloudCreate { name: name(cloud)?, provider: "lab".into() };
            admin.create_cloud(&body).await.map_err(failed("making a cloud known"))?;
        }
        let body = ProjectCreate { name: name(PROJECT)?, quota: None };
        admin.create_project(&body).await.map_err(failed("making the project"))?;
        let secret =
            make_token(&admin, "operator", Role::Operator).await.map_err(failed("making the operator token"))?;
        state::write_private(&lab.path("operator.token"), &format!("{secret}\n"))?;
        let client = connect(&url, &secret, &ca, None).map_err(failed("the operator's client"))?;
        Ok(Self { lab, log: spec.log.clone(), admin, client })
    }

    /// Lets an agent on every host join, and waits until all are up.
    ///
    /// # Errors
    /// When one does not come up.
    pub async fn join_hosts(&self) -> Result<()> {
        let hosts: Vec<_> = self.lab.spec().hosts.clone();
        for host in &hosts {
            let site = self.lab.host(&host.name)?;
            let body =
                JoinTokenCreate { host_name: name(&host.name)?, cloud: host.cloud.as_str().into(), expires_in_s: 900 };
            let token =
                self.admin.create_join_token(&body).await.map_err(|source| self.call("making a join token", source))?;
            let agent = daemon("agent", "supercloud-agent", "agent.toml", &site, &self.log);
            let about = config::agent(&site)?;
            // A host VM takes its time for a file.
            blocking(move || {
                let settings = Settings(&site);
                settings.write("join-token", &format!("{}\n", token.token))?;
                settings.write("agent.toml", &about)
            })
            .await??;
            spawn(&self.lab, &host.name, agent).await?;
        }
        for host in &hosts {
            self.await_host_up(&host.name).await?;
        }
        Ok(())
    }

    /// Waits until a host's agent is connected and well.
    ///
    /// # Errors
    /// When it has ended, or is not up in time.
    pub async fn await_host_up(&self, host: &str) -> Result<Host> {
        let is_vm = self.lab.host(host)?.hardware().is_some();
        let mut waiting = Waiting::new(format!("host {host} (state up)"), self.patient(DAEMON_BUDGET));
        loop {
            match self.admin.host(host).await {
                Ok(known) if known.state == HostState::Up => return Ok(known),
                // Not joined yet.
                Ok(_) | Err(ClientError::Problem(_)) => {}
                Err(source) => return Err(self.call("asking for a host", source)),
            }
            check_running(&self.lab, host, "agent").await?;
            if is_vm {
                // Each look costs a translated machine more than the agent's own work.
                tokio::time::sleep(VM_LOOK_EVERY).await;
            }
            waiting.pause(|| log_of(&self.lab, host, "agent")).await?;
        }
    }

    /// Starts the price daemon with a token of its own.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn start_spotd(&self, policy: &CheapestWithHysteresis, move_nanousd_per_gib: u64) -> Result<()> {
        let site = self.lab.host(CONTROLLER)?;
        let secret = make_token(&self.admin, "spotd", Role::Policy)
            .await
            .map_err(|source| self.call("making the price daemon's token", source))?;
        let settings = Settings(&site);
        settings.write("spotd.token", &format!("{secret}\n"))?;
        settings.write("spotd.toml", &config::spotd(self.lab.index(), policy, move_nanousd_per_gib)?)?;
        spawn(&self.lab, CONTROLLER, daemon("spotd", "supercloud-spotd", "spotd.toml", &site, &self.log)).await
    }

    /// Ends the price daemon (SIGTERM) and waits for its end.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn stop_spotd(&self) -> Result<()> {
        let site = self.lab.host(CONTROLLER)?;
        let mut waiting = Waiting::new("the end of the price daemon", Duration::from_secs(20));
        loop {
            let look = site.clone();
            let left = blocking(move || {
                let found = look.processes().into_iter().filter(|process| process.program() == "supercloud-spotd");
                found.filter(|process| process.signal(libc::SIGTERM).unwrap_or(false)).count()
            })
            .await?;
            if left == 0 {
                return Ok(self.lab.forget(CONTROLLER, "spotd")?);
            }
            waiting.pause(|| log_of(&self.lab, CONTROLLER, "spotd")).await?;
        }
    }

    /// Whether a host of it is a VM.
    #[must_use]
    pub fn is_of_vms(&self) -> bool {
        self.lab.spec().hosts.iter().any(|host| host.vm.is_some())
    }

    /// What is time enough in hosts of this machine's own speed, for the hosts that there are.
    #[must_use]
    pub fn patient(&self, budget: Duration) -> Duration {
        if self.is_of_vms() { budget * VM_PATIENCE } else { budget }
    }

    /// The lab: its links can be cut, its hosts killed.
    #[must_use]
    pub fn lab(&self) -> &Arc<Lab> {
        &self.lab
    }

    /// The API, with the rights of an admin of everything.
    #[must_use]
    pub fn admin(&self) -> &Client {
        &self.admin
    }

    /// The API, with the rights of an operator of the project [`PROJECT`].
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Another client, as a token of this role in the project.
    ///
    /// # Errors
    /// When the token cannot be made.
    pub async fn client_as(&self, token_name: &str, role: Role) -> Result<Client> {
        let secret =
            make_token(&self.admin, token_name, role).await.map_err(|source| self.call("making a token", source))?;
        let ca = read(&self.ca_file()?)?;
        connect(&config::api_url(self.lab.index()), &secret, &ca, None).map_err(|source| self.call("a client", source))
    }

    /// The API's URL, reachable from this machine.
    #[must_use]
    pub fn url(&self) -> String {
        config::api_url(self.lab.index())
    }

    /// The file with the admin's token.
    ///
    /// # Errors
    /// Never in practice.
    pub fn admin_token_file(&self) -> Result<PathBuf> {
        Ok(controller_file(&self.lab.host(CONTROLLER)?, "admin.token"))
    }

    /// The file with the operator's token.
    #[must_use]
    pub fn operator_token_file(&self) -> PathBuf {
        self.lab.path("operator.token")
    }

    /// The file with the CA that signs for the API.
    ///
    /// # Errors
    /// Never in practice.
    pub fn ca_file(&self) -> Result<PathBuf> {
        Ok(controller_file(&self.lab.host(CONTROLLER)?, "ca.pem"))
    }

    /// The log of a daemon (`agent`, `controller`, `spotd`).
    ///
    /// # Errors
    /// When there is no such site.
    pub fn log(&self, site: &str, daemon: &str) -> Result<PathBuf> {
        Ok(log_path(&self.lab.host(site)?, daemon))
    }

    /// Follows a guest's console over all hosts, and writes it down as `logs/<guest>.console` in the lab's folder.
    ///
    /// # Errors
    /// When that file cannot be made.
    pub fn console(&self, guest: GuestId) -> Result<Console> {
        let mut console = Console::new([]);
        for host in &self.lab.spec().hosts {
            let site = self.lab.host(&host.name)?;
            console = match site.vm_guests() {
                Some(told) => console.with_forwarded(host.name.clone(), told, &guest.to_string()),
                None => {
                    let inside = format!("{}/{guest}/console.log", config::GUESTS_DIR);
                    console.with_log(host.name.clone(), site.outside(&inside).unwrap_or_default())
                }
            };
        }
        let path = self.lab.path(&format!("logs/{guest}.console"));
        console.with_transcript(&path).map_err(|source| FleetError::Read { path, source })
    }

    /// Takes everything down and says what could not be.
    ///
    /// # Errors
    /// As [`Lab::stop`].
    pub async fn down(self) -> Result<()> {
        let lab = self.lab;
        // Whoever else holds the lab must not take it down a second time.
        blocking(move || match Arc::try_unwrap(lab) {
            Ok(lab) => lab.stop(),
            Err(lab) => crate::lab::down(&state::default_root(), &lab.spec().name),
        })
        .await??;
        Ok(())
    }

    /// Leaves everything up.
    ///
    /// # Errors
    /// When somebody else holds the lab as well.
    pub fn keep(self) -> Result<()> {
        let mut lab =
            Arc::try_unwrap(self.lab).map_err(|_held| FleetError::Unexpected("the lab is still in use".to_owned()))?;
        lab.keep();
        Ok(())
    }

    pub(crate) fn call(&self, what: impl Into<String>, source: ClientError) -> FleetError {
        call(&what.into(), source, &self.lab)
    }

    /// The last lines of the logs of the controller and of these hosts' agents.
    pub(crate) fn logs_of<'a>(&self, hosts: impl IntoIterator<Item = &'a str>) -> LogTails {
        let mut tails = log_of(&self.lab, CONTROLLER, "controller").0;
        for host in hosts {
            tails.extend(log_of(&self.lab, host, "agent").0);
        }
        LogTails(tails)
    }
}

/// Runs blocking work where that is allowed.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    Ok(tokio::task::spawn_blocking(work).await?)
}

/// A wait with a deadline, one look at a time.
#[derive(Debug)]
pub(crate) struct Waiting {
    what: String,
    began: Instant,
    budget: Duration,
}

impl Waiting {
    pub(crate) fn new(what: impl Into<String>, budget: Duration) -> Self {
        Self { what: what.into(), began: Instant::now(), budget }
    }

    /// Waits for the next look.
    pub(crate) async fn pause(&mut self, logs: impl FnOnce() -> LogTails) -> Result<()> {
        if self.began.elapsed() >= self.budget {
            let what = self.what.clone();
            return Err(FleetError::Deadline { what, seconds: self.budget.as_secs(), logs: logs() });
        }
        tokio::time::sleep(LOOK_EVERY).await;
        Ok(())
    }
}

/// Writes settings files of a site.
struct Settings<'a>(&'a Site);

impl Settings<'_> {
    fn write(&self, file: &str, text: &str) -> Result<()> {
        let written = self.0.write_settings(&format!("{}/{file}", config::SETTINGS_DIR), text);
        Ok(written.map_err(LabError::from)?)
    }
}

fn daemon(daemon: &str, program: &str, settings: &str, site: &Site, log: &str) -> ProcessSpec {
    ProcessSpec {
        name: daemon.to_owned(),
        argv: vec![
            program_dir().join(program).display().to_string(),
            "--config".to_owned(),
            format!("{}/{settings}", config::SETTINGS_DIR),
        ],
        env: vec![("RUST_LOG".into(), log.to_owned()), ("LC_ALL".into(), "C.UTF-8".into())],
        log: log_path(site, daemon),
    }
}

fn log_path(site: &Site, daemon: &str) -> PathBuf {
    site.outside(&format!("{}/{daemon}.log", config::LOG_DIR)).unwrap_or_default()
}

fn log_of(lab: &Lab, site: &str, daemon: &str) -> LogTails {
    LogTails(lab.host(site).map(|site| LogTail::read(&log_path(&site, daemon))).into_iter().collect())
}

fn controller_file(site: &Site, file: &str) -> PathBuf {
    site.outside(&format!("{}/{file}", config::CONTROLLER_DIR)).unwrap_or_default()
}

async fn spawn(lab: &Arc<Lab>, site: &str, process: ProcessSpec) -> Result<()> {
    let (lab, site) = (Arc::clone(lab), site.to_owned());
    blocking(move || lab.spawn(&site, &process)).await??;
    Ok(())
}

/// That a daemon has not ended.
async fn check_running(lab: &Arc<Lab>, site: &str, daemon: &str) -> Result<()> {
    let (held, at) = (Arc::clone(lab), site.to_owned());
    let daemons = blocking(move || held.host(&at).map(|site| site.daemons())).await??;
    let ended = daemons.ok().and_then(|mut all| all.remove(daemon)?.ended);
    match ended {
        Some(ended) => {
            let log = log_of(lab, site, daemon);
            Err(FleetError::Ended { name: daemon.to_owned(), site: site.to_owned(), ended, log })
        }
        None => Ok(()),
    }
}

fn call(what: &str, source: ClientError, lab: &Lab) -> FleetError {
    // A refusal speaks for itself.
    let is_refusal = source.problem().is_some_and(|problem| problem.status < 500);
    let log = if is_refusal { LogTails::default() } else { log_of(lab, CONTROLLER, "controller") };
    FleetError::Call { what: what.to_owned(), source: Box::new(source), log }
}

async fn make_token(admin: &Client, token_name: &str, role: Role) -> std::result::Result<String, ClientError> {
    let name = token_name.parse().map_err(|error| ClientError::Setup(format!("{error}")))?;
    let body = TokenCreate { name, project: PROJECT.into(), role, expires_in_s: None };
    Ok(admin.create_token(&body).await?.secret)
}

fn connect(url: &str, token: &str, ca: &str, project: Option<&str>) -> std::result::Result<Client, ClientError> {
    Client::new(ClientConfig {
        url: url.to_owned(),
        token: Some(token.to_owned()),
        ca_pem: Some(ca.to_owned()),
        project: project.map(str::to_owned),
    })
}

fn name(text: &str) -> Result<Name> {
    Ok(text.parse()?)
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| FleetError::Read { path: path.to_owned(), source })
}

/// The clouds of a lab, each once.
fn clouds(spec: &LabSpec) -> Vec<&str> {
    let mut clouds: Vec<&str> = Vec::new();
    for host in &spec.hosts {
        if !clouds.contains(&host.cloud.as_str()) {
            clouds.push(&host.cloud);
        }
    }
    clouds
}
