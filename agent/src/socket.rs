//! Sockets: how soon a silent peer is noticed, and who is at the other end of a unix socket.

use std::{io, os::fd::AsRawFd as _, path::Path, time::Duration};

use tokio::net::{TcpStream, UnixListener, UnixStream};

use crate::{accounts::Account, durable};

/// A peer that acknowledges nothing for so long is gone.
const SILENCE_BUDGET: Duration = Duration::from_secs(20);
/// Bytes that may wait in the kernel without having been sent. What waits there when a guest is paused is part of its pause.
const UNSENT_BYTES: libc::c_int = 256 << 10;

fn set(stream: &TcpStream, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the descriptor is open while `stream` lives; the kernel reads `length` bytes, the size of the value.
    let rc = unsafe { libc::setsockopt(stream.as_raw_fd(), level, option, (&raw const value).cast(), length) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets a connection up so that a peer that went silent is noticed within about 20 s, whether bytes are under way
/// (`TCP_USER_TIMEOUT`) or not (keepalive), small messages leave at once, and little waits in the kernel beyond what is on
/// the wire (`TCP_NOTSENT_LOWAT`).
///
/// # Errors
/// When the system refuses.
pub fn watch_over(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    set(stream, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    set(stream, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 5)?;
    set(stream, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 5)?;
    set(stream, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 3)?;
    set(stream, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, UNSENT_BYTES)?;
    let budget = libc::c_int::try_from(SILENCE_BUDGET.as_millis()).unwrap_or(libc::c_int::MAX);
    set(stream, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, budget)
}

/// What the kernel knows of the opening of a connection that this side has just opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opening {
    /// The round-trip time of the handshake in microseconds; of no worth when packets went again.
    pub rtt_us: u32,
    /// Packets that went again.
    pub resent: u32,
}

/// Asks for it (`TCP_INFO`, tcp(7)).
///
/// # Errors
/// When the system refuses, or tells too little.
pub fn opening(stream: &TcpStream) -> io::Result<Opening> {
    // SAFETY: all bytes zero is a value of this plain struct of integers.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    let into = (&raw mut info).cast();
    // SAFETY: the descriptor is open while `stream` lives; the kernel writes at most `length` bytes, the size of the struct.
    let rc = unsafe { libc::getsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, into, &raw mut length) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    if (length as usize) < std::mem::offset_of!(libc::tcp_info, tcpi_total_retrans) + size_of::<u32>() {
        return Err(io::Error::from(io::ErrorKind::Unsupported));
    }
    Ok(Opening { rtt_us: info.tcpi_rtt, resent: info.tcpi_total_retrans })
}

/// Listens on a unix socket of mode 0600 that belongs to `client`, so that it can connect; what lay there before is removed.
/// Its folder must not be writable for others, and who connects must be asked for [`is_peer_allowed`]: between bind and
/// chmod the mode is what the umask gives.
///
/// # Errors
/// When the system refuses, or the path is too long.
pub fn listen(path: &Path, client: Account) -> io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt as _;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    durable::give(path, client).map_err(io::Error::other)?;
    Ok(listener)
}

/// Whether the process at the other end runs as root, as this process's user, or as `client`.
#[must_use]
pub fn is_peer_allowed(stream: &UnixStream, client: Account) -> bool {
    // SAFETY: geteuid takes no arguments and cannot fail.
    let own = unsafe { libc::geteuid() };
    stream.peer_cred().is_ok_and(|cred| [0, own, client.uid].contains(&cred.uid()))
}

/// Whether the process at the other end listened as `server`, or as root where that is its user. A folder that belongs to
/// another user may hold a link to anybody's socket under the name that was dialled.
#[must_use]
pub fn is_server(stream: &UnixStream, server: Account) -> bool {
    stream.peer_cred().is_ok_and(|cred| cred.uid() == server.uid)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[tokio::test]
    async fn a_socket_is_private_and_replaces_an_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        for _ in 0..2 {
            let listener = listen(&path, Account::ROOT).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            let (client, server) = tokio::join!(UnixStream::connect(&path), listener.accept());
            assert!(is_peer_allowed(&server.unwrap().0, Account::ROOT));
            let (client, stranger) = (client.unwrap(), Account { uid: u32::MAX - 1, gid: 0 });
            assert!(!is_server(&client, stranger));
            // SAFETY: geteuid takes no arguments and cannot fail.
            assert!(is_server(&client, Account { uid: unsafe { libc::geteuid() }, gid: 0 }));
        }
        assert!(listen(&dir.path().join("x".repeat(200)), Account::ROOT).is_err());
    }
}
