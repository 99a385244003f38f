//! Who may write: the volume's role on this host, and the only transitions that there are.
//!
//! ```text
//!             adopt            activate(e)              seal(e)
//!   Standby ────────> Adopted ────────────> Active{e} ──────────> Sealed{e}
//!      ^                 │                    │   ^                 │
//!      └─────────────────┘                    └───┘ activate(e' >= e)
//!        pre-copy again                        ^                    │
//!                                              └────────────────────┘ unseal(e), the same e: the switch was refused
//! ```
//!
//! There is no way from `Sealed` to a higher epoch: another host was the writer since, and this copy is old.

use supercloud_ids::Epoch;

use crate::process::control::RoleStatus;

/// The role of a volume on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Opened at a destination; has no map of the source's yet, or only an unconfirmed one.
    Standby,
    /// Has the map of the source that was sealed at this epoch.
    Adopted {
        /// The epoch that the source sealed.
        sealed: Epoch,
    },
    /// The writer.
    Active {
        /// At this epoch.
        epoch: Epoch,
    },
    /// Was the writer; serves blocks to peers.
    Sealed {
        /// At this epoch.
        epoch: Epoch,
    },
}

/// Why a transition was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RoleError {
    /// The epoch asked for is older than the volume's.
    #[error("epoch {asked} is over: the volume is at epoch {current}")]
    OldEpoch {
        /// The epoch asked for.
        asked: Epoch,
        /// The volume's.
        current: Epoch,
    },
    /// The epoch asked for is one that the volume was never given.
    #[error("epoch {asked} is not the volume's, which is {current}")]
    ForeignEpoch {
        /// The epoch asked for.
        asked: Epoch,
        /// The volume's.
        current: Epoch,
    },
    /// The role has no such transition.
    #[error("a volume that is {role:?} cannot {action}")]
    Role {
        /// The role.
        role: Role,
        /// What was asked for.
        action: &'static str,
    },
}

impl Role {
    /// Become the writer at `epoch`.
    pub fn activate(self, epoch: Epoch) -> Result<Self, RoleError> {
        match self {
            Self::Adopted { sealed } if epoch > sealed => Ok(Self::Active { epoch }),
            Self::Adopted { sealed: current } => Err(RoleError::OldEpoch { asked: epoch, current }),
            Self::Active { epoch: current } if epoch >= current => Ok(Self::Active { epoch }),
            Self::Active { epoch: current } => Err(RoleError::OldEpoch { asked: epoch, current }),
            Self::Sealed { epoch: current } if epoch < current => Err(RoleError::OldEpoch { asked: epoch, current }),
            Self::Standby | Self::Sealed { .. } => Err(RoleError::Role { role: self, action: "be activated" }),
        }
    }

    /// End writing under `epoch`.
    pub fn seal(self, epoch: Epoch) -> Result<Self, RoleError> {
        match self {
            Self::Active { epoch: current } | Self::Sealed { epoch: current } => {
                same(epoch, current)?;
                Ok(Self::Sealed { epoch })
            }
            Self::Standby | Self::Adopted { .. } => Err(RoleError::Role { role: self, action: "be sealed" }),
        }
    }

    /// Go on writing under the epoch that was sealed.
    pub fn unseal(self, epoch: Epoch) -> Result<Self, RoleError> {
        match self {
            Self::Active { epoch: current } | Self::Sealed { epoch: current } => {
                same(epoch, current)?;
                Ok(Self::Active { epoch })
            }
            Self::Standby | Self::Adopted { .. } => Err(RoleError::Role { role: self, action: "be unsealed" }),
        }
    }

    /// Take the map of a source that was sealed at `sealed`.
    pub fn adopt(self, sealed: Epoch) -> Result<Self, RoleError> {
        match self {
            Self::Standby => Ok(Self::Adopted { sealed }),
            // Again: the source went on after a refused switch and was sealed once more.
            Self::Adopted { sealed: current } if sealed >= current => Ok(Self::Adopted { sealed }),
            Self::Adopted { sealed: current } => Err(RoleError::OldEpoch { asked: sealed, current }),
            Self::Active { .. } | Self::Sealed { .. } => Err(RoleError::Role { role: self, action: "adopt a map" }),
        }
    }

