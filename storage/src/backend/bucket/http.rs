//! How requests to a bucket travel: the workspace's own HTTP client, with bounds on time and size.

use std::{error::Error, path::Path, pin::Pin, time::Duration};

use http_body_util::{BodyExt as _, Limited};
use object_store::{
    ClientOptions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
    },
};

use super::BucketError;

const CONNECT_BUDGET: Duration = Duration::from_secs(5);
/// One attempt, its body included.
pub(super) const REQUEST_BUDGET: Duration = Duration::from_secs(30);
/// The largest answer that is read: pages of 1000 names, objects of some MiB at most.
const ANSWER_BYTES: usize = 16 << 20;
/// The largest file of authorities.
const CA_BYTES: u64 = 4 << 20;

#[derive(Debug, Clone)]
pub(super) struct Connector(reqwest::Client);

impl Connector {
    /// Blocking: reads the authorities.
    pub(super) fn new(ca_file: &Path, is_plain: bool) -> Result<Self, BucketError> {
        // The process may have chosen one already; any will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("supercloud/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_BUDGET)
            .timeout(REQUEST_BUDGET)
            .tcp_keepalive(Duration::from_secs(15))
            // What was signed for one host is not shown to another.
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy();
        if !is_plain {
            use std::io::Read as _;
            let failed = |source| BucketError::File { path: ca_file.display().to_string(), source };
            let mut pem = Vec::new();
            let file = std::fs::File::open(ca_file).map_err(failed)?;
            file.take(CA_BYTES).read_to_end(&mut pem).map_err(failed)?;
            let authorities = reqwest::Certificate::from_pem_bundle(&pem);
            for authority in authorities.map_err(|error| BucketError::Client(error.to_string()))? {
                builder = builder.add_root_certificate(authority);
            }
        }
        Ok(Self(builder.build().map_err(|error| BucketError::Client(error.to_string()))?))
    }

    async fn send(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        // Chunks are small: as a whole, so that the length is known.
        let body = body.collect().await?.to_bytes();
        let request = reqwest::Request::try_from(http::Request::from_parts(parts, body));
        let request = request.map_err(|error| HttpError::new(HttpErrorKind::Unknown, error.without_url()))?;
        let response = self.0.execute(request).await.map_err(told)?;
        let (parts, body) = http::Response::<reqwest::Body>::from(response).into_parts();
        let too_large = |error: Box<dyn Error + Send + Sync>| match error.downcast::<reqwest::Error>() {
            Ok(error) => told(*error),
            Err(error) => HttpError::new_boxed(HttpErrorKind::Decode, error),
        };
        let body = HttpResponseBody::new(Limited::new(body, ANSWER_BYTES).map_err(too_large));
        Ok(HttpResponse::from_parts(parts, body))
    }
}

/// What is worth another attempt is for the client to decide, by the kind.
fn told(error: reqwest::Error) -> HttpError {
    let kind = if error.is_timeout() {
        HttpErrorKind::Timeout
    } else if error.is_connect() {
        HttpErrorKind::Connect
    } else if error.is_decode() {
        HttpErrorKind::Decode
    } else {
        HttpErrorKind::Interrupted
    };
    HttpError::new(kind, error.without_url())
}

impl HttpService for Connector {
    // What the `async_trait` macro makes of it.
    fn call<'life0, 'async_trait>(
        &'life0 self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'async_trait>>
    where
        'life0: 'async_trait,
        Self: 'async_trait,
    {
        Box::pin(self.send(request))
    }
}

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}
