//! libvirt's numbers in our words; pure.

use supercloud_blanket::{
    backend::{GuestEvent, PauseReason, RunState, StopReason},
    migrate::{TransferPhase, TransferProgress},
};
use virt::sys;

use crate::metadata::Role;

/// What a machine's state means to us. `None`: it is gone.
pub(crate) fn run_state(state: u32, reason: u32, role: Role) -> Option<RunState> {
    match state {
        sys::VIR_DOMAIN_RUNNING | sys::VIR_DOMAIN_BLOCKED => Some(RunState::Running),
        sys::VIR_DOMAIN_PAUSED => Some(RunState::Paused(pause_reason(reason, role))),
        sys::VIR_DOMAIN_PMSUSPENDED => Some(RunState::Paused(PauseReason::Other)),
        sys::VIR_DOMAIN_SHUTDOWN => Some(RunState::ShuttingDown),
        sys::VIR_DOMAIN_CRASHED => Some(RunState::Crashed),
        _ => None,
    }
}

/// A departed and an incoming guest are both `paused (migration)` for libvirt; the role tells which. An incoming one
/// becomes `paused (user)` when its finish phase is done: it has arrived, whether or not its mark says so by then.
fn pause_reason(reason: u32, role: Role) -> PauseReason {
    match (role, reason) {
        (Role::Incoming, sys::VIR_DOMAIN_PAUSED_MIGRATION | sys::VIR_DOMAIN_PAUSED_STARTING_UP) => {
            PauseReason::Incoming
        }
        // Only a save of ours pauses for this reason; its guest has run here, whatever its mark still says.
        (_, sys::VIR_DOMAIN_PAUSED_SAVE) => PauseReason::Saving,
        (Role::Incoming | Role::Arrived, _) => PauseReason::Arrived,
        (Role::Owner, sys::VIR_DOMAIN_PAUSED_USER) => PauseReason::Asked,
        (Role::Owner, sys::VIR_DOMAIN_PAUSED_MIGRATION) => PauseReason::Departed,
        (Role::Owner, sys::VIR_DOMAIN_PAUSED_IOERROR) => PauseReason::DiskError,
        (
            Role::Owner,
            sys::VIR_DOMAIN_PAUSED_DUMP | sys::VIR_DOMAIN_PAUSED_SNAPSHOT | sys::VIR_DOMAIN_PAUSED_FROM_SNAPSHOT,
        ) => PauseReason::Saving,
        (Role::Owner, _) => PauseReason::Other,
    }
}

/// A lifecycle event of libvirt's; `None` for those that say nothing new.
pub(crate) fn lifecycle(event: u32, detail: u32) -> Option<GuestEvent> {
    match event {
        sys::VIR_DOMAIN_EVENT_STARTED => Some(GuestEvent::Started),
        sys::VIR_DOMAIN_EVENT_SUSPENDED => Some(GuestEvent::Paused(match detail {
            sys::VIR_DOMAIN_EVENT_SUSPENDED_PAUSED => PauseReason::Asked,
            sys::VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED => PauseReason::Departed,
            sys::VIR_DOMAIN_EVENT_SUSPENDED_IOERROR => PauseReason::DiskError,
            sys::VIR_DOMAIN_EVENT_SUSPENDED_RESTORED | sys::VIR_DOMAIN_EVENT_SUSPENDED_FROM_SNAPSHOT => {
                PauseReason::Saving
            }
            _ => PauseReason::Other,
        })),
        sys::VIR_DOMAIN_EVENT_RESUMED => Some(GuestEvent::Resumed),
        sys::VIR_DOMAIN_EVENT_STOPPED => Some(GuestEvent::Stopped(match detail {
            sys::VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN => StopReason::PoweredOff,
            sys::VIR_DOMAIN_EVENT_STOPPED_DESTROYED => StopReason::Killed,
            // libvirt says "failed" when the QEMU process ended without being asked to.
            sys::VIR_DOMAIN_EVENT_STOPPED_CRASHED | sys::VIR_DOMAIN_EVENT_STOPPED_FAILED => StopReason::Crashed,
            sys::VIR_DOMAIN_EVENT_STOPPED_MIGRATED => StopReason::Departed,
            sys::VIR_DOMAIN_EVENT_STOPPED_SAVED => StopReason::Frozen,
            _ => StopReason::Failed,
        })),
        sys::VIR_DOMAIN_EVENT_CRASHED => Some(GuestEvent::Stopped(StopReason::Crashed)),
        _ => None,
    }
}

/// The figures of a job that are read; absent ones are zero, as in the first second of a migration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct JobFigures {
    pub iteration: u64,
    pub memory_total: u64,
    pub memory_processed: u64,
    pub memory_remaining: u64,
    /// Pages per second.
    pub dirty_rate: u64,
    pub page_size: u64,
    /// Bytes per second.
    pub bandwidth: u64,
    pub downtime_ms: Option<u64>,
    pub throttle_percent: u64,
    pub elapsed_ms: u64,
}

