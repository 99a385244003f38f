//! Price feeds as files: reading them, replaying them on a clock of their own, and making them from a stated model.
//!
//! ## Format (version 1)
//! UTF-8 text. Lines that start with `#` are comments; the first must be `# supercloud-feed 1`. Then one header line
//! `feed_ms,cloud,instance_type,tenure,usd_per_hour` and one line per *change*, ordered by time: a price holds until the next
//! line of its market. `tenure` is `spot` or `on_demand`; `feed_ms` is milliseconds on the feed's own clock, from 0.
//!
//! ## Model of generated feeds
//! See [`generate`].

#![forbid(unsafe_code)]

mod generate;
pub mod loads;
pub mod recorded;

pub use generate::{MarketModel, Model, generate};

use std::collections::BTreeMap;

use supercloud_scheduler::money::NanoUsd;

/// The longest feed that is read, in bytes.
pub const MAX_FEED_BYTES: usize = 64 << 20;
/// The first line of a feed.
pub const MAGIC: &str = "# supercloud-feed 1";
const HEADER: &str = "feed_ms,cloud,instance_type,tenure,usd_per_hour";

/// A market's identity in a feed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MarketKey {
    /// The cloud's name.
    pub cloud: String,
    /// The instance type.
    pub instance_type: String,
    /// `spot` or `on_demand`.
    pub tenure: String,
}

impl MarketKey {
    /// `<cloud>/<instance type>/<tenure>`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}/{}", self.cloud, self.instance_type, self.tenure)
    }
}

/// A price that holds from a time on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// From when, on the feed's clock.
    pub at_ms: u64,
    /// The price per hour.
    pub price: NanoUsd,
}

/// Why a feed is not acceptable; names the line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FeedError {
    /// Too long.
    #[error("the feed has {0} bytes; at most {MAX_FEED_BYTES} are read")]
    TooLong(usize),
    /// The first line is another.
    #[error("line 1 must be '{MAGIC}'")]
    Magic,
    /// The header line is missing or another.
    #[error("line {line}: the header must be '{HEADER}'")]
    Header {
        /// Which line.
        line: usize,
    },
    /// A line is wrong.
    #[error("line {line}: {what}")]
    Line {
        /// Which line.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// No price at all.
    #[error("the feed holds no price")]
    Empty,
}

/// A feed: for each market its price steps.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Feed {
    markets: BTreeMap<MarketKey, Vec<Step>>,
}

impl Feed {
    /// Reads a feed.
    ///
    /// # Errors
    /// What is wrong and in which line.
    pub fn parse(text: &str) -> Result<Self, FeedError> {
        if text.len() > MAX_FEED_BYTES {
            return Err(FeedError::TooLong(text.len()));
        }
        let mut lines = text.lines().enumerate().map(|(i, line)| (i + 1, line.trim_end()));
        if lines.next().is_none_or(|(_, line)| line != MAGIC) {
            return Err(FeedError::Magic);
        }
        let mut lines = lines.filter(|(_, line)| !line.starts_with('#') && !line.is_empty());
        match lines.next() {
            Some((_, HEADER)) => {}
            Some((line, _)) => return Err(FeedError::Header { line }),
            None => return Err(FeedError::Empty),
        }
        let mut feed = Self::default();
        let mut last_ms = 0;
        for (line, text) in lines {
            let wrong = |what: String| FeedError::Line { line, what };
            let fields: Vec<&str> = text.split(',').collect();
            let &[at_ms, cloud, instance_type, tenure, price] = fields.as_slice() else {
                return Err(wrong(format!("{} fields; there must be 5", fields.len())));
            };
            let at_ms: u64 = at_ms.parse().map_err(|_| wrong("feed_ms is no whole number".into()))?;
            if at_ms < last_ms {
                return Err(wrong("the time goes back".into()));
            }
            last_ms = at_ms;
            for (field, value) in [("cloud", cloud), ("instance_type", instance_type)] {
                let good = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
                if value.is_empty() || value.len() > 63 || !value.bytes().all(good) {
                    return Err(wrong(format!("{field} must be 1 to 63 characters of a-z, 0-9, '-', '.', '_'")));
                }
            }
            if !["spot", "on_demand"].contains(&tenure) {
                return Err(wrong("tenure must be spot or on_demand".into()));
            }
            let price = NanoUsd::parse_usd(price).map_err(wrong)?;
            let key = MarketKey { cloud: cloud.into(), instance_type: instance_type.into(), tenure: tenure.into() };
            feed.push(key, Step { at_ms, price });
        }
        if feed.markets.is_empty() { Err(FeedError::Empty) } else { Ok(feed) }
    }

