//! The ledger while the controller is killed again and again: what hosts cost is what its lines say, to the nano-dollar, and who
//! ran where is who owned.

use std::{collections::BTreeMap, time::Duration};

use supercloud_api::{
    GuestState, LedgerClock, LedgerKind, Phase, Tenure,
    handover::Owner,
    ids::{GuestId, RentingId},
    unix_ms,
};
use supercloud_controller::{
    ledger::{
        Asked, DaySums, EgressRecord, LINES_AT_MOST, MarketName, MarketRecord, PriceRecord, Role, Stamp, Statement,
        StayRecord, TenancyRecord, statement,
    },
    state::{Change, Context, GuestRecord, OperationRecord, retry_conflicts},
};
use supercloud_scheduler::{
    ledger::{HOUR_MS, Span},
    money::NanoUsd,
};

use crate::support::{Random, seed, world::World};

/// A price at which a millisecond is no whole number of nano-dollars.
const PRICE: NanoUsd = NanoUsd(41_666_667_123);

/// Gives every host a market with a price that has always held.
async fn price(world: &World) {
    world
        .until("every host has told what it has", async |world| {
            let found = world.state().list::<TenancyRecord>().await.unwrap();
            found.len() == world.hosts.len() && found.iter().all(|tenancy| !tenancy.sizes.is_empty())
        })
        .await;
    for host in world.state().list::<TenancyRecord>().await.unwrap() {
        let name = MarketName { cloud: host.cloud_name.clone(), instance_type: "m".into(), tenure: Tenure::Spot };
        retry_conflicts(|| async {
            let before = world.state().need::<TenancyRecord>(&host.host).await?;
            let mut change = Change::new();
            let (renting, market) = (Some(RentingId::generate()), Some(name.clone()));
            change.update(&before, &TenancyRecord { renting, market, ..before.value.clone() });
            for market in [name.name(), name.on_demand().name()] {
                let clock = LedgerClock::Wall;
                let at = Stamp { clock, at_ms: 0 };
                change.create(&PriceRecord { market: market.clone(), at, per_hour: PRICE });
                change.create(&MarketRecord { market, clock, last_at_ms: 0, last: PRICE, known_until_ms: u64::MAX });
            }
            world.state().commit(&Context::system(), change).await
        })
        .await
        .unwrap();
    }
}

async fn told(world: &World, from_ms: u64, to_ms: u64) -> Statement {
    let window = Span { from_ms, to_ms };
    let asked = Asked { clock: LedgerClock::Wall, window, project: None, guest: None, host: None, cloud: None };
    statement(world.state(), asked, 0..usize::MAX, LINES_AT_MOST, &mut DaySums::default()).await.unwrap()
}

/// What the hosts cost until then: each rounded up once.
async fn bill(world: &World, to_ms: u64) -> u64 {
    let tenancies = world.state().list::<TenancyRecord>().await.unwrap();
    tenancies.iter().map(|tenancy| PRICE.per_hour_for(to_ms - tenancy.spans[0].since.at_ms).0).sum()
}

