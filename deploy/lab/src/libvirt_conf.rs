//! The configuration of a lab host's libvirtd.
//!
//! No TCP listener (design: agents carry the streams), no cgroups and no mount namespaces of its own: it runs in namespaces
//! of the lab. QEMU runs as an unprivileged user with its seccomp filter, as it does on a host of Debian's. The host's UUID is set because without DMI libvirt
//! takes a random one, and because it refuses a migration between two hosts of one UUID.

use crate::addressing::LabIndex;

/// Account files of a site: (below the site's folder, where, lines added when their name is not there).
///
/// libvirtd ends at its start when the account `libvirt-qemu` does not exist, even if its configuration names another; the
/// package that makes it (libvirt-daemon-system) wants polkit and systemd, so a site gets it in files of its own. So it does
/// with the volume processes' user, which systemd-sysusers makes on a real host.
pub const ACCOUNTS: [(&str, &str, &[&str]); 2] = [
    (
        "passwd",
        "/etc/passwd",
        &[
            "libvirt-qemu:x:64055:64055:Libvirt Qemu:/var/lib/libvirt:/usr/sbin/nologin",
            "supercloud-volume:x:64058:64058:Supercloud volume processes:/nonexistent:/usr/sbin/nologin",
        ],
    ),
    ("group", "/etc/group", &["libvirt-qemu:x:64055:", "libvirt:x:64057:", "supercloud-volume:x:64058:"]),
];

/// The text of an account file with the lines added whose name is not there yet.
#[must_use]
pub fn with_accounts(mut text: String, more: &[&str]) -> String {
    for line in more {
        let name = &line[..=line.find(':').unwrap_or(0)];
        if !text.lines().any(|known| known.starts_with(name)) {
            if !text.is_empty() && !text.ends_with('\n') {
                text.push('\n');
            }
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

/// The text of a group file with `user` in the group of number `gid`, which is added as `name` when it is not there.
///
/// Debian's package puts libvirt-qemu into the group of /dev/kvm. A libvirtd whose QEMU may not open it although it found it usable
/// holds what it knows of QEMU for outdated and asks QEMU anew, seconds each time, whenever it starts a guest
/// (`virQEMUCapsIsValid`).
#[must_use]
pub fn with_member(text: &str, name: &str, gid: u32, user: &str) -> String {
    let number = gid.to_string();
    let mut is_there = false;
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    for line in lines.iter_mut().filter(|line| line.split(':').nth(2) == Some(&number)) {
        is_there = true;
        let members = line.rsplit(':').next().unwrap_or_default();
        if !members.split(',').any(|member| member == user) {
            let comma = if members.is_empty() { "" } else { "," };
            *line = format!("{line}{comma}{user}");
        }
    }
    if !is_there {
        lines.push(format!("{name}:x:{gid}:{user}"));
    }
    lines.join("\n") + "\n"
}

/// The files below /etc/libvirt: (path, text).
#[must_use]
pub fn files(index: LabIndex, site: u8) -> Vec<(&'static str, String)> {
    let uuid = format!("5c4c0000-0000-4000-8{:03x}-{:012x}", index.get(), site);
    let libvirtd = format!(
        "listen_tls = 0\n\
         listen_tcp = 0\n\
         auth_unix_ro = \"none\"\n\
         auth_unix_rw = \"none\"\n\
         unix_sock_group = \"root\"\n\
         unix_sock_ro_perms = \"0700\"\n\
         unix_sock_rw_perms = \"0700\"\n\
         host_uuid = \"{uuid}\"\n\
         log_outputs = \"2:file:/var/log/libvirt/libvirtd.log\"\n\
         max_clients = 200\n"
    );
    // Users, ownership and sandbox as Debian's package sets them up.
    let qemu = "user = \"libvirt-qemu\"\n\
                group = \"libvirt-qemu\"\n\
                dynamic_ownership = 1\n\
                remember_owner = 1\n\
                seccomp_sandbox = 1\n\
                security_driver = \"none\"\n\
                cgroup_controllers = []\n\
                namespaces = []\n\
                stdio_handler = \"file\"\n";
    let mut files = vec![("libvirtd.conf", libvirtd), ("qemu.conf", qemu.to_owned())];
    files.extend(["libvirt.conf", "virtlogd.conf", "virtlockd.conf"].map(|name| (name, String::new())));
    // libvirtd looks into these folders at its start.
    files.extend(
        ["hooks/.keep", "nwfilter/.keep", "qemu/.keep", "storage/.keep", "secrets/.keep"]
            .map(|path| (path, String::new())),
    );
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_added_once() {
        let once = with_accounts("root:x:0:0::/root:/bin/sh".to_owned(), ACCOUNTS[0].2);
        assert_eq!(once.lines().count(), 1 + ACCOUNTS[0].2.len());
        assert!(once.lines().any(|line| line.starts_with("supercloud-volume:x:64058:")));
        assert_eq!(with_accounts(once.clone(), ACCOUNTS[0].2), once);
    }

    #[test]
    fn members_are_added_once() {
        for (before, after) in [
            ("root:x:0:\n", "root:x:0:\nkvm:x:110:q\n"),
            ("virt:x:110:\nroot:x:0:", "virt:x:110:q\nroot:x:0:\n"),
            ("kvm:x:110:other", "kvm:x:110:other,q\n"),
        ] {
            assert_eq!(with_member(before, "kvm", 110, "q"), after);
            assert_eq!(with_member(after, "kvm", 110, "q"), after);
        }
    }

    #[test]
    fn hosts_have_different_uuids() {
        let text = |index, site| files(LabIndex::new(index).unwrap(), site)[0].1.clone();
        assert!(text(1, 1).contains("host_uuid = \"5c4c0000-0000-4000-8001-000000000001\""));
        assert_ne!(text(1, 1), text(1, 2));
        assert_ne!(text(1, 1), text(2, 1));
    }
}
