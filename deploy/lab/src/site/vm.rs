//! A host that is a virtual machine: QEMU in the site's namespaces, its cards bridged to the cables to the WAN.
//!
//! ```text
//! WAN -- eth0 -- b-eth0 -- t-eth0 -- QEMU: eth0   agent, controller
//! WAN -- ul0  -- b-ul0  -- t-ul0  -- QEMU: ul0    tunnels of Open vSwitch in the VM's kernel
//! ```
//!
//! The VM has four serial lines: its console, the log of its agent and the consoles of its guests, which are files below the site's
//! folder, and the one on which its first process serves the lab ([`crate::host_init::serve_channel`]).

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Site, SiteError};
use crate::{
    addressing::{Segment, mac_text},
    command::{Run, wait_for},
    fleet::config::LOG_DIR,
    host_init::{self, ProcessSpec},
    host_vm::{self, Hardware, Hypervisor},
    image::{self, ImageError},
    lab::program_dir,
    netns, state,
};

/// Memory of such a host: for its system and a few lean guests.
const MEMORY_MIB: u32 = 1024;

/// What of it the first domain of a Xen host gets; the rest is for guests.
const FIRST_DOMAIN_MIB: u32 = 576;

/// How long a translated machine may take to boot when others do as well.
const BOOT_BUDGET: Duration = Duration::from_secs(300);

/// The first domain's kernel. Its clock is Xen's; its console is Xen's, which is the first serial line.
const XEN_CMDLINE: &str = "console=hvc0 quiet loglevel=3 mitigations=off panic=-1";

/// What the VM's process is called among the site's.
const PROCESS: &str = "host-vm";

fn bridge(segment: Segment) -> String {
    format!("b-{}", segment.host_interface())
}

fn tap(segment: Segment) -> String {
    format!("t-{}", segment.host_interface())
}

impl Site {
    /// What its host is made of, when that is a VM.
    #[must_use]
    pub fn hardware(&self) -> Option<Hardware> {
        self.vm
    }

    /// Where the VM's first process is reached.
    pub(super) fn channel(&self) -> PathBuf {
        self.dir.join("vm.sock")
    }

    /// The same, for who runs commands there: none where the host is no VM.
    #[must_use]
    pub fn vm_channel(&self) -> Option<PathBuf> {
        self.vm.map(|_| self.channel())
    }

    fn disk(&self) -> PathBuf {
        self.dir.join("disk.raw")
    }

    /// The VM's console.
    #[must_use]
    pub fn vm_console(&self) -> PathBuf {
        self.dir.join("vm.console")
    }

    /// What its guests say on their consoles ([`crate::fleet::console::forward`]): none where the host is no VM.
    #[must_use]
    pub fn vm_guests(&self) -> Option<PathBuf> {
        self.vm.map(|_| self.dir.join("vm.guests"))
    }

    fn image(&self, source: ImageError) -> SiteError {
        SiteError::Image { site: self.name.clone(), source: Box::new(source) }
    }

    /// Bridges between the cables and the VM's cards.
    pub(super) fn bridge_vm(&self) -> Result<(), SiteError> {
        let failed = self.command("setting up its network");
        for segment in self.segments() {
            let (cable, bridge, tap) = (segment.host_interface(), bridge(*segment), tap(*segment));
            for words in [
                format!("link add {bridge} type bridge"),
                format!("tuntap add {tap} mode tap"),
                format!("link set {tap} master {bridge}"),
                format!("link set {cable} master {bridge}"),
                format!("link set {tap} up"),
                format!("link set {cable} up"),
                format!("link set {bridge} up"),
            ] {
                netns::ip(&self.namespace, &words).map_err(&failed)?;
            }
        }
        Ok(())
    }

    /// Switches the VM on and waits until its first process serves.
    pub(super) fn start_vm(&self, hardware: Hardware) -> Result<(), SiteError> {
        let argv = self.qemu(hardware).map_err(|source| self.image(source))?;
        // What it said in an earlier life. One that cannot be removed is emptied by QEMU.
        let _ = fs::remove_file(self.vm_console());
        let process = ProcessSpec { name: PROCESS.to_owned(), argv, env: Vec::new(), log: self.dir.join("qemu.log") };
        host_init::spawn(&self.init_socket(), process).map_err(self.host("switching its VM on"))?;
        let is_up = wait_for(BOOT_BUDGET, || {
            let all = host_init::status(&self.init_socket()).unwrap_or_default();
            if all.get(PROCESS).is_none_or(|status| status.ended.is_some()) {
                return Some(false);
            }
            // Until the first process serves, nobody answers: the console tells when to ask.
            let console = fs::read(self.vm_console()).unwrap_or_default();
            let console = String::from_utf8_lossy(&console);
            let is_told = |what: &str| console.lines().any(|line| line.starts_with(what));
            if is_told("@host has no ") {
                return Some(false);
            }
            (is_told("@host up") && host_init::status(&self.channel()).is_ok()).then_some(true)
        });
        if is_up == Some(true) {
            return Ok(());
        }
        let said = self.log_tail("qemu.log") + "\n" + &self.log_tail("vm.console");
        Err(SiteError::Daemon { site: self.name.clone(), name: "its VM", said })
    }

