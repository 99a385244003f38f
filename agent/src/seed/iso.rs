//! A small ISO 9660 image with Joliet names (ECMA-119; Joliet: ECMA-119 supplementary descriptor with UCS-2): one folder with
//! a few files, the same bytes for the same content.
//!
//! | sector | what |
//! |---|---|
//! | 0..16 | system area, zero |
//! | 16, 17, 18 | primary and Joliet descriptors, terminator |
//! | 19..23 | path tables: primary little and big endian, Joliet little and big endian |
//! | 23, 24 | root folder, in primary and Joliet names |
//! | 25.. | the files |

const SECTOR: usize = 2048;
const PATH_TABLES: u32 = 19;
const ROOTS: [u32; 2] = [23, 24];
const FIRST_FILE: u32 = 25;
/// Bytes of a path table with the root alone: record header (8), a name of one byte, padding.
const PATH_TABLE_BYTES: u32 = 10;
/// The same moment in every image: 2000-01-01 00:00:00 UTC, as years since 1900, month, day, hour, minute, second, offset.
const DATE: [u8; 7] = [100, 1, 1, 0, 0, 0, 0];

/// One file.
pub struct File<'a> {
    /// Its name as guests see it (Joliet), at most 64 characters.
    pub name: &'a str,
    /// Its name for readers without Joliet: up to eight of `A-Z0-9_`.
    pub short: &'a str,
    /// Its content.
    pub bytes: &'a [u8],
}

fn both_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
    out.extend_from_slice(&value.to_be_bytes());
}

fn both_u16(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_le_bytes());
    out.extend_from_slice(&value.to_be_bytes());
}

/// Big-endian UCS-2, for Joliet.
fn ucs2(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_be_bytes).collect()
}

fn padded(out: &mut Vec<u8>, text: &[u8], len: usize, fill: &[u8]) {
    let end = out.len() + len;
    out.extend_from_slice(&text[..text.len().min(len)]);
    while out.len() < end {
        let need = (end - out.len()).min(fill.len());
        out.extend_from_slice(&fill[fill.len() - need..]);
    }
}

/// A directory record (ECMA-119, 9.1).
fn record(name: &[u8], sector: u32, bytes: u32, is_folder: bool) -> Vec<u8> {
    let length = (33 + name.len()).next_multiple_of(2);
    let mut out = Vec::with_capacity(length);
    out.push(u8::try_from(length).unwrap_or(u8::MAX));
    out.push(0);
    both_u32(&mut out, sector);
    both_u32(&mut out, bytes);
    out.extend_from_slice(&DATE);
    out.push(if is_folder { 2 } else { 0 });
    out.extend_from_slice(&[0, 0]);
    both_u16(&mut out, 1);
    out.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
    out.extend_from_slice(name);
    out.resize(length, 0);
    out
}

/// A volume descriptor (ECMA-119, 8.4 and 8.5).
fn descriptor(label: &str, is_joliet: bool, sectors: u32) -> Vec<u8> {
    let text = |text: &str| if is_joliet { ucs2(text) } else { text.as_bytes().to_vec() };
    let blank: &[u8] = if is_joliet { &[0, b' '] } else { b" " };
    let root = ROOTS[usize::from(is_joliet)];
    let tables = PATH_TABLES + 2 * u32::from(is_joliet);
    let mut out = Vec::with_capacity(SECTOR);
    out.push(if is_joliet { 2 } else { 1 });
    out.extend_from_slice(b"CD001\x01\0");
    padded(&mut out, &text("LINUX"), 32, blank);
    padded(&mut out, &text(label), 32, blank);
    out.extend_from_slice(&[0; 8]);
    both_u32(&mut out, sectors);
    // Joliet level 3; the primary descriptor has zeros here.
    padded(&mut out, if is_joliet { b"%/E" } else { b"" }, 32, &[0]);
    both_u16(&mut out, 1);
    both_u16(&mut out, 1);
    both_u16(&mut out, SECTOR as u16);
    both_u32(&mut out, PATH_TABLE_BYTES);
    out.extend_from_slice(&tables.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&(tables + 1).to_be_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&record(&[0], root, SECTOR as u32, true));
    for length in [128, 128, 128, 128, 37, 37, 37] {
        padded(&mut out, b"", length, blank);
    }
    // Created, modified, expires, effective (ECMA-119, 8.4.26.1): all not specified.
    for _ in 0..4 {
        out.extend_from_slice(&[b'0'; 16]);
        out.push(0);
    }
    out.push(1);
    out.resize(SECTOR, 0);
    out
}

