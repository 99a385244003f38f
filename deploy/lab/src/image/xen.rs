//! The hypervisor of Xen hosts: the package that `deploy/xen` has built, whose hypervisor finds the pages that a guest writes and so can
//! move it live, else Debian's own, which can only move a guest that stands still.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{ImageError, cache, io_at, kernel, running};
use crate::command::Run;

/// Changed whenever what is kept of a package changes.
const LAYOUT: &[u8] = b"xen-1";

/// The package that names Debian's newest Xen.
const NEWEST: &str = "xen-system-amd64";

/// What `deploy/xen` calls its package; the file's name goes on with its version.
const BUILT: &str = "supercloud-xen-hypervisor_";

/// A hypervisor.
#[derive(Debug, Clone)]
pub struct Xen {
    /// The program as QEMU's `-kernel` takes it: an unpacked ELF file.
    pub elf: PathBuf,
    /// Which package it is of, and what it can do, for people.
    pub about: String,
}

/// Where `deploy/xen` leaves its packages.
#[must_use]
pub fn packages() -> PathBuf {
    cache::root().join("../xen")
}

/// The hypervisor that hosts of this lab run.
///
/// # Errors
/// When no package can be had.
pub fn hypervisor() -> Result<Xen, ImageError> {
    let debian = kernel::dependency(NEWEST, "xen-hypervisor-")?;
    let Some(built) = newest_built(&packages()) else {
        let version = kernel::candidate(&debian)?;
        let key = cache::key(&[LAYOUT, debian.as_bytes(), version.as_bytes()]);
        let dir = cache::get_or_build("hypervisor", &key, |dir| {
            let file = kernel::download(&debian, dir)?;
            unpack(&file, dir)?;
            fs::remove_file(&file).map_err(io_at("remove", &file))
        })?;
        let about =
            format!("{debian} {version}: without shadow page tables, so guests are moved while they stand still");
        return Ok(Xen { elf: dir.join("xen.elf"), about });
    };
    let name = built.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let content = fs::read(&built).map_err(io_at("read", &built))?;
    let key = cache::key(&[LAYOUT, name.as_bytes(), &content]);
    let dir = cache::get_or_build("hypervisor", &key, |dir| unpack(&built, dir))?;
    Ok(Xen { elf: dir.join("xen.elf"), about: format!("{name}: with shadow page tables, so guests move live") })
}

/// The package that was built last.
fn newest_built(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    let is_package = |name: &str| name.starts_with(BUILT) && name.ends_with(".deb");
    let built = entries.filter(|entry| entry.file_name().to_str().is_some_and(is_package));
    built.filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path()))).max().map(|(_, path)| path)
}

fn unpack(package: &Path, dir: &Path) -> Result<(), ImageError> {
    let tree = dir.join("tree");
    Run::new("dpkg-deb")
        .arg("-x")
        .args([package, &tree])
        .budget(Duration::from_secs(60))
        .ok()
        .map_err(running("unpacking Xen"))?;
    let boot = tree.join("boot");
    let is_packed = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "gz");
    let mut files = fs::read_dir(&boot).map_err(io_at("list", &boot))?.flatten().map(|entry| entry.path());
    let no_xen = || ImageError::Missing(format!("no hypervisor in {}", package.display()));
    let packed = files.find(is_packed).ok_or_else(no_xen)?;
    let place = dir.join("xen.elf");
    fs::copy(&packed, place.with_extension("elf.gz")).map_err(io_at("copy", &packed))?;
    Run::new("gzip").arg("-d").arg(place.with_extension("elf.gz")).ok().map_err(running("unpacking Xen"))?;
    fs::remove_dir_all(&tree).map_err(io_at("remove", &tree))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_packages_of_ours_count_and_the_last_one_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(newest_built(folder.path()), None);
        assert_eq!(newest_built(&folder.path().join("nowhere")), None);
        for other in ["supercloud-xen-hypervisor_1.deb.part", "xen-hypervisor_1.deb", "supercloud-xen-hypervisor_1.dsc"]
        {
            fs::write(folder.path().join(other), b"").unwrap();
        }
        assert_eq!(newest_built(folder.path()), None);
        let [old, new] =
            ["supercloud-xen-hypervisor_2.deb", "supercloud-xen-hypervisor_1.deb"].map(|name| folder.path().join(name));
        for (path, seconds) in [(&old, 1), (&new, 2)] {
            fs::write(path, b"").unwrap();
            let time = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            fs::File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
        }
        assert_eq!(newest_built(folder.path()), Some(new));
    }
}
