//! The typed REST client: TLS pinned to the controller's CA, problems as errors, idempotent retry, long-polled
//! operations, the event stream with resume.

mod blocks;
mod events;

use std::time::{Duration, Instant};

use futures::{Stream, StreamExt as _};
use reqwest::{Method, RequestBuilder, StatusCode};
use serde::{Serialize, de::DeserializeOwned};
use supercloud_ids::{OperationId, PlanId, RentingId, RequestId};

use crate::{
    ChunkStore, Cloud, CloudCreate, Evacuation, Event, FeedClock, FleetPlan, FleetPlanCreate, Freeze, Group,
    GroupCreate, GroupThaw, GroupUpdate, Guest, GuestCreate, GuestFailover, GuestFreeze, GuestMigrate, GuestMirror,
    GuestPatch, GuestStart, GuestStop, GuestThaw, GuestVerdict, HistoryPolicy, Host, HostPatch, HostRent, Image,
    ImageCreate, ImageImport, ImagePart, JoinRequest, JoinResponse, JoinToken, JoinTokenCreate, Ledger, Link, Market,
    Mirror, Network, NetworkCreate, Operation, Page, Placement, Port, PortFlows, PriceSeries, Problem, Project,
    ProjectCreate, Reliability, Renting, Site, Token, TokenCreate, TokenSecret, UploadDigest, VerdictsTaken,
    VerdictsTold, Volume, VolumeAsOf, VolumeHistory, WhoAmI, blocks::BlocksError,
};

pub use blocks::BlockStream;

use events::{STREAM_SILENCE, sse_events};

/// How long one attempt of a request may take when it does not say otherwise.
const REQUEST_BUDGET: Duration = Duration::from_secs(60);
/// How long a request is tried again when the controller cannot be reached or says "retry".
const RETRY_BUDGET: Duration = Duration::from_secs(20);
/// How long an operation is still waited for when the controller does not answer any more: a restart takes less.
const LOST_BUDGET: Duration = Duration::from_secs(120);
/// The longest answer that is read, in bytes.
const MAX_BODY_BYTES: usize = 64 << 20;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The controller answered with a problem.
    #[error("{0}")]
    Problem(Problem),
    /// It could not be reached, or the answer broke off.
    #[error("cannot reach the controller at {url}")]
    Transport {
        /// Where.
        url: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// It was silent for too long.
    #[error("no answer from {url} within {budget:?}")]
    Silent {
        /// Where.
        url: String,
        /// How long it had.
        budget: Duration,
    },
    /// It answered with something that is not what this version of the API says.
    #[error("unexpected answer from {url}: {what}")]
    Unexpected {
        /// Where.
        url: String,
        /// What was wrong.
        what: String,
    },
    /// An event of the stream is none that this version knows; those after it can be asked for.
    #[error("an event{} cannot be read: {what}", seq.map(|seq| format!(" ({seq})")).unwrap_or_default())]
    UnknownEvent {
        /// Its number, where the stream says it.
        seq: Option<u64>,
        /// What is wrong.
        what: String,
    },
    /// The settings make no client.
    #[error("the client cannot be set up: {0}")]
    Setup(String),
    /// A stream of blocks is wrong, or the controller could not go on with it.
    #[error("blocks from {url}")]
    Blocks {
        /// From where.
        url: String,
        /// What is wrong.
        #[source]
        source: BlocksError,
    },
    /// The wait was over before the operation was.
    #[error("operation {0} has not ended yet")]
    StillRunning(OperationId),
}

/// Items of a listing that [`Client::list`] asks for at most.
pub const LIST_AT_MOST: usize = 100_000;

impl ClientError {
    /// The problem, when the controller gave one.
    #[must_use]
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Problem(problem) => Some(problem),
            _ => None,
        }
    }
}

