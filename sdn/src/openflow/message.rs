//! Messages: header, body, and the bundle extension that the ONF defined for OpenFlow 1.3 (EXT-230).

use super::{
    flow::{Action, FlowMod, Match},
    group::{GroupMod, MeterMod},
    multipart::{MultipartReply, MultipartRequest},
    wire::{DecodeError, Reader, Writer},
};

/// The version byte of OpenFlow 1.3.
pub const VERSION: u8 = 4;
/// Bytes of a header.
pub const HEADER_LEN: usize = 8;
/// The largest message that the 16-bit length allows.
pub const MAX_LEN: usize = 65_535;
const ONF: u32 = 0x4f4e_4600;
const BUNDLE_CONTROL: u32 = 2300;
const BUNDLE_ADD: u32 = 2301;

/// A bundle is committed at once or not at all.
pub const BUNDLE_ATOMIC: u16 = 1;
/// The messages of a bundle take effect in their order.
pub const BUNDLE_ORDERED: u16 = 2;

/// Why a message cannot be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// It would be longer than the format's 16-bit lengths allow.
    #[error("an OpenFlow message of {len} bytes does not fit its 16-bit length")]
    TooLong {
        /// The bytes it would take.
        len: usize,
    },
}

/// Steps of a bundle (OFPBCT_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum BundleControl {
    /// Opens.
    OpenRequest = 0,
    /// Is open.
    OpenReply = 1,
    /// No more messages.
    CloseRequest = 2,
    /// Is closed.
    CloseReply = 3,
    /// Takes effect.
    CommitRequest = 4,
    /// Has taken effect.
    CommitReply = 5,
    /// Is thrown away.
    DiscardRequest = 6,
    /// Is gone.
    DiscardReply = 7,
}

impl BundleControl {
    fn from_wire(got: u16) -> Result<Self, DecodeError> {
        use BundleControl::*;
        [OpenRequest, OpenReply, CloseRequest, CloseReply, CommitRequest, CommitReply, DiscardRequest, DiscardReply]
            .get(usize::from(got))
            .copied()
            .ok_or(DecodeError::Value { what: "bundle control type", got: got.into() })
    }
}

/// A packet that the switch hands to the controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PacketIn {
    /// OFPR_*: 0 for a table miss, 1 for an action.
    pub reason: u8,
    /// The table that sent it.
    pub table: u8,
    /// The cookie of the flow that sent it.
    pub cookie: u64,
    /// Its length on the wire; `data` may be shorter.
    pub total_len: u16,
    /// Metadata, among it the port it came by.
    pub matching: Match,
    /// The frame.
    pub data: Vec<u8>,
}

/// A packet that the controller sends through the switch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PacketOut {
    /// As if it had come by this port.
    pub in_port: u32,
    /// What happens to it.
    pub actions: Vec<Action>,
    /// The frame.
    pub data: Vec<u8>,
}

/// A port of the switch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortDesc {
    /// Its number.
    pub number: u32,
    /// Its Ethernet address.
    pub hw_addr: [u8; 6],
    /// Its name, up to 15 bytes.
    pub name: String,
    /// OFPPC_* bits.
    pub config: u32,
    /// OFPPS_* bits.
    pub state: u32,
}

impl PortDesc {
    pub(crate) fn put(&self, w: &mut Writer) -> bool {
        w.u32(self.number);
        w.zeros(4);
        w.bytes(&self.hw_addr);
        w.zeros(2);
        let mut name = [0; 16];
        let cut = self.name.len().min(15);
        name[..cut].copy_from_slice(&self.name.as_bytes()[..cut]);
        w.bytes(&name);
        w.u32(self.config);
        w.u32(self.state);
        w.zeros(24);
        true
    }

    pub(crate) fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let mut r = r.sub(64, "port description")?;
        let number = r.u32("port number")?;
        r.skip(4, "port description")?;
        let mut hw_addr = [0; 6];
        hw_addr.copy_from_slice(r.take(6, "port address")?);
        r.skip(2, "port description")?;
        let name = r.take(16, "port name")?;
        let end = name.iter().position(|b| *b == 0).unwrap_or(15);
        Ok(Self {
            number,
            hw_addr,
            name: String::from_utf8_lossy(&name[..end]).into_owned(),
            config: r.u32("port configuration")?,
            state: r.u32("port state")?,
        })
    }
}

