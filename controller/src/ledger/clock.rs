//! The ledger's clock: the time of the price feed where one is replayed, else wall time. It never goes back.

use std::{
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use serde::{Deserialize, Serialize};
use supercloud_api::{LedgerClock, unix_ms};
use supercloud_scheduler::money::NanoUsd;

use crate::{markets::FeedMarkets, renting::Providers};

/// A time by one of the two clocks; times of different clocks do not compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// Which clock.
    pub clock: LedgerClock,
    /// Its time.
    pub at_ms: u64,
}

/// What everything that is written into the ledger is stamped and priced with. Cheap to clone; hangs on the state.
#[derive(Clone, Default)]
pub struct Book(Arc<Inner>);

#[derive(Default)]
struct Inner {
    feed: OnceLock<FeedMarkets>,
    providers: OnceLock<Providers>,
    newest_ms: Mutex<u64>,
}

impl fmt::Debug for Book {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Book").field("clock", &self.clock()).finish_non_exhaustive()
    }
}

impl Book {
    /// From now on time is the feed's. To be said before anything is written.
    pub fn follow(&self, feed: FeedMarkets) {
        let _first = self.0.feed.set(feed);
    }

    /// Who knows what leaving a cloud costs.
    pub fn ask(&self, providers: Providers) {
        let _first = self.0.providers.set(providers);
    }

    /// Time is never told to be before this.
    pub fn not_before(&self, at_ms: u64) {
        let mut newest = self.0.newest_ms.lock().unwrap_or_else(PoisonError::into_inner);
        *newest = (*newest).max(at_ms);
    }

    /// By which clock.
    #[must_use]
    pub fn clock(&self) -> LedgerClock {
        if self.0.feed.get().is_some() { LedgerClock::Feed } else { LedgerClock::Wall }
    }

    /// Now.
    #[must_use]
    pub fn now(&self) -> Stamp {
        let mut newest = self.0.newest_ms.lock().unwrap_or_else(PoisonError::into_inner);
        *newest = (*newest).max(self.0.feed.get().map_or_else(unix_ms, FeedMarkets::feed_now_ms));
        Stamp { clock: self.clock(), at_ms: *newest }
    }

    /// What a GiB costs that leaves a cloud of this provider for another cloud, if somebody knows.
    #[must_use]
    pub fn egress_per_gib(&self, provider: &str, to_cloud: &str) -> Option<NanoUsd> {
        self.0.providers.get()?.get(provider)?.provider.egress_price_per_gib(to_cloud)
    }
}
