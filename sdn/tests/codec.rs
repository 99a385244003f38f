//! The codec against itself, against an independent implementation (Open vSwitch's own tools), and against mutations.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::process::Command;

use proptest::{prelude::*, strategy::ValueTree};
use supercloud_sdn::openflow::{
    Action, BUNDLE_ATOMIC, Bucket, BundleControl, Field, FlowCommand, FlowMod, FlowStats, Group, GroupKind, GroupMod,
    Instruction, METER_BURST, METER_PKTPS, Match, Message, Meter, MeterMod, MultipartReply, MultipartRequest, PacketIn,
    PacketOut, PortCounters, PortDesc, TableCommand, port,
};

fn field() -> impl Strategy<Value = Field> {
    proptest::sample::select(Field::ALL)
}

fn matching() -> impl Strategy<Value = Match> {
    proptest::collection::vec((field(), any::<u128>(), any::<u128>()), 0..8).prop_map(|entries| {
        entries.into_iter().fold(Match::any(), |m, (f, value, mask)| {
            if mask % 3 == 0 { m.with_mask(f, value, mask) } else { m.with(f, value & f.ones()) }
        })
    })
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        (any::<u32>(), any::<u16>()).prop_map(|(port, max_len)| Action::Output { port, max_len }),
        any::<u32>().prop_map(Action::Group),
        (field(), any::<u128>()).prop_map(|(f, v)| Action::SetField(f, v & f.ones())),
        (field(), field()).prop_map(|(a, b)| Action::copy(a, b)),
        (field(), any::<u64>()).prop_map(|(dst, value)| {
            let bits = (8 * dst.len()).min(64) as u16;
            Action::Load { dst, bit: 0, bits, value: value & (u64::MAX >> (64 - bits)) }
        }),
        (any::<u16>(), any::<u8>()).prop_map(|(port, table)| Action::Resubmit { port, table }),
    ]
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    proptest::collection::vec(action(), 0..6)
}

fn instructions() -> impl Strategy<Value = Vec<Instruction>> {
    let one = prop_oneof![
        any::<u8>().prop_map(Instruction::GotoTable),
        actions().prop_map(Instruction::Apply),
        actions().prop_map(Instruction::Write),
        Just(Instruction::Clear),
        any::<u32>().prop_map(Instruction::Meter),
    ];
    proptest::collection::vec(one, 0..4)
}

fn flow_mod() -> impl Strategy<Value = FlowMod> {
    use FlowCommand::*;
    let command = proptest::sample::select(vec![Add, Modify, ModifyStrict, Delete, DeleteStrict]);
    (command, any::<(u8, u16, u64, u64, u16)>(), matching(), instructions()).prop_map(
        |(command, (table, priority, cookie, cookie_mask, idle), matching, instructions)| FlowMod {
            command,
            table,
            priority,
            cookie,
            cookie_mask,
            idle_timeout_s: idle,
            hard_timeout_s: idle / 2,
            flags: idle & 7,
            matching,
            instructions,
        },
    )
}

fn flow_stats() -> impl Strategy<Value = FlowStats> {
    flow_mod().prop_map(|f| FlowStats {
        table: f.table,
        priority: f.priority,
        cookie: f.cookie,
        duration_s: u32::from(f.priority),
        idle_timeout_s: f.idle_timeout_s,
        hard_timeout_s: f.hard_timeout_s,
        flags: f.flags,
        packets: f.cookie_mask,
        bytes: f.cookie_mask / 2,
        matching: f.matching,
        instructions: f.instructions,
    })
}

fn group() -> impl Strategy<Value = Group> {
    let kind =
        proptest::sample::select(vec![GroupKind::All, GroupKind::Select, GroupKind::Indirect, GroupKind::FastFailover]);
    let bucket = (any::<(u16, u32, u32)>(), actions())
        .prop_map(|((weight, watch_port, watch_group), actions)| Bucket { weight, watch_port, watch_group, actions });
    (any::<u32>(), kind, proptest::collection::vec(bucket, 0..4)).prop_map(|(id, kind, buckets)| Group {
        id,
        kind,
        buckets,
    })
}