/// A message without its header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Opening; the versions that the sender speaks, one bit each (version n is bit n).
    Hello {
        /// The bitmap, where the sender gives one.
        versions: Option<u32>,
    },
    /// A request was refused.
    Error {
        /// OFPET_*; 0xffff for an experimenter's.
        kind: u16,
        /// What exactly.
        code: u16,
        /// The start of the refused message, or a text.
        data: Vec<u8>,
    },
    /// Are you there?
    EchoRequest(Vec<u8>),
    /// Yes, with the same data.
    EchoReply(Vec<u8>),
    /// Asks for the switch's features.
    FeaturesRequest,
    /// The switch's features.
    FeaturesReply {
        /// The bridge's identity.
        datapath_id: u64,
        /// Packets it can buffer.
        buffers: u32,
        /// Flow tables.
        tables: u8,
        /// OFPC_* bits.
        capabilities: u32,
    },
    /// Sets how fragments are handled and how much of a missed packet is sent.
    SetConfig {
        /// OFPC_FRAG_* bits.
        flags: u16,
        /// Bytes of a packet to the controller.
        miss_send_len: u16,
    },
    /// A packet for the controller.
    PacketIn(PacketIn),
    /// A port came (0), went (1) or changed (2).
    PortStatus {
        /// What happened.
        reason: u8,
        /// The port.
        port: PortDesc,
    },
    /// A packet from the controller.
    PacketOut(PacketOut),
    /// A change of a flow table.
    FlowMod(FlowMod),
    /// A change of the group table.
    GroupMod(GroupMod),
    /// A change of the meter table.
    MeterMod(MeterMod),
    /// Asks for a list.
    MultipartRequest(MultipartRequest),
    /// A part of a list.
    MultipartReply {
        /// More parts follow.
        more: bool,
        /// The part.
        part: MultipartReply,
    },
    /// Asks that all before it be done.
    BarrierRequest,
    /// All before it is done.
    BarrierReply,
    /// Asks for or sets the role (OFPCR_ROLE_*).
    RoleRequest {
        /// The role.
        role: u32,
        /// Guards against late messages of a former master.
        generation: u64,
    },
    /// The role.
    RoleReply {
        /// The role.
        role: u32,
        /// The last generation seen.
        generation: u64,
    },
    /// A step of a bundle.
    BundleControl {
        /// The bundle.
        bundle: u32,
        /// The step.
        control: BundleControl,
        /// `BUNDLE_*` bits.
        flags: u16,
    },
    /// A message that takes effect with its bundle.
    BundleAdd {
        /// The bundle.
        bundle: u32,
        /// `BUNDLE_*` bits.
        flags: u16,
        /// The message.
        message: Box<Message>,
    },
    /// A message that is not known here.
    Other {
        /// Its type.
        kind: u8,
        /// What follows the header.
        body: Vec<u8>,
    },
}

/// Reads a header: type, length of the whole message, xid. `Ok(None)` while fewer than eight bytes are there.
/// The version is checked for everything but hello.
pub fn decode_header(bytes: &[u8]) -> Result<Option<(u8, usize, u32)>, DecodeError> {
    if bytes.len() < HEADER_LEN {
        return Ok(None);
    }
    let mut r = Reader::new(bytes);
    let version = r.u8("version")?;
    let kind = r.u8("message type")?;
    let len = usize::from(r.u16("message length")?);
    if version != VERSION && kind != 0 {
        return Err(DecodeError::Version(version));
    }
    if len < HEADER_LEN {
        return Err(DecodeError::Length { what: "message", got: len });
    }
    Ok(Some((kind, len, r.u32("xid")?)))
}

impl Message {
    fn kind(&self) -> u8 {
        match self {
            Message::Hello { .. } => 0,
            Message::Error { .. } => 1,
            Message::EchoRequest(_) => 2,
            Message::EchoReply(_) => 3,
            Message::BundleControl { .. } | Message::BundleAdd { .. } => 4,
            Message::FeaturesRequest => 5,
            Message::FeaturesReply { .. } => 6,
            Message::SetConfig { .. } => 9,
            Message::PacketIn(_) => 10,
            Message::PortStatus { .. } => 12,
            Message::PacketOut(_) => 13,
            Message::FlowMod(_) => 14,
            Message::GroupMod(_) => 15,
            Message::MultipartRequest(_) => 18,
            Message::MultipartReply { .. } => 19,
            Message::BarrierRequest => 20,
            Message::BarrierReply => 21,
            Message::RoleRequest { .. } => 24,
            Message::RoleReply { .. } => 25,
            Message::MeterMod(_) => 29,
            Message::Other { kind, .. } => *kind,
        }
    }

    /// The message with its header.
    pub fn encode(&self, xid: u32) -> Result<Vec<u8>, EncodeError> {
        let mut w = Writer::default();
        let fits = self.put(xid, &mut w);
        if fits { Ok(w.into_inner()) } else { Err(EncodeError::TooLong { len: w.len() }) }
    }

