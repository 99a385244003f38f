//! The command line: `supercloud NOUN VERB`.

mod group;
mod guest;
mod plan;
mod volume;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use supercloud_api::Role;
use supercloud_cli::disk_file::Format;

pub use group::GroupVerb;
pub use guest::{GuestCreateArguments, GuestVerb};
pub use plan::{PlanAim, PlanVerb};
pub use volume::{CloneArguments, HistoryVerb, Instant};

use crate::{settings::Connection, values};

const EXAMPLES: &str = "\
Examples:
  supercloud guest list
  supercloud image import disk.qcow2 --name debian
  supercloud guest create web --image debian --memory 512 --network lan --place aws-east
  supercloud guest migrate web --to gcp-west --watch
  supercloud guest freeze web && supercloud guest thaw web --to home
  supercloud apply -f fleet.toml --dry-run";

/// Moves virtual machines above clouds: run, move, freeze and thaw guests wherever their hosts are.
#[derive(Debug, Parser)]
#[command(
    name = "supercloud",
    version,
    after_help = format!("{EXAMPLES}\n\n{}", crate::exit::HELP)
)]
pub struct Arguments {
    /// Where the controller is.
    #[command(flatten)]
    pub connection: Connection,
    /// How results are printed.
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    /// What to do.
    #[command(subcommand)]
    pub noun: Noun,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For people who want to know more: tables with all columns.
    Wide,
    /// For programs: what REST answered.
    Json,
    /// The same, a line for each thing.
    Ndjson,
    /// The same, easier on the eye.
    Yaml,
}

impl Output {
    /// Whether it is words and tables; else it is what REST answered.
    pub const fn is_for_people(self) -> bool {
        matches!(self, Self::Table | Self::Wide)
    }
}

/// What the command is about.
#[derive(Debug, Subcommand)]
pub enum Noun {
    /// Machines that run agents.
    #[command(subcommand)]
    Host(HostVerb),
    /// Provider regions or zones.
    #[command(subcommand)]
    Cloud(CloudVerb),
    /// Where the chunks of images, volumes and freezes lie: a cloud's, and the controller's own.
    #[command(subcommand)]
    Store(StoreVerb),
    /// Tenants.
    #[command(subcommand)]
    Project(ProjectVerb),
    /// Access tokens.
    #[command(subcommand)]
    Token(TokenVerb),
    /// Content that guests start from.
    #[command(subcommand)]
    Image(ImageVerb),
    /// Guests' disks.
    #[command(subcommand)]
    Volume(VolumeVerb),
    /// How hosts reach each other: round-trip times and loss, as their agents measure them.
    #[command(subcommand)]
    Link(LinkVerb),
    /// Private networks.
    #[command(subcommand)]
    Network(NetworkVerb),
    /// Virtual machines.
    #[command(subcommand)]
    Guest(GuestVerb),
    /// Guests that are moved, frozen and thawed together, all or none.
    #[command(subcommand)]
    Group(GroupVerb),
    /// Moves of guests: an operation of kind `guest_migrate`.
    #[command(subcommand)]
    Migration(OperationVerb),
    /// Long-running pieces of work.
    #[command(subcommand)]
    Operation(OperationVerb),
    /// Moves of many guests, decided together: looked at first, then applied; cancelled, or taken back.
    #[command(subcommand)]
    Plan(PlanVerb),
    /// What happened.
    #[command(subcommand)]
    Event(EventVerb),
    /// What can be rented, and for how much.
    #[command(subcommand)]
    Market(MarketVerb),
    /// What was paid.
    Ledger(crate::ledger::LedgerArguments),
    /// Replays policies on recorded markets, beside baselines and the offline optimum; needs no controller.
    Simulate(crate::simulate::Simulate),
    /// Who this token is.
    Whoami,
    /// Controllers that are known by a name: where each is, and with which token; needs no controller.
    #[command(subcommand)]
    Context(crate::contexts::ContextVerb),
    /// Makes everything as a file says: projects, networks, images, guests. Says first what would change.
    Apply(crate::apply::ApplyArguments),
    /// The same as `guest console`: a guest's serial console; Ctrl-] ends it.
    #[command(after_help = "Examples:\n  supercloud console web\n  supercloud console web --read-only | tee boot.log")]
    Console {
        /// Name or id.
        name: String,
        /// Only look; nothing is typed, and any input is left alone.
        #[arg(long, short)]
        read_only: bool,
    },
    /// The fleet at a glance, as it changes: alarms, moves, hosts, prices, guests.
    Top(crate::top::TopArguments),
    /// Any call of REST, as it is: what the other commands and the dashboard do, this does, too.
    #[command(after_help = "Examples:\n  supercloud api GET /v1/guests -o yaml\n  \
        supercloud api GET /v1/events --all -o ndjson\n  \
        supercloud api POST '/v1/guests/web/migrate?dry_run=true' --data '{\"to\":\"home\"}'\n  \
        supercloud api PATCH /v1/hosts/h1 --data @change.json")]
    Api(ApiArguments),
    /// What the things of the API are, and what their fields mean; needs no controller.
    #[command(
        after_help = "Examples:\n  supercloud explain\n  supercloud explain guest\n  supercloud explain operation.phase"
    )]
    Explain {
        /// A thing, or one of its fields; all things when absent.
        path: Option<String>,
    },
    /// Writes the manual pages, one per command: `man ./man/supercloud-guest-migrate.1`.
    Man {
        /// The folder that they are written to; it is made where it is missing.
        folder: PathBuf,
    },
    /// Prints a completion script: `source <(supercloud completion bash)`.
    Completion {
        /// For which shell.
        shell: clap_complete::Shell,
    },
}