/// The next value of a progress that never goes back. `is_paused`: the source's vCPUs stand still.
pub(crate) fn advance(before: &TransferProgress, job: &JobFigures, is_paused: bool) -> TransferProgress {
    let phase = match (is_paused, job.memory_total) {
        (true, _) => TransferPhase::Drain,
        (false, 0) => TransferPhase::Setup,
        (false, _) => TransferPhase::Copy,
    };
    let page = if job.page_size == 0 { 4096 } else { job.page_size };
    TransferProgress {
        is_holding: false,
        phase: before.phase.max(phase),
        iteration: before.iteration.max(job.iteration),
        memory_total_bytes: before.memory_total_bytes.max(job.memory_total),
        memory_processed_bytes: before.memory_processed_bytes.max(job.memory_processed),
        memory_remaining_bytes: job.memory_remaining,
        dirty_bytes_per_s: job.dirty_rate.saturating_mul(page),
        bandwidth_bytes_per_s: job.bandwidth,
        expected_downtime_ms: job.downtime_ms,
        throttle_percent: job.throttle_percent,
        elapsed_ms: before.elapsed_ms.max(job.elapsed_ms),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_role_tells_a_departed_guest_from_an_incoming_and_an_arrived_one() {
        let paused = |reason, role| run_state(sys::VIR_DOMAIN_PAUSED, reason, role);
        let migration = sys::VIR_DOMAIN_PAUSED_MIGRATION;
        assert_eq!(paused(migration, Role::Owner), Some(RunState::Paused(PauseReason::Departed)));
        assert_eq!(paused(migration, Role::Incoming), Some(RunState::Paused(PauseReason::Incoming)));
        for role in [Role::Arrived, Role::Incoming] {
            assert_eq!(paused(sys::VIR_DOMAIN_PAUSED_USER, role), Some(RunState::Paused(PauseReason::Arrived)));
        }
        for role in [Role::Owner, Role::Arrived] {
            let saving = Some(RunState::Paused(PauseReason::Saving));
            assert_eq!(paused(sys::VIR_DOMAIN_PAUSED_SAVE, role), saving);
        }
        assert_eq!(paused(sys::VIR_DOMAIN_PAUSED_USER, Role::Owner), Some(RunState::Paused(PauseReason::Asked)));
        for role in [Role::Owner, Role::Incoming, Role::Arrived] {
            assert_eq!(run_state(sys::VIR_DOMAIN_RUNNING, 0, role), Some(RunState::Running));
            assert_eq!(run_state(sys::VIR_DOMAIN_SHUTOFF, 0, role), None);
        }
    }

    #[test]
    fn a_process_that_died_is_a_crash_and_a_departure_is_not() {
        let stopped = |detail| lifecycle(sys::VIR_DOMAIN_EVENT_STOPPED, detail);
        assert_eq!(stopped(sys::VIR_DOMAIN_EVENT_STOPPED_FAILED), Some(GuestEvent::Stopped(StopReason::Crashed)));
        assert_eq!(stopped(sys::VIR_DOMAIN_EVENT_STOPPED_MIGRATED), Some(GuestEvent::Stopped(StopReason::Departed)));
        assert_eq!(lifecycle(sys::VIR_DOMAIN_EVENT_DEFINED, 0), None);
        assert_eq!(lifecycle(9999, 9999), None);
    }

    #[test]
    fn progress_never_goes_back() {
        let mut now = TransferProgress::default();
        let copy =
            JobFigures { memory_total: 100, memory_processed: 60, iteration: 2, elapsed_ms: 50, ..Default::default() };
        now = advance(&now, &copy, false);
        assert_eq!((now.phase, now.iteration), (TransferPhase::Copy, 2));
        now = advance(&now, &JobFigures::default(), true);
        assert_eq!((now.phase, now.memory_processed_bytes, now.iteration), (TransferPhase::Drain, 60, 2));
        now = advance(&now, &copy, false);
        assert_eq!((now.phase, now.elapsed_ms), (TransferPhase::Drain, 50));
    }

    #[test]
    fn the_dirty_rate_is_in_bytes_even_where_the_page_size_is_not_told() {
        let job = JobFigures { dirty_rate: 10, ..Default::default() };
        assert_eq!(advance(&TransferProgress::default(), &job, false).dirty_bytes_per_s, 40_960);
        let huge = JobFigures { dirty_rate: u64::MAX, page_size: 4096, ..Default::default() };
        assert_eq!(advance(&TransferProgress::default(), &huge, false).dirty_bytes_per_s, u64::MAX);
    }
}
