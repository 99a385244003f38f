//! What a lab consists of at an instant, to be compared with another: nothing may be left behind by what came between.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use crate::command::{pause, wait_for};
use crate::lab::Lab;
use crate::netns;
use crate::site::Site;

/// How long short-lived helpers may take to end.
pub const SETTLE_BUDGET: Duration = Duration::from_secs(10);

/// Deepest folder looked into for sockets.
const DEPTH: usize = 8;

/// Things of a lab, each with how often it is there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    things: BTreeMap<String, usize>,
}

impl Snapshot {
    /// Looks at everything that a running guest or a move could leave behind.
    #[must_use]
    pub fn take(lab: &Lab) -> Self {
        let mut snapshot = Self::default();
        for name in netns::list(&lab.index().namespace_prefix()) {
            snapshot.add(format!("namespace {name}"));
        }
        for site in lab.sites() {
            snapshot.add_site(&site);
        }
        snapshot
    }

    /// Looks until two looks in a row agree: daemons run short-lived helpers now and then.
    #[must_use]
    pub fn settled(lab: &Lab) -> Self {
        let mut last = Self::take(lab);
        // A lab that never rests is compared as it is.
        let _ = wait_for(SETTLE_BUDGET, || {
            pause(Duration::from_millis(100));
            let next = Self::take(lab);
            let before = std::mem::replace(&mut last, next);
            (before == last).then_some(())
        });
        last
    }

    fn add(&mut self, thing: String) {
        *self.things.entry(thing).or_default() += 1;
    }

    fn add_site(&mut self, site: &Site) {
        let name = &site.name;
        for process in site.processes() {
            // A restarted daemon is the same thing with another pid; its role is its first argument that is a word.
            let arguments = process.arguments();
            if arguments.is_empty() {
                // Between two programs, or ending.
                continue;
            }
            let role = arguments
                .get(1)
                .filter(|arg| arg.chars().all(|c| c.is_ascii_lowercase() || c == '-') && !arg.starts_with('-'));
            let role = role.map(|role| format!(" {role}")).unwrap_or_default();
            self.add(format!("{name}: process {}{role}", process.program()));
        }
        for link in site.links().unwrap_or_default() {
            self.add(format!("{name}: interface {link}"));
        }
        for folder in ["run", "lib-supercloud", "lib-libvirt"] {
            self.add_sockets(name, &site.dir, &site.dir.join(folder), DEPTH);
        }
        let quick = Duration::from_secs(10);
        let ask = |argv: &[&str]| site.run(argv, quick).ok().and_then(|run| run.text().ok()).unwrap_or_default();
        if site.links().is_ok_and(|links| links.iter().any(|link| link == "br-phy")) {
            for bridge in ask(&["ovs-vsctl", "--timeout=5", "list-br"]).lines() {
                for port in ask(&["ovs-vsctl", "--timeout=5", "list-ports", bridge]).lines() {
                    self.add(format!("{name}: switch port {bridge}/{port}"));
                }
                for kind in ["dump-flows", "dump-groups", "dump-meters"] {
                    for line in ask(&["ovs-ofctl", "-OOpenFlow13", "--no-stats", kind, bridge]).lines() {
                        let line = line.trim();
                        if !line.starts_with("OFPST_") && !line.is_empty() {
                            self.add(format!("{name}: {} {bridge} {line}", kind.trim_start_matches("dump-")));
                        }
                    }
                }
            }
        }
    }

    fn add_sockets(&mut self, site: &str, root: &Path, folder: &Path, depth: usize) {
        let Ok(entries) = fs::read_dir(folder) else { return };
        for entry in entries.flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            let path = entry.path();
            if kind.is_dir() && depth > 0 {
                self.add_sockets(site, root, &path, depth - 1);
            } else if kind.is_socket() {
                let path = path.strip_prefix(root).unwrap_or(&path).display().to_string();
                // Control sockets of the switch's daemons carry their pid, which changes with a restart.
                if !path.starts_with("run/openvswitch/") || !path.ends_with(".ctl") {
                    self.add(format!("{site}: socket {}", without_run_number(&path)));
                }
            }
        }
    }

    /// What `later` has more ("left: ...") or less ("missing: ...") than this.
    #[must_use]
    pub fn differences(&self, later: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        for (thing, count) in &later.things {
            let before = self.things.get(thing).copied().unwrap_or(0);
            lines.extend((before..*count).map(|_| format!("left: {thing}")));
        }
        for (thing, count) in &self.things {
            let now = later.things.get(thing).copied().unwrap_or(0);
            lines.extend((now..*count).map(|_| format!("missing: {thing}")));
        }
        lines
    }
}

/// A path without the number that libvirtd gives a guest anew each time it comes to the host: `…/domain-7-<guest>/…`.
fn without_run_number(path: &str) -> String {
    let shorten = |part: &str| match part.strip_prefix("domain-").and_then(|rest| rest.split_once('-')) {
        Some((number, guest)) if number.parse::<u32>().is_ok() => format!("domain-{guest}"),
        _ => part.to_owned(),
    };
    path.split('/').map(shorten).collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_came_back_is_the_same_guest() {
        let at = |number: u32| format!("lib-libvirt/qemu/domain-{number}-gst-01/monitor.sock");
        assert_eq!(without_run_number(&at(2)), without_run_number(&at(17)));
        assert_ne!(without_run_number(&at(2)), without_run_number(&at(2).replace("gst-01", "gst-02")));
        assert_eq!(without_run_number("run/domain-x-1/domain"), "run/domain-x-1/domain");
    }

    #[test]
    fn differences_count_both_ways() {
        let of = |things: &[&str]| {
            let mut snapshot = Snapshot::default();
            things.iter().for_each(|thing| snapshot.add((*thing).to_owned()));
            snapshot
        };
        assert!(of(&["a", "b"]).differences(&of(&["b", "a"])).is_empty());
        assert_eq!(of(&["a", "b"]).differences(&of(&["a", "a", "c"])), ["left: a", "left: c", "missing: b"]);
    }
}
