//! The ledger as it is told: facts and prices become lines.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::{ControlFlow, Range},
};

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

/// The most lines that are made for one request, whether they are on its page or not: seconds of work at worst.
pub const LINES_AT_MOST: usize = 1_000_000;
/// So much time of a host is added up at once, so that its lines are never all there together. Whole hours: cutting there changes
/// no line.
const PIECE_MS: u64 = 24 * HOUR_MS;

/// Of lines of whole days that are over, whose sums are kept ([`DaySums`]), so many times as many are made.
const OF_DAYS: usize = 20;
/// A day is over for good when so much time has passed since: what is known of it late is known by then.
const SETTLED_MS: u64 = 24 * HOUR_MS;
/// The most days of hosts whose sums are kept: some 500 hosts for a year.
const DAYS_AT_MOST: usize = 200_000;

/// Sums of days that are over, so that nobody adds them up twice.
#[derive(Debug, Default)]
pub struct DaySums(HashMap<DayOf, (LedgerTotals, usize)>);

/// Whose sums: a host's in a day, of everything on it or of one project's guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct DayOf {
    clock: LedgerClock,
    host: HostId,
    project: Option<ProjectId>,
    from_ms: u64,
}

impl DaySums {
    /// How many days of hosts are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn keep(&mut self, day: DayOf, sums: (LedgerTotals, usize)) {
        if self.0.len() >= DAYS_AT_MOST {
            self.0.clear();
        }
        self.0.insert(day, sums);
    }
}

/// Why there is no statement.
#[derive(Debug, thiserror::Error)]
pub enum StatementError {
    /// The store does not answer, or a record is damaged.
    #[error(transparent)]
    State(#[from] StateError),
    /// It would make more lines, or read more facts, than [`LINES_AT_MOST`]; of whole days that are over twenty times as many lines.
    #[error("this is of more than {LINES_AT_MOST} lines")]
    TooMuch,
}

/// Some of the lines, with the sums of all.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Statement {
    /// Those lines of all, by host, then by time, that were wanted.
    pub lines: Vec<LedgerLine>,
    /// How many there are of all.
    pub count: usize,
    /// The sums of all lines.
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

impl Stay {
    fn is_in(&self, asked: &Asked) -> bool {
        let span = Span { from_ms: self.stay.since.at_ms, to_ms: self.to_ms };
        self.stay.since.clock == asked.clock && span.and(asked.window).ms() > 0
    }
}

/// All facts of one host.
struct HostFacts {
    tenancy: TenancyRecord,
    stays: Vec<Stay>,
}

/// The lines that are asked for; of these, those whose numbers are in `wanted`. Everything open is told as if it ended with the
/// window. At most `at_most` lines are made (callers say [`LINES_AT_MOST`]), and only those that are wanted are kept. What the days
/// that are over come to is kept in `sums`, so that the next statement makes their lines no more.
///
/// # Errors
/// When the store does not answer or a record is damaged; [`StatementError::TooMuch`].
pub async fn statement(
    state: &State,
    asked: Asked,
    wanted: Range<usize>,
    at_most: usize,
    sums: &mut DaySums,
) -> Result<Statement, StatementError> {
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
    let mut facts_left = at_most;
    let mut hosts: BTreeMap<HostId, (Option<HostFacts>, Vec<LedgerLine>)> = BTreeMap::new();
    for tenancy in state.list::<TenancyRecord>().await? {
        let is_then = |span: &TenancySpan| span.since.clock == asked.clock && span_of(span).and(asked.window).ms() > 0;
        if !asked.is_place_asked_for(tenancy.host, tenancy.cloud) || !tenancy.spans.iter().any(is_then) {
            continue;
        }
        let mut stays = open.remove(&tenancy.host).unwrap_or_default();
        stays.retain(|stay| stay.is_in(&asked));
        over(state, tenancy.host, &asked, &mut facts_left, &mut stays).await?;
        if !asked.sees_idle() && !stays.iter().any(|stay| asked.is_asked_for(stay.project, stay.guest)) {
            continue;
        }
        // The order in which shares are rounded, and lines are told: always the same one.
        stays.sort_by_key(|stay| (stay.guest, stay.stay.since.at_ms, stay.stay.role));
        let host = tenancy.host;
        hosts.entry(host).or_default().0 = Some(HostFacts { tenancy: tenancy.value, stays });
    }
    let mut markets: BTreeMap<String, Prices> = BTreeMap::new();
    let used = hosts.values().filter_map(|(host, _)| host.as_ref()?.tenancy.market_by(asked.clock));
    for name in used.flat_map(|market| [market.name(), market.on_demand().name()]).collect::<BTreeSet<_>>() {
        let found = prices(state, &name, &asked, &mut facts_left).await?;
        markets.insert(name, found);
    }
    for line in egress(state, &asked, &mut facts_left).await? {
        hosts.entry(line.host).or_default().1.push(line);
    }
    // Of a clock that is not the one that goes on now nothing is over for good.
    let settled_ms = match state.book().clock() == asked.clock {
        true => asked.window.to_ms.saturating_sub(SETTLED_MS),
        false => 0,
    };
    let mut known = std::mem::take(sums);
    let computed = tokio::task::spawn_blocking(move || {
        let told =
            Adding { markets: &markets, asked: &asked, wanted: &wanted, at_most, settled_ms }.up(hosts, &mut known);
        (told, known)
    });
    let ended = |_| StateError::Missing("the ledger's lines: the controller ends".to_owned());
    let (told, known) = computed.await.map_err(ended)?;
    *sums = known;
    told
}

/// How lines are made and added up.
struct Adding<'a> {
    markets: &'a BTreeMap<String, Prices>,
    asked: &'a Asked,
    wanted: &'a Range<usize>,
    at_most: usize,
    /// What ended before this time is over for good.
    settled_ms: u64,
}

