//! The clerk: looks prices up and keeps them, and puts the ledger in order at the start.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use supercloud_api::{LedgerClock, Market, PricePoint, Tenure, unix_ms};
use supercloud_scheduler::money::NanoUsd;
use tokio::{sync::Mutex, time::Instant};
use tracing::{info, warn};

use super::{
    ClockRecord, MarketName, MarketRecord, PriceRecord, Stamp, TenancyRecord, TenancySpan, facts, record::market_id,
};
use crate::{
    app::FeedConfig,
    chain,
    markets::FeedMarkets,
    price_board::Markets,
    state::{Change, Context, GuestRecord, HostRecord, State, StateError, retry_conflicts},
};

/// How often prices are looked up when nobody asks.
const PASS_EVERY: Duration = Duration::from_secs(60);
/// Who asks again so soon is told the same time.
const RECENT: Duration = Duration::from_secs(1);
/// Prices that are written in one transaction, which takes a hundred steps at most.
const PRICES_AT_ONCE: usize = 50;

/// Looks prices up. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Clerk {
    state: State,
    board: Markets,
    /// The tenure in which hosts count as rented that joined by themselves, where a feed is replayed.
    own_hosts: Tenure,
    /// One pass at a time; when the last one was, and what it answered.
    turn: Arc<Mutex<Option<(Instant, Stamp)>>>,
}

impl Clerk {
    /// A clerk who reads this board.
    #[must_use]
    pub fn new(state: State, board: Markets, own_hosts: Tenure) -> Self {
        Self { state, board, own_hosts, turn: Arc::default() }
    }

    /// Passes for ever; the first time, after a while.
    pub async fn run(self) {
        loop {
            tokio::time::sleep(PASS_EVERY).await;
            if let Err(error) = self.pass().await {
                warn!("prices cannot be kept now: {}", chain(&error));
            }
        }
    }

    /// Keeps the prices of all markets in which hosts are rented, up to now. The answer is that time.
    ///
    /// # Errors
    /// When the store does not answer; what was kept stays kept.
    pub async fn pass(&self) -> Result<Stamp, StateError> {
        let mut last = self.turn.lock().await;
        let now = self.keep_all().await?;
        *last = Some((Instant::now(), now));
        Ok(now)
    }

    /// As [`Clerk::pass`], unless one has just been.
    ///
    /// # Errors
    /// As that.
    pub async fn recent(&self) -> Result<Stamp, StateError> {
        let mut last = self.turn.lock().await;
        if let Some((at, stamp)) = *last
            && at.elapsed() < RECENT
        {
            return Ok(stamp);
        }
        let now = self.keep_all().await?;
        *last = Some((Instant::now(), now));
        Ok(now)
    }

    async fn keep_all(&self) -> Result<Stamp, StateError> {
        // Before the tenancies: one that ends meanwhile is then looked at in the next pass, too.
        let now = self.state.book().now();
        self.name_markets().await?;
        // Each market with the earliest time for which its price is wanted, and the latest.
        let mut wanted: BTreeMap<String, (u64, u64)> = BTreeMap::new();
        let tenancies = self.state.list::<TenancyRecord>().await?;
        if tenancies.is_empty() {
            // Nothing has ever cost anything: nothing to keep the time of.
            return Ok(now);
        }
        for tenancy in tenancies {
            let Some(market) = tenancy.market_by(now.clock) else { continue };
            for span in tenancy.spans.iter().filter(|span| span.since.clock == now.clock) {
                for name in [market.name(), market.on_demand().name()] {
                    let until = span.to_ms.unwrap_or(u64::MAX);
                    let entry = wanted.entry(name).or_insert((span.since.at_ms, until));
                    *entry = (entry.0.min(span.since.at_ms), entry.1.max(until));
                }
            }
        }
        for (market, (from_ms, until_ms)) in wanted {
            self.keep(&market, from_ms, until_ms, now).await?;
        }
        retry_conflicts(|| async {
            let record = ClockRecord { at: now, wall_ms: unix_ms() };
            let mut change = Change::new();
            match self.state.read::<ClockRecord>(&"now").await? {
                Some(before) => change.update(&before, &record),
                None => change.create(&record),
            };
            self.state.commit(&Context::system(), change).await
        })
        .await?;
        Ok(now)
    }

