//! The configuration of a guest's domain (xl.cfg(5)): a pure function of what it sees and of what this host gives.
//!
//! A guest finds its disks as `/dev/xvda`, `/dev/xvdb`, ... and its console as `hvc0`; a command line that names the disks and the serial
//! port of the other back ends' machines is put into these words, so that one image boots on all.

use std::{collections::BTreeMap, fmt::Write as _, path::Path};

use supercloud_blanket::{
    BackendError, BackendResult, CompatClass, Launch,
    device::{Boot, Clock},
};

use crate::BACK_END;

/// What this back end lacks of a launch, refused by name.
///
/// # Errors
/// The first thing that is wrong or lacking.
pub fn check(launch: &Launch, class: &CompatClass) -> BackendResult<()> {
    launch.check()?;
    let lacks = |option: String| Err(BackendError::Unsupported { back_end: BACK_END, option });
    let spec = &launch.spec;
    if spec.class != *class {
        return lacks(format!("class '{}'; it has {class} here", spec.class));
    }
    if spec.devices.has_balloon {
        return lacks("a virtio memory balloon".to_owned());
    }
    if spec.devices.has_rng {
        return lacks("a virtio entropy source".to_owned());
    }
    match &spec.boot {
        Boot::Disk => lacks("booting from a disk; give the image a kernel".to_owned()),
        Boot::Kernel { cmdline, .. } if quoted(&command_line(cmdline)).is_none() => {
            lacks("a command line with backslashes, or with both kinds of quotes".to_owned())
        }
        Boot::Kernel { .. } => Ok(()),
    }
}

/// A string as xl's configuration has it; `None` where it cannot have it.
fn quoted(text: &str) -> Option<String> {
    let quote = ['"', '\''].into_iter().find(|quote| !text.contains(*quote))?;
    let is_plain = text.bytes().all(|byte| (0x20..0x7f).contains(&byte) && byte != b'\\');
    is_plain.then(|| format!("{quote}{text}{quote}"))
}

/// The same words for a paravirtual machine: `root=/dev/vda1` is `/dev/xvda1`, and the last console is Xen's.
fn command_line(text: &str) -> String {
    let words = text.split(' ').map(|word| match word.strip_prefix("root=/dev/vd") {
        Some(rest) => format!("root=/dev/xvd{rest}"),
        None => word.to_owned(),
    });
    let mut line = words.collect::<Vec<_>>().join(" ");
    line.push_str(" console=hvc0");
    line
}

