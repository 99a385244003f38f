//! The one door to all benchmarks: what was measured of ours, of the peer in the same run, and whether the target holds.

pub mod bare;
pub mod engine;
pub mod migration;
pub mod overload;
pub mod placement;
pub mod policies;
pub mod stats;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde::Serialize;
use supercloud_cli::table::Table;

use self::stats::{Ratio, Sample};
use crate::demo::tell::Teller;
use crate::interrupt::{Ended, guarded};

const EXAMPLES: &str = "Examples:
  ./deploy/bench                                          all of them
  ./deploy/bench --list                                   which ones there are
  ./deploy/bench namespace-migration --json rows.json     one, its rows also as JSON
  ./deploy/bench namespace-migration --runs 25            more runs, a narrower interval
  ./deploy/bench migration --case 300M-1ms/idle --runs 3  one case of it, quickly";

/// Options of the benchmarks.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// Which ones; all when none is named
    #[arg(value_enum)]
    pub names: Vec<Benchmark>,
    /// Also write the rows as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Only say which ones there are
    #[arg(long)]
    pub list: bool,
    /// Traces that `policies` replays instead of generated ones; recorded by volume processes
    #[arg(long = "trace", value_name = "FILE")]
    pub traces: Vec<PathBuf>,
    /// How often each side is measured; below 7 the interval says little
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Only cases of `migration` that have this in their names, such as `300M-1ms/idle`
    #[arg(long = "case", value_name = "WORD")]
    pub cases: Vec<String>,
}

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Benchmark {
    /// A live move through our agents beside the bare hypervisor's, between two hosts of the lab
    NamespaceMigration,
    /// The move of our own VMM beside QEMU's: one small guest on this machine's /dev/kvm, over one paced link
    Migration,
    /// Overloads of memory that are waited out or moved away from, on generated ones: the decision alone
    Overload,
    /// Placement decisions per second in a fleet of 10,000 hosts and 100,000 guests, on one core; no peer
    Placement,
    /// How blocks follow a volume: the policies in the simulator, on generated traces or on `--trace` files
    Policies,
}

/// One row. Numbers are medians; `ratio` is how many times better ours is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What was measured, its unit in the name.
    pub metric: String,
    /// Ours.
    pub ours: f64,
    /// The peer's; absent where none can run.
    pub peer: Option<f64>,
    /// The peer's over ours, where there is a peer (less is better in all of those rows).
    pub ratio: Option<f64>,
    /// What is asked for.
    pub target: String,
    /// Whether it holds.
    pub holds: bool,
    #[serde(skip)]
    detail: Detail,
}

/// What only the table shows.
#[derive(Debug, Clone, Default, PartialEq)]
struct Detail {
    ours: String,
    peer: String,
    ratio: String,
}

impl Row {
    /// A row of which less is better, against a peer that was measured in the same run; the target is "no slower".
    #[must_use]
    pub fn no_slower(metric: &str, ours: &Sample, peer: &Sample, peer_name: &str) -> Option<Self> {
        let ratio = ours.less_than(peer)?;
        let Ratio { value, low, high } = ratio;
        Some(Self {
            metric: metric.to_owned(),
            ours: ours.median()?,
            peer: peer.median(),
            ratio: Some(value),
            target: "no slower".to_owned(),
            holds: ratio.is_no_slower(),
            detail: Detail {
                ours: figure(ours)?,
                peer: format!("{} ({peer_name})", figure(peer)?),
                ratio: format!("{value:.2} ({low:.2}-{high:.2})"),
            },
        })
    }
}

/// The target of a row of which nothing is asked.
const NO_TARGET: &str = "none";

impl Row {
    /// A row of which less is better, and ours is to be at most this share of the peer's.
    #[must_use]
    pub fn at_most(metric: &str, ours: &Sample, peer: &Sample, peer_name: &str, share: f64) -> Option<Self> {
        let row = Self::no_slower(metric, ours, peer, peer_name)?;
        let holds = row.ours <= share * row.peer?;
        Some(Self { target: format!("<= {share}x"), holds, ..row })
    }

