//! Contexts, `apply`, `top --once`, wide tables and exit codes, as a person calls them. The far side is a small controller that
//! keeps what is made in it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod far;

use std::{
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output, Stdio},
};

use far::Far;

fn supercloud(home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_supercloud"));
    for name in ["URL", "TOKEN", "TOKEN_FILE", "CA", "PROJECT", "CONTEXT"] {
        command.env_remove(format!("SUPERCLOUD_{name}"));
    }
    command.env("XDG_CONFIG_HOME", home).current_dir(home).args(arguments).stdin(Stdio::null());
    command
}

fn run(home: &Path, arguments: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = supercloud(home, arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

#[test]
fn a_context_says_where_the_controller_is_and_keeps_its_secret() {
    let home = tempfile::tempdir().unwrap();
    let (first, second) = (Far::start(), Far::start());
    let add = |name: &str, url: &str, secret: &str| {
        let mut command = supercloud(home.path(), &["context", "add", name, "--url", url, "--token-stdin"]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), secret.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
    };
    add("one", &first.url, "secret-one\n");
    add("two", &second.url, "secret-two\n");
    let folder = home.path().join("supercloud");
    for file in ["contexts.toml", "tokens/one", "tokens/two"] {
        assert_eq!(folder.join(file).metadata().unwrap().permissions().mode() & 0o777, 0o600, "{file}");
    }
    // The first one is in use; a secret is never shown.
    for arguments in
        [&["context", "list", "-o", "wide"][..], &["context", "show", "one"], &["context", "list", "-o", "json"]]
    {
        let (code, out, _) = run(home.path(), arguments);
        assert_eq!(code, 0);
        assert!(out.contains("one") && !out.contains("secret-one"), "{out}");
    }
    assert_eq!(run(home.path(), &["guest", "list"]).0, 0);
    assert_eq!(first.secrets(), ["secret-one"]);
    assert_eq!(run(home.path(), &["context", "use", "two"]).0, 0);
    assert_eq!(run(home.path(), &["guest", "list"]).0, 0);
    assert_eq!(run(home.path(), &["guest", "list", "--context", "one"]).0, 0);
    assert_eq!((first.secrets().len(), second.secrets()), (2, vec!["secret-two".to_owned()]));
    // A URL wins, and no context's secret goes there.
    assert_eq!(run(home.path(), &["guest", "list", "--url", &first.url]).0, 0);
    assert_eq!(first.secrets().last().unwrap(), "");
    // The settings file wins, too, and says so.
    std::fs::write(folder.join("config.toml"), format!("url = \"{}\"\n", first.url)).unwrap();
    assert_eq!(run(home.path(), &["guest", "list"]).0, 0);
    assert_eq!(first.secrets().len(), 4);
    assert!(run(home.path(), &["context", "list"]).2.contains("wins"));
    std::fs::remove_file(folder.join("config.toml")).unwrap();
    // What is removed is forgotten with its secret.
    assert_eq!(run(home.path(), &["context", "remove", "two"]).0, 0);
    assert!(!folder.join("tokens/two").exists() && folder.join("tokens/one").exists());
    let (code, _, said) = run(home.path(), &["guest", "list"]);
    assert!(code == 1 && said.contains("no controller given"), "{said}");
    for wrong in
        [&["context", "use", "two"][..], &["context", "add", "One", "--url", "https://x"], &["context", "show", "x"]]
    {
        assert_eq!(run(home.path(), wrong).0, 1, "{wrong:?}");
    }
}

const FLEET: &str = r#"
default_project = "shop"

[[project]]
name = "shop"

[[network]]
name = "lan"
cidr = "10.20.0.0/24"

[[image]]
name = "debian"
disk = "disk.raw"

[[guest]]
name = "web"
image = "debian"
network = "lan"
shape = "1x512"
where = "east"
"#;

#[test]
fn a_fleet_is_made_once_kept_and_pruned() {
    let home = tempfile::tempdir().unwrap();
    let far = Far::start();
    let file = home.path().join("fleet.toml");
    std::fs::write(&file, FLEET).unwrap();
    std::fs::write(home.path().join("disk.raw"), [7_u8; 4096]).unwrap();
    let apply = |more: &[&str]| run(home.path(), &[&["apply", "-f", "fleet.toml", "--url", &far.url], more].concat());

    let (code, out, said) = apply(&["--dry-run"]);
    assert_eq!((code, far.changes()), (6, 0), "{out}{said}");
    let lines: Vec<&str> = out.lines().skip(1).collect();
    assert!(lines.len() == 4 && lines[0].contains("shop") && lines[3].contains("shop/web"), "{out}");
    let (code, _, said) = apply(&[]);
    assert!(code == 7 && said.contains("--yes") && far.changes() == 0, "{said}");

    let (code, out, said) = apply(&["--yes"]);
    assert_eq!(code, 0, "{out}{said}");
    assert!(said.contains("4 steps done"), "{said}");
    assert_eq!(far.uploaded(), 4096);
    let before = far.changes();
    let (code, _, said) = apply(&["--yes"]);
    assert!(code == 0 && said.contains("nothing to change") && far.changes() == before, "{said}");
    assert_eq!(apply(&["--dry-run"]).0, 0);

    // Elsewhere: a move. Another shape: refused by name, and nothing else is done.
    std::fs::write(&file, FLEET.replace("\"east\"", "\"west\"")).unwrap();
    let (code, out, _) = apply(&["--yes", "-o", "json"]);
    let plan: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, plan["steps"][0]["action"].as_str()), (0, Some("migrate")), "{out}");
    assert_eq!(far.guest("web")["cloud_name"], "west");
    std::fs::write(&file, FLEET.replace("1x512", "1x1024")).unwrap();
    let before = far.changes();
    let (code, out, said) = apply(&["--yes"]);
    assert!(code == 5 && out.contains("shape") && said.contains("nothing was done"), "{out}{said}");
    assert_eq!(far.changes(), before);

    // What is in the file no more is kept, unless it shall be deleted: and then only what this file made.
    far.add_guest("foreign");
    std::fs::write(&file, FLEET.split("[[guest]]").next().unwrap()).unwrap();
    let (code, _, said) = apply(&["--yes"]);
    assert!(code == 0 && said.contains("guest shop/web"), "{said}");
    let (code, out, said) = apply(&["--yes", "--prune"]);
    assert_eq!(code, 0, "{out}{said}");
    assert_eq!(far.guest_names(), ["foreign"]);
}

