//! Matches, actions, instructions, and the messages that change and show flows, groups and meters.

use std::collections::BTreeMap;

use super::{
    field::Field,
    wire::{DecodeError, Reader, Writer},
};

/// Reserved port numbers (OpenFlow 1.3.5, section 7.2.1).
pub mod port {
    /// Back to where the packet came from.
    pub const IN_PORT: u32 = 0xffff_fff8;
    /// To the controller.
    pub const CONTROLLER: u32 = 0xffff_fffd;
    /// The bridge's own interface.
    pub const LOCAL: u32 = 0xffff_fffe;
    /// Any port, in requests.
    pub const ANY: u32 = 0xffff_ffff;
    /// Through the tables, in packet-out.
    pub const TABLE: u32 = 0xffff_fff9;
}

/// No packet buffer of the switch.
pub const NO_BUFFER: u32 = 0xffff_ffff;
/// Whole packets to the controller.
pub const WHOLE_PACKET: u16 = 0xffff;
const NICIRA: u32 = 0x0000_2320;

/// Which packets a flow is for: all of its entries must hold.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Match {
    fields: BTreeMap<Field, (u128, u128)>,
    /// Entries of fields that are not known here, as they came, so that a foreign flow can still be named.
    unknown: Vec<u8>,
}

impl Match {
    /// A match of every packet.
    #[must_use]
    pub fn any() -> Self {
        Self::default()
    }

    /// Adds an exact value. Bits beyond the field are cut off.
    #[must_use]
    pub fn with(self, field: Field, value: impl Into<u128>) -> Self {
        self.with_mask(field, value, field.ones())
    }

    /// Adds a value under a mask; a mask of zero adds nothing.
    #[must_use]
    pub fn with_mask(mut self, field: Field, value: impl Into<u128>, mask: u128) -> Self {
        let mask = mask & field.ones();
        if mask == 0 {
            self.fields.remove(&field);
        } else {
            self.fields.insert(field, (value.into() & mask, mask));
        }
        self
    }

    /// The entries: field, value, mask.
    pub fn fields(&self) -> impl Iterator<Item = (Field, u128, u128)> + '_ {
        self.fields.iter().map(|(f, (v, m))| (*f, *v, *m))
    }

    /// The value and mask of a field.
    #[must_use]
    pub fn get(&self, field: Field) -> Option<(u128, u128)> {
        self.fields.get(&field).copied()
    }

    /// Whether it has entries that this codec does not know.
    #[must_use]
    pub fn has_unknown(&self) -> bool {
        !self.unknown.is_empty()
    }

    pub(crate) fn put(&self, w: &mut Writer) -> bool {
        let start = w.len();
        w.u16(1);
        w.u16(0);
        for (field, value, mask) in self.fields() {
            field.put(w, value, (mask != field.ones()).then_some(mask));
        }
        w.bytes(&self.unknown);
        let fits = w.patch_len(start + 2, start);
        w.pad8(start);
        fits
    }

    pub(crate) fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let mut body = r.sized(2, 4, "match")?;
        let len = body.left();
        let kind = body.u16("match type")?;
        if kind != 1 {
            return Err(DecodeError::Value { what: "match type", got: kind.into() });
        }
        body.skip(2, "match length")?;
        let mut made = Match::default();
        while body.left() > 0 {
            match Field::take(&mut body)? {
                Ok((field, value, mask)) => {
                    let mask = mask.unwrap_or(field.ones());
                    if mask != 0 && made.fields.insert(field, (value, mask)).is_some() {
                        return Err(DecodeError::Value { what: "repeated match field", got: 0 });
                    }
                }
                Err(raw) => made.unknown.extend_from_slice(&raw),
            }
        }
        r.skip(len.next_multiple_of(8) - len, "padding of a match")?;
        Ok(made)
    }
}

/// What happens to a packet.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// Out by a port. `max_len` counts for the controller only: bytes of the packet to send.
    Output {
        /// The port number.
        port: u32,
        /// Bytes for the controller; 0 for other ports.
        max_len: u16,
    },
    /// Through a group.
    Group(u32),
    /// A field gets a value.
    SetField(Field, u128),
    /// Bits of one field are copied to another.
    Move {
        /// From this field.
        src: Field,
        /// From this bit.
        src_bit: u16,
        /// To this field.
        dst: Field,
        /// To this bit.
        dst_bit: u16,
        /// Number of bits.
        bits: u16,
    },
    /// Bits of a field get a value (1 to 64 bits).
    Load {
        /// The field.
        dst: Field,
        /// From this bit.
        bit: u16,
        /// Number of bits, 1 to 64.
        bits: u16,
        /// The value.
        value: u64,
    },
    /// Goes on in another table and comes back.
    Resubmit {
        /// As if it had come by this port; 0xfff8 for the one it came by.
        port: u16,
        /// The table.
        table: u8,
    },
    /// An action that is not known here, as it came.
    Unknown(Vec<u8>),
}

