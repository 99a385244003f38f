//! `supercloud image import` going on with an upload that was interrupted.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
};

use serde_json::json;

const IMAGE: &str = "img-01a1fea9-e622-75ca-b41b-000000000001";

#[derive(Default)]
struct State {
    kept: Vec<u8>,
    /// Offsets and lengths of the pieces that came.
    pieces: Vec<(usize, usize)>,
    /// So many pieces are kept before a connection breaks without an answer.
    breaks_after: Option<usize>,
    is_imported: bool,
}

/// A controller that has an image half uploaded.
struct Far {
    url: String,
    state: Arc<Mutex<State>>,
}

fn done() -> serde_json::Value {
    json!({ "id": "opn-01a1fea9-e622-75ca-b41b-000000000003", "kind": "image_import", "phase": "done", "progress": {},
        "guest": null, "is_cancel_requested": false, "actor": "token:a",
        "request_id": "req-01a1fea9-e617-7305-957c-ad553aef0867", "created_at_ms": 1, "updated_at_ms": 1 })
}

fn answer(state: &Mutex<State>, method: &str, path: &str, body: &[u8]) -> Option<serde_json::Value> {
    let mut known = state.lock().unwrap();
    let number = |key: &str| -> usize {
        let rest = path.split_once(&format!("{key}=")).unwrap().1;
        rest.split('&').next().unwrap().parse().unwrap()
    };
    let image = |known: &State| {
        json!({ "id": IMAGE, "project": "prj-01a1fea9-e622-75ca-b41b-000000000002", "name": "lean", "state": "uploading",
            "cmdline": null, "parts": [], "uploaded": [{ "part": "disk", "bytes": known.kept.len() }], "created_at_ms": 1 })
    };
    match (method, path.split('?').next().unwrap().trim_start_matches("/v1/images/")) {
        ("GET", "lean") => Some(image(&known)),
        ("GET", operation) if operation.contains("operations") => Some(done()),
        ("GET", _) => {
            let (offset, bytes) = (number("offset"), number("bytes"));
            let stretch = &known.kept[offset.min(known.kept.len())..(offset + bytes).min(known.kept.len())];
            let digest = blake3::hash(stretch).to_hex().to_string();
            Some(json!({ "part": "disk", "offset": offset, "bytes": stretch.len(), "blake3": digest }))
        }
        ("PUT", _) => {
            known.pieces.push((number("offset"), body.len()));
            let is_again = number("offset") + body.len() == known.kept.len();
            if !is_again {
                assert_eq!(number("offset"), known.kept.len(), "a piece goes at the end");
                known.kept.extend_from_slice(body);
            }
            if known.breaks_after.is_some_and(|after| known.pieces.len() == after) {
                return None;
            }
            Some(image(&known))
        }
        _ => {
            known.is_imported = true;
            Some(done())
        }
    }
}

fn serve(mut stream: &TcpStream, state: &Mutex<State>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let Some((key, value)) = header.trim().split_once(": ") else { break };
        if key.eq_ignore_ascii_case("content-length") {
            length = value.parse().ok()?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let text = answer(state, &method, &path, &body)?.to_string();
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", text.len());
    stream.write_all((head + &text).as_bytes()).ok()
}

impl Far {
    fn with(kept: &[u8]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State { kept: kept.to_vec(), ..State::default() }));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || serve(&stream.unwrap(), &shared));
            }
        });
        Self { url, state }
    }

    fn import(&self, folder: &Path) -> (i32, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_supercloud"));
        for name in ["TOKEN", "TOKEN_FILE", "CA", "PROJECT", "CONTEXT"] {
            command.env_remove(format!("SUPERCLOUD_{name}"));
        }
        command.env("SUPERCLOUD_URL", &self.url).env("XDG_CONFIG_HOME", folder).current_dir(folder);
        let out =
            command.args(["image", "import", "disk.raw", "--name", "lean"]).stdin(Stdio::null()).output().unwrap();
        (out.status.code().unwrap(), String::from_utf8_lossy(&out.stderr).into_owned())
    }
}

fn disk() -> Vec<u8> {
    (0..20_000_000u32).map(|at| (at / 4096 * 7 + at % 251).to_le_bytes()[0]).collect()
}

#[test]
fn what_came_before_is_checked_and_not_sent_again() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk();
    std::fs::write(folder.path().join("disk.raw"), &disk).unwrap();
    let far = Far::with(&disk[..9_000_001]);
    // And the answer to a piece is lost on the way.
    far.state.lock().unwrap().breaks_after = Some(1);
    let (code, said) = far.import(folder.path());
    assert_eq!(code, 0, "{said}");
    let known = far.state.lock().unwrap();
    assert!(known.kept == disk && known.is_imported, "{said}");
    let piece = 8 << 20;
    assert_eq!(known.pieces[..2], [(9_000_001, piece), (9_000_001, piece)], "the same piece once more");
    assert_eq!(known.pieces.len(), 3, "{:?}", known.pieces);
}

#[test]
fn an_upload_of_another_file_is_not_gone_on_with() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk();
    std::fs::write(folder.path().join("disk.raw"), &disk).unwrap();
    let mut other = disk[..9_000_000].to_vec();
    other[8_000_000] ^= 1;
    let far = Far::with(&other);
    let (code, said) = far.import(folder.path());
    assert!(code == 1 && said.contains("not of this file") && said.contains("image delete lean"), "{said}");
    let known = far.state.lock().unwrap();
    assert!(known.pieces.is_empty() && !known.is_imported);
}
