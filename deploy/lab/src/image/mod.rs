//! Guest images, made on the spot from Debian's packages and kept in a cache that is named by what went into them.
//!
//! | image | what | boots |
//! |---|---|---|
//! | [`lean`] | kernel, initramfs and a 64 MiB ext4 disk with one static program | directly by the hypervisor |
//! | [`distro`] | a Debian as distributions ship it: GPT, GRUB, systemd, cloud-init | from its own disk |
//!
//! Nothing needs loop devices, mounts or a running hypervisor: file systems are filled by `mke2fs -d`, partition tables and boot
//! sectors are written into a file.

pub mod cache;
pub mod cpio;
pub mod distro;
pub mod grub;
pub mod host;
pub mod kernel;
pub mod lean;
pub mod modules;
pub mod xen;

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::command::CommandError;
use crate::state::StateError;

/// An image that cannot be made.
#[derive(Debug, Error)]
pub enum ImageError {
    /// A program failed.
    #[error("{what}")]
    Command {
        /// What was being done.
        what: &'static str,
        /// The program's failure.
        #[source]
        source: CommandError,
    },
    /// A file failed.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The cache's lock failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// Something that was expected in a package is not there.
    #[error("{0}")]
    Missing(String),
}

pub(crate) fn io_at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path: PathBuf = path.to_owned();
    move |source| ImageError::Io { what, path: path.display().to_string(), source }
}

pub(crate) fn running(what: &'static str) -> impl Fn(CommandError) -> ImageError {
    move |source| ImageError::Command { what, source }
}
