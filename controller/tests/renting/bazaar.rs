//! A provider for these tests: it keeps machines by token, tells of them late if so wished, and can be caught in the middle of a
//! launch.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use supercloud_api::Tenure;
use supercloud_provider::{
    Abilities, Call, FaultDomains, Instance, InstanceState, InstanceType, LaunchOrder, Nesting, Notice, PriceQuery,
    Provider, ProviderError, Series,
};
use supercloud_scheduler::money::NanoUsd;

/// Where a launch gets stuck.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stuck {
    /// Before anything happened.
    Before,
    /// When the machine exists, and nobody was told.
    After,
}

#[derive(Debug, Clone)]
pub struct Standing {
    pub instance: Instance,
    pub owner: String,
    pub user_data: String,
    listed_from: Instant,
}

#[derive(Debug, Default)]
pub struct Inner {
    pub machines: Vec<Standing>,
    pub stuck: Option<Stuck>,
    /// A launch is stuck now.
    pub is_caught: bool,
    /// What the next launch is answered.
    pub refusal: Option<ProviderError>,
    /// Listings tell of a machine so long after its launch.
    pub lag: Duration,
    pub launches: u32,
}

#[derive(Debug, Clone, Default)]
pub struct Bazaar(pub Arc<Mutex<Inner>>);

impl Bazaar {
    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    /// Machines that cost money now.
    pub fn costing(&self) -> Vec<Standing> {
        self.lock().machines.iter().filter(|one| one.instance.state.may_cost()).cloned().collect()
    }

    fn launch_now(&self, order: &LaunchOrder) -> Result<Instance, ProviderError> {
        let mut inner = self.lock();
        inner.launches += 1;
        if order.instance_type != "m" {
            return Err(ProviderError::BadOrder { what: "no such type".into() });
        }
        if let Some(refusal) = inner.refusal.take() {
            return Err(refusal);
        }
        if let Some(known) = inner.machines.iter().find(|one| one.instance.token == order.token) {
            assert_eq!(known.user_data, order.user_data, "a repeated order is the same order");
            return Ok(known.instance.clone());
        }
        let instance = Instance {
            id: format!("i-{}", inner.machines.len()),
            token: order.token.clone(),
            state: InstanceState::Running,
            instance_type: order.instance_type.clone(),
            tenure: order.tenure,
            address: None,
            launched_at_ms: None,
            domains: FaultDomains { provider: "bazaar".into(), ..FaultDomains::default() },
        };
        let listed_from = Instant::now() + inner.lag;
        let (owner, user_data) = (order.owner.clone(), order.user_data.clone());
        inner.machines.push(Standing { instance: instance.clone(), owner, user_data, listed_from });
        Ok(instance)
    }
}

impl Provider for Bazaar {
    fn abilities(&self) -> Abilities {
        Abilities { launches: true, spot: true }
    }

    fn catalogue(&self) -> Call<'_, Vec<InstanceType>> {
        let one = InstanceType {
            name: "m".into(),
            vcpus: 2,
            memory_bytes: 4 << 30,
            cpu: None,
            nesting: Nesting::Always,
            spot: true,
        };
        Box::pin(async { Ok(vec![one]) })
    }

    fn spot_prices<'a>(&'a self, _query: &'a PriceQuery) -> Call<'a, Vec<Series>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    fn on_demand_price<'a>(&'a self, _instance_type: &'a str) -> Call<'a, Option<NanoUsd>> {
        Box::pin(async { Ok(None) })
    }

    fn egress_price_per_gib(&self, _to: &str) -> Option<NanoUsd> {
        None
    }

    fn launch<'a>(&'a self, order: &'a LaunchOrder) -> Call<'a, Instance> {
        Box::pin(async {
            tokio::task::yield_now().await;
            let stuck = self.lock().stuck;
            if stuck == Some(Stuck::Before) {
                self.lock().is_caught = true;
                std::future::pending::<()>().await;
            }
            let answer = self.launch_now(order);
            if stuck == Some(Stuck::After) {
                self.lock().is_caught = true;
                std::future::pending::<()>().await;
            }
            tokio::task::yield_now().await;
            answer
        })
    }

    fn terminate<'a>(&'a self, instance: &'a str) -> Call<'a, ()> {
        Box::pin(async move {
            tokio::task::yield_now().await;
            for one in self.lock().machines.iter_mut().filter(|one| one.instance.id == instance) {
                one.instance.state = InstanceState::Gone;
            }
            Ok(())
        })
    }

    fn instances<'a>(&'a self, owner: &'a str) -> Call<'a, Vec<Instance>> {
        Box::pin(async move {
            tokio::task::yield_now().await;
            let inner = self.lock();
            let told = inner.machines.iter().filter(|one| one.owner == owner && one.listed_from <= Instant::now());
            Ok(told.map(|one| one.instance.clone()).collect())
        })
    }

    fn notices<'a>(&'a self, _owner: &'a str) -> Call<'a, Vec<Notice>> {
        Box::pin(async { Ok(Vec::new()) })
    }
}

/// An order of a test.
pub fn order(token: &str) -> LaunchOrder {
    LaunchOrder {
        token: token.into(),
        owner: "me".into(),
        name: "h".into(),
        instance_type: "m".into(),
        tenure: Tenure::Spot,
        max_price: None,
        user_data: "x".into(),
        taken: Vec::new(),
    }
}
