//! What a guest finds besides what its description says: versions of the machine, each of which stays as it is.
//!
//! The version is a part of a guest's class, so that a guest is only ever moved to where its version is offered, and goes on there with
//! the devices that it knows. A guest keeps its version for as long as it lives, also when it boots again.

/// A version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MachineVersion {
    /// The first.
    One,
    /// Disks of which parts can be emptied, where what serves them can do that; a memory balloon.
    Two,
}

impl MachineVersion {
    /// All that there are, newest first.
    pub const ALL: [Self; 2] = [Self::Two, Self::One];

    /// The one of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.name() == name)
    }

    /// Its name in a guest's class.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::One => "1",
            Self::Two => "2",
        }
    }

    /// Whether disks can be told what they need not keep.
    #[must_use]
    pub fn has_thin_disks(self) -> bool {
        self >= Self::Two
    }

    /// Whether there can be a memory balloon.
    #[must_use]
    pub fn has_balloon(self) -> bool {
        self >= Self::Two
    }
}