fn meter() -> impl Strategy<Value = Meter> {
    any::<(u32, u32, u32)>().prop_map(|(id, rate, burst)| Meter { id, flags: METER_PKTPS | METER_BURST, rate, burst })
}

fn port_desc() -> impl Strategy<Value = PortDesc> {
    (any::<(u32, [u8; 6], u32, u32)>(), "[a-z0-9]{0,15}")
        .prop_map(|((number, hw_addr, config, state), name)| PortDesc { number, hw_addr, name, config, state })
}

fn data() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..100)
}

fn message() -> impl Strategy<Value = Message> {
    let requests = prop_oneof![
        (any::<(u8, u64, u64)>(), matching()).prop_map(|((table, cookie, cookie_mask), matching)| {
            MultipartRequest::Flows { table, cookie, cookie_mask, matching }
        }),
        any::<u32>().prop_map(|port| MultipartRequest::PortStats { port }),
        Just(MultipartRequest::GroupDesc),
        Just(MultipartRequest::MeterConfig),
        Just(MultipartRequest::PortDesc),
    ];
    let counters = any::<(u32, u64, u64)>().prop_map(|(port, a, b)| PortCounters {
        port,
        rx_packets: a,
        tx_packets: b,
        rx_bytes: a ^ b,
        tx_bytes: !a,
        rx_dropped: !b,
        tx_dropped: 0,
    });
    let parts = prop_oneof![
        proptest::collection::vec(flow_stats(), 0..4).prop_map(MultipartReply::Flows),
        proptest::collection::vec(counters, 0..4).prop_map(MultipartReply::PortStats),
        proptest::collection::vec(group(), 0..4).prop_map(MultipartReply::GroupDesc),
        proptest::collection::vec(meter(), 0..4).prop_map(MultipartReply::MeterConfig),
        proptest::collection::vec(port_desc(), 0..4).prop_map(MultipartReply::PortDesc),
    ];
    let table = proptest::sample::select(vec![TableCommand::Add, TableCommand::Modify]);
    prop_oneof![
        proptest::option::of(any::<u32>()).prop_map(|versions| Message::Hello { versions }),
        (any::<(u16, u16)>(), data()).prop_map(|((kind, code), data)| Message::Error { kind, code, data }),
        data().prop_map(Message::EchoRequest),
        data().prop_map(Message::EchoReply),
        any::<(u64, u32, u8, u32)>().prop_map(|(datapath_id, buffers, tables, capabilities)| {
            Message::FeaturesReply { datapath_id, buffers, tables, capabilities }
        }),
        any::<(u16, u16)>().prop_map(|(flags, miss_send_len)| Message::SetConfig { flags, miss_send_len }),
        (any::<(u8, u8, u64, u16)>(), matching(), data()).prop_map(|((reason, table, cookie, len), matching, data)| {
            Message::PacketIn(PacketIn { reason, table, cookie, total_len: len, matching, data })
        }),
        (any::<u8>(), port_desc()).prop_map(|(reason, port)| Message::PortStatus { reason, port }),
        (any::<u32>(), actions(), data()).prop_map(|(in_port, actions, data)| Message::PacketOut(PacketOut {
            in_port,
            actions,
            data
        })),
        flow_mod().prop_map(Message::FlowMod),
        (table.clone(), group()).prop_map(|(command, group)| Message::GroupMod(GroupMod { command, group })),
        (table, meter()).prop_map(|(command, meter)| Message::MeterMod(MeterMod { command, meter })),
        requests.prop_map(Message::MultipartRequest),
        (any::<bool>(), parts).prop_map(|(more, part)| Message::MultipartReply { more, part }),
        Just(Message::BarrierRequest),
        any::<(u32, u64)>().prop_map(|(role, generation)| Message::RoleReply { role, generation }),
        any::<(u32, u16)>().prop_map(|(bundle, flags)| Message::BundleControl {
            bundle,
            control: BundleControl::CommitRequest,
            flags,
        }),
        (any::<(u32, u16)>(), flow_mod()).prop_map(|((bundle, flags), inner)| Message::BundleAdd {
            bundle,
            flags,
            message: Box::new(Message::FlowMod(inner)),
        }),
    ]
}

