//! Anything may come from outside: reports of any host about anything, orders in any order, stored bytes that were
//! damaged. Nothing panics, and the right to run comes only from where it may come.

use supercloud_handover::*;
use supercloud_ids::{Epoch, FreezeId, GuestId, HostId, OperationId, VolumeId};

const SEEDS: u64 = 400;

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % sides as u64) as usize
    }

    fn of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.roll(choices.len())].clone()
    }
}

struct Names {
    dice: Dice,
    guests: Vec<GuestId>,
    hosts: Vec<HostId>,
    operations: Vec<OperationId>,
    freezes: Vec<FreezeId>,
}

/// The same ids in every run: damage to their text must be the same, too.
fn ids<T: std::str::FromStr>(prefix: &str, count: usize) -> Vec<T>
where
    T::Err: std::fmt::Debug,
{
    (1..=count).map(|n| format!("{prefix}-00000000-0000-7000-8000-{n:012x}").parse().expect("an id")).collect()
}

impl Names {
    fn new(seed: u64) -> Self {
        Self {
            dice: Dice(seed),
            guests: ids("gst", 2),
            hosts: ids("hst", 3),
            operations: ids("opn", 4),
            freezes: ids("frz", 2),
        }
    }

    fn host(&mut self) -> HostId {
        self.dice.of(&self.hosts)
    }

    /// Mostly the first.
    fn guest(&mut self) -> GuestId {
        let at = usize::from(self.dice.roll(12) == 0);
        self.guests[at]
    }

    fn operation(&mut self) -> OperationId {
        self.dice.of(&self.operations)
    }

    fn epoch(&mut self) -> Epoch {
        Epoch(match self.dice.roll(30) {
            0 => u64::MAX,
            n => n as u64 % 5,
        })
    }

    fn owner(&mut self) -> Owner {
        match self.dice.roll(8) {
            0 => Owner::Unowned,
            1 => Owner::Frozen(self.dice.of(&self.freezes)),
            2 => Owner::Stopped,
            3 => Owner::Lost(self.host()),
            _ => Owner::Host(self.host()),
        }
    }

    fn stamp(&mut self) -> Stamp {
        Stamp { owner: self.owner(), epoch: self.epoch() }
    }

    fn kind(&mut self) -> OperationKind {
        let (to, freeze) = (self.host(), self.dice.of(&self.freezes));
        match self.dice.roll(8) {
            0 => OperationKind::Start { to },
            1 => OperationKind::Freeze { freeze },
            2 => OperationKind::Thaw { freeze, to },
            3 => OperationKind::Stop,
            4 => OperationKind::RestartFromVolume { to },
            n => OperationKind::Migrate { to, post_copy: n == 5 },
        }
    }

    fn volumes(&mut self) -> Vec<VolumeStamp> {
        let volume = VolumeStamp { volume: ids::<VolumeId>("vol", 1)[0], root: [7; 32], version: 1 };
        vec![volume; self.dice.of(&[0, 1, 1, 2, MAX_VOLUMES + 1])]
    }

    fn query(&mut self) -> OwnerQuery {
        OwnerQuery {
            operation: self.dice.of(&[None, Some(self.operations[0]), Some(self.operations[1])]),
            epoch: self.epoch(),
            copy: self.dice.of(&[LocalCopy::Intact, LocalCopy::Gone]),
            wants_back: self.dice.roll(2) == 0,
        }
    }

    fn request(&mut self) -> SwitchRequest {
        SwitchRequest {
            guest: self.guest(),
            operation: self.operation(),
            from: self.stamp(),
            to: self.owner(),
            volumes: self.volumes(),
        }
    }

    fn report(&mut self) -> Report {
        let (operation, epoch) = (self.operation(), self.epoch());
        match self.dice.roll(13) {
            0 => Report::Prepared { operation },
            1 => Report::Paused { operation },
            2 => Report::RequestSwitch(self.request()),
            3 => Report::RequestAbort {
                operation,
                reason: AbortReason::SourceFailed,
                owned: self.dice.of(&[None, Some(epoch)]),
            },
            4 => Report::AskOwner(self.query()),
            5 => Report::Running { operation, epoch },
            6 => Report::NothingMissing { operation, epoch },
            7 => Report::Resumed { operation, epoch },
            8 => Report::Released { epoch },
            9 => Report::Cleaned { operation },
            10 => Report::GuestLost { operation: Some(operation), epoch },
            11 => Report::FetchesMemory { operation, epoch },
            _ => Report::LostAfterSwitch { operation, epoch },
        }
    }

