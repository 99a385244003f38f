//! A small driver: what a guest's kernel does with a device, register by register.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use vm_memory::{Bytes as _, GuestAddress};

use crate::vmm::{
    Ram,
    bus::Registers as _,
    memory,
    pci::{Function as _, MessageSink},
    virtio::{Device, F_VERSION_1, VirtioPci},
};

pub const RAM_BYTES: u64 = 4 << 20;
const QUEUE_BYTES: u64 = 0x4000;
/// Where tests put their buffers.
pub const BUFFERS: u64 = 0x10_0000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;

/// Interrupts that were sent: their data.
#[derive(Default)]
pub struct Sent(pub Mutex<Vec<u32>>);

impl MessageSink for Sent {
    fn signal(&self, _address: u64, data: u32) {
        self.0.lock().unwrap().push(data);
    }
}

/// A part of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    pub at: u64,
    pub bytes: u32,
    pub is_writable: bool,
}

pub fn readable(at: u64, bytes: u32) -> Part {
    Part { at, bytes, is_writable: false }
}

pub fn writable(at: u64, bytes: u32) -> Part {
    Part { at, bytes, is_writable: true }
}

pub struct Driver {
    pub device: VirtioPci,
    pub ram: Arc<Ram>,
    pub sent: Arc<Sent>,
    size: u16,
    next: [u16; 8],
    used: [u16; 8],
}

impl Driver {
    pub fn new(device: Device) -> Self {
        let ram = Arc::new(memory::map(memory::create(RAM_BYTES).unwrap(), RAM_BYTES).unwrap());
        let sent = Arc::new(Sent::default());
        let device = VirtioPci::new(device, 1, Arc::clone(&ram), Arc::clone(&sent) as _).unwrap();
        Self { device, ram, sent, size: 16, next: [0; 8], used: [0; 8] }
    }

    /// The same guest with another device, which takes over from this one; memory is copied.
    pub fn moved(&mut self, device: Device) -> Self {
        self.device.pause();
        let saved = serde_json::to_vec(&self.device.save().unwrap()).unwrap();
        self.copied(device, &saved)
    }

    /// The same guest with another device, which takes over what was saved of this one.
    pub fn copied(&self, device: Device, saved: &[u8]) -> Self {
        let mut to = Self::new(device);
        to.put(0, &self.get(0, usize::try_from(RAM_BYTES).unwrap()));
        to.device.restore(&serde_json::from_slice(saved).unwrap()).unwrap();
        (to.next, to.used) = (self.next, self.used);
        to
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.device.write(offset, data);
    }

