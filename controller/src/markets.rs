//! The markets that REST shows: a price feed replayed on a clock of its own.
//!
//! The feed's clock starts at `start_ms` and runs `speed` feed milliseconds per millisecond; it can be set, which the lab
//! uses to skip the spans in which nothing happens. Prices after the clock's time are never shown.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use supercloud_api::{Cloud, Code, FeedClock, Market, Name, PricePoint, PriceSeries, Problem, Tenure};
use supercloud_feed::{Feed, FeedError, MarketKey};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{
    app::FeedConfig,
    chain,
    price_board::PriceBoard,
    state::{Seen, State},
};

/// Why a feed cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MarketsError {
    /// Its file cannot be read.
    #[error("cannot read the price feed {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Its text is wrong.
    #[error("the price feed {path} is not acceptable")]
    Parse {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: FeedError,
    },
    /// The speed is none.
    #[error("feed speed {0} is not acceptable; use 0 to 1000000")]
    Speed(f64),
}

/// The feed's clock.
#[derive(Debug, Clone, Copy)]
struct Clock {
    at_ms: u64,
    since: Instant,
    speed: f64,
}

impl Clock {
    fn now_ms(&self) -> u64 {
        self.at_ms.saturating_add((self.since.elapsed().as_secs_f64() * 1000.0 * self.speed) as u64)
    }
}

/// The markets. Cheap to clone.
#[derive(Debug, Clone)]
pub struct FeedMarkets(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    feed: Feed,
    clock: Mutex<Clock>,
    clouds: Mutex<Vec<Cloud>>,
}

fn check_speed(speed: f64) -> Result<f64, MarketsError> {
    if (0.0..=1e6).contains(&speed) { Ok(speed) } else { Err(MarketsError::Speed(speed)) }
}

impl FeedMarkets {
    fn new(feed: Feed, at_ms: u64, speed: f64) -> Self {
        Self(Arc::new(Inner {
            feed,
            clock: Mutex::new(Clock { at_ms, since: Instant::now(), speed }),
            clouds: Mutex::default(),
        }))
    }

    /// The markets of a configured feed. Reads the file: call it where blocking is allowed.
    ///
    /// # Errors
    /// When the feed cannot be used.
    pub fn open(config: &FeedConfig) -> Result<Self, MarketsError> {
        let path = config.file.clone();
        let text =
            std::fs::read_to_string(&path).map_err(|source| MarketsError::Read { path: path.clone(), source })?;
        let feed = Feed::parse(&text).map_err(|source| MarketsError::Parse { path, source })?;
        Ok(Self::new(feed, config.start_ms, check_speed(config.speed)?))
    }

    /// The feed's time now.
    #[must_use]
    pub fn feed_now_ms(&self) -> u64 {
        self.0.clock.lock().unwrap_or_else(PoisonError::into_inner).now_ms()
    }

    /// How fast the feed's clock runs.
    #[must_use]
    pub fn speed(&self) -> f64 {
        self.0.clock.lock().unwrap_or_else(PoisonError::into_inner).speed
    }

    /// Sets the clock; it never goes back (a price once shown stays shown).
    ///
    /// # Errors
    /// When the speed is none.
    pub fn set_clock(&self, feed_now_ms: Option<u64>, speed: Option<f64>) -> Result<(), MarketsError> {
        let speed = speed.map(check_speed).transpose()?;
        let mut clock = self.0.clock.lock().unwrap_or_else(PoisonError::into_inner);
        let now_ms = clock.now_ms();
        *clock = Clock {
            at_ms: feed_now_ms.unwrap_or(now_ms).max(now_ms),
            since: Instant::now(),
            speed: speed.unwrap_or(clock.speed),
        };
        Ok(())
    }

    /// Keeps the list of known clouds, until cancelled.
    pub async fn follow_clouds(&self, state: &State, cancel: &CancellationToken) {
        let mut follower = state.follow::<Cloud>();
        loop {
            let seen = tokio::select! {
                seen = follower.next() => seen,
                () = cancel.cancelled() => return,
            };
            let mut clouds = self.0.clouds.lock().unwrap_or_else(PoisonError::into_inner);
            match seen {
                Ok(Seen::Restart) => clouds.clear(),
                Ok(Seen::Put(cloud)) => {
                    clouds.retain(|known| known.id != cloud.id);
                    clouds.push(cloud.value);
                }
                Ok(Seen::Gone(id)) => clouds.retain(|known| known.id.to_string() != id),
                Ok(Seen::CaughtUp) => {}
                Err(error) => warn!("a cloud's record cannot be read: {}", chain(&error)),
            }
        }
    }