    fn turn(&mut self) -> u64 {
        self.dice.roll(5) as u64
    }

    fn order(&mut self) -> OrderBody {
        let (guest, operation, turn, kind, epoch) =
            (self.guest(), self.operation(), self.turn(), self.kind(), self.epoch());
        match self.dice.roll(12) {
            11 => OrderBody::Destination(DestinationOrder::SourceLost { operation }),
            0 | 1 => OrderBody::Source(SourceOrder::Begin(SourcePlan { guest, operation, turn, kind, epoch })),
            2 => OrderBody::Source(SourceOrder::StillYours { operation: Some(operation), turn, epoch }),
            3 => OrderBody::Source(SourceOrder::Undecided { operation: Some(operation) }),
            4 => OrderBody::Source(SourceOrder::Elsewhere {
                now: self.stamp(),
                yours: epoch,
                needed: self.dice.roll(2) == 0,
            }),
            5 | 6 => OrderBody::Destination(DestinationOrder::Prepare(DestinationPlan {
                guest,
                operation,
                turn,
                kind,
                from: self.stamp(),
                to: self.host(),
                holders: Vec::new(),
            })),
            7 => OrderBody::Destination(DestinationOrder::Granted(Grant {
                guest,
                operation,
                turn,
                owner: self.owner(),
                epoch,
            })),
            8 => OrderBody::Destination(DestinationOrder::Refused {
                operation,
                reason: SwitchRefusal::WrongOrigin(self.stamp()),
            }),
            9 => OrderBody::Destination(DestinationOrder::Cancel { operation, turn }),
            _ => OrderBody::Destination(DestinationOrder::Settled { operation }),
        }
    }

    fn local_event(&mut self) -> LocalEvent {
        let (operation, epoch, volumes) = (self.operation(), self.epoch(), self.volumes());
        let found = self.dice.of(&[Found::Nothing, Found::Paused, Found::Running]);
        let source = LocalEvent::Source;
        let destination = LocalEvent::Destination;
        match self.dice.roll(28) {
            0 => source(SourceEvent::Tick),
            1 => source(SourceEvent::Restarted { found }),
            2 => source(SourceEvent::CopyFailed { operation }),
            3 => source(SourceEvent::PeerLost { operation }),
            4 => source(SourceEvent::GuestPaused { operation }),
            5 => source(SourceEvent::VolumesSealed { operation, volumes }),
            6 => source(SourceEvent::FreezeStored { operation }),
            7 => source(SourceEvent::GuestResumed { epoch }),
            8 => source(SourceEvent::MemoryServed { operation }),
            9 => source(SourceEvent::GuestGone),
            10 => source(SourceEvent::VolumesDeleted { epoch }),
            11 => destination(DestinationEvent::Tick),
            12 => destination(DestinationEvent::Restarted { found }),
            13 => destination(DestinationEvent::Prepared { operation }),
            14 => destination(DestinationEvent::ReceiveFailed { operation }),
            15 => destination(DestinationEvent::StateReceived { operation }),
            16 => destination(DestinationEvent::VolumeMapsReceived { operation, volumes }),
            17 => destination(DestinationEvent::GuestRunning { epoch }),
            18 => destination(DestinationEvent::NothingMissing { epoch }),
            19 => destination(DestinationEvent::GuestGone),
            20 => destination(DestinationEvent::Destroyed { operation }),
            _ => self.order().into(),
        }
    }
}

