//! `supercloud simulate --sun`: a guest that follows its clients over three regions, beside fixed places.

use serde_json::{Value, json};
use supercloud_cli::table::Table;
use supercloud_scheduler::sun::{
    FollowTheSun,
    replay::{Follower, SunOutcome, World, three_regions},
};

use super::{Simulate, usd};
use crate::arguments::Output;

/// The clouds of the generated world.
const CLOUDS: [&str; 3] = ["americas", "europe", "asia"];
/// Days that are only learned from: two weeks, so that weekends were seen.
const TRAIN_DAYS: u32 = 14;

/// What was asked for, or is taken where nothing was.
struct Wanted {
    days: u32,
    night_permille: u32,
    weekend_permille: u32,
    seed: u64,
}

/// Replays and reports.
pub fn run(arguments: &Simulate, output: Output) -> anyhow::Result<()> {
    let wanted = Wanted {
        days: arguments.days.unwrap_or(1),
        night_permille: arguments.night_permille.unwrap_or(10),
        weekend_permille: arguments.weekend_permille.unwrap_or(1000),
        seed: arguments.seed,
    };
    let share = |permille: u32| f64::from(permille) / 1000.0;
    let world = three_regions(
        (TRAIN_DAYS + wanted.days) as usize,
        TRAIN_DAYS as usize,
        (share(wanted.night_permille), share(wanted.weekend_permille), 0.1),
        wanted.seed,
    );
    let sun = FollowTheSun { target_p95_ms: arguments.target_p95.unwrap_or(0), ..FollowTheSun::default() };
    let rows = rows(&world, &sun);
    match output {
        Output::Table | Output::Wide => print!("{}", table(&wanted, &rows)),
        _ => crate::show::print_value(output, &json(&wanted, &rows))?,
    }
    Ok(())
}

fn rows(world: &World, sun: &FollowTheSun) -> Vec<(String, SunOutcome)> {
    let fixed = CLOUDS.iter().enumerate().map(|(i, name)| (format!("fixed in {name}"), Follower::Fixed(i)));
    let others = [
        ("follow-the-sun".to_owned(), Follower::Sun(sun.clone())),
        ("reactive".to_owned(), Follower::Reactive),
        ("with a true forecast".to_owned(), Follower::Clairvoyant(sun.clone())),
    ];
    others.into_iter().chain(fixed).map(|(name, follower)| (name, world.run(&follower))).collect()
}

/// The fixed place with the lowest p95.
fn best_fixed(rows: &[(String, SunOutcome)]) -> Option<&SunOutcome> {
    let fixed = rows.iter().filter(|(name, _)| name.starts_with("fixed")).map(|(_, outcome)| outcome);
    fixed.min_by(|a, b| a.p95_ms.total_cmp(&b.p95_ms))
}

fn json(wanted: &Wanted, rows: &[(String, SunOutcome)]) -> Value {
    let outcome = |outcome: &SunOutcome| {
        json!({
            "p95_ms": outcome.p95_ms,
            "mean_ms": outcome.mean_ms,
            "deviation_ms": outcome.deviation_ms,
            "hourly_p95_spread_ms": outcome.hourly_spread_ms,
            "moves": outcome.moves,
            "cost_usd": usd(outcome.cost),
            "moves_usd": usd(outcome.moves_cost),
        })
    };
    let policies: serde_json::Map<String, Value> =
        rows.iter().map(|(name, of)| (name.replace(' ', "-"), outcome(of))).collect();
    json!({
        "about": {
            "is_generated": true,
            "days": wanted.days,
            "learned_days": TRAIN_DAYS,
            "night_permille": wanted.night_permille,
            "weekend_permille": wanted.weekend_permille,
            "seed": wanted.seed,
        },
        "policies": policies,
    })
}

fn table(wanted: &Wanted, rows: &[(String, SunOutcome)]) -> String {
    let mut out = format!(
        "Three client regions, generated; nights ask for {} and weekends for {} thousandths; {} days after {TRAIN_DAYS} learned from, seed {}\n\n",
        wanted.night_permille, wanted.weekend_permille, wanted.days, wanted.seed,
    );
    let best = best_fixed(rows);
    let change = |value: f64, of: fn(&SunOutcome) -> f64| match best.map(of) {
        Some(best) if best > 0.0 => format!("{:+.1}", (value / best - 1.0) * 100.0),
        _ => "-".into(),
    };
    let mut table = Table::new([
        "POLICY",
        "P95_MS",
        "VS_BEST_FIXED_%",
        "DEVIATION_MS",
        "VS_BEST_FIXED_%",
        "HOURLY_P95_SPREAD_MS",
        "MEAN_MS",
        "MOVES",
        "COST_USD",
    ]);
    for (name, outcome) in rows {
        table.row([
            name.clone(),
            format!("{:.1}", outcome.p95_ms),
            change(outcome.p95_ms, |best| best.p95_ms),
            format!("{:.1}", outcome.deviation_ms),
            change(outcome.deviation_ms, |best| best.deviation_ms),
            format!("{:.1}", outcome.hourly_spread_ms),
            format!("{:.1}", outcome.mean_ms),
            outcome.moves.to_string(),
            format!("{:.2}", usd(outcome.cost)),
        ]);
    }
    out.push_str(&table.render());
    out
}
