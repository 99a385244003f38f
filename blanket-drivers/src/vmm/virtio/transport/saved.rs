//! A device between two of its requests, as it is saved and restored.

use serde::{Deserialize, Serialize};

use super::{NO_VECTOR, QueueSetup, VirtioPci, Work};
use crate::vmm::{
    VmmError,
    pci::{ConfigSpace, MsixState},
    state::refused,
    virtio::{
        F_VERSION_1, Ring,
        phase::{self, Phase, status},
    },
};

/// A device as it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    /// Its virtio device number.
    pub number: u16,
    /// How far driver and device have come.
    pub phase: Phase,
    /// The status register in [`Phase::Failed`].
    pub failed_status: u8,
    /// Features that the driver wants.
    pub features: u64,
    /// Which halves of features the registers show: the device's, the driver's.
    pub feature_selects: [u32; 2],
    /// Which queue they show.
    pub queue_select: u16,
    /// The interrupt for configuration changes.
    pub config_vector: u16,
    /// Each queue.
    pub queues: Vec<QueueParts>,
    /// Configuration space.
    pub config: Vec<u8>,
    /// The guest asked for the BAR's size.
    pub is_sizing: bool,
    /// Its interrupts.
    pub msix: MsixState,
    /// What its handler holds.
    pub handler: Vec<u8>,
}

/// A queue as it is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueParts {
    /// Entries.
    pub size: u16,
    /// Its interrupt.
    pub vector: u16,
    /// Switched on.
    pub is_enabled: bool,
    /// Addresses of descriptor table, available ring, used ring.
    pub places: [u64; 3],
    /// Of a queue that is served: how many requests were taken and how many given back, modulo 2^16.
    pub done: Option<[u16; 2]>,
}

impl VirtioPci {
    /// The device as it is, when it is paused.
    ///
    /// # Errors
    /// When it is not.
    pub fn save(&self) -> Result<DeviceState, VmmError> {
        let (handler, rings): (_, &[Option<Ring>]) = match &self.work {
            Work::Idle(handler) => (handler.save(), &[]),
            Work::Paused(handler, rings) | Work::Held(handler, rings) => (handler.save(), rings),
            Work::Running(_) => return Err(refused(format!("{} is not paused", self.name))),
            Work::Lost => (Vec::new(), &[]),
        };
        let mut done =
            rings.iter().map(|ring| ring.as_ref().map(|ring| [ring.state().next_avail, ring.state().next_used]));
        let (config, is_sizing) = self.config.save();
        let mut state = DeviceState {
            number: self.number,
            phase: self.phase,
            failed_status: self.failed_status,
            features: self.features,
            feature_selects: self.feature_selects,
            queue_select: self.queue_select,
            config_vector: self.config_vector,
            queues: Vec::with_capacity(self.queues.len()),
            config,
            is_sizing,
            msix: self.msix.save(),
            handler,
        };
        for queue in &self.queues {
            let QueueSetup { size, vector, is_enabled, places, .. } = *queue;
            state.queues.push(QueueParts { size, vector, is_enabled, places, done: done.next().flatten() });
        }
        // What its lost thread held is lost; there the driver finds a device that wants a reset, which helps.
        if matches!(self.work, Work::Lost) && self.phase == Phase::Live {
            state.phase = Phase::Failed;
            state.failed_status = phase::status_of(Phase::Live) | status::NEEDS_RESET;
        }
        Ok(state)
    }

    /// Makes a device that has just been made into a saved one; it stays paused. Guest memory is already there.
    ///
    /// # Errors
    /// When it is another device, or cannot be in such a state.
    pub fn restore(&mut self, saved: &DeviceState) -> Result<(), VmmError> {
        let (config, queues) = self.fitting(saved)?;
        let mut control = [0; 2];
        config.read(self.msix_at + 2, &mut control);
        if !self.msix.restore(&saved.msix, u16::from_le_bytes(control)) {
            return Err(refused(format!("another number of interrupts of {}", self.name)));
        }
        let Work::Idle(handler) = &mut self.work else {
            return Err(refused(format!("a second state of {}", self.name)));
        };
        if !handler.restore(&saved.handler) {
            return Err(refused(format!("what {} had in hand cannot be taken over", self.name)));
        }
        self.config = config;
        self.phase = saved.phase;
        self.failed_status = saved.failed_status;
        self.features = saved.features;
        self.feature_selects = saved.feature_selects;
        self.queue_select = saved.queue_select;
        self.config_vector = saved.config_vector;
        self.queues = queues;
        if self.phase == Phase::Live { self.restore_rings(&saved.queues) } else { Ok(()) }
    }

    /// Whether a saved device can be this one, as far as that can be told without changing it.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, saved: &DeviceState) -> Result<(), VmmError> {
        self.fitting(saved).map(drop)
    }

    /// Registers and queues of a saved device that can be this one.
    fn fitting(&self, saved: &DeviceState) -> Result<(ConfigSpace, Vec<QueueSetup>), VmmError> {
        let wrong = |what: &str| refused(format!("{what} of {}", self.name));
        if saved.number != self.number || saved.queues.len() != self.queues.len() {
            return Err(wrong("another kind"));
        }
        let is_vector = |vector| vector == NO_VECTOR || vector < self.msix.vectors();
        let is_agreed = matches!(saved.phase, Phase::Agreed | Phase::Live);
        if is_agreed && (saved.features & !self.offered != 0 || saved.features & F_VERSION_1 == 0) {
            return Err(wrong("features that are not offered here"));
        }
        let status_bits = status::FAILED | status::NEEDS_RESET | phase::status_of(Phase::Live);
        if !is_vector(saved.config_vector) || saved.failed_status & !status_bits != 0 {
            return Err(wrong("impossible registers"));
        }
        let mut queues = Vec::with_capacity(self.queues.len());
        for (parts, here) in saved.queues.iter().zip(&self.queues) {
            let is_size = parts.size.is_power_of_two() && parts.size <= here.max_size;
            if !is_size || !is_vector(parts.vector) {
                return Err(wrong("impossible queues"));
            }
            let QueueParts { size, vector, is_enabled, places, .. } = *parts;
            queues.push(QueueSetup { max_size: here.max_size, size, vector, is_enabled, places });
        }
        let mut config = self.config.clone();
        if !config.restore(&saved.config, saved.is_sizing) {
            return Err(wrong("the configuration of another device instead"));
        }
        Ok((config, queues))
    }

    fn restore_rings(&mut self, saved: &[QueueParts]) -> Result<(), VmmError> {
        let mut rings = Vec::with_capacity(saved.len());
        for (setup, parts) in self.queues.iter().zip(saved) {
            let ring = parts.done.filter(|_| setup.is_enabled).and_then(|done| self.ring_at(setup, done));
            if setup.is_enabled && ring.is_none() {
                return Err(refused(format!("queues of {} that cannot be served", self.name)));
            }
            rings.push(ring);
        }
        let Work::Idle(mut handler) = std::mem::replace(&mut self.work, Work::Lost) else {
            return Err(refused(format!("{} has a state already", self.name)));
        };
        handler.begin(self.features);
        self.work = Work::Paused(handler, rings);
        Ok(())
    }
}
