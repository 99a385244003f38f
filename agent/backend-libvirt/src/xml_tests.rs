use std::path::PathBuf;

use supercloud_blanket::{
    CompatClass, MachineSpec,
    device::{GuestDevices, Mac},
    host::{HostArgs, NbdSocket},
};
use supercloud_ids::{Epoch, GuestId};

use super::*;
use crate::metadata::Role;

fn launch() -> Launch {
    let guest: GuestId = "gst-0192d6a0-0000-7000-8000-000000000001".parse().unwrap();
    let disk = |name: &str, is_read_only| Disk { name: name.to_owned(), is_read_only };
    let nbd = |socket: &str, export: &str| NbdSocket { socket: PathBuf::from(socket), export: export.to_owned() };
    Launch {
        guest,
        epoch: Epoch(3),
        spec: MachineSpec {
            class: CompatClass {
                back_end: BACK_END.to_owned(),
                accelerator: "tcg".to_owned(),
                machine_version: "pc-i440fx-7.2".to_owned(),
                cpu_baseline: "qemu64".to_owned(),
            },
            vcpus: 2,
            memory_bytes: 256 << 20,
            boot: Boot::Kernel { has_initrd: true, cmdline: "console=ttyS0 a=\"<&>'\"".to_owned() },
            clock: Clock::Utc,
            devices: GuestDevices {
                disks: vec![disk("root", false), disk("seed", true)],
                nics: vec![Nic { name: "eth0".to_owned(), mac: Mac([0x52, 0x54, 0, 0xaa, 0xbb, 0xcc]), mtu: 1450 }],
                console: Console::Serial,
                has_rng: true,
                has_balloon: true,
            },
        },
        host: HostArgs {
            kernel: Some("/g/vmlinuz".into()),
            initrd: Some("/g/initrd".into()),
            disks: [
                ("root".to_owned(), nbd("/run/g/root.sock", "")),
                ("seed".to_owned(), nbd("/run/g/seed.sock", "a&b")),
            ]
            .into(),
            taps: [("eth0".to_owned(), "sct0".to_owned())].into(),
            console_socket: Some("/run/g/console.sock".into()),
            console_log: Some("/log/g/console.log".into()),
        },
    }
}

fn mark(launch: &Launch, role: Role) -> Mark {
    Mark { guest: launch.guest, epoch: launch.epoch, role }
}

fn rendered(launch: &Launch) -> String {
    render(launch, &mark(launch, Role::Owner))
}

/// Set `BLESS=1` to write the golden files anew; then read the difference.
fn is_golden(name: &str, text: &str) {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("BLESS").is_some() {
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, text).unwrap();
    }
    let golden = std::fs::read_to_string(&file).unwrap();
    assert_eq!(text, golden, "{} differs; BLESS=1 writes it anew", file.display());
}

#[test]
fn a_kernel_guest_under_tcg() {
    is_golden("kernel-tcg.xml", &rendered(&launch()));
}

#[test]
fn a_disk_guest_under_kvm_with_a_virtio_console_and_without_extras() {
    let mut launch = launch();
    launch.spec.class.accelerator = "kvm".to_owned();
    launch.spec.class.cpu_baseline = "Nehalem".to_owned();
    launch.spec.boot = Boot::Disk;
    launch.spec.devices.console = Console::Virtio;
    launch.spec.devices.has_rng = false;
    launch.spec.devices.has_balloon = false;
    launch.spec.devices.nics.clear();
    launch.host.console_socket = None;
    is_golden("disk-kvm.xml", &rendered(&launch));
}

#[test]
fn memory_is_odd_under_tcg_only() {
    let mut launch = launch();
    for mib in [64, 192, 256, 1024, 4096] {
        launch.spec.memory_bytes = mib << 20;
        let text = rendered(&launch);
        let bytes: u64 =
            text.split("supercloud.ram,size=").nth(1).unwrap().split('\'').next().unwrap().parse().unwrap();
        assert!(!bytes.is_multiple_of(64 * 4096) && bytes.is_multiple_of(8192), "{bytes}");
        assert!(text.contains(&format!("'size={}k'", bytes / 1024)));
    }
    launch.spec.class.accelerator = "kvm".to_owned();
    assert!(!rendered(&launch).contains("qemu:"));
}

/// What the guest sees must not depend on the host: all that may differ is the host's own paths and names.
#[test]
fn two_hosts_render_the_same_machine() {
    let here = launch();
    let mut there = here.clone();
    for nbd in there.host.disks.values_mut() {
        nbd.socket = PathBuf::from("/elsewhere").join(nbd.socket.file_name().unwrap());
    }
    there.host.taps.insert("eth0".to_owned(), "othertap".to_owned());
    there.host.console_socket = Some("/elsewhere/console.sock".into());
    there.host.console_log = Some("/elsewhere/console.log".into());
    there.epoch = Epoch(4);
    let plain = |text: String| {
        text.lines()
            .filter(|line| !line.contains("<metadata>"))
            .map(|line| line.replace("/elsewhere", "/run/g").replace("/log/g", "/run/g").replace("othertap", "sct0"))
            .collect::<Vec<_>>()
    };
    assert_eq!(plain(rendered(&here)), plain(render(&there, &mark(&there, Role::Incoming))));
}

