//! The kernel's block devices on volume processes: `/dev/nbdN`, made over generic netlink (`linux/nbd-netlink.h`).
//!
//! The kernel holds the connection, so a disk needs no process of ours and outlives the agent. Each device carries a name of ours
//! (`/sys/block/nbdN/backend`), by which the agent that comes after finds it. When the volume's process is gone, what the guest asks of
//! its disk waits, for [`PATIENCE_S`] at most, until a new connection is given ([`Disk::mend`]).
//!
//! The module must be loaded with `max_part=0`: else the kernel looks for partitions when a device is opened, which at the destination
//! of a move waits for a volume that answers nobody yet.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::{Duration, Instant},
};

use supercloud_blanket::{device, host::NbdSocket, vmm::virtio::nbd::handshake};

/// How long a guest's disk may be without its volume process before the guest sees errors.
const PATIENCE_S: u64 = 7 * 24 * 3600;
/// The device's blocks; what guests see elsewhere, too.
const BLOCK_BYTES: u64 = 512;
/// `NBD_FLAG_READ_ONLY`.
const READ_ONLY: u64 = 1 << 1;

const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLA_F_NESTED: u16 = 1 << 15;
const HEADER_BYTES: usize = 16;
const GENERIC_BYTES: usize = 4;

#[derive(Clone, Copy)]
#[repr(u8)]
enum Verb {
    Connect = 1,
    Disconnect = 2,
    Reconfigure = 3,
}

mod attribute {
    pub const INDEX: u16 = 1;
    pub const SIZE_BYTES: u16 = 2;
    pub const BLOCK_SIZE_BYTES: u16 = 3;
    pub const SERVER_FLAGS: u16 = 5;
    pub const CLIENT_FLAGS: u16 = 6;
    pub const SOCKETS: u16 = 7;
    pub const DEAD_CONN_TIMEOUT: u16 = 8;
    pub const BACKEND_IDENTIFIER: u16 = 10;
    /// `NBD_SOCK_ITEM`, and `NBD_SOCK_FD` in it.
    pub const SOCKET: u16 = 1;
}

fn broken(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// Appends an attribute: length, kind, content, filled up to four bytes.
fn put(message: &mut Vec<u8>, kind: u16, content: &[u8]) {
    let length = u16::try_from(content.len() + 4).unwrap_or(u16::MAX);
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(content);
    message.resize(message.len().next_multiple_of(4), 0);
}

/// The content of the first attribute of a kind.
fn get(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?));
        let have = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let content = attributes.get(4..length)?;
        if have & !NLA_F_NESTED == kind {
            return Some(content);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

/// A message to a family: netlink's header, the generic one, attributes.
fn message(family: u16, command: u8, attributes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER_BYTES + GENERIC_BYTES + attributes.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(HEADER_BYTES + GENERIC_BYTES + attributes.len());
    bytes.extend(length.to_ne_bytes());
    bytes.extend(family.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    // Sequence and sender: one question at a time on a socket of its own.
    bytes.extend([0; 8]);
    bytes.extend([command, 1, 0, 0]);
    bytes.extend(attributes);
    bytes
}

/// A netlink socket for one question.
fn ask(family: u16, command: u8, attributes: &[u8]) -> io::Result<Vec<u8>> {
    // SAFETY: no pointers; the result is checked before it is owned.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_GENERIC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let bytes = message(family, command, attributes);
    // SAFETY: the pointer and length are those of a live buffer.
    let sent = unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut told = Vec::new();
    let mut buffer = vec![0u8; 16 << 10];
    // What is told comes before the acknowledgement.
    for _ in 0..4 {
        // SAFETY: as above.
        let count = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        match read_answers(buffer.get(..count).unwrap_or_default())? {
            Answer::Done(more) => {
                told.extend(more);
                return Ok(told);
            }
            Answer::Told(more) => told.extend(more),
        }
    }
    Err(broken("the kernel does not acknowledge"))
}

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// Attributes; the acknowledgement is still to come.
    Told(Vec<u8>),
    /// It is acknowledged.
    Done(Vec<u8>),
}

fn read_answers(mut bytes: &[u8]) -> io::Result<Answer> {
    let cut = || broken("a message of the kernel's is cut off");
    let mut told = Vec::new();
    while !bytes.is_empty() {
        let header = bytes.get(..HEADER_BYTES).ok_or_else(cut)?;
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]);
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let length = usize::try_from(length).map_err(|_| cut())?;
        let content = bytes.get(HEADER_BYTES..length).ok_or_else(cut)?;
        if kind == NLMSG_ERROR {
            let code = content.get(..4).and_then(|code| code.try_into().ok()).ok_or_else(cut)?;
            return match i32::from_ne_bytes(code) {
                0 => Ok(Answer::Done(told)),
                code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
            };
        }
        told.extend(content.get(GENERIC_BYTES..).ok_or_else(cut)?);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(Answer::Told(told))
}

