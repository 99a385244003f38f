//! `supercloud ledger`: what was paid, added up for people, or line by line for programs.

use std::{collections::BTreeMap, fmt::Write as _};

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use supercloud_api::{Ledger, LedgerClock, LedgerLine, client::Client};
use supercloud_cli::table::{Table, time, usd};

use crate::{arguments::Output, show};

/// Lines of one request: the most that the API gives.
const PAGE: usize = 1000;

/// What was paid, for whom and where, and what the same would have cost on demand.
#[derive(Debug, clap::Args)]
pub struct LedgerArguments {
    /// Only the last of it: `90m`, `24h`, `7d`.
    #[arg(long, conflicts_with = "from_ms")]
    last: Option<String>,
    /// From when, in milliseconds by the ledger's clock; 31 days before the end when absent.
    #[arg(long)]
    from_ms: Option<u64>,
    /// Until when; now when absent.
    #[arg(long)]
    to_ms: Option<u64>,
    /// Only this guest; one that was deleted, by its id.
    #[arg(long)]
    guest: Option<String>,
    /// Only this host; one that was removed, by its id.
    #[arg(long)]
    host: Option<String>,
    /// Only hosts in this cloud.
    #[arg(long)]
    cloud: Option<String>,
    /// What is added up.
    #[arg(long, value_enum, default_value_t = By::Guest)]
    by: By,
    /// Every line, as comma-separated values.
    #[arg(long)]
    csv: bool,
}

/// What lines are added up by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum By {
    /// For each guest, and what nobody used.
    Guest,
    /// For each host.
    Host,
    /// For each market.
    Market,
    /// For each hour.
    Hour,
    /// Nothing: every line.
    Line,
}

/// A query's value: names and ids need no escaping, and nothing else names anything here.
pub fn is_plain(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// `90m`, `24h`, `7d` in milliseconds.
fn parse_last(text: &str) -> Option<u64> {
    let unit_ms = match text.chars().last()? {
        's' => 1000,
        'm' => 60_000,
        'h' => 3_600_000,
        'd' => 86_400_000,
        _ => return None,
    };
    text[..text.len() - 1].parse::<u64>().ok()?.checked_mul(unit_ms)
}

/// Shows the ledger.
pub async fn run(client: &Client, output: Output, arguments: &LedgerArguments) -> anyhow::Result<()> {
    let mut query = format!("limit={PAGE}");
    let named = [("guest", &arguments.guest), ("host", &arguments.host), ("cloud", &arguments.cloud)];
    for (name, value) in named.into_iter().filter_map(|(name, value)| Some((name, value.as_ref()?))) {
        if !is_plain(value) {
            bail!("--{name}: '{value}' is neither a name nor an id");
        }
        write!(query, "&{name}={value}")?;
    }
    let mut from_ms = arguments.from_ms;
    if let Some(last) = &arguments.last {
        let last_ms = parse_last(last).context("--last must be a time like 90m, 24h or 7d")?;
        let to_ms = match arguments.to_ms {
            Some(to_ms) => to_ms,
            None => client.ledger("limit=1").await?.to_ms,
        };
        from_ms = Some(to_ms.saturating_sub(last_ms));
    }
    if let Some(to_ms) = arguments.to_ms {
        write!(query, "&to_ms={to_ms}")?;
    }
    let beginning = from_ms.map_or_else(String::new, |from_ms| format!("&from_ms={from_ms}"));
    let mut ledger = client.ledger(&format!("{query}{beginning}")).await?;
    while let Some(next) = ledger.next_page.take() {
        // Pages are of one listing, which begins where the first one says.
        let more = client.ledger(&format!("{query}&from_ms={}&page={next}", ledger.from_ms)).await?;
        ledger.items.extend(more.items);
        ledger.next_page = more.next_page;
    }
    if arguments.csv {
        print!("{}", csv(&ledger));
        return Ok(());
    }
    show::print(output, &ledger, || match arguments.by {
        By::Line => lines(&ledger),
        by => sums(&ledger, by),
    })?;
    if output.is_for_people() {
        print!("{}", words(&ledger));
    }
    Ok(())
}

fn when(clock: LedgerClock, ms: u64) -> String {
    match clock {
        LedgerClock::Wall => time(ms),
        // A feed may count from any beginning.
        LedgerClock::Feed => {
            format!("{}d {:02}:{:02}:{:02}", ms / 86_400_000, ms / 3_600_000 % 24, ms / 60_000 % 60, ms / 1000 % 60)
        }
    }
}

fn word<T: serde::Serialize>(value: T) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

fn money(nanousd: Option<u64>) -> String {
    nanousd.map_or_else(|| "-".into(), usd)
}

fn lines(ledger: &Ledger) -> Table {
    let mut table = Table::new(["FROM", "UNTIL", "KIND", "GUEST", "HOST", "MARKET", "PRICE", "PAID", "ON DEMAND"]);
    for line in &ledger.items {
        table.row([
            when(ledger.clock, line.from_ms),
            when(ledger.clock, line.to_ms),
            word(line.kind),
            line.guest_name.as_ref().map_or_else(|| "-".into(), ToString::to_string),
            line.host_name.to_string(),
            line.market.clone().unwrap_or_else(|| "-".into()),
            money(line.price_nanousd),
            money(line.paid_nanousd),
            money(line.on_demand_nanousd),
        ]);
    }
    table
}

/// Sums of lines that have something in common.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Sum {
    paid: u64,
    comparable: u64,
    on_demand: u64,
    has_unpriced: bool,
}

