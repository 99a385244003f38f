//! A distribution's kernel for guests, unpacked from its package; nothing is installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{ImageError, cache, io_at, modules, running};
use crate::command::{CommandError, Run};

const DOWNLOAD_BUDGET: Duration = Duration::from_secs(600);

/// Changed whenever what is kept of a package changes.
const LAYOUT: &[u8] = b"kernel-3";

/// The package that names the newest kernel for clouds, and the one for the newest kernel for all machines.
const CLOUD: &str = "linux-image-cloud-amd64";
const ALL: &str = "linux-image-amd64";

/// An unpacked kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The folder in the cache.
    pub dir: PathBuf,
}

impl Kernel {
    /// The kernel. Packed: unpacking costs 0.3 s of a boot without hardware virtualization, the unpacked one 39 MB more in
    /// every image.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// The modules that a guest loads, in order; their files lie in `modules/`.
    ///
    /// # Errors
    /// When the list cannot be read.
    pub fn modules(&self) -> Result<Vec<String>, ImageError> {
        let path = self.dir.join("modules.load");
        Ok(fs::read_to_string(&path).map_err(io_at("read", &path))?.lines().map(str::to_owned).collect())
    }
}

/// Debian's newest cloud kernel, from the archive or from the cache.
///
/// # Errors
/// When the package can neither be downloaded nor found in the cache.
pub fn cloud() -> Result<Kernel, ImageError> {
    with_modules("kernel", CLOUD, &modules::WANTED)
}

/// The same kernel with the modules that a host VM loads: its own disk, KVM on AMD's processors, taps.
///
/// # Errors
/// As [`cloud`].
pub fn cloud_for_hosts() -> Result<Kernel, ImageError> {
    with_modules("host-kernel", CLOUD, &modules::WANTED_BY_HOSTS)
}

/// A kernel for host VMs with agents: the cloud kernel, or the one for all machines, which also knows cards and disks that no cloud
/// has any more.
///
/// # Errors
/// As [`cloud`].
pub fn for_agents_hosts(is_for_clouds: bool) -> Result<Kernel, ImageError> {
    let (kind, package) = if is_for_clouds { ("agent-kernel", CLOUD) } else { ("agent-big-kernel", ALL) };
    with_modules(kind, package, &modules::WANTED_BY_AGENTS_HOSTS)
}

/// The kernel of a Xen host's first domain: the one for all machines, which the cloud kernel cannot be.
///
/// # Errors
/// As [`cloud`].
pub fn for_xen_hosts() -> Result<Kernel, ImageError> {
    with_modules("xen-kernel", ALL, &modules::WANTED_BY_XEN_HOSTS)
}

fn with_modules(kind: &str, newest_of: &str, wanted: &[&str]) -> Result<Kernel, ImageError> {
    let newest = || -> Result<Kernel, ImageError> {
        let package = dependency(newest_of, "linux-image-")?;
        let version = candidate(&package)?;
        let key = cache::key(&[LAYOUT, package.as_bytes(), version.as_bytes(), wanted.join(" ").as_bytes()]);
        Ok(Kernel { dir: cache::get_or_build(kind, &key, |dir| build(&package, wanted, dir))? })
    };
    newest().or_else(|error| {
        // Without the archive (no network, lists out of date) the last kernel is as good.
        cache::built(kind).into_iter().next().map(|dir| Kernel { dir }).ok_or(error)
    })
}

pub(super) fn dependency(package: &str, prefix: &str) -> Result<String, ImageError> {
    let text =
        Run::line(&format!("apt-cache depends {package}")).text().map_err(running("asking for the newest kernel"))?;
    let found =
        text.lines().filter_map(|line| line.trim().strip_prefix("Depends: ")).find(|name| name.starts_with(prefix));
    found
        .map(str::to_owned)
        .ok_or_else(|| ImageError::Missing(format!("{package} is in no package list (apt-get update)")))
}

pub(super) fn candidate(package: &str) -> Result<String, ImageError> {
    let text =
        Run::line(&format!("apt-cache policy {package}")).text().map_err(running("asking for the newest kernel"))?;
    let found = text.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
    found.map(str::to_owned).ok_or_else(|| ImageError::Missing(format!("{package} has no version")))
}

/// Downloads a package into a folder; once more with fresh lists when the archive no longer has that version.
pub(crate) fn download(package: &str, dir: &Path) -> Result<PathBuf, ImageError> {
    let get = || -> Result<(), CommandError> {
        Run::line(&format!("apt-get -o APT::Sandbox::User=root download {package}"))
            .dir(dir)
            .budget(DOWNLOAD_BUDGET)
            .ok()
    };
    if get().is_err() {
        Run::line("apt-get update").budget(DOWNLOAD_BUDGET).ok().map_err(running("updating the package lists"))?;
        get().map_err(running("downloading a package"))?;
    }
    let entries = fs::read_dir(dir).map_err(io_at("list", dir))?;
    let is_package = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "deb");
    let found = entries.flatten().map(|entry| entry.path()).find(is_package);
    found.ok_or_else(|| ImageError::Missing(format!("apt-get download left no file of {package}")))
}

fn build(package: &str, wanted: &[&str], dir: &Path) -> Result<(), ImageError> {
    let file = download(package, dir)?;
    let tree = dir.join("tree");
    Run::new("dpkg-deb")
        .arg("-x")
        .args([&file, &tree])
        .budget(DOWNLOAD_BUDGET)
        .ok()
        .map_err(running("unpacking the kernel"))?;

    let boot = tree.join("boot");
    let is_kernel =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-"));
    let mut entries = fs::read_dir(&boot).map_err(io_at("list", &boot))?.flatten().map(|entry| entry.path());
    let packed = entries.find(is_kernel).ok_or_else(|| ImageError::Missing(format!("no kernel in {package}")))?;
    fs::copy(&packed, dir.join("vmlinuz")).map_err(io_at("copy", &packed))?;

    let folder = dir.join("modules");
    fs::create_dir(&folder).map_err(io_at("make", &folder))?;
    let mut names = String::new();
    for path in modules::in_order(&tree.join("lib/modules"), wanted)? {
        let Some(name) = path.file_name() else { continue };
        fs::copy(&path, folder.join(name)).map_err(io_at("copy", &path))?;
        names.push_str(&format!("{}\n", name.to_string_lossy()));
    }
    let place = dir.join("modules.load");
    fs::write(&place, names).map_err(io_at("write", &place))?;
    fs::remove_dir_all(&tree).map_err(io_at("remove", &tree))?;
    fs::remove_file(&file).map_err(io_at("remove", &file))
}