    fn put(&self, xid: u32, w: &mut Writer) -> bool {
        let start = w.len();
        w.u8(VERSION);
        w.u8(self.kind());
        w.u16(0);
        w.u32(xid);
        self.put_body(xid, w) && w.patch_len(start + 2, start)
    }

    fn put_body(&self, xid: u32, w: &mut Writer) -> bool {
        match self {
            Message::Hello { versions: None }
            | Message::FeaturesRequest
            | Message::BarrierRequest
            | Message::BarrierReply => {}
            Message::Hello { versions: Some(bits) } => {
                w.u16(1);
                w.u16(8);
                w.u32(*bits);
            }
            Message::Error { kind, code, data } => {
                w.u16(*kind);
                w.u16(*code);
                w.bytes(data);
            }
            Message::EchoRequest(data) | Message::EchoReply(data) => w.bytes(data),
            Message::FeaturesReply { datapath_id, buffers, tables, capabilities } => {
                w.u64(*datapath_id);
                w.u32(*buffers);
                w.u8(*tables);
                w.zeros(3);
                w.u32(*capabilities);
                w.zeros(4);
            }
            Message::SetConfig { flags, miss_send_len } => {
                w.u16(*flags);
                w.u16(*miss_send_len);
            }
            Message::PacketIn(p) => {
                w.u32(super::flow::NO_BUFFER);
                w.u16(p.total_len);
                w.u8(p.reason);
                w.u8(p.table);
                w.u64(p.cookie);
                let fits = p.matching.put(w);
                w.zeros(2);
                w.bytes(&p.data);
                return fits;
            }
            Message::PortStatus { reason, port } => {
                w.u8(*reason);
                w.zeros(7);
                return port.put(w);
            }
            Message::PacketOut(p) => {
                w.u32(super::flow::NO_BUFFER);
                w.u32(p.in_port);
                let at = w.len();
                w.zeros(8);
                let start = w.len();
                let fits = Action::put_all(&p.actions, w) && w.patch_len(at, start);
                w.bytes(&p.data);
                return fits;
            }
            Message::FlowMod(m) => return m.put(w),
            Message::GroupMod(m) => return m.put(w),
            Message::MeterMod(m) => return m.put(w),
            Message::MultipartRequest(m) => return m.put(w),
            Message::MultipartReply { more, part } => return part.put(*more, w),
            Message::RoleRequest { role, generation } | Message::RoleReply { role, generation } => {
                w.u32(*role);
                w.zeros(4);
                w.u64(*generation);
            }
            Message::BundleControl { bundle, control, flags } => {
                w.u32(ONF);
                w.u32(BUNDLE_CONTROL);
                w.u32(*bundle);
                w.u16(*control as u16);
                w.u16(*flags);
            }
            Message::BundleAdd { bundle, flags, message } => {
                w.u32(ONF);
                w.u32(BUNDLE_ADD);
                w.u32(*bundle);
                w.zeros(2);
                w.u16(*flags);
                // The inner message carries the outer one's xid, else the switch refuses it.
                return message.put(xid, w);
            }
            Message::Other { body, .. } => w.bytes(body),
        }
        true
    }

    /// Reads one whole message (header included, nothing behind it).
    pub fn decode(bytes: &[u8]) -> Result<(u32, Message), DecodeError> {
        Self::decode_nested(bytes, true)
    }

    fn decode_nested(bytes: &[u8], may_nest: bool) -> Result<(u32, Message), DecodeError> {
        let short = DecodeError::Short { what: "message", left: bytes.len(), want: HEADER_LEN };
        let (kind, len, xid) = decode_header(bytes)?.ok_or(short)?;
        if len != bytes.len() {
            return Err(DecodeError::Length { what: "message", got: len });
        }
        let mut r = Reader::new(&bytes[HEADER_LEN..]);
        let message = Self::take_body(kind, &mut r, may_nest)?;
        if r.left() > 0 {
            return Err(DecodeError::Length { what: "message with bytes left over", got: len });
        }
        Ok((xid, message))
    }

