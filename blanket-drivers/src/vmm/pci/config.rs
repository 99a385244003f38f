//! A function's configuration space: bytes, and which bits of them a guest may change.

/// Length of the part that we have; beyond it everything reads as zero (no extended capabilities).
const BYTES: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const HAS_CAPABILITIES: u8 = 1 << 4;
const MEMORY_ENABLED: u8 = 1 << 1;
/// Command bits that a guest may set: memory decoding, bus mastering; and of the high byte: no INTx.
const COMMAND_MASK: [u8; 2] = [0x06, 0x04];

/// Who a function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Class, subclass, interface: 24 bits.
    pub class: u32,
    /// Subsystem's vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// A capability: its id and what follows id and next pointer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capability {
    /// Its id.
    pub id: u8,
    /// Its body.
    pub body: Vec<u8>,
    /// Which bits of the body a guest may change; as long as the body or shorter.
    pub writable: Vec<u8>,
}

/// A configuration space of type 0.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; BYTES],
    writable: [u8; BYTES],
    /// The BAR: where it is, and how long.
    bar: Option<(u32, u32)>,
    /// The guest asked for the BAR's size and did not write anything else since.
    is_sizing: bool,
    next_capability: usize,
    last_pointer: usize,
}

impl ConfigSpace {
    /// A space without BAR and capabilities.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        let mut bytes = [0; BYTES];
        bytes[0..2].copy_from_slice(&identity.vendor.to_le_bytes());
        bytes[2..4].copy_from_slice(&identity.device.to_le_bytes());
        bytes[8] = 1; // revision: virtio 1.x and later
        bytes[9..12].copy_from_slice(&identity.class.to_le_bytes()[..3]);
        bytes[0x2c..0x2e].copy_from_slice(&identity.subsystem_vendor.to_le_bytes());
        bytes[0x2e..0x30].copy_from_slice(&identity.subsystem.to_le_bytes());
        let mut writable = [0; BYTES];
        writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_MASK);
        // Cache line size and interrupt line: a guest's notes to itself.
        writable[0x0c] = 0xff;
        writable[0x3c] = 0xff;
        Self {
            bytes,
            writable,
            bar: None,
            is_sizing: false,
            next_capability: FIRST_CAPABILITY,
            last_pointer: CAPABILITIES,
        }
    }

    /// Gives it its one BAR: 32-bit memory of a length that is a power of two, and switches decoding on.
    pub fn set_bar(&mut self, at: u32, length: u32) {
        self.bar = Some((at, length));
        self.bytes[COMMAND] |= MEMORY_ENABLED;
    }

    /// Appends a capability; answers its offset. What does not fit is left out (there are at most eight of ours).
    pub fn add_capability(&mut self, capability: &Capability) -> Option<usize> {
        let at = self.next_capability;
        let end = at + 2 + capability.body.len();
        if end > BYTES {
            return None;
        }
        self.bytes[at] = capability.id;
        self.bytes[at + 2..end].copy_from_slice(&capability.body);
        for (to, mask) in self.writable[at + 2..end].iter_mut().zip(&capability.writable) {
            *to = *mask;
        }
        // Both fit a byte: they are below 256.
        self.bytes[self.last_pointer] = u8::try_from(at).ok()?;
        self.bytes[STATUS] |= HAS_CAPABILITIES;
        self.last_pointer = at + 1;
        self.next_capability = end.next_multiple_of(4);
        Some(at)
    }

    /// Whether the guest lets the function answer at its BAR.
    #[must_use]
    pub const fn is_memory_enabled(&self) -> bool {
        self.bytes[COMMAND] & MEMORY_ENABLED != 0
    }

    /// A byte as a guest would read it.
    #[must_use]
    pub fn byte(&self, at: usize) -> u8 {
        match self.bar {
            Some((address, length)) if (BAR0..BAR0 + 4).contains(&at) => {
                let value = if self.is_sizing { !(length - 1) } else { address };
                value.to_le_bytes()[at - BAR0]
            }
            _ => self.bytes.get(at).copied().unwrap_or(0),
        }
    }

    /// All bytes, for [`ConfigSpace::restore`].
    #[must_use]
    pub fn save(&self) -> (Vec<u8>, bool) {
        (self.bytes.to_vec(), self.is_sizing)
    }

    /// What a guest had written, out of what [`ConfigSpace::save`] gave; false, and nothing changed, when these are the bytes
    /// of another function.
    #[must_use]
    pub fn restore(&mut self, bytes: &[u8], is_sizing: bool) -> bool {
        let is_other = |((old, new), mask): ((&u8, &u8), &u8)| (old ^ new) & !mask != 0;
        if bytes.len() != BYTES || self.bytes.iter().zip(bytes).zip(&self.writable).any(is_other) {
            return false;
        }
        self.bytes.copy_from_slice(bytes);
        self.is_sizing = is_sizing;
        true
    }

    /// Reads.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.byte(at);
        }
    }

    /// Writes what may be written.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let offset = usize::from(offset);
        if offset == BAR0 && data.len() == 4 {
            self.is_sizing = data == [0xff; 4];
        }
        for (at, byte) in (offset..).zip(data) {
            if let (Some(old), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *old = (*old & !mask) | (byte & mask);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            class: 0x01_8000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        space.set_bar(0xc000_8000, 0x8000);
        space.add_capability(&Capability { id: 9, body: vec![0x10; 14], writable: Vec::new() }).unwrap();
        space.add_capability(&Capability { id: 0x11, body: vec![0; 10], writable: vec![0, 0xc0] }).unwrap();
        space
    }

    fn word(space: &ConfigSpace, at: u16) -> u32 {
        let mut bytes = [0; 4];
        space.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn capabilities_are_a_list_and_the_bar_says_its_size_and_stays() {
        let mut space = space();
        assert_eq!(space.byte(0x34), 0x40);
        assert_eq!((space.byte(0x40), space.byte(0x41)), (9, 0x50));
        assert_eq!((space.byte(0x50), space.byte(0x51)), (0x11, 0));
        assert_eq!(word(&space, 0x10), 0xc000_8000);
        space.write(0x10, &[0xff; 4]);
        assert_eq!(word(&space, 0x10), 0xffff_8000);
        space.write(0x10, &0x1000_0000u32.to_le_bytes());
        assert_eq!(word(&space, 0x10), 0xc000_8000, "it cannot be moved");
        let mut full = space;
        while full.add_capability(&Capability { id: 9, body: vec![0; 14], writable: Vec::new() }).is_some() {}
    }

    proptest! {
        #[test]
        fn a_guest_changes_only_what_it_may(writes in proptest::collection::vec((0u16..4096, proptest::collection::vec(any::<u8>(), 1..5)), 0..64)) {
            let (fresh, mut space) = (space(), space());
            for (offset, data) in &writes {
                space.write(*offset, data);
            }
            for at in 0..4096usize {
                let mask = match at { 0x04 => 0x06, 0x05 => 0x04, 0x0c | 0x3c => 0xff, 0x53 => 0xc0, 0x10..0x14 => continue, _ => 0 };
                prop_assert_eq!(space.byte(at) & !mask, fresh.byte(at) & !mask, "{:#x}", at);
            }
            prop_assert!([0xc000_8000, 0xffff_8000].contains(&word(&space, 0x10)));
        }
    }
}
