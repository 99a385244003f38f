//! The ledger through REST: on a feed whose clock stands still until it is set, so that every figure is known beforehand.

use std::sync::Arc;

use reqwest::Method;
use supercloud_api::{
    Code, FeedClock, Ledger, LedgerClock, LedgerKind, LedgerLine, Market, PricePoint, PriceSeries, Problem, Role,
    Shape, Tenure,
    handover::{Owner, OwnerRecord},
    ids::{Epoch, GuestId, RentingId},
    unix_ms,
};

use supercloud_scheduler::ledger::Span;

use super::{TestController, World, guest, problem};
use crate::{
    ledger::{Asked, DaySums, MarketName, StatementError, TenancyRecord, end_stays, keep_stays, statement},
    price_board::PriceBoard,
    state::{Change, Context, GuestRecord, Record as _, retry_conflicts},
};

const HOUR: u64 = 3_600_000;
/// A thousandth of a dollar.
const MILLI: u64 = 1_000_000;

const FEED: &str = "# supercloud-feed 1\nfeed_ms,cloud,instance_type,tenure,usd_per_hour\n\
    0,east,m,on_demand,0.1\n0,east,m,spot,0.04\n0,west,m,on_demand,0.1\n0,west,m,spot,0.02\n1800000,east,m,spot,0.08\n";

async fn start(folder: tempfile::TempDir) -> TestController {
    let path = folder.path().join("feed.csv");
    std::fs::write(&path, FEED).unwrap();
    TestController::start_with(folder, &format!("[feed]\nfile = '{}'\nspeed = 0.0\n", path.display())).await
}

impl TestController {
    async fn feed_at(&self, feed_ms: u64) {
        let clock = FeedClock { feed_now_ms: Some(feed_ms), speed: None };
        self.admin_client().set_feed_clock(&clock).await.unwrap();
    }

    /// As the engine writes it: the stays change with the owner.
    async fn own(&self, guest: GuestId, owner: Owner) {
        let state = self.state();
        let host = match owner {
            Owner::Host(host) => Some(state.need::<crate::state::HostRecord>(&host).await.unwrap().value.host),
            _ => None,
        };
        retry_conflicts(|| async {
            let before = state.need::<GuestRecord>(&guest).await?;
            let mut now = before.value.clone();
            let epoch = Epoch(now.owner.epoch.0 + 1);
            now.set_owner(OwnerRecord { owner, epoch, operation: None, ..now.owner.clone() }, host.as_ref());
            let mut change = Change::new();
            keep_stays(&mut now, state.book().now(), &mut change);
            change.update(&before, &now);
            state.commit(&Context::system(), change).await
        })
        .await
        .unwrap();
    }

    /// A quarter of the host `east`, a half of the memory and a quarter of the vCPUs of `west`.
    async fn quarter(&self, world: &World, name: &str) -> GuestId {
        let mut wanted = guest(name);
        wanted.shape = Shape { vcpus: 16, memory_bytes: 16 << 30 };
        world.client.create_guest(&wanted).await.unwrap();
        world.client.guest(name).await.unwrap().id
    }
}

async fn all(test: &TestController) -> Ledger {
    test.admin_client().ledger("limit=1000").await.unwrap()
}

fn paid(ledger: &Ledger, keep: impl Fn(&LedgerLine) -> bool) -> u64 {
    ledger.items.iter().filter(|line| keep(line)).map(|line| line.paid_nanousd.unwrap()).sum()
}

