//! The one owner of the machine: takes what clients ask for and what happens to the guest, one after the other.

mod leaving;
mod left;
mod mirrors;

use std::{
    fs::File,
    io,
    ops::ControlFlow,
    os::{
        fd::{FromRawFd as _, IntoRawFd as _},
        unix::net::UnixStream,
    },
    process::ExitCode,
    sync::{Arc, PoisonError, mpsc},
};

use anyhow::Context as _;
use kvm_ioctls::Kvm;
use supercloud_blanket::{
    device::{Boot, Console, MachineSpec},
    vmm::{
        Lease, Machine, MachineConfig, Outcome,
        boot::BootFiles,
        legacy::Sink,
        travel::{StreamVersion, TravelError, mirror::StagedCut},
        version::MachineVersion,
        virtio::{self, Device, nbd::LinkNews},
    },
};

use crate::{
    console::{self, CurrentSerial, feed, feed_serial},
    control::{self, Client, Event, Line, MirrorProgress, Progress, Request, State, Verb},
    disks::Disks,
    launch::Held,
    left::{Leavings, LeftNews},
    mirror::{Ask, Mirrored, Standby},
    travel::{Arrival, Parts, Received, Receiving, Sending},
};

/// What comes to the owner.
#[derive(Debug)]
pub enum Input {
    /// A client is there, by its number.
    Client(u64, UnixStream),
    /// That one asks for something.
    Request(u64, Request, Option<UnixStream>),
    /// A run has come to its end; the number is that of the boot, so that a late word of the one before counts for nothing.
    Outcome(u64, Outcome),
    /// So far it is with sending the guest.
    Progress(Progress),
    /// The machine is back from being sent.
    Traveled(Box<Arrival>),
    /// Somebody has connected a stream.
    Stream(UnixStream),
    /// The machine has come, or not.
    Received(Box<Received>),
    /// Something happened to the way to a disk.
    Disk(String, LinkNews),
    /// What a guest's disk boots was found, or not; the number is that of the boot, as with outcomes.
    Found(u64, anyhow::Result<BootFiles>),
    /// What the thread that mirrors the guest asks for.
    Mirror(Ask),
    /// So far it is with mirroring the guest.
    MirrorProgress(MirrorProgress),
    /// That thread is over.
    MirrorOver(Result<(), TravelError>),
    /// What comes over the stream is a mirror.
    Standby(Box<Standby>),
    /// A cut of it is whole.
    Staged(Box<StagedCut>),
    /// Nothing more comes.
    StandbyOver(Result<(), TravelError>),
    /// Something happened to memory that a move has left behind.
    Left(LeftNews),
    /// A client's new way to a disk is taken, or not: the client's number, the request's, and why not.
    Attached(u64, u64, String, Option<String>),
}

struct Owner<'a> {
    spec: &'a MachineSpec,
    held: Held,
    disks: Disks,
    /// Where a serial console's output goes.
    console: console::Console,
    /// How the guest ended.
    ended: Option<Event>,
    inputs: mpsc::Sender<Input>,
    serial: CurrentSerial,
    machine: Option<Machine>,
    boots: u64,
    state: State,
    client: Client,
    /// While the machine is with the thread that sends it.
    sending: Option<Sending>,
    /// What happened to the guest meanwhile.
    missed: Option<Outcome>,
    /// The request for a pause meanwhile, or for its resume before it has come: the client's number, and the request's.
    asked: Option<(u64, u64)>,
    /// While the machine comes over the stream.
    receiving: Option<Receiving>,
    /// Memory that a move has left behind, here or where it came from.
    leavings: Leavings,
    /// While the guest is mirrored.
    mirrored: Mirrored,
    /// For how long it may run unheard.
    lease: Arc<Lease>,
    /// While this is a mirror's standby.
    standby: Option<Standby>,
    /// Another stream can come.
    takes_streams: bool,
}

