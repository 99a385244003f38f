//! Who this host is: its id, key and certificate, kept in one file of mode 0600.
//!
//! The key is made here and never leaves the host. A certificate lives days; [`Identity::is_due`] says when a fresh one
//! is to be asked for.

use std::{path::PathBuf, sync::Arc};

use rcgen::{CertificateParams, KeyPair};
use rustls::{ClientConfig, ServerConfig};
use serde::{Deserialize, Serialize};
use supercloud_api::tls::{self, MaterialError};
use supercloud_ids::HostId;

use crate::durable::{self, DurableError};

/// Why an identity cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// It cannot be kept or read.
    #[error("the identity cannot be kept")]
    Keep(#[from] DurableError),
    /// Key or request cannot be made.
    #[error("a key or certificate request cannot be made")]
    Make(#[from] rcgen::Error),
    /// Certificate, key or CA is not usable.
    #[error("the identity's certificate or key is not usable")]
    Material(#[from] MaterialError),
    /// The certificate is for another host.
    #[error("the certificate does not name {0}")]
    OtherHost(HostId),
}

/// This host's identity.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// The host.
    pub host: HostId,
    /// Its certificate (leaf first), PEM.
    pub certificate_pem: String,
    /// Its key, PEM.
    key_pem: String,
    /// The CA, PEM.
    pub ca_pem: String,
    /// Where the controller takes agents' links (`host:port`).
    pub link_address: String,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("host", &self.host).field("link_address", &self.link_address).finish()
    }
}

/// A key made here, and the request for its certificate.
pub struct Request {
    key_pem: String,
    /// PKCS#10, PEM.
    pub csr_pem: String,
}

impl Request {
    /// Makes a key for `host` (ECDSA P-256).
    ///
    /// # Errors
    /// When the system gives no randomness.
    pub fn make(host: HostId) -> Result<Self, IdentityError> {
        let key = KeyPair::generate()?;
        let params = CertificateParams::new(vec![tls::host_dns_name(host)])?;
        let csr_pem = params.serialize_request(&key)?.pem()?;
        Ok(Self { key_pem: key.serialize_pem(), csr_pem })
    }

    /// The identity that the controller's answer makes of it.
    ///
    /// # Errors
    /// When the answer is not usable or is for another host.
    pub fn complete(
        self,
        host: HostId,
        certificate_pem: String,
        ca_pem: String,
        link_address: String,
    ) -> Result<Identity, IdentityError> {
        let identity = Identity { host, certificate_pem, key_pem: self.key_pem, ca_pem, link_address };
        identity.material()?;
        Ok(identity)
    }
}

/// What TLS needs of an identity, ready made.
#[derive(Clone)]
pub struct Material {
    /// SHA-256 of the certificate, hex: how tickets name this host.
    pub fingerprint: String,
    /// For dialling the controller's link.
    pub link: Arc<ClientConfig>,
    /// For dialling the data plane of others.
    pub dial: Arc<ClientConfig>,
    /// For taking others' data connections.
    pub serve: Arc<ServerConfig>,
}

impl Identity {
    /// The file below the agent's data folder.
    #[must_use]
    pub fn path(data_dir: &std::path::Path) -> PathBuf {
        data_dir.join("identity.json")
    }

    /// Reads the identity; `None` when this host has not joined yet. Blocking.
    ///
    /// # Errors
    /// When there is one that cannot be read.
    pub fn load(data_dir: &std::path::Path) -> Result<Option<Self>, IdentityError> {
        Ok(durable::read_json(&Self::path(data_dir))?)
    }

    /// Keeps it. Blocking.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn save(&self, data_dir: &std::path::Path) -> Result<(), IdentityError> {
        Ok(durable::write_json(&Self::path(data_dir), self)?)
    }

    /// Checks it and makes what TLS needs of it.
    ///
    /// # Errors
    /// When certificate, key or CA are not usable, or name another host.
    pub fn material(&self) -> Result<Material, IdentityError> {
        let chain = tls::certificates_of_pem(&self.certificate_pem)?;
        let ca = tls::certificates_of_pem(&self.ca_pem)?;
        let fingerprint = tls::fingerprint(&chain[0]);
        if tls::host_of_certificate(&chain[0]) != Some(self.host) {
            return Err(IdentityError::OtherHost(self.host));
        }
        let identity = tls::Identity { chain, key: tls::key_of_pem(&self.key_pem)? };
        Ok(Material {
            fingerprint,
            link: Arc::new(tls::client_config(&ca, identity.clone(), tls::ALPN_AGENT)?),
            dial: Arc::new(tls::client_config(&ca, identity.clone(), tls::ALPN_DATA)?),
            serve: Arc::new(tls::server_config(&ca, identity, &[tls::ALPN_DATA])?),
        })
    }

    /// How much of the certificate's life is over at `now_ms` (Unix milliseconds), 0.0 to 1.0 and beyond.
    ///
    /// # Errors
    /// When the certificate cannot be read.
    pub fn age(&self, now_ms: u64) -> Result<f64, IdentityError> {
        use x509_parser::prelude::FromDer as _;
        let chain = tls::certificates_of_pem(&self.certificate_pem)?;
        let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(chain[0].as_ref())
            .map_err(|_| MaterialError::Missing("certificate"))?;
        let validity = certificate.validity();
        let (from, until) = (validity.not_before.timestamp() as f64, validity.not_after.timestamp() as f64);
        Ok((now_ms as f64 / 1000.0 - from) / (until - from).max(1.0))
    }

    /// Whether a fresh certificate is to be asked for: after half of its life when nothing is under way (tickets name
    /// the certificate), after nine tenths in any case.
    ///
    /// # Errors
    /// When the certificate cannot be read.
    pub fn is_due(&self, now_ms: u64, is_quiet: bool) -> Result<bool, IdentityError> {
        let age = self.age(now_ms)?;
        Ok(age > 0.9 || (age > 0.5 && is_quiet))
    }
}
