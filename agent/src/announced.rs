//! What this machine's provider has announced for it, heard where the provider tells the machine itself: two minutes before EC2 takes a
//! spot instance, half a minute before Google takes a preemptible one. It goes to the controller with each heartbeat.
//!
//! - EC2: instance metadata service, version 2 ("Use IMDSv2", "Spot Instance interruption notices", "EC2 instance rebalance
//!   recommendations" of the EC2 User Guide): a session token by `PUT`, then `spot/instance-action` and
//!   `events/recommendations/rebalance`, which are not found as long as nothing is announced.
//! - Google: `instance/preempted` of the metadata server ("Preemptible VM instances" of the Compute Engine documentation), `TRUE` from
//!   the notice on.

use std::{path::Path, time::Duration};

use reqwest::{Client, Method, RequestBuilder, StatusCode};
use serde::{Deserialize, Serialize};
use supercloud_api::{HostNoticeKind, link::Announced};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

/// Where link-local metadata services are, of all providers.
const ENDPOINT: &str = "http://169.254.169.254";
/// How long an answer may take: it comes from the machine's own hypervisor.
const BUDGET: Duration = Duration::from_secs(2);
/// The longest answer that is read, in bytes.
const MAX_ANSWER_BYTES: usize = 4 << 10;
/// How long a session token is asked for, in seconds, and when a new one is asked for.
const TOKEN_S: u64 = 21_600;
const TOKEN_FOR: Duration = Duration::from_secs(TOKEN_S / 2);
/// Troubles are told of this often.
const TELL_EVERY: Duration = Duration::from_secs(3600);

/// Who tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Whom the machine's firmware names.
    #[default]
    Auto,
    /// Nobody.
    Off,
    /// EC2.
    Ec2,
    /// Google Compute Engine.
    Gce,
}

/// Where it is heard: `[provider_notices]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProviderNotices {
    /// Who tells.
    pub source: Source,
    /// Where the metadata service is, `http://` and an authority; where all have it when absent.
    pub endpoint: Option<String>,
}

impl ProviderNotices {
    /// Refuses an endpoint that is none.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), String> {
        let Some(endpoint) = &self.endpoint else { return Ok(()) };
        match reqwest::Url::parse(endpoint) {
            Ok(url) if url.scheme() == "http" && url.has_host() && url.path() == "/" => Ok(()),
            _ => Err(format!("'{endpoint}' must be http:// with an address, without a path")),
        }
    }
}

/// Providers that tell machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Provider {
    Ec2,
    Gce,
}

impl Provider {
    /// By what the firmware says (`/sys/class/dmi/id`): `sys_vendor` and `bios_version`.
    fn of_firmware(vendor: &str, bios: &str) -> Option<Self> {
        if vendor.starts_with("Amazon EC2") || bios.ends_with(".amazon") {
            return Some(Self::Ec2);
        }
        (vendor == "Google").then_some(Self::Gce)
    }

