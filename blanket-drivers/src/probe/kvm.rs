//! A tiny guest on `/dev/kvm`, timed.
//!
//! Memory (4 MiB at guest address 0): page tables at 0x1000, code at 0x8000, a page to write to at 0x10_0000. The vCPU
//! starts in 64-bit mode with paging on:
//!
//! ```text
//! loop: mov [rdi], rcx     ; a store through the page tables
//!       dec rcx
//!       jnz loop           ; 3 instructions a round
//! exit: out 0x10, al       ; back to us
//!       jmp exit
//! ```
//!
//! It runs on a thread of its own. When the budget is over the thread is signalled out of `KVM_RUN` until it ends; one
//! that does not even answer signals is left behind and said to hang.

use std::{
    os::unix::thread::JoinHandleExt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::SLOW_NS_PER_INSTRUCTION;

const MEMORY_BYTES: usize = 4 << 20;
const TABLES: u64 = 0x1000;
const CODE: u64 = 0x8000;
const SCRATCH: u64 = 0x10_0000;
const CODE_BYTES: [u8; 12] = [0x48, 0x89, 0x0f, 0x48, 0xff, 0xc9, 0x75, 0xf8, 0xe6, 0x10, 0xeb, 0xfc];
const PORT: u16 = 0x10;
const INSTRUCTIONS_A_ROUND: f64 = 3.0;

/// Rounds of the first, short run: 24 ms where each instruction is emulated at 400 ns.
const SHORT_ROUNDS: u64 = 20_000;
/// Rounds of the long run, only where the short one was fast: a few milliseconds.
const LONG_ROUNDS: u64 = 2_000_000;
/// Exits in the train.
const EXITS: u32 = 2_000;
/// How often each is measured; the least counts.
const REPEATS: u32 = 9;

/// How long a thread that is signalled may take to end.
const SIGNAL_PATIENCE: Duration = Duration::from_secs(1);
const SIGNAL_EVERY: Duration = Duration::from_millis(5);

/// First of PVM's virtual MSRs (`MSR_PVM_LINEAR_ADDRESS_RANGE`, asm/pvm_para.h of the PVM patches).
const PVM_MSR_FIRST: u32 = 0x4b56_4df0;
const PVM_MSR_LAST: u32 = PVM_MSR_FIRST + 15;

/// What `/dev/kvm` did with the tiny guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "found")]
pub enum KvmFinding {
    /// It cannot be opened.
    Absent {
        /// Why.
        reason: String,
    },
    /// It is there but did not run the guest to its end.
    Unusable {
        /// Why.
        reason: String,
        /// Whether its kernel offers page-table virtualization.
        has_pvm: bool,
    },
    /// It ran the guest.
    Measured {
        /// Nanoseconds per guest instruction, 64-bit mode, paging on.
        ns_per_instruction: f64,
        /// Nanoseconds per exit to us and back.
        ns_per_exit: f64,
        /// Whether its kernel offers page-table virtualization.
        has_pvm: bool,
    },
}

/// Runs and times the guest, within `budget`.
#[must_use]
pub fn measure(budget: Duration) -> KvmFinding {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return KvmFinding::Absent { reason: format!("/dev/kvm cannot be opened: {error}") },
    };
    let has_pvm = has_pvm(&kvm);
    let unusable = |reason: String| KvmFinding::Unusable { reason, has_pvm };
    let Some(signal) = crate::signal::kick() else {
        return unusable("no signal is free to end a guest that hangs".to_owned());
    };
    let deadline = Instant::now() + budget;
    let has_ended = Arc::new(AtomicBool::new(false));
    let (sender, receiver) = mpsc::channel();
    let ended = Arc::clone(&has_ended);
    let spawned = std::thread::Builder::new().name("kvm-probe".to_owned()).spawn(move || {
        let result = run(&kvm, deadline);
        ended.store(true, Ordering::Release);
        // Nobody waits any more when the budget was over long ago.
        let _ = sender.send(result);
    });
    let thread = match spawned {
        Ok(thread) => thread,
        Err(error) => return unusable(format!("no thread for the probe: {error}")),
    };
    let mut result = receiver.recv_timeout(budget);
    let give_up = Instant::now() + SIGNAL_PATIENCE;
    while result.is_err() && Instant::now() < give_up {
        if !has_ended.load(Ordering::Acquire) {
            // A signal that comes before the thread enters KVM_RUN is missed: hence the repetition.
            // SAFETY: the thread was neither joined nor detached, so its id is valid even when it has just ended.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), signal) };
        }
        result = receiver.recv_timeout(SIGNAL_EVERY);
    }
    match result {
        Ok(measured) => {
            let _ = thread.join();
            match measured {
                Ok((ns_per_instruction, ns_per_exit)) => {
                    KvmFinding::Measured { ns_per_instruction, ns_per_exit, has_pvm }
                }
                Err(reason) => unusable(reason),
            }
        }
        Err(_) => unusable("a tiny guest hangs in KVM_RUN and does not answer signals".to_owned()),
    }
}

/// Whether the kernel lists PVM's virtual MSRs, or has its module loaded.
fn has_pvm(kvm: &Kvm) -> bool {
    let is_listed = kvm
        .get_msr_index_list()
        .is_ok_and(|list| list.as_slice().iter().any(|msr| (PVM_MSR_FIRST..=PVM_MSR_LAST).contains(msr)));
    is_listed || std::path::Path::new("/sys/module/kvm_pvm").exists()
}

