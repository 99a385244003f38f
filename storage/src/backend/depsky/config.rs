//! Which stores, and the secret that they never see.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Quorum, ReadOrder};
use crate::backend::BucketConfig;

/// Most members: f = 5.
const MEMBERS_AT_MOST: usize = 16;

/// A store over several others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloudOfCloudsConfig {
    /// A file with the store's secret, 64 hexadecimal digits, mode 0600: the same for all who use the store.
    pub key_file: PathBuf,
    /// Who is asked first.
    #[serde(default)]
    pub read_order: ReadOrder,
    /// The stores: 4, 7, 10, 13 or 16, of different providers; a third of them (rounded down) may fail. Their order matters: each
    /// has the pieces of its place.
    #[serde(default, rename = "member")]
    pub members: Vec<MemberConfig>,
}

/// One of the stores. It must be used for nothing else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberConfig {
    /// What it is called in events and logs: `[a-z0-9-]`.
    pub name: String,
    /// A bucket, or
    #[serde(default)]
    pub bucket: Option<BucketConfig>,
    /// a folder.
    #[serde(default)]
    pub folder: Option<PathBuf>,
}

/// What is wrong with the configuration: where, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cloud_of_clouds: {at} {why}")]
pub struct ValueError {
    /// Which value.
    pub at: String,
    /// What is wrong, and what to do.
    pub why: String,
}

impl CloudOfCloudsConfig {
    /// Checks the values.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), ValueError> {
        let wrong = |at: String, why: String| Err(ValueError { at, why });
        let n = self.members.len();
        if Quorum::of(n).is_none() || n > MEMBERS_AT_MOST {
            let why = format!(
                "has {n} entries: list 4 stores of different providers (of which 1 may fail), 7 (2), 10 (3), 13 (4) or 16 (5)"
            );
            return wrong("member".into(), why);
        }
        if !self.key_file.is_absolute() {
            return wrong("key_file".into(), "must be an absolute path of a file with 64 hexadecimal digits".into());
        }
        for (index, member) in self.members.iter().enumerate() {
            let at = |field: &str| format!("member {} ('{}'){field}", index + 1, member.name);
            let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
            if !(1..=40).contains(&member.name.len()) || !member.name.bytes().all(is_plain) {
                return wrong(at(": name"), "is not 1 to 40 of [a-z0-9-]".into());
            }
            match (&member.bucket, &member.folder) {
                (Some(bucket), None) => {
                    if let Err(error) = bucket.validate() {
                        return wrong(at(""), error.to_string());
                    }
                }
                (None, Some(folder)) if folder.is_absolute() => {}
                (None, Some(_)) => return wrong(at(": folder"), "must be an absolute path".into()),
                _ => return wrong(at(""), "needs either bucket = { ... } or folder = \"/...\"".into()),
            }
            for (other_index, other) in self.members[..index].iter().enumerate() {
                if other.name == member.name {
                    return wrong(at(": name"), format!("is that of member {} too", other_index + 1));
                }
                let place = |of: &MemberConfig| {
                    let bucket = of.bucket.as_ref();
                    (of.folder.clone(), bucket.map(|b| (b.endpoint.clone(), b.bucket.clone(), b.prefix.clone())))
                };
                if place(other) == place(member) {
                    return wrong(at(""), format!("is the same place as member {}", other_index + 1));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(n: usize) -> CloudOfCloudsConfig {
        let member = |i: usize| MemberConfig {
            name: format!("provider-{i}"),
            bucket: None,
            folder: Some(format!("/stores/{i}").into()),
        };
        CloudOfCloudsConfig {
            key_file: "/etc/supercloud/store-key".into(),
            read_order: ReadOrder::Fastest,
            members: (0..n).map(member).collect(),
        }
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place_and_what_to_do() {
        for n in [4, 7, 10, 13, 16] {
            config(n).validate().unwrap();
        }
        for n in [0, 1, 3, 5, 6, 8, 17, 19] {
            let error = config(n).validate().unwrap_err();
            assert!(error.to_string().contains("list 4 stores"), "{error}");
        }
        let changed = |change: fn(&mut CloudOfCloudsConfig)| {
            let mut config = config(4);
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(changed(|c| c.members[2].folder = None).contains("member 3 ('provider-2') needs either"));
        assert!(changed(|c| c.members[2].folder = Some("x".into())).contains("absolute"));
        assert!(changed(|c| c.members[3].name = "provider-0".into()).contains("is that of member 1 too"));
        assert!(changed(|c| c.members[3].folder = c.members[1].folder.clone()).contains("same place as member 2"));
        assert!(changed(|c| c.members[0].name = "A B".into()).contains("[a-z0-9-]"));
        assert!(changed(|c| c.key_file = "key".into()).contains("key_file"));
    }
}
