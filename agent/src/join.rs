//! How a host joins: a one-time token, a key made here, and TLS that trusts nobody but the CA that the token names.
//!
//! The token is `scjoin.<host>.<secret>.<SHA-256 of the CA's certificate, hex>`. The host does not have the CA's
//! certificate yet: the controller shows it as part of its chain, and the fingerprint says whether it is the right one.

use std::{sync::Arc, time::Duration};

use rustls::{
    ClientConfig, DigitallySignedStruct, Error as TlsError, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use supercloud_api::{JoinRequest, JoinResponse, Problem, tls};
use supercloud_ids::HostId;

use crate::identity::{Identity, IdentityError, Request};

/// The longest answer that is read, in bytes.
const MAX_ANSWER_BYTES: usize = 256 << 10;
/// How long one try may take.
const TRY_BUDGET: Duration = Duration::from_secs(15);
/// How long joining is tried while the controller cannot be reached: as long as a token may live.
const JOIN_BUDGET: Duration = Duration::from_secs(900);

/// Why this host could not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The token is not of the form that the controller gives.
    #[error("this is not a join token (want scjoin.<host>.<secret>.<fingerprint>)")]
    Token,
    /// The configured CA is not the one that the token names.
    #[error("the CA in {path} is not the one that the join token names")]
    OtherCa {
        /// The file.
        path: String,
    },
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No HTTP client can be made.
    #[error("no HTTP client can be made")]
    Client(#[source] reqwest::Error),
    /// The controller cannot be reached, or is not the one that the token names.
    #[error("cannot reach the controller at {url}")]
    Unreachable {
        /// Where.
        url: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// The controller refuses.
    #[error("the controller refuses the join")]
    Refused(#[source] Problem),
    /// The answer is not understood.
    #[error("the controller's answer is not understood: {0}")]
    Answer(String),
    /// What came is no identity for this host.
    #[error("what the controller gave is not usable")]
    Identity(#[from] IdentityError),
}

/// A join token, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Token {
    host: HostId,
    ca_sha256: String,
}

impl Token {
    fn parse(text: &str) -> Result<Self, JoinError> {
        let parts: Vec<&str> = text.split('.').collect();
        let ["scjoin", host, secret, fingerprint] = parts[..] else { return Err(JoinError::Token) };
        let is_fingerprint = hex::decode(fingerprint).is_ok_and(|bytes| bytes.len() == 32);
        if secret.is_empty() || !is_fingerprint || text.len() > 1024 {
            return Err(JoinError::Token);
        }
        let host = host.parse().map_err(|_| JoinError::Token)?;
        Ok(Self { host, ca_sha256: fingerprint.to_ascii_lowercase() })
    }
}

/// Joins with a token: makes the key, has it certified, and returns what is to be kept. Tries again while the controller
/// cannot be reached; a refusal is final.
///
/// # Errors
/// What went wrong.
pub async fn join(controller_url: &str, token: &str, ca_file: Option<&std::path::Path>) -> Result<Identity, JoinError> {
    let token_text = token.trim();
    let token = Token::parse(token_text)?;
    if let Some(path) = ca_file {
        let name = path.display().to_string();
        let pem =
            tokio::fs::read_to_string(path).await.map_err(|source| JoinError::Read { path: name.clone(), source })?;
        let ca = tls::certificates_of_pem(&pem).map_err(IdentityError::from)?;
        if !ca.iter().any(|certificate| tls::fingerprint(certificate) == token.ca_sha256) {
            return Err(JoinError::OtherCa { path: name });
        }
    }
    let request = Request::make(token.host)?;
    let body = JoinRequest { token: token_text.to_owned(), csr_pem: request.csr_pem.clone() };
    let client = reqwest::Client::builder()
        .use_preconfigured_tls(pinned_config(token.ca_sha256.clone()))
        .https_only(true)
        .no_proxy()
        .timeout(TRY_BUDGET)
        .build()
        .map_err(JoinError::Client)?;
    let url = format!("{}/v1/join", controller_url.trim_end_matches('/'));
    let answer = ask(&client, &url, &body).await?;
    if answer.host != token.host {
        return Err(JoinError::Answer(format!("it is for {}", answer.host)));
    }
    // The CA for everything that follows: it must be the one that the token names, and nothing beside it.
    let ca = tls::certificates_of_pem(&answer.ca_pem).map_err(IdentityError::from)?;
    if ca.len() != 1 || tls::fingerprint(&ca[0]) != token.ca_sha256 {
        return Err(JoinError::Answer("it names another CA than the token".to_owned()));
    }
    Ok(request.complete(answer.host, answer.certificate_pem, answer.ca_pem, answer.link_address)?)
}

async fn ask(client: &reqwest::Client, url: &str, body: &JoinRequest) -> Result<JoinResponse, JoinError> {
    let deadline = tokio::time::Instant::now() + JOIN_BUDGET;
    let mut pause = Duration::from_millis(200);
    loop {
        let error = match ask_once(client, url, body).await {
            Err(error @ JoinError::Unreachable { .. }) => error,
            Err(JoinError::Refused(problem)) if problem.retryable => JoinError::Refused(problem),
            other => return other,
        };
        if tokio::time::Instant::now() + pause >= deadline {
            return Err(error);
        }
        tracing::warn!(error = %crate::chain(&error), "the controller does not answer yet; trying again");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(5));
    }
}

async fn ask_once(client: &reqwest::Client, url: &str, body: &JoinRequest) -> Result<JoinResponse, JoinError> {
    let unreachable = |source| JoinError::Unreachable { url: url.to_owned(), source };
    let mut response = client.post(url).json(body).send().await.map_err(unreachable)?;
    let mut bytes = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(unreachable)? {
        if bytes.len() + piece.len() > MAX_ANSWER_BYTES {
            return Err(JoinError::Answer("it is too long".to_owned()));
        }
        bytes.extend_from_slice(&piece);
    }
    if response.status().is_success() {
        return serde_json::from_slice(&bytes).map_err(|error| JoinError::Answer(error.to_string()));
    }
    match serde_json::from_slice::<Problem>(&bytes) {
        Ok(problem) => Err(JoinError::Refused(problem)),
        Err(_) => Err(JoinError::Answer(response.status().to_string())),
    }
}

fn pinned_config(ca_sha256: String) -> ClientConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = PinnedCa { ca_sha256, provider: provider.clone() };
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    // ring's provider has the default versions' cipher suites.
    #[expect(clippy::expect_used, reason = "a property of the linked provider, not of input")]
    let builder = builder.expect("ring supports the default protocol versions");
    builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier)).with_no_client_auth()
}