/// The configuration of a checked launch, with its disks' block devices by name, and our program, which is called for each device.
pub fn render(launch: &Launch, disks: &BTreeMap<String, u32>, program: &Path) -> String {
    let script = program.display();
    let spec = &launch.spec;
    let path =
        |path: &Option<std::path::PathBuf>| path.as_deref().map(Path::to_string_lossy).unwrap_or_default().into_owned();
    let mut text = String::with_capacity(1024);
    let mut line = |key: &str, value: &str| {
        // Writing into a string does not fail.
        let _ = writeln!(text, "{key} = {value}");
    };
    let string = |text: &str| quoted(text).unwrap_or_else(|| "\"\"".to_owned());
    line("name", &string(&launch.guest.to_string()));
    line("uuid", &string(&launch.guest.uuid().to_string()));
    line("type", "\"pv\"");
    line("vcpus", &spec.vcpus.to_string());
    line("memory", &(spec.memory_bytes >> 20).to_string());
    match spec.clock {
        Clock::Utc => line("localtime", "0"),
    }
    if let Boot::Kernel { has_initrd, cmdline } = &spec.boot {
        line("kernel", &string(&path(&launch.host.kernel)));
        if *has_initrd {
            line("ramdisk", &string(&path(&launch.host.initrd)));
        }
        line("cmdline", &string(&command_line(cmdline)));
    }
    let disk = |(index, disk): (usize, &supercloud_blanket::device::Disk)| {
        let letter = char::from(b'a' + u8::try_from(index).unwrap_or(25));
        let access = if disk.is_read_only { "ro" } else { "rw" };
        let device = disks.get(&disk.name)?;
        Some(format!(
            "\"format=raw,vdev=xvd{letter},access={access},backendtype=phy,script={script},target=/dev/nbd{device}\""
        ))
    };
    let all: Vec<String> = spec.devices.disks.iter().enumerate().filter_map(disk).collect();
    line("disk", &format!("[{}]", all.join(", ")));
    let all: Vec<String> =
        spec.devices.nics.iter().map(|nic| format!("\"mac={},type=vif,script={script}\"", nic.mac)).collect();
    line("vif", &format!("[{}]", all.join(", ")));
    // Who looks after domains here decides what becomes of one that stands still.
    for event in ["on_poweroff", "on_reboot", "on_watchdog", "on_crash"] {
        line(event, "\"preserve\"");
    }
    text
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use supercloud_blanket::{
        HostArgs, MachineSpec,
        device::{Console, Disk, GuestDevices, Mac, Nic},
        host::NbdSocket,
    };
    use supercloud_ids::{Epoch, GuestId};

    pub fn class() -> CompatClass {
        CompatClass {
            back_end: BACK_END.to_owned(),
            accelerator: "pv".to_owned(),
            machine_version: "1".to_owned(),
            cpu_baseline: "host-1".to_owned(),
        }
    }

    pub fn launch() -> Launch {
        let disks = [("disk0", false), ("seed", true)];
        let socket = |name: &str| NbdSocket { socket: format!("/run/{name}").into(), export: String::new() };
        Launch {
            guest: GuestId::generate(),
            epoch: Epoch(3),
            spec: MachineSpec {
                class: class(),
                vcpus: 2,
                memory_bytes: 128 << 20,
                boot: Boot::Kernel {
                    has_initrd: true,
                    cmdline: "console=ttyS0 quiet root=/dev/vda rw sc.x=/dev/vdb".to_owned(),
                },
                clock: Clock::Utc,
                devices: GuestDevices {
                    disks: disks.map(|(name, is_read_only)| Disk { name: name.to_owned(), is_read_only }).to_vec(),
                    nics: vec![Nic { name: "net0".to_owned(), mac: Mac([0x52, 0x54, 0, 1, 2, 3]), mtu: 1450 }],
                    console: Console::Serial,
                    has_rng: false,
                    has_balloon: false,
                },
            },
            host: HostArgs {
                kernel: Some("/c/kernel".into()),
                initrd: Some("/c/initrd".into()),
                disks: disks.map(|(name, _)| (name.to_owned(), socket(name))).into(),
                taps: BTreeMap::from([("net0".to_owned(), "sct0".to_owned())]),
                console_socket: Some("/run/c".into()),
                console_log: Some("/run/l".into()),
            },
        }
    }

    #[test]
    fn a_domain_has_the_guests_disks_cards_and_words() {
        let launch = launch();
        check(&launch, &class()).unwrap();
        let disks = BTreeMap::from([("disk0".to_owned(), 4), ("seed".to_owned(), 7)]);
        let expected = format!(
            "name = \"{0}\"\nuuid = \"{1}\"\ntype = \"pv\"\nvcpus = 2\nmemory = 128\nlocaltime = 0\n\
             kernel = \"/c/kernel\"\nramdisk = \"/c/initrd\"\n\
             cmdline = \"console=ttyS0 quiet root=/dev/xvda rw sc.x=/dev/vdb console=hvc0\"\n\
             disk = [\"format=raw,vdev=xvda,access=rw,backendtype=phy,script=/p/x,target=/dev/nbd4\", \
             \"format=raw,vdev=xvdb,access=ro,backendtype=phy,script=/p/x,target=/dev/nbd7\"]\n\
             vif = [\"mac=52:54:00:01:02:03,type=vif,script=/p/x\"]\non_poweroff = \"preserve\"\non_reboot = \"preserve\"\n\
             on_watchdog = \"preserve\"\non_crash = \"preserve\"\n",
            launch.guest,
            launch.guest.uuid()
        );
        assert_eq!(render(&launch, &disks, Path::new("/p/x")), expected);
    }

    #[test]
    fn what_is_lacking_is_refused_by_name() {
        type Spoil = fn(&mut MachineSpec);
        let cases: [(&str, Spoil); 6] = [
            ("class", |s| s.class.back_end = "kvm".to_owned()),
            ("balloon", |s| s.devices.has_balloon = true),
            ("entropy", |s| s.devices.has_rng = true),
            ("disk", |s| s.boot = Boot::Disk),
            ("backslashes", |s| s.boot = Boot::Kernel { has_initrd: false, cmdline: "a\\b".to_owned() }),
            ("quotes", |s| s.boot = Boot::Kernel { has_initrd: false, cmdline: "a='b' c=\"d\"".to_owned() }),
        ];
        for (word, spoil) in cases {
            let mut bad = launch();
            spoil(&mut bad.spec);
            let said = check(&bad, &class()).expect_err(word).to_string();
            assert!(said.contains(word), "{said} should name {word}");
        }
    }

    #[test]
    fn a_string_cannot_end_early() {
        assert_eq!(quoted("a b").as_deref(), Some("\"a b\""));
        assert_eq!(quoted("a \"b").as_deref(), Some("'a \"b'"));
        for bad in ["\"'", "a\nb", "a\\", "ä"] {
            assert_eq!(quoted(bad), None, "{bad}");
        }
    }
}
