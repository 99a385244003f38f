//! A whole machine: memory, vCPUs, devices.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuFd};
use supercloud_api::CpuBaseline;
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use super::{
    Ram, VmmError, acpi,
    boot::{self, BootFiles},
    bus::Bus,
    cpu,
    kvm::Vm,
    kvm_error, layout,
    lease::Lease,
    legacy::{self, SerialPort, Sink},
    memory::{self, PAGE_BYTES},
    pci::{self, Ecam, Function, MessageSink},
    state::{self, Chips, MachineState},
    vcpu::{Buses, Vcpus},
    virtio::{Balloon, Device, VirtioPci, balloon::Keep, transport},
};

/// A guest that is slowed down stands still for a part of each of these.
const SLOW_PERIOD: Duration = Duration::from_millis(50);

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

/// Where the ends of a machine's run are told.
#[derive(Debug, Clone)]
pub struct Endings {
    sender: mpsc::Sender<Outcome>,
    has_ended: Arc<AtomicBool>,
}

impl Endings {
    /// A place, and who hears of it.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<Outcome>) {
        let (sender, receiver) = mpsc::channel();
        (Self { sender, has_ended: Arc::default() }, receiver)
    }

    /// Tells of an end.
    pub fn tell(&self, outcome: Outcome) {
        self.has_ended.store(true, Ordering::SeqCst);
        // Nobody listens any more when the machine is being taken apart.
        let _ = self.sender.send(outcome);
    }

    /// Whether there was one, whether it was heard or not.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::SeqCst)
    }
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
    body: Body,
}

/// A machine but for its vCPUs.
#[derive(Debug)]
struct Body {
    config: MachineConfig,
    buses: Buses,
    outcomes: Endings,
    /// For how long the guest may run, where somebody says.
    lease: Option<Arc<Lease>>,
    /// What each vCPU was told of itself. Not asked of KVM: some add what the processor has beyond it.
    cpuid: Vec<Vec<kvm_cpuid_entry2>>,
    devices: Vec<Arc<Mutex<VirtioPci>>>,
    balloon: Option<Arc<Balloon>>,
    serial: Arc<Mutex<SerialPort>>,
    vm: Arc<Vm>,
}

/// A machine that waits for another's memory and state. Dropping it ends it.
#[derive(Debug)]
pub struct Incoming {
    body: Body,
    told: mpsc::Receiver<Outcome>,
}

impl Machine {
    /// A machine that stands before its kernel's first instruction, and what tells how its run ends: more than once when
    /// nobody stops it then, and closed when the machine is gone. Its processors are said to have what `cpu` has; without
    /// that, all that KVM gives.
    ///
    /// # Errors
    /// When `/dev/kvm` refuses, the processor here lacks something, something is out of range or the kernel cannot be loaded.
    pub fn boot(
        kvm: Kvm,
        config: MachineConfig,
        cpu: Option<&CpuBaseline>,
        files: &BootFiles,
        console: Sink,
        devices: Vec<Device>,
    ) -> Result<(Self, mpsc::Receiver<Outcome>), VmmError> {
        let (mut body, outcomes) = Body::new(kvm, config, console, devices)?;
        let (vm, ram) = (&body.vm, body.vm.ram());
        let supported = vm.supported_cpuid()?;
        let mut vcpus = Vec::new();
        for index in 0..config.vcpus {
            let vcpu = vm.create_vcpu(index)?;
            body.cpuid.push(cpu::prepare(vm.kvm(), &vcpu, &supported, index, config.vcpus, cpu)?);
            vcpus.push(vcpu);
        }
        let rsdp = acpi::write(ram, config.vcpus)?;
        let entry = boot::load(ram, config.memory_bytes, files, rsdp)?;
        if let Some(first) = vcpus.first() {
            cpu::enter(first, ram, entry)?;
        }
        Ok((Self { vcpus: Vcpus::start(vcpus, &body.buses, &body.outcomes)?, body }, outcomes))
    }

    /// What it is made of.
    #[must_use]
    pub const fn config(&self) -> MachineConfig {
        self.body.config
    }

