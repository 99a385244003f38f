//! A whole machine: memory, vCPUs, devices.

use std::sync::{Arc, Mutex, PoisonError, mpsc};

use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch};

use super::{
    Ram, VmmError, acpi,
    boot::{self, BootFiles},
    bus::Bus,
    cpu,
    kvm::Vm,
    kvm_error, layout,
    legacy::{self, SerialPort, Sink},
    memory,
    pci::{self, Ecam, Function, MessageSink},
    vcpu::{Buses, Vcpus},
    virtio::{Device, VirtioPci, transport},
};

/// How a machine's run came to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest asked for a reset, or a vCPU had a triple fault.
    Reset,
    /// The guest switched itself off.
    PowerOff,
    /// The guest cannot go on.
    Broken {
        /// Why.
        reason: String,
    },
}

/// What a machine is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineConfig {
    /// vCPUs: 1 to [`cpu::MAX_VCPUS`].
    pub vcpus: u8,
    /// Memory: see [`memory::MEMORY_RANGE`].
    pub memory_bytes: u64,
}

/// A machine. It is made paused; dropping it ends it.
#[derive(Debug)]
pub struct Machine {
    // Dropped first: the threads use all that follows.
    vcpus: Vcpus,
    devices: Vec<Arc<Mutex<VirtioPci>>>,
    serial: Arc<Mutex<SerialPort>>,
    vm: Arc<Vm>,
}

impl Machine {
    /// A machine that stands before its kernel's first instruction, and what tells how its run ends: more than once when
    /// nobody stops it then, and closed when the machine is gone.
    ///
    /// # Errors
    /// When `/dev/kvm` refuses, something is out of range or the kernel cannot be loaded.
    pub fn boot(
        kvm: Kvm,
        config: MachineConfig,
        files: &BootFiles,
        console: Sink,
        devices: Vec<Device>,
    ) -> Result<(Self, mpsc::Receiver<Outcome>), VmmError> {
        if !(1..=cpu::MAX_VCPUS).contains(&config.vcpus) {
            return Err(VmmError::Range { what: "vCPUs", value: config.vcpus.into(), range: "1 to 64" });
        }
        let ram = Arc::new(memory::map(memory::create(config.memory_bytes)?, config.memory_bytes)?);
        let vm = Arc::new(Vm::new(kvm, Arc::clone(&ram))?);
        let (sender, outcomes) = mpsc::channel();

        let mut ports = Bus::default();
        let serial = Arc::new(Mutex::new(SerialPort::new(Arc::clone(&vm), layout::SERIAL_IRQ, console)));
        let port = Arc::clone(&serial);
        ports.add("serial port", layout::SERIAL.into(), 8, port)?;
        legacy::add_power(&mut ports, &sender)?;
        let mut registers = Bus::default();
        let devices = add_devices(&vm, &mut registers, devices)?;
        let buses = Buses { ports: Arc::new(ports), registers: Arc::new(registers) };

        let supported = vm.supported_cpuid()?;
        let mut vcpus = Vec::new();
        for index in 0..config.vcpus {
            let vcpu = vm.create_vcpu(index)?;
            cpu::prepare(vm.kvm(), &vcpu, &supported, index, config.vcpus)?;
            vcpus.push(vcpu);
        }
        let rsdp = acpi::write(&ram, config.vcpus)?;
        let entry = boot::load(&ram, config.memory_bytes, files, rsdp)?;
        if let Some(first) = vcpus.first() {
            cpu::enter(first, &ram, entry)?;
        }
        Ok((Self { vcpus: Vcpus::start(vcpus, &buses, &sender)?, devices, serial, vm }, outcomes))
    }

    /// Lets the guest and its devices run.
    pub fn resume(&self) {
        for device in &self.devices {
            device.lock().unwrap_or_else(PoisonError::into_inner).resume();
        }
        self.vcpus.resume();
    }

    /// Stops the guest between two instructions and its devices between two requests; its memory does not change until
    /// [`Machine::resume`].
    ///
    /// # Errors
    /// [`VmmError::Stuck`].
    pub fn pause(&self) -> Result<(), VmmError> {
        self.vcpus.pause()?;
        for device in &self.devices {
            device.lock().unwrap_or_else(PoisonError::into_inner).pause();
        }
        Ok(())
    }

    /// The guest's memory.
    #[must_use]
    pub fn ram(&self) -> &Ram {
        self.vm.ram()
    }

    /// The serial port, to feed it.
    #[must_use]
    pub fn serial(&self) -> Arc<Mutex<SerialPort>> {
        Arc::clone(&self.serial)
    }
}

/// Puts devices on the PCI bus, in order from slot 1 on, and has the kernel listen for their notifications.
fn add_devices(
    vm: &Arc<Vm>,
    registers: &mut Bus,
    devices: Vec<Device>,
) -> Result<Vec<Arc<Mutex<VirtioPci>>>, VmmError> {
    let mut ecam = Ecam::new();
    let mut added = Vec::new();
    for device in devices {
        let slot = ecam.next_slot()?;
        let sink: Arc<dyn MessageSink> = Arc::clone(vm) as _;
        let device = VirtioPci::new(device, slot, Arc::clone(vm.ram()), sink)?;
        for (kick, index) in device.kicks().iter().zip(0u64..) {
            let at = IoEventAddress::Mmio(pci::bar_address(slot) + transport::NOTIFY + 4 * index);
            vm.fd()
                .register_ioevent(kick, &at, NoDatamatch)
                .map_err(kvm_error("listen for a device's notifications"))?;
        }
        let device = Arc::new(Mutex::new(device));
        registers.add("virtio device", pci::bar_address(slot), pci::BAR_BYTES, Arc::clone(&device) as _)?;
        ecam.add(Arc::clone(&device) as Arc<Mutex<dyn Function>>);
        added.push(device);
    }
    registers.add("PCI configuration space", layout::ECAM, layout::ECAM_BYTES, Arc::new(Mutex::new(ecam)))?;
    Ok(added)
}
