//! A virtio device's registers on PCI (virtio 1.2, 4.1).
//!
//! ```text
//! BAR 0 (32 KiB)  0x0000 common configuration   0x1000 interrupt status   0x2000 device configuration
//!                 0x3000 notifications, 4 bytes a queue   0x4000 MSI-X table   0x5000 its pending bits
//! ```
//!
//! Notifications normally end in the kernel (an ioeventfd for each queue), so that no vCPU comes out for them.
//! There is no legacy interface and no interrupt line: a driver without MSI-X hears nothing.

mod saved;

use std::{sync::Arc, time::Instant};

use virtio_queue::{Queue, QueueState, QueueT as _};
use vmm_sys_util::eventfd::EventFd;

use super::{
    Balloon, Device, F_EVENT_INDEX, F_INDIRECT, F_VERSION_1, Handler, Ring,
    phase::{self, Operation, Phase, Step, is_legal, status},
    worker::Worker,
};
use crate::vmm::{
    Ram, VmmError,
    bus::{Registers, copy},
    io_error,
    pci::{self, Capability, ConfigSpace, Function, Identity, MessageSink, Msix},
};

pub use saved::{DeviceState, QueueParts};

const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
/// Notifications: a queue's are at 4 times its number from here.
pub const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
const REGION_BYTES: u32 = 0x1000;
/// "No interrupt for this."
const NO_VECTOR: u16 = 0xffff;
/// Most queues of a device.
pub const MAX_QUEUES: usize = 8;

/// A queue as the guest sets it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct QueueSetup {
    max_size: u16,
    size: u16,
    vector: u16,
    is_enabled: bool,
    /// Descriptor table, available ring, used ring.
    places: [u64; 3],
}

impl QueueSetup {
    const fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size, vector: NO_VECTOR, is_enabled: false, places: [0; 3] }
    }
}

/// Who has handler and rings.
#[derive(Debug)]
enum Work {
    Idle(Box<dyn Handler>),
    Running(Worker),
    Paused(Box<dyn Handler>, Vec<Option<Ring>>),
    /// For a moment, with what is in flight still so.
    Held(Box<dyn Handler>, Vec<Option<Ring>>),
    /// Its thread is gone; the device answers, but never serves again.
    Lost,
}

/// A device.
#[derive(Debug)]
pub struct VirtioPci {
    name: String,
    number: u16,
    config: ConfigSpace,
    msix_at: u16,
    offered: u64,
    device_config: Vec<u8>,
    balloon: Option<Arc<Balloon>>,
    ram: Arc<Ram>,
    msix: Arc<Msix>,
    kicks: Vec<EventFd>,
    phase: Phase,
    /// Bits that the driver had set before one side failed.
    failed_status: u8,
    features: u64,
    feature_selects: [u32; 2],
    queue_select: u16,
    config_vector: u16,
    queues: Vec<QueueSetup>,
    work: Work,
}

