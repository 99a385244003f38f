use super::*;

fn server(t_ms: u64, acked: u64, verified: u64) -> Seen<ServerStats> {
    let stats = ServerStats {
        boot_id: "s1".into(),
        t_ms,
        acked,
        verified,
        verify_bad: 0,
        write_errors: 0,
        mem_checked: t_ms / 50,
        mem_bad: 0,
        clock_back: 0,
        sabotaged: 0,
    };
    Seen { host: "a".into(), stats }
}

fn client(t_ms: u64, bytes: u64) -> Seen<ClientStats> {
    let stats = ClientStats {
        boot_id: "c1".into(),
        t_ms,
        connected: true,
        connects: 1,
        resets: 0,
        bytes,
        bad: 0,
        ticks: bytes / 2000,
        gap_ms: 20,
        http_ok: 3,
        http_failed: 0,
        acked_seen: 0,
        mem_checked: t_ms / 50,
        mem_bad: 0,
        clock_back: 0,
    };
    Seen { host: "b".into(), stats }
}

fn good() -> Testimony {
    Testimony {
        server: vec![server(500, 5, 0), server(1000, 10, 0), server(1500, 15, 12)],
        client: vec![client(500, 100_000), client(1000, 200_000), client(1500, 300_000)],
    }
}

/// Judged as if the last move had ended before the last line of each.
fn judged(testimony: &Testimony) -> (Verdict, Checked) {
    judge(&Evidence { testimony, server_lines_before: 2, client_lines_before: 2, starts: (1, 1) })
}

fn outcome(change: impl FnOnce(&mut Testimony)) -> Verdict {
    let mut testimony = good();
    change(&mut testimony);
    judged(&testimony).0
}

#[test]
fn a_clean_run_is_all_zero_and_says_how_much_was_checked() {
    let (verdict, checked) = judged(&good());
    assert_eq!(verdict.outcome(), Outcome::Good, "{verdict:?}");
    assert_eq!(checked, Checked { bytes: Some(300_000), writes: Some(12), ticks: Some(150) });
}

#[test]
fn each_fault_is_seen() {
    assert_eq!(outcome(|t| t.client[2].stats.resets = 1).tcp_resets, Some(1));
    assert_eq!(outcome(|t| t.client[1].stats.connects = 3).tcp_resets, Some(2));
    assert_eq!(outcome(|t| t.client[2].stats.http_failed = 1).tcp_resets, Some(1));
    assert_eq!(outcome(|t| t.client[0].stats.bad = 7).bytes_corrupted, Some(7));
    assert_eq!(outcome(|t| t.server[2].stats.mem_bad = 2).bytes_corrupted, Some(8192));
    assert_eq!(outcome(|t| t.server[1].stats.verify_bad = 4).writes_lost, Some(4));
    assert_eq!(outcome(|t| t.server[2].stats.write_errors = 2).writes_lost, Some(2));
    assert_eq!(outcome(|t| t.server[2].stats.clock_back = 1).guest_restarts, Some(1));
    assert_eq!(outcome(|t| t.client[1].stats.clock_back = 1).guest_restarts, Some(1));
    assert_eq!(outcome(|t| t.server[2].stats.acked = 8).writes_lost, Some(2), "goes on from an older disk");
    let restarted = outcome(|t| t.server[2].stats.boot_id = "s2".into());
    assert_eq!(restarted.guest_restarts, Some(1));
    assert_eq!(restarted.outcome(), Outcome::Bad);
    assert_eq!(outcome(|t| t.client[2].stats.boot_id = "c2".into()).guest_restarts, Some(1));
    assert_eq!(outcome(|t| t.client[2].stats.t_ms = 400).guest_restarts, Some(1), "the uptime went back");
    let evidence = Evidence { testimony: &good(), server_lines_before: 2, client_lines_before: 2, starts: (2, 1) };
    assert_eq!(judge(&evidence).0.guest_restarts, Some(1), "the controller knows of a restart");
}

#[test]
fn counters_that_begin_anew_after_a_restart_hide_nothing() {
    let verdict = outcome(|t| {
        t.client[0].stats.bad = 7;
        t.client[1].stats.boot_id = "c2".into();
        t.client[2].stats.boot_id = "c2".into();
        t.client[2].stats.bad = 1;
    });
    assert_eq!(verdict.bytes_corrupted, Some(8));
}

#[test]
fn lines_of_two_consoles_may_be_heard_in_any_order() {
    let verdict = outcome(|t| {
        t.server[1].host = "b".into();
        t.server.swap(0, 1);
    });
    assert_eq!(verdict.outcome(), Outcome::Good, "{verdict:?}");
}

#[test]
fn what_was_not_measured_after_the_last_move_is_absent() {
    assert_eq!(outcome(|t| t.server[2].stats.verified = 9).writes_lost, None, "the check did not reach what was acked");
    let silent = outcome(|t| t.client.truncate(2));
    assert_eq!((silent.tcp_resets, silent.bytes_corrupted, silent.guest_restarts), (None, None, None));
    assert_eq!(silent.outcome(), Outcome::Unmeasured);
    assert_eq!(outcome(|t| t.server.truncate(2)).guest_restarts, None);
    assert_eq!(outcome(|t| t.server.clear()).writes_lost, None);
    let never = outcome(|t| t.client.iter_mut().for_each(|seen| seen.stats.bytes = 0));
    assert_eq!(never.bytes_corrupted, None, "nothing came, so nothing was checked");
    for unchecked in [
        outcome(|t| t.server.iter_mut().for_each(|seen| seen.stats.mem_checked = 0)),
        outcome(|t| t.client.iter_mut().for_each(|seen| seen.stats.mem_checked = 0)),
        // Not once after the last move.
        outcome(|t| t.server[2].stats.mem_checked = t.server[1].stats.mem_checked),
    ] {
        assert_eq!((unchecked.bytes_corrupted, unchecked.outcome()), (None, Outcome::Unmeasured));
    }
    let corrupt =
        outcome(|t| t.server.iter_mut().for_each(|seen| (seen.stats.mem_checked, seen.stats.mem_bad) = (0, 1)));
    assert_eq!(corrupt.bytes_corrupted, Some(4096));
    assert_eq!(
        judge(&Evidence {
            testimony: &Testimony::default(),
            server_lines_before: 0,
            client_lines_before: 0,
            starts: (1, 1)
        })
        .0,
        Verdict::default()
    );
}
