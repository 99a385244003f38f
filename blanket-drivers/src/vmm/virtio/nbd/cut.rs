//! A mirror's cuts on the way to a volume process.

use std::{collections::BTreeSet, io};

use super::{Broken, REQUEST_BYTES, request};

/// The type of the request, "SC": done when every operation before it is in the cut, and none after it. Its offset is the cut's number.
pub const CMD_CUT: u16 = 0x5343;
/// Cookies of cuts have this bit; no request's number reaches it. The rest is the cut's number.
const COOKIE: u64 = 1 << 63;
/// Cuts that may be without an answer, late ones all of them but one.
const MAX_UNANSWERED: usize = 16;

/// How much of a request has gone.
pub(super) enum Sent {
    /// All of it, or there is none.
    Whole,
    /// The socket takes no more now.
    InPart,
}

/// The cut under way, and those that nobody waits for any more.
#[derive(Debug, Default)]
pub(super) struct Cuts {
    /// Its request, and how much of it has gone.
    sending: Option<([u8; REQUEST_BYTES], usize)>,
    /// The one that is waited for.
    current: Option<u64>,
    /// Asked for, and not answered.
    unanswered: BTreeSet<u64>,
    /// Its answer.
    answer: Option<io::Result<()>>,
}

impl Cuts {
    /// Takes this one up.
    pub fn begin(&mut self, number: u64) -> io::Result<()> {
        if self.sending.is_some() || self.unanswered.len() >= MAX_UNANSWERED {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the volume process does not answer earlier cuts"));
        }
        if number == 0 || number & COOKIE != 0 || !self.unanswered.insert(number) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "that is no number of a cut"));
        }
        self.sending = Some((request(CMD_CUT, number | COOKIE, number, 0), 0));
        (self.current, self.answer) = (Some(number), None);
        Ok(())
    }

    /// Whether there is something to be sent.
    pub const fn has_more(&self) -> bool {
        self.sending.is_some()
    }

    /// Sends what there is; between two requests only.
    pub fn send(&mut self, mut write: impl FnMut(&[u8]) -> Result<Option<usize>, Broken>) -> Result<Sent, Broken> {
        while let Some((request, gone)) = &mut self.sending {
            match write(&request[*gone..])? {
                Some(count) => *gone += count,
                None => return Ok(Sent::InPart),
            }
            if *gone == REQUEST_BYTES {
                self.sending = None;
            }
        }
        Ok(Sent::Whole)
    }

    /// Takes an answer, if it is one to a cut that was asked for.
    pub fn take(&mut self, cookie: u64, error: u32) -> bool {
        let number = cookie & !COOKIE;
        if cookie & COOKIE == 0 || !self.unanswered.remove(&number) {
            return false;
        }
        if self.current == Some(number) {
            self.answer = Some(match error {
                0 => Ok(()),
                error => Err(io::Error::from_raw_os_error(i32::try_from(error).unwrap_or(libc::EIO))),
            });
        }
        true
    }

    /// Whether the one under way is answered, and nobody has asked yet what came of it.
    pub const fn is_answered(&self) -> bool {
        self.answer.is_some()
    }

    /// What came of the one under way, once.
    pub fn outcome(&mut self) -> Option<io::Result<()>> {
        self.current?;
        let outcome = self.answer.take()?;
        self.current = None;
        Some(outcome)
    }

    /// The link is gone, and with it all that was asked for on it.
    pub fn lose(&mut self) {
        self.sending = None;
        self.unanswered.clear();
        if self.current.is_some() && self.answer.is_none() {
            self.answer = Some(Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the way to the disk broke")));
        }
    }

    /// Whether nothing of them is on the link.
    pub fn are_answered(&self) -> bool {
        self.sending.is_none() && self.unanswered.is_empty()
    }
}
