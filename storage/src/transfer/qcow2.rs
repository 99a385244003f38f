//! The qcow2 header, read by ourselves so that what is dangerous is refused by name before any other program sees it.
//!
//! Format: QEMU's `docs/interop/qcow2.rst`. Numbers are big endian.

/// The first bytes of a qcow2 image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// How much of a file [`Qcow2Header::parse`] wants to see: the header and its extensions lie in the first cluster.
pub const PROBE_BYTES: usize = 64 * 1024;

/// Why a qcow2 image is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Qcow2Error {
    /// It is too short, or not qcow2.
    #[error("it is not a qcow2 image: {0}")]
    NotQcow2(&'static str),
    /// A version other than 2 and 3.
    #[error("qcow2 version {0} is not known")]
    Version(u32),
    /// Its content depends on another file.
    #[error("it has a backing file; flatten it first (qemu-img convert)")]
    BackingFile,
    /// Its data lies in another file.
    #[error("its data lies in an external data file")]
    ExternalDataFile,
    /// It is encrypted.
    #[error("it is encrypted (method {0}); decrypt it first")]
    Encrypted(u32),
    /// It was marked as damaged.
    #[error("it is marked as corrupt; repair it first (qemu-img check -r)")]
    Corrupt,
    /// It uses a feature that is not known.
    #[error("it uses the unknown incompatible feature {0}")]
    UnknownFeature(u32),
    /// A field is out of any sensible range.
    #[error("its {field} of {value} is out of range")]
    Range {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

/// What is read of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Qcow2Header {
    /// 2 or 3.
    pub version: u32,
    /// The disk's size in bytes.
    pub virtual_size: u64,
    /// The cluster size as a power of two.
    pub cluster_bits: u32,
}

const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_EXTERNAL_DATA: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const EXTENSION_END: u32 = 0;
const EXTENSION_EXTERNAL_DATA: u32 = 0x4441_5441;
const EXTENSION_ENCRYPTION: u32 = 0x0537_be77;

impl Qcow2Header {
    /// Reads and judges a header from the first bytes of a file of `file_len` bytes.
    pub fn parse(bytes: &[u8], file_len: u64) -> Result<Self, Qcow2Error> {
        let u32_at = |at: usize| {
            let bytes = bytes.get(at..at + 4).and_then(|b| b.first_chunk());
            bytes.map(|b| u32::from_be_bytes(*b)).ok_or(Qcow2Error::NotQcow2("it is too short"))
        };
        let u64_at = |at: usize| Ok::<_, Qcow2Error>(u64::from(u32_at(at)?) << 32 | u64::from(u32_at(at + 4)?));
        if bytes.get(..4) != Some(&MAGIC) {
            return Err(Qcow2Error::NotQcow2("its first bytes are others"));
        }
        let version = u32_at(4)?;
        if !(2..=3).contains(&version) {
            return Err(Qcow2Error::Version(version));
        }
        if u64_at(8)? != 0 || u32_at(16)? != 0 {
            return Err(Qcow2Error::BackingFile);
        }
        let range = |field, value: u64, is_ok: bool| {
            if is_ok { Ok(()) } else { Err(Qcow2Error::Range { field, value }) }
        };
        let cluster_bits = u32_at(20)?;
        range("cluster size", u64::from(cluster_bits), (9..=21).contains(&cluster_bits))?;
        let virtual_size = u64_at(24)?;
        range("disk size", virtual_size, (1..=crate::MAX_VOLUME_BYTES).contains(&virtual_size))?;
        let crypt_method = u32_at(32)?;
        if crypt_method != 0 {
            return Err(Qcow2Error::Encrypted(crypt_method));
        }
        let mut header_len = 72;
        let mut incompatible = 0;
        if version == 3 {
            incompatible = u64_at(72)?;
            header_len = u32_at(100)?;
            range(
                "header length",
                u64::from(header_len),
                (104..=4096).contains(&header_len) && header_len.is_multiple_of(8),
            )?;
        }
        Self::judge_features(incompatible)?;

        let l1_entries = u64::from(u32_at(36)?);
        // QEMU's own cap: 32 MiB of 8-byte entries.
        range("L1 table size", l1_entries, l1_entries <= (32 << 20) / 8)?;
        let cluster_bytes = 1u64 << cluster_bits;
        for (field, at, len) in [("L1 table offset", 40, l1_entries * 8), ("refcount table offset", 48, 8)] {
            let offset = u64_at(at)?;
            let is_inside = offset.checked_add(len).is_some_and(|end| end <= file_len);
            range(field, offset, offset.is_multiple_of(cluster_bytes) && is_inside)?;
        }
        let refcount_clusters = u64::from(u32_at(56)?);
        range("refcount table size", refcount_clusters, refcount_clusters <= (8 << 20) / cluster_bytes.min(8 << 20))?;
        let snapshots = u64::from(u32_at(60)?);
        range("number of snapshots", snapshots, snapshots <= 65_536)?;
        if version == 3 {
            let refcount_order = u32_at(96)?;
            range("refcount order", u64::from(refcount_order), refcount_order <= 6)?;
        }
        Self::judge_extensions(bytes, header_len as usize, u32_at)?;
        Ok(Self { version, virtual_size, cluster_bits })
    }

    fn judge_features(incompatible: u64) -> Result<(), Qcow2Error> {
        if incompatible & INCOMPATIBLE_CORRUPT != 0 {
            return Err(Qcow2Error::Corrupt);
        }
        if incompatible & INCOMPATIBLE_EXTERNAL_DATA != 0 {
            return Err(Qcow2Error::ExternalDataFile);
        }
        let known = INCOMPATIBLE_DIRTY | INCOMPATIBLE_COMPRESSION | INCOMPATIBLE_EXTENDED_L2;
        let unknown = incompatible & !known;
        if unknown != 0 {
            return Err(Qcow2Error::UnknownFeature(unknown.trailing_zeros()));
        }
        Ok(())
    }

    fn judge_extensions(
        bytes: &[u8],
        mut at: usize,
        u32_at: impl Fn(usize) -> Result<u32, Qcow2Error>,
    ) -> Result<(), Qcow2Error> {
        // Each takes at least 8 bytes, so this ends; without an end mark they end with the probe.
        while at + 8 <= bytes.len() {
            let (kind, len) = (u32_at(at)?, u32_at(at + 4)? as usize);
            match kind {
                EXTENSION_END => return Ok(()),
                EXTENSION_EXTERNAL_DATA => return Err(Qcow2Error::ExternalDataFile),
                EXTENSION_ENCRYPTION => return Err(Qcow2Error::Encrypted(2)),
                _ => {}
            }
            if len > PROBE_BYTES {
                return Err(Qcow2Error::Range { field: "header extension's length", value: len as u64 });
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _};

    use super::*;

    /// A version 3 header as `qemu-img create` makes it for a disk of 1 GiB.
    pub(crate) fn header() -> Vec<u8> {
        let mut h = vec![0; 65536];
        h[..4].copy_from_slice(&MAGIC);
        let mut put32 = |at: usize, v: u32| h[at..at + 4].copy_from_slice(&v.to_be_bytes());
        put32(4, 3);
        put32(20, 16);
        put32(28, 1 << 30);
        put32(36, 2);
        put32(44, 3 << 16);
        put32(52, 1 << 16);
        put32(56, 1);
        put32(96, 4);
        put32(100, 112);
        h
    }

    fn with(change: impl Fn(&mut Vec<u8>)) -> Result<Qcow2Header, Qcow2Error> {
        let mut h = header();
        change(&mut h);
        Qcow2Header::parse(&h, 1 << 20)
    }

    #[test]
    fn a_plain_header_is_read() {
        let header = with(|_| {}).unwrap();
        assert_eq!(header, Qcow2Header { version: 3, virtual_size: 1 << 30, cluster_bits: 16 });
    }

    #[test]
    fn what_is_dangerous_is_refused_by_name() {
        assert_eq!(with(|h| h[15] = 200), Err(Qcow2Error::BackingFile));
        assert_eq!(with(|h| h[19] = 5), Err(Qcow2Error::BackingFile));
        assert_eq!(with(|h| h[35] = 1), Err(Qcow2Error::Encrypted(1)));
        assert_eq!(with(|h| h[79] = 1), Ok(with(|_| {}).unwrap()));
        assert_eq!(with(|h| h[79] = 2), Err(Qcow2Error::Corrupt));
        assert_eq!(with(|h| h[79] = 4), Err(Qcow2Error::ExternalDataFile));
        assert_eq!(with(|h| h[79] = 32), Err(Qcow2Error::UnknownFeature(5)));
        assert_eq!(with(|h| h[72] = 128), Err(Qcow2Error::UnknownFeature(63)));
        assert_eq!(with(|h| h[7] = 4), Err(Qcow2Error::Version(4)));
        assert!(matches!(with(|h| h[23] = 30), Err(Qcow2Error::Range { field: "cluster size", .. })));
        assert!(matches!(with(|h| h[24] = 1), Err(Qcow2Error::Range { field: "disk size", .. })));
        assert!(matches!(with(|h| h[36] = 1), Err(Qcow2Error::Range { field: "L1 table size", .. })));
        assert!(matches!(with(|h| h[40] = 1), Err(Qcow2Error::Range { field: "L1 table offset", .. })));
        let data_file = |h: &mut Vec<u8>| h[112..116].copy_from_slice(&EXTENSION_EXTERNAL_DATA.to_be_bytes());
        assert_eq!(with(data_file), Err(Qcow2Error::ExternalDataFile));
        let encrypted = |h: &mut Vec<u8>| h[112..116].copy_from_slice(&EXTENSION_ENCRYPTION.to_be_bytes());
        assert_eq!(with(encrypted), Err(Qcow2Error::Encrypted(2)));
        assert!(matches!(Qcow2Header::parse(&header()[..80], 1 << 20), Err(Qcow2Error::NotQcow2(_))));
        assert!(matches!(Qcow2Header::parse(b"", 0), Err(Qcow2Error::NotQcow2(_))));
    }

    #[test]
    fn mutated_headers_never_panic_and_never_pass_the_caps() {
        let seed = 0x5eed_0004;
        println!("seed {seed:#x}");
        let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
        let good = header();
        for _ in 0..20_000 {
            let mut h = good[..512].to_vec();
            for _ in 0..rng.random_range(1..6) {
                let at = rng.random_range(4..160);
                h[at] = rng.random();
            }
            h.truncate(rng.random_range(0..=512));
            if let Ok(header) = Qcow2Header::parse(&h, 1 << 20) {
                assert!(header.virtual_size <= crate::MAX_VOLUME_BYTES && header.virtual_size > 0);
                assert!(u64::from_be_bytes(*h[8..16].first_chunk().unwrap()) == 0, "a backing file passed");
            }
        }
    }
}
