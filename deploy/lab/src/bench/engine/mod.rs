//! `migration`: the move of our own VMM beside QEMU's, at this machine's own speed.
//!
//! One small guest ([`program`]) with a ramdisk that becomes its memory is moved from process to process over one link that both
//! go through ([`wire`]), by pre-copy, with the same limit of downtime; both in plain, the destination knowing nothing beforehand. QEMU
//! with its defaults, and with each setting that makes it better at something; ours also as to a host that has not been upgraded.

pub mod processor;
pub mod program;
pub mod sides;
pub mod wire;

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, ensure};

use self::program::Load;
use self::sides::{Moved, NEWEST, OLDER, Setting, Work};
use self::wire::Link;
use super::Row;
use super::stats::Sample;
use crate::demo::tell::Teller;

const MEMORY_MIB: u64 = 96;
/// What the guest's memory is made of.
const CONTENT_BYTES: u64 = 48 << 20;

/// How much a guest writes, in hundredths of what the link takes: as asked for. What it does is printed.
const CASES: [(&str, u64); 4] = [("idle", 2), ("25%", 25), ("75%", 75), ("150%", 150)];
/// A link, and how many pages are written again and again: what of them is dirty must fit into the downtime in the end, also raw.
const LINKS: [(&str, Link, u32); 2] = [
    ("300M-1ms", Link { bits_per_s: 300_000_000, delay: Duration::from_micros(500) }, 2048),
    ("100M-40ms", Link { bits_per_s: 100_000_000, delay: Duration::from_millis(20) }, 768),
];
/// What a page and a turn of the delay's loop cost where `/dev/kvm` emulates the guest instruction by instruction, in
/// nanoseconds; elsewhere guests write faster than they are asked to.
const PAGE_NS: u64 = 41_000;
const TURN_NS: u64 = 2_700;
/// About this long between two ticks.
const TICK_NS: u64 = 10_000_000;

/// What makes a guest write so much of what a link takes.
fn load(link: Link, pages: u32, percent: u64) -> Load {
    let page_ns = PAGE_BITS * 1_000_000_000 / (link.bits_per_s * percent / 100);
    let delay = u32::try_from(page_ns.saturating_sub(PAGE_NS) / TURN_NS).unwrap_or(u32::MAX);
    let pages_per_tick = u32::try_from(TICK_NS / page_ns).unwrap_or(1).clamp(1, 1024);
    Load { pages, delay, pages_per_tick: 1 << pages_per_tick.ilog2() }
}

const PAGE_BITS: u64 = 4096 * 8;

