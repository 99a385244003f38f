//! What the process gives up before it looks at anything of its guest's: dumps, descriptors beyond what it has, and every
//! system call that running a guest does not take (seccomp(2)).
//!
//! It opens no file, makes no socket and no process, connects to nobody and maps nothing that can be executed: all that it will
//! ever have was handed to it. A call that is not in the list fails with `ENOSYS`, as on a kernel that does not have it.

use std::{collections::BTreeMap, io};

use anyhow::Context as _;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use supercloud_blanket::vmm::travel::left::FAULT_REQUESTS;

/// Descriptors at once: a few per device, vCPU and client.
const MAX_DESCRIPTORS: u64 = 1024;

/// Memory that is not the guest's: threads' stacks, buffers, a kernel and a ramdisk while they are loaded.
const MAX_DATA_BYTES: u64 = 3 << 30;

/// `KVMIO` of linux/kvm.h, the type of all of its requests, where a request has its type.
const KVM_REQUESTS: (u64, u64) = (0xff00, 0xae00);
/// `TUNSETVNETHDRSZ` and `TUNSETOFFLOAD` of linux/if_tun.h.
const TAP_REQUESTS: [u64; 2] = [0x4004_54d8, 0x4004_54d0];

/// Allowed whatever their arguments.
const PLAIN: &[libc::c_long] = &[
    // What it holds already.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_ftruncate,
    libc::SYS_dup,
    libc::SYS_close,
    // Clients, streams, ways to disks.
    libc::SYS_accept4,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    // Memory: the guest's, which is made anew when it resets; what can be executed is decided below.
    libc::SYS_memfd_create,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    // Waiting.
    libc::SYS_eventfd2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_restart_syscall,
    // Threads, signals, the end.
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_geteuid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getrandom,
];

type Rules = Result<Vec<SeccompRule>, seccompiler::BackendError>;

fn rule(argument: u8, operator: SeccompCmpOp, value: u64) -> Rules {
    Ok(vec![SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Qword, operator, value)?])?])
}

fn program() -> anyhow::Result<BpfProgram> {
    let number = |value: libc::c_int| u64::from(value.unsigned_abs());
    let without = |argument, bits: libc::c_int| rule(argument, SeccompCmpOp::MaskedEq(number(bits)), 0);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = PLAIN.iter().map(|call| (*call, Vec::new())).collect();
    let thread = number(libc::CLONE_THREAD | libc::CLONE_VM | libc::CLONE_SIGHAND);
    // The kernel looks at 32 bits of a request; so does the C library, which may hand over others.
    let request = |operator, value| {
        Ok(vec![SeccompRule::new(vec![SeccompCondition::new(1, SeccompCmpArgLen::Dword, operator, value)?])?])
    };
    let mut requests: Vec<SeccompRule> = Rules::from(request(SeccompCmpOp::MaskedEq(KVM_REQUESTS.0), KVM_REQUESTS.1))?;
    for value in TAP_REQUESTS.into_iter().chain([libc::FIONBIO]).chain(FAULT_REQUESTS) {
        requests.extend(Rules::from(request(SeccompCmpOp::Eq, value))?);
    }
    // Flags and seals; not whom a signal goes to.
    let commands =
        [libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL, libc::F_DUPFD_CLOEXEC, libc::F_ADD_SEALS];
    let mut flags = Vec::new();
    for command in commands {
        flags.extend(rule(1, SeccompCmpOp::Eq, number(command))?);
    }
    rules.extend([
        (libc::SYS_fcntl, flags),
        // All guests' processes of a host may be one user's: a signal goes to threads of this one only.
        (libc::SYS_tgkill, rule(0, SeccompCmpOp::Eq, std::process::id().into())?),
        (libc::SYS_mmap, without(2, libc::PROT_EXEC)?),
        (libc::SYS_mprotect, without(2, libc::PROT_EXEC)?),
        (libc::SYS_prctl, rule(0, SeccompCmpOp::Eq, number(libc::PR_SET_NAME))?),
        // Threads, no processes. (clone3 has its flags in memory, where a filter cannot look: without it libc takes this.)
        (libc::SYS_clone, rule(0, SeccompCmpOp::MaskedEq(thread), thread)?),
        (libc::SYS_ioctl, requests),
        // Reading limits of its own, not setting them.
        (libc::SYS_prlimit64, rule(2, SeccompCmpOp::Eq, 0)?),
    ]);
    // Holes in disks that are files, whose length stays; in the guest's memory they are made by madvise.
    let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    rules.insert(libc::SYS_fallocate, rule(1, SeccompCmpOp::Eq, number(hole))?);
    let architecture = std::env::consts::ARCH.try_into()?;
    let refused = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    Ok(SeccompFilter::new(rules, refused, SeccompAction::Allow, architecture)?.try_into()?)
}

fn limit(what: &'static str, resource: libc::__rlimit_resource_t, most: u64) -> anyhow::Result<()> {
    let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one rlimit, which lives over the call.
    checked(what, unsafe { libc::getrlimit(resource, &raw mut now) })?;
    let most = now.rlim_max.min(most);
    let new = libc::rlimit { rlim_cur: most, rlim_max: most };
    // SAFETY: the kernel reads one rlimit, which lives over the call.
    checked(what, unsafe { libc::setrlimit(resource, &raw const new) })
}

fn checked(what: &'static str, rc: libc::c_int) -> anyhow::Result<()> {
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()).context(what) }
}

/// Confines this process, which has one thread yet, and all that it will start.
///
/// # Errors
/// When a step fails; the process must not go on then.
pub fn confine() -> anyhow::Result<()> {
    limit("forbidding core dumps", libc::RLIMIT_CORE, 0)?;
    limit("bounding its descriptors", libc::RLIMIT_NOFILE, MAX_DESCRIPTORS)?;
    limit("bounding its own memory", libc::RLIMIT_DATA, MAX_DATA_BYTES)?;
    for (option, value) in [(libc::PR_SET_NO_NEW_PRIVS, 1), (libc::PR_SET_DUMPABLE, 0)] {
        // SAFETY: these options take numbers only.
        checked("giving up rights", unsafe { libc::prctl(option, value, 0, 0, 0) })?;
    }
    seccompiler::apply_filter(&program()?).context("putting the filter of system calls in force")
}