/// A call of REST.
#[derive(Debug, Args)]
pub struct ApiArguments {
    /// GET, POST, PUT, PATCH or DELETE.
    pub method: String,
    /// The path with its query: `/v1/guests?limit=5`.
    pub path: String,
    /// The body: JSON, `@FILE`, or `-` for standard input.
    #[arg(short, long, value_name = "JSON")]
    pub data: Option<String>,
    /// All pages of a listing.
    #[arg(long)]
    pub all: bool,
}

/// Whether it is only tried.
#[derive(Debug, Clone, Copy, Args)]
pub struct Trial {
    /// Say what would be done, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// Verbs of hosts.
#[derive(Debug, Subcommand)]
pub enum HostVerb {
    /// All hosts.
    List,
    /// One host, with what its probe measured.
    Show {
        /// Name or id.
        name: String,
    },
    /// A one-time token with which a new host's agent joins.
    JoinToken {
        /// The name that the host will have.
        name: String,
        /// The cloud in which it stands.
        #[arg(long)]
        cloud: String,
        /// How long the token may be used, in seconds (at most 900).
        #[arg(long, default_value_t = 900)]
        expires: u32,
    },
    /// Rents a host from a cloud's provider and waits until its agent has joined.
    #[command(
        after_help = "Examples:\n  supercloud host rent h7 --cloud aws-east --type m7i.xlarge --spot --max-price 0.12\n  \
        supercloud host rent h8 --cloud home --type big      # own machines: prints a join token to start the agent with"
    )]
    Rent {
        /// The name that the host will have.
        name: String,
        /// Where.
        #[arg(long)]
        cloud: String,
        /// What, in the provider's words.
        #[arg(long = "type")]
        instance_type: String,
        /// On the spot market: cheaper, until the provider wants it back.
        #[arg(long)]
        spot: bool,
        /// The most to pay per hour on the spot market, in USD.
        #[arg(long, requires = "spot")]
        max_price: Option<String>,
        /// Say what would be done, and do nothing.
        #[arg(long)]
        dry_run: bool,
        /// How to wait.
        #[command(flatten)]
        watch: Watch,
    },
    /// Gives a rented host back. Refused while it runs guests, or others need what only it has.
    Return {
        /// The host's name or id, or the renting's id.
        name: String,
        /// Give up disk blocks, freezes and volumes that only this host has.
        #[arg(long)]
        force: bool,
        /// How to wait.
        #[command(flatten)]
        watch: Watch,
    },
    /// Hosts that are rented or on their way; `--all`: also those that were.
    Rentings {
        /// Also those that have ended.
        #[arg(long)]
        all: bool,
    },
    /// It takes no new guests from now on.
    Cordon {
        /// Name or id.
        name: String,
    },
    /// It takes guests again.
    Uncordon {
        /// Name or id.
        name: String,
    },
    /// Removes a host: its certificate is denied at once. Refused while others need what only this host has.
    Remove {
        /// Name or id.
        name: String,
        /// The machine does not run any more: give up disk blocks, freezes and volumes that only it has. Standbys of mirrors take
        /// over and guests whose on-loss says so start elsewhere, at once: of a machine that runs on, two copies of a guest would run.
        #[arg(long)]
        force: bool,
    },
}

