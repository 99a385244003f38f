use proptest::prelude::*;
use supercloud_ids::{CloudId, Epoch, ProjectId, VolumeId};

use super::*;
use crate::HistoryBand;

const HOUR: u64 = 3_600_000;

fn bands(bands: &[(u64, u64)]) -> Vec<HistoryBand> {
    bands.iter().map(|(for_s, every_s)| HistoryBand { for_s: *for_s, every_s: *every_s }).collect()
}

fn policy(keep: &[(u64, u64)]) -> HistoryPolicy {
    HistoryPolicy { every_s: Some(900), keep: bands(keep), memory: None }
}

fn taken(wall_ms: u64, version: u64) -> Taken {
    Taken {
        wall_ms,
        epoch: Epoch(1),
        version,
        root: format!("{version:064x}"),
        cloud: CloudId::generate(),
        stored_bytes: version * 7,
        memory: None,
    }
}

fn history(walls: &[u64]) -> VolumeHistory {
    let keep = policy(&[(4 * 3600, 900), (7 * 86_400, 86_400)]);
    let mut history = VolumeHistory::begin(VolumeId::generate(), ProjectId::generate(), keep, None, 0);
    for (version, wall) in walls.iter().enumerate() {
        history.append(taken(*wall, version as u64 + 1));
    }
    history
}

fn a_policy() -> impl Strategy<Value = Vec<HistoryBand>> {
    proptest::collection::vec((1u64..40, 60u64..4000), 1..4).prop_map(|raw| {
        let (mut for_s, mut every_s) = (0, 0);
        raw.into_iter()
            .map(|(times, more)| {
                every_s += more;
                for_s += times * every_s;
                HistoryBand { for_s, every_s }
            })
            .collect()
    })
}

/// Instants in order, some of them the same, in bursts and with pauses.
fn instants() -> impl Strategy<Value = Vec<u64>> {
    let step = prop_oneof![3 => 0u64..200_000, 2 => 0u64..4_000_000, 1 => 0u64..100_000_000];
    proptest::collection::vec(step, 0..120).prop_map(|steps| {
        let mut at = 1_000_000;
        steps
            .into_iter()
            .map(|step| {
                at += step;
                at
            })
            .collect()
    })
}

