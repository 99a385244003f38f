//! `fleet.toml`: what shall be there. Read strictly: an unknown key, a name that is none, or the same thing twice is an error
//! that names its line.

use std::{
    collections::HashMap,
    fmt,
    io::Read as _,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Deserializer, Serialize, de};
use supercloud_api::{CpuChoice, Name, OnLoss, Propagation, Quota, Shape};
use toml::Spanned;

use crate::values;

/// The longest file of a fleet, in bytes.
const FLEET_AT_MOST: u64 = 4 << 20;
/// The longest user-data that the API takes, in bytes.
const USER_DATA_AT_MOST: u64 = 64 << 10;

/// Why a file makes no fleet.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// The file, or one that it names, cannot be read.
    #[error("reading {path}")]
    Read {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is longer than allowed.
    #[error("{path} is longer than {most} bytes")]
    TooLong {
        /// Which.
        path: String,
        /// The limit.
        most: u64,
    },
    /// It is no TOML, or has keys or values that are none of ours; the message names the line.
    #[error(transparent)]
    Toml(#[from] toml::de::Error),
    /// A thing is not as it must be.
    #[error("line {line}: {thing}: {what}")]
    Thing {
        /// Where its name stands.
        line: usize,
        /// Which.
        thing: String,
        /// What is wrong.
        what: String,
    },
}

/// What a thing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A project.
    Project,
    /// A network.
    Network,
    /// An image.
    Image,
    /// A guest.
    Guest,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Project => "project",
            Self::Network => "network",
            Self::Image => "image",
            Self::Guest => "guest",
        })
    }
}

/// The name of a thing with its project's: `shop/web`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    /// The project; that of a project is itself.
    pub project: Name,
    /// The name.
    pub name: Name,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.project == self.name { write!(f, "{}", self.name) } else { write!(f, "{}/{}", self.project, self.name) }
    }
}

/// What shall be there.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Fleet {
    /// Projects.
    pub projects: Vec<WantedProject>,
    /// Networks.
    pub networks: Vec<WantedNetwork>,
    /// Images.
    pub images: Vec<WantedImage>,
    /// Guests.
    pub guests: Vec<WantedGuest>,
}

/// A project that shall be there.
#[derive(Debug, Clone, PartialEq)]
pub struct WantedProject {
    /// Its name.
    pub key: Key,
    /// What it may use at once; as it is when absent.
    pub quota: Option<Quota>,
}

/// A network that shall be there.
#[derive(Debug, Clone, PartialEq)]
pub struct WantedNetwork {
    /// Its name.
    pub key: Key,
    /// Its IPv4 prefix.
    pub cidr: String,
    /// Name servers; as they are when absent.
    pub dns: Option<Vec<Ipv4Addr>>,
}

/// An image that shall be there.
#[derive(Debug, Clone, PartialEq)]
pub struct WantedImage {
    /// Its name.
    pub key: Key,
    /// The file of its disk.
    pub disk: PathBuf,
    /// The file of a kernel to boot directly.
    pub kernel: Option<PathBuf>,
    /// The file of its initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub cmdline: Option<String>,
    /// The sizes and times of change of its files, as one word; absent where one of them is not there.
    pub files: Option<String>,
}

/// A guest that shall be there.
#[derive(Debug, Clone, PartialEq)]
pub struct WantedGuest {
    /// Its name.
    pub key: Key,
    /// The image that its disk starts from.
    pub image: Name,
    /// The network it is attached to.
    pub network: Name,
    /// vCPUs and memory.
    pub shape: Shape,
    /// Its address; the first free one when absent.
    pub ipv4: Option<Ipv4Addr>,
    /// Its disk's size in bytes; that of the image when absent.
    pub disk_bytes: Option<u64>,
    /// cloud-init user-data.
    pub user_data: Option<String>,
    /// Appended to the image's kernel command line.
    pub cmdline_extra: Option<String>,
    /// How blocks follow its disk.
    pub propagation: Propagation,
    /// Whether price policies may move it.
    pub follow_prices: bool,
    /// What its processors can do; that of its first start, or `portable`, when absent.
    pub cpu: Option<CpuChoice>,
    /// What is done by itself when its running copy is lost.
    pub on_loss: OnLoss,
    /// What it shall do.
    pub state: WantedState,
    /// A host or a cloud; anywhere when absent.
    pub place: Option<String>,
}

