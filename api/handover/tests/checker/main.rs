//! Checks the protocol's own `step` functions and decisions: every interleaving of small scenarios, and long random
//! runs of larger ones.

mod explore;
mod scenarios;
mod world;
