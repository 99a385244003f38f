//! Bridges: bytes between a TLS connection and a unix socket, both ways, with back-pressure and half-close.

use std::{io, path::Path, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes},
    net::UnixStream,
    time::{Instant, sleep, timeout_at},
};

/// Bytes held in each direction: enough for a fast link with a long round trip's worth in the kernel's buffers.
const BUFFER_BYTES: usize = 256 << 10;

/// Carries bytes both ways until both directions have ended, or one fails; returns how many went `(a to b, b to a)`.
///
/// # Errors
/// When either side breaks; then both are closed.
pub async fn carry<A, B>(mut a: A, mut b: B) -> io::Result<(u64, u64)>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    copy_bidirectional_with_sizes(&mut a, &mut b, BUFFER_BYTES, BUFFER_BYTES).await
}

/// Connects to a unix socket that may be about to be made.
///
/// # Errors
/// When it cannot be connected to within `budget`.
pub async fn connect(path: &Path, budget: Duration) -> io::Result<UnixStream> {
    let deadline = Instant::now() + budget;
    loop {
        match timeout_at(deadline, UnixStream::connect(path)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) if Instant::now() + Duration::from_millis(20) >= deadline => return Err(error),
            Ok(Err(_)) => sleep(Duration::from_millis(20)).await,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn one_direction_may_end_before_the_other() {
        let (mut left, a) = tokio::io::duplex(64);
        let (mut right, b) = tokio::io::duplex(64);
        let bridge = tokio::spawn(carry(a, b));
        left.write_all(&[7; 1000]).await.unwrap_or_default();
        unreachable_unless_read(&mut right, 1000).await;
        left.shutdown().await.unwrap();
        assert_eq!(right.read(&mut [0; 8]).await.unwrap(), 0);
        right.write_all(b"answer").await.unwrap();
        drop(right);
        let mut answer = Vec::new();
        left.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
        assert_eq!(bridge.await.unwrap().unwrap(), (1000, 6));
    }

    async fn unreachable_unless_read(stream: &mut tokio::io::DuplexStream, len: usize) {
        let mut bytes = vec![0; len];
        stream.read_exact(&mut bytes).await.unwrap();
        assert!(bytes.iter().all(|b| *b == 7));
    }

    #[tokio::test]
    async fn a_socket_that_is_not_there_is_an_error_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        assert!(connect(&path, Duration::from_millis(50)).await.is_err());
        let listener = crate::socket::listen(&path, crate::accounts::Account::ROOT).unwrap();
        connect(&path, Duration::from_secs(5)).await.unwrap();
        drop(listener);
    }
}