impl WantedGuest {
    /// What the API takes when a guest is made and does not show afterwards, as one hash: BLAKE3, hex.
    pub fn hidden_inputs(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for part in [&self.user_data, &self.cmdline_extra] {
            let text = part.as_deref().unwrap_or_default();
            hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// What a guest shall do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WantedState {
    /// Run.
    #[default]
    Running,
    /// Not run.
    Stopped,
    /// Lie in the image store with its memory.
    Frozen,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    default_project: Option<Name>,
    #[serde(default, rename = "project")]
    projects: Vec<ProjectEntry>,
    #[serde(default, rename = "network")]
    networks: Vec<NetworkEntry>,
    #[serde(default, rename = "image")]
    images: Vec<ImageEntry>,
    #[serde(default, rename = "guest")]
    guests: Vec<GuestEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ProjectEntry {
    name: Spanned<Name>,
    quota: Option<QuotaEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QuotaEntry {
    guests: u32,
    vcpus: u32,
    #[serde(deserialize_with = "size")]
    memory: u64,
    #[serde(deserialize_with = "size")]
    volumes: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworkEntry {
    name: Spanned<Name>,
    project: Option<Name>,
    cidr: String,
    dns: Option<Vec<Ipv4Addr>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ImageEntry {
    name: Spanned<Name>,
    project: Option<Name>,
    disk: PathBuf,
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    cmdline: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GuestEntry {
    name: Spanned<Name>,
    project: Option<Name>,
    image: Name,
    network: Name,
    #[serde(deserialize_with = "shape")]
    shape: Shape,
    ipv4: Option<Ipv4Addr>,
    #[serde(default, deserialize_with = "some_size")]
    disk: Option<u64>,
    cloud_init: Option<PathBuf>,
    cmdline_extra: Option<String>,
    #[serde(default)]
    propagation: Propagation,
    #[serde(default)]
    follow_prices: bool,
    cpu: Option<CpuChoice>,
    #[serde(default)]
    on_loss: OnLoss,
    #[serde(default)]
    state: WantedState,
    #[serde(rename = "where")]
    place: Option<String>,
}

fn shape<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Shape, D::Error> {
    let text = String::deserialize(deserializer)?;
    let shape = values::shape(&text).map_err(de::Error::custom)?;
    shape.check().map_err(de::Error::custom)?;
    Ok(shape)
}

fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    values::size(&String::deserialize(deserializer)?).map_err(de::Error::custom)
}

fn some_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    size(deserializer).map(Some)
}

/// The text of a file that is no longer than `most` bytes.
fn read(path: &Path, most: u64) -> Result<String, FleetError> {
    let path_text = || path.display().to_string();
    let mut text = String::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(most + 1).read_to_string(&mut text));
    let length = read.map_err(|source| FleetError::Read { path: path_text(), source })?;
    if length as u64 > most { Err(FleetError::TooLong { path: path_text(), most }) } else { Ok(text) }
}

/// What tells a file from what it was before: its size and its time of change.
fn version(path: &Path) -> Option<String> {
    let about = path.metadata().ok()?;
    let changed = about.modified().ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(format!("{}@{}", about.len(), changed.as_nanos()))
}

/// Turns a file's entries into things, and notes what is wrong with a line.
struct Reader<'a> {
    text: &'a str,
    folder: &'a Path,
    project: Name,
    lines: HashMap<(Kind, Key), usize>,
}

impl Reader<'_> {
    fn line(&self, name: &Spanned<Name>) -> usize {
        let before = self.text.as_bytes().iter().take(name.span().start);
        1 + before.filter(|byte| **byte == b'\n').count()
    }

    fn wrong(&self, name: &Spanned<Name>, kind: Kind, what: impl Into<String>) -> FleetError {
        FleetError::Thing { line: self.line(name), thing: format!("{kind} {}", name.get_ref()), what: what.into() }
    }

    /// The key of a thing, which no other one has.
    fn key(&mut self, kind: Kind, project: Option<Name>, name: &Spanned<Name>) -> Result<Key, FleetError> {
        let own = name.get_ref().clone();
        let project = match kind {
            Kind::Project => own.clone(),
            _ => project.unwrap_or_else(|| self.project.clone()),
        };
        let key = Key { project, name: own };
        let line = self.line(name);
        match self.lines.insert((kind, key.clone()), line) {
            Some(first) => Err(self.wrong(name, kind, format!("there is one of this name in line {first} already"))),
            None => Ok(key),
        }
    }

    fn guest(&mut self, entry: GuestEntry) -> Result<WantedGuest, FleetError> {
        let key = self.key(Kind::Guest, entry.project, &entry.name)?;
        let user_data = entry.cloud_init.map(|path| read(&self.folder.join(path), USER_DATA_AT_MOST)).transpose();
        let user_data = user_data.map_err(|error| match error {
            FleetError::Read { path, source } => {
                self.wrong(&entry.name, Kind::Guest, format!("cloud_init: reading {path}: {source}"))
            }
            other => self.wrong(&entry.name, Kind::Guest, format!("cloud_init: {other}")),
        })?;
        if entry.cmdline_extra.as_ref().is_some_and(|text| text.len() > 1024 || text.chars().any(char::is_control)) {
            let what = "cmdline_extra is at most 1024 bytes without control characters";
            return Err(self.wrong(&entry.name, Kind::Guest, what));
        }
        Ok(WantedGuest {
            key,
            image: entry.image,
            network: entry.network,
            shape: entry.shape,
            ipv4: entry.ipv4,
            disk_bytes: entry.disk,
            user_data,
            cmdline_extra: entry.cmdline_extra,
            propagation: entry.propagation,
            follow_prices: entry.follow_prices,
            cpu: entry.cpu,
            on_loss: entry.on_loss,
            state: entry.state,
            place: entry.place,
        })
    }

    fn image(&mut self, entry: ImageEntry) -> Result<WantedImage, FleetError> {
        let key = self.key(Kind::Image, entry.project, &entry.name)?;
        if entry.kernel.is_none() && (entry.initrd.is_some() || entry.cmdline.is_some()) {
            return Err(self.wrong(&entry.name, Kind::Image, "initrd and cmdline need a kernel"));
        }
        let beside = |path: PathBuf| self.folder.join(path);
        let (disk, kernel, initrd) = (beside(entry.disk), entry.kernel.map(beside), entry.initrd.map(beside));
        let paths = [Some(&disk), kernel.as_ref(), initrd.as_ref()];
        let files = paths.iter().flatten().map(|path| version(path)).collect::<Option<Vec<String>>>();
        Ok(WantedImage { key, disk, kernel, initrd, cmdline: entry.cmdline, files: files.map(|files| files.join(" ")) })
    }
}

impl Fleet {
    /// The default project of a file, if it says one.
    ///
    /// # Errors
    /// As [`Fleet::load`].
    pub fn default_project(text: &str) -> Result<Option<Name>, FleetError> {
        Ok(toml::from_str::<File>(text)?.default_project)
    }

    /// The file's text.
    ///
    /// # Errors
    /// When it cannot be read, or is too long.
    pub fn read(path: &Path) -> Result<String, FleetError> {
        read(path, FLEET_AT_MOST)
    }

    /// Reads a fleet. Paths in it are relative to `folder`; what names no project is in `project`.
    ///
    /// # Errors
    /// What is wrong, and in which line.
    pub fn load(text: &str, folder: &Path, project: Name) -> Result<Self, FleetError> {
        let file: File = toml::from_str(text)?;
        let mut reader = Reader { text, folder, project, lines: HashMap::new() };
        let mut fleet = Self::default();
        for entry in file.projects {
            let key = reader.key(Kind::Project, None, &entry.name)?;
            let quota = entry.quota.map(|quota| Quota {
                guests: quota.guests,
                vcpus: quota.vcpus,
                memory_bytes: quota.memory,
                volume_bytes: quota.volumes,
            });
            fleet.projects.push(WantedProject { key, quota });
        }
        for entry in file.networks {
            let key = reader.key(Kind::Network, entry.project, &entry.name)?;
            fleet.networks.push(WantedNetwork { key, cidr: entry.cidr, dns: entry.dns });
        }
        for entry in file.images {
            fleet.images.push(reader.image(entry)?);
        }
        for entry in file.guests {
            fleet.guests.push(reader.guest(entry)?);
        }
        Ok(fleet)
    }

    /// Whether a thing shall be there.
    pub fn has(&self, kind: Kind, key: &Key) -> bool {
        match kind {
            Kind::Project => self.projects.iter().any(|one| one.key == *key),
            Kind::Network => self.networks.iter().any(|one| one.key == *key),
            Kind::Image => self.images.iter().any(|one| one.key == *key),
            Kind::Guest => self.guests.iter().any(|one| one.key == *key),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Fleet, FleetError> {
        Fleet::load(text, Path::new("/nowhere"), "shop".parse().unwrap())
    }

    const GUEST: &str = "[[guest]]\nname = \"web\"\nimage = \"debian\"\nnetwork = \"lan\"\nshape = \"2x1G\"\n";

    #[test]
    fn what_is_not_said_has_defaults_and_paths_are_beside_the_file() {
        let image = "[[image]]\nname = \"debian\"\nproject = \"base\"\ndisk = \"d.qcow2\"\n";
        let fleet =
            load(&format!("[[project]]\nname = \"shop\"\n{image}{GUEST}where = \"home\"\ndisk = \"10G\"\n")).unwrap();
        assert_eq!(fleet.projects[0].key.to_string(), "shop");
        assert_eq!(
            (fleet.images[0].key.to_string(), &fleet.images[0].disk),
            ("base/debian".into(), &"/nowhere/d.qcow2".into())
        );
        let web = &fleet.guests[0];
        assert_eq!(
            (web.key.to_string(), web.shape.memory_bytes, web.disk_bytes),
            ("shop/web".into(), 1 << 30, Some(10 << 30))
        );
        assert_eq!(
            (web.state, web.place.as_deref(), web.user_data.as_ref()),
            (WantedState::Running, Some("home"), None)
        );
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (text, line, what) in [
            (format!("{GUEST}memroy = 5\n"), "line 6", "memroy"),
            ("\n[[guests]]\nname = \"a\"\n".into(), "line 2", "guests"),
            (GUEST.replace("\"web\"", "\"Web\""), "line 2", "is not a name"),
            (GUEST.replace("2x1G", "2"), "line 5", "no shape"),
            (GUEST.replace("2x1G", "0x1G"), "line 5", "1 to 64"),
            (format!("{GUEST}state = \"asleep\"\n"), "line 6", "frozen"),
            (format!("{GUEST}disk = \"10 apples\"\n"), "line 6", "no size"),
            (format!("{GUEST}\n{GUEST}"), "line 8", "line 2 already"),
            (format!("{GUEST}cloud_init = \"none.yaml\"\n"), "line 2", "/nowhere/none.yaml"),
            ("[[image]]\nname = \"a\"\ndisk = \"d\"\ninitrd = \"i\"\n".into(), "line 2", "need a kernel"),
            ("[[network]]\nname = \"lan\"\n".into(), "line 1", "cidr"),
        ] {
            let said = load(&text).unwrap_err().to_string();
            assert!(said.contains(line) && said.contains(what), "{line}, {what}: {said}");
        }
    }

    #[test]
    fn the_example_is_a_fleet() {
        let fleet = load(include_str!("../../../deploy/examples/fleet.toml")).unwrap();
        assert_eq!((fleet.projects.len(), fleet.networks.len(), fleet.images.len(), fleet.guests.len()), (1, 1, 1, 2));
    }

    #[test]
    fn the_same_name_in_another_project_is_another_thing() {
        let other = GUEST.replace("name = \"web\"", "name = \"web\"\nproject = \"other\"");
        assert_eq!(load(&format!("{GUEST}{other}")).unwrap().guests.len(), 2);
    }

    #[test]
    fn what_the_api_does_not_show_is_told_apart_by_a_hash() {
        let plain = load(GUEST).unwrap().guests.remove(0);
        let with = |user_data: Option<&str>, cmdline: Option<&str>| {
            let guest = WantedGuest {
                user_data: user_data.map(Into::into),
                cmdline_extra: cmdline.map(Into::into),
                ..plain.clone()
            };
            guest.hidden_inputs()
        };
        assert_eq!(with(Some("a"), None), with(Some("a"), None));
        assert_ne!(with(Some("a"), None), with(Some("b"), None));
        assert_ne!(with(Some("a"), None), with(None, Some("a")));
    }
}
