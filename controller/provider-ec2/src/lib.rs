//! Hosts rented from EC2, or from a server that speaks its API (`endpoint_url`).
//!
//! One [`Ec2`] is one region, or one zone of it. What it launches carries three tags from the moment it exists (they are part of
//! `RunInstances`): `supercloud-owner` (which controller), `supercloud-token` (which order) and `Name`. Launching is idempotent
//! twice over: EC2's own client token, and a look for the order's tag before it is given.
//!
//! Credentials come from the standard chain: environment, profile files, web identity, container, instance metadata.
#![forbid(unsafe_code)]

mod settings;
mod translate;

#[cfg(feature = "sdk")]
mod convert;
#[cfg(feature = "sdk")]
mod driver;

#[cfg(feature = "sdk")]
pub use driver::Ec2;
pub use settings::Settings;
pub use translate::{error_of_code, price, series};
