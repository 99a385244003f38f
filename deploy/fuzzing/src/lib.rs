//! Fuzzing of everything that reads what others wrote: functions as targets, an own small mutation engine, no special compiler.
//!
//! `cargo test` runs every target for a moment and every input that once did harm (`corpus/<target>/*`); `./deploy/fuzz [TARGET...]
//! [--seconds N]` runs on. An input does harm when the target panics (a broken promise of its own, such as "what was read is
//! written back the same", is a panic too), takes longer than [`engine::SLOW`], or asks for more memory at once than
//! [`memory::CAP_BYTES`].
//!
//! TO ADD ONE: a function of bytes in [`targets`] that returns nothing, seeds (a few good inputs), a row in [`targets::TARGETS`].

pub mod engine;
mod guest;
pub mod memory;
pub mod mutate;
pub mod targets;
