//! MSI-X (PCI Local Bus 3.0, 6.8.2): a table of messages that the guest writes, and bits for those that wait.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

use crate::vmm::bus::copy;

/// Takes messages: writes of 32 bits to where local APICs listen.
pub trait MessageSink: Send + Sync {
    /// Sends one. Address and data are the guest's.
    fn signal(&self, address: u64, data: u32);
}

impl MessageSink for super::super::kvm::Vm {
    fn signal(&self, address: u64, data: u32) {
        self.signal_msi(address, data);
    }
}

const ENTRY_BYTES: u64 = 16;

/// A table as it is saved: its messages and which of them wait.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    /// Each vector's message.
    pub table: Vec<Message>,
    /// Bits of those that came while they were masked.
    pub pending: u64,
}

/// A message of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Where to.
    pub address: u64,
    /// What.
    pub data: u32,
    /// Held back.
    pub is_masked: bool,
}

impl Message {
    /// As it is after a reset.
    const EMPTY: Self = Self { address: 0, data: 0, is_masked: true };
}

#[derive(Debug)]
struct State {
    table: Vec<Message>,
    /// Messages that came while they were masked.
    pending: u64,
    is_enabled: bool,
    is_masked: bool,
}

/// A function's MSI-X table; shared by the registers and the thread that raises interrupts.
pub struct Msix {
    sink: Arc<dyn MessageSink>,
    state: Mutex<State>,
}

impl fmt::Debug for Msix {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Msix").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Msix {
    /// Most vectors of a function: as many as the pending bits of one word.
    pub const MAX_VECTORS: u16 = 64;

    /// A table of so many vectors, at most [`Msix::MAX_VECTORS`].
    #[must_use]
    pub fn new(vectors: u16, sink: Arc<dyn MessageSink>) -> Self {
        let table = vec![Message::EMPTY; usize::from(vectors.min(Self::MAX_VECTORS))];
        Self { sink, state: Mutex::new(State { table, pending: 0, is_enabled: false, is_masked: false }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many vectors there are.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.lock().table.len()).unwrap_or(Self::MAX_VECTORS)
    }

    /// Raises an interrupt: sent now, kept while it is masked, nothing when there is no such vector or MSI-X is off.
    pub fn raise(&self, vector: u16) {
        let mut state = self.lock();
        let Some(message) = state.table.get(usize::from(vector)).copied() else { return };
        if !state.is_enabled {
            return;
        }
        if state.is_masked || message.is_masked {
            state.pending |= 1 << vector;
        } else {
            self.sink.signal(message.address, message.data);
        }
    }

    /// The guest wrote the capability's control word: bit 15 enables, bit 14 masks all.
    pub fn set_control(&self, control: u16) {
        let mut state = self.lock();
        state.is_enabled = control & (1 << 15) != 0;
        state.is_masked = control & (1 << 14) != 0;
        self.deliver(&mut state);
    }

    /// Sends what waits and may go.
    fn deliver(&self, state: &mut State) {
        if !state.is_enabled || state.is_masked {
            return;
        }
        for (index, message) in state.table.iter().enumerate() {
            if state.pending & (1 << index) != 0 && !message.is_masked {
                state.pending &= !(1 << index);
                self.sink.signal(message.address, message.data);
            }
        }
    }

    /// Reads the table: 4 or 8 bytes, aligned.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let Some(message) = entry(&state.table, offset) else { return };
        let mut row = [0u8; 16];
        row[..8].copy_from_slice(&message.address.to_le_bytes());
        row[8..12].copy_from_slice(&message.data.to_le_bytes());
        row[12] = u8::from(message.is_masked);
        copy(&row, offset % ENTRY_BYTES, data);
    }

