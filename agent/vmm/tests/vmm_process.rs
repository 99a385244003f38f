//! The process, with a small program instead of a kernel.
#![cfg(target_arch = "x86_64")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "shared with the library's own tests, which use more of it")]
#[path = "../../../blanket-drivers/tests/machine/guest.rs"]
mod guest;

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::{
        fd::{OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    process::{Child, Command, Stdio},
};

use guest::{PATIENCE, TALK, elf, file, runs_guests};
use serde_json::{Value, json};

/// The process, and the other end of its guest's console.
struct Vmm {
    child: Child,
    console: UnixStream,
    heard: String,
}

/// A descriptor that the next child inherits, under a number of its own.
fn inheritable(fd: &impl std::os::fd::AsRawFd) -> RawFd {
    // SAFETY: a plain system call; the copy has no close-on-exec flag, and stays open until the test ends.
    let copy = unsafe { libc::dup(fd.as_raw_fd()) };
    assert!(copy >= 0);
    copy
}

fn start(control: Option<&UnixListener>) -> Vmm {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
    let mut fds =
        vec![inheritable(&kvm), inheritable(&elf(TALK)), inheritable(&file(b"ramdisk")), inheritable(&theirs)];
    let mut wiring =
        json!({"kvm": fds[0], "kernel": fds[1], "initrd": fds[2], "console_out": fds[3], "console_in": fds[3]});
    if let Some(control) = control {
        fds.push(inheritable(control));
        wiring["control"] = fds[4].into();
    }
    let launch = json!({
        "spec": {
            "class": {"back_end": "kvm", "accelerator": "kvm", "machine_version": "1", "cpu_baseline": "host"},
            "vcpus": 1, "memory_bytes": 64 << 20,
            "boot": {"from": "kernel", "has_initrd": true, "cmdline": "hello "},
            "devices": {"disks": [], "nics": [], "has_balloon": false},
        },
        "wiring": wiring,
    });
    let child = Command::new(env!("CARGO_BIN_EXE_supercloud-vmm"))
        .args(["--launch", &launch.to_string()])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    for fd in fds {
        // SAFETY: the copies were made above and are nobody else's.
        drop(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) });
    }
    Vmm { child, console: ours, heard: String::new() }
}

impl Vmm {
    fn await_text(&mut self, wanted: &str) {
        while !self.heard.contains(wanted) {
            let mut bytes = [0; 256];
            let count = self.console.read(&mut bytes).unwrap();
            assert!(count > 0, "the console closed after '{}'", self.heard);
            self.heard.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
        }
        self.heard.clear();
    }

    fn type_in(&mut self, text: &str) {
        self.console.write_all(text.as_bytes()).unwrap();
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Client {
    lines: BufReader<UnixStream>,
}

impl Client {
    fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { lines: BufReader::new(stream) }
    }

    fn line(&mut self) -> Option<Value> {
        let mut line = String::new();
        (self.lines.read_line(&mut line).unwrap() > 0).then(|| serde_json::from_str(&line).unwrap())
    }

    fn ask(&mut self, id: u64, verb: &str) -> Value {
        self.say(&json!({"id": id, "do": verb}).to_string());
        let answer = self.line().unwrap();
        assert_eq!(answer["id"], id);
        answer
    }

    fn say(&mut self, line: &str) {
        self.lines.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
    }
}

#[test]
fn without_control_a_guest_runs_boots_again_and_ends_the_process() {
    if !runs_guests("without_control_a_guest_runs_boots_again_and_ends_the_process") {
        return;
    }
    let mut vmm = start(None);
    for _ in 0..3 {
        vmm.await_text("hello ramdisk");
        vmm.type_in("abc");
        vmm.await_text("abc");
        vmm.type_in("r");
    }
    vmm.await_text("hello ramdisk");
    vmm.type_in("o");
    assert_eq!(vmm.child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_client_controls_a_guest_and_another_one_finds_it_again() {
    if !runs_guests("a_client_controls_a_guest_and_another_one_finds_it_again") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let listener = UnixListener::bind(&path).unwrap();
    let mut vmm = start(Some(&listener));
    let mut client = Client::connect(&path);
    assert_eq!(client.ask(1, "status"), json!({"id": 1, "state": "paused"}));
    assert_eq!(client.ask(2, "resume")["state"], "running");
    vmm.await_text("hello ramdisk");
    assert_eq!(client.ask(3, "pause")["state"], "paused");
    vmm.type_in("x");
    assert_eq!(client.ask(4, "pause")["state"], "paused");
    assert_eq!(client.ask(5, "resume")["state"], "running");
    vmm.await_text("x");

    // A new client takes over; the old one hears that it is over.
    let mut second = Client::connect(&path);
    assert_eq!(second.ask(1, "status")["state"], "running");
    assert_eq!(client.line(), None);
    // One that talks nonsense is sent away; the guest does not notice.
    second.say("{}");
    assert!(second.line().unwrap()["error"].is_string());
    assert_eq!(second.line(), None);
    let mut long = Client::connect(&path);
    long.say(&"x".repeat(5000));
    assert!(long.line().unwrap()["error"].is_string());

    let mut third = Client::connect(&path);
    assert_eq!(third.ask(1, "status")["state"], "running");
    vmm.type_in("r");
    assert_eq!(third.line(), Some(json!({"event": "rebooted", "state": "running"})));
    vmm.await_text("hello ramdisk");
    vmm.type_in("o");
    assert_eq!(third.line(), Some(json!({"event": "powered_off", "state": "ended"})));
    let refused = third.ask(2, "resume");
    assert!(refused["error"].as_str().unwrap().contains("ended") && refused["state"] == "ended");
    assert_eq!(third.ask(3, "end")["state"], "ended");
    assert_eq!(vmm.child.wait().unwrap().code(), Some(0));
}