    /// A row of which nothing is asked.
    #[must_use]
    pub fn beside(metric: &str, ours: &Sample, peer: &Sample, peer_name: &str) -> Option<Self> {
        let row = Self::no_slower(metric, ours, peer, peer_name)?;
        Some(row.without_target())
    }

    /// The same, of which nothing is asked.
    #[must_use]
    pub fn without_target(self) -> Self {
        Self { target: NO_TARGET.to_owned(), holds: true, ..self }
    }

    /// A row without a peer, of which the median is to be at least `least`.
    #[must_use]
    pub fn no_less(metric: &str, ours: &Sample, least: f64) -> Option<Self> {
        Some(Self::alone(metric, ours, format!(">= {least}"), ours.median()? >= least, figure(ours)?))
    }

    /// A row without a peer, of which the median is to be at most `most`.
    #[must_use]
    pub fn no_more(metric: &str, ours: &Sample, most: f64) -> Option<Self> {
        Some(Self::alone(metric, ours, format!("<= {most}"), ours.median()? <= most, figure(ours)?))
    }

    fn alone(metric: &str, ours: &Sample, target: String, holds: bool, figure: String) -> Self {
        Self {
            metric: metric.to_owned(),
            ours: ours.median().unwrap_or_default(),
            peer: None,
            ratio: None,
            target,
            holds,
            detail: Detail { ours: figure, peer: "-".to_owned(), ratio: "-".to_owned() },
        }
    }
}

impl Row {
    /// A row of one number of which less is better, computed and not measured, that is to be at most this share of the peer's.
    #[must_use]
    pub fn computed(metric: &str, ours: f64, peer: f64, peer_name: &str, share: f64) -> Self {
        let ratio = (ours > 0.0).then(|| peer / ours);
        Self {
            metric: metric.to_owned(),
            ours,
            peer: Some(peer),
            ratio,
            target: format!("<= {share}x"),
            holds: ours <= share * peer,
            detail: Detail {
                ours: format!("{ours:.0}"),
                peer: format!("{peer:.0} ({peer_name})"),
                ratio: ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
            },
        }
    }
}

/// Median, spread and count of a sample.
fn figure(sample: &Sample) -> Option<String> {
    let (least, most) = sample.spread()?;
    Some(format!("{:.0} [{least:.0}-{most:.0}] n={}", sample.median()?, sample.len()))
}

#[derive(Debug, Serialize)]
struct Rows<'a> {
    rows: &'a [Row],
}

/// The table.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let mut table = Table::new(["METRIC", "OURS", "PEER", "RATIO (95 %)", "TARGET", "HOLDS"]);
    for row in rows {
        let Detail { ours, peer, ratio } = row.detail.clone();
        let holds = match (row.target.as_str(), row.holds) {
            (NO_TARGET, _) => "n/a",
            (_, true) => "yes",
            (_, false) => "NO",
        };
        table.row([row.metric.clone(), ours, peer, ratio, row.target.clone(), holds.to_owned()]);
    }
    table.render()
}

/// Each benchmark and what it measures, a line each.
fn list() -> String {
    let named = Benchmark::value_variants().iter().filter_map(ValueEnum::to_possible_value);
    named
        .map(|one| format!("{}: {}\n", one.get_name(), one.get_help().map(ToString::to_string).unwrap_or_default()))
        .collect()
}

fn write_json(rows: &[Row], path: &Path) -> std::io::Result<()> {
    let mut text = serde_json::to_string_pretty(&Rows { rows })?;
    text.push('\n');
    std::fs::write(path, text)
}

