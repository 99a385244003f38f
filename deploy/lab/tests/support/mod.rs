//! What the failure tests are made of.

pub mod case;
pub mod checks;
pub mod ground;
pub mod life;
pub mod refusals;
pub mod stints;
pub mod strike;
