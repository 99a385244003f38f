//! How a process gives up what it does not need, before it touches anything that others send.
//!
//! ```text
//!   started by the agent as root: reads its configuration and its project's key, has its log open
//!   -> resource limits           no core dumps, few descriptors
//!   -> no new privileges         whatever it might execute gains nothing
//!   -> another user              own uid and gid, no further groups, no capabilities in any set
//!   -> not dumpable              another process of that user can neither trace it nor read its memory
//!   -> a seccomp filter          only the system calls that serving a volume takes ([`filter`])
//! ```

pub mod filter;

use std::io;

use crate::accounts::Account;

/// Descriptors at once: sockets of the guest, of peers and of the agent, and a few dozen files.
const MAX_DESCRIPTORS: u64 = 1024;
/// The kernel has fewer capabilities than this (64 fit into its sets).
const CAPABILITIES: libc::c_ulong = 64;
/// `_LINUX_CAPABILITY_VERSION_3` of linux/capability.h: sets of 64 bits in two halves.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

/// Why a process cannot be confined; it must not go on then.
#[derive(Debug, thiserror::Error)]
pub enum ConfinementError {
    /// The kernel refused a step.
    #[error("cannot {what}")]
    Step {
        /// The step.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// More threads than one: the others would keep their rights.
    #[error("the process has {0} threads; it must give up its rights before it starts any")]
    Threads(usize),
    /// The filter of system calls.
    #[error("the filter of system calls cannot be put in force")]
    Filter(#[from] filter::FilterError),
}

fn checked(what: &'static str, rc: libc::c_int) -> Result<(), ConfinementError> {
    if rc < 0 { Err(ConfinementError::Step { what, source: io::Error::last_os_error() }) } else { Ok(()) }
}

/// Confines this process, which has one thread; a process that runs as root becomes `user`, if one is given.
///
/// # Errors
/// When a step fails: the process is then in between, and must end.
pub fn confine(user: Option<Account>) -> Result<(), ConfinementError> {
    let tasks = std::fs::read_dir("/proc/self/task").map(Iterator::count);
    match tasks.map_err(|source| ConfinementError::Step { what: "count the process's threads", source })? {
        1 => {}
        more => return Err(ConfinementError::Threads(more)),
    }
    limit("forbid core dumps", libc::RLIMIT_CORE, 0)?;
    limit("bound its descriptors", libc::RLIMIT_NOFILE, MAX_DESCRIPTORS)?;
    limit("forbid locked memory", libc::RLIMIT_MEMLOCK, 0)?;
    // SAFETY: prctl with this option takes numbers only.
    let rc = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    checked("forbid new privileges", rc)?;
    // SAFETY: geteuid takes no arguments and cannot fail.
    let is_root = unsafe { libc::geteuid() } == 0;
    if is_root && let Some(user) = user.filter(|user| !user.is_root()) {
        become_user(user)?;
    }
    // SAFETY: prctl with this option takes numbers only.
    let rc = unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
    checked("forbid dumps and tracing", rc)?;
    Ok(filter::apply()?)
}

/// Lowers a limit; never raises one.
fn limit(what: &'static str, resource: libc::__rlimit_resource_t, most: u64) -> Result<(), ConfinementError> {
    let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one rlimit, which lives over the call.
    let rc = unsafe { libc::getrlimit(resource, &raw mut now) };
    checked(what, rc)?;
    let most = now.rlim_max.min(most);
    let new = libc::rlimit { rlim_cur: most, rlim_max: most };
    // SAFETY: the kernel reads one rlimit, which lives over the call.
    let rc = unsafe { libc::setrlimit(resource, &raw const new) };
    checked(what, rc)
}

fn become_user(user: Account) -> Result<(), ConfinementError> {
    for capability in 0..CAPABILITIES {
        // SAFETY: prctl with this option takes numbers only.
        let rc = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        if rc < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
            // The kernel knows no further one.
            break;
        }
        checked("drop a capability", rc)?;
    }
    // SAFETY: a count of zero groups; the pointer is not read.
    let rc = unsafe { libc::setgroups(0, std::ptr::null()) };
    checked("leave its groups", rc)?;
    // SAFETY: numbers only.
    let rc = unsafe { libc::setresgid(user.gid, user.gid, user.gid) };
    checked("become another group", rc)?;
    // SAFETY: numbers only.
    let rc = unsafe { libc::setresuid(user.uid, user.uid, user.uid) };
    checked("become another user", rc)?;
    // With the user went the effective and permitted sets; the inheritable one stays until it is emptied.
    let header = [CAPABILITY_VERSION, 0];
    let none = [0_u32; 6];
    // SAFETY: a header of two words and two sets of three words each (capset(2)), which live over the call.
    let rc = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    checked("empty its capabilities", i32::try_from(rc).unwrap_or(-1))
}
