//! Between the trait's types and etcd's. Nothing that etcd sends is taken unchecked.

use std::path::PathBuf;

use etcd_client::{Compare as EtcdCompare, CompareOp, KeyValue, TxnOp};
use supercloud_store::{Compare, Condition, Key, Op, Prefix, StoreError, Value, Versioned};

/// Where in etcd the store's keys are: `namespace/`.
#[derive(Debug, Clone)]
pub(crate) struct Namespace(String);

impl Namespace {
    pub(crate) fn new(namespace: &str) -> Self {
        Self(format!("{namespace}/"))
    }

    pub(crate) fn key(&self, key: &Key) -> Vec<u8> {
        [self.0.as_bytes(), key.as_bytes()].concat()
    }

    /// The first key under the prefix, and the end of them.
    pub(crate) fn range(&self, prefix: &Prefix) -> (Vec<u8>, Vec<u8>) {
        let start = [self.0.as_bytes(), prefix.as_bytes()].concat();
        // Starts with a namespace's letter, so there is an end.
        let end = Prefix::end_of(&start).unwrap_or_else(|| vec![0]);
        (start, end)
    }

    pub(crate) fn read_key(&self, key: &[u8]) -> Result<Key, StoreError> {
        let path = key.strip_prefix(self.0.as_bytes()).and_then(|path| std::str::from_utf8(path).ok());
        path.and_then(|path| Key::new(path).ok()).ok_or_else(|| {
            self.damaged(format!("'{}' is not a key of this store", String::from_utf8_lossy(key).escape_debug()))
        })
    }

    pub(crate) fn read(&self, entry: KeyValue) -> Result<Versioned, StoreError> {
        let key = self.read_key(entry.key())?;
        let (create_revision, mod_revision) = (number(entry.create_revision()), number(entry.mod_revision()));
        let version = number(entry.version());
        if create_revision == 0 || mod_revision < create_revision || version == 0 {
            return Err(self.damaged(format!("the counters of '{key}' are impossible")));
        }
        let (_, value) = entry.into_key_value();
        let value = Value::new(value).map_err(|e| self.damaged(format!("the value of '{key}': {e}")))?;
        Ok(Versioned { key, value, create_revision, mod_revision, version })
    }

    pub(crate) fn damaged(&self, reason: String) -> StoreError {
        StoreError::Damaged { path: PathBuf::from(format!("etcd:{}", self.0)), reason }
    }

    pub(crate) fn compare(&self, compare: &Compare) -> EtcdCompare {
        let key = self.key(&compare.key);
        match &compare.condition {
            // Above what etcd can count no key's revision is; nor is it -1.
            Condition::ModRevisionIs(revision) => {
                EtcdCompare::mod_revision(key, CompareOp::Equal, i64::try_from(*revision).unwrap_or(-1))
            }
            Condition::Exists => EtcdCompare::create_revision(key, CompareOp::Greater, 0),
            Condition::Absent => EtcdCompare::create_revision(key, CompareOp::Equal, 0),
            Condition::ValueIs(value) => EtcdCompare::value(key, CompareOp::Equal, value.as_bytes()),
        }
    }

    pub(crate) fn op(&self, op: &Op) -> TxnOp {
        match op {
            Op::Put { key, value } => TxnOp::put(self.key(key), value.as_bytes(), None),
            Op::Delete { key } => TxnOp::delete(self.key(key), None),
        }
    }
}

/// A counter of etcd's; negative ones do not exist, and count as 0.
pub(crate) fn number(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use etcd_client::proto::PbKeyValue;

    use super::*;

    #[test]
    fn keys_stay_in_the_namespace() {
        let namespace = Namespace::new("cloud");
        let key = Key::new("a/b").unwrap();
        assert_eq!(namespace.key(&key), b"cloud/a/b");
        assert_eq!(namespace.read_key(b"cloud/a/b").unwrap(), key);
        assert_eq!(namespace.range(&Prefix::all()), (b"cloud/".to_vec(), b"cloud0".to_vec()));
        for foreign in [&b"cloudy/a"[..], b"cloud/", b"cloud/a/", b"cloud/\xff", b"", b"cloud//a"] {
            assert!(matches!(namespace.read_key(foreign), Err(StoreError::Damaged { .. })), "{foreign:?}");
        }
    }

    #[test]
    fn impossible_entries_are_refused() {
        let namespace = Namespace::new("n");
        let good = PbKeyValue {
            key: b"n/k".to_vec(),
            value: b"v".to_vec(),
            create_revision: 3,
            mod_revision: 4,
            version: 2,
            lease: 0,
        };
        assert_eq!(namespace.read(KeyValue(good.clone())).unwrap().version, 2);
        let changes: [fn(&mut PbKeyValue); 5] = [
            |kv| kv.create_revision = 0,
            |kv| kv.mod_revision = 2,
            |kv| kv.version = -1,
            |kv| kv.key = b"other/k".to_vec(),
            |kv| kv.value = vec![0; supercloud_store::MAX_VALUE_BYTES + 1],
        ];
        for change in changes {
            let mut bad = good.clone();
            change(&mut bad);
            assert!(namespace.read(KeyValue(bad)).is_err());
        }
    }
}
