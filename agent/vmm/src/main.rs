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
//! With `--launch -` the text is read from standard input to its end: nothing is begun before, so that the starter can first write down
//! which process it is, and it is not in the list of processes for everybody to read.
//!
//! With a control socket the guest waits for `resume`; without one it runs at once, and the process ends with it: exit
//! code 0 when it switched itself off, 1 when it cannot go on. A guest that resets is booted again.

mod confine;
mod console;
mod control;
mod disks;
mod launch;
mod left;
mod mirror;
mod owner;
mod travel;

use std::{io::Read as _, process::ExitCode};

use anyhow::Context as _;
use clap::Parser;

/// Runs one guest on /dev/kvm.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    /// The guest and its descriptors, as JSON; `-`: from standard input
    #[arg(long)]
    launch: String,
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    let text = match cli.launch.as_str() {
        "-" => std::io::read_to_string(std::io::stdin().lock().take(launch::MAX_TEXT_BYTES as u64 + 1)),
        text => Ok(text.to_owned()),
    };
    let launch = launch::Launch::parse(&text.context("reading the launch")?).context("reading the launch")?;
    let held = launch::Held::take(&launch).context("taking the descriptors")?;
    confine::confine().context("confining the process")?;
    owner::run(&launch.spec, launch.arrives, held)
}