/// Verbs of clouds.
#[derive(Debug, Subcommand)]
pub enum CloudVerb {
    /// All clouds.
    List,
    /// Makes a cloud known.
    Create {
        /// Its name.
        name: String,
        /// The driver that rents hosts there.
        #[arg(long, default_value = "static")]
        provider: String,
    },
}

/// Verbs of volumes.
#[derive(Debug, Subcommand)]
pub enum VolumeVerb {
    /// All of them.
    List,
    /// One.
    Show {
        /// Its name or id.
        name: String,
    },
    /// Where it lies: hosts that have blocks of it, stores that have what it stands on and what was kept of it.
    Sites {
        /// Its name or id.
        name: String,
    },
    /// Has all read that it stands on, in its cloud's store; what is missing or damaged is mended where it can be had elsewhere.
    Check {
        /// Its name or id.
        name: String,
        /// How fast to read, in millions of bytes per second.
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=100_000))]
        megabytes_per_s: u64,
    },
    /// As of past instants.
    #[command(flatten)]
    History(HistoryVerb),
    /// Writes what a volume holds, whose guest is frozen or was never started, to a file that is not there yet; as `image export`.
    #[command(
        after_help = "Example:\n  supercloud guest freeze web --watch && supercloud volume export web --format qcow2 web.qcow2"
    )]
    Export {
        /// Its name or id.
        name: String,
        /// The file.
        file: PathBuf,
        /// What to write: raw (zeros are holes), or qcow2 (version 3).
        #[arg(long, value_enum, default_value = "raw")]
        format: ExportFormat,
    },
}

/// Verbs of chunk stores.
#[derive(Debug, Subcommand)]
pub enum StoreVerb {
    /// All stores, with what the last sweeps found.
    List,
    /// Has a store swept now: what no image, volume or freeze names any more is removed, unless it was written lately.
    Sweep {
        /// A cloud, or `controller`.
        name: String,
        /// The controller's records were brought back from a backup, and all guests that run are known again: what hosts were
        /// told by the controller before counts no more.
        #[arg(long)]
        accept_records: bool,
    },
}

/// Verbs of projects.
#[derive(Debug, Subcommand)]
pub enum ProjectVerb {
    /// All projects.
    List,
    /// Makes a project.
    Create {
        /// Its name.
        name: String,
    },
}

/// Verbs of tokens.
#[derive(Debug, Subcommand)]
pub enum TokenVerb {
    /// All tokens, without their secrets.
    List,
    /// Makes a token; its secret is printed once.
    Create {
        /// What it is for.
        name: String,
        /// The project it is good for; `*` for all.
        #[arg(long)]
        project_scope: String,
        /// What its bearer may do.
        #[arg(long, value_parser = values::roles())]
        role: Role,
        /// How long it works, in seconds; until deleted when absent.
        #[arg(long)]
        expires: Option<u64>,
    },
    /// Deletes a token.
    Delete {
        /// Its id.
        id: String,
    },
}

/// Verbs of images.
#[derive(Debug, Subcommand)]
pub enum ImageVerb {
    /// All images.
    List,
    /// One image.
    Show {
        /// Name or id.
        name: String,
    },
    /// Where its content lies, as far as the controller knows.
    Sites {
        /// Name or id.
        name: String,
    },
    /// Imports a disk (raw or qcow2), alone or with a kernel to boot directly.
    #[command(after_help = "Examples:\n  supercloud image import disk.qcow2 --name debian\n  \
        supercloud image import root.raw --name lean --kernel vmlinuz --initrd initrd.img --cmdline 'console=ttyS0'")]
    Import {
        /// The disk's file.
        file: PathBuf,
        /// The image's name; that of the file without its extension when absent.
        #[arg(long)]
        name: Option<String>,
        /// A kernel to boot directly.
        #[arg(long)]
        kernel: Option<PathBuf>,
        /// Its initial RAM disk.
        #[arg(long, requires = "kernel")]
        initrd: Option<PathBuf>,
        /// Its command line.
        #[arg(long, requires = "kernel")]
        cmdline: Option<String>,
    },
    /// Writes what an image holds to a file that is not there yet, checked against the image's identity as it comes.
    ///
    /// Until it is whole the file is called FILE.supercloud-part; after an interruption the same command goes on from there,
    /// when it has checked what is in it.
    #[command(after_help = "Examples:\n  supercloud image export debian --format qcow2 debian.qcow2\n  \
        supercloud image export lean --part kernel vmlinuz")]
    Export {
        /// Name or id.
        name: String,
        /// The file.
        file: PathBuf,
        /// What to write: raw (zeros are holes), or qcow2 (version 3; disks only).
        #[arg(long, value_enum, default_value = "raw")]
        format: ExportFormat,
        /// Which of its files.
        #[arg(long, value_enum, default_value = "disk")]
        part: ExportPart,
    },
    /// Deletes an image that no volume needs.
    Delete {
        /// Name or id.
        name: String,
    },
}

