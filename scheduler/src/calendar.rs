//! UTC dates without a clock: recorded markets name their times, reports name their months.
//!
//! The conversions are Howard Hinnant's `days_from_civil` and `civil_from_days` (proleptic Gregorian calendar).

/// Milliseconds in a day.
const DAY_MS: u64 = 86_400_000;

/// Days from 1970-01-01 to a date of the years 1970 to 9999; `None` when there is no such date.
#[must_use]
pub fn days_from_civil(year: u32, month: u32, day: u32) -> Option<u64> {
    let is_leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let length = match month {
        1 | 3 | 5 | 7 | 8 | 10 | 12 => 31,
        4 | 6 | 9 | 11 => 30,
        2 => 28 + u32::from(is_leap),
        _ => return None,
    };
    if !(1970..=9999).contains(&year) || day == 0 || day > length {
        return None;
    }
    // Years begin in March, so that the leap day is the last of its year.
    let shifted = u64::from(if month <= 2 { year - 1 } else { year });
    let (era, of_era) = (shifted / 400, shifted % 400);
    let of_year = u64::from((153 * ((month + 9) % 12) + 2) / 5 + day - 1);
    Some(era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468)
}

/// The year and month in which a time (milliseconds since 1970, UTC) lies.
#[must_use]
pub fn month_of(unix_ms: u64) -> (u64, u32) {
    let days = unix_ms / DAY_MS + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), u32::try_from(month).unwrap_or(12))
}

/// The time of `YYYY-MM-DDTHH:MM:SSZ` in milliseconds since 1970; `None` when the text is of another form.
#[must_use]
pub fn parse_utc(text: &str) -> Option<u64> {
    let bytes = text.as_bytes();
    if bytes.len() != 20
        || [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':'), (19, b'Z')].iter().any(|(i, b)| bytes[*i] != *b)
    {
        return None;
    }
    let number = |from: usize, to: usize| -> Option<u32> {
        bytes[from..to].iter().try_fold(0, |sum, b| b.is_ascii_digit().then(|| sum * 10 + u32::from(b - b'0')))
    };
    let days = days_from_civil(number(0, 4)?, number(5, 7)?, number(8, 10)?)?;
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    Some(days * DAY_MS + u64::from(hour * 3600 + minute * 60 + second) * 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_days_are_known() {
        assert_eq!(parse_utc("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(parse_utc("2015-03-11T10:34:42Z"), Some(1_426_070_082_000));
        assert_eq!(parse_utc("2000-02-29T23:59:59Z"), Some(951_868_799_000));
        for bad in
            ["2015-02-29T00:00:00Z", "2015-03-11 10:34:42Z", "2015-13-01T00:00:00Z", "2015-03-11T24:00:00Z", "", "é"]
        {
            assert_eq!(parse_utc(bad), None, "{bad}");
        }
    }

    #[test]
    fn every_day_of_four_centuries_is_counted_once_and_lies_in_its_month() {
        let mut expected = days_from_civil(1970, 1, 1).unwrap();
        for year in 1970..2400 {
            for month in 1..=12 {
                for day in 1..=31 {
                    let Some(days) = days_from_civil(year, month, day) else { continue };
                    assert_eq!(days, expected);
                    assert_eq!(month_of(days * DAY_MS + DAY_MS - 1), (u64::from(year), month));
                    expected += 1;
                }
            }
        }
    }
}
