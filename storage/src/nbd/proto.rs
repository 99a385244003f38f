//! Numbers and headers of the NBD protocol. All numbers big endian.

use std::io;

/// The largest read or write, in bytes: what the protocol lets a client assume.
pub const MAX_REQUEST_BYTES: u32 = 32 << 20;

/// Why an NBD session ended, other than by the client's leaving.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The connection failed.
    #[error("the NBD connection failed")]
    Io(#[from] io::Error),
    /// The client broke the protocol.
    #[error("the NBD client broke the protocol: {0}")]
    Protocol(&'static str),
    /// The handshake took too long, or the client stopped reading.
    #[error("the NBD client was silent for too long")]
    Deadline,
}

pub(super) const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

pub(super) const FLAG_FIXED_NEWSTYLE: u16 = 1;
pub(super) const FLAG_NO_ZEROES: u16 = 2;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_LIST: u32 = 3;
pub(super) const OPT_INFO: u32 = 6;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_SERVER: u32 = 2;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_ERR_UNSUP: u32 = (1 << 31) + 1;
pub(super) const REP_ERR_INVALID: u32 = (1 << 31) + 3;
pub(super) const REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;
pub(super) const REP_ERR_TOO_BIG: u32 = (1 << 31) + 9;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES, SEND_CACHE. Not CAN_MULTI_CONN: one client only.
pub(super) const TRANSMISSION_FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 10;
/// Reads in one piece can be asked for once structured replies are on: always so here.
pub(super) const FLAG_SEND_DF: u16 = 1 << 7;

pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_WRITE: u16 = 1;
pub(super) const CMD_DISC: u16 = 2;
pub(super) const CMD_FLUSH: u16 = 3;
pub(super) const CMD_TRIM: u16 = 4;
pub(super) const CMD_CACHE: u16 = 5;
/// Of our own ("SC"): make cut number `offset`. Every operation that was asked for before it is in the cut, none that is asked for
/// after it. Answered in the simple form, always.
pub(super) const CMD_CUT: u16 = 0x5343;
pub(super) const CMD_WRITE_ZEROES: u16 = 6;

pub(super) const CMD_FLAG_FUA: u16 = 1;
pub(super) const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
pub(super) const CMD_FLAG_DF: u16 = 1 << 2;

pub(super) const REPLY_FLAG_DONE: u16 = 1;
pub(super) const REPLY_TYPE_NONE: u16 = 0;
pub(super) const REPLY_TYPE_OFFSET_DATA: u16 = 1;
pub(super) const REPLY_TYPE_ERROR: u16 = (1 << 15) + 1;

pub(super) const EIO: u32 = 5;
pub(super) const EINVAL: u32 = 22;
pub(super) const ENOSPC: u32 = 28;
pub(super) const EOVERFLOW: u32 = 75;

pub(super) const REQUEST_HEADER: usize = 28;

/// A request's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub len: u32,
}

impl Request {
    pub(super) fn parse(header: &[u8; REQUEST_HEADER]) -> Result<Self, NbdError> {
        let [m0, m1, m2, m3, f0, f1, c0, c1, rest @ ..] = header;
        if u32::from_be_bytes([*m0, *m1, *m2, *m3]) != REQUEST_MAGIC {
            return Err(NbdError::Protocol("a request has the wrong magic"));
        }
        let number = |at: usize| rest[at..].first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        Ok(Self {
            flags: u16::from_be_bytes([*f0, *f1]),
            command: u16::from_be_bytes([*c0, *c1]),
            cookie: number(0),
            offset: number(8),
            len: rest[16..].first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes)),
        })
    }

    /// Whether what is asked for is possible; else the error number to answer.
    pub(super) fn judge(&self, size_bytes: u64) -> Result<(), u32> {
        let allowed = match self.command {
            CMD_READ => CMD_FLAG_FUA | CMD_FLAG_DF,
            CMD_WRITE | CMD_TRIM | CMD_FLUSH => CMD_FLAG_FUA,
            CMD_WRITE_ZEROES => CMD_FLAG_FUA | CMD_FLAG_NO_HOLE,
            CMD_CACHE | CMD_CUT => 0,
            _ => return Err(EINVAL),
        };
        if self.flags & !allowed != 0 {
            return Err(EINVAL);
        }
        if self.command == CMD_FLUSH {
            return if self.offset == 0 && self.len == 0 { Ok(()) } else { Err(EINVAL) };
        }
        if self.command == CMD_CUT {
            return if self.offset > 0 && self.len == 0 { Ok(()) } else { Err(EINVAL) };
        }
        if matches!(self.command, CMD_READ | CMD_WRITE) && self.len > MAX_REQUEST_BYTES {
            return Err(EOVERFLOW);
        }
        match self.offset.checked_add(u64::from(self.len)) {
            Some(end) if end <= size_bytes => Ok(()),
            // What the protocol wants for a write beyond the end.
            _ if matches!(self.command, CMD_WRITE | CMD_WRITE_ZEROES) => Err(ENOSPC),
            _ => Err(EINVAL),
        }
    }
}

pub(super) fn simple_reply(cookie: u64, error: u32) -> [u8; 16] {
    let mut out = [0; 16];
    out[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&error.to_be_bytes());
    out[8..].copy_from_slice(&cookie.to_be_bytes());
    out
}

/// The header of the only chunk of a structured reply.
pub(super) fn structured_reply(cookie: u64, kind: u16, len: u32) -> [u8; 20] {
    let mut out = [0; 20];
    out[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    out[4..6].copy_from_slice(&REPLY_FLAG_DONE.to_be_bytes());
    out[6..8].copy_from_slice(&kind.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..].copy_from_slice(&len.to_be_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_judged() {
        let ask = |command, flags, offset, len| Request { flags, command, cookie: 1, offset, len }.judge(1 << 20);
        assert_eq!(ask(CMD_READ, 0, 0, 1 << 20), Ok(()));
        assert_eq!(ask(CMD_READ, 0, 1, 1 << 20), Err(EINVAL));
        assert_eq!(ask(CMD_READ, 0, u64::MAX, 2), Err(EINVAL));
        assert_eq!(ask(CMD_WRITE, CMD_FLAG_FUA, 1 << 20, 1), Err(ENOSPC));
        assert_eq!(ask(CMD_WRITE, 0, 0, MAX_REQUEST_BYTES + 1), Err(EOVERFLOW));
        assert_eq!(ask(CMD_WRITE, 1 << 9, 0, 1), Err(EINVAL));
        assert_eq!(ask(CMD_FLUSH, 0, 0, 0), Ok(()));
        assert_eq!(ask(CMD_FLUSH, 0, 0, 1), Err(EINVAL));
        assert_eq!(ask(CMD_WRITE_ZEROES, CMD_FLAG_NO_HOLE, 0, 1 << 20), Ok(()));
        assert_eq!(ask(99, 0, 0, 0), Err(EINVAL));
        assert_eq!(ask(CMD_CUT, 0, u64::MAX, 0), Ok(()));
        assert_eq!(ask(CMD_CUT, 0, 0, 0), Err(EINVAL));
        assert_eq!(ask(CMD_CUT, 0, 1, 1), Err(EINVAL));
        assert_eq!(ask(CMD_CUT, CMD_FLAG_FUA, 1, 0), Err(EINVAL));
    }
}
