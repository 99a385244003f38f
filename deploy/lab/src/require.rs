//! For tests that need what not every machine has.

use std::path::Path;

/// If set, a test that cannot run here fails: `deploy/test` sets it after it has installed all that is needed.
pub const REQUIRE: &str = "SUPERCLOUD_REQUIRE";

/// Whether a lab with real guests can be made here: as root, and with these programs. Says it when not, as [`skip`] does.
///
/// # Panics
/// As [`skip`].
#[must_use]
pub fn lab(programs: &[&str]) -> bool {
    // SAFETY: plain system call.
    let is_root = unsafe { libc::geteuid() } == 0;
    let has = |program: &&str| ["/usr/sbin", "/usr/bin"].iter().any(|dir| Path::new(dir).join(program).exists());
    let is_possible = is_root && programs.iter().all(has);
    if !is_possible {
        skip(&format!("needs root and {}", programs.join(", ")));
    }
    is_possible
}

/// Whether a lab of hosts that are VMs can be made here. Says it when not, as [`skip`] does.
///
/// # Panics
/// As [`skip`].
#[must_use]
pub fn host_vms() -> bool {
    if let Some(why) = crate::host_vm::missing() {
        skip(why);
        return false;
    }
    lab(&["mmdebstrap", "ovs-vswitchd", "qemu-system-x86_64"])
}

/// Says that a test does nothing here, and why.
///
/// # Panics
/// When [`REQUIRE`] is set.
pub fn skip(why: &str) {
    assert!(std::env::var_os(REQUIRE).is_none(), "{REQUIRE} is set, but this test cannot run: {why}");
    println!("SKIPPED: {why}");
}
