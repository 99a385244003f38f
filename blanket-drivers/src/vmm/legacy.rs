//! What is left of a PC: a serial port, the registers of power-off and reset, the keyboard controller's reset command.

use std::{
    collections::VecDeque,
    fmt,
    io::{self, Write},
    sync::Arc,
};

use vm_superio::{Serial, Trigger, serial::NoEvents};

use serde::{Deserialize, Serialize};

use super::{Outcome, VmmError, bus::Registers, kvm::Vm, layout, machine::Endings, state::refused};

/// Most bytes that wait for a guest to read them from its serial port.
pub const MAX_INPUT_BYTES: usize = 4096;

/// Where a guest's serial output goes. It must not block: a byte that cannot be written at once is lost.
pub type Sink = Box<dyn Write + Send>;

struct Line {
    vm: Arc<Vm>,
    irq: u32,
}

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.vm.pulse(self.irq).map_err(io::Error::other)
    }
}

/// A serial port as it is saved: its registers, and input that waits.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialState {
    /// Divisor low and high, interrupt enable and identification, line control and status, modem control and status,
    /// scratch.
    pub registers: [u8; 9],
    /// Bytes in the receiver.
    pub received: Vec<u8>,
    /// Bytes for which the receiver has no room yet.
    pub waiting: Vec<u8>,
}

/// A 16550 serial port.
pub struct SerialPort {
    port: Serial<Line, NoEvents, Sink>,
    input: VecDeque<u8>,
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("SerialPort").field("waiting", &self.input.len()).finish_non_exhaustive()
    }
}

impl SerialPort {
    /// A port that writes to `sink`.
    #[must_use]
    pub fn new(vm: Arc<Vm>, irq: u32, sink: Sink) -> Self {
        Self { port: Serial::new(Line { vm, irq }, sink), input: VecDeque::new() }
    }

    /// Takes input for the guest: how many bytes, at most until [`MAX_INPUT_BYTES`] wait.
    pub fn feed(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(MAX_INPUT_BYTES.saturating_sub(self.input.len()));
        self.input.extend(&bytes[..taken]);
        self.refill();
        taken
    }

    /// The port as it is.
    #[must_use]
    pub fn save(&self) -> SerialState {
        let state = self.port.state();
        SerialState {
            registers: [
                state.baud_divisor_low,
                state.baud_divisor_high,
                state.interrupt_enable,
                state.interrupt_identification,
                state.line_control,
                state.line_status,
                state.modem_control,
                state.modem_status,
                state.scratch,
            ],
            received: state.in_buffer,
            waiting: self.input.iter().copied().collect(),
        }
    }

    /// Makes it another's; its output goes where it went.
    ///
    /// # Errors
    /// When that has more waiting than a port can have.
    pub fn restore(&mut self, saved: &SerialState, vm: Arc<Vm>, irq: u32) -> Result<(), VmmError> {
        let [low, high, enable, identification, line, line_status, modem, modem_status, scratch] = saved.registers;
        let state = vm_superio::serial::SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: line,
            line_status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: saved.received.clone(),
        };
        if saved.waiting.len() > MAX_INPUT_BYTES || saved.received.len() > MAX_INPUT_BYTES {
            return Err(refused("its serial port has more input than fits"));
        }
        let nowhere: Sink = Box::new(io::sink());
        let sink = std::mem::replace(self.port.writer_mut(), nowhere);
        let port = Serial::from_state(&state, Line { vm, irq }, NoEvents, sink);
        self.port = port.map_err(|error| refused(format!("its serial port: {error:?}")))?;
        self.input = saved.waiting.iter().copied().collect();
        Ok(())
    }

    fn refill(&mut self) {
        let room = self.port.fifo_capacity().min(self.input.len());
        if room > 0 {
            let next: Vec<u8> = self.input.drain(..room).collect();
            // It has the room; what else can fail is the interrupt, which the guest then misses.
            let _ = self.port.enqueue_raw_bytes(&next);
        }
    }
}

impl Registers for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.port.read(offset);
            if offset == 0 {
                self.refill();
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // A sink that does not take it loses it.
            let _ = self.port.write(offset, *byte);
        }
    }
}

/// ACPI's sleep control (offset 0), sleep status (1) and reset (2) registers.
#[derive(Debug)]
pub struct Power {
    outcomes: Endings,
}

impl Power {
    /// Tells of what the guest asks for.
    #[must_use]
    pub const fn new(outcomes: Endings) -> Self {
        Self { outcomes }
    }
}

impl Registers for Power {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, offset: u64, data: &[u8]) {
        const SLEEP_ENABLE: u8 = 1 << 5;
        const OFF: u8 = SLEEP_ENABLE | layout::SLEEP_TYPE_OFF << 2;
        let outcome = match (offset, data) {
            (0, [value]) if value & 0x3c == OFF => Outcome::PowerOff,
            (2, [layout::RESET_VALUE]) => Outcome::Reset,
            _ => return,
        };
        self.outcomes.tell(outcome);
    }
}

/// The keyboard controller's command register: only "pulse the processor's reset line".
#[derive(Debug)]
pub struct KeyboardController {
    outcomes: Endings,
}

impl KeyboardController {
    /// Tells of a reset.
    #[must_use]
    pub const fn new(outcomes: Endings) -> Self {
        Self { outcomes }
    }
}

impl Registers for KeyboardController {
    // Zero: no input waits and commands are taken.
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, offset: u64, data: &[u8]) {
        if (offset, data) == (4, &[0xfe]) {
            self.outcomes.tell(Outcome::Reset);
        }
    }
}

/// Puts power and reset on a bus of ports.
pub(super) fn add_power(ports: &mut super::bus::Bus, outcomes: &Endings) -> Result<(), VmmError> {
    let power = Power::new(outcomes.clone());
    ports.add("power", layout::POWER.into(), 3, Arc::new(std::sync::Mutex::new(power)))?;
    let keyboard = KeyboardController::new(outcomes.clone());
    ports.add("keyboard controller", layout::I8042.into(), 5, Arc::new(std::sync::Mutex::new(keyboard)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::bus::Bus;

    #[test]
    fn only_the_right_values_end_a_machine() {
        let (endings, receiver) = Endings::new();
        let mut ports = Bus::default();
        add_power(&mut ports, &endings).unwrap();
        assert!(!endings.has_ended());
        for (port, value) in (0u8..=255).flat_map(|value| [0x60, 0x61, 0x64, 0x600, 0x601, 0x602].map(|p| (p, value))) {
            ports.write(port, &[value]);
            let wanted = match (port, value) {
                (0x64, 0xfe) | (0x602, 1) => Some(Outcome::Reset),
                // S5 with the enable bit; the bits that the register does not have count for nothing.
                (0x600, value) if value & 0x3c == 0x34 => Some(Outcome::PowerOff),
                _ => None,
            };
            assert_eq!(receiver.try_recv().ok(), wanted, "{port:#x} {value:#x}");
        }
        assert!(endings.has_ended());
        let mut status = [1];
        ports.read(0x64, &mut status);
        assert_eq!(status, [0]);
    }
}
