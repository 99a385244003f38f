//! Match fields: OXM (OpenFlow 1.3.5, section 7.2.3) and the Nicira and Ericsson ones that Open vSwitch adds
//! (ovs-fields(7)).

use super::wire::{DecodeError, Reader, Writer};

/// Class of the fields that the OpenFlow standard names.
const CLASS_BASIC: u16 = 0x8000;
/// Class of the Nicira extensions.
const CLASS_NXM1: u16 = 0x0001;
/// Class of the Ericsson extensions (`ERICOXM_OF_*` in Open vSwitch).
const CLASS_ERICSSON: u16 = 0x1000;

macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident = ($class:expr, $number:literal, $bytes:literal, $text:literal);)*) => {
        /// A field of a packet or of its metadata.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Field {
            $($(#[$doc])* $name,)*
        }

        impl Field {
            /// Every field, in the order in which matches are written: prerequisites first.
            pub const ALL: &'static [Field] = &[$(Field::$name,)*];

            /// Class, number inside the class, length of the value in bytes.
            const fn code(self) -> (u16, u8, u8) {
                match self { $(Field::$name => ($class, $number, $bytes),)* }
            }

            /// The name that Open vSwitch's tools use.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Field::$name => $text,)* }
            }
        }
    };
}

fields! {
    /// The switch port by which the packet came.
    InPort = (CLASS_BASIC, 0, 4, "in_port");
    /// Scratch register 0: here, the network's VNI.
    Reg0 = (CLASS_NXM1, 0, 4, "reg0");
    /// Scratch register 1: here, where the packet came from.
    Reg1 = (CLASS_NXM1, 1, 4, "reg1");
    /// Scratch register 2.
    Reg2 = (CLASS_NXM1, 2, 4, "reg2");
    /// Scratch register 3.
    Reg3 = (CLASS_NXM1, 3, 4, "reg3");
    /// Metadata between tables.
    Metadata = (CLASS_BASIC, 2, 8, "metadata");
    /// The tunnel's key.
    TunnelId = (CLASS_BASIC, 38, 8, "tun_id");
    /// The tunnel's outer source.
    TunnelIpv4Src = (CLASS_NXM1, 31, 4, "tun_src");
    /// The tunnel's outer destination.
    TunnelIpv4Dst = (CLASS_NXM1, 32, 4, "tun_dst");
    /// Ethernet destination.
    EthDst = (CLASS_BASIC, 3, 6, "eth_dst");
    /// Ethernet source.
    EthSrc = (CLASS_BASIC, 4, 6, "eth_src");
    /// Ethernet type (the inner one of a tagged frame).
    EthType = (CLASS_BASIC, 5, 2, "eth_type");
    /// VLAN id with OpenFlow's present bit.
    VlanVid = (CLASS_BASIC, 6, 2, "vlan_vid");
    /// IP protocol or next header.
    IpProto = (CLASS_BASIC, 10, 1, "nw_proto");
    /// IPv4 source.
    Ipv4Src = (CLASS_BASIC, 11, 4, "ip_src");
    /// IPv4 destination.
    Ipv4Dst = (CLASS_BASIC, 12, 4, "ip_dst");
    /// TCP source port.
    TcpSrc = (CLASS_BASIC, 13, 2, "tcp_src");
    /// TCP destination port.
    TcpDst = (CLASS_BASIC, 14, 2, "tcp_dst");
    /// UDP source port.
    UdpSrc = (CLASS_BASIC, 15, 2, "udp_src");
    /// UDP destination port.
    UdpDst = (CLASS_BASIC, 16, 2, "udp_dst");
    /// ICMPv4 type.
    Icmpv4Type = (CLASS_BASIC, 19, 1, "icmp_type");
    /// ICMPv4 code.
    Icmpv4Code = (CLASS_BASIC, 20, 1, "icmp_code");
    /// ARP operation.
    ArpOp = (CLASS_BASIC, 21, 2, "arp_op");
    /// ARP sender's protocol address.
    ArpSpa = (CLASS_BASIC, 22, 4, "arp_spa");
    /// ARP target's protocol address.
    ArpTpa = (CLASS_BASIC, 23, 4, "arp_tpa");
    /// ARP sender's hardware address.
    ArpSha = (CLASS_BASIC, 24, 6, "arp_sha");
    /// ARP target's hardware address.
    ArpTha = (CLASS_BASIC, 25, 6, "arp_tha");
    /// IPv6 source.
    Ipv6Src = (CLASS_BASIC, 26, 16, "ipv6_src");
    /// IPv6 destination.
    Ipv6Dst = (CLASS_BASIC, 27, 16, "ipv6_dst");
    /// ICMPv6 type.
    Icmpv6Type = (CLASS_BASIC, 29, 1, "icmpv6_type");
    /// ICMPv6 code.
    Icmpv6Code = (CLASS_BASIC, 30, 1, "icmpv6_code");
    /// Neighbour discovery: target.
    NdTarget = (CLASS_BASIC, 31, 16, "nd_target");
    /// Neighbour discovery: source link-layer address option.
    NdSll = (CLASS_BASIC, 32, 6, "nd_sll");
    /// Neighbour discovery: target link-layer address option.
    NdTll = (CLASS_BASIC, 33, 6, "nd_tll");
    /// Neighbour discovery: flags and reserved bits (userspace datapath only).
    NdReserved = (CLASS_ERICSSON, 1, 4, "nd_reserved");
    /// Neighbour discovery: type of the option (userspace datapath only).
    NdOptionsType = (CLASS_ERICSSON, 2, 1, "nd_options_type");
}