#[test]
fn a_run_that_broke_off_is_gone_on_with() {
    let home = tempfile::tempdir().unwrap();
    let far = Far::start();
    std::fs::write(home.path().join("fleet.toml"), FLEET).unwrap();
    std::fs::write(home.path().join("disk.raw"), [7_u8; 4096]).unwrap();
    let apply = || run(home.path(), &["apply", "-f", "fleet.toml", "--url", &far.url, "--yes"]);
    far.fail_next("POST /v1/images/");
    let (code, _, said) = apply();
    assert!(code == 3 && said.contains("goes on from here"), "{said}");
    // Pieces of two files make no image.
    let about = home.path().join("disk.raw").metadata().unwrap();
    std::fs::write(home.path().join("disk.raw"), [8_u8; 8192]).unwrap();
    let (code, out, _) = apply();
    assert!(code == 5 && out.contains("half uploaded"), "{out}");
    std::fs::write(home.path().join("disk.raw"), [7_u8; 4096]).unwrap();
    let disk = std::fs::File::options().write(true).open(home.path().join("disk.raw")).unwrap();
    disk.set_modified(about.modified().unwrap()).unwrap();
    let (code, out, said) = apply();
    assert!(code == 0 && out.contains("go on importing"), "{out}{said}");
    assert_eq!((far.uploaded(), far.guest_names()), (4096, vec!["web".to_owned()]), "uploaded once");
    // An operation that fails is told as such; the next run starts what was made.
    let more = FLEET.replace(
        "[[guest]]",
        "[[guest]]\nname = \"two\"\nimage = \"debian\"\nnetwork = \"lan\"\nshape = \"1x512\"\n[[guest]]",
    );
    std::fs::write(home.path().join("fleet.toml"), more).unwrap();
    far.fail_next_operation();
    let (code, _, said) = apply();
    assert!(code == 4 && said.contains("shop/two"), "{said}");
    let (code, out, said) = apply();
    assert!(code == 0 && out.contains("start"), "{out}{said}");
}

