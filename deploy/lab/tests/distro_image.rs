//! A whole image as distributions ship it, brought by a user: imported, configured by cloud-init, moved live.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use supercloud_lab::command::{Run, pause};
use supercloud_lab::fleet::{Console, Fleet, FleetSpec, programs};
use supercloud_lab::lab::{chain, program_dir};
use supercloud_lab::{LabSpec, image, require};

/// A Debian boots without hardware virtualization on a busy machine.
const BOOT_BUDGET: Duration = Duration::from_secs(600);
const MOVE_BUDGET: Duration = Duration::from_secs(300);
const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ0Zp2lOv2mV1mUuJ0Zp2lOv2mV1mUuJ0Zp2lOv2mV1m somebody@somewhere";

/// What the guest says every second, from a service that cloud-init starts: which boot it is, how long it is up, and the key that
/// it has for its user.
fn user_data() -> String {
    format!(
        r#"#cloud-config
hostname: brought
users:
  - name: somebody
    ssh_authorized_keys: ["{KEY}"]
write_files:
  - path: /root/say
    permissions: "0755"
    content: |
      #!/bin/sh
      while sleep 1; do
        key=$(cut -d' ' -f3 /home/somebody/.ssh/authorized_keys)
        echo "@alive $(cat /proc/sys/kernel/random/boot_id) $(cut -d. -f1 /proc/uptime) $(hostname) $key" > /dev/ttyS0
      done
runcmd:
  - [systemd-run, --unit=say, /root/say]
"#
    )
}

/// A line of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Alive {
    host: String,
    boot_id: String,
    uptime_s: u64,
    hostname: String,
    key: String,
}

fn parse(line: &str) -> Option<Alive> {
    let (host, said) = line.split_once(": ")?;
    let words: Vec<&str> = said.split_once("@alive ")?.1.split(' ').collect();
    let [boot_id, uptime_s, hostname, key] = words[..] else { return None };
    let [host, boot_id, hostname, key] = [host, boot_id, hostname, key].map(str::to_owned);
    Some(Alive { host, boot_id, uptime_s: uptime_s.parse().ok()?, hostname, key })
}

struct Listener {
    console: Console,
    transcript: std::path::PathBuf,
}

impl Listener {
    fn text(&mut self) -> String {
        self.console.poll();
        String::from_utf8_lossy(&std::fs::read(&self.transcript).unwrap()).into_owned()
    }

    /// Waits for a line that is looked for; everything said until then.
    fn await_line(&mut self, budget: Duration, is_it: impl Fn(&Alive) -> bool) -> Vec<Alive> {
        let end = Instant::now() + budget;
        loop {
            let text = self.text();
            let said: Vec<Alive> = text.lines().filter_map(parse).collect();
            if said.iter().any(&is_it) {
                return said;
            }
            let last: Vec<&str> = text.lines().rev().take(20).collect();
            assert!(Instant::now() < end, "the console ends (last first) with\n{}", last.join("\n"));
            pause(Duration::from_millis(500));
        }
    }
}

/// The operator's own command.
fn supercloud(fleet: &Fleet, args: &[&str]) {
    let output = Command::new(program_dir().join("supercloud"))
        .env("SUPERCLOUD_URL", fleet.url())
        .env("SUPERCLOUD_CA", fleet.ca_file().unwrap())
        .env("SUPERCLOUD_TOKEN_FILE", fleet.operator_token_file())
        .args(args)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{args:?}: {said}\n{}", String::from_utf8_lossy(&output.stderr));
}

/// A qcow2 of the distribution's disk.
fn qcow2(from: &Path, to: &Path) {
    Run::line("qemu-img convert -f raw -O qcow2").args([from, to]).budget(BOOT_BUDGET).ok().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_debian_is_imported_configured_and_moved_live() {
    // SAFETY: plain system call.
    if unsafe { libc::geteuid() } != 0 {
        require::skip("mmdebstrap and network namespaces need root");
        return;
    }
    let began = Instant::now();
    let say = |what: &str| println!("[{:>4} s] {what}", began.elapsed().as_secs());
    tokio::task::block_in_place(programs::build).unwrap_or_else(|error| panic!("{}", chain(&error)));
    let image = tokio::task::block_in_place(image::distro::ensure).unwrap_or_else(|error| panic!("{}", chain(&error)));
    let folder = tempfile::tempdir().unwrap();
    let (disk, data) = (folder.path().join("debian.qcow2"), folder.path().join("user-data.yaml"));
    tokio::task::block_in_place(|| qcow2(&image.disk, &disk));
    std::fs::write(&data, user_data()).unwrap();
    say("the image is made");

    let fleet = Fleet::up(FleetSpec::new(LabSpec::plain(&format!("dst-{}", std::process::id()), 2))).await.unwrap();
    tokio::task::block_in_place(|| supercloud(&fleet, &["image", "import", disk.to_str().unwrap()]));
    say("imported");
    fleet.create_network("lan", "10.20.0.0/24").await.unwrap();
    let create = ["guest", "create", "brought", "--image", "debian", "--network", "lan", "--memory", "512"];
    let create = [&create[..], &["--place", "h1", "--watch", "--cloud-init", data.to_str().unwrap()]].concat();
    tokio::task::block_in_place(|| supercloud(&fleet, &create));
    let guest = fleet.guest("brought").await.unwrap();
    let transcript = folder.path().join("console");
    let console = fleet.console(guest.id).unwrap().with_transcript(&transcript).unwrap();
    let mut listener = Listener { console, transcript };
    let key = KEY.split(' ').nth(2).unwrap();
    let is_configured = |alive: &Alive| alive.hostname == "brought" && alive.key == key;
    let first = tokio::task::block_in_place(|| listener.await_line(BOOT_BUDGET, is_configured));
    say("it has booted from its disk, and cloud-init has done what it was told");

    tokio::task::block_in_place(|| supercloud(&fleet, &["guest", "migrate", "brought", "--to", "h2", "--watch"]));
    say("moved");
    let last = first.last().unwrap().clone();
    // A line that was cut by the move may be wrong in any word.
    let goes_on = |alive: &Alive| alive.host == "h2" && is_configured(alive) && alive.uptime_s > last.uptime_s + 3;
    let all = tokio::task::block_in_place(|| listener.await_line(MOVE_BUDGET, goes_on));
    let whole = all.iter().filter(|alive| is_configured(alive));
    let boots: BTreeSet<&str> = whole.clone().map(|alive| alive.boot_id.as_str()).collect();
    assert_eq!(boots.len(), 1, "it was booted again: {boots:?}");
    let uptimes: Vec<u64> = whole.map(|alive| alive.uptime_s).collect();
    assert!(uptimes.is_sorted(), "its clock went back: {uptimes:?}");
    let guest = fleet.guest("brought").await.unwrap();
    assert_eq!((guest.host_name.map(|name| name.to_string()).as_deref(), guest.starts), (Some("h2"), 1));
    fleet.down().await.unwrap();
    say("done");
}
