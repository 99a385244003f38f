//! `migration`: the move of our own VMM beside QEMU's, at this machine's own speed.
//!
//! One small guest ([`program`]) with a ramdisk that becomes its memory is moved from process to process over one link that both
//! go through ([`wire`]), by pre-copy, with the same limit of downtime; both in plain, the destination knowing nothing beforehand.

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
use self::sides::{Moved, Work};
use self::wire::Link;
use super::Row;
use super::stats::Sample;
use crate::demo::tell::Teller;

const MEMORY_MIB: u64 = 96;
/// What the guest's memory is made of.
const CONTENT_BYTES: u64 = 48 << 20;

/// How much a guest writes, of what the link takes.
const CASES: [(&str, Load); 4] = [
    ("idle", Load { pages: 1024, delay: 1000, pages_per_tick: 1 }),
    ("25%", Load { pages: 2048, delay: 34, pages_per_tick: 16 }),
    ("75%", Load { pages: 2048, delay: 10, pages_per_tick: 64 }),
    ("150%", Load { pages: 2048, delay: 3, pages_per_tick: 128 }),
];
const LINKS: [(&str, Link); 2] = [
    ("300M-1ms", Link { bits_per_s: 300_000_000, delay: Duration::from_micros(500) }),
    ("100M-40ms", Link { bits_per_s: 100_000_000, delay: Duration::from_millis(20) }),
];

/// Measures each side `runs` times in each case.
///
/// # Errors
/// When a part does not do what it shall, or nothing runs on `/dev/kvm`.
pub fn run(runs: u32) -> anyhow::Result<Vec<Row>> {
    let tell = Teller::default();
    let folder = std::env::temp_dir().join(format!("supercloud-engine-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let measured = measure(&folder, runs, tell);
    std::fs::remove_dir_all(&folder)?;
    measured
}

fn measure(folder: &Path, runs: u32, tell: Teller) -> anyhow::Result<Vec<Row>> {
    let program = std::env::current_exe()?.with_file_name("supercloud-vmm");
    ensure!(program.exists(), "{} is not there: cargo build", program.display());
    let version = std::process::Command::new("qemu-system-x86_64").arg("--version").output().context("asking QEMU")?;
    let version = String::from_utf8_lossy(&version.stdout);
    let peer = version.split_whitespace().nth(3).map_or_else(|| "QEMU".to_owned(), |number| format!("QEMU {number}"));
    let ramdisk = folder.join("content");
    std::fs::write(&ramdisk, content()?)?;
    let mut rows = Vec::new();
    for (link_name, link) in LINKS {
        for (case, load) in CASES {
            let kernel = folder.join("guest");
            std::fs::write(&kernel, program::elf(load))?;
            let work = Work {
                kernel,
                ramdisk: ramdisk.clone(),
                memory_mib: MEMORY_MIB,
                link,
                pages_per_tick: load.pages_per_tick,
            };
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            for run in 0..runs {
                ours.push(sides::ours(&program, folder, &work).with_context(|| format!("our move {run}, {case}"))?);
                theirs.push(sides::qemu(folder, &work).with_context(|| format!("QEMU's move {run}, {case}"))?);
            }
            let dirtied = |moves: &[Moved]| {
                sample(moves, |moved| moved.dirty_bytes_per_s * 800.0 / link.bits_per_s as f64).median().unwrap_or(0.0)
            };
            tell.say(&format!(
                "{link_name} {case}: dirtied {:.0} % of the link in ours, {:.0} % in QEMU",
                dirtied(&ours),
                dirtied(&theirs)
            ));
            let figures: [(&str, fn(&Moved) -> f64, f64); 3] = [
                ("bytes", |moved| moved.bytes, 0.5),
                ("total_ms", |moved| moved.total_ms, 0.6),
                ("downtime_ms", |moved| moved.downtime_ms, 0.5),
            ];
            for (metric, figure, share) in figures {
                let name = format!("migration/{link_name}/{case}/{metric}");
                let row = Row::at_most(&name, &sample(&ours, figure), &sample(&theirs, figure), &peer, share);
                rows.push(row.with_context(|| format!("{name} was not measured"))?);
            }
        }
    }
    Ok(rows)
}

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
