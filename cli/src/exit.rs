//! How a command ends, and the exit codes that tell of it.

use std::process::ExitCode;

use supercloud_api::{
    Operation,
    client::ClientError,
    ids::{OperationId, PlanId},
};

/// A local fault, or the controller cannot be reached.
pub const FAULT: u8 = 1;
// 2 is wrong usage: clap ends the process with it itself.
/// The controller refused.
pub const REFUSED: u8 = 3;
/// An operation did not end as it should.
pub const OPERATION_FAILED: u8 = 4;
/// `apply`: what cannot be changed in place.
pub const UNCHANGEABLE: u8 = 5;
/// `apply --dry-run`: something would change.
pub const WOULD_CHANGE: u8 = 6;
/// `apply`: the answer was no.
pub const NOT_AGREED: u8 = 7;
/// `apply`: there is nobody to ask.
pub const NOBODY_TO_ASK: u8 = 8;
/// The controller is there, and busy or just starting.
pub const UNAVAILABLE: u8 = 9;
/// As the shell tells of a process that SIGINT ended.
pub const INTERRUPTED: u8 = 130;
/// As the shell tells of a process that SIGPIPE ended.
pub const NO_READER: u8 = 141;

/// What `--help` says of them.
pub const HELP: &str = "\
Exit codes:
    0  done
    1  the controller cannot be reached, or a local fault
    2  wrong usage
    3  the controller refused
    4  the operation failed or was rolled back; a plan failed
    5  `apply`: the file asks for what cannot be had, or changed in place; nothing was done
    6  `apply --dry-run`: something would change
    7  `apply`: asked whether to go on, somebody said no; nothing was done
    8  `apply`: there is no terminal to ask at, and no --yes; nothing was done
    9  the controller is busy or just starting (429, 503), and still was after 20 s: try again later
  130  interrupted: whatever was watched goes on; `apply` and `export` go on with the same command
  141  nobody reads the output any more";

/// An operation that did not end as it should.
#[derive(Debug)]
pub struct OperationFailed(pub Box<Operation>);

impl std::fmt::Display for OperationFailed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Operation { id, phase, .. } = &*self.0;
        write!(f, "operation {id} ended as {}", supercloud_cli::progress::phase_name(*phase))?;
        match self.0.failure() {
            Some(problem) => write!(f, ": {}", problem.detail),
            None => Ok(()),
        }
    }
}

impl std::error::Error for OperationFailed {}

/// A plan that has come to rest with steps that are not as they should be.
#[derive(Debug, thiserror::Error)]
#[error("plan {0} ended as failed: see its steps; `supercloud plan undo {0}` takes back what was done")]
pub struct PlanFailed(pub PlanId);

/// The user no longer looks at an operation, which goes on.
#[derive(Debug)]
pub struct WatchLeft(pub OperationId);

impl std::fmt::Display for WatchLeft {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self(id) = self;
        write!(
            f,
            "no longer watched; it goes on. Look again: supercloud operation watch {id}; end it: supercloud operation cancel {id}"
        )
    }
}

impl std::error::Error for WatchLeft {}

/// The user does not wait for a content to be written to a file.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct ExportLeft;

/// How `apply` ends when it has not done what the file says.
#[derive(Debug, thiserror::Error)]
pub enum NotApplied {
    /// Steps that a dry run found.
    #[error("steps that would be done: {0}")]
    WouldChange(usize),
    /// Things that cannot be had.
    #[error("what cannot be had as the file says: {0}; nothing was done")]
    Unchangeable(usize),
    /// Nobody can be asked.
    #[error("without a terminal to ask at, --yes is needed")]
    NobodyToAsk,
    /// The user does not wait.
    #[error("interrupted; what was begun goes on, and the same command goes on from here")]
    Interrupted,
    /// The answer was no.
    #[error("nothing was done")]
    NotAgreed,
}

/// Says what went wrong, and gives its code.
pub fn tell(error: &anyhow::Error) -> ExitCode {
    match error.downcast_ref::<NotApplied>() {
        // What a dry run found is no error.
        Some(found @ NotApplied::WouldChange(_)) => eprintln!("{found}"),
        _ => eprintln!("error: {error:#}"),
    }
    if let Some(ClientError::Problem(problem)) = error.downcast_ref::<ClientError>()
        && problem.retryable
    {
        eprintln!("hint: this may pass by itself; try again later");
    }
    ExitCode::from(code(error))
}

fn code(error: &anyhow::Error) -> u8 {
    if error.downcast_ref::<OperationFailed>().is_some() || error.downcast_ref::<PlanFailed>().is_some() {
        return OPERATION_FAILED;
    }
    if error.downcast_ref::<WatchLeft>().is_some() || error.downcast_ref::<ExportLeft>().is_some() {
        return INTERRUPTED;
    }
    match error.downcast_ref::<NotApplied>() {
        Some(NotApplied::WouldChange(_)) => return WOULD_CHANGE,
        Some(NotApplied::NobodyToAsk) => return NOBODY_TO_ASK,
        Some(NotApplied::NotAgreed) => return NOT_AGREED,
        Some(NotApplied::Unchangeable(_)) => return UNCHANGEABLE,
        Some(NotApplied::Interrupted) => return INTERRUPTED,
        None => {}
    }
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Problem(problem)) if matches!(problem.status, 429 | 503) => UNAVAILABLE,
        Some(ClientError::Problem(_)) => REFUSED,
        _ => FAULT,
    }
}
