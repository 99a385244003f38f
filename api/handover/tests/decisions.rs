//! The controller's decisions, one by one.

use supercloud_handover::*;
use supercloud_ids::{Epoch, FreezeId, GuestId, HostId, OperationId, VolumeId};

struct Names {
    a: HostId,
    b: HostId,
    c: HostId,
    op: OperationId,
}

fn names() -> Names {
    Names { a: HostId::generate(), b: HostId::generate(), c: HostId::generate(), op: OperationId::generate() }
}

fn owned_by(host: HostId) -> OwnerRecord {
    OwnerRecord { owner: Owner::Host(host), epoch: Epoch(4), ..OwnerRecord::new(GuestId::generate()) }
}

fn begun(record: &OwnerRecord, operation: OperationId, kind: OperationKind) -> OwnerRecord {
    let record = begin(record, &BeginRequest { operation, kind, group: None }).expect("can begin");
    leave_plan(&record, operation).expect("is in its plan")
}

fn migrating(n: &Names) -> OwnerRecord {
    begun(&owned_by(n.a), n.op, OperationKind::Migrate { to: n.b, post_copy: false })
}

fn request(record: &OwnerRecord) -> SwitchRequest {
    let op = record.operation.as_ref().expect("is under way");
    SwitchRequest { guest: record.guest, operation: op.id, from: op.from, to: op.kind.target(), volumes: Vec::new() }
}

fn granted(decision: SwitchDecision) -> (OwnerRecord, Grant) {
    match decision {
        SwitchDecision::Granted { record, grant } => (*record, grant),
        other => panic!("{other:?}"),
    }
}

