//! The peer of the migration benchmark: the same guest on the same two libvirtd, moved by `virsh migrate --p2p` without us.
//!
//! It has it easier than ours in three ways, which the table says: its disk is shared (one NBD server that both
//! hosts reach, so that no block moves), its stream is not encrypted, and nobody decides who owns the guest.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use supercloud_api::CompatClass;

use crate::fleet::{Console, Fleet, Said, blocking};
use crate::host_init::ProcessSpec;
use crate::image::lean::LeanImage;
use crate::lab::Lab;
use crate::netns;
use crate::spec::CONTROLLER;

/// The domain's name.
const NAME: &str = "bare";
const TAP: &str = "bare0";
const MOVE_BUDGET: Duration = Duration::from_secs(120);
const SHORT: Duration = Duration::from_secs(30);

/// What one move took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BareMove {
    /// Wall time of the call.
    pub total_ms: f64,
    /// How long no vCPU ran, as QEMU says.
    pub downtime_ms: f64,
    /// Memory that travelled, as QEMU says.
    pub memory_bytes: f64,
}

/// The bare guest.
#[derive(Debug)]
pub struct Bare {
    lab: Arc<Lab>,
    host: String,
    folder: PathBuf,
}

impl Bare {
    /// Starts it at a host with the same image, memory and work as ours, and waits until it works.
    ///
    /// # Errors
    /// When a part cannot be started, or the guest does not come up.
    pub async fn start(
        fleet: &Fleet,
        host: &str,
        image: &LeanImage,
        class: &CompatClass,
        memory_mib: u64,
        role: &str,
    ) -> anyhow::Result<Self> {
        let lab = Arc::clone(fleet.lab());
        let folder = lab.path("bare");
        let bare = Self { lab, host: host.to_owned(), folder };
        crate::state::make_dir(&bare.folder)?;
        let disk = bare.folder.join("disk.raw");
        let (from, to) = (image.disk.clone(), disk.clone());
        blocking(move || std::fs::copy(from, to)).await?.context("copying the disk")?;
        let socket = bare.folder.join("disk.sock");
        let argv =
            ["qemu-nbd", "-f", "raw", "--persistent", "--shared", "8", "--cache", "none", "--aio", "threads", "-k"];
        let mut argv: Vec<String> = argv.map(str::to_owned).to_vec();
        argv.extend([socket.display().to_string(), disk.display().to_string()]);
        let process = ProcessSpec { name: "bare-nbd".into(), argv, env: Vec::new(), log: bare.folder.join("nbd.log") };
        let held = Arc::clone(&bare.lab);
        blocking(move || held.spawn(CONTROLLER, &process)).await??;
        wait_until("the peer's disk server", SHORT, || socket.exists()).await?;

        let hosts: Vec<String> = bare.lab.spec().hosts.iter().map(|host| host.name.clone()).collect();
        for name in &hosts {
            let namespace = bare.lab.host(name)?.namespace;
            let make = move || {
                netns::ip(&namespace, &format!("tuntap add {TAP} mode tap"))?;
                netns::ip(&namespace, &format!("link set {TAP} up mtu 1450"))
            };
            blocking(make).await?.context("making the peer's tap")?;
        }
        let xml = bare.folder.join("domain.xml");
        let text = bare.xml(image, class, memory_mib, role);
        std::fs::write(&xml, text).context("writing the peer's domain")?;
        bare.virsh(&bare.host, &["create", &xml.display().to_string()], SHORT).await?;

        let log = bare.folder.join("console.log");
        let mut console = Console::new([(host.to_owned(), log)]);
        let works = |said: &Said| matches!(said, Said::Server(stats) if stats.acked > 5);
        wait_until("the peer guest's work", Duration::from_secs(180), || {
            console.poll().iter().any(|heard| works(&heard.said))
        })
        .await?;
        Ok(bare)
    }

