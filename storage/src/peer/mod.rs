//! Between volume processes, over any byte stream that the agents bridge (they encrypt and authenticate it).
//!
//! ```text
//!   destination                                             source
//!     Hello{volume, project, size, base} ──────────────────>
//!                                      <─────────────────── Hello{...}, or Refused and the end
//!     GetMap{request, from, since} ────────────────────────>
//!                                      <─────────────────── Map{request, version, next, entries}
//!     GetBlocks{request, [(block, version)]} ──────────────>
//!                                      <─────────────────── Block{request, block, version, digest, data}, one each,
//!                                                           in any order, or Refused{request, why}
//!     Released{request} ───────────────────────────────────>
//!                                      <─────────────────── Done{request}
//!   of a mirror:
//!     AwaitCut{request, after, have} ──────────────────────>  (waits for the next cut)
//!                                      <─────────────────── Cut{request, number, version, since, root} or no cut
//!     GetCutMap{request, number, from, since} ─────────────>
//!                                      <─────────────────── Map{...}, as of the cut
//!     GetCutBlocks{request, number, [(block, version)]} ───>
//!                                      <─────────────────── Block{...}, as of the cut
//! ```
//!
//! Requests are numbered by the client and may overlap. [`chunks`] speaks the same frames for sealed chunks.

pub mod chunks;
mod client;
mod message;
mod server;

pub use self::{
    client::{Dial, DialFuture, PeerClient, UnixDial},
    message::{Hello, Message, MessageError},
    server::{PeerServerError, serve_peer},
};

use tokio::io::{AsyncRead, AsyncWrite};

/// A byte stream between two processes.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}