    /// Pauses it and reads everything but its memory. It stays paused and can be resumed.
    ///
    /// # Errors
    /// [`VmmError::Ended`] when the guest has come to the end of its run: what it asked for then would be lost. Else when a vCPU
    /// does not stop or KVM refuses; only when no new thread is to be had can it not be resumed then.
    pub fn save(&mut self) -> Result<MachineState, VmmError> {
        self.pause()?;
        self.save_still()
    }

    /// Stops it at one instant, of which disks take this cut (until then at most), and reads everything but its memory. It stands
    /// still until [`Machine::resume`]; what it has asked of its disks goes on then.
    ///
    /// # Errors
    /// As [`Machine::save`], and when a disk does not take the cut. In every case it stands still and can be resumed likewise.
    pub fn cut(&mut self, number: u64, budget: Duration) -> Result<MachineState, VmmError> {
        self.vcpus.pause()?;
        let devices = || self.body.devices.iter().map(|device| device.lock().unwrap_or_else(PoisonError::into_inner));
        devices().for_each(|mut device| device.hold());
        let until = Instant::now() + budget;
        let refused = |source| VmmError::Io { what: "taking a mirror's cut of a disk", source };
        // Asked for at all disks before the first is waited for.
        let begun: Vec<_> = devices().map(|mut device| device.begin_cut(number)).collect();
        for (mut device, begun) in devices().zip(begun) {
            begun.and_then(|()| device.await_cut(until)).map_err(refused)?;
        }
        self.save_still()
    }

    /// Reads everything but its memory, of a machine that stands still.
    fn save_still(&mut self) -> Result<MachineState, VmmError> {
        if self.body.outcomes.has_ended() {
            return Err(VmmError::Ended);
        }
        // vCPUs are read without their threads.
        let none = Vcpus::start(Vec::new(), &self.body.buses, &self.body.outcomes)?;
        let fds = std::mem::replace(&mut self.vcpus, none).end()?;
        let saved = self.body.save(&fds);
        match Vcpus::start(fds, &self.body.buses, &self.body.outcomes) {
            Ok(vcpus) => {
                if let Some(lease) = &self.body.lease {
                    vcpus.obey(lease);
                }
                self.vcpus = vcpus;
            }
            Err(error) => {
                // Its processors are gone, and nobody shall think that it can be resumed.
                self.body.outcomes.tell(Outcome::Broken { reason: error.to_string() });
                return Err(error);
            }
        }
        saved
    }

    /// From now on the guest runs only as long as its lease lets it; to be said before it runs.
    pub fn obey(&mut self, lease: &Arc<Lease>) {
        self.vcpus.obey(lease);
        self.body.lease = Some(Arc::clone(lease));
    }

    /// Lets the guest and its devices run.
    pub fn resume(&self) {
        for device in &self.body.devices {
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
        for device in &self.body.devices {
            device.lock().unwrap_or_else(PoisonError::into_inner).pause();
        }
        Ok(())
    }

    /// Whether the guest runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.vcpus.are_wanted()
    }

    /// Slows the guest, which runs, down: it stands still for so many percent of the time, until `is_over`. Its devices go on.
    #[expect(clippy::disallowed_methods, reason = "a thread that slows a guest down and does nothing else")]
    pub(super) fn slow_down(&self, percent: u8, is_over: &AtomicBool) {
        let part = |percent: u8| SLOW_PERIOD * u32::from(percent) / 100;
        while !is_over.load(Ordering::Acquire) {
            let paused = self.vcpus.pause();
            std::thread::sleep(part(percent));
            self.vcpus.resume();
            if paused.is_err() {
                // It cannot be slowed down; whoever pauses it in earnest is told why.
                return;
            }
            std::thread::sleep(part(100 - percent.min(100)));
        }
    }

