//! Flow tables as data, and the changes that turn what a switch has into what it should have.

use std::collections::BTreeMap;

use crate::openflow::{FlowCommand, FlowMod, FlowStats, Instruction, Match, Message, Meter, MeterMod, TableCommand};

/// What names a flow in a switch: adding a second one with the same key replaces the first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKey {
    /// The table.
    pub table: u8,
    /// Higher ones win.
    pub priority: u16,
    /// Which packets.
    pub matching: Match,
}

/// What a flow does.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FlowBody {
    /// Its mark, see [`crate::compile::Cookie`].
    pub cookie: u64,
    /// What happens to its packets; empty drops.
    pub instructions: Vec<Instruction>,
}

/// Everything a switch should hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FlowTables {
    flows: BTreeMap<FlowKey, FlowBody>,
    meters: BTreeMap<u32, Meter>,
}

/// The changes that a switch needs. Meters cannot be part of a bundle in Open vSwitch: new ones come before it, old
/// ones go after it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Changes {
    /// Meters to add or change first.
    pub meters_before: Vec<MeterMod>,
    /// Flows to add, change and remove, in one atomic bundle.
    pub flows: Vec<FlowMod>,
    /// Meters to remove afterwards.
    pub meters_after: Vec<MeterMod>,
}

impl Changes {
    /// Whether the switch is as it should be.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.meters_before.is_empty() && self.flows.is_empty() && self.meters_after.is_empty()
    }

    /// Flows added or replaced, and flows removed.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        let added = self.flows.iter().filter(|f| f.command == FlowCommand::Add).count();
        (added, self.flows.len() - added)
    }

    /// The flow changes as messages for a bundle.
    #[must_use]
    pub fn bundle(&self) -> Vec<Message> {
        self.flows.iter().cloned().map(Message::FlowMod).collect()
    }
}

impl FlowTables {
    /// Adds a flow. A second one with the same key is a mistake of the compiler and replaces the first.
    pub(crate) fn add(
        &mut self,
        table: u8,
        priority: u16,
        matching: Match,
        cookie: u64,
        instructions: Vec<Instruction>,
    ) {
        let key = FlowKey { table, priority, matching };
        let old = self.flows.insert(key, FlowBody { cookie, instructions });
        debug_assert!(old.is_none(), "two flows with one key");
    }

    pub(crate) fn add_meter(&mut self, meter: Meter) {
        self.meters.insert(meter.id, meter);
    }

    /// The flows in order of table, priority and match.
    pub fn flows(&self) -> impl Iterator<Item = (&FlowKey, &FlowBody)> {
        self.flows.iter()
    }

    /// The meters in order of their numbers.
    pub fn meters(&self) -> impl Iterator<Item = &Meter> {
        self.meters.values()
    }

    /// Number of flows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    /// Whether there is no flow.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// What must change in a switch that has these flows and meters. A flow that is right is not touched. What is in
    /// the switch and not in the tables goes, whoever made it: the bridge has one programmer.
    #[must_use]
    pub fn changes_from(&self, have: &[FlowStats], meters: &[Meter]) -> Changes {
        let mut changes = Changes::default();
        let mut right = std::collections::BTreeSet::new();
        for flow in have {
            let key = FlowKey { table: flow.table, priority: flow.priority, matching: flow.matching.clone() };
            match self.flows.get(&key) {
                Some(body) => {
                    let same = body.cookie == flow.cookie
                        && body.instructions == flow.instructions
                        && flow.idle_timeout_s == 0
                        && flow.hard_timeout_s == 0;
                    if same {
                        right.insert(key);
                    }
                }
                None => changes.flows.push(flow_mod(FlowCommand::DeleteStrict, &key, None)),
            }
        }
        for (key, body) in &self.flows {
            if !right.contains(key) {
                changes.flows.push(flow_mod(FlowCommand::Add, key, Some(body)));
            }
        }
        let have: BTreeMap<u32, &Meter> = meters.iter().map(|m| (m.id, m)).collect();
        for meter in self.meters.values() {
            let command = match have.get(&meter.id) {
                Some(same) if *same == meter => continue,
                Some(_) => TableCommand::Modify,
                None => TableCommand::Add,
            };
            changes.meters_before.push(MeterMod { command, meter: meter.clone() });
        }
        for meter in meters.iter().filter(|m| !self.meters.contains_key(&m.id)) {
            changes.meters_after.push(MeterMod { command: TableCommand::Delete, meter: meter.clone() });
        }
        changes
    }
}

fn flow_mod(command: FlowCommand, key: &FlowKey, body: Option<&FlowBody>) -> FlowMod {
    FlowMod {
        command,
        table: key.table,
        priority: key.priority,
        cookie: body.map_or(0, |b| b.cookie),
        cookie_mask: 0,
        idle_timeout_s: 0,
        hard_timeout_s: 0,
        flags: 0,
        matching: key.matching.clone(),
        instructions: body.map(|b| b.instructions.clone()).unwrap_or_default(),
    }
}