    /// As our own back end writes it, less what only we need. It runs as root: its files lie in the lab's folder, which is closed.
    fn xml(&self, image: &LeanImage, class: &CompatClass, memory_mib: u64, role: &str) -> String {
        let kind = if class.accelerator == "kvm" { "kvm" } else { "qemu" };
        let (machine, cpu) = (&class.machine_version, &class.cpu_baseline);
        let (kernel, initrd, cmdline) = (image.kernel.display(), image.initrd.display(), &image.cmdline);
        let folder = self.folder.display();
        let uuid = uuid::Uuid::new_v4();
        format!(
            "<domain type='{kind}'>
  <name>{NAME}</name><uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu placement='static'>1</vcpu>
  <os><type arch='x86_64' machine='{machine}'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>
    <cmdline>{cmdline} {role}</cmdline></os>
  <features><acpi/><apic/></features>
  <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>{cpu}</model></cpu>
  <clock offset='utc'/>
  <devices>
    <controller type='usb' model='none'/>
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw' cache='none' discard='unmap' detect_zeroes='unmap'/>
      <source protocol='nbd'><host transport='unix' socket='{folder}/disk.sock'/></source>
      <target dev='vda' bus='virtio'/>
    </disk>
    <interface type='ethernet'>
      <mac address='52:54:00:5c:00:01'/><target dev='{TAP}' managed='no'/><model type='virtio'/>
      <mtu size='1450'/><rom enabled='no'/>
    </interface>
    <serial type='null'><log file='{folder}/console.log' append='on'/></serial>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <memballoon model='virtio'/>
  </devices>
  <seclabel type='static' model='dac' relabel='no'><label>+0:+0</label></seclabel>
</domain>
"
        )
    }

    /// The host where it is.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Moves it live to another host, over the same emulated link.
    ///
    /// # Errors
    /// When the move fails.
    pub async fn migrate(&mut self, to: &str) -> anyhow::Result<BareMove> {
        let there = self.lab.host(to)?;
        // The other host's daemon by its socket's path outside, which is the same inside every host.
        let socket = there.outside("/run/libvirt/libvirt-sock").context("the socket's path")?;
        let daemon = format!("qemu+unix:///system?socket={}", socket.display());
        let stream = format!("tcp://{}", there.address());
        let argv = ["migrate", "--live", "--p2p", NAME, "--desturi", &daemon, "--migrateuri", &stream];
        let began = Instant::now();
        self.virsh(&self.host, &argv, MOVE_BUDGET).await?;
        let total_ms = began.elapsed().as_secs_f64() * 1000.0;
        to.clone_into(&mut self.host);
        // Only the destination knows the figures of a move that is over.
        let text = self.virsh(to, &["domjobinfo", NAME, "--completed", "--rawstats"], SHORT).await?;
        let number = |key: &str| {
            let line = text.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix(':'));
            line.and_then(|value| value.trim().parse::<f64>().ok())
        };
        let (Some(downtime_ms), Some(memory_bytes)) = (number("downtime"), number("memory_processed")) else {
            bail!("virsh domjobinfo does not say downtime and memory_processed:\n{text}");
        };
        Ok(BareMove { total_ms, downtime_ms, memory_bytes })
    }

    /// Ends the guest; its disk server and its taps go with the lab.
    ///
    /// # Errors
    /// When it is not there any more.
    pub async fn stop(self) -> anyhow::Result<()> {
        self.virsh(&self.host, &["destroy", NAME], SHORT).await.map(drop)
    }

    /// The peer and its version.
    ///
    /// # Errors
    /// When virsh does not answer.
    pub async fn version(&self) -> anyhow::Result<String> {
        let text = self.virsh(&self.host, &["version"], SHORT).await?;
        let value = |key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
            line.trim_start_matches([':', ' ']).rsplit(' ').next().unwrap_or_default().to_owned()
        };
        Ok(format!("virsh migrate --p2p, libvirt {}, QEMU {}", value("Using library"), value("Running hypervisor")))
    }

    async fn virsh(&self, host: &str, argv: &[&str], budget: Duration) -> anyhow::Result<String> {
        let (lab, host) = (Arc::clone(&self.lab), host.to_owned());
        let argv: Vec<String> =
            ["virsh", "-c", "qemu:///system"].iter().chain(argv).map(|arg| (*arg).to_owned()).collect();
        blocking(move || {
            let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
            lab.exec(&host, &argv, budget)
        })
        .await?
        .map_err(|error| anyhow::anyhow!("{}", crate::lab::chain(&error)))
    }
}

async fn wait_until(what: &str, budget: Duration, mut is_there: impl FnMut() -> bool) -> anyhow::Result<()> {
    let end = Instant::now() + budget;
    while !is_there() {
        if Instant::now() >= end {
            bail!("{what} did not come within {} s", budget.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}