proptest! {
    #[test]
    fn every_message_survives_the_wire(message in message(), xid: u32) {
        let bytes = message.encode(xid).unwrap();
        prop_assert_eq!(Message::decode(&bytes), Ok((xid, message)));
    }

    #[test]
    fn any_bytes_are_a_message_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Message::decode(&bytes);
    }
}

/// xorshift64*: the same mutations in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % below
    }
}

#[test]
fn mutated_messages_are_messages_or_errors() {
    const SEED: u64 = 0x5c0d_e001;
    println!("seed {SEED:#x}");
    let mut dice = Dice(SEED);
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let (mut read, mut refused) = (0, 0);
    for _ in 0..400 {
        let bytes = message().new_tree(&mut runner).unwrap().current().encode(7).unwrap();
        for _ in 0..50 {
            let mut mutant = bytes.clone();
            for _ in 0..=dice.roll(3) {
                let at = dice.roll(mutant.len());
                match dice.roll(4) {
                    0 => mutant[at] ^= 1 << dice.roll(8),
                    1 => mutant[at] = [0, 1, 0x7f, 0x80, 0xff][dice.roll(5)],
                    2 if at >= 8 => mutant.truncate(at),
                    _ => mutant.insert(at, dice.roll(256) as u8),
                }
                // Half of them with a length that is right, so that they come past the header.
                if mutant.len() >= 8 && dice.roll(2) == 0 {
                    let len = (mutant.len() as u16).to_be_bytes();
                    mutant[2..4].copy_from_slice(&len);
                }
            }
            match Message::decode(&mutant) {
                // What is taken in can be written again.
                Ok((xid, message)) => {
                    read += 1;
                    let again = message.encode(xid).unwrap();
                    assert!(again.len() <= mutant.len() + 64, "{message:?}");
                }
                Err(_) => refused += 1,
            }
        }
    }
    assert!(read > 1000 && refused > 1000, "{read} read, {refused} refused");
}

/// What `ovs-ofctl` reads in the message, or that there is no such tool.
fn ofctl(message: &Message) -> Option<String> {
    let hex: String = message.encode(1).unwrap().iter().map(|b| format!("{b:02x}")).collect();
    match Command::new("ovs-ofctl").args(["ofp-print", &hex, "3"]).output() {
        Ok(out) => Some(String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)),
        Err(err) => {
            assert!(
                std::env::var_os("SUPERCLOUD_REQUIRE").is_none(),
                "SUPERCLOUD_REQUIRE is set, but there is no ovs-ofctl ({err})"
            );
            println!("SKIPPED: no ovs-ofctl ({err})");
            None
        }
    }
}

fn add(matching: Match, instructions: Vec<Instruction>) -> Message {
    Message::FlowMod(FlowMod {
        command: FlowCommand::Add,
        table: 2,
        priority: 100,
        cookie: 0x5c,
        cookie_mask: 0,
        idle_timeout_s: 0,
        hard_timeout_s: 0,
        flags: 0,
        matching,
        instructions,
    })
}

