//! Why a guest ended, from the log that libvirtd keeps of it: the one place where that outlives a transient machine.
//!
//! libvirt notes `starting up libvirt version: ...` when it makes the machine's process and `shutting down, reason=...`
//! when that is gone, also when it was not there itself and finds out later (`qemu_domain.c`, `qemu_process.c`).

use std::{
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    path::Path,
};

use supercloud_blanket::backend::StopReason;

/// So much of a log's end is looked at.
const TAIL_BYTES: u64 = 256 << 10;

/// Why the last process ended; `None` when it is not known, or has not ended. Blocking.
pub(crate) fn read(log: &Path) -> std::io::Result<Option<StopReason>> {
    let mut file = match File::open(log) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
    let mut tail = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut tail)?;
    Ok(last_end(&String::from_utf8_lossy(&tail)))
}

fn last_end(log: &str) -> Option<StopReason> {
    let line = log.lines().rev().find(|line| is_libvirts(line, "starting up ") || is_libvirts(line, ENDED))?;
    Some(match line.split_once(ENDED)?.1.trim() {
        "shutdown" => StopReason::PoweredOff,
        "destroyed" => StopReason::Killed,
        "crashed" => StopReason::Crashed,
        "migrated" => StopReason::Departed,
        "saved" => StopReason::Frozen,
        _ => StopReason::Failed,
    })
}

const ENDED: &str = "shutting down, reason=";

/// `2026-01-02 03:04:05.678+0000: <text>`; what QEMU itself says begins otherwise.
fn is_libvirts(line: &str, text: &str) -> bool {
    line.split_once(": ").is_some_and(|(time, said)| {
        said.starts_with(text)
            && time.len() == 28
            && time.ends_with("+0000")
            && time.starts_with(|c: char| c.is_ascii_digit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: &str =
        "2026-11-21 10:03:50.630+0000: starting up libvirt version: 9.0.0, qemu version: 7.2.22\n-name x \\\n";
    const OFF: &str = "2026-11-21 10:04:50.630+0000: shutting down, reason=shutdown\n";

    #[test]
    fn only_the_end_of_the_last_run_counts() {
        assert_eq!(last_end(&format!("{START}{OFF}")), Some(StopReason::PoweredOff));
        assert_eq!(last_end(&format!("{START}{OFF}{START}")), None, "it runs again");
        let crashed = OFF.replace("shutdown", "crashed");
        assert_eq!(last_end(&format!("{START}{OFF}{START}{crashed}")), Some(StopReason::Crashed));
        assert_eq!(
            last_end(&format!("{START}{OFF}qemu-system-x86_64: terminating on signal 15\n")),
            Some(StopReason::PoweredOff)
        );
        assert_eq!(last_end(""), None);
        // What a device prints of a guest's doing is no word of libvirt's.
        assert_eq!(last_end(&format!("{START}virtio: shutting down, reason=shutdown\n")), None);
        assert_eq!(last_end(&OFF.replace("shutdown", "of another version")), Some(StopReason::Failed));
    }

    #[test]
    fn the_end_of_a_long_log_is_enough() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("g.log");
        assert_eq!(read(&log).unwrap(), None);
        std::fs::write(&log, format!("{START}{}{OFF}", "x".repeat(1 << 20) + "\n")).unwrap();
        assert_eq!(read(&log).unwrap(), Some(StopReason::PoweredOff));
    }
}
