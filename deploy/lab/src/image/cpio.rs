//! Writes a cpio archive in the `newc` format that the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::fmt::Write as _;

/// An archive being written.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

impl Archive {
    /// Adds a folder.
    pub fn folder(&mut self, path: &str) {
        self.entry(path, FOLDER, (0, 0), &[]);
    }

    /// Adds a file, which may be run.
    pub fn file(&mut self, path: &str, content: &[u8]) {
        self.entry(path, PROGRAM, (0, 0), content);
    }

    /// Adds a character device.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, CHARACTER_DEVICE, (major, minor), &[]);
    }

    /// The whole archive.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        let mut head = String::from("070701");
        // inode, mode, uid, gid, links, time, size, device of the file (2), device that it is (2), length of name, sum
        for field in [self.inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0] {
            // Writing to a string cannot fail.
            let _ = write!(head, "{field:08x}");
        }
        self.bytes.extend(head.as_bytes());
        self.bytes.extend(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Run;

    #[test]
    fn another_program_reads_it() {
        let mut archive = Archive::default();
        archive.folder("dev");
        archive.device("dev/console", 5, 1);
        archive.file("init", b"#!/bin/sh\n");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let path = std::env::temp_dir().join(format!("sc-cpio-{}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        match Run::line("cpio -itv").stdin(std::fs::File::open(&path).unwrap()).text() {
            Ok(list) => {
                assert!(list.lines().any(|line| line.starts_with("drwxr-xr-x") && line.ends_with(" dev")), "{list}");
                assert!(list.lines().any(|line| line.starts_with("crw-------") && line.contains("5,   1")), "{list}");
                assert!(list.lines().any(|line| line.starts_with("-rwxr-xr-x") && line.contains(" 10 ")), "{list}");
            }
            Err(error) => crate::require::skip(&error.to_string()),
        }
        std::fs::remove_file(path).unwrap();
    }
}
