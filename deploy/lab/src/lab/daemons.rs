//! The daemons of a site: started, started again, forgotten.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Lab, LabError};
use crate::{
    command::{Run, wait_for},
    host_init::ProcessSpec,
    site::{Site, SiteError},
    state::{self, StateError},
};

const PREFIX: &str = "daemon-";
const SUFFIX: &str = ".json";

/// How long a signal may take to be sent in a VM.
const QUICK: Duration = Duration::from_secs(20);

/// Where it is remembered how a daemon of a site was started.
fn kept_at(site: &Path, name: &str) -> PathBuf {
    site.join(format!("{PREFIX}{name}{SUFFIX}"))
}

impl Lab {
    /// Starts a daemon in a site and remembers how, for [`Lab::restart`].
    ///
    /// # Errors
    /// When one of its name runs already, or it cannot be started.
    pub fn spawn(&self, site: &str, process: &ProcessSpec) -> Result<i32, LabError> {
        let site = self.host(site)?;
        let path = kept_at(&site.dir, &process.name);
        let text = serde_json::to_string_pretty(process).map_err(|error| StateError::Io {
            what: "write",
            path: path.display().to_string(),
            source: error.into(),
        })?;
        state::write_private(&path, &text)?;
        Ok(site.spawn(process.clone())?)
    }

    /// Ends a daemon that [`Lab::spawn`] started, if it still runs (SIGKILL), and starts it again in the same way.
    ///
    /// # Errors
    /// When it was never started or does not start.
    pub fn restart(&self, site: &str, name: &str) -> Result<i32, LabError> {
        let site = self.host(site)?;
        let path = kept_at(&site.dir, name);
        let io = |source| StateError::Io { what: "read", path: path.display().to_string(), source };
        let text = fs::read(&path).map_err(io)?;
        let process: ProcessSpec = serde_json::from_slice(&text).map_err(|error| io(error.into()))?;
        self.end_daemon(&site, name)?;
        Ok(site.spawn(process)?)
    }

    /// The daemons that [`Lab::spawn`] ever started in a site, by name.
    ///
    /// # Errors
    /// When there is no such host or its folder cannot be read.
    pub fn remembered(&self, name: &str) -> Result<Vec<String>, LabError> {
        let dir = self.host(name)?.dir;
        let io = |source| StateError::Io { what: "read", path: dir.display().to_string(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(&dir).map_err(io)? {
            let file = entry.map_err(io)?.file_name().to_string_lossy().into_owned();
            names.extend(file.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(SUFFIX)).map(str::to_owned));
        }
        names.sort();
        Ok(names)
    }

    /// A daemon that was ended for good is not started again when its host boots.
    ///
    /// # Errors
    /// When there is no such host or its folder cannot be written.
    pub fn forget(&self, site: &str, name: &str) -> Result<(), LabError> {
        let path = kept_at(&self.host(site)?.dir, name);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(StateError::Io { what: "remove", path: path.display().to_string(), source }.into())
            }
            _ => Ok(()),
        }
    }

    pub(super) fn end_daemon(&self, site: &Site, name: &str) -> Result<(), LabError> {
        let ended = wait_for(Duration::from_secs(20), || {
            let running = site.daemons().ok()?.remove(name).filter(|status| status.ended.is_none());
            let Some(running) = running else { return Some(()) };
            if site.hardware().is_some() {
                // One that has ended by itself is as good.
                let _ = site.run(&["kill", "-9", &running.pid.to_string()], QUICK).map(Run::ok);
                return None;
            }
            for process in site.processes().iter().filter(|process| process.inner_pid() == Some(running.pid)) {
                // One that has ended by itself is as good.
                let _ = process.signal(libc::SIGKILL);
            }
            None
        });
        let stuck =
            || SiteError::Daemon { site: site.name.clone(), name: "a daemon", said: format!("{name} does not end") };
        Ok(ended.ok_or_else(stuck)?)
    }
}