#[tokio::test]
async fn hosts_are_paid_by_their_guests_and_by_nobody_through_a_move_a_restart_and_an_end() {
    let test = start(tempfile::tempdir().unwrap()).await;
    let world = test.world().await;
    let [east, west] = world.hosts.clone();
    let id = test.quarter(&world, "g").await;
    test.own(id, Owner::Host(east.id)).await;
    test.feed_at(HOUR).await;
    let first = all(&test).await;
    assert_eq!((first.clock, first.from_ms, first.to_ms), (LedgerClock::Feed, 0, HOUR));
    let of_guest: Vec<_> = first.items.iter().filter(|line| line.guest == Some(id)).collect();
    let told: Vec<_> = of_guest.iter().map(|line| (line.from_ms, line.price_nanousd, line.paid_nanousd)).collect();
    assert_eq!(
        told,
        [(0, Some(40 * MILLI), Some(5 * MILLI)), (HOUR / 2, Some(80 * MILLI), Some(10 * MILLI))],
        "a quarter of each price"
    );
    assert_eq!(of_guest[0].market.as_deref(), Some("east/m/spot"));
    assert_eq!(of_guest[0].on_demand_nanousd, Some(12_500_000));
    let totals = first.totals;
    assert_eq!((totals.paid_nanousd, totals.runs_nanousd, totals.idle_nanousd), (80 * MILLI, 15 * MILLI, 65 * MILLI));
    assert_eq!((totals.on_demand_nanousd, totals.unpriced_ms), (200 * MILLI, 0));
    let metrics = test.raw(Method::GET, "/metrics", Some(&test.admin_secret())).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    for line in ["paid_nanousd_per_hour 100000000", "on_demand_nanousd_per_hour 200000000", "unpriced_hosts 0"] {
        assert!(metrics.contains(&format!("\nsupercloud_{line}\n")), "{line}: {metrics}");
    }

    test.own(id, Owner::Host(west.id)).await;
    test.feed_at(2 * HOUR).await;
    // The clock goes on, and so does what was open.
    let folder = test.stop().await;
    let test = start(folder).await;
    assert_eq!(all(&test).await.to_ms, 2 * HOUR);
    test.feed_at(3 * HOUR).await;
    test.own(id, Owner::Stopped).await;
    test.feed_at(4 * HOUR).await;
    let ledger = all(&test).await;
    // 20 + 40 and three times 80 in the east, four times 20 in the west.
    assert_eq!(ledger.totals.paid_nanousd, 380 * MILLI);
    assert_eq!(paid(&ledger, |line| line.host == east.id), 300 * MILLI);
    // Half of the memory and a quarter of the vCPUs of the west for two hours.
    assert_eq!(paid(&ledger, |line| line.guest == Some(id)), 15 * MILLI + 15 * MILLI);
    assert_eq!(paid(&ledger, |line| line.kind == LedgerKind::Idle), 350 * MILLI);
    let last = ledger.items.iter().filter(|line| line.guest == Some(id)).map(|line| line.to_ms).max();
    assert_eq!(last, Some(3 * HOUR));

    // Pages are of one listing; its sums are of all of it.
    let (admin, mut page, mut lines) = (test.admin_client(), String::new(), Vec::new());
    loop {
        let part = admin.ledger(&format!("limit=3{page}")).await.unwrap();
        assert_eq!(part.totals, ledger.totals);
        lines.extend(part.items);
        let Some(next) = part.next_page else { break };
        page = format!("&page={next}");
    }
    assert_eq!(lines, ledger.items);
    // Any cut of time has the same sum, and filters keep what they name.
    let mut sum = 0;
    for (from, to) in [(0, 77_777), (77_777, HOUR + 1), (HOUR + 1, 9 * HOUR)] {
        sum += admin.ledger(&format!("from_ms={from}&to_ms={to}")).await.unwrap().totals.paid_nanousd;
    }
    assert_eq!(sum, ledger.totals.paid_nanousd);
    let one = admin.ledger("guest=g&project=p&host=west-1&cloud=west").await.unwrap();
    assert_eq!((one.totals.paid_nanousd, one.totals.idle_nanousd), (15 * MILLI, 0));

    // What a guest cost stays known when it is gone.
    let before = test.state().need::<GuestRecord>(&id).await.unwrap();
    let mut change = Change::new();
    end_stays(&before, test.state().book().now(), &mut change);
    change.delete_named(&before);
    test.state().commit(&Context::system(), change).await.unwrap();
    assert_eq!(admin.ledger(&format!("guest={id}")).await.unwrap().totals.paid_nanousd, 30 * MILLI);
    test.stop().await;
}

#[tokio::test]
async fn a_project_sees_the_lines_of_its_own_guests_only() {
    let test = start(tempfile::tempdir().unwrap()).await;
    let world = test.world().await;
    let id = test.quarter(&world, "g").await;
    test.own(id, Owner::Host(world.hosts[0].id)).await;
    test.feed_at(HOUR).await;
    let own = world.client.ledger("").await.unwrap();
    assert_eq!((own.totals.paid_nanousd, own.totals.idle_nanousd), (15 * MILLI, 0));
    assert!(own.items.iter().all(|line| line.guest == Some(id)));
    let (_, other) = test.project("q").await;
    let other = test.client(&other);
    for query in ["", "host=east-1", &format!("guest={id}")] {
        let none = other.ledger(query).await.unwrap();
        assert!(none.items.is_empty() && none.totals.paid_nanousd == 0, "{none:?}");
    }
    assert_eq!(problem(other.ledger("project=p").await).code, Code::NotFound);
    assert_eq!(problem(other.ledger("guest=g").await).code, Code::NotFound);
    let viewer = test.token("p", Role::Viewer).await.secret;
    assert_eq!(test.client(&viewer).ledger("").await.unwrap(), own);
    let guests_own = test.guest_token(world.project, id).await;
    assert_eq!(problem(test.client(&guests_own).ledger("").await).code, Code::Forbidden);
    for bad in
        ["page=x", "limit=0", "from_ms=-1", "clock=moon", "clock=wall", "from_ms=0&to_ms=99999999999999&clock=wall"]
    {
        let refused =
            test.raw(Method::GET, &format!("/v1/ledger?{bad}"), Some(&test.admin_secret())).send().await.unwrap();
        assert_eq!(refused.status(), 400, "{bad}");
    }
    test.stop().await;
}

