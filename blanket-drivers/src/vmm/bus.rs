//! Which device answers at which address: one bus for ports, one for memory-mapped registers.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use super::VmmError;

/// A device's registers.
pub trait Registers: Send {
    /// Reads at an offset within the device's range; `data` is all zero before and never longer than the range has room
    /// for. What the device does not have stays as it is.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Writes at an offset within the device's range.
    fn write(&mut self, offset: u64, data: &[u8]);
}

struct Place {
    length: u64,
    device: Arc<Mutex<dyn Registers>>,
}

/// Devices by their addresses. Nothing is added once vCPUs run.
#[derive(Default)]
pub struct Bus {
    places: BTreeMap<u64, Place>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_map().entries(self.places.iter().map(|(at, place)| (at, place.length))).finish()
    }
}

impl Bus {
    /// Gives a device `length` addresses from `at` on.
    ///
    /// # Errors
    /// [`VmmError::Overlap`].
    pub fn add(
        &mut self,
        name: &'static str,
        at: u64,
        length: u64,
        device: Arc<Mutex<dyn Registers>>,
    ) -> Result<(), VmmError> {
        let overlap = VmmError::Overlap { name, at };
        let Some(end) = at.checked_add(length).filter(|_| length > 0) else { return Err(overlap) };
        let before = self.places.range(..end).next_back();
        if before.is_some_and(|(start, place)| start + place.length > at) {
            return Err(overlap);
        }
        self.places.insert(at, Place { length, device });
        Ok(())
    }

    /// The device that has all `bytes` addresses from `at` on, and the offset in it.
    fn find(&self, at: u64, bytes: usize) -> Option<(&Mutex<dyn Registers>, u64)> {
        let (start, place) = self.places.range(..=at).next_back()?;
        let offset = at - start;
        let end = offset.checked_add(bytes as u64)?;
        (end <= place.length).then_some((&*place.device, offset))
    }

    /// Reads; where nobody answers, all bits are set, as on a bus without a device.
    pub fn read(&self, at: u64, data: &mut [u8]) {
        match self.find(at, data.len()) {
            Some((device, offset)) => {
                data.fill(0);
                device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Writes; where nobody listens, nothing happens.
    pub fn write(&self, at: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(at, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }
}

/// Copies what there is from `offset` on.
pub(super) fn copy(from: &[u8], offset: u64, to: &mut [u8]) {
    let Ok(offset) = usize::try_from(offset) else { return };
    for (to, byte) in to.iter_mut().zip(from.iter().skip(offset)) {
        *to = *byte;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;
    impl Registers for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&mut self, _offset: u64, _data: &[u8]) {}
    }

    #[test]
    fn accesses_reach_the_device_that_has_all_of_the_addresses() {
        let mut bus = Bus::default();
        bus.add("a", 0x100, 8, Arc::new(Mutex::new(Echo))).unwrap();
        bus.add("b", 0x108, 8, Arc::new(Mutex::new(Echo))).unwrap();
        let read = |at: u64, bytes: usize| {
            let mut data = vec![0x55; bytes];
            bus.read(at, &mut data);
            data
        };
        assert_eq!(read(0x107, 1), [7]);
        assert_eq!(read(0x108, 1), [0]);
        // Across two devices, before the first, after the last, at the end of everything.
        for (at, bytes) in [(0x106, 4), (0xff, 1), (0x110, 1), (u64::MAX, 8)] {
            assert_eq!(read(at, bytes), vec![0xff; bytes]);
            bus.write(at, &vec![0; bytes]);
        }
    }

    #[test]
    fn no_two_devices_have_the_same_address() {
        let mut bus = Bus::default();
        bus.add("a", 0x100, 0x10, Arc::new(Mutex::new(Echo))).unwrap();
        for (at, length) in [(0x100, 1), (0xf0, 0x11), (0x10f, 4), (0xf0, 0x100), (0x200, 0), (u64::MAX, 2)] {
            assert!(bus.add("b", at, length, Arc::new(Mutex::new(Echo))).is_err(), "{at:#x} {length:#x}");
        }
        bus.add("b", 0xf0, 0x10, Arc::new(Mutex::new(Echo))).unwrap();
    }
}