/// Trusts a chain that hangs on the one CA whose fingerprint is known; names and dates are checked as always.
#[derive(Debug)]
struct PinnedCa {
    ca_sha256: String,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let ca = intermediates.iter().find(|certificate| tls::fingerprint(certificate) == self.ca_sha256);
        let ca = ca
            .ok_or_else(|| TlsError::General("the server does not show the CA that the join token names".to_owned()))?;
        let mut roots = rustls::RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|error| TlsError::General(error.to_string()))?
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_controllers_form_is_a_token() {
        let host = HostId::generate();
        let fingerprint = "ab".repeat(32);
        let token = Token::parse(&format!("scjoin.{host}.s3cret.{fingerprint}")).unwrap();
        assert_eq!(token, Token { host, ca_sha256: fingerprint.clone() });
        for bad in [
            String::new(),
            "scjoin".into(),
            format!("scjoin.{host}.s3cret"),
            format!("scjoin.{host}..{fingerprint}"),
            format!("scjoin.{host}.s3cret.abcd"),
            format!("other.{host}.s3cret.{fingerprint}"),
            format!("scjoin.x.s3cret.{fingerprint}"),
            format!("scjoin.{host}.s3cret.{fingerprint}.x"),
        ] {
            assert!(matches!(Token::parse(&bad), Err(JoinError::Token)), "{bad}");
        }
    }
}
