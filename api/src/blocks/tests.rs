use proptest::prelude::*;

use super::*;
use crate::Code;

fn content(block: u32) -> Vec<u8> {
    (0..BLOCK_BYTES).map(|at| (block as usize + at).to_le_bytes()[0] | 1).collect()
}

fn map_of(blocks: u32, set: &[u32]) -> BlockMap {
    let mut map = BlockMap::zeros(blocks);
    set.iter().for_each(|block| map.set(*block));
    map
}

/// A whole stream, frame by frame.
fn stream(map: &BlockMap, range: std::ops::Range<u32>, digests: bool) -> Vec<Bytes> {
    let size_bytes = u64::from(map.blocks()) * BLOCK_BYTES as u64 - 512;
    let (mut encoder, mut frames) = Encoder::begin("r".into(), size_bytes, map, range.clone(), digests).unwrap();
    let mut next = range.start;
    while let Some(block) = map.next(next).filter(|block| *block < range.end) {
        if digests {
            frames.extend(encoder.digest(block, &content(block)).unwrap());
        } else {
            frames.push(encoder.block(block, &content(block)).unwrap());
        }
        next = block + 1;
    }
    frames.extend(encoder.end().unwrap());
    frames
}

/// Everything that a decoder says to these bytes, which come in pieces.
fn decode(bytes: &[u8], piece: usize) -> Result<Vec<Item>, BlocksError> {
    let (mut decoder, mut items) = (Decoder::default(), Vec::new());
    for piece in bytes.chunks(piece) {
        decoder.push(piece);
        while let Some(item) = decoder.next_item()? {
            items.push(item);
        }
    }
    decoder.finish().map(|()| items)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn what_is_sent_arrives_however_it_is_cut(
        blocks in 1u32..70,
        set in proptest::collection::vec(any::<u32>(), 0..8),
        ends in any::<(u32, u32)>(),
        piece in 1usize..200_000,
        digests in any::<bool>(),
    ) {
        let map = map_of(blocks, &set.iter().map(|block| block % blocks).collect::<Vec<_>>());
        let (a, b) = (ends.0 % (blocks + 1), ends.1 % (blocks + 1));
        let range = a.min(b)..a.max(b);
        let items = decode(&stream(&map, range.clone(), digests).concat(), piece).unwrap();
        let Item::Head(head, told) = &items[0] else { panic!("{items:?}") };
        prop_assert_eq!((told, head.from..head.to, head.digests), (&map, range.clone(), digests));
        prop_assert_eq!(items.last().unwrap(), &Item::End);
        let wanted: Vec<u32> = range.filter(|block| map.has(*block)).collect();
        let came: Vec<u32> = items[1..items.len() - 1]
            .iter()
            .map(|item| match item {
                Item::Block { block, data } => {
                    assert!(!digests && data[..] == content(*block));
                    *block
                }
                Item::Digest { block, digest: came } => {
                    assert!(digests && *came == digest(*block, &content(*block)));
                    *block
                }
                other => panic!("{other:?}"),
            })
            .collect();
        prop_assert_eq!(&came, &wanted);
        prop_assert_eq!(map.count(a.min(b), a.max(b)) as usize, wanted.len());
    }

    #[test]
    fn a_changed_byte_is_found_out_and_never_panics(at in any::<prop::sample::Index>(), by in 1u8.., digests in any::<bool>()) {
        let map = map_of(9, &[0, 3, 8]);
        let good = stream(&map, 0..9, digests).concat();
        let mut bad = good.clone();
        let at = at.index(bad.len());
        bad[at] ^= by;
        if let Ok(items) = decode(&bad, 50_000) {
            // Only what says what the content is, or what a digest says of a block, can be another than it was.
            let whole = decode(&good, 50_000).unwrap();
            let is_same = |a: &Item, b: &Item| match (a, b) {
                (Item::Head(_, a), Item::Head(_, b)) => a == b,
                (Item::Digest { block: a, .. }, Item::Digest { block: b, .. }) => a == b,
                (a, b) => a == b,
            };
            prop_assert!(items.len() == whole.len() && items.iter().zip(&whole).all(|(a, b)| is_same(a, b)));
        }
    }

    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), piece in 1usize..40) {
        let _ = decode(&bytes, piece);
    }
}

#[test]
fn a_stream_that_leaves_out_repeats_or_breaks_off_is_refused() {
    let map = map_of(20, &[1, 5, 6, 19]);
    let frames = stream(&map, 0..20, false);
    assert!(decode(&frames.concat(), 1000).is_ok());
    // Frames: head, map, four blocks, end.
    assert_eq!(frames.len(), 7);
    for left_out in 2..6 {
        let mut fewer = frames.clone();
        fewer.remove(left_out);
        assert!(matches!(decode(&fewer.concat(), 1000), Err(BlocksError::Order { .. })), "{left_out}");
    }
    let mut again = frames.clone();
    again.insert(3, again[2].clone());
    let refused = decode(&again.concat(), 1000);
    assert!(matches!(refused, Err(BlocksError::Order { expected: Some(5), came: Some(1) })), "{refused:?}");
    for ended in 0..6 {
        assert!(matches!(decode(&frames[..ended].concat(), 1000), Err(BlocksError::BrokeOff)), "{ended}");
    }
    let mut failed = frames[..3].to_vec();
    failed.push(Encoder::failed(&Problem::new(Code::Internal, "the disk is gone")).unwrap());
    assert!(
        matches!(decode(&failed.concat(), 1000), Err(BlocksError::Failed(problem)) if problem.code == Code::Internal)
    );
    // A good block at another's place.
    let mut swapped = frames.clone();
    let mut other = swapped[3].to_vec();
    other[HEADER_BYTES..HEADER_BYTES + 4].copy_from_slice(&1u32.to_le_bytes());
    swapped[2] = other.into();
    assert!(matches!(decode(&swapped.concat(), 1000), Err(BlocksError::Damaged { block: 1 })));
}

#[test]
fn sizes_are_checked_before_anything_is_kept() {
    let map = BlockMap::zeros(2);
    let begin = |size, range| Encoder::begin("r".into(), size, &map, range, false).map(drop);
    assert!(begin(BLOCK_BYTES as u64 + 1, 0..2).is_ok());
    assert!(begin(BLOCK_BYTES as u64, 0..1).is_err() && begin(BLOCK_BYTES as u64 * 2, 0..3).is_err());
    assert_eq!((block_count(0), block_count(MAX_SIZE_BYTES + 1), block_count(1)), (None, None, Some(1)));
    assert_eq!(block_count(MAX_SIZE_BYTES), Some(1 << 25));
    assert!(BlockMap::from_bits(9, vec![0xff, 1]).is_some() && BlockMap::from_bits(9, vec![0xff, 2]).is_none());
    assert!(BlockMap::from_bits(9, vec![0xff]).is_none());
    let huge = Head {
        root: "r".into(),
        size_bytes: u64::MAX,
        block_bytes: BLOCK_BYTES as u32,
        from: 0,
        to: 1,
        digests: false,
        map_blake3: String::new(),
    };
    let bytes = Frame::json(1, 1, &huge).unwrap().to_bytes().unwrap();
    assert!(matches!(decode(&bytes, 10), Err(BlocksError::Nonsense(_))));
}
