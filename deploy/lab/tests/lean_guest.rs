//! The lean guest under a plain QEMU without hardware virtualization: what it says about itself is true.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use supercloud_lab::command::wait_for;
use supercloud_lab::image::lean::{self, LeanImage};

const LONG: Duration = Duration::from_secs(120);

const CLIENT: &str = "sc.address=10.0.0.2/24 sc.role=client sc.peer=10.0.0.1";
const SERVER: &str = "sc.address=10.0.0.1/24 sc.role=server";

struct Guest {
    qemu: Child,
    console: PathBuf,
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Guest {
    fn boot(image: &LeanImage, disk: &Path, role: &str, nic: &[String; 2]) -> Self {
        let console = disk.with_extension("console");
        // Nothing that an earlier guest said may be taken for this one's.
        std::fs::write(&console, "").unwrap();
        let qemu = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg", "-M", "pc", "-m", "128", "-display", "none", "-monitor", "none"])
            .arg("-kernel")
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(&image.initrd)
            .args(["-append", &format!("{} {role}", image.cmdline)])
            .args(["-netdev", &nic[0], "-device", &nic[1]])
            .args(["-drive", &format!("file={},if=virtio,format=raw,cache=none", disk.display())])
            .args(["-serial", &format!("file:{}", console.display())])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { qemu, console }
    }

    /// The last line of this role on the console.
    fn last(&self, role: &str) -> Option<Value> {
        let text = std::fs::read_to_string(&self.console).ok()?;
        // The last line may be unfinished.
        let whole = &text[..=text.rfind('\n')?];
        let mut objects = whole.lines().rev().filter_map(|line| serde_json::from_str(line.strip_prefix("@sc ")?).ok());
        objects.find(|object: &Value| object["role"] == role)
    }

    fn await_line(&mut self, role: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        let found = wait_for(LONG, || {
            assert!(matches!(self.qemu.try_wait(), Ok(None)), "QEMU has ended");
            self.last(role).filter(&is_it)
        });
        found.unwrap_or_else(|| {
            let text = std::fs::read_to_string(&self.console).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            panic!("the console ends with\n{}", lines[lines.len().saturating_sub(10)..].join("\n"))
        })
    }
}

fn number(object: &Value, key: &str) -> u64 {
    object[key].as_u64().unwrap_or_else(|| panic!("{key} in {object}"))
}

fn image() -> Option<LeanImage> {
    if Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_err() {
        supercloud_lab::require::skip("qemu-system-x86_64 is not installed");
        return None;
    }
    Some(lean::ensure().unwrap_or_else(|error| panic!("{}", supercloud_lab::lab::chain(&error))))
}

fn copy_of(image: &LeanImage, path: &Path) -> PathBuf {
    std::fs::copy(&image.disk, path).unwrap();
    path.to_owned()
}

/// A cable between two machines: datagrams over the loopback, which a machine's death does not cut.
fn cable() -> [[String; 2]; 2] {
    let ports = [0, 1].map(|_| std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port());
    [0, 1].map(|own: usize| {
        let end = |which: &str, port: u16| format!("{which}.type=inet,{which}.host=127.0.0.1,{which}.port={port}");
        let cable = format!("dgram,id=cable,{},{}", end("local", ports[own]), end("remote", ports[1 - own]));
        [cable, format!("virtio-net-pci,netdev=cable,mac=02:00:00:00:00:0{own}")]
    })
}

#[test]
fn a_lean_guest_counts_what_it_wrote_and_what_it_received() {
    let Some(image) = image() else { return };
    let folder = tempfile::tempdir().unwrap();
    let nics = cable();
    let server_disk = copy_of(&image, &folder.path().join("server.raw"));

    let mut server = Guest::boot(&image, &server_disk, SERVER, &nics[0]);
    let up = server.await_line("server", |line| number(line, "verified") >= 20);
    for clean in ["verify_bad", "write_errors", "mem_bad", "clock_back"] {
        assert_eq!(number(&up, clean), 0, "{clean}");
    }
    assert!(number(&up, "mem_checked") > 0);

    let client_disk = copy_of(&image, &folder.path().join("client.raw"));
    let mut client = Guest::boot(&image, &client_disk, CLIENT, &nics[1]);
    let streaming = client.await_line("client", |line| number(line, "bytes") > 500_000);
    assert_eq!((number(&streaming, "bad"), number(&streaming, "resets"), number(&streaming, "connects")), (0, 0, 1));
    assert!(number(&streaming, "ticks") > 0 && streaming["connected"] == true);

    // A server that stops for a while is a pause, not a reset.
    let pid = libc::pid_t::try_from(server.qemu.id()).unwrap();
    // SAFETY: plain system calls on a child of ours.
    unsafe { libc::kill(pid, libc::SIGSTOP) };
    let paused = client.await_line("client", |line| number(line, "gap_ms") > 1000);
    // SAFETY: as above.
    unsafe { libc::kill(pid, libc::SIGCONT) };
    let more = number(&paused, "bytes") + 200_000;
    let resumed = client.await_line("client", |line| number(line, "bytes") > more);
    assert_eq!((number(&resumed, "bad"), number(&resumed, "resets")), (0, 0));

    // A server that dies and starts anew is a reset, and what it had acknowledged is on its disk.
    let last = server.last("server").unwrap();
    drop(server);
    let mut again = Guest::boot(&image, &server_disk, SERVER, &nics[0]);
    let first = again.await_line("server", |line| number(line, "verified") > 0);
    assert!(number(&first, "verified") >= number(&last, "acked"), "{first} after {last}");
    assert_eq!(number(&first, "verify_bad"), 0);
    assert_ne!(first["boot_id"], last["boot_id"]);
    let reset = client.await_line("client", |line| number(line, "connects") == 2);
    assert_eq!(number(&reset, "resets"), 1);
    assert!(number(&reset, "http_ok") > 0);
}

#[test]
fn faults_made_on_purpose_are_seen() {
    let Some(image) = image() else { return };
    for (kind, field) in [("tcp", "resets"), ("bytes", "bad"), ("writes", "verify_bad"), ("restart", "t_ms")] {
        let folder = tempfile::tempdir().unwrap();
        let nics = cable();
        let disk = copy_of(&image, &folder.path().join("server.raw"));
        let role = format!("{SERVER} sc.sabotage={kind} sc.after=4");
        let mut server = Guest::boot(&image, &disk, &role, &nics[0]);
        if matches!(kind, "tcp" | "bytes") {
            let disk = copy_of(&image, &folder.path().join("client.raw"));
            let mut client = Guest::boot(&image, &disk, CLIENT, &nics[1]);
            client.await_line("client", |line| number(line, field) > 0);
        } else if kind == "restart" {
            let before = server.await_line("server", |line| number(line, field) > 0);
            server.await_line("server", |line| line["boot_id"] != before["boot_id"]);
        } else {
            server.await_line("server", |line| number(line, field) > 0);
        }
        server.await_line("server", |line| number(line, "sabotaged") == 1);
    }
}