    pub fn read<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.device.read(offset, &mut data);
        data
    }

    pub fn status(&mut self) -> u8 {
        self.read::<1>(20)[0]
    }

    fn queue_places(queue: u16) -> [u64; 3] {
        let at = QUEUE_BYTES * u64::from(queue) + 0x1000;
        [at, at + 0x1000, at + 0x2000]
    }

    /// Everything up to a live device; features besides version 1 are `features`.
    pub fn bring_up(&mut self, features: u64) {
        let msix = self.device_capability(0x11);
        self.device.write_config(msix + 2, &[0, 0x80]);
        let vectors = 1 + self.queues();
        for vector in 0..u64::from(vectors) {
            self.write(TABLE + 16 * vector, &0xfee0_0000u32.to_le_bytes());
            self.write(TABLE + 16 * vector + 8, &u32::try_from(vector).unwrap().to_le_bytes());
            self.write(TABLE + 16 * vector + 12, &[0; 4]);
        }
        self.write(20, &[1]);
        self.write(20, &[3]);
        let features = features | F_VERSION_1;
        for half in 0..2u32 {
            self.write(8, &half.to_le_bytes());
            self.write(12, &u32::try_from((features >> (32 * half)) & 0xffff_ffff).unwrap().to_le_bytes());
        }
        self.write(20, &[11]);
        assert_eq!(self.status(), 11, "features are agreed");
        for queue in 0..self.queues() {
            self.set_up_queue(queue);
        }
        self.write(20, &[15]);
        assert_eq!(self.status(), 15, "it lives");
    }

    pub fn set_up_queue(&mut self, queue: u16) {
        self.write(22, &queue.to_le_bytes());
        self.write(24, &self.size.to_le_bytes());
        self.write(26, &(queue + 1).to_le_bytes());
        for (offset, place) in (32..).step_by(8).zip(Self::queue_places(queue)) {
            self.write(offset, &u32::try_from(place).unwrap().to_le_bytes());
            self.write(offset + 4, &[0; 4]);
            for at in (place..place + 0x1000).step_by(8) {
                self.ram.write_obj(0u64, GuestAddress(at)).unwrap();
            }
        }
        (self.next[usize::from(queue)], self.used[usize::from(queue)]) = (0, 0);
        self.write(28, &1u16.to_le_bytes());
    }

    /// Entries of each queue, before the device is brought up.
    pub fn set_size(&mut self, size: u16) {
        self.size = size;
    }

    pub fn queues(&mut self) -> u16 {
        u16::from_le_bytes(self.read(18))
    }

    fn device_capability(&mut self, id: u8) -> u16 {
        let mut at = [0u8];
        self.device.read_config(0x34, &mut at);
        while at[0] != 0 {
            let mut head = [0; 2];
            self.device.read_config(at[0].into(), &mut head);
            if head[0] == id {
                return at[0].into();
            }
            at[0] = head[1];
        }
        panic!("no capability {id:#x}");
    }

    /// Makes a chain available; its head. Descriptors from `first` on are used for it.
    pub fn offer(&mut self, queue: u16, first: u16, parts: &[Part]) -> u16 {
        let [table, available, _] = Self::queue_places(queue);
        for (index, part) in (first..).zip(parts) {
            let is_last = usize::from(index - first) + 1 == parts.len();
            let flags = u16::from(!is_last) | u16::from(part.is_writable) << 1;
            self.descriptor(table + 16 * u64::from(index), *part, flags, index + 1);
        }
        let next = &mut self.next[usize::from(queue)];
        let at = available + 4 + 2 * u64::from(*next % self.size);
        self.ram.write_obj(first, GuestAddress(at)).unwrap();
        *next = next.wrapping_add(1);
        self.ram.write_obj(*next, GuestAddress(available + 2)).unwrap();
        first
    }

    pub fn descriptor(&self, at: u64, part: Part, flags: u16, next: u16) {
        self.ram.write_obj(part.at, GuestAddress(at)).unwrap();
        self.ram.write_obj(part.bytes, GuestAddress(at + 8)).unwrap();
        self.ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.ram.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    pub fn kick(&mut self, queue: u16) {
        self.write(NOTIFY + 4 * u64::from(queue), &queue.to_le_bytes());
    }

    /// The next chain that the device gave back: head and bytes written.
    pub fn await_used(&mut self, queue: u16) -> (u32, u32) {
        let end = Instant::now() + Duration::from_secs(20);
        while !self.has_used(queue) {
            assert!(Instant::now() < end, "queue {queue}: nothing came back");
            std::thread::yield_now();
        }
        let [_, _, ring] = Self::queue_places(queue);
        let used = &mut self.used[usize::from(queue)];
        let at = ring + 4 + 8 * u64::from(*used % self.size);
        *used = used.wrapping_add(1);
        let get = |at| self.ram.read_obj(GuestAddress(at)).unwrap();
        (get(at), get(at + 4))
    }

    pub fn has_used(&self, queue: u16) -> bool {
        let [_, _, ring] = Self::queue_places(queue);
        self.ram.read_obj::<u16>(GuestAddress(ring + 2)).unwrap() != self.used[usize::from(queue)]
    }

    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub fn get(&self, at: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.ram.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }
}
