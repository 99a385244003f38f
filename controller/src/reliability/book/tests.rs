use proptest::prelude::*;
use serde_json::{Value, json};
use supercloud_api::ids::{FreezeId, RequestId};

use super::*;

const HOUR: u64 = 3_600_000;

/// Events in a row.
struct Told {
    book: Book,
    project: ProjectId,
    operation: Option<OperationId>,
}

impl Told {
    fn new() -> Self {
        Self { book: Book::default(), project: ProjectId::generate(), operation: None }
    }

    fn event(&mut self, at_ms: u64, kind: &str, guest: Option<GuestId>, host: Option<HostId>, data: Value) {
        let seq = self.book.seq() + 1;
        let project = guest.map(|_| self.project);
        self.book.see(&Event {
            seq,
            at_ms,
            kind: kind.to_owned(),
            actor: "system".to_owned(),
            request_id: RequestId::generate(),
            project,
            guest,
            host,
            operation: self.operation,
            data,
            previous_hash: String::new(),
            hash: String::new(),
        });
    }

    fn owner(&mut self, at_ms: u64, guest: GuestId, owner: Owner) {
        // As `operations::report` writes it.
        let owned = |owner: Owner, epoch: u64| json!({ "owner": owner, "epoch": epoch });
        self.event(
            at_ms,
            "guest.switched",
            Some(guest),
            None,
            json!({ "from": owned(Owner::Unowned, 0), "to": owned(owner, 1) }),
        );
    }

    fn moved(&mut self, at_ms: u64, guest: GuestId, data: &Value) {
        let mut whole = json!({ "kind": "guest_migrate", "phase": "done" });
        whole.as_object_mut().unwrap().extend(data.as_object().unwrap().clone());
        self.event(at_ms, "operation.phase", Some(guest), None, whole);
    }

    fn tell(&self, from_ms: u64, to_ms: u64) -> Reliability {
        self.book.tell(&Window { from_ms, to_ms, project: None, guest: None })
    }
}

#[test]
fn what_was_to_run_and_did_is_counted_and_what_was_stopped_is_not() {
    let (mut told, guest, host) = (Told::new(), GuestId::generate(), HostId::generate());
    assert_eq!(told.tell(0, HOUR).availability_ppm, None, "of nothing nothing is said");
    told.owner(HOUR, guest, Owner::Host(host));
    told.owner(3 * HOUR, guest, Owner::Stopped);
    told.owner(5 * HOUR, guest, Owner::Host(host));
    told.owner(6 * HOUR, guest, Owner::Lost(host));
    told.owner(7 * HOUR, guest, Owner::Host(HostId::generate()));
    told.owner(8 * HOUR, guest, Owner::Frozen(FreezeId::generate()));
    let all = told.tell(0, 100 * HOUR);
    assert_eq!((all.guests, all.wanted_ms, all.lost_ms), (1, 5 * HOUR, HOUR));
    assert_eq!(all.availability_ppm, Some(800_000));
    let part = told.tell(2 * HOUR, 6 * HOUR + HOUR / 2);
    assert_eq!((part.wanted_ms, part.lost_ms), (HOUR + HOUR + HOUR / 2, HOUR / 2));
    assert_eq!(told.tell(3 * HOUR, 5 * HOUR).guests, 0);
}

#[test]
fn moves_and_their_pauses_are_those_of_the_window() {
    let (mut told, guest) = (Told::new(), GuestId::generate());
    told.owner(0, guest, Owner::Host(HostId::generate()));
    for pause in 1..=100 {
        told.moved(pause, guest, &json!({ "downtime_ms": pause }));
    }
    told.moved(200, guest, &json!({ "downtime_ms": null }));
    told.moved(300, guest, &json!({ "phase": "rolled_back", "error": { "code": "wrong_state" } }));
    told.moved(301, guest, &json!({ "phase": "rolled_back", "missed_deadline": true }));
    told.moved(302, guest, &json!({ "phase": "failed" }));
    told.moved(303, guest, &json!({ "kind": "guest_start", "phase": "failed" }));
    told.moved(304, guest, &json!({ "phase": "of another version" }));
    let all = told.tell(0, 1_000_000);
    assert_eq!((all.moves, all.rolled_back, all.failed), (101, 2, 1));
    assert_eq!((all.downtime_p50_ms, all.downtime_p99_ms), (Some(50), Some(99)));
    assert_eq!((all.missed_by_moves, all.missed_deadlines(), all.paused_ms), (1, 1, 5050));
    assert_eq!(all.availability_ppm, Some(1_000_000 - 5050));
    assert_eq!(told.tell(100, 101).downtime_p50_ms, Some(100));
    assert_eq!(told.tell(200, 201).downtime_p99_ms, None, "a move that nobody measured has no pause of 0");
}

