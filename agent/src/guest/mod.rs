//! One guest on this host: what is remembered of it, and the task that owns it.

pub mod machine;
pub mod record;