    /// Presses its power button: a guest that listens switches itself off in order.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn press_power_button(&self) -> Result<(), VmmError> {
        self.body.vm.pulse(layout::POWER_BUTTON_IRQ)
    }

    /// The guest's memory.
    #[must_use]
    pub fn ram(&self) -> &Ram {
        self.body.vm.ram()
    }

    /// Begins, or ends, to note which pages are written; what was noted before is forgotten.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn note_writes(&self, is_wanted: bool) -> Result<(), VmmError> {
        self.body.vm.note_writes(is_wanted)
    }

    /// The pages (numbers of 4096 bytes of guest-physical address, ascending) that guest or devices have written since the
    /// last call, or since [`Machine::note_writes`].
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn take_written(&self) -> Result<Vec<u64>, VmmError> {
        self.body.vm.take_written()
    }

    /// All pages of guest memory, numbered as in [`Machine::take_written`].
    #[must_use]
    pub fn page_numbers(&self) -> Vec<u64> {
        let parts = self.ram().iter().map(|region| (region.start_addr().0, region.len()));
        parts.flat_map(|(at, bytes)| at / PAGE_BYTES..(at + bytes) / PAGE_BYTES).collect()
    }

    /// The pages of guest memory that were ever written, and not taken out of it: all others are zeros.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn pages_there(&self) -> Result<Vec<u64>, VmmError> {
        let mut holes = memory::Holes::new(self.ram());
        let mut there = Vec::new();
        for page in self.page_numbers() {
            if !holes.is_hole(page).map_err(super::io_error("looking for what is written of a guest's memory"))? {
                there.push(page);
            }
        }
        Ok(there)
    }

    /// Its balloon, if it has one.
    #[must_use]
    pub fn balloon(&self) -> Option<&Arc<Balloon>> {
        self.body.balloon.as_ref()
    }

    /// Keeps its balloon from taking anything out of its memory, if it has one, while it stands still.
    pub fn keep_memory(&self) -> Option<Keep> {
        self.balloon().map(Balloon::keep)
    }

    /// Asks the guest to give so much of its memory, and no more.
    ///
    /// # Errors
    /// When it has no balloon, or not so much memory.
    pub fn ask_for_memory(&self, bytes: u64) -> Result<(), VmmError> {
        let balloon = self.balloon().ok_or_else(|| state::refused("there is no balloon"))?;
        if !balloon.ask_for(bytes) {
            return Err(VmmError::Range {
                what: "the balloon's size",
                value: bytes,
                range: "up to the guest's memory",
            });
        }
        for device in &self.body.devices {
            let device = device.lock().unwrap_or_else(PoisonError::into_inner);
            if device.balloon().is_some() {
                device.tell_of_config();
            }
        }
        Ok(())
    }

    /// Bytes of its memory that take space on this host.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn resident_bytes(&self) -> Result<u64, VmmError> {
        use std::os::unix::fs::MetadataExt as _;
        let what = "asking how much space a guest's memory takes";
        let first = self.ram().iter().next().and_then(|region| region.file_offset());
        let file = first.ok_or_else(|| state::refused("there is no memory"))?;
        // Of both parts: they are in one file.
        Ok(file.file().metadata().map_err(super::io_error(what))?.blocks() * 512)
    }

    /// The serial port, to feed it.
    #[must_use]
    pub fn serial(&self) -> Arc<Mutex<SerialPort>> {
        Arc::clone(&self.body.serial)
    }
}

impl Body {
    fn new(
        kvm: Kvm,
        config: MachineConfig,
        console: Sink,
        devices: Vec<Device>,
    ) -> Result<(Self, mpsc::Receiver<Outcome>), VmmError> {
        if !(1..=cpu::MAX_VCPUS).contains(&config.vcpus) {
            return Err(VmmError::Range { what: "vCPUs", value: config.vcpus.into(), range: "1 to 64" });
        }
        let ram = Arc::new(memory::map(memory::create(config.memory_bytes)?, config.memory_bytes)?);
        let vm = Arc::new(Vm::new(kvm, ram)?);
        let (sender, outcomes) = Endings::new();
        let mut ports = Bus::default();
        let serial = Arc::new(Mutex::new(SerialPort::new(Arc::clone(&vm), layout::SERIAL_IRQ, console)));
        let port = Arc::clone(&serial);
        ports.add("serial port", layout::SERIAL.into(), 8, port)?;
        legacy::add_power(&mut ports, &sender)?;
        let mut registers = Bus::default();
        let balloon = devices.iter().find_map(|device| device.balloon.clone());
        let devices = add_devices(&vm, &mut registers, devices)?;
        let buses = Buses { ports: Arc::new(ports), registers: Arc::new(registers) };
        Ok((
            Self { config, buses, outcomes: sender, lease: None, cpuid: Vec::new(), devices, balloon, serial, vm },
            outcomes,
        ))
    }

