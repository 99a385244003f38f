//! Breadth-first exploration of every reachable state, and of what can still be reached from each.

use std::{
    collections::{BTreeSet, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
};

use supercloud_handover::Phase;

use crate::world::{Action, Model, Scenario, World};

/// What an exploration found.
pub struct Explored {
    pub states: usize,
    pub steps: usize,
    pub settled: usize,
    /// The ends that operations came to.
    pub ends: BTreeSet<Phase>,
    /// With the way that leads there.
    pub violation: Option<String>,
}

/// 64 bits of SipHash: with the few million states here, two that collide are less likely than one in a million runs.
fn fingerprint(world: &World) -> u64 {
    let mut hasher = DefaultHasher::new();
    world.hash(&mut hasher);
    hasher.finish()
}

struct Graph {
    worlds: Vec<World>,
    from: Vec<(u32, Action)>,
}

impl Graph {
    fn way(&self, model: &Model, mut at: u32) -> String {
        let end = model.describe(&self.worlds[at as usize]);
        let mut steps = Vec::new();
        while at != 0 {
            let (before, action) = self.from[at as usize];
            steps.push(model.describe_action(action));
            at = before;
        }
        steps.reverse();
        steps.iter().enumerate().map(|(n, step)| format!("{:3} {step}\n", n + 1)).collect::<String>() + &end
    }
}

/// Explores all of a scenario, or up to the first violation.
///
/// # Panics
/// When there are more than `bound` states: a scenario that is not explored in full proves nothing.
pub fn explore(scenario: Scenario, bound: usize) -> Explored {
    let name = scenario.name;
    let mut model = Model::new(scenario);
    let initial = model.initial();
    let mut graph = Graph { worlds: vec![initial], from: vec![(0, Action::Begin)] };
    let mut known = HashMap::from([(fingerprint(&initial), 0_u32)]);
    // Steps of the protocol itself, target first: what can be reached with faults switched off.
    let mut edges: Vec<(u32, u32)> = Vec::new();
    let mut steps = 0;
    let mut at = 0;
    let violated = |graph: &Graph, model: &Model, text: String, at: u32, steps| Explored {
        states: graph.worlds.len(),
        steps,
        settled: 0,
        ends: BTreeSet::new(),
        violation: Some(format!("{name}: {text}\n{}", graph.way(model, at))),
    };
    while at < graph.worlds.len() {
        let here = u32::try_from(at).unwrap();
        let world = graph.worlds[at];
        for action in model.actions(&world) {
            let next = match model.apply(&world, action) {
                Ok(Some(next)) => next,
                Ok(None) => continue,
                Err(text) => {
                    let text = format!("{text}, by {}", model.describe_action(action));
                    return violated(&graph, &model, text, here, steps);
                }
            };
            if next == world {
                continue;
            }
            steps += 1;
            let there = *known.entry(fingerprint(&next)).or_insert_with(|| {
                graph.worlds.push(next);
                graph.from.push((here, action));
                u32::try_from(graph.worlds.len() - 1).unwrap()
            });
            if !action.is_fault() {
                edges.push((there, here));
            }
        }
        at += 1;
        if graph.worlds.len() > bound {
            panic!("{name}: more than {bound} states, the last one by\n{}", graph.way(&model, here));
        }
    }
    let settled: Vec<u32> =
        (0..).zip(&graph.worlds).filter(|(_, world)| model.is_settled(world)).map(|(n, _)| n).collect();
    match stuck(&edges, &settled, graph.worlds.len()) {
        Some(at) => violated(&graph, &model, "from here nothing good can come any more".to_owned(), at, steps),
        None => {
            let ends =
                graph.worlds.iter().filter_map(|world| model.record(world).last).map(|last| last.phase).collect();
            Explored { states: graph.worlds.len(), steps, settled: settled.len(), ends, violation: None }
        }
    }
}

/// The first state from which no settled one can be reached without faults.
fn stuck(edges: &[(u32, u32)], settled: &[u32], states: usize) -> Option<u32> {
    let mut sorted = edges.to_vec();
    sorted.sort_unstable();
    let mut good = vec![false; states];
    let mut open: Vec<u32> = settled.to_vec();
    for at in settled {
        good[*at as usize] = true;
    }
    while let Some(at) = open.pop() {
        let first = sorted.partition_point(|(to, _)| *to < at);
        for (_, from) in sorted[first..].iter().take_while(|(to, _)| *to == at) {
            if !std::mem::replace(&mut good[*from as usize], true) {
                open.push(*from);
            }
        }
    }
    good.iter().position(|good| !good).and_then(|at| u32::try_from(at).ok())
}
