//! The agents' link, as dumb as can be: a unix socket that is carried to another one.

use std::path::{Path, PathBuf};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    task::JoinHandle,
};

/// Takes one connection on `near` and carries it to `far`; closes both when either ends. Gone when dropped.
pub struct Bridge {
    pub near: PathBuf,
    task: JoinHandle<()>,
}

impl Bridge {
    pub fn new(near: &Path, far: &Path) -> Self {
        let _ = std::fs::remove_file(near);
        let listener = UnixListener::bind(near).unwrap();
        let far = far.to_owned();
        let task = tokio::spawn(async move {
            let Ok((from, _)) = listener.accept().await else { return };
            let Ok(to) = UnixStream::connect(&far).await else { return };
            let (from_read, from_write) = from.into_split();
            let (to_read, to_write) = to.into_split();
            // The first direction that ends closes both: QEMU has no timeout of its own here.
            tokio::select! {
                () = carry(from_read, to_write) => {}
                () = carry(to_read, from_write) => {}
            }
        });
        Self { near: near.to_owned(), task }
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn carry(mut from: tokio::net::unix::OwnedReadHalf, mut to: tokio::net::unix::OwnedWriteHalf) {
    let mut block = vec![0; 256 << 10];
    loop {
        match from.read(&mut block).await {
            Ok(0) | Err(_) => return,
            Ok(n) => {
                if to.write_all(&block[..n]).await.is_err() {
                    return;
                }
            }
        }
    }
}