    /// All markets of known clouds with their prices now; those without a price yet are left out.
    #[must_use]
    pub fn list(&self, clouds: &[Cloud]) -> Vec<Market> {
        let now_ms = self.feed_now_ms();
        let feed = &self.0.feed;
        feed.markets()
            .filter_map(|(key, _)| {
                let cloud = clouds.iter().find(|cloud| cloud.name.as_str() == key.cloud)?;
                let step = feed.price_at(key, now_ms)?;
                let on_demand = MarketKey { tenure: "on_demand".into(), ..key.clone() };
                Some(Market {
                    name: key.name(),
                    cloud: cloud.id,
                    cloud_name: Name::clone(&cloud.name),
                    instance_type: key.instance_type.clone(),
                    tenure: if key.tenure == "spot" { Tenure::Spot } else { Tenure::OnDemand },
                    price_nanousd_per_hour: step.price.0,
                    on_demand_nanousd_per_hour: feed.price_at(&on_demand, now_ms).map(|step| step.price.0),
                    feed_time_ms: step.at_ms,
                    feed_now_ms: now_ms,
                    seen: None,
                })
            })
            .collect()
    }

    /// The prices of a market up to now, the newest 10,000 steps at most.
    #[must_use]
    pub fn series(&self, market: &str) -> Option<PriceSeries> {
        const MOST: usize = 10_000;
        let feed_now_ms = self.feed_now_ms();
        let (_, steps) = self.0.feed.markets().find(|(key, _)| key.name() == market)?;
        let shown = &steps[..steps.partition_point(|step| step.at_ms <= feed_now_ms)];
        let points = shown[shown.len().saturating_sub(MOST)..]
            .iter()
            .map(|step| PricePoint { feed_time_ms: step.at_ms, price_nanousd_per_hour: step.price.0 })
            .collect();
        Some(PriceSeries { market: market.to_owned(), feed_now_ms, points })
    }
}

impl PriceBoard for FeedMarkets {
    fn markets(&self) -> Vec<Market> {
        let clouds = self.0.clouds.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.list(&clouds)
    }

    fn prices(&self, market: &str) -> Option<PriceSeries> {
        self.series(market)
    }

    fn set_clock(&self, clock: FeedClock) -> Result<FeedClock, Problem> {
        Self::set_clock(self, clock.feed_now_ms, clock.speed)
            .map_err(|error| Problem::new(Code::BadRequest, error.to_string()))?;
        Ok(FeedClock { feed_now_ms: Some(self.feed_now_ms()), speed: Some(self.speed()) })
    }
}

#[cfg(test)]
mod tests {
    use supercloud_api::ids::CloudId;

    use super::*;

    fn markets() -> FeedMarkets {
        let text = "# supercloud-feed 1\nfeed_ms,cloud,instance_type,tenure,usd_per_hour\n\
            0,home,m,on_demand,0.1\n0,home,m,spot,0.03\n0,mars,m,spot,0.01\n60000,home,m,spot,0.05\n";
        FeedMarkets::new(Feed::parse(text).unwrap(), 0, 0.0)
    }

    #[test]
    fn prices_after_now_are_not_shown_and_the_clock_never_goes_back() {
        let markets = markets();
        let home =
            Cloud { id: CloudId::generate(), name: "home".parse().unwrap(), provider: "lab".into(), created_at_ms: 0 };
        let spot = |markets: &FeedMarkets| {
            let all = markets.list(std::slice::from_ref(&home));
            assert_eq!(all.len(), 2, "clouds that are not known have no markets here");
            all.into_iter().find(|market| market.tenure == Tenure::Spot).unwrap()
        };
        assert_eq!(spot(&markets).price_nanousd_per_hour, 30_000_000);
        assert_eq!(markets.series("home/m/spot").unwrap().points.len(), 1);
        markets.set_clock(Some(60_000), None).unwrap();
        assert_eq!(spot(&markets).price_nanousd_per_hour, 50_000_000);
        markets.set_clock(Some(5), None).unwrap();
        assert_eq!(markets.feed_now_ms(), 60_000);
        markets.set_clock(Some(u64::MAX), Some(1000.0)).unwrap();
        assert_eq!(markets.feed_now_ms(), u64::MAX);
        assert!(markets.set_clock(None, Some(-1.0)).is_err() && markets.set_clock(None, Some(f64::NAN)).is_err());
        assert!(markets.series("nowhere").is_none());
    }
}
