//! A domain's network card takes the place of the tap that was made for it.
//!
//! A card of a domain's is an interface `vif<domain>.<index>` that is there as long as the domain. The port's tap, made before by who
//! attached the port to the switch, only keeps its name and its number in the switch: it is removed, and the domain's interface gets
//! its name. Open vSwitch takes an interface that comes under the name of a port for that port, with the number that was asked for. When
//! the guest boots again, its old domain's interface goes with that domain, and the new one's gets the name.

use std::{
    ffi::OsStr,
    io,
    path::Path,
    time::{Duration, Instant},
};

use supercloud_blanket::{BackendError, BackendResult, Launch};
use tokio::time::sleep;

use crate::{guest::blocking, xl};

/// How often an interface that is still to come is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(50);
const WHAT: &str = "plug a domain's network card";
const CARDS: &str = "/sys/class/net";

/// What an interface is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Is {
    /// Not there.
    Missing,
    /// The card that is meant.
    TheCard,
    /// Another domain's card: one that is being taken apart.
    AnotherCard,
    /// Something else: the tap.
    Else,
}

/// What the interface of this name is, by the device that the kernel says it belongs to: `.../vif-<domain>-<index>`. Blocking.
fn look(cards: &Path, name: &str, domain: u32, index: usize) -> io::Result<Is> {
    let place = cards.join(name);
    if !place.try_exists()? {
        return Ok(Is::Missing);
    }
    match std::fs::read_link(place.join("device")) {
        Ok(device) => {
            let device = device.file_name().and_then(OsStr::to_str).unwrap_or_default();
            Ok(match device {
                device if device == format!("vif-{domain}-{index}") => Is::TheCard,
                device if device.starts_with("vif-") => Is::AnotherCard,
                _ => Is::Else,
            })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Is::Else),
        Err(error) => Err(error),
    }
}

/// The host's own stack has no business at a guest's card.
fn seal(name: &str) -> io::Result<()> {
    for (family, setting, value) in [
        ("ipv6", "disable_ipv6", "1"),
        ("ipv4", "arp_ignore", "8"),
        ("ipv4", "rp_filter", "1"),
        ("ipv4", "accept_local", "0"),
        ("ipv4", "forwarding", "0"),
    ] {
        let folder = Path::new("/proc/sys/net").join(family).join("conf").join(name);
        // A kernel without IPv6 has no such folder, and needs no such setting.
        if folder.try_exists()? {
            std::fs::write(folder.join(setting), value)?;
        }
    }
    Ok(())
}

async fn look_at(name: &str, domain: u32, index: usize) -> BackendResult<Is> {
    let name = name.to_owned();
    blocking(WHAT, move || look(Path::new(CARDS), &name, domain, index)).await
}

/// Puts the cards of a domain, which stands still yet, in their places. Doing it again changes nothing.
///
/// # Errors
/// When an interface does not come in time, or cannot be changed.
pub async fn plug(launch: &Launch, domain: u32, budget: Duration) -> BackendResult<()> {
    let end = Instant::now() + budget;
    let late =
        || BackendError::Deadline { what: WHAT, budget_ms: u64::try_from(budget.as_millis()).unwrap_or(u64::MAX) };
    let ip = |line: String| {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        xl::run(WHAT, budget, OsStr::new("ip"), words)
    };
    for (index, nic) in launch.spec.devices.nics.iter().enumerate() {
        let Some(tap) = launch.host.taps.get(&nic.name) else { continue };
        let vif = format!("vif{domain}.{index}");
        loop {
            match (look_at(tap, domain, index).await?, look_at(&vif, domain, index).await?) {
                // Put there before.
                (Is::TheCard, _) => break,
                (Is::Else, Is::TheCard) => {
                    ip(format!("link delete {tap}")).await?;
                    continue;
                }
                (Is::Missing, Is::TheCard) => {
                    ip(format!("link set {vif} down")).await?;
                    ip(format!("link set {vif} name {tap} mtu {}", nic.mtu)).await?;
                    break;
                }
                // Its own is still to come, or the one of the domain before is still to go.
                _ if Instant::now() >= end => return Err(late()),
                _ => sleep(LOOK_EVERY).await,
            }
        }
        let name = tap.clone();
        blocking(WHAT, move || seal(&name)).await?;
        ip(format!("link set {tap} up")).await?;
        let key = format!("/local/domain/0/backend/vif/{domain}/{index}/hotplug-status");
        xl::run(WHAT, budget, OsStr::new("xenstore-write"), [key.as_str(), "connected"]).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_is_told_from_a_tap_and_from_one_of_another_domain() {
        let cards = tempfile::tempdir().unwrap();
        for (name, device) in [("sct0", None), ("sct1", Some("../../../vif-7-0")), ("sct2", Some("../../../virtio0"))] {
            let place = cards.path().join(name);
            std::fs::create_dir(&place).unwrap();
            if let Some(device) = device {
                std::os::unix::fs::symlink(device, place.join("device")).unwrap();
            }
        }
        let look = |name: &str, domain| look(cards.path(), name, domain, 0).unwrap();
        assert_eq!([look("sct0", 7), look("sct1", 7), look("sct2", 7)], [Is::Else, Is::TheCard, Is::Else]);
        assert_eq!(
            [look("sct1", 6), look("sct1", 70), look("sct9", 7)],
            [Is::AnotherCard, Is::AnotherCard, Is::Missing]
        );
    }
}
