//! The controller's certificate authority.

mod host;

use std::{net::IpAddr, path::Path, time::Duration};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use supercloud_api::tls::{self, Identity};

use crate::keys::{self, KeyFileError};

/// How long the CA's own certificate is valid.
const CA_VALIDITY: Duration = Duration::from_secs(10 * 365 * 86_400);
/// How long the controller's certificate is valid. A new one is made at each start, and for REST every day.
const SERVER_VALIDITY: Duration = Duration::from_secs(2 * 365 * 86_400);
/// Clocks of peers may be this much behind ours.
const CLOCK_SLACK: Duration = Duration::from_secs(3600);

/// Why the CA cannot be used or a certificate not be made.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file.
    #[error("the CA's files")]
    File(#[from] KeyFileError),
    /// What the files hold.
    #[error("{path} does not hold {what}")]
    Content {
        /// The file.
        path: String,
        /// What was expected.
        what: &'static str,
    },
    /// A host's certificate signing request.
    #[error("the certificate signing request is not acceptable: {0}")]
    Csr(String),
    /// Making a certificate failed.
    #[error("a certificate cannot be made")]
    Certificate(#[from] rcgen::Error),
}

/// The CA: its key signs the certificates of the controller and of the hosts.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pem: String,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("fingerprint", &self.fingerprint()).finish_non_exhaustive()
    }
}

fn with_validity(mut params: CertificateParams, validity: Duration) -> CertificateParams {
    let now = std::time::SystemTime::now();
    params.not_before = (now - CLOCK_SLACK).into();
    params.not_after = (now + validity).into();
    params
}

impl Authority {
    /// Reads `ca.key` and `ca.pem` of a folder; makes them at the first start. Blocking.
    ///
    /// # Errors
    /// When a file cannot be read or written, or does not hold what it should.
    pub fn open_or_make(folder: &Path) -> Result<Self, CaError> {
        let (key_path, pem_path) = (folder.join("ca.key"), folder.join("ca.pem"));
        let content = |path: &Path, what| CaError::Content { path: path.display().to_string(), what };
        let made = keys::read_secret(&key_path)?;
        let key_pem = match &made {
            Some(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            None => KeyPair::generate()?.serialize_pem(),
        };
        let key = KeyPair::from_pem(&key_pem).map_err(|_| content(&key_path, "a private key"))?;
        let pem = match std::fs::read_to_string(&pem_path) {
            Ok(pem) if made.is_some() => pem,
            // The certificate is written after the key: without it nothing was ever signed.
            _ => {
                let mut params = with_validity(CertificateParams::default(), CA_VALIDITY);
                params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
                params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
                params.distinguished_name.remove(DnType::CommonName);
                params.distinguished_name.push(DnType::CommonName, DnValue::Utf8String("Supercloud CA".into()));
                let pem = params.self_signed(&key)?.pem();
                if made.is_none() {
                    keys::write_file(&key_path, key_pem.as_bytes(), 0o600)?;
                }
                keys::write_file(&pem_path, pem.as_bytes(), 0o644)?;
                pem
            }
        };
        let mut certificates = tls::certificates_of_pem(&pem).map_err(|_| content(&pem_path, "a certificate"))?;
        let certificate = certificates.swap_remove(0);
        let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
        Ok(Self { issuer, certificate, pem })
    }

    /// The CA's certificate, PEM.
    #[must_use]
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// The CA's certificate.
    #[must_use]
    pub const fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// SHA-256 of the CA's certificate (DER), hex.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        tls::fingerprint(&self.certificate)
    }

    /// A fresh key and certificate for the controller: for [`tls::CONTROLLER_NAME`] and the names and addresses given.
    ///
    /// # Errors
    /// When a name cannot stand in a certificate.
    pub fn server_identity(&self, names: &[String]) -> Result<Identity, CaError> {
        let key = KeyPair::generate()?;
        let mut params = with_validity(CertificateParams::new(vec![tls::CONTROLLER_NAME.to_owned()])?, SERVER_VALIDITY);
        for name in names {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => SanType::DnsName(name.as_str().try_into()?),
            });
        }
        params.distinguished_name.remove(DnType::CommonName);
        params.distinguished_name.push(DnType::CommonName, DnValue::Utf8String("Supercloud controller".into()));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        Ok(Identity { chain: vec![certificate.der().clone()], key })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ca_is_made_once_and_signs_for_the_controller() {
        let folder = tempfile::tempdir().unwrap();
        let first = Authority::open_or_make(folder.path()).unwrap();
        let again = Authority::open_or_make(folder.path()).unwrap();
        assert_eq!(first.fingerprint(), again.fingerprint());
        let identity = again.server_identity(&["localhost".into(), "127.0.0.1".into()]).unwrap();
        assert!(tls::is_controller_certificate(&identity.chain[0]));
        assert!(again.server_identity(&["ä".into()]).is_err());
        let ca = [again.certificate().clone()];
        assert!(tls::server_config(&ca, identity, &[tls::ALPN_AGENT]).is_ok());
    }
}
