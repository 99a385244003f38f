//! Verbs of groups.

use clap::Subcommand;

use super::{
    Trial, Watch,
    guest::{Memory, ThawedMemory},
};

/// Verbs of groups.
#[derive(Debug, Subcommand)]
pub enum GroupVerb {
    /// All groups.
    List,
    /// One group.
    Show {
        /// Name or id.
        name: String,
    },
    /// Makes a group: guests that are moved, frozen and thawed together, all or none.
    Create {
        /// Its name.
        name: String,
        /// Its guests, by name or id; 1 to 8.
        #[arg(required = true)]
        guests: Vec<String>,
    },
    /// Says which guests are the group's from now on: all of them are named.
    Set {
        /// Name or id of the group.
        name: String,
        /// Its guests, by name or id; 1 to 8.
        #[arg(required = true)]
        guests: Vec<String>,
    },
    /// Deletes a group; its guests stay as they are.
    Delete {
        /// Name or id.
        name: String,
    },
    /// Moves all guests of a group live, or none: they change over in one transaction.
    Migrate {
        /// Name or id.
        name: String,
        /// A host or a cloud; guests that are there already stay.
        #[arg(long)]
        to: String,
        /// At most this much of the link, in Mbit/s, for each guest.
        #[arg(long)]
        bandwidth_mbps: Option<u64>,
        /// The pause that is aimed at, in milliseconds; a guest may stand still longer until the others are ready.
        #[arg(long)]
        max_downtime_ms: Option<u64>,
        /// Give up when the switch has not come by then, in seconds.
        #[arg(long)]
        deadline: Option<u64>,
        /// Do not slow guests down when they write faster than the link carries.
        #[arg(long)]
        no_auto_converge: bool,
        /// Which memory may follow after the guests run at the destination.
        #[arg(long, value_enum, default_value_t = Memory::PreCopy)]
        memory: Memory,
        /// Why, for the audit trail.
        #[arg(long)]
        reason: Option<String>,
        /// Whether it is only tried.
        #[command(flatten)]
        trial: Trial,
        /// How to wait.
        #[command(flatten)]
        watch: Watch,
    },
    /// Suspends all guests of a group into the image store, or none: a consistent cut, in which no effect is without its cause.
    Freeze {
        /// Name or id.
        name: String,
        /// Why, for the audit trail.
        #[arg(long)]
        reason: Option<String>,
        /// Whether it is only tried.
        #[command(flatten)]
        trial: Trial,
        /// How to wait.
        #[command(flatten)]
        watch: Watch,
    },
    /// Resumes all guests of a frozen group, or none.
    Thaw {
        /// Name or id.
        name: String,
        /// A host or a cloud; anywhere with room when absent.
        #[arg(long)]
        to: Option<String>,
        /// Whether they wait for their memory.
        #[arg(long)]
        memory: Option<ThawedMemory>,
        /// Why, for the audit trail.
        #[arg(long)]
        reason: Option<String>,
        /// Whether it is only tried.
        #[command(flatten)]
        trial: Trial,
        /// How to wait.
        #[command(flatten)]
        watch: Watch,
    },
}
