//! Volume processes: started in a session of their own so that they outlive the agent, found again by their control
//! socket, started anew when they died.

use std::{
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use supercloud_blanket::lasting::{self, Lasting};
use supercloud_ids::VolumeId;
use supercloud_storage::process::{ClientError, ConfigError, VolumeClient, VolumeProcessConfig, control::VolumeStatus};

use crate::{
    accounts::Account,
    durable::{self, DurableError},
};

/// How long a started process may take until it answers: it may have to fetch its base's manifest.
const START_BUDGET: Duration = Duration::from_secs(45);
/// How long a process that is there may take to answer before it is taken for hung.
const ANSWER_BUDGET: Duration = Duration::from_secs(10);
/// A log larger than this is begun anew at the next start.
const MAX_LOG_BYTES: u64 = 1 << 20;

/// Why a volume process cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum VolumesError {
    /// Its files.
    #[error("volume {volume}: its files cannot be kept")]
    Files {
        /// The volume.
        volume: VolumeId,
        /// Why.
        #[source]
        source: DurableError,
    },
    /// Its configuration.
    #[error("volume {volume} cannot be configured")]
    Config {
        /// The volume.
        volume: VolumeId,
        /// Why.
        #[source]
        source: ConfigError,
    },
    /// The program cannot be started.
    #[error("volume {volume}: {program} cannot be started")]
    Spawn {
        /// The volume.
        volume: VolumeId,
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It ended right after its start.
    #[error("volume {volume}: its process ended at once ({status}); it said: {said}")]
    Ended {
        /// The volume.
        volume: VolumeId,
        /// How.
        status: String,
        /// The end of its log.
        said: String,
    },
    /// It does not do what it is asked.
    #[error("volume {volume} did not {what}")]
    Client {
        /// The volume.
        volume: VolumeId,
        /// What was asked.
        what: &'static str,
        /// Why.
        #[source]
        source: ClientError,
    },
    /// A worker thread died.
    #[error("a worker died")]
    Worker(#[from] tokio::task::JoinError),
}

/// Where the files and sockets of one volume are on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeHome {
    /// The volume.
    pub volume: VolumeId,
    /// Configuration, key, log; the data lie in a folder below.
    pub folder: PathBuf,
    /// The sockets.
    pub run: PathBuf,
}

impl VolumeHome {
    fn config_file(&self) -> PathBuf {
        self.folder.join("config.json")
    }

    /// What it stands on, as its configuration says. Blocking.
    #[must_use]
    pub fn base(&self) -> Option<supercloud_storage::key::ContentRoot> {
        VolumeProcessConfig::from_file(&self.config_file()).ok()?.base
    }

    fn process_file(&self) -> PathBuf {
        self.folder.join("process.json")
    }

    fn log_file(&self) -> PathBuf {
        self.folder.join("volume.log")
    }

    /// The file of the project's key, for the configuration.
    #[must_use]
    pub fn key_file(&self) -> PathBuf {
        self.folder.join("project.key")
    }

    /// The folder of data and journal.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// The guest's disk.
    #[must_use]
    pub fn nbd_socket(&self) -> PathBuf {
        self.run.join("nbd.sock")
    }

    /// Where other hosts' volume processes read.
    #[must_use]
    pub fn peer_socket(&self) -> PathBuf {
        self.run.join("peer.sock")
    }

    /// The agent's socket for it, which leads to the host that has its newest blocks.
    #[must_use]
    pub fn peer_dial(&self) -> PathBuf {
        self.run.with_extension("dial")
    }

    /// Its control socket's client.
    #[must_use]
    pub fn client(&self) -> VolumeClient {
        VolumeClient::new(self.run.join("control.sock"))
    }

    fn record(&self) -> Option<Lasting> {
        durable::read_json(&self.process_file()).ok().flatten()
    }

    /// The kernel's number of its process, if that runs. Blocking.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.record().filter(|record| record.is_alive()).map(|record| record.pid)
    }
}

