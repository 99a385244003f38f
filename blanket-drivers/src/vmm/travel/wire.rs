//! A stream that is written frame by frame, at a pace.

use std::{
    io::{self, Write},
    time::{Duration, Instant},
};

use supercloud_api::frame::Frame;

use super::{TravelError, packed::level::waited};

/// A stream that takes nothing for so long is given up.
pub(super) const STALL: Duration = Duration::from_secs(10);
/// The same where only the other end is to be told that it was given up.
pub(super) const STALL_AT_END: Duration = Duration::from_millis(500);
/// A frame that takes longer is cut off when the machine is not to be sent any more; a faster one is finished.
const SLOW_FRAME: Duration = Duration::from_secs(1);
/// How long is waited at once for the limit of bytes per second.
const PACE: Duration = Duration::from_millis(50);

/// Asked often: whether it is still wanted.
pub(super) type Look<'a> = &'a mut dyn FnMut() -> Result<(), TravelError>;

/// The stream.
pub(super) struct Wire<W> {
    to: W,
    /// Of all frames so far.
    hash: blake3::Hasher,
    /// Bytes so far.
    pub sent_bytes: u64,
    /// How long it was waited for the other end, or for the limit of bytes per second.
    pub waited: Duration,
    paced_since: Instant,
    paced_bytes: u64,
}

impl<W: Write> Wire<W> {
    pub fn new(to: W) -> Self {
        let (waited, paced_since) = (Duration::ZERO, Instant::now());
        Self { to, hash: blake3::Hasher::new(), sent_bytes: 0, waited, paced_since, paced_bytes: 0 }
    }

    /// BLAKE3 of all frames so far.
    pub fn hash(&self) -> [u8; 32] {
        *self.hash.finalize().as_bytes()
    }

    /// Writes a frame.
    ///
    /// # Errors
    /// [`TravelError::Stalled`] when the stream takes nothing for as long as there is patience; what is cut off in between is
    /// never "cancelled", as nobody could read on there.
    pub fn write(
        &mut self,
        kind: u16,
        version: u16,
        payload: &[u8],
        patience: Duration,
        look: Look<'_>,
    ) -> Result<(), TravelError> {
        let bytes = Frame { kind, version, payload: payload.to_vec() }.to_bytes()?;
        self.hash.update(&bytes);
        let (began, count) = (Instant::now(), bytes.len() as u64);
        self.write_whole(&bytes, patience, look)?;
        self.waited += waited(count, began.elapsed());
        self.sent_bytes += count;
        self.paced_bytes += count;
        Ok(())
    }

    /// # Errors
    /// As the stream's own.
    pub fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }

    fn write_whole(&mut self, mut left: &[u8], patience: Duration, look: Look<'_>) -> Result<(), TravelError> {
        use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
        let begun = Instant::now();
        let mut taken_at = begun;
        while !left.is_empty() {
            match self.to.write(left) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(count) => (left, taken_at) = (&left[count..], Instant::now()),
                Err(error) if matches!(error.kind(), Interrupted | WouldBlock | TimedOut) => {}
                Err(error) => return Err(error.into()),
            }
            let is_stalled = taken_at.elapsed() >= PACE;
            let is_slow = !left.is_empty() && (is_stalled || begun.elapsed() >= SLOW_FRAME);
            if is_slow && (taken_at.elapsed() >= patience || look().is_err()) {
                return Err(TravelError::Stalled(begun.elapsed()));
            }
        }
        Ok(())
    }

    /// Waits until no more was sent than the limit allows since it last had to wait.
    ///
    /// # Errors
    /// Those of `look`.
    #[expect(clippy::disallowed_methods, reason = "a thread that sends a machine and does nothing else")]
    pub fn pace(&mut self, max_bytes_per_s: Option<u64>, look: Look<'_>) -> Result<(), TravelError> {
        let Some(limit) = max_bytes_per_s.filter(|limit| *limit > 0) else {
            (self.paced_since, self.paced_bytes) = (Instant::now(), 0);
            return Ok(());
        };
        let due = Duration::from_secs_f64(self.paced_bytes as f64 / limit as f64);
        if self.paced_since.elapsed() > due + Duration::from_millis(100) {
            // What was not used is not saved up.
            (self.paced_since, self.paced_bytes) = (Instant::now(), 0);
            return Ok(());
        }
        while let Some(left) = due.checked_sub(self.paced_since.elapsed()).filter(|left| !left.is_zero()) {
            look()?;
            std::thread::sleep(left.min(PACE));
            self.waited += left.min(PACE);
        }
        Ok(())
    }
}
