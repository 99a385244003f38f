//! Lists: flows, ports, groups, meters (OpenFlow 1.3.5, section 7.3.5).

use super::{
    flow::{FlowStats, Match, port},
    group::{Group, Meter},
    message::PortDesc,
    wire::{DecodeError, Reader, Writer},
};

/// A question that is answered by a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MultipartRequest {
    /// The flows that a match covers.
    Flows {
        /// The table; 0xff for all.
        table: u8,
        /// The cookie they must have, where the mask has bits.
        cookie: u64,
        /// Bits of the cookie that count.
        cookie_mask: u64,
        /// Which packets they are for.
        matching: Match,
    },
    /// Packet counters of a port, or of all ([`port::ANY`]).
    PortStats {
        /// The port.
        port: u32,
    },
    /// All groups.
    GroupDesc,
    /// All meters.
    MeterConfig,
    /// All ports.
    PortDesc,
}

/// Counters of a port since it was added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PortCounters {
    /// The port.
    pub port: u32,
    /// Packets that came by it.
    pub rx_packets: u64,
    /// Packets that left by it.
    pub tx_packets: u64,
    /// Bytes that came by it.
    pub rx_bytes: u64,
    /// Bytes that left by it.
    pub tx_bytes: u64,
    /// Packets that came and were dropped.
    pub rx_dropped: u64,
    /// Packets that should have left and were dropped.
    pub tx_dropped: u64,
}

/// A part of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MultipartReply {
    /// Flows.
    Flows(Vec<FlowStats>),
    /// Counters.
    PortStats(Vec<PortCounters>),
    /// Groups.
    GroupDesc(Vec<Group>),
    /// Meters.
    MeterConfig(Vec<Meter>),
    /// Ports.
    PortDesc(Vec<PortDesc>),
    /// A list that is not known here.
    Other {
        /// OFPMP_*.
        kind: u16,
        /// The list.
        body: Vec<u8>,
    },
}

const FLOWS: u16 = 1;
const PORT_STATS: u16 = 4;
const GROUP_DESC: u16 = 7;
const METER_CONFIG: u16 = 10;
const PORT_DESC: u16 = 13;
/// OFPM_ALL.
const ALL_METERS: u32 = u32::MAX;

fn head(w: &mut Writer, kind: u16, flags: u16) {
    w.u16(kind);
    w.u16(flags);
    w.zeros(4);
}

impl MultipartRequest {
    /// All flows.
    #[must_use]
    pub fn all_flows() -> Self {
        MultipartRequest::Flows { table: 0xff, cookie: 0, cookie_mask: 0, matching: Match::any() }
    }

    pub(crate) fn put(&self, w: &mut Writer) -> bool {
        match self {
            MultipartRequest::Flows { table, cookie, cookie_mask, matching } => {
                head(w, FLOWS, 0);
                w.u8(*table);
                w.zeros(3);
                w.u32(port::ANY);
                w.u32(u32::MAX);
                w.zeros(4);
                w.u64(*cookie);
                w.u64(*cookie_mask);
                return matching.put(w);
            }
            MultipartRequest::PortStats { port } => {
                head(w, PORT_STATS, 0);
                w.u32(*port);
                w.zeros(4);
            }
            MultipartRequest::GroupDesc => head(w, GROUP_DESC, 0),
            MultipartRequest::MeterConfig => {
                head(w, METER_CONFIG, 0);
                w.u32(ALL_METERS);
                w.zeros(4);
            }
            MultipartRequest::PortDesc => head(w, PORT_DESC, 0),
        }
        true
    }

    pub(crate) fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let kind = r.u16("multipart type")?;
        r.skip(6, "multipart request")?;
        Ok(match kind {
            FLOWS => {
                let table = r.u8("table")?;
                r.skip(15, "flow request")?;
                let (cookie, cookie_mask) = (r.u64("cookie")?, r.u64("cookie mask")?);
                MultipartRequest::Flows { table, cookie, cookie_mask, matching: Match::take(r)? }
            }
            PORT_STATS => {
                let port = r.u32("port")?;
                r.skip(4, "port request")?;
                MultipartRequest::PortStats { port }
            }
            GROUP_DESC => MultipartRequest::GroupDesc,
            METER_CONFIG => {
                r.skip(8, "meter request")?;
                MultipartRequest::MeterConfig
            }
            PORT_DESC => MultipartRequest::PortDesc,
            got => return Err(DecodeError::Value { what: "multipart type", got: got.into() }),
        })
    }
}

fn all<T>(r: &mut Reader<'_>, take: impl Fn(&mut Reader<'_>) -> Result<T, DecodeError>) -> Result<Vec<T>, DecodeError> {
    let mut list = Vec::new();
    while r.left() > 0 {
        list.push(take(r)?);
    }
    Ok(list)
}

impl MultipartReply {
    pub(crate) fn put(&self, more: bool, w: &mut Writer) -> bool {
        let kind = match self {
            MultipartReply::Flows(_) => FLOWS,
            MultipartReply::PortStats(_) => PORT_STATS,
            MultipartReply::GroupDesc(_) => GROUP_DESC,
            MultipartReply::MeterConfig(_) => METER_CONFIG,
            MultipartReply::PortDesc(_) => PORT_DESC,
            MultipartReply::Other { kind, .. } => *kind,
        };
        head(w, kind, u16::from(more));
        match self {
            MultipartReply::Flows(list) => list.iter().all(|f| f.put(w)),
            MultipartReply::PortStats(list) => list.iter().all(|c| c.put(w)),
            MultipartReply::GroupDesc(list) => list.iter().all(|g| g.put_desc(w)),
            MultipartReply::MeterConfig(list) => list.iter().all(|m| m.put_config(w)),
            MultipartReply::PortDesc(list) => list.iter().all(|p| p.put(w)),
            MultipartReply::Other { body, .. } => {
                w.bytes(body);
                true
            }
        }
    }

    pub(crate) fn take(r: &mut Reader<'_>) -> Result<(bool, Self), DecodeError> {
        let kind = r.u16("multipart type")?;
        let flags = r.u16("multipart flags")?;
        r.skip(4, "multipart reply")?;
        let part = match kind {
            FLOWS => MultipartReply::Flows(all(r, FlowStats::take)?),
            PORT_STATS => MultipartReply::PortStats(all(r, PortCounters::take)?),
            GROUP_DESC => MultipartReply::GroupDesc(all(r, Group::take_desc)?),
            METER_CONFIG => MultipartReply::MeterConfig(all(r, Meter::take_config)?),
            PORT_DESC => MultipartReply::PortDesc(all(r, PortDesc::take)?),
            kind => MultipartReply::Other { kind, body: r.rest().to_vec() },
        };
        Ok((flags & 1 == 1, part))
    }
}

impl PortCounters {
    fn put(&self, w: &mut Writer) -> bool {
        w.u32(self.port);
        w.zeros(4);
        for n in [self.rx_packets, self.tx_packets, self.rx_bytes, self.tx_bytes, self.rx_dropped, self.tx_dropped] {
            w.u64(n);
        }
        w.zeros(56);
        true
    }

    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let mut r = r.sub(112, "port counters")?;
        let port = r.u32("port")?;
        r.skip(4, "port counters")?;
        Ok(Self {
            port,
            rx_packets: r.u64("received packets")?,
            tx_packets: r.u64("sent packets")?,
            rx_bytes: r.u64("received bytes")?,
            tx_bytes: r.u64("sent bytes")?,
            rx_dropped: r.u64("dropped packets")?,
            tx_dropped: r.u64("dropped packets")?,
        })
    }
}
