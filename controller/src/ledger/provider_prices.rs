//! Prices of what is rented, as the providers tell them: the board of markets where no price feed is replayed.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use supercloud_api::{Cloud, Code, FeedClock, Market, PricePoint, PriceSeries, Problem, Tenure, unix_ms};
use supercloud_provider::{PriceQuery, ProviderError};
use tracing::warn;

use super::{MarketName, TenancyRecord};
use crate::{
    chain,
    price_board::PriceBoard,
    renting::Providers,
    state::{State, StateError},
};

/// How often it is looked whether something new is rented.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How often a provider is asked for a price again.
const ASK_EVERY_MS: u64 = 60_000;
/// Until so long after its end, what a host cost at last is still asked for.
const AFTER_MS: u64 = 600_000;
/// Prices that are remembered of one market, the newest; the ledger keeps all.
const POINTS_AT_MOST: usize = 10_000;

/// What is known of one market.
#[derive(Debug, Clone)]
struct Known {
    cloud: Cloud,
    market: MarketName,
    points: Vec<PricePoint>,
    /// When the provider told this, or that nothing has changed since.
    told_at_ms: u64,
    /// When it was asked last, whatever came of it.
    asked_at_ms: u64,
}

/// The board. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ProviderPrices {
    state: State,
    providers: Providers,
    /// Settings, and so the prices in them, hold from here on.
    began_ms: u64,
    known: Arc<Mutex<BTreeMap<String, Known>>>,
}

/// The points with a price that holds from then on, if it is another one.
fn with_price(mut points: Vec<PricePoint>, feed_time_ms: u64, price_nanousd_per_hour: u64) -> Vec<PricePoint> {
    if points.last().is_none_or(|last| last.price_nanousd_per_hour != price_nanousd_per_hour) {
        points.push(PricePoint { feed_time_ms, price_nanousd_per_hour });
    }
    points
}

impl ProviderPrices {
    /// A board on which nothing hangs yet.
    #[must_use]
    pub fn new(state: State, providers: Providers) -> Self {
        Self { state, providers, began_ms: unix_ms(), known: Arc::default() }
    }

    /// Asks for ever.
    pub async fn run(self) {
        loop {
            if let Err(error) = self.pass().await {
                warn!("what is rented cannot be read now: {}", chain(&error));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn pass(&self) -> Result<(), StateError> {
        let now_ms = unix_ms();
        let mut wanted: BTreeMap<String, (Cloud, MarketName, u64)> = BTreeMap::new();
        for tenancy in self.state.list::<TenancyRecord>().await? {
            let (Some(_), Some(market)) = (tenancy.renting, &tenancy.market) else { continue };
            let Some(span) = tenancy.spans.last() else { continue };
            if span.to_ms.is_some_and(|to_ms| to_ms.saturating_add(AFTER_MS) < now_ms) {
                continue;
            }
            let Some(cloud) = self.state.read::<Cloud>(&tenancy.cloud).await? else { continue };
            for market in [market.clone(), market.on_demand()] {
                let entry = wanted.entry(market.name());
                let entry = entry.or_insert_with(|| (cloud.value.clone(), market, span.since.at_ms));
                entry.2 = entry.2.min(span.since.at_ms);
            }
        }
        self.lock().retain(|name, _| wanted.contains_key(name));
        for (name, (cloud, market, from_ms)) in wanted {
            let before = self.lock().get(&name).cloned();
            let mut known = before.unwrap_or(Known { cloud, market, points: vec![], told_at_ms: 0, asked_at_ms: 0 });
            if known.asked_at_ms.saturating_add(ASK_EVERY_MS) > now_ms && known.asked_at_ms <= now_ms {
                continue;
            }
            known.asked_at_ms = now_ms;
            match self.ask(&known, from_ms, now_ms).await {
                Ok(Some(points)) => {
                    known.points = points;
                    known.points.drain(..known.points.len().saturating_sub(POINTS_AT_MOST));
                    known.told_at_ms = now_ms;
                }
                Ok(None) => {}
                Err(error) => warn!(market = name, "its price is not told now: {error}"),
            }
            self.lock().insert(name, known);
        }
        Ok(())
    }

    /// The points of a market as the provider tells them; none when it does not.
    async fn ask(&self, known: &Known, from_ms: u64, now_ms: u64) -> Result<Option<Vec<PricePoint>>, ProviderError> {
        let Some(configured) = self.providers.get(&known.cloud.provider) else { return Ok(None) };
        let (provider, instance_type) = (&configured.provider, &known.market.instance_type);
        if known.market.tenure == Tenure::OnDemand {
            let Some(price) = provider.on_demand_price(instance_type).await? else { return Ok(None) };
            let since_ms = if known.points.is_empty() { self.began_ms } else { now_ms };
            return Ok(Some(with_price(known.points.clone(), since_ms, price.0)));
        }
        let last_ms = known.points.last().map(|point| point.feed_time_ms);
        let query = PriceQuery {
            instance_types: vec![instance_type.clone()],
            from_ms: last_ms.unwrap_or(from_ms),
            to_ms: now_ms,
        };
        let series = provider.spot_prices(&query).await?;
        // In a region with several zones nobody says in which of them the host stands: then none is taken for the right one.
        let [one] = series.as_slice() else { return Ok(None) };
        let mut points = known.points.clone();
        for point in one.points.iter().filter(|point| last_ms.is_none_or(|last_ms| point.at_ms > last_ms)) {
            points = with_price(points, point.at_ms, point.per_hour.0);
        }
        Ok(Some(points))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PriceBoard for ProviderPrices {
    fn markets(&self) -> Vec<Market> {
        let known = self.lock();
        let last = |name: &str| known.get(name).and_then(|known| known.points.last().copied());
        let market = |(name, one): (&String, &Known)| {
            let newest = last(name)?;
            Some(Market {
                name: name.clone(),
                cloud: one.cloud.id,
                cloud_name: one.cloud.name.clone(),
                instance_type: one.market.instance_type.clone(),
                tenure: one.market.tenure,
                price_nanousd_per_hour: newest.price_nanousd_per_hour,
                on_demand_nanousd_per_hour: last(&one.market.on_demand().name())
                    .map(|point| point.price_nanousd_per_hour),
                feed_time_ms: newest.feed_time_ms,
                feed_now_ms: one.told_at_ms,
                seen: None,
            })
        };
        known.iter().filter_map(market).collect()
    }

    fn prices(&self, market: &str) -> Option<PriceSeries> {
        let known = self.lock();
        let found = known.get(market).filter(|known| !known.points.is_empty())?;
        Some(PriceSeries { market: market.to_owned(), feed_now_ms: found.told_at_ms, points: found.points.clone() })
    }

    fn set_clock(&self, _clock: FeedClock) -> Result<FeedClock, Problem> {
        Err(Problem::new(Code::NotFound, "no price feed is replayed here: see [feed] in the controller's settings"))
    }
}