/// Runs benchmarks in the lab `name`.
///
/// # Errors
/// When one cannot be run to its end; the lab is taken down all the same.
pub fn run(name: &str, options: &Options) -> anyhow::Result<ExitCode> {
    if options.list {
        print!("{}", list());
        return Ok(ExitCode::SUCCESS);
    }
    let all = Benchmark::value_variants();
    let names = if options.names.is_empty() { all } else { &options.names };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut rows = Vec::new();
    for benchmark in names {
        match benchmark {
            Benchmark::Migration => rows.extend(engine::run(options.runs, &options.cases)?),
            Benchmark::Overload => rows.extend(overload::run(options.runs)),
            Benchmark::Placement => rows.extend(placement::run(options.runs)?),
            Benchmark::Policies => rows.extend(policies::run(&options.traces)?),
            Benchmark::NamespaceMigration => {
                let work = migration::run(name.to_owned(), options.runs);
                match runtime.block_on(guarded(name, work))? {
                    Ended::Done(measured) => rows.extend(measured?),
                    Ended::Signalled(status) => return Ok(ExitCode::from(status)),
                }
            }
        }
    }
    let tell = Teller::default();
    tell.say(&format!("\n{}", table(&rows)));
    tell.say("medians [least-most]; ratio: the peer's median over ours, above 1 ours is better");
    if let Some(path) = &options.json {
        write_json(&rows, path).map_err(|error| anyhow::anyhow!("cannot write {}: {error}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Door {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn a_name_that_nobody_knows_is_refused_with_those_that_there_are() {
        let error = Door::try_parse_from(["bench", "no-such"]).unwrap_err().to_string();
        assert!(error.contains("no-such") && error.contains("namespace-migration"), "{error}");
        let few = Door::try_parse_from(["bench", "--runs", "0"]).unwrap_err().to_string();
        assert!(few.contains("1..=1000"), "{few}");
        let door = Door::try_parse_from(["bench", "namespace-migration", "--json", "f"]).unwrap();
        assert_eq!((door.options.names, door.options.runs), (vec![Benchmark::NamespaceMigration], 9));
        assert!(list().starts_with("namespace-migration: A live move"), "{}", list());
    }

    #[test]
    fn the_file_holds_the_rows() {
        let peer: Sample = [10.0, 11.0, 9.0, 10.5, 9.5, 10.2, 9.8].into_iter().collect();
        let ours: Sample = [20.0, 22.0, 18.0, 21.0, 19.0, 20.4, 19.6].into_iter().collect();
        let row = Row::no_slower("x/total_ms", &ours, &peer, "other 1.0").unwrap();
        let path = std::env::temp_dir().join(format!("bench-rows-{}.json", std::process::id()));
        write_json(&[row], &path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let rows = json["rows"].as_array().unwrap();
        let mut keys: Vec<&str> = rows[0].as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!((rows.len(), keys), (1, vec!["holds", "metric", "ours", "peer", "ratio", "target"]));
        assert_eq!((rows[0]["holds"].as_bool(), rows[0]["ratio"].as_f64()), (Some(false), Some(0.5)));
    }

    #[test]
    fn rows_are_as_promised() {
        let mut sample = Sample::default();
        (0..7).for_each(|i| sample.push(100.0 + f64::from(i)));
        let row = Row::no_slower("x/total_ms", &sample, &sample, "other 1.0").unwrap();
        let json = serde_json::to_value(Rows { rows: std::slice::from_ref(&row) }).unwrap();
        let expected = serde_json::json!({"rows": [{"metric": "x/total_ms", "ours": 103.0, "peer": 103.0, "ratio": 1.0,
            "target": "no slower", "holds": true}]});
        assert_eq!(json, expected);
        let table = table(&[row]);
        assert!(table.contains("other 1.0") && table.contains("n=7"), "{table}");
        assert_eq!(Row::no_slower("x", &Sample::default(), &sample, ""), None);
        let alone = [Row::no_less("x/rate", &sample, 103.0).unwrap(), Row::no_more("x/ms", &sample, 102.0).unwrap()];
        let json = serde_json::to_value(Rows { rows: &alone }).unwrap();
        let expected = serde_json::json!({"rows": [
            {"metric": "x/rate", "ours": 103.0, "peer": null, "ratio": null, "target": ">= 103", "holds": true},
            {"metric": "x/ms", "ours": 103.0, "peer": null, "ratio": null, "target": "<= 102", "holds": false},
        ]});
        assert_eq!(json, expected);
        assert_eq!(Row::no_less("x", &Sample::default(), 0.0), None);
    }
}
