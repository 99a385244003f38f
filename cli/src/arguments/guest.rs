//! `supercloud guest ...`

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use supercloud_api::{CpuChoice, Fencing, MemoryMode, OnLoss, Shape, ThawMemory};

use super::{Trial, Watch};
use crate::values;

/// Which memory of a guest that moves may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Memory {
    /// None of it.
    PreCopy,
    /// What it writes faster than the link carries.
    Hybrid,
    /// All of it.
    PostCopy,
}

impl From<Memory> for MemoryMode {
    fn from(memory: Memory) -> Self {
        match memory {
            Memory::PreCopy => Self::PreCopy,
            Memory::Hybrid => Self::Hybrid,
            Memory::PostCopy => Self::PostCopy,
        }
    }
}

/// Whether a thawed guest waits for its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ThawedMemory {
    /// It runs at once, and its memory follows.
    Lazy,
    /// It runs when all of it is there.
    Whole,
}

impl From<ThawedMemory> for ThawMemory {
    fn from(memory: ThawedMemory) -> Self {
        match memory {
            ThawedMemory::Lazy => Self::Lazy,
            ThawedMemory::Whole => Self::Whole,
        }
    }
}

/// Who may say that a mirrored guest does not run at a host that is silent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MirrorFencing {
    /// You (`guest failover`), or the host's provider.
    Manual,
    /// The clock: the guest stands still by itself when its lease runs out, and its standby takes over by itself after that.
    Lease,
}

impl From<MirrorFencing> for Fencing {
    fn from(fencing: MirrorFencing) -> Self {
        match fencing {
            MirrorFencing::Manual => Self::Manual,
            MirrorFencing::Lease => Self::Lease,
        }
    }
}

