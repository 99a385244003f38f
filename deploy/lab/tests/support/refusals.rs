//! What is refused by the real thing: each time a clear problem+json, and nothing has changed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use reqwest::Method;
use serde_json::{Value, json};
use supercloud_api::client::{Client, ClientConfig};
use supercloud_api::{
    Code, GuestState, GuestStop, ImageCreate, ImageImport, ImagePart, ImageState, Operation, Phase, Problem,
    ProjectCreate, Role, TokenCreate,
};
use supercloud_lab::command::Run;
use supercloud_lab::fleet::{GuestSpec, PROJECT, config};
use supercloud_lab::image;
use supercloud_lab::{CONTROLLER, Which};

use super::case::Dice;
use super::ground::{Ground, IMAGE, NETWORK, SEATS, SERVER, THIRD, now};

/// How long an operation may take that does next to nothing.
const OPERATION_BUDGET: Duration = Duration::from_secs(120);

/// A raw request, as somebody sends it who does not use our client.
struct Asked<'a> {
    what: &'a str,
    method: Method,
    path: &'a str,
    token: Option<&'a str>,
    body: String,
    status: u16,
    code: Code,
    says: &'a str,
}

impl Ground {
    fn raw(&self) -> Result<reqwest::Client> {
        let ca = std::fs::read(self.fleet.ca_file()?)?;
        let ca = reqwest::Certificate::from_pem(&ca)?;
        Ok(reqwest::Client::builder().add_root_certificate(ca).no_proxy().timeout(Duration::from_secs(30)).build()?)
    }

    /// Everything that a refused request could have changed.
    async fn world(&self) -> Result<Value> {
        let admin = self.fleet.admin();
        Ok(json!({
            "guests": admin.guests().await?,
            "images": admin.images().await?,
            "volumes": admin.volumes().await?,
            "networks": admin.networks().await?,
            "ports": admin.ports().await?,
            "operations": admin.operations().await?,
            "tokens": admin.tokens().await?,
            "projects": admin.projects().await?,
            "clouds": admin.clouds().await?,
        }))
    }

    async fn expect_refusal(&self, http: &reqwest::Client, asked: Asked<'_>) -> Result<()> {
        let what = asked.what;
        let before = self.world().await?;
        let url = format!("{}{}", self.fleet.url(), asked.path);
        let mut request = http.request(asked.method, url).header("Content-Type", "application/json").body(asked.body);
        if let Some(token) = asked.token {
            request = request.bearer_auth(token);
        }
        let answer = request.send().await?;
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        let text = answer.text().await?;
        let kind = headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
        ensure!(kind.starts_with("application/problem+json"), "{what}: answered as {kind}: {status} {text}");
        let problem: Problem = serde_json::from_str(&text).with_context(|| format!("{what}: {text}"))?;
        let is_right = status == asked.status && problem.status == status && problem.code == asked.code;
        ensure!(is_right, "{what}: {status} {problem:?}, wanted {} {:?}", asked.status, asked.code);
        ensure!(problem.detail.contains(asked.says), "{what}: does not tell of {:?}: {problem:?}", asked.says);
        ensure!(problem.request_id.is_some(), "{what}: {problem:?}");
        let after = self.world().await?;
        ensure!(before == after, "{what} changed something:\n{before:#}\n{after:#}");
        self.say(&format!("refused: {what}: {}", problem.detail));
        Ok(())
    }

