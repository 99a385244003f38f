//! A service that answers as it is told, and moto, an independent one (started where SUPERCLOUD_MOTO names its program: see
//! deploy/moto).

use std::{
    collections::VecDeque,
    fs,
    os::unix::fs::PermissionsExt as _,
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
};

use supercloud_ids::ProjectId;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use super::*;
use crate::backend::conformance::conforms;

fn store(endpoint: String, prefix: &str, folder: &std::path::Path) -> BucketStore {
    let credentials_file = folder.join("credentials");
    fs::write(&credentials_file, "aws_access_key_id = AKtest\naws_secret_access_key = verysecret\n").unwrap();
    fs::set_permissions(&credentials_file, fs::Permissions::from_mode(0o600)).unwrap();
    let config = BucketConfig {
        bucket: "chunks".into(),
        prefix: prefix.into(),
        region: "us-east-1".into(),
        endpoint: Some(endpoint),
        credentials_file: Some(credentials_file),
        ca_file: "/nonexistent".into(),
    };
    BucketStore::open(&config).unwrap()
}

/// Answers one request per connection from a list, the last answer again and again; keeps the heads of what was asked.
#[derive(Debug, Clone)]
struct Scripted {
    answers: Arc<Mutex<VecDeque<String>>>,
    asked: Arc<Mutex<Vec<String>>>,
    address: std::net::SocketAddr,
}

impl Scripted {
    async fn begin(answers: &[&str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answers = answers.iter().map(|answer| (*answer).to_owned()).collect();
        let server = Self { answers: Arc::new(Mutex::new(answers)), asked: Arc::default(), address };
        let task = server.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (mut head, mut byte) = (Vec::new(), [0]);
                while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).await.is_ok_and(|n| n == 1) {
                    head.push(byte[0]);
                }
                let head = String::from_utf8(head).unwrap();
                let length =
                    head.to_lowercase().lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
                let mut body = vec![0; length.unwrap_or(0)];
                stream.read_exact(&mut body).await.unwrap();
                task.asked.lock().unwrap().push(head);
                let answer = {
                    let mut answers = task.answers.lock().unwrap_or_else(PoisonError::into_inner);
                    if answers.len() > 1 { answers.pop_front() } else { answers.front().cloned() }
                };
                let _ = stream.write_all(answer.unwrap().as_bytes()).await;
            }
        });
        server
    }

    fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn answer(status: &str, headers: &str, body: &str) -> String {
    let length =
        if headers.contains("Content-Length") { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
    format!("HTTP/1.1 {status}\r\nConnection: close\r\n{length}{headers}\r\n{body}")
}

const STAMP: &str = "Last-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\nETag: \"a\"\r\n";

#[tokio::test]
async fn what_fails_is_tried_again_but_no_deletion() {
    let folder = tempfile::tempdir().unwrap();
    let slow_down = answer("503 Slow Down", "", "<Error><Code>SlowDown</Code></Error>");
    let server = Scripted::begin(&[&slow_down, &slow_down, &answer("200 OK", STAMP, "hello")]).await;
    let store = store(server.endpoint(), "a/b", folder.path());
    let key = ObjectKey::other(ProjectId::generate(), "x").unwrap();
    assert_eq!(store.get(key.clone(), 5).await.unwrap(), "hello");
    let asked = server.asked();
    assert_eq!(asked.len(), 3);
    assert!(asked[0].starts_with(&format!("GET /chunks/a/b/{key} ")), "{}", asked[0]);
    assert!(asked[0].contains("AWS4-HMAC-SHA256 Credential=AKtest/") && !asked[0].contains("verysecret"));

    let head = answer("200 OK", STAMP, "");
    let server = Scripted::begin(&[&head, &slow_down]).await;
    let store = super::tests::store(server.endpoint(), "", folder.path());
    let error = store.delete(key).await.unwrap_err();
    assert!(error.to_string().contains("SlowDown"), "{error}");
    assert_eq!(server.asked().len(), 2, "one look, one deletion");
}

#[tokio::test]
async fn refusals_are_told_by_their_code_and_nothing_that_was_signed() {
    let folder = tempfile::tempdir().unwrap();
    let body = "<Error><Code>SignatureDoesNotMatch</Code><StringToSign>AWS4 secret things</StringToSign></Error>";
    let server = Scripted::begin(&[&answer("403 Forbidden", "", body)]).await;
    let store = store(server.endpoint(), "", folder.path());
    let key = ObjectKey::other(ProjectId::generate(), "x").unwrap();
    let error = store.put(key, Bytes::from_static(b"x")).await.unwrap_err();
    let text = format!("{error} {error:?} {store:?}");
    assert!(text.contains("SignatureDoesNotMatch") && text.contains("bucket chunks at"), "{text}");
    assert!(!text.contains("secret things") && !text.contains("verysecret"), "{text}");
    assert_eq!(server.asked().len(), 1, "a refusal is not tried again");
}

#[tokio::test]
async fn an_answer_that_is_too_large_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let huge = answer("200 OK", &format!("{STAMP}Content-Length: 9999999999\r\n"), "x");
    let server = Scripted::begin(&[&huge]).await;
    let store = store(server.endpoint(), "", folder.path());
    let key = ObjectKey::other(ProjectId::generate(), "x").unwrap();
    let error = store.get(key, 1 << 20).await.unwrap_err();
    assert!(matches!(error, StoreError::TooLarge { len: 9_999_999_999, .. }), "{error}");
}

