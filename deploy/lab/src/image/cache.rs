//! The cache of built things: a folder per thing, named by a hash of what went into it, made whole or not at all.

use std::fs;
use std::path::{Path, PathBuf};

use super::{ImageError, io_at};
use crate::state::{self, Lock};

/// Old things of a kind that are kept beside the newest.
const KEEP: usize = 2;

/// Where the cache lies: `$XDG_CACHE_HOME/supercloud/lab`, by default below `~/.cache`.
#[must_use]
pub fn root() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache");
    let base = std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from);
    base.join("supercloud/lab")
}

/// A name for what went into a thing.
#[must_use]
pub fn key(parts: &[&[u8]]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        // Lengths keep ("ab", "c") and ("a", "bc") apart.
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

/// The folder `<kind>-<key>`; when it is not there, `build` fills an empty folder that then becomes it. Two that ask at
/// once build once.
///
/// # Errors
/// When `build` fails; nothing is kept then.
pub fn get_or_build(
    kind: &str,
    key: &str,
    build: impl FnOnce(&Path) -> Result<(), ImageError>,
) -> Result<PathBuf, ImageError> {
    let root = root();
    let place = root.join(format!("{kind}-{key}"));
    if place.is_dir() {
        return Ok(place);
    }
    state::make_dir(&root)?;
    let _lock = Lock::take(&root.join(format!("{kind}.lock")))?;
    if place.is_dir() {
        return Ok(place);
    }
    let part = root.join(format!("{kind}.part"));
    if part.exists() {
        fs::remove_dir_all(&part).map_err(io_at("remove", &part))?;
    }
    state::make_dir(&part)?;
    build(&part)?;
    fs::rename(&part, &place).map_err(io_at("name", &place))?;
    forget_old(&root, kind, &place);
    Ok(place)
}

/// Things of this kind, the newest first.
#[must_use]
pub fn built(kind: &str) -> Vec<PathBuf> {
    of_kind(&root(), kind)
}

fn of_kind(root: &Path, kind: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let prefix = format!("{kind}-");
    let mut found: Vec<_> = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix) && entry.path().is_dir())
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    found.sort();
    found.into_iter().rev().map(|(_, path)| path).collect()
}

/// Old images are large; somebody may still boot from the last ones.
fn forget_old(root: &Path, kind: &str, newest: &Path) {
    for old in of_kind(root, kind).into_iter().filter(|path| path != newest).skip(KEEP) {
        // One that cannot be removed only takes room.
        let _ = fs::remove_dir_all(old);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_parts_apart() {
        assert_eq!(key(&[b"a", b"b"]), key(&[b"a", b"b"]));
        assert_ne!(key(&[b"ab", b"c"]), key(&[b"a", b"bc"]));
        assert_eq!(key(&[]).len(), 16);
    }
}
