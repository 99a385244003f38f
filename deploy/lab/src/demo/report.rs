//! What the demo found: as a table for people, as JSON for programs.

use std::path::Path;

use serde::{Deserialize, Serialize};
use supercloud_api::{Freeze, FrozenVolume, Operation, Volume};
use supercloud_cli::table::{Table, bytes, duration};

use super::verdict::{Checked, Outcome, Verdict};

/// How a guest moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Live, as asked for.
    Live,
    /// Into the store of the cloud where it was.
    Freeze,
    /// Out of it, somewhere else.
    Thaw,
    /// Live, as the price policy wanted.
    Price,
}

/// One move. What was not measured is absent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// How.
    pub kind: Kind,
    /// From this cloud (of a thaw: from its store).
    pub from: String,
    /// To this cloud (of a freeze: into its store).
    pub to: String,
    /// From the request to the end of all clean-up.
    pub total_ms: Option<u64>,
    /// The longest silence on the stream as the peer guest saw it; of a freeze: until its operation had ended; of a thaw: the
    /// whole silence, the freeze included.
    pub downtime_ms: Option<u64>,
    /// Of a thaw: from the request until the peer guest was answered again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answered_ms: Option<u64>,
    /// Memory that travelled, repeats included; of a freeze: what was stored.
    pub memory_bytes: Option<u64>,
    /// Volume bytes that travelled before the guest ran again; of a freeze: what was stored.
    pub disk_bytes_before: Option<u64>,
    /// Volume bytes that travelled afterwards; of a freeze: 0 once no host has anything of the volumes any more.
    pub disk_bytes_after: Option<u64>,
}

impl Move {
    /// A move between hosts out of its operation. The peer's silence is added by who measured it.
    #[must_use]
    pub fn of(kind: Kind, from: &str, to: &str, operation: &Operation) -> Self {
        let progress = &operation.progress;
        // A guest that writes ten times per second cannot have moved without a byte of memory and of disk. A thawed one
        // can: its disk is read chunk by chunk when it is needed.
        let disk = progress.disk_bytes_before_resume.zip(progress.disk_bytes_after_resume);
        let disk = disk.filter(|(before, after)| kind == Kind::Thaw || before + after > 0);
        Self {
            kind,
            from: from.to_owned(),
            to: to.to_owned(),
            total_ms: operation.ended_at_ms.map(|end| end.saturating_sub(operation.created_at_ms)),
            downtime_ms: None,
            answered_ms: None,
            memory_bytes: Some(progress.memory_sent_bytes).filter(|bytes| *bytes > 0),
            disk_bytes_before: disk.map(|(before, _)| before),
            disk_bytes_after: disk.map(|(_, after)| after),
        }
    }

    /// A freeze out of its operation, what it left in the store, and the records of the guest's volumes after it.
    #[must_use]
    pub fn of_freeze(cloud: &str, operation: &Operation, freeze: &Freeze, volumes: &[Volume]) -> Self {
        let stored = freeze.volumes.iter().map(|volume| volume.stored_bytes).sum();
        // Nothing can travel any more when no host has, or still owes, anything of the disk.
        let at_rest = |frozen: &FrozenVolume| {
            let record = volumes.iter().find(|volume| volume.id == frozen.volume);
            record.is_some_and(|volume| volume.host.is_none() && volume.needed_source.is_none())
        };
        let is_at_rest = !freeze.volumes.is_empty() && freeze.volumes.iter().all(at_rest);
        Self {
            memory_bytes: Some(freeze.memory_bytes).filter(|bytes| *bytes > 0),
            disk_bytes_before: (!freeze.volumes.is_empty()).then_some(stored),
            disk_bytes_after: is_at_rest.then_some(0),
            ..Self::of(Kind::Freeze, cloud, cloud, operation)
        }
    }

    fn numbers(&self) -> [Option<u64>; 5] {
        [self.total_ms, self.downtime_ms, self.memory_bytes, self.disk_bytes_before, self.disk_bytes_after]
    }
}

/// Everything that is reported.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The moves, in order.
    pub moves: Vec<Move>,
    /// What must be zero.
    pub verdict: Verdict,
    /// How much was checked.
    pub checked: Checked,
}

