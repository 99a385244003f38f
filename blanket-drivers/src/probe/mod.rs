//! What the substrate really is, by measuring.
//!
//! That `/dev/kvm` is there says little: on a rented machine it may be the processor's own virtualization, that of a
//! hypervisor below handed through (nesting), page-table virtualization (PVM), which runs only kernels made for it at
//! speed, or an emulator behind the same interface that interprets a guest instruction by instruction. So a tiny guest
//! is run: 64-bit mode, paging on, a loop that writes memory, then a train of exits; see [`kvm`].
//!
//! | case | ns per instruction | our back ends |
//! |---|---|---|
//! | [`Substrate::Hardware`], [`Substrate::NestedHardware`] | below [`SLOW_NS_PER_INSTRUCTION`] | `/dev/kvm` |
//! | [`Substrate::Pvm`] | a plain guest: far above | QEMU by translation (or guests with a PVM kernel) |
//! | [`Substrate::EmulationOnly`] | far above, or it does not run at all | QEMU by translation |
//! | [`Substrate::None`] | | QEMU by translation |

pub mod kvm;
mod machine;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use kvm::KvmFinding;
pub use machine::{Machine, NicInfo};

/// Above this a guest does not run on the processor. Measured: processors 0.1 to 3 ns (1.5 ns in a nested guest of an
/// emulated machine), an emulating `/dev/kvm` about 400 ns; this lies between, a factor of seven from either.
pub const SLOW_NS_PER_INSTRUCTION: f64 = 20.0;

/// What a host's processor and kernel give to guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Substrate {
    /// Guests run on the processor of a real machine.
    Hardware,
    /// Guests run on the processor, of a host that is a virtual machine itself.
    NestedHardware,
    /// A plain guest was measured to be emulated, and the kernel offers page-table virtualization: guests with a kernel
    /// made for it may run at speed (which is not measured yet), others do not.
    Pvm,
    /// `/dev/kvm` answers, but emulates instruction by instruction, or cannot run a plain guest: not usable.
    EmulationOnly,
    /// No usable `/dev/kvm`.
    None,
}

impl Substrate {
    /// Whether any guest runs on `/dev/kvm` at the processor's speed; where not, QEMU must translate.
    #[must_use]
    pub const fn runs_plain_guests(self) -> bool {
        matches!(self, Self::Hardware | Self::NestedHardware)
    }
}

/// What the probe found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// The verdict.
    pub substrate: Substrate,
    /// What `/dev/kvm` did.
    pub kvm: KvmFinding,
    /// The machine around it.
    pub machine: Machine,
}

/// Measures this host. Blocks for at most `budget` and a second (usually for a fraction of a second); never hangs.
#[must_use]
pub fn probe(budget: Duration) -> ProbeReport {
    let machine = Machine::read();
    let kvm = kvm::measure(budget);
    ProbeReport { substrate: classify(&kvm, machine.is_virtual()), kvm, machine }
}

/// The verdict, from what was found.
fn classify(kvm: &KvmFinding, is_virtual: bool) -> Substrate {
    match kvm {
        KvmFinding::Absent { .. } => Substrate::None,
        KvmFinding::Measured { ns_per_instruction, .. } if *ns_per_instruction < SLOW_NS_PER_INSTRUCTION => {
            if is_virtual {
                Substrate::NestedHardware
            } else {
                Substrate::Hardware
            }
        }
        KvmFinding::Measured { has_pvm: true, .. } | KvmFinding::Unusable { has_pvm: true, .. } => Substrate::Pvm,
        KvmFinding::Measured { .. } | KvmFinding::Unusable { .. } => Substrate::EmulationOnly,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(ns_per_instruction: f64, has_pvm: bool) -> KvmFinding {
        KvmFinding::Measured { ns_per_instruction, ns_per_exit: 1000.0, has_pvm }
    }

    #[test]
    fn the_four_cases_are_told_apart() {
        assert_eq!(classify(&measured(0.4, false), false), Substrate::Hardware);
        assert_eq!(classify(&measured(1.5, false), true), Substrate::NestedHardware);
        assert_eq!(classify(&measured(400.0, false), true), Substrate::EmulationOnly);
        assert_eq!(classify(&measured(400.0, true), true), Substrate::Pvm);
        let reason = String::new();
        assert_eq!(
            classify(&KvmFinding::Unusable { reason: reason.clone(), has_pvm: false }, true),
            Substrate::EmulationOnly
        );
        assert_eq!(classify(&KvmFinding::Absent { reason }, true), Substrate::None);
        assert_eq!(classify(&measured(f64::NAN, false), false), Substrate::EmulationOnly);
    }

    #[test]
    fn only_what_runs_on_the_processor_takes_plain_guests() {
        let takes = [Substrate::Hardware, Substrate::NestedHardware];
        for substrate in [Substrate::Pvm, Substrate::EmulationOnly, Substrate::None].into_iter().chain(takes) {
            assert_eq!(substrate.runs_plain_guests(), takes.contains(&substrate));
        }
    }

    /// Runs the real probe, whatever this machine is.
    #[test]
    fn this_machine_can_be_probed_and_the_report_travels() {
        let report = probe(Duration::from_secs(5));
        println!("{report:?}");
        match &report.kvm {
            KvmFinding::Measured { ns_per_instruction, ns_per_exit, .. } => {
                assert!(*ns_per_instruction > 0.0 && *ns_per_exit > 0.0, "{report:?}");
            }
            KvmFinding::Absent { reason } | KvmFinding::Unusable { reason, .. } => assert!(!reason.is_empty()),
        }
        assert!(report.machine.cpus > 0 && report.machine.memory_bytes > 0);
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<ProbeReport>(&text).unwrap().substrate, report.substrate);
    }

    #[test]
    fn a_budget_that_is_too_short_is_kept() {
        // Whatever /dev/kvm does, nothing is measured in no time; and it does not hang.
        assert!(matches!(probe(Duration::ZERO).kvm, KvmFinding::Unusable { .. } | KvmFinding::Absent { .. }));
    }
}
