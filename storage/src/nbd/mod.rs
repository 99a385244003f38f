//! An NBD server of our own: how QEMU, and every NBD client, reaches a volume.
//!
//! Fixed newstyle handshake on a unix socket, one export, one client at a time; structured replies when asked for;
//! FLUSH, FUA, TRIM, WRITE_ZEROES, CACHE; one request of our own (0x5343), the cut of a mirror. Protocol: NetworkBlockDevice's
//! `doc/proto.md`.
//!
//! The client is hostile: lengths are capped before anything is allocated, requests and bytes under way are bounded,
//! the handshake has a deadline.

mod handshake;
mod proto;
mod session;
#[cfg(test)]
mod tests;

pub use self::{
    proto::{MAX_REQUEST_BYTES, NbdError},
    session::serve_nbd,
};
