//! What the substrate really is, by measuring.

use serde::{Deserialize, Serialize};

/// What a host's processor and kernel give to guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Substrate {
    /// Guests run on the processor of a real machine.
    Hardware,
    /// Guests run on the processor, of a host that is a virtual machine itself.
    NestedHardware,
    /// Page-table virtualization: guests run at speed only with a kernel made for it; others are emulated.
    Pvm,
    /// `/dev/kvm` answers, but emulates instruction by instruction: not usable.
    EmulationOnly,
    /// No usable `/dev/kvm`.
    None,
}

impl Substrate {
    /// Whether any guest runs on `/dev/kvm` at the processor's speed.
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
}
