//! Groups and meters.

use super::{
    flow::Action,
    wire::{DecodeError, Reader, Writer},
};

/// What a group does with its buckets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum GroupKind {
    /// A copy through each.
    All = 0,
    /// Through one of them.
    Select = 1,
    /// Through the only one.
    Indirect = 2,
    /// Through the first that is alive.
    FastFailover = 3,
}

/// Add, change or remove.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum TableCommand {
    /// Adds.
    Add = 0,
    /// Changes.
    Modify = 1,
    /// Removes.
    Delete = 2,
}

impl TableCommand {
    fn from_wire(got: u16) -> Result<Self, DecodeError> {
        match got {
            0 => Ok(Self::Add),
            1 => Ok(Self::Modify),
            2 => Ok(Self::Delete),
            got => Err(DecodeError::Value { what: "group or meter command", got: got.into() }),
        }
    }
}

/// One of a group's ways.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Bucket {
    /// Share, for select groups.
    pub weight: u16,
    /// The port whose life counts, for fast failover; [`super::flow::port::ANY`] for none.
    pub watch_port: u32,
    /// The group whose life counts; `u32::MAX` for none.
    pub watch_group: u32,
    /// What happens.
    pub actions: Vec<Action>,
}

/// A group, as it is changed and as it is shown.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Group {
    /// Its number.
    pub id: u32,
    /// What it does with its buckets.
    pub kind: GroupKind,
    /// Its ways.
    pub buckets: Vec<Bucket>,
}

/// A change of the group table.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct GroupMod {
    /// What it does.
    pub command: TableCommand,
    /// The group; for a deletion only its number counts.
    pub group: Group,
}

impl Group {
    fn put_body(&self, w: &mut Writer) -> bool {
        w.u8(self.kind as u8);
        w.zeros(1);
        w.u32(self.id);
        self.buckets.iter().all(|bucket| {
            let start = w.len();
            w.u16(0);
            w.u16(bucket.weight);
            w.u32(bucket.watch_port);
            w.u32(bucket.watch_group);
            w.zeros(4);
            Action::put_all(&bucket.actions, w) && w.patch_len(start, start)
        })
    }

    fn take_body(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let kind = match r.u8("group type")? {
            0 => GroupKind::All,
            1 => GroupKind::Select,
            2 => GroupKind::Indirect,
            3 => GroupKind::FastFailover,
            got => return Err(DecodeError::Value { what: "group type", got: got.into() }),
        };
        r.skip(1, "padding of a group")?;
        let id = r.u32("group")?;
        let mut buckets = Vec::new();
        while r.left() > 0 {
            let mut b = r.sized(0, 16, "bucket")?;
            b.skip(2, "bucket length")?;
            let weight = b.u16("weight")?;
            let (watch_port, watch_group) = (b.u32("watch port")?, b.u32("watch group")?);
            b.skip(4, "padding of a bucket")?;
            buckets.push(Bucket { weight, watch_port, watch_group, actions: Action::take_all(b)? });
        }
        Ok(Self { id, kind, buckets })
    }

    pub(crate) fn put_desc(&self, w: &mut Writer) -> bool {
        let start = w.len();
        w.u16(0);
        let fits = self.put_body(w);
        w.patch_len(start, start) && fits
    }

    pub(crate) fn take_desc(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let mut r = r.sized(0, 8, "group description")?;
        r.skip(2, "group description")?;
        Self::take_body(&mut r)
    }
}

impl GroupMod {
    pub(crate) fn put(&self, w: &mut Writer) -> bool {
        w.u16(self.command as u16);
        self.group.put_body(w)
    }

    pub(crate) fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let command = TableCommand::from_wire(r.u16("group command")?)?;
        Ok(Self { command, group: Group::take_body(r)? })
    }
}

/// Rates in packets instead of kilobits.
pub const METER_PKTPS: u16 = 2;
/// A burst size is given.
pub const METER_BURST: u16 = 4;

/// A meter with one band, which drops what is above the rate.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Meter {
    /// Its number, from 1.
    pub id: u32,
    /// `METER_*` bits: the unit, and whether `burst` counts.
    pub flags: u16,
    /// Packets or kilobits per second.
    pub rate: u32,
    /// Packets or kilobits at once.
    pub burst: u32,
}

/// A change of the meter table.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MeterMod {
    /// What it does.
    pub command: TableCommand,
    /// The meter; for a deletion only its number counts.
    pub meter: Meter,
}

impl Meter {
    fn put_band(&self, w: &mut Writer) {
        w.u16(1);
        w.u16(16);
        w.u32(self.rate);
        w.u32(self.burst);
        w.zeros(4);
    }

    /// The first drop band; other bands are passed over.
    fn take_bands(r: &mut Reader<'_>) -> Result<(u32, u32), DecodeError> {
        let mut found = None;
        while r.left() > 0 {
            let mut band = r.sized(2, 12, "meter band")?;
            let kind = band.u16("meter band type")?;
            band.skip(2, "meter band length")?;
            let (rate, burst) = (band.u32("rate")?, band.u32("burst")?);
            if kind == 1 && found.is_none() {
                found = Some((rate, burst));
            }
        }
        Ok(found.unwrap_or((0, 0)))
    }

    pub(crate) fn put_config(&self, w: &mut Writer) -> bool {
        let start = w.len();
        w.u16(0);
        w.u16(self.flags);
        w.u32(self.id);
        self.put_band(w);
        w.patch_len(start, start)
    }

    pub(crate) fn take_config(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let mut r = r.sized(0, 8, "meter")?;
        r.skip(2, "meter length")?;
        let flags = r.u16("meter flags")?;
        let id = r.u32("meter")?;
        let (rate, burst) = Self::take_bands(&mut r)?;
        Ok(Self { id, flags, rate, burst })
    }
}

impl MeterMod {
    pub(crate) fn put(&self, w: &mut Writer) -> bool {
        w.u16(self.command as u16);
        w.u16(self.meter.flags);
        w.u32(self.meter.id);
        if self.command != TableCommand::Delete {
            self.meter.put_band(w);
        }
        true
    }

    pub(crate) fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let command = TableCommand::from_wire(r.u16("meter command")?)?;
        let flags = r.u16("meter flags")?;
        let id = r.u32("meter")?;
        let (rate, burst) = Meter::take_bands(r)?;
        Ok(Self { command, meter: Meter { id, flags, rate, burst } })
    }
}