/// Runs the guest to its end.
///
/// # Errors
/// When it cannot be started.
pub fn run(spec: &MachineSpec, arrives: bool, mut held: Held) -> anyhow::Result<ExitCode> {
    let (sender, receiver) = mpsc::channel();
    let control = held.control.take();
    let has_control = control.is_some();
    let streams = held.streams.take();
    let serial = CurrentSerial::default();
    if let (Console::Serial, Some(input)) = (spec.devices.console, held.console_in.take_if(|_| is_serial(spec))) {
        feed_serial(input, Arc::clone(&serial))?;
    }
    let disks = Disks::new(std::mem::take(&mut held.disks), &sender)?;
    let console = console::Console::new(held.console_out.take_if(|_| is_serial(spec)));
    if let Some(socket) = held.console.take() {
        let serial = Arc::clone(&serial);
        console.listen(socket, move |bytes| feed(&serial, bytes))?;
    }
    let mut owner = Owner {
        spec,
        console,
        held,
        disks,
        ended: None,
        inputs: sender.clone(),
        serial,
        machine: None,
        boots: 0,
        state: State::Paused,
        client: Client::default(),
        sending: None,
        missed: None,
        asked: None,
        receiving: None,
        leavings: Leavings::default(),
        mirrored: Mirrored::default(),
        lease: Arc::default(),
        standby: None,
        takes_streams: streams.is_some() || has_control,
    };
    owner.mirrored.outputs().obey(&owner.lease);
    if arrives {
        owner.state = State::Arriving;
        owner.receive().context("receiving the guest")?;
    } else {
        owner.boot_first().context("starting the guest")?;
    }
    if let Some(socket) = streams {
        control::listen_for_streams(socket, &sender).context("listening for streams")?;
    }
    match control {
        // Only now: a client that is answered has a guest, or will have one.
        Some(socket) => control::listen(socket, &sender).context("listening for clients")?,
        None => owner.resume(),
    }
    loop {
        // There is always a sender: our own.
        let Ok(input) = receiver.recv() else { return Ok(ExitCode::FAILURE) };
        match input {
            Input::Client(number, stream) => owner.client.replace(number, stream),
            Input::Request(number, request, socket) => {
                if owner.client.is(number) && owner.answer(number, &request, socket) {
                    return Ok(ExitCode::SUCCESS);
                }
            }
            Input::Disk(disk, news) => {
                let (event, error) = owner.disks.hear_of(&disk, news);
                let state = Some(owner.state);
                owner.client.tell(&Line { event: Some(event), state, disk: Some(disk), error, ..Line::default() });
            }
            Input::Attached(number, id, disk, error) => {
                if error.is_some() {
                    owner.disks.lose(disk);
                }
                owner.answer_late(Some((number, id)), error);
            }
            Input::Outcome(boot, outcome) if boot == owner.boots && owner.state != State::Ended => {
                let code = owner.take(outcome);
                if let (Some(code), false) = (code, has_control) {
                    return Ok(code);
                }
            }
            Input::Outcome(..) => {}
            Input::Found(boot, files) if boot == owner.boots && owner.state != State::Ended => {
                let code = owner.found(files);
                if let (Some(code), false) = (code, has_control) {
                    return Ok(code);
                }
            }
            Input::Found(..) => {}
            Input::Progress(progress) => {
                let (event, state) = (Some(Event::Progress), Some(owner.state));
                if owner.sending.is_some() {
                    owner.client.tell(&Line { event, state, progress: Some(progress), ..Line::default() });
                }
            }
            Input::Mirror(ask) => {
                owner.mirrored.answer(ask, owner.machine.as_mut(), owner.state == State::Running);
            }
            Input::MirrorProgress(progress) if owner.mirrored.is_on() => {
                let (event, state) = (Some(Event::Progress), Some(owner.state));
                owner.client.tell(&Line { event, state, mirror: Some(progress), ..Line::default() });
            }
            Input::MirrorProgress(_) => {}
            Input::MirrorOver(outcome) => owner.mirror_over(outcome),
            Input::Standby(standby) => owner.standby = Some(*standby),
            Input::Staged(cut) => owner.staged(*cut),
            Input::StandbyOver(outcome) => owner.standby_over(outcome),
            Input::Left(news) => {
                let code = owner.hear_of_left(news);
                if let (Some(code), false) = (code, has_control) {
                    return Ok(code);
                }
            }
            Input::Stream(stream) => owner.connect(stream)?,
            Input::Received(received) => owner.received(*received)?,
            Input::Traveled(arrival) => {
                let code = owner.traveled(*arrival);
                if let (Some(code), false) = (code, has_control) {
                    return Ok(code);
                }
            }
        }
    }
}