#[test]
fn a_silence_counts_only_when_the_guest_went_on_elsewhere() {
    let (mut told, guest) = (Told::new(), GuestId::generate());
    let (a, b) = (HostId::generate(), HostId::generate());
    told.owner(0, guest, Owner::Host(a));
    told.event(HOUR, "host.unreachable", None, Some(a), json!({}));
    told.event(2 * HOUR, "host.up", None, Some(a), json!({}));
    assert_eq!(told.tell(0, 2 * HOUR).lost_ms, 0, "it ran on");
    told.event(3 * HOUR, "host.unreachable", None, Some(a), json!({}));
    told.event(4 * HOUR, "host.unreachable", None, Some(a), json!({}));
    told.owner(5 * HOUR, guest, Owner::Host(b));
    assert_eq!(told.tell(0, 6 * HOUR).lost_ms, 2 * HOUR);
    assert_eq!(told.tell(4 * HOUR, 6 * HOUR).lost_ms, HOUR);
}

#[test]
fn guests_that_were_there_when_the_provider_took_the_host_missed_the_notice() {
    let mut told = Told::new();
    let [left, stayed, mirrored, came_later] = [(); 4].map(|()| GuestId::generate());
    let (spot, home) = (HostId::generate(), HostId::generate());
    for guest in [left, stayed, mirrored] {
        told.owner(0, guest, Owner::Host(spot));
    }
    told.event(1, "operation.phase", Some(mirrored), None, json!({ "kind": "guest_mirror", "phase": "copy" }));
    let notice = |at_ms: Option<u64>| json!({ "kind": "interruption", "at_ms": at_ms });
    told.event(10, "host.notice", None, Some(spot), notice(None));
    told.event(11, "host.notice", None, Some(spot), notice(Some(120)));
    // Earlier than was said: one notice.
    told.event(12, "host.notice", None, Some(spot), notice(Some(100)));
    told.event(13, "host.notice", None, Some(home), json!({ "kind": "rebalance", "at_ms": 50 }));
    told.owner(99, left, Owner::Host(home));
    told.owner(110, came_later, Owner::Host(spot));
    assert_eq!(told.tell(0, 1000).missed_by_notices, 1);
    assert_eq!(told.tell(0, 100).missed_by_notices, 0, "its time has not come");
    told.event(200, "host.notice", None, Some(spot), notice(Some(900)));
    told.event(300, "host.uncordoned", None, Some(spot), json!({}));
    assert_eq!(told.tell(0, 1000).missed_by_notices, 1, "what was withdrawn nobody misses");
}

#[test]
fn what_was_missed_ever_is_counted_once_and_never_less() {
    let (mut told, spot) = (Told::new(), HostId::generate());
    let guests = [(); 3].map(|()| GuestId::generate());
    for guest in guests {
        told.owner(0, guest, Owner::Host(spot));
    }
    told.moved(1, guests[0], &json!({ "phase": "rolled_back", "missed_deadline": true }));
    told.event(10, "host.notice", None, Some(spot), json!({ "kind": "interruption", "at_ms": 100 }));
    told.book.settle(100 + SETTLED_MS - 1);
    assert_eq!(
        told.book.missed(),
        Missed { by_moves: 1, by_notices: 0 },
        "who left in time may be told of a little later"
    );
    told.owner(99, guests[2], Owner::Host(HostId::generate()));
    for _ in 0..2 {
        told.book.settle(100 + SETTLED_MS);
        assert_eq!(told.book.missed(), Missed { by_moves: 1, by_notices: 2 });
        // Told again afterwards.
        told.event(HOUR, "host.notice", None, Some(spot), json!({ "kind": "interruption", "at_ms": 100 }));
    }
    // What was announced and withdrawn is not missed; what is forgotten stays counted.
    told.event(HOUR, "host.notice", None, Some(spot), json!({ "kind": "interruption", "at_ms": 2 * HOUR }));
    told.event(HOUR + 1, "host.uncordoned", None, Some(spot), json!({}));
    told.book.settle(9 * HOUR);
    told.book.forget(9 * HOUR);
    assert_eq!(
        (told.tell(0, 9 * HOUR).missed_deadlines(), told.book.missed()),
        (0, Missed { by_moves: 1, by_notices: 2 })
    );
}

