//! Holes in files: finding data, giving space back.

use std::{fs::File, io, ops::Range, os::fd::AsRawFd as _};

fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<u64> {
    let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: lseek takes a descriptor, which `file` keeps open during the call, and touches no memory of ours. It
    // moves the file's cursor, which nobody here uses: all reads and writes are positioned.
    let at = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    u64::try_from(at).map_err(|_| io::Error::last_os_error())
}

/// The first range of data at or after `offset`; `None` when only a hole, or nothing, follows. Where the file system
/// cannot tell, all the rest is data.
pub(crate) fn next_data(file: &File, offset: u64) -> io::Result<Option<Range<u64>>> {
    let len = file.metadata()?.len();
    if offset >= len {
        return Ok(None);
    }
    let start = match seek(file, offset, libc::SEEK_DATA) {
        Ok(start) => start,
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(Some(offset..len)),
        Err(error) => return Err(error),
    };
    let end = seek(file, start, libc::SEEK_HOLE)?;
    Ok(Some(start..end.max(start)))
}

/// Makes a range of a file read as zeros and gives its space back; the file's length stays. False where the file
/// system cannot punch holes.
pub(crate) fn punch_hole(file: &File, range: &Range<u64>) -> io::Result<bool> {
    let offset = i64::try_from(range.start).map_err(|_| io::ErrorKind::InvalidInput)?;
    let len = i64::try_from(range.end.saturating_sub(range.start)).map_err(|_| io::ErrorKind::InvalidInput)?;
    if len == 0 {
        return Ok(true);
    }
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    loop {
        // SAFETY: fallocate takes a descriptor, which `file` keeps open during the call, and touches no memory of ours.
        let rc = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) };
        if rc == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => return Ok(false),
            _ => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn data_is_found_and_given_back() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 4096], 512 << 10).unwrap();
        let data = next_data(&file, 0).unwrap();
        // A file system without holes says that all is data; ours has them, and so have those that it runs on.
        assert_eq!(data, Some(512 << 10..(512 << 10) + 4096));
        assert_eq!(next_data(&file, 600 << 10).unwrap(), None);
        assert_eq!(next_data(&file, 2 << 20).unwrap(), None);
        assert!(punch_hole(&file, &(0..1 << 20)).unwrap());
        assert_eq!(next_data(&file, 0).unwrap(), None);
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
    }
}