impl Sum {
    fn add(&mut self, line: &LedgerLine) {
        let Some(paid) = line.paid_nanousd else {
            self.has_unpriced = true;
            return;
        };
        self.paid = self.paid.saturating_add(paid);
        if let Some(on_demand) = line.on_demand_nanousd {
            self.comparable = self.comparable.saturating_add(paid);
            self.on_demand = self.on_demand.saturating_add(on_demand);
        }
    }

    /// What was saved against on-demand, where both are known.
    fn saved(&self) -> String {
        let (more, sign) = match self.on_demand.checked_sub(self.comparable) {
            Some(saved) => (saved, ""),
            None => (self.comparable - self.on_demand, "-"),
        };
        let percent = more.saturating_mul(100).checked_div(self.on_demand).unwrap_or(0);
        format!("{sign}{} ({sign}{percent} %)", usd(more))
    }

    fn cells(&self, name: String) -> [String; 5] {
        let unpriced = if self.has_unpriced { "yes" } else { "-" };
        [name, usd(self.paid), usd(self.on_demand), self.saved(), unpriced.into()]
    }
}

fn sums(ledger: &Ledger, by: By) -> Table {
    // By what names a thing for ever, with its last name: a name is another thing's in another project, or later.
    let mut groups: BTreeMap<(u64, String), (u64, String, Sum)> = BTreeMap::new();
    let mut all = Sum::default();
    for line in &ledger.items {
        let (hour_ms, id, name) = match by {
            By::Guest | By::Line => match (line.guest, &line.guest_name) {
                (Some(id), Some(name)) => (0, id.to_string(), name.to_string()),
                (Some(id), None) => (0, id.to_string(), id.to_string()),
                (None, _) => (0, String::new(), "(idle)".into()),
            },
            By::Host => (0, line.host.to_string(), line.host_name.to_string()),
            By::Market => {
                let name = line.market.clone().unwrap_or_else(|| format!("(of {})", line.cloud_name));
                (0, format!("{} {name}", line.cloud), name)
            }
            By::Hour => {
                let hour_ms = line.from_ms / 3_600_000 * 3_600_000;
                (hour_ms, String::new(), when(ledger.clock, hour_ms))
            }
        };
        let (named_ms, known, sum) = groups.entry((hour_ms, id)).or_default();
        if line.from_ms >= *named_ms {
            (*named_ms, *known) = (line.from_ms, name);
        }
        sum.add(line);
        all.add(line);
    }
    let mut rows: Vec<_> = groups.iter().map(|((hour_ms, id), (_, name, sum))| (*hour_ms, name, id, sum)).collect();
    rows.sort_unstable_by_key(|(hour_ms, name, id, _)| (*hour_ms, *name, *id));
    let header = match by {
        By::Guest | By::Line => "GUEST",
        By::Host => "HOST",
        By::Market => "MARKET",
        By::Hour => "HOUR",
    };
    let mut table = Table::new([header, "PAID", "ON DEMAND", "SAVED", "UNPRICED"]);
    for (at, (hour_ms, name, id, sum)) in rows.iter().enumerate() {
        let is_same = |other: Option<usize>| {
            other.and_then(|i| rows.get(i)).is_some_and(|other| (other.0, other.1) == (*hour_ms, *name))
        };
        // Two of one name: only the id tells which is which.
        let is_shared = is_same(at.checked_sub(1)) || is_same(at.checked_add(1));
        table.row(sum.cells(if is_shared { format!("{name} ({id})") } else { (*name).clone() }));
    }
    table.row(all.cells("total".into()));
    table
}

/// What the sums are made of, and by which clock.
fn words(ledger: &Ledger) -> String {
    let totals = &ledger.totals;
    let mut text = format!(
        "\n{} until {}: run {}, on the way {}, idle {}, egress {}\n",
        when(ledger.clock, ledger.from_ms),
        when(ledger.clock, ledger.to_ms),
        usd(totals.runs_nanousd),
        usd(totals.incoming_nanousd),
        usd(totals.idle_nanousd),
        usd(totals.egress_nanousd),
    );
    if ledger.clock == LedgerClock::Feed {
        text.push_str(
            "times are the replayed price feed's (days and hours since its beginning): nobody really pays this\n",
        );
    }
    if totals.unpriced_ms > 0 || totals.unpriced_bytes > 0 {
        text.push_str("where no price is known nothing is counted: see UNPRICED\n");
    }
    text
}

/// A field of comma-separated values: quoted where it has to be.
fn field(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.to_owned() }
}

