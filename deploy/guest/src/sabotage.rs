//! Faults that the server makes on purpose, once, so that it is seen that the checks around it can fail.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::clock::sleep_ms;
use crate::sys;

/// What to break.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Resets a stream.
    Tcp,
    /// Flips a bit of one byte of a stream.
    Bytes,
    /// Loses a record that was acknowledged.
    Writes,
    /// Restarts the machine without a word.
    Restart,
}

impl Kind {
    /// The kind of this name.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "tcp" => Self::Tcp,
            "bytes" => Self::Bytes,
            "writes" => Self::Writes,
            "restart" => Self::Restart,
            _ => return None,
        })
    }
}

/// A fault that is due some seconds after the server has started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Which fault.
    pub kind: Kind,
    /// How long after the start.
    pub after_s: u32,
}

/// Faults that wait for whom they concern, and how many were made.
#[derive(Debug, Default)]
pub struct Faults {
    streams: AtomicBool,
    byte: AtomicBool,
    record: AtomicBool,
    made: AtomicU64,
}

impl Faults {
    /// Waits until the plan's time and makes its fault; once per disk, so that a restarted guest does not restart for ever.
    pub fn carry_out(&self, plan: Plan, folder: &Path) {
        let marker = folder.join("sabotaged");
        if marker.exists() {
            self.made.fetch_add(1, Ordering::Relaxed);
            return;
        }
        sleep_ms(u64::from(plan.after_s) * 1000);
        // Without the marker on the disk nothing is broken.
        if File::create(&marker).and_then(|file| file.sync_all()).is_err() {
            return;
        }
        match plan.kind {
            Kind::Tcp => self.streams.store(true, Ordering::Relaxed),
            Kind::Bytes => self.byte.store(true, Ordering::Relaxed),
            Kind::Writes => self.record.store(true, Ordering::Relaxed),
            Kind::Restart => sys::restart(),
        }
    }

    /// Whether a stream shall be reset now.
    pub fn take_stream(&self) -> bool {
        self.take(&self.streams)
    }

    /// Whether a byte shall be flipped now.
    pub fn take_byte(&self) -> bool {
        self.take(&self.byte)
    }

    /// Whether a record shall be lost now.
    pub fn take_record(&self) -> bool {
        self.take(&self.record)
    }

    fn take(&self, fault: &AtomicBool) -> bool {
        let is_due = fault.swap(false, Ordering::Relaxed);
        if is_due {
            self.made.fetch_add(1, Ordering::Relaxed);
        }
        is_due
    }

    /// Faults made so far.
    pub fn made(&self) -> u64 {
        self.made.load(Ordering::Relaxed)
    }
}
