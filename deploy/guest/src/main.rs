//! What runs inside the lab's lean guests: one small static program that is initramfs, init, server and client.
//!
//! ```text
//! supercloud-guest initramfs        in the initramfs (as /init): load modules, mount the disk, go on to init there
//! supercloud-guest init             pid 1 on the disk (as /sbin/init): devices, address by DHCP, then the role
//! supercloud-guest poweroff         (as /sbin/poweroff): what a kernel runs that Xen tells to power off
//! supercloud-guest server           HTTP on :80, the checked stream on :7000, numbered writes to /data/log
//! supercloud-guest client PEER      holds one stream to the server and checks every byte
//! supercloud-guest traveller to=PLACE  asks for its own move there and back, and sees where it is
//! ```
//!
//! Server and client print one JSON line per half second to the console, prefixed `@sc `, because that is the one way
//! by which a host may look into a guest: the overlay lets no packet through from host to guest. `docs` of the fields: [`report`].

mod client;
mod clock;
mod dhcp;
mod http;
mod init;
mod initramfs;
mod journal;
mod json;
mod memory;
mod net;
mod pattern;
mod report;
mod role;
mod sabotage;
mod server;
mod sys;
mod traveller;

use std::process::ExitCode;

use role::Role;

const USAGE: &str = "usage: supercloud-guest initramfs | init | server [mem=MIB] [dirty=MIB_PER_S] | client peer=ADDRESS | traveller \
     to=PLACE";

fn main() -> ExitCode {
    let mut arguments = std::env::args();
    let own_name = arguments.next().unwrap_or_default();
    let words: Vec<String> = arguments.collect();
    // The kernel passes unknown words of its command line to init as arguments: only the name counts for pid 1.
    let verb = match own_name.as_str() {
        "/init" => "initramfs",
        "/sbin/init" => "init",
        "/sbin/poweroff" => "poweroff",
        _ => words.first().map_or("", String::as_str),
    };
    match verb {
        "initramfs" => initramfs::run(),
        "init" => init::run(),
        "poweroff" => {
            sys::power_off();
            ExitCode::FAILURE
        }
        "server" | "client" | "traveller" => {
            let text = format!("role={}", words.join(" "));
            match role::parse(&text) {
                Some(Role::Server(options)) => server::run(&options),
                Some(Role::Client(options)) => client::run(&options),
                Some(Role::Traveller(options)) => traveller::run(&options),
                None => {
                    eprintln!("{USAGE}");
                    ExitCode::from(2)
                }
            }
        }
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}