#[tokio::test]
async fn without_a_price_nothing_is_invented_and_when_the_clock_changes_what_is_open_is_cut() {
    let test = TestController::start().await;
    let world = test.world().await;
    let id = test.quarter(&world, "g").await;
    test.own(id, Owner::Host(world.hosts[0].id)).await;
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let unpriced = all(&test).await;
    assert_eq!((unpriced.clock, unpriced.totals.paid_nanousd), (LedgerClock::Wall, 0));
    assert!(unpriced.totals.unpriced_ms > 0);
    assert!(unpriced.items.iter().all(|line| line.paid_nanousd.is_none() && line.price_nanousd.is_none()));
    let folder = test.stop().await;

    let test = start(folder).await;
    test.feed_at(HOUR).await;
    let ledger = all(&test).await;
    assert_eq!(
        (ledger.clock, ledger.totals.paid_nanousd, ledger.totals.unpriced_ms),
        (LedgerClock::Feed, 80 * MILLI, 0)
    );
    let query = format!("clock=wall&from_ms={}&to_ms={}", unpriced.from_ms, unpriced.to_ms + HOUR);
    let old = test.admin_client().ledger(&query).await.unwrap();
    assert_eq!(old.items.iter().filter(|line| line.guest == Some(id)).count(), 1, "{old:?}");
    assert!(old.totals.unpriced_ms >= unpriced.totals.unpriced_ms);
    assert!(old.totals.unpriced_ms < unpriced.totals.unpriced_ms + HOUR, "it ended when it was last seen");
    let record = test.state().need::<GuestRecord>(&id).await.unwrap();
    assert_eq!(record.stays.len(), 1, "{}", GuestRecord::FOLDER);
    test.stop().await;
}

/// A board with one market, as of somebody who has rented one machine there.
struct OneMarket(Market);

impl PriceBoard for OneMarket {
    fn markets(&self) -> Vec<Market> {
        vec![self.0.clone()]
    }
    fn prices(&self, market: &str) -> Option<PriceSeries> {
        let point = PricePoint { feed_time_ms: 0, price_nanousd_per_hour: self.0.price_nanousd_per_hour };
        let told = PriceSeries { market: market.to_owned(), feed_now_ms: unix_ms(), points: vec![point] };
        (market == self.0.name).then_some(told)
    }
    fn set_clock(&self, _clock: FeedClock) -> Result<FeedClock, Problem> {
        Err(Problem::new(Code::NotFound, "no feed"))
    }
}