    /// As often as the provider advises, or as its short notice wants.
    const fn every(self) -> Duration {
        match self {
            Self::Ec2 => Duration::from_secs(5),
            Self::Gce => Duration::from_secs(1),
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum HearError {
    #[error("the metadata service does not answer")]
    Http(#[from] reqwest::Error),
    #[error("the metadata service answers {what} with {status}")]
    Status { what: &'static str, status: StatusCode },
    #[error("the metadata service's answer to {what} is not understood")]
    Answer { what: &'static str },
}

/// Follows what is announced, until `cancel`; nothing where no provider tells.
pub async fn follow(config: ProviderNotices, told: watch::Sender<Option<Announced>>, cancel: CancellationToken) {
    let provider = match config.source {
        Source::Off => None,
        Source::Ec2 => Some(Provider::Ec2),
        Source::Gce => Some(Provider::Gce),
        Source::Auto => of_this_machine(Path::new("/sys/class/dmi/id")).await,
    };
    let Some(provider) = provider else { return };
    // A proxy would be another machine's metadata; so would be wherever one is sent to from there.
    let client = Client::builder().timeout(BUDGET).no_proxy().redirect(reqwest::redirect::Policy::none()).build();
    let client = match client {
        Ok(client) => client,
        Err(error) => {
            tracing::warn!(error = crate::chain(&error), "what the provider announces is not heard");
            return;
        }
    };
    let endpoint = config.endpoint.unwrap_or_else(|| ENDPOINT.to_owned());
    let endpoint = endpoint.trim_end_matches('/').to_owned();
    tracing::info!(?provider, endpoint, "listens to what the provider announces for this machine");
    let mut service = Service { client, endpoint, token: None };
    let mut said_trouble: Option<Instant> = None;
    loop {
        let heard = tokio::select! {
            () = cancel.cancelled() => return,
            heard = service.hear(provider) => heard,
        };
        match heard {
            Ok(announced) => {
                let is_news = told.send_if_modified(|had| std::mem::replace(had, announced) != announced);
                if is_news {
                    tracing::warn!(?announced, "the provider has announced something for this machine");
                }
            }
            Err(error) => {
                if said_trouble.is_none_or(|at| at.elapsed() > TELL_EVERY) {
                    said_trouble = Some(Instant::now());
                    tracing::warn!(error = crate::chain(&error), "what the provider announces is not heard just now");
                }
            }
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(provider.every()) => {}
        }
    }
}

async fn of_this_machine(folder: &Path) -> Option<Provider> {
    let read = async |name| tokio::fs::read_to_string(folder.join(name)).await.unwrap_or_default();
    Provider::of_firmware(read("sys_vendor").await.trim(), read("bios_version").await.trim())
}

struct Service {
    client: Client,
    endpoint: String,
    /// EC2's session, and since when.
    token: Option<(String, Instant)>,
}

impl Service {
    async fn hear(&mut self, provider: Provider) -> Result<Option<Announced>, HearError> {
        match provider {
            Provider::Ec2 => self.hear_ec2().await,
            Provider::Gce => self.hear_gce().await,
        }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}/{path}", self.endpoint))
    }

    async fn hear_gce(&self) -> Result<Option<Announced>, HearError> {
        let what = "instance/preempted";
        let path = format!("computeMetadata/v1/{what}");
        let answer = self.request(Method::GET, &path).header("Metadata-Flavor", "Google").send().await?;
        match text(what, answer).await?.as_deref().map(str::trim) {
            Some("TRUE") => Ok(Some(Announced { kind: HostNoticeKind::Interruption, at_ms: None })),
            Some("FALSE") | None => Ok(None),
            Some(_) => Err(HearError::Answer { what }),
        }
    }

    async fn hear_ec2(&mut self) -> Result<Option<Announced>, HearError> {
        #[derive(Deserialize)]
        struct InstanceAction {
            action: String,
            time: String,
        }
        // Whatever it is called (terminate, stop, hibernate): it runs no more after that.
        let what = "spot/instance-action";
        if let Some(answer) = self.ec2(what).await? {
            let said: InstanceAction = serde_json::from_str(&answer).map_err(|_| HearError::Answer { what })?;
            if said.action.is_empty() {
                return Err(HearError::Answer { what });
            }
            return Ok(Some(Announced { kind: HostNoticeKind::Interruption, at_ms: unix_ms(&said.time) }));
        }
        let hint = self.ec2("events/recommendations/rebalance").await?;
        Ok(hint.map(|_| Announced { kind: HostNoticeKind::Rebalance, at_ms: None }))
    }

    /// A path's text, if there is one.
    async fn ec2(&mut self, what: &'static str) -> Result<Option<String>, HearError> {
        for is_last in [false, true] {
            let token = match self.token.take_if(|(_, since)| since.elapsed() < TOKEN_FOR) {
                Some(token) => token,
                None => self.new_token().await?,
            };
            let path = format!("latest/meta-data/{what}");
            let answer = self.request(Method::GET, &path).header("X-aws-ec2-metadata-token", &token.0).send().await?;
            // It counts for another machine, or no more: this one was stopped and begun again.
            if answer.status() == StatusCode::UNAUTHORIZED && !is_last {
                continue;
            }
            self.token = Some(token);
            return text(what, answer).await;
        }
        Ok(None)
    }

    async fn new_token(&self) -> Result<(String, Instant), HearError> {
        let what = "api/token";
        let request = self.request(Method::PUT, &format!("latest/{what}"));
        let answer = request.header("X-aws-ec2-metadata-token-ttl-seconds", TOKEN_S).send().await?;
        let token = text(what, answer).await?.unwrap_or_default();
        // It goes into a header.
        if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(HearError::Answer { what });
        }
        Ok((token, Instant::now()))
    }
}

/// An answer's text; `None`: there is no such thing.
async fn text(what: &'static str, mut answer: reqwest::Response) -> Result<Option<String>, HearError> {
    match answer.status() {
        StatusCode::OK => {}
        StatusCode::NOT_FOUND => return Ok(None),
        status => return Err(HearError::Status { what, status }),
    }
    let mut bytes = Vec::new();
    while let Some(piece) = answer.chunk().await? {
        if bytes.len() + piece.len() > MAX_ANSWER_BYTES {
            return Err(HearError::Answer { what });
        }
        bytes.extend_from_slice(&piece);
    }
    String::from_utf8(bytes).map(Some).map_err(|_| HearError::Answer { what })
}

/// A time as EC2 writes it; one that is not understood is soon.
fn unix_ms(time: &str) -> Option<u64> {
    let time = OffsetDateTime::parse(time, &Rfc3339).ok()?;
    u64::try_from(time.unix_timestamp()).ok()?.checked_mul(1000)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
        task::JoinSet,
    };

    use super::*;

    /// What the metadata service of a test answers, after AWS's and Google's documentation.
    #[derive(Default)]
    struct Metadata {
        tokens: u32,
        /// The token that counts.
        valid: Option<String>,
        action: Option<&'static str>,
        rebalance: Option<&'static str>,
        preempted: Option<&'static str>,
    }

    impl Metadata {
        fn answer(&mut self, request: &str) -> (u16, String) {
            let mut lines = request.lines();
            let first = lines.next().unwrap_or_default();
            let header = |name: &str| {
                let mut lines = request.lines().skip(1);
                lines.find_map(|line| line.to_ascii_lowercase().strip_prefix(&format!("{name}: ")).map(str::to_owned))
            };
            if first.starts_with("PUT /latest/api/token ") {
                assert_eq!(header("x-aws-ec2-metadata-token-ttl-seconds").unwrap(), "21600");
                self.tokens += 1;
                let token = format!("token-{}==", self.tokens);
                self.valid = Some(token.clone());
                return (200, token);
            }
            let found = |text: Option<&str>| text.map_or((404, "not found".to_owned()), |text| (200, text.to_owned()));
            if first.starts_with("GET /computeMetadata/v1/instance/preempted ") {
                return match header("metadata-flavor").as_deref() {
                    Some("google") => found(self.preempted),
                    _ => (403, String::new()),
                };
            }
            if header("x-aws-ec2-metadata-token") != self.valid || self.valid.is_none() {
                return (401, String::new());
            }
            match first.split(' ').nth(1) {
                Some("/latest/meta-data/spot/instance-action") => found(self.action),
                Some("/latest/meta-data/events/recommendations/rebalance") => found(self.rebalance),
                other => panic!("{other:?}"),
            }
        }
    }

    async fn talk(mut stream: TcpStream, metadata: Arc<Mutex<Metadata>>) {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            let Ok(byte) = stream.read_u8().await else { return };
            request.push(byte);
        }
        let (status, text) = metadata.lock().unwrap().answer(std::str::from_utf8(&request).unwrap());
        let length = text.len();
        let head = format!("HTTP/1.1 {status} x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
        let _ = stream.write_all((head + &text).as_bytes()).await;
    }

    /// A service, and what it answers with from now on.
    async fn service(tasks: &mut JoinSet<()>) -> (Service, Arc<Mutex<Metadata>>) {
        supercloud_api::tls::install_provider();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let metadata = Arc::new(Mutex::new(Metadata::default()));
        let served = metadata.clone();
        tasks.spawn(async move {
            loop {
                talk(listener.accept().await.unwrap().0, served.clone()).await;
            }
        });
        let client = Client::builder().timeout(BUDGET).no_proxy().build().unwrap();
        (Service { client, endpoint, token: None }, metadata)
    }

    #[tokio::test]
    async fn ec2_tells_of_a_hint_then_of_the_end_and_its_sessions_end_too() {
        let mut tasks = JoinSet::new();
        let (mut service, metadata) = service(&mut tasks).await;
        assert_eq!(service.hear(Provider::Ec2).await.unwrap(), None);
        metadata.lock().unwrap().rebalance = Some(r#"{"noticeTime": "2020-10-27T08:22:00Z"}"#);
        let hint = Announced { kind: HostNoticeKind::Rebalance, at_ms: None };
        assert_eq!(service.hear(Provider::Ec2).await.unwrap(), Some(hint));
        assert_eq!(metadata.lock().unwrap().tokens, 1, "one session for all");
        // Stopped and begun again: the old token counts no more.
        metadata.lock().unwrap().valid = None;
        metadata.lock().unwrap().action = Some(r#"{"action": "terminate", "time": "2017-09-18T08:22:00Z"}"#);
        let end = Announced { kind: HostNoticeKind::Interruption, at_ms: Some(1_505_722_920_000) };
        assert_eq!(service.hear(Provider::Ec2).await.unwrap(), Some(end));
        assert_eq!(metadata.lock().unwrap().tokens, 2);
    }

    #[tokio::test]
    async fn nonsense_is_an_error_and_no_announcement() {
        let mut tasks = JoinSet::new();
        let (mut service, metadata) = service(&mut tasks).await;
        for action in ["", "[]", r#"{"action": "", "time": ""}"#, r#"{"time": "2017-09-18T08:22:00Z"}"#] {
            metadata.lock().unwrap().action = Some(action);
            assert!(service.hear(Provider::Ec2).await.is_err(), "{action}");
        }
        let long: &'static str = Box::leak("x".repeat(MAX_ANSWER_BYTES + 1).into_boxed_str());
        metadata.lock().unwrap().action = Some(long);
        assert!(service.hear(Provider::Ec2).await.is_err());
        // A time that is none: soon.
        metadata.lock().unwrap().action = Some(r#"{"action": "hibernate", "time": "soon"}"#);
        let end = Announced { kind: HostNoticeKind::Interruption, at_ms: None };
        assert_eq!(service.hear(Provider::Ec2).await.unwrap(), Some(end));
        metadata.lock().unwrap().preempted = Some("perhaps");
        assert!(service.hear(Provider::Gce).await.is_err());
    }

    #[tokio::test]
    async fn google_tells_of_the_end() {
        let mut tasks = JoinSet::new();
        let (mut service, metadata) = service(&mut tasks).await;
        assert_eq!(service.hear(Provider::Gce).await.unwrap(), None);
        metadata.lock().unwrap().preempted = Some("FALSE");
        assert_eq!(service.hear(Provider::Gce).await.unwrap(), None);
        metadata.lock().unwrap().preempted = Some("TRUE\n");
        let end = Announced { kind: HostNoticeKind::Interruption, at_ms: None };
        assert_eq!(service.hear(Provider::Gce).await.unwrap(), Some(end));
    }

    #[tokio::test(start_paused = true)]
    async fn a_service_that_is_not_there_changes_nothing() {
        supercloud_api::tls::install_provider();
        let (told, mut heard) = watch::channel(None);
        let cancel = CancellationToken::new();
        let config = ProviderNotices { source: Source::Ec2, endpoint: Some("http://127.0.0.1:1".to_owned()) };
        let follow = tokio::spawn(follow(config, told, cancel.clone()));
        tokio::time::sleep(Duration::from_secs(60)).await;
        cancel.cancel();
        follow.await.unwrap();
        assert_eq!(*heard.borrow_and_update(), None);
    }

    #[test]
    fn providers_are_known_by_the_firmware() {
        assert_eq!(Provider::of_firmware("Amazon EC2", "1.0"), Some(Provider::Ec2));
        assert_eq!(Provider::of_firmware("Xen", "4.11.amazon"), Some(Provider::Ec2));
        assert_eq!(Provider::of_firmware("Google", "Google"), Some(Provider::Gce));
        assert_eq!(Provider::of_firmware("QEMU", "1.16.2-debian-1.16.2-1"), None);
    }

    #[test]
    fn an_endpoint_is_an_authority() {
        let check = |endpoint: &str| ProviderNotices { source: Source::Auto, endpoint: Some(endpoint.into()) }.check();
        for good in ["http://169.254.169.254", "http://127.0.0.1:8080/", "http://[fd00:ec2::254]"] {
            check(good).unwrap();
        }
        for bad in ["", "169.254.169.254", "https://x", "http://x/latest", "file:///etc/passwd"] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }
}
