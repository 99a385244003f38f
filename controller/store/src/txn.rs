//! Transactions: what must hold, and what happens if it does.

use std::collections::HashSet;

use crate::{Key, StoreError, Value, Versioned};

/// Most operations in a transaction, and most compares (etcd's default allows 128 of each).
pub const MAX_TXN_OPS: usize = 100;
/// Largest transaction, in bytes of keys and values plus a small overhead for each entry: with the largest value
/// there is room for 256 KiB beside it, and etcd's default request limit of 1.5 MiB is kept.
pub const MAX_TXN_BYTES: usize = 1280 << 10;
const ENTRY_OVERHEAD_BYTES: usize = 64;

/// What must hold of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// It was last changed at this revision; 0: it is absent.
    ModRevisionIs(u64),
    /// It is there.
    Exists,
    /// It is not there.
    Absent,
    /// It is there and holds this.
    ValueIs(Value),
}

impl Condition {
    /// Whether the condition holds of what the store has.
    pub fn holds(&self, current: Option<&Versioned>) -> bool {
        match (self, current) {
            (Self::ModRevisionIs(revision), current) => current.map_or(0, |c| c.mod_revision) == *revision,
            (Self::Exists, current) => current.is_some(),
            (Self::Absent, current) => current.is_none(),
            (Self::ValueIs(value), Some(current)) => current.value == *value,
            (Self::ValueIs(_), None) => false,
        }
    }
}

/// A condition on one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare {
    /// The key.
    pub key: Key,
    /// What must hold of it.
    pub condition: Condition,
}

/// A change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Sets the key's value.
    Put {
        /// The key.
        key: Key,
        /// Its new value.
        value: Value,
    },
    /// Removes the key; nothing happens if it is absent.
    Delete {
        /// The key.
        key: Key,
    },
}

impl Op {
    /// The key that is changed.
    pub fn key(&self) -> &Key {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// Compares and operations that happen together or not at all.
///
/// ```
/// # use supercloud_store::{Condition, Key, Txn, Value};
/// # fn main() -> Result<(), supercloud_store::StoreError> {
/// let owner = Key::new("guests/gst-1/owner")?;
/// let txn = Txn::new()
///     .require(owner.clone(), Condition::ModRevisionIs(7))
///     .put(owner, Value::new("hst-2 epoch 4")?)
///     .delete(Key::new("tickets/tkt-9")?);
/// assert!(txn.validate().is_ok());
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    /// What must hold, all of it.
    pub compares: Vec<Compare>,
    /// What happens then. No key twice.
    pub ops: Vec<Op>,
}

impl Txn {
    /// An empty transaction; as it is, it commits and changes nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition.
    #[must_use]
    pub fn require(mut self, key: Key, condition: Condition) -> Self {
        self.compares.push(Compare { key, condition });
        self
    }

    /// Adds a put.
    #[must_use]
    pub fn put(mut self, key: Key, value: Value) -> Self {
        self.ops.push(Op::Put { key, value });
        self
    }

    /// Adds a delete.
    #[must_use]
    pub fn delete(mut self, key: Key) -> Self {
        self.ops.push(Op::Delete { key });
        self
    }

    /// The size that counts against [`MAX_TXN_BYTES`].
    pub fn size_bytes(&self) -> usize {
        // A compared key travels twice: in the compare and in the read that answers a conflict.
        let compares = self.compares.iter().map(|c| {
            let value = if let Condition::ValueIs(value) = &c.condition { value.len() } else { 0 };
            2 * (c.key.as_bytes().len() + ENTRY_OVERHEAD_BYTES) + value
        });
        let ops = self.ops.iter().map(|op| {
            let value = if let Op::Put { value, .. } = op { value.len() } else { 0 };
            op.key().as_bytes().len() + ENTRY_OVERHEAD_BYTES + value
        });
        compares.chain(ops).sum()
    }

    /// Checks the limits that every store shares. Stores call it; callers need not.
    pub fn validate(&self) -> Result<(), StoreError> {
        let refuse = |reason: String| Err(StoreError::InvalidTxn { reason });
        if self.ops.len() > MAX_TXN_OPS || self.compares.len() > MAX_TXN_OPS {
            let (ops, compares) = (self.ops.len(), self.compares.len());
            return refuse(format!("{ops} operations and {compares} compares: at most {MAX_TXN_OPS} of each"));
        }
        let bytes = self.size_bytes();
        if bytes > MAX_TXN_BYTES {
            return refuse(format!("{bytes} bytes: at most {MAX_TXN_BYTES}"));
        }
        let mut seen = HashSet::with_capacity(self.ops.len());
        for op in &self.ops {
            if !seen.insert(op.key()) {
                return refuse(format!("key '{}' is changed twice", op.key()));
            }
        }
        Ok(())
    }
}

/// How a transaction ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TxnOutcome {
    /// All compares held, and everything happened.
    Committed {
        /// The revision of what was put and deleted; the store's revision at that moment if nothing changed.
        revision: u64,
    },
    /// A compare did not hold; nothing happened.
    Conflict {
        /// What the compared keys held at that moment, in the order of the compares.
        current: Vec<Option<Versioned>>,
    },
}

impl TxnOutcome {
    /// The revision if committed.
    pub fn committed(&self) -> Option<u64> {
        match self {
            Self::Committed { revision } => Some(*revision),
            Self::Conflict { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: usize) -> Key {
        Key::new(format!("k/{n}")).unwrap()
    }

    #[test]
    fn limits_are_checked() {
        let fill = |n: usize| (0..n).fold(Txn::new(), |txn, i| txn.delete(key(i)));
        assert!(fill(MAX_TXN_OPS).validate().is_ok());
        assert!(fill(MAX_TXN_OPS + 1).validate().is_err());
        let compares = (0..=MAX_TXN_OPS).fold(Txn::new(), |txn, i| txn.require(key(i), Condition::Exists));
        assert!(compares.validate().is_err());
        assert!(Txn::new().delete(key(1)).put(key(1), Value::default()).validate().is_err());
        let big = || Value::new(vec![0; crate::MAX_VALUE_BYTES]).unwrap();
        assert!(Txn::new().put(key(1), big()).validate().is_ok());
        assert!(Txn::new().put(key(1), big()).put(key(2), big()).validate().is_err());
        assert!(Txn::new().require(key(1), Condition::ValueIs(big())).put(key(1), big()).validate().is_err());
    }

    #[test]
    fn conditions_hold_of_what_is_there() {
        let value = Value::new("v").unwrap();
        let there = Versioned { key: key(1), value: value.clone(), create_revision: 2, mod_revision: 5, version: 3 };
        let cases = [
            (Condition::ModRevisionIs(0), true, false),
            (Condition::ModRevisionIs(5), false, true),
            (Condition::ModRevisionIs(2), false, false),
            (Condition::Exists, false, true),
            (Condition::Absent, true, false),
            (Condition::ValueIs(value), false, true),
            (Condition::ValueIs(Value::default()), false, false),
        ];
        for (condition, absent, present) in cases {
            assert_eq!(condition.holds(None), absent, "{condition:?} of nothing");
            assert_eq!(condition.holds(Some(&there)), present, "{condition:?} of something");
        }
    }
}
