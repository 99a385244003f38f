//! The fixed newstyle handshake, from the server's side.

use bytes::{BufMut as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::proto::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, FLAG_SEND_DF, INFO_BLOCK_SIZE, INFO_EXPORT, INIT_MAGIC, MAX_REQUEST_BYTES,
    NbdError, OPT_ABORT, OPT_EXPORT_NAME, OPT_GO, OPT_INFO, OPT_LIST, OPT_STRUCTURED_REPLY, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, REP_ACK, REP_ERR_INVALID, REP_ERR_TOO_BIG, REP_ERR_UNKNOWN, REP_ERR_UNSUP, REP_INFO,
    REP_SERVER, TRANSMISSION_FLAGS,
};

/// The longest option: a name of 4096 bytes and a list of what is asked for about it.
const MAX_OPTION_BYTES: u32 = 8192;
/// Options per handshake: a client that haggles for ever is let go.
const MAX_OPTIONS: usize = 64;

/// What was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Agreed {
    pub is_structured: bool,
}

/// What the export is.
#[derive(Debug, Clone)]
pub(super) struct Export {
    /// Its name; the empty name, the default export, is it too.
    pub name: String,
    pub size_bytes: u64,
    pub preferred_block: u32,
}

/// Talks until the transmission phase begins; `None` when the client left by the rules.
pub(super) async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    export: &Export,
) -> Result<Option<Agreed>, NbdError> {
    let mut hello = BytesMut::new();
    hello.put_u64(INIT_MAGIC);
    hello.put_u64(OPTION_MAGIC);
    hello.put_u16(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    stream.write_all(&hello).await?;
    let client_flags = stream.read_u32().await?;
    if client_flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
        return Err(NbdError::Protocol("unknown client flags"));
    }
    let has_no_zeroes = client_flags & u32::from(FLAG_NO_ZEROES) != 0;
    let mut agreed = Agreed { is_structured: false };
    for _ in 0..MAX_OPTIONS {
        if stream.read_u64().await? != OPTION_MAGIC {
            return Err(NbdError::Protocol("an option has the wrong magic"));
        }
        let option = stream.read_u32().await?;
        let len = stream.read_u32().await?;
        if len > MAX_OPTION_BYTES {
            // Read past it without keeping it, as long as it is within reason.
            if len > MAX_REQUEST_BYTES {
                return Err(NbdError::Protocol("an absurdly long option"));
            }
            tokio::io::copy(&mut stream.take(u64::from(len)), &mut tokio::io::sink()).await?;
            reply(stream, option, REP_ERR_TOO_BIG, b"the option is too long").await?;
            continue;
        }
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data).await?;
        match option {
            OPT_EXPORT_NAME => {
                // The old way, which has no way to say no but to hang up.
                if !is_name(&data, export) {
                    return Err(NbdError::Protocol("there is no such export"));
                }
                let mut out = BytesMut::new();
                out.put_u64(export.size_bytes);
                out.put_u16(flags(agreed));
                if !has_no_zeroes {
                    out.put_bytes(0, 124);
                }
                stream.write_all(&out).await?;
                return Ok(Some(agreed));
            }
            OPT_ABORT => {
                // The client may be gone already.
                let _ = reply(stream, option, REP_ACK, &[]).await;
                return Ok(None);
            }
            OPT_LIST if data.is_empty() => {
                let mut out = BytesMut::new();
                out.put_u32(u32::try_from(export.name.len()).unwrap_or(0));
                out.put_slice(export.name.as_bytes());
                reply(stream, option, REP_SERVER, &out).await?;
                reply(stream, option, REP_ACK, &[]).await?;
            }
            OPT_STRUCTURED_REPLY if data.is_empty() => {
                agreed.is_structured = true;
                reply(stream, option, REP_ACK, &[]).await?;
            }
            OPT_INFO | OPT_GO => match parse_info(&data) {
                None => reply(stream, option, REP_ERR_INVALID, b"malformed").await?,
                Some(name) if !is_name(name, export) => {
                    reply(stream, option, REP_ERR_UNKNOWN, b"there is no such export").await?;
                }
                Some(_) => {
                    for info in infos(export, agreed) {
                        reply(stream, option, REP_INFO, &info).await?;
                    }
                    reply(stream, option, REP_ACK, &[]).await?;
                    if option == OPT_GO {
                        return Ok(Some(agreed));
                    }
                }
            },
            OPT_LIST | OPT_STRUCTURED_REPLY => reply(stream, option, REP_ERR_INVALID, b"it takes no data").await?,
            _ => reply(stream, option, REP_ERR_UNSUP, &[]).await?,
        }
    }
    Err(NbdError::Protocol("too many options"))
}

fn flags(agreed: Agreed) -> u16 {
    TRANSMISSION_FLAGS | if agreed.is_structured { FLAG_SEND_DF } else { 0 }
}

fn is_name(name: &[u8], export: &Export) -> bool {
    name.is_empty() || name == export.name.as_bytes()
}

/// The name in the data of INFO and GO, when all of it is well formed.
fn parse_info(data: &[u8]) -> Option<&[u8]> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    let (name, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    let (count, rest) = rest.split_first_chunk::<2>()?;
    (rest.len() == usize::from(u16::from_be_bytes(*count)) * 2).then_some(name)
}

/// Everything that is told of the export, asked for or not: the protocol allows it, and clients use it.
fn infos(export: &Export, agreed: Agreed) -> [Bytes; 2] {
    let mut size = BytesMut::new();
    size.put_u16(INFO_EXPORT);
    size.put_u64(export.size_bytes);
    size.put_u16(flags(agreed));
    let mut blocks = BytesMut::new();
    blocks.put_u16(INFO_BLOCK_SIZE);
    // Any alignment works; 512 is what disks have.
    blocks.put_u32(512);
    blocks.put_u32(export.preferred_block);
    blocks.put_u32(MAX_REQUEST_BYTES);
    [size.freeze(), blocks.freeze()]
}

async fn reply<S: AsyncWrite + Unpin>(stream: &mut S, option: u32, kind: u32, data: &[u8]) -> Result<(), NbdError> {
    let mut out = BytesMut::with_capacity(20 + data.len());
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_u32(u32::try_from(data.len()).unwrap_or(0));
    out.put_slice(data);
    stream.write_all(&out).await?;
    Ok(())
}