#[test]
fn one_disk_more_does_not_move_the_other_devices() {
    let two = launch();
    let mut one = two.clone();
    one.spec.devices.disks.truncate(1);
    let slots =
        |text: &str| text.lines().filter(|line| line.contains("type='pci'")).map(str::to_owned).collect::<Vec<_>>();
    let (two, one) = (slots(&rendered(&two)), slots(&rendered(&one)));
    assert!(one.iter().all(|line| two.contains(line)));
    assert_eq!(two.len(), one.len() + 1);
}

#[test]
fn every_full_machine_has_a_slot_for_each_device() {
    let mut launch = launch();
    launch.spec.devices.console = Console::Virtio;
    launch.spec.devices.disks = (0..8).map(|n| Disk { name: format!("d{n}"), is_read_only: false }).collect();
    launch.spec.devices.nics =
        (0..8).map(|n| Nic { name: format!("n{n}"), mac: Mac([2, 0, 0, 0, 0, n]), mtu: 1450 }).collect();
    launch.host.disks = (0..8)
        .map(|n| (format!("d{n}"), NbdSocket { socket: format!("/run/{n}.sock").into(), export: String::new() }))
        .collect();
    launch.host.taps = (0..8).map(|n| (format!("n{n}"), format!("tap{n}"))).collect();
    check(&launch).unwrap();
    let text = rendered(&launch);
    let mut slots: Vec<&str> = text.split("slot='").skip(1).map(|rest| &rest[..4]).collect();
    assert_eq!(slots.len(), 19);
    slots.sort_unstable();
    slots.dedup();
    assert_eq!(slots.len(), 19);
}

#[test]
fn what_is_lacking_is_refused_by_name() {
    let refusal = |spoil: fn(&mut Launch)| {
        let mut launch = launch();
        spoil(&mut launch);
        check(&launch).unwrap_err().to_string()
    };
    assert!(refusal(|l| l.spec.class.back_end = "kvm".to_owned()).contains("back end 'kvm'"));
    assert!(refusal(|l| l.spec.class.accelerator = "xen".to_owned()).contains("accelerator 'xen'"));
    assert!(refusal(|l| l.spec.class.machine_version = "pc-q35-7.2".to_owned()).contains("pc-q35-7.2"));
    assert!(matches!(
        check(&{
            let mut l = launch();
            l.host.taps.clear();
            l
        }),
        Err(BackendError::Spec(_))
    ));
}

/// Seeded noise in every text that reaches the XML: whatever passes the checks stays inside its quotes.
#[test]
fn no_text_breaks_out_of_its_place() {
    const SEED: u64 = 0x5eed_0001;
    println!("seed {SEED:#x}");
    let mut state = SEED;
    let mut next = move || {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    const ALPHABET: &[char] =
        &['a', '\'', '"', '<', '>', '&', '/', ' ', '\n', '\0', ']', '-', '=', 'é', ';', '\u{fffe}'];
    let shape = |text: &str| (text.matches('<').count(), text.matches('\'').count(), text.matches('"').count());
    let want = shape(&rendered(&launch()));
    let mut passed = 0;
    for _ in 0..2000 {
        let mut noise = String::new();
        for _ in 0..next() % 12 {
            noise.push(ALPHABET[usize::try_from(next()).unwrap_or(0) % ALPHABET.len()]);
        }
        let mut l = launch();
        match next() % 5 {
            0 => l.spec.boot = Boot::Kernel { has_initrd: true, cmdline: noise },
            1 => l.host.kernel = Some(format!("/{noise}").into()),
            2 => l.host.disks.get_mut("seed").unwrap().export = format!("x{noise}"),
            3 => l.spec.class.cpu_baseline = noise,
            _ => l.host.console_log = Some(format!("/{noise}").into()),
        }
        if check(&l).is_ok() {
            passed += 1;
            assert_eq!(shape(&rendered(&l)), want, "{l:?}");
        }
    }
    assert!(passed > 100, "only {passed} passed the checks");
}

#[test]
fn a_thawed_guest_has_the_memory_that_it_was_frozen_with() {
    let launch = launch();
    let mark = Mark { guest: launch.guest, epoch: Epoch(3), role: Role::Arrived };
    let text = render(&launch, &mark);
    let said = |saved: &str| {
        let text = with_current_memory(text.clone(), saved);
        let (_, rest) = text.split_once("<currentMemory").unwrap();
        let (element, rest) = rest.split_once("</currentMemory>").unwrap();
        assert!(!rest.contains("currentMemory") && rest.ends_with("</domain>\n"));
        element.to_owned()
    };
    let usual = format!(" unit='bytes'>{}", launch.spec.memory_bytes);
    assert_eq!(said("<domain><currentMemory unit='KiB'>131064</currentMemory></domain>"), " unit='KiB'>131064");
    for strange in
        ["", "<currentMemory", "<currentMemory unit='KiB'>x</currentMemory>", "<currentMemory>5</currentMemory>"]
    {
        assert_eq!(said(strange), usual, "{strange}");
    }
}
