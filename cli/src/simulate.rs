//! `supercloud simulate`: policies on recorded markets, beside baselines and the offline optimum.

mod deadlines;
mod sun;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{IsTerminal as _, Read as _, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use supercloud_cli::table::Table;
use supercloud_feed::{MAX_FEED_BYTES, recorded};
use supercloud_scheduler::{
    cluster::{
        Room,
        rent::{self, Offer},
    },
    market::{Regime, Trace},
    money::NanoUsd,
    policy::{Cheapest, Greedy, Guest, OnDemand, Policy, Restart, Single, SmartSpot},
    price::CheapestWithHysteresis,
    sim::{
        self, Grid, LineKind, Outcome, Settings,
        fleet::Fleet,
        hazard::{Followed, Half},
        optimum,
    },
};

use crate::arguments::Output;

/// Milliseconds in a day.
const DAY_MS: u64 = 86_400_000;

/// What to replay.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    supercloud simulate --trace sample\n  \
    supercloud simulate --trace prices-2015-us-east-1.csv.gz --policy smart-spot\n  \
    supercloud simulate --trace prices-2021-us-east-1.csv.gz --capacity capacity.csv --resource intel_64 --notice 30\n  \
    supercloud simulate --trace prices.csv --policy mine.toml --policy smart-spot --part second -o json\n  \
    supercloud simulate --work-hours 24 --deadline-hours 28 --capacity capacity.csv --part second\n  \
    supercloud simulate --sun --days 7\n\n\
    A policy file: kind = \"smart-spot\" or \"cheapest\", name = \"mine\", and that policy's settings, for example\n  \
    kind = \"smart-spot\"\n  name = \"patient\"\n  horizon_ms = 86400000\n\n\
    Prices: CSV timestamp_utc,zone,instance_type,usd_per_hour (also .gz). `--trace sample` is generated, not recorded:\n  \
    its prices swing about a mean without interruptions, so that following them saves little.")]
pub struct Simulate {
    /// Recorded spot prices; `sample`: a generated one.
    #[arg(long, required_unless_present_any = ["work_hours", "sun"], conflicts_with_all = ["work_hours", "sun"])]
    trace: Option<PathBuf>,
    /// Instead of a fleet, jobs of so many hours of work, one begun every four hours of each recording of `--capacity`.
    #[arg(long, requires_all = ["deadline_hours", "capacity"], value_parser = clap::value_parser!(u32).range(1..=10_000))]
    work_hours: Option<u32>,
    /// The hours in which a job must be done.
    #[arg(long, requires = "work_hours", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    deadline_hours: Option<u32>,
    /// How long a job stands still when it changes hosts, in seconds; rounded up to ticks.
    #[arg(long, default_value_t = 300, requires = "work_hours", value_parser = clap::value_parser!(u64).range(0..=36_000))]
    change: u64,
    /// What spot costs a job, in thousandths of on-demand: recordings of capacity have no prices.
    #[arg(long, default_value_t = 300, requires = "work_hours", value_parser = clap::value_parser!(u32).range(0..=1000))]
    spot_permille: u32,
    /// Instead of a fleet, one guest whose clients are in three regions and ask by day: where it should be, and when. The demand
    /// is generated.
    #[arg(long, conflicts_with = "work_hours")]
    sun: bool,
    /// With `--sun`: the days that are reported, after two weeks that are learned from; 1 without it.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=60))]
    days: Option<u32>,
    /// With `--sun`: what a region asks for by night, in thousandths of its noon; 10 without it.
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=1000))]
    night_permille: Option<u32>,
    /// With `--sun`: what it asks for at weekends, in thousandths of other days; 1000 without it.
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=1000))]
    weekend_permille: Option<u32>,
    /// With `--sun`: the latency that is good enough for 95 of 100 requests, in milliseconds; as low as can be without it.
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=60_000))]
    target_p95: Option<u32>,
    /// Instance types and their on-demand prices; without it the ones that ship.
    #[arg(long)]
    catalogue: Option<PathBuf>,
    /// A policy's name (smart-spot, smart-spot-spares, cheapest, greedy) or a TOML file; may be given more than once.
    #[arg(long)]
    policy: Vec<String>,
    /// The guests (TOML); without it 56 of 1 to 64 GiB.
    #[arg(long)]
    fleet: Option<PathBuf>,
    /// Recorded probes of capacity, from which interruptions of the capacity regime are learned and drawn.
    #[arg(long)]
    capacity: Option<PathBuf>,
    /// Only this resource's probes.
    #[arg(long, requires = "capacity")]
    resource: Option<String>,
    /// Whether pools lose capacity as drawn from the runs of the recordings, or just as recorded, with the hours of day and
    /// what goes together; then `--part` takes that half of each recording, too.
    #[arg(long, value_enum, default_value_t = Interruptions::Drawn)]
    interruptions: Interruptions,
    /// How markets work; without it what the prices show.
    #[arg(long, value_enum)]
    regime: Option<RegimeName>,
    /// How long before it takes a host the provider says so, in seconds.
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    notice: u64,
    /// The length of a tick, in seconds; it must divide an hour.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(60..=3600))]
    tick: u64,
    /// Bids, in thousandths of the on-demand price (auction regime). One bids high, so as not to be thrown out, and
    /// leaves before such a price is paid for long; ten times on-demand was the most that EC2 took.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    bid_permille: u32,
    /// What draws the interruptions and the sample.
    #[arg(long, default_value_t = 12)]
    seed: u64,
    /// Which part of the time: tune on the first half, report on the second.
    #[arg(long, value_enum, default_value_t = Part::All)]
    part: Part,
    /// Leave out the optimum, which takes longest.
    #[arg(long)]
    no_optimum: bool,
    /// Writes the ledger of the first policy to this file (CSV).
    #[arg(long)]
    ledger: Option<PathBuf>,
}