fn path_table(root: u32, is_big_endian: bool) -> Vec<u8> {
    let mut out = vec![1, 0];
    let (root, parent) = match is_big_endian {
        true => (root.to_be_bytes(), 1u16.to_be_bytes()),
        false => (root.to_le_bytes(), 1u16.to_le_bytes()),
    };
    out.extend_from_slice(&root);
    out.extend_from_slice(&parent);
    out.resize(SECTOR, 0);
    out
}

/// An image labelled `label` (at most 16 characters) with `files`.
#[must_use]
pub fn image(label: &str, files: &[File<'_>]) -> Vec<u8> {
    let sectors_of = |bytes: &[u8]| u32::try_from(bytes.len().div_ceil(SECTOR)).unwrap_or(u32::MAX);
    let sectors = FIRST_FILE + files.iter().map(|file| sectors_of(file.bytes)).sum::<u32>();
    let mut out = vec![0; 16 * SECTOR];
    out.extend(descriptor(label, false, sectors));
    out.extend(descriptor(label, true, sectors));
    let mut terminator = b"\xffCD001\x01".to_vec();
    terminator.resize(SECTOR, 0);
    out.extend(terminator);
    for root in ROOTS {
        out.extend(path_table(root, false));
        out.extend(path_table(root, true));
    }
    for (is_joliet, root) in [false, true].into_iter().zip(ROOTS) {
        let mut folder = record(&[0], root, SECTOR as u32, true);
        folder.extend(record(&[1], root, SECTOR as u32, true));
        let mut at = FIRST_FILE;
        let mut records = Vec::new();
        for file in files {
            let name = if is_joliet { ucs2(file.name) } else { format!("{}.;1", file.short).into_bytes() };
            let bytes = u32::try_from(file.bytes.len()).unwrap_or(u32::MAX);
            records.push((name.clone(), record(&name, at, bytes, false)));
            at += sectors_of(file.bytes);
        }
        // In order of names (ECMA-119, 9.3).
        records.sort();
        folder.extend(records.into_iter().flat_map(|(_, record)| record));
        folder.resize(SECTOR, 0);
        out.extend(folder);
    }
    for file in files {
        let end = (out.len() + file.bytes.len()).next_multiple_of(SECTOR);
        out.extend_from_slice(file.bytes);
        out.resize(end, 0);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads one file of the Joliet tree, as a driver would.
    fn read(image: &[u8], wanted: &str) -> Option<Vec<u8>> {
        let descriptor = &image[17 * SECTOR..18 * SECTOR];
        assert_eq!(&descriptor[..6], b"\x02CD001");
        let u32_at = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        let root = &descriptor[156..190];
        let folder = &image[u32_at(root, 2) * SECTOR..][..u32_at(root, 10)];
        let mut at = 0;
        while folder[at] != 0 {
            let record = &folder[at..at + usize::from(folder[at])];
            let name = &record[33..33 + usize::from(record[32])];
            if name == ucs2(wanted) {
                return Some(image[u32_at(record, 2) * SECTOR..][..u32_at(record, 10)].to_vec());
            }
            at += record.len();
        }
        None
    }

    #[test]
    fn files_are_found_by_their_long_names() {
        let long = vec![b'x'; 5000];
        let files = [
            File { name: "user-data", short: "USERDATA", bytes: &long },
            File { name: "meta-data", short: "METADATA", bytes: b"instance-id: a\n" },
            File { name: "empty", short: "EMPTY", bytes: b"" },
        ];
        let image = image("cidata", &files);
        assert_eq!(image.len() % SECTOR, 0);
        for file in &files {
            assert_eq!(read(&image, file.name).as_deref(), Some(file.bytes), "{}", file.name);
        }
        assert_eq!(read(&image, "nothing"), None);
        assert_eq!(&image[16 * SECTOR + 40..16 * SECTOR + 47], b"cidata ");
        // The length that the descriptor tells is the image's.
        let told = u32::from_le_bytes(image[16 * SECTOR + 80..16 * SECTOR + 84].try_into().unwrap()) as usize;
        assert_eq!(told * SECTOR, image.len());
    }
}
