//! Two and three agents in one process, over real TLS, with real volume processes; the hypervisor and the controller are test
//! doubles, the ownership protocol is the real one.

mod controller;
mod crashes;
mod hypervisor;
mod lab;
mod moves;
mod nbd;
