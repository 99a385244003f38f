//! Counts of clients' requests by place and time.
//!
//! CSV `timestamp_utc,place,requests` with that header, by time: one row per place and slot, the time being the slot's beginning. The
//! shortest time between two slots is their length, which must divide a day; what has no row is 0.

use std::collections::BTreeMap;

use supercloud_scheduler::{
    calendar::parse_utc,
    sun::{Demand, MOST_PLACES, MOST_SLOTS},
};

use crate::recorded::{RecordedError, name, rows};

/// Counts, with the names of their places.
#[derive(Debug, Clone, PartialEq)]
pub struct Loads {
    /// The places, in the order of the demand.
    pub places: Vec<String>,
    /// The counts.
    pub demand: Demand,
}

/// The longest time that a file may span, in slots: more than is kept, so that an old file that is only added to is not refused.
const MOST_SPAN: u64 = 100 * MOST_SLOTS as u64;

/// Reads counts.
///
/// # Errors
/// What is wrong and in which line.
pub fn loads(text: &str) -> Result<Loads, RecordedError> {
    const HEADER: &str = "timestamp_utc,place,requests";
    let mut counts: BTreeMap<&str, Vec<(u64, f64)>> = BTreeMap::new();
    let mut slot_ms = u64::MAX;
    let (mut first_ms, mut last_ms) = (None, 0);
    let mut last_line = 1;
    for row in rows::<3>(text, HEADER)? {
        let (line, [at, place, requests]) = row?;
        let wrong = |what: String| RecordedError::Line { line, what };
        let at_ms = parse_utc(at).ok_or_else(|| wrong("timestamp_utc must be YYYY-MM-DDTHH:MM:SSZ".into()))?;
        if first_ms.is_some() && at_ms < last_ms {
            return Err(wrong("the time goes back".into()));
        }
        if first_ms.is_some() && at_ms > last_ms {
            slot_ms = slot_ms.min(at_ms - last_ms);
        }
        first_ms.get_or_insert(at_ms);
        (last_ms, last_line) = (at_ms, line);
        let requests = requests.parse().ok().filter(|n| (0.0..=1e15).contains(n));
        let requests: f64 = requests.ok_or_else(|| wrong("requests must be a number from 0 to 10^15".into()))?;
        if !counts.contains_key(place) {
            name(line, "place", place)?;
            if counts.len() == MOST_PLACES {
                return Err(wrong(format!("more than {MOST_PLACES} places")));
            }
        }
        counts.entry(place).or_default().push((at_ms, requests));
    }
    let first_ms = first_ms.filter(|_| slot_ms < u64::MAX).ok_or(RecordedError::Empty)?;
    let wrong = |what: String| RecordedError::Line { line: last_line, what };
    let span = (last_ms - first_ms) / slot_ms + 1;
    if span > MOST_SPAN {
        return Err(wrong(format!("{span} slots of {slot_ms} ms are too many")));
    }
    // Only the newest are kept, so that no more than these are ever held.
    let gone = span.saturating_sub(MOST_SLOTS as u64);
    let of = |(place, rows): (&str, Vec<(u64, f64)>)| {
        let mut slots = vec![0.0; (span - gone) as usize];
        for (at_ms, requests) in rows {
            if !(at_ms - first_ms).is_multiple_of(slot_ms) {
                return Err(wrong(format!("slots of {place} are not all {slot_ms} ms apart")));
            }
            let slot = ((at_ms - first_ms) / slot_ms).checked_sub(gone).and_then(|slot| slots.get_mut(slot as usize));
            if let Some(slot) = slot {
                *slot += requests;
            }
        }
        Ok((place.to_owned(), slots))
    };
    let (places, counts) =
        counts.into_iter().map(of).collect::<Result<Vec<_>, _>>()?.into_iter().unzip::<_, _, Vec<_>, Vec<_>>();
    let demand = Demand::new(first_ms + gone * slot_ms, slot_ms, counts).map_err(|error| wrong(error.to_string()))?;
    Ok(Loads { places, demand })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_slots_and_what_is_missing_is_none() {
        let text = "timestamp_utc,place,requests\n2026-01-01T00:00:00Z,eu,5\n2026-01-01T00:00:00Z,us,1\n\
                    2026-01-01T00:15:00Z,us,2.5\n2026-01-01T00:45:00Z,eu,7\n";
        let loads = loads(text).unwrap();
        assert_eq!(loads.places, ["eu", "us"]);
        assert_eq!((loads.demand.slots(), loads.demand.slot_ms()), (4, 900_000));
        let last = loads.demand.forecast(Some(4), loads.demand.end_ms(), 4);
        assert_eq!(last, [[5.0, 0.0, 0.0, 7.0], [1.0, 2.5, 0.0, 0.0]]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let said = |rows: &str| loads(&format!("timestamp_utc,place,requests\n{rows}")).unwrap_err().to_string();
        let at = |time: &str| format!("2026-01-01T{time}:00Z,eu,1\n");
        assert!(loads("time\n").is_err());
        assert_eq!(said(&at("00:00")), "the file holds no data", "one slot has no length");
        for (rows, what) in [
            (at("01:00") + &at("00:00"), "line 3: the time goes back"),
            ("2026-01-01T00:00:00Z,eu,-1\n".into(), "line 2: requests must be"),
            ("2026-01-01T00:00:00Z,eu,NaN\n".into(), "line 2: requests must be"),
            ("2026-01-01T00:00:00Z,e u,1\n".into(), "line 2: place must be"),
            (at("00:00") + &at("00:07") + &at("00:18"), "not all 420000 ms apart"),
            (at("00:00") + &at("00:07") + &at("00:14"), "does not divide a day"),
            ("1970-01-01T00:00:00Z,eu,1\n".to_owned() + &at("00:00") + &at("00:01"), "too many"),
        ] {
            assert!(said(&rows).contains(what), "{}", said(&rows));
        }
    }
}
