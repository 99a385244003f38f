//! REST against a real controller: its own sockets, TLS, store on disk; the typed client, and raw requests where that is too good.

mod blocks;
mod checkpoints;
mod cpus;
mod events;
mod fleet;
mod groups;
mod guest_calls;
mod guests;
mod histories;
mod idempotency;
mod images;
mod joins;
mod lasting;
mod ledger;
mod links;
mod mirrors;
mod monitoring;
mod moves;
mod operations;
mod plans;
mod problems;
mod rentings;
#[cfg(feature = "ec2")]
mod rentings_ec2;
mod roles;
mod session;
mod simulations;
mod stores;
mod trials;

use std::net::SocketAddr;

use reqwest::{Method, Response, StatusCode};
use supercloud_api::{
    Cloud, CloudCreate, CompatClass, GuestCreate, Host, HostState, Image, ImageContent, ImagePart, ImageState,
    NetworkCreate, Problem, ProjectCreate, Role, Room, Shape, TokenCreate, TokenSecret,
    client::{Client, ClientConfig, ClientError},
    handover::{Owner, OwnerRecord},
    ids::{Epoch, GuestId, HostId, ImageId, ProjectId},
    unix_ms,
};

use crate::{
    app::{Config, Controller, Parts},
    auth::new_token,
    state::{Change, Context, GuestRecord, HostRecord, LiveHost, Record, State, Stored},
};

/// A controller of its own, with its folder.
pub struct TestController {
    controller: Controller,
    folder: tempfile::TempDir,
    http: reqwest::Client,
}

fn config(folder: &tempfile::TempDir, more: &str) -> Config {
    let text = format!(
        "data_dir = '{}'\nlisten = '127.0.0.1:0'\nlink_listen = '127.0.0.1:0'\nnames = ['127.0.0.1', 'localhost']\n{more}",
        folder.path().display()
    );
    Config::parse(&text, "test").unwrap()
}

