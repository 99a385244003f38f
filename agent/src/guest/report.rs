//! What a guest's task says to the controller, read off its record: pure.

use supercloud_api::{
    Progress,
    link::{GuestReport, Holding, ReportDetails, VolumeRoot},
};
use supercloud_handover::{DestinationState, LocalCopy, LocalHandover, OwnerQuery, Report, SourceState};
use supercloud_ids::{Epoch, OperationId};

use super::record::GuestRecord;

/// What a host holds of a guest; `None` when nothing.
#[must_use]
pub fn holding(handover: &LocalHandover, is_stalled: bool) -> Option<Holding> {
    Some(match handover.destination().state() {
        DestinationState::Idle | DestinationState::Finished { .. } => match handover.source().state() {
            SourceState::Idle => return None,
            SourceState::Running | SourceState::Copying { .. } if is_stalled => Holding::Paused,
            SourceState::Running | SourceState::Copying { .. } => Holding::Running,
            SourceState::Sealing { .. }
            | SourceState::Sealed { .. }
            | SourceState::Vacating { .. }
            | SourceState::Resuming { .. } => Holding::Paused,
            SourceState::Serving { .. } | SourceState::Releasing => Holding::Volumes,
            SourceState::Lost { .. } => Holding::Down,
        },
        DestinationState::Preparing { .. }
        | DestinationState::Receiving { .. }
        | DestinationState::Complete { .. }
        | DestinationState::Destroying { .. }
        | DestinationState::Orphaned { .. } => Holding::Incoming,
        DestinationState::Granted { .. } => Holding::Paused,
        DestinationState::Running { .. } | DestinationState::Fetched { .. } if is_stalled => Holding::Paused,
        DestinationState::Running { .. } | DestinationState::Fetched { .. } => Holding::Running,
        DestinationState::Lost { .. } => Holding::Down,
    })
}

/// The operation in which the guest takes part here.
#[must_use]
pub fn operation(handover: &LocalHandover) -> Option<OperationId> {
    handover.destination().operation().or_else(|| handover.source().plan().map(|plan| plan.operation))
}

/// The guest's row in a hello or heartbeat.
#[must_use]
pub fn row(
    record: &GuestRecord,
    is_stalled: bool,
    alarm: Option<&str>,
    missing_bytes: u64,
    base_missing_bytes: Option<u64>,
) -> Option<GuestReport> {
    let handover = &record.handover;
    let holding = match holding(handover, is_stalled)? {
        // By level, not by edge: the word of the event itself may have been lost.
        Holding::Running | Holding::Paused if record.is_off && handover.is_quiet() => Holding::Down,
        holding => holding,
    };
    let copy = match handover.destination().epoch() {
        Some(_) => record.incoming.as_ref(),
        None => record.current.as_ref(),
    };
    let volumes = copy.map_or_else(Vec::new, |copy| {
        let root = |stamp: &supercloud_handover::VolumeStamp| VolumeRoot {
            volume: stamp.volume,
            root: hex::encode(stamp.root),
            version: stamp.version,
        };
        copy.sealed.iter().map(root).collect()
    });
    Some(GuestReport {
        guest: record.guest(),
        epoch: handover.destination().epoch().unwrap_or_else(|| handover.source().epoch()),
        holding,
        operation: operation(handover),
        alarm: record.alarm.as_deref().or(alarm).map(str::to_owned),
        missing_bytes,
        base_missing_bytes,
        volumes,
    })
}

/// What goes with a report.
#[must_use]
pub fn details(
    report: &Report,
    record: &GuestRecord,
    (progress, of): (&Progress, Option<OperationId>),
    problem: Option<&supercloud_api::Problem>,
) -> ReportDetails {
    let class = || {
        let copy = record.incoming.as_ref().or(record.current.as_ref());
        copy.map(|copy| copy.launch.spec.class.clone())
    };
    // What is known may still be of the operation before, which did what this one never came to.
    let progress = match report {
        Report::Running { operation, .. }
        | Report::NothingMissing { operation, .. }
        | Report::Resumed { operation, .. }
            if of != Some(*operation) =>
        {
            &Progress::default()
        }
        _ => progress,
    };
    match report {
        Report::Prepared { .. } => ReportDetails { compat_class: class(), ..ReportDetails::default() },
        Report::RequestSwitch(_) => ReportDetails { frozen: record.frozen.clone(), ..ReportDetails::default() },
        Report::RequestAbort { .. } | Report::Cleaned { .. } => {
            ReportDetails { problem: problem.cloned(), ..ReportDetails::default() }
        }
        Report::Running { .. } => {
            ReportDetails { compat_class: class(), progress: Some(progress.clone()), ..ReportDetails::default() }
        }
        Report::NothingMissing { .. } | Report::Released { .. } | Report::Resumed { .. } => {
            ReportDetails { progress: Some(progress.clone()), ..ReportDetails::default() }
        }
        _ => ReportDetails::default(),
    }
}

/// What is to be said when the controller is there again and tells at which epoch this host owns the guest, beside what
/// the machines say by themselves: held but not owned, or owned but not held.
#[must_use]
pub fn reconcile(handover: &LocalHandover, owned: Option<Epoch>) -> Option<Report> {
    if !handover.is_quiet() {
        return None;
    }
    let source = handover.source();
    match (source.state(), owned) {
        (SourceState::Running, owned) if owned != Some(source.epoch()) => Some(Report::AskOwner(OwnerQuery {
            operation: None,
            epoch: source.epoch(),
            copy: LocalCopy::Intact,
            wants_back: false,
        })),
        // This host's state was lost, and with it the guest.
        (SourceState::Idle, Some(epoch)) => Some(Report::GuestLost { operation: None, epoch }),
        _ => None,
    }
}