    fn take_body(kind: u8, r: &mut Reader<'_>, may_nest: bool) -> Result<Message, DecodeError> {
        Ok(match kind {
            0 => Message::Hello { versions: take_hello(r)? },
            1 => Message::Error { kind: r.u16("error type")?, code: r.u16("error code")?, data: r.rest().to_vec() },
            2 => Message::EchoRequest(r.rest().to_vec()),
            3 => Message::EchoReply(r.rest().to_vec()),
            4 => return take_experimenter(r, may_nest),
            5 => Message::FeaturesRequest,
            6 => {
                let (datapath_id, buffers) = (r.u64("datapath id")?, r.u32("buffers")?);
                let tables = r.u8("tables")?;
                r.skip(3, "features reply")?;
                let capabilities = r.u32("capabilities")?;
                r.skip(4, "features reply")?;
                Message::FeaturesReply { datapath_id, buffers, tables, capabilities }
            }
            9 => Message::SetConfig { flags: r.u16("flags")?, miss_send_len: r.u16("miss send length")? },
            10 => {
                r.skip(4, "packet buffer")?;
                let total_len = r.u16("packet length")?;
                let (reason, table) = (r.u8("packet-in reason")?, r.u8("packet-in table")?);
                let cookie = r.u64("cookie")?;
                let matching = Match::take(r)?;
                r.skip(2, "padding of a packet-in")?;
                Message::PacketIn(PacketIn { reason, table, cookie, total_len, matching, data: r.rest().to_vec() })
            }
            12 => {
                let reason = r.u8("port status reason")?;
                r.skip(7, "port status")?;
                Message::PortStatus { reason, port: PortDesc::take(r)? }
            }
            13 => {
                r.skip(4, "packet buffer")?;
                let in_port = r.u32("in port")?;
                let len = usize::from(r.u16("length of actions")?);
                r.skip(6, "padding of a packet-out")?;
                let actions = Action::take_all(r.sub(len, "actions of a packet-out")?)?;
                Message::PacketOut(PacketOut { in_port, actions, data: r.rest().to_vec() })
            }
            14 => Message::FlowMod(FlowMod::take(r)?),
            15 => Message::GroupMod(GroupMod::take(r)?),
            18 => Message::MultipartRequest(MultipartRequest::take(r)?),
            19 => {
                let (more, part) = MultipartReply::take(r)?;
                Message::MultipartReply { more, part }
            }
            20 => Message::BarrierRequest,
            21 => Message::BarrierReply,
            24 | 25 => {
                let role = r.u32("role")?;
                r.skip(4, "padding of a role")?;
                let generation = r.u64("generation")?;
                match kind {
                    24 => Message::RoleRequest { role, generation },
                    _ => Message::RoleReply { role, generation },
                }
            }
            29 => Message::MeterMod(MeterMod::take(r)?),
            kind => Message::Other { kind, body: r.rest().to_vec() },
        })
    }
}

/// The first version bitmap of a hello; elements of other types are passed over (section 7.5.1).
fn take_hello(r: &mut Reader<'_>) -> Result<Option<u32>, DecodeError> {
    let mut versions = None;
    while r.left() > 0 {
        let mut element = r.sized(2, 4, "hello element")?;
        let len = element.left();
        let kind = element.u16("hello element")?;
        element.skip(2, "hello element")?;
        if kind == 1 && versions.is_none() && element.left() >= 4 {
            versions = Some(element.u32("version bitmap")?);
        }
        r.skip((len.next_multiple_of(8) - len).min(r.left()), "padding of a hello element")?;
    }
    Ok(versions)
}

fn take_experimenter(r: &mut Reader<'_>, may_nest: bool) -> Result<Message, DecodeError> {
    let whole = r.clone().rest().to_vec();
    let experimenter = r.u32("experimenter")?;
    let kind = r.u32("experimenter type")?;
    match (experimenter, kind) {
        (ONF, BUNDLE_CONTROL) => {
            let bundle = r.u32("bundle")?;
            let control = BundleControl::from_wire(r.u16("bundle control type")?)?;
            let flags = r.u16("bundle flags")?;
            // Properties are of no use here.
            r.rest();
            Ok(Message::BundleControl { bundle, control, flags })
        }
        (ONF, BUNDLE_ADD) if may_nest => {
            let bundle = r.u32("bundle")?;
            r.skip(2, "padding of a bundle")?;
            let flags = r.u16("bundle flags")?;
            let mut peek = r.clone();
            let inner = peek.sized(2, HEADER_LEN, "message in a bundle")?.rest();
            r.skip(inner.len(), "message in a bundle")?;
            r.rest();
            let (_, message) = Message::decode_nested(inner, false)?;
            Ok(Message::BundleAdd { bundle, flags, message: Box::new(message) })
        }
        (ONF, BUNDLE_ADD) => Err(DecodeError::Value { what: "bundle inside a bundle", got: kind.into() }),
        _ => {
            r.rest();
            Ok(Message::Other { kind: 4, body: whole })
        }
    }
}
