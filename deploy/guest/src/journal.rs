//! The numbered writes: one record per number, each flushed before the number counts as acknowledged, and the check that none
//! is missing, reading past the page cache.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Bytes of a record: 15 digits and a line end.
const RECORD_BYTES: usize = 16;

/// Block of direct reads.
const DIRECT_BYTES: usize = 4096;

/// The file of numbered records 1, 2, 3, ...
#[derive(Debug)]
pub struct Journal {
    file: File,
    next: u64,
}

/// What a check has found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Records 1..=good are there and right.
    pub good: u64,
    /// Records that are wrong (not counting an unfinished last one).
    pub bad: u64,
}

fn record(number: u64) -> [u8; RECORD_BYTES] {
    let mut bytes = [b'\n'; RECORD_BYTES];
    let text = format!("{number:015}");
    bytes[..RECORD_BYTES - 1].copy_from_slice(&text.as_bytes()[..RECORD_BYTES - 1]);
    bytes
}

impl Journal {
    /// Opens the file and goes on after its last complete record.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
        let records = file.metadata()?.len() / RECORD_BYTES as u64;
        // What a crash left of an unfinished record was never acknowledged.
        file.set_len(records * RECORD_BYTES as u64)?;
        file.seek(SeekFrom::End(0))?;
        // The folder's entry must be as durable as the records.
        if let Some(parent) = path.parent() {
            File::open(parent)?.sync_all()?;
        }
        Ok(Self { file, next: records + 1 })
    }

    /// The last number written by an earlier run.
    pub fn last(&self) -> u64 {
        self.next - 1
    }

    /// Writes the next number and flushes it to the disk; then it is acknowledged.
    pub fn append(&mut self) -> io::Result<u64> {
        let number = self.next;
        // A retry after a failure writes the same record at the same place.
        self.file.seek(SeekFrom::Start((number - 1) * RECORD_BYTES as u64))?;
        self.file.write_all(&record(number))?;
        self.file.sync_all()?;
        self.next += 1;
        Ok(number)
    }

    /// Overwrites the last record, which was acknowledged (a fault made on purpose).
    pub fn lose_last(&mut self) -> io::Result<()> {
        self.file.seek(SeekFrom::Start((self.next - 1).saturating_sub(1) * RECORD_BYTES as u64))?;
        self.file.write_all(&[0; RECORD_BYTES])?;
        self.file.sync_all()
    }

    /// Reads the file back from the disk, not from the page cache.
    pub fn verify(path: &Path) -> io::Result<Verdict> {
        let mut file = match OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path) {
            Ok(file) => file,
            // Some file systems (tmpfs) have no direct reads.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                let file = File::open(path)?;
                // SAFETY: the descriptor is open; the call is advice.
                unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
                file
            }
            Err(error) => return Err(error),
        };
        let mut verdict = Verdict::default();
        let mut room = vec![0_u8; 2 * DIRECT_BYTES];
        // Direct reads want an aligned buffer.
        let skip = room.as_ptr().align_offset(DIRECT_BYTES);
        let buffer = &mut room[skip..skip + DIRECT_BYTES];
        let mut number = 0;
        loop {
            // A disk's end need not be a multiple of the block; the last read is short.
            let got = file.read(buffer)?;
            for bytes in buffer[..got].chunks_exact(RECORD_BYTES) {
                number += 1;
                if bytes == record(number) {
                    verdict.good += u64::from(verdict.good + 1 == number);
                } else {
                    verdict.bad += 1;
                }
            }
            if got < DIRECT_BYTES {
                return Ok(verdict);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_on_and_damage_is_found() {
        let path = std::env::temp_dir().join(format!("sc-journal-{}", std::process::id()));
        let mut journal = Journal::open(&path).unwrap();
        for number in 1..=1000 {
            assert_eq!(journal.append().unwrap(), number);
        }
        assert_eq!(Journal::verify(&path).unwrap(), Verdict { good: 1000, bad: 0 });
        // An unfinished record is no damage and is written anew.
        drop(journal);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"0000").unwrap();
        assert_eq!(Journal::verify(&path).unwrap(), Verdict { good: 1000, bad: 0 });
        let mut journal = Journal::open(&path).unwrap();
        assert_eq!(journal.last(), 1000);
        assert_eq!(journal.append().unwrap(), 1001);
        assert_eq!(Journal::verify(&path).unwrap(), Verdict { good: 1001, bad: 0 });
        journal.lose_last().unwrap();
        assert_eq!(Journal::verify(&path).unwrap(), Verdict { good: 1000, bad: 1 });
        assert_eq!(journal.append().unwrap(), 1002);
        assert_eq!(Journal::verify(&path).unwrap(), Verdict { good: 1000, bad: 1 });
        // A lost block, a flipped digit.
        let mut file = OpenOptions::new().write(true).open(&path).unwrap();
        file.seek(SeekFrom::Start(499 * 16 + 3)).unwrap();
        file.write_all(b"7").unwrap();
        assert_eq!(Journal::verify(&path).unwrap(), Verdict { good: 499, bad: 2 });
        file.set_len(100 * 16).unwrap();
        assert_eq!(Journal::verify(&path).unwrap().good, 100);
        std::fs::remove_file(path).unwrap();
    }
}
