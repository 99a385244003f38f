//! The main job, end to end, as `supercloud-lab demo` shows it: real guests, real switches, real hypervisors, three clouds.
//!
//! Needs root and the packages of ./deploy/setup; without them each test says why it does nothing. Each run takes minutes, so there
//! are few.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Once;
use std::time::Duration;

use serde_json::Value;
use supercloud_lab::command::wait_for;
use supercloud_lab::demo::report::Report;
use supercloud_lab::fleet::programs;
use supercloud_lab::lab::chain;
use supercloud_lab::state;

const PROGRAM: &str = env!("CARGO_BIN_EXE_supercloud-lab");

fn build_programs() {
    static BUILT: Once = Once::new();
    BUILT.call_once(|| programs::build().unwrap_or_else(|error| panic!("{}", chain(&error))));
}

/// Whether a lab can be made here at all.
fn is_possible() -> bool {
    supercloud_lab::require::lab(&["libvirtd", "ovs-vswitchd", "qemu-system-x86_64"])
}

struct Demo {
    name: String,
    folder: tempfile::TempDir,
}

impl Demo {
    fn new(name: &str) -> Self {
        build_programs();
        Self { name: format!("t-{name}-{}", std::process::id()), folder: tempfile::tempdir().unwrap() }
    }

    fn json(&self) -> PathBuf {
        self.folder.path().join("result.json")
    }

    fn command(&self, options: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(["demo", "--name", &self.name, "--json"]).arg(self.json()).args(options);
        command
    }

    fn run(&self, options: &[&str]) -> Output {
        let output = self.command(options).output().unwrap();
        println!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        output
    }

    fn report(&self) -> Report {
        serde_json::from_slice(&std::fs::read(self.json()).unwrap()).unwrap()
    }

    /// That nothing of the lab is there any more.
    fn assert_gone(&self) {
        assert!(!state::default_root().join(&self.name).exists(), "the lab's folder is still there");
        let of_this_lab = |line: &String| line.contains(&self.name);
        let left: Vec<String> = supercloud_lab::process::all()
            .into_iter()
            .map(|process| process.command_line())
            .filter(of_this_lab)
            .collect();
        assert!(left.is_empty(), "still running: {left:#?}");
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        // Whatever a failed run left.
        let _ = supercloud_lab::down(&state::default_root(), &self.name);
    }
}

#[test]
fn the_demo_runs_to_its_end_and_loses_nothing() {
    if !is_possible() {
        return;
    }
    let demo = Demo::new("demo");
    let output = demo.run(&[]);
    assert!(output.status.success(), "{}", output.status);
    let report = demo.report();
    let json: Value = serde_json::from_slice(&std::fs::read(demo.json()).unwrap()).unwrap();
    let kinds: Vec<&str> = json["moves"].as_array().unwrap().iter().map(|row| row["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["live", "live", "live", "freeze", "thaw", "price", "price"]);
    let mut cloud = "aws-east".to_owned();
    for row in &report.moves {
        assert_eq!(row.from, cloud, "each move begins where the last one ended: {row:?}");
        cloud.clone_from(&row.to);
    }
    assert_eq!(
        json["verdict"],
        serde_json::json!({"tcp_resets": 0, "bytes_corrupted": 0, "writes_lost": 0, "guest_restarts": 0})
    );
    for checked in ["bytes", "writes", "ticks"] {
        assert!(json["checked"][checked].as_u64().unwrap() > 0, "{checked}");
    }
    demo.assert_gone();
}

#[test]
fn each_sabotage_is_seen_by_the_verdict() {
    if !is_possible() {
        return;
    }
    for (kind, number) in
        [("tcp", "tcp_resets"), ("bytes", "bytes_corrupted"), ("writes", "writes_lost"), ("restart", "guest_restarts")]
    {
        let demo = Demo::new(kind);
        let output = demo.run(&["--quick", "--sabotage", kind]);
        assert_eq!(output.status.code(), Some(1), "{kind}");
        let verdict = serde_json::to_value(demo.report().verdict).unwrap();
        assert!(verdict[number].as_u64().is_some_and(|found| found > 0), "{kind}: {verdict}");
        demo.assert_gone();
    }
}

#[test]
fn an_interrupted_demo_cleans_up_and_a_killed_one_does_not_hinder_the_next() {
    if !is_possible() {
        return;
    }
    let demo = Demo::new("broken");
    // Killed without a chance to clean up, while the guests are being made.
    let mut killed = start(&demo);
    read_until(&mut killed, "2/5");
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(state::default_root().join(&demo.name).exists(), "it had made a lab");
    // The next one starts all the same; interrupted, it leaves nothing.
    let mut interrupted = start(&demo);
    read_until(&mut interrupted, "2/5");
    // SAFETY: plain system call; the child has not been waited for, so that its pid is its own.
    assert_eq!(unsafe { libc::kill(i32::try_from(interrupted.id()).unwrap(), libc::SIGINT) }, 0);
    let status = wait_for(Duration::from_secs(120), || interrupted.try_wait().unwrap()).expect("it ends");
    assert_eq!(status.code(), Some(130));
    demo.assert_gone();
}

fn start(demo: &Demo) -> Child {
    demo.command(&[]).stdout(Stdio::piped()).spawn().unwrap()
}

/// Reads what it says until a line holds `text`; what comes later is read and thrown away.
fn read_until(child: &mut Child, text: &str) {
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let found = lines.by_ref().map_while(Result::ok).any(|line| line.contains(text));
    assert!(found, "it ended before it said {text:?}");
    std::thread::spawn(move || lines.for_each(drop));
}