/// Verbs of guests.
#[derive(Debug, Subcommand)]
pub enum GuestVerb {
    /// All guests.
    List,
    /// One guest.
    Show {
        /// Name or id.
        name: String,
    },
    /// Where a guest would go now, and what every host says to it.
    Placement {
        /// Name or id.
        name: String,
        /// Only this host or cloud.
        #[arg(long)]
        place: Option<String>,
    },
    /// Makes a guest and starts it.
    Create(GuestCreateArguments),
    /// Shows a guest's serial console and types into it; Ctrl-] ends it.
    #[command(after_help = "Examples:\n  supercloud guest console web                 # Ctrl-] ends it\n  \
        supercloud guest console web --read-only | tee boot.log\n\nIt stays with the guest while that moves. Of several \
        that look at one guest, the newest sees it.")]
    Console {
        /// Name or id.
        name: String,
        /// Only look; nothing is typed, and any input is left alone.
        #[arg(long, short)]
        read_only: bool,
    },
    /// Starts a stopped guest.
    Start {
        /// Name or id.
        name: String,
        /// A host or a cloud; where its volume is when absent.
        #[arg(long)]
        place: Option<String>,
        /// Another CPU from this start on: `portable`, `host`, `x86-64-v2`, `x86-64-v3` or `x86-64-v4`.
        #[arg(long)]
        cpu: Option<CpuChoice>,
        /// Whether it is only tried.
        #[command(flatten)]
        trial: Trial,
        /// How to wait.
        #[command(flatten)]
        watch: Watch,
    },
    /// Stops a guest; its disk is kept.
    Stop {
        /// Name or id.
        name: String,
        /// Pull the plug at once.
        #[arg(long)]
        force: bool,
        /// Whether it is only tried.
        #[command(flatten)]
        trial: Trial,
        /// How to wait.
        #[command(flatten)]
        watch: Watch,
    },
    /// Moves a running guest live: with its memory, disk, address and connections.
    #[command(
        after_help = "Examples:\n  supercloud guest migrate web --to oak\n  supercloud guest migrate web --to gcp-west --memory hybrid \
        --dry-run"
    )]
    Migrate {
        /// Name or id.
        name: String,
        /// A host or a cloud.
        #[arg(long)]
        to: String,
        /// At most this much of the link, in Mbit/s.
        #[arg(long)]
        bandwidth_mbps: Option<u64>,
        /// The pause that is aimed at, in milliseconds.
        #[arg(long)]
        max_downtime_ms: Option<u64>,
        /// Give up when the switch has not come by then, in seconds.
        #[arg(long)]
        deadline: Option<u64>,
        /// Do not slow the guest down when it writes faster than the link carries.
        #[arg(long)]
        no_auto_converge: bool,
        /// Which memory may follow after the guest runs at the destination: what it writes faster than the link carries (hybrid), or
        /// all of it (post-copy). Until all has come, the loss of the host that it has left loses the guest.
        #[arg(long, value_enum, default_value_t = Memory::PreCopy)]
        memory: Memory,
        /// Say what would be done, and do nothing.
        #[arg(long)]
        dry_run: bool,
        /// Why, for the audit trail.
        #[arg(long)]
        reason: Option<String>,
        /// How to wait.
        #[command(flatten)]
        watch: Watch,
    },
    /// Keeps a second copy of a running guest at another host, up to date cut by cut, until you end it (`guest unmirror`) or it
    /// takes over (`guest failover`).
    #[command(
        after_help = "Examples:\n  supercloud guest mirror web --to oak\n  supercloud guest mirror web --to oak --strict \
        --interval-ms 200\n  supercloud guest mirror web --to oak --fencing lease     # fails over by \
        itself\n  supercloud guest mirror web --to oak --keep      # and again elsewhere, after a fail-over\n  \
        supercloud guest mirrors web"
    )]
    Mirror {
        /// Name or id.
        name: String,
        /// A host or a cloud.
        #[arg(long)]
        to: String,
        /// From one cut to the next, in milliseconds; 1,000 when absent.
        #[arg(long)]
        interval_ms: Option<u64>,
        /// Hold back what the guest says until the standby has the cut that it belongs to: nothing that anybody has seen is ever
        /// lost, and each answer takes up to an interval longer.
        #[arg(long)]
        strict: bool,
        /// Who may say that the guest does not run at a host that is silent: you, or the clock.
        #[arg(long, value_enum, default_value_t = MirrorFencing::Manual)]
        fencing: MirrorFencing,
        /// With `--fencing lease`: how long the guest may run unheard, in milliseconds; 15,000 when absent.
        #[arg(long)]
        lease_ms: Option<u64>,
        /// Begin another one whenever it has taken over or has broken: there, in another cloud, or at another host.
        #[arg(long)]
        keep: bool,
        /// At most this much of the link, in Mbit/s.
        #[arg(long)]
        bandwidth_mbps: Option<u64>,
        /// Say what would be done, and do nothing.
        #[arg(long)]
        dry_run: bool,
        /// Why, for the audit trail.
        #[arg(long)]
        reason: Option<String>,
        /// Return at once, not when the standby has its first whole cut.
        #[arg(long)]
        no_wait: bool,
    },
    /// The guest's mirrors: where they are, how old what they have is.
    Mirrors {
        /// Name or id.
        name: String,
    },
    /// Ends the guest's mirror, and sees to it that none is begun again.
    Unmirror {
        /// Name or id.
        name: String,
        /// Whether it is only tried.
        #[command(flatten)]
        trial: Trial,
    },
    /// Has the standby of a mirrored guest take over, whose host is dead. Two running copies of a guest do harm that nobody can
    /// undo: make sure that the host is off (the provider says terminated, or you switched it off).
    #[command(after_help = "Example:\n  supercloud guest failover web --host-is-dead")]
    Failover {
        /// Name or id.
        name: String,
        /// You know that the guest's host does not run any more.
        #[arg(long)]
        host_is_dead: bool,
        /// Why, for the audit trail.
        #[arg(long)]
        reason: Option<String>,
        /// How to wait.
        #[command(flatten)]
        watch: Watch,
    },
    /// Suspends a guest into the image store; nothing runs any more, nothing is lost.
    Freeze {
        /// Name or id.
        name: String,
        /// Whether it is only tried.
        #[command(flatten)]
        trial: Trial,
        /// How to wait.
        #[command(flatten)]
        watch: Watch,
    },
    /// Takes a checkpoint of a running guest now: memory, devices and disk of one instant, while it runs on. It is a point of its
    /// volume's history (`volume history`); `volume keep --memory` takes them by themselves.
    Checkpoint {
        /// Name or id.
        name: String,
    },
    /// Resumes a frozen guest, anywhere, once; with `--checkpoint`, one that is lost or stopped, from there.
    #[command(after_help = "Examples:\n  supercloud guest thaw web\n  supercloud guest thaw web --memory whole\n  \
        supercloud guest thaw web --checkpoint\n  \
        supercloud guest thaw web --checkpoint 17 --to oak --dry-run")]
    Thaw {
        /// Name or id.
        name: String,
        /// A host or a cloud; anywhere with room when absent.
        #[arg(long)]
        to: Option<String>,
        /// Set it back to its newest checkpoint, or to this point: what it wrote after it, to memory and disk, is given up.
        #[arg(long, value_name = "POINT", num_args = 0..=1)]
        checkpoint: Option<Option<u64>>,
        /// Whether it waits for its memory: it runs at once and its memory follows (lazy), or it runs when all of it is there (whole);
        /// lazy where the host and what was frozen allow it when absent.
        #[arg(long)]
        memory: Option<ThawedMemory>,
        /// Whether it is only tried.
        #[command(flatten)]
        trial: Trial,
        /// How to wait.
        #[command(flatten)]
        watch: Watch,
    },
    /// Whether guests could leave in time when the provider takes their hosts back, as moves were measured; `-o wide` says why.
    Evacuations,
    /// How good it was: what guests missed of the time that they were to run, how moves paused them, which deadlines were missed.
    #[command(
        after_help = "Examples:\n  supercloud guest reliability\n  supercloud guest reliability web --days 7 -o wide"
    )]
    Reliability {
        /// Name or id; all guests when absent. One that was deleted, by its id.
        name: Option<String>,
        /// So many days back from now.
        #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=366))]
        days: u64,
    },
    /// Lets price policies move the guest, or not.
    FollowPrices {
        /// Name or id.
        name: String,
        /// `true` or `false`.
        #[arg(action = clap::ArgAction::Set)]
        follow: bool,
    },
    /// Says what is done by itself when the guest's process is gone, or its host was removed or taken back: a host that is merely
    /// silent is not lost. A mirror takes over in any case.
    #[command(after_help = "Example:\n  supercloud guest on-loss web restart-from-volume\n  \
        supercloud guest on-loss web thaw-checkpoint")]
    OnLoss {
        /// Name or id.
        name: String,
        /// What.
        #[arg(value_parser = values::on_loss())]
        what: OnLoss,
    },
    /// Deletes a guest that does not run, with its disk and address.
    Delete {
        /// Name or id.
        name: String,
        /// Whether it is only tried.
        #[command(flatten)]
        trial: Trial,
        /// How to wait.
        #[command(flatten)]
        watch: Watch,
    },
}

