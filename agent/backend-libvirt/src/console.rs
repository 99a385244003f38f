//! Keeping a guest's console log bounded.
//!
//! QEMU appends to the log itself (`stdio_handler = "file"`; libvirt's own logging daemon would need another service),
//! and a hostile guest can write without end. QEMU opens the file with `O_APPEND`, so it can be cut under its hands.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

/// Where the older part of a log goes: the same name with `.1`.
#[must_use]
pub fn older_log(log: &Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// Cuts a log that is larger than `max_bytes`: its last `max_bytes` become [`older_log`], and it starts anew. Returns
/// whether it was cut. What is written between reading and cutting is lost. Blocks; call it every few seconds.
///
/// # Errors
/// What the file system says; a log that is not there (yet) is fine.
pub fn trim_log(log: &Path, max_bytes: u64) -> io::Result<bool> {
    let mut file = match OpenOptions::new().read(true).write(true).open(log) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let len = file.metadata()?.len();
    if len <= max_bytes {
        return Ok(false);
    }
    file.seek(SeekFrom::Start(len - max_bytes))?;
    let mut older = File::create(older_log(log))?;
    io::copy(&mut (&mut file).take(max_bytes), &mut older)?;
    file.set_len(0)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_long_log_is_cut_and_its_end_is_kept_while_its_writer_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("console.log");
        assert!(!trim_log(&log, 10).unwrap());
        let mut writer = OpenOptions::new().create(true).append(true).open(&log).unwrap();
        writer.write_all(b"0123456789").unwrap();
        assert!(!trim_log(&log, 10).unwrap());
        writer.write_all(b"abc").unwrap();
        assert!(trim_log(&log, 10).unwrap());
        writer.write_all(b"new").unwrap();
        assert_eq!(std::fs::read(older_log(&log)).unwrap(), b"3456789abc");
        assert_eq!(std::fs::read(&log).unwrap(), b"new");
    }
}
