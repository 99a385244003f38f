use std::collections::BTreeMap;

use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::vmm::{
    legacy::SerialState,
    memory,
    state::Chips,
    travel::{Round, pages::Packer},
};

const PAGES: u64 = 512;

fn ram() -> Ram {
    memory::map(memory::create(PAGES * 4096).unwrap(), PAGES * 4096).unwrap()
}

/// A state by which it can be known again.
fn state(number: u64) -> MachineState {
    let chips = Chips { irqchips: Vec::new(), clock: kvm_bindings::kvm_clock_data::default(), wall_ns: number };
    MachineState { vcpus: Vec::new(), chips, serial: SerialState::default(), devices: Vec::new() }
}

fn frame(kind: u16, payload: Vec<u8>) -> Frame {
    Frame { kind, version: VERSION, payload }
}

/// Pages that begin with this number.
fn pages(numbers: &[u64], content: u64) -> Frame {
    let (ram, mut packer, mut out) = (ram(), Packer::new().unwrap(), Vec::new());
    for page in numbers {
        ram.write_obj(content, GuestAddress(page * 4096)).unwrap();
        packer.pack(&ram, *page, &mut out).unwrap();
    }
    frame(kind::PAGES, out)
}

#[derive(Debug, Clone)]
enum Step {
    Pages(Vec<u64>),
    Round,
    /// So far above the newest.
    Cut(u64),
    State,
    End {
        is_good: bool,
    },
    Abandoned,
    Commit,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => proptest::collection::vec(0..PAGES, 1..6).prop_map(Step::Pages),
        1 => Just(Step::Round),
        5 => (0u64..4).prop_map(Step::Cut),
        5 => Just(Step::State),
        5 => proptest::bool::weighted(0.9).prop_map(|is_good| Step::End { is_good }),
        1 => Just(Step::Abandoned),
        6 => Just(Step::Commit),
    ]
}

/// What a standby must have, told in the plainest way.
#[derive(Debug, Clone, Default)]
struct Model {
    memory: BTreeMap<u64, u64>,
    committed: u64,
    staged: Option<(u64, BTreeMap<u64, u64>)>,
    /// The cut under way, what it has, and whether its state has come.
    open: Option<(u64, BTreeMap<u64, u64>, bool)>,
    newest: u64,
    is_copied: bool,
    rounds: u32,
    is_round_open: bool,
}

