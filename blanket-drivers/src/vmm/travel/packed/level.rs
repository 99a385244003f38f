//! How hard pages are compressed: an estimate of what the processor and the link take, and the choice. Pure.

use std::time::Duration;

/// How hard: a level of zstd, or not at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(usize);

/// What levels cost, as multiples of the first one's: level of zstd (0: raw), time of the processor, bytes. Measured on 48 MiB of
/// programs and libraries; what they are multiples of is measured on the way.
///
/// Levels 5 to 7 (3.6 to 7.5 times the time, 0.77 to 0.73 of the bytes) are left out: where processors are short the link is served
/// late, and looks slow, and who then compresses harder takes away more of what is short.
const LADDER: [(i32, f64, f64); 4] = [(0, 0.02, f64::NAN), (1, 1.0, 1.0), (2, 1.2, 0.88), (3, 1.8, 0.84)];

impl Level {
    /// What is begun with: right for links of some hundred Mbit/s.
    pub const FIRST: Self = Self(3);
    /// Not at all.
    pub const RAW: Self = Self(0);

    /// All, the cheapest first.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..LADDER.len()).map(Self)
    }

    /// zstd's number of it; `None`: not compressed.
    #[must_use]
    pub const fn zstd(self) -> Option<i32> {
        match LADDER[self.0].0 {
            0 => None,
            level => Some(level),
        }
    }
}

/// What was seen of some pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seen {
    /// Bytes of pages that could be compressed, as they are.
    pub plain_bytes: u64,
    /// What became of them.
    pub packed_bytes: u64,
    /// What went over the link meanwhile: these and others.
    pub sent_bytes: u64,
    /// How long all pages took otherwise: to be read, compared, told from noise.
    pub reading: Duration,
    /// How long compressing them took.
    pub packing: Duration,
    /// How long it was waited for the link: see [`waited`].
    pub waiting: Duration,
}

impl Seen {
    /// Both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            plain_bytes: self.plain_bytes.saturating_add(other.plain_bytes),
            packed_bytes: self.packed_bytes.saturating_add(other.packed_bytes),
            sent_bytes: self.sent_bytes.saturating_add(other.sent_bytes),
            reading: self.reading.saturating_add(other.reading),
            packing: self.packing.saturating_add(other.packing),
            waiting: self.waiting.saturating_add(other.waiting),
        }
    }
}

/// What handing bytes to the system takes when it has room for them: so long for each write, and a nanosecond for each byte. That is
/// generous: a link of 1 GB/s is faster than any compressor here.
const HAND_OVER: Duration = Duration::from_micros(50);

/// How much of a write of so many bytes, which took so long, was waiting for the link: all, or nothing where it was no more than copying
/// them.
#[must_use]
pub fn waited(bytes: u64, took: Duration) -> Duration {
    if took > HAND_OVER.saturating_add(Duration::from_nanos(bytes)) { took } else { Duration::ZERO }
}

/// Waiting for less than this share of the time is not waiting for the link.
const IS_WAITING: f64 = 0.05;
/// A link that was never waited for is taken for one that needs so much of the time, and one that was waited for before for one that
/// became faster by so little.
const FASTER: [f64; 2] = [0.25, 0.97];
/// The compressor shall be busy for no more than this share of the time that the link takes.
const BUSY: f64 = 0.95;
/// Fewer bytes are worth so much more time than it takes at best: bytes between clouds are paid for.
const THRIFT: f64 = 1.1;
/// With another level what the compressor has learnt is lost: one that is slower or larger by no more than this is kept.
const NEAR: [f64; 2] = [1.05, 1.02];
/// Plain bytes after which it is chosen for the first time, and after each choice.
const FIRST_AFTER: u64 = 1 << 20;
const AFTER: u64 = 4 << 20;

/// The estimate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    level: Level,
    /// What the first level would take for a byte, in seconds, and would make of it.
    cost: f64,
    share: f64,
    /// What a byte takes at any level before it is compressed, in seconds.
    reading: f64,
    /// What the link takes for a byte, in seconds, as far as it is known.
    link: f64,
    was_waiting: bool,
    /// Since the last choice.
    seen: Seen,
    after: u64,
}

impl Default for Estimate {
    fn default() -> Self {
        // Until it is known: 250 MB/s, and a third.
        Self {
            level: Level::FIRST,
            cost: 4e-9,
            share: 0.35,
            reading: 1e-9,
            link: f64::MAX,
            was_waiting: false,
            seen: Seen::default(),
            after: FIRST_AFTER,
        }
    }
}

impl Estimate {
    /// The level of the moment.
    #[must_use]
    pub const fn level(&self) -> Level {
        self.level
    }

    /// What a level makes of so much, as a share; raw is as it is, whatever the pages are.
    fn size(&self, level: Level) -> f64 {
        let times = LADDER[level.0].2;
        if times.is_nan() { 1.0 } else { (self.share * times).min(1.0) }
    }