#[test]
fn open_vswitch_reads_what_we_write() {
    let nd = Match::any()
        .with(Field::Reg0, 0x65_u8)
        .with(Field::EthType, 0x86dd_u16)
        .with(Field::IpProto, 58_u8)
        .with(Field::Icmpv6Type, 135_u8)
        .with(Field::NdTarget, 1_u8)
        .with(Field::NdOptionsType, 1_u8);
    let nd_actions = vec![
        Action::copy(Field::Ipv6Src, Field::Ipv6Dst),
        Action::SetField(Field::NdSll, 0x0200_0000_0001),
        Action::SetField(Field::NdOptionsType, 2),
        Action::SetField(Field::NdReserved, 0x6000_0000),
        Action::SetField(Field::Icmpv6Type, 136),
        Action::output(port::IN_PORT),
    ];
    let flood = Match::any().with(Field::Reg1, 2_u8).with_mask(Field::EthDst, 1_u128 << 40, 1 << 40);
    let flow = add(nd.clone(), vec![Instruction::Apply(nd_actions)]);
    let bundle = Message::BundleAdd { bundle: 9, flags: BUNDLE_ATOMIC, message: Box::new(add(flood.clone(), vec![])) };
    let bucket = Bucket { weight: 0, watch_port: port::ANY, watch_group: u32::MAX, actions: vec![Action::output(3)] };
    let cases: Vec<(Message, &[&str])> = vec![
        (Message::Hello { versions: Some(0x10) }, &["OFPT_HELLO", "version bitmap: 0x04"]),
        (Message::SetConfig { flags: 0, miss_send_len: 0xffff }, &["OFPT_SET_CONFIG", "miss_send_len=65535"]),
        (
            flow,
            &[
                "ADD table:2 priority=100,icmp6,reg0=0x65,icmp_type=135,nd_target=::1,nd_options_type=1 cookie:0x5c",
                "move:NXM_NX_IPV6_SRC[]->NXM_NX_IPV6_DST[],set_field:02:00:00:00:00:01->nd_sll,\
                 set_field:2->nd_options_type,set_field:1610612736->nd_reserved,set_field:136->icmpv6_type,IN_PORT",
            ],
        ),
        (
            add(
                flood,
                vec![
                    Instruction::Meter(4),
                    Instruction::Apply(vec![
                        Action::SetField(Field::TunnelId, 0x80_0065),
                        Action::Load { dst: Field::Reg3, bit: 4, bits: 8, value: 0xab },
                        Action::Resubmit { port: 0xfff8, table: 3 },
                        Action::Group(6),
                        Action::Output { port: port::CONTROLLER, max_len: 0xffff },
                    ]),
                    Instruction::GotoTable(3),
                ],
            ),
            &[
                "reg1=0x2,dl_dst=01:00:00:00:00:00/01:00:00:00:00:00",
                "meter:4,set_field:0x800065->tun_id,load:0xab->NXM_NX_REG3[4..11],resubmit(,3),group:6,\
                 CONTROLLER:65535,goto_table:3",
            ],
        ),
        (bundle, &["ONFT_BUNDLE_ADD_MESSAGE", "bundle_id=0x9 flags=atomic", "OFPT_FLOW_MOD"]),
        (
            Message::BundleControl { bundle: 9, control: BundleControl::CommitRequest, flags: 3 },
            &["bundle_id=0x9 type=COMMIT_REQUEST flags=atomic ordered"],
        ),
        (
            Message::GroupMod(GroupMod {
                command: TableCommand::Add,
                group: Group { id: 5, kind: GroupKind::All, buckets: vec![bucket] },
            }),
            &["ADD group_id=5,type=all", "actions=output:3"],
        ),
        (
            Message::MeterMod(MeterMod {
                command: TableCommand::Add,
                meter: Meter { id: 7, flags: METER_PKTPS | METER_BURST, rate: 8, burst: 16 },
            }),
            &["ADD meter=7 pktps burst bands=", "type=drop rate=8 burst_size=16"],
        ),
        (
            Message::PacketOut(PacketOut {
                in_port: port::CONTROLLER,
                actions: vec![Action::output(2)],
                data: vec![0; 60],
            }),
            &["in_port=CONTROLLER actions=output:2 data_len=60"],
        ),
        (Message::MultipartRequest(MultipartRequest::all_flows()), &["OFPST_FLOW request"]),
        (Message::MultipartRequest(MultipartRequest::MeterConfig), &["OFPST_METER_CONFIG request", "meter=all"]),
        (Message::MultipartRequest(MultipartRequest::GroupDesc), &["OFPST_GROUP_DESC request"]),
        (Message::MultipartRequest(MultipartRequest::PortDesc), &["OFPST_PORT_DESC request"]),
        (Message::MultipartRequest(MultipartRequest::PortStats { port: 3 }), &["OFPST_PORT request", "port_no=3"]),
        (Message::RoleRequest { role: 1, generation: 5 }, &["OFPT_ROLE_REQUEST", "role=equal"]),
    ];
    for (message, wanted) in cases {
        let Some(said) = ofctl(&message) else { return };
        for part in wanted {
            assert!(said.contains(part), "'{part}' in\n{said}\nfor {message:?}");
        }
    }
}
