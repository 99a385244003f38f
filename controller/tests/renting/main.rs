//! Rentings under kills of the controller: one order is one machine or none, and nothing is left behind.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bazaar;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bazaar::{Bazaar, Stuck};
use supercloud_api::{
    Cloud, Host, HostRent, HostState, Operation, OperationKind, Phase, Renting, RentingEnd, RentingState, Room, Tenure,
    ids::{CloudId, HostId, OperationId, RentingId},
};
use supercloud_controller::{
    auth::secret_sha256,
    keys::Keys,
    ledger::{TenancyRecord, host_removed, keep_host},
    renting::{Pace, Place, PlaceParts, Providers, machine, machine::Limits, secret_purpose},
    state::{Change, Context, HostRecord, JoinRecord, OperationRecord, RentingRecord, State, Work, retry_conflicts},
};
use supercloud_provider::{Bounded, Budgets, ProviderError};
use supercloud_store::{SledOptions, SledStore, Store};
use tokio::task::JoinHandle;

const PATIENCE: Duration = Duration::from_secs(60);
const OWNER: &str = "fingerprint";

/// A controller's share in rentings, which can be killed and started again.
struct World {
    folder: tempfile::TempDir,
    bazaar: Bazaar,
    limits: Limits,
    running: Option<(State, Arc<SledStore>, JoinHandle<()>)>,
    cloud: Cloud,
}

impl World {
    async fn new() -> Self {
        let cloud =
            Cloud { id: CloudId::generate(), name: "c".parse().unwrap(), provider: "bazaar".into(), created_at_ms: 0 };
        let limits = Limits { join_ms: 3_600_000, settle_ms: 300 };
        let mut world =
            Self { folder: tempfile::tempdir().unwrap(), bazaar: Bazaar::default(), limits, running: None, cloud };
        world.start().await;
        let mut change = Change::new();
        change.create_named(&world.cloud);
        world.state().commit(&Context::system(), change).await.unwrap();
        world
    }

    fn state(&self) -> &State {
        &self.running.as_ref().unwrap().0
    }

    fn keys(&self) -> Keys {
        Keys::open_or_make(self.folder.path()).unwrap()
    }

    async fn start(&mut self) {
        let path = self.folder.path().join("state");
        let store = Arc::new(SledStore::open(path, SledOptions::default()).await.unwrap());
        let state = State::open(Arc::clone(&store) as Arc<dyn Store>).await.unwrap();
        let parts = PlaceParts {
            state: state.clone(),
            keys: Arc::new(self.keys()),
            owner: OWNER.into(),
            controller_url: "https://controller:8443".into(),
            wake: Arc::default(),
            limits: self.limits,
            pace: Pace {
                look: Duration::from_millis(20),
                sweep: Duration::from_millis(40),
                pause: Duration::from_millis(20),
            },
        };
        let second = Duration::from_secs(1);
        let budgets = Budgets { change: second, look: second, listing: second };
        let bounded = Bounded::with(Arc::new(self.bazaar.clone()), budgets);
        let providers = Providers::of([("bazaar".to_owned(), bounded)]);
        let place = Place::new(parts, "bazaar", providers.get("bazaar").unwrap().clone());
        self.running = Some((state, store, tokio::spawn(place.run())));
    }

    /// Dies at whatever await it is in.
    async fn kill(&mut self) {
        let (_, store, task) = self.running.take().unwrap();
        task.abort();
        let _cancelled = task.await;
        store.close().await;
    }

    /// The store lies open, and nobody works on it.
    async fn start_idle(&mut self) {
        let path = self.folder.path().join("state");
        let store = Arc::new(SledStore::open(path, SledOptions::default()).await.unwrap());
        let state = State::open(Arc::clone(&store) as Arc<dyn Store>).await.unwrap();
        self.running = Some((state, store, tokio::spawn(async {})));
    }

    /// As REST writes it.
    async fn rent(&self, name: &str, instance_type: &str) -> RentingId {
        let (id, host) = (RentingId::generate(), HostId::generate());
        let planned = Context::system().planned(OperationId::generate(), OperationKind::HostRent);
        let operation = Operation { destination: Some(host), ..planned };
        let wanted = HostRent {
            host_name: name.parse().unwrap(),
            instance_type: instance_type.into(),
            tenure: Tenure::Spot,
            max_price_nanousd_per_hour: None,
        };
        let renting = machine::recorded(id, &self.cloud, host, &wanted, operation.id);
        let sealed = self.keys().root.seal(&secret_purpose(host), name.as_bytes());
        let mut change = Change::new();
        change
            .create(&RentingRecord { renting, sealed_secret: hex::encode(sealed) })
            .create_operation(&OperationRecord { operation, work: Work::HostRent });
        self.state().commit(&Context::system(), change).await.unwrap();
        id
    }

