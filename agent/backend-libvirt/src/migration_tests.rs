use super::*;

#[test]
fn a_cookie_is_taken_only_whole_and_from_its_own_kind() {
    let inner = b"<qemu-migration/>\0";
    let cookie = wrap(inner).unwrap();
    assert_eq!(unwrap(&cookie).unwrap(), inner);
    let take = |bytes: Vec<u8>| unwrap(&Cookie::new(bytes).unwrap());
    let cut = cookie.as_bytes().len() - 1;
    assert!(take(cookie.as_bytes()[..cut].to_vec()).is_err());
    assert!(take(inner.to_vec()).is_err());
    assert!(take(Vec::new()).is_err());
    assert!(take([COOKIE_MAGIC, b"a\0b\0"].concat()).is_err());
    assert!(Cookie::new(vec![0; supercloud_blanket::migrate::MAX_COOKIE_BYTES + 1]).is_err());
}

#[test]
fn bandwidth_is_never_rounded_to_nothing_which_would_mean_no_limit() {
    assert_eq!((mib_per_s(0), mib_per_s(1), mib_per_s(3 * MIB + 5)), (1, 1, 3));
}

#[test]
fn a_stream_socket_cannot_smuggle_a_query_into_the_uri() {
    assert_eq!(socket_uri("/run/a-b_c/1.sock".as_ref()).unwrap(), "unix:///run/a-b_c/1.sock");
    for bad in ["/run/a?x=1", "/run/a b", "rel.sock", "/run/%2f", "/run/#"] {
        assert!(socket_uri(bad.as_ref()).is_err(), "{bad}");
    }
}

#[test]
fn only_the_job_that_is_tracked_is_untracked() {
    let moves = Moves::default();
    let guest = GuestId::generate();
    let (first, second) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let old = moves.track(guest, &first);
    let new = moves.track(guest, &second);
    drop(old);
    assert!(moves.running(guest).is_some_and(|flag| Arc::ptr_eq(&flag, &second)));
    drop(new);
    assert!(moves.running(guest).is_none());
}

#[test]
fn a_begin_counts_as_long_as_its_call_and_is_known_when_nobody_waits() {
    let moves = Moves::default();
    let guest = GuestId::generate();
    let (first, second) = (moves.beginning(guest), moves.beginning(guest));
    drop(first);
    assert!(moves.is_beginning(guest));
    second.succeeded(7);
    drop(second);
    assert!(!moves.is_beginning(guest));
    assert_eq!(moves.table().begun.get(&guest), Some(&7));
}

fn every_sight() -> Vec<Seen> {
    let mut all = Vec::new();
    let reasons = [
        PauseReason::Asked,
        PauseReason::Departed,
        PauseReason::Incoming,
        PauseReason::Arrived,
        PauseReason::DiskError,
        PauseReason::Saving,
        PauseReason::Other,
    ];
    let mut states = vec![RunState::Running, RunState::ShuttingDown, RunState::Crashed];
    states.extend(reasons.map(RunState::Paused));
    for state in states {
        for bits in 0..16 {
            let bit = |n: u32| bits >> n & 1 == 1;
            let (has_job, is_copying) = (bit(0), bit(1));
            all.push(Seen { state, has_job, is_copying, is_held: bit(2), was_resumed: bit(3) });
        }
    }
    all
}

#[test]
fn only_a_paused_and_departed_or_crashed_copy_is_ever_destroyed() {
    for seen in every_sight() {
        let may_end = matches!(seen.state, RunState::Paused(PauseReason::Departed) | RunState::Crashed);
        let step = next_step(seen, Verdict::Release);
        let ends = step == Step::Destroy || step == Step::Confirm;
        assert!(!ends || (may_end && !seen.is_copying), "{seen:?} {step:?}");
        assert_ne!(next_step(seen, Verdict::Keep), Step::Destroy, "{seen:?}");
    }
}

#[test]
fn the_protocols_last_phase_is_used_only_for_a_job_that_is_held_for_us_and_idle() {
    for seen in every_sight() {
        for verdict in [Verdict::Keep, Verdict::Release] {
            if next_step(seen, verdict) == Step::Confirm {
                assert!(seen.has_job && seen.is_held && !seen.is_copying, "{seen:?}");
            }
        }
    }
}

#[test]
fn a_source_is_kept_by_a_plain_resume_after_its_agent_or_daemon_was_restarted() {
    let seen = Seen {
        state: RunState::Paused(PauseReason::Departed),
        has_job: false,
        is_copying: false,
        is_held: true,
        was_resumed: false,
    };
    assert_eq!(next_step(seen, Verdict::Keep), Step::Resume);
    assert_eq!(next_step(seen, Verdict::Release), Step::Destroy);
    assert_eq!(next_step(Seen { has_job: true, is_held: false, ..seen }, Verdict::Keep), Step::Wait);
    let runs = Seen { state: RunState::Running, ..seen };
    assert_eq!(next_step(runs, Verdict::Keep), Step::Done);
    assert_eq!(next_step(Seen { has_job: true, is_held: false, ..runs }, Verdict::Keep), Step::Abort);
    assert_eq!(next_step(runs, Verdict::Release), Step::Refuse);
}

#[test]
fn a_save_that_nobody_waits_for_is_given_up_at_once_where_the_guest_is_kept() {
    let seen = Seen {
        state: RunState::Paused(PauseReason::Saving),
        has_job: true,
        is_copying: false,
        is_held: false,
        was_resumed: false,
    };
    assert_eq!(next_step(seen, Verdict::Keep), Step::Abort);
    assert_eq!(next_step(seen, Verdict::Release), Step::Refuse);
}