    /// Takes note, and chooses when enough was seen.
    pub fn observe(&mut self, seen: Seen) -> Level {
        self.seen = self.seen.and(seen);
        if self.seen.plain_bytes < self.after {
            return self.level;
        }
        let seen = std::mem::take(&mut self.seen);
        self.after = AFTER;
        let (_, cost, size) = LADDER[self.level.0];
        if self.level != Level::RAW {
            // Half new, half of before.
            let plain = seen.plain_bytes as f64;
            self.cost = f64::midpoint(self.cost, seen.packing.as_secs_f64() / plain / cost);
            self.share = f64::midpoint(self.share, seen.packed_bytes as f64 / plain / size).clamp(0.001, 1.0);
        }
        let [reading, packing, waiting] = [seen.reading, seen.packing, seen.waiting].map(|took| took.as_secs_f64());
        self.reading = f64::midpoint(self.reading, reading / seen.plain_bytes.max(1) as f64);
        // The link goes on meanwhile with what it has.
        let all = reading + packing + waiting;
        let now = all / seen.sent_bytes.max(1) as f64;
        // Who waits for the link sees how fast it is; else it is faster than that, and by how much is found out step by step.
        if waiting >= IS_WAITING * all {
            (self.link, self.was_waiting) = (now, true);
        } else {
            self.link = self.link.min(now) * FASTER[usize::from(self.was_waiting)];
        }
        self.level = self.best();
        self.level
    }

    /// Seconds for a byte of pages at a level: what takes longer of the two.
    fn seconds(&self, level: Level) -> f64 {
        ((self.reading + self.cost * LADDER[level.0].1) / BUSY).max(self.size(level) * self.link)
    }

    fn best(&self) -> Level {
        let fastest = Level::all().map(|level| self.seconds(level)).fold(f64::MAX, f64::min);
        let is_fast = |level: &Level| self.seconds(*level) <= fastest * THRIFT;
        let best = Level::all().filter(is_fast).last().unwrap_or(self.level);
        let is_near = self.seconds(self.level) <= fastest * THRIFT * NEAR[0]
            && self.size(self.level) <= self.size(best) * NEAR[1];
        if is_near { self.level } else { best }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// So many MiB over a link, through a compressor of which the first level takes `cost` seconds a byte and makes `share` of it, and
    /// all others are by these factors off what the ladder says; seconds it takes, and the last level.
    fn drive(mib: u64, link: f64, cost: f64, share: f64, off: [f64; 2], fixed: Option<Level>) -> (f64, Level) {
        let mut estimate = Estimate::default();
        let mut took = 0.0;
        for _ in 0..mib * 8 {
            let level = fixed.unwrap_or(estimate.level());
            let plain = f64::from(128 << 10);
            let (_, times, size) = LADDER[level.0];
            let packing = if level == Level::RAW { 0.0 } else { plain * cost * (1.0 + (times - 1.0) * off[0]) };
            let size = if size.is_nan() { 1.0 } else { share * (1.0 + (size - 1.0) * off[1]) };
            let sent = plain * size.min(1.0);
            // What is sent waits in a buffer of its own while the next is compressed; bringing it there takes a while as well.
            let reading = plain * 1.5e-9;
            let writing = (sent / link - packing - reading).max(0.0) + 20e-6 + 0.5e-9 * sent;
            took += reading + packing + writing;
            estimate.observe(Seen {
                plain_bytes: 128 << 10,
                packed_bytes: sent as u64,
                sent_bytes: sent as u64,
                reading: Duration::from_secs_f64(reading),
                packing: Duration::from_secs_f64(packing),
                waiting: waited(sent as u64, Duration::from_secs_f64(writing)),
            });
        }
        (took, fixed.unwrap_or(estimate.level()))
    }

    #[test]
    fn slow_links_get_fewer_bytes_and_fast_ones_no_delay() {
        let level = |mbit: f64| drive(64, mbit * 125_000.0, 4e-9, 0.37, [1.0, 1.0], None).1.zstd();
        let levels: Vec<_> = [10.0, 100.0, 300.0, 1000.0, 10_000.0, 40_000.0].map(level).into();
        println!("{levels:?}");
        assert_eq!(levels[..3], [Some(3); 3]);
        assert!(levels[3] >= Some(1) && levels[5].is_none(), "{levels:?}");
        assert!(levels.is_sorted_by(|a, b| a >= b), "{levels:?}");
        // Also where copying the bytes takes a tenth of the time that compressing them takes.
        assert_eq!(drive(64, 5e9, 1.5e-9, 0.37, [1.0, 1.0], None).1, Level::RAW);
    }

    proptest! {
        /// Never much slower than the best that is fixed beforehand, whatever the link, the processor and the pages are.
        #[test]
        fn it_is_about_as_fast_as_the_best_level(
            mbit in (1.0f64..4.3).prop_map(|log| 10f64.powf(log)), ns in 1.0f64..60.0, share in 0.02f64..1.0, off in [0.7f64..1.4, 0.8f64..1.2],
        ) {
            let run = |fixed| drive(256, mbit * 125_000.0, ns * 1e-9, share, off, fixed);
            let (took, level) = run(None);
            let best = Level::all().map(|level| run(Some(level)).0).fold(f64::MAX, f64::min);
            // What is not known is found out with some MiB at what was begun with.
            let first = drive(40, mbit * 125_000.0, ns * 1e-9, share, off, Some(Level::FIRST)).0;
            prop_assert!(took <= best * 1.4 + first, "{took} s at last at {level:?}, the best {best} s");
        }

        #[test]
        fn nothing_makes_it_stumble(seen in proptest::collection::vec(any::<[u64; 6]>(), 0..50)) {
            let mut estimate = Estimate::default();
            for [plain_bytes, packed_bytes, sent_bytes, took @ ..] in seen {
                let [reading, packing, waiting] = took.map(Duration::from_nanos);
                estimate.observe(Seen { plain_bytes, packed_bytes, sent_bytes, reading, packing, waiting });
                prop_assert!([estimate.cost, estimate.share, estimate.reading].iter().all(|figure| figure.is_finite()));
            }
        }
    }
}