/// The number of the family `nbd`, which the kernel gives out when the module is loaded.
fn family() -> io::Result<u16> {
    let mut attributes = Vec::new();
    put(&mut attributes, CTRL_ATTR_FAMILY_NAME, b"nbd\0");
    let told = ask(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, &attributes)?;
    let id = get(&told, CTRL_ATTR_FAMILY_ID).and_then(|id| id.try_into().ok());
    id.map(u16::from_ne_bytes).ok_or_else(|| broken("the kernel does not tell the number of 'nbd'"))
}

/// Why block devices cannot be made here, if so. Blocking.
pub fn missing() -> Option<String> {
    let max_part = match fs::read_to_string("/sys/module/nbd/parameters/max_part") {
        Ok(text) => text,
        Err(error) => return Some(format!("the kernel module nbd is not loaded ({error}): modprobe nbd max_part=0")),
    };
    (max_part.trim() != "0").then(|| {
        "the kernel module nbd looks for partitions: 'options nbd max_part=0' in /etc/modprobe.d/supercloud.conf, and \
         load it anew"
            .to_owned()
    })
}

/// So many tries to mend it have to fail in a row until a disk is said to be away: a volume's process that is just being started again is
/// there by the next one.
const TELL_AFTER: u32 = 2;

/// What there is to be told of a disk's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// It is away.
    Away,
    /// It is there again, and was said to be away.
    Back,
}

/// How often in a row a disk could not be mended.
#[derive(Debug, Default)]
struct Outage(u32);

impl Outage {
    /// Notes how a try ended; what is to be told, once.
    fn note(&mut self, is_there: bool) -> Option<Turn> {
        if is_there {
            return (std::mem::take(&mut self.0) >= TELL_AFTER).then_some(Turn::Back);
        }
        self.0 = self.0.saturating_add(1);
        (self.0 == TELL_AFTER).then_some(Turn::Away)
    }
}

/// A guest's disk as a block device of the kernel's.
#[derive(Debug)]
pub struct Disk {
    /// Its number: `/dev/nbd<index>`.
    pub index: u32,
    identifier: String,
    at: NbdSocket,
    /// A second descriptor of the kernel's connection, to see it break; none of a device that an agent before has made.
    connection: Option<UnixStream>,
    outage: Outage,
}

fn dial(at: &NbdSocket) -> io::Result<(UnixStream, handshake::Export)> {
    if !at.export.is_empty() {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "an export with a name"));
    }
    let stream = UnixStream::connect(&at.socket)?;
    let export = handshake::negotiate(&stream)?;
    // The kernel waits for its server for as long as it takes.
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    Ok((stream, export))
}

fn sockets(stream: &UnixStream) -> Vec<u8> {
    let (mut item, mut all) = (Vec::new(), Vec::new());
    put(&mut item, attribute::SOCKET, &stream.as_raw_fd().to_ne_bytes());
    put(&mut all, attribute::SOCKET | NLA_F_NESTED, &item);
    all
}

fn name_of(identifier: &str) -> Vec<u8> {
    [identifier.as_bytes(), &[0]].concat()
}

