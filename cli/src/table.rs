//! Tables: a header, rows, two spaces between columns; numbers are right-aligned.

use std::fmt::Write as _;

/// A table under construction.
#[derive(Debug, Clone, Default)]
pub struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
    /// The columns from this one on are only for those who ask for more.
    narrow: usize,
}

impl Table {
    /// A table with these columns.
    #[must_use]
    pub fn new<const N: usize>(header: [&str; N]) -> Self {
        Self { header: header.map(str::to_owned).to_vec(), rows: Vec::new(), narrow: N }
    }

    /// The same with columns that only [`Table::render_wide`] shows.
    #[must_use]
    pub fn and_wide<const N: usize>(mut self, header: [&str; N]) -> Self {
        self.header.extend(header.map(str::to_owned));
        self
    }

    /// Adds a row; missing cells are empty, further ones dropped.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.row_wide(cells, []);
    }

    /// Adds a row with what stands in the wide columns.
    pub fn row_wide<const N: usize, const M: usize>(&mut self, cells: [String; N], wide: [String; M]) {
        let mut cells = Vec::from(cells);
        cells.resize(self.narrow, String::new());
        cells.extend(wide);
        cells.resize(self.header.len(), String::new());
        self.rows.push(cells);
    }

    /// The text, ending with a line feed.
    #[must_use]
    pub fn render(&self) -> String {
        self.render_columns(self.narrow)
    }

    /// The text with all columns.
    #[must_use]
    pub fn render_wide(&self) -> String {
        self.render_columns(self.header.len())
    }

    fn render_columns(&self, columns: usize) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().map(|row| &row[column]).chain([&self.header[column]]);
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let is_number = |cell: &str| cell.starts_with(|c: char| c.is_ascii_digit());
        let is_numeric: Vec<bool> = (0..columns)
            .map(|column| {
                let mut filled =
                    self.rows.iter().map(|row| row[column].as_str()).filter(|cell| *cell != "-").peekable();
                filled.peek().is_some() && filled.all(is_number)
            })
            .collect();
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in std::iter::once(&self.header).chain(&self.rows) {
            let mut line = String::new();
            for ((cell, width), is_numeric) in row.iter().zip(&widths).zip(&is_numeric) {
                let pad = " ".repeat(width - cell.chars().count());
                let _infallible =
                    if *is_numeric { write!(line, "{pad}{cell}  ") } else { write!(line, "{cell}{pad}  ") };
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Bytes for people: `1.5 GiB`.
#[must_use]
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// Nano-dollars for people: `$0.0416`.
#[must_use]
pub fn usd(nanousd: u64) -> String {
    format!("${}.{:04}", nanousd / 1_000_000_000, nanousd % 1_000_000_000 / 100_000)
}

/// Milliseconds for people: `850 ms`, `12.3 s`, `4 min 05 s`.
#[must_use]
pub fn duration(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..120_000 => format!("{:.1} s", ms as f64 / 1000.0),
        _ => format!("{} min {:02} s", ms / 60_000, ms % 60_000 / 1000),
    }
}

/// A time of wall clock for people: UTC, `2026-01-31 12:34:56`.
#[must_use]
pub fn time(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Civil date from days (Howard Hinnant, "chrono-compatible low-level date algorithms").
    let z = days + 719_468;
    let era = z / 146_097;
    let doe = z % 146_097;
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", rest / 3600, rest % 3600 / 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(["NAME", "SIZE"]);
        table.row(["a".into(), "5 MiB".into()]);
        table.row(["longer".into(), "100 MiB".into()]);
        assert_eq!(table.render(), "NAME       SIZE\na         5 MiB\nlonger  100 MiB\n");
    }

    #[test]
    fn wide_columns_are_for_who_asks() {
        let mut table = Table::new(["NAME"]).and_wide(["ID", "AT"]);
        table.row_wide(["a".into()], ["gst-1".into(), "5".into()]);
        table.row(["longer".into()]);
        assert_eq!(table.render(), "NAME\na\nlonger\n");
        assert_eq!(table.render_wide(), "NAME    ID     AT\na       gst-1  5\nlonger\n");
    }

    #[test]
    fn figures_are_for_people() {
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(usd(41_600_000), "$0.0416");
        assert_eq!(duration(245_000), "4 min 05 s");
        assert_eq!(time(1_700_000_000_000), "2023-11-14 22:13:20");
        assert_eq!(time(951_782_400_000), "2000-02-29 00:00:00");
    }
}
