//! How good it was, and what policies decided.

use anyhow::ensure;
use supercloud_api::{GuestVerdict, Reliability, client::Client, unix_ms};
use supercloud_cli::table::{Table, duration, time};

use crate::{arguments::Output, ledger::is_plain, show};

const DAY_MS: u64 = 86_400_000;

/// Prints how good it was in the last days, for one guest or for all.
pub async fn reliability(client: &Client, output: Output, guest: Option<&str>, days: u64) -> anyhow::Result<()> {
    let from_ms = unix_ms().saturating_sub(days.saturating_mul(DAY_MS));
    ensure!(guest.is_none_or(is_plain), "that is no name and no id of a guest");
    let guest = guest.map(|guest| format!("&guest={guest}")).unwrap_or_default();
    let found = client.reliability(&format!("from_ms={from_ms}{guest}")).await?;
    show::print(output, &found, || table(&found))
}

/// Millionths as a percentage, rounded down: what was not whole is not told as whole.
fn percent(ppm: u64) -> String {
    let thousandths = ppm / 10;
    format!("{}.{:03} %", thousandths / 1000, thousandths % 1000)
}

fn table(found: &Reliability) -> Table {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let mut table = Table::new([
        "AVAILABLE",
        "GUESTS",
        "MOVES",
        "PAUSE P50",
        "PAUSE P99",
        "ROLLED BACK",
        "FAILED",
        "DEADLINES MISSED",
    ])
    .and_wide(["WANTED", "LOST", "PAUSED", "MISSED BY MOVES", "MISSED BY NOTICES"]);
    let cells = [
        or_dash(found.availability_ppm.map(percent)),
        found.guests.to_string(),
        found.moves.to_string(),
        or_dash(found.downtime_p50_ms.map(duration)),
        or_dash(found.downtime_p99_ms.map(duration)),
        found.rolled_back.to_string(),
        found.failed.to_string(),
        found.missed_deadlines().to_string(),
    ];
    let wide = [
        duration(found.wanted_ms),
        duration(found.lost_ms),
        duration(found.paused_ms),
        found.missed_by_moves.to_string(),
        found.missed_by_notices.to_string(),
    ];
    table.row_wide(cells, wide);
    table
}

/// Prints what policies decided for guests.
pub async fn verdicts(client: &Client, output: Output) -> anyhow::Result<()> {
    let found = client.verdicts().await?;
    show::print(output, &found, || verdict_table(&found))
}

fn verdict_table(found: &[GuestVerdict]) -> Table {
    let mut table =
        Table::new(["GUEST", "POLICY", "VERDICT", "CHOSEN", "NEXT"]).and_wide(["IS AT", "WHY", "TOLD", "BY"]);
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    for one in found {
        let cells = [
            one.guest_name.to_string(),
            one.policy.to_string(),
            if one.is_move { "move" } else { "stay" }.to_owned(),
            or_dash(&one.chosen),
            or_dash(&one.runner_up),
        ];
        table.row_wide(cells, [or_dash(&one.market), one.reason.clone(), time(one.told_at_ms), one.actor.clone()]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_whole_is_not_told_as_whole() {
        assert_eq!(
            [1_000_000, 999_999, 999_990, 0, 5].map(percent),
            ["100.000 %", "99.999 %", "99.999 %", "0.000 %", "0.000 %"]
        );
    }

    #[test]
    fn what_is_not_known_is_a_dash() {
        let nothing = table(&Reliability::default()).render_wide();
        assert!(
            nothing.contains("AVAILABLE") && nothing.lines().nth(1).unwrap().trim_start().starts_with('-'),
            "{nothing}"
        );
        let some = Reliability {
            availability_ppm: Some(999_500),
            missed_by_moves: 1,
            missed_by_notices: 2,
            ..Reliability::default()
        };
        let told = table(&some).render();
        assert!(told.contains("99.950 %") && told.lines().nth(1).unwrap().trim_end().ends_with('3'), "{told}");
    }
}
