//! The command line: `supercloud NOUN VERB`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use supercloud_api::{Role, Shape};

use crate::{settings::Connection, values};

/// Moves virtual machines above clouds: run, move, freeze and thaw guests wherever their hosts are.
#[derive(Debug, Parser)]
#[command(
    name = "supercloud",
    version,
    after_help = "Examples:\n  \
        supercloud guest list\n  \
        supercloud image import disk.qcow2 --name debian\n  \
        supercloud guest create web --image debian --memory 512 --network lan --place aws-east\n  \
        supercloud guest migrate web --to gcp-west --watch\n  \
        supercloud guest freeze web && supercloud guest thaw web --to home\n\n\
        Exit codes: 0 done; 1 cannot reach the controller or a local fault; 2 wrong usage; \
        3 the controller refused; 4 the operation failed or was rolled back; \
        130 watching was interrupted, and the operation goes on."
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
    /// For programs: what REST answered.
    Json,
    /// The same, a line for each thing.
    Ndjson,
    /// The same, easier on the eye.
    Yaml,
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
    Volume(ListShow),
    /// Private networks.
    #[command(subcommand)]
    Network(NetworkVerb),
    /// Virtual machines.
    #[command(subcommand)]
    Guest(GuestVerb),
    /// Moves of guests: an operation of kind `guest_migrate`.
    #[command(subcommand)]
    Migration(OperationVerb),
    /// Long-running pieces of work.
    #[command(subcommand)]
    Operation(OperationVerb),
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

/// Verbs of what can only be looked at.
#[derive(Debug, Subcommand)]
pub enum ListShow {
    /// All of them.
    List,
    /// One of them.
    Show {
        /// Name or id.
        name: String,
    },
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
        /// Give up disk blocks, freezes and volumes that only this host has.
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
    /// Deletes an image that no volume needs.
    Delete {
        /// Name or id.
        name: String,
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
    /// Starts a stopped guest.
    Start {
        /// Name or id.
        name: String,
        /// A host or a cloud; where its volume is when absent.
        #[arg(long)]
        place: Option<String>,
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
    /// Resumes a frozen guest, anywhere, once.
    Thaw {
        /// Name or id.
        name: String,
        /// A host or a cloud; anywhere with room when absent.
        #[arg(long)]
        to: Option<String>,
        /// Whether it is only tried.
        #[command(flatten)]
        trial: Trial,
        /// How to wait.
        #[command(flatten)]
        watch: Watch,
    },
    /// Lets price policies move the guest, or not.
    FollowPrices {
        /// Name or id.
        name: String,
        /// `true` or `false`.
        #[arg(action = clap::ArgAction::Set)]
        follow: bool,
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
    /// The prices of one market up to now.
    Prices {
        /// `<cloud>/<instance type>/<spot|on_demand>`.
        market: String,
    },
}
