//! Certificates of hosts: a host's key is made on the host and never leaves it; a CSR gives only its public key, every name
//! in the certificate is ours.

use std::time::Duration;

use rcgen::{CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, KeyUsagePurpose};
use supercloud_api::{ids::HostId, tls};

use super::{Authority, CaError, with_validity};

/// How long a host's certificate holds; its agent renews it over the link.
const HOST_VALIDITY: Duration = Duration::from_secs(7 * 86_400);
/// The longest CSR that is looked at, in bytes.
const MAX_CSR_BYTES: usize = 16 << 10;

impl Authority {
    /// Signs a host's key. Of the CSR only the public key is taken (and its proof of possession checked).
    ///
    /// # Errors
    /// When the CSR is not acceptable.
    pub fn sign_host(&self, host: HostId, csr_pem: &str) -> Result<String, CaError> {
        if csr_pem.len() > MAX_CSR_BYTES {
            return Err(CaError::Csr(format!("it has more than {MAX_CSR_BYTES} bytes")));
        }
        let mut csr =
            CertificateSigningRequestParams::from_pem(csr_pem).map_err(|error| CaError::Csr(error.to_string()))?;
        let mut params = with_validity(CertificateParams::new(vec![tls::host_dns_name(host)])?, HOST_VALIDITY);
        params.distinguished_name.push(DnType::CommonName, host.to_string());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        csr.params = params;
        Ok(csr.signed_by(&self.issuer)?.pem())
    }
}