impl VirtioPci {
    /// A device in a slot.
    ///
    /// # Errors
    /// When it has too many queues, or descriptors run out.
    pub fn new(device: Device, slot: u8, ram: Arc<Ram>, sink: Arc<dyn MessageSink>) -> Result<Self, VmmError> {
        if device.queues.is_empty() || device.queues.len() > MAX_QUEUES {
            let value = device.queues.len() as u64;
            return Err(VmmError::Range { what: "queues of a device", value, range: "1 to 8" });
        }
        let queues = u16::try_from(device.queues.len()).unwrap_or(0);
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1040 + device.number,
            class: device.class,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        config.set_bar(u32::try_from(pci::bar_address(slot)).unwrap_or(0), u32::try_from(pci::BAR_BYTES).unwrap_or(0));
        let room = |value| VmmError::Range { what: "capabilities", value, range: "256 bytes" };
        let length = u32::try_from(device.config.len()).unwrap_or(0).max(4);
        for (kind, at, length, multiplier) in [
            (1u8, COMMON, 56, None),
            (2, NOTIFY, 4 * u32::from(queues), Some(4u32)),
            (3, ISR, 4, None),
            (4, DEVICE, length, None),
        ] {
            let mut body = vec![if multiplier.is_some() { 20 } else { 16 }, kind, 0, 0, 0, 0];
            body.extend(u32::try_from(at).unwrap_or(0).to_le_bytes());
            body.extend(length.to_le_bytes());
            body.extend(multiplier.into_iter().flat_map(u32::to_le_bytes));
            let capability = Capability { id: 9, body, writable: Vec::new() };
            config.add_capability(&capability).ok_or_else(|| room(kind.into()))?;
        }
        let vectors = queues + 1;
        let mut body = (vectors - 1).to_le_bytes().to_vec();
        for at in [MSIX_TABLE, MSIX_PENDING] {
            body.extend(u32::try_from(at).unwrap_or(0).to_le_bytes());
        }
        let capability = Capability { id: 0x11, body, writable: vec![0, 0xc0] };
        let msix_at = config.add_capability(&capability).ok_or_else(|| room(0x11))?;
        let kick = |_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Self {
            name: format!("virtio-{}-{slot}", device.number),
            number: device.number,
            config,
            msix_at: u16::try_from(msix_at).unwrap_or(0),
            offered: device.features | F_VERSION_1 | F_INDIRECT | F_EVENT_INDEX,
            device_config: device.config,
            balloon: device.balloon,
            ram,
            msix: Arc::new(Msix::new(vectors, sink)),
            kicks: (0..queues).map(kick).collect::<Result<_, _>>().map_err(io_error("making an eventfd"))?,
            phase: Phase::Reset,
            failed_status: 0,
            features: 0,
            feature_selects: [0; 2],
            queue_select: 0,
            config_vector: NO_VECTOR,
            queues: device.queues.iter().map(|max_size| QueueSetup::new(*max_size)).collect(),
            work: Work::Idle(device.handler),
        })
    }

    /// The events by which queues are kicked, in order: for the kernel to set.
    #[must_use]
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// How far driver and device have come.
    #[must_use]
    pub const fn phase(&self) -> Phase {
        self.phase
    }

    /// Stops serving, with nothing half done.
    pub fn pause(&mut self) {
        self.work = match std::mem::replace(&mut self.work, Work::Lost) {
            Work::Running(worker) => match worker.stop(true) {
                Some((handler, rings)) => Work::Paused(handler, rings),
                None => Work::Lost,
            },
            Work::Held(mut handler, mut rings) => {
                handler.settle(&mut rings);
                Work::Paused(handler, rings)
            }
            other => other,
        };
    }

    /// Stops serving for a moment: what is in flight stays so, and goes on when it is resumed. Nothing touches guest memory
    /// meanwhile but [`VirtioPci::await_cut`].
    pub fn hold(&mut self) {
        self.work = match std::mem::replace(&mut self.work, Work::Lost) {
            Work::Running(worker) => match worker.stop(false) {
                Some((handler, rings)) => Work::Held(handler, rings),
                None => Work::Lost,
            },
            other => other,
        };
    }

    /// While it is held: begins to have a cut taken of what is behind it.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn begin_cut(&mut self, number: u64) -> std::io::Result<()> {
        match &mut self.work {
            Work::Idle(handler) | Work::Paused(handler, _) | Work::Held(handler, _) => handler.begin_cut(number),
            Work::Running(_) => Err(std::io::Error::other(format!("{} is not held", self.name))),
            Work::Lost => Err(std::io::Error::other(format!("the thread of {} is gone", self.name))),
        }
    }

    /// While it is held: waits for the cut.
    ///
    /// # Errors
    /// When there is none by then.
    pub fn await_cut(&mut self, until: Instant) -> std::io::Result<()> {
        match &mut self.work {
            Work::Idle(handler) => handler.await_cut(&mut [], until),
            Work::Paused(handler, rings) | Work::Held(handler, rings) => handler.await_cut(rings, until),
            Work::Running(_) | Work::Lost => Err(std::io::Error::other(format!("{} is not held", self.name))),
        }
    }

    /// Serves again, if it did before the pause.
    pub fn resume(&mut self) {
        self.work = match std::mem::replace(&mut self.work, Work::Lost) {
            Work::Paused(handler, rings) | Work::Held(handler, rings) => {
                match Worker::start(self.name.clone(), handler, rings, &self.kicks) {
                    Ok(worker) => Work::Running(worker),
                    Err((_, left)) => {
                        self.fail();
                        left.map_or(Work::Lost, |(handler, _)| Work::Idle(handler))
                    }
                }
            }
            other => other,
        };
    }

    /// The device, if it is a balloon.
    #[must_use]
    pub const fn balloon(&self) -> Option<&Arc<Balloon>> {
        self.balloon.as_ref()
    }

    /// Tells the driver that the device's configuration has changed.
    pub fn tell_of_config(&self) {
        if self.phase == Phase::Live {
            self.msix.raise(self.config_vector);
        }
    }

    /// The device cannot go on until the driver resets it.
    fn fail(&mut self) {
        self.failed_status = phase::status_of(self.phase) | status::NEEDS_RESET;
        self.phase = Phase::Failed;
        self.msix.raise(self.config_vector);
    }

    fn status(&self) -> u8 {
        if self.phase == Phase::Failed { self.failed_status } else { phase::status_of(self.phase) }
    }

    fn write_status(&mut self, value: u8) {
        match phase::step(self.phase, value) {
            Step::Stay => {}
            Step::Reset => self.reset(),
            Step::Go(Phase::Agreed) => {
                let is_known = self.features & !self.offered == 0;
                if is_known && self.features & F_VERSION_1 != 0 {
                    self.phase = Phase::Agreed;
                }
            }
            Step::Go(Phase::Live) => {
                self.phase = Phase::Live;
                if self.start().is_none() {
                    self.fail();
                }
            }
            Step::Go(Phase::Failed) => {
                self.stop();
                self.failed_status = phase::status_of(self.phase) | status::FAILED;
                self.phase = Phase::Failed;
            }
            Step::Go(next) => self.phase = next,
        }
    }

    /// Begins to serve the queues as they were set up; `None` when that is not possible.
    fn start(&mut self) -> Option<()> {
        let mut rings = Vec::with_capacity(self.queues.len());
        for setup in &self.queues {
            rings.push(if setup.is_enabled { Some(self.ring(setup)?) } else { None });
        }
        let Work::Idle(mut handler) = std::mem::replace(&mut self.work, Work::Lost) else { return None };
        handler.begin(self.features);
        match Worker::start(self.name.clone(), handler, rings, &self.kicks) {
            Ok(worker) => {
                self.work = Work::Running(worker);
                Some(())
            }
            Err((_, left)) => {
                self.work = left.map_or(Work::Lost, |(handler, _)| Work::Idle(handler));
                None
            }
        }
    }

    fn ring(&self, setup: &QueueSetup) -> Option<Ring> {
        self.ring_at(setup, [0, 0])
    }

    /// A ring of which so many requests were taken and given back.
    fn ring_at(&self, setup: &QueueSetup, [next_avail, next_used]: [u16; 2]) -> Option<Ring> {
        let [desc_table, avail_ring, used_ring] = setup.places;
        let queue = Queue::try_from(QueueState {
            max_size: setup.max_size,
            size: setup.size,
            next_avail,
            next_used,
            ready: true,
            desc_table,
            avail_ring,
            used_ring,
            event_idx_enabled: self.features & F_EVENT_INDEX != 0,
        });
        let queue = queue.ok().filter(|queue| queue.is_valid(&*self.ram))?;
        Some(Ring::new(queue, Arc::clone(&self.ram), Arc::clone(&self.msix), setup.vector))
    }

    fn stop(&mut self) {
        self.pause();
        self.work = match std::mem::replace(&mut self.work, Work::Lost) {
            Work::Paused(mut handler, _) => {
                handler.forget();
                Work::Idle(handler)
            }
            other => other,
        };
    }

    fn reset(&mut self) {
        self.stop();
        self.phase = Phase::Reset;
        self.failed_status = 0;
        self.features = 0;
        self.feature_selects = [0; 2];
        self.queue_select = 0;
        self.config_vector = NO_VECTOR;
        for queue in &mut self.queues {
            *queue = QueueSetup::new(queue.max_size);
        }
        // What came for the queues before is for nobody.
        for kick in &self.kicks {
            let _ = kick.read();
        }
    }

    fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The common configuration as it reads now (4.1.4.3).
    fn common(&self) -> [u8; 56] {
        let mut image = [0; 56];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let half = |value: u64, select: u32| match select {
            #[expect(clippy::cast_possible_truncation, reason = "the low half")]
            0 => value as u32,
            1 => u32::try_from(value >> 32).unwrap_or(0),
            _ => 0,
        };
        put(0, &self.feature_selects[0].to_le_bytes());
        put(4, &half(self.offered, self.feature_selects[0]).to_le_bytes());
        put(8, &self.feature_selects[1].to_le_bytes());
        put(12, &half(self.features, self.feature_selects[1]).to_le_bytes());
        put(16, &self.config_vector.to_le_bytes());
        put(18, &u16::try_from(self.queues.len()).unwrap_or(0).to_le_bytes());
        put(20, &[self.status(), self.balloon.as_ref().map_or(0, |balloon| balloon.generation())]);
        put(22, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.selected() {
            put(24, &queue.size.to_le_bytes());
            put(26, &queue.vector.to_le_bytes());
            put(28, &u16::from(queue.is_enabled).to_le_bytes());
            put(30, &self.queue_select.to_le_bytes());
            for (at, place) in (32..).step_by(8).zip(queue.places) {
                put(at, &place.to_le_bytes());
            }
        }
        image
    }

    /// Writes a register of the common configuration; only whole registers, and 64-bit ones by halves.
    fn write_common(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        let Some(low) = bytes.get_mut(..data.len()) else { return };
        low.copy_from_slice(data);
        let value = u32::from_le_bytes(bytes);
        #[expect(clippy::cast_possible_truncation, reason = "as wide as the access was")]
        let (word, byte) = (value as u16, value as u8);
        let may = |operation| is_legal(self.phase, operation);
        let queue_select = usize::from(self.queue_select);
        match (offset, data.len()) {
            (0, 4) if may(Operation::Select) => self.feature_selects[0] = value,
            (8, 4) if may(Operation::Select) => self.feature_selects[1] = value,
            (12, 4) if may(Operation::WriteFeatures) => match self.feature_selects[1] {
                0 => self.features = (self.features & !0xffff_ffff) | u64::from(value),
                1 => self.features = (self.features & 0xffff_ffff) | u64::from(value) << 32,
                _ => {}
            },
            (16, 2) if may(Operation::SetVector) => self.config_vector = self.vector(word),
            (20, 1) => self.write_status(byte),
            (22, 2) if may(Operation::Select) => self.queue_select = word,
            (24..56, _) => {
                let vector = self.vector(word);
                let (may_set, may_enable) = (may(Operation::SetQueue), may(Operation::EnableQueue));
                let Some(queue) = self.queues.get_mut(queue_select) else { return };
                // A queue that is switched on is not changed any more.
                if queue.is_enabled {
                    return;
                }
                match (offset, data.len()) {
                    (24, 2) if may_set && word.is_power_of_two() && word <= queue.max_size => queue.size = word,
                    (26, 2) if may_set => queue.vector = vector,
                    (28, 2) if may_enable && word == 1 => queue.is_enabled = true,
                    (32..56, 4) if may_set && offset.is_multiple_of(4) => {
                        let place = &mut queue.places[usize::try_from((offset - 32) / 8).unwrap_or(0)];
                        *place = if offset.is_multiple_of(8) {
                            (*place & !0xffff_ffff) | u64::from(value)
                        } else {
                            (*place & 0xffff_ffff) | u64::from(value) << 32
                        };
                    }
                    _ => {}
                }
            }
            _ => {}
        }
    }

    /// A vector that there is, or none.
    fn vector(&self, wanted: u16) -> u16 {
        if wanted < self.msix.vectors() { wanted } else { NO_VECTOR }
    }

    fn notify(&mut self, offset: u64) {
        let index = usize::try_from(offset / 4).unwrap_or(usize::MAX);
        if is_legal(self.phase, Operation::Notify)
            && let Some(kick) = self.kicks.get(index)
        {
            // Full only if it is already set.
            let _ = kick.write(1);
        }
    }
}

