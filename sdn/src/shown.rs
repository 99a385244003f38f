//! Flows as text for people, close to what Open vSwitch's `ovs-ofctl dump-flows` writes; switch ports by names where they have any.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use crate::{
    addr::MacAddr,
    openflow::{Action, Field, Instruction, Match, port},
};

/// What switch ports are called.
pub type PortNames = BTreeMap<u32, String>;

fn port_name(number: u32, names: &PortNames) -> String {
    match (number, names.get(&number)) {
        (port::IN_PORT, _) => "in_port".to_owned(),
        (port::CONTROLLER, _) => "agent".to_owned(),
        (_, Some(name)) => name.clone(),
        (_, None) => number.to_string(),
    }
}

fn value(field: Field, value: u128, names: &PortNames) -> String {
    let mac = |value: u128| {
        let [.., a, b, c, d, e, f] = value.to_be_bytes();
        MacAddr([a, b, c, d, e, f]).to_string()
    };
    // Values are never wider than their fields, so nothing is cut off.
    let narrow = |value: u128| u32::try_from(value & u128::from(u32::MAX)).unwrap_or(u32::MAX);
    match field {
        Field::InPort => port_name(narrow(value), names),
        Field::EthDst | Field::EthSrc | Field::ArpSha | Field::ArpTha | Field::NdSll | Field::NdTll => mac(value),
        Field::Ipv4Src
        | Field::Ipv4Dst
        | Field::ArpSpa
        | Field::ArpTpa
        | Field::TunnelIpv4Src
        | Field::TunnelIpv4Dst => Ipv4Addr::from(narrow(value)).to_string(),
        Field::Ipv6Src | Field::Ipv6Dst | Field::NdTarget => Ipv6Addr::from(value).to_string(),
        Field::EthType | Field::TunnelId | Field::Reg0 => format!("{value:#x}"),
        _ => value.to_string(),
    }
}

/// Which packets: `in_port=tap1,eth_type=0x800`; `any` where all.
#[must_use]
pub fn matching(matching: &Match, names: &PortNames) -> String {
    let entry = |(field, worth, mask): (Field, u128, u128)| {
        let worth = value(field, worth, names);
        if mask == field.ones() {
            format!("{}={worth}", field.name())
        } else {
            format!("{}={worth}/{}", field.name(), value(field, mask, &PortNames::new()))
        }
    };
    let mut parts: Vec<String> = matching.fields().map(entry).collect();
    if matching.has_unknown() {
        parts.push("…".to_owned());
    }
    if parts.is_empty() { "any".to_owned() } else { parts.join(",") }
}

fn action(action: &Action, names: &PortNames) -> String {
    match action {
        Action::Output { port, .. } => format!("output:{}", port_name(*port, names)),
        Action::Group(group) => format!("group:{group}"),
        Action::SetField(field, worth) => format!("set:{}={}", field.name(), value(*field, *worth, names)),
        Action::Move { src, dst, .. } => format!("move:{}->{}", src.name(), dst.name()),
        Action::Load { dst, value: worth, .. } => format!("load:{worth:#x}->{}", dst.name()),
        Action::Resubmit { table, .. } => format!("resubmit:{table}"),
        Action::Unknown(_) => "…".to_owned(),
    }
}

/// What happens to them: `set:reg1=1,goto:4`; `drop` where nothing.
#[must_use]
pub fn actions(instructions: &[Instruction], names: &PortNames) -> String {
    let mut parts = Vec::new();
    for instruction in instructions {
        match instruction {
            Instruction::GotoTable(table) => parts.push(format!("goto:{table}")),
            Instruction::Apply(list) => parts.extend(list.iter().map(|one| action(one, names))),
            Instruction::Write(list) => parts.extend(list.iter().map(|one| format!("write({})", action(one, names)))),
            Instruction::Clear => parts.push("clear".to_owned()),
            Instruction::Meter(meter) => parts.push(format!("meter:{meter}")),
            Instruction::Unknown(_) => parts.push("…".to_owned()),
        }
    }
    if parts.is_empty() { "drop".to_owned() } else { parts.join(",") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_read_as_the_switchs_own_tools_write_them() {
        let names = PortNames::from([(7, "tap7".to_owned()), (1002, "to h2".to_owned())]);
        let from = Match::any()
            .with(Field::InPort, 7_u32)
            .with(Field::EthSrc, 0x0200_0000_0001_u64)
            .with(Field::EthType, 0x0800_u16)
            .with(Field::Ipv4Src, 0x0a4d_000b_u32);
        assert_eq!(matching(&from, &names), "in_port=tap7,eth_src=02:00:00:00:00:01,eth_type=0x800,ip_src=10.77.0.11");
        let group = Match::any().with_mask(Field::EthDst, 0x0100_0000_0000_u64, 0x0100_0000_0000);
        assert_eq!(matching(&group, &names), "eth_dst=01:00:00:00:00:00/01:00:00:00:00:00");
        assert_eq!((matching(&Match::any(), &names).as_str(), actions(&[], &names).as_str()), ("any", "drop"));
        let away = [
            Instruction::Meter(3),
            Instruction::Apply(vec![Action::SetField(Field::TunnelId, 101), Action::output(1002), Action::output(9)]),
            Instruction::GotoTable(4),
        ];
        assert_eq!(actions(&away, &names), "meter:3,set:tun_id=0x65,output:to h2,output:9,goto:4");
        let turn = Instruction::Apply(vec![Action::copy(Field::EthSrc, Field::EthDst), Action::output(port::IN_PORT)]);
        assert_eq!(actions(&[turn], &names), "move:eth_src->eth_dst,output:in_port");
    }
}
