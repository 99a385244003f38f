//! Recorded markets: spot prices, the catalogue that says what an instance type is, and probes of capacity.
//!
//! ## Formats
//! CSV without quoting; the header line is part of the format. Times are UTC. Every series is a step function.
//! - prices: `timestamp_utc,zone,instance_type,usd_per_hour`, by time;
//! - catalogue: `era,region,instance_type,vcpus,memory_gib,usd_per_hour` (the on-demand price);
//! - capacity: `trace,zone,resource,gap_seconds,start_offset_seconds,instances_available`; `end` closes a series.
//!
//! Any of them may be gzip-compressed.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    io::Read as _,
};

use supercloud_scheduler::{
    calendar::parse_utc,
    market::{HOUR_MS, InstanceType, PricePoint, Regime, SpotSeries, Trace},
    money::NanoUsd,
    sim::hazard::CapacityRuns,
};

use crate::{MAX_FEED_BYTES, MarketModel, Model, generate};

/// The most markets that one trace may have.
pub const MAX_MARKETS: usize = 4096;

/// Why a recorded market is not acceptable; names the line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordedError {
    /// Too long.
    #[error("the file has more than {MAX_FEED_BYTES} bytes of text")]
    TooLong,
    /// Not gzip, or damaged, or no UTF-8.
    #[error("the file is not readable: {0}")]
    Unreadable(String),
    /// The header line is another.
    #[error("line 1 must be '{0}'")]
    Header(&'static str),
    /// A line is wrong.
    #[error("line {line}: {what}")]
    Line {
        /// Which line.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// Nothing in it.
    #[error("the file holds no data")]
    Empty,
}

/// The text of a file, decompressed when it is gzip; never more than [`MAX_FEED_BYTES`].
///
/// # Errors
/// Too long, damaged, or not UTF-8.
pub fn text_of(bytes: &[u8]) -> Result<String, RecordedError> {
    let unreadable = |error: &dyn std::fmt::Display| RecordedError::Unreadable(error.to_string());
    let mut text = Vec::new();
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut plain = flate2::read::MultiGzDecoder::new(bytes).take(MAX_FEED_BYTES as u64 + 1);
        plain.read_to_end(&mut text).map_err(|error| unreadable(&error))?;
    } else {
        text.extend_from_slice(&bytes[..bytes.len().min(MAX_FEED_BYTES + 1)]);
    }
    if text.len() > MAX_FEED_BYTES {
        return Err(RecordedError::TooLong);
    }
    String::from_utf8(text).map_err(|error| unreadable(&error))
}

