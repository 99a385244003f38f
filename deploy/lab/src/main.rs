//! `supercloud-lab`: the one-machine lab by hand.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use supercloud_lab::wan::control::Request;
use supercloud_lab::wan::fabric::FabricSpec;
use supercloud_lab::{Lab, LabSpec, bench, demo, host_init, host_vm::Hypervisor, image, netns, state, wan};

const EXAMPLES: &str = "Examples:
  supercloud-lab up                            three clouds: aws-east, gcp-west, home
  supercloud-lab status                        hosts, addresses, links with their counters
  supercloud-lab exec aws-east -- ovs-vsctl show
  supercloud-lab link aws-east home --rtt 80 --loss 0.5
  supercloud-lab partition aws-east gcp-west   cut one link
  supercloud-lab heal                          heal all links
  supercloud-lab kill home                     the host loses power
  supercloud-lab boot home                     and gets it back
  supercloud-lab down                          remove everything, also after a crash
  supercloud-lab demo                          tell the whole story with real guests";

/// The one-machine lab: hosts in several clouds, joined by an emulated WAN.
#[derive(Parser)]
#[command(version, about, after_help = EXAMPLES)]
struct Cli {
    /// Which lab; several can be up at once
    #[arg(long, global = true, default_value = "demo", env = "SUPERCLOUD_LAB")]
    lab: String,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Make the lab; what is left of an earlier one of that name is removed first
    Up {
        /// A lab in TOML instead of the three clouds (name, [[hosts]], [[links]])
        #[arg(long, value_name = "FILE")]
        spec: Option<PathBuf>,
        /// What the hosts of the three clouds are
        #[arg(long, value_enum, default_value = "namespaces", conflicts_with = "spec")]
        hosts: Hosts,
    },
    /// Remove the lab, whatever state it is in
    Down {
        /// Remove every lab of this machine
        #[arg(long)]
        all: bool,
    },
    /// Show hosts, daemons and links
    Status,
    /// Cut the link of two sites
    Partition(Pair),
    /// Heal the link of two sites, or all links
    Heal {
        /// The two sites
        #[arg(num_args = 2, value_names = ["A", "B"])]
        pair: Vec<String>,
    },
    /// Change the link of two sites
    Link {
        #[command(flatten)]
        pair: Pair,
        /// Round-trip time, milliseconds
        #[arg(long, value_name = "MS")]
        rtt: Option<f64>,
        /// Rate, Mbit/s (0: unlimited)
        #[arg(long, value_name = "MBIT")]
        rate: Option<u32>,
        /// Loss, percent
        #[arg(long, value_name = "PERCENT")]
        loss: Option<f64>,
        /// Queue, bytes
        #[arg(long, value_name = "BYTES")]
        queue: Option<u64>,
    },
    /// A host loses power: all its processes end at once
    Kill {
        /// The host, or "controller"
        host: String,
    },
    /// A host that lost power boots again, with the agent or what else was ever started in it
    Boot {
        /// The host, or "controller"
        host: String,
    },
    /// Run a command inside a host
    Exec {
        /// The host, or "controller"
        host: String,
        /// The command and its arguments
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// A running guest moves between three clouds: shown, measured, judged
    Demo(demo::Options),
    /// Measure ours beside its peers, in a lab of its own
    Bench(bench::Options),
    /// Make a guest image (or take it from the cache) and print where its parts are, as JSON
    Image {
        /// Which one
        #[arg(value_enum)]
        kind: ImageKind,
    },
    /// (internal) The WAN emulator's process
    #[command(hide = true)]
    Wan {
        #[arg(long)]
        config: PathBuf,
        #[arg(long)]
        control: PathBuf,
        #[arg(long)]
        namespace: String,
    },
    /// (internal) Runs a command in a host that is a VM
    #[command(hide = true)]
    InVm {
        #[arg(long)]
        channel: PathBuf,
        /// Seconds
        #[arg(long, default_value_t = 600)]
        budget: u64,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// (internal) A lab host's first process
    #[command(hide = true)]
    HostInit {
        #[arg(long)]
        stage_one: Option<PathBuf>,
        #[arg(long)]
        stage_two: Option<PathBuf>,
        #[arg(long, num_args = 3, value_names = ["CHANNEL", "LOG", "GUESTS"])]
        lines: Vec<PathBuf>,
    },
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Hosts {
    /// Of this machine's kernel
    Namespaces,
    /// Virtual machines with a kernel of their own, each of other hardware, translated by QEMU: slow
    Vm,
    /// The same, each with Xen and its first domain, on a processor without virtualization: paravirtual guests run there (docs/xen.md)
    Xen,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum ImageKind {
    /// Kernel, initramfs and a small disk: boots in seconds without hardware virtualization
    Lean,
    /// A whole Debian as distributions ship it: GPT, GRUB, systemd, cloud-init
    Distro,
}

#[derive(Args)]
struct Pair {
    /// One site
    a: String,
    /// The other
    b: String,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let attach = || Lab::attach(&cli.lab);
    match cli.verb {
        Verb::Up { spec, hosts } => up(&cli.lab, spec.as_deref(), hosts)?,
        Verb::Down { all } => {
            let root = state::default_root();
            if all {
                supercloud_lab::lab::down_all(&root)?;
            } else {
                supercloud_lab::down(&root, &cli.lab)?;
            }
        }
        Verb::Demo(options) => return demo::run(&cli.lab, &options),
        Verb::Bench(options) => return bench::run("bench", &options),
        Verb::Status => status(&attach()?)?,
        Verb::Partition(Pair { a, b }) => attach()?.partition(&a, &b)?,
        Verb::Heal { pair } => match pair.as_slice() {
            [a, b] => attach()?.heal(a, b)?,
            _ => attach()?.heal_all()?,
        },
        Verb::Link { pair: Pair { a, b }, rtt, rate, loss, queue } => {
            let loss_ppm = loss.map(ppm).transpose()?;
            let request = Request::Link { a, b, rtt_ms: rtt, rate_mbit: rate, loss_ppm, queue_bytes: queue };
            attach()?.change_link(&request)?;
        }
        Verb::Kill { host } => attach()?.kill_host(&host)?,
        Verb::Boot { host } => boot(&attach()?, &host)?,
        Verb::Exec { host, command } => return exec(&attach()?, &host, &command),
        Verb::Image { kind } => println!(
            "{}",
            match kind {
                ImageKind::Lean => serde_json::to_string_pretty(&image::lean::ensure()?)?,
                ImageKind::Distro => serde_json::to_string_pretty(&image::distro::ensure()?)?,
            }
        ),
        Verb::Wan { config, control, namespace } => {
            netns::enter(&namespace).context("entering the WAN's namespace")?;
            let spec: FabricSpec = serde_json::from_slice(&fs::read(config)?)?;
            wan::relay::run(spec, &control)?;
        }
        Verb::HostInit { stage_one: Some(setup), .. } => println!("{}", host_init::stage_one(&setup)?),
        Verb::HostInit { stage_two: Some(setup), .. } => host_init::stage_two(&setup)?,
        Verb::InVm { channel, budget, command } => return in_vm(&channel, &command, budget),
        Verb::HostInit { lines, .. } => match lines.as_slice() {
            [channel, log, guests] => host_init::serve_channel(channel, log, guests)?,
            _ => bail!("this is an internal command"),
        },
    }
    Ok(ExitCode::SUCCESS)
}

fn up(name: &str, spec: Option<&Path>, hosts: Hosts) -> anyhow::Result<()> {
    let spec: LabSpec = match spec {
        Some(path) => toml::from_str(&fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?)
            .with_context(|| format!("{} is not a lab", path.display()))?,
        None => match hosts {
            Hosts::Namespaces => LabSpec::three_clouds(name),
            Hosts::Vm => LabSpec::three_clouds_of_vms(name),
            Hosts::Xen => LabSpec::three_clouds_of_xen(name),
        },
    };
    let has_xen = spec.hosts.iter().any(|host| host.hypervisor == Hypervisor::Xen);
    let mut lab = Lab::start(spec)?;
    lab.keep();
    print!("{}", lab.describe());
    if has_xen {
        println!("Xen is {}", image::xen::hypervisor()?.about);
    }
    Ok(())
}

/// As a machine does that starts its services at boot.
fn boot(lab: &Lab, host: &str) -> anyhow::Result<()> {
    lab.boot_host(host)?;
    for daemon in lab.remembered(host)? {
        lab.restart(host, &daemon).with_context(|| format!("starting {daemon} again"))?;
        println!("{host}: {daemon} is started");
    }
    Ok(())
}

fn status(lab: &Lab) -> anyhow::Result<()> {
    let mut text = lab.describe();
    for site in lab.sites() {
        let daemons = site.daemons().unwrap_or_else(|_| BTreeMap::new());
        for (name, daemon) in daemons {
            writeln!(text, "  {:<22} {name:<24} {}", site.name, daemon.ended.unwrap_or_else(|| "running".to_owned()))?;
        }
    }
    let (links, realtime) = lab.links()?;
    if !realtime {
        writeln!(text, "(the WAN emulator has no real-time priority: delays may jitter by milliseconds)")?;
    }
    writeln!(
        text,
        "{:<36} {:>8} {:>7} {:>7}  {:<4} {:>12} {:>8} {:>8} {:>8}",
        "link", "rtt ms", "Mbit/s", "loss %", "", "bytes", "lost", "overflow", "cut"
    )?;
    for link in links {
        writeln!(
            text,
            "{:<36} {:>8} {:>7} {:>7}  {:<4} {:>12} {:>8} {:>8} {:>8}",
            format!("{} -> {}", link.from, link.to),
            link.shape.rtt_ms,
            link.shape.rate_mbit,
            f64::from(link.shape.loss_ppm) / 10_000.0,
            if link.up { "up" } else { "CUT" },
            link.counters.sent_bytes,
            link.counters.lost_frames,
            link.counters.overflow_frames,
            link.counters.cut_frames,
        )?;
    }
    // A reader that has seen enough (`| head`) is no error.
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn ppm(percent: f64) -> anyhow::Result<u32> {
    if !(0.0..=100.0).contains(&percent) {
        bail!("--loss is a percentage from 0 to 100, not {percent}");
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 <= value <= 1e6")]
    let ppm = (percent * 10_000.0).round() as u32;
    Ok(ppm)
}

/// Becomes the command inside the host, with this terminal.
fn exec(lab: &Lab, host: &str, command: &[String]) -> anyhow::Result<ExitCode> {
    let site = lab.host(host)?;
    let Some(init) = site.init() else { bail!("the host {host} is down") };
    if let Some(channel) = site.vm_channel() {
        return in_vm(&channel, command, IN_VM_S);
    }
    let error = std::process::Command::new("nsenter")
        .args(["-t", &init.pid.to_string(), "-m", "-u", "-i", "-n", "-p", "--"])
        .args(command)
        .env("PATH", supercloud_lab::command::path_with_sbin())
        .exec();
    Err(error).context("running nsenter")
}

/// How long a command in a VM may take that a person has typed, in seconds.
const IN_VM_S: u64 = 600;

fn in_vm(channel: &Path, command: &[String], seconds: u64) -> anyhow::Result<ExitCode> {
    let ran = host_init::run(channel, command, std::time::Duration::from_secs(seconds))?;
    std::io::stdout().write_all(ran.out.as_bytes())?;
    std::io::stderr().write_all(ran.err.as_bytes())?;
    Ok(ExitCode::from(u8::try_from(ran.status).unwrap_or(1)))
}