    /// Requests that are refused at once.
    pub async fn refuse_requests(&self) -> Result<()> {
        let http = self.raw()?;
        let token = |client: &Client| client.config().token.clone().unwrap_or_default();
        let own = token(self.fleet.client());
        let stranger = self.stranger().await?;
        let guest = |change: Value| {
            let mut body = json!({
                "name": "another", "image": IMAGE, "network": NETWORK,
                "shape": {"vcpus": 1, "memory_bytes": 128 << 20},
            });
            for (field, value) in change.as_object().into_iter().flatten() {
                body[field] = value.clone();
            }
            body.to_string()
        };
        let id = self.server.to_string();
        let (of_id, migrate_id) = (format!("/v1/guests/{id}"), format!("/v1/guests/{id}/migrate"));
        let migrate = format!("/v1/guests/{SERVER}/migrate");
        let (post, get) = (Method::POST, Method::GET);
        let moved = |to: &str| json!({ "to": to }).to_string();
        let wrong = format!("{own}x");
        let cases = [
            (
                "an unknown image",
                &post,
                "/v1/guests",
                Some(&own),
                guest(json!({"image": "nope"})),
                Code::NotFound,
                "nope",
            ),
            (
                "a name that is taken",
                &post,
                "/v1/guests",
                Some(&own),
                guest(json!({"name": SERVER})),
                Code::NameTaken,
                SERVER,
            ),
            (
                "a guest too large for any host",
                &post,
                "/v1/guests",
                Some(&own),
                guest(json!({"shape": {"vcpus": 1, "memory_bytes": 8_u64 << 30}})),
                Code::NoCapacity,
                "MiB",
            ),
            ("a wrong token", &get, "/v1/guests", Some(&wrong), String::new(), Code::Unauthenticated, ""),
            ("no token", &post, &migrate, None, moved(SEATS[1]), Code::Unauthenticated, ""),
            ("another project's guest", &get, &of_id, Some(&stranger), String::new(), Code::NotFound, ""),
            (
                "a move of another project's guest",
                &post,
                &migrate_id,
                Some(&stranger),
                moved(SEATS[1]),
                Code::NotFound,
                "",
            ),
            ("a malformed body", &post, "/v1/guests", Some(&own), "{\"name\": ".to_owned(), Code::BadRequest, ""),
            (
                "a body with an unknown field",
                &post,
                &migrate,
                Some(&own),
                "{\"to\":\"left\",\"x\":1}".into(),
                Code::BadRequest,
                "x",
            ),
            ("a move to nowhere", &post, &migrate, Some(&own), moved("mars"), Code::NotFound, "mars"),
        ];
        for (what, method, path, token, body, code, says) in cases {
            let token = token.map(String::as_str);
            let asked = Asked { what, method: method.clone(), path, token, body, status: code.status(), code, says };
            self.expect_refusal(&http, asked).await?;
        }
        Ok(())
    }

    /// A token of another project.
    async fn stranger(&self) -> Result<String> {
        let admin = self.fleet.admin();
        let name = |text: &str| text.parse::<supercloud_api::Name>();
        admin.create_project(&ProjectCreate { name: name("strangers")?, quota: None }).await?;
        let body =
            TokenCreate { name: name("stranger")?, project: "strangers".into(), role: Role::Admin, expires_in_s: None };
        Ok(admin.create_token(&body).await?.secret)
    }

    /// A destination without room: refused before anything happens.
    pub async fn refuse_a_small_destination(&self) -> Result<()> {
        let settings = format!("{}/agent.toml", config::SETTINGS_DIR);
        let path = self.lab().host(THIRD)?.outside(&settings).context("no settings")?;
        let good = std::fs::read_to_string(&path)?;
        let mut table: toml::Table = good.parse()?;
        let capacity = table.get_mut("capacity").and_then(toml::Value::as_table_mut).context("no capacity")?;
        // The client lives there already.
        capacity.insert("memory_bytes".into(), toml::Value::Integer(192 << 20));
        let set = async |text: &str, memory_bytes: u64| -> Result<()> {
            std::fs::write(&path, text)?;
            now(|| self.lab().restart(THIRD, "agent"))?;
            let known = super::ground::until(OPERATION_BUDGET, async || {
                let host = self.fleet.admin().host(THIRD).await.ok()?;
                (host.capacity.memory_bytes == memory_bytes && host.state == supercloud_api::HostState::Up)
                    .then_some(())
            });
            known.await.context("the host's new capacity is not known")
        };
        let full = self.fleet.admin().host(THIRD).await?.capacity.memory_bytes;
        set(&toml::to_string(&table)?, 192 << 20).await?;
        let own = self.fleet.client().config().token.clone();
        let asked = Asked {
            what: "a destination that is too small",
            method: Method::POST,
            path: &format!("/v1/guests/{SERVER}/migrate"),
            token: own.as_deref(),
            body: json!({ "to": THIRD }).to_string(),
            status: 409,
            code: Code::NoCapacity,
            says: THIRD,
        };
        self.expect_refusal(&self.raw()?, asked).await?;
        set(&good, full).await
    }

