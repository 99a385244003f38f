//! The process that serves one volume on one host: its configuration, its control socket, and what it runs.
//!
//! ```text
//!   <run_folder>/nbd.sock       the guest's disk (NBD; QEMU, or any NBD client)
//!   <run_folder>/control.sock   the agent asks and orders ([`control`], [`VolumeClient`])
//!   <run_folder>/peer.sock      another host's volume process reads map and blocks (bridged by the agents)
//!   peer_dial                   a socket of the agent, which bridges it to the source host's peer.sock
//!   chunk_dial                  a socket of the agent, which bridges it to a host that has the base image's chunks
//! ```

mod client;
mod config;
pub mod control;
mod jobs;
mod orders;
mod serve;
mod sockets;

pub use self::{
    client::{ClientError, PointContent, VolumeClient},
    config::{ConfigError, KeySource, NbdMode, StartRole, VolumeProcessConfig},
    serve::{ProcessError, run},
};