#[test]
fn an_interrupt_ends_the_run_and_not_what_was_begun() {
    let home = tempfile::tempdir().unwrap();
    let far = Far::start();
    far.hold_operations();
    let guests = |names: [&str; 2]| {
        names.map(|name| {
            format!("[[guest]]\nname = \"{name}\"\nimage = \"debian\"\nnetwork = \"lan\"\nshape = \"1x512\"\n")
        })
    };
    let base = FLEET.split("[[image]]").next().unwrap();
    let image = "[[image]]\nname = \"debian\"\ndisk = \"disk.raw\"\n";
    std::fs::write(home.path().join("disk.raw"), [7_u8; 4096]).unwrap();
    // Two images are imported at once: one interrupt is enough.
    let text = format!("{base}{image}{}{}", image.replace("debian", "other"), guests(["one", "two"]).concat());
    std::fs::write(home.path().join("fleet.toml"), text).unwrap();
    let mut child = supercloud(home.path(), &["apply", "-f", "fleet.toml", "--url", &far.url, "--yes"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    far.wait_until_watched();
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!((far.uploaded(), far.guest_names().len()), (8192, 0), "no more was begun");
}

#[test]
fn what_is_wrong_in_a_fleet_is_said_with_its_line_before_anything_is_asked() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("fleet.toml"), FLEET.replace("cidr", "cird")).unwrap();
    let (code, _, said) = run(home.path(), &["apply", "-f", "fleet.toml", "--url", "http://127.0.0.1:1"]);
    assert!(code == 1 && said.contains("line 9") && said.contains("cird"), "{said}");
}

#[test]
fn top_prints_one_picture_as_text() {
    let home = tempfile::tempdir().unwrap();
    let far = Far::start();
    far.add_guest("web");
    let (code, out, said) = run(home.path(), &["top", "--once", "--url", &far.url]);
    assert_eq!((code, out.lines().count()), (0, 24), "{out}{said}");
    assert!(out.contains("web") && out.contains("hosts 2/2 up") && out.contains("No alarms"), "{out}");
    // Where there is no terminal it says so, and draws nothing.
    let (code, out, said) = run(home.path(), &["top", "--url", &far.url]);
    assert!(code == 1 && out.is_empty() && said.contains("--once"), "{said}");
}

/// On a terminal of its own (`script` makes it): drawn, ended by a key or a signal, and left as it was.
#[test]
fn top_leaves_the_terminal_as_it_was() {
    const ENTER: &[u8] = b"\x1b[?1049h";
    const LEAVE: &[u8] = b"\x1b[?1049l";
    let far = Far::start();
    far.add_guest("web");
    for key in ["q", "\u{3}"] {
        let home = tempfile::tempdir().unwrap();
        let call = format!("stty rows 24 cols 80; exec {} top --url {}", env!("CARGO_BIN_EXE_supercloud"), far.url);
        let mut script = Command::new("script");
        script.args(["-qec", &call, "/dev/null"]).env("TERM", "xterm").env("XDG_CONFIG_HOME", home.path());
        for name in ["URL", "TOKEN", "TOKEN_FILE", "CA", "PROJECT", "CONTEXT"] {
            script.env_remove(format!("SUPERCLOUD_{name}"));
        }
        let mut child = script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (mut keys, mut screen) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (mut seen, mut piece) = (Vec::new(), [0; 4096]);
        let has = |seen: &[u8], what: &[u8]| seen.windows(what.len()).rposition(|window| window == what);
        let mut is_told = false;
        loop {
            let length = std::io::Read::read(&mut screen, &mut piece).unwrap();
            if length == 0 {
                break;
            }
            seen.extend_from_slice(&piece[..length]);
            if !is_told && has(&seen, b"Guests").is_some() {
                is_told = true;
                std::io::Write::write_all(&mut keys, key.as_bytes()).unwrap();
            }
        }
        assert_eq!(child.wait().unwrap().code(), Some(0), "{}", String::from_utf8_lossy(&seen));
        let (entered, left) = (has(&seen, ENTER).unwrap(), has(&seen, LEAVE).unwrap());
        assert!(entered < left && seen.len() - left < 32, "nothing is drawn after it was left");
        assert!(has(&seen, b"\x1b[?25h").unwrap() > has(&seen, b"\x1b[?25l").unwrap(), "the cursor is there again");
    }
}