/// Options of `guest create`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  supercloud guest create web --image debian --vcpus 1 --memory 512 --network lan \
    --place aws-east --cloud-init user-data.yaml")]
pub struct GuestCreateArguments {
    /// Its name.
    pub name: String,
    /// The image its disk starts from.
    #[arg(long)]
    pub image: String,
    /// Virtual CPUs and memory in one word: 2x1024 (MiB), 2x4G; in place of --vcpus and --memory.
    #[arg(long, value_name = "VCPUSxMEMORY", value_parser = values::shape, conflicts_with_all = ["vcpus", "memory"])]
    pub shape: Option<Shape>,
    /// Virtual CPUs.
    #[arg(long, default_value_t = 1)]
    pub vcpus: u32,
    /// Memory in MiB.
    #[arg(long, default_value_t = 512)]
    pub memory: u64,
    /// The network it is attached to.
    #[arg(long)]
    pub network: String,
    /// Its address there; the first free one when absent.
    #[arg(long)]
    pub ipv4: Option<std::net::Ipv4Addr>,
    /// A host or a cloud; anywhere with room when absent.
    #[arg(long)]
    pub place: Option<String>,
    /// The disk's size in GiB; that of the image when absent.
    #[arg(long)]
    pub disk: Option<u64>,
    /// A file with cloud-init user-data.
    #[arg(long)]
    pub cloud_init: Option<PathBuf>,
    /// Appended to the image's kernel command line.
    #[arg(long)]
    pub cmdline_extra: Option<String>,
    /// Let price policies move it.
    #[arg(long)]
    pub follow_prices: bool,
    /// What its processors can do, and so where it can go while it runs: `portable` (what all hosts have, and no more than
    /// x86-64-v3), `host` (all that its first host has), `x86-64-v2`, `x86-64-v3` or `x86-64-v4`; `supercloud guest placement`
    /// shows what each gives up and opens.
    #[arg(long, default_value_t)]
    pub cpu: CpuChoice,
    /// What is done by itself when its running copy is lost: `nothing`, `restart-from-volume` or `thaw-checkpoint`.
    #[arg(long, value_parser = values::on_loss(), default_value = "nothing")]
    pub on_loss: OnLoss,
    /// Make it, but do not start it.
    #[arg(long)]
    pub no_start: bool,
    /// Whether it is only tried.
    #[command(flatten)]
    pub trial: Trial,
    /// How to wait.
    #[command(flatten)]
    pub watch: Watch,
}