/// Nobody ran at two places at once, and who runs has a stay that is open.
async fn agrees_with_owners(world: &World) {
    let mut runs: BTreeMap<GuestId, Vec<(u64, u64)>> = BTreeMap::new();
    for record in world.state().list::<StayRecord>().await.unwrap() {
        assert!(record.stay.since.at_ms < record.to_ms);
        if record.stay.role == Role::Runs {
            runs.entry(record.guest).or_default().push((record.stay.since.at_ms, record.to_ms));
        }
    }
    for record in world.state().list::<GuestRecord>().await.unwrap() {
        let open: Vec<_> = record.stays.iter().filter(|stay| stay.role == Role::Runs).collect();
        match record.owner.owner {
            Owner::Host(host) => assert!(open.len() == 1 && open[0].host == host, "{open:?}"),
            _ => assert!(open.is_empty(), "{open:?}"),
        }
        let spans = runs.entry(record.guest.id).or_default();
        spans.extend(open.iter().map(|stay| (stay.since.at_ms, u64::MAX)));
    }
    let (events, more) = world.state().events(0, 100_000).await.unwrap();
    assert!(!more);
    for (guest, mut spans) in runs {
        spans.sort_unstable();
        let is_begin = |event: &&supercloud_api::Event| {
            event.kind == "guest.switched"
                && event.guest == Some(guest)
                && event.data["to"]["owner"]["host"].is_string()
        };
        assert_eq!(spans.len(), events.iter().filter(is_begin).count(), "{guest}: one stay for each time of owning it");
        assert!(spans.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{guest} ran twice at once: {spans:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sums_reconcile_exactly_however_often_the_controller_dies() {
    let seed = seed("ledger", 43);
    let mut random = Random::new(seed);
    let mut world = World::new(seed, 3).await;
    price(&world).await;
    let mut guests = Vec::new();
    for _ in 0..3 {
        guests.push(world.guest().await);
    }
    let began_ms = unix_ms();
    for round in 0..24 {
        let guest = guests[random.below(guests.len())];
        let record = world.record(guest).await;
        let to = random.below(3);
        let is_free = record.guest.operation.is_none();
        let is_elsewhere = record.guest.host.is_some_and(|host| host != world.id(to));
        match record.guest.state {
            _ if !is_free => {}
            GuestState::Created | GuestState::Stopped => drop(world.start(guest, to).await),
            GuestState::Running if random.below(6) == 0 => drop(world.stop(guest).await),
            GuestState::Running if is_elsewhere => drop(world.migrate(guest, to).await),
            _ => {}
        }
        tokio::time::sleep(Duration::from_millis(random.next() % 300)).await;
        if round % 4 == 3 {
            world.kill_controller().await;
            tokio::time::sleep(Duration::from_millis(random.next() % 100)).await;
            world.start_controller().await;
            agrees_with_owners(&world).await;
        }
    }
    world.settled().await;
    agrees_with_owners(&world).await;

    let end_ms = unix_ms();
    let all = told(&world, 0, end_ms).await;
    assert_eq!(all.totals.paid_nanousd, bill(&world, end_ms).await, "the hosts cost what the lines say");
    assert_eq!(all.totals.unpriced_ms, 0);
    assert!(all.totals.runs_nanousd > 0 && all.totals.incoming_nanousd > 0 && all.totals.idle_nanousd > 0);
    // Cut anywhere, the same sum.
    let (mut sum, mut at_ms) = (0, 0);
    while at_ms < end_ms {
        let next_ms = if at_ms == 0 { began_ms } else { at_ms + 1 + random.next() % 900 };
        sum += told(&world, at_ms, next_ms.min(end_ms)).await.totals.paid_nanousd;
        at_ms = next_ms;
    }
    assert_eq!(sum, all.totals.paid_nanousd);
    assert!(all.lines.iter().all(|line| line.to_ms / HOUR_MS - line.from_ms / HOUR_MS <= 1));

    // What was told stays so, through one more death.
    world.restart_controller().await;
    let again = told(&world, 0, end_ms).await;
    assert_eq!(again.totals, all.totals);
    // One entry for each move whose bytes left a cloud, without a price: nobody told one.
    let operations = world.state().list::<OperationRecord>().await.unwrap();
    let is_moved = |record: &OperationRecord| {
        record.operation.kind == supercloud_api::OperationKind::GuestMigrate && record.operation.phase == Phase::Done
    };
    let mut moved: Vec<_> = operations.iter().filter(|r| is_moved(r)).map(|r| r.operation.id).collect();
    let told: Vec<_> = again.lines.iter().filter(|line| line.kind == LedgerKind::Egress).collect();
    assert!(told.iter().all(|line| line.paid_nanousd.is_none() && line.bytes.is_some_and(|bytes| bytes > 0)));
    let egress = world.state().list::<EgressRecord>().await.unwrap();
    moved.retain(|id| egress.iter().filter(|entry| entry.operation == *id).count() != 1);
    let sent = |id| operations.iter().find(|r| r.operation.id == id).map(|r| r.operation.progress.memory_sent_bytes);
    assert!(moved.iter().all(|id| sent(*id) == Some(0)), "moves without an entry: {moved:?}");
    for guest in guests {
        if world.record(guest).await.guest.state == GuestState::Running {
            world.done(world.stop(guest).await).await;
        }
    }
    world.settled().await;
    agrees_with_owners(&world).await;
}
