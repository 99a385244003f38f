//! The process, with a small program instead of a kernel.
#![cfg(target_arch = "x86_64")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "shared with the library's own tests, which use more of it")]
#[path = "../../../blanket-drivers/tests/machine/guest.rs"]
mod guest;

#[path = "support/boot_disk.rs"]
mod boot_disk;

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
    start_with(control, None, None, false)
}

fn start_with(
    control: Option<&UnixListener>,
    stream: Option<&UnixStream>,
    streams: Option<&UnixListener>,
    arrives: bool,
) -> Vmm {
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
    if let Some(stream) = stream {
        fds.push(inheritable(stream));
        wiring["stream"] = fds[fds.len() - 1].into();
    }
    if let Some(streams) = streams {
        fds.push(inheritable(streams));
        wiring["streams"] = fds[fds.len() - 1].into();
    }
    let launch = json!({
        "spec": {
            "class": {"back_end": "kvm", "accelerator": "kvm", "machine_version": "1", "cpu_baseline": "host"},
            "vcpus": 1, "memory_bytes": 64 << 20,
            "boot": {"from": "kernel", "has_initrd": true, "cmdline": "hello "},
            "devices": {"disks": [], "nics": [], "has_balloon": false},
        },
        "wiring": wiring,
        "arrives": arrives,
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
    assert_eq!(
        client.ask(1, "status"),
        json!({
            "id": 1, "state": "paused", "is_mirrored": false, "takes_leases": true, "takes_holds": true, "missing_bytes": 0, "stream_version": 2,
        })
    );
    assert_eq!(client.ask(2, "resume")["state"], "running");
    vmm.await_text("hello ramdisk");
    // Each of its threads, the guest's processors among them, is under the filter of system calls.
    for task in std::fs::read_dir(format!("/proc/{}/task", vmm.child.id())).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        assert!(status.contains("Seccomp:\t2\n") && status.contains("NoNewPrivs:\t1\n"), "{status}");
    }
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

#[test]
fn a_guest_boots_what_its_disk_says_then() {
    if !runs_guests("a_guest_boots_what_its_disk_says_then") {
        return;
    }
    let (Some(first), Some(second)) = (boot_disk::disk("one."), boot_disk::disk("two.")) else {
        println!("SKIPPED: no mke2fs here");
        return;
    };
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&first).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
    let fds = [inheritable(&kvm), inheritable(&file), inheritable(&theirs)];
    let launch = json!({
        "spec": {
            "class": {"back_end": "kvm", "accelerator": "kvm", "machine_version": "1", "cpu_baseline": "host"},
            "vcpus": 1, "memory_bytes": 64 << 20, "boot": {"from": "disk"},
            "devices": {"disks": [{"name": "root"}], "nics": [], "has_balloon": false},
        },
        "wiring": {"kvm": fds[0], "disks": {"root": fds[1]}, "console_out": fds[2], "console_in": fds[2]},
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
    let mut vmm = Vmm { child, console: ours, heard: String::new() };
    vmm.await_text("from diskone.");
    // Its kernel, or what comes with it, was upgraded meanwhile.
    std::os::unix::fs::FileExt::write_all_at(&file, &second, 0).unwrap();
    vmm.type_in("r");
    vmm.await_text("from disktwo.");
    vmm.type_in("o");
    assert_eq!(vmm.child.wait().unwrap().code(), Some(0));
}

/// The answer to a request, and then the first event that is not of its progress.
fn outcome_of(client: &mut Client, request: &Value) -> Value {
    client.say(&request.to_string());
    let answer = client.line().unwrap();
    assert_eq!((&answer["id"], &answer["error"]), (&request["id"], &Value::Null), "{answer}");
    loop {
        let line = client.line().unwrap();
        if line["event"] != "progress" {
            return line;
        }
    }
}

#[test]
fn a_guest_goes_from_process_to_process_and_back() {
    if !runs_guests("a_guest_goes_from_process_to_process_and_back") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let bind = |name: &str| (folder.path().join(name), UnixListener::bind(folder.path().join(name)).unwrap());
    let (here_path, here_control) = bind("here");
    let (here_stream, there_stream) = UnixStream::pair().unwrap();
    let mut here = start_with(Some(&here_control), Some(&here_stream), None, false);
    let mut client = Client::connect(&here_path);
    assert_eq!(client.ask(1, "resume")["state"], "running");
    here.await_text("hello ramdisk");
    here.type_in("abc");
    here.await_text("abc");

    // Over there it waits, and here it stands still but is kept.
    let (there_path, there_control) = bind("there");
    let mut there = start_with(Some(&there_control), Some(&there_stream), None, true);
    let sent = outcome_of(&mut client, &json!({"id": 2, "do": "send", "max_downtime_ms": 500}));
    assert_eq!((&sent["event"], &sent["state"]), (&json!("sent"), &json!("sent")), "{sent}");
    assert!(sent["progress"]["sent_bytes"].as_u64() > Some(1000) && sent["progress"]["paused_ms"].is_u64(), "{sent}");
    // Asked early, it runs as soon as it has come; that it came may be told before.
    let mut far = Client::connect(&there_path);
    far.say(&json!({"id": 2, "do": "resume"}).to_string());
    let lines: Vec<_> = std::iter::from_fn(|| far.line()).take_while(|line| line["event"] == "arrived").collect();
    assert!(lines.len() <= 1, "{lines:?}");
    assert_eq!(far.ask(1, "status")["state"], "running");
    there.type_in("def");
    there.await_text("def");
    assert_eq!(client.ask(3, "end")["state"], "ended");
    assert_eq!(here.child.wait().unwrap().code(), Some(0));
    // What it boots again from is there, too.
    there.type_in("r");
    assert_eq!(far.line(), Some(json!({"event": "rebooted", "state": "running"})));
    there.await_text("hello ramdisk");

    // Nobody listens at the other end any more: it runs on.
    drop(here_stream);
    let failed = outcome_of(&mut far, &json!({"id": 4, "do": "send"}));
    assert_eq!((&failed["event"], &failed["state"]), (&json!("not_sent"), &json!("running")), "{failed}");
    assert!(failed["error"].as_str().unwrap().contains("stream"), "{failed}");
    there.type_in("ghi");
    there.await_text("ghi");
    there.type_in("o");
    assert_eq!(far.line(), Some(json!({"event": "powered_off", "state": "ended"})));
}

#[test]
fn sending_can_be_given_up_and_begun_again_on_the_same_stream() {
    if !runs_guests("sending_can_be_given_up_and_begun_again_on_the_same_stream") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let control = UnixListener::bind(&path).unwrap();
    let (stream, mut ours) = UnixStream::pair().unwrap();
    let mut vmm = start_with(Some(&control), Some(&stream), None, false);
    let mut client = Client::connect(&path);
    for (request, word) in [
        (json!({"id": 1, "do": "cancel"}), "not being sent"),
        (json!({"id": 1, "do": "pause", "max_downtime_ms": 1}), "limits"),
    ] {
        client.say(&request.to_string());
        let answer = client.line().unwrap();
        assert!(answer["error"].as_str().unwrap().contains(word), "{answer}");
    }
    client.ask(1, "resume");
    vmm.await_text("hello ramdisk");
    // A slow stream, and a guest that is told of an end before it has gone over.
    client.say(&json!({"id": 2, "do": "send", "max_bytes_per_s": 20_000}).to_string());
    assert_eq!(client.line().unwrap()["state"], "sending");
    assert!(client.ask(3, "resume")["error"].as_str().unwrap().contains("cancel"));
    client.say(&json!({"id": 4, "do": "cancel"}).to_string());
    let mut lines = Vec::new();
    while lines.last().is_none_or(|line: &Value| line["event"] != "not_sent") {
        lines.push(client.line().unwrap());
    }
    assert_eq!(lines.last().unwrap()["state"], "running");
    vmm.type_in("on and on".replace('o', "0").as_str());
    vmm.await_text("0n and 0n");
    // The one who reads finds the end of the one and the beginning of the next.
    let reads = std::thread::spawn(move || {
        let mut kinds = Vec::new();
        while kinds.last() != Some(&5) {
            kinds.push(supercloud_api::frame::read_frame_blocking(&mut ours).unwrap().kind);
        }
        kinds
    });
    let sent = outcome_of(&mut client, &json!({"id": 5, "do": "send"}));
    assert_eq!(sent["event"], "sent", "{sent}");
    let kinds = reads.join().unwrap();
    let given_up = kinds.iter().position(|kind| *kind == 6).unwrap();
    assert_eq!((kinds[0], kinds[given_up + 1], kinds[kinds.len() - 2]), (1, 1, 4), "{kinds:?}");
    // It was not wanted after all.
    assert_eq!(client.ask(6, "resume")["state"], "running");
    vmm.type_in("still here".replace(['t', 'r'], "_").as_str());
    vmm.await_text("s_ill he_e");
}

/// The next line that tells of this.
fn event(client: &mut Client, name: &str) -> Value {
    loop {
        let line = client.line().unwrap();
        if line["event"] == name {
            return line;
        }
    }
}

#[test]
fn a_stream_that_takes_nothing_is_left_at_once_and_another_one_serves() {
    if !runs_guests("a_stream_that_takes_nothing_is_left_at_once_and_another_one_serves") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (path, streams_path) = (folder.path().join("control"), folder.path().join("streams"));
    let control = UnixListener::bind(&path).unwrap();
    let streams = UnixListener::bind(&streams_path).unwrap();
    let (stream, silent) = UnixStream::pair().unwrap();
    // It is full before the guest is.
    stream.set_nonblocking(true).unwrap();
    while (&stream).write(&[0; 4096]).is_ok() {}
    stream.set_nonblocking(false).unwrap();
    let mut vmm = start_with(Some(&control), Some(&stream), Some(&streams), false);
    let mut client = Client::connect(&path);
    client.ask(1, "resume");
    vmm.await_text("hello ramdisk");

    // A pause does not wait for a stream that will never take anything, and the guest then stands still.
    assert_eq!(client.ask(2, "send")["state"], "sending");
    client.say(&json!({"id": 3, "do": "pause"}).to_string());
    let failed = event(&mut client, "not_sent");
    assert!(failed["error"].as_str().unwrap().contains("did not take"), "{failed}");
    assert_eq!(client.line().unwrap(), json!({"id": 3, "state": "paused"}));
    let refused = client.ask(4, "send");
    assert!(refused["error"].as_str().unwrap().contains("no stream"), "{refused}");
    assert_eq!(client.ask(5, "resume")["state"], "running");
    drop(silent);

    // An agent that was started anew has none of the old descriptors.
    let mut second = Client::connect(&path);
    assert_eq!(second.ask(1, "status")["state"], "running");
    let mut ours = UnixStream::connect(&streams_path).unwrap();
    assert_eq!(event(&mut second, "stream"), json!({"event": "stream", "state": "running"}));
    let reads = std::thread::spawn(move || {
        let mut kinds = Vec::new();
        while kinds.last() != Some(&5) {
            kinds.push(supercloud_api::frame::read_frame_blocking(&mut ours).unwrap().kind);
        }
    });
    let sent = outcome_of(&mut second, &json!({"id": 1, "do": "send"}));
    assert_eq!((&sent["event"], &sent["state"]), (&json!("sent"), &json!("sent")), "{sent}");
    reads.join().unwrap();
    assert_eq!(second.ask(2, "resume")["state"], "running");
    vmm.type_in("xyz");
    vmm.await_text("xyz");
}

#[test]
fn what_does_not_arrive_can_arrive_by_the_next_stream() {
    if !runs_guests("what_does_not_arrive_can_arrive_by_the_next_stream") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let bind = |name: &str| (folder.path().join(name), UnixListener::bind(folder.path().join(name)).unwrap());
    let (here_path, here_control) = bind("here");
    let (here_streams_path, here_streams) = bind("here-streams");
    let mut here = start_with(Some(&here_control), None, Some(&here_streams), false);
    let mut client = Client::connect(&here_path);
    client.ask(1, "resume");
    here.await_text("hello ramdisk");

    let (there_path, there_control) = bind("there");
    let (there_streams_path, there_streams) = bind("there-streams");
    let mut there = start_with(Some(&there_control), None, Some(&there_streams), true);
    let mut far = Client::connect(&there_path);
    assert_eq!(far.ask(1, "status")["state"], "arriving");
    assert!(far.ask(2, "pause")["error"].is_string());
    // Nonsense, a stream that ends, and one that nothing comes over until it is not wanted any more.
    for (bytes, is_cancelled) in [(&b"nonsense that is no frame"[..], false), (&[1, 0][..], false), (&[][..], true)] {
        let mut stream = UnixStream::connect(&there_streams_path).unwrap();
        event(&mut far, "stream");
        stream.write_all(bytes).unwrap();
        if is_cancelled {
            assert_eq!(far.ask(3, "cancel")["state"], "arriving");
        } else {
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let failed = event(&mut far, "not_arrived");
        assert_eq!(failed["state"], "arriving", "{failed}");
        assert!(failed["error"].is_string(), "{failed}");
    }
    let mut from = UnixStream::connect(&here_streams_path).unwrap();
    event(&mut client, "stream");
    let mut to = UnixStream::connect(&there_streams_path).unwrap();
    event(&mut far, "stream");
    let relay = std::thread::spawn(move || std::io::copy(&mut from, &mut to));
    let sent = outcome_of(&mut client, &json!({"id": 2, "do": "send"}));
    assert_eq!(sent["event"], "sent", "{sent}");
    assert_eq!(event(&mut far, "arrived")["state"], "paused");
    assert_eq!(client.ask(3, "end")["state"], "ended");
    relay.join().unwrap().unwrap();
    assert_eq!(far.ask(4, "resume")["state"], "running");
    there.type_in("xyz");
    there.await_text("xyz");
}

#[test]
fn a_guest_stands_still_by_itself_when_its_lease_runs_out_whoever_is_there_and_goes_on_when_it_is_renewed() {
    if !runs_guests(
        "a_guest_stands_still_by_itself_when_its_lease_runs_out_whoever_is_there_and_goes_on_when_it_is_renewed",
    ) {
        return;
    }
    use supercloud_blanket::vmm::lease::boot_ms;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let listener = UnixListener::bind(&path).unwrap();
    let mut vmm = start(Some(&listener));
    let mut client = Client::connect(&path);
    let lease = |client: &mut Client, id: u64, until_ms: u64| {
        client.say(&json!({"id": id, "do": "lease", "lease_until_ms": until_ms}).to_string());
        let answer = client.line().unwrap();
        assert_eq!((&answer["id"], &answer["error"]), (&json!(id), &Value::Null), "{answer}");
        answer["lease_left_ms"].as_u64()
    };
    assert!(lease(&mut client, 1, boot_ms() + 60_000) > Some(1_000));
    assert_eq!(client.ask(2, "resume")["state"], "running");
    vmm.await_text("hello ramdisk");
    vmm.type_in("a");
    vmm.await_text("a");
    // One that nobody renews: its agent is dead.
    assert_eq!(lease(&mut client, 3, 0), None);
    let began = boot_ms();
    assert!(lease(&mut client, 4, began + 1_500).is_some());
    drop(client);
    vmm.console.set_read_timeout(Some(std::time::Duration::from_millis(100))).unwrap();
    // It answers what is typed for as long as it runs.
    let mut last = began;
    loop {
        vmm.type_in("b");
        match vmm.console.read(&mut [0; 64]) {
            Ok(_) => last = boot_ms(),
            Err(_) if boot_ms() > began + 4_000 => break,
            Err(_) => {}
        }
    }
    assert!(last < began + 1_500 + 1_500, "it ran for {} ms", last - began);
    // Another client finds it as it is; what is asked of it meanwhile does not let it go on.
    let mut second = Client::connect(&path);
    let status = second.ask(1, "status");
    assert_eq!((&status["state"], &status["lease_left_ms"]), (&json!("running"), &json!(0)), "{status}");
    assert_eq!(second.ask(2, "pause")["state"], "paused");
    assert_eq!(second.ask(3, "resume")["state"], "running");
    assert!(vmm.console.read(&mut [0; 64]).is_err(), "it runs without a lease");
    // Nor one that was on its way when it ended.
    assert_eq!(lease(&mut second, 4, boot_ms() - 1), Some(0));
    assert!(vmm.console.read(&mut [0; 64]).is_err(), "it runs without a lease");
    vmm.console.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(lease(&mut second, 5, boot_ms() + 60_000) > Some(1_000));
    vmm.await_text("b");
    // It boots again under the same lease.
    vmm.type_in("r");
    loop {
        if second.line().unwrap()["event"] == "rebooted" {
            break;
        }
    }
    vmm.await_text("hello ramdisk");
    assert!(second.ask(6, "status")["lease_left_ms"].as_u64() > Some(1_000));
    assert_eq!(lease(&mut second, 7, 0), None);
    second.say(&json!({"id": 8, "do": "lease", "lease_until_ms": boot_ms() + 7_200_000}).to_string());
    assert!(second.line().unwrap()["error"].is_string(), "no lease is that long");
    second.say(&json!({"id": 9, "do": "status", "lease_until_ms": 1}).to_string());
    assert!(second.line().unwrap()["error"].is_string());
    vmm.type_in("o");
    assert_eq!(second.line().unwrap()["event"], "powered_off");
}
