//! What a machine is beside its memory, as it is saved and restored: vCPUs, interrupt chips, clock, devices.
//!
//! Everything in it may come from another host, so that nothing is believed: each part is checked against the machine that
//! it is restored into, and what does not fit is refused before the guest runs.

pub mod cpuid;
pub mod vcpu;

use std::time::SystemTime;

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use serde::{Deserialize, Serialize};

use super::{VmmError, kvm::Vm, kvm_error, legacy::SerialState, virtio::transport::DeviceState};
pub use vcpu::VcpuState;

/// The version of [`MachineState`]. A machine takes this one and all before it.
///
/// 1: the first. 2: the wall time, by which the TSC is moved on, and kvmclock where KVM does not know the wall time.
pub const VERSION: u16 = 2;

/// A machine that stands still, without its memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// Each vCPU, in order.
    pub vcpus: Vec<VcpuState>,
    /// The interrupt chips inside the kernel.
    pub chips: Chips,
    /// The serial port.
    pub serial: SerialState,
    /// The devices on the PCI bus, in order.
    pub devices: Vec<DeviceState>,
}

/// Interrupt chips and the guests' clock inside the kernel.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chips {
    /// Both old interrupt controllers and the I/O APIC.
    pub irqchips: Vec<kvm_irqchip>,
    /// kvmclock.
    pub clock: kvm_clock_data,
    /// The host's wall time when that was read, in nanoseconds since 1970; 0 where it is not known.
    #[serde(default)]
    pub wall_ns: u64,
}

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// Says why a state is refused.
pub(crate) fn refused(what: impl Into<String>) -> VmmError {
    VmmError::State { what: what.into() }
}

impl Chips {
    /// Reads them. No vCPU runs.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn save(vm: &Vm) -> Result<Self, VmmError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
            vm.fd().get_irqchip(&mut chip).map_err(kvm_error("read an interrupt chip"))?;
            Ok::<_, VmmError>(chip)
        };
        let irqchips = CHIPS.into_iter().map(chip).collect::<Result<_, _>>()?;
        let clock = vm.fd().get_clock().map_err(kvm_error("read the guests' clock"))?;
        Ok(Self { irqchips, clock, wall_ns: wall_ns() })
    }

    /// Whether these are the interrupt chips of our machines.
    pub(super) fn check(&self) -> Result<(), VmmError> {
        if self.irqchips.iter().map(|chip| chip.chip_id).ne(CHIPS) {
            return Err(refused("its interrupt chips are not those of this machine"));
        }
        Ok(())
    }

    /// Writes the interrupt chips.
    pub(super) fn restore_chips(&self, vm: &Vm) -> Result<(), VmmError> {
        self.check()?;
        for chip in &self.irqchips {
            vm.fd().set_irqchip(chip).map_err(kvm_error("set an interrupt chip"))?;
        }
        Ok(())
    }

    /// How long ago it was read by the wall clocks of both hosts, in nanoseconds; nothing when that is not known, or a clock is
    /// wrong so that it would have been later than now.
    pub(super) fn age_ns(&self) -> u64 {
        if self.wall_ns == 0 { 0 } else { wall_ns().saturating_sub(self.wall_ns) }
    }

    /// Sets kvmclock, when the vCPUs have their TSC: it goes on from where it would be by now, so that wall time in the guest is
    /// right. It never goes back.
    pub(super) fn restore_clock(&self, vm: &Vm) -> Result<(), VmmError> {
        // Of the flags that are read, only this one can be written (Documentation/virt/kvm/api.rst, 4.30). With it KVM itself
        // adds what has passed by the wall clock.
        let flags = self.clock.flags & KVM_CLOCK_REALTIME;
        let clock = if flags == 0 { self.clock.clock.saturating_add(self.age_ns()) } else { self.clock.clock };
        vm.fd().set_clock(&kvm_clock_data { flags, clock, ..self.clock }).map_err(kvm_error("set the guests' clock"))
    }
}

fn wall_ns() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(0)
}
