//! A far side: HTTP on loopback, an answer for each path, and the things that were made. It does at once what is asked for.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex},
};

use serde_json::{Value, json};

#[derive(Default)]
struct State {
    things: Vec<(&'static str, Value)>,
    secrets: Vec<String>,
    changes: usize,
    uploaded: usize,
    fail: Option<String>,
    fails_operation: bool,
    holds_operations: bool,
    watched: bool,
    count: u64,
    /// Answers by idempotency key, with what was asked.
    answers: std::collections::HashMap<String, (String, Answer)>,
    replayed: usize,
    /// The next call that begins so is not answered: `true` when it is done all the same.
    hang: Option<(String, bool)>,
    hangs: bool,
    busy: usize,
}

/// A far side that is up until the test ends.
pub struct Far {
    /// Where it is.
    pub url: String,
    state: Arc<(Mutex<State>, Condvar)>,
}

type Answer = (u16, Value);

fn problem(status: u16, code: &str, detail: &str) -> Answer {
    (
        status,
        json!({ "type": "x", "code": code, "title": code, "status": status, "detail": detail, "retryable": false }),
    )
}

impl State {
    fn id(&mut self, kind: &str) -> String {
        self.count += 1;
        format!("{kind}-01a1fea9-e622-75ca-b41b-{:012x}", self.count)
    }

    fn of(&self, noun: &str) -> Vec<Value> {
        self.things.iter().filter(|(kind, _)| *kind == noun).map(|(_, thing)| thing.clone()).collect()
    }

    fn find(&mut self, noun: &str, name: &str) -> Option<&mut Value> {
        let found = self
            .things
            .iter_mut()
            .find(|(kind, thing)| *kind == noun && (thing["name"] == name || thing["id"] == name));
        found.map(|(_, thing)| thing)
    }

    fn add(&mut self, noun: &'static str, thing: Value) -> Value {
        self.things.push((noun, thing.clone()));
        thing
    }

    fn project(&mut self, name: &str) -> String {
        match self.find("projects", name) {
            Some(project) => project["id"].as_str().unwrap().to_owned(),
            None => {
                let quota = json!({ "guests": 100, "vcpus": 200, "memory_bytes": 0, "volume_bytes": 0 });
                let id = self.id("prj");
                self.add("projects", json!({ "id": id, "name": name, "quota": quota, "created_at_ms": 1 }));
                id
            }
        }
    }

    fn is_taken(&mut self, path: &[&str], body: &Value) -> bool {
        let noun = path.first().copied().unwrap_or_default();
        body["name"].as_str().is_some_and(|name| self.find(noun, name).is_some())
    }

    fn place(&mut self, guest: &str, place: &str) {
        let hosts = self.of("hosts");
        let is_it = |host: &&Value| place.is_empty() || host["name"] == place || host["cloud_name"] == place;
        let host = hosts.iter().find(is_it).unwrap().clone();
        let guest = self.find("guests", guest).unwrap();
        guest["state"] = json!("running");
        for (field, of_host) in
            [("host", "id"), ("host_name", "name"), ("cloud", "cloud"), ("cloud_name", "cloud_name")]
        {
            guest[field] = host[of_host].clone();
        }
    }

    fn guest(&mut self, project: &str, body: &Value) -> String {
        let [id, volume, port] = ["gst", "vol", "prt"].map(|kind| self.id(kind));
        let of = |state: &mut Self, noun: &str, name: &Value| {
            state.find(noun, name.as_str().unwrap_or_default()).map_or(Value::Null, |thing| thing["id"].clone())
        };
        let (image, network) = (of(self, "images", &body["image"]), of(self, "networks", &body["network"]));
        let none = "img-01a1fea9-e622-75ca-b41b-000000000000";
        self.add(
            "guests",
            json!({
                "id": id, "project": project, "name": body["name"], "state": "created", "alarm": null, "shape": body["shape"],
                "image": if image.is_null() { json!(none) } else { image }, "host": null, "host_name": null, "cloud": null,
                "cloud_name": null, "epoch": 1, "compat_class": null, "volumes": [volume], "ports": [port],
                "ipv4": "10.20.0.5", "operation": null, "freeze": null,
                "follow_prices": body["follow_prices"].as_bool().unwrap_or(false), "starts": 0, "created_at_ms": 1,
            }),
        );
        if !network.is_null() {
            let port = json!({ "id": port, "network": network, "project": project, "guest": id, "mac": "02:00", "ipv4": "10.20.0.5",
                "host": null, "epoch": 1, "prepared_at": null, "moved_from": null });
            self.add("ports", port);
        }
        id
    }