impl Registers for VirtioPci {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if !self.config.is_memory_enabled() {
            data.fill(0xff);
            return;
        }
        let (region, at) = (offset & !u64::from(REGION_BYTES - 1), offset & u64::from(REGION_BYTES - 1));
        match region {
            COMMON => copy(&self.common(), at, data),
            DEVICE => match &self.balloon {
                Some(balloon) => copy(&balloon.config(), at, data),
                None => copy(&self.device_config, at, data),
            },
            MSIX_TABLE => self.msix.read_table(at, data),
            MSIX_PENDING => self.msix.read_pending(at, data),
            // Interrupt status is for interrupt lines; notifications cannot be read.
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if !self.config.is_memory_enabled() {
            return;
        }
        let (region, at) = (offset & !u64::from(REGION_BYTES - 1), offset & u64::from(REGION_BYTES - 1));
        match region {
            COMMON => self.write_common(at, data),
            NOTIFY => self.notify(at),
            DEVICE if is_legal(self.phase, Operation::WriteConfig) => {
                if let Some(balloon) = &self.balloon {
                    balloon.write_config(at, data);
                }
            }
            MSIX_TABLE => self.msix.write_table(at, data),
            _ => {}
        }
    }
}

impl Function for VirtioPci {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        let control = self.msix_at + 2;
        let end = offset.saturating_add(u16::try_from(data.len()).unwrap_or(u16::MAX));
        if offset < control + 2 && end > control {
            let mut bytes = [0; 2];
            self.config.read(control, &mut bytes);
            self.msix.set_control(u16::from_le_bytes(bytes));
        }
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.stop();
    }
}