impl Simulate {
    /// The recording; of jobs there is none.
    fn trace(&self) -> &Path {
        self.trace.as_deref().unwrap_or(Path::new(""))
    }
}

/// Where interruptions come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Interruptions {
    /// Runs are drawn: no hour of day, no two pools alike.
    Drawn,
    /// As they were.
    Recorded,
}

/// How markets work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RegimeName {
    /// Bids, started hours.
    Auction,
    /// Capacity, seconds.
    Capacity,
}

/// Part of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// All of it.
    All,
    /// The first half.
    First,
    /// The second half.
    Second,
}

/// Everything that a report needs.
struct Report {
    policies: Vec<Outcome>,
    baselines: Vec<Outcome>,
    optimum: Option<NanoUsd>,
    floor: NanoUsd,
    packed: Option<Packed>,
    is_measured: bool,
    about: Value,
}

/// The fleet on as few on-demand hosts as it fits, rented jointly, for the whole time.
struct Packed {
    hosts: usize,
    cost: NanoUsd,
    /// What nobody who rents on-demand can pay less than.
    bound: NanoUsd,
}

/// Larger fleets are not packed: it takes longer than the replay.
const MOST_PACKED: usize = 1000;

/// Replays and reports.
pub fn run(arguments: &Simulate, output: Output) -> anyhow::Result<()> {
    if arguments.work_hours.is_some() {
        return deadlines::run(arguments, output);
    }
    if arguments.sun {
        return sun::run(arguments, output);
    }
    let of_sun = [arguments.days, arguments.night_permille, arguments.weekend_permille, arguments.target_p95];
    if of_sun.iter().any(Option::is_some) {
        bail!("--days, --night-permille, --weekend-permille and --target-p95 are for --sun");
    }
    let policies = if arguments.policy.is_empty() {
        vec![policy("smart-spot")?, policy("cheapest")?]
    } else {
        arguments.policy.iter().map(|name| policy(name)).collect::<anyhow::Result<_>>()?
    };
    let fleet = fleet(arguments.fleet.as_deref())?;
    let grid = grid(arguments)?;
    let settings = Settings {
        notice_ms: arguments.notice * 1000,
        restart_ms: fleet.restart_s * 1000,
        host_reserve_bytes: fleet.host_reserve_mib << 20,
    };
    let report = replay(arguments, &grid, &fleet.guests(), &settings, &policies);
    if let (Some(path), Some(outcome)) = (&arguments.ledger, report.policies.first()) {
        write_ledger(path, &grid, outcome).with_context(|| format!("writing {}", path.display()))?;
    }
    match output {
        Output::Table | Output::Wide => print!("{}", report.table()),
        _ => crate::show::print_value(output, &report.json())?,
    }
    Ok(())
}