impl Field {
    /// Length of the value in bytes.
    #[must_use]
    pub const fn len(self) -> usize {
        self.code().2 as usize
    }

    /// Never: a field has at least one byte.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        false
    }

    /// All bits of the field set.
    #[must_use]
    pub const fn ones(self) -> u128 {
        match self.len() {
            16 => u128::MAX,
            n => (1 << (8 * n)) - 1,
        }
    }

    /// The 32-bit header without a mask, as actions name fields.
    pub(crate) fn header(self) -> u32 {
        let (class, number, len) = self.code();
        u32::from(class) << 16 | u32::from(number) << 9 | u32::from(len)
    }

    fn find(class: u16, number: u8) -> Option<Field> {
        Field::ALL.iter().copied().find(|f| {
            let (c, n, _) = f.code();
            (c, n) == (class, number) || f.older_code() == Some((class, number))
        })
    }

    /// The code from before OXM (`nicira-ext.h`): Open vSwitch still names fields so in the moves that it shows.
    const fn older_code(self) -> Option<(u16, u8)> {
        Some(match self {
            Field::EthDst => (0, 1),
            Field::EthSrc => (0, 2),
            Field::EthType => (0, 3),
            Field::IpProto => (0, 6),
            Field::Ipv4Src => (0, 7),
            Field::Ipv4Dst => (0, 8),
            Field::TcpSrc => (0, 9),
            Field::TcpDst => (0, 10),
            Field::UdpSrc => (0, 11),
            Field::UdpDst => (0, 12),
            Field::Icmpv4Type => (0, 13),
            Field::Icmpv4Code => (0, 14),
            Field::ArpOp => (0, 15),
            Field::ArpSpa => (0, 16),
            Field::ArpTpa => (0, 17),
            Field::TunnelId => (CLASS_NXM1, 16),
            Field::ArpSha => (CLASS_NXM1, 17),
            Field::ArpTha => (CLASS_NXM1, 18),
            Field::Ipv6Src => (CLASS_NXM1, 19),
            Field::Ipv6Dst => (CLASS_NXM1, 20),
            Field::Icmpv6Type => (CLASS_NXM1, 21),
            Field::Icmpv6Code => (CLASS_NXM1, 22),
            Field::NdTarget => (CLASS_NXM1, 23),
            Field::NdSll => (CLASS_NXM1, 24),
            Field::NdTll => (CLASS_NXM1, 25),
            _ => return None,
        })
    }

    /// Writes header, value and mask.
    pub(crate) fn put(self, w: &mut Writer, value: u128, mask: Option<u128>) {
        let (class, number, len) = self.code();
        w.u16(class);
        w.u8(number << 1 | u8::from(mask.is_some()));
        w.u8(len * if mask.is_some() { 2 } else { 1 });
        w.bytes(&value.to_be_bytes()[16 - self.len()..]);
        if let Some(mask) = mask {
            w.bytes(&mask.to_be_bytes()[16 - self.len()..]);
        }
    }

    /// Reads one entry; `Err(bytes)` holds an entry of a field that is not known here.
    pub(crate) fn take(r: &mut Reader<'_>) -> Result<Result<FieldMatch, Vec<u8>>, DecodeError> {
        let mut whole = r.clone();
        let class = r.u16("field class")?;
        let number = r.u8("field number")?;
        let body = r.u8("field length")?;
        let mut body_reader = r.sub(usize::from(body), "field value")?;
        let masked = number & 1 == 1;
        let Some(field) = Field::find(class, number >> 1) else {
            return Ok(Err(whole.take(4 + usize::from(body), "field")?.to_vec()));
        };
        if body_reader.left() != field.len() * if masked { 2 } else { 1 } {
            return Err(DecodeError::Length { what: field.name(), got: body_reader.left() });
        }
        let value = body_reader.uint(field.len(), field.name())?;
        let mask = if masked { Some(body_reader.uint(field.len(), field.name())?) } else { None };
        if let Some(mask) = mask
            && value & !mask != 0
        {
            return Err(DecodeError::Value { what: "bits outside the mask of a field", got: u64::from(number) });
        }
        Ok(Ok((field, value, mask)))
    }

    /// Reads a bare header, as actions name fields. Unknown ones are an error.
    pub(crate) fn take_header(r: &mut Reader<'_>) -> Result<Field, DecodeError> {
        let header = r.u32("field header")?;
        let class = (header >> 16) as u16;
        let number = (header >> 9 & 0x7f) as u8;
        Field::find(class, number)
            .filter(|f| f.header() & 0xff == header & 0xff && header & 0x100 == 0)
            .ok_or(DecodeError::Value { what: "field header", got: header.into() })
    }
}

/// Field, value and mask of one match entry.
pub(crate) type FieldMatch = (Field, u128, Option<u128>);