impl Adding<'_> {
    /// The day of a host that a piece is, if its sums can be kept: whole, over, and with prices that are known to its end.
    fn day(&self, host: &HostFacts, piece: Span) -> Option<DayOf> {
        let is_whole = piece.from_ms.is_multiple_of(PIECE_MS) && piece.ms() == PIECE_MS;
        let market = host.tenancy.market_by(self.asked.clock);
        let names = market.map(|market| [market.name(), market.on_demand().name()]);
        let is_known = |name: &String| self.markets.get(name).is_some_and(|one| one.known_until_ms >= piece.to_ms);
        // Of a host that joined by itself no price may ever be known; of one that is rented it may be, late.
        let is_priced = names.map_or(host.tenancy.renting.is_none(), |names| names.iter().all(is_known));
        let is_kept = is_whole && piece.to_ms <= self.settled_ms && is_priced && self.asked.guest.is_none();
        let (clock, host) = (self.asked.clock, host.tenancy.host);
        is_kept.then_some(DayOf { clock, host, project: self.asked.project, from_ms: piece.from_ms })
    }

    /// Makes the lines, a piece of a host's time at once, and keeps those that are wanted.
    fn up(
        &self,
        hosts: BTreeMap<HostId, (Option<HostFacts>, Vec<LedgerLine>)>,
        known: &mut DaySums,
    ) -> Result<Statement, StatementError> {
        let mut told = Statement::default();
        let (mut made, mut made_of_days) = (0_usize, 0_usize);
        for (_, (host, mut egress)) in hosts {
            egress.sort_by_key(|line| (line.from_ms, line.guest));
            let mut egress = egress.into_iter().peekable();
            // Nothing before a host's first time or behind its last one.
            let spans = host.iter().flat_map(|host| host.tenancy.spans.iter());
            let spans = spans.filter(|span| span.since.clock == self.asked.clock);
            let all = spans.map(|span| span_of(span).and(self.asked.window)).filter(|span| span.ms() > 0);
            let all = all.reduce(|a, b| Span { from_ms: a.from_ms.min(b.from_ms), to_ms: a.to_ms.max(b.to_ms) });
            let mut from_ms = all.map_or(u64::MAX, |all| all.from_ms);
            let to_ms = all.map_or(0, |all| all.to_ms);
            loop {
                let is_last = from_ms >= to_ms;
                let next_ms = (from_ms / PIECE_MS).saturating_add(1).saturating_mul(PIECE_MS).min(to_ms);
                // What lies behind the last piece, too.
                let sent = std::iter::from_fn(|| egress.next_if(|line| is_last || line.from_ms < next_ms));
                let mut lines: Vec<LedgerLine> = sent.collect();
                made += lines.len();
                if let (Some(host), false) = (&host, is_last) {
                    let piece = Span { from_ms, to_ms: next_ms };
                    let day = self.day(host, piece);
                    let kept = day.and_then(|day| known.0.get(&day)).filter(|(_, count)| {
                        let end = told.count.saturating_add(*count).saturating_add(lines.len());
                        end <= self.wanted.start || told.count >= self.wanted.end
                    });
                    if let Some((sums, count)) = kept {
                        merge(&mut told.totals, sums);
                        told.count += count;
                    } else {
                        let mut own = Vec::new();
                        let count = host_lines(host, self.markets, self.asked, piece, &mut own);
                        if let Some(day) = day {
                            let mut sums = LedgerTotals::default();
                            own.iter().for_each(|line| add(&mut sums, line));
                            known.keep(day, (sums, own.len()));
                            made_of_days += count;
                        } else {
                            made += count;
                        }
                        lines.append(&mut own);
                    }
                }
                if made > self.at_most || made_of_days > self.at_most.saturating_mul(OF_DAYS) {
                    return Err(StatementError::TooMuch);
                }
                lines.sort_by_key(|line| (line.from_ms, line.to_ms, line.guest));
                for line in lines {
                    add(&mut told.totals, &line);
                    if self.wanted.contains(&told.count) {
                        told.lines.push(line);
                    }
                    told.count += 1;
                }
                if is_last {
                    break;
                }
                from_ms = next_ms;
            }
        }
        Ok(told)
    }
}

