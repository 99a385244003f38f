//! Disks that a guest boots from.

use std::{
    io::{Read as _, Seek as _},
    path::Path,
    process::{Command, Stdio},
};

use crate::guest::{TALK, elf};

/// A disk with a configuration of GRUB, this program as its kernel, and this ramdisk; `None` where the tool is missing.
pub fn disk(ramdisk: &str) -> Option<Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    let (tree, image) = (folder.path().join("tree"), folder.path().join("image"));
    std::fs::create_dir_all(tree.join("boot/grub")).unwrap();
    let mut kernel = Vec::new();
    let mut program = elf(TALK);
    program.rewind().unwrap();
    program.read_to_end(&mut kernel).unwrap();
    std::fs::write(tree.join("vmlinuz"), kernel).unwrap();
    std::fs::write(tree.join("initrd.img"), ramdisk).unwrap();
    let config = "menuentry 'TALK' {\n linux /vmlinuz from disk \n initrd /initrd.img\n}\n";
    std::fs::write(tree.join("boot/grub/grub.cfg"), config).unwrap();
    let tool = ["/sbin/mke2fs", "/usr/sbin/mke2fs"].into_iter().find(|tool| Path::new(tool).exists())?;
    let mut command = Command::new(tool);
    let made = command.args(["-q", "-F", "-t", "ext4", "-d"]).arg(&tree).arg(&image).arg("4096K");
    assert!(made.stdout(Stdio::null()).status().unwrap().success());
    Some(std::fs::read(image).unwrap())
}
