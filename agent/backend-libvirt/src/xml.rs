//! The domain XML of a guest: a pure function of what it sees and of what this host gives.
//!
//! Every PCI address is written out, fixed by the kind of device and its index: the same spec gives the same machine on
//! every host and under every libvirt, and one device more does not move the others.
//!
//! | slot (bus 0) | device |
//! |---|---|
//! | 0, 1 | host bridge; ISA bridge and IDE of the chip set |
//! | 3..10 | disks |
//! | 11..18 | network interfaces |
//! | 19 | entropy source |
//! | 20 | balloon |
//! | 21 | virtio serial controller (virtio console only) |
//!
//! # Memory of an odd size under TCG
//! QEMU before 9.0 loses guest writes when it migrates a guest that it runs by translation (TCG): between two rounds it
//! clears the dirty bits of large aligned ranges without telling the translator's TLB, so that later writes to those
//! pages are not seen (`cpu_physical_memory_sync_dirty_bitmap`, fixed upstream by "physmem: Fix migration dirty bitmap
//! coherency with TCG memory access"; not in Debian 12's 7.2.22). Guests then crash or, worse, go on with old memory:
//! measured, hundreds of lost writes in the first move of a busy guest that takes five rounds. The other path of that
//! function, for memory whose size is no multiple of 64 pages, does it right. So under TCG a guest's memory is given
//! [`TCG_MEMORY_LESS_BYTES`] less than its shape says (libvirt itself only knows whole MiB, hence the QEMU arguments);
//! of every QEMU version, because both ends of a move must have the same. With it, 190 moves of five to eleven rounds
//! each lost nothing. `two_hosts.rs` holds the test that fails without it.

use std::{fmt::Write, path::Path};

use supercloud_blanket::{
    BackendError, BackendResult, Launch,
    device::{Boot, Clock, Console, Disk, Nic},
};

use crate::{BACK_END, metadata::Mark};

const FIRST_DISK_SLOT: usize = 3;
const FIRST_NIC_SLOT: usize = 11;
const RNG_SLOT: usize = 19;
const BALLOON_SLOT: usize = 20;
const SERIAL_SLOT: usize = 21;

/// The usual figures of a disk that is addressed by blocks (ATA-4, identify words 1, 3, 6).
const CYLINDERS: u32 = 16_383;
const HEADS: u32 = 16;
const SECTORS: u32 = 63;

/// How often the guest's balloon driver is asked for memory figures, seconds.
const MEMORY_STATS_PERIOD_S: u32 = 5;

/// What is missing from a guest's memory under TCG: two pages, so that its size is no multiple of 64 pages (QEMU rounds
/// to 8 KiB).
const TCG_MEMORY_LESS_BYTES: u64 = 8192;

/// Prefix of the aliases that we give to devices; libvirt demands `ua-`.
pub(crate) const DISK_ALIAS: &str = "ua-disk-";

/// Writes a text so that it is one attribute's value or one element's content, whatever it holds.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&apos;"),
            '"' => out.push_str("&quot;"),
            // Not even a reference to these is well-formed XML 1.0.
            c if (c as u32) < 0x20 && !matches!(c, '\t' | '\n' | '\r') => {}
            c => out.push(c),
        }
    }
    out
}

fn path(path: &Path) -> String {
    escape(&path.to_string_lossy())
}

/// What this back end lacks of a launch, refused by name.
pub(crate) fn check(launch: &Launch) -> BackendResult<()> {
    launch.check()?;
    let lacks = |option: String| Err(BackendError::Unsupported { back_end: BACK_END, option });
    let class = &launch.spec.class;
    if class.back_end != BACK_END {
        return lacks(format!("back end '{}'", class.back_end));
    }
    if !matches!(class.accelerator.as_str(), "tcg" | "kvm") {
        return lacks(format!("accelerator '{}'", class.accelerator));
    }
    if !class.machine_version.starts_with("pc-i440fx-") {
        return lacks(format!("machine version '{}'", class.machine_version));
    }
    Ok(())
}

/// The domain XML of a checked launch.
pub(crate) fn render(launch: &Launch, mark: &Mark) -> String {
    let (spec, host) = (&launch.spec, &launch.host);
    let kind = if spec.class.accelerator == "kvm" { "kvm" } else { "qemu" };
    let mut x = String::with_capacity(4096);
    // Writing into a String does not fail.
    let _ = render_into(&mut x, launch, mark, kind);
    debug_assert!(host.disks.len() >= spec.devices.disks.len());
    x
}

