//! What a guest can do to our VMM: registers, configuration space, rings; and the files that it is booted from.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use supercloud_api::frame::Frame;
use supercloud_blanket::device::Mac;
use supercloud_blanket::vmm::boot::{self, BootFiles};
use supercloud_blanket::vmm::bus::Registers as _;
use supercloud_blanket::vmm::pci::{Function as _, MessageSink};
use supercloud_blanket::vmm::travel::image::{self as frozen, Lay};
use supercloud_blanket::vmm::travel::mirror::standby::rehearse;
use supercloud_blanket::vmm::travel::packed;
use supercloud_blanket::vmm::travel::pages::{Packer, Unpacker};
use supercloud_blanket::vmm::virtio::phase::{self, Operation, Phase, Step};
use supercloud_blanket::vmm::virtio::transport::DeviceState;
use supercloud_blanket::vmm::virtio::{Device, VirtioPci, balloon, block, console, net, rng};
use supercloud_blanket::vmm::{Ram, memory};
use vm_memory::{Bytes as _, GuestAddress};

const RAM_BYTES: u64 = 2 << 20;
const DISK_BYTES: u64 = 64 << 10;
const STATUS: u64 = 20;
/// More would only repeat.
const MAX_OPERATIONS: usize = 200;

struct Nobody;

impl MessageSink for Nobody {
    fn signal(&self, _address: u64, _data: u32) {}
}

