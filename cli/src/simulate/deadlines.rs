//! `supercloud simulate --work-hours`: jobs with a deadline over recorded capacity, beside baselines and the offline optimum.

use std::path::Path;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use supercloud_cli::table::Table;
use supercloud_feed::recorded;
use supercloud_scheduler::{
    money::NanoUsd,
    sim::deadline::{
        Deadline, DeadlinePolicy, Job, LatestStart, OnDemandOnly, Tally, Trial, UniformProgress, on_ticks,
    },
};

use super::{Part, Simulate, read};
use crate::arguments::Output;

/// The most ticks of a window: the optimum looks at each with each amount of work left.
const MAX_WINDOW_TICKS: usize = 4096;

/// Replays and reports.
pub(super) fn run(arguments: &Simulate, output: Output) -> anyhow::Result<()> {
    let (Some(work_h), Some(deadline_h), Some(path)) =
        (arguments.work_hours, arguments.deadline_hours, &arguments.capacity)
    else {
        bail!("--work-hours needs --deadline-hours and --capacity");
    };
    let tick_ms = arguments.tick * 1000;
    let ticks = |ms: u64| usize::try_from(ms.div_ceil(tick_ms)).unwrap_or(usize::MAX);
    let hours = |hours: u32| ticks(u64::from(hours) * 3_600_000);
    let job = Job { work: hours(work_h), window: hours(deadline_h), change: ticks(arguments.change * 1000) };
    if !job.is_possible() {
        bail!("{work_h} hours of work and a change of hosts do not fit into {deadline_h} hours");
    }
    if job.window > MAX_WINDOW_TICKS {
        bail!("a deadline of {} ticks is too long; at most {MAX_WINDOW_TICKS}: ask for longer ticks", job.window);
    }
    let trial = Trial { job, every: hours(4), spot_permille: arguments.spot_permille, tick_ms };
    let recordings = recordings(path, arguments, tick_ms)?;
    let report = Report::of(&trial, &recordings, !arguments.no_optimum);
    if report.rows[0].1.jobs == 0 {
        bail!("no recording is as long as {deadline_h} hours");
    }
    match output {
        Output::Table | Output::Wide => {
            println!(
                "{}: {} jobs of {work_h} hours in {deadline_h}, a change of hosts {} s, spot at {} of on-demand",
                path.display(),
                report.rows[0].1.jobs,
                arguments.change,
                f64::from(arguments.spot_permille) / 1000.0
            );
            print!("{}", report.table().render());
            Ok(())
        }
        _ => crate::show::print_value(output, &report.json()),
    }
}

fn recordings(path: &Path, arguments: &Simulate, tick_ms: u64) -> anyhow::Result<Vec<Vec<bool>>> {
    let steps = recorded::capacity_series(&read(path)?, arguments.resource.as_deref())
        .with_context(|| format!("in {}", path.display()))?;
    let part = |open: Vec<bool>| {
        let middle = open.len() / 2;
        match arguments.part {
            Part::All => open,
            Part::First => open[..middle].to_vec(),
            Part::Second => open[middle..].to_vec(),
        }
    };
    Ok(steps.iter().map(|steps| part(on_ticks(steps, tick_ms))).collect())
}

struct Report {
    rows: Vec<(&'static str, Tally)>,
    optimum: Option<NanoUsd>,
}

impl Report {
    fn of(trial: &Trial, recordings: &[Vec<bool>], has_optimum: bool) -> Self {
        let policies: [&dyn DeadlinePolicy; 4] = [&Deadline::default(), &UniformProgress, &LatestStart, &OnDemandOnly];
        let rows = policies.into_iter().map(|policy| (policy.name(), trial.run(recordings, policy))).collect();
        let optimum = if has_optimum { trial.optimum(recordings) } else { None };
        Self { rows, optimum }
    }

    /// On-demand only is the last row.
    fn share(&self, of: NanoUsd, whole: Option<NanoUsd>) -> Option<f64> {
        whole.filter(|whole| whole.0 > 0).map(|whole| of.0 as f64 / whole.0 as f64)
    }

    fn on_demand(&self) -> Option<NanoUsd> {
        self.rows.last().map(|(_, tally)| tally.paid)
    }

    fn table(&self) -> Table {
        let mut table = Table::new(["POLICY", "VS_ON_DEMAND", "VS_OPTIMUM", "MISSED", "HOSTS_PER_JOB", "ON_SPOT_%"]);
        let text = |share: Option<f64>| share.map_or_else(|| "-".to_owned(), |share| format!("{share:.3}"));
        for (name, tally) in &self.rows {
            let paid_ticks = (tally.on_spot + tally.on_demand).max(1);
            table.row([
                (*name).to_owned(),
                text(self.share(tally.paid, self.on_demand())),
                text(self.share(tally.paid, self.optimum)),
                tally.missed.to_string(),
                format!("{:.1}", tally.changes as f64 / tally.jobs.max(1) as f64),
                format!("{:.1}", tally.on_spot as f64 * 100.0 / paid_ticks as f64),
            ]);
        }
        if let Some(optimum) = self.optimum {
            let [vs_on_demand, vs_optimum] =
                [self.on_demand(), Some(optimum)].map(|whole| text(self.share(optimum, whole)));
            table.row(["offline optimum".to_owned(), vs_on_demand, vs_optimum, "0".into(), "-".into(), "-".into()]);
        }
        table
    }

    fn json(&self) -> Value {
        let rows: serde_json::Map<String, Value> = (self.rows.iter())
            .map(|(name, tally)| {
                let row = json!({
                    "vs_on_demand": self.share(tally.paid, self.on_demand()),
                    "vs_optimum": self.share(tally.paid, self.optimum),
                    "missed_deadlines": tally.missed,
                    "jobs": tally.jobs,
                    "hosts": tally.changes,
                    "ticks_on_spot": tally.on_spot,
                    "ticks_on_demand": tally.on_demand,
                });
                ((*name).to_owned(), row)
            })
            .collect();
        json!({ "policies": rows, "optimum": { "vs_on_demand": self.optimum.and_then(|paid| self.share(paid, self.on_demand())) } })
    }
}