/// Takes news into what is known of an operation's progress: counters never go back, and what nothing is said of stays.
pub fn merge(known: &mut Progress, told: &Progress) {
    known.memory_sent_bytes = known.memory_sent_bytes.max(told.memory_sent_bytes);
    known.round = known.round.max(told.round);
    known.disk_bytes_before_resume = known.disk_bytes_before_resume.max(told.disk_bytes_before_resume);
    known.disk_bytes_after_resume = known.disk_bytes_after_resume.max(told.disk_bytes_after_resume);
    known.downtime_ms = told.downtime_ms.or(known.downtime_ms);
    known.disk_missing_bytes = told.disk_missing_bytes;
    if told.memory_total_bytes > 0 {
        known.memory_total_bytes = known.memory_total_bytes.max(told.memory_total_bytes);
        known.memory_remaining_bytes = told.memory_remaining_bytes;
        known.dirty_bytes_per_s = told.dirty_bytes_per_s;
        known.bandwidth_bytes_per_s = told.bandwidth_bytes_per_s;
        known.is_holding = told.is_holding;
        known.eta_min_ms = told.eta_min_ms;
        known.eta_max_ms = told.eta_max_ms;
    }
    known.memory_missing_bytes = match (known.memory_missing_bytes, told.memory_missing_bytes) {
        (Some(known), Some(told)) => Some(known.min(told)),
        (known, told) => known.or(told),
    };
    if let Some(mirror) = &told.mirror {
        known.mirror = Some(mirror.clone());
    }
    if !told.message.is_empty() {
        known.message.clone_from(&told.message);
    }
}

#[cfg(test)]
mod tests {
    use supercloud_handover::SourceHandover;
    use supercloud_ids::{GuestId, HostId};

    use super::*;

    #[test]
    fn what_is_held_and_owned_differently_is_asked_or_told() {
        let (guest, host) = (GuestId::generate(), HostId::generate());
        let running = LocalHandover::of(SourceHandover::running(guest, host, Epoch(3)), host);
        assert_eq!(reconcile(&running, Some(Epoch(3))), None);
        for other in [None, Some(Epoch(2)), Some(Epoch(4))] {
            assert!(matches!(reconcile(&running, other), Some(Report::AskOwner(query)) if query.epoch == Epoch(3)));
        }
        let idle = LocalHandover::idle(guest, host);
        assert_eq!(reconcile(&idle, None), None);
        assert_eq!(reconcile(&idle, Some(Epoch(3))), Some(Report::GuestLost { operation: None, epoch: Epoch(3) }));
    }

    #[test]
    fn progress_counts_forward_and_keeps_what_the_other_part_said() {
        let mut known = Progress::default();
        let memory = Progress {
            memory_total_bytes: 100,
            memory_sent_bytes: 60,
            memory_remaining_bytes: 40,
            round: 2,
            message: "a".into(),
            ..Progress::default()
        };
        merge(&mut known, &memory);
        merge(&mut known, &Progress { is_holding: true, ..memory.clone() });
        assert!(known.is_holding);
        merge(&mut known, &memory);
        assert!(!known.is_holding);
        merge(&mut known, &Progress { disk_bytes_before_resume: Some(9), ..Progress::default() });
        merge(&mut known, &Progress { memory_sent_bytes: 10, round: 1, ..memory.clone() });
        assert_eq!((known.memory_sent_bytes, known.round, known.memory_remaining_bytes), (60, 2, 40));
        assert_eq!((known.disk_bytes_before_resume, known.message.as_str()), (Some(9), "a"));
        for (told, shown) in [(None, None), (Some(5), Some(5)), (Some(6), Some(5)), (None, Some(5)), (Some(0), Some(0))]
        {
            merge(&mut known, &Progress { memory_missing_bytes: told, ..Progress::default() });
            assert_eq!(known.memory_missing_bytes, shown);
        }
    }

    #[test]
    fn a_move_that_was_called_off_tells_nothing_of_the_one_before() {
        let guest = GuestId::generate();
        let record = GuestRecord::new(guest, HostId::generate());
        let (before, now) = (OperationId::generate(), OperationId::generate());
        let known = Progress { downtime_ms: Some(648), ..Progress::default() };
        let resumed = |operation| Report::Resumed { operation, epoch: Epoch(2) };
        let told = |operation| details(&resumed(operation), &record, (&known, Some(before)), None).progress.unwrap();
        assert_eq!((told(before).downtime_ms, told(now).downtime_ms), (Some(648), None));
    }

    #[test]
    fn an_idle_guest_is_not_reported_and_a_stalled_one_is_paused() {
        let (guest, host) = (GuestId::generate(), HostId::generate());
        assert_eq!(holding(&LocalHandover::idle(guest, host), false), None);
        let running = LocalHandover::of(SourceHandover::running(guest, host, Epoch(3)), host);
        assert_eq!(holding(&running, false), Some(Holding::Running));
        assert_eq!(holding(&running, true), Some(Holding::Paused));
    }
}