/// What a guest does, out of an input: a tag and its arguments.
enum Deed<'a> {
    Write(u64, &'a [u8]),
    Read(u64, usize),
    Configure(u16, &'a [u8]),
    Fill(u64, &'a [u8]),
    Pause,
}

/// The next deed and what is left.
fn deed(input: &[u8]) -> Option<(Deed<'_>, &[u8])> {
    let (head, rest) = input.split_first_chunk::<4>()?;
    let [kind, low, high, width] = *head;
    let at = u16::from_le_bytes([low, high]);
    let width = [1, 2, 4, 8][usize::from(width) % 4];
    // As the bus gives them: within the BAR, configuration space aligned.
    let register = u64::from(at & 0x7fff).min(0x8000 - width as u64);
    match kind % 8 {
        0..=2 => rest.split_at_checked(width).map(|(data, rest)| (Deed::Write(register, data), rest)),
        3 => Some((Deed::Read(register, width), rest)),
        4 => {
            let width = width.min(4);
            let offset = (at & 0xfff) & !(u16::try_from(width).unwrap_or(4) - 1);
            rest.split_at_checked(width).map(|(data, rest)| (Deed::Configure(offset, data), rest))
        }
        5 | 6 => rest.split_at_checked(width).map(|(data, rest)| (Deed::Fill(u64::from(at), data), rest)),
        _ => Some((Deed::Pause, rest)),
    }
}

/// How many there are, and which of them have more than the first version of a machine.
const KINDS: u8 = 6;
const THIN: u8 = 4;
const BALLOON: u8 = 5;

/// A device by its number, and its disk where it is one.
fn device(number: u8) -> std::io::Result<(Device, Option<File>)> {
    Ok(match number % KINDS {
        kind @ (0 | THIN) => {
            let file = File::from(OwnedFd::from(memory::create(RAM_BYTES).map_err(std::io::Error::other)?));
            let is_read_only = kind == 0;
            let disk = Box::new(Part { file: block::RawFile::new(file.try_clone()?)?, is_read_only });
            let device = if is_read_only { block::device } else { block::thin };
            (device(disk, "fuzz", is_read_only), Some(file))
        }
        1 => {
            let (ours, theirs) = UnixDatagram::pair()?;
            ours.set_nonblocking(true)?;
            theirs.send(&[7; 100])?;
            theirs.send(&[8; 1500])?;
            (net::over(File::from(OwnedFd::from(ours)), Mac([2, 0, 0, 0, 0, 7]), 1450, None), None)
        }
        2 => (console::device(Box::new(std::io::sink()), None), None),
        3 => (rng::device(), None),
        _ => (balloon::device(RAM_BYTES), None),
    })
}

/// The begin of a file as a disk: places behind its end are there to be reached.
struct Part {
    file: block::RawFile,
    is_read_only: bool,
}

impl block::BlockBackend for Part {
    fn bytes(&self) -> u64 {
        DISK_BYTES
    }

    fn submit(&mut self, id: block::RequestId, operation: block::BlockOperation, ram: &Arc<Ram>) {
        use block::BlockOperation::{Discard, Flush, Read, Write, Zero};
        assert!(!self.is_read_only || matches!(operation, Read { .. } | Flush), "a read-only disk is changed");
        let end = match &operation {
            Read { offset, to } => offset + to.bytes(),
            Write { offset, from } => offset + from.bytes(),
            Flush => 0,
            Discard { extents } | Zero { extents } => {
                let most = if matches!(operation, Zero { .. }) {
                    block::clear::MAX_ZERO_SECTORS
                } else {
                    block::clear::MAX_DISCARD_SECTORS
                };
                assert!((1..=16).contains(&extents.len()), "{} extents", extents.len());
                assert!(extents.iter().all(|extent| (1..=most).contains(&(extent.bytes / 512))), "{extents:?}");
                extents.iter().map(|extent| extent.offset + u64::from(extent.bytes)).max().unwrap_or(0)
            }
        };
        assert!(end <= DISK_BYTES, "a request behind the disk's end");
        self.file.submit(id, operation, ram);
    }

    fn empties(&self) -> block::Empties {
        self.file.empties()
    }

    fn done(&mut self) -> Option<block::Completion> {
        self.file.done()
    }
}

fn common(device: &mut VirtioPci) -> [u8; 56] {
    let mut image = [0; 56];
    device.read(0, &mut image);
    image
}

/// Does to a device what an input says; the table of legal operations is the oracle.
pub fn virtio(input: &[u8]) {
    drive(input);
}

/// How far the device came at most: whether it lived, and requests that it gave back in its first queue at 0x1000.
fn drive(input: &[u8]) -> Option<(bool, u16)> {
    let (number, mut rest) = input.split_first()?;
    let ram = Arc::new(memory::map(memory::create(RAM_BYTES).ok()?, RAM_BYTES).ok()?);
    let fresh = || VirtioPci::new(device(*number).ok()?.0, 1, Arc::clone(&ram), Arc::new(Nobody)).ok();
    let mut device = fresh()?;
    let mut has_lived = false;
    for _ in 0..MAX_OPERATIONS {
        let Some((deed, left)) = deed(rest) else { break };
        rest = left;
        let (before, phase) = (common(&mut device), device.phase());
        has_lived |= phase == Phase::Live;
        match deed {
            Deed::Write(at, data) => {
                device.write(at, data);
                check_write(&mut device, &before, phase, at, data);
            }
            Deed::Read(at, width) => {
                device.read(at, &mut [0; 8][..width]);
                assert_eq!((common(&mut device), device.phase()), (before, phase), "reading changes nothing");
            }
            Deed::Configure(at, data) => {
                device.write_config(at, data);
                device.read_config(at, &mut [0; 4]);
                assert_eq!(device.phase(), phase);
            }
            // Rings and buffers; what does not fit is not written.
            Deed::Fill(at, data) => drop(ram.write_slice(data, GuestAddress(at))),
            Deed::Pause => {
                device.pause();
                // Wherever it stands: another one can take over from it.
                #[expect(clippy::expect_used, reason = "a promise")]
                let saved = device.save().expect("a paused device can be saved");
                let mut other = fresh()?;
                let taken = serde_json::to_vec(&saved).ok().and_then(|json| serde_json::from_slice(&json).ok());
                assert_eq!(taken.as_ref(), Some(&saved));
                if let Err(error) = other.restore(&saved) {
                    panic!("{error}: {saved:?}");
                }
                assert_eq!((common(&mut other), other.phase()), (before, phase));
                device = other;
                device.resume();
                assert_eq!(device.phase(), phase);
            }
        }
    }
    device.pause();
    Some((has_lived, ram.read_obj(GuestAddress(0x3002)).ok()?))
}

/// Compares what a write of a register did with what the table says that it may do.
fn check_write(device: &mut VirtioPci, before: &[u8; 56], phase: Phase, at: u64, data: &[u8]) {
    let now = device.phase();
    // All bits set: it does not decode, and nothing is written.
    let is_silent = before == &[0xff; 56];
    if (at, data.len()) == (STATUS, 1) && !is_silent {
        let is_good = match phase::step(phase, data[0]) {
            Step::Stay => now == phase,
            Step::Reset => now == Phase::Reset,
            Step::Go(Phase::Agreed) => [Phase::Agreed, Phase::Driven].contains(&now),
            Step::Go(Phase::Live) => [Phase::Live, Phase::Failed].contains(&now),
            Step::Go(to) => now == to,
        };
        assert!(is_good, "{phase:?} and a status of {:#x} became {now:?}", data[0]);
        return;
    }
    assert_eq!(now, phase, "only the status register leads on");
    let operation = match at {
        0..4 | 8..12 | 22..24 => Some(Operation::Select),
        12..16 => Some(Operation::WriteFeatures),
        16..18 => Some(Operation::SetVector),
        24..28 | 32..56 => Some(Operation::SetQueue),
        28..30 => Some(Operation::EnableQueue),
        _ => None,
    };
    if is_silent || !operation.is_some_and(|operation| phase::is_legal(phase, operation)) {
        assert_eq!(&common(device), before, "a write at {at:#x} in {phase:?}");
    }
}

/// What comes of a machine from another host: pages, or the state of a device.
pub fn travel(input: &[u8]) {
    let Some((kind, rest)) = input.split_first() else { return };
    let Ok(ram) = memory::create(RAM_BYTES).and_then(|file| memory::map(file, RAM_BYTES)) else { return };
    if kind % 8 == 4 || kind % 8 == 6 {
        // As it comes, or packed here: what is changed in something packed can rarely be unpacked.
        let (plain, raw) = rest.split_at(rest.len().min(usize::from(*kind) << 8));
        let frame = if kind % 8 == 4 { rest.to_vec() } else { stored(plain, raw) };
        if let Ok(mut unpacker) = packed::Unpacker::new() {
            let _ = unpacker.unpack(&ram, &frame, kind % 16 < 8);
            let _ = unpacker.unpack(&ram, &frame, false);
        }
        return;
    }
    if kind % 2 == 0 {
        if let Ok(mut unpacker) = Unpacker::new() {
            let _ = unpacker.unpack(&ram, rest, kind % 4 == 0);
        }
        return;
    }
    let Ok(state) = serde_json::from_slice::<DeviceState>(rest) else { return };
    let number = match u8::try_from(DEVICES.iter().position(|number| *number == state.number).unwrap_or(0)) {
        // One that has agreed to discard or write zeroes.
        Ok(0) if state.features & 0x6000 != 0 => THIN,
        number => number.unwrap_or(0),
    };
    let Ok((device, _disk)) = device(number) else { return };
    let Ok(mut device) = VirtioPci::new(device, 1, Arc::new(ram), Arc::new(Nobody)) else { return };
    let _ = device.restore(&state);
    device.resume();
    device.write(0x3000, &[0, 0]);
    device.pause();
    // Whatever it was, a reset helps (when the guest lets it answer at all).
    device.write_config(4, &[2, 0]);
    device.write(STATUS, &[0]);
    assert_eq!(device.phase(), Phase::Reset);
}

/// A frame of packed pages of which this is the piece, unpacked, and these are the raw pages: zstd of blocks as they are (RFC 8878).
fn stored(plain: &[u8], raw: &[u8]) -> Vec<u8> {
    let mut piece = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 11 << 3];
    let mut blocks = plain.chunks(64 << 10).peekable();
    while let Some(block) = blocks.next() {
        let head = u32::try_from(block.len()).unwrap_or(0) << 3 | u32::from(blocks.peek().is_none());
        piece.extend_from_slice(&head.to_le_bytes()[..3]);
        piece.extend_from_slice(block);
    }
    [&u32::try_from(piece.len()).unwrap_or(0).to_le_bytes()[..], &piece, raw].concat()
}

/// Pages of each form, packed together, and the runs that they are before that.
fn packed_seeds() -> Option<Vec<Vec<u8>>> {
    let ram = memory::map(memory::create(RAM_BYTES).ok()?, RAM_BYTES).ok()?;
    ram.write_slice(&[7; 4096], GuestAddress(4096)).ok()?;
    let mut packer = packed::Packer::new(RAM_BYTES).ok()?;
    let frame = packer.pack(&ram, &mut [0, 1, 2, 3].iter(), |_| false).ok()??;
    let run = |first: u64, pages: u16, form: u8| [&first.to_le_bytes()[..], &pages.to_le_bytes(), &[form]].concat();
    // Of a page of zeros.
    let check = blake3::hash(&[0; 4096]).as_bytes()[..8].to_vec();
    let plain = [run(0, 2, 0), run(5, 1, 1), vec![9; 4096], run(7, 1, 2), check, vec![3; 4096], run(9, 1, 3)].concat();
    let mut whole = vec![38];
    whole.extend_from_slice(&plain);
    whole.resize(1 + (38 << 8), 0);
    Some(vec![[&[4], &frame[..]].concat(), [&[6], &run(0, 9, 0)[..]].concat(), [&[38], &plain[..]].concat(), whole])
}

/// What comes of a mirror from another host: frame by frame.
pub fn mirror(input: &[u8]) {
    let Ok(ram) = memory::create(RAM_BYTES).and_then(|file| memory::map(file, RAM_BYTES)) else { return };
    let _ = rehearse(input, &ram);
}

/// The length of a frozen machine's image and the beginning of its first block: what is looked at of it before its blocks are read.
pub fn image(input: &[u8]) {
    let Some((bytes, head)) = input.split_first_chunk::<8>() else { return };
    let mut first = head.to_vec();
    first.resize(usize::try_from(frozen::BLOCK_BYTES).unwrap_or(0), 0);
    let Ok(lay) = Lay::read(&first, u64::from_le_bytes(*bytes)) else { return };
    // A large one takes as long as it is large, which says nothing.
    if lay.config().memory_bytes <= 16 * RAM_BYTES {
        let pages = lay.pages(|block| block % 3 == 0);
        let _ = lay.leave(head, pages);
    }
}

/// One with and one without a record of what was hot.
pub fn image_seeds() -> Vec<Vec<u8>> {
    let head = br#"supercloud-image{"version":1,"vcpus":1,"memory_bytes":2097152,"state_version":1,"state_bytes":10}"#;
    let bytes = (frozen::BLOCK_BYTES + (2 << 20) + 10).to_le_bytes();
    let plain = [&bytes[..], head].concat();
    // zstd (RFC 8878): one block as it is, four bytes.
    let packed = [0x28, 0xb5, 0x2f, 0xfd, 0x20, 4, 0x21, 0, 0, 9, 0, 0, 1];
    let length = u32::try_from(packed.len()).unwrap_or(0).to_le_bytes();
    let hot = [&plain[..], b"\0hot1", &length, &packed, &[7; 32]].concat();
    vec![plain, hot]
}

/// A first copy and two cuts, one of which is abandoned.
pub fn mirror_seeds() -> Vec<Vec<u8>> {
    let page = |number: u64| [&number.to_le_bytes()[..], &[1], &[7; 4096]].concat();
    let zero = |number: u64| [&number.to_le_bytes()[..], &[0]].concat();
    // zstd (RFC 8878): one block as it is, "{}".
    let state = [0x28, 0xb5, 0x2f, 0xfd, 0x20, 2, 0x11, 0, 0, b'{', b'}'];
    let hello = br#"{"vcpus":1,"memory_bytes":2097152,"state_version":2}"#;
    let number = |number: u64| format!("{{\"number\":{number}}}").into_bytes();
    let frames = [
        (16, hello.to_vec()),
        (2, [page(1), zero(2)].concat()),
        (3, number(1)),
        (17, number(1)),
        (2, page(511)),
        (20, number(1)),
        (17, number(3)),
        (18, state.to_vec()),
        (2, [zero(511), page(0)].concat()),
        (19, vec![9; 32]),
        (21, Vec::new()),
    ];
    let whole = |frames: &[(u16, Vec<u8>)]| {
        let frames = frames.iter().map(|(kind, payload)| Frame { kind: *kind, version: 1, payload: payload.clone() });
        frames.filter_map(|frame| frame.to_bytes().ok()).flatten().collect()
    };
    vec![whole(&frames), whole(&frames[..6])]
}

/// Virtio's numbers of the devices that [`device`] makes.
const DEVICES: [u16; KINDS as usize] = [2, 1, 3, 4, 2, 5];

/// Pages of each form, and the state of each kind of device.
pub fn travel_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    let pages = || -> Option<Vec<u8>> {
        let ram = memory::map(memory::create(RAM_BYTES).ok()?, RAM_BYTES).ok()?;
        ram.write_slice(&[7; 4096], GuestAddress(4096)).ok()?;
        let mut bytes = vec![2];
        let mut packer = Packer::new().ok()?;
        (0..3).try_for_each(|page| packer.pack(&ram, page, &mut bytes)).ok()?;
        bytes.extend([3, 0, 0, 0, 0, 0, 0, 0, 1]);
        bytes.extend((0u16..4096).map(|at| at.to_le_bytes()[0]));
        Some(bytes)
    };
    seeds.extend(pages());
    seeds.extend(packed_seeds().unwrap_or_default());
    for seed in virtio_seeds() {
        // Up to where the driver has brought it to life.
        let state = || -> Option<Vec<u8>> {
            let (number, mut rest) = seed.split_first()?;
            let ram = Arc::new(memory::map(memory::create(RAM_BYTES).ok()?, RAM_BYTES).ok()?);
            let mut device = VirtioPci::new(device(*number).ok()?.0, 1, ram, Arc::new(Nobody)).ok()?;
            while device.phase() != Phase::Live {
                let (next, left) = deed(rest)?;
                rest = left;
                if let Deed::Write(at, data) = next {
                    device.write(at, data);
                }
            }
            device.pause();
            let json = serde_json::to_vec(&device.save().ok()?).ok()?;
            Some([vec![1], json].concat())
        };
        seeds.extend(state());
    }
    seeds
}

