//! The ledger as it is told: facts and prices become lines.

use std::collections::{BTreeMap, HashMap, btree_map::Entry};

use supercloud_api::{
    LedgerClock, LedgerKind, LedgerLine, LedgerTotals, Name,
    ids::{CloudId, GuestId, HostId, ProjectId},
};
use supercloud_scheduler::{
    ledger::{self, Account, HOUR_MS, Prices, Room, Span, Step, Use},
    money::NanoUsd,
};
use supercloud_store::Key;

use super::{
    EgressRecord, MarketRecord, OpenStay, PriceRecord, Role, StayRecord, TenancyRecord, TenancySpan,
    record::{market_id, stay_id_at},
};
use crate::state::{GuestRecord, Record as _, State, StateError, decode, keys};

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// By which clock.
    pub clock: LedgerClock,
    /// From when until when.
    pub window: Span,
    /// Only the lines of this project's guests; all lines, and what is idle, when absent.
    pub project: Option<ProjectId>,
    /// Only of this guest.
    pub guest: Option<GuestId>,
    /// Only of this host.
    pub host: Option<HostId>,
    /// Only of hosts in this cloud.
    pub cloud: Option<CloudId>,
}

impl Asked {
    fn is_asked_for(&self, project: ProjectId, guest: GuestId) -> bool {
        self.project.is_none_or(|wanted| wanted == project) && self.guest.is_none_or(|wanted| wanted == guest)
    }

    fn is_place_asked_for(&self, host: HostId, cloud: CloudId) -> bool {
        self.host.is_none_or(|wanted| wanted == host) && self.cloud.is_none_or(|wanted| wanted == cloud)
    }

    /// Whoever sees one project or guest does not see what others leave idle.
    const fn sees_idle(&self) -> bool {
        self.project.is_none() && self.guest.is_none()
    }
}

/// Lines with their sums.
#[derive(Debug, Clone, PartialEq)]
pub struct Statement {
    /// The lines, by host, then by time.
    pub lines: Vec<LedgerLine>,
    /// Their sums.
    pub totals: LedgerTotals,
}

/// Somebody's stay on a host, open or over.
struct Stay {
    guest: GuestId,
    guest_name: Name,
    project: ProjectId,
    stay: OpenStay,
    to_ms: u64,
}

/// All facts of one host.
struct HostFacts {
    tenancy: TenancyRecord,
    stays: Vec<Stay>,
}

/// The lines that are asked for. Everything open is told as if it ended with the window.
///
/// # Errors
/// When the store does not answer or a record is damaged.
pub async fn statement(state: &State, asked: Asked) -> Result<Statement, StateError> {
    let mut open: HashMap<HostId, Vec<Stay>> = HashMap::new();
    for record in state.list::<GuestRecord>().await? {
        for stay in &record.stays {
            open.entry(stay.host).or_default().push(Stay {
                guest: record.guest.id,
                guest_name: record.guest.name.clone(),
                project: record.guest.project,
                stay: stay.clone(),
                to_ms: u64::MAX,
            });
        }
    }
    let mut hosts = Vec::new();
    for tenancy in state.list::<TenancyRecord>().await? {
        let is_then = |span: &TenancySpan| span.since.clock == asked.clock && span_of(span).and(asked.window).ms() > 0;
        if !asked.is_place_asked_for(tenancy.host, tenancy.cloud) || !tenancy.spans.iter().any(is_then) {
            continue;
        }
        let mut stays = over(state, tenancy.host, asked.window.from_ms).await?;
        stays.extend(open.remove(&tenancy.host).unwrap_or_default());
        stays.retain(|stay| stay.stay.since.clock == asked.clock);
        // The order in which shares are rounded, and lines are told: always the same one.
        stays.sort_by_key(|stay| (stay.guest, stay.stay.since.at_ms, stay.stay.role));
        hosts.push(HostFacts { tenancy: tenancy.value, stays });
    }
    let mut markets: BTreeMap<String, Prices> = BTreeMap::new();
    for market in hosts.iter().filter_map(|host| host.tenancy.market_by(asked.clock)) {
        for name in [market.name(), market.on_demand().name()] {
            if let Entry::Vacant(place) = markets.entry(name) {
                let found = prices(state, place.key(), asked.clock).await?;
                place.insert(found);
            }
        }
    }
    let egress = egress(state, &asked).await?;
    let computed = tokio::task::spawn_blocking(move || {
        let mut lines: Vec<LedgerLine> = hosts.iter().flat_map(|host| host_lines(host, &markets, &asked)).collect();
        lines.extend(egress);
        lines.sort_by_key(|line| (line.host, line.from_ms, line.to_ms, line.guest));
        Statement { totals: totals(&lines), lines }
    });
    computed.await.map_err(|_| StateError::Missing("the ledger's lines: the controller ends".to_owned()))
}

