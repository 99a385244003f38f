//! Work on a lab that cleans up whatever happens: signals, errors, panics.

use std::future::Future;

use tokio::signal::unix::{SignalKind, signal};

use crate::lab::chain;
use crate::state;

/// How guarded work ended.
#[derive(Debug)]
pub enum Ended<T> {
    /// By itself; what is left of the lab is its maker's.
    Done(T),
    /// By a signal; the lab is down. The exit status that tells of it.
    Signalled(u8),
}

/// Runs work on the lab `name` in a task of its own until it ends or SIGINT, SIGTERM or SIGHUP comes. After a signal, or when the
/// work panics, the lab is taken down; a second signal does not break that off.
///
/// # Errors
/// When the work panicked, or the lab could not be taken down.
pub async fn guarded<T: Send + 'static>(
    name: &str,
    work: impl Future<Output = T> + Send + 'static,
) -> anyhow::Result<Ended<T>> {
    let [mut interrupt, mut terminate, mut hangup] =
        [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?];
    let mut task = tokio::spawn(work);
    let status = tokio::select! {
        ended = &mut task => match ended {
            Ok(done) => return Ok(Ended::Done(done)),
            Err(error) => {
                take_down(name).await?;
                return Err(anyhow::Error::from(error).context("the work on the lab broke off"));
            }
        },
        _ = interrupt.recv() => 130,
        _ = terminate.recv() => 143,
        _ = hangup.recv() => 129,
    };
    // Also seen where standard output is a pipe that nobody reads any more.
    eprintln!("\ninterrupted: cleaning up");
    task.abort();
    // Its end drops what it held; a lab that is just being made is waited for below and taken down.
    let _aborted = task.await;
    take_down(name).await?;
    Ok(Ended::Signalled(status))
}

/// Takes the lab down.
///
/// # Errors
/// As [`crate::down`].
pub async fn take_down(name: &str) -> anyhow::Result<()> {
    let name = name.to_owned();
    let down = tokio::task::spawn_blocking(move || crate::down(&state::default_root(), &name)).await?;
    down.map_err(|error| anyhow::anyhow!("{}", chain(&error)))
}
