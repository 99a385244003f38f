//! Which request is taken in which state of a guest: one pure table.

use supercloud_api::{Code, GuestState, Problem, ids::OperationId};

/// What somebody wants of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Request {
    /// Start it cold.
    Start,
    /// Shut it down.
    Stop,
    /// Move it live.
    Migrate,
    /// Keep a second copy of it.
    Mirror,
    /// Suspend it into the store.
    Freeze,
    /// Resume it from the store.
    Thaw,
    /// Set it back to a checkpoint, and resume it from there.
    SetBack,
    /// Delete it.
    Delete,
    /// Change a setting that no host knows of.
    Patch,
}

impl Request {
    /// All of them.
    pub const ALL: [Request; 9] = [
        Request::Start,
        Request::Stop,
        Request::Migrate,
        Request::Mirror,
        Request::Freeze,
        Request::Thaw,
        Request::SetBack,
        Request::Delete,
        Request::Patch,
    ];

    /// The states in which it is taken.
    #[must_use]
    pub const fn states(self) -> &'static [GuestState] {
        use GuestState::{Created, Frozen, Lost, Running, Stopped};
        match self {
            // A lost guest starts again from its volumes.
            Self::Start => &[Created, Stopped, Lost],
            Self::Stop | Self::Migrate | Self::Mirror | Self::Freeze => &[Running],
            Self::Thaw => &[Frozen],
            // Never while a copy may run.
            Self::SetBack => &[Stopped, Lost],
            Self::Delete => &[Created, Stopped, Frozen, Lost],
            Self::Patch => &[Created, Running, Stopped, Frozen, Lost],
        }
    }

    /// Whether it is taken while an operation holds the guest.
    #[must_use]
    pub const fn is_taken_during_operation(self) -> bool {
        matches!(self, Self::Patch)
    }

    /// As messages say it.
    #[must_use]
    pub const fn verb(self) -> &'static str {
        match self {
            Self::Start => "started",
            Self::Stop => "stopped",
            Self::Migrate => "migrated",
            Self::Mirror => "mirrored",
            Self::Freeze => "frozen",
            Self::Thaw => "thawed",
            Self::SetBack => "set back to a checkpoint",
            Self::Delete => "deleted",
            Self::Patch => "changed",
        }
    }
}

/// What matters of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Where it is in its life.
    pub state: GuestState,
    /// The operation that holds it.
    pub operation: Option<OperationId>,
    /// It is being deleted.
    pub is_deleting: bool,
}

/// Why a request is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DenyReason {
    /// It is being deleted.
    #[error("the guest is being deleted")]
    Deleting,
    /// An operation holds it.
    #[error("operation {0} holds the guest; wait for it or cancel it")]
    Busy(OperationId),
    /// Not in this state.
    #[error("a guest that is {} cannot be {}; {}", name(*.state), .request.verb(), hint(*.request, *.state))]
    State {
        /// What was wanted.
        request: Request,
        /// The state.
        state: GuestState,
    },
}

const fn name(state: GuestState) -> &'static str {
    match state {
        GuestState::Created => "created (never started)",
        GuestState::Running => "running",
        GuestState::Stopped => "stopped",
        GuestState::Frozen => "frozen",
        GuestState::Lost => "lost",
    }
}

const fn hint(request: Request, state: GuestState) -> &'static str {
    match (request, state) {
        (Request::Start, GuestState::Running) => "it runs already",
        (Request::Thaw, GuestState::Stopped | GuestState::Lost) => {
            "thaw it from a checkpoint, if it has one (`--checkpoint`), or start it again from its volumes"
        }
        (_, GuestState::Frozen) => "thaw it first",
        (Request::Delete, GuestState::Running) => "stop it first",
        (_, GuestState::Created | GuestState::Stopped) => "start it first",
        (_, GuestState::Lost) => "start it again from its volumes first",
        (Request::Thaw, GuestState::Running) => "it runs already",
        _ => "see its state",
    }
}

impl DenyReason {
    /// As a client is told.
    #[must_use]
    pub fn problem(self) -> Problem {
        let code = match self {
            Self::Busy(_) => Code::OperationInProgress,
            Self::Deleting | Self::State { .. } => Code::WrongState,
        };
        Problem::new(code, self.to_string())
    }
}

/// Whether a request is taken; `None`: it is.
#[must_use]
pub fn deny_reason(request: Request, guest: Standing) -> Option<DenyReason> {
    if guest.is_deleting {
        return Some(DenyReason::Deleting);
    }
    if let Some(operation) = guest.operation.filter(|_| !request.is_taken_during_operation()) {
        return Some(DenyReason::Busy(operation));
    }
    if !request.states().contains(&guest.state) {
        return Some(DenyReason::State { request, state: guest.state });
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use GuestState::{Created, Frozen, Lost, Running, Stopped};

    /// The table once more, as a person would write it: rows are requests, columns created, running, stopped, frozen, lost.
    const EXPECTED: [(Request, [bool; 5]); 9] = [
        (Request::Start, [true, false, true, false, true]),
        (Request::Stop, [false, true, false, false, false]),
        (Request::Migrate, [false, true, false, false, false]),
        (Request::Mirror, [false, true, false, false, false]),
        (Request::Freeze, [false, true, false, false, false]),
        (Request::Thaw, [false, false, false, true, false]),
        (Request::SetBack, [false, false, true, false, true]),
        (Request::Delete, [true, false, true, true, true]),
        (Request::Patch, [true, true, true, true, true]),
    ];

    #[test]
    fn every_request_in_every_state_with_and_without_an_operation() {
        let operation = OperationId::generate();
        assert_eq!(EXPECTED.map(|row| row.0), Request::ALL);
        for (request, row) in EXPECTED {
            for (state, expected) in [Created, Running, Stopped, Frozen, Lost].into_iter().zip(row) {
                let free = Standing { state, operation: None, is_deleting: false };
                let denied = deny_reason(request, free);
                assert_eq!(denied.is_none(), expected, "{request:?} in {state:?}");
                if let Some(reason) = denied {
                    assert_eq!(reason.problem().code, Code::WrongState);
                    assert!(!reason.to_string().is_empty());
                }
                let busy = Standing { operation: Some(operation), ..free };
                let expected_busy = (request != Request::Patch).then_some(DenyReason::Busy(operation));
                assert_eq!(deny_reason(request, busy), expected_busy, "{request:?} in {state:?}, busy");
                let dying = Standing { is_deleting: true, ..busy };
                assert_eq!(deny_reason(request, dying), Some(DenyReason::Deleting));
            }
        }
    }
}
