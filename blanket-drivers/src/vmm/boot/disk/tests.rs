//! Disks made with `mke2fs`, good ones and spoiled ones.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use proptest::prelude::*;

use super::*;

/// A file system with these files in it; `None` where the tool is missing.
fn system(files: &[(&str, &[u8])], kib: u32) -> Option<Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    for (path, bytes) in files {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match bytes.strip_prefix(b"-> ") {
            Some(target) => std::os::unix::fs::symlink(std::str::from_utf8(target).unwrap(), &path).unwrap(),
            None => fs::write(&path, bytes).unwrap(),
        }
    }
    let image = folder.path().join("image");
    let tool = ["/sbin/mke2fs", "/usr/sbin/mke2fs"].into_iter().find(|tool| Path::new(tool).exists());
    let Some(tool) = tool else {
        println!("SKIPPED: no mke2fs here");
        return None;
    };
    let mut command = Command::new(tool);
    let made = command.args(["-q", "-F", "-t", "ext4", "-d"]).arg(&tree).arg(&image).arg(format!("{kib}K"));
    assert!(made.stdout(Stdio::null()).status().unwrap().success());
    Some(fs::read(image).unwrap())
}

/// A disk whose second partition this is.
fn partitioned(system: &[u8]) -> Vec<u8> {
    let mut disk = vec![0; (1 << 20) + system.len()];
    disk[512..520].copy_from_slice(b"EFI PART");
    disk[512 + 72] = 2;
    disk[512 + 80] = 4;
    disk[512 + 84] = 128;
    let last = (disk.len() as u64) / 512 - 1;
    for (index, (first, last)) in [(34u64, 2047u64), (2048, last)].into_iter().enumerate() {
        let at = 1024 + 128 * index;
        disk[at] = 1;
        disk[at + 32..at + 40].copy_from_slice(&first.to_le_bytes());
        disk[at + 40..at + 48].copy_from_slice(&last.to_le_bytes());
    }
    disk[1 << 20..].copy_from_slice(system);
    disk
}

fn all(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

const CONFIG: &[u8] =
    b"set default=0\nmenuentry 'Debian' {\n  linux /vmlinuz root=LABEL=root ro\n  initrd /a.img /b.img\n}\n";

fn debian() -> Vec<(&'static str, &'static [u8])> {
    const KERNEL: &[u8] = &[7; 300_001];
    vec![
        ("boot/grub/grub.cfg", CONFIG),
        ("vmlinuz", b"-> boot/vmlinuz-6.1"),
        ("boot/vmlinuz-6.1", KERNEL),
        ("a.img", b"first"),
        ("b.img", b"second"),
    ]
}

#[test]
fn what_a_disk_boots_is_found_on_it() {
    let Some(root) = system(&debian(), 4096) else { return };
    for disk in [root.clone(), partitioned(&root)] {
        let found = files(disk).unwrap();
        assert_eq!(all(&found.kernel), [7; 300_001]);
        assert_eq!(all(&found.initrd.unwrap()), b"first\0\0\0second\0\0");
        assert_eq!(found.cmdline, "root=LABEL=root ro");
    }
    // A partition for /boot, with loader entries; and none of either.
    let entry = b"title F\nlinux /vmlinuz-9\noptions root=/dev/vda2\n";
    let boot = [("grub2/grub.cfg", &b"blscfg\n"[..]), ("loader/entries/x-9.conf", entry), ("vmlinuz-9", b"nine")];
    let found = files(partitioned(&system(&boot, 4096).unwrap())).unwrap();
    assert_eq!((all(&found.kernel).as_slice(), found.cmdline.as_str()), (&b"nine"[..], "root=/dev/vda2"));
    assert!(found.initrd.is_none());
    let said = files(partitioned(&system(&[("etc/fstab", b"")], 4096).unwrap())).unwrap_err().to_string();
    assert!(said.contains("1048576") && said.contains("GRUB"), "{said}");
    let said = files(vec![0; 1 << 20]).unwrap_err().to_string();
    assert!(said.contains("ext4"), "{said}");
    let mut missing = debian();
    missing.retain(|(path, _)| *path != "b.img");
    let said = files(system(&missing, 4096).unwrap()).unwrap_err().to_string();
    assert!(said.contains("/b.img"), "{said}");
}

/// A disk that cannot be read from some place on.
struct Failing(Vec<u8>, u64);

impl ReadAt for Failing {
    fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if offset + buffer.len() as u64 > self.1 {
            Err(io::ErrorKind::NotConnected.into())
        } else {
            self.0.read_at(offset, buffer)
        }
    }
}

#[test]
fn a_disk_that_cannot_be_read_is_not_one_without_a_kernel() {
    let Some(root) = system(&debian(), 4096) else { return };
    for most in [0, 512 << 10, 1 << 20, (1 << 20) + (100 << 10)] {
        let said = files(Failing(partitioned(&root), most)).unwrap_err();
        assert!(matches!(said, BootError::Read { .. }), "{most}: {said}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// A disk that its guest has spoiled is an error, or boots something; it does not panic.
    #[test]
    fn no_disk_does_harm(places in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40), head in 0usize..3) {
        thread_local!(static ROOT: Option<Vec<u8>> = system(&debian(), 2048));
        let Some(mut disk) = ROOT.with(Clone::clone) else { return Ok(()) };
        // Metadata lie at the beginning.
        let range = [2048, 64 << 10, disk.len()][head];
        for (place, byte) in places {
            disk[place.index(range)] = byte;
        }
        let _ = files(disk);
    }
}
