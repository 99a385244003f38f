//! The client's side of the fixed newstyle handshake, up to the transmission phase.
//!
//! Format: the NBD protocol (<https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>), "Fixed newstyle
//! negotiation" and `NBD_OPT_GO`. Replies are simple ones: structured replies are not asked for.

use std::{
    io::{self, Read as _, Write as _},
    os::unix::net::UnixStream,
    time::Duration,
};

use crate::vmm::virtio::block::Empties;

const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const FLAG_FIXED_NEWSTYLE: u16 = 1;
const FLAG_NO_ZEROES: u16 = 2;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
/// `NBD_FLAG_SEND_FLUSH` of the transmission flags.
const SENDS_FLUSH: u16 = 1 << 2;
/// `NBD_FLAG_SEND_TRIM`.
const SENDS_TRIM: u16 = 1 << 5;
/// `NBD_FLAG_SEND_WRITE_ZEROES`.
const SENDS_ZEROES: u16 = 1 << 6;

/// What a server offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Export {
    /// Its size.
    pub bytes: u64,
    /// Its transmission flags (`NBD_FLAG_*`).
    pub flags: u16,
}

impl Export {
    /// Which requests that empty parts of it the server takes.
    #[must_use]
    pub const fn empties(&self) -> Empties {
        Empties { discards: self.flags & SENDS_TRIM != 0, zeroes: self.flags & SENDS_ZEROES != 0 }
    }
}

/// Longest reply that is read; the server's words in an error may be that long.
const MAX_REPLY_BYTES: u32 = 8192;
/// Replies until the server says that it is ready.
const MAX_REPLIES: usize = 32;
/// How long the server may be silent.
const BUDGET: Duration = Duration::from_secs(10);

fn broken(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn number<const N: usize>(stream: &mut &UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Asks for the default export. Blocking, but not for ever.
///
/// # Errors
/// When the server refuses, is silent, or does not speak the protocol.
pub fn negotiate(stream: &UnixStream) -> io::Result<Export> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(BUDGET))?;
    stream.set_write_timeout(Some(BUDGET))?;
    let mut stream = stream;
    if u64::from_be_bytes(number(&mut stream)?) != INIT_MAGIC
        || u64::from_be_bytes(number(&mut stream)?) != OPTION_MAGIC
    {
        return Err(broken("it is no NBD server"));
    }
    let flags = u16::from_be_bytes(number(&mut stream)?);
    if flags & FLAG_FIXED_NEWSTYLE == 0 {
        return Err(broken("the server is too old"));
    }
    let ours = flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    let mut request = u32::from(ours).to_be_bytes().to_vec();
    request.extend(OPTION_MAGIC.to_be_bytes());
    request.extend(OPT_GO.to_be_bytes());
    // The default export's empty name, and no list of what is asked for: the size is told in any case.
    request.extend(6u32.to_be_bytes());
    request.extend(0u32.to_be_bytes());
    request.extend(0u16.to_be_bytes());
    stream.write_all(&request)?;
    let mut export = None;
    for _ in 0..MAX_REPLIES {
        let magic = u64::from_be_bytes(number(&mut stream)?);
        let option = u32::from_be_bytes(number(&mut stream)?);
        let kind = u32::from_be_bytes(number(&mut stream)?);
        let bytes = u32::from_be_bytes(number(&mut stream)?);
        if magic != OPTION_REPLY_MAGIC || option != OPT_GO || bytes > MAX_REPLY_BYTES {
            return Err(broken("the server breaks the protocol"));
        }
        let mut data = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
        stream.read_exact(&mut data)?;
        match kind {
            REP_ACK => return export.ok_or_else(|| broken("the server does not tell the disk's size")),
            REP_INFO => export = export.or(told(&data)?),
            kind if kind & REP_ERROR != 0 => {
                let said: String = String::from_utf8_lossy(&data).chars().take(200).collect();
                return Err(io::Error::other(format!("the server refuses ({kind:#x}): {said}")));
            }
            _ => return Err(broken("the server answers something else")),
        }
    }
    Err(broken("the server talks without end"))
}

/// The export, of an information that tells of it.
fn told(data: &[u8]) -> io::Result<Option<Export>> {
    let Some((kind, rest)) = data.split_first_chunk::<2>() else { return Err(broken("an information is empty")) };
    if u16::from_be_bytes(*kind) != INFO_EXPORT {
        return Ok(None);
    }
    let (Some(size), Some(flags)) = (rest.first_chunk::<8>(), rest.get(8..10)) else {
        return Err(broken("the export's information is cut off"));
    };
    let flags = u16::from_be_bytes([flags[0], flags[1]]);
    if flags & SENDS_FLUSH == 0 {
        return Err(broken("the server cannot flush"));
    }
    Ok(Some(Export { bytes: u64::from_be_bytes(*size), flags }))
}