#[test]
fn wide_tables_tell_more_and_one_thing_tells_names() {
    let home = tempfile::tempdir().unwrap();
    let far = Far::start();
    far.add_guest("web");
    let (_, narrow, _) = run(home.path(), &["guest", "list", "--url", &far.url]);
    let (_, wide, _) = run(home.path(), &["guest", "list", "-o", "wide", "--url", &far.url]);
    assert!(narrow.contains("h1") && narrow.contains("east") && !narrow.contains("gst-"), "{narrow}");
    assert!(wide.contains("gst-") && wide.contains("FOLLOWS PRICES") && wide.contains("default"), "{wide}");
    let (_, one, _) = run(home.path(), &["guest", "show", "web", "--url", &far.url]);
    let project = one.lines().find(|line| line.starts_with("project ")).unwrap();
    assert!(project.contains("prj-") && project.ends_with("(default)"), "{one}");
}

#[test]
fn exit_codes_are_as_the_help_says() {
    let home = tempfile::tempdir().unwrap();
    let far = Far::start();
    let help = run(home.path(), &["--help"]).1;
    let documented: Vec<&str> =
        help.split("Exit codes:").nth(1).unwrap().lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(documented, ["0", "1", "2", "3", "4", "5", "6", "7", "130", "141"], "{help}");
    let code = |arguments: &[&str]| run(home.path(), arguments).0;
    assert_eq!(code(&["guest", "list", "--url", &far.url]), 0);
    assert_eq!(code(&["guest", "list"]), 1, "no controller");
    assert_eq!(code(&["guest", "lits"]), 2);
    assert_eq!(code(&["guest", "show", "none", "--url", &far.url]), 3);
    far.add_guest("web");
    far.fail_next_operation();
    assert_eq!(code(&["guest", "stop", "web", "--watch", "--url", &far.url]), 4);
    // 5, 6, 7: `a_fleet_is_made_once_kept_and_pruned`. 130: whoever watches is interrupted.
    far.hold_operations();
    let mut child = supercloud(home.path(), &["guest", "freeze", "web", "--watch", "--url", &far.url])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    far.wait_until_watched();
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    // 141: nobody reads.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = supercloud(home.path(), &["explain"]).stdout(writer).status().unwrap();
    assert_eq!(status.code(), Some(141));
}

#[test]
fn completions_and_manual_pages_know_every_verb() {
    let home = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let script = run(home.path(), &["completion", shell]).1;
        for word in ["apply", "top", "context", "prune", "token-stdin", "wide"] {
            assert!(script.contains(word), "{word} for {shell}");
        }
    }
    assert_eq!(run(home.path(), &["man", "man"]).0, 0);
    for page in ["apply", "top", "context-add", "context-use"] {
        assert!(home.path().join(format!("man/supercloud-{page}.1")).exists(), "{page}");
    }
    let page = std::fs::read_to_string(home.path().join("man/supercloud.1")).unwrap();
    assert!(page.contains("Exit codes"), "{page}");
}
