//! Sets of pages, and how they travel. Pure.

use crate::vmm::travel::TravelError;

/// Pages of one piece: what a frame tells of at once.
pub const PIECE_PAGES: u64 = 32_768;
/// Bytes of one piece, unpacked: a bit for each page, the lowest first.
const PIECE_BYTES: usize = 4096;
const PIECE_WORDS: usize = PIECE_BYTES / 8;
/// Before the packed bits: the piece's number.
const HEAD: usize = 4;
/// Nothing that packs 4096 bytes is longer.
const MAX_PACKED_BYTES: usize = PIECE_BYTES + 64;

/// Some of the pages of a machine, by their numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    count: u64,
}

impl PageSet {
    /// No page, with room for those below `end`.
    #[must_use]
    pub fn below(end: u64) -> Self {
        // Whole pieces, so that each can be taken as it is.
        let words = usize::try_from(end.div_ceil(PIECE_PAGES)).unwrap_or(0).saturating_mul(PIECE_WORDS);
        Self { words: vec![0; words], count: 0 }
    }

    fn place(page: u64) -> Option<(usize, u64)> {
        Some((usize::try_from(page / 64).ok()?, 1 << (page % 64)))
    }

    /// Adds a page; whether it is new. One for which there is no room is not added.
    pub fn insert(&mut self, page: u64) -> bool {
        let Some((word, bit)) = Self::place(page) else { return false };
        let Some(word) = self.words.get_mut(word) else { return false };
        let is_new = *word & bit == 0;
        *word |= bit;
        self.count += u64::from(is_new);
        is_new
    }

    /// Removes a page; whether it was there.
    pub fn remove(&mut self, page: u64) -> bool {
        let Some((word, bit)) = Self::place(page) else { return false };
        let Some(word) = self.words.get_mut(word) else { return false };
        let was_there = *word & bit != 0;
        *word &= !bit;
        self.count -= u64::from(was_there);
        was_there
    }

    /// Whether a page is there.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        Self::place(page).is_some_and(|(word, bit)| self.words.get(word).is_some_and(|word| word & bit != 0))
    }

    /// How many there are.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.count
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Removes all.
    pub fn clear(&mut self) {
        self.words.fill(0);
        self.count = 0;
    }

    /// The first page from this one on.
    #[must_use]
    pub fn first_from(&self, page: u64) -> Option<u64> {
        let at = usize::try_from(page / 64).ok()?;
        let first = self.words.get(at)? & (u64::MAX << (page % 64));
        let rest = self.words.iter().enumerate().skip(at + 1).map(|(index, word)| (index, *word));
        let (index, word) = std::iter::once((at, first)).chain(rest).find(|(_, word)| *word != 0)?;
        Some(index as u64 * 64 + u64::from(word.trailing_zeros()))
    }

    /// All, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> {
        std::iter::successors(self.first_from(0), |page| self.first_from(page.checked_add(1)?))
    }

    /// The frame of the first piece, from this one on, that has pages, and the piece after it.
    ///
    /// # Errors
    /// When there is no memory to pack it.
    pub fn piece(&self, from: u32) -> std::io::Result<Option<(Vec<u8>, u32)>> {
        let first = u64::from(from) * PIECE_PAGES;
        let Some(number) = self.first_from(first).and_then(|page| u32::try_from(page / PIECE_PAGES).ok()) else {
            return Ok(None);
        };
        let at = usize::try_from(number).map_err(std::io::Error::other)? * PIECE_WORDS;
        let words = self.words.get(at..at + PIECE_WORDS).unwrap_or_default();
        let bits: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut frame = number.to_le_bytes().to_vec();
        frame.extend(zstd::bulk::compress(&bits, 1)?);
        Ok(Some((frame, number + 1)))
    }
}

/// Reads a set, piece by piece; from a peer that may be hostile.
#[derive(Debug)]
pub struct SetReader {
    set: PageSet,
    /// The least number that the next piece may have.
    next: u32,
}

impl SetReader {
    /// A set of pages below `end`.
    #[must_use]
    pub fn below(end: u64) -> Self {
        Self { set: PageSet::below(end), next: 0 }
    }

    /// Takes a piece; `is_page` says which pages there are.
    ///
    /// # Errors
    /// When it is not the next one, or has what is not there.
    pub fn take(&mut self, frame: &[u8], is_page: impl Fn(u64) -> bool) -> Result<(), TravelError> {
        const BAD: TravelError = TravelError::Malformed("a piece of what is left that cannot be");
        let (number, packed) = frame.split_first_chunk::<HEAD>().ok_or(BAD)?;
        let number = u32::from_le_bytes(*number);
        if number < self.next || packed.len() > MAX_PACKED_BYTES {
            return Err(BAD);
        }
        let bits = zstd::bulk::decompress(packed, PIECE_BYTES).map_err(|_| BAD)?;
        if bits.len() != PIECE_BYTES {
            return Err(BAD);
        }
        self.next = number.checked_add(1).ok_or(BAD)?;
        let first = u64::from(number) * PIECE_PAGES;
        for (byte, at) in bits.iter().zip((first..).step_by(8)) {
            for bit in (0..8).filter(|bit| byte & (1 << bit) != 0) {
                if !is_page(at + bit) || !self.set.insert(at + bit) {
                    return Err(TravelError::Malformed("a page beyond memory"));
                }
            }
        }
        Ok(())
    }