/// A driver's way to a live device, and a request or two.
pub fn virtio_seeds() -> Vec<Vec<u8>> {
    let write = |at: u16, data: &[u8]| {
        let width = u8::try_from(data.len().trailing_zeros()).unwrap_or(0);
        let [low, high] = at.to_le_bytes();
        [&[0, low, high, width], data].concat()
    };
    let fill = |at: u16, word: u64| {
        let [low, high] = at.to_le_bytes();
        [&[5, low, high, 3][..], &word.to_le_bytes()].concat()
    };
    let queue = |index: u16| {
        let base = 0x1000 + 0x3000 * u32::from(index);
        let mut bytes = [write(22, &index.to_le_bytes()), write(24, &[8, 0]), write(26, &[1, 0])].concat();
        for (at, place) in [(32, base), (40, base + 0x1000), (48, base + 0x2000)] {
            bytes.extend(write(at, &place.to_le_bytes()));
        }
        bytes.extend(write(28, &[1, 0]));
        bytes
    };
    let up = |queues: u16, features: u32| {
        let mut bytes = [write(20, &[1]), write(20, &[3])].concat();
        bytes.extend(write(8, &[0; 4]));
        bytes.extend(write(12, &features.to_le_bytes()));
        bytes.extend(write(8, &[1, 0, 0, 0]));
        bytes.extend(write(12, &[1, 0, 0, 0]));
        bytes.extend(write(20, &[11]));
        (0..queues).for_each(|index| bytes.extend(queue(index)));
        bytes
    };
    let chain = |base: u16| {
        // A header of 16 bytes at 0x800, 512 to write at 0xa00, a status byte at 0xfff; one chain available.
        let mut bytes = fill(base, 0x800);
        bytes.extend(fill(base + 8, 16 | 1 << 32 | 1 << 48));
        bytes.extend(fill(base + 16, 0xa00));
        bytes.extend(fill(base + 24, 512 | 3 << 32 | 2 << 48));
        bytes.extend(fill(base + 32, 0xfff));
        bytes.extend(fill(base + 40, 1 | 2 << 32));
        bytes.extend(fill(base + 0x1000, 1 << 16));
        bytes
    };
    // What is emptied: a header, one extent of eight sectors, a status byte.
    let emptied = [fill(0x800, 11), fill(0xa00, 0), fill(0xa08, 8), fill(0x1018, 16 | 1 << 32 | 2 << 48)].concat();
    // What is free: four pages and a half, in one part to be written; and pages that are set aside, by their numbers.
    let free = [
        fill(0xa00, 0x101 | 0x102 << 32),
        fill(0x1000, 0xa00),
        fill(0x1008, 8),
        fill(0x2000, 1 << 16),
        fill(0x7000, 0x10_0800),
        fill(0x7008, 0x4800 | 2 << 32),
        fill(0x8000, 1 << 16),
    ]
    .concat();
    let third = [write(0x2004, &[2, 0, 0, 0]), write(0x3008, &[2, 0])].concat();
    let go = [write(20, &[15]), write(0x3000, &[0, 0]), vec![7, 0, 0, 0], write(0x3004, &[1, 0]), vec![3, 20, 0, 0]];
    (0u8..KINDS)
        .map(|number| {
            let (queues, features) = match number {
                1 | 2 => (2, 0),
                THIN => (1, 0x6000),
                BALLOON => (3, 0x24),
                _ => (1, 0),
            };
            let mut bytes = vec![number];
            bytes.extend(chain(0x1000));
            bytes.extend(chain(0x4000));
            match number {
                THIN => bytes.extend(&emptied),
                BALLOON => bytes.extend(&free),
                _ => {}
            }
            bytes.extend(up(queues, features));
            go.iter().for_each(|part| bytes.extend(part));
            if number == BALLOON {
                bytes.extend(&third);
            }
            bytes.extend([4, 0x62, 0, 1, 0, 0x80]);
            bytes.extend(write(20, &[0]));
            bytes
        })
        .collect()
}

