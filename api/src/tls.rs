//! Mutual TLS as every link of ours uses it: rustls on ring, TLS 1.3 only, the project's own CA, certificates that name a host.
//!
//! A host's certificate carries its id as a DNS name `<host id>.host.supercloud`, the controller's
//! `controller.supercloud`. Peers dial by these names whatever the address, so no certificate names an address.

use std::sync::Arc;

use rustls::{
    ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore, ServerConfig, SignatureScheme,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime},
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use supercloud_ids::HostId;

/// ALPN of the agent link.
pub const ALPN_AGENT: &[u8] = b"supercloud-agent/1";
/// ALPN of the data plane.
pub const ALPN_DATA: &[u8] = b"supercloud-data/1";
/// The name in the controller's certificate.
pub const CONTROLLER_NAME: &str = "controller.supercloud";
/// What follows the host id in a host's name.
pub const HOST_SUFFIX: &str = ".host.supercloud";

/// The DNS name in a host's certificate.
#[must_use]
pub fn host_dns_name(host: HostId) -> String {
    format!("{host}{HOST_SUFFIX}")
}

/// The host that a DNS name names.
#[must_use]
pub fn host_of_dns_name(name: &str) -> Option<HostId> {
    name.strip_suffix(HOST_SUFFIX)?.parse().ok()
}

/// SHA-256 of a certificate (DER), hex.
#[must_use]
pub fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    hex::encode(ring::digest::digest(&ring::digest::SHA256, certificate.as_ref()).as_ref())
}

/// An identity: certificate chain and key.
#[derive(Debug)]
pub struct Identity {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self { chain: self.chain.clone(), key: self.key.clone_key() }
    }
}

/// Why PEM or TLS material cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MaterialError {
    /// The PEM text holds no such thing.
    #[error("no {0} in the PEM text")]
    Missing(&'static str),
    /// rustls does not take it.
    #[error("the TLS material is not acceptable")]
    Tls(#[from] TlsError),
    /// The verifier cannot be built.
    #[error("the CA is not acceptable: {0}")]
    Verifier(String),
}

/// Certificates of a PEM text.
///
/// # Errors
/// When there is none.
pub fn certificates_of_pem(pem: &str) -> Result<Vec<CertificateDer<'static>>, MaterialError> {
    use rustls::pki_types::pem::PemObject as _;
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes()).filter_map(Result::ok).collect();
    if found.is_empty() { Err(MaterialError::Missing("certificate")) } else { Ok(found) }
}

/// The private key of a PEM text.
///
/// # Errors
/// When there is none.
pub fn key_of_pem(pem: &str) -> Result<PrivateKeyDer<'static>, MaterialError> {
    use rustls::pki_types::pem::PemObject as _;
    PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| MaterialError::Missing("private key"))
}

/// A root store of the CA alone.
///
/// # Errors
/// When the CA's certificate is not acceptable.
pub fn roots(ca: &[CertificateDer<'static>]) -> Result<RootCertStore, MaterialError> {
    let mut store = RootCertStore::empty();
    for certificate in ca {
        store.add(certificate.clone())?;
    }
    Ok(store)
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Makes ring the process's default provider; libraries that ask for "the default" (the REST client) need it.
pub fn install_provider() {
    // A second call finds one installed, which is what is wanted.
    let _already = rustls::crypto::ring::default_provider().install_default();
}

/// A client that trusts our CA and shows `identity`.
///
/// # Errors
/// When the material is not acceptable.
pub fn client_config(
    ca: &[CertificateDer<'static>],
    identity: Identity,
    alpn: &[u8],
) -> Result<ClientConfig, MaterialError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots(ca)?)
        .with_client_auth_cert(identity.chain, identity.key)?;
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(config)
}

/// A server that trusts our CA, demands a certificate of it and shows `identity`.
///
/// # Errors
/// When the material is not acceptable.
pub fn server_config(
    ca: &[CertificateDer<'static>],
    identity: Identity,
    alpn: &[&[u8]],
) -> Result<ServerConfig, MaterialError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(ca)?), provider())
        .build()
        .map_err(|e| MaterialError::Verifier(e.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(NoNames(verifier)))
        .with_single_cert(identity.chain, identity.key)?;
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(config)
}

/// The server name under which a host is dialled.
///
/// # Panics
/// Never: an id makes a valid DNS name.
#[must_use]
pub fn host_server_name(host: HostId) -> ServerName<'static> {
    ServerName::try_from(host_dns_name(host)).unwrap_or_else(|_| controller_server_name())
}

/// The server name under which the controller is dialled.
///
/// # Panics
/// Never: it is a constant.
#[must_use]
#[expect(clippy::unwrap_used, reason = "a constant DNS name")]
pub fn controller_server_name() -> ServerName<'static> {
    ServerName::try_from(CONTROLLER_NAME).unwrap()
}

/// Keeps the list of accepted CAs out of the handshake: a stranger learns nothing from it.
#[derive(Debug)]
struct NoNames(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for NoNames {
    fn root_hint_subjects(&self) -> &[rustls::DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, TlsError> {
        self.0.verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, TlsError> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, TlsError> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

/// The host named by a peer's certificate, which the handshake has already checked against the CA.
#[must_use]
pub fn host_of_certificate(certificate: &CertificateDer<'_>) -> Option<HostId> {
    names_of_certificate(certificate).iter().find_map(|name| host_of_dns_name(name))
}

/// Whether a peer's certificate, which the handshake has already checked, is the controller's.
#[must_use]
pub fn is_controller_certificate(certificate: &CertificateDer<'_>) -> bool {
    names_of_certificate(certificate).iter().any(|name| name == CONTROLLER_NAME)
}

fn names_of_certificate(certificate: &CertificateDer<'_>) -> Vec<String> {
    use x509_parser::{extensions::GeneralName, prelude::FromDer as _};
    let Ok((_, parsed)) = x509_parser::certificate::X509Certificate::from_der(certificate.as_ref()) else {
        return Vec::new();
    };
    let Ok(Some(names)) = parsed.subject_alternative_name() else { return Vec::new() };
    names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::DNSName(dns) => Some((*dns).to_owned()),
            _ => None,
        })
        .collect()
}