/// Starts and ends volume processes.
#[derive(Debug, Clone)]
pub struct VolumeRunner {
    /// The program, `supercloud-volume`.
    pub program: PathBuf,
    /// As whom it serves.
    pub user: Account,
    /// Who besides root may use the disk.
    pub qemu: Account,
}

impl VolumeRunner {
    /// Writes what a new volume's process is told. An existing configuration is replaced; a running process keeps the
    /// one that it began with.
    ///
    /// # Errors
    /// When it is refused or cannot be kept.
    pub async fn configure(
        &self,
        home: &VolumeHome,
        mut config: VolumeProcessConfig,
        key_hex: String,
    ) -> Result<(), VolumesError> {
        let volume = home.volume;
        config.nbd_uids = vec![self.qemu.uid];
        // SAFETY: geteuid takes no arguments and cannot fail.
        config.agent_uid = Some(unsafe { libc::geteuid() });
        config.validate().map_err(|source| VolumesError::Config { volume, source })?;
        let home = home.clone();
        tokio::task::spawn_blocking(move || {
            durable::make_folder(&home.folder)?;
            durable::write(&home.key_file(), key_hex.as_bytes())?;
            durable::write_json(&home.config_file(), &config)
        })
        .await?
        .map_err(|source| VolumesError::Files { volume, source })
    }

    /// Sees to it that the volume's process runs and answers.
    ///
    /// # Errors
    /// Why it does not.
    pub async fn ensure(&self, home: &VolumeHome) -> Result<VolumeStatus, VolumesError> {
        let client = home.client();
        if let Ok(status) = client.clone().with_budget(Duration::from_secs(2)).status().await {
            return Ok(status);
        }
        let record = {
            let home = home.clone();
            tokio::task::spawn_blocking(move || home.record()).await?
        };
        if let Some(record) = record.filter(|record| record.is_alive()) {
            // It is starting, or hangs.
            if let Ok(status) = client.wait_ready(ANSWER_BUDGET).await {
                return Ok(status);
            }
            tracing::warn!(volume = %home.volume, pid = record.pid, "a volume process does not answer; it is started anew");
            record.end().await;
        }
        self.start(home).await
    }

    async fn start(&self, home: &VolumeHome) -> Result<VolumeStatus, VolumesError> {
        let volume = home.volume;
        let failed = |source| VolumesError::Spawn { volume, program: self.program.display().to_string(), source };
        let (runner, at) = (self.clone(), home.clone());
        let mut child = tokio::task::spawn_blocking(move || {
            runner.make_folders(&at).map_err(io::Error::other)?;
            runner.spawn(&at)
        })
        .await?
        .map_err(failed)?;
        let client = home.client();
        let ended = tokio::select! {
            ready = client.wait_ready(START_BUDGET) => {
                // Not waited for any more: it outlives this agent, and while this agent lives, tokio reaps it.
                return ready.map_err(|source| VolumesError::Client { volume, what: "start", source });
            }
            ended = child.wait() => ended,
        };
        let status = ended.map_or_else(|error| error.to_string(), |status| status.to_string());
        let log = home.log_file();
        let said = tokio::task::spawn_blocking(move || last_words(&log)).await?;
        Err(VolumesError::Ended { volume, status, said })
    }

    /// Ends the process; what it has written stays.
    ///
    /// # Errors
    /// When its record cannot be read.
    pub async fn stop(&self, home: &VolumeHome) -> Result<(), VolumesError> {
        if let Err(error) = home.client().with_budget(ANSWER_BUDGET).shutdown(false, false).await {
            tracing::debug!(volume = %home.volume, %error, "a volume process was not there to be told to leave");
        }
        let home = home.clone();
        if let Some(record) = tokio::task::spawn_blocking(move || home.record()).await? {
            record.end().await;
        }
        Ok(())
    }

