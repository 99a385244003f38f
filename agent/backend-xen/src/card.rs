//! A domain's network card takes the place of the tap that was made for it.
//!
//! A card of a domain's is an interface `vif<domain>.<index>` that is there as long as the domain. The port's tap, made before by who
//! attached the port to the switch, only keeps its name and its number in the switch: it is removed, and the domain's interface gets
//! its name. Open vSwitch takes an interface that comes under the name of a port for that port, with the number that was asked for.

use std::{ffi::OsStr, path::Path, time::Duration};

use supercloud_blanket::{BackendError, BackendResult, Launch};
use tokio::time::{Instant, sleep};

use crate::xl;

/// How often an interface that is still to come is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Puts the cards of a domain, which stands still yet, in their places. Doing it again changes nothing.
///
/// # Errors
/// When an interface does not come in time, or cannot be changed.
pub async fn plug(launch: &Launch, domain: u32, budget: Duration) -> BackendResult<()> {
    let what = "plug a domain's network card";
    let end = Instant::now() + budget;
    for (index, nic) in launch.spec.devices.nics.iter().enumerate() {
        let Some(tap) = launch.host.taps.get(&nic.name) else { continue };
        let vif = format!("vif{domain}.{index}");
        let is_there = |name: &str| Path::new("/sys/class/net").join(name).exists();
        while !is_there(&vif) {
            // Of an agent before, which got so far.
            if is_there(tap) && is_virtual_card(tap) {
                break;
            }
            if Instant::now() >= end {
                let budget_ms = u64::try_from(budget.as_millis()).unwrap_or(u64::MAX);
                return Err(BackendError::Deadline { what, budget_ms });
            }
            sleep(LOOK_EVERY).await;
        }
        let ip = |words: Vec<String>| xl::run(what, budget, OsStr::new("ip"), words);
        let words = |line: String| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        if is_there(&vif) {
            if is_there(tap) {
                ip(words(format!("link delete {tap}"))).await?;
            }
            ip(words(format!("link set {vif} down name {tap} mtu {}", nic.mtu))).await?;
        }
        // The host's own stack has no business there.
        for (setting, value) in [("ipv6/conf/NAME/disable_ipv6", "1"), ("ipv4/conf/NAME/arp_ignore", "8")] {
            let path = Path::new("/proc/sys/net").join(setting.replace("NAME", tap));
            if let Err(source) = tokio::fs::write(&path, value).await
                && source.kind() != std::io::ErrorKind::NotFound
            {
                return Err(BackendError::File { what: "write", path, source });
            }
        }
        ip(words(format!("link set {tap} up"))).await?;
        let key = format!("/local/domain/0/backend/vif/{domain}/{index}/hotplug-status");
        xl::run(what, budget, OsStr::new("xenstore-write"), [key.as_str(), "connected"]).await?;
    }
    Ok(())
}

/// Whether an interface of this name is a domain's card.
fn is_virtual_card(name: &str) -> bool {
    std::fs::read_link(Path::new("/sys/class/net").join(name).join("device/driver"))
        .is_ok_and(|driver| driver.file_name() == Some(OsStr::new("vif")))
}
