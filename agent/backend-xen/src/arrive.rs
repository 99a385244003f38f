//! A guest's stream comes in: `xl restore -p` makes the domain of it and leaves it paused.
//!
//! `xl` reads a file that begins with a header of its own, then libxl's stream. Streams here are libxl's alone, so the header goes before.
//! `xl` ends when the domain is whole, and the domain stays, whoever lives; when the stream breaks off, it takes the domain apart.

use std::{path::Path, process::Stdio, sync::Arc};

use supercloud_blanket::{
    BackendError, BackendResult,
    lasting::{self, Lasting},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    process::Command,
};

use crate::{
    guest::{Guest, Role, failed},
    xl::last_words,
};

/// `xl`'s header (`struct save_file_header` of xl.h): what it is, byte order, flags that must be understood (a stream of libxl's second
/// version), flags that may be, no more data.
pub fn header() -> Vec<u8> {
    let mut bytes = b"Xen saved domain, xl format\n \0 \r".to_vec();
    for word in [0x0102_0304_u32, 1 << 1, 0, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes
}

/// How much is kept of what `xl` says.
const MAX_SAID_BYTES: u64 = 64 << 10;

/// Makes the guest's domain of a stream, after the configuration in its folder. The domain stands still.
///
/// # Errors
/// When the stream is not whole, or Xen cannot take it. Nothing of it is left then, unless `xl` was killed.
pub async fn restore(guest: &Arc<Guest>, config: &Path, mut stream: impl AsyncRead + Unpin) -> BackendResult<()> {
    let what = "take an incoming guest";
    let mut command = std::process::Command::new("xl");
    command.args(["restore", "-p", "-e"]).arg(config).arg("/proc/self/fd/0");
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    lasting::detach(&mut command, &[]);
    // It ends when its input does; killed, it would leave half a domain.
    let mut child = Command::from(command).kill_on_drop(false).spawn().map_err(failed("start xl"))?;
    let process = child.id().and_then(Lasting::of);
    guest.mark(Role::Incoming(process)).await?;
    let (Some(mut input), Some(mut errors)) = (child.stdin.take(), child.stderr.take()) else {
        return Err(BackendError::Failed { what, detail: "xl has no input".to_owned() });
    };
    let feed = async move {
        input.write_all(&header()).await?;
        let copied = tokio::io::copy(&mut stream, &mut input).await;
        drop(input);
        copied
    };
    let hear = async move {
        let mut said = Vec::new();
        let _ = (&mut errors).take(MAX_SAID_BYTES).read_to_end(&mut said).await;
        // What is more is not kept, but it must not be kept from saying it.
        let _ = tokio::io::copy(&mut errors, &mut tokio::io::sink()).await;
        said
    };
    let mut feed = std::pin::pin!(feed);
    let mut hear = std::pin::pin!(hear);
    let (mut is_fed, mut said) = (None, None);
    let status = loop {
        tokio::select! {
            fed = &mut feed, if is_fed.is_none() => is_fed = Some(fed),
            heard = &mut hear, if said.is_none() => said = Some(heard),
            // All came: what the stream's carrier does after that is no matter.
            status = child.wait() => break status.map_err(failed(what))?,
        }
    };
    if status.success() {
        return Ok(());
    }
    let said = match said {
        Some(said) => said,
        None => hear.await,
    };
    let mut detail = format!("{status}: {}", last_words(&String::from_utf8_lossy(&said)));
    if let Some(Err(error)) = is_fed {
        detail.push_str(&format!("; its stream: {error}"));
    }
    Err(BackendError::Failed { what, detail })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_xls_own() {
        let bytes = header();
        assert_eq!(bytes.len(), 48);
        assert_eq!(bytes[27..32], *b"\n \0 \r");
        assert_eq!(bytes[32..40], [4, 3, 2, 1, 2, 0, 0, 0]);
    }
}