    fn qemu(&self, hardware: Hardware) -> Result<Vec<String>, ImageError> {
        let is_xen = self.hypervisor == Hypervisor::Xen;
        let kernel = match self.hypervisor {
            Hypervisor::Kvm => image::kernel::for_agents_hosts(hardware.is_of_clouds())?,
            Hypervisor::Xen => image::kernel::for_xen_hosts()?,
        };
        let initrd = self.dir.join("vm.initrd");
        host_vm::write(&initrd, &image::host::initramfs(&kernel, Path::new(host_vm::BUSYBOX))?)?;
        let disk = self.disk();
        if !disk.exists() {
            // Made in another name: a copy that was interrupted is no disk.
            let part = disk.with_extension("part");
            Run::line("cp --sparse=always")
                .args([&image::host::disk(&program_dir(), self.hypervisor)?, &part])
                .budget(Duration::from_secs(300))
                .ok()
                .map_err(image::running("copying a disk"))?;
            fs::rename(&part, &disk).map_err(image::io_at("name", &disk))?;
        }
        let log = self.outside(&format!("{LOG_DIR}/agent.log")).unwrap_or_default();
        let cmdline = format!(
            "{} random.trust_cpu=on sc.disk={} sc.name={} sc.agents={} sc.overlay={}",
            if is_xen { XEN_CMDLINE.to_owned() } else { host_vm::cmdline() },
            hardware.disk_path(),
            self.name,
            self.address(),
            self.overlay_address(),
        );
        let mut argv: Vec<String> = host_vm::QEMU.iter().map(|word| (*word).to_owned()).collect();
        let mut add = |option: &str, value: String| argv.extend([option.to_owned(), value]);
        add("-cpu", self.hypervisor.processor(hardware).to_owned());
        add("-m", MEMORY_MIB.to_string());
        if is_xen {
            // The hypervisor is what boots; the first domain's kernel, with its command line, and its initramfs are modules for it.
            let xen = image::xen::hypervisor()?;
            add("-kernel", xen.elf.display().to_string());
            let comma = |text: String| text.replace(',', ",,");
            let kernel = comma(format!("{} {cmdline}", kernel.image().display()));
            add("-initrd", format!("{kernel},{}", comma(initrd.display().to_string())));
            let memory = format!("dom0_mem={FIRST_DOMAIN_MIB}M,max:{FIRST_DOMAIN_MIB}M");
            add("-append", format!("console=com1 com1=115200,8n1 loglvl=warning guest_loglvl=warning {memory}"));
        } else {
            add("-kernel", kernel.image().display().to_string());
            add("-initrd", initrd.display().to_string());
            add("-append", cmdline);
        }
        // The file's pages outlive QEMU: what the VM has flushed survives a cut of its power also without real flushes.
        add("-drive", format!("file={},if=none,id=disk,format=raw,cache=unsafe,discard=unmap", disk.display()));
        add("-device", format!("{},drive=disk", hardware.disk()));
        for segment in self.segments() {
            let tap = tap(*segment);
            // The relay must see frames as they are on a wire.
            add("-netdev", format!("tap,id={tap},ifname={tap},script=no,downscript=no,vnet_hdr=off"));
            let mac = mac_text(self.index.mac(self.number, *segment));
            add("-device", format!("{},netdev={tap},mac={mac}", hardware.card()));
        }
        let guests = self.vm_guests().unwrap_or_default();
        let file = |path: &Path| format!("file,path={}", path.display());
        let socket = format!("socket,path={},server=on,wait=off", self.channel().display());
        // The usual four share two interrupts, which lines of this bus cannot: one would wait for ever.
        for (at, (name, end, interrupt)) in [
            ("console", file(&self.vm_console()), 4),
            ("channel", socket, 3),
            ("log", file(&log) + ",append=on", 5),
            ("guests", file(&guests) + ",append=on", 10),
        ]
        .into_iter()
        .enumerate()
        {
            add("-chardev", format!("{end},id={name}"));
            add("-device", format!("isa-serial,chardev={name},index={at},irq={interrupt}"));
        }
        Ok(argv)
    }

    /// As a daemon of ours is started in the VM: from the folder of its disk, with a log that is forwarded.
    pub(super) fn in_vm(mut process: ProcessSpec) -> ProcessSpec {
        process.log = PathBuf::from(host_init::FORWARDED_LOG);
        if let Some(program) = process.argv.first_mut()
            && let Some(name) = Path::new(program).file_name().and_then(|name| name.to_str())
            && name.starts_with("supercloud-")
        {
            *program = format!("{}/{name}", image::host::PROGRAM_DIR);
        }
        process
    }

    /// A command inside the VM, by the lab's own program.
    pub(super) fn run_in_vm(&self, argv: &[&str], budget: Duration) -> Run {
        Run::new(program_dir().join("supercloud-lab"))
            .args(["in-vm", "--budget", &budget.as_secs().max(1).to_string(), "--channel"])
            .arg(self.channel())
            .arg("--")
            .args(argv)
            .budget(budget + Duration::from_secs(60))
    }

    /// Writes a settings file of a daemon in the site.
    ///
    /// # Errors
    /// When the site is down, or the file cannot be written.
    pub fn write_settings(&self, inside: &str, text: &str) -> Result<(), SiteError> {
        if self.vm.is_some() {
            return host_init::write(&self.channel(), Path::new(inside), text)
                .map_err(self.host("writing its settings"));
        }
        Ok(state::write_private(&self.outside(inside).unwrap_or_default(), text)?)
    }
}