fn kept(instants: &[u64], keeps: &[bool]) -> Vec<u64> {
    instants.iter().zip(keeps).filter_map(|(at, is_kept)| is_kept.then_some(*at)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// The rule, said another way than it is carried out: every point that goes leaves a gap that its band allows.
    #[test]
    fn thinning_leaves_no_gap_longer_than_its_band_says(at in instants(), keep in a_policy(), later in 0u64..200_000_000) {
        let now = at.last().copied().unwrap_or(0) + later;
        let keeps = thin(&at, &keep, now, u64::MAX);
        prop_assert_eq!(keeps.len(), at.len());
        prop_assert!(keeps.last().is_none_or(|newest| *newest), "the newest is gone");
        let band = |at: u64| keep.iter().find(|band| now - at <= band.for_s * 1000);
        for (index, gone) in at.iter().enumerate().filter(|(index, _)| !keeps[*index]) {
            let after = (index..at.len()).find(|index| keeps[*index]).map(|index| at[index]).unwrap();
            match band(*gone) {
                Some(band) => {
                    let before = (0..index).rev().find(|index| keeps[*index]).map(|index| at[index]);
                    prop_assert!(before.is_some(), "the first of a band is gone");
                    prop_assert!(after - before.unwrap() <= band.every_s * 1000);
                }
                // What is too old goes only where another one stands for the end of the last band.
                None => prop_assert!((index + 1..at.len()).any(|index| keeps[index] && band(at[index]).is_none())
                    || keeps.iter().filter(|is_kept| **is_kept).count() == 1),
            }
        }
        let left = kept(&at, &keeps);
        prop_assert!(left.iter().filter(|at| band(**at).is_none()).count() <= 1, "more than one beyond the last band");
        if later == 0 || band(*at.last().unwrap_or(&now)).is_some() {
            prop_assert!(left.len() as u64 <= points_at_most(&keep), "{} of {}", left.len(), points_at_most(&keep));
        }
    }

    #[test]
    fn thinning_twice_is_thinning_once_and_what_is_gone_would_go_later_too(
        at in instants(), keep in a_policy(), later in 0u64..50_000_000, more in 0u64..200_000_000,
    ) {
        let now = at.last().copied().unwrap_or(0) + later;
        let once = kept(&at, &thin(&at, &keep, now, u64::MAX));
        prop_assert_eq!(&kept(&once, &thin(&once, &keep, now, u64::MAX)), &once);
        // Thinned now and then, or never before: what an instant means then is no more than a gap older.
        let then = now + more;
        let twice = kept(&once, &thin(&once, &keep, then, u64::MAX));
        prop_assert!(twice.iter().all(|at| once.contains(at)), "a point came back");
        let last = keep[keep.len() - 1];
        let gap = |at: u64| keep.iter().find(|band| then - at <= band.for_s * 1000).unwrap_or(&last).every_s * 1000;
        for asked in at.iter().copied().chain([then]).filter(|asked| then - asked <= last.for_s * 1000) {
            let newest_of = |list: &[u64]| list.iter().rev().find(|at| **at <= asked).copied();
            // None before the first point.
            let (Some(was), is) = (newest_of(&at), newest_of(&twice)) else { continue };
            prop_assert!(is.is_some(), "{asked} means nothing any more");
            let is = is.unwrap();
            let first_gone = at.iter().copied().find(|at| *at > is).unwrap_or(was);
            prop_assert!(was - is <= gap(first_gone), "{asked}: {was} -> {is}, gap {}", gap(first_gone));
        }
    }

    /// Pauses that count as less do not let more points be kept, and what is left is left when it is done again.
    #[test]
    fn long_pauses_keep_within_the_policys_bound(at in instants(), keep in a_policy(), every_s in proptest::option::of(60u64..90_000)) {
        let mut at = at;
        at.dedup();
        let now = at.last().copied().unwrap_or(0);
        let pause = pause_at_most_ms(&HistoryPolicy { every_s, keep: keep.clone(), memory: None });
        let once = kept(&at, &thin(&at, &keep, now, pause));
        prop_assert!(once.len() as u64 <= points_at_most(&keep), "{} of {}", once.len(), points_at_most(&keep));
        prop_assert_eq!(&kept(&once, &thin(&once, &keep, now, pause)), &once);
    }

    #[test]
    fn instants_rise_whatever_the_clock_says(walls in proptest::collection::vec(0u64..2000, 1..60)) {
        let mut last = None;
        for wall in walls {
            let next = next_instant(last, wall);
            prop_assert!(last.is_none_or(|last| last < next));
            prop_assert!(next.0 >= wall, "earlier than what it tells of");
            last = Some(next);
        }
    }

    #[test]
    fn a_thinned_history_holds_and_a_changed_one_does_not(
        walls in proptest::collection::vec(0u64..2_000 * HOUR, 1..40), at in any::<prop::sample::Index>(), how in 0usize..12,
    ) {
        let mut walls = walls;
        walls.sort_unstable();
        let mut history = history(&walls);
        let gone = history.thin(walls[walls.len() - 1] + HOUR);
        let found = verify(&history).unwrap();
        prop_assert_eq!((found.points, found.thinned), (history.points.len() as u64, gone.len() as u64));
        prop_assert_eq!(found.thinned, history.thinned_count());
        prop_assert!(history.thin(walls[walls.len() - 1] + HOUR).is_empty());
        let text = serde_json::to_string(&history).unwrap();
        prop_assert_eq!(&serde_json::from_str::<VolumeHistory>(&text).unwrap(), &history);

        let whole = history.clone();
        let index = at.index(history.points.len());
        let point = &mut history.points[index];
        match how {
            0 => point.at_ms += 1,
            1 => point.tick += 1,
            2 => point.epoch = Epoch(2),
            3 => point.version += 1,
            4 => point.root = format!("{:064x}", 0xbad),
            5 => point.cloud = CloudId::generate(),
            6 => point.stored_bytes += 1,
            7 => drop(history.points.remove(index)),
            8 => history.volume = VolumeId::generate(),
            9 => history.next += 1,
            10 => history.head = NO_HASH.replace('0', "a"),
            _ => {
                let twin = point.clone();
                history.points.insert(index, twin);
            }
        }
        prop_assert!(verify(&history).is_err(), "change {how} of {index} is not seen");
        // The end cut off: only the head tells.
        let mut short = whole.clone();
        short.points.pop();
        prop_assert!(verify(&short).is_err());
    }

    /// Whatever a damaged register holds, it is judged and nothing panics.
    #[test]
    fn a_hostile_history_is_judged(
        numbers in proptest::collection::vec((any::<u64>(), any::<u64>(), 0u64..4), 0..8),
        rows in proptest::collection::vec((prop_oneof![0u64..6, any::<u64>()], prop_oneof![0u64..6, any::<u64>()]), 0..6),
        next in prop_oneof![0u64..9, any::<u64>()], asked in any::<u64>(), now in any::<u64>(),
    ) {
        let mut history = history(&[]);
        history.next = next;
        for (at_ms, version, number) in numbers {
            let mut point = history.clone().append(taken(at_ms, version % 1000)).clone();
            point.number = number;
            history.points.push(point);
        }
        history.thinned =
            rows.into_iter().map(|(from, to)| ThinnedPoints { from, to, hash: String::new() }).collect();
        let _ = (verify(&history), history.as_of(asked, now), history.point(asked), history.thinned_count());
        history.thin(now);
        history.append(taken(now, 1));
    }
}

#[test]
fn an_instant_means_the_newest_point_that_is_not_younger() {
    let history = history(&[10, 20, 20, 15, 40]);
    // The clock went back once: the fourth is of the same millisecond as the third.
    let at: Vec<_> = history.points.iter().map(|point| (point.at_ms, point.tick)).collect();
    assert_eq!(at, [(10, 0), (20, 0), (20, 1), (20, 2), (40, 0)]);
    let meant = |asked| history.as_of(asked, 50).map(|found| (found.point.number, found.older_ms));
    assert_eq!(meant(10), Ok((1, 0)));
    assert_eq!(meant(19), Ok((1, 9)));
    assert_eq!(meant(20), Ok((4, 0)));
    assert_eq!(meant(39), Ok((4, 19)));
    assert_eq!(meant(50), Ok((5, 10)));
    assert_eq!(meant(51), Err(AsOfRefusal::Ahead { asked_ms: 51, now_ms: 50 }));
    assert_eq!(meant(9), Err(AsOfRefusal::Before { asked_ms: 9, oldest: 1, oldest_ms: 10, thinned: 0 }));
    // A clock that is behind the newest point does not put it into the future.
    assert_eq!(history.as_of(40, 5).unwrap().point.number, 5);
    assert_eq!(super::VolumeHistory { points: vec![], ..history.clone() }.as_of(40, 50), Err(AsOfRefusal::Empty));
    assert_eq!(history.point(6), Err(AsOfRefusal::None { number: 6, newest: 5 }));
    assert_eq!(history.point(0), Err(AsOfRefusal::None { number: 0, newest: 5 }));
}

#[test]
fn what_was_thinned_out_is_refused_by_name() {
    let mut history = history(&[0, 60_000, 120_000, 180_000, 10 * HOUR]);
    let gone: Vec<_> = history.thin(10 * HOUR).iter().map(|point| point.number).collect();
    assert_eq!(gone, [2, 3, 4], "within a day of each other, ten hours ago");
    assert_eq!(history.thinned.len(), 1);
    assert_eq!((history.thinned[0].from, history.thinned[0].to), (2, 4));
    assert_eq!(history.point(3), Err(AsOfRefusal::Thinned { number: 3, kept: 2, oldest: 1, newest: 5 }));
    assert_eq!(history.as_of(130_000, 10 * HOUR).unwrap().point.number, 1);
    verify(&history).unwrap();
}

#[test]
fn policies_are_within_their_ranges() {
    let check =
        |every_s, keep: &[(u64, u64)]| check_policy(&HistoryPolicy { every_s, keep: bands(keep), memory: None });
    assert_eq!(check(Some(900), &[(4 * 3600, 900), (7 * 86_400, 86_400)]), Ok(()));
    assert_eq!(check(None, &[(60, 60)]), Ok(()));
    assert_eq!(check(Some(59), &[(60, 60)]), Err(PolicyFault::Every(59)));
    assert_eq!(check(Some(31 * 86_400), &[(60, 60)]), Err(PolicyFault::Every(31 * 86_400)));
    assert_eq!(check(None, &[]), Err(PolicyFault::Bands(0)));
    assert_eq!(check(None, &[(60, 60); 9]), Err(PolicyFault::Bands(9)));
    assert_eq!(check(None, &[(3600, 60), (3600, 60)]), Err(PolicyFault::For(1, 3600)));
    assert_eq!(check(None, &[(u64::MAX, 60)]), Err(PolicyFault::For(0, u64::MAX)));
    assert_eq!(check(None, &[(3600, 120), (7200, 60)]), Err(PolicyFault::Gap(1, 60)));
    assert_eq!(check(None, &[(3600, 7200)]), Err(PolicyFault::Gap(0, 7200)));
    assert_eq!(check(None, &[(86_400, 60)]), Err(PolicyFault::Points(2884)));
}

#[test]
fn a_clock_that_stands_still_or_jumps_ahead_thins_little() {
    let quarter = 900_000;
    let numbers = |history: &VolumeHistory| history.points.iter().map(|point| point.number).collect::<Vec<_>>();
    // It went back an hour: what is taken meanwhile is all of one instant, and stays.
    let mut back = history(&[10 * HOUR, 20 * HOUR, 19 * HOUR, 19 * HOUR + quarter, 19 * HOUR + 2 * quarter, 21 * HOUR]);
    assert_eq!(back.thin_by_newest(), 0);
    verify(&back).unwrap();
    // For ever: only so many.
    let mut stuck = history(&[0, 20 * HOUR]);
    for version in 3..400 {
        stuck.append(taken(HOUR, version));
        stuck.thin_by_newest();
    }
    assert_eq!(stuck.points.len(), 102, "{:?}", numbers(&stuck));
    verify(&stuck).unwrap();

    // Four years ahead: points of the last band (a week) stay, as two days at most are counted.
    let days: Vec<u64> = (0..5).map(|day| day * 24 * HOUR).collect();
    let mut ahead = history(&days);
    let jumped = days[4] + 4 * 365 * 24 * HOUR;
    for (more, version) in [(0, 6), (quarter, 7), (2 * quarter, 8)] {
        ahead.append(taken(jumped + more, version));
        ahead.thin_by_newest();
    }
    assert_eq!(numbers(&ahead), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(pause_at_most_ms(&ahead.policy), 48 * HOUR);
}

#[test]
fn the_memory_of_the_newest_checkpoints_is_kept_and_they_with_it() {
    let memory = |version: u64| PointMemory {
        root: format!("{:064x}", version + 1000),
        bytes: 1 << 30,
        format: "an-image/1".into(),
        is_kept: true,
    };
    let mut history = history(&[]);
    assert_eq!(history.checkpoint(None), Err(AsOfRefusal::NoCheckpoint));
    history.policy.memory = Some(2);
    // A minute apart, each third one with memory: all would be thinned but the first and the newest.
    for version in 1..=20u64 {
        let with = (version % 3 == 0).then(|| memory(version));
        history.append(Taken { memory: with, ..taken(version * 60_000, version) });
        history.thin_by_newest();
        verify(&history).unwrap();
    }
    let checkpoints = |history: &VolumeHistory| {
        history.points.iter().filter(|point| point.is_checkpoint()).map(|point| point.number).collect::<Vec<_>>()
    };
    assert_eq!(checkpoints(&history), [15, 18]);
    assert_eq!(history.checkpoint(None).unwrap().number, 18);
    assert_eq!(history.checkpoint(Some(15)).unwrap().number, 15);
    assert_eq!(history.checkpoint(Some(20)), Err(AsOfRefusal::NoMemory { number: 20 }));
    assert!(matches!(history.checkpoint(Some(12)), Err(AsOfRefusal::Thinned { .. })));
    assert_eq!(history.checkpoint(Some(21)), Err(AsOfRefusal::None { number: 21, newest: 20 }));
    assert!(history.points.len() < 8, "{:?}", history.points);

    // Without a policy for it the newest one's is kept; what was said of the others stays said.
    history.policy.memory = None;
    history.policy.keep = bands(&[(7200, 60)]);
    history.append(taken(21 * 60_000, 21));
    history.thin_by_newest();
    assert_eq!(checkpoints(&history), [18]);
    assert_eq!(history.checkpoint(Some(15)), Err(AsOfRefusal::NoMemory { number: 15 }));
    verify(&history).unwrap();
    let changes: [fn(&mut PointMemory); 3] =
        [|memory| memory.root = "00".repeat(32), |memory| memory.bytes += 1, |memory| memory.format.push('x')];
    for change in changes {
        let mut forged = history.clone();
        let point = forged.points.iter_mut().find(|point| point.number == 18).unwrap();
        point.memory.iter_mut().for_each(change);
        assert_eq!(verify(&forged), Err(ChainFault::Hash { number: 18 }));
        point_without_memory(&mut forged);
        assert_eq!(verify(&forged), Err(ChainFault::Hash { number: 18 }));
    }
    let check = |memory| check_policy(&HistoryPolicy { memory, ..policy(&[(60, 60)]) });
    assert_eq!((check(Some(1)), check(Some(20)), check(None)), (Ok(()), Ok(()), Ok(())));
    assert_eq!((check(Some(0)), check(Some(21))), (Err(PolicyFault::Memory(0)), Err(PolicyFault::Memory(21))));
}

fn point_without_memory(history: &mut VolumeHistory) {
    history.points.iter_mut().filter(|point| point.number == 18).for_each(|point| point.memory = None);
}