    /// Adds a step to a market; a step at the same time as the last replaces it.
    fn push(&mut self, key: MarketKey, step: Step) {
        let steps = self.markets.entry(key).or_default();
        match steps.last_mut() {
            Some(last) if last.at_ms == step.at_ms => *last = step,
            _ => steps.push(step),
        }
    }

    /// The text form, without comments beyond the first line and `comment`.
    #[must_use]
    pub fn to_text(&self, comment: &str) -> String {
        let mut rows: Vec<(u64, &MarketKey, NanoUsd)> = self
            .markets
            .iter()
            .flat_map(|(key, steps)| steps.iter().map(move |step| (step.at_ms, key, step.price)))
            .collect();
        rows.sort_by_key(|(at_ms, key, _)| (*at_ms, *key));
        let mut text = format!("{MAGIC}\n");
        for line in comment.lines() {
            text.push_str(&format!("# {line}\n"));
        }
        text.push_str(HEADER);
        for (at_ms, key, price) in rows {
            let MarketKey { cloud, instance_type, tenure } = key;
            let (whole, nanos) = (price.0 / 1_000_000_000, price.0 % 1_000_000_000);
            text.push_str(&format!("\n{at_ms},{cloud},{instance_type},{tenure},{whole}.{nanos:09}"));
        }
        text.push('\n');
        text
    }

    /// The markets, in order.
    pub fn markets(&self) -> impl Iterator<Item = (&MarketKey, &[Step])> {
        self.markets.iter().map(|(key, steps)| (key, steps.as_slice()))
    }

    /// The price of a market at a time: the last step that is not later. None before the first.
    #[must_use]
    pub fn price_at(&self, key: &MarketKey, now_ms: u64) -> Option<Step> {
        let steps = self.markets.get(key)?;
        steps[..steps.partition_point(|step| step.at_ms <= now_ms)].last().copied()
    }

    /// The time of the last step.
    #[must_use]
    pub fn end_ms(&self) -> u64 {
        self.markets.values().filter_map(|steps| steps.last()).map(|step| step.at_ms).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "# supercloud-feed 1\n# made by hand\nfeed_ms,cloud,instance_type,tenure,usd_per_hour\n\
        0,home,m.large,on_demand,0.1\n0,aws-east,m.large,spot,0.03\n60000,aws-east,m.large,spot,0.05\n";

    #[test]
    fn a_price_holds_until_the_next_line() {
        let feed = Feed::parse(GOOD).unwrap();
        let key = MarketKey { cloud: "aws-east".into(), instance_type: "m.large".into(), tenure: "spot".into() };
        assert_eq!(feed.price_at(&key, 59_999).unwrap().price, NanoUsd(30_000_000));
        assert_eq!(feed.price_at(&key, 60_000).unwrap().price, NanoUsd(50_000_000));
        assert_eq!(feed.end_ms(), 60_000);
        assert_eq!(Feed::parse(&feed.to_text("again")).unwrap(), feed);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        assert_eq!(Feed::parse(""), Err(FeedError::Magic));
        assert_eq!(Feed::parse("# supercloud-feed 1\n"), Err(FeedError::Empty));
        assert_eq!(Feed::parse("# supercloud-feed 1\nx\n"), Err(FeedError::Header { line: 2 }));
        for bad in ["1,a,b,spot", "x,a,b,spot,1", "1,a b,c,spot,1", "1,a,b,rent,1", "1,a,b,spot,-1", "1,,b,spot,1"] {
            let text = format!("{GOOD}{}", bad.replacen('1', "70000", 1));
            assert!(matches!(Feed::parse(&text), Err(FeedError::Line { line: 7, .. })), "{bad}");
        }
        assert!(matches!(Feed::parse(&format!("{GOOD}5,a,b,spot,1\n")), Err(FeedError::Line { line: 7, .. })));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(noise in ".{0,200}", at in 0usize..200) {
            let mut text = GOOD.to_owned();
            let at = at.min(text.len());
            text.insert_str(at, &noise);
            let _ = Feed::parse(&text);
        }
    }

    #[test]
    fn the_same_seed_makes_the_same_feed() {
        let model = Model::demo();
        let (a, b) = (generate(&model, 7), generate(&model, 7));
        assert_eq!(a, b);
        assert_ne!(a, generate(&model, 8));
        assert_eq!(Feed::parse(&a.to_text("")).unwrap(), a);
        for (key, steps) in a.markets() {
            let market = model.markets.iter().find(|m| m.cloud == key.cloud).unwrap();
            let cap = if key.tenure == "spot" { market.on_demand } else { NanoUsd(u64::MAX) };
            assert!(steps.iter().all(|s| s.price <= cap && s.price.0 > 0), "{}", key.name());
        }
    }
}
