//! What holds the disks' bytes: files, or volume processes, the ways to which may break and be mended.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::unix::net::UnixStream,
    sync::mpsc::Sender,
};

use anyhow::Context as _;
use supercloud_blanket::vmm::{
    boot::{
        BootFiles,
        disk::{self, DiskFile},
    },
    virtio::{
        block::{BlockBackend, RawFile},
        nbd::{LinkNews, NbdLink},
    },
};

use crate::{
    control::{Event, Request},
    launch::DiskEnd,
    owner::Input,
};

/// All disks of the guest, by their names.
#[derive(Debug)]
pub struct Disks {
    ends: BTreeMap<String, End>,
    /// Those to which there is no way.
    lost: BTreeSet<String>,
}

#[derive(Debug)]
enum End {
    File(std::fs::File),
    Volume(NbdLink),
}

/// A disk that a guest boots from.
#[derive(Debug)]
pub enum BootDisk {
    /// In a file.
    File(std::fs::File),
    /// At a volume process.
    Volume(NbdLink),
}

impl BootDisk {
    /// What the disk's own boot loader would boot. May take minutes: blocks may be away.
    ///
    /// # Errors
    /// When the disk cannot be read, or there is nothing on it that is understood.
    pub fn files(self) -> anyhow::Result<BootFiles> {
        let files = match self {
            Self::Volume(link) => disk::files(link.reader()),
            Self::File(file) => {
                let bytes = RawFile::new(file.try_clone().context("copying a descriptor")?)
                    .context("measuring the disk")?
                    .bytes();
                disk::files(DiskFile(file, bytes))
            }
        };
        files.context("looking for what the disk boots")
    }
}

impl Disks {
    /// Shakes hands with the volume processes.
    ///
    /// # Errors
    /// When one of them does not serve.
    pub fn new(ends: BTreeMap<String, DiskEnd>, inputs: &Sender<Input>) -> anyhow::Result<Self> {
        let open = |(name, end): (String, DiskEnd)| {
            let end = match end {
                DiskEnd::File(file) => End::File(file),
                DiskEnd::Volume(stream) => {
                    let (disk, inputs) = (name.clone(), inputs.clone());
                    let tell = move |news| {
                        // The owner is there as long as the process is.
                        let _ = inputs.send(Input::Disk(disk.clone(), news));
                    };
                    let link = NbdLink::new(stream, Box::new(tell));
                    End::Volume(link.with_context(|| format!("disk '{name}'"))?)
                }
            };
            anyhow::Ok((name, end))
        };
        Ok(Self { ends: ends.into_iter().map(open).collect::<Result<_, _>>()?, lost: BTreeSet::new() })
    }

    /// What a new device reads and writes.
    ///
    /// # Errors
    /// When there is no such disk, or no descriptor.
    pub fn backend(&self, name: &str) -> anyhow::Result<Box<dyn BlockBackend>> {
        let end = self.ends.get(name).with_context(|| format!("there is nothing for disk '{name}'"))?;
        Ok(match end {
            End::Volume(link) => Box::new(link.disk()),
            End::File(file) => {
                let file = file.try_clone().context("copying a descriptor")?;
                Box::new(RawFile::new(file).with_context(|| format!("disk '{name}'"))?)
            }
        })
    }

    /// The disk, to be read by a machine that does not run.
    ///
    /// # Errors
    /// When there is no such disk, or no descriptor.
    pub fn boot_disk(&self, name: &str) -> anyhow::Result<BootDisk> {
        let end = self.ends.get(name).with_context(|| format!("there is nothing for disk '{name}'"))?;
        Ok(match end {
            End::Volume(link) => BootDisk::Volume(link.clone()),
            End::File(file) => BootDisk::File(file.try_clone().context("copying a descriptor")?),
        })
    }

    /// Something happened to the way to a disk; what a client is told of it.
    pub fn hear_of(&mut self, disk: &str, news: LinkNews) -> (Event, Option<String>) {
        match news {
            LinkNews::Lost => {
                self.lose(disk.to_owned());
                (Event::DiskLost, None)
            }
            LinkNews::Refused { error } => {
                let why = io::Error::from_raw_os_error(i32::try_from(error).unwrap_or(libc::EIO));
                (Event::DiskRefused, Some(why.to_string()))
            }
            LinkNews::Answers => (Event::DiskAnswers, None),
        }
    }

    /// There is no way to it.
    pub fn lose(&mut self, disk: String) {
        self.lost.insert(disk);
    }

    /// Those to which there is no way.
    #[must_use]
    pub fn lost(&self) -> Vec<String> {
        self.lost.iter().cloned().collect()
    }

    /// Takes another way to a disk, on a thread of its own, which says when it is done ([`Input::Attached`]): the server may
    /// be slow to answer. Why not, if not.
    pub fn attach(
        &mut self,
        client: u64,
        request: &Request,
        socket: Option<UnixStream>,
        inputs: &Sender<Input>,
    ) -> Option<String> {
        let Some(disk) = request.disk.clone() else { return Some("'disk' is missing".to_owned()) };
        let Some(End::Volume(link)) = self.ends.get(&disk) else {
            return Some(format!("no volume process serves a disk '{disk}'"));
        };
        let Some(socket) = socket else { return Some("no socket came with it".to_owned()) };
        // From here on: a way that breaks as soon as it is taken is told of before that it was taken.
        self.lost.remove(&disk);
        let (link, id, inputs) = (link.clone(), request.id, inputs.clone());
        let attach = move || {
            let error = link.replace(socket).err().map(|error| error.to_string());
            let _ = inputs.send(Input::Attached(client, id, disk, error));
        };
        std::thread::Builder::new().name("attach".to_owned()).spawn(attach).err().map(|error| error.to_string())
    }
}
