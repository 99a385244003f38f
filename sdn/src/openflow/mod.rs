//! OpenFlow 1.3, as far as a switch of the overlay needs it: strict, bounded, without panics on any input.
//!
//! Layouts are from the OpenFlow Switch Specification 1.3.5; bundles are the ONF's extension 230 for 1.3; Nicira's
//! actions and registers are those of Open vSwitch's `nicira-ext.h` and ovs-fields(7). What a peer sends that is not
//! known here is kept as it came (`Unknown`, `Other`) where it can be, so that a foreign flow can still be shown and
//! removed; what breaks the format is a [`DecodeError`].

mod field;
mod flow;
mod group;
mod message;
mod multipart;
mod wire;

pub use self::{
    field::Field,
    flow::{Action, FlowCommand, FlowMod, FlowStats, Instruction, Match, NO_BUFFER, WHOLE_PACKET, port},
    group::{Bucket, Group, GroupKind, GroupMod, METER_BURST, METER_PKTPS, Meter, MeterMod, TableCommand},
    message::{
        BUNDLE_ATOMIC, BUNDLE_ORDERED, BundleControl, EncodeError, HEADER_LEN, MAX_LEN, Message, PacketIn, PacketOut,
        PortDesc, VERSION, decode_header,
    },
    multipart::{MultipartReply, MultipartRequest, PortCounters},
    wire::DecodeError,
};