impl Action {
    /// Output to a port of the switch.
    #[must_use]
    pub const fn output(port: u32) -> Self {
        Action::Output { port, max_len: 0 }
    }

    /// Copy of a whole field.
    #[must_use]
    pub const fn copy(src: Field, dst: Field) -> Self {
        let bits = 8 * if src.len() < dst.len() { src.len() } else { dst.len() };
        Action::Move { src, src_bit: 0, dst, dst_bit: 0, bits: bits as u16 }
    }

    pub(crate) fn put(&self, w: &mut Writer) -> bool {
        let start = w.len();
        match self {
            Action::Output { port, max_len } => {
                w.u16(0);
                w.u16(0);
                w.u32(*port);
                w.u16(*max_len);
                w.zeros(6);
            }
            Action::Group(group) => {
                w.u16(22);
                w.u16(0);
                w.u32(*group);
            }
            Action::SetField(field, value) => {
                w.u16(25);
                w.u16(0);
                field.put(w, *value & field.ones(), None);
                w.pad8(start);
            }
            Action::Move { src, src_bit, dst, dst_bit, bits } => {
                nicira(w, 6);
                w.u16(*bits);
                w.u16(*src_bit);
                w.u16(*dst_bit);
                for field in [src, dst] {
                    w.u32(field.header());
                }
                w.pad8(start);
            }
            Action::Load { dst, bit, bits, value } => {
                nicira(w, 7);
                w.u16(bit << 6 | (bits.saturating_sub(1) & 0x3f));
                w.u32(dst.header());
                w.u64(*value);
            }
            Action::Resubmit { port, table } => {
                nicira(w, 14);
                w.u16(*port);
                w.u8(*table);
                w.zeros(3);
            }
            Action::Unknown(raw) => {
                w.bytes(raw);
                return true;
            }
        }
        w.patch_len(start + 2, start)
    }

    pub(crate) fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let mut body = r.sized(2, 8, "action")?;
        let whole = body.clone().rest();
        if whole.len() % 8 != 0 {
            return Err(DecodeError::Length { what: "action", got: whole.len() });
        }
        let kind = body.u16("action type")?;
        body.skip(2, "action length")?;
        let unknown = || Action::Unknown(whole.to_vec());
        Ok(match (kind, whole.len()) {
            (0, 16) => Action::Output { port: body.u32("output port")?, max_len: body.u16("output length")? },
            (22, 8) => Action::Group(body.u32("group")?),
            (25, _) => match Field::take(&mut body)? {
                Ok((field, value, None)) => Action::SetField(field, value),
                // A masked set-field is of OpenFlow 1.5; one of a foreign field is kept as it came.
                _ => unknown(),
            },
            (0xffff, _) => Action::take_nicira(&mut body).unwrap_or_else(|_| unknown()),
            _ => unknown(),
        })
    }

    fn take_nicira(body: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let other = |got: u64| DecodeError::Value { what: "experimenter action", got };
        let vendor = body.u32("experimenter")?;
        if vendor != NICIRA {
            return Err(other(vendor.into()));
        }
        match body.u16("Nicira action")? {
            6 => {
                let bits = body.u16("bits")?;
                let (src_bit, dst_bit) = (body.u16("source bit")?, body.u16("destination bit")?);
                let (src, dst) = (Field::take_header(body)?, Field::take_header(body)?);
                let room = |f: Field, bit: u16| usize::from(bit) + usize::from(bits) <= 8 * f.len();
                if bits == 0 || !room(src, src_bit) || !room(dst, dst_bit) {
                    return Err(other(6));
                }
                Ok(Action::Move { src, src_bit, dst, dst_bit, bits })
            }
            7 => {
                let place = body.u16("bits")?;
                let (bit, bits) = (place >> 6, (place & 0x3f) + 1);
                let dst = Field::take_header(body)?;
                let value = body.u64("value")?;
                if usize::from(bit + bits) > 8 * dst.len() || (bits < 64 && value >> bits != 0) {
                    return Err(other(7));
                }
                Ok(Action::Load { dst, bit, bits, value })
            }
            14 => {
                let port = body.u16("port")?;
                Ok(Action::Resubmit { port, table: body.u8("table")? })
            }
            subtype => Err(other(subtype.into())),
        }
    }

    pub(crate) fn put_all(actions: &[Action], w: &mut Writer) -> bool {
        actions.iter().all(|a| a.put(w))
    }

    pub(crate) fn take_all(mut r: Reader<'_>) -> Result<Vec<Action>, DecodeError> {
        let mut actions = Vec::new();
        while r.left() > 0 {
            actions.push(Action::take(&mut r)?);
        }
        Ok(actions)
    }
}

