//! How values of options are read.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use supercloud_api::{HistoryBand, OnLoss, Role, Shape};

/// Reads a role by its name in the API; the help lists them.
pub fn roles() -> impl TypedValueParser<Value = Role> {
    PossibleValuesParser::new(["viewer", "policy", "operator", "admin"])
        .try_map(|text| serde_json::from_value::<Role>(serde_json::Value::String(text)))
}

/// What is done for a lost guest.
pub fn on_loss() -> impl TypedValueParser<Value = OnLoss> {
    PossibleValuesParser::new(["nothing", "restart-from-volume", "thaw-checkpoint"])
        .try_map(|text| serde_json::from_value::<OnLoss>(serde_json::Value::String(text.replace('-', "_"))))
}

/// Reads a shape: vCPUs, `x`, memory in MiB, or with `M` or `G`.
pub fn shape(text: &str) -> Result<Shape, String> {
    let wrong = || format!("'{text}' is no shape: write vCPUs, x and memory, as in 2x1024 (MiB) or 2x4G");
    let (vcpus, memory) = text.split_once('x').ok_or_else(wrong)?;
    let memory_bytes = mebibytes(memory).ok_or_else(wrong)?;
    Ok(Shape { vcpus: vcpus.parse().map_err(|_| wrong())?, memory_bytes })
}

/// Reads a size: a number with `M` (MiB), `G` or `T`.
pub fn size(text: &str) -> Result<u64, String> {
    let is_with_unit = text.ends_with(['M', 'G', 'T']);
    let bytes = mebibytes(text).filter(|_| is_with_unit);
    bytes.ok_or_else(|| format!("'{text}' is no size: write a whole number with M (MiB), G or T, as in 512M or 10G"))
}

/// Whole MiB, or with `M`, `G` or `T`; in bytes.
fn mebibytes(text: &str) -> Option<u64> {
    let units = [('M', 1u64 << 20), ('G', 1 << 30), ('T', 1 << 40)];
    let found = units.iter().find_map(|(letter, unit)| Some((text.strip_suffix(*letter)?, *unit)));
    let (number, unit) = found.unwrap_or((text, 1 << 20));
    // `parse` by itself takes a plus sign.
    let is_plain = number.bytes().all(|byte| byte.is_ascii_digit());
    number.parse::<u64>().ok().filter(|_| is_plain)?.checked_mul(unit)
}

/// Reads a span of time, in seconds: a number with `s`, `m`, `h` or `d`.
pub fn span_s(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no span of time: write a whole number with s, m, h or d, as in 90s or 15m");
    let units = [('s', 1u64), ('m', 60), ('h', 3600), ('d', 86_400)];
    let found = units.iter().find_map(|(letter, unit)| Some((text.strip_suffix(*letter)?, *unit)));
    let (number, unit) = found.ok_or_else(wrong)?;
    digits(number).and_then(|number| number.checked_mul(unit)).ok_or_else(wrong)
}

/// Reads a band of a history: `4h:15m`.
pub fn band(text: &str) -> Result<HistoryBand, String> {
    let wrong = || format!("'{text}' is no band: write an age and a gap, as in 4h:15m");
    let (age, gap) = text.split_once(':').ok_or_else(wrong)?;
    Ok(HistoryBand { for_s: span_s(age)?, every_s: span_s(gap)? })
}

/// Reads a time, in milliseconds since 1970: those, or `2026-11-22T08:30:00` (UTC; a `Z` at the end, a blank for the `T` and a
/// time without seconds are taken, too).
pub fn time(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no time: write it as 2026-11-22T08:30:00 (UTC), or in milliseconds since 1970");
    if let Some(ms) = digits(text) {
        return Ok(ms);
    }
    let text = text.strip_suffix('Z').unwrap_or(text);
    let (date, clock) = text.split_once(['T', ' ']).ok_or_else(wrong)?;
    let numbers = |text: &str, separator: char| -> Option<Vec<u64>> { text.split(separator).map(digits).collect() };
    let (date, clock) = (numbers(date, '-').ok_or_else(wrong)?, numbers(clock, ':').ok_or_else(wrong)?);
    let (&[year, month, day], &[hour, minute, ref rest @ ..]) = (&date[..], &clock[..]) else { return Err(wrong()) };
    let second = match rest {
        [] => 0,
        [second] => *second,
        _ => return Err(wrong()),
    };
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days_of = |month| match month {
        2 => 28 + u64::from(is_leap),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    };
    let is_right = (1970..10_000).contains(&year)
        && (1..=12).contains(&month)
        && (1..=days_of(month)).contains(&day)
        && hour < 24
        && minute < 60
        && second < 60;
    if !is_right {
        return Err(wrong());
    }
    // Days from a civil date (Howard Hinnant, "chrono-compatible low-level date algorithms").
    let year = year - u64::from(month <= 2);
    let (era, of_era) = (year / 400, year % 400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    Ok(((days * 24 + hour) * 60 + minute) * 60_000 + second * 1000)
}

/// A whole number without a sign.
fn digits(text: &str) -> Option<u64> {
    // `parse` by itself takes a plus sign.
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_they_are_written() {
        use supercloud_cli::table;
        for ms in [0, 951_782_399_000, 951_782_400_000, 951_868_800_000, 1_795_336_200_000, 253_402_300_799_000] {
            let text = table::time(ms);
            assert_eq!(time(&text), Ok(ms), "{text}");
            assert_eq!(time(&format!("{}Z", text.replace(' ', "T"))), Ok(ms));
        }
        assert_eq!(time("2026-11-22T08:30"), Ok(1_795_336_200_000));
        assert_eq!(time("1795336200000"), Ok(1_795_336_200_000));
        let wrong = ["", "x", "-1", "+1", "2026-11-22", "2026-02-29T00:00", "2026-13-01T00:00", "2026-11-22T24:00"];
        for wrong in wrong.into_iter().chain(["2026-11-22T08:60", "1969-12-31T23:59", "2026-11-22T08:30:00:00"]) {
            assert!(time(wrong).is_err(), "{wrong}");
        }
        assert_eq!(
            (span_s("90s"), span_s("15m"), span_s("2h"), span_s("7d")),
            (Ok(90), Ok(900), Ok(7200), Ok(604_800))
        );
        assert!(["", "m", "5", "-5m", "+5m", "1.5h", "99999999999999999999d"].iter().all(|text| span_s(text).is_err()));
        assert_eq!(band("4h:15m"), Ok(HistoryBand { for_s: 14_400, every_s: 900 }));
        assert!(["", "4h", "4h:", ":15m", "4h:15m:1m"].iter().all(|text| band(text).is_err()));
    }

    #[test]
    fn a_shape_is_one_word() {
        let good = |vcpus, memory_bytes| Ok(Shape { vcpus, memory_bytes });
        assert_eq!(shape("2x1024"), good(2, 1 << 30));
        assert_eq!(shape("1x512M"), good(1, 512 << 20));
        assert_eq!(shape("16x64G"), good(16, 64 << 30));
        for wrong in ["", "2", "x", "2x", "x4G", "2x4P", "2x-1", "-1x4", "2x99999999999999G", "2 x 4G"] {
            assert!(shape(wrong).is_err(), "{wrong}");
        }
        assert_eq!((size("10G"), size("512M"), size("2T")), (Ok(10 << 30), Ok(512 << 20), Ok(2 << 40)));
        for wrong in ["", "G", "10", "10 G", "1.5G", "+1G", "-1G", "99999999999T"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
