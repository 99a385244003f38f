//! This host's key for the overlay's encryption: made once, kept in `overlay.key` (mode 0600) of the data folder, so that the other hosts
//! know this one again after a restart.

use std::{fs, io, path::PathBuf};

use supercloud_api::OverlayEncryption;
use supercloud_sdn::wireguard::{self, PrivateKey, WireguardConfig, WireguardError};

use crate::{
    config::Config,
    durable::{self, DurableError},
};

/// The file with the private key.
const FILE: &str = "overlay.key";

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum OverlayKeyError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file holds none.
    #[error("{0} holds no WireGuard key; remove it, and another one is made at the next start")]
    Bad(PathBuf),
    /// A new one cannot be kept.
    #[error(transparent)]
    Keep(#[from] DurableError),
    /// The program that makes keys.
    #[error(transparent)]
    Wireguard(#[from] WireguardError),
    /// A worker thread died.
    #[error("a worker died")]
    Worker(#[from] tokio::task::JoinError),
}

/// What the switch's driver and the other hosts must know; none where the configuration does not ask for encryption.
///
/// # Errors
/// When there is no key, and none can be made.
pub async fn load(config: &Config) -> Result<Option<(WireguardConfig, OverlayEncryption)>, OverlayKeyError> {
    let Some(wireguard) = &config.wireguard else { return Ok(None) };
    let path = config.data_dir.join(FILE);
    let file = path.clone();
    let kept = tokio::task::spawn_blocking(move || match fs::read_to_string(&file) {
        Ok(text) => text.parse::<PrivateKey>().map(Some).map_err(|_| OverlayKeyError::Bad(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(OverlayKeyError::Read { path: file, source }),
    })
    .await??;
    let private_key = match kept {
        Some(key) => key,
        None => {
            let made = wireguard::make_key().await?;
            let text = made.reveal() + "\n";
            tokio::task::spawn_blocking(move || durable::write(&path, text.as_bytes())).await??;
            made
        }
    };
    let endpoint = config.wireguard_endpoint();
    let public_key = wireguard::public_key(&private_key).await?.to_string();
    let (interface, listen_port) = (wireguard.interface.clone(), wireguard.listen_port);
    let driver = WireguardConfig { interface, listen_port, private_key, endpoint };
    Ok(Some((driver, OverlayEncryption { public_key, endpoint })))
}
