//! `supercloud volume ...`: histories.

use clap::{Args, Subcommand};
use supercloud_api::HistoryBand;

use super::{Trial, Watch};
use crate::values;

/// An instant of the past.
#[derive(Debug, Clone, Default, Args)]
#[group(multiple = false)]
pub struct Instant {
    /// As of this time: 2026-11-22T08:30:00 or 2026-11-22T08:30 (UTC), or milliseconds since 1970.
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    pub as_of: Option<u64>,
    /// As of so long ago: 90s, 15m, 2h, 7d.
    #[arg(long, value_name = "SPAN", value_parser = values::span_s)]
    pub ago: Option<u64>,
}

/// Verbs of volumes' histories.
#[derive(Debug, Subcommand)]
pub enum HistoryVerb {
    /// The points that are kept of a volume; with an instant, which of them that means.
    #[command(after_help = "Examples:\n  supercloud volume history web\n  supercloud volume history web --ago 2h\n  \
        supercloud volume history web --verify --noted 4f3c...   # the hash that was newest once")]
    History {
        /// The volume's name or id.
        name: String,
        /// Which instant.
        #[command(flatten)]
        instant: Instant,
        /// Check, here, that each point is what was written and none is missing but what thinning took.
        #[arg(long, conflicts_with_all = ["as_of", "ago"])]
        verify: bool,
        /// Also that a point with this hash (noted when it was the newest) is among them still.
        #[arg(long, value_name = "HASH", requires = "verify")]
        noted: Option<String>,
    },
    /// Says how often points of a volume are taken and how long they are kept. Without `--every` they are taken by `point` and by
    /// freezes alone.
    #[command(
        after_help = "Examples:\n  supercloud volume keep web --every 15m --for 4h:15m --for 2d:1h --for 30d:1d\n  \
        supercloud volume keep web --for 7d:1h\n  supercloud volume keep web --every 5m --for 1h:5m --memory\n  \
        supercloud volume keep web --off"
    )]
    Keep {
        /// The volume's name or id.
        name: String,
        /// A point is taken this often: 1m to 30d.
        #[arg(long, value_name = "SPAN", value_parser = values::span_s)]
        every: Option<u64>,
        /// Points not older than the first are thinned to gaps of at most the second; may be given again, younger ones first.
        #[arg(long = "for", value_name = "AGE:GAP", value_parser = values::band, required_unless_present = "off")]
        bands: Vec<HistoryBand>,
        /// Take points with the memory of the running guest: checkpoints, from which it can go on (`guest thaw --checkpoint`). The memory
        /// of the newest so many is kept (1 to 20; 2 when not said).
        #[arg(long, value_name = "NEWEST", num_args = 0..=1)]
        memory: Option<Option<u32>>,
        /// Keep no history: all points go.
        #[arg(long, conflicts_with_all = ["every", "bands", "memory"])]
        off: bool,
        /// Whether it is only tried.
        #[command(flatten)]
        trial: Trial,
    },
    /// Takes a point of a running guest's volume now.
    Point {
        /// The volume's name or id.
        name: String,
    },
    /// Makes a guest whose disk is a volume as of a past instant; no bytes are copied. Image, network and shape are those of the
    /// volume's guest unless given.
    #[command(after_help = "Examples:\n  supercloud volume clone web --ago 2h --guest web-then --dry-run\n  \
        supercloud volume clone web --as-of 2026-11-22T08:30 --guest web-then\n  \
        supercloud volume clone web --point 17 --guest web-then --network lab --no-start")]
    Clone(CloneArguments),
}

/// What a clone is made of.
#[derive(Debug, Args)]
pub struct CloneArguments {
    /// The volume's name or id.
    pub name: String,
    /// Which instant; now when nothing is said.
    #[command(flatten)]
    pub instant: Instant,
    /// The point of this number.
    #[arg(long, conflicts_with_all = ["as_of", "ago"])]
    pub point: Option<u64>,
    /// The name of the new guest, and of its volume.
    #[arg(long)]
    pub guest: String,
    /// Its network; that of the volume's guest when absent.
    #[arg(long)]
    pub network: Option<String>,
    /// vCPUs and memory, as in 2x4G; those of the volume's guest when absent.
    #[arg(long, value_parser = values::shape)]
    pub shape: Option<supercloud_api::Shape>,
    /// A host or a cloud; anywhere with room when absent.
    #[arg(long)]
    pub place: Option<String>,
    /// Make it, and do not start it.
    #[arg(long)]
    pub no_start: bool,
    /// Whether it is only tried.
    #[command(flatten)]
    pub trial: Trial,
    /// How to wait.
    #[command(flatten)]
    pub watch: Watch,
}