/// The text with as much current memory as a saved guest's own XML tells: libvirt refuses to thaw it with another number, and
/// a daemon that was restarted while the guest ran has asked QEMU, which has 8 KiB less than was asked for (see
/// `TCG_MEMORY_LESS_BYTES`). Only that number is taken from there.
pub(crate) fn with_current_memory(text: String, saved: &str) -> String {
    const OPEN: &str = "<currentMemory";
    let element = |xml: &str| {
        let at = xml.find(OPEN)?;
        let value = at + xml[at..].find('>')? + 1;
        let end = value + xml[value..].find("</currentMemory>")?;
        Some((at, value, end))
    };
    let number = element(saved).and_then(|(at, value, end)| {
        let is_kib = saved[at..value].contains("unit='KiB'");
        saved[value..end].parse::<u64>().ok().filter(|_| is_kib)
    });
    match (number, element(&text)) {
        (Some(kib), Some((at, _, end))) => {
            format!("{}<currentMemory unit='KiB'>{kib}{}", &text[..at], &text[end..])
        }
        _ => text,
    }
}

fn render_into(x: &mut String, launch: &Launch, mark: &Mark, kind: &str) -> std::fmt::Result {
    let spec = &launch.spec;
    let devices = &spec.devices;
    let is_tcg = kind == "qemu";
    let namespace = if is_tcg { " xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'" } else { "" };
    writeln!(x, "<domain type='{kind}'{namespace}>")?;
    writeln!(x, "  <name>{}</name>", launch.guest)?;
    writeln!(x, "  <uuid>{}</uuid>", launch.guest.uuid())?;
    writeln!(x, "  <metadata>{}</metadata>", mark.to_xml())?;
    writeln!(x, "  <memory unit='bytes'>{}</memory>", spec.memory_bytes)?;
    writeln!(x, "  <currentMemory unit='bytes'>{}</currentMemory>", spec.memory_bytes)?;
    writeln!(x, "  <vcpu placement='static'>{}</vcpu>", spec.vcpus)?;
    writeln!(x, "  <os>")?;
    writeln!(x, "    <type arch='x86_64' machine='{}'>hvm</type>", escape(&spec.class.machine_version))?;
    match &spec.boot {
        Boot::Disk => writeln!(x, "    <boot dev='hd'/>")?,
        Boot::Kernel { has_initrd, cmdline } => {
            if let Some(kernel) = &launch.host.kernel {
                writeln!(x, "    <kernel>{}</kernel>", path(kernel))?;
            }
            if let Some(initrd) = launch.host.initrd.as_ref().filter(|_| *has_initrd) {
                writeln!(x, "    <initrd>{}</initrd>", path(initrd))?;
            }
            writeln!(x, "    <cmdline>{}</cmdline>", escape(cmdline))?;
        }
    }
    writeln!(x, "  </os>")?;
    writeln!(x, "  <features><acpi/><apic/></features>")?;
    // The named model as it is: what the host could add on top would not be there at the next host. With KVM two
    // features go with every baseline, which KVM provides on any processor; without them guests take many times as
    // many exits for their timer.
    let (check, timers) = match kind {
        "kvm" => {
            ("partial", "<feature policy='require' name='x2apic'/><feature policy='require' name='tsc-deadline'/>")
        }
        _ => ("none", ""),
    };
    writeln!(
        x,
        "  <cpu mode='custom' match='exact' check='{check}'><model fallback='forbid'>{}</model>{timers}</cpu>",
        escape(&spec.class.cpu_baseline)
    )?;
    match spec.clock {
        Clock::Utc => writeln!(x, "  <clock offset='utc'/>")?,
    }
    writeln!(x, "  <on_poweroff>destroy</on_poweroff>")?;
    writeln!(x, "  <on_reboot>restart</on_reboot>")?;
    writeln!(x, "  <on_crash>destroy</on_crash>")?;
    writeln!(x, "  <devices>")?;
    writeln!(x, "    <controller type='usb' model='none'/>")?;
    for (index, disk) in devices.disks.iter().enumerate() {
        render_disk(x, launch, index, disk)?;
    }
    for (index, nic) in devices.nics.iter().enumerate() {
        render_nic(x, launch, index, nic)?;
    }
    render_console(x, launch)?;
    if devices.has_rng {
        writeln!(x, "    <rng model='virtio'><backend model='random'>/dev/urandom</backend>{}</rng>", slot(RNG_SLOT))?;
    }
    if devices.has_balloon {
        writeln!(
            x,
            "    <memballoon model='virtio'><stats period='{MEMORY_STATS_PERIOD_S}'/>{}</memballoon>",
            slot(BALLOON_SLOT)
        )?;
    } else {
        writeln!(x, "    <memballoon model='none'/>")?;
    }
    writeln!(x, "  </devices>")?;
    if is_tcg {
        render_odd_memory(x, spec.memory_bytes.saturating_sub(TCG_MEMORY_LESS_BYTES))?;
    }
    writeln!(x, "</domain>")
}

