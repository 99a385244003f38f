//! Sends a Xen domain, or lets a suspended one run on, by calls of libxl's that Xen's own `xl` does not offer.
//!
//! ```text
//! supercloud-xen LIBRARY LOCK send DOMAIN live|still   the domain's stream goes to standard output; it stays suspended
//! supercloud-xen LIBRARY LOCK resume DOMAIN
//! ```
//!
//! Xen's tools call it as well, as the script of disks and cards ([`hotplug`]).
//!
//! `LIBRARY` is libxl's name, `libxenlight.so.4.17`; `LOCK` a file that it holds locked: one at a time does something of this to a domain
//! (exit status 75 when another one does). How far it is, and why it failed, is told on standard error, a line each.

use std::{path::Path, process::ExitCode};

use supercloud_xen::{BUSY, hotplug, libxl::Libxl, turn};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    if let ([word @ ("add" | "remove" | "online" | "offline"), ..], Ok(place)) =
        (words.as_slice(), std::env::var("XENBUS_PATH"))
    {
        return match hotplug::run(word, &place) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("supercloud-xen: {place}: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let (library, lock, domain, how) = match words.as_slice() {
        [library, lock, "send", domain, how @ ("live" | "still")] => (library, lock, domain, Some(*how == "live")),
        [library, lock, "resume", domain] => (library, lock, domain, None),
        _ => {
            eprintln!("supercloud-xen: this is a program of the agent's");
            return ExitCode::from(2);
        }
    };
    // The first domain is this host itself.
    let Some(domain) = domain.parse().ok().filter(|domain| *domain > 0) else {
        eprintln!("supercloud-xen: '{domain}' is no guest's domain");
        return ExitCode::from(2);
    };
    let turn = match turn::take(Path::new(lock))
        .and_then(|turn| turn.map(|turn| turn.hand_down().map(|()| turn)).transpose())
    {
        Ok(Some(turn)) => turn,
        Ok(None) => {
            eprintln!("supercloud-xen: domain {domain} is being sent, or let run on, by another one");
            return ExitCode::from(BUSY);
        }
        Err(error) => {
            eprintln!("supercloud-xen: cannot lock {lock}: {error}");
            return ExitCode::FAILURE;
        }
    };
    let done = Libxl::begin(library).and_then(|libxl| match how {
        Some(is_live) => libxl.send(domain, libc::STDOUT_FILENO, is_live),
        None => libxl.resume(domain),
    });
    drop(turn);
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("supercloud-xen: {error}");
            ExitCode::FAILURE
        }
    }
}