const fn is_serial(spec: &MachineSpec) -> bool {
    matches!(spec.devices.console, Console::Serial)
}

impl Owner<'_> {
    /// The first machine, before there is a client: who starts the process hears why there is none.
    fn boot_first(&mut self) -> anyhow::Result<()> {
        if self.spec.boot != Boot::Disk {
            return self.boot().map(drop);
        }
        let first = self.spec.devices.disks.first().context("there is no disk to boot from")?;
        let files = self.disks.boot_disk(&first.name)?.files()?;
        self.boot_from(&files)
    }

    /// A new machine out of the same descriptors, or the search for what it boots: each time anew, the guest may have another
    /// kernel on its disk by now. Whether the machine is there.
    fn boot(&mut self) -> anyhow::Result<bool> {
        self.machine = None;
        self.boots += 1;
        let clone = |file: &File| file.try_clone().context("copying a descriptor");
        match &self.spec.boot {
            Boot::Kernel { cmdline, .. } => {
                let files = BootFiles {
                    kernel: clone(self.held.kernel.as_ref().context("there is no kernel")?)?,
                    initrd: self.held.initrd.as_ref().map(clone).transpose()?,
                    cmdline: cmdline.clone(),
                };
                self.boot_from(&files)?;
                Ok(true)
            }
            Boot::Disk => {
                let first = self.spec.devices.disks.first().context("there is no disk to boot from")?;
                let (disk, boot, inputs) = (self.disks.boot_disk(&first.name)?, self.boots, self.inputs.clone());
                // Beside: clients are answered meanwhile, one of whom may bring the way to the disk.
                let search = move || {
                    let _ = inputs.send(Input::Found(boot, disk.files()));
                };
                std::thread::Builder::new().name("boot".to_owned()).spawn(search).context("beginning a thread")?;
                Ok(false)
            }
        }
    }

    /// What the disk boots was found, or not; what the process would exit with if nobody controlled it.
    fn found(&mut self, files: anyhow::Result<BootFiles>) -> Option<ExitCode> {
        let reason = match files.and_then(|files| self.boot_from(&files)) {
            Ok(()) => {
                if self.state == State::Running {
                    self.resume();
                }
                return None;
            }
            Err(error) => format!("it cannot boot: {error:#}"),
        };
        self.take(Outcome::Broken { reason })
    }

    fn boot_from(&mut self, files: &BootFiles) -> anyhow::Result<()> {
        // A class that says no features (of an older host) is of a host that is the same in all of them.
        let cpu = self.spec.class.features();
        let (serial, devices) = (self.serial_sink()?, self.devices()?);
        let booted = Machine::boot(self.kvm()?, self.config()?, cpu.as_ref(), files, serial, devices)?;
        self.take_up(booted)
    }

    /// Begins to take the machine from the stream, where there is one.
    fn receive(&mut self) -> anyhow::Result<()> {
        let Some(stream) = &self.held.stream else { return Ok(()) };
        let userfaultfd = self.held.userfaultfd.as_ref().map(File::try_clone).transpose();
        let parts = Parts {
            userfaultfd: userfaultfd.context("copying a descriptor")?,
            kvm: self.kvm()?,
            config: self.config()?,
            console: self.serial_sink()?,
            devices: self.devices()?,
        };
        self.receiving = Some(Receiving::start(stream, parts, self.inputs.clone())?);
        Ok(())
    }

    /// The machine that came waits; where none came, the next stream may bring it.
    fn received(&mut self, received: Received) -> anyhow::Result<()> {
        self.receiving = None;
        let asked = self.asked.take();
        if self.state != State::Arriving {
            return Ok(());
        }
        let (event, error) = match received {
            Ok((machine, told, fetch)) => {
                self.leavings.arrived(fetch);
                self.take_up((machine, told))?;
                self.state = State::Paused;
                (Event::Arrived, None)
            }
            Err(error) => {
                self.drop_stream();
                if !self.takes_streams {
                    return Err(error).context("receiving the guest");
                }
                (Event::NotArrived, Some(format!("{:#}", anyhow::Error::from(error))))
            }
        };
        let (state, missing_bytes) = (Some(self.state), Some(self.leavings.missing_bytes()));
        self.client.tell(&Line { event: Some(event), state, missing_bytes, error: error.clone(), ..Line::default() });
        if self.state == State::Paused && asked.is_some() {
            self.resume();
        }
        self.answer_late(asked, error);
        Ok(())
    }

    /// Answers a request that had to wait, if who asked is still there.
    fn answer_late(&mut self, asked: Option<(u64, u64)>, error: Option<String>) {
        if let Some((_, id)) = asked.filter(|(number, _)| self.client.is(*number)) {
            self.client.tell(&Line { id: Some(id), state: Some(self.state), error, ..Line::default() });
        }
    }

    fn kvm(&self) -> anyhow::Result<Kvm> {
        let kvm = self.held.kvm.try_clone().context("copying a descriptor")?;
        // SAFETY: the descriptor is ours alone from here on; one that is not of /dev/kvm fails at its first use.
        Ok(unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) })
    }

    fn config(&self) -> anyhow::Result<MachineConfig> {
        let vcpus = u8::try_from(self.spec.vcpus).context("counting vCPUs")?;
        Ok(MachineConfig { vcpus, memory_bytes: self.spec.memory_bytes })
    }

    fn take_up(&mut self, (mut machine, outcomes): (Machine, mpsc::Receiver<Outcome>)) -> anyhow::Result<()> {
        machine.obey(&self.lease);
        *self.serial.lock().unwrap_or_else(PoisonError::into_inner) = Some(machine.serial());
        self.mirrored.renew(&machine).context("going on to mirror it")?;
        self.machine = Some(machine);
        let (boot, inputs) = (self.boots, self.inputs.clone());
        let forward = move || {
            outcomes
                .iter()
                .take_while(|outcome| inputs.send(Input::Outcome(boot, outcome.clone())).is_ok())
                .for_each(drop)
        };
        std::thread::Builder::new().name("outcomes".to_owned()).spawn(forward).context("beginning a thread")?;
        Ok(())
    }

    fn output(&self) -> anyhow::Result<Sink> {
        Ok(match &self.held.console_out {
            Some(file) => Box::new(file.try_clone().context("copying a descriptor")?),
            None => Box::new(io::sink()),
        })
    }

    fn serial_sink(&self) -> anyhow::Result<Sink> {
        if is_serial(self.spec) { Ok(Box::new(self.console.clone())) } else { Ok(Box::new(io::sink())) }
    }

    /// The guest's devices, in the order that gives each the same place on the bus everywhere.
    fn devices(&self) -> anyhow::Result<Vec<Device>> {
        let clone = |file: &File| file.try_clone().context("copying a descriptor");
        let mut devices = Vec::new();
        let version = MachineVersion::named(&self.spec.class.machine_version).unwrap_or(MachineVersion::One);
        self.mirrored.outputs().forget_cards();
        for disk in &self.spec.devices.disks {
            let backend = self.disks.backend(&disk.name)?;
            devices.push(if version.has_thin_disks() {
                virtio::block::thin(backend, &disk.name, disk.is_read_only)
            } else {
                virtio::block::device(backend, &disk.name, disk.is_read_only)
            });
        }
        for nic in &self.spec.devices.nics {
            let tap = self.held.taps.get(&nic.name).with_context(|| format!("card '{}'", nic.name))?;
            let gate = self.mirrored.outputs().gate().context("making an event")?;
            let card = virtio::net::device(clone(tap)?, nic.mac, nic.mtu, Some(gate));
            devices.push(card.with_context(|| format!("the tap of card '{}'", nic.name))?);
        }
        if !is_serial(self.spec) {
            let input = self.held.console_in.as_ref().map(clone).transpose()?;
            devices.push(virtio::console::device(self.output()?, input));
        }
        if self.spec.devices.has_rng {
            devices.push(virtio::rng::device());
        }
        if self.spec.devices.has_balloon {
            devices.push(virtio::balloon::device(self.spec.memory_bytes));
        }
        Ok(devices)
    }

    /// Lets the guest run, at once or when it is there.
    fn resume(&mut self) {
        // Not while a cut is copied: it runs on after that.
        if let Some(machine) = self.machine.as_ref().filter(|_| !self.mirrored.is_still()) {
            machine.resume();
        }
        self.state = State::Running;
    }

    /// Does what is asked for; whether the process shall end.
    fn answer(&mut self, client: u64, request: &Request, socket: Option<UnixStream>) -> bool {
        let mut error = None;
        let has_limits = request.max_downtime_ms.is_some()
            || request.max_bytes_per_s.is_some()
            || request.may_throttle.is_some()
            || request.holds.is_some();
        match (request.verb, self.state) {
            (Verb::Mirror, _)
                if request.max_downtime_ms.is_some() || request.may_throttle.is_some() || request.holds.is_some() =>
            {
                error = Some("a mirror has an interval and bytes per second only".to_owned());
            }
            (verb, _) if has_limits && !matches!(verb, Verb::Send | Verb::Limits | Verb::Mirror) => {
                error = Some("limits are for 'send' and 'limits' only".to_owned());
            }
            (verb, _) if request.memory.is_some() && verb != Verb::Send => {
                error = Some("a mode of memory is for 'send' only".to_owned());
            }
            (verb, _) if request.stream_version.is_some_and(|version| version == 0 || verb != Verb::Send) => {
                error = Some("a stream's version is for 'send' only, and is 1 at least".to_owned());
            }
            (verb, _) if (request.interval_ms.is_some() || request.strict.is_some()) && verb != Verb::Mirror => {
                error = Some("an interval and strictness are for 'mirror' only".to_owned());
            }
            (verb, _) if request.cut.is_some() != (verb == Verb::Commit) => {
                error = Some("a cut is for 'commit', which needs one".to_owned());
            }
            (verb, _) if request.lease_until_ms.is_some() != (verb == Verb::Lease) => {
                error = Some("a time is for 'lease', which needs one".to_owned());
            }
            (Verb::Lease, _) => error = self.keep_lease(request.lease_until_ms.unwrap_or(0)),
            (Verb::Mirror | Verb::EndMirror | Verb::Commit | Verb::Promote, _) => {
                match self.answer_mirror(client, request) {
                    ControlFlow::Continue(why) => error = why,
                    // Answered when its thread is over.
                    ControlFlow::Break(()) => return false,
                }
            }
            (Verb::Serve | Verb::Fetch, _) => {
                self.answer_left(request, socket);
                return false;
            }
            // Answered when it has come, or when it is back.
            (Verb::Resume, State::Arriving) | (Verb::Pause, State::Sending)
                if self.asked.is_none() && self.standby.is_none() =>
            {
                self.asked = Some((client, request.id));
                if let Some(sending) = &self.sending {
                    sending.cancel();
                }
                return false;
            }
            (Verb::Disk, _) => match self.disks.attach(client, request, socket, &self.inputs) {
                // Answered when hands were shaken.
                None => return false,
                why => error = why,
            },
            (Verb::Stream, _) => error = self.take_stream(socket).err().map(|failed| format!("{failed:#}")),
            (Verb::HangUp, _) if !self.is_stream_used() => self.drop_stream(),
            (Verb::HangUp, _) => error = Some("the stream is being used; cancel that first".to_owned()),
            (Verb::Reset, State::Running | State::Paused) => {
                self.take(Outcome::Reset);
            }
            (Verb::PowerButton, State::Running) => {
                let pressed = self.machine.as_ref().map(Machine::press_power_button);
                error = pressed.and_then(Result::err).map(|failed| failed.to_string());
            }
            (Verb::PowerButton, _) => error = Some("it does not run".to_owned()),
            (Verb::Reset, _) => error = Some("it is not here to be reset".to_owned()),
            (Verb::Status, _)
            | (Verb::Resume, State::Running)
            | (Verb::Pause, State::Paused | State::Sent)
            | (Verb::Send, State::Sending) => {}
            (Verb::End, _) => {
                // One that waits for what is missing ends with the process.
                if self.leavings.is_missing() {
                    std::mem::forget(self.machine.take());
                }
                self.machine = None;
                self.state = State::Ended;
            }
            (Verb::Resume | Verb::Pause | Verb::Send, State::Ended) => error = Some("the guest has ended".to_owned()),
            (Verb::Resume, State::Paused) => self.resume(),
            (Verb::Resume, State::Sent) => {
                self.leavings.take_back();
                self.resume();
            }
            (Verb::Resume | Verb::Pause, State::Sending) => {
                error = Some("it is being sent; cancel that first".to_owned())
            }
            (Verb::Resume | Verb::Pause | Verb::Send, State::Arriving) => {
                error = Some("it has not come yet".to_owned())
            }
            (Verb::Send, State::Running | State::Paused | State::Sent) => {
                error = self.send(request).err().map(|failed| format!("{failed:#}"));
            }
            (Verb::Limits, _) => match &self.sending {
                Some(sending) => sending.limit(request),
                None => error = Some("it is not being sent".to_owned()),
            },
            (Verb::Cancel, _) => match (&self.sending, &self.receiving) {
                (Some(sending), _) => sending.cancel(),
                (None, Some(receiving)) => receiving.cancel(),
                (None, None) => error = Some("it is not being sent or received".to_owned()),
            },
            (Verb::Pause, State::Running) if self.leavings.is_missing() => {
                // Who waits for what is missing cannot be stopped between two instructions.
                error = self.leavings.must_be_whole().err().map(|failed| failed.to_string());
            }
            (Verb::Pause, State::Running) => match self.machine.as_ref().map(Machine::pause) {
                Some(Err(failed)) => error = Some(failed.to_string()),
                _ => self.state = State::Paused,
            },
        }
        let (id, state) = (Some(request.id), Some(self.state));
        let is_status = request.verb == Verb::Status;
        let lost = if is_status { self.disks.lost() } else { Vec::new() };
        let ended = self.ended.filter(|_| is_status);
        let is_mirrored = is_status.then(|| self.mirrored.is_on());
        let cut = self.standby.as_ref().map(Standby::staged).filter(|_| is_status);
        let missing_bytes = is_status.then(|| self.leavings.missing_bytes());
        let connection = self.leavings.connection().filter(|_| is_status);
        let committed = self.standby.as_ref().map(Standby::committed).filter(|_| is_status);
        let stream_version = is_status.then(|| StreamVersion::default().hello());
        let standing = Line { cut, committed, connection, missing_bytes, stream_version, ..Line::default() };
        let lease_left_ms = self.lease.left_ms().filter(|_| is_status || request.verb == Verb::Lease);
        let (takes_leases, takes_holds) = (is_status.then_some(true), is_status.then_some(true));
        let line = Line { id, state, error, ended, lost, is_mirrored, lease_left_ms, ..standing };
        let line = Line { takes_leases, takes_holds, ..line };
        self.client.tell(&line);
        request.verb == Verb::End
    }

    /// Takes the end of a run; what the process would exit with if nobody controlled it.
    fn take(&mut self, outcome: Outcome) -> Option<ExitCode> {
        if let Some(sending) = &self.sending {
            // A machine whose run has ended is not sent; it is dealt with when it is back.
            sending.cancel();
            self.missed = Some(outcome);
            return None;
        }
        if self.parts(&outcome) {
            return None;
        }
        let (event, error, code) = match outcome {
            Outcome::Reset => {
                // Paused in between: a guest that waits for its resume after a reset still waits.
                let was_running = self.state == State::Running;
                match self.boot() {
                    Ok(is_there) => {
                        if was_running && is_there {
                            self.resume();
                        }
                        (Event::Rebooted, None, None)
                    }
                    Err(error) => {
                        (Event::Broken, Some(format!("it cannot boot again: {error:#}")), Some(ExitCode::FAILURE))
                    }
                }
            }
            Outcome::PowerOff => (Event::PoweredOff, None, Some(ExitCode::SUCCESS)),
            Outcome::Broken { reason } => (Event::Broken, Some(reason), Some(ExitCode::FAILURE)),
        };
        if code.is_some() {
            // Memory and disks are let go; the socket stays until somebody has heard of it.
            self.machine = None;
            self.mirrored.stop();
            self.state = State::Ended;
            self.ended = Some(event);
            if let Some(error) = &error {
                eprintln!("supercloud-vmm: {error}");
            }
        }
        self.client.tell(&Line { event: Some(event), state: Some(self.state), error, ..Line::default() });
        code
    }
}
