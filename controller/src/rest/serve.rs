//! The REST listener: TLS with a certificate of our CA that is renewed every day, or plain HTTP on loopback when asked for.

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use axum::Router;
use axum_server::{Handle, tls_rustls::RustlsConfig};
use hyper_util::rt::TokioTimer;
use rustls::ServerConfig;

use crate::{
    app::{Parts, StartError},
    chain,
};

/// How long a client may take to send a request's head; also how long a connection may idle.
const HEAD_BUDGET: Duration = Duration::from_secs(60);
/// How long a TLS handshake may take.
const HANDSHAKE_BUDGET: Duration = Duration::from_secs(10);
/// How long requests that are under way may take once the controller ends.
const DRAIN_BUDGET: Duration = Duration::from_secs(8);
/// A fresh certificate this often.
const RENEW_EVERY: Duration = Duration::from_secs(24 * 3600);
/// HTTP/2 streams of one connection at once.
const STREAMS_PER_CONNECTION: u32 = 128;

fn tls_config(parts: &Parts) -> Result<Arc<ServerConfig>, StartError> {
    let identity = parts.authority.server_identity(&parts.config.names)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = |error: rustls::Error| StartError::Tls(chain(&error));
    // The CA goes along, so that a client can be shown what to pin.
    let mut certificates = identity.chain;
    certificates.push(parts.authority.certificate().clone());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(tls)?
        .with_no_client_auth()
        .with_single_cert(certificates, identity.key)
        .map_err(tls)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Starts to serve; returns where.
///
/// # Errors
/// When the address cannot be had, or TLS not be set up.
pub fn serve(parts: &Parts, router: Router) -> Result<SocketAddr, StartError> {
    let wanted = parts.config.listen;
    let listen = |source| StartError::Listen { address: wanted, source };
    let listener = TcpListener::bind(wanted).map_err(listen)?;
    listener.set_nonblocking(true).map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    let handle = Handle::new();
    let drain = handle.clone();
    let stop = parts.stop.clone();
    parts.spawn_draining("rest drain", async move {
        stop.cancelled().await;
        drain.graceful_shutdown(Some(DRAIN_BUDGET));
    });
    if parts.config.plain_http {
        let mut server = axum_server::from_tcp(listener).map_err(listen)?.handle(handle);
        limit(server.http_builder());
        parts.spawn_draining("rest", async move {
            ended(server.serve(router.into_make_service_with_connect_info::<SocketAddr>()).await)
        });
    } else {
        let config = RustlsConfig::from_config(tls_config(parts)?);
        parts.spawn("certificate renewal", renew(parts.clone(), config.clone()));
        let acceptor = axum_server::tls_rustls::RustlsAcceptor::new(config).handshake_timeout(HANDSHAKE_BUDGET);
        let mut server = axum_server::from_tcp(listener).map_err(listen)?.acceptor(acceptor).handle(handle);
        limit(server.http_builder());
        parts.spawn_draining("rest", async move {
            ended(server.serve(router.into_make_service_with_connect_info::<SocketAddr>()).await)
        });
    }
    Ok(address)
}

fn limit(builder: &mut hyper_util::server::conn::auto::Builder<hyper_util::rt::TokioExecutor>) {
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_BUDGET).max_headers(64);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .max_header_list_size(32 << 10)
        .keep_alive_interval(HEAD_BUDGET)
        .keep_alive_timeout(HANDSHAKE_BUDGET);
}

fn ended(outcome: std::io::Result<()>) {
    if let Err(error) = outcome {
        tracing::error!(%error, "the REST listener failed");
    }
}

async fn renew(parts: Parts, config: RustlsConfig) {
    loop {
        tokio::time::sleep(RENEW_EVERY).await;
        match tls_config(&parts) {
            Ok(fresh) => config.reload_from_config(fresh),
            Err(error) => tracing::error!(error = %chain(&error), "the REST certificate cannot be renewed"),
        }
    }
}