/// QEMU merges repeated `-m` and `-machine` options, the last one wins. libvirt's own memory object stays unused: it is
/// only address space.
fn render_odd_memory(x: &mut String, bytes: u64) -> std::fmt::Result {
    writeln!(x, "  <qemu:commandline>")?;
    let object = format!("memory-backend-ram,id=supercloud.ram,size={bytes}");
    let size = format!("size={}k", bytes / 1024);
    for argument in ["-object", &object, "-machine", "memory-backend=supercloud.ram", "-m", &size] {
        writeln!(x, "    <qemu:arg value='{argument}'/>")?;
    }
    writeln!(x, "  </qemu:commandline>")
}

fn slot(slot: usize) -> String {
    format!("<address type='pci' domain='0x0000' bus='0x00' slot='0x{slot:02x}' function='0x0'/>")
}

fn render_disk(x: &mut String, launch: &Launch, index: usize, disk: &Disk) -> std::fmt::Result {
    let Some(nbd) = launch.host.disks.get(&disk.name) else { return Ok(()) };
    let letter = char::from(b'a' + u8::try_from(index).unwrap_or(25));
    writeln!(x, "    <disk type='network' device='disk'>")?;
    // A volume process that goes away must stop the guest, not give it an I/O error.
    writeln!(
        x,
        "      <driver name='qemu' type='raw' cache='none' error_policy='stop' rerror_policy='stop' discard='unmap' \
         detect_zeroes='unmap'/>"
    )?;
    let name = if nbd.export.is_empty() { String::new() } else { format!(" name='{}'", escape(&nbd.export)) };
    writeln!(x, "      <source protocol='nbd'{name}><host transport='unix' socket='{}'/></source>", path(&nbd.socket))?;
    writeln!(x, "      <target dev='vd{letter}' bus='virtio'/>")?;
    if disk.is_read_only {
        writeln!(x, "      <readonly/>")?;
    }
    // Without it QEMU guesses one from the first sector, already while a guest comes here: from a volume whose newest
    // content is still with the source, and which answers no read before it is this host's turn. The figures mean
    // nothing to a virtio guest.
    writeln!(x, "      <geometry cyls='{CYLINDERS}' heads='{HEADS}' secs='{SECTORS}'/>")?;
    writeln!(x, "      <serial>{}</serial>", escape(&disk.name))?;
    writeln!(x, "      <alias name='{DISK_ALIAS}{}'/>", escape(&disk.name))?;
    writeln!(x, "      {}", slot(FIRST_DISK_SLOT + index))?;
    writeln!(x, "    </disk>")
}

fn render_nic(x: &mut String, launch: &Launch, index: usize, nic: &Nic) -> std::fmt::Result {
    let Some(tap) = launch.host.taps.get(&nic.name) else { return Ok(()) };
    writeln!(x, "    <interface type='ethernet'>")?;
    writeln!(x, "      <mac address='{}'/>", nic.mac)?;
    writeln!(x, "      <target dev='{}' managed='no'/>", escape(tap))?;
    writeln!(x, "      <model type='virtio'/>")?;
    // Userspace tunnels drop or corrupt what the guest left to an offload: none is offered to it.
    writeln!(x, "      <driver name='qemu'>")?;
    writeln!(x, "        <host csum='off' gso='off' tso4='off' tso6='off' ecn='off' ufo='off' mrg_rxbuf='off'/>")?;
    writeln!(x, "        <guest csum='off' tso4='off' tso6='off' ecn='off' ufo='off'/>")?;
    writeln!(x, "      </driver>")?;
    writeln!(x, "      <mtu size='{}'/>", nic.mtu)?;
    writeln!(x, "      <rom enabled='no'/>")?;
    writeln!(x, "      <alias name='ua-nic-{}'/>", escape(&nic.name))?;
    writeln!(x, "      {}", slot(FIRST_NIC_SLOT + index))?;
    writeln!(x, "    </interface>")
}

fn render_console(x: &mut String, launch: &Launch) -> std::fmt::Result {
    let is_virtio = launch.spec.devices.console == Console::Virtio;
    let (element, target) = if is_virtio {
        writeln!(x, "    <controller type='virtio-serial' index='0'>{}</controller>", slot(SERIAL_SLOT))?;
        ("console", "<target type='virtio' port='0'/>")
    } else {
        ("serial", "<target type='isa-serial' port='0'><model name='isa-serial'/></target>")
    };
    let log = match &launch.host.console_log {
        Some(file) => format!("<log file='{}' append='on'/>", path(file)),
        None => String::new(),
    };
    match &launch.host.console_socket {
        Some(socket) => writeln!(
            x,
            "    <{element} type='unix'><source mode='bind' path='{}'/>{log}{target}</{element}>",
            path(socket)
        ),
        None => writeln!(x, "    <{element} type='null'>{log}{target}</{element}>"),
    }
}

#[cfg(test)]
#[path = "xml_tests.rs"]
mod tests;
