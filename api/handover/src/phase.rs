//! The phases of an operation, and which may follow which: forward only.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where an operation on a guest is. The names are those that people see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Checked and predicted; nothing has happened yet.
    Plan,
    /// The destination reserves what it needs.
    Prepare,
    /// The guest runs at its source while its state is copied.
    Copy,
    /// The guest is paused; the destination holds all that it needs to go on and asks for the switch.
    Switch,
    /// Past the commit point: the destination starts the guest.
    Resume,
    /// The guest runs; what is still missing is fetched, then the source is released.
    Finish,
    /// Ended: the change is made and nothing is left behind.
    Done,
    /// Ended: as if nothing had happened, and nothing is left behind.
    RolledBack,
    /// Ended past the commit point with a loss that a person or a policy must answer. Never silent.
    Failed,
}

/// Every step that an operation may take. All go forward; the step out of [`Phase::Switch`] to
/// [`Phase::Resume`] or [`Phase::Finish`] is the COMMIT POINT: no row leads from behind it to [`Phase::RolledBack`].
pub const TRANSITIONS: &[(Phase, Phase)] = &[
    (Phase::Plan, Phase::Prepare),
    // A freeze and a stop have no destination to prepare.
    (Phase::Plan, Phase::Copy),
    (Phase::Plan, Phase::RolledBack),
    (Phase::Prepare, Phase::Copy),
    (Phase::Prepare, Phase::RolledBack),
    (Phase::Copy, Phase::Switch),
    (Phase::Copy, Phase::RolledBack),
    // COMMIT POINT
    (Phase::Switch, Phase::Resume),
    (Phase::Switch, Phase::Finish),
    (Phase::Switch, Phase::RolledBack),
    (Phase::Resume, Phase::Finish),
    (Phase::Resume, Phase::Failed),
    (Phase::Finish, Phase::Done),
    (Phase::Finish, Phase::Failed),
];

/// Whether [`TRANSITIONS`] has this step.
#[must_use]
pub fn is_transition_valid(from: Phase, to: Phase) -> bool {
    TRANSITIONS.contains(&(from, to))
}

/// Whether `to` is `from` itself or can be reached from it by valid steps.
#[must_use]
pub fn is_ahead(from: Phase, to: Phase) -> bool {
    // The table has no cycles (tested), so this ends.
    from == to || TRANSITIONS.iter().any(|(a, b)| *a == from && is_ahead(*b, to))
}

impl Phase {
    /// All phases, in order.
    pub const ALL: [Phase; 9] = [
        Phase::Plan,
        Phase::Prepare,
        Phase::Copy,
        Phase::Switch,
        Phase::Resume,
        Phase::Finish,
        Phase::Done,
        Phase::RolledBack,
        Phase::Failed,
    ];

    /// Whether the operation has ended.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        matches!(self, Phase::Done | Phase::RolledBack | Phase::Failed)
    }

    /// Whether the commit point is behind: only forward from here.
    #[must_use]
    pub const fn is_committed(self) -> bool {
        matches!(self, Phase::Resume | Phase::Finish | Phase::Done | Phase::Failed)
    }

    /// The name as it is stored and shown.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Phase::Plan => "plan",
            Phase::Prepare => "prepare",
            Phase::Copy => "copy",
            Phase::Switch => "switch",
            Phase::Resume => "resume",
            Phase::Finish => "finish",
            Phase::Done => "done",
            Phase::RolledBack => "rolled_back",
            Phase::Failed => "failed",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_goes_forward_and_nothing_follows_an_end() {
        for (from, to) in TRANSITIONS {
            assert!(from < to, "{from} -> {to}");
            assert!(!from.is_terminal(), "{from} -> {to}");
        }
        for phase in Phase::ALL {
            assert!(is_ahead(Phase::Plan, phase), "{phase} cannot be reached");
        }
    }

    #[test]
    fn the_commit_point_separates_rolling_back_from_rolling_forward() {
        for phase in Phase::ALL {
            let back = is_ahead(phase, Phase::RolledBack);
            assert_eq!(back, !phase.is_committed(), "{phase}");
        }
    }

    #[test]
    fn the_table_in_the_crate_documentation_is_this_table() {
        let docs = include_str!("lib.rs");
        for from in Phase::ALL {
            let next: Vec<_> = TRANSITIONS.iter().filter(|(a, _)| *a == from).map(|(_, b)| b.name()).collect();
            let next = if next.is_empty() { "(end)".to_owned() } else { next.join(", ") };
            let row = format!("//! | {} | {} |", from.name(), next);
            assert!(docs.lines().any(|line| line == row), "lib.rs lacks the row `{row}`");
        }
    }
}