fn refusal(decision: SwitchDecision) -> SwitchRefusal {
    match decision {
        SwitchDecision::Refused(reason) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_switch_gives_the_next_epoch_and_keeps_the_source_as_a_holder() {
    let n = names();
    let record = migrating(&n);
    let (after, grant) = granted(grant_switch(&record, n.b, &request(&record)));
    assert_eq!((grant.owner, grant.epoch), (Owner::Host(n.b), Epoch(5)));
    assert_eq!(after.stamp(), Stamp { owner: Owner::Host(n.b), epoch: Epoch(5) });
    assert_eq!(after.holders, [Holder { host: n.a, epoch: Epoch(4), needed: true, lost: false }]);
    assert_eq!(after.operation.as_ref().unwrap().phase, Phase::Resume);
    assert_eq!(after.check(), Ok(()));
}

#[test]
fn a_repeated_request_gets_the_same_answer_also_when_the_operation_has_ended() {
    let n = names();
    let record = migrating(&n);
    let request = request(&record);
    let (mut record, grant) = granted(grant_switch(&record, n.b, &request));
    assert_eq!(grant_switch(&record, n.b, &request), SwitchDecision::AlreadyGranted(grant));
    for (from, report) in [
        (n.b, Report::Running { operation: n.op, epoch: Epoch(5) }),
        (n.b, Report::NothingMissing { operation: n.op, epoch: Epoch(5) }),
        (n.a, Report::Released { epoch: Epoch(4) }),
    ] {
        record = accept(&record, from, &report, WhenOpen::Wait).record.unwrap();
    }
    assert_eq!(record.last.unwrap().phase, Phase::Done);
    assert_eq!((record.operation.as_ref(), record.holders.len()), (None, 0));
    assert_eq!(grant_switch(&record, n.b, &request), SwitchDecision::AlreadyGranted(grant));
    assert_eq!(refusal(grant_switch(&record, n.c, &request)), SwitchRefusal::NotAuthorised);
}

#[test]
fn an_aborted_operation_is_never_granted_and_a_granted_one_never_aborted() {
    let n = names();
    let record = migrating(&n);
    let AbortDecision::Aborted { record: aborted } = request_abort(&record, n.op, AbortReason::Cancelled) else {
        panic!("must be possible before the switch");
    };
    let request = request(&record);
    assert_eq!(refusal(grant_switch(&aborted, n.b, &request)), SwitchRefusal::Aborted(AbortReason::Cancelled));
    assert_eq!(
        request_abort(&aborted, n.op, AbortReason::Deadline),
        AbortDecision::AlreadyAborted(AbortReason::Cancelled)
    );
    let (after, grant) = granted(grant_switch(&record, n.b, &request));
    assert_eq!(request_abort(&after, n.op, AbortReason::Cancelled), AbortDecision::TooLate(grant));
}

#[test]
fn requests_that_do_not_fit_are_refused_by_name() {
    let n = names();
    let record = migrating(&n);
    let right = request(&record);
    let why = |asker, request: &SwitchRequest| refusal(grant_switch(&record, asker, request));
    assert_eq!(why(n.c, &right), SwitchRefusal::NotAuthorised);
    assert_eq!(why(n.a, &right), SwitchRefusal::NotAuthorised);
    let other = SwitchRequest { guest: GuestId::generate(), ..right.clone() };
    assert_eq!(why(n.b, &other), SwitchRefusal::WrongGuest);
    let other = SwitchRequest { operation: OperationId::generate(), ..right.clone() };
    assert_eq!(why(n.b, &other), SwitchRefusal::UnknownOperation);
    let other = SwitchRequest { to: Owner::Host(n.c), ..right.clone() };
    assert_eq!(why(n.b, &other), SwitchRefusal::WrongTarget);
    for from in [Stamp { epoch: Epoch(3), ..right.from }, Stamp { owner: Owner::Host(n.c), ..right.from }] {
        let other = SwitchRequest { from, ..right.clone() };
        assert_eq!(why(n.b, &other), SwitchRefusal::WrongOrigin(record.stamp()));
    }
    let volume = VolumeStamp { volume: VolumeId::generate(), root: [0; 32], version: 1 };
    let other = SwitchRequest { volumes: vec![volume; MAX_VOLUMES + 1], ..right };
    assert_eq!(why(n.b, &other), SwitchRefusal::TooManyVolumes);
}

#[test]
fn one_operation_at_a_time_and_beginning_twice_is_beginning_once() {
    let n = names();
    let kind = OperationKind::Migrate { to: n.b, post_copy: false };
    let first = BeginRequest { operation: n.op, kind, group: None };
    let record = begin(&owned_by(n.a), &first).unwrap();
    assert_eq!(begin(&record, &first), Ok(record.clone()));
    let second = BeginRequest { operation: OperationId::generate(), ..first };
    assert_eq!(begin(&record, &second), Err(BeginRefusal::Busy(n.op)));
    let there = BeginRequest { kind: OperationKind::Migrate { to: n.a, post_copy: false }, ..first };
    assert_eq!(begin(&owned_by(n.a), &there), Err(BeginRefusal::AlreadyThere));
    let start = BeginRequest { kind: OperationKind::Start { to: n.b }, ..first };
    assert_eq!(begin(&owned_by(n.a), &start), Err(BeginRefusal::WrongState(Owner::Host(n.a))));
}

#[test]
fn a_freeze_thaws_once_and_a_stale_one_never() {
    let n = names();
    let freeze = FreezeId::generate();
    let record = begun(&owned_by(n.a), n.op, OperationKind::Freeze { freeze });
    let (record, grant) = granted(grant_switch(&record, n.a, &request(&record)));
    assert_eq!((grant.owner, grant.epoch), (Owner::Frozen(freeze), Epoch(4)));
    let record = accept(&record, n.a, &Report::Released { epoch: Epoch(4) }, WhenOpen::Wait).record.unwrap();
    let thaw = |freeze, to| OperationKind::Thaw { freeze, to };
    let try_to = |record: &OwnerRecord, kind| {
        begin(record, &BeginRequest { operation: OperationId::generate(), kind, group: None })
    };
    assert_eq!(try_to(&record, thaw(FreezeId::generate(), n.b)), Err(BeginRefusal::StaleFreeze));
    let record = begun(&record, OperationId::generate(), thaw(freeze, n.b));
    let (record, grant) = granted(grant_switch(&record, n.b, &request(&record)));
    assert_eq!((grant.owner, grant.epoch), (Owner::Host(n.b), Epoch(5)));
    assert!(try_to(&record, thaw(freeze, n.c)).is_err());
    let report = Report::NothingMissing { operation: grant.operation, epoch: Epoch(5) };
    let record = accept(&record, n.b, &report, WhenOpen::Wait).record.unwrap();
    assert_eq!(try_to(&record, thaw(freeze, n.c)), Err(BeginRefusal::StaleFreeze));
}

#[test]
fn who_asks_is_told_that_it_owns_only_when_no_switch_can_come() {
    let n = names();
    let record = migrating(&n);
    let query = OwnerQuery { operation: Some(n.op), epoch: Epoch(4), copy: LocalCopy::Intact, wants_back: true };
    let undecided = SourceOrder::Undecided { operation: Some(n.op) };
    assert_eq!(ask_owner(&record, n.a, &query, WhenOpen::Wait).answer, undecided);
    let gone = OwnerQuery { copy: LocalCopy::Gone, ..query };
    assert_eq!(
        ask_owner(&record, n.a, &gone, WhenOpen::Abort).answer,
        undecided,
        "the destination may be all there is"
    );
    let decision = ask_owner(&record, n.a, &query, WhenOpen::Abort);
    assert_eq!(decision.answer, SourceOrder::StillYours { operation: Some(n.op), turn: 1, epoch: Epoch(4) });
    let aborted = decision.record.unwrap();
    assert_eq!(
        refusal(grant_switch(&aborted, n.b, &request(&record))),
        SwitchRefusal::Aborted(AbortReason::ContactLost)
    );
    let (moved, _) = granted(grant_switch(&record, n.b, &request(&record)));
    let elsewhere = SourceOrder::Elsewhere { now: moved.stamp(), yours: Epoch(4), needed: true };
    assert_eq!(ask_owner(&moved, n.a, &query, WhenOpen::Abort).answer, elsewhere);
    let future = OwnerQuery { epoch: Epoch(9), ..query };
    let decision = ask_owner(&record, n.a, &future, WhenOpen::Abort);
    assert_eq!(decision.alarm, Some(Alarm::EpochFromTheFuture { host: n.a, epoch: Epoch(9) }));
    assert_eq!(decision.answer, undecided);
}

#[test]
fn a_stop_that_has_begun_is_not_taken_back() {
    let n = names();
    let record = begun(&owned_by(n.a), n.op, OperationKind::Stop);
    assert_eq!(request_abort(&record, n.op, AbortReason::Cancelled), AbortDecision::NotCancellable);
    let (record, grant) = granted(grant_switch(&record, n.a, &request(&record)));
    assert_eq!((grant.owner, grant.epoch), (Owner::Stopped, Epoch(4)));
    assert_eq!(record.last.map(|last| last.phase), Some(Phase::Done));
    assert!(record.holder(n.a, Epoch(4)).is_some_and(|holder| holder.needed), "the volumes are there");
}

#[test]
fn a_lost_destination_after_the_switch_is_an_alarm_and_the_source_is_kept() {
    let n = names();
    let record = migrating(&n);
    let (record, _) = granted(grant_switch(&record, n.b, &request(&record)));
    let loss = note_host_lost(&record, n.b);
    assert_eq!(loss.alarms, [Alarm::GuestLost { host: n.b, epoch: Epoch(5) }]);
    let record = loss.record.unwrap();
    assert_eq!(record.owner, Owner::Lost(n.b));
    assert_eq!(record.last.map(|last| last.phase), Some(Phase::Failed));
    assert!(record.holder(n.a, Epoch(4)).is_some_and(|holder| holder.needed));
    assert_eq!(note_host_lost(&record, n.b).record, None, "saying it again changes nothing");
    let record = begun(&record, OperationId::generate(), OperationKind::RestartFromVolume { to: n.c });
    let (record, grant) = granted(grant_switch(&record, n.c, &request(&record)));
    assert_eq!((grant.owner, grant.epoch), (Owner::Host(n.c), Epoch(6)));
    assert_eq!(record.check(), Ok(()));
    assert_eq!(note_host_lost(&record, n.b).record, None, "what it was lost with is what it starts without");
    let other = note_host_lost(&record, n.a);
    assert_eq!(other.record.and_then(|record| record.last).map(|last| last.phase), Some(Phase::Failed));
}

#[test]
fn only_a_guest_that_nobody_runs_is_set_back_and_then_it_thaws_once() {
    let n = names();
    let freeze = FreezeId::generate();
    assert_eq!(set_back(&owned_by(n.a), freeze), Err(BeginRefusal::WrongState(Owner::Host(n.a))));
    let unowned = OwnerRecord::new(owned_by(n.a).guest);
    assert_eq!(set_back(&unowned, freeze), Err(BeginRefusal::WrongState(Owner::Unowned)));
    let under_way = begun(&owned_by(n.a), n.op, OperationKind::Stop);
    assert_eq!(set_back(&under_way, freeze), Err(BeginRefusal::Busy(n.op)));

    // Lost with its host: nothing is waited for that was there.
    let lost = note_host_lost(&owned_by(n.a), n.a).record.unwrap();
    let back = set_back(&lost, freeze).unwrap();
    assert_eq!(
        (back.stamp(), back.holders.len(), back.check()),
        (Stamp { owner: Owner::Frozen(freeze), epoch: Epoch(4) }, 0, Ok(()))
    );
    assert_eq!(back.alarm(), None);
    assert!(set_back(&back, FreezeId::generate()).is_err());
    // What comes back of it is not the guest any more, whatever it says.
    let query = OwnerQuery { operation: None, epoch: Epoch(4), copy: LocalCopy::Intact, wants_back: true };
    let gone = SourceOrder::Elsewhere { now: back.stamp(), yours: Epoch(4), needed: false };
    assert_eq!(ask_owner(&back, n.a, &query, WhenOpen::Abort).answer, gone);
    let late = accept(&back, n.a, &Report::GuestLost { operation: None, epoch: Epoch(4) }, WhenOpen::Wait);
    assert_eq!(late.record, None);

    // Lost by itself, or stopped: its host lets go of what it has, also while the thaw goes on.
    let by_itself =
        accept(&owned_by(n.a), n.a, &Report::GuestLost { operation: None, epoch: Epoch(4) }, WhenOpen::Wait);
    let by_itself = by_itself.record.unwrap();
    assert!(by_itself.holder(n.a, Epoch(4)).is_some_and(|holder| holder.needed));
    let back = set_back(&by_itself, freeze).unwrap();
    assert!(back.holder(n.a, Epoch(4)).is_some_and(|holder| !holder.needed));
    for to in [n.a, n.b] {
        let record = begun(&back, OperationId::generate(), OperationKind::Thaw { freeze, to });
        let (record, grant) = granted(grant_switch(&record, to, &request(&record)));
        assert_eq!((grant.owner, grant.epoch), (Owner::Host(to), Epoch(5)));
        assert_eq!(record.check(), Ok(()));
        let again = BeginRequest {
            operation: OperationId::generate(),
            kind: OperationKind::Thaw { freeze, to: n.c },
            group: None,
        };
        assert!(begin(&record, &again).is_err());
    }
}

/// Two guests of one group that move together.
fn group(n: &Names) -> Vec<OwnerRecord> {
    let kind = OperationKind::Migrate { to: n.b, post_copy: false };
    let member = |_| {
        let request = BeginRequest { operation: OperationId::generate(), kind, group: Some(n.op) };
        let record = begin(&owned_by(n.a), &request).expect("can begin");
        leave_plan(&record, request.operation).expect("is in its plan")
    };
    (0..3).map(member).collect()
}

#[test]
fn a_group_is_switched_all_or_none() {
    let n = names();
    let records = group(&n);
    let requests: Vec<_> = records.iter().map(|record| (n.b, request(record))).collect();
    assert_eq!(refusal(grant_switch(&records[0], n.b, &requests[0].1)), SwitchRefusal::GroupMember);
    assert_eq!(
        accept(&records[0], n.b, &Report::RequestSwitch(requests[0].1.clone()), WhenOpen::Wait).group,
        GroupNeed::Ready(requests[0].1.clone())
    );
    let GroupDecision::Granted(granted) = grant_switch_all(&records, &requests) else { panic!("all are ready") };
    assert!(granted.iter().all(|(record, grant)| record.is_owned_by(n.b, Epoch(5)) && grant.epoch == Epoch(5)));
    let after: Vec<_> = granted.iter().map(|(record, _)| record.clone()).collect();
    let grants: Vec<_> = granted.iter().map(|(_, grant)| *grant).collect();
    assert_eq!(grant_switch_all(&after, &requests), GroupDecision::AlreadyGranted(grants));
    assert!(request_abort_all(&after, n.op, AbortReason::Cancelled).is_err());

    let refused =
        |records: &[OwnerRecord], requests: &[(HostId, SwitchRequest)]| match grant_switch_all(records, requests) {
            GroupDecision::Refused { reason, .. } => reason,
            other => panic!("{other:?}"),
        };
    assert_eq!(refused(&records, &requests[..2]), SwitchRefusal::GroupMismatch);
    let twice = [records[0].clone(), records[0].clone()];
    assert_eq!(refused(&twice, &[requests[0].clone(), requests[0].clone()]), SwitchRefusal::GroupMismatch);
    let mixed = [records[0].clone(), after[1].clone(), records[2].clone()];
    assert_eq!(refused(&mixed, &requests), SwitchRefusal::GroupMismatch);
    let mut stranger = records.clone();
    stranger[1].operation.as_mut().unwrap().group = Some(OperationId::generate());
    assert_eq!(refused(&stranger, &requests), SwitchRefusal::GroupMismatch);
    let mut stale = requests.clone();
    stale[2].1.from.epoch = Epoch(3);
    assert_eq!(refused(&records, &stale), SwitchRefusal::WrongOrigin(records[2].stamp()));
}

#[test]
fn a_group_is_aborted_all_or_none() {
    let n = names();
    let records = group(&n);
    let operation = records[1].operation.as_ref().unwrap().id;
    assert_eq!(request_abort(&records[1], operation, AbortReason::Cancelled), AbortDecision::GroupMember);
    let query = OwnerQuery { operation: Some(operation), epoch: Epoch(4), copy: LocalCopy::Intact, wants_back: true };
    let decision = ask_owner(&records[1], n.a, &query, WhenOpen::Abort);
    assert_eq!((decision.record, decision.abort_group), (None, true));
    for (from, report) in
        [(n.b, Report::Cleaned { operation }), (n.a, Report::GuestLost { operation: Some(operation), epoch: Epoch(4) })]
    {
        let accepted = accept(&records[1], from, &report, WhenOpen::Abort);
        assert!(matches!((accepted.record, accepted.group), (None, GroupNeed::Abort(_))), "{report:?}");
    }
    assert!(note_host_lost(&records[1], n.b).abort_group);
    // One whose source is lost is not given up for the others' sake: its destination may have all of it.
    let mut copying = records.clone();
    let prepared = accept(&copying[1], n.b, &Report::Prepared { operation }, WhenOpen::Abort).record.unwrap();
    copying[1] = note_host_lost(&prepared, n.a).record.unwrap();
    let after = request_abort_all(&copying, n.op, AbortReason::Cancelled).unwrap();
    let left = after[1].operation.as_ref().unwrap();
    assert_eq!((left.group, left.verdict, left.source_lost), (None, Verdict::Open, true));
    assert!(after[0].operation.as_ref().unwrap().verdict == Verdict::Aborted(AbortReason::Cancelled));
    assert!(matches!(grant_switch(&after[1], n.b, &request(&copying[1])), SwitchDecision::Granted { .. }));
    assert!(request_abort_all(&records, operation, AbortReason::Cancelled).is_err(), "a member's is not the group's");
    let aborted = request_abort_all(&records, n.op, AbortReason::Cancelled).unwrap();
    let requests: Vec<_> = records.iter().map(|record| (n.b, request(record))).collect();
    assert!(matches!(grant_switch_all(&aborted, &requests), GroupDecision::Refused { .. }));
}

#[test]
fn who_fetches_memory_is_told_that_its_source_is_lost_and_nobody_else() {
    let n = names();
    let record = begun(&owned_by(n.a), n.op, OperationKind::Migrate { to: n.b, post_copy: true });
    let prepared = accept(&record, n.b, &Report::Prepared { operation: n.op }, WhenOpen::Wait).record.unwrap();
    let (granted, _) = granted(grant_switch(&prepared, n.b, &request(&prepared)));
    let fetches = Report::FetchesMemory { operation: n.op, epoch: Epoch(5) };
    let answer = |record: &OwnerRecord, from| accept(record, from, &fetches, WhenOpen::Wait);
    assert!(answer(&granted, n.b).orders.is_empty(), "it is there");
    let lost = note_host_lost(&granted, n.a).record.expect("what it holds is needed");
    let told = Order { to: n.b, body: OrderBody::Destination(DestinationOrder::SourceLost { operation: n.op }) };
    assert_eq!(answer(&lost, n.b).orders, [told]);
    assert!(answer(&lost, n.a).orders.is_empty() && answer(&lost, n.c).orders.is_empty());
    // It speaks again.
    let query = OwnerQuery { operation: None, epoch: Epoch(4), copy: LocalCopy::Intact, wants_back: false };
    let back = accept(&lost, n.a, &Report::AskOwner(query), WhenOpen::Wait).record.expect("it is back");
    assert!(answer(&back, n.b).orders.is_empty());
}

/// A mirror from `a` to `b` that copies.
fn mirroring(n: &Names) -> OwnerRecord {
    let record = begun(&owned_by(n.a), n.op, OperationKind::Mirror { to: n.b });
    accept(&record, n.b, &Report::Prepared { operation: n.op }, WhenOpen::Wait).record.expect("it copies now")
}

#[test]
fn a_mirror_is_granted_only_without_its_source_and_needs_nothing_of_it() {
    let n = names();
    let record = mirroring(&n);
    assert_eq!(refusal(grant_switch(&record, n.b, &request(&record))), SwitchRefusal::SourceNotLost);
    let lost = note_host_lost(&record, n.a).record.expect("it is lost");
    let told = Order { to: n.b, body: OrderBody::Destination(DestinationOrder::TakeOver { operation: n.op }) };
    assert_eq!(lost.orders(), [told]);
    let (after, grant) = granted(grant_switch(&lost, n.b, &request(&lost)));
    assert_eq!((grant.owner, grant.epoch), (Owner::Host(n.b), Epoch(5)));
    assert!(after.holders.iter().all(|holder| !holder.needed), "{:?}", after.holders);
}

#[test]
fn what_is_left_of_a_mirror_without_its_source_is_given_up_by_nobody_but_who_has_it() {
    let n = names();
    let lost = note_host_lost(&mirroring(&n), n.a).record.expect("it is lost");
    // The source comes back and wants to run on, or a user thinks better of it.
    let (operation, reason) = (n.op, AbortReason::SourceFailed);
    let wants = Report::RequestAbort { operation, reason, owned: Some(Epoch(4)) };
    assert_eq!(accept(&lost, n.a, &wants, WhenOpen::Abort).record, None);
    let query = OwnerQuery { operation: Some(n.op), epoch: Epoch(4), copy: LocalCopy::Intact, wants_back: true };
    let asked = accept(&lost, n.a, &Report::AskOwner(query), WhenOpen::Abort);
    assert!(asked.record.is_none() && !asked.orders.iter().any(is_yours), "{asked:?}");
    assert_eq!(request_abort(&lost, n.op, AbortReason::Cancelled), AbortDecision::NotCancellable);
    // The standby has nothing whole.
    let cleaned = accept(&lost, n.b, &Report::Cleaned { operation }, WhenOpen::Wait).record.expect("it is over");
    assert_eq!((cleaned.owner, cleaned.operation), (Owner::Lost(n.a), None));
    let orphaned = Report::RequestAbort { operation, reason: AbortReason::DestinationFailed, owned: None };
    assert_eq!(accept(&lost, n.b, &orphaned, WhenOpen::Wait).record.expect("it is over").owner, Owner::Lost(n.a));
}

fn is_yours(order: &Order) -> bool {
    matches!(order.body, OrderBody::Source(SourceOrder::StillYours { .. }))
}

#[test]
fn records_of_guests_that_move_alone_are_what_they_were() {
    let n = names();
    let alone = serde_json::to_value(migrating(&n)).unwrap();
    assert_eq!(alone["operation"]["group"], serde_json::json!(false));
    let member = group(&n).remove(0);
    let text = serde_json::to_value(&member).unwrap();
    assert_eq!(serde_json::from_value::<OwnerRecord>(text.clone()).unwrap(), member);
    assert_eq!(text["operation"]["group"], serde_json::json!(n.op));
    let mut unnamed = alone;
    unnamed["operation"]["group"] = true.into();
    assert!(serde_json::from_value::<OwnerRecord>(unnamed).is_err());
}