/// Where the controller is and what to show it.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// `https://host:port`, or `http://` on loopback.
    pub url: String,
    /// The bearer's secret.
    pub token: Option<String>,
    /// The controller's CA, PEM. Required with https: no public CA is trusted.
    pub ca_pem: Option<String>,
    /// The project for names and listings, when the token is good for all.
    pub project: Option<String>,
}

/// The client. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    config: ClientConfig,
    is_trial: bool,
}

type Result<T, E = ClientError> = std::result::Result<T, E>;

impl Client {
    /// A client; no connection is made yet.
    ///
    /// # Errors
    /// When URL or CA are not acceptable.
    pub fn new(config: ClientConfig) -> Result<Self> {
        crate::tls::install_provider();
        let url = reqwest::Url::parse(&config.url).map_err(|e| ClientError::Setup(format!("'{}': {e}", config.url)))?;
        let host = url.host_str().unwrap_or_default().to_owned();
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("supercloud/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(Duration::from_secs(10))
            .tcp_keepalive(Duration::from_secs(15))
            .no_proxy();
        match url.scheme() {
            "https" => {
                let pem = config.ca_pem.as_deref().ok_or_else(|| {
                    ClientError::Setup("https needs the controller's CA (--ca FILE or SUPERCLOUD_CA)".into())
                })?;
                let ca = reqwest::Certificate::from_pem(pem.as_bytes())
                    .map_err(|e| ClientError::Setup(format!("the CA: {e}")))?;
                builder = builder.add_root_certificate(ca).https_only(true);
            }
            "http" if ["127.0.0.1", "localhost", "[::1]"].contains(&host.as_str()) => {}
            "http" => return Err(ClientError::Setup("plain http is for loopback only; use https".into())),
            other => return Err(ClientError::Setup(format!("'{other}' is no scheme of ours; use https"))),
        }
        let http = builder.build().map_err(|e| ClientError::Setup(e.to_string()))?;
        Ok(Self { http, config, is_trial: false })
    }

    /// The settings it was made with.
    #[must_use]
    pub fn config(&self) -> &ClientConfig {
        &self.config
    }

    /// The same client, all of whose changes are dry runs: what would be is told, nothing is done. What cannot be tried is refused.
    #[must_use]
    pub fn trying(&self) -> Self {
        Self { is_trial: true, ..self.clone() }
    }

    /// Whether changes are dry runs.
    #[must_use]
    pub const fn is_trying(&self) -> bool {
        self.is_trial
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.config.url.trim_end_matches('/'))
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let is_change = !matches!(method, Method::GET | Method::HEAD);
        let mut request = self.http.request(method, self.url(path));
        if let Some(token) = &self.config.token {
            request = request.bearer_auth(token);
        }
        if let Some(project) = &self.config.project {
            request = request.query(&[("project", project)]);
        }
        if self.is_trial && is_change {
            request = request.query(&[("dry_run", "true")]);
        }
        request
    }

    /// Sends, tries again while that makes sense, and decodes. Every try carries the same `Idempotency-Key`.
    async fn send<T: DeserializeOwned>(&self, path: &str, request: RequestBuilder) -> Result<T> {
        self.send_as(RequestId::generate(), path, request).await
    }

    async fn send_as<T: DeserializeOwned>(&self, key: RequestId, path: &str, request: RequestBuilder) -> Result<T> {
        let bytes = self.send_raw(key, path, request).await?;
        let bytes: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(bytes).map_err(|e| ClientError::Unexpected { url: self.url(path), what: e.to_string() })
    }

