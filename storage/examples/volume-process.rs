//! Runs one volume process from a configuration file, until SIGTERM or SIGINT: for trying things by hand.
//!
//! `cargo run -p supercloud-storage --example volume-process -- config.json`

use supercloud_storage::process::{VolumeProcessConfig, run};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let path = std::env::args().nth(1).ok_or("usage: volume-process CONFIG.json")?;
    let config = VolumeProcessConfig::from_file(path.as_ref())?;
    let key = config.key.read()?;
    let shutdown = CancellationToken::new();
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = shutdown.clone();
    let signals = async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        stop.cancel();
        // The second one is for who is in a hurry.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        result = run(config, key, shutdown) => Ok(result?),
        () = signals => Ok(()),
    }
}