impl TestController {
    pub async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap()).await
    }

    pub async fn start_in(folder: tempfile::TempDir) -> Self {
        Self::start_with(folder, "").await
    }

    /// With more settings.
    pub async fn start_with(folder: tempfile::TempDir, more: &str) -> Self {
        let controller = Controller::start(config(&folder, more)).await.unwrap();
        let parts = &controller.parts;
        // What it writes of itself is written: tests look at what requests change.
        while !parts.lease_claim.holds(&parts.state).await.unwrap() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        let ca_pem = std::fs::read_to_string(folder.path().join("ca.pem")).unwrap();
        let ca = reqwest::Certificate::from_pem(ca_pem.as_bytes()).unwrap();
        let http = reqwest::Client::builder().add_root_certificate(ca).no_proxy().build().unwrap();
        Self { controller, folder, http }
    }

    /// Ends it and gives its folder, for another start.
    pub async fn stop(self) -> tempfile::TempDir {
        self.controller.shutdown().await;
        self.folder
    }

    pub fn parts(&self) -> &Parts {
        &self.controller.parts
    }

    pub fn state(&self) -> &State {
        &self.controller.parts.state
    }

    pub fn address(&self) -> SocketAddr {
        self.controller.rest_address
    }

    pub fn admin_secret(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("admin.token")).unwrap().trim().to_owned()
    }

    pub fn client(&self, secret: &str) -> Client {
        let ca_pem = std::fs::read_to_string(self.folder.path().join("ca.pem")).unwrap();
        Client::new(ClientConfig {
            url: format!("https://{}", self.address()),
            token: Some(secret.to_owned()),
            ca_pem: Some(ca_pem),
            project: None,
        })
        .unwrap()
    }

    pub fn admin_client(&self) -> Client {
        self.client(&self.admin_secret())
    }

    /// A request that the typed client would not make.
    pub fn raw(&self, method: Method, path: &str, secret: Option<&str>) -> reqwest::RequestBuilder {
        let request = self.http.request(method, format!("https://{}{path}", self.address()));
        match secret {
            Some(secret) => request.bearer_auth(secret),
            None => request,
        }
    }

    /// So many requests, from this address, whose bodies never come; waits until so many of them were sent away at once.
    pub async fn trickle(
        &self,
        request: impl Fn(&reqwest::Client) -> reqwest::RequestBuilder,
        from: &str,
        many: usize,
        refused: usize,
    ) -> tokio::task::JoinSet<StatusCode> {
        let http = self.http_from(from);
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..many {
            let silence = futures::stream::pending::<Result<bytes::Bytes, std::io::Error>>();
            let request = request(&http).body(reqwest::Body::wrap_stream(silence));
            tasks.spawn(async move { request.send().await.unwrap().status() });
        }
        for _ in 0..refused {
            let answered = tokio::time::timeout(std::time::Duration::from_secs(60), tasks.join_next()).await;
            let status = answered.expect("sent away at once").unwrap().unwrap();
            assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
        }
        tasks
    }

    /// A client at an address of its own.
    pub fn http_from(&self, from: &str) -> reqwest::Client {
        let ca_pem = std::fs::read_to_string(self.folder.path().join("ca.pem")).unwrap();
        let ca = reqwest::Certificate::from_pem(ca_pem.as_bytes()).unwrap();
        let from: std::net::IpAddr = from.parse().unwrap();
        reqwest::Client::builder().add_root_certificate(ca).local_address(from).no_proxy().build().unwrap()
    }

    /// A project and an operator's secret for it.
    pub async fn project(&self, name: &str) -> (ProjectId, String) {
        let admin = self.admin_client();
        let project = admin.create_project(&ProjectCreate { name: name.parse().unwrap(), quota: None }).await.unwrap();
        (project.id, self.token(name, Role::Operator).await.secret)
    }

    pub async fn token(&self, project: &str, role: Role) -> TokenSecret {
        let name = format!("t-{}", HostId::generate().short());
        let wanted = TokenCreate { name: name.parse().unwrap(), project: project.into(), role, expires_in_s: None };
        self.admin_client().create_token(&wanted).await.unwrap()
    }

    /// A secret that is good for one guest.
    pub async fn guest_token(&self, project: ProjectId, guest: GuestId) -> String {
        let (record, secret) = new_token("own".parse().unwrap(), Some(project), Some(guest), Role::Operator, None);
        let mut change = Change::new();
        record.store_in(&mut change);
        self.state().commit(&Context::system(), change).await.unwrap();
        secret
    }

    /// Changes a record as the engine would.
    pub async fn edit<T: Record>(&self, id: &T::Id, edit: impl Fn(&mut T)) -> Stored<T> {
        crate::state::retry_conflicts(|| async {
            let before = self.state().need::<T>(id).await?;
            let mut now = before.value.clone();
            edit(&mut now);
            let mut change = Change::new();
            change.update(&before, &now);
            self.state().commit(&Context::system(), change).await
        })
        .await
        .unwrap();
        self.state().need::<T>(id).await.unwrap()
    }

    /// A host that is connected, as far as REST can tell.
    pub async fn host(&self, name: &str, cloud: &Cloud, memory_bytes: u64) -> Host {
        let host = Host {
            id: HostId::generate(),
            name: name.parse().unwrap(),
            cloud: cloud.id,
            cloud_name: cloud.name.clone(),
            state: HostState::Up,
            data_address: Some("192.0.2.7:4500".parse().unwrap()),
            overlay_address: None,
            overlay_encryption: None,
            overlay_index: 1,
            capacity: Room { vcpus: 64, memory_bytes, disk_bytes: 1 << 42 },
            used: Room::default(),
            compat_classes: vec![class()],
            probe: serde_json::json!({ "kind": "hardware" }),
            agent_version: "0".into(),
            certificate_sha256: "ab".into(),
            last_seen_ms: 0,
            moves_live: true,
            notice: None,
            created_at_ms: unix_ms(),
        };
        let record = HostRecord { host: host.clone(), is_cordoned: false, is_removed: false, withdrawn: None };
        let mut change = Change::new();
        change.create_named(&record);
        crate::ledger::keep_host(self.state(), &host, &mut change).await.unwrap();
        self.state().commit(&Context::system(), change).await.unwrap();
        self.connect(&host);
        host
    }

    pub fn connect(&self, host: &Host) {
        self.parts().hosts.seen(host.id, LiveHost { last_seen_ms: unix_ms(), used: Room::default() });
    }

    pub async fn cloud(&self, name: &str) -> Cloud {
        let wanted = CloudCreate { name: name.parse().unwrap(), provider: "lab".into() };
        self.admin_client().create_cloud(&wanted).await.unwrap()
    }

    /// An image that is ready.
    pub async fn image(&self, project: ProjectId, name: &str) -> Image {
        let image = Image {
            id: ImageId::generate(),
            project,
            name: name.parse().unwrap(),
            state: ImageState::Ready,
            cmdline: None,
            parts: vec![ImageContent {
                part: ImagePart::Disk,
                root: "ab".repeat(32),
                size_bytes: 10 << 20,
                stored_bytes: 1 << 20,
            }],
            uploaded: vec![],
            created_at_ms: unix_ms(),
        };
        let mut change = Change::new();
        change.create_named(&image);
        self.state().commit(&Context::system(), change).await.unwrap();
        image
    }

    /// Project `p` with image `lean` and network `lan`, clouds `east` and `west` with a host each.
    pub async fn world(&self) -> World {
        let (project, secret) = self.project("p").await;
        let client = self.client(&secret);
        self.image(project, "lean").await;
        let lan = NetworkCreate {
            name: "lan".parse().unwrap(),
            project: None,
            cidr: "10.20.0.0/24".into(),
            dns: vec!["9.9.9.9".parse().unwrap()],
        };
        client.create_network(&lan).await.unwrap();
        let (east, west) = (self.cloud("east").await, self.cloud("west").await);
        let hosts = [self.host("east-1", &east, 64 << 30).await, self.host("west-1", &west, 32 << 30).await];
        World { project, secret, client, hosts }
    }

    /// Makes a guest run on a host, as the engine would have done it.
    pub async fn run_on(&self, guest: GuestId, host: &Host) {
        self.edit::<GuestRecord>(&guest, |record| {
            let owner = OwnerRecord {
                owner: Owner::Host(host.id),
                epoch: Epoch(record.owner.epoch.0 + 1),
                operation: None,
                ..record.owner.clone()
            };
            record.set_owner(owner, Some(host));
            record.guest.compat_class = Some(class());
        })
        .await;
    }
}