/// What a content is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    /// The bytes as they are.
    Raw,
    /// QEMU's format.
    Qcow2,
}

impl From<ExportFormat> for Format {
    fn from(format: ExportFormat) -> Self {
        match format {
            ExportFormat::Raw => Self::Raw,
            ExportFormat::Qcow2 => Self::Qcow2,
        }
    }
}

/// A file of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportPart {
    /// The disk.
    Disk,
    /// The kernel.
    Kernel,
    /// Its initial RAM disk.
    Initrd,
}

/// Verbs of links.
#[derive(Debug, Subcommand)]
pub enum LinkVerb {
    /// The ways between hosts, each direction by itself.
    List {
        /// Only those from and to this host.
        #[arg(long)]
        host: Option<String>,
    },
}

/// Verbs of networks.
#[derive(Debug, Subcommand)]
pub enum NetworkVerb {
    /// All networks.
    List,
    /// One network.
    Show {
        /// Name or id.
        name: String,
    },
    /// Makes a network.
    Create {
        /// Its name.
        name: String,
        /// Its IPv4 prefix, for example 10.20.0.0/24.
        #[arg(long)]
        cidr: String,
        /// A name server told to guests; may be given again.
        #[arg(long)]
        dns: Vec<std::net::Ipv4Addr>,
    },
    /// The ports of a network: which guest has which address, and where.
    Ports {
        /// Name or id; all networks when absent.
        network: Option<String>,
    },
    /// What the switch of its host holds for a guest's port now, with what has passed by each flow.
    Flows {
        /// The guest, by name or id; or the id of a port.
        of: String,
    },
    /// Deletes a network without ports.
    Delete {
        /// Name or id.
        name: String,
    },
}

/// How to wait.
#[derive(Debug, Clone, Copy, Args)]
pub struct Watch {
    /// Show the progress until it has ended (the default on a terminal).
    #[arg(long, conflicts_with = "no_watch")]
    pub watch: bool,
    /// Return as soon as the operation is accepted.
    #[arg(long)]
    pub no_watch: bool,
}

/// Verbs of operations.
#[derive(Debug, Subcommand)]
pub enum OperationVerb {
    /// All of them.
    List,
    /// One of them.
    Show {
        /// Its id.
        id: String,
    },
    /// Shows the progress until it has ended.
    Watch {
        /// Its id.
        id: String,
    },
    /// Cancels it; possible until the switch.
    Cancel {
        /// Its id.
        id: String,
    },
}

/// Verbs of events.
#[derive(Debug, Subcommand)]
pub enum EventVerb {
    /// Events so far.
    List {
        /// Only those after this number.
        #[arg(long, default_value_t = 0)]
        after: u64,
    },
    /// Events as they happen.
    Watch {
        /// From after this number.
        #[arg(long, default_value_t = 0)]
        after: u64,
    },
    /// Checks the chain of hashes from the first event on.
    Verify,
}

/// Verbs of markets.
#[derive(Debug, Subcommand)]
pub enum MarketVerb {
    /// All markets with their prices now.
    List,
    /// What policies decided for guests: the market that is chosen for each, and the one that comes after it.
    Verdicts,
    /// The prices of one market up to now.
    Prices {
        /// `<cloud>/<instance type>/<spot|on_demand>`.
        market: String,
    },
}