    fn save(&self, vcpus: &[VcpuFd]) -> Result<MachineState, VmmError> {
        let devices = self.devices.iter().map(|device| device.lock().unwrap_or_else(PoisonError::into_inner).save());
        let save = |(fd, cpuid): (&VcpuFd, &Vec<_>)| state::vcpu::save(self.vm.kvm(), fd, cpuid.clone());
        let mut saved: Vec<_> = vcpus.iter().zip(&self.cpuid).map(save).collect::<Result<_, _>>()?;
        let chips = Chips::save(&self.vm)?;
        for (fd, vcpu) in vcpus.iter().zip(&mut saved) {
            state::vcpu::read_tsc(fd, vcpu)?;
        }
        Ok(MachineState {
            vcpus: saved,
            chips,
            serial: self.serial.lock().unwrap_or_else(PoisonError::into_inner).save(),
            devices: devices.collect::<Result<_, _>>()?,
        })
    }
}

impl Incoming {
    /// A machine with empty memory. Devices are as the saved machine's were, in the same order.
    ///
    /// # Errors
    /// When `/dev/kvm` refuses or something is out of range.
    pub fn new(kvm: Kvm, config: MachineConfig, console: Sink, devices: Vec<Device>) -> Result<Self, VmmError> {
        let (body, told) = Body::new(kvm, config, console, devices)?;
        Ok(Self { body, told })
    }

    /// Memory, to be filled.
    #[must_use]
    pub fn ram(&self) -> &Ram {
        self.body.vm.ram()
    }

    /// What it is made of.
    #[must_use]
    pub const fn config(&self) -> MachineConfig {
        self.body.config
    }

    /// Whether a saved machine can be this one, as far as that can be told without becoming it.
    ///
    /// # Errors
    /// [`VmmError::State`]: why not. Else when KVM refuses.
    pub fn check(&self, saved: &MachineState) -> Result<(), VmmError> {
        let body = &self.body;
        if saved.vcpus.len() != usize::from(body.config.vcpus) || saved.devices.len() != body.devices.len() {
            let (vcpus, devices) = (saved.vcpus.len(), saved.devices.len());
            return Err(state::refused(format!("it has {vcpus} vCPUs and {devices} devices, this machine has others")));
        }
        let supported = body.vm.supported_cpuid()?;
        for vcpu in &saved.vcpus {
            if let Some(missing) = state::cpuid::lacking(&vcpu.cpuid, supported.as_slice()) {
                return Err(state::refused(format!("its guest was told of what this processor lacks: {missing}")));
            }
        }
        saved.chips.check()?;
        for (device, saved) in body.devices.iter().zip(&saved.devices) {
            device.lock().unwrap_or_else(PoisonError::into_inner).check(saved)?;
        }
        Ok(())
    }

    /// The machine that was saved, once its memory is there. It is paused.
    ///
    /// # Errors
    /// [`VmmError::State`] when the state does not fit this machine or this host, else when KVM refuses.
    pub fn finish(self, saved: &MachineState) -> Result<(Machine, mpsc::Receiver<Outcome>), VmmError> {
        self.check(saved)?;
        let Self { mut body, told } = self;
        let vm = &body.vm;
        let mut fds = Vec::with_capacity(saved.vcpus.len());
        for index in 0..body.config.vcpus {
            fds.push(vm.create_vcpu(index)?);
        }
        saved.chips.restore_chips(vm)?;
        for (fd, vcpu) in fds.iter().zip(&saved.vcpus) {
            vcpu.restore(vm.kvm(), fd, || saved.chips.age_ns())?;
            body.cpuid.push(vcpu.cpuid.clone());
        }
        saved.chips.restore_clock(vm)?;
        for (device, saved) in body.devices.iter().zip(&saved.devices) {
            device.lock().unwrap_or_else(PoisonError::into_inner).restore(saved)?;
        }
        let mut serial = body.serial.lock().unwrap_or_else(PoisonError::into_inner);
        serial.restore(&saved.serial, Arc::clone(vm), layout::SERIAL_IRQ)?;
        drop(serial);
        Ok((Machine { vcpus: Vcpus::start(fds, &body.buses, &body.outcomes)?, body }, told))
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
