//! What Xen's tools run when a domain gets or loses a device: `supercloud-xen`, named as the script of each disk and card.
//!
//! A card is put in its place by the agent, before its domain runs: there is nothing to do here. A disk's back end in the kernel wants to
//! be told the numbers of the block device. Called as docs/misc/block-scripts.txt of Xen's says: the word `add` or `remove` (of cards
//! `online` or `offline`), the device's place in the store in the environment.

use std::{
    io,
    os::{linux::fs::MetadataExt as _, unix::fs::FileTypeExt as _},
    path::Path,
    process::Command,
};

fn store(words: &[&str]) -> io::Result<String> {
    let output = Command::new(words[0]).args(&words[1..]).output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(io::Error::other(format!("{} {}: {said}", words[0], words[1])))
}

/// A block device's numbers, as the kernel's back end reads them.
fn numbers(device: &Path) -> io::Result<String> {
    let about = std::fs::metadata(device)?;
    if !about.file_type().is_block_device() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} is no block device", device.display())));
    }
    let number = about.st_rdev();
    Ok(format!("{:x}:{:x}", libc::major(number), libc::minor(number)))
}

/// Does what is to be done for a device. Blocking.
///
/// # Errors
/// When a disk's device is none, or the store cannot be written.
pub fn run(word: &str, place: &str) -> io::Result<()> {
    if word != "add" {
        return Ok(());
    }
    let device = store(&["xenstore-read", &format!("{place}/params")])?;
    let numbers = numbers(Path::new(&device))?;
    store(&[
        "xenstore-write",
        &format!("{place}/physical-device"),
        &numbers,
        &format!("{place}/hotplug-status"),
        "connected",
    ])
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_block_device_is_refused_and_cards_need_nothing() {
        for odd in ["/dev/null", "/", "/no/such/thing"] {
            assert!(numbers(Path::new(odd)).is_err(), "{odd}");
        }
        for word in ["online", "offline", "remove"] {
            run(word, "/nowhere").unwrap();
        }
    }
}