    /// An operation that has ended, unless they are held.
    fn operation(&mut self, kind: &str, guest: Option<&str>) -> Answer {
        let phase = match (self.holds_operations, std::mem::take(&mut self.fails_operation)) {
            (true, _) => "copy",
            (_, true) => "failed",
            _ => "done",
        };
        let operation = json!({
            "id": self.id("opn"), "kind": kind, "phase": phase, "progress": {}, "guest": guest, "is_cancel_requested": false,
            "actor": "token:a", "request_id": "req-01a1fea9-e617-7305-957c-ad553aef0867", "created_at_ms": 1, "updated_at_ms": 1,
        });
        (202, self.add("operations", operation))
    }

    fn change(&mut self, method: &str, path: &[&str], body: &Value) -> Answer {
        match (method, path) {
            ("POST", ["projects" | "networks" | "images" | "guests"]) if self.is_taken(path, body) => {
                problem(409, "name_taken", "there is one of that name")
            }
            ("POST", ["projects"]) => {
                let id = self.project(body["name"].as_str().unwrap());
                (201, self.find("projects", &id).unwrap().clone())
            }
            ("POST", ["networks"]) => {
                let (id, project) = (self.id("net"), self.project(body["project"].as_str().unwrap()));
                let network = json!({ "id": id, "project": project, "name": body["name"], "cidr": body["cidr"],
                    "gateway": "10.20.0.1", "dns": body["dns"], "vni": 1, "mtu": 1400, "created_at_ms": 1 });
                (201, self.add("networks", network))
            }
            ("POST", ["images"]) => {
                let (id, project) = (self.id("img"), self.project(body["project"].as_str().unwrap()));
                let image = json!({ "id": id, "project": project, "name": body["name"], "state": "uploading",
                    "cmdline": body["cmdline"], "parts": [], "uploaded": [], "created_at_ms": 1 });
                (201, self.add("images", image))
            }
            ("PUT", ["images", id, "parts", part]) => {
                let length = body.as_u64().unwrap();
                self.uploaded += usize::try_from(length).unwrap();
                let image = self.find("images", id).unwrap();
                image["uploaded"] = json!([{ "part": part, "bytes": length }]);
                (200, image.clone())
            }
            ("POST", ["images", id, "import"]) => {
                self.find("images", id).unwrap()["state"] = json!("ready");
                self.operation("image_import", None)
            }
            ("POST", ["guests"]) => {
                let project = self.project(body["project"].as_str().unwrap());
                let id = self.guest(&project, body);
                let is_started = body["start"].as_bool().unwrap() && !self.fails_operation;
                if is_started {
                    self.place(&id, body["place"].as_str().unwrap_or_default());
                }
                self.operation("guest_start", Some(&id))
            }
            ("POST", ["guests", guest, verb]) => {
                let Some(found) = self.find("guests", guest) else { return problem(404, "not_found", guest) };
                let id = found["id"].as_str().unwrap().to_owned();
                match *verb {
                    "stop" => found["state"] = json!("stopped"),
                    "freeze" => found["state"] = json!("frozen"),
                    _ => {
                        let place = [&body["to"], &body["place"]].into_iter().find_map(|place| place.as_str());
                        self.place(&id, place.unwrap_or_default());
                    }
                }
                self.operation(&format!("guest_{verb}"), Some(&id))
            }
            ("DELETE", [noun @ ("networks" | "images"), id]) => {
                self.things.retain(|(kind, thing)| kind != noun || thing["id"] != *id);
                (200, Value::Null)
            }
            ("DELETE", ["guests", guest]) => {
                assert_ne!(self.find("guests", guest).unwrap()["state"], "running", "stopped first");
                self.things.retain(|(kind, thing)| *kind != "guests" || thing["id"] != *guest);
                self.operation("guest_delete", None)
            }
            _ => problem(404, "not_found", "no such route"),
        }
    }