impl Disk {
    /// Makes the device of a guest's disk. What an earlier life has left under this name, with requests that nobody waits for any more, is
    /// ended first: none of them may reach the volume now. Blocking.
    ///
    /// # Errors
    /// When the volume's process cannot be reached, or the kernel refuses.
    pub fn connect(identifier: String, disk: &device::Disk, at: &NbdSocket) -> io::Result<Self> {
        if let Some(left) = Self::find(identifier.clone(), at)? {
            left.disconnect()?;
        }
        let (stream, export) = dial(at)?;
        let mut flags = u64::from(export.flags);
        if disk.is_read_only {
            flags |= READ_ONLY;
        }
        let mut attributes = Vec::new();
        for (kind, value) in [
            (attribute::SIZE_BYTES, export.bytes),
            (attribute::BLOCK_SIZE_BYTES, BLOCK_BYTES),
            (attribute::SERVER_FLAGS, flags),
            (attribute::CLIENT_FLAGS, 0),
            (attribute::DEAD_CONN_TIMEOUT, PATIENCE_S),
        ] {
            put(&mut attributes, kind, &value.to_ne_bytes());
        }
        put(&mut attributes, attribute::BACKEND_IDENTIFIER, &name_of(&identifier));
        put(&mut attributes, attribute::SOCKETS | NLA_F_NESTED, &sockets(&stream));
        let told = ask(family()?, Verb::Connect as u8, &attributes)?;
        let index = get(&told, attribute::INDEX).and_then(|index| index.try_into().ok());
        let index = index.map(u32::from_ne_bytes).ok_or_else(|| broken("the kernel does not tell the device"))?;
        Ok(Self { index, identifier, at: at.clone(), connection: Some(stream), outage: Outage::default() })
    }

    /// The device that an agent before has made, if it is there. Blocking.
    ///
    /// # Errors
    /// When the kernel's devices cannot be listed.
    pub fn find(identifier: String, at: &NbdSocket) -> io::Result<Option<Self>> {
        let index = find_named(Path::new("/sys/block"), &identifier)?;
        let outage = Outage::default();
        Ok(index.map(|index| Self { index, identifier, at: at.clone(), connection: None, outage }))
    }

    /// Its name among the guest's disks: the identifier is `<guest>:<name>`.
    pub fn name(&self) -> &str {
        self.identifier.split_once(':').map_or("", |(_, name)| name)
    }

    /// Whether its connection has broken, as far as it is known.
    fn is_broken(&self) -> bool {
        let Some(stream) = &self.connection else { return true };
        let mut poll = libc::pollfd { fd: stream.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
        // SAFETY: one structure that is valid for the call, which does not wait.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
        ready > 0 && poll.revents & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0
    }

    /// Gives the device a new connection when the one it had has broken. Blocking.
    ///
    /// # Errors
    /// When there is none to be had: try again.
    pub fn mend(&mut self) -> io::Result<()> {
        if !self.is_broken() {
            return Ok(());
        }
        // A server that has one client at a time hangs up on the old connection now: then the kernel takes the new one.
        let (stream, _) = dial(&self.at)?;
        let mut attributes = Vec::new();
        put(&mut attributes, attribute::INDEX, &self.index.to_ne_bytes());
        put(&mut attributes, attribute::DEAD_CONN_TIMEOUT, &PATIENCE_S.to_ne_bytes());
        put(&mut attributes, attribute::BACKEND_IDENTIFIER, &name_of(&self.identifier));
        put(&mut attributes, attribute::SOCKETS | NLA_F_NESTED, &sockets(&stream));
        ask(family()?, Verb::Reconfigure as u8, &attributes)?;
        self.connection = Some(stream);
        Ok(())
    }

    /// Likewise; what there is to be told of how that went. Blocking.
    pub fn look_after(&mut self) -> Option<Turn> {
        let mended = self.mend();
        if let Err(error) = &mended {
            tracing::debug!(disk = %self.identifier, %error, "a disk's connection cannot be mended now");
        }
        self.outage.note(mended.is_ok())
    }

    /// Whether it was said to be away, and not yet to be back.
    pub fn is_away(&self) -> bool {
        self.outage.0 >= TELL_AFTER
    }

    /// Ends the device, whose domain is gone. Blocking.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn disconnect(&self) -> io::Result<()> {
        let mut attributes = Vec::new();
        put(&mut attributes, attribute::INDEX, &self.index.to_ne_bytes());
        match ask(family()?, Verb::Disconnect as u8, &attributes) {
            // It is none any more.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => Ok(()),
            other => other.map(drop),
        }
    }
}

/// Whether the kernel has a request under way, from `/sys/block/nbdN/inflight`: reads and writes.
fn is_busy(index: u32) -> io::Result<bool> {
    let text = fs::read_to_string(format!("/sys/block/nbd{index}/inflight"))?;
    Ok(text.split_ascii_whitespace().any(|count| count != "0"))
}