fn merge(sums: &mut LedgerTotals, more: &LedgerTotals) {
    for (sum, more) in [
        (&mut sums.paid_nanousd, more.paid_nanousd),
        (&mut sums.runs_nanousd, more.runs_nanousd),
        (&mut sums.incoming_nanousd, more.incoming_nanousd),
        (&mut sums.idle_nanousd, more.idle_nanousd),
        (&mut sums.egress_nanousd, more.egress_nanousd),
        (&mut sums.comparable_paid_nanousd, more.comparable_paid_nanousd),
        (&mut sums.on_demand_nanousd, more.on_demand_nanousd),
        (&mut sums.unpriced_ms, more.unpriced_ms),
        (&mut sums.unpriced_bytes, more.unpriced_bytes),
    ] {
        *sum = sum.saturating_add(more);
    }
}

/// What everything that is rented costs now, per hour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rate {
    /// At the prices that were looked up last.
    pub paid: NanoUsd,
    /// Of this, for hosts of which is known what they cost on demand.
    pub comparable: NanoUsd,
    /// What these hosts cost on demand.
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
        let Some(paid) = market.and_then(|market| last(market.name())) else {
            rate.unpriced_hosts += 1;
            continue;
        };
        rate.paid = rate.paid + paid.last;
        if let Some(price) = market.and_then(|market| last(market.on_demand().name())) {
            rate.comparable = rate.comparable + paid.last;
            rate.on_demand = rate.on_demand + price.last;
        }
    }
    Ok(rate)
}

fn span_of(span: &TenancySpan) -> Span {
    Span { from_ms: span.since.at_ms, to_ms: span.to_ms.unwrap_or(u64::MAX) }
}

/// Reads a folder from a key on, until `take` has enough.
async fn range<T: serde::de::DeserializeOwned>(
    state: &State,
    folder: &str,
    mut after: Option<Key>,
    mut take: impl FnMut(T) -> Result<ControlFlow<()>, StatementError> + Send,
) -> Result<(), StatementError> {
    const PAGE: usize = 1000;
    let prefix = keys::folder(folder);
    loop {
        let page = state.store().range(prefix.clone(), after, PAGE).await.map_err(StateError::from)?;
        for item in &page.items {
            if take(decode::<T>(item)?)?.is_break() {
                return Ok(());
            }
        }
        if !page.more {
            return Ok(());
        }
        after = page.items.last().map(|item| item.key.clone());
    }
}

/// One fact more is kept.
fn count(left: &mut usize) -> Result<(), StatementError> {
    *left = left.checked_sub(1).ok_or(StatementError::TooMuch)?;
    Ok(())
}

