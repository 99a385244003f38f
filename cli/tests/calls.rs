//! `supercloud api`, `explain`, `man` and the forms of output, as a person calls them. The far side is a few canned answers.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpListener,
    path::Path,
    process::{Command, Output},
    sync::mpsc,
};

/// What arrived: the request line, the idempotency key, the last event seen, the body.
struct Arrived {
    line: String,
    key: Option<String>,
    after: Option<String>,
    body: String,
}

/// An answer of which the end does not come.
const CUT_OFF: &str = "{\"name\":";

/// Answers one connection after the other; `None` breaks the connection off once the request was read.
fn far_side(answers: Vec<Option<(u16, &'static str)>>) -> (String, mpsc::Receiver<Arrived>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for answer in answers {
            let (stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(&stream);
            let mut lines = Vec::new();
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                if line.trim().is_empty() {
                    break;
                }
                lines.push(line.trim().to_owned());
            }
            let header = |name: &str| {
                let found = lines.iter().filter_map(|line| line.split_once(": "));
                found.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned()).next()
            };
            let length = header("content-length").map_or(0, |length| length.parse().unwrap());
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let (line, key, after) = (lines[0].clone(), header("idempotency-key"), header("last-event-id"));
            sender.send(Arrived { line, key, after, body: String::from_utf8(body).unwrap() }).unwrap();
            if let Some((status, text)) = answer {
                let length = if text == CUT_OFF { text.len() + 100 } else { text.len() };
                let head = format!("HTTP/1.1 {status} x\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
                (&stream).write_all((head + text).as_bytes()).unwrap();
            }
        }
    });
    (url, receiver)
}

fn supercloud(url: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_supercloud"));
    command.env("SUPERCLOUD_URL", url).env("SUPERCLOUD_TOKEN", "secret").env("XDG_CONFIG_HOME", "/nowhere");
    for name in ["SUPERCLOUD_PROJECT", "SUPERCLOUD_CA", "SUPERCLOUD_TOKEN_FILE"] {
        command.env_remove(name);
    }
    command.args(arguments).output().unwrap()
}