#[test]
fn any_reports_of_any_host_leave_a_sound_record() {
    println!("seeds 0..{SEEDS}");
    for seed in 0..SEEDS {
        let mut names = Names::new(seed);
        let mut record = OwnerRecord::new(names.guests[0]);
        for _ in 0..300 {
            let before = record.clone();
            let mut switch = None;
            match names.dice.roll(12) {
                0 => {
                    let request = BeginRequest { operation: names.operation(), kind: names.kind(), group: None };
                    record = begin(&record, &request).unwrap_or(record);
                }
                1 => record = leave_plan(&record, names.operation()).unwrap_or(record),
                2 => record = note_host_lost(&record, names.host()).record.unwrap_or(record),
                3 => {
                    if let AbortDecision::Aborted { record: next } =
                        request_abort(&record, names.operation(), AbortReason::Cancelled)
                    {
                        record = *next;
                    }
                }
                4 => {
                    // A request that fits, from a host that may not fit.
                    if let Some(op) = &record.operation {
                        let request = SwitchRequest {
                            guest: record.guest,
                            operation: op.id,
                            from: op.from,
                            to: op.kind.target(),
                            volumes: Vec::new(),
                        };
                        let host = names.host();
                        switch = Some((host, request.clone()));
                        let report = Report::RequestSwitch(request);
                        record = accept(&record, host, &report, WhenOpen::Abort).record.unwrap_or(record);
                    }
                }
                _ => {
                    let (host, report) = (names.host(), names.report());
                    if let Report::RequestSwitch(request) = &report {
                        switch = Some((host, request.clone()));
                    }
                    let when_open = names.dice.of(&[WhenOpen::Wait, WhenOpen::Abort]);
                    record = accept(&record, host, &report, when_open).record.unwrap_or(record);
                }
            }
            assert_eq!(record.check(), Ok(()), "seed {seed}: {before:?} became {record:?}");
            assert!(record.epoch == before.epoch || record.epoch == before.epoch.next(), "seed {seed}");
            if let Owner::Host(now) = record.owner
                && before.stamp() != record.stamp()
            {
                let (host, request) = switch.unwrap_or_else(|| panic!("seed {seed}: an owner without a request"));
                assert_eq!((host, request.from, request.guest), (now, before.stamp(), before.guest), "seed {seed}");
                assert_eq!(record.epoch, before.epoch.next(), "seed {seed}");
            }
            for order in record.orders() {
                assert!(names.hosts.contains(&order.to), "seed {seed}");
            }
        }
    }
}

#[test]
fn no_event_makes_an_agent_run_a_guest_without_the_word_that_it_may() {
    println!("seeds 0..{SEEDS}");
    let (mut runs, mut resumes) = (0, 0);
    for seed in 0..SEEDS {
        let mut names = Names::new(seed);
        let (guest, host) = (names.guests[0], names.hosts[0]);
        let mut machine = match seed % 2 {
            0 => LocalHandover::idle(guest, host),
            _ => LocalHandover::of(SourceHandover::running(guest, host, Epoch(1)), host),
        };
        let mut grants = Vec::new();
        let mut still_mine = Vec::new();
        for _ in 0..3000 {
            // Half of the events fit: else nothing gets far.
            let event = match names.dice.roll(2) {
                0 => fitting(&mut names, &machine),
                _ => None,
            };
            let event = event.unwrap_or_else(|| names.local_event());
            match &event {
                LocalEvent::Destination(DestinationEvent::Order(DestinationOrder::Granted(grant))) => {
                    grants.push(*grant);
                }
                LocalEvent::Source(SourceEvent::Order(SourceOrder::StillYours { epoch, .. })) => {
                    still_mine.push(*epoch);
                }
                _ => {}
            }
            let text = serde_json::to_string(&machine).unwrap();
            let effects = machine.step(event);
            for effect in effects {
                match effect {
                    LocalEffect::Destination(
                        DestinationEffect::RunGuest { epoch } | DestinationEffect::ActivateVolumes { epoch },
                    ) => {
                        runs += 1;
                        let may = |g: &Grant| g.guest == guest && g.owner == Owner::Host(host) && g.epoch == epoch;
                        assert!(grants.iter().any(may), "seed {seed}: runs at {epoch} out of {text}");
                    }
                    LocalEffect::Source(
                        SourceEffect::ResumeGuest { epoch } | SourceEffect::UnsealVolumes { epoch },
                    ) => {
                        resumes += 1;
                        assert!(still_mine.contains(&epoch), "seed {seed}: resumes at {epoch} out of {text}");
                    }
                    _ => {}
                }
            }
            assert_eq!(
                serde_json::from_str::<LocalHandover>(&text)
                    .map(|back| serde_json::to_string(&back).unwrap() == text)
                    .ok(),
                Some(true)
            );
        }
    }
    println!("{runs} runs, {resumes} resumes");
    assert!(runs > 100 && resumes > 100, "the events do not get far enough to prove anything");
}