    async fn end_of(&self, operation: &Operation) -> Result<Operation> {
        Ok(self.fleet.client().wait(operation.id, OPERATION_BUDGET, |_| {}).await?)
    }

    async fn image_of(&self, name: &str, parts: &[(ImagePart, Vec<u8>)], cmdline: Option<&str>) -> Result<Operation> {
        let client = self.fleet.client();
        let body = ImageCreate { name: name.parse()?, project: None, cmdline: cmdline.map(str::to_owned) };
        let image = client.create_image(&body).await?.id.to_string();
        for (part, content) in parts {
            for (number, piece) in content.chunks(4 << 20).enumerate() {
                client.upload_part(&image, *part, (number * (4 << 20)) as u64, piece.to_vec().into()).await?;
            }
        }
        let operation = client.import_image(&image, &ImageImport::default()).await?;
        self.end_of(&operation).await
    }

    /// A disk image that wants to read another file of the machine: the import fails by name and leaves no content.
    pub async fn refuse_a_backing_file(&self) -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = |name: &str| folder.path().join(name).display().to_string();
        std::fs::write(path("base.raw"), vec![7; 1 << 20])?;
        Run::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &path("base.raw"), &path("top.qcow2")])
            .ok()?;
        let before = self.world().await?;
        let stored = self.origin_objects()?;
        let ended = self.image_of("leaky", &[(ImagePart::Disk, std::fs::read(path("top.qcow2"))?)], None).await?;
        let problem = ended.error.clone().context("it does not tell why")?;
        ensure!(ended.phase == Phase::Failed && problem.code == Code::BadContent, "{ended:?}");
        ensure!(problem.detail.contains("backing"), "{problem:?}");
        self.say(&format!("refused: a qcow2 with a backing file: {}", problem.detail));
        let image = self.fleet.client().image("leaky").await?;
        ensure!(image.state == ImageState::Failed && image.parts.is_empty(), "{image:?}");
        ensure!(self.origin_objects()? == stored, "content of it was stored");
        self.fleet.client().delete_image("leaky").await?;
        let after = self.world().await?;
        for kind in ["guests", "images", "volumes", "ports"] {
            ensure!(before[kind] == after[kind], "{kind} changed: {:#} {:#}", before[kind], after[kind]);
        }
        Ok(())
    }

    fn origin(&self) -> Result<PathBuf> {
        let folder = format!("{}/store", config::CONTROLLER_DIR);
        self.lab().host(CONTROLLER)?.outside(&folder).context("no origin store")
    }

    /// The files of the origin store.
    fn origin_objects(&self) -> Result<BTreeSet<PathBuf>> {
        fn walk(folder: &Path, found: &mut BTreeSet<PathBuf>) -> std::io::Result<()> {
            for entry in std::fs::read_dir(folder)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    walk(&entry.path(), found)?;
                } else {
                    found.insert(entry.path());
                }
            }
            Ok(())
        }
        let mut found = BTreeSet::new();
        walk(&self.origin()?, &mut found)?;
        Ok(found)
    }

    /// A chunk of an image with a flipped bit in the origin store: the start that needs it fails and says why; put right,
    /// the same guest starts.
    pub async fn refuse_a_flipped_bit(&self) -> Result<()> {
        let lean = now(image::lean::ensure)?;
        let before = self.origin_objects()?;
        let mut initrd = std::fs::read(&lean.initrd)?;
        // Content that no other image has; a kernel ignores what follows the archive.
        let mut dice = Dice(0x5eed);
        initrd.extend((0..(512 << 10) / 8).flat_map(|_| dice.next().to_le_bytes()));
        let parts = [
            (ImagePart::Kernel, std::fs::read(&lean.kernel)?),
            (ImagePart::Initrd, initrd),
            (ImagePart::Disk, std::fs::read(&lean.disk)?),
        ];
        let imported = self.image_of("marked", &parts, Some(&lean.cmdline)).await?;
        ensure!(imported.phase == Phase::Done, "{imported:?}");
        let new: Vec<PathBuf> = self.origin_objects()?.difference(&before).cloned().collect();
        let largest = new.iter().max_by_key(|path| std::fs::metadata(path).map_or(0, |meta| meta.len()));
        let largest = largest.context("the new image has no content of its own")?;
        let good = std::fs::read(largest)?;
        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle] ^= 1;
        std::fs::write(largest, &bad)?;

        let spec = GuestSpec::new("marked", "marked", NETWORK, "sc.role=idle").at(SEATS[1]);
        match self.fleet.create_guest(&spec).await {
            Ok(_) => bail!("a guest started from a damaged image"),
            Err(supercloud_lab::fleet::FleetError::Operation { phase, problem, .. }) => {
                ensure!(!problem.detail.is_empty() && problem.code != Code::Internal, "{phase}: {problem:?}");
                self.say(&format!("refused: a flipped bit: {phase}, {problem}"));
            }
            Err(other) => return Err(other.into()),
        }
        let guest = self.fleet.guest("marked").await?;
        let is_as_before = guest.host.is_none() && guest.operation.is_none();
        ensure!(is_as_before && matches!(guest.state, GuestState::Created | GuestState::Stopped), "{guest:?}");

        std::fs::write(largest, &good)?;
        let client = self.fleet.client();
        let start = client
            .start_guest("marked", &supercloud_api::GuestStart { place: Some(SEATS[1].into()), cpu: None })
            .await?;
        let started = self.end_of(&start).await?;
        ensure!(started.phase == Phase::Done, "the second attempt: {started:?}");
        let stop = client.stop_guest("marked", &GuestStop { force: true, grace_ms: None }).await?;
        ensure!(self.end_of(&stop).await?.phase == Phase::Done, "it does not stop");
        let delete = client.delete_guest("marked").await?;
        ensure!(self.end_of(&delete).await?.phase == Phase::Done, "it is not deleted");
        Ok(client.delete_image("marked").await?)
    }

    /// What is not refused at the door, but by what the token may do: a viewer changes nothing.
    pub async fn refuse_a_viewer(&self) -> Result<()> {
        let viewer = self.fleet.client_as("viewer", Role::Viewer).await?;
        let ClientConfig { token, .. } = viewer.config();
        let asked = Asked {
            what: "a move that a viewer asks for",
            method: Method::POST,
            path: &format!("/v1/guests/{SERVER}/migrate?project={PROJECT}"),
            token: token.as_deref(),
            body: json!({ "to": SEATS[1] }).to_string(),
            status: 403,
            code: Code::Forbidden,
            says: "",
        };
        self.expect_refusal(&self.raw()?, asked).await
    }

    /// That the hosts have their processes: nothing that was refused has cost one.
    pub fn check_daemons(&self) -> Result<()> {
        for host in &self.lab().spec().hosts {
            let agents = now(|| self.lab().kill_process(&host.name, Which::Agent, 0))?;
            ensure!(agents == 1, "{} agents at {}", agents, host.name);
        }
        Ok(())
    }
}
