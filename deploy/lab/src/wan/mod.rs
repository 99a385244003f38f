//! The WAN between the lab's hosts: delay, rate, loss, queues and cuts, by a relay of our own.
//!
//! Every site has one veth pair per Ethernet segment whose far end lies in the WAN's namespace; the relay reads frames
//! there by `AF_PACKET`, looks the destination up, holds each frame for as long as the link of the two sites asks for,
//! and writes it to the other site's veth.
//!
//! ```text
//!  host a           namespace of the WAN                host b
//!  eth0 ==veth== a1 --+            +-- a2 ==veth== eth0      segment `agents`
//!                     |  link a->b |
//!                     |  link b->a |                         one budget per ordered pair of sites,
//!  ul0  ==veth== o1 --+            +-- o2 ==veth== ul0       shared by both segments
//! ```
//!
//! Why not netem: it is a kernel module that many machines lack (rented ones, containers), and results of one lab
//! should not depend on the kernel below. The relay behaves the same on each. It takes real-time priority where it is allowed to (else
//! delays jitter by some milliseconds on a loaded machine) and says in its status whether it has it.
//!
//! [`fabric`] is the pure part (time comes in as an argument), [`packet`] the sockets, [`relay`] the loop, [`control`] the unix
//! socket on which links are changed while traffic flows.

pub mod control;
pub mod fabric;
pub mod packet;
pub mod relay;
