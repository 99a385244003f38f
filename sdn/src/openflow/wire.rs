//! Bounded reading and writing of big-endian structures.

/// Why bytes are not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The bytes end inside a structure.
    #[error("{what} ends after {left} of {want} bytes")]
    Short {
        /// The structure or field.
        what: &'static str,
        /// Bytes that are there.
        left: usize,
        /// Bytes that are needed.
        want: usize,
    },
    /// A length that the structure cannot have.
    #[error("{what} has the impossible length {got}")]
    Length {
        /// The structure.
        what: &'static str,
        /// The length it claims.
        got: usize,
    },
    /// A value that is not defined.
    #[error("{what} has the undefined value {got:#x}")]
    Value {
        /// The field.
        what: &'static str,
        /// The value.
        got: u64,
    },
    /// Another version of the protocol.
    #[error("protocol version {0:#x}, want 0x4 (OpenFlow 1.3)")]
    Version(u8),
}

/// Reads from a slice; every step is checked against what is left.
#[derive(Debug, Clone)]
pub(crate) struct Reader<'a> {
    left: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { left: bytes }
    }

    pub(crate) fn left(&self) -> usize {
        self.left.len()
    }

    pub(crate) fn take(&mut self, n: usize, what: &'static str) -> Result<&'a [u8], DecodeError> {
        match self.left.split_at_checked(n) {
            Some((head, tail)) => {
                self.left = tail;
                Ok(head)
            }
            None => Err(DecodeError::Short { what, left: self.left.len(), want: n }),
        }
    }

    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.left)
    }

    pub(crate) fn sub(&mut self, n: usize, what: &'static str) -> Result<Reader<'a>, DecodeError> {
        Ok(Reader::new(self.take(n, what)?))
    }

    pub(crate) fn skip(&mut self, n: usize, what: &'static str) -> Result<(), DecodeError> {
        self.take(n, what).map(drop)
    }

    /// An unsigned number of up to 16 bytes.
    pub(crate) fn uint(&mut self, n: usize, what: &'static str) -> Result<u128, DecodeError> {
        Ok(self.take(n, what)?.iter().fold(0, |v, b| v << 8 | u128::from(*b)))
    }

    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, DecodeError> {
        Ok(self.uint(1, what)? as u8)
    }

    pub(crate) fn u16(&mut self, what: &'static str) -> Result<u16, DecodeError> {
        Ok(self.uint(2, what)? as u16)
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, DecodeError> {
        Ok(self.uint(4, what)? as u32)
    }

    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, DecodeError> {
        Ok(self.uint(8, what)? as u64)
    }

    /// A structure whose own 16-bit length (itself included) sits `at` bytes from its start; at least `min` long.
    pub(crate) fn sized(&mut self, at: usize, min: usize, what: &'static str) -> Result<Reader<'a>, DecodeError> {
        let mut peek = self.clone();
        peek.skip(at, what)?;
        let len = usize::from(peek.u16(what)?);
        if len < min.max(at + 2) {
            return Err(DecodeError::Length { what, got: len });
        }
        self.sub(len, what)
    }
}

/// Writes into a vector and patches lengths afterwards.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    out: Vec<u8>,
}

impl Writer {
    pub(crate) fn len(&self) -> usize {
        self.out.len()
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    pub(crate) fn zeros(&mut self, n: usize) {
        self.out.resize(self.out.len() + n, 0);
    }

    pub(crate) fn u8(&mut self, v: u8) {
        self.out.push(v);
    }

    pub(crate) fn u16(&mut self, v: u16) {
        self.bytes(&v.to_be_bytes());
    }

    pub(crate) fn u32(&mut self, v: u32) {
        self.bytes(&v.to_be_bytes());
    }

    pub(crate) fn u64(&mut self, v: u64) {
        self.bytes(&v.to_be_bytes());
    }

    /// Zeros up to a multiple of eight bytes from `start`.
    pub(crate) fn pad8(&mut self, start: usize) {
        self.zeros((self.len() - start).next_multiple_of(8) - (self.len() - start));
    }

    /// Writes the length of everything since `start` at `at`; false when it does not fit.
    pub(crate) fn patch_len(&mut self, at: usize, start: usize) -> bool {
        self.patch_value(at, self.len() - start)
    }

    pub(crate) fn patch_value(&mut self, at: usize, len: usize) -> bool {
        let fits = u16::try_from(len);
        self.out[at..at + 2].copy_from_slice(&fits.unwrap_or(u16::MAX).to_be_bytes());
        fits.is_ok()
    }

    pub(crate) fn into_inner(self) -> Vec<u8> {
        self.out
    }
}