    async fn send_raw(&self, key: RequestId, path: &str, request: RequestBuilder) -> Result<bytes::Bytes> {
        let request = request.header("Idempotency-Key", key.to_string());
        let began = Instant::now();
        let mut pause = Duration::from_millis(100);
        loop {
            // A streamed body cannot be cloned: one try only.
            let Some(attempt) = request.try_clone() else { return self.once(path, request).await };
            match self.once(path, attempt).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) if is_worth_a_retry(&error) && began.elapsed() + pause < RETRY_BUDGET => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(3));
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn once(&self, path: &str, request: RequestBuilder) -> Result<bytes::Bytes> {
        let transport = |source| ClientError::Transport { url: self.url(path), source };
        let response = request.timeout(REQUEST_BUDGET).send().await.map_err(transport)?;
        let status = response.status();
        if response.content_length().is_some_and(|n| n > MAX_BODY_BYTES as u64) {
            return Err(ClientError::Unexpected { url: self.url(path), what: "the answer is too large".into() });
        }
        let body = response.bytes().await.map_err(transport)?;
        if status.is_success() {
            return Ok(body);
        }
        match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => Err(ClientError::Problem(problem)),
            Err(_) => Err(ClientError::Unexpected {
                url: self.url(path),
                what: format!("{status}: {}", String::from_utf8_lossy(&body[..body.len().min(200)])),
            }),
        }
    }

    /// `GET`s any path under `/v1`.
    ///
    /// # Errors
    /// As every call: see [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.send(path, self.request(Method::GET, path)).await
    }

    /// Sends a body with any method to any path under `/v1`.
    ///
    /// # Errors
    /// As every call.
    pub async fn call<B: Serialize + Sync, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &B,
    ) -> Result<T> {
        self.send(path, self.request(method, path).json(body)).await
    }

    /// `POST`s a body with an idempotency key of the caller's own, who may repeat the very same call with it later, also after it was
    /// killed: within a day it is done once.
    ///
    /// # Errors
    /// As every call.
    pub async fn post_once<B: Serialize + Sync, T: DeserializeOwned>(
        &self,
        key: RequestId,
        path: &str,
        body: &B,
    ) -> Result<T> {
        self.send_as(key, path, self.request(Method::POST, path).json(body)).await
    }

    async fn post<B: Serialize + Sync, T: DeserializeOwned>(&self, path: &str, body: &B) -> Result<T> {
        self.call(Method::POST, path, body).await
    }

    /// `DELETE`s any path under `/v1`.
    ///
    /// # Errors
    /// As every call.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.send(path, self.request(Method::DELETE, path)).await
    }

    /// All items of a listing, page by page (at most [`LIST_AT_MOST`]).
    ///
    /// # Errors
    /// As every call.
    pub async fn list<T: DeserializeOwned>(&self, path: &str) -> Result<Vec<T>> {
        Ok(self.list_up_to(path, LIST_AT_MOST).await?.0)
    }

    /// The items of a listing, page by page, until there are `most` of them or more; and whether these are all.
    ///
    /// # Errors
    /// As every call.
    pub async fn list_up_to<T: DeserializeOwned>(&self, path: &str, most: usize) -> Result<(Vec<T>, bool)> {
        let mut items = Vec::new();
        let mut page = None::<String>;
        loop {
            let mut request = self.request(Method::GET, path);
            if let Some(page) = &page {
                request = request.query(&[("page", page)]);
            }
            let answer: Page<T> = self.send(path, request).await?;
            items.extend(answer.items);
            page = answer.next_page;
            if page.is_none() || items.len() >= most {
                return Ok((items, page.is_none()));
            }
        }
    }

    /// Uploads a piece of an image's part at an offset; pieces of at most 8 MiB.
    ///
    /// # Errors
    /// As every call.
    pub async fn upload_part(&self, image: &str, part: ImagePart, offset: u64, piece: bytes::Bytes) -> Result<Image> {
        let path = part_path(image, part);
        let request = self
            .request(Method::PUT, &path)
            .query(&[("offset", offset)])
            .header("Content-Type", "application/octet-stream")
            .body(piece);
        self.send(&path, request).await
    }

    /// What a stretch of an uploaded part is; at most 1 GiB.
    ///
    /// # Errors
    /// As every call.
    pub async fn uploaded_digest(&self, image: &str, part: ImagePart, offset: u64, bytes: u64) -> Result<UploadDigest> {
        let path = part_path(image, part);
        let request = self.request(Method::GET, &path).query(&[("offset", offset), ("bytes", bytes)]);
        self.send(&path, request).await
    }

    /// Waits until an operation has ended, calling `watch` with each state seen. The last state is returned whatever it is.
    /// A controller that is away for up to two minutes meanwhile is waited for: the operation does not end with it.
    ///
    /// # Errors
    /// [`ClientError::StillRunning`] when it has not ended within `budget`; else as every call.
    pub async fn wait(
        &self,
        id: OperationId,
        budget: Duration,
        mut watch: impl FnMut(&Operation),
    ) -> Result<Operation> {
        let began = Instant::now();
        let mut heard = began;
        loop {
            match self.get::<Operation>(&format!("/v1/operations/{id}?wait=1s")).await {
                Ok(operation) => {
                    heard = Instant::now();
                    watch(&operation);
                    if operation.phase.is_terminal() {
                        return Ok(operation);
                    }
                }
                Err(error) if is_worth_a_retry(&error) && heard.elapsed() < LOST_BUDGET && began.elapsed() < budget => {
                }
                Err(error) => return Err(error),
            }
            if began.elapsed() >= budget {
                return Err(ClientError::StillRunning(id));
            }
        }
    }

    /// What a guest's console says, from a little before now on, and the number by which it is typed into. The stream ends when
    /// the guest leaves its host, when somebody else opens the console, or with the connection.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub async fn console(
        &self,
        guest: &str,
    ) -> Result<(u64, impl Stream<Item = Result<bytes::Bytes>> + Send + Unpin + use<>)> {
        let path = format!("/v1/guests/{guest}/console");
        let url = self.url(&path);
        let response = self.request(Method::GET, &path).send().await;
        let response = response.map_err(|source| ClientError::Transport { url: url.clone(), source })?;
        if response.status() != StatusCode::OK {
            return Err(refusal(url, response).await);
        }
        let number = response.headers().get("supercloud-console").and_then(|value| value.to_str().ok()?.parse().ok());
        let what = || "it does not tell the console's number".to_owned();
        let number = number.ok_or_else(|| ClientError::Unexpected { url: url.clone(), what: what() })?;
        let pieces = response
            .bytes_stream()
            .map(move |piece| piece.map_err(|source| ClientError::Transport { url: url.clone(), source }));
        Ok((number, pieces))
    }

    /// Types into a console, at most [`crate::link::MAX_CONSOLE_BYTES`]. Tried once: what arrives twice is typed twice.
    ///
    /// # Errors
    /// As every call: see [`ClientError`].
    pub async fn type_into_console(&self, guest: &str, console: u64, data: &[u8]) -> Result<()> {
        use base64::Engine as _;
        let path = format!("/v1/guests/{guest}/console/{console}/input");
        let body = crate::ConsoleInput { data: base64::engine::general_purpose::STANDARD.encode(data) };
        self.once(&path, self.request(Method::POST, &path).json(&body)).await.map(drop)
    }

    /// The event stream from after `after`; ends when the connection does, or an error was told: that nothing came for 45 seconds, not
    /// even a keep-alive, or an event that this version cannot read (call again with the last `seq`, also that of such an event).
    ///
    /// # Errors
    /// When it cannot be opened.
    pub async fn events(&self, after: u64) -> Result<impl Stream<Item = Result<Event>> + Send + use<>> {
        let path = "/v1/events/stream";
        let url = self.url(path);
        let transport_url = url.clone();
        let silent = ClientError::Silent { url: url.clone(), budget: STREAM_SILENCE };
        let request = self
            .request(Method::GET, path)
            .header("Last-Event-ID", after.to_string())
            .header("Accept", "text/event-stream");
        let response = match tokio::time::timeout(STREAM_SILENCE, request.send()).await {
            Ok(response) => response.map_err(|source| ClientError::Transport { url: url.clone(), source })?,
            Err(_) => return Err(silent),
        };
        if response.status() != StatusCode::OK {
            return Err(refusal(url, response).await);
        }
        let lines = response
            .bytes_stream()
            .map(move |piece| piece.map_err(|source| ClientError::Transport { url: transport_url.clone(), source }));
        Ok(sse_events(url, lines))
    }
}

