//! Rented hosts: from a durable order to the confirmed end. An orphan never costs money.
//!
//! ```text
//!   REST: renting (recorded) + operation ──► place's task: asked, durably ──► provider.launch(token) ──► launched ──► agent joins: up
//!                                                   ▲ a restarted controller looks for the token here
//!   REST: ending_as ──────────► returning ──► provider.terminate, again and again ──► the provider says gone: ended
//! ```
//! What may follow what is in [`machine`]; here are the settings ([`Providers`]) and the task of each provider ([`Place`]).
//!
//! # Who ends what
//! A machine that carries our mark and whose renting has ended is ended by the sweep, whoever launched it when. One of which
//! the store knows *nothing* is told of as an alarm and left alone: every order is durable before it is given, so that such a
//! store is an older one, brought back, and the machine may well run guests.

pub mod machine;
mod place;
mod providers;
pub mod seen;
mod text;

pub use place::{Pace, Place, PlaceParts};
pub(crate) use place::{renew_join, write};
pub use providers::{ProviderConfig, ProviderConfigError, Providers};
pub use text::{problem, secret_purpose};
