//! The agent of one host.

pub mod chunks;
pub mod config;
pub mod durable;
pub mod guest;
pub mod host;
pub mod identity;
pub mod jobs;
pub mod join;
pub mod link;
pub mod plane;
pub mod ports;
pub mod seed;
pub mod socket;
pub mod volumes;

/// An error with all its causes, for logs and problems: `what: why: why`.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