pub struct World {
    pub project: ProjectId,
    pub secret: String,
    pub client: Client,
    pub hosts: [Host; 2],
}

pub fn class() -> CompatClass {
    CompatClass {
        back_end: "libvirt-qemu".into(),
        accelerator: "tcg".into(),
        machine_version: "pc-i440fx-7.2".into(),
        cpu_baseline: "qemu64".into(),
    }
}

/// A guest that is made and not started.
pub fn guest(name: &str) -> GuestCreate {
    GuestCreate {
        name: name.parse().unwrap(),
        project: None,
        image: "lean".into(),
        shape: Shape { vcpus: 1, memory_bytes: 256 << 20 },
        disk_from: None,
        network: "lan".into(),
        ipv4: None,
        place: None,
        disk_bytes: None,
        user_data: None,
        cmdline_extra: None,
        propagation: supercloud_api::Propagation::HotStandby,
        follow_prices: false,
        cpu: supercloud_api::CpuChoice::Portable,
        on_loss: supercloud_api::OnLoss::Nothing,
        start: false,
    }
}

/// The problem of a refused call.
pub fn problem<T: std::fmt::Debug>(outcome: Result<T, ClientError>) -> Problem {
    match outcome.unwrap_err() {
        ClientError::Problem(problem) => problem,
        other => panic!("no problem but {other:?}"),
    }
}

/// Checks that an answer is a problem in its full form, and gives it.
pub async fn problem_of(response: Response) -> Problem {
    let (status, headers) = (response.status(), response.headers().clone());
    assert_eq!(headers["content-type"], "application/problem+json");
    let text = response.text().await.unwrap();
    let problem: Problem = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(status, StatusCode::from_u16(problem.status).unwrap());
    assert_eq!(headers["x-request-id"], problem.request_id.unwrap().to_string().as_str());
    assert!(!problem.detail.is_empty() && problem.kind.starts_with("urn:supercloud:problem:"), "{problem:?}");
    problem
}