/// What everything that is rented costs now, per hour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rate {
    /// At the prices that were looked up last.
    pub paid: NanoUsd,
    /// What these hosts cost on demand; of those where that is known.
    pub on_demand: NanoUsd,
    /// Hosts without a known price.
    pub unpriced_hosts: u64,
}

/// What everything that is rented costs now.
///
/// # Errors
/// When the store does not answer.
pub async fn rate(state: &State) -> Result<Rate, StateError> {
    let clock = state.book().clock();
    let markets = state.list::<MarketRecord>().await?;
    let last = |name: String| markets.iter().find(|record| record.market == name && record.clock == clock);
    let mut rate = Rate::default();
    for tenancy in state.list::<TenancyRecord>().await? {
        if tenancy.spans.iter().all(|span| span.to_ms.is_some()) {
            continue;
        }
        let market = tenancy.market_by(clock);
        match market.and_then(|market| last(market.name())) {
            Some(price) => rate.paid = rate.paid + price.last,
            None => rate.unpriced_hosts += 1,
        }
        if let Some(price) = market.and_then(|market| last(market.on_demand().name())) {
            rate.on_demand = rate.on_demand + price.last;
        }
    }
    Ok(rate)
}

fn span_of(span: &TenancySpan) -> Span {
    Span { from_ms: span.since.at_ms, to_ms: span.to_ms.unwrap_or(u64::MAX) }
}

/// Reads a folder from a key on.
async fn range<T: serde::de::DeserializeOwned>(
    state: &State,
    folder: &str,
    mut after: Option<Key>,
) -> Result<Vec<T>, StateError> {
    const PAGE: usize = 1000;
    let prefix = keys::folder(folder);
    let mut all = Vec::new();
    loop {
        let page = state.store().range(prefix.clone(), after, PAGE).await?;
        for item in &page.items {
            all.push(decode::<T>(item)?);
        }
        if !page.more {
            return Ok(all);
        }
        after = page.items.last().map(|item| item.key.clone());
    }
}

/// The stays on a host that ended after a time.
async fn over(state: &State, host: HostId, from_ms: u64) -> Result<Vec<Stay>, StateError> {
    let after = keys::record::<StayRecord>(&stay_id_at(host, from_ms));
    let found: Vec<StayRecord> = range(state, &format!("{}/{host}", StayRecord::FOLDER), Some(after)).await?;
    let stay = |record: StayRecord| Stay {
        guest: record.guest,
        guest_name: record.guest_name,
        project: record.project,
        stay: record.stay,
        to_ms: record.to_ms,
    };
    Ok(found.into_iter().map(stay).collect())
}

async fn prices(state: &State, market: &str, clock: LedgerClock) -> Result<Prices, StateError> {
    let id = market_id(market, clock);
    let Some(record) = state.read::<MarketRecord>(&id).await? else { return Ok(Prices::default()) };
    let found: Vec<PriceRecord> = range(state, &format!("{}/{id}", PriceRecord::FOLDER), None).await?;
    let steps = found.iter().map(|price| Step { at_ms: price.at.at_ms, per_hour: price.per_hour }).collect();
    Ok(Prices { steps, known_until_ms: record.known_until_ms })
}

async fn egress(state: &State, asked: &Asked) -> Result<Vec<LedgerLine>, StateError> {
    let after = keys::record::<EgressRecord>(&format!("{:020}", asked.window.from_ms));
    let found: Vec<EgressRecord> = range(state, EgressRecord::FOLDER, Some(after)).await?;
    let is_asked_for = |record: &EgressRecord| {
        record.at.clock == asked.clock
            && record.at.at_ms < asked.window.to_ms
            && asked.is_asked_for(record.project, record.guest)
            && asked.is_place_asked_for(record.host, record.cloud)
    };
    let line = |record: EgressRecord| {
        let paid = record.per_gib.map(|per_gib| ledger::egress(per_gib, record.bytes));
        LedgerLine {
            kind: LedgerKind::Egress,
            from_ms: record.at.at_ms,
            to_ms: record.at.at_ms,
            host: record.host,
            host_name: record.host_name,
            cloud: record.cloud,
            cloud_name: record.cloud_name,
            market: None,
            guest: Some(record.guest),
            guest_name: Some(record.guest_name),
            project: Some(record.project),
            operation: Some(record.operation),
            to_cloud_name: Some(record.to_cloud_name),
            bytes: Some(record.bytes),
            price_nanousd: record.per_gib.map(|price| price.0),
            paid_nanousd: paid.map(|paid| paid.0),
            // Who never has to leave sends nothing.
            on_demand_nanousd: paid.map(|_| 0),
        }
    };
    Ok(found.into_iter().filter(is_asked_for).map(line).collect())
}