    /// Where a feed is replayed, a host that joined by itself counts as rented in its cloud's first market of the tenure that the
    /// settings say. Where real money is counted nobody knows what it costs.
    async fn name_markets(&self) -> Result<(), StateError> {
        if self.state.book().clock() != LedgerClock::Feed {
            return Ok(());
        }
        let board = self.board.board();
        let mut markets: Option<Vec<Market>> = None;
        for tenancy in self.state.list::<TenancyRecord>().await? {
            let is_open = tenancy.spans.iter().any(|span| span.to_ms.is_none());
            if tenancy.market.is_some() || tenancy.renting.is_some() || !is_open {
                continue;
            }
            let markets = markets.get_or_insert_with(|| board.markets());
            let here = |market: &&Market| market.cloud == tenancy.cloud && market.tenure == self.own_hosts;
            let Some(first) = markets.iter().filter(here).min_by(|a, b| a.name.cmp(&b.name)) else { continue };
            let market = MarketName {
                cloud: first.cloud_name.clone(),
                instance_type: first.instance_type.clone(),
                tenure: first.tenure,
            };
            let mut change = Change::new();
            change.update(&tenancy, &TenancyRecord { market: Some(market), ..tenancy.value.clone() });
            match self.state.commit(&Context::system(), change).await {
                Ok(_) => {}
                // It has changed meanwhile: the next pass names it.
                Err(error) if error.is_conflict() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Keeps the prices of a market that came since the last pass, oldest first, each some of them with how far they reach.
    async fn keep(&self, market: &str, from_ms: u64, until_ms: u64, now: Stamp) -> Result<(), StateError> {
        let mut before = self.state.read::<MarketRecord>(&market_id(market, now.clock)).await?;
        if before.as_ref().is_some_and(|record| record.known_until_ms >= until_ms.min(now.at_ms)) {
            return Ok(());
        }
        // A market that the board does not tell of is not known any further.
        let Some(series) = self.board.board().prices(market) else { return Ok(()) };
        // A provider that does not answer now has told only how it was when it did.
        let told_until_ms = series.feed_now_ms.min(now.at_ms);
        let mut points: Vec<PricePoint> = series.points;
        points.retain(|point| point.feed_time_ms <= now.at_ms);
        match &before {
            Some(record) => points.retain(|point| point.feed_time_ms > record.last_at_ms),
            // What holds at the beginning began before it.
            None => {
                let first = points.partition_point(|point| point.feed_time_ms <= from_ms).saturating_sub(1);
                points.drain(..first);
            }
        }
        let mut rest = points.as_slice();
        loop {
            let (some, after) = rest.split_at(rest.len().min(PRICES_AT_ONCE));
            rest = after;
            let newest = some.last().map(|point| (point.feed_time_ms, NanoUsd(point.price_nanousd_per_hour)));
            let Some((last_at_ms, last)) = newest.or(before.as_ref().map(|record| (record.last_at_ms, record.last)))
            else {
                return Ok(());
            };
            let known_until_ms = rest.first().map_or(told_until_ms, |point| point.feed_time_ms);
            if some.is_empty() && before.as_ref().is_some_and(|record| record.known_until_ms >= known_until_ms) {
                return Ok(());
            }
            let record = MarketRecord { market: market.to_owned(), clock: now.clock, last_at_ms, last, known_until_ms };
            let mut change = Change::new();
            for point in some {
                change.create(&PriceRecord {
                    market: market.to_owned(),
                    at: Stamp { clock: now.clock, at_ms: point.feed_time_ms },
                    per_hour: NanoUsd(point.price_nanousd_per_hour),
                });
            }
            match &before {
                Some(before) => change.update(before, &record),
                None => change.create(&record),
            };
            self.state.commit(&Context::system(), change).await?;
            if rest.is_empty() {
                return Ok(());
            }
            before = self.state.read::<MarketRecord>(&market_id(market, now.clock)).await?;
        }
    }
}

/// Puts the ledger in order before anything else is written: the clock goes on, what is open by another one is cut, and what
/// has no entry yet (a store of an older version) gets one.
///
/// # Errors
/// When the store does not answer.
pub async fn start(state: &State, feed: Option<(&FeedMarkets, &FeedConfig)>) -> Result<(), StateError> {
    let clock = if feed.is_some() { LedgerClock::Feed } else { LedgerClock::Wall };
    let last = state.read::<ClockRecord>(&"now").await?.map(|record| record.value);
    let guests = state.list::<GuestRecord>().await?;
    let tenancies = state.list::<TenancyRecord>().await?;
    // Nothing that was written is in the future.
    let stays = guests.iter().flat_map(|guest| guest.stays.iter().map(|stay| stay.since));
    let spans = tenancies.iter().flat_map(|tenancy| tenancy.spans.iter().flat_map(stamps));
    let stamps = stays.chain(spans).chain(last.map(|last| last.at));
    let newest_ms = stamps.filter(|stamp| stamp.clock == clock).map(|stamp| stamp.at_ms).max().unwrap_or(0);
    if let Some((markets, config)) = feed {
        let passed_ms = last.filter(|last| last.at.clock == clock).map_or(0, |last| {
            let away_ms = unix_ms().saturating_sub(last.wall_ms);
            last.at.at_ms.saturating_add((away_ms as f64 * config.speed) as u64)
        });
        let resumed_ms = passed_ms.max(newest_ms);
        if resumed_ms > config.start_ms {
            info!(feed_ms = resumed_ms, "the feed goes on from where it was");
            // It only goes forward, and the speed stays as it is: nothing can be wrong with that.
            let _cannot_be_refused = markets.set_clock(Some(resumed_ms), None);
        }
        state.book().follow(markets.clone());
    }
    state.book().not_before(newest_ms);
    let now = state.book().now();
    // What another clock has opened ends at the last time that was seen by it.
    let end_of = |since: Stamp| last.map(|last| last.at).filter(|at| at.clock == since.clock).unwrap_or(since);
    for guest in &guests {
        retry_conflicts(|| async {
            let Some(before) = state.read::<GuestRecord>(&guest.guest.id).await? else { return Ok(()) };
            let mut record = before.value.clone();
            let mut change = Change::new();
            if let Some(old) = record.stays.iter().map(|stay| stay.since).find(|since| since.clock != clock) {
                facts::cut_stays(&mut record, end_of(old), now, &mut change);
            }
            facts::keep_stays(&mut record, now, &mut change);
            if record == before.value {
                return Ok(());
            }
            change.update(&before, &record);
            state.commit(&Context::system(), change).await.map(drop)
        })
        .await?;
    }
    for tenancy in tenancies {
        let Some(old) = open_by_another(&tenancy, clock) else { continue };
        let mut record = tenancy.value.clone();
        facts::end_spans(&mut record, end_of(old));
        record.spans.push(TenancySpan { since: now, to_ms: None });
        if let Some(size) = record.sizes.last().copied() {
            record.sizes.push(super::SizeFrom { since: now, ..size });
        }
        let mut change = Change::new();
        change.update(&tenancy, &record);
        state.commit(&Context::system(), change).await?;
    }
    for host in state.list::<HostRecord>().await?.iter().filter(|host| !host.is_removed) {
        if state.read::<TenancyRecord>(&host.host.id).await?.is_none() {
            let mut change = Change::new();
            facts::keep_host(state, &host.host, &mut change).await?;
            state.commit(&Context::system(), change).await?;
        }
    }
    Ok(())
}

fn stamps(span: &TenancySpan) -> impl Iterator<Item = Stamp> + use<> {
    let clock = span.since.clock;
    [Some(span.since.at_ms), span.to_ms].into_iter().flatten().map(move |at_ms| Stamp { clock, at_ms })
}

fn open_by_another(tenancy: &TenancyRecord, clock: LedgerClock) -> Option<Stamp> {
    let open = tenancy.spans.iter().filter(|span| span.to_ms.is_none());
    open.map(|span| span.since).find(|since| since.clock != clock)
}