/// Boots from a file: kernel and ramdisk alike.
pub fn boot_file(input: &[u8]) {
    let file = || -> std::io::Result<File> {
        let mut file = tempfile::tempfile()?;
        file.write_all(input)?;
        Ok(file)
    };
    let (Ok(kernel), Ok(initrd)) = (file(), file()) else { return };
    let Ok(ram) = memory::create(RAM_BYTES).and_then(|file| memory::map(file, RAM_BYTES)) else { return };
    let files = BootFiles { kernel, initrd: Some(initrd), cmdline: "console=ttyS0".to_owned() };
    let _ = boot::load(&ram, RAM_BYTES, &files, 0xe_0000);
}

/// A small file of each kind.
pub fn boot_seeds() -> Vec<Vec<u8>> {
    let words = |values: &[u32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
    let mut elf = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0".to_vec();
    elf.extend(words(&[1, 0x10_0000, 52, 0, 0]));
    elf.extend([52, 0, 32, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend(words(&[1, 136, 0x10_0000, 0x10_0000, 4, 4, 5, 1]));
    elf.extend(words(&[4, 116, 0, 0, 20, 20, 4, 4]));
    elf.extend(words(&[4, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x10_0000]));
    elf.extend([0xf4; 4]);
    let mut image = vec![0; 0x600];
    image[0x1f1] = 1;
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x201] = 0x6a;
    image[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
    image[0x211] = 1;
    image[0x22c..0x230].copy_from_slice(&[0xff, 0xff, 0xff, 0x7f]);
    image[0x236] = 1;
    image[0x238] = 0xff;
    image[0x25a] = 0x10;
    image[0x261] = 0x10;
    vec![elf, image]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_good_inputs_bring_each_device_to_life_and_get_answers() {
        for (seed, number) in virtio_seeds().iter().zip(0..) {
            // The disk, the card's received frame and the entropy source answer; a console has no input.
            let wanted = u16::from(number != 2);
            assert_eq!(drive(seed), Some((true, wanted)), "device {number}");
        }
    }
}
