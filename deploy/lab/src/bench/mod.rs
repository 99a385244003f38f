//! The one door to all benchmarks: what was measured of ours, of the peer in the same run, and whether the target holds.

pub mod bare;
pub mod migration;
pub mod stats;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde::Serialize;
use supercloud_cli::table::Table;

use self::stats::{Ratio, Sample};
use crate::demo::tell::Teller;
use crate::interrupt::{Ended, guarded};

/// Options of the benchmarks.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Which ones; all when none is named
    #[arg(value_enum)]
    pub names: Vec<Benchmark>,
    /// Also write the rows as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// How often each side is measured
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(7..=1000))]
    pub runs: u32,
}

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Benchmark {
    /// A live move through our agents beside the bare hypervisor's, between two hosts of the lab
    NamespaceMigration,
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
    /// The peer's over ours (less is better in all rows so far).
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
        let holds = if row.holds { "yes" } else { "NO" };
        table.row([row.metric.clone(), ours, peer, ratio, row.target.clone(), holds.to_owned()]);
    }
    table.render()
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
    let all = Benchmark::value_variants();
    let names = if options.names.is_empty() { all } else { &options.names };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut rows = Vec::new();
    for benchmark in names {
        match benchmark {
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
    use super::*;

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
    }
}
