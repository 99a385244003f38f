//! `supercloud-vmm`: one guest on `/dev/kvm`, in a process of its own.
//!
//! Whoever starts it hands over every descriptor that it will ever have: `/dev/kvm`, kernel, disks, taps, console, and the
//! listening sockets of control and streams. What the guest is (`spec`) and which descriptor is what (`wiring`) are one JSON text:
//!
//! ```sh
//! supercloud-vmm --launch '{"spec": {...}, "wiring": {"kvm": 3, "kernel": 4, "disks": {"root": 5}, "console_out": 1}}' \
//!   3<>/dev/kvm 4<vmlinuz 5<>disk.raw
//! ```
//!
//! With `"arrives": true` the guest does not boot: it comes over the stream (`"stream"` in the wiring, a connected socket, or who
//! connects to the listening socket `"streams"`) from another process that was asked to `send` it, and waits for `resume`.
//!
//! With a control socket the guest waits for `resume`; without one it runs at once, and the process ends with it: exit
//! code 0 when it switched itself off, 1 when it cannot go on. A guest that resets is booted again.

mod confine;
mod console;
mod control;
mod disks;
mod launch;
mod owner;
mod travel;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;

/// Runs one guest on /dev/kvm.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    /// The guest and its descriptors, as JSON
    #[arg(long)]
    launch: String,
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    let launch = launch::Launch::parse(&cli.launch).context("reading --launch")?;
    let held = launch::Held::take(&launch).context("taking the descriptors")?;
    confine::confine().context("confining the process")?;
    owner::run(&launch.spec, launch.arrives, held)
}