/// The lines after the header, with their numbers, each split into exactly `N` fields.
pub(crate) fn rows<'a, const N: usize>(
    text: &'a str,
    header: &'static str,
) -> Result<impl Iterator<Item = Result<(usize, [&'a str; N]), RecordedError>>, RecordedError> {
    let mut lines = text.lines().enumerate().map(|(i, line)| (i + 1, line.trim_end()));
    if lines.next().is_none_or(|(_, line)| line != header) {
        return Err(RecordedError::Header(header));
    }
    Ok(lines.filter(|(_, text)| !text.is_empty() && !text.starts_with('#')).map(|(line, text)| {
        let mut fields = [""; N];
        let mut count = 0;
        for field in text.split(',') {
            if let Some(slot) = fields.get_mut(count) {
                *slot = field;
            }
            count += 1;
        }
        if count == N {
            Ok((line, fields))
        } else {
            Err(RecordedError::Line { line, what: format!("{count} fields; there must be {N}") })
        }
    }))
}

pub(crate) fn name(line: usize, what: &str, text: &str) -> Result<String, RecordedError> {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    if text.is_empty() || text.len() > 63 || !text.bytes().all(good) {
        let what = format!("{what} must be 1 to 63 characters of a-z, 0-9, '-', '.', '_'");
        return Err(RecordedError::Line { line, what });
    }
    Ok(text.to_owned())
}

/// Reads a catalogue: instance types by name.
///
/// # Errors
/// What is wrong and in which line; a type that is listed twice with different data is wrong.
pub fn catalogue(text: &str) -> Result<BTreeMap<String, InstanceType>, RecordedError> {
    const HEADER: &str = "era,region,instance_type,vcpus,memory_gib,usd_per_hour";
    let mut types = BTreeMap::new();
    for row in rows::<6>(text, HEADER)? {
        let (line, [_era, _region, kind, vcpus, memory, price]) = row?;
        let wrong = |what: String| RecordedError::Line { line, what };
        let kind = name(line, "instance_type", kind)?;
        let vcpus = vcpus.parse().ok().filter(|n| (1..=4096).contains(n));
        let vcpus: u32 = vcpus.ok_or_else(|| wrong("vcpus must be 1 to 4096".into()))?;
        // A decimal number of GiB, read exactly by the reader of money (10^-9 units).
        let memory = NanoUsd::parse_usd(memory).ok().filter(|m| (1..=65_536_000_000_000).contains(&m.0));
        let memory = memory.ok_or_else(|| wrong("memory_gib must be above 0 and at most 65536".into()))?;
        let memory_bytes = (u128::from(memory.0) * (1 << 30) / 1_000_000_000) as u64;
        let on_demand = NanoUsd::parse_usd(price).map_err(wrong)?;
        let instance = InstanceType { name: kind.clone(), vcpus, memory_bytes, on_demand };
        match types.entry(kind) {
            Entry::Vacant(free) => {
                free.insert(instance);
            }
            Entry::Occupied(there) if *there.get() == instance => {}
            Entry::Occupied(there) => return Err(wrong(format!("{} is listed twice", there.key()))),
        }
    }
    if types.is_empty() { Err(RecordedError::Empty) } else { Ok(types) }
}

/// The catalogue that ships: EC2's Linux list prices of us-east-1 for the types of two public traces: the rows of 2015 as in the
/// data of github.com/prateek-s/spot-price-model, those of 2021 from the provider's public price list of spring 2021.
pub const CATALOGUE: &str = include_str!("../catalogue.csv");

/// A generated sample, for trying things out: four types in three zones over 60 days, in the capacity regime.
/// Not a recording: see [`crate::generate`] for the model.
#[must_use]
pub fn sample(types: &BTreeMap<String, InstanceType>, seed: u64) -> Trace {
    const DAY_MS: u64 = 86_400_000;
    let mut series = Vec::new();
    let names = ["m5.large", "m5.xlarge", "r5.xlarge", "r5.4xlarge"];
    for (i, instance) in names.into_iter().filter_map(|name| types.get(name)).enumerate() {
        let markets = ["a", "b", "c"].into_iter().enumerate().map(|(j, zone)| MarketModel {
            cloud: zone.into(),
            instance_type: instance.name.clone(),
            on_demand: instance.on_demand,
            spot_mean: 0.36 + 0.02 * ((i + 2 * j) % 3) as f64,
            swing: 0.15,
            peak: (i + j) as f64 / 7.0,
            noise: 0.02,
        });
        let model = Model { markets: markets.collect(), step_ms: HOUR_MS, length_ms: 60 * DAY_MS };
        let feed = generate(&model, seed.wrapping_add(i as u64));
        series.extend(feed.markets().filter(|(key, _)| key.tenure == "spot").map(|(key, steps)| SpotSeries {
            zone: key.cloud.clone(),
            instance: instance.clone(),
            points: steps.iter().map(|step| PricePoint { at_ms: step.at_ms, price: step.price }).collect(),
        }));
    }
    Trace { regime: Regime::Capacity, series }
}

/// Reads recorded spot prices. The regime is what the prices show ([`Trace::guess_regime`]) unless it is given.
///
/// # Errors
/// What is wrong and in which line; a type that is not in the catalogue is wrong.
pub fn prices(
    text: &str,
    types: &BTreeMap<String, InstanceType>,
    regime: Option<Regime>,
) -> Result<Trace, RecordedError> {
    const HEADER: &str = "timestamp_utc,zone,instance_type,usd_per_hour";
    let mut markets: BTreeMap<(&str, &str), SpotSeries> = BTreeMap::new();
    let mut last_ms = 0;
    for row in rows::<4>(text, HEADER)? {
        let (line, [at, zone, kind, price]) = row?;
        let wrong = |what: String| RecordedError::Line { line, what };
        let at_ms = parse_utc(at).ok_or_else(|| wrong("timestamp_utc must be YYYY-MM-DDTHH:MM:SSZ".into()))?;
        if at_ms < last_ms {
            return Err(wrong("the time goes back".into()));
        }
        last_ms = at_ms;
        let price = NanoUsd::parse_usd(price).map_err(wrong)?;
        if !markets.contains_key(&(zone, kind)) {
            if markets.len() == MAX_MARKETS {
                return Err(wrong(format!("more than {MAX_MARKETS} markets")));
            }
            let known = types.get(kind);
            let instance = known.ok_or_else(|| {
                wrong(format!("{} is not in the catalogue", name(line, "instance_type", kind).unwrap_or_default()))
            })?;
            let series = SpotSeries { zone: name(line, "zone", zone)?, instance: instance.clone(), points: Vec::new() };
            markets.insert((zone, kind), series);
        }
        let Some(series) = markets.get_mut(&(zone, kind)) else { continue };
        match series.points.last_mut() {
            Some(last) if last.at_ms == at_ms => last.price = price,
            _ => series.points.push(PricePoint { at_ms, price }),
        }
    }
    let series: Vec<SpotSeries> = markets.into_values().collect();
    if series.is_empty() {
        return Err(RecordedError::Empty);
    }
    Ok(Trace { regime: regime.unwrap_or_else(|| Trace::guess_regime(&series)), series })
}

/// Reads capacity probes of one resource (all when `resource` is `None`): how long capacity was there and away.
///
/// # Errors
/// What is wrong and in which line.
pub fn capacity(text: &str, resource: Option<&str>) -> Result<CapacityRuns, RecordedError> {
    let series = capacity_series(text, resource)?;
    let runs = CapacityRuns::learn(series.iter().map(Vec::as_slice));
    if runs.is_usable() { Ok(runs) } else { Err(RecordedError::Empty) }
}

/// Steps of one recording: when (milliseconds), and whether capacity was there from then on. The last closes it.
pub type CapacitySteps = Vec<(u64, bool)>;

/// Reads the same probes as they are.
///
/// # Errors
/// What is wrong and in which line.
pub fn capacity_series(text: &str, resource: Option<&str>) -> Result<Vec<CapacitySteps>, RecordedError> {
    const HEADER: &str = "trace,zone,resource,gap_seconds,start_offset_seconds,instances_available";
    let mut series: BTreeMap<[&str; 3], Vec<(u64, bool)>> = BTreeMap::new();
    for row in rows::<6>(text, HEADER)? {
        let (line, [trace, zone, of, _gap, offset, available]) = row?;
        let wrong = |what: &str| RecordedError::Line { line, what: what.into() };
        if resource.is_some_and(|wanted| wanted != of) {
            continue;
        }
        let offset = offset.parse().ok().filter(|s: &u64| *s <= 1 << 32);
        let at_ms = offset.ok_or_else(|| wrong("start_offset_seconds must be a whole number below 2^32"))? * 1000;
        let is_there = match available {
            "end" => false,
            text => text.parse::<u32>().map_err(|_| wrong("instances_available must be a number or 'end'"))? > 0,
        };
        let points = series.entry([trace, zone, of]).or_default();
        if points.last().is_some_and(|(last, _)| *last > at_ms) {
            return Err(wrong("the time goes back"));
        }
        points.push((at_ms, is_there));
    }
    Ok(series.into_values().collect())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;
    use supercloud_scheduler::sim::hazard::Runs;

    use super::*;

    const TYPES: &str = "era,region,instance_type,vcpus,memory_gib,usd_per_hour\n2015,x,m3.medium,1,3.75,0.067\n";
    const PRICES: &str = "timestamp_utc,zone,instance_type,usd_per_hour\n\
        2015-03-11T10:34:42Z,a,m3.medium,0.0081\n2015-03-11T10:35:42Z,a,m3.medium,0.1131\n";

    #[test]
    fn recorded_prices_become_markets_of_the_regime_that_they_show() {
        let types = catalogue(TYPES).unwrap();
        assert_eq!(types["m3.medium"].memory_bytes, (15 << 30) / 4);
        let trace = prices(PRICES, &types, None).unwrap();
        assert_eq!((trace.regime, trace.series.len(), trace.series[0].points.len()), (Regime::Auction, 1, 2));
        assert_eq!(trace.series[0].points[1].price, NanoUsd(113_100_000));
        let low = PRICES.replace("0.1131", "0.01");
        assert_eq!(prices(&low, &types, None).unwrap().regime, Regime::Capacity);
        assert_eq!(prices(&low, &types, Some(Regime::Auction)).unwrap().regime, Regime::Auction);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let types = catalogue(TYPES).unwrap();
        let wrong = |line: &str| prices(&format!("{PRICES}{line}\n"), &types, None).unwrap_err().to_string();
        assert!(wrong("2015-03-11T10:36:42Z,a,m9.big,1").starts_with("line 4: m9.big is not in the catalogue"));
        assert!(wrong("2015-03-11T10:30:42Z,a,m3.medium,1").starts_with("line 4: the time goes back"));
        assert!(wrong("2015-03-11T10:36:42Z,a,m3.medium").starts_with("line 4: 3 fields"));
        assert!(wrong("2015-03-11T10:36:42Z,a,m3.medium,1,2").starts_with("line 4: 5 fields"));
        assert!(wrong("yesterday,a,m3.medium,1").starts_with("line 4: timestamp"));
        assert!(wrong("2015-03-11T10:36:42Z,a b,m3.medium,-1").starts_with("line 4: "));
        assert!(matches!(prices("x\n", &types, None), Err(RecordedError::Header(_))));
        assert!(catalogue(&format!("{TYPES}2015,x,m3.medium,2,3.75,0.067\n")).is_err());
        assert!(catalogue(&format!("{TYPES}2015,x,b,0,3.75,0.067\n")).is_err());
    }

    #[test]
    fn compressed_text_is_read_and_a_bomb_is_not() {
        let pack = |data: &[u8]| {
            let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            packer.write_all(data).unwrap();
            packer.finish().unwrap()
        };
        assert_eq!(text_of(&pack(PRICES.as_bytes())).unwrap(), PRICES);
        assert_eq!(text_of(PRICES.as_bytes()).unwrap(), PRICES);
        assert_eq!(text_of(&pack(&vec![0; MAX_FEED_BYTES + 1])), Err(RecordedError::TooLong));
        assert!(matches!(text_of(&[0x1f, 0x8b, 1, 2]), Err(RecordedError::Unreadable(_))));
        assert!(matches!(text_of(&[0xff]), Err(RecordedError::Unreadable(_))));
    }

    #[test]
    fn capacity_is_read_by_resource() {
        let text = "trace,zone,resource,gap_seconds,start_offset_seconds,instances_available\n\
            t,a,cpu,30,0,1\nt,a,cpu,30,600,0\nt,a,cpu,30,900,2\nt,a,cpu,30,1000,end\nt,a,gpu,30,0,0\nt,a,gpu,30,60,end\n";
        let runs = capacity(text, Some("cpu")).unwrap();
        assert_eq!(runs.series, [Runs { up_ms: vec![600_000, 100_000], down_ms: vec![300_000] }]);
        assert_eq!(capacity(text, Some("gpu")), Err(RecordedError::Empty), "never there");
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_readers_panic(noise in ".{0,200}", at in 0usize..200) {
            let types = catalogue(TYPES).unwrap();
            for good in [TYPES, PRICES] {
                let mut text = good.to_owned();
                text.insert_str(at.min(good.len()), &noise);
                let _ = (catalogue(&text), prices(&text, &types, None), capacity(&text, None));
            }
        }

        #[test]
        fn no_compressed_bytes_make_the_reader_panic(mut noise in prop::collection::vec(any::<u8>(), 0..300)) {
            noise.splice(0..0, [0x1f, 0x8b, 8, 0]);
            let _ = text_of(&noise);
        }
    }
}