fn read(path: &Path) -> anyhow::Result<String> {
    let context = || format!("reading {}", path.display());
    let mut bytes = Vec::new();
    File::open(path)
        .with_context(context)?
        .take(MAX_FEED_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .with_context(context)?;
    recorded::text_of(&bytes).with_context(context)
}

fn policy(name: &str) -> anyhow::Result<(String, Box<dyn Policy>)> {
    match name {
        "smart-spot" => return Ok((name.into(), Box::new(SmartSpot::default()))),
        "smart-spot-spares" => return Ok((name.into(), Box::new(SmartSpot::with_spares()))),
        "cheapest" => return Ok((name.into(), Box::new(Cheapest(CheapestWithHysteresis::default())))),
        "greedy" => return Ok((name.into(), Box::new(Greedy))),
        _ if !name.ends_with(".toml") => {
            bail!(
                "there is no policy '{name}'; there are smart-spot, smart-spot-spares, cheapest, greedy, or a file that ends with .toml"
            )
        }
        _ => {}
    }
    let context = || format!("in {name}");
    let mut table: toml::Table = read(Path::new(name))?.parse().with_context(context)?;
    let mut text = |key: &str| match table.remove(key) {
        Some(toml::Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(anyhow::anyhow!("{key} must be a text")),
        None => Ok(None),
    };
    let kind = text("kind").with_context(context)?;
    let title = text("name").with_context(context)?;
    let table = toml::Value::Table(table);
    let policy: Box<dyn Policy> = match kind.as_deref() {
        Some("smart-spot") => {
            let policy: SmartSpot = table.try_into().with_context(context)?;
            policy.check().map_err(anyhow::Error::msg).with_context(context)?;
            Box::new(policy)
        }
        Some("cheapest") => {
            let policy: CheapestWithHysteresis = table.try_into().with_context(context)?;
            policy.check().map_err(anyhow::Error::msg).with_context(context)?;
            Box::new(Cheapest(policy))
        }
        _ => bail!("in {name}: kind must be \"smart-spot\" or \"cheapest\""),
    };
    Ok((title.unwrap_or_else(|| name.trim_end_matches(".toml").to_owned()), policy))
}

fn fleet(path: Option<&Path>) -> anyhow::Result<Fleet> {
    let Some(path) = path else { return Ok(Fleet::default()) };
    let fleet: Fleet = toml::from_str(&read(path)?).with_context(|| format!("in {}", path.display()))?;
    if let Err(what) = fleet.check() {
        bail!("in {}: {what}", path.display());
    }
    Ok(fleet)
}

fn grid(arguments: &Simulate) -> anyhow::Result<Grid> {
    let types = match &arguments.catalogue {
        Some(path) => recorded::catalogue(&read(path)?).with_context(|| format!("in {}", path.display()))?,
        None => recorded::catalogue(recorded::CATALOGUE).context("in the catalogue that ships")?,
    };
    let regime = arguments.regime.map(|name| match name {
        RegimeName::Auction => Regime::Auction,
        RegimeName::Capacity => Regime::Capacity,
    });
    let trace: Trace = if arguments.trace() == Path::new("sample") {
        recorded::sample(&types, arguments.seed)
    } else {
        let path = arguments.trace();
        recorded::prices(&read(path)?, &types, regime).with_context(|| format!("in {}", path.display()))?
    };
    let runs = match &arguments.capacity {
        Some(path) if arguments.interruptions == Interruptions::Drawn => Some(
            recorded::capacity(&read(path)?, arguments.resource.as_deref())
                .with_context(|| format!("in {}", path.display()))?,
        ),
        _ => None,
    };
    // A recording holds changes only: on its first day many prices are not known yet.
    let (first, last) = trace.span().context("the trace holds no prices")?;
    let first = first + DAY_MS.min((last - first) / 2);
    let middle = first + (last - first) / 2;
    let span = match arguments.part {
        Part::All => (first, last),
        Part::First => (first, middle),
        Part::Second => (middle, last),
    };
    let capacity = runs.as_ref().map(|runs| (runs, arguments.seed));
    let mut grid = Grid::new(&trace, span, arguments.tick * 1000, arguments.bid_permille, capacity)?;
    if arguments.interruptions == Interruptions::Recorded {
        let path =
            arguments.capacity.as_ref().context("--interruptions recorded needs the recordings: --capacity FILE")?;
        let series = recorded::capacity_series(&read(path)?, arguments.resource.as_deref())
            .with_context(|| format!("in {}", path.display()))?;
        let half = match arguments.part {
            Part::All => None,
            Part::First => Some(Half::First),
            Part::Second => Some(Half::Second),
        };
        let recorded = Followed::new(series.iter().map(Vec::as_slice), half);
        if !recorded.is_usable() {
            bail!("in {}: no series is at least a day long and changes", path.display());
        }
        grid.follow(&recorded, arguments.seed);
    }
    Ok(grid)
}

fn replay(
    arguments: &Simulate,
    grid: &Grid,
    guests: &[Guest],
    settings: &Settings,
    policies: &[(String, Box<dyn Policy>)],
) -> Report {
    let is_shown = std::io::stderr().is_terminal();
    let tell = |name: &str, permille: u32| {
        if is_shown {
            eprint!("\r{name}: {} %\x1b[K", permille / 10);
        }
    };
    let play = |name: &str, policy: &dyn Policy| {
        let mut outcome = sim::run(grid, guests, settings, policy, |permille| tell(name, permille));
        outcome.policy = name.to_owned();
        outcome
    };
    let baselines: [&dyn Policy; 4] = [&OnDemand, &Single, &Restart, &Greedy];
    let report = Report {
        policies: policies.iter().map(|(name, policy)| play(name, policy.as_ref())).collect(),
        baselines: baselines.into_iter().map(|policy| play(policy.name(), policy)).collect(),
        optimum: (!arguments.no_optimum)
            .then(|| optimum::optimum(grid, guests, settings, |permille| tell("optimum", permille))),
        floor: optimum::floor(grid, guests, settings),
        packed: packed(grid, guests, settings),
        is_measured: grid.has_interruptions,
        about: json!({
            "trace": arguments.trace().display().to_string(),
            "is_generated": arguments.trace() == Path::new("sample"),
            "regime": grid.regime,
            "start_ms": grid.start_ms,
            "hours": grid.length_ms() / 3_600_000,
            "spot_markets": grid.markets.iter().filter(|market| !market.is_on_demand()).count(),
            "guests": guests.len(),
            "notice_s": arguments.notice,
            "tick_s": arguments.tick,
            "seed": arguments.seed,
            "interruptions": match (grid.regime, &arguments.capacity) {
                (Regime::Auction, _) => json!("recorded prices above the bid"),
                (Regime::Capacity, Some(path)) if arguments.interruptions == Interruptions::Recorded => {
                    json!(format!("as recorded in {}", path.display()))
                }
                (Regime::Capacity, Some(path)) => json!(format!("drawn from {}", path.display())),
                (Regime::Capacity, None) => json!("not modelled"),
            },
        }),
    };
    if is_shown {
        eprint!("\r\x1b[K");
    }
    report
}

/// `None`: a guest fits no type, or there are too many of them.
fn packed(grid: &Grid, guests: &[Guest], settings: &Settings) -> Option<Packed> {
    let room = |vcpus: u32, memory_bytes: u64| Room { vcpus, memory_bytes, disk_bytes: 0 };
    let needs: Vec<Room> = guests.iter().map(|guest| room(guest.vcpus, guest.load.memory_bytes)).collect();
    let offers: Vec<Offer> = (grid.markets.iter())
        .filter(|market| market.is_on_demand())
        .map(|market| Offer {
            room: room(market.instance.vcpus, market.instance.memory_bytes.saturating_sub(settings.host_reserve_bytes)),
            price: market.instance.on_demand,
            most: u32::MAX,
        })
        .collect();
    if guests.len() > MOST_PACKED {
        return None;
    }
    let hosts = rent::rent(&needs, &offers)?;
    let whole = |per_hour: NanoUsd| per_hour.per_hour_for(grid.length_ms());
    Some(Packed {
        hosts: hosts.len(),
        cost: whole(rent::cost(&hosts, &offers)),
        bound: whole(rent::lower_bound(&needs, &offers)),
    })
}

fn usd(amount: NanoUsd) -> f64 {
    amount.0 as f64 / 1e9
}

impl Report {
    fn on_demand(&self) -> Option<&Outcome> {
        self.baselines.iter().find(|outcome| outcome.policy == "on-demand")
    }

    fn outcome(&self, outcome: &Outcome) -> Value {
        let on_demand: BTreeMap<_, _> =
            self.on_demand().map(|outcome| outcome.ledger.months().into_iter().collect()).unwrap_or_default();
        let months = outcome.ledger.months().into_iter().map(|(month, paid)| {
            json!({
                "month": format!("{}-{:02}", month.0, month.1),
                "cost_usd": usd(paid),
                "on_demand_usd": on_demand.get(&month).copied().map(usd),
            })
        });
        json!({
            "cost_usd": usd(outcome.cost()),
            "cost_nanousd": outcome.cost().0,
            "availability": self.is_measured.then(|| outcome.availability()),
            "interruptions": outcome.interruptions,
            "moves": outcome.moves,
            "most_interrupted_at_once": outcome.most_at_once,
            "missed_deadlines": outcome.missed,
            "unplaceable_guests": outcome.unplaceable,
            "changes_by_reason": outcome.reasons.iter().map(|(why, count)| (why.to_string(), *count)).collect::<BTreeMap<_, _>>(),
            "months": months.collect::<Vec<_>>(),
        })
    }

    fn json(&self) -> Value {
        let all = |outcomes: &[Outcome]| -> BTreeMap<String, Value> {
            outcomes.iter().map(|outcome| (outcome.policy.clone(), self.outcome(outcome))).collect()
        };
        let mut baselines = all(&self.baselines);
        if let Some(on_demand) = baselines.remove("on-demand") {
            baselines.insert("on_demand".into(), on_demand);
        }
        json!({
            "about": self.about,
            "policies": all(&self.policies),
            "baselines": baselines,
            "optimum": self.optimum.map(|cost| json!({ "cost_usd": usd(cost), "cost_nanousd": cost.0 })),
            "floor": { "cost_usd": usd(self.floor) },
            "on_demand_packed": self.packed.as_ref().map(|packed| json!({
                "hosts": packed.hosts,
                "cost_usd": usd(packed.cost),
                "lower_bound_usd": usd(packed.bound),
            })),
        })
    }

    fn table(&self) -> String {
        let text = |key: &str| self.about[key].as_str().map_or_else(|| self.about[key].to_string(), str::to_owned);
        let mut out = format!(
            "{} ({} regime), {} spot markets, {} guests, {} hours; notice {} s, tick {} s, seed {}\nInterruptions: {}\n\n",
            text("trace"),
            text("regime"),
            text("spot_markets"),
            text("guests"),
            text("hours"),
            text("notice_s"),
            text("tick_s"),
            text("seed"),
            text("interruptions"),
        );
        let on_demand = self.on_demand().map_or(NanoUsd(0), Outcome::cost);
        let share = |of: NanoUsd, whole: Option<NanoUsd>| match whole {
            Some(whole) if whole > NanoUsd(0) => format!("{:.3}", of.0 as f64 / whole.0 as f64),
            _ => "-".into(),
        };
        let mut table = Table::new([
            "POLICY",
            "COST_USD",
            "VS_ON_DEMAND",
            "VS_OPTIMUM",
            "AVAILABILITY_%",
            "TAKEN",
            "MISSED",
            "MOVES",
            "MONTHS_ABOVE_ON_DEMAND",
        ]);
        for outcome in self.policies.iter().chain(&self.baselines) {
            let limits: BTreeMap<_, _> =
                self.on_demand().map(|outcome| outcome.ledger.months().into_iter().collect()).unwrap_or_default();
            let months = outcome.ledger.months();
            let above =
                months.iter().filter(|(month, paid)| limits.get(month).is_some_and(|limit| paid > limit)).count();
            table.row([
                outcome.policy.clone(),
                format!("{:.2}", usd(outcome.cost())),
                share(outcome.cost(), Some(on_demand)),
                share(outcome.cost(), self.optimum),
                if self.is_measured { format!("{:.4}", outcome.availability() * 100.0) } else { "not measured".into() },
                outcome.interruptions.to_string(),
                outcome.missed.to_string(),
                outcome.moves.to_string(),
                format!("{above} of {}", months.len()),
            ]);
        }
        let bounds = (self.optimum.map(|cost| ("offline optimum", cost)).into_iter())
            .chain([("floor", self.floor)])
            .chain(self.packed.as_ref().map(|packed| ("on-demand, packed jointly", packed.cost)));
        for (name, cost) in bounds {
            let mut row = std::array::from_fn::<String, 9, _>(|_| "-".into());
            row[0] = name.into();
            row[1] = format!("{:.2}", usd(cost));
            row[2] = share(cost, Some(on_demand));
            row[3] = share(cost, self.optimum);
            table.row(row);
        }
        out.push_str(&table.render());
        let unplaceable = self.policies.first().map_or(0, |outcome| outcome.unplaceable);
        if unplaceable > 0 {
            out.push_str(&format!(
                "\n{unplaceable} guests are larger than every type of the trace and were left out.\n"
            ));
        }
        out
    }
}

/// One line per payment; the sum of `paid_nanousd` is the policy's cost.
fn write_ledger(path: &Path, grid: &Grid, outcome: &Outcome) -> std::io::Result<()> {
    let mut file = std::io::BufWriter::new(File::create(path)?);
    writeln!(file, "unix_ms,guest,market,kind,for_ms,paid_nanousd")?;
    for line in &outcome.ledger.lines {
        let kind = match line.kind {
            LineKind::Rent => "rent",
            LineKind::Spare => "spare",
            LineKind::Egress => "egress",
        };
        let market = &grid.markets[line.market as usize].name;
        writeln!(file, "{},{},{market},{kind},{},{}", line.at_ms, line.guest, line.for_ms, line.paid.0)?;
    }
    file.flush()
}