/// Waits until the devices of these numbers have nothing under way: what a suspended domain had asked for is done then. Blocking.
///
/// # Errors
/// When they do not come to rest in time.
pub fn come_to_rest(devices: &[u32], budget: Duration) -> io::Result<()> {
    let end = Instant::now() + budget;
    for device in devices {
        while is_busy(*device)? {
            if Instant::now() >= end {
                return Err(io::ErrorKind::TimedOut.into());
            }
            // A request takes a fraction of a millisecond; this thread is one for blocking work.
            #[expect(clippy::disallowed_methods, reason = "a thread for blocking work, with a deadline")]
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

fn find_named(block: &Path, identifier: &str) -> io::Result<Option<u32>> {
    for entry in fs::read_dir(block)?.flatten() {
        let name = entry.file_name();
        let Some(index) = name.to_str().and_then(|name| name.strip_prefix("nbd")?.parse().ok()) else { continue };
        // Only a device that is connected has one.
        if fs::read_to_string(entry.path().join("backend")).is_ok_and(|text| text.trim_end() == identifier) {
            return Ok(Some(index));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_back_and_what_is_cut_off_is_none() {
        let mut bytes = Vec::new();
        put(&mut bytes, 3, b"abc");
        put(&mut bytes, 7 | NLA_F_NESTED, &5u32.to_ne_bytes());
        assert_eq!(bytes.len(), 16);
        assert_eq!(get(&bytes, 3), Some(&b"abc"[..]));
        assert_eq!(get(&bytes, 7), Some(&5u32.to_ne_bytes()[..]));
        assert_eq!(get(&bytes, 4), None);
        for length in 0..bytes.len() {
            assert_eq!(get(&bytes[..length], 7).map(<[u8]>::len).unwrap_or(4), 4);
        }
        // A length of less than its own header must not be walked for ever.
        assert_eq!(get(&[0, 0, 9, 0, 0, 0, 0, 0], 3), None);
    }

    #[test]
    fn answers_are_told_from_acknowledgements_and_errors() {
        let answer = |kind: u16, content: &[u8]| {
            let length = u32::try_from(HEADER_BYTES + content.len()).unwrap();
            let mut bytes = length.to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend(content);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        let told = answer(30, &[1, 1, 0, 0, 9, 9]);
        assert_eq!(read_answers(&told).unwrap(), Answer::Told(vec![9, 9]));
        let done = answer(NLMSG_ERROR, &0i32.to_ne_bytes());
        assert_eq!(read_answers(&[told.clone(), done].concat()).unwrap(), Answer::Done(vec![9, 9]));
        let refused = answer(NLMSG_ERROR, &(-libc::ENOSPC).to_ne_bytes());
        assert_eq!(read_answers(&refused).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
        for length in 1..told.len() - 2 {
            assert!(read_answers(&told[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn a_message_has_its_length_in_front() {
        let bytes = message(0x10, 3, &[1, 2, 3, 4]);
        assert_eq!(bytes.len(), 24);
        assert_eq!(bytes[..4], 24u32.to_ne_bytes());
        assert_eq!(bytes[16..], [3, 1, 0, 0, 1, 2, 3, 4]);
    }

    #[test]
    fn an_outage_is_told_once_and_its_end_as_well() {
        let told = |tries: &[bool]| {
            let mut outage = Outage::default();
            tries.iter().map(|is_there| outage.note(*is_there)).collect::<Vec<_>>()
        };
        let (away, back) = (Some(Turn::Away), Some(Turn::Back));
        assert_eq!(told(&[true, false, true, false, true]), [None; 5], "one failure is nothing");
        assert_eq!(told(&[false, false, false, false, true, true]), [None, away, None, None, back, None]);
        assert_eq!(told(&[false, false, true, false, false, true]), [None, away, back, None, away, back]);
        let mut long = Outage(u32::MAX);
        assert_eq!((long.note(false), long.note(true)), (None, back));
    }

    #[test]
    fn devices_are_found_by_our_name() {
        let block = tempfile::tempdir().unwrap();
        for (name, backend) in
            [("nbd0", None), ("nbd3", Some("x:a\n")), ("nbd12", Some("x:b\n")), ("sda", Some("x:b\n"))]
        {
            fs::create_dir(block.path().join(name)).unwrap();
            if let Some(backend) = backend {
                fs::write(block.path().join(name).join("backend"), backend).unwrap();
            }
        }
        assert_eq!(find_named(block.path(), "x:b").unwrap(), Some(12));
        assert_eq!(find_named(block.path(), "x:c").unwrap(), None);
    }
}