/// The path of a part of an image.
fn part_path(image: &str, part: ImagePart) -> String {
    let part = serde_json::to_value(part).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default();
    format!("/v1/images/{image}/parts/{part}")
}

/// Why a stream was not opened.
async fn refusal(url: String, response: reqwest::Response) -> ClientError {
    let status = response.status();
    let body = response.bytes().await.unwrap_or_default();
    serde_json::from_slice(&body)
        .map_or_else(|_| ClientError::Unexpected { url, what: status.to_string() }, ClientError::Problem)
}

/// Whether the same call may do better a little later.
#[must_use]
pub fn is_worth_a_retry(error: &ClientError) -> bool {
    match error {
        // Also an answer that broke off: the key makes it safe to ask again.
        ClientError::Transport { source, .. } => {
            source.is_connect() || source.is_timeout() || source.is_request() || source.is_body() || source.is_decode()
        }
        ClientError::Silent { .. } => true,
        // Other retryable problems (no capacity, operation in progress) are the caller's to judge.
        ClientError::Problem(problem) => matches!(problem.status, 429 | 503),
        ClientError::Blocks { source: BlocksError::BrokeOff | BlocksError::Damaged { .. }, .. } => true,
        ClientError::Blocks { source: BlocksError::Failed(problem), .. } => matches!(problem.status, 429 | 503),
        _ => false,
    }
}

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident($($arg:ident: $kind:ty),*) -> $out:ty = $verb:ident($path:expr $(, $body:expr)?);)*) => {
        impl Client {$(
            $(#[$doc])*
            ///
            /// # Errors
            /// As every call: see [`ClientError`].
            pub async fn $name(&self, $($arg: $kind),*) -> Result<$out> {
                self.$verb(&$path $(, $body)?).await
            }
        )*}
    };
}