    async fn renting(&self, id: RentingId) -> Renting {
        self.state().need::<RentingRecord>(&id).await.unwrap().value.renting
    }

    async fn rent_phase(&self, id: RentingId) -> Phase {
        let operation = self.renting(id).await.rent_operation;
        self.state().need::<OperationRecord>(&operation).await.unwrap().operation.phase
    }

    async fn reaches(&self, id: RentingId, state: RentingState) -> Renting {
        let began = Instant::now();
        loop {
            let now = self.renting(id).await;
            if now.state == state {
                return now;
            }
            assert!(began.elapsed() < PATIENCE, "it is {:?}, not {state:?}: {now:?}", now.state);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Its agent joins.
    async fn join(&self, id: RentingId) {
        let renting = self.renting(id).await;
        let host = Host {
            id: renting.host,
            name: renting.host_name.clone(),
            cloud: renting.cloud,
            cloud_name: renting.cloud_name.clone(),
            state: HostState::Up,
            data_address: None,
            overlay_address: None,
            overlay_encryption: None,
            overlay_index: 1,
            capacity: Room::default(),
            used: Room::default(),
            compat_classes: vec![],
            probe: serde_json::Value::Null,
            agent_version: String::new(),
            certificate_sha256: String::new(),
            last_seen_ms: 0,
            moves_live: true,
            notice: None,
            created_at_ms: 0,
        };
        let mut change = Change::new();
        keep_host(self.state(), &host, &mut change).await.unwrap();
        change.create_named(&HostRecord { host, is_cordoned: false, is_removed: false, withdrawn: None });
        self.state().commit(&Context::system(), change).await.unwrap();
    }

    /// As an operator cancels the rent operation.
    async fn cancel(&self, id: RentingId) {
        retry_conflicts(|| async {
            let operation = self.renting(id).await.rent_operation;
            let before = self.state().need::<OperationRecord>(&operation).await?;
            let mut now = before.value.clone();
            now.operation.is_cancel_requested = true;
            let mut change = Change::new();
            change.update_operation(&before, &mut now);
            self.state().commit(&Context::system(), change).await.map(drop)
        })
        .await
        .unwrap();
    }

    async fn until(&self, what: &str, holds: impl Fn() -> bool) {
        let began = Instant::now();
        while !holds() {
            assert!(began.elapsed() < PATIENCE, "{what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test]
async fn the_tests_own_provider_keeps_what_every_driver_promises() {
    supercloud_provider::conformance::check(&Bazaar::default(), &bazaar::order("t")).await;
}

#[tokio::test]
async fn killed_between_the_record_and_the_launch_it_launches_exactly_one_later() {
    let mut world = World::new().await;
    world.bazaar.lock().stuck = Some(Stuck::Before);
    let id = world.rent("h", "m").await;
    world.until("the launch is begun", || world.bazaar.lock().is_caught).await;
    world.kill().await;
    assert!(world.bazaar.costing().is_empty());
    world.bazaar.lock().stuck = None;
    world.start().await;
    let renting = world.reaches(id, RentingState::Launched).await;
    assert_eq!(world.bazaar.costing().len(), 1);
    assert_eq!(world.bazaar.costing()[0].instance.id, renting.instance.unwrap());
    assert!(world.bazaar.costing()[0].user_data.contains(&format!("scjoin.{}.h.{OWNER}", renting.host)));
    let join = world.state().need::<JoinRecord>(&secret_sha256("h")).await.unwrap();
    assert_eq!((join.host, join.host_name.as_str()), (renting.host, "h"));
    world.join(id).await;
    world.reaches(id, RentingState::Up).await;
    assert_eq!(world.rent_phase(id).await, Phase::Done);
}

#[tokio::test]
async fn killed_between_the_launch_and_its_note_it_finds_the_machine_again() {
    for lag_ms in [0, 150] {
        let mut world = World::new().await;
        world.bazaar.lock().stuck = Some(Stuck::After);
        world.bazaar.lock().lag = Duration::from_millis(lag_ms);
        let id = world.rent("h", "m").await;
        world.until("the launch has happened", || world.bazaar.lock().is_caught).await;
        world.kill().await;
        assert_eq!(world.bazaar.costing().len(), 1);
        world.bazaar.lock().stuck = None;
        world.start().await;
        let renting = world.reaches(id, RentingState::Launched).await;
        assert_eq!(renting.instance.as_deref(), Some("i-0"));
        assert_eq!(world.bazaar.lock().machines.len(), 1, "one order, one machine, also where listings lag");
    }
}

#[tokio::test]
async fn an_agent_that_joins_before_its_launch_is_known_is_priced_as_what_was_rented() {
    for is_removed in [false, true] {
        let mut world = World::new().await;
        world.bazaar.lock().stuck = Some(Stuck::After);
        let id = world.rent("h", "m").await;
        world.until("the launch has happened", || world.bazaar.lock().is_caught).await;
        world.kill().await;
        world.bazaar.lock().stuck = None;
        world.start_idle().await;
        world.join(id).await;
        let host = world.renting(id).await.host;
        let joined = world.state().need::<TenancyRecord>(&host).await.unwrap().value;
        assert_eq!((joined.renting, &joined.market), (None, &None));
        if is_removed {
            tokio::time::sleep(Duration::from_millis(2)).await;
            let mut change = Change::new();
            host_removed(world.state(), host, &mut change).await.unwrap();
            world.state().commit(&Context::system(), change).await.unwrap();
        }
        world.kill().await;
        world.start().await;
        world.reaches(id, RentingState::Up).await;
        let tenancy = world.state().need::<TenancyRecord>(&host).await.unwrap().value;
        assert_eq!((tenancy.renting, tenancy.market.unwrap().name().as_str()), (Some(id), "c/m/spot"));
        assert_eq!(tenancy.spans, joined.spans, "it costs since it joined, and on and on");
        assert_eq!(tenancy.sizes, joined.sizes);
        // Who removes the host does not end what the machine costs.
        let mut change = Change::new();
        host_removed(world.state(), host, &mut change).await.unwrap();
        assert!(change.is_empty());
    }
}

#[tokio::test]
async fn given_up_while_nobody_knows_what_came_of_the_launch_it_leaves_nothing() {
    for (stuck, lag_ms) in [(Stuck::Before, 0), (Stuck::After, 0), (Stuck::After, 100), (Stuck::After, 900)] {
        let mut world = World::new().await;
        world.bazaar.lock().stuck = Some(stuck);
        world.bazaar.lock().lag = Duration::from_millis(lag_ms);
        let id = world.rent("h", "m").await;
        world.until("the launch is under way", || world.bazaar.lock().is_caught).await;
        world.kill().await;
        world.bazaar.lock().stuck = None;
        // The wish lies in the store before the controller starts again.
        world.start_idle().await;
        world.cancel(id).await;
        world.kill().await;
        world.start().await;
        let renting = world.reaches(id, RentingState::Ended).await;
        assert_eq!(renting.end, Some(RentingEnd::Returned), "{stuck:?}");
        assert_eq!(world.rent_phase(id).await, Phase::RolledBack);
        // One that listings told of only after the renting had ended is swept all the same.
        world.until("nothing costs money", || world.bazaar.costing().is_empty()).await;
        tokio::time::sleep(Duration::from_millis(1000)).await;
        assert!(world.bazaar.costing().is_empty(), "and nothing comes later");
        assert!(world.bazaar.lock().machines.len() <= 1);
    }
}

#[tokio::test]
async fn a_refusal_ends_the_order_and_trouble_does_not() {
    let world = World::new().await;
    let id = world.rent("bad", "no.such").await;
    let renting = world.reaches(id, RentingState::Ended).await;
    assert_eq!(renting.end, Some(RentingEnd::Refused));
    assert_eq!(renting.error.unwrap().code, supercloud_api::Code::BadRequest);
    assert_eq!(world.rent_phase(id).await, Phase::RolledBack);

    world.bazaar.lock().refusal = Some(ProviderError::NoCapacity { what: "none".into() });
    let id = world.rent("none", "m").await;
    assert_eq!(world.reaches(id, RentingState::Ended).await.end, Some(RentingEnd::Refused));

    world.bazaar.lock().refusal = Some(ProviderError::Throttled { what: "slower".into() });
    let id = world.rent("later", "m").await;
    world.reaches(id, RentingState::Launched).await;
    assert_eq!(world.bazaar.costing().len(), 1);
}

#[tokio::test]
async fn what_the_provider_takes_is_a_host_no_more() {
    let world = World::new().await;
    let id = world.rent("h", "m").await;
    world.reaches(id, RentingState::Launched).await;
    world.join(id).await;
    let host = world.reaches(id, RentingState::Up).await.host;
    world.bazaar.lock().machines[0].instance.state = supercloud_provider::InstanceState::Gone;
    let renting = world.reaches(id, RentingState::Ended).await;
    assert_eq!(renting.end, Some(RentingEnd::Taken));
    assert!(world.state().need::<HostRecord>(&host).await.unwrap().is_removed);
}

#[tokio::test]
async fn an_agent_that_never_joins_costs_no_longer_than_its_time() {
    let mut world = World::new().await;
    world.kill().await;
    world.limits.join_ms = 200;
    world.start().await;
    let id = world.rent("h", "m").await;
    assert_eq!(world.reaches(id, RentingState::Ended).await.end, Some(RentingEnd::NeverJoined));
    assert!(world.bazaar.costing().is_empty());
    assert_eq!(world.rent_phase(id).await, Phase::RolledBack);
}

#[tokio::test]
async fn machines_of_others_and_of_a_store_that_is_gone_are_left_alone() {
    let world = World::new().await;
    let order = supercloud_provider::LaunchOrder { owner: OWNER.into(), ..bazaar::order("rnt-of-nobody") };
    let other = bazaar::order("rnt-of-somebody-else");
    for order in [&order, &other] {
        supercloud_provider::Provider::launch(&world.bazaar, order).await.unwrap();
    }
    let id = world.rent("h", "m").await;
    world.reaches(id, RentingState::Launched).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(world.bazaar.costing().len(), 3);
    let (events, _) = world.state().events(0, 1000).await.unwrap();
    let told: Vec<_> = events.iter().filter(|event| event.kind == "renting.unknown").collect();
    assert_eq!(told.len(), 1, "told once: {told:?}");
    assert_eq!(told[0].data["instance"], "i-0");
}

#[tokio::test]
async fn killed_at_any_point_orders_and_machines_agree_in_the_end() {
    for seed in 0..12_u64 {
        let mut world = World::new().await;
        world.bazaar.lock().lag = Duration::from_millis(seed % 3 * 40);
        let mut ids = Vec::new();
        for n in 0..4 {
            ids.push(world.rent(&format!("h{n}"), "m").await);
            // Somewhere in the middle of whatever it does.
            tokio::time::sleep(Duration::from_micros(seed * 1700 + n * 900)).await;
            world.kill().await;
            world.start().await;
        }
        for id in &ids[..2] {
            world.cancel(*id).await;
            tokio::time::sleep(Duration::from_micros(seed * 1300)).await;
            world.kill().await;
            world.start().await;
        }
        for id in &ids[..2] {
            world.reaches(*id, RentingState::Ended).await;
        }
        for id in &ids[2..] {
            world.reaches(*id, RentingState::Launched).await;
        }
        world.until("only what is rented costs", || world.bazaar.costing().len() == 2).await;
        for id in &ids[2..] {
            let instance = world.renting(*id).await.instance.unwrap();
            assert!(world.bazaar.costing().iter().any(|one| one.instance.id == instance));
        }
        // The ledger knows of each machine, and of nothing else; what was given back costs no longer.
        for tenancy in world.state().list::<TenancyRecord>().await.unwrap() {
            let renting = world.renting(tenancy.renting.unwrap()).await;
            assert!(renting.launched_at_ms.is_some() && tenancy.host == renting.host);
            let is_over = tenancy.spans.iter().all(|span| span.to_ms.is_some());
            assert_eq!((tenancy.spans.len(), is_over), (1, renting.state == RentingState::Ended));
            assert_eq!(tenancy.market.as_ref().unwrap().name(), "c/m/spot");
        }
        for id in &ids[2..] {
            let host = world.renting(*id).await.host;
            assert!(world.state().read::<TenancyRecord>(&host).await.unwrap().is_some(), "{id} costs");
        }
    }
}