fn nicira(w: &mut Writer, subtype: u16) {
    w.u16(0xffff);
    w.u16(0);
    w.u32(NICIRA);
    w.u16(subtype);
}

/// What a flow does with its packets.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Instruction {
    /// Goes on in a later table.
    GotoTable(u8),
    /// Carries the actions out at once.
    Apply(Vec<Action>),
    /// Adds the actions to the set that is carried out at the end.
    Write(Vec<Action>),
    /// Empties that set.
    Clear,
    /// Passes a meter, which may drop the packet.
    Meter(u32),
    /// An instruction that is not known here, as it came.
    Unknown(Vec<u8>),
}

impl Instruction {
    pub(crate) fn put(&self, w: &mut Writer) -> bool {
        let start = w.len();
        let mut fits = true;
        match self {
            Instruction::GotoTable(table) => {
                w.u16(1);
                w.u16(0);
                w.u8(*table);
                w.zeros(3);
            }
            Instruction::Apply(actions) | Instruction::Write(actions) => {
                w.u16(if matches!(self, Instruction::Apply(_)) { 4 } else { 3 });
                w.u16(0);
                w.zeros(4);
                fits = Action::put_all(actions, w);
            }
            Instruction::Clear => {
                w.u16(5);
                w.u16(0);
                w.zeros(4);
            }
            Instruction::Meter(meter) => {
                w.u16(6);
                w.u16(0);
                w.u32(*meter);
            }
            Instruction::Unknown(raw) => {
                w.bytes(raw);
                return true;
            }
        }
        w.patch_len(start + 2, start) && fits
    }

    pub(crate) fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let mut body = r.sized(2, 8, "instruction")?;
        let whole = body.clone().rest();
        let kind = body.u16("instruction type")?;
        body.skip(2, "instruction length")?;
        Ok(match (kind, whole.len()) {
            (1, 8) => Instruction::GotoTable(body.u8("table")?),
            (3 | 4, _) => {
                body.skip(4, "padding of an instruction")?;
                let actions = Action::take_all(body)?;
                if kind == 4 { Instruction::Apply(actions) } else { Instruction::Write(actions) }
            }
            (5, 8) => Instruction::Clear,
            (6, 8) => Instruction::Meter(body.u32("meter")?),
            _ => Instruction::Unknown(whole.to_vec()),
        })
    }

    pub(crate) fn take_all(mut r: Reader<'_>) -> Result<Vec<Instruction>, DecodeError> {
        let mut all = Vec::new();
        while r.left() > 0 {
            all.push(Instruction::take(&mut r)?);
        }
        Ok(all)
    }
}

/// What a flow-mod does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FlowCommand {
    /// Adds a flow, or replaces the one with the same table, priority and match.
    Add = 0,
    /// Changes the instructions of all flows that the match covers.
    Modify = 1,
    /// Changes the instructions of the flow with this priority and match.
    ModifyStrict = 2,
    /// Removes all flows that the match covers.
    Delete = 3,
    /// Removes the flow with this priority and match.
    DeleteStrict = 4,
}

/// A change of a flow table.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FlowMod {
    /// What it does.
    pub command: FlowCommand,
    /// The table; 0xff for all, in deletions.
    pub table: u8,
    /// Higher ones win.
    pub priority: u16,
    /// A mark of the flow.
    pub cookie: u64,
    /// Bits of the cookie that must agree, in changes and deletions.
    pub cookie_mask: u64,
    /// Seconds without a packet after which it goes; 0 for never.
    pub idle_timeout_s: u16,
    /// Seconds after which it goes; 0 for never.
    pub hard_timeout_s: u16,
    /// OFPFF_* bits.
    pub flags: u16,
    /// Which packets.
    pub matching: Match,
    /// What happens to them; empty drops.
    pub instructions: Vec<Instruction>,
}

