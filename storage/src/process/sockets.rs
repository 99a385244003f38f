//! The process's unix sockets: made in a private folder, mode 0600, the other end's user checked.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use tokio::net::{UnixListener, UnixStream};

/// Makes the folder of the sockets. `is_shared` lets other users pass through it to a socket that they own. A folder that
/// hands its group on to what is made in it (set-group-ID) was prepared by who started this process, and stays as it is.
pub(super) fn ensure_folder(folder: &Path, is_shared: bool) -> io::Result<()> {
    if fs::metadata(folder).is_ok_and(|meta| meta.permissions().mode() & libc::S_ISGID != 0) {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    fs::set_permissions(folder, fs::Permissions::from_mode(if is_shared { 0o711 } else { 0o700 }))
}

/// A listening socket; its name goes when it is dropped.
#[derive(Debug)]
pub(super) struct Socket {
    listener: UnixListener,
    path: PathBuf,
    users: Vec<u32>,
}

impl Socket {
    /// Listens at `path`, in the place of what an earlier process left there. Root, `agent` (this process's user when absent)
    /// and `others` may connect. The first of `others` owns the socket, so that it can; a process that cannot give it away
    /// leaves it to the group that the folder hands on.
    pub(super) fn listen(path: &Path, agent: Option<u32>, others: &[u32]) -> io::Result<Self> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        let own = {
            use std::os::unix::fs::MetadataExt as _;
            // Who made it: us.
            fs::metadata(path)?.uid()
        };
        if let Some(owner) = others.first().filter(|owner| **owner != own) {
            if own == 0 {
                std::os::unix::fs::chown(path, Some(*owner), None)?;
            } else {
                fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
            }
        }
        let users = [0, agent.unwrap_or(own)].into_iter().chain(others.iter().copied()).collect();
        Ok(Self { listener, path: path.to_owned(), users })
    }

    /// The next connection of a user who may.
    pub(super) async fn accept(&self) -> UnixStream {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => match stream.peer_cred() {
                    Ok(cred) if self.users.contains(&cred.uid()) => return stream,
                    Ok(cred) => tracing::warn!(socket = %self.path.display(), uid = cred.uid(), "refused a user"),
                    Err(error) => tracing::warn!(socket = %self.path.display(), %error, "refused an unknown user"),
                },
                Err(error) => {
                    // Out of descriptors, as a rule: it passes when a connection ends.
                    tracing::warn!(socket = %self.path.display(), %error, "cannot accept");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Best effort: the next process removes it, too.
        let _ = fs::remove_file(&self.path);
    }
}
