//! How blocks follow a volume: the policies replayed on traces in the simulator ([`supercloud_storage::propagation::simulate`]).
//! Nothing of it depends on the machine.

use std::path::Path;

use anyhow::Context as _;
use supercloud_cli::table::Table;
use supercloud_storage::propagation::{
    Tuning,
    simulate::{Line, Move, Outcome, Policy, replay},
    trace::{Kind, Trace, generate},
};

use super::Row;

/// 100 Mbit/s and 40 ms.
const LINE: Line = Line { bytes_per_s: 12_500_000, rtt_ms: 40.0 };
/// The seeds on which the policy was tuned is 1: these are others.
const SEEDS: [u64; 3] = [2, 3, 4];

/// When a guest that lives so long moves: blocks are copied for a short, a middle and a long time before the switch, and the
/// guest lives on after it.
fn moves(length_ms: u64) -> [Move; 3] {
    let at = |share: f64| (length_ms as f64 * share) as u64;
    [(0.25, 0.33), (0.5, 0.67), (0.42, 0.8)].map(|(begin, switch)| Move { begin_ms: at(begin), switch_ms: at(switch) })
}

/// What the moves of some traces cost, all together, by policy.
#[derive(Debug, Clone, Copy, Default)]
struct Costs {
    on_demand: Outcome,
    hot_standby: Outcome,
    predictive: Outcome,
    best: Outcome,
}

fn add(sum: &mut Outcome, one: &Outcome) {
    sum.bytes_before += one.bytes_before;
    sum.bytes_after += one.bytes_after;
    sum.remote_reads += one.remote_reads;
    sum.stall_ms += one.stall_ms;
    sum.independent_ms += one.independent_ms;
}

fn costs(traces: &[Trace]) -> Costs {
    let mut costs = Costs::default();
    for trace in traces {
        for when in moves(trace.length_ms()) {
            let of = |policy| replay(trace, LINE, when, policy);
            add(&mut costs.on_demand, &of(Policy::OnDemand));
            add(&mut costs.hot_standby, &of(Policy::HotStandby));
            add(&mut costs.predictive, &of(Policy::Predictive(Tuning::default())));
            add(&mut costs.best, &of(Policy::Clairvoyant));
        }
    }
    costs
}

/// Traces by name: generated ones, or those in the files.
fn traces(files: &[std::path::PathBuf]) -> anyhow::Result<Vec<(String, Vec<Trace>)>> {
    if files.is_empty() {
        let of = |kind: Kind| (kind.name().to_owned(), SEEDS.map(|seed| generate(kind, seed)).to_vec());
        return Ok(Kind::ALL.into_iter().map(of).collect());
    }
    let read = |path: &Path| {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let trace = Trace::decode(&bytes).with_context(|| format!("{} is no trace", path.display()))?;
        let name = path.file_stem().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        Ok((name, vec![trace]))
    };
    files.iter().map(|path| read(path)).collect()
}

/// Replays; prints what each policy costs.
///
/// # Errors
/// When a file is no trace.
pub fn run(files: &[std::path::PathBuf]) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut table =
        Table::new(["TRACE", "POLICY", "MB BEFORE", "MB AFTER", "REMOTE READS", "STALL MS", "WHOLE AFTER MS"]);
    for (name, traces) in traces(files)? {
        let costs = costs(&traces);
        let Costs { on_demand, hot_standby, predictive, best } = costs;
        let lines =
            [("on-demand", on_demand), ("hot-standby", hot_standby), ("predictive", predictive), ("clairvoyant", best)];
        for (policy, cost) in lines {
            table.row([
                name.clone(),
                policy.to_owned(),
                format!("{:.1}", cost.bytes_before as f64 / 1e6),
                format!("{:.1}", cost.bytes_after as f64 / 1e6),
                cost.remote_reads.to_string(),
                format!("{:.0}", cost.stall_ms),
                format!("{:.0}", cost.independent_ms),
            ]);
        }
        let row = |metric: &str, ours: f64, peer: f64, of: &str, share: f64| {
            Row::computed(&format!("policies/{name}/{metric}"), ours, peer, of, share)
        };
        rows.push(row("bytes", predictive.bytes() as f64, hot_standby.bytes() as f64, "hot-standby", 0.6));
        rows.push(row("stall_ms", predictive.stall_ms, hot_standby.stall_ms, "hot-standby", 1.2));
        let (ours, peer) = (predictive.remote_reads as f64, on_demand.remote_reads as f64);
        rows.push(row("remote_reads", ours, peer, "on-demand", 0.4));
    }
    println!("{}", table.render());
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_trace_has_its_rows_and_ours_never_moves_more_than_all_and_again() {
        let rows = run(&[]).unwrap();
        assert_eq!(rows.len(), 3 * Kind::ALL.len());
        for row in rows.iter().filter(|row| row.metric.ends_with("/remote_reads")) {
            assert!(row.holds, "{row:?}");
        }
        for row in rows.iter().filter(|row| row.metric.ends_with("/bytes")) {
            assert!(row.ours <= row.peer.unwrap() * 1.02, "{row:?}");
        }
    }

    #[test]
    fn a_file_is_replayed_and_what_is_none_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mine.trace");
        std::fs::write(&path, generate(Kind::Build, 9).encode().unwrap()).unwrap();
        let rows = run(std::slice::from_ref(&path)).unwrap();
        assert!(rows.iter().all(|row| row.metric.starts_with("policies/mine/")));
        std::fs::write(&path, "no trace").unwrap();
        assert!(run(&[path]).unwrap_err().to_string().contains("mine.trace"));
    }
}