calls! {
    /// Who the token is.
    whoami() -> WhoAmI = get("/v1/whoami");
    /// All clouds.
    clouds() -> Vec<Cloud> = list("/v1/clouds");
    /// Makes a cloud known.
    create_cloud(body: &CloudCreate) -> Cloud = post("/v1/clouds", body);
    /// All chunk stores.
    stores() -> Vec<ChunkStore> = list("/v1/stores");
    /// Has a store swept now: `controller`, or a cloud. `force`: also by records that were brought back from a backup.
    sweep_store(store: &str, force: bool) -> ChunkStore = post(format!("/v1/stores/{store}/sweep?force={force}"), &serde_json::json!({}));
    /// Has a volume checked: everything that it stands on is read, and mended where that can be.
    check_volume(volume: &str, bytes_per_s: u64) -> Volume = post(format!("/v1/volumes/{volume}/check?bytes_per_s={bytes_per_s}"), &serde_json::json!({}));
    /// The history of a volume.
    volume_history(volume: &str) -> VolumeHistory = get(format!("/v1/volumes/{volume}/history"));
    /// Says how points of a volume are taken and kept.
    set_volume_history(volume: &str, body: &HistoryPolicy) -> VolumeHistory = put(format!("/v1/volumes/{volume}/history"), body);
    /// Ends a volume's history: all its points go.
    end_volume_history(volume: &str) -> () = delete(format!("/v1/volumes/{volume}/history"));
    /// What a volume was as of an instant, in milliseconds since 1970.
    volume_as_of(volume: &str, as_of_ms: u64) -> VolumeAsOf = get(format!("/v1/volumes/{volume}/as-of?as_of_ms={as_of_ms}"));
    /// Has a point of a volume taken now.
    take_volume_point(volume: &str) -> VolumeHistory = post(format!("/v1/volumes/{volume}/points"), &serde_json::json!({}));
    /// Has a checkpoint of a running guest taken now.
    checkpoint_guest(guest: &str) -> VolumeHistory = post(format!("/v1/guests/{guest}/checkpoints"), &serde_json::json!({}));
    /// All hosts.
    hosts() -> Vec<Host> = list("/v1/hosts");
    /// One host, by name or id.
    host(host: &str) -> Host = get(format!("/v1/hosts/{host}"));
    /// Changes a host.
    patch_host(host: &str, body: &HostPatch) -> Host = patch(format!("/v1/hosts/{host}"), body);
    /// Removes a host: its certificate is denied at once. `force` gives up what only it has.
    remove_host(host: &str, force: bool) -> Host = delete(format!("/v1/hosts/{host}?force={force}"));
    /// A one-time token for an agent to join with.
    create_join_token(body: &JoinTokenCreate) -> JoinToken = post("/v1/join-tokens", body);
    /// Joins: called by an agent.
    join(body: &JoinRequest) -> JoinResponse = post("/v1/join", body);
    /// All projects.
    projects() -> Vec<Project> = list("/v1/projects");
    /// Makes a project.
    create_project(body: &ProjectCreate) -> Project = post("/v1/projects", body);
    /// All tokens (without secrets).
    tokens() -> Vec<Token> = list("/v1/tokens");
    /// Makes a token.
    create_token(body: &TokenCreate) -> TokenSecret = post("/v1/tokens", body);
    /// Deletes a token.
    delete_token(id: &str) -> () = delete(format!("/v1/tokens/{id}"));
    /// All images.
    images() -> Vec<Image> = list("/v1/images");
    /// One image.
    image(image: &str) -> Image = get(format!("/v1/images/{image}"));
    /// Makes an image record; upload its parts next.
    create_image(body: &ImageCreate) -> Image = post("/v1/images", body);
    /// Starts the import of what was uploaded.
    import_image(image: &str, body: &ImageImport) -> Operation = post(format!("/v1/images/{image}/import"), body);
    /// Deletes an image that no volume needs.
    delete_image(image: &str) -> () = delete(format!("/v1/images/{image}"));
    /// All volumes.
    volumes() -> Vec<Volume> = list("/v1/volumes");
    /// One volume.
    volume(volume: &str) -> Volume = get(format!("/v1/volumes/{volume}"));
    /// Rents a host in a cloud.
    rent_host(cloud: &str, body: &HostRent) -> Operation = post(format!("/v1/clouds/{cloud}/rent"), body);
    /// What renting it would do; nothing happens.
    plan_rent(cloud: &str, body: &HostRent) -> Operation = post(format!("/v1/clouds/{cloud}/rent?dry_run=true"), body);
    /// All rentings, oldest first, also those that have ended.
    rentings() -> Vec<Renting> = list("/v1/rentings");
    /// One renting.
    renting(renting: RentingId) -> Renting = get(format!("/v1/rentings/{renting}"));
    /// Gives a rented host back; `force`: also what only this host has.
    return_renting(renting: RentingId, force: bool) -> Operation = post(format!("/v1/rentings/{renting}/return?force={force}"), &());
    /// The join token of a reserved machine on which the agent is started by hand.
    renting_join_token(renting: RentingId) -> JoinToken = post(format!("/v1/rentings/{renting}/join-token"), &());
    /// All plans that are kept, oldest first.
    plans() -> Vec<FleetPlan> = list("/v1/plans");
    /// One plan.
    plan(plan: PlanId) -> FleetPlan = get(format!("/v1/plans/{plan}"));
    /// Makes a plan; a dry run does not keep it. Nothing moves before it is applied.
    create_plan(body: &FleetPlanCreate, dry_run: bool) -> FleetPlan = post(format!("/v1/plans?dry_run={dry_run}"), body);
    /// Has a plan carried out.
    apply_plan(plan: PlanId, dry_run: bool) -> FleetPlan = post(format!("/v1/plans/{plan}/apply?dry_run={dry_run}"), &());
    /// Has a plan stop; what is done stays.
    cancel_plan(plan: PlanId) -> FleetPlan = post(format!("/v1/plans/{plan}/cancel"), &());
    /// Has a plan that has come to rest taken back.
    undo_plan(plan: PlanId, dry_run: bool) -> FleetPlan = post(format!("/v1/plans/{plan}/undo?dry_run={dry_run}"), &());
    /// Where an image lies.
    image_sites(image: &str) -> Vec<Site> = list(format!("/v1/images/{image}/sites"));
    /// Where a volume lies.
    volume_sites(volume: &str) -> Vec<Site> = list(format!("/v1/volumes/{volume}/sites"));
    /// All networks.
    networks() -> Vec<Network> = list("/v1/networks");
    /// One network.
    network(network: &str) -> Network = get(format!("/v1/networks/{network}"));
    /// Makes a network.
    create_network(body: &NetworkCreate) -> Network = post("/v1/networks", body);
    /// Deletes a network without ports.
    delete_network(network: &str) -> () = delete(format!("/v1/networks/{network}"));
    /// All ports.
    ports() -> Vec<Port> = list("/v1/ports");
    /// What the switch of its host holds for a port now.
    port_flows(port: &str) -> PortFlows = get(format!("/v1/ports/{port}/flows"));
    /// The ways between hosts, as their agents measure them.
    links() -> Vec<Link> = list("/v1/links?limit=1000");
    /// Those from and to one host.
    links_of(host: &str) -> Vec<Link> = list(format!("/v1/links?host={host}&limit=1000"));
    /// All groups.
    groups() -> Vec<Group> = list("/v1/groups");
    /// One group.
    group(group: &str) -> Group = get(format!("/v1/groups/{group}"));
    /// Makes a group.
    create_group(body: &GroupCreate) -> Group = post("/v1/groups", body);
    /// Says which guests are the group's.
    patch_group(group: &str, body: &GroupUpdate) -> Group = patch(format!("/v1/groups/{group}"), body);
    /// Deletes a group; its guests stay.
    delete_group(group: &str) -> () = delete(format!("/v1/groups/{group}"));
    /// Moves all guests of a group live, or none.
    migrate_group(group: &str, body: &GuestMigrate) -> Operation = post(format!("/v1/groups/{group}/migrate"), body);
    /// Suspends all guests of a group into the store, or none.
    freeze_group(group: &str, body: &GuestFreeze) -> Operation = post(format!("/v1/groups/{group}/freeze"), body);
    /// Resumes all guests of a frozen group, or none.
    thaw_group(group: &str, body: &GroupThaw) -> Operation = post(format!("/v1/groups/{group}/thaw"), body);
    /// All guests.
    guests() -> Vec<Guest> = list("/v1/guests");
    /// One guest.
    guest(guest: &str) -> Guest = get(format!("/v1/guests/{guest}"));
    /// How good it was; the query names what is asked for: `from_ms=0&guest=web`.
    reliability(query: &str) -> Reliability = get(format!("/v1/reliability?{query}"));
    /// What policies decided for guests.
    verdicts() -> Vec<GuestVerdict> = list("/v1/verdicts?limit=1000");
    /// Tells what a policy decided.
    tell_verdicts(body: &VerdictsTold) -> VerdictsTaken = post("/v1/verdicts", body);
    /// Guests whose hosts a provider may take back: whether they could leave in time.
    evacuations() -> Vec<Evacuation> = list("/v1/evacuations");
    /// Where a guest would go now, with what every host says to it.
    explain_placement(guest: &str) -> Placement = get(format!("/v1/guests/{guest}/placement?explain=true"));
    /// The same, for a host or a cloud.
    explain_placement_at(guest: &str, place: &str) -> Placement = get(format!("/v1/guests/{guest}/placement?explain=true&place={place}"));
    /// Makes a guest and starts it.
    create_guest(body: &GuestCreate) -> Operation = post("/v1/guests", body);
    /// Changes a guest.
    patch_guest(guest: &str, body: &GuestPatch) -> Guest = patch(format!("/v1/guests/{guest}"), body);
    /// Starts a stopped guest.
    start_guest(guest: &str, body: &GuestStart) -> Operation = post(format!("/v1/guests/{guest}/start"), body);
    /// Stops a guest.
    stop_guest(guest: &str, body: &GuestStop) -> Operation = post(format!("/v1/guests/{guest}/stop"), body);
    /// Moves a guest live.
    migrate_guest(guest: &str, body: &GuestMigrate) -> Operation = post(format!("/v1/guests/{guest}/migrate"), body);
    /// What a move would do; nothing happens.
    plan_migration(guest: &str, body: &GuestMigrate) -> Operation = post(format!("/v1/guests/{guest}/migrate?dry_run=true"), body);
    /// Keeps a second copy of a running guest at another host.
    mirror_guest(guest: &str, body: &GuestMirror) -> Operation = post(format!("/v1/guests/{guest}/mirrors"), body);
    /// What that would do; nothing happens.
    plan_mirror(guest: &str, body: &GuestMirror) -> Operation = post(format!("/v1/guests/{guest}/mirrors?dry_run=true"), body);
    /// The guest's mirrors.
    mirrors(guest: &str) -> Vec<Mirror> = list(format!("/v1/guests/{guest}/mirrors"));
    /// Ends the guest's mirror; none is begun again.
    end_mirrors(guest: &str) -> Guest = delete(format!("/v1/guests/{guest}/mirrors"));
    /// Has the standby of a mirrored guest take over, whose host is dead.
    fail_over_guest(guest: &str, body: &GuestFailover) -> Operation = post(format!("/v1/guests/{guest}/failover"), body);
    /// Suspends a guest into the store.
    freeze_guest(guest: &str, body: &GuestFreeze) -> Operation = post(format!("/v1/guests/{guest}/freeze"), body);
    /// Resumes a frozen guest.
    thaw_guest(guest: &str, body: &GuestThaw) -> Operation = post(format!("/v1/guests/{guest}/thaw"), body);
    /// Deletes a stopped or frozen guest with its volumes and ports.
    delete_guest(guest: &str) -> Operation = delete(format!("/v1/guests/{guest}"));
    /// All freezes.
    freezes() -> Vec<Freeze> = list("/v1/freezes");
    /// All operations, newest last.
    operations() -> Vec<Operation> = list("/v1/operations");
    /// Those that have not ended.
    active_operations() -> Vec<Operation> = list("/v1/operations?active=true");
    /// One operation.
    operation(id: OperationId) -> Operation = get(format!("/v1/operations/{id}"));
    /// Asks for an operation to be cancelled.
    cancel_operation(id: OperationId) -> Operation = post(format!("/v1/operations/{id}/cancel"), &());
    /// Events after a number, at most 1000.
    events_after(after: u64) -> Page<Event> = get(format!("/v1/events?after={after}&limit=1000"));
    /// A page of the ledger; the query names what is asked for: `from_ms=0&limit=1000`.
    ledger(query: &str) -> Ledger = get(format!("/v1/ledger?{query}"));
    /// All markets with their prices now.
    markets() -> Vec<Market> = list("/v1/markets");
    /// Sets the clock of a replayed price feed; the answer is the clock as it is now.
    set_feed_clock(body: &FeedClock) -> FeedClock = post("/v1/feed", body);
    /// The prices of a market up to now.
    prices(market: &str) -> PriceSeries = get(format!("/v1/prices?market={market}"));
}

impl Client {
    async fn put<B: Serialize + Sync, T: DeserializeOwned>(&self, path: &str, body: &B) -> Result<T> {
        self.call(Method::PUT, path, body).await
    }

    async fn patch<B: Serialize + Sync, T: DeserializeOwned>(&self, path: &str, body: &B) -> Result<T> {
        self.call(Method::PATCH, path, body).await
    }
}