impl Report {
    /// How the run ended: a number of a move that is missing makes it unmeasured, too.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        let is_complete = self.moves.iter().all(|row| row.numbers().iter().all(Option::is_some));
        match self.verdict.outcome() {
            Outcome::Good if !is_complete || self.moves.is_empty() => Outcome::Unmeasured,
            outcome => outcome,
        }
    }

    /// The table of moves.
    #[must_use]
    pub fn table(&self) -> String {
        let header = ["MOVE", "FROM", "TO", "TOTAL", "DOWNTIME", "MEMORY", "DISK BEFORE", "DISK AFTER"];
        let mut table = Table::new(header);
        let or_dash = |number: Option<u64>, form: fn(u64) -> String| number.map_or_else(|| "-".to_owned(), form);
        for row in &self.moves {
            let kind = serde_json::to_value(row.kind).ok();
            table.row([
                kind.as_ref().and_then(|kind| kind.as_str()).unwrap_or_default().to_owned(),
                row.from.clone(),
                row.to.clone(),
                or_dash(row.total_ms, duration),
                or_dash(row.downtime_ms, duration),
                or_dash(row.memory_bytes, bytes),
                or_dash(row.disk_bytes_before, bytes),
                or_dash(row.disk_bytes_after, bytes),
            ]);
        }
        table.render()
    }

    /// The verdict, one line per number with how much was checked.
    #[must_use]
    pub fn verdict_lines(&self) -> Vec<String> {
        let Checked { bytes: checked_bytes, writes, ticks } = self.checked;
        let number = |number: Option<u64>| number.map_or_else(|| "?".to_owned(), |n| n.to_string());
        let checked = [
            format!("{} arrivals of data on one stream", number(ticks)),
            format!(
                "{} of the stream, and memory of both guests",
                checked_bytes.map_or_else(|| "an unknown part".to_owned(), bytes)
            ),
            format!("{} writes read back from the disk; failed ones count", number(writes)),
            "boot ids, uptimes, clocks and the controller's count compared".to_owned(),
        ];
        let line = |((name, found), checked): ((&str, Option<u64>), String)| {
            let found = found.map_or_else(|| "not measured".to_owned(), |found| found.to_string());
            format!("{name:<26}{found:<14}({checked})")
        };
        self.verdict.numbers().into_iter().zip(checked).map(line).collect()
    }

    /// Writes the JSON.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        std::fs::write(path, text)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use supercloud_api::{
        OperationKind, Progress,
        ids::{OperationId, RequestId},
    };

    use super::*;

    fn report() -> Report {
        let row = Move {
            kind: Kind::Live,
            from: "aws-east".into(),
            to: "home".into(),
            total_ms: Some(7300),
            answered_ms: None,
            downtime_ms: Some(210),
            memory_bytes: Some(50 << 20),
            disk_bytes_before: Some(1 << 20),
            disk_bytes_after: Some(0),
        };
        let zero = Some(0);
        let verdict = Verdict { tcp_resets: zero, bytes_corrupted: zero, writes_lost: zero, guest_restarts: zero };
        Report { moves: vec![row], verdict, checked: Checked { bytes: Some(5000), writes: Some(70), ticks: Some(9) } }
    }

    #[test]
    fn the_json_is_what_was_promised() {
        let mut report = report();
        report.moves[0].downtime_ms = None;
        report.verdict.writes_lost = None;
        let expected = json!({
            "moves": [{"kind": "live", "from": "aws-east", "to": "home", "total_ms": 7300, "downtime_ms": null,
                "memory_bytes": 52_428_800, "disk_bytes_before": 1_048_576, "disk_bytes_after": 0}],
            "verdict": {"tcp_resets": 0, "bytes_corrupted": 0, "writes_lost": null, "guest_restarts": 0},
            "checked": {"bytes": 5000, "writes": 70, "ticks": 9},
        });
        assert_eq!(serde_json::to_value(&report).unwrap(), expected);
        let file = tempfile::NamedTempFile::new().unwrap();
        report.write(file.path()).unwrap();
        assert_eq!(serde_json::from_slice::<Report>(&std::fs::read(file.path()).unwrap()).unwrap(), report);
    }

    fn operation(kind: OperationKind, disk: Option<(u64, u64)>) -> Operation {
        let (disk_bytes_before_resume, disk_bytes_after_resume) = disk.unzip();
        let progress =
            Progress { memory_sent_bytes: 5, disk_bytes_before_resume, disk_bytes_after_resume, ..Progress::default() };
        let mut text = json!({
            "id": OperationId::generate(), "kind": kind, "project": null, "phase": "done", "actor": "a",
            "request_id": RequestId::generate(), "created_at_ms": 10, "updated_at_ms": 30, "ended_at_ms": 30,
            "is_cancel_requested": false,
        });
        text["progress"] = serde_json::to_value(progress).unwrap();
        serde_json::from_value(text).unwrap()
    }

    #[test]
    fn what_nobody_has_counted_is_absent_and_not_zero() {
        let of = |kind, disk| {
            let row = Move::of(kind, "a", "b", &operation(OperationKind::GuestMigrate, disk));
            row.disk_bytes_before.zip(row.disk_bytes_after)
        };
        assert_eq!((of(Kind::Thaw, None), of(Kind::Thaw, Some((0, 0)))), (None, Some((0, 0))));
        assert_eq!((of(Kind::Live, Some((0, 0))), of(Kind::Live, Some((3, 0)))), (None, Some((3, 0))));
    }

    #[test]
    fn a_missing_number_makes_the_run_fail() {
        assert_eq!(report().outcome(), Outcome::Good);
        let mut one = report();
        one.moves[0].downtime_ms = None;
        assert_eq!(one.outcome(), Outcome::Unmeasured);
        assert_eq!(Report { moves: Vec::new(), ..report() }.outcome(), Outcome::Unmeasured);
        let mut bad = one;
        bad.verdict.tcp_resets = Some(1);
        assert_eq!(bad.outcome(), Outcome::Bad);
    }

    #[test]
    fn the_table_and_the_verdict_are_for_people() {
        let report = report();
        let table = report.table();
        assert!(table.contains("live") && table.contains("7.3 s") && table.contains("210 ms"), "{table}");
        assert_eq!(report.verdict_lines().len(), 4);
        assert!(report.verdict_lines()[2].contains("70 writes read back"), "{:?}", report.verdict_lines());
    }
}