fn told(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn any_call_is_made_and_printed_as_asked_for() {
    let answer = Some((200, r#"[{"name":"a","count":1},{"name":"b","at":null}]"#));
    let (url, arrived) = far_side(vec![answer, answer, answer]);
    let called =
        supercloud(&url, &["api", "post", "/v1/guests/web/migrate?dry_run=true", "--data", r#"{"to":"home"}"#]);
    assert!(told(&called).contains("\n    \"name\": \"a\""));
    let first = arrived.recv().unwrap();
    assert_eq!(
        (first.line.as_str(), first.body.as_str()),
        ("POST /v1/guests/web/migrate?dry_run=true HTTP/1.1", r#"{"to":"home"}"#)
    );
    assert_eq!(
        told(&supercloud(&url, &["api", "GET", "/v1/x", "-o", "ndjson"])),
        "{\"count\":1,\"name\":\"a\"}\n{\"at\":null,\"name\":\"b\"}\n"
    );
    assert_eq!(
        told(&supercloud(&url, &["api", "GET", "/v1/x", "-o", "yaml"])),
        "- count: 1\n  name: a\n- at: null\n  name: b\n"
    );
}

#[test]
fn all_pages_are_one_listing() {
    let pages =
        vec![Some((200, r#"{"items":[1,2],"next_page":"two"}"#)), Some((200, r#"{"items":[3],"next_page":null}"#))];
    let (url, arrived) = far_side(pages);
    assert_eq!(told(&supercloud(&url, &["api", "GET", "/v1/events?limit=2", "--all", "-o", "ndjson"])), "1\n2\n3\n");
    assert_eq!(arrived.recv().unwrap().line, "GET /v1/events?limit=2 HTTP/1.1");
    assert_eq!(arrived.recv().unwrap().line, "GET /v1/events?limit=2&page=two HTTP/1.1");
}

#[test]
fn all_pages_say_so_when_they_are_not_all() {
    let page = |next: &str| format!("{{\"items\":[{}1],\"next_page\":{next}}}", "1,".repeat(99_999));
    for (next, is_all) in [("\"two\"", false), ("null", true)] {
        let (url, _arrived) = far_side(vec![Some((200, page(next).leak()))]);
        let called = supercloud(&url, &["api", "GET", "/v1/events", "--all", "-o", "ndjson"]);
        assert_eq!(String::from_utf8_lossy(&called.stdout).lines().count(), 100_000);
        let said = String::from_utf8_lossy(&called.stderr);
        assert_eq!(
            (called.status.success(), said.contains("100000 items, and there are more")),
            (is_all, !is_all),
            "{said}"
        );
    }
}

#[test]
fn a_call_that_had_no_answer_is_sent_again_with_its_key() {
    for lost in [None, Some((200, CUT_OFF))] {
        let (url, arrived) = far_side(vec![lost, Some((200, "{}"))]);
        told(&supercloud(&url, &["api", "POST", "/v1/guests/web/stop"]));
        let (first, second) = (arrived.recv().unwrap(), arrived.recv().unwrap());
        assert_eq!(first.line, second.line);
        assert!(first.key.is_some());
        assert_eq!(first.key, second.key);
    }
}

#[test]
fn events_go_on_after_a_lost_connection() {
    let event = |seq: u64| {
        let event = serde_json::json!({ "seq": seq, "at_ms": 1, "kind": "host.up", "actor": "system",
            "request_id": "req-01a1fea9-e617-7305-957c-ad553aef0867", "data": {}, "previous_hash": "", "hash": "" });
        Some((200, &*format!("id: {seq}\ndata: {event}\n\n").leak()))
    };
    let refusal = r#"{"type":"x","code":"forbidden","title":"x","status":403,"detail":"no more","retryable":false}"#;
    let (url, arrived) = far_side(vec![event(1), None, event(2), Some((403, refusal))]);
    let called = supercloud(&url, &["event", "watch", "-o", "ndjson"]);
    let seen = String::from_utf8_lossy(&called.stdout).lines().map(|line| line[..8].to_owned()).collect::<Vec<_>>();
    assert_eq!((called.status.code(), seen), (Some(3), vec!["{\"seq\":1".to_owned(), "{\"seq\":2".to_owned()]));
    assert_eq!(arrived.iter().map(|arrived| arrived.after.unwrap()).collect::<Vec<_>>(), ["0", "1", "1", "2"]);
}

#[test]
fn events_that_cannot_be_read_are_told_and_left_behind_and_a_busy_controller_is_waited_for() {
    let event = |seq: u64, kind: serde_json::Value| {
        serde_json::json!({ "seq": seq, "at_ms": 1, "kind": kind, "actor": "system",
            "request_id": "req-01a1fea9-e617-7305-957c-ad553aef0867", "data": {}, "previous_hash": "", "hash": "" })
    };
    let known = |seq| event(seq, "host.up".into());
    let unknown = event(2, serde_json::json!({ "of": "another version" }));
    let problem = |status: u16, code: &str| {
        let text = serde_json::json!({ "type": "x", "code": code, "title": "x", "status": status, "detail": "not now",
            "retryable": status != 403 });
        Some((status, &*text.to_string().leak()))
    };
    let stream = |text: String| Some((200, &*text.leak()));
    let (url, arrived) = far_side(vec![
        // At the start, too.
        problem(503, "store_unavailable"),
        stream(format!("id: 1\ndata: {}\n\nid: 2\ndata: {unknown}\n\n", known(1))),
        problem(503, "store_unavailable"),
        problem(429, "too_many_requests"),
        stream(format!(": keep-alive\n\nid: 3\ndata: {}\n\n", known(3))),
        problem(403, "forbidden"),
    ]);
    let called = supercloud(&url, &["event", "watch", "-o", "ndjson"]);
    let seen = String::from_utf8_lossy(&called.stdout).lines().map(|line| line[..8].to_owned()).collect::<Vec<_>>();
    let said = String::from_utf8_lossy(&called.stderr);
    assert_eq!(
        (called.status.code(), seen),
        (Some(3), vec!["{\"seq\":1".to_owned(), "{\"seq\":3".to_owned()]),
        "{said}"
    );
    assert!(said.contains("an event (2) cannot be read") && said.contains("left out"), "{said}");
    let after: Vec<String> = arrived.iter().map(|arrived| arrived.after.unwrap()).collect();
    assert_eq!(after, ["0", "0", "2", "2", "2", "3"], "the unreadable one is not asked for again");
}

#[test]
fn a_dry_run_asks_and_follows_nothing() {
    let plan = r#"{"id":"opn-01a1fea9-e622-75ca-b41b-c7d245b5cc2f","kind":"guest_freeze","phase":"plan","progress":{},
        "plan":{"checks":[{"name":"state","is_ok":false,"detail":"it does not run"}]},"is_cancel_requested":false,"actor":"a",
        "request_id":"req-01a1fea9-e617-7305-957c-ad553aef0867","created_at_ms":1,"updated_at_ms":1}"#;
    let (url, arrived) = far_side(vec![Some((200, plan))]);
    let text = told(&supercloud(&url, &["guest", "freeze", "web", "--dry-run", "--watch"]));
    assert!(text.contains("it does not run") && text.contains("NO"), "{text}");
    assert_eq!(arrived.recv().unwrap().line, "POST /v1/guests/web/freeze?dry_run=true HTTP/1.1");
}

#[test]
fn what_cannot_be_sent_is_said_before_anything_is() {
    for arguments in
        [&["GET", "v1/guests"][..], &["POST", "/v1/guests", "--all"], &["POST", "/v1/guests", "--data", "{to"]]
    {
        let called = supercloud("http://127.0.0.1:1", &[&["api"], arguments].concat());
        assert_eq!(called.status.code(), Some(1), "{arguments:?}");
        assert!(!String::from_utf8_lossy(&called.stderr).contains("cannot reach"), "{arguments:?}");
    }
}

#[test]
fn explanations_and_manual_pages_need_no_controller() {
    assert!(told(&supercloud("http://127.0.0.1:1", &["explain", "guest"])).contains("epoch"));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("man");
    told(&supercloud("http://127.0.0.1:1", &["man", folder.to_str().unwrap()]));
    let page = std::fs::read_to_string(folder.join("supercloud-guest-migrate.1")).unwrap();
    assert!(page.contains("Moves a running guest live") && page.contains("max\\-downtime\\-ms"), "{page}");
}
