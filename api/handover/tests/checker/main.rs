//! Checks the protocol's own `step` functions and decisions: every interleaving of small scenarios, and long random
//! runs of larger ones.

#[cfg(test)]
mod explore;
#[cfg(test)]
mod scenarios;
#[cfg(test)]
mod simulator;
#[cfg(test)]
mod world;
