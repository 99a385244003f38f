//! The main job, end to end, as `supercloud-lab demo` shows it: real guests, real switches, real hypervisors, three clouds.
//!
//! Needs root and the packages of ./deploy/setup; without them each test says why it does nothing. Each run takes minutes, so there
//! are few.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::Value;
use supercloud_lab::command::wait_for;

mod told;

use told::Demo;

/// Whether a lab can be made here at all.
fn is_possible() -> bool {
    supercloud_lab::require::lab(&["libvirtd", "ovs-vswitchd", "qemu-system-x86_64"])
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
    assert!(supercloud_lab::state::default_root().join(&demo.name).exists(), "it had made a lab");
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
