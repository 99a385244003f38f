//! Which operation is legal when (virtio 1.2, 2.1 and 3.1): one table, obeyed by the transport and used by the fuzzer's
//! model. What is not legal is ignored: it changes nothing.

use serde::{Deserialize, Serialize};

/// Status bits.
pub mod status {
    /// The guest has found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// It has a driver for it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed.
    pub const FEATURES_OK: u8 = 8;
    /// The device cannot go on until it is reset.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver gave up.
    pub const FAILED: u8 = 128;
}

/// How far driver and device have come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// After power-on or a reset.
    Reset,
    /// Found.
    Found,
    /// A driver is there and chooses features.
    Driven,
    /// Features are agreed, queues are being set up.
    Agreed,
    /// Requests are served.
    Live,
    /// The driver gave up, or the device could not go on; only a reset helps.
    Failed,
}

/// What a guest may try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Choose which half of features, or which queue, the registers show.
    Select,
    /// Say which features it wants.
    WriteFeatures,
    /// Say which interrupt tells of configuration changes, or of a queue.
    SetVector,
    /// Say where a queue is and how long.
    SetQueue,
    /// Switch a queue on.
    EnableQueue,
    /// Say that there is something in a queue.
    Notify,
    /// Write into the device's own configuration, where that can be written.
    WriteConfig,
}

/// Every phase.
pub const PHASES: [Phase; 6] = [Phase::Reset, Phase::Found, Phase::Driven, Phase::Agreed, Phase::Live, Phase::Failed];

/// What is legal in each phase; everything else is not.
pub const LEGAL: &[(Phase, &[Operation])] = &[
    (Phase::Reset, &[Operation::Select]),
    (Phase::Found, &[Operation::Select]),
    (Phase::Driven, &[Operation::Select, Operation::WriteFeatures]),
    // Drivers set the vector for configuration changes before features are agreed or after.
    (
        Phase::Agreed,
        &[Operation::Select, Operation::SetVector, Operation::SetQueue, Operation::EnableQueue, Operation::WriteConfig],
    ),
    (Phase::Live, &[Operation::Select, Operation::Notify, Operation::WriteConfig]),
    (Phase::Failed, &[Operation::Select]),
];

/// Whether an operation is legal.
#[must_use]
pub fn is_legal(phase: Phase, operation: Operation) -> bool {
    LEGAL.iter().any(|(row, operations)| *row == phase && operations.contains(&operation))
}

/// What a write of the status register asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing legal, or nothing new.
    Stay,
    /// A reset.
    Reset,
    /// The next phase. To [`Phase::Agreed`] only if the features are acceptable, to [`Phase::Live`] only if the queues are.
    Go(Phase),
}

const FOUND: u8 = status::ACKNOWLEDGE;
const DRIVEN: u8 = FOUND | status::DRIVER;
const AGREED: u8 = DRIVEN | status::FEATURES_OK;
const LIVE: u8 = AGREED | status::DRIVER_OK;

/// The status register's value in a phase, as far as it follows from it.
#[must_use]
pub const fn status_of(phase: Phase) -> u8 {
    match phase {
        Phase::Reset => 0,
        Phase::Found => FOUND,
        Phase::Driven => DRIVEN,
        Phase::Agreed => AGREED,
        Phase::Live => LIVE,
        Phase::Failed => status::FAILED,
    }
}

/// Status writes that lead on.
pub const STEPS: &[(Phase, u8, Phase)] = &[
    (Phase::Reset, FOUND, Phase::Found),
    (Phase::Reset, DRIVEN, Phase::Driven),
    (Phase::Found, DRIVEN, Phase::Driven),
    (Phase::Driven, AGREED, Phase::Agreed),
    (Phase::Agreed, LIVE, Phase::Live),
];

/// What a status write asks for in a phase.
#[must_use]
pub fn step(phase: Phase, written: u8) -> Step {
    if written == 0 {
        return Step::Reset;
    }
    if written & status::FAILED != 0 {
        return if phase == Phase::Failed { Step::Stay } else { Step::Go(Phase::Failed) };
    }
    let next = STEPS.iter().find(|(from, value, _)| (*from, *value) == (phase, written));
    next.map_or(Step::Stay, |(_, _, to)| Step::Go(*to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_each_phase_once_and_only_forward_steps() {
        for phase in PHASES {
            assert_eq!(LEGAL.iter().filter(|(row, _)| *row == phase).count(), 1);
            assert!(is_legal(phase, Operation::Select));
            assert_eq!(step(phase, 0), Step::Reset);
            assert_eq!(
                step(phase, status_of(phase).max(1)),
                match phase {
                    Phase::Reset => Step::Go(Phase::Found),
                    _ => Step::Stay,
                }
            );
        }
        for (from, value, to) in STEPS {
            assert_eq!(status_of(*to), *value);
            assert!(PHASES.iter().position(|p| p == from) < PHASES.iter().position(|p| p == to));
        }
    }

    #[test]
    fn queues_are_set_only_between_features_and_start_and_served_only_after() {
        for phase in PHASES {
            for operation in [Operation::SetQueue, Operation::EnableQueue] {
                assert_eq!(is_legal(phase, operation), phase == Phase::Agreed);
            }
            assert_eq!(is_legal(phase, Operation::Notify), phase == Phase::Live);
        }
        // No way to Live but through Agreed.
        for phase in PHASES.into_iter().filter(|phase| *phase != Phase::Agreed) {
            assert!((0..=255).all(|value| step(phase, value) != Step::Go(Phase::Live)));
        }
    }
}
