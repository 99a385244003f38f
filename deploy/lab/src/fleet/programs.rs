//! The programs that run in a lab, built where the lab looks for them.

use std::path::Path;
use std::time::Duration;

use super::FleetError;
use crate::command::{CommandError, Run};
use crate::lab::program_dir;

/// Everything that a fleet starts, and the operator's command.
pub const PACKAGES: [&str; 6] =
    ["supercloud-controller", "supercloud-agent", "supercloud-vmm", "supercloud-xen", "supercloud-spotd", "supercloud"];

const BUILD_BUDGET: Duration = Duration::from_secs(3600);

/// Builds them from the source tree that this program was built from: for tests, of which Cargo builds only their own package.
///
/// # Errors
/// When Cargo fails.
pub fn build() -> Result<(), FleetError> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.toml");
    let target = program_dir();
    let mut build = Run::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())).budget(BUILD_BUDGET);
    // What Cargo sets for a test would count as a change for build scripts that look at it, and half of the tree would be
    // built anew, each time from the other side.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("CARGO_") && !["CARGO_HOME", "CARGO_NET_OFFLINE"].contains(&name.as_str()) {
            build.command_mut().env_remove(name);
        }
    }
    // As a person's own call would have it.
    build.command_mut().env_remove("LC_ALL").env("PATH", std::env::var_os("PATH").unwrap_or_default());
    build
        .args(["build", "--quiet", "--manifest-path"])
        .arg(manifest)
        .arg("--target-dir")
        .arg(target.parent().unwrap_or(&target))
        .args(PACKAGES.iter().flat_map(|package| ["-p", package]))
        .ok()
        .map_err(|source: CommandError| FleetError::Build { source: Box::new(source) })
}
