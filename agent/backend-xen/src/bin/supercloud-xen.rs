//! Sends a Xen domain, or lets a suspended one run on, by calls of libxl's that Xen's own `xl` does not offer.
//!
//! ```text
//! supercloud-xen LIBRARY send DOMAIN live|still   the domain's stream goes to standard output; it stays suspended
//! supercloud-xen LIBRARY resume DOMAIN
//! ```
//!
//! `LIBRARY` is libxl's name, `libxenlight.so.4.17`. How far it is, and why it failed, is told on standard error, a line each.

use std::process::ExitCode;

use supercloud_xen::libxl::Libxl;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (library, domain, how) = match words.as_slice() {
        [library, "send", domain, how @ ("live" | "still")] => (library, domain, Some(*how == "live")),
        [library, "resume", domain] => (library, domain, None),
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
    let done = Libxl::begin(library).and_then(|libxl| match how {
        Some(is_live) => libxl.send(domain, libc::STDOUT_FILENO, is_live),
        None => libxl.resume(domain),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("supercloud-xen: {error}");
            ExitCode::FAILURE
        }
    }
}