/// Measures each side `runs` times in each case whose name (`300M-1ms/idle`) has one of these words in it; in all when there is none.
///
/// # Errors
/// When a part does not do what it shall, or nothing runs on `/dev/kvm`.
pub fn run(runs: u32, only: &[String]) -> anyhow::Result<Vec<Row>> {
    let tell = Teller::default();
    let folder = std::env::temp_dir().join(format!("supercloud-engine-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let measured = measure(&folder, runs, only, tell);
    std::fs::remove_dir_all(&folder)?;
    measured
}

fn measure(folder: &Path, runs: u32, only: &[String], tell: Teller) -> anyhow::Result<Vec<Row>> {
    let program = std::env::current_exe()?.with_file_name("supercloud-vmm");
    ensure!(program.exists(), "{} is not there: cargo build", program.display());
    let version = std::process::Command::new("qemu-system-x86_64").arg("--version").output().context("asking QEMU")?;
    let version = String::from_utf8_lossy(&version.stdout);
    let peer = version.split_whitespace().nth(3).map_or_else(|| "QEMU".to_owned(), |number| format!("QEMU {number}"));
    let ramdisk = folder.join("content");
    std::fs::write(&ramdisk, content()?)?;
    let mut rows = Vec::new();
    for (link_name, link, pages) in LINKS {
        for (case, percent) in CASES {
            let case = format!("{link_name}/{case}");
            if !only.is_empty() && !only.iter().any(|word| case.contains(word.as_str())) {
                continue;
            }
            let load = load(link, pages, percent);
            let kernel = folder.join("guest");
            std::fs::write(&kernel, program::elf(load))?;
            let (ramdisk, pages_per_tick) = (ramdisk.clone(), load.pages_per_tick);
            let work = Work { kernel, ramdisk, memory_mib: MEMORY_MIB, link, pages_per_tick };
            let [mut ours, mut older] = [Vec::new(), Vec::new()];
            let mut theirs = Setting::ALL.map(|setting| (setting, Vec::new()));
            for run in 0..runs {
                for (moves, reads) in [(&mut ours, NEWEST), (&mut older, OLDER)] {
                    let moved = sides::ours(&program, folder, &work, reads);
                    moves.push(moved.with_context(|| format!("our move {run}, {case}, stream {reads}"))?);
                }
                for (setting, moves) in &mut theirs {
                    let moved = sides::qemu(folder, &work, *setting);
                    moves.push(moved.with_context(|| format!("QEMU's move {run}, {case}, {}", setting.name()))?);
                }
            }
            let dirtied = |moves: &[Moved]| {
                sample(moves, |moved| moved.dirty_bytes_per_s * 800.0 / link.bits_per_s as f64).median().unwrap_or(0.0)
            };
            let by_qemu = dirtied(&theirs.iter().flat_map(|(_, moves)| moves.clone()).collect::<Vec<_>>());
            tell.say(&format!("{case}: dirtied {:.0} % of the link in ours, {by_qemu:.0} % in QEMU", dirtied(&ours)));
            rows.extend(compare(&case, [&ours, &older], &theirs, &peer)?);
        }
    }
    ensure!(!rows.is_empty(), "no case has a name like that; there are 300M-1ms/idle, 100M-40ms/25% and such");
    Ok(judged(rows, runs))
}

/// Fewer moves of each side say whether a part works, and nothing about a target.
const TELLING_RUNS: u32 = 7;

fn judged(rows: Vec<Row>, runs: u32) -> Vec<Row> {
    if runs >= TELLING_RUNS { rows } else { rows.into_iter().map(Row::without_target).collect() }
}

/// The rows of a case: against QEMU's defaults, against the best of its settings for each figure, and against the older stream.
fn compare(
    case: &str,
    [ours, older]: [&[Moved]; 2],
    theirs: &[(Setting, Vec<Moved>)],
    peer: &str,
) -> anyhow::Result<Vec<Row>> {
    let figures: [(&str, Figure, Option<f64>); 4] = [
        ("bytes", |moved| moved.bytes, Some(0.5)),
        ("total_ms", |moved| moved.total_ms, Some(0.6)),
        ("downtime_ms", |moved| moved.downtime_ms, Some(0.5)),
        ("cpu_ms", |moved| moved.cpu_ms, None),
    ];
    let mut rows = Vec::new();
    for (metric, figure, share) in figures {
        let name = format!("migration/{case}/{metric}");
        let samples = theirs.iter().map(|(setting, moves)| (*setting, sample(moves, figure)));
        let samples: Vec<(Setting, Sample)> = samples.collect();
        let mut row =
            |setting: Setting, sample_of: &Sample, make: &dyn Fn(&str, &Sample, &Sample, &str) -> Option<Row>| {
                let row = make(&name, &sample(ours, figure), sample_of, &format!("{peer}, {}", setting.name()));
                row.with_context(|| format!("{name} was not measured")).map(|row| rows.push(row))
            };
        let median = |sample: &Sample| sample.median().unwrap_or(f64::MAX);
        let best = samples.iter().min_by(|(_, a), (_, b)| median(a).total_cmp(&median(b)));
        for (setting, of) in samples.iter().filter(|(setting, _)| *setting == Setting::Defaults) {
            match share {
                Some(share) => row(*setting, of, &|name, a, b, peer| Row::at_most(name, a, b, peer, share))?,
                None => row(*setting, of, &Row::beside)?,
            }
        }
        if let Some((setting, of)) = best.filter(|(setting, _)| *setting != Setting::Defaults) {
            match metric {
                "bytes" => row(*setting, of, &|name, a, b, peer| Row::at_most(name, a, b, peer, 0.8))?,
                "cpu_ms" => row(*setting, of, &Row::beside)?,
                _ => row(*setting, of, &Row::no_slower)?,
            }
        }
        let row = Row::beside(&name, &sample(ours, figure), &sample(older, figure), "our older stream");
        rows.push(row.with_context(|| format!("{name} was not measured"))?);
    }
    Ok(rows)
}

/// One figure of a move.
type Figure = fn(&Moved) -> f64;

fn sample(moves: &[Moved], figure: impl Fn(&Moved) -> f64) -> Sample {
    moves.iter().map(figure).collect()
}

/// What a guest's memory may hold: programs and libraries of this machine, as in a page cache.
fn content() -> anyhow::Result<Vec<u8>> {
    let mut files: Vec<PathBuf> = std::fs::read_dir("/usr/lib/x86_64-linux-gnu")?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.is_file() && path.to_string_lossy().contains(".so"))
        .collect();
    files.sort();
    let mut bytes = Vec::new();
    for file in files {
        let left = CONTENT_BYTES.saturating_sub(bytes.len() as u64);
        std::fs::File::open(file)?.take(left).read_to_end(&mut bytes)?;
        // Files begin at pages in a page cache.
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
    }
    ensure!(bytes.len() as u64 >= CONTENT_BYTES, "there are too few libraries here to fill a guest's memory");
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_of_the_peers_settings_is_a_row_of_its_own() {
        let moved = |bytes: f64, total_ms: f64| Moved {
            total_ms,
            downtime_ms: 100.0,
            bytes,
            dirty_bytes_per_s: 1.0,
            cpu_ms: 50.0,
        };
        let all = |bytes, total_ms| vec![moved(bytes, total_ms); 3];
        let theirs = [
            (Setting::Defaults, all(100.0, 90.0)),
            (Setting::MultifdZstd, all(40.0, 100.0)),
            (Setting::Xbzrle, all(90.0, 95.0)),
        ];
        let rows = compare("x", [&all(33.0, 95.0), &all(50.0, 94.0)], &theirs, "QEMU").unwrap();
        let said: Vec<_> =
            rows.iter().map(|row| (row.metric.as_str(), row.peer, row.target.as_str(), row.holds)).collect();
        let expected = [
            ("migration/x/bytes", Some(100.0), "<= 0.5x", true),
            ("migration/x/bytes", Some(40.0), "<= 0.8x", false),
            ("migration/x/bytes", Some(50.0), "none", true),
            ("migration/x/total_ms", Some(90.0), "<= 0.6x", false),
            ("migration/x/total_ms", Some(94.0), "none", true),
            ("migration/x/downtime_ms", Some(100.0), "<= 0.5x", false),
            ("migration/x/downtime_ms", Some(100.0), "none", true),
            ("migration/x/cpu_ms", Some(50.0), "none", true),
            ("migration/x/cpu_ms", Some(50.0), "none", true),
        ];
        assert_eq!(said, expected);
        assert_eq!(judged(rows.clone(), 7), rows);
        assert!(judged(rows, 6).iter().all(|row| row.target == "none" && row.holds));
    }

    #[test]
    fn slower_links_and_idler_guests_wait_longer() {
        for (_, link, pages) in LINKS {
            let loads: Vec<Load> = CASES.iter().map(|(_, percent)| load(link, pages, *percent)).collect();
            assert!(loads.is_sorted_by(|a, b| a.delay > b.delay), "{loads:?}");
            assert!(loads.iter().all(|load| load.pages_per_tick.is_power_of_two()));
        }
    }
}