    fn answer(&mut self, method: &str, path: &str, body: &Value) -> Answer {
        if self.fail.as_ref().is_some_and(|start| format!("{method} {path}").starts_with(start)) {
            self.fail = None;
            return problem(409, "wrong_state", "not now");
        }
        let path = path.split('?').next().unwrap().trim_start_matches("/v1/");
        let parts: Vec<&str> = path.split('/').collect();
        if method != "GET" {
            self.changes += 1;
            return self.change(method, &parts, body);
        }
        match parts[..] {
            ["whoami"] => problem(403, "forbidden", "not of interest here"),
            ["rentings"] => problem(403, "forbidden", "for those who see all projects"),
            [noun] => (200, json!({ "items": self.of(noun), "next_page": null })),
            [noun, name] => match self.find(noun, name) {
                Some(thing) => (200, thing.clone()),
                None => problem(404, "not_found", &format!("there is no {name}")),
            },
            // As a controller that does not tell what it has of an upload.
            ["images", _, "parts", _] => problem(405, "bad_request", "only PUT is for this path"),
            _ => problem(404, "not_found", "no such route"),
        }
    }
}

fn serve(stream: &TcpStream, state: &(Mutex<State>, Condvar)) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let (mut length, mut secret, mut once) = (0, String::new(), None::<String>);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let Some((key, value)) = header.trim().split_once(": ") else { break };
        match key.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().ok()?,
            "idempotency-key" => once = Some(value.to_owned()),
            "authorization" => secret = value.trim_start_matches("Bearer ").to_owned(),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let body = serde_json::from_slice(&body).unwrap_or_else(|_| json!(length));
    let (status, answer) = {
        let mut known = state.0.lock().unwrap();
        known.secrets.push(secret);
        let is_watched = path.contains("wait=");
        known.watched |= is_watched;
        state.1.notify_all();
        let asked = format!("{method} {path} {body}");
        let call = format!("{method} {path}");
        if let Some((_, is_done)) = known.hang.take_if(|(start, _)| call.starts_with(start.as_str())) {
            if is_done {
                let answer = known.answer(&method, &path, &body);
                known.answers.insert(once?, (asked, answer));
            }
            known.hangs = true;
            state.1.notify_all();
            drop(known);
            // Whoever asked is killed meanwhile.
            let mut rest = Vec::new();
            let _ended = reader.read_to_end(&mut rest);
            return None;
        }
        let kept = once.as_ref().and_then(|key| known.answers.get(key)).filter(|_| method != "GET").cloned();
        let answer = match kept {
            Some((before, answer)) if before == asked => {
                known.replayed += 1;
                answer
            }
            Some(_) => problem(422, "idempotency_key_reused", "used for another request"),
            None if known.busy > 0 => {
                known.busy -= 1;
                problem(503, "store_unavailable", "just starting")
            }
            None => known.answer(&method, &path, &body),
        };
        if let Some(key) = once.filter(|_| method == "POST" && answer.0 < 300) {
            known.answers.insert(key, (asked, answer.clone()));
        }
        // As a long poll would, so that whoever watches does not ask all the time.
        if is_watched && known.holds_operations {
            drop(state.1.wait_timeout(known, std::time::Duration::from_millis(200)).unwrap());
        }
        answer
    };
    let text = answer.to_string();
    let head = format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", text.len());
    let mut stream = stream;
    stream.write_all((head + &text).as_bytes()).ok()
}