/// An event that the machine waits for.
fn fitting(names: &mut Names, machine: &LocalHandover) -> Option<LocalEvent> {
    let epoch = machine.source().epoch();
    let source = |event| Some(LocalEvent::Source(event));
    let destination = |event| Some(LocalEvent::Destination(event));
    if names.dice.roll(2) == 0 {
        let plan = machine.source().plan().copied();
        return match (machine.source().state(), plan) {
            (SourceState::Copying { .. }, Some(plan)) => source(SourceEvent::GuestPaused { operation: plan.operation }),
            (SourceState::Sealing { .. }, Some(plan)) => {
                source(SourceEvent::VolumesSealed { operation: plan.operation, volumes: Vec::new() })
            }
            (SourceState::Sealed { .. } | SourceState::Vacating { .. }, Some(plan)) => {
                let (operation, turn) = (Some(plan.operation), plan.turn);
                source(SourceEvent::Order(SourceOrder::StillYours { operation, turn, epoch }))
            }
            (SourceState::Resuming { .. }, _) => source(SourceEvent::GuestResumed { epoch }),
            (SourceState::Running, _) => {
                let (guest, operation, kind) = (names.guests[0], names.operation(), names.kind());
                let turn = names.dice.roll(1 << 20) as u64;
                source(SourceEvent::Order(SourceOrder::Begin(SourcePlan { guest, operation, turn, kind, epoch })))
            }
            _ => None,
        };
    }
    let operation = machine.destination().operation();
    match (machine.destination().state(), operation) {
        (DestinationState::Preparing { .. }, Some(operation)) => destination(DestinationEvent::Prepared { operation }),
        (DestinationState::Receiving { state_received: false, .. }, Some(operation)) => {
            destination(DestinationEvent::StateReceived { operation })
        }
        (DestinationState::Receiving { .. }, Some(operation)) => {
            destination(DestinationEvent::VolumeMapsReceived { operation, volumes: Vec::new() })
        }
        (DestinationState::Complete { plan, .. }, _) => {
            let (guest, operation, turn, epoch) = (plan.guest, plan.operation, plan.turn, plan.epoch());
            let owner = Owner::Host(plan.to);
            destination(DestinationEvent::Order(DestinationOrder::Granted(Grant {
                guest,
                operation,
                turn,
                owner,
                epoch,
            })))
        }
        (DestinationState::Idle, _) => {
            let (guest, operation, to) = (names.guests[0], names.operation(), names.hosts[0]);
            let turn = names.dice.roll(1 << 20) as u64;
            let kind = OperationKind::Migrate { to, post_copy: false };
            let (from, holders) = (names.stamp(), Vec::new());
            let plan = DestinationPlan { guest, operation, turn, kind, from, to, holders };
            destination(DestinationEvent::Order(DestinationOrder::Prepare(plan)))
        }
        _ => None,
    }
}

#[test]
fn damaged_bytes_are_refused_or_harmless() {
    println!("seeds 0..{SEEDS}");
    let mut read = 0;
    for seed in 0..SEEDS {
        let mut names = Names::new(seed);
        let mut record = OwnerRecord::new(names.guests[0]);
        record.owner = Owner::Host(names.hosts[0]);
        record.epoch = Epoch(2);
        let request = BeginRequest {
            operation: names.operations[0],
            kind: names.kind(),
            group: (seed % 3 == 0).then(|| names.operations[1]),
        };
        record = begin(&record, &request).unwrap_or(record);
        let order = names.order();
        for _ in 0..50 {
            let mut bytes = serde_json::to_vec(&(&record, names.report(), &order)).unwrap();
            for _ in 0..=names.dice.roll(3) {
                let at = names.dice.roll(bytes.len());
                match names.dice.roll(3) {
                    0 => bytes[at] ^= 1 << names.dice.roll(8),
                    1 => drop(bytes.remove(at)),
                    _ => bytes[at] = b'0' + names.dice.roll(10) as u8,
                }
            }
            let Ok((record, report, order)) = serde_json::from_slice::<(OwnerRecord, Report, OrderBody)>(&bytes) else {
                continue;
            };
            read += 1;
            let host = names.hosts[0];
            let mut machine = LocalHandover::of(SourceHandover::running(record.guest, host, record.epoch), host);
            machine.step(order.into());
            machine.step(LocalEvent::Source(SourceEvent::Tick));
            let _ = record.check();
            let _ = record.orders();
            let _ = accept(&record, host, &report, WhenOpen::Abort);
            let _ = note_host_lost(&record, host);
        }
    }
    println!("{read} damaged texts still had a meaning");
    assert!(read > 100, "the damage is too great to prove anything");
}