/// A vCPU with what it needs to live. Dropped in this order.
struct Guest {
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

/// `(ns per instruction, ns per exit)`.
fn run(kvm: &Kvm, deadline: Instant) -> Result<(f64, f64), String> {
    let mut guest = Guest::new(kvm)?;
    // Once for what only the first entry costs.
    guest.time_rounds(100, deadline)?;
    let mut rounds = SHORT_ROUNDS;
    let mut ns = guest.best_of(deadline, |guest| guest.time_rounds(rounds, deadline))?;
    let per_instruction = |ns: f64, rounds: u64| {
        #[expect(clippy::cast_precision_loss, reason = "at most two million")]
        let rounds = rounds as f64;
        ns / rounds / INSTRUCTIONS_A_ROUND
    };
    if per_instruction(ns, rounds) < SLOW_NS_PER_INSTRUCTION {
        rounds = LONG_ROUNDS;
        ns = guest.best_of(deadline, |guest| guest.time_rounds(rounds, deadline))?;
    }
    let exits = guest.best_of(deadline, |guest| guest.time_exits(deadline))?;
    Ok((per_instruction(ns, rounds), exits / f64::from(EXITS)))
}

impl Guest {
    fn new(kvm: &Kvm) -> Result<Self, String> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])
            .map_err(|error| format!("no memory for a tiny guest: {error}"))?;
        let put = |at: u64, value: u64| {
            memory.write_obj(value, GuestAddress(at)).map_err(|error| format!("a tiny guest's memory: {error}"))
        };
        // One entry at each level, then two pages of 2 MiB: present, writable (0x3), large (0x80).
        put(TABLES, (TABLES + 0x1000) | 0x3)?;
        put(TABLES + 0x1000, (TABLES + 0x2000) | 0x3)?;
        put(TABLES + 0x2000, 0x83)?;
        put(TABLES + 0x2008, 0x20_0000 | 0x83)?;
        memory
            .write_slice(&CODE_BYTES, GuestAddress(CODE))
            .map_err(|error| format!("a tiny guest's memory: {error}"))?;

        let fail = |what: &'static str| move |error: kvm_ioctls::Error| format!("/dev/kvm cannot {what}: {error}");
        let vm = kvm.create_vm().map_err(fail("make a virtual machine"))?;
        let host =
            memory.get_host_address(GuestAddress(0)).map_err(|error| format!("a tiny guest's memory: {error}"))?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY_BYTES as u64,
            userspace_addr: host as u64,
        };
        // SAFETY: the region is one mapping of MEMORY_BYTES, which Guest drops after the vCPU and the VM.
        unsafe { vm.set_user_memory_region(region) }.map_err(fail("give memory to a virtual machine"))?;
        let vcpu = vm.create_vcpu(0).map_err(fail("make a vCPU"))?;

        let mut sregs = vcpu.get_sregs().map_err(fail("read a vCPU's registers"))?;
        let segment = kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..kvm_segment::default() };
        sregs.cs = kvm_segment { selector: 8, type_: 0xb, l: 1, ..segment };
        let data = kvm_segment { selector: 16, type_: 0x3, db: 1, ..segment };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.cr3 = TABLES;
        sregs.cr4 |= 0x20; // PAE
        sregs.cr0 |= 0x8000_0001; // PG, PE
        sregs.efer |= 0x500; // LME, LMA
        vcpu.set_sregs(&sregs).map_err(fail("set a vCPU to 64-bit mode"))?;
        Ok(Self { vcpu, _vm: vm, _memory: memory })
    }

    fn best_of(
        &mut self,
        deadline: Instant,
        mut once: impl FnMut(&mut Self) -> Result<f64, String>,
    ) -> Result<f64, String> {
        let mut best = once(self)?;
        for _ in 1..REPEATS {
            // A slow one need not be measured so often.
            if Instant::now() + Duration::from_nanos(500_000_000) > deadline {
                break;
            }
            best = best.min(once(self)?);
        }
        Ok(best)
    }

    /// Nanoseconds of so many rounds of the loop.
    fn time_rounds(&mut self, rounds: u64, deadline: Instant) -> Result<f64, String> {
        let regs = kvm_regs { rip: CODE, rflags: 2, rcx: rounds, rdi: SCRATCH, ..kvm_regs::default() };
        self.vcpu.set_regs(&regs).map_err(|error| format!("/dev/kvm cannot set a vCPU's registers: {error}"))?;
        let begin = Instant::now();
        self.until_exit(deadline)?;
        Ok(nanos(begin))
    }

    /// Nanoseconds of the train of exits; the guest stands at its `exit` label.
    fn time_exits(&mut self, deadline: Instant) -> Result<f64, String> {
        let begin = Instant::now();
        for _ in 0..EXITS {
            self.until_exit(deadline)?;
        }
        Ok(nanos(begin))
    }

    fn until_exit(&mut self, deadline: Instant) -> Result<(), String> {
        loop {
            if Instant::now() >= deadline {
                return Err("a tiny guest did not end within the probe's budget".to_owned());
            }
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(PORT, _)) => return Ok(()),
                Ok(exit) => return Err(format!("a tiny guest ended by {exit:?}")),
                // Interrupted: the loop looks at the deadline.
                Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {}
                Err(error) => return Err(format!("/dev/kvm cannot run a tiny guest: {error}")),
            }
        }
    }
}

fn nanos(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e9
}
