//! Agents that lie: a good certificate, and words about what is not theirs. Nothing that they say has an effect.

use std::collections::BTreeMap;

use rcgen::{CertificateParams, KeyPair};
use supercloud_api::{
    Code, Freeze, FrozenVolume, GuestState, Image, Phase, Port, Problem, Progress, Room, Volume,
    frame::{Frame, write_frame},
    handover::{AbortReason, Owner, Report, Stamp, SwitchRequest, VolumeStamp},
    ids::{Epoch, FreezeId, GuestId, HostId, OperationId},
    link::{
        self, Answer, FrozenContent, FrozenMemory, GuestEventKind, GuestReport, Holding, Notice, Query, ReportDetails,
        kind,
    },
    tls,
};
use supercloud_controller::{
    auth::token_of_secret,
    state::{GuestRecord, OperationRecord, Record, TokenRecord},
};
use tokio::io::AsyncWriteExt as _;

use crate::support::{
    Random,
    agent::{Stage, lock, query, root_of},
    liar::Liar,
    seed,
    world::{World, identity},
};

async fn all<T: Record>(world: &World, into: &mut BTreeMap<String, serde_json::Value>) {
    for record in world.state().list::<T>().await.unwrap() {
        into.insert(format!("{}/{}", T::FOLDER, record.id()), serde_json::to_value(&record.value).unwrap());
    }
}

/// Every record that an agent could wish to change.
async fn records(world: &World) -> BTreeMap<String, serde_json::Value> {
    let mut found = BTreeMap::new();
    all::<GuestRecord>(world, &mut found).await;
    all::<Volume>(world, &mut found).await;
    all::<Port>(world, &mut found).await;
    all::<OperationRecord>(world, &mut found).await;
    all::<Freeze>(world, &mut found).await;
    all::<Image>(world, &mut found).await;
    all::<TokenRecord>(world, &mut found).await;
    found
}

/// Everything that can be said about a guest by somebody who has nothing to do with it.
fn lies(guest: GuestId, operation: OperationId, liar: HostId, owner: HostId) -> Vec<Notice> {
    let mut notices = Vec::new();
    for epoch in [0, 1, 2, 3, u64::MAX].map(Epoch) {
        let request = |from: Owner, to: Owner, volumes: usize| {
            let volumes =
                vec![
                    VolumeStamp { volume: supercloud_api::ids::VolumeId::generate(), root: [1; 32], version: 9 };
                    volumes
                ];
            Report::RequestSwitch(SwitchRequest { guest, operation, from: Stamp { owner: from, epoch }, to, volumes })
        };
        let (mine, theirs) = (Owner::Host(liar), Owner::Host(owner));
        let mut reports = vec![
            Report::Prepared { operation },
            Report::Paused { operation },
            request(theirs, mine, 0),
            request(theirs, mine, 65),
            request(mine, mine, 1),
            request(mine, Owner::Stopped, 1),
            request(theirs, Owner::Frozen(FreezeId::generate()), 1),
            request(theirs, Owner::Unowned, 1),
            Report::AskOwner(query(Some(operation), epoch)),
            Report::AskOwner(query(None, epoch)),
            Report::Running { operation, epoch },
            Report::FetchesMemory { operation, epoch },
            Report::NothingMissing { operation, epoch },
            Report::Resumed { operation, epoch },
            Report::Released { epoch },
            Report::Cleaned { operation },
            Report::LostAfterSwitch { operation, epoch },
        ];
        for owned in [None, Some(epoch)] {
            reports.push(Report::RequestAbort { operation, reason: AbortReason::Cancelled, owned });
        }
        for operation in [None, Some(operation)] {
            reports.push(Report::GuestLost { operation, epoch });
        }
        let details = || {
            Box::new(ReportDetails {
                problem: Some(Problem::new(Code::Internal, "a lie")),
                progress: Some(Progress { memory_sent_bytes: u64::MAX, ..Progress::default() }),
                ..ReportDetails::default()
            })
        };
        notices.extend(reports.into_iter().map(|report| Notice::Report { guest, report, details: details() }));
        for event in [GuestEventKind::PoweredOff, GuestEventKind::Crashed] {
            notices.push(Notice::GuestEvent { guest, epoch, event, times: 1 });
        }
        for holding in [Holding::Running, Holding::Down] {
            let alarm = Some("a lie".to_owned());
            let (operation, volumes) = (Some(operation), Vec::new());
            let report = GuestReport {
                guest,
                epoch,
                holding,
                operation,
                alarm,
                missing_bytes: 1,
                base_missing_bytes: None,
                volumes,
            };
            notices.push(Notice::Heartbeat {
                used: Room::default(),
                guests: vec![report],
                view_revision: u64::MAX,
                announced: None,
            });
        }
    }
    let progress = Progress { memory_sent_bytes: u64::MAX, message: "a lie".into(), ..Progress::default() };
    notices.push(Notice::Progress { operation, progress });
    notices.push(Notice::Discarded { guest });
    notices
}