#[tokio::test]
async fn hosts_that_joined_by_themselves_are_not_priced_by_what_others_rent() {
    let test = TestController::start().await;
    let [own, rented] = test.world().await.hosts;
    let market = Market {
        name: "east/m/spot".into(),
        cloud: own.cloud,
        cloud_name: own.cloud_name.clone(),
        instance_type: "m".into(),
        tenure: Tenure::Spot,
        price_nanousd_per_hour: 3_600 * MILLI,
        on_demand_nanousd_per_hour: None,
        feed_time_ms: 0,
        feed_now_ms: unix_ms(),
        seen: None,
    };
    assert_eq!(own.cloud_name.as_str(), "east");
    test.parts().markets.post(Arc::new(OneMarket(market)));
    let in_east = MarketName { cloud: own.cloud_name.clone(), instance_type: "m".into(), tenure: Tenure::Spot };
    let write = async |host, renting, market: Option<MarketName>| {
        let before = test.state().need::<TenancyRecord>(&host).await.unwrap();
        let mut change = Change::new();
        change.update(&before, &TenancyRecord { renting, market, ..before.value.clone() });
        test.state().commit(&Context::system(), change).await.unwrap();
    };
    write(rented.id, Some(RentingId::generate()), Some(in_east.clone())).await;
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let is_right = async || {
        test.parts().clerk.pass().await.unwrap();
        let told = all(&test).await;
        assert!(told.items.iter().all(|line| line.paid_nanousd.is_some() == (line.host == rented.id)), "{told:?}");
        assert!(told.items.iter().all(|line| line.market.is_some() == (line.host == rented.id)), "{told:?}");
        assert!(told.items.iter().any(|line| line.host == own.id) && told.totals.paid_nanousd > 0);
        let metrics = test.raw(Method::GET, "/metrics", Some(&test.admin_secret())).send().await.unwrap();
        let metrics = metrics.text().await.unwrap();
        assert!(metrics.contains("\nsupercloud_paid_nanousd_per_hour 3600000000\n"), "{metrics}");
        assert!(metrics.contains("\nsupercloud_unpriced_hosts 1\n"), "{metrics}");
    };
    is_right().await;
    assert_eq!(test.state().need::<TenancyRecord>(&own.id).await.unwrap().market, None, "and nothing is written");
    // One that a feed, or an older version, has named.
    write(own.id, None, Some(in_east)).await;
    is_right().await;
    test.stop().await;
}

#[tokio::test]
async fn a_statement_keeps_its_page_only_and_makes_no_more_than_its_bound() {
    let test = start(tempfile::tempdir().unwrap()).await;
    let world = test.world().await;
    let id = test.quarter(&world, "g").await;
    test.own(id, Owner::Host(world.hosts[0].id)).await;
    test.feed_at(75 * HOUR + 7).await;
    test.own(id, Owner::Host(world.hosts[1].id)).await;
    test.feed_at(80 * HOUR).await;
    test.parts().clerk.pass().await.unwrap();
    let window = Span { from_ms: 0, to_ms: 80 * HOUR };
    let asked = Asked { clock: LedgerClock::Feed, window, project: None, guest: None, host: None, cloud: None };
    let all = statement(test.state(), asked, 0..usize::MAX, usize::MAX, &mut DaySums::default()).await.unwrap();
    assert_eq!(all.count, all.lines.len());
    // Half an hour at 40 and then at 80; 80 hours at 20.
    assert_eq!(all.totals.paid_nanousd, (20 + 79 * 80 + 40 + 80 * 20) * MILLI);
    let idle = |line: &&LedgerLine| line.kind == LedgerKind::Idle && line.host == world.hosts[0].id;
    assert_eq!(all.lines.iter().filter(idle).map(|line| line.to_ms - line.from_ms).sum::<u64>(), 80 * HOUR);
    assert!(all.lines.is_sorted_by_key(|line| (line.host, line.from_ms, line.to_ms, line.guest)));
    let (mut lines, mut sums) = (Vec::new(), DaySums::default());
    for at in (0..all.count).step_by(7) {
        let page = statement(test.state(), asked, at..at + 7, all.count, &mut sums).await.unwrap();
        assert_eq!((page.totals, page.count), (all.totals, all.count));
        assert!(page.lines.len() <= 7);
        lines.extend(page.lines);
    }
    assert_eq!(lines, all.lines);
    // Of each host the two whole days that are over for more than a day; what they came to is not added up again.
    assert_eq!(sums.len(), 4);
    let project = Asked { project: Some(world.project), ..asked };
    let of_project = statement(test.state(), project, 0..0, all.count, &mut DaySums::default()).await.unwrap();
    for _ in 0..2 {
        assert_eq!(statement(test.state(), project, 0..0, all.count, &mut sums).await.unwrap(), of_project);
        assert_eq!(statement(test.state(), asked, 0..0, all.count, &mut sums).await.unwrap().totals, all.totals);
    }
    assert_ne!(of_project.totals, all.totals);
    assert_eq!(sums.len(), 8);
    let refused = statement(test.state(), asked, 0..1, 20, &mut sums).await;
    assert!(matches!(refused, Err(StatementError::TooMuch)), "{refused:?}");
    // Who sees one guest only makes the lines of its hosts: of one, then of two.
    let of_guest = Asked { guest: Some(id), window: Span { from_ms: 0, to_ms: 75 * HOUR }, ..asked };
    let one = statement(test.state(), of_guest, 0..0, 2 * 76, &mut sums).await.unwrap();
    assert_eq!((one.count, one.lines.len()), (76, 0));
    test.stop().await;
}