#[test]
fn a_guests_life_is_told_of_that_guest_alone() {
    let (mut told, guest) = (Told::new(), GuestId::generate());
    let (a, b, operation) = (HostId::generate(), HostId::generate(), OperationId::generate());
    told.owner(HOUR, guest, Owner::Host(a));
    told.operation = Some(operation);
    told.owner(2 * HOUR, guest, Owner::Host(b));
    told.moved(2 * HOUR + 1, guest, &json!({ "downtime_ms": 321 }));
    told.operation = None;
    told.owner(3 * HOUR, guest, Owner::Lost(b));
    let tell = |guest| told.book.tell(&Window { from_ms: HOUR + 1, to_ms: 4 * HOUR, project: None, guest });
    let life: Vec<_> = tell(Some(guest))
        .stays
        .iter()
        .map(|stay| (stay.from_ms, stay.until_ms, stay.host, stay.is_lost, stay.downtime_ms))
        .collect();
    assert_eq!(
        life,
        [
            (HOUR + 1, 2 * HOUR, Some(a), false, None),
            (2 * HOUR, 3 * HOUR, Some(b), false, Some(321)),
            (3 * HOUR, 4 * HOUR, None, true, None)
        ]
    );
    assert_eq!(tell(Some(guest)).stays[1].operation, Some(operation));
    assert!(tell(None).stays.is_empty() && tell(Some(GuestId::generate())).stays.is_empty());
}

#[test]
fn projects_and_guests_are_kept_apart() {
    let (mut told, one, other) = (Told::new(), GuestId::generate(), GuestId::generate());
    told.owner(0, one, Owner::Host(HostId::generate()));
    let mine = told.project;
    told.project = ProjectId::generate();
    told.owner(0, other, Owner::Host(HostId::generate()));
    told.moved(5, other, &json!({ "downtime_ms": 7 }));
    let tell = |project, guest| told.book.tell(&Window { from_ms: 0, to_ms: 10, project, guest });
    assert_eq!((tell(None, None).guests, tell(None, None).moves), (2, 1));
    assert_eq!((tell(Some(mine), None).guests, tell(Some(mine), None).moves), (1, 0));
    assert_eq!((tell(None, Some(other)).wanted_ms, tell(None, Some(other)).paused_ms), (10, 7));
    assert_eq!(tell(Some(mine), Some(other)).guests, 0);
}

proptest! {
    /// Whatever happens, and whatever is forgotten: parts of a time add up to the whole, and no more is missed than was wanted.
    #[test]
    fn parts_add_up_and_what_is_forgotten_was_over(
        steps in proptest::collection::vec((0u64..1000, 0u8..6, 0usize..3, 0usize..3), 0..60), cut in 0u64..30_000,
    ) {
        let mut told = Told::new();
        let (guests, hosts) = ([(); 3].map(|()| GuestId::generate()), [(); 3].map(|()| HostId::generate()));
        let mut now = 0;
        for (passes, what, guest, host) in steps {
            now += passes;
            let (guest, host) = (guests[guest], hosts[host]);
            match what {
                0 | 1 => told.owner(now, guest, Owner::Host(host)),
                2 => told.owner(now, guest, Owner::Lost(host)),
                3 => told.owner(now, guest, Owner::Stopped),
                4 => told.event(now, "host.unreachable", None, Some(host), json!({})),
                _ => told.event(now, "host.up", None, Some(host), json!({})),
            }
        }
        let (whole, a, b) = (told.tell(0, 60_000), told.tell(0, cut), told.tell(cut, 60_000));
        prop_assert_eq!(whole.wanted_ms, a.wanted_ms + b.wanted_ms);
        prop_assert_eq!(whole.lost_ms, a.lost_ms + b.lost_ms);
        prop_assert!(whole.lost_ms <= whole.wanted_ms);
        told.book.forget(cut);
        prop_assert_eq!(told.tell(cut, 60_000), b);
    }
}