impl FlowMod {
    pub(crate) fn put(&self, w: &mut Writer) -> bool {
        w.u64(self.cookie);
        w.u64(self.cookie_mask);
        w.u8(self.table);
        w.u8(self.command as u8);
        w.u16(self.idle_timeout_s);
        w.u16(self.hard_timeout_s);
        w.u16(self.priority);
        w.u32(NO_BUFFER);
        w.u32(port::ANY);
        w.u32(u32::MAX);
        w.u16(self.flags);
        w.zeros(2);
        self.matching.put(w) && self.instructions.iter().all(|i| i.put(w))
    }

    pub(crate) fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (cookie, cookie_mask) = (r.u64("cookie")?, r.u64("cookie mask")?);
        let table = r.u8("table")?;
        let command = match r.u8("flow command")? {
            0 => FlowCommand::Add,
            1 => FlowCommand::Modify,
            2 => FlowCommand::ModifyStrict,
            3 => FlowCommand::Delete,
            4 => FlowCommand::DeleteStrict,
            got => return Err(DecodeError::Value { what: "flow command", got: got.into() }),
        };
        let (idle_timeout_s, hard_timeout_s) = (r.u16("idle timeout")?, r.u16("hard timeout")?);
        let priority = r.u16("priority")?;
        // Buffer and the out port and group of a filter are never used here.
        r.skip(12, "flow-mod")?;
        let flags = r.u16("flags")?;
        r.skip(2, "padding of a flow-mod")?;
        let matching = Match::take(r)?;
        let instructions = Instruction::take_all(Reader::new(r.rest()))?;
        Ok(Self {
            command,
            table,
            priority,
            cookie,
            cookie_mask,
            idle_timeout_s,
            hard_timeout_s,
            flags,
            matching,
            instructions,
        })
    }
}

/// A flow as the switch shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowStats {
    /// The table it is in.
    pub table: u8,
    /// Its priority.
    pub priority: u16,
    /// Its mark.
    pub cookie: u64,
    /// Seconds since it was added.
    pub duration_s: u32,
    /// Seconds without a packet after which it goes.
    pub idle_timeout_s: u16,
    /// Seconds after which it goes.
    pub hard_timeout_s: u16,
    /// OFPFF_* bits.
    pub flags: u16,
    /// Packets so far.
    pub packets: u64,
    /// Bytes so far.
    pub bytes: u64,
    /// Which packets.
    pub matching: Match,
    /// What happens to them.
    pub instructions: Vec<Instruction>,
}

impl FlowStats {
    pub(crate) fn put(&self, w: &mut Writer) -> bool {
        let start = w.len();
        w.u16(0);
        w.u8(self.table);
        w.zeros(1);
        w.u32(self.duration_s);
        w.u32(0);
        w.u16(self.priority);
        w.u16(self.idle_timeout_s);
        w.u16(self.hard_timeout_s);
        w.u16(self.flags);
        w.zeros(4);
        w.u64(self.cookie);
        w.u64(self.packets);
        w.u64(self.bytes);
        let fits = self.matching.put(w) && self.instructions.iter().all(|i| i.put(w));
        w.patch_len(start, start) && fits
    }

    pub(crate) fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let mut r = r.sized(0, 56, "flow stats")?;
        r.skip(2, "flow stats length")?;
        let table = r.u8("table")?;
        r.skip(1, "padding of flow stats")?;
        let duration_s = r.u32("duration")?;
        r.skip(4, "nanoseconds")?;
        let priority = r.u16("priority")?;
        let (idle_timeout_s, hard_timeout_s) = (r.u16("idle timeout")?, r.u16("hard timeout")?);
        let flags = r.u16("flags")?;
        r.skip(4, "padding of flow stats")?;
        let cookie = r.u64("cookie")?;
        let (packets, bytes) = (r.u64("packets")?, r.u64("bytes")?);
        let matching = Match::take(&mut r)?;
        let instructions = Instruction::take_all(r)?;
        Ok(Self {
            table,
            priority,
            cookie,
            duration_s,
            idle_timeout_s,
            hard_timeout_s,
            flags,
            packets,
            bytes,
            matching,
            instructions,
        })
    }
}