proptest! {
    /// Whatever comes in whatever order: what is committed is a cut that was whole, and nothing else is in memory.
    #[test]
    fn only_whole_cuts_that_are_committed_are_in_memory(steps in proptest::collection::vec(step(), 0..80)) {
        let ram = ram();
        let (mut parser, mut standby, mut model) = (parser(ram.clone()).unwrap(), Standby::new(ram.clone()).unwrap(), Model::default());
        // Always a first copy.
        let begin = [Step::Pages(vec![1, 2]), Step::Round];
        for (at, step) in (1000u64..).zip(begin.into_iter().chain(steps)) {
            let (sent, is_legal) = match &step {
                Step::Commit => {
                    let Some((number, pages)) = model.staged.take() else {
                        prop_assert!(standby.commit(model.committed + 1).is_err());
                        prop_assert!(model.committed == 0 || standby.commit(model.committed).is_ok());
                        continue;
                    };
                    model.memory.extend(pages);
                    model.committed = number;
                    prop_assert!(standby.commit(number + 1).is_err());
                    standby.commit(number).unwrap();
                    standby.commit(number).unwrap();
                    prop_assert_eq!(standby.committed(), number);
                    prop_assert_eq!(standby.state.as_ref().map(|state| state.chips.wall_ns), Some(number));
                    continue;
                }
                Step::Pages(numbers) => {
                    let new = numbers.iter().map(|page| (*page, at));
                    let is_legal = match &mut model.open {
                        Some((_, pages, _)) => { pages.extend(new); true }
                        None if !model.is_copied => { model.memory.extend(new); model.is_round_open = true; true }
                        None => false,
                    };
                    (pages(numbers, at), is_legal)
                }
                Step::Round => {
                    let is_legal = !model.is_copied;
                    if is_legal {
                        model.rounds += 1;
                        model.is_round_open = false;
                    }
                    (Frame::json(kind::ROUND, VERSION, &Round { number: model.rounds }).unwrap(), is_legal)
                }
                Step::Cut(above) => {
                    let number = model.newest + above;
                    let is_legal = model.open.is_none() && *above > 0 && model.staged.is_none()
                        && (model.is_copied || (model.rounds > 0 && !model.is_round_open));
                    if is_legal {
                        (model.is_copied, model.newest, model.open) = (true, number, Some((number, BTreeMap::new(), false)));
                    }
                    (Frame::json(kind::CUT, VERSION, &Number { number }).unwrap(), is_legal)
                }
                Step::State => {
                    let Some((number, _, has_state)) = &mut model.open else {
                        prop_assert!(parser.take(frame(kind::CUT_STATE, vec![1]), [0; 32], model.committed).is_err());
                        break;
                    };
                    let is_second = std::mem::replace(has_state, true);
                    if is_second {
                        continue;
                    }
                    let json = serde_json::to_vec(&state(*number)).unwrap();
                    (frame(kind::CUT_STATE, zstd::bulk::compress(&json, 1).unwrap()), true)
                }
                Step::End { is_good } => {
                    let is_legal = *is_good && model.open.as_ref().is_some_and(|open| open.2);
                    if is_legal && let Some((number, pages, _)) = model.open.take() {
                        model.staged = Some((number, pages));
                    }
                    (frame(kind::CUT_END, vec![if *is_good { 7 } else { 8 }; 32]), is_legal)
                }
                Step::Abandoned => {
                    let is_legal = model.open.take().is_some();
                    (frame(kind::ABANDONED, Vec::new()), is_legal)
                }
            };
            let outcome = parser.take(sent, [7; 32], standby.committed());
            prop_assert_eq!(outcome.is_ok(), is_legal, "{:?} {:?} {:?}", step, outcome.err(), model);
            match outcome {
                Ok(Some(News::Staged(cut))) => {
                    let number = standby.stage(*cut, |_| Ok(())).unwrap();
                    prop_assert_eq!(Some(number), model.staged.as_ref().map(|staged| staged.0));
                }
                Ok(Some(News::Over)) => prop_assert!(false, "nobody said so"),
                Ok(None) => {}
                // Nothing more is read; what is staged may still be committed.
                Err(_) => break,
            }
        }
        for page in 0..PAGES {
            let content: u64 = ram.read_obj(GuestAddress(page * 4096)).unwrap();
            prop_assert_eq!(content, model.memory.get(&page).copied().unwrap_or(0), "page {}", page);
        }
        let staged = model.staged.map_or(model.committed, |staged| staged.0);
        prop_assert_eq!((standby.staged(), standby.can_be_promoted()), (staged, model.committed > 0));
    }
}

#[test]
fn a_cut_that_does_not_fit_or_comes_too_early_changes_nothing() {
    let mut standby = Standby::new(ram()).unwrap();
    let cut = |number| StagedCut { number, pages: Vec::new(), state: state(number) };
    let refused = standby.stage(cut(1), |_| Err(TravelError::Malformed("another machine")));
    assert!(refused.is_err() && standby.staged() == 0 && standby.commit(1).is_err());
    assert_eq!(standby.stage(cut(2), |_| Ok(())).unwrap(), 2);
    assert!(standby.stage(cut(3), |_| Ok(())).is_err());
    standby.commit(2).unwrap();
    assert!(standby.stage(cut(2), |_| Ok(())).is_err());
    assert_eq!(standby.stage(cut(3), |_| Ok(())).unwrap(), 3);
    // Promoted, it is what was committed.
    assert_eq!(standby.promote().map(|state| state.chips.wall_ns), Some(2));
}

#[test]
fn a_state_that_is_larger_than_it_may_be_is_refused() {
    let json = vec![b' '; MAX_STATE_BYTES + 1];
    assert!(unpacked(&zstd::bulk::compress(&json, 1).unwrap()).is_err());
    assert!(unpacked(&[]).is_err() && unpacked(&[1, 2, 3]).is_err());
    let good = zstd::bulk::compress(&serde_json::to_vec(&state(5)).unwrap(), 1).unwrap();
    assert_eq!(unpacked(&good).unwrap().chips.wall_ns, 5);
}