impl Far {
    /// With a project, two clouds and a host in each.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new((Mutex::new(State::default()), Condvar::new()));
        {
            let mut known = state.0.lock().unwrap();
            known.project("default");
            for (cloud_name, host_name) in [("east", "h1"), ("west", "h2")] {
                let [cloud, host] = ["cld", "hst"].map(|kind| known.id(kind));
                known.add(
                    "clouds",
                    json!({ "id": cloud, "name": cloud_name, "provider": "static", "created_at_ms": 1 }),
                );
                let room = json!({ "vcpus": 8, "memory_bytes": 8_u64 << 30, "disk_bytes": 0 });
                let host = json!({ "id": host, "name": host_name, "cloud": cloud, "cloud_name": cloud_name, "state": "up",
                    "data_address": null, "overlay_address": null, "overlay_index": 1, "capacity": room, "used": room,
                    "compat_classes": [], "probe": {}, "agent_version": "1", "certificate_sha256": "", "last_seen_ms": 1,
                    "created_at_ms": 1 });
                known.add("hosts", host);
            }
        }
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || serve(&stream.unwrap(), &shared));
            }
        });
        Self { url, state }
    }

    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.state.0.lock().unwrap())
    }

    /// The secrets of the calls so far.
    pub fn secrets(&self) -> Vec<String> {
        self.with(|state| state.secrets.clone())
    }

    /// How many calls were to change something.
    pub fn changes(&self) -> usize {
        self.with(|state| state.changes)
    }

    /// Bytes of images that came.
    pub fn uploaded(&self) -> usize {
        self.with(|state| state.uploaded)
    }

    /// A guest.
    pub fn guest(&self, name: &str) -> Value {
        self.with(|state| state.find("guests", name).unwrap().clone())
    }

    /// Things of a kind.
    pub fn count(&self, noun: &str) -> usize {
        self.with(|state| state.of(noun).len())
    }

    /// All guests.
    pub fn guest_names(&self) -> Vec<String> {
        self.with(|state| state.of("guests").iter().map(|guest| guest["name"].as_str().unwrap().to_owned()).collect())
    }

    /// Somebody makes a guest that runs.
    pub fn add_guest(&self, name: &str) {
        self.with(|state| {
            let project = state.project("default");
            let id =
                state.guest(&project, &json!({ "name": name, "shape": { "vcpus": 1, "memory_bytes": 1_u64 << 29 } }));
            state.place(&id, "east");
        });
    }

    /// The next call that begins so is refused.
    pub fn fail_next(&self, start: &str) {
        self.with(|state| state.fail = Some(start.into()));
    }

    /// The next call that begins so is never answered; it is done all the same, or not.
    pub fn hang_next(&self, start: &str, is_done: bool) {
        self.with(|state| (state.hang, state.hangs) = (Some((start.into(), is_done)), false));
    }

    /// Returns when somebody waits for an answer that does not come.
    pub fn wait_until_hanging(&self) {
        let mut known = self.state.0.lock().unwrap();
        while !known.hangs {
            known = self.state.1.wait(known).unwrap();
        }
    }

    /// So many calls are answered with 503.
    pub fn be_busy(&self, calls: usize) {
        self.with(|state| state.busy = calls);
    }

    /// Calls that were answered as before.
    pub fn replayed(&self) -> usize {
        self.with(|state| state.replayed)
    }

    /// A mirror holds a guest.
    pub fn mirror(&self, guest: &str) {
        self.with(|state| {
            let id = state.find("guests", guest).unwrap()["id"].as_str().unwrap().to_owned();
            let (_, mut operation) = state.operation("guest_mirror", Some(&id));
            operation["phase"] = json!("copy");
            let mirror = operation["id"].clone();
            *state.find("operations", mirror.as_str().unwrap()).unwrap() = operation;
            state.find("guests", guest).unwrap()["operation"] = mirror;
        });
    }

    /// The next operation fails.
    pub fn fail_next_operation(&self) {
        self.with(|state| state.fails_operation = true);
    }

    /// Operations do not end from now on.
    pub fn hold_operations(&self) {
        self.with(|state| (state.holds_operations, state.watched) = (true, false));
    }

    /// Returns when somebody waits for an operation.
    pub fn wait_until_watched(&self) {
        let mut known = self.state.0.lock().unwrap();
        while !known.watched {
            known = self.state.1.wait(known).unwrap();
        }
    }
}