    /// The set, when it has as many pages as it shall have.
    ///
    /// # Errors
    /// That it has not.
    pub fn finish(self, expected: u64) -> Result<PageSet, TravelError> {
        if self.set.len() == expected {
            return Ok(self.set);
        }
        Err(TravelError::Malformed("not all is told of what is left"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use proptest::prelude::*;

    const END: u64 = 3 * PIECE_PAGES;

    fn set(pages: &BTreeSet<u64>) -> PageSet {
        let mut set = PageSet::below(END);
        pages.iter().for_each(|page| assert!(set.insert(*page)));
        set
    }

    fn frames(set: &PageSet) -> Vec<Vec<u8>> {
        let mut from = 0;
        std::iter::from_fn(|| {
            let (frame, next) = set.piece(from).unwrap()?;
            from = next;
            Some(frame)
        })
        .collect()
    }

    proptest! {
        #[test]
        fn it_is_a_set(pages: BTreeSet<u16>, others: BTreeSet<u16>, from: u16) {
            let pages: BTreeSet<u64> = pages.into_iter().map(|page| u64::from(page) + 7).collect();
            let mut mine = set(&pages);
            prop_assert_eq!(mine.iter().collect::<BTreeSet<_>>(), pages.clone());
            prop_assert_eq!(mine.first_from(from.into()), pages.range(u64::from(from)..).next().copied());
            for other in others {
                prop_assert_eq!(mine.contains(other.into()), pages.contains(&other.into()));
                let was_there = pages.contains(&other.into());
                prop_assert_eq!(mine.remove(other.into()), was_there);
                prop_assert!(!mine.contains(other.into()));
            }
            prop_assert_eq!(mine.len(), mine.iter().count() as u64);
        }

        #[test]
        fn it_travels_whole_or_not_at_all(pages in proptest::collection::btree_set(0..END, 1..200), cut: u16, flip: u16) {
            let mine = set(&pages);
            let frames = frames(&mine);
            let take = |frames: &[Vec<u8>]| {
                let mut reader = SetReader::below(END);
                frames.iter().try_for_each(|frame| reader.take(frame, |page| page < END))?;
                reader.finish(mine.len())
            };
            prop_assert_eq!(take(&frames).unwrap(), mine.clone());
            prop_assert!(take(&frames[1..]).is_err());
            let doubled: Vec<_> = frames.iter().chain(&frames).cloned().collect();
            prop_assert!(take(&doubled).is_err());
            // Bytes that were changed give another set of as many, or none.
            let mut spoilt = frames.clone();
            let at = usize::from(cut) % spoilt[0].len();
            spoilt[0][at] ^= 1 << (flip % 8);
            if let Ok(other) = take(&spoilt) {
                prop_assert_eq!(other.len(), mine.len());
            }
            spoilt[0].truncate(at);
            prop_assert!(take(&spoilt).is_err());
        }
    }

    #[test]
    fn what_is_not_there_is_refused() {
        let mine = set(&BTreeSet::from([5, 6]));
        let frame = mine.piece(0).unwrap().unwrap().0;
        let take = |frame: &[u8], end| SetReader::below(END).take(frame, |page| page < end);
        assert!(take(&frame, 6).is_err() && take(&frame, 7).is_ok());
        let mut reader = SetReader::below(END);
        reader.take(&frame, |_| true).unwrap();
        assert!(reader.finish(1).is_err());
        let mut far = frame.clone();
        for number in [3, u32::MAX] {
            far[..4].copy_from_slice(&u32::to_le_bytes(number));
            assert!(take(&far, END).is_err());
            // Nothing in it, far away.
            let mut empty = far[..4].to_vec();
            empty.extend(zstd::bulk::compress(&[0; PIECE_BYTES], 1).unwrap());
            assert_eq!(take(&empty, END).is_ok(), number == 3);
        }
        // A bomb: more than a piece in few bytes.
        let mut bomb = frame[..4].to_vec();
        bomb.extend(zstd::bulk::compress(&vec![0; 1 << 20], 1).unwrap());
        assert!(take(&bomb, END).is_err());
        let mut other = PageSet::below(END);
        assert!(!other.insert(END) && !other.insert(u64::MAX) && !other.contains(u64::MAX));
        assert!(!other.remove(u64::MAX) && other.first_from(u64::MAX).is_none() && other.is_empty());
    }
}
