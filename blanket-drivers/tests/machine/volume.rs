//! A volume process, for tests: it serves a disk by NBD on a thread, and takes cuts of it.

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write as _},
    os::unix::net::UnixStream,
    sync::{Arc, Mutex},
    time::Duration,
};

use supercloud_blanket::vmm::virtio::nbd::CMD_CUT;

/// A disk, and its cuts.
#[derive(Debug, Default)]
pub struct Disk {
    pub bytes: Vec<u8>,
    pub cuts: BTreeMap<u64, Vec<u8>>,
    /// What was written to the front, in order.
    pub written: Vec<u32>,
    /// The next cut is answered so late.
    pub slow_for: Duration,
    /// Cuts are refused; how many were.
    pub refuses: bool,
    pub refused: u32,
}

/// Who has it.
pub type Shared = Arc<Mutex<Disk>>;

pub fn disk(bytes: usize) -> Shared {
    Arc::new(Mutex::new(Disk { bytes: vec![0; bytes], ..Disk::default() }))
}

/// The number at the front of a disk.
pub fn number(disk: &[u8]) -> u32 {
    u32::from_le_bytes(*disk.first_chunk().unwrap())
}

/// The client's end of a link; the other is served until it is gone.
pub fn serve(disk: &Shared) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let disk = Arc::clone(disk);
    std::thread::spawn(move || serve_link(&theirs, &disk));
    ours
}

/// Serves one link to its end.
///
/// # Errors
/// That it has come.
#[expect(clippy::disallowed_methods, reason = "a server that is slow on purpose")]
pub fn serve_link(mut stream: &UnixStream, disk: &Shared) -> io::Result<()> {
    let size = disk.lock().unwrap().bytes.len() as u64;
    stream.write_all(&0x4e42_444d_4147_4943u64.to_be_bytes())?;
    stream.write_all(&0x4948_4156_454f_5054u64.to_be_bytes())?;
    stream.write_all(&3u16.to_be_bytes())?;
    stream.read_exact(&mut [0; 26])?;
    let mut export = 0u16.to_be_bytes().to_vec();
    export.extend(size.to_be_bytes());
    export.extend(5u16.to_be_bytes());
    for (kind, data) in [(3u32, export), (1, Vec::new())] {
        stream.write_all(&0x0003_e889_0455_65a9u64.to_be_bytes())?;
        stream.write_all(&7u32.to_be_bytes())?;
        stream.write_all(&kind.to_be_bytes())?;
        stream.write_all(&u32::try_from(data.len()).unwrap().to_be_bytes())?;
        stream.write_all(&data)?;
    }
    loop {
        let mut header = [0; 28];
        stream.read_exact(&mut header)?;
        let command = u16::from_be_bytes(*header[6..].first_chunk().unwrap());
        let offset = u64::from_be_bytes(*header[16..].first_chunk().unwrap());
        let from = usize::try_from(offset).unwrap();
        let bytes = usize::try_from(u32::from_be_bytes(*header[24..].first_chunk().unwrap())).unwrap();
        let (mut answer, mut error) = (Vec::new(), 0u32);
        match command {
            0 => answer.extend(&disk.lock().unwrap().bytes[from..from + bytes]),
            1 => {
                let mut data = vec![0; bytes];
                stream.read_exact(&mut data)?;
                let mut disk = disk.lock().unwrap();
                disk.bytes[from..from + bytes].copy_from_slice(&data);
                disk.written.push(number(&data));
            }
            CMD_CUT => {
                let slow_for = std::mem::take(&mut disk.lock().unwrap().slow_for);
                std::thread::sleep(slow_for);
                let mut disk = disk.lock().unwrap();
                let is_next = disk.cuts.last_key_value().is_none_or(|(last, _)| offset > *last);
                if is_next && bytes == 0 && !disk.refuses {
                    let now = disk.bytes.clone();
                    disk.cuts.insert(offset, now);
                } else {
                    disk.refused += 1;
                    error = 22;
                }
            }
            _ => {}
        }
        stream.write_all(&0x6744_6698u32.to_be_bytes())?;
        stream.write_all(&error.to_be_bytes())?;
        stream.write_all(&header[8..16])?;
        stream.write_all(&answer)?;
    }
}
