//! A byte stream in which every byte follows from its position, so that any loss, repetition or flip is seen.
//!
//! Word `i` (8 bytes, little endian) is the i-th output of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
//! generators", 2014), which needs no state but the position.

/// The word at this index.
pub fn word(index: u64) -> u64 {
    let mut z = index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Fills `buffer` with the stream from `position` on.
pub fn fill(position: u64, buffer: &mut [u8]) {
    for (at, byte) in (position..).zip(buffer.iter_mut()) {
        *byte = byte_at(at);
    }
}

/// How many bytes of `buffer` are not those of the stream from `position` on.
pub fn count_wrong(position: u64, buffer: &[u8]) -> u64 {
    let (mut wrong, mut at) = (0, position);
    let mut rest = buffer;
    while !rest.is_empty() {
        match rest.split_first_chunk::<8>() {
            Some((eight, after)) if at.is_multiple_of(8) && u64::from_le_bytes(*eight) == word(at / 8) => {
                rest = after;
                at += 8;
            }
            _ => {
                wrong += u64::from(rest[0] != byte_at(at));
                rest = &rest[1..];
                at += 1;
            }
        }
    }
    wrong
}

fn byte_at(position: u64) -> u8 {
    let [.., shift] = (position % 8).to_be_bytes();
    word(position / 8).to_le_bytes()[usize::from(shift)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_the_same_however_it_is_cut() {
        let mut whole = vec![0; 1000];
        fill(12_345, &mut whole);
        for cut in [0, 1, 7, 8, 9, 500, 999] {
            let mut parts = vec![0; 1000];
            let (left, right) = parts.split_at_mut(cut);
            fill(12_345, left);
            fill(12_345 + cut as u64, right);
            assert_eq!(count_wrong(12_345, left) + count_wrong(12_345 + cut as u64, right), 0);
            assert_eq!(parts, whole);
        }
    }

    #[test]
    fn every_wrong_byte_is_counted_and_a_shift_is_seen() {
        let mut bytes = vec![0; 4096];
        fill(64, &mut bytes);
        for at in [0, 1, 8, 63, 2000, 4095] {
            bytes[at] ^= 1;
        }
        assert_eq!(count_wrong(64, &bytes), 6);
        fill(64, &mut bytes);
        assert!(count_wrong(65, &bytes) > 3900);
        assert!(count_wrong(0, &vec![0; 4096]) > 3900);
    }

    #[test]
    fn the_first_words_are_those_of_splitmix64_with_seed_zero() {
        assert_eq!(word(0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(word(1), 0x6e78_9e6a_a1b9_65f4);
    }
}