    /// Writes the table: 4 or 8 bytes, aligned.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        let Some(message) = entry(&state.table, offset) else { return };
        if !(matches!(data.len(), 4 | 8) && offset.is_multiple_of(data.len() as u64)) {
            return;
        }
        let mut row = [0u8; 16];
        row[..8].copy_from_slice(&message.address.to_le_bytes());
        row[8..12].copy_from_slice(&message.data.to_le_bytes());
        row[12] = u8::from(message.is_masked);
        for (to, byte) in row.iter_mut().skip(usize::try_from(offset % ENTRY_BYTES).unwrap_or(16)).zip(data) {
            *to = *byte;
        }
        let [address, rest] = [&row[..8], &row[8..]].map(|half| {
            let mut word = [0; 8];
            word.copy_from_slice(half);
            u64::from_le_bytes(word)
        });
        #[expect(clippy::cast_possible_truncation, reason = "the low half is the data")]
        let new = Message { address, data: rest as u32, is_masked: row[12] & 1 != 0 };
        if let Some(place) = usize::try_from(offset / ENTRY_BYTES).ok().and_then(|index| state.table.get_mut(index)) {
            *place = new;
        }
        self.deliver(&mut state);
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        copy(&self.lock().pending.to_le_bytes(), offset, data);
    }

    /// The table as it is.
    #[must_use]
    pub fn save(&self) -> MsixState {
        let state = self.lock();
        MsixState { table: state.table.clone(), pending: state.pending }
    }

    /// Makes the table that of another; `control` is the capability's control word. Nothing is sent: what waits, waits for
    /// the guest to let it go. False, and nothing changed, when that table has another length.
    #[must_use]
    pub fn restore(&self, saved: &MsixState, control: u16) -> bool {
        let mut state = self.lock();
        let is_beyond = saved.table.len() < 64 && saved.pending >> saved.table.len() != 0;
        if saved.table.len() != state.table.len() || is_beyond {
            return false;
        }
        state.table.clone_from(&saved.table);
        state.pending = saved.pending;
        state.is_enabled = control & (1 << 15) != 0;
        state.is_masked = control & (1 << 14) != 0;
        true
    }

    /// As after power-on.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.table.fill(Message::EMPTY);
        state.pending = 0;
        state.is_enabled = false;
        state.is_masked = false;
    }
}

fn entry(table: &[Message], offset: u64) -> Option<Message> {
    table.get(usize::try_from(offset / ENTRY_BYTES).ok()?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Sent(Mutex<Vec<(u64, u32)>>);
    impl MessageSink for Sent {
        fn signal(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push((address, data));
        }
    }

    #[test]
    fn a_message_waits_while_it_is_masked_and_is_sent_once() {
        let sent = Arc::new(Sent::default());
        let msix = Msix::new(2, Arc::clone(&sent) as Arc<dyn MessageSink>);
        let taken = || std::mem::take(&mut *sent.0.lock().unwrap());
        msix.raise(1);
        msix.set_control(1 << 15);
        assert_eq!(taken(), [], "what came while MSI-X was off is gone");
        msix.write_table(16, &0xfee0_1000u32.to_le_bytes());
        msix.write_table(24, &0x41u32.to_le_bytes());
        msix.raise(1);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!((taken(), pending[0]), (vec![], 2));
        msix.write_table(28, &[0; 4]);
        assert_eq!(taken(), [(0xfee0_1000, 0x41)]);
        msix.raise(1);
        assert_eq!(taken(), [(0xfee0_1000, 0x41)]);
        // All of them masked, and let go again.
        msix.set_control(3 << 14);
        msix.raise(1);
        assert_eq!(taken(), []);
        msix.set_control(1 << 15);
        msix.set_control(1 << 15);
        assert_eq!(taken(), [(0xfee0_1000, 0x41)]);
        // No such vector, no such entry, odd accesses.
        msix.raise(2);
        msix.raise(u16::MAX);
        for (offset, bytes) in [(32, 4), (u64::MAX, 4), (18, 4), (28, 8), (0, 3)] {
            msix.write_table(offset, &vec![0xff; bytes]);
            msix.read_table(offset, &mut vec![0; bytes]);
            msix.read_pending(offset, &mut vec![0; bytes]);
        }
        msix.raise(1);
        assert_eq!(taken(), [(0xfee0_1000, 0x41)], "odd accesses changed nothing");
    }
}
