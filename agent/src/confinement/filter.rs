//! The system calls that serving a volume takes, and no others (seccomp(2)).
//!
//! A call that is not in the list fails with `ENOSYS`, as on a kernel that does not have it: libraries know how to go
//! another way then, and an attacker in the process cannot tell from it what else is forbidden. Nothing here executes a
//! program, makes a process, opens a socket of the network, traces, mounts, loads, or maps memory that can be executed.
//!
//! The list is written by need (files, memory, threads, unix sockets, time) and proved by the tests of this crate and the demo;
//! a path that neither takes may still meet `ENOSYS`: the process's log tells.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Why the filter is not in force.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// It cannot be made.
    #[error("it cannot be compiled")]
    Compile(#[from] seccompiler::BackendError),
    /// The kernel refused it.
    #[error("the kernel refused it")]
    Apply(#[from] seccompiler::Error),
}

/// Allowed whatever their arguments.
const PLAIN: &[libc::c_long] = &[
    // Files.
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_syncfs,
    libc::SYS_sync_file_range,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fadvise64,
    libc::SYS_flock,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_renameat2,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_mkdirat,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_copy_file_range,
    libc::SYS_getcwd,
    libc::SYS_umask,
    // Sockets; which kinds can be made is decided below.
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    // Waiting.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_ppoll,
    libc::SYS_pipe2,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_restart_syscall,
    // Memory; what can be executed is decided below.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    // Threads, signals, the end.
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];

/// The older forms of the same calls, which only this architecture has.
#[cfg(target_arch = "x86_64")]
const OLDER: &[libc::c_long] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_rename,
    libc::SYS_link,
    libc::SYS_unlink,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_epoll_wait,
    libc::SYS_poll,
    libc::SYS_time,
    libc::SYS_getdents,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[libc::c_long] = &[];

fn rule(
    argument: u8,
    length: SeccompCmpArgLen,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    Ok(vec![SeccompRule::new(vec![SeccompCondition::new(argument, length, operator, value)?])?])
}

/// The filter.
///
/// # Errors
/// Never in practice: it does not depend on anything but the architecture.
pub fn program() -> Result<BpfProgram, FilterError> {
    let (double, quad) = (SeccompCmpArgLen::Dword, SeccompCmpArgLen::Qword);
    let number = |value: libc::c_int| u64::from(value.unsigned_abs());
    let only = |argument, value| rule(argument, double.clone(), SeccompCmpOp::Eq, number(value));
    let without = |argument, bits: libc::c_int| rule(argument, quad.clone(), SeccompCmpOp::MaskedEq(number(bits)), 0);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        PLAIN.iter().chain(OLDER).map(|call| (*call, Vec::new())).collect();
    let thread = number(libc::CLONE_THREAD | libc::CLONE_VM | libc::CLONE_SIGHAND);
    rules.extend([
        (libc::SYS_socket, only(0, libc::AF_UNIX)?),
        (libc::SYS_socketpair, only(0, libc::AF_UNIX)?),
        (libc::SYS_mmap, without(2, libc::PROT_EXEC)?),
        (libc::SYS_mprotect, without(2, libc::PROT_EXEC)?),
        (libc::SYS_prctl, only(0, libc::PR_SET_NAME)?),
        // Threads, no processes. (clone3 has its flags in memory, where a filter cannot look: without it libc takes this.)
        (libc::SYS_clone, rule(0, quad.clone(), SeccompCmpOp::MaskedEq(thread), thread)?),
        (libc::SYS_ioctl, rule(1, double.clone(), SeccompCmpOp::Eq, libc::FIONBIO)?),
        // Reading limits of its own, not setting them.
        (libc::SYS_prlimit64, rule(2, quad.clone(), SeccompCmpOp::Eq, 0)?),
    ]);
    let architecture = std::env::consts::ARCH.try_into()?;
    let refused = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    Ok(SeccompFilter::new(rules, refused, SeccompAction::Allow, architecture)?.try_into()?)
}

/// Puts the filter in force for this thread and all that it starts.
///
/// # Errors
/// When the kernel has no seccomp, or refuses.
pub fn apply() -> Result<(), FilterError> {
    Ok(seccompiler::apply_filter(&program()?)?)
}

#[cfg(test)]
mod tests {
    use std::{io, net::TcpListener, os::unix::net::UnixStream, process::Command};

    use super::*;

    fn is_refused<T>(result: io::Result<T>) -> bool {
        result.err().and_then(|error| error.raw_os_error()) == Some(libc::ENOSYS)
    }

    #[test]
    fn what_serves_a_volume_works_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Command::new("true").status().is_ok() && TcpListener::bind("127.0.0.1:0").is_ok());
        // In force for a thread of its own only.
        let path = dir.path().to_owned();
        let checked = std::thread::spawn(move || {
            apply().unwrap();
            std::fs::write(path.join("a"), "a").unwrap();
            std::fs::hard_link(path.join("a"), path.join("b")).unwrap();
            std::fs::rename(path.join("b"), path.join("c")).unwrap();
            assert_eq!(std::fs::read_dir(&path).unwrap().count(), 2);
            UnixStream::pair().unwrap().0.set_nonblocking(true).unwrap();
            assert_eq!(std::thread::spawn(|| 7).join().unwrap(), 7);
            let mut refused = vec![
                ("a program", is_refused(Command::new("true").status())),
                ("the network", is_refused(TcpListener::bind("127.0.0.1:0"))),
            ];
            let raw = |name, call: libc::c_long, a: libc::c_long, b: libc::c_long, c: libc::c_long| {
                // SAFETY: each is refused before the kernel looks at its arguments, which the test asserts; and none of them
                // names memory.
                let rc = unsafe { libc::syscall(call, a, b, c, 0, 0, 0) };
                (name, rc == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS))
            };
            refused.extend([
                raw("a process", libc::SYS_clone, libc::c_long::from(libc::SIGCHLD), 0, 0),
                raw("clone3", libc::SYS_clone3, 0, 0, 0),
                raw("tracing", libc::SYS_ptrace, 0, 0, 0),
                raw("another's memory", libc::SYS_process_vm_readv, 0, 0, 0),
                raw("a user", libc::SYS_setresuid, 0, 0, 0),
                raw("a namespace", libc::SYS_unshare, libc::c_long::from(libc::CLONE_NEWUSER), 0, 0),
                raw("bpf", libc::SYS_bpf, 0, 0, 0),
                raw("io_uring", libc::SYS_io_uring_setup, 0, 0, 0),
                raw("an executable mapping", libc::SYS_mmap, 0, 4096, libc::c_long::from(libc::PROT_EXEC)),
                raw("a signal to others", libc::SYS_kill, 0, 0, 0),
                raw("typing for a terminal", libc::SYS_ioctl, 0, 0x5412, 0),
                raw("a keyring", libc::SYS_keyctl, 0, 0, 0),
            ]);
            refused
        });
        for (name, is_refused) in checked.join().unwrap() {
            assert!(is_refused, "{name} is not refused");
        }
    }
}
