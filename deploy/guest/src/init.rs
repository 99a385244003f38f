//! Pid 1 on the disk: devices, address, role. One process with threads; nothing is ever started besides.

use std::fs;
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use crate::clock::{boot_ms, sleep_ms};
use crate::dhcp::{self, Lease};
use crate::net::Interface;
use crate::report::{self, Report};
use crate::role::{self, Role};
use crate::{client, http, server, sys, traveller};

const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Of a disk that may be a seed, so much is searched for a role.
const SEED_CAP: usize = 2 << 20;

/// Runs until the machine ends.
pub fn run() -> ExitCode {
    // The kernel ends with pid 1: whatever happens, this one stays.
    if let Err(error) = boot() {
        say("failed", &error.to_string());
    }
    loop {
        sleep_ms(60_000);
    }
}

fn say(key: &str, value: &str) {
    report::print(&Report::new("init").word(key, value).finish());
}

fn boot() -> io::Result<()> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/run"), ("tmpfs", "/tmp")] {
        // What is there already is fine.
        let _ = sys::mount(kind, target, kind, libc::MS_NOSUID | libc::MS_NODEV);
    }
    let _ = sys::set_hostname("guest");
    std::thread::spawn(watch_power_button);
    let loopback = Interface::new("lo")?;
    loopback.set_address(Ipv4Addr::LOCALHOST, 8)?;
    loopback.up()?;

    let interface = await_interface()?;
    say("interface", interface.name());
    interface.up()?;
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    if let Some((address, prefix)) = role::static_address(&command_line) {
        interface.set_address(address, prefix)?;
        say("address", &format!("{address}/{prefix}"));
    } else {
        let lease = await_lease(&interface);
        apply(&interface, &lease)?;
        say("address", &format!("{}/{} mtu {}", lease.address, lease.prefix, lease.mtu.unwrap_or(1500)));
        std::thread::spawn(move || keep_lease(&interface, lease.lease_s));
    }

    match await_role(&command_line) {
        Role::Server(options) => server::run(&options),
        Role::Client(options) => client::run(&options),
        Role::Traveller(options) => traveller::run(&options),
    };
    Ok(())
}

/// The first interface that is not the loopback.
fn await_interface() -> io::Result<Interface> {
    loop {
        let mut names: Vec<String> = fs::read_dir("/sys/class/net")?
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.retain(|name| name != "lo");
        names.sort();
        if let Some(name) = names.first() {
            return Interface::new(name);
        }
        sleep_ms(50);
    }
}

fn await_lease(interface: &Interface) -> Lease {
    let mut transaction = u32::try_from(boot_ms() & 0xffff_ffff).unwrap_or(1) ^ 0x5c00_0000;
    loop {
        transaction = transaction.wrapping_add(1);
        match dhcp::ask(interface, transaction) {
            Ok(Some(lease)) => return lease,
            Ok(None) => say("waiting", "no DHCP answer"),
            Err(error) => {
                say("waiting", &error.to_string());
                sleep_ms(1000);
            }
        }
    }
}

fn apply(interface: &Interface, lease: &Lease) -> io::Result<()> {
    if let Some(mtu) = lease.mtu {
        interface.set_mtu(mtu)?;
    }
    interface.set_address(lease.address, lease.prefix)?;
    // RFC 3442: a client that takes the classless routes ignores the router option.
    for (to, prefix, gateway) in &lease.routes {
        let gateway = (!gateway.is_unspecified()).then_some(*gateway);
        interface.add_route(*to, *prefix, gateway)?;
    }
    if let (true, Some(router)) = (lease.routes.is_empty(), lease.router) {
        interface.add_route(Ipv4Addr::UNSPECIFIED, 0, Some(router))?;
    }
    if !lease.routes.iter().any(|(to, prefix, _)| *to == METADATA && *prefix == 32) {
        interface.add_route(METADATA, 32, None)?;
    }
    Ok(())
}

/// Renews at half time. A server that does not answer is asked again; the address stays: the network pins it to this guest.
fn keep_lease(interface: &Interface, mut lease_s: u32) {
    loop {
        sleep_ms(u64::from(lease_s) * 500);
        lease_s = await_lease(interface).lease_s;
    }
}

/// The role by kernel command line, file, seed disk or metadata, asked for until there is one.
fn await_role(command_line: &str) -> Role {
    let file = || fs::read_to_string("/etc/role").unwrap_or_default();
    for round in 0_u32.. {
        let found = role::from_kernel_command_line(command_line)
            .or_else(|| role::parse(&file()))
            .or_else(|| role::parse(&seed_text()))
            .or_else(|| role::parse(&user_data().unwrap_or_default()));
        if let Some(role) = found {
            return role;
        }
        if round.is_multiple_of(5) {
            say("waiting", "no role: not on the kernel command line, in /etc/role, on a seed disk or in the user data");
        }
        sleep_ms(1000);
    }
    unreachable!("the loop ends by a role")
}

/// What text a second disk holds. A seed's files lie in one piece each, so that a line is found without mounting it.
fn seed_text() -> String {
    let mut bytes = Vec::new();
    let read = fs::File::open("/dev/vdb").and_then(|disk| disk.take(SEED_CAP as u64).read_to_end(&mut bytes));
    if read.is_err() {
        return String::new();
    }
    // Lines of text only: what lies between is no line.
    let lines = bytes.split(|byte| *byte == b'\n' || *byte == 0).filter_map(|line| std::str::from_utf8(line).ok());
    lines.filter(|line| line.contains("role=")).collect::<Vec<_>>().join("\n")
}

/// The user data of the metadata service, which wants a session token first.
fn user_data() -> Option<String> {
    let service = SocketAddr::from((METADATA, 80));
    let patience = Duration::from_secs(3);
    let ttl = ("X-aws-ec2-metadata-token-ttl-seconds", "300");
    let (status, token) = http::request(service, "PUT", "/latest/api/token", &[ttl], "", patience).ok()?;
    if status != 200 {
        return None;
    }
    let header = ("X-aws-ec2-metadata-token", token.trim());
    let (status, text) = http::request(service, "GET", "/latest/user-data", &[header], "", patience).ok()?;
    (status == 200).then_some(text)
}

/// Switches the machine off when its power button is pressed (that is how a hypervisor asks for it).
fn watch_power_button() {
    const EVENT_BYTES: usize = size_of::<libc::input_event>();
    const KEY: u16 = 1;
    const KEY_POWER: u16 = 116;
    let Ok(entries) = fs::read_dir("/dev/input") else { return };
    for entry in entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("event")) {
        let Ok(mut device) = fs::File::open(entry.path()) else { continue };
        std::thread::spawn(move || {
            let mut event = [0_u8; EVENT_BYTES];
            while device.read_exact(&mut event).is_ok() {
                // After the time: type, code, value.
                let [kind, code] =
                    [EVENT_BYTES - 8, EVENT_BYTES - 6].map(|at| u16::from_ne_bytes([event[at], event[at + 1]]));
                let is_pressed = event[EVENT_BYTES - 4..] != [0; 4];
                if kind == KEY && code == KEY_POWER && is_pressed {
                    say("state", "power button: switching off");
                    sys::power_off();
                }
            }
        });
    }
}