    /// Be a destination without a map (again), so that blocks may be pulled ahead.
    pub fn await_map(self) -> Result<Self, RoleError> {
        match self {
            Self::Standby | Self::Adopted { .. } => Ok(Self::Standby),
            Self::Active { .. } | Self::Sealed { .. } => Err(RoleError::Role { role: self, action: "copy ahead" }),
        }
    }

    /// Whether the guest's reads and writes are served.
    #[must_use]
    pub const fn is_active(self) -> bool {
        matches!(self, Self::Active { .. })
    }

    /// Whether blocks may be given to peers.
    #[must_use]
    pub const fn may_serve_peers(self) -> bool {
        matches!(self, Self::Active { .. } | Self::Sealed { .. })
    }
}

fn same(asked: Epoch, current: Epoch) -> Result<(), RoleError> {
    match asked.cmp(&current) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Less => Err(RoleError::OldEpoch { asked, current }),
        std::cmp::Ordering::Greater => Err(RoleError::ForeignEpoch { asked, current }),
    }
}

impl From<Role> for RoleStatus {
    fn from(role: Role) -> Self {
        match role {
            Role::Standby => Self::Standby { is_adopted: false },
            Role::Adopted { .. } => Self::Standby { is_adopted: true },
            Role::Active { epoch } => Self::Active { epoch },
            Role::Sealed { epoch } => Self::Sealed { epoch },
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Activate(u64),
        Seal(u64),
        Unseal(u64),
        Adopt(u64),
        Await,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..5u64).prop_map(Step::Activate),
            (0..5u64).prop_map(Step::Seal),
            (0..5u64).prop_map(Step::Unseal),
            (0..5u64).prop_map(Step::Adopt),
            Just(Step::Await),
        ]
    }

    proptest! {
        #[test]
        fn the_epoch_only_rises_and_a_sealed_one_is_followed_only_by_itself(steps in proptest::collection::vec(step(), 1..40)) {
            let mut role = Role::Standby;
            let mut highest = Epoch(0);
            for step in steps {
                let next = match step {
                    Step::Activate(e) => role.activate(Epoch(e)),
                    Step::Seal(e) => role.seal(Epoch(e)),
                    Step::Unseal(e) => role.unseal(Epoch(e)),
                    Step::Adopt(e) => role.adopt(Epoch(e)),
                    Step::Await => role.await_map(),
                };
                let Ok(next) = next else { continue };
                if let Role::Active { epoch } = next {
                    prop_assert!(epoch >= highest);
                    highest = epoch;
                    match role {
                        Role::Sealed { epoch: sealed } => prop_assert_eq!(sealed, epoch),
                        Role::Adopted { sealed } => prop_assert!(epoch > sealed),
                        Role::Standby => prop_assert!(false, "active without a map"),
                        Role::Active { .. } => {}
                    }
                }
                role = next;
            }
        }
    }

    #[test]
    fn an_older_epoch_is_refused_by_name() {
        let active = Role::Active { epoch: Epoch(4) };
        assert_eq!(active.activate(Epoch(3)), Err(RoleError::OldEpoch { asked: Epoch(3), current: Epoch(4) }));
        assert_eq!(active.seal(Epoch(3)), Err(RoleError::OldEpoch { asked: Epoch(3), current: Epoch(4) }));
        assert_eq!(active.seal(Epoch(5)), Err(RoleError::ForeignEpoch { asked: Epoch(5), current: Epoch(4) }));
        let sealed = active.seal(Epoch(4)).unwrap();
        assert!(matches!(sealed.activate(Epoch(5)), Err(RoleError::Role { .. })));
        assert_eq!(sealed.unseal(Epoch(4)), Ok(active));
        assert!(matches!(sealed.unseal(Epoch(5)), Err(RoleError::ForeignEpoch { .. })));
        assert!(matches!(Role::Standby.activate(Epoch(1)), Err(RoleError::Role { .. })));
    }
}