/// The stays on a host, over by now, that were in the window.
async fn over(
    state: &State,
    host: HostId,
    asked: &Asked,
    left: &mut usize,
    stays: &mut Vec<Stay>,
) -> Result<(), StatementError> {
    let after = keys::record::<StayRecord>(&stay_id_at(host, asked.window.from_ms));
    range(state, &format!("{}/{host}", StayRecord::FOLDER), Some(after), |record: StayRecord| {
        let stay = Stay {
            guest: record.guest,
            guest_name: record.guest_name,
            project: record.project,
            stay: record.stay,
            to_ms: record.to_ms,
        };
        if stay.is_in(asked) {
            count(left)?;
            stays.push(stay);
        }
        Ok(ControlFlow::Continue(()))
    })
    .await
}

/// The prices of a market that hold somewhere in the window.
async fn prices(state: &State, market: &str, asked: &Asked, left: &mut usize) -> Result<Prices, StatementError> {
    let id = market_id(market, asked.clock);
    let Some(record) = state.read::<MarketRecord>(&id).await? else { return Ok(Prices::default()) };
    let mut steps: Vec<Step> = Vec::new();
    range(state, &format!("{}/{id}", PriceRecord::FOLDER), None, |price: PriceRecord| {
        if price.at.at_ms >= asked.window.to_ms {
            return Ok(ControlFlow::Break(()));
        }
        if price.at.at_ms <= asked.window.from_ms {
            // Only the last of these holds in it.
            steps.clear();
        } else {
            count(left)?;
        }
        steps.push(Step { at_ms: price.at.at_ms, per_hour: price.per_hour });
        Ok(ControlFlow::Continue(()))
    })
    .await?;
    Ok(Prices { steps, known_until_ms: record.known_until_ms })
}

async fn egress(state: &State, asked: &Asked, left: &mut usize) -> Result<Vec<LedgerLine>, StatementError> {
    let after = keys::record::<EgressRecord>(&format!("{:020}", asked.window.from_ms));
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
    let mut lines = Vec::new();
    range(state, EgressRecord::FOLDER, Some(after), |record: EgressRecord| {
        if is_asked_for(&record) {
            count(left)?;
            lines.push(line(record));
        }
        Ok(ControlFlow::Continue(()))
    })
    .await?;
    Ok(lines)
}

/// The lines of a host in a piece of time that are asked for; the answer is how many were made. All of its users are counted,
/// whoever asks: shares depend on them.
fn host_lines(
    host: &HostFacts,
    markets: &BTreeMap<String, Prices>,
    asked: &Asked,
    piece: Span,
    told: &mut Vec<LedgerLine>,
) -> usize {
    let tenancy = &host.tenancy;
    let nothing = Prices::default();
    let of = |name: Option<String>| name.and_then(|name| markets.get(&name)).unwrap_or(&nothing);
    let market = tenancy.market_by(asked.clock);
    let (paid, on_demand) = (of(market.map(|m| m.name())), of(market.map(|m| m.on_demand().name())));
    let sizes = tenancy.sizes.iter().filter(|size| size.since.clock == asked.clock);
    let rooms: Vec<(u64, Room)> = sizes.map(|size| (size.since.at_ms, size.size.into())).collect();
    let span_of_stay = |stay: &Stay| Span { from_ms: stay.stay.since.at_ms, to_ms: stay.to_ms };
    let stays: Vec<&Stay> = host.stays.iter().filter(|stay| span_of_stay(stay).and(piece).ms() > 0).collect();
    let uses: Vec<Use> =
        stays.iter().map(|stay| Use { span: span_of_stay(stay), room: stay.stay.size.into() }).collect();
    let mut made = 0;
    for span in tenancy.spans.iter().filter(|span| span.since.clock == asked.clock) {
        let account = Account { rented: span_of(span), rooms: &rooms, paid, on_demand, uses: &uses };
        for line in ledger::lines(&account, piece, HOUR_MS) {
            made += 1;
            let stay = line.user.map(|user| stays[user]);
            let is_asked_for = match stay {
                Some(stay) => asked.is_asked_for(stay.project, stay.guest),
                None => asked.sees_idle() && line.paid != Some(NanoUsd(0)),
            };
            if is_asked_for {
                told.push(told_line(tenancy, asked.clock, stay, &line));
            }
        }
    }
    made
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

fn add(sums: &mut LedgerTotals, line: &LedgerLine) {
    let Some(paid) = line.paid_nanousd else {
        sums.unpriced_ms = sums.unpriced_ms.saturating_add(line.to_ms - line.from_ms);
        sums.unpriced_bytes = sums.unpriced_bytes.saturating_add(line.bytes.unwrap_or(0));
        return;
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