    /// Makes what the process cannot make for itself as the user that it becomes, and gives it what an earlier process
    /// made as root. Blocking.
    fn make_folders(&self, home: &VolumeHome) -> Result<(), DurableError> {
        if let Some(volumes) = home.folder.parent() {
            durable::make_passage(volumes)?;
        }
        durable::make_folder(&home.folder)?;
        if self.user.is_root() {
            return Ok(());
        }
        // It syncs the folder above its data; configuration and key in it stay closed to it.
        durable::share(&home.folder, 0o750, Account::ROOT, self.user)?;
        durable::make_folder(&home.data())?;
        durable::give_all(&home.data(), self.user)?;
        durable::make_folder(&home.run)?;
        // Its sockets get the hypervisor's group, since it cannot give them away.
        durable::share(&home.run, 0o2710, self.user, self.qemu)
    }

    /// Ends the process and deletes everything of the volume on this host. The caller knows that it may.
    ///
    /// # Errors
    /// When something is left.
    pub async fn delete(&self, home: &VolumeHome) -> Result<(), VolumesError> {
        // In order if it answers; what does not answer is ended all the same.
        let asked = home.client().with_budget(ANSWER_BUDGET).shutdown(true, true).await;
        if let Err(error) = asked {
            tracing::debug!(volume = %home.volume, %error, "a volume process was not there to be told to leave");
        }
        let record = {
            let home = home.clone();
            tokio::task::spawn_blocking(move || home.record()).await?
        };
        if let Some(record) = record {
            record.end().await;
        }
        let at = home.clone();
        tokio::task::spawn_blocking(move || {
            // Not the agent's own socket for it: that may be there already for the process that comes next.
            durable::remove_folder(&at.folder)?;
            durable::remove_folder(&at.run)
        })
        .await?
        .map_err(|source| VolumesError::Files { volume: home.volume, source })
    }

    /// Starts the process. Blocking.
    fn spawn(&self, home: &VolumeHome) -> io::Result<tokio::process::Child> {
        let log_path = home.log_file();
        let is_long = std::fs::metadata(&log_path).is_ok_and(|meta| meta.len() > MAX_LOG_BYTES);
        let log = {
            use std::os::unix::fs::OpenOptionsExt as _;
            let mut options = std::fs::File::options();
            options.create(true).mode(0o600);
            if is_long {
                options.write(true).truncate(true)
            } else {
                options.append(true)
            };
            options.open(&log_path)?
        };
        let mut command = std::process::Command::new(&self.program);
        command
            .arg("--config")
            .arg(home.config_file())
            .args(["--uid", &self.user.uid.to_string(), "--gid", &self.user.gid.to_string()])
            .current_dir("/")
            .env_clear()
            .envs(std::env::var_os("RUST_LOG").map(|value| ("RUST_LOG", value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        lasting::detach(&mut command, &[]);
        let child = tokio::process::Command::from(command).kill_on_drop(false).spawn()?;
        if let Some(record) = child.id().and_then(Lasting::of) {
            durable::write_json(&home.process_file(), &record).map_err(io::Error::other)?;
        }
        Ok(child)
    }
}

fn last_words(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let from = text.len().saturating_sub(400);
    String::from_utf8_lossy(&text[from..]).trim().replace('\n', " | ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_program_that_ends_at_once_is_told_with_its_last_words() {
        let dir = tempfile::tempdir().unwrap();
        let home = VolumeHome { volume: VolumeId::generate(), folder: dir.path().join("v"), run: dir.path().join("r") };
        durable::make_folder(&home.folder).unwrap();
        let program = dir.path().join("p");
        std::fs::write(&program, "#!/bin/sh\necho this is why >&2\nexit 3\n").unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let runner = |program| VolumeRunner { program, user: Account::ROOT, qemu: Account::ROOT };
        let error = runner(program).ensure(&home).await.unwrap_err();
        assert!(error.to_string().contains("this is why"), "{error}");
        runner("/nonexistent".into()).delete(&home).await.unwrap();
        assert!(!home.folder.exists());
    }
}