fn csv(ledger: &Ledger) -> String {
    let mut text = String::from(
        "clock,from_ms,to_ms,kind,project,guest,guest_name,host,host_name,cloud,market,to_cloud,bytes,price_nanousd,\
         paid_nanousd,on_demand_nanousd\n",
    );
    let number = |value: Option<u64>| value.map(|value| value.to_string()).unwrap_or_default();
    for line in &ledger.items {
        let fields = [
            word(ledger.clock),
            line.from_ms.to_string(),
            line.to_ms.to_string(),
            word(line.kind),
            line.project.map(|id| id.to_string()).unwrap_or_default(),
            line.guest.map(|id| id.to_string()).unwrap_or_default(),
            line.guest_name.as_ref().map(ToString::to_string).unwrap_or_default(),
            line.host.to_string(),
            line.host_name.to_string(),
            line.cloud_name.to_string(),
            line.market.clone().unwrap_or_default(),
            line.to_cloud_name.as_ref().map(ToString::to_string).unwrap_or_default(),
            number(line.bytes),
            number(line.price_nanousd),
            number(line.paid_nanousd),
            number(line.on_demand_nanousd),
        ];
        let fields: Vec<String> = fields.iter().map(|text| field(text)).collect();
        text.push_str(&fields.join(","));
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use supercloud_api::{
        LedgerKind, LedgerTotals,
        ids::{CloudId, GuestId, HostId, ProjectId},
    };

    use super::*;

    fn line(guest: Option<&str>, paid: Option<u64>, on_demand: Option<u64>) -> LedgerLine {
        LedgerLine {
            kind: if guest.is_some() { LedgerKind::Runs } else { LedgerKind::Idle },
            from_ms: 3_600_000,
            to_ms: 7_200_000,
            host: HostId::generate(),
            host_name: "h".parse().unwrap(),
            cloud: CloudId::generate(),
            cloud_name: "c".parse().unwrap(),
            market: Some("c/m,1/spot".into()),
            guest: guest.map(|_| GuestId::generate()),
            guest_name: guest.map(|name| name.parse().unwrap()),
            project: guest.map(|_| ProjectId::generate()),
            operation: None,
            to_cloud_name: None,
            bytes: None,
            price_nanousd: paid.map(|_| 40_000_000),
            paid_nanousd: paid,
            on_demand_nanousd: on_demand,
        }
    }

    fn ledger() -> Ledger {
        let web = line(Some("web"), Some(10_000_000), Some(40_000_000));
        let unpriced = LedgerLine { guest: web.guest, project: web.project, ..line(Some("web"), None, None) };
        let items = vec![web, unpriced, line(None, Some(30_000_000), Some(20_000_000))];
        let totals = LedgerTotals::default();
        Ledger { clock: LedgerClock::Feed, from_ms: 0, to_ms: 7_200_000, totals, rate: None, items, next_page: None }
    }

    #[test]
    fn lines_are_added_up_and_what_has_no_price_is_said() {
        let text = sums(&ledger(), By::Guest).render();
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[1], ["(idle)", "$0.0300", "$0.0200", "-$0.0100", "(-50", "%)", "-"]);
        assert_eq!(rows[2], ["web", "$0.0100", "$0.0400", "$0.0300", "(75", "%)", "yes"]);
        assert_eq!(rows[3][..3], ["total", "$0.0400", "$0.0600"]);
        assert!(words(&ledger()).contains("nobody really pays this"));
        assert!(sums(&ledger(), By::Hour).render().contains("0d 01:00:00"));
    }

    #[test]
    fn things_of_one_name_are_not_added_up_and_a_renamed_one_is() {
        let mut ledger = ledger();
        let web = ledger.items[0].clone();
        let (one, other) = (web.guest.unwrap(), GuestId::generate());
        ledger.items.push(LedgerLine { guest: Some(other), project: Some(ProjectId::generate()), ..web.clone() });
        let text = sums(&ledger, By::Guest).render();
        for id in [one, other] {
            let row = text.lines().find(|line| line.starts_with(&format!("web ({id})"))).unwrap_or_default();
            assert!(row.contains("$0.0100"), "{text}");
        }
        let again = LedgerLine { guest_name: Some("shop".parse().unwrap()), from_ms: 7_200_000, ..web };
        ledger.items = vec![ledger.items[0].clone(), again];
        let text = sums(&ledger, By::Guest).render();
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!((rows.len(), &rows[1][..2]), (3, &["shop", "$0.0200"][..]), "{text}");
    }

    #[test]
    fn comma_separated_values_are_quoted_where_they_must_be() {
        let text = csv(&ledger());
        assert_eq!(text.lines().count(), 4);
        assert!(text.lines().nth(1).unwrap().contains(",\"c/m,1/spot\",,,40000000,10000000,40000000"), "{text}");
        assert!(text.lines().nth(2).unwrap().ends_with(",,,,,"), "{text}");
    }

    #[test]
    fn spans_of_time_are_read() {
        assert_eq!((parse_last("90m"), parse_last("7d")), (Some(5_400_000), Some(604_800_000)));
        for bad in ["", "h", "5", "5 h", "-1h", "99999999999999999999d", "5µ"] {
            assert_eq!(parse_last(bad), None, "{bad}");
        }
        assert!(is_plain("web-1") && !is_plain("a&b") && !is_plain(""));
    }
}
