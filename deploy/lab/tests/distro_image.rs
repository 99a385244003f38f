//! The whole-distribution image boots by its own GRUB and takes its user's data by cloud-init.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use supercloud_lab::command::wait_for;
use supercloud_lab::{image, netns};

/// Without hardware virtualization on a busy machine.
const LONG: Duration = Duration::from_secs(400);

const USER_DATA: &str = "#cloud-config\nruncmd:\n  - [sh, -c, 'echo told-by-cloud-init to $(hostname) > /dev/ttyS0']\n";

/// A namespace without a route out, gone with the test.
struct Namespace(String);

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = netns::delete(&self.0) {
            eprintln!("{error}");
        }
    }
}

struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// cloud-init's NoCloud files over HTTP. The thread ends with the process.
fn serve_seed(listener: TcpListener) {
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = String::new();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            reader.read_line(&mut request).unwrap();
            while reader.read_line(&mut String::new()).unwrap_or(0) > 2 {}
            let body = match request.split(' ').nth(1) {
                Some("/meta-data") => "instance-id: i-1\nlocal-hostname: by-metadata\n",
                Some("/user-data") => USER_DATA,
                _ => "",
            };
            // One that hangs up asks again.
            let _ = write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        }
    });
}

#[test]
fn a_whole_debian_boots_from_its_disk_and_is_configured() {
    // SAFETY: plain system call.
    if unsafe { libc::geteuid() } != 0 {
        supercloud_lab::require::skip("mmdebstrap and network namespaces need root");
        return;
    }
    let image = image::distro::ensure().unwrap_or_else(|error| panic!("{}", supercloud_lab::lab::chain(&error)));
    let namespace = Namespace(format!("scl-image-{}", std::process::id()));
    netns::add(&namespace.0).unwrap();
    let listener = netns::inside(&namespace.0, || TcpListener::bind("127.0.0.1:0")).unwrap().unwrap();
    let port = listener.local_addr().unwrap().port();
    serve_seed(listener);

    let folder = tempfile::tempdir().unwrap();
    let (disk, console) = (folder.path().join("disk.raw"), folder.path().join("console"));
    Command::new("cp").arg("--sparse=always").args([&image.disk, &disk]).status().unwrap();
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-accel", "tcg", "-M", "pc", "-m", "512", "-display", "none", "-monitor", "none"])
        .args(["-nic", "user,model=virtio-net-pci", "-device", "virtio-rng-pci"])
        .args(["-smbios", &format!("type=1,serial=ds=nocloud-net;s=http://10.0.2.2:{port}/")])
        .arg("-drive")
        .arg(format!("file={},if=virtio,format=raw,cache=unsafe", disk.display()))
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .stdin(Stdio::null());
    let mut machine = Machine(netns::inside(&namespace.0, || command.spawn()).unwrap().unwrap());

    let text = || String::from_utf8_lossy(&std::fs::read(&console).unwrap_or_default()).into_owned();
    let told = wait_for(LONG, || {
        assert!(matches!(machine.0.try_wait(), Ok(None)), "QEMU has ended");
        text().contains("told-by-cloud-init to by-metadata").then_some(())
    });
    assert!(told.is_some(), "the console ends with\n{}", text().lines().rev().take(20).collect::<Vec<_>>().join("\n"));
}
