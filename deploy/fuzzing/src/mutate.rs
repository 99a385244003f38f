//! Mutations: blind to formats, but fond of the numbers at which lengths and counts go wrong.

/// SplitMix64 (Steele, Lea, Flood 2014): small, and the same everywhere for a seed.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One below `end`, which is above 0.
    pub fn below(&mut self, end: usize) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "less than a usize")]
        let index = (self.number() % end as u64) as usize;
        index
    }

    fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }
}

/// No input grows beyond this.
pub const MAX_BYTES: usize = 128 << 10;

const NUMBERS: [u64; 16] =
    [0, 1, 2, 7, 8, 16, 32, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, i64::MAX as u64, u64::MAX];
const WORDS: [&str; 14] = [
    "-1",
    "0",
    "1e999",
    "18446744073709551616",
    "null",
    "\"\"",
    "[]",
    "{}",
    "[[[[[[[[",
    "\\u0000",
    "\u{feff}",
    ",",
    "\n",
    "NaN",
];

/// One mutation, or a few in a row.
pub fn mutate(random: &mut Random, input: &mut Vec<u8>, others: &[Vec<u8>]) {
    for _ in 0..=random.below(4) {
        once(random, input, others);
    }
    input.truncate(MAX_BYTES);
}

fn once(random: &mut Random, input: &mut Vec<u8>, others: &[Vec<u8>]) {
    if input.is_empty() {
        input.extend_from_slice(&random.number().to_le_bytes());
        return;
    }
    let at = random.below(input.len());
    let end = at + 1 + random.below((input.len() - at).min(64));
    match random.below(11) {
        0 => input[at] ^= 1 << random.below(8),
        1 => input[at] = random.number().to_le_bytes()[0],
        2 => {
            let number = random.of(&NUMBERS).wrapping_add(random.of(&[0, 1, u64::MAX]));
            let width = random.of(&[1, 2, 4, 8]);
            let bytes = if random.below(2) == 0 { number.to_le_bytes() } else { number.swap_bytes().to_le_bytes() };
            let bytes = if bytes[0] == 0 && random.below(2) == 0 { &bytes[8 - width..] } else { &bytes[..width] };
            for (slot, byte) in input[at..].iter_mut().zip(bytes) {
                *slot = *byte;
            }
        }
        3 => drop(input.drain(at..end)),
        4 => {
            let piece = input[at..end].to_vec();
            let to = random.below(input.len() + 1);
            input.splice(to..to, piece);
        }
        5 => input.truncate(at),
        6 => {
            let word = random.of(&WORDS);
            input.splice(at..at, word.bytes());
        }
        7 => {
            let word = random.of(&WORDS);
            input.splice(at..end, word.bytes());
        }
        8 => {
            let count = 1 + random.below(300);
            let byte = input[at];
            input.splice(at..at, std::iter::repeat_n(byte, count));
        }
        9 if !others.is_empty() => {
            let other = &others[random.below(others.len())];
            let from = random.below(other.len() + 1);
            input.splice(at.., other[from..].iter().copied());
        }
        _ => {
            let value = random.number().to_le_bytes();
            for (slot, byte) in input[at..end].iter_mut().zip(value.iter().cycle()) {
                *slot = *byte;
            }
        }
    }
}
