//! A stock Debian kernel in our own VMM, in hosts that are VMs themselves, whatever this machine is: it boots, moves from process
//! to process and from host to host, is frozen and thawed, and loses nothing.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{path::Path, time::Duration};

use serde_json::Value;
use supercloud_lab::{
    host_vm::{self, Cable, Hardware, HostPlan, HostVm},
    lab::chain,
};

/// Everything is 20 to 80 times slower in there, on a machine that others may use.
const LONG: Duration = Duration::from_secs(300);

fn host_said<'a>(line: &'a str, what: &str) -> Option<&'a str> {
    line.strip_prefix("@host ")?.strip_prefix(what)
}

/// What a witness told of the guest's stream.
fn witnessed(line: &str) -> Option<Value> {
    let object: Value = serde_json::from_str(line.strip_prefix("@sc ")?).ok()?;
    (object["role"] == "client" && object["bytes"].is_u64()).then_some(object)
}

fn boot(folder: &Path, plan: &HostPlan<'_>) -> HostVm {
    HostVm::boot(folder, plan).unwrap_or_else(|error| panic!("{}", chain(&error)))
}

/// The number of lines up to the nth that says this.
fn await_nth(host: &mut HostVm, what: &str, nth: usize) -> usize {
    let mut at = 0;
    for _ in 0..nth {
        host.await_line(at, LONG, |line| host_said(line, what).map(drop)).unwrap();
        at += 1 + host.lines()[at..].iter().position(|line| host_said(line, what).is_some()).unwrap();
    }
    at
}

/// After so many lines the witness' one stream still stands and brings more, and no byte of it was ever wrong.
fn stream_goes_on(host: &mut HostVm, after: usize) {
    let bytes = |line: &Value| line["bytes"].as_u64().unwrap();
    let before = host.lines()[..after].iter().rev().find_map(|line| witnessed(line)).map_or(0, |line| bytes(&line));
    let more = |line: &str| witnessed(line).filter(|line| bytes(line) > before);
    let now = host.await_line(after, LONG, more).unwrap();
    for (field, wanted) in [("connects", 1), ("resets", 0), ("bad", 0), ("http_failed", 0), ("mem_bad", 0)] {
        assert_eq!(now[field], wanted, "{field} in {now}");
    }
}

/// What the guest said of itself each time that it had read its whole disk: nothing of it was lost or wrong, its clocks never went
/// back, and between two times it has written on without a boot.
fn has_lost_nothing(told: &[Value]) {
    for now in told {
        for clean in ["verify_bad", "write_errors", "mem_bad", "clock_back"] {
            assert_eq!(now[clean], 0, "{clean} in {now}");
        }
        assert!(now["mem_checked"].as_u64() > Some(0), "{now}");
        // A number may be on the disk before it counts as written.
        let [acked, verified] = [&now["acked"], &now["verified"]].map(|number| number.as_u64().unwrap());
        assert!(verified > 0 && acked + 1 >= verified, "{now}");
    }
    for two in told.windows(2) {
        assert!(two[1]["acked"].as_u64() > two[0]["acked"].as_u64(), "{} and {}", two[0], two[1]);
        assert_eq!(two[1]["boot_id"], two[0]["boot_id"], "it was booted again");
    }
}

fn proofs(host: &HostVm) -> Vec<Value> {
    let lines = host.lines();
    lines.iter().filter_map(|line| serde_json::from_str(host_said(line, "proved ")?).ok()).collect()
}

/// What it took, for people.
fn tell(name: &str, host: &HostVm) {
    host.lines().iter().filter(|line| line.starts_with("@host ")).for_each(|line| println!("{name}: {line}"));
}

#[test]
fn a_guest_moves_from_process_to_process_and_is_frozen_and_thawed() {
    if let Some(why) = host_vm::missing() {
        supercloud_lab::require::skip(why);
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let disk = host_vm::guest_disk(folder.path()).unwrap_or_else(|error| panic!("{}", chain(&error)));
    let plan = HostPlan {
        name: "host",
        hardware: Hardware::Virtio,
        address: [10, 0, 0, 254],
        cable: None,
        disk: &disk,
        steps: "boot witness hear prove move wall prove move wall prove freeze:10 wall prove stay",
    };
    let mut host = boot(folder.path(), &plan);
    host.await_line(0, LONG, |line| host_said(line, "kvm").map(drop)).unwrap();
    for (what, nth) in [("did hear", 1), ("did move", 1), ("did move", 2), ("did freeze", 1)] {
        let at = await_nth(&mut host, what, nth);
        stream_goes_on(&mut host, at);
    }
    await_nth(&mut host, "did prove", 4);
    tell("host", &host);
    let told = proofs(&host);
    assert_eq!(told.len(), 4, "{told:?}");
    has_lost_nothing(&told);
    // Ten seconds of standing still show in a clock that is not put right.
    let lines = host.lines();
    let wrong: Vec<u64> = lines.iter().filter_map(|line| host_said(line, "wall ")?.parse().ok()).collect();
    assert!(wrong.len() == 3 && wrong.iter().all(|ms| *ms < 2000), "wall time is wrong by {wrong:?} ms");
}

#[test]
fn a_guest_moves_between_hosts_of_different_hardware() {
    if let Some(why) = host_vm::missing() {
        supercloud_lab::require::skip(why);
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let disk = host_vm::guest_disk(folder.path()).unwrap_or_else(|error| panic!("{}", chain(&error)));
    let socket = folder.path().join("cable");
    let plan = |name, hardware, last, is_first, steps| HostPlan {
        name,
        hardware,
        address: [10, 0, 0, last],
        cable: Some(Cable { socket: &socket, is_first }),
        disk: &disk,
        steps,
    };
    let first = plan("first", Hardware::Virtio, 254, true, "boot witness hear prove to:10.0.0.253 from prove stay");
    let second = plan("second", Hardware::Vmware, 253, false, "from prove to:10.0.0.254 idle");
    let mut first = boot(folder.path(), &first);
    let mut second = boot(folder.path(), &second);
    await_nth(&mut second, "did from", 1);
    let at = first.lines().len();
    stream_goes_on(&mut first, at);
    let at = await_nth(&mut first, "did from", 1);
    stream_goes_on(&mut first, at);
    await_nth(&mut first, "did prove", 2);
    tell("first", &first);
    tell("second", &second);
    let (here, there) = (proofs(&first), proofs(&second));
    assert_eq!((here.len(), there.len()), (2, 1), "{here:?} {there:?}");
    has_lost_nothing(&[here[0].clone(), there[0].clone(), here[1].clone()]);
}
