//! Markets and prices as REST shows them. Who follows a price feed posts a [`PriceBoard`]; without one there are no markets.

use std::{fmt, sync::Arc};

use supercloud_api::{Code, FeedClock, Market, PriceSeries, Problem};
use tokio::sync::watch;

/// What is known of markets now.
pub trait PriceBoard: Send + Sync + 'static {
    /// All markets with their prices now, ordered by name.
    fn markets(&self) -> Vec<Market>;
    /// The prices of a market up to now, if there is such a market.
    fn prices(&self, market: &str) -> Option<PriceSeries>;
    /// Sets the clock of a replayed feed; the answer is the clock as it is now.
    ///
    /// # Errors
    /// When there is no replayed feed, or the clock is not acceptable.
    fn set_clock(&self, clock: FeedClock) -> Result<FeedClock, Problem>;
}

/// No markets.
struct Empty;

impl PriceBoard for Empty {
    fn markets(&self) -> Vec<Market> {
        Vec::new()
    }
    fn prices(&self, _market: &str) -> Option<PriceSeries> {
        None
    }
    fn set_clock(&self, _clock: FeedClock) -> Result<FeedClock, Problem> {
        Err(Problem::new(Code::NotFound, "no price feed is replayed here: see [feed] in the controller's settings"))
    }
}

/// Where the board hangs: starts empty, can be replaced at any time. Cheap to clone.
#[derive(Clone)]
pub struct Markets(watch::Sender<Arc<dyn PriceBoard>>);

impl fmt::Debug for Markets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Markets(..)")
    }
}

impl Default for Markets {
    fn default() -> Self {
        Self(watch::Sender::new(Arc::new(Empty)))
    }
}

impl Markets {
    /// Hangs up a board.
    pub fn post(&self, board: Arc<dyn PriceBoard>) {
        self.0.send_replace(board);
    }

    /// The board.
    #[must_use]
    pub fn board(&self) -> Arc<dyn PriceBoard> {
        Arc::clone(&self.0.borrow())
    }
}
