//! `supercloud plan`: its verbs.

use clap::{Args, Subcommand};
use supercloud_api::ids::PlanId;

use super::{Trial, Watch};

/// Verbs of plans.
#[derive(Debug, Subcommand)]
pub enum PlanVerb {
    /// The plans that are kept.
    List,
    /// One plan with its steps, what it costs, and what may go otherwise.
    Show {
        /// Its id.
        id: PlanId,
    },
    /// Makes a plan. Nothing moves before it is applied.
    #[command(after_help = "Examples:\n  supercloud plan create drain h3 --dry-run\n  \
        supercloud plan create evacuate aws-east --reason 'price'\n  \
        supercloud plan create rebalance --band 15\n  \
        supercloud plan create gather web db cache --to gcp-west\n  \
        supercloud plan apply pln-0192... --watch")]
    Create(PlanCreateArguments),
    /// Has a plan carried out, step by step.
    Apply {
        /// Its id.
        id: PlanId,
        /// Whether it is only tried.
        #[command(flatten)]
        trial: Trial,
        /// How to wait.
        #[command(flatten)]
        watch: Watch,
    },
    /// Has a plan stop: nothing more begins, moves under way are cancelled where that is still possible, what is done stays.
    Cancel {
        /// Its id.
        id: PlanId,
        /// How to wait.
        #[command(flatten)]
        watch: Watch,
    },
    /// Has a plan that has come to rest taken back: its cordons, and its moves, the last first.
    Undo {
        /// Its id.
        id: PlanId,
        /// Whether it is only tried.
        #[command(flatten)]
        trial: Trial,
        /// How to wait.
        #[command(flatten)]
        watch: Watch,
    },
    /// Shows a plan's progress until it has come to rest.
    Watch {
        /// Its id.
        id: PlanId,
    },
}

/// A plan to make.
#[derive(Debug, Args)]
pub struct PlanCreateArguments {
    /// What it is for.
    #[command(subcommand)]
    pub aim: PlanAim,
}

/// What the aims have in common.
#[derive(Debug, Clone, Args)]
pub struct Making {
    /// Only show it: it is not kept.
    #[arg(long)]
    pub dry_run: bool,
    /// Why, for the audit trail.
    #[arg(long)]
    pub reason: Option<String>,
}

/// What a plan is for.
#[derive(Debug, Subcommand)]
pub enum PlanAim {
    /// Everything off one host, which takes no new guests from then on.
    Drain {
        /// The host.
        host: String,
        /// How.
        #[command(flatten)]
        making: Making,
    },
    /// Everything off all hosts of a cloud, which take no new guests from then on.
    Evacuate {
        /// The cloud.
        cloud: String,
        /// How.
        #[command(flatten)]
        making: Making,
    },
    /// From loaded hosts to less loaded ones.
    Rebalance {
        /// How far apart the loads of two hosts may be, in percent of a host; 20 when absent.
        #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=100))]
        band: Option<u32>,
        /// How.
        #[command(flatten)]
        making: Making,
    },
    /// These guests to a place: all of them, or none.
    Gather {
        /// The guests.
        #[arg(required = true)]
        guests: Vec<String>,
        /// A host or a cloud.
        #[arg(long)]
        to: String,
        /// How.
        #[command(flatten)]
        making: Making,
    },
}
