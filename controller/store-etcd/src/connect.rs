//! How an etcd cluster is reached.

use std::{fmt, net::IpAddr, time::Duration};

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use supercloud_store::{Key, StoreError};

use crate::fault;

/// The shortest [`EtcdOptions::call_budget`] that is accepted: a leader election takes about a second.
pub const MIN_CALL_BUDGET: Duration = Duration::from_millis(100);
/// Most servers of one cluster.
const MAX_ENDPOINTS: usize = 64;
/// Longest namespace, in bytes; leaves room for keys in etcd's request limit.
const MAX_NAMESPACE_BYTES: usize = 64;

/// How to reach and use an etcd cluster.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct EtcdOptions {
    /// Where the store's keys live: key `k` is kept at `namespace/k`.
    pub namespace: String,
    /// The cluster's certificate authority and, where it wants one, our certificate. Needed unless all servers are on
    /// this machine.
    pub tls: Option<EtcdTls>,
    /// User and password, where etcd's authentication is on.
    pub user: Option<(String, String)>,
    /// How long a call may take, over all servers tried.
    pub call_budget: Duration,
}

impl Default for EtcdOptions {
    fn default() -> Self {
        Self { namespace: "supercloud".into(), tls: None, user: None, call_budget: Duration::from_secs(10) }
    }
}

/// What TLS to an etcd cluster needs, all in PEM.
#[derive(Clone)]
pub struct EtcdTls {
    /// The authorities that sign the servers' certificates.
    pub ca_pem: String,
    /// Our certificate chain and key.
    pub identity_pem: Option<(String, String)>,
    /// The name expected in the servers' certificates, if it is not the endpoint's host.
    pub domain: Option<String>,
}

/// Without the key.
impl fmt::Debug for EtcdTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdTls").field("domain", &self.domain).finish_non_exhaustive()
    }
}

fn refuse(reason: String) -> StoreError {
    StoreError::InvalidArgument { reason }
}

/// Checks options and endpoints; pure.
pub(crate) fn check(endpoints: &[String], options: &EtcdOptions) -> Result<(), StoreError> {
    Key::new(options.namespace.clone())?;
    if options.namespace.len() > MAX_NAMESPACE_BYTES {
        return Err(refuse(format!("an etcd namespace has at most {MAX_NAMESPACE_BYTES} bytes")));
    }
    if options.call_budget < MIN_CALL_BUDGET {
        return Err(refuse(format!("the time for an etcd call is at least {MIN_CALL_BUDGET:?}")));
    }
    if endpoints.is_empty() || endpoints.len() > MAX_ENDPOINTS {
        return Err(refuse(format!("1 to {MAX_ENDPOINTS} etcd servers are needed, {} are given", endpoints.len())));
    }
    for endpoint in endpoints {
        match (endpoint.strip_prefix("http://"), endpoint.starts_with("https://"), &options.tls) {
            (Some(host), _, None) if is_loopback(host) => {}
            (Some(_), _, None) => {
                return Err(refuse(format!(
                    "etcd at {endpoint}: without TLS only a server on this machine is accepted"
                )));
            }
            (None, true, Some(_)) => {}
            _ => return Err(refuse(format!("etcd at {endpoint}: https:// with TLS options, or http:// without"))),
        }
    }
    Ok(())
}

/// Whether `host[:port][/path]` is this machine.
fn is_loopback(host: &str) -> bool {
    let authority = host.split('/').next().unwrap_or_default();
    let name = match authority.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Makes a client; connections are made, and made again, as calls need them.
pub(crate) async fn client(endpoints: &[String], options: &EtcdOptions) -> Result<Client, StoreError> {
    check(endpoints, options)?;
    let mut connect = ConnectOptions::new()
        .with_connect_timeout(options.call_budget / 2)
        // A server that is gone without a word is noticed, also by an idle watch.
        .with_keep_alive(Duration::from_secs(5), Duration::from_secs(5))
        .with_keep_alive_while_idle(true)
        // A server cut off from its cluster refuses instead of serving what is old.
        .with_require_leader(true)
        .with_auto_token_refresh(true);
    if let Some((name, password)) = &options.user {
        connect = connect.with_user(name, password);
    }
    if let Some(tls) = &options.tls {
        let mut settings = TlsOptions::new().ca_certificate(Certificate::from_pem(&tls.ca_pem));
        if let Some((certificate, key)) = &tls.identity_pem {
            settings = settings.identity(Identity::from_pem(certificate, key));
        }
        if let Some(domain) = &tls.domain {
            settings = settings.domain_name(domain);
        }
        connect = connect.with_tls(settings);
    }
    let connecting = Client::connect(endpoints, Some(connect));
    fault::within(options.call_budget, connecting).await.map_err(|fault| fault.reading("connect to etcd"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_is_for_this_machine_only() {
        let with = |endpoint: &str, tls: bool| {
            let tls = tls.then(|| EtcdTls { ca_pem: String::new(), identity_pem: None, domain: None });
            check(&[endpoint.to_owned()], &EtcdOptions { tls, ..EtcdOptions::default() }).is_ok()
        };
        for local in ["http://127.0.0.1:2379", "http://localhost:2379/", "http://[::1]:2379", "http://127.9.9.9"] {
            assert!(with(local, false), "{local}");
            assert!(!with(local, true), "{local} with TLS");
        }
        for remote in
            ["http://10.0.0.1:2379", "http://etcd:2379", "http://localhost.example.org", "http://127.0.0.1.example.org"]
        {
            assert!(!with(remote, false), "{remote}");
        }
        assert!(with("https://etcd:2379", true));
        assert!(!with("https://etcd:2379", false));
        assert!(!with("etcd:2379", false) && !with("ftp://localhost", false));
    }

    #[test]
    fn options_are_checked() {
        let here = ["http://127.0.0.1:2379".to_owned()];
        let with = |change: fn(&mut EtcdOptions)| {
            let mut options = EtcdOptions::default();
            change(&mut options);
            check(&here, &options).is_ok()
        };
        assert!(with(|_| ()));
        assert!(!with(|o| o.namespace = "a/".into()));
        assert!(!with(|o| o.namespace = "n".repeat(65)));
        assert!(!with(|o| o.call_budget = Duration::ZERO));
        assert!(check(&[], &EtcdOptions::default()).is_err());
    }

    #[test]
    fn keys_are_not_shown() {
        let identity_pem = Some(("certificate".to_owned(), "hidden".to_owned()));
        let tls = EtcdTls { ca_pem: "ca".into(), identity_pem, domain: None };
        assert!(!format!("{tls:?}").contains("hidden"));
    }
}