/// The lines of a host that are asked for. All of its users are counted, whoever asks: shares depend on them.
fn host_lines(host: &HostFacts, markets: &BTreeMap<String, Prices>, asked: &Asked) -> Vec<LedgerLine> {
    let tenancy = &host.tenancy;
    let nothing = Prices::default();
    let of = |name: Option<String>| name.and_then(|name| markets.get(&name)).unwrap_or(&nothing);
    let market = tenancy.market_by(asked.clock);
    let (paid, on_demand) = (of(market.map(|m| m.name())), of(market.map(|m| m.on_demand().name())));
    let sizes = tenancy.sizes.iter().filter(|size| size.since.clock == asked.clock);
    let rooms: Vec<(u64, Room)> = sizes.map(|size| (size.since.at_ms, size.size.into())).collect();
    let uses: Vec<Use> = host
        .stays
        .iter()
        .map(|stay| Use {
            span: Span { from_ms: stay.stay.since.at_ms, to_ms: stay.to_ms },
            room: stay.stay.size.into(),
        })
        .collect();
    let mut told = Vec::new();
    for span in tenancy.spans.iter().filter(|span| span.since.clock == asked.clock) {
        let account = Account { rented: span_of(span), rooms: &rooms, paid, on_demand, uses: &uses };
        for line in ledger::lines(&account, asked.window, HOUR_MS) {
            let stay = line.user.map(|user| &host.stays[user]);
            let is_asked_for = match stay {
                Some(stay) => asked.is_asked_for(stay.project, stay.guest),
                None => asked.sees_idle() && line.paid != Some(NanoUsd(0)),
            };
            if is_asked_for {
                told.push(told_line(tenancy, asked.clock, stay, &line));
            }
        }
    }
    told
}

fn told_line(tenancy: &TenancyRecord, clock: LedgerClock, stay: Option<&Stay>, line: &ledger::Line) -> LedgerLine {
    let kind = match stay.map(|stay| stay.stay.role) {
        None => LedgerKind::Idle,
        Some(Role::Runs) => LedgerKind::Runs,
        Some(Role::Incoming) => LedgerKind::Incoming,
    };
    let on_demand = match kind {
        // Who never has to leave is never on the way.
        LedgerKind::Incoming => line.paid.map(|_| NanoUsd(0)),
        _ => line.on_demand,
    };
    LedgerLine {
        kind,
        from_ms: line.span.from_ms,
        to_ms: line.span.to_ms,
        host: tenancy.host,
        host_name: tenancy.host_name.clone(),
        cloud: tenancy.cloud,
        cloud_name: tenancy.cloud_name.clone(),
        market: tenancy.market_by(clock).map(super::MarketName::name),
        guest: stay.map(|stay| stay.guest),
        guest_name: stay.map(|stay| stay.guest_name.clone()),
        project: stay.map(|stay| stay.project),
        operation: None,
        to_cloud_name: None,
        bytes: None,
        price_nanousd: line.per_hour.map(|price| price.0),
        paid_nanousd: line.paid.map(|paid| paid.0),
        on_demand_nanousd: on_demand.map(|paid| paid.0),
    }
}

fn totals(lines: &[LedgerLine]) -> LedgerTotals {
    let mut sums = LedgerTotals::default();
    for line in lines {
        let Some(paid) = line.paid_nanousd else {
            sums.unpriced_ms = sums.unpriced_ms.saturating_add(line.to_ms - line.from_ms);
            sums.unpriced_bytes = sums.unpriced_bytes.saturating_add(line.bytes.unwrap_or(0));
            continue;
        };
        let of_kind = match line.kind {
            LedgerKind::Runs => &mut sums.runs_nanousd,
            LedgerKind::Incoming => &mut sums.incoming_nanousd,
            LedgerKind::Idle => &mut sums.idle_nanousd,
            LedgerKind::Egress => &mut sums.egress_nanousd,
        };
        *of_kind = of_kind.saturating_add(paid);
        sums.paid_nanousd = sums.paid_nanousd.saturating_add(paid);
        if let Some(on_demand) = line.on_demand_nanousd {
            sums.comparable_paid_nanousd = sums.comparable_paid_nanousd.saturating_add(paid);
            sums.on_demand_nanousd = sums.on_demand_nanousd.saturating_add(on_demand);
        }
    }
    sums
}