/// Of a redirect the target learns nothing.
#[tokio::test]
async fn redirects_are_not_followed() {
    let folder = tempfile::tempdir().unwrap();
    let other = Scripted::begin(&[&answer("200 OK", STAMP, "stolen")]).await;
    let moved = answer("307 Temporary Redirect", &format!("Location: {}/x\r\n", other.endpoint()), "");
    let server = Scripted::begin(&[&moved]).await;
    let store = store(server.endpoint(), "", folder.path());
    let key = ObjectKey::other(ProjectId::generate(), "x").unwrap();
    assert!(store.get(key, 100).await.is_err());
    assert_eq!(other.asked().len(), 0);
}

struct Moto(Child);

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn moto() -> Option<(Moto, String)> {
    let Some(program) = std::env::var_os("SUPERCLOUD_MOTO") else {
        println!("skipped: needs moto (deploy/moto)");
        return None;
    };
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let child = Command::new(program)
        .args(["-H", "127.0.0.1", "-p", &port.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (moto, endpoint) = (Moto(child), format!("http://127.0.0.1:{port}"));
    // Another test may have done so, or none yet.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    loop {
        match http.put(format!("{endpoint}/chunks")).send().await {
            Ok(made) if made.status().is_success() => return Some((moto, endpoint)),
            other => assert!(std::time::Instant::now() < deadline, "moto does not come up: {other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_is_a_store() {
    let Some((_moto, endpoint)) = moto().await else { return };
    let folder = tempfile::tempdir().unwrap();
    let lazy = store(endpoint.clone(), "", folder.path());
    conforms(Arc::new(lazy.clone()), Duration::from_millis(1100), true).await;
    let exact = store(endpoint, "clouds/west-1", folder.path()).with_times(Duration::ZERO, Duration::ZERO);
    // With the other's objects beside its prefix, and something that is nobody's.
    lazy.inner.patient.put(&Path::from("clouds/west-1/README"), PutPayload::from_static(b"x")).await.unwrap();
    conforms(Arc::new(exact), Duration::from_millis(1100), false).await;
}

/// More objects than one page has.
#[tokio::test(flavor = "multi_thread")]
async fn long_listings_come_whole() {
    let Some((_moto, endpoint)) = moto().await else { return };
    let folder = tempfile::tempdir().unwrap();
    let store = store(endpoint, "p", folder.path());
    let project = ProjectId::generate();
    let objects: Vec<_> =
        (0..1100).map(|i| (ObjectKey::other(project, &format!("n/{i:04}")).unwrap(), Bytes::new())).collect();
    assert_eq!(store.put_batch(objects.clone()).await.unwrap(), 1100);
    let keys: Vec<_> = objects.into_iter().map(|(key, _)| key).collect();
    for limit in [1100, 5000] {
        let listed = store.list(&format!("{project}/"), None, limit).await.unwrap();
        assert_eq!(listed.into_iter().map(|entry| entry.key).collect::<Vec<_>>(), keys);
    }
    assert_eq!(store.list(&format!("{project}/"), Some(&format!("{project}/n/1050")), 1000).await.unwrap().len(), 49);
}