/// Two guests at rest, one on its way, and a host that lies.
async fn stage(seed: u64) -> (World, [GuestId; 3], OperationId) {
    let mut world = World::new(seed, 3).await;
    let guests = [world.guest().await, world.guest().await, world.guest().await];
    world.done(world.start(guests[0], 0).await).await;
    world.done(world.start(guests[1], 0).await).await;
    world.done(world.stop(guests[1]).await).await;
    world.done(world.start(guests[2], 0).await).await;
    world.settled().await;
    world.kill_agent(2).await;
    world.stall(Stage::Copy, true);
    let moving = world.migrate(guests[2], 1).await;
    world.phase(moving, Phase::Copy).await;
    // The progress of what stands still is written once, and then stays.
    world.until("progress", async |world| world.operation(moving).await.progress.memory_sent_bytes > 0).await;
    (world, guests, moving)
}

/// That all goes on as if nobody had lied.
async fn goes_on(world: &World, guests: [GuestId; 3], moving: OperationId) {
    world.stall(Stage::Copy, false);
    world.done(moving).await;
    world.done(world.migrate(guests[0], 1).await).await;
    world.done(world.start(guests[1], 1).await).await;
    for guest in guests {
        assert_eq!(world.place(guest).await, Some(1));
        let starts = world.record(guest).await.guest.starts;
        assert_eq!(lock(&world.ground).boots[&guest], starts);
    }
    world.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn words_about_the_guests_of_others_have_no_effect() {
    let (world, guests, moving) = stage(seed("lies", 50)).await;
    let before = records(&world).await;
    let mut liar = Liar::dial(&world.hosts[2].seat).await.expect("a host of ours");
    let ended: Vec<_> = world.state().list::<OperationRecord>().await.unwrap();
    let operations = ended.iter().map(|record| record.operation.id).chain([OperationId::generate()]);
    for operation in operations {
        for guest in guests {
            for lie in lies(guest, operation, world.id(2), world.id(0)) {
                liar.notice(&lie).await;
            }
        }
    }
    for guest in guests {
        for epoch in [0, 1, 2].map(Epoch) {
            assert!(liar.ask(Query::ChunkSources { guest }).await.is_err());
            let refused = liar.ask(Query::GuestToken { guest, epoch }).await.unwrap_err();
            assert_eq!(refused.code, Code::Forbidden);
        }
    }
    assert_eq!(records(&world).await, before);
    // About a guest that never was: there is nothing to keep of it.
    liar.report(GuestId::generate(), Report::AskOwner(query(None, Epoch(1)))).await;
    goes_on(&world, guests, moving).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_ends_a_link_and_nothing_else() {
    let seed = seed("garbage", 51);
    let (world, guests, moving) = stage(seed).await;
    let before = records(&world).await;
    let seat = &world.hosts[2].seat;
    // Not a frame, kinds that are none, versions that are none, too long, cut off.
    let mut raw: Vec<Vec<u8>> = vec![vec![0; 64], vec![0xff; 64], b"GET / HTTP/1.1\r\n\r\n".to_vec()];
    for (kind, version, length) in [(5u16, 1u16, u32::MAX), (5, 1, (1 << 20) + 1), (5, 9, 2), (99, 1, 2), (1, 1, 2)] {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend(version.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(b"{}");
        raw.push(bytes);
    }
    for bytes in raw {
        let mut liar = Liar::dial(seat).await.expect("a host of ours");
        liar.stream.write_all(&bytes).await.unwrap();
        assert!(liar.is_hung_up().await, "{bytes:02x?}");
    }
    // Good words with flipped bits: each is refused, or says something that has no effect.
    let mut random = Random::new(seed);
    let words = lies(guests[0], moving, world.id(2), world.id(0));
    let mut liar = Liar::dial(seat).await.expect("a host of ours");
    for _ in 0..400 {
        let mut frame = Frame::json(kind::NOTICE, link::VERSION, &words[random.below(words.len())]).unwrap();
        for _ in 0..=random.below(3) {
            let at = random.below(frame.payload.len());
            frame.payload[at] = u8::try_from(random.next() & 0xff).unwrap();
        }
        if write_frame(&mut liar.stream, &frame).await.is_err() || random.is_hit(20) {
            liar = Liar::dial(seat).await.expect("a host of ours");
        }
    }
    assert_eq!(records(&world).await, before);
    goes_on(&world, guests, moving).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_and_hosts_under_another_name_are_not_welcome() {
    let mut world = World::new(seed("strangers", 52), 2).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    world.kill_agent(1).await;
    let seat = world.hosts[1].seat.clone();
    // Another host's name in the hello.
    let mut hello = seat.hello(Vec::new());
    hello.host = world.id(0);
    assert!(Liar::dial_as(&seat, hello).await.is_none());
    // A certificate of another CA, and one for a host that never joined.
    let elsewhere = tempfile::tempdir().unwrap();
    let (foreign, _) = identity(elsewhere.path(), seat.host).await;
    let (unknown, _) = identity(world.folder.path(), HostId::generate()).await;
    for wrong in [foreign, unknown] {
        let mut seat = seat.clone();
        seat.host = tls::host_of_certificate(&wrong.chain[0]).unwrap();
        seat.identity = wrong;
        assert!(Liar::dial(&seat).await.is_none());
    }
    // Addresses of others, and a probe that fills the record, do no harm.
    let mut hello = seat.hello(Vec::new());
    hello.overlay_address = Some(world.hosts[0].seat.overlay_address);
    hello.probe = serde_json::json!({ "x": "y".repeat(900_000) });
    let mut liar = Liar::dial_as(&seat, hello).await.expect("a host of ours");
    assert!(liar.ask(Query::GuestToken { guest, epoch: Epoch(1) }).await.is_err());
    world.done(world.stop(guest).await).await;
    world.done(world.start(guest, 0).await).await;
    // The newer link of a host takes the older one's place.
    let _newer = Liar::dial(&seat).await.expect("a host of ours");
    assert!(liar.is_hung_up().await);
    world.kill_agent(1).await;
    world.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_resets_in_a_loop_fills_no_chain() {
    let mut world = World::new(seed("resets", 56), 1).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    world.settled().await;
    world.kill_agent(0).await;
    let epoch = world.record(guest).await.owner.epoch;
    let mut host = Liar::dial(&world.hosts[0].seat).await.unwrap();
    for _ in 0..500 {
        host.notice(&Notice::GuestEvent { guest, epoch, event: GuestEventKind::Rebooted, times: 1 }).await;
    }
    // Of another epoch: nobody's.
    let foreign = Notice::GuestEvent { guest, epoch: Epoch(99), event: GuestEventKind::DiskStalled, times: 1 };
    host.notice(&foreign).await;
    assert!(host.ask(Query::ChunkSources { guest }).await.is_ok(), "all was heard");
    let told = async |world: &World| {
        let (events, _) = world.state().events(0, 10_000).await.unwrap();
        events.into_iter().filter(|event| event.kind == "guest.event").collect::<Vec<_>>()
    };
    world.until("told", async |world| !told(world).await.is_empty()).await;
    let events = told(&world).await;
    assert!(events.len() < 50, "{} events", events.len());
    assert!(events.iter().all(|event| event.data["event"] == "rebooted"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_renewed_for_its_own_host_only() {
    let mut world = World::new(seed("renewal", 53), 2).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    world.kill_agent(0).await;
    let seat = world.hosts[0].seat.clone();
    let mut host = Liar::dial(&seat).await.expect("a host of ours");
    for csr_pem in [String::new(), "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END".into(), "x".repeat(100_000)] {
        let refused = host.ask(Query::RenewCertificate { csr_pem }).await.unwrap_err();
        assert_eq!(refused.code, Code::BadRequest);
    }
    let key = KeyPair::generate().unwrap();
    let names = vec![tls::host_dns_name(world.id(1)), tls::CONTROLLER_NAME.to_owned()];
    let csr = CertificateParams::new(names).unwrap().serialize_request(&key).unwrap().pem().unwrap();
    let Ok(Answer::Certificate { certificate_pem }) = host.ask(Query::RenewCertificate { csr_pem: csr }).await else {
        panic!("a certificate was expected");
    };
    let chain = tls::certificates_of_pem(&certificate_pem).unwrap();
    assert_eq!(tls::host_of_certificate(&chain[0]), Some(seat.host));
    assert!(!tls::is_controller_certificate(&chain[0]));
    // The owner gets its guest a token, at its epoch only.
    let Ok(Answer::GuestToken { secret, .. }) = host.ask(Query::GuestToken { guest, epoch: Epoch(1) }).await else {
        panic!("a token was expected");
    };
    assert!(secret.len() > 32);
    // One at a time: a newer one ends the one before.
    let Ok(Answer::GuestToken { secret: newer, .. }) = host.ask(Query::GuestToken { guest, epoch: Epoch(1) }).await
    else {
        panic!("a token was expected");
    };
    let tokens = world.state().list::<TokenRecord>().await.unwrap();
    assert_eq!(tokens.iter().filter(|token| token.token.guest == Some(guest)).count(), 1);
    let now = supercloud_api::unix_ms();
    assert!(token_of_secret(world.state(), &secret, now).await.unwrap().is_none());
    assert_eq!(token_of_secret(world.state(), &newer, now).await.unwrap().unwrap().guest, Some(guest));
    assert!(host.ask(Query::GuestToken { guest, epoch: Epoch(2) }).await.is_err());
    let Ok(Answer::ChunkSources { sources }) = host.ask(Query::ChunkSources { guest }).await else {
        panic!("the owner is told where the chunks are");
    };
    assert!(!sources.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_party_that_lies_about_its_own_operation_is_held_to_bounds() {
    let mut world = World::new(seed("party", 54), 2).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    world.settled().await;
    world.kill_agent(0).await;
    let seat = world.hosts[0].seat.clone();
    let mut source = Liar::dial(&seat).await.expect("a host of ours");
    let id = world.freeze(guest).await;
    world.phase(id, Phase::Copy).await;
    let record = world.record(guest).await;
    let handover = record.owner.operation.clone().unwrap();
    let supercloud_api::handover::OperationKind::Freeze { freeze } = handover.kind else { panic!("{handover:?}") };
    let volume = record.guest.volumes[0];
    let good = FrozenContent {
        memory: FrozenMemory { freeze, root: root_of(1), bytes: 1, format: "fake/1".into() },
        volumes: vec![FrozenVolume { volume, root: root_of(2), stored_bytes: 1 }],
    };
    let changed = |change: &dyn Fn(&mut FrozenContent)| {
        let mut content = good.clone();
        change(&mut content);
        Some(content)
    };
    let wrong = [
        None,
        changed(&|content| content.memory.freeze = FreezeId::generate()),
        changed(&|content| content.memory.root = "../../etc/passwd".into()),
        changed(&|content| content.memory.format = "x".repeat(100_000)),
        changed(&|content| content.volumes.clear()),
        changed(&|content| content.volumes[0].root = "x".repeat(1000)),
        changed(&|content| content.volumes.push(content.volumes[0].clone())),
        changed(&|content| content.volumes[0].volume = supercloud_api::ids::VolumeId::generate()),
    ];
    let request = SwitchRequest {
        guest,
        operation: id,
        from: handover.from,
        to: Owner::Frozen(freeze),
        volumes: vec![VolumeStamp { volume, root: [1; 32], version: 9 }],
    };
    let before = records(&world).await;
    for frozen in wrong {
        let details = Box::new(ReportDetails { frozen, ..ReportDetails::default() });
        source.notice(&Notice::Report { guest, report: Report::RequestSwitch(request.clone()), details }).await;
    }
    assert!(source.ask(Query::GuestToken { guest, epoch: Epoch(99) }).await.is_err());
    assert_eq!(records(&world).await, before);
    // A reason of a megabyte fits no record; it is cut, and the operation ends all the same.
    let problem = Some(Problem::new(Code::Internal, "y".repeat(900_000)));
    let details = Box::new(ReportDetails { problem, ..ReportDetails::default() });
    let report = Report::RequestAbort { operation: id, reason: AbortReason::SourceFailed, owned: Some(Epoch(1)) };
    source.notice(&Notice::Report { guest, report, details }).await;
    world.until("aborted", async |world| world.operation(id).await.error.is_some()).await;
    drop(source);
    world.start_agent(0);
    let ended = world.end(id).await;
    assert_eq!(ended.phase, Phase::RolledBack);
    assert!(ended.error.unwrap().detail.len() <= 1000);
    world.settled().await;
    assert_eq!(world.record(guest).await.guest.state, GuestState::Running);
    world.done(world.migrate(guest, 1).await).await;
    world.settled().await;
}
