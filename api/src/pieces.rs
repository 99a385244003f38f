//! Overlay views that are longer than a frame travel in pieces.
//!
//! The JSON text of the view is cut into [`Directive::OverlayPiece`]s, numbered from 0, which arrive in order on one connection.
//! Other directives may come between them; the first piece of another view ends the one before.

use serde_json::Value;

use crate::link::Directive;

/// Bytes of text in a piece. Quoted once more inside a frame it at most doubles, which leaves room below the frame's limit.
const PIECE_BYTES: usize = 400 << 10;
/// The most pieces that a view may have: room for as many ports as a view may have (65 536, some 330 bytes each).
pub const PIECES_AT_MOST: u32 = 64;

/// The view is longer than [`PIECES_AT_MOST`] pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an overlay view of {bytes} bytes is over the limit of {} bytes", PIECES_AT_MOST as usize * PIECE_BYTES)]
pub struct TooLong {
    /// Its length as text.
    pub bytes: usize,
}

/// A piece that does not follow what came before.
#[derive(Debug, thiserror::Error)]
pub enum BadPiece {
    /// Out of order, of another view, or over the limits.
    #[error("piece {piece} of {of} of an overlay view is out of order or over the limits")]
    Order {
        /// Its number, from 0.
        piece: u32,
        /// How many there are said to be.
        of: u32,
    },
    /// All pieces came, and are no JSON.
    #[error("the pieces of an overlay view make no JSON")]
    Json(#[from] serde_json::Error),
}

/// A view as directives, each of which fits a frame: one if that is enough.
///
/// # Errors
/// [`TooLong`].
pub fn cut(revision: u64, view: Value) -> Result<Vec<Directive>, TooLong> {
    let text = view.to_string();
    if text.len() <= PIECE_BYTES {
        return Ok(vec![Directive::Overlay { revision, view }]);
    }
    let mut pieces = Vec::new();
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let end = (0..=rest.len().min(PIECE_BYTES)).rev().find(|at| rest.is_char_boundary(*at));
        let (piece, after) = rest.split_at(end.unwrap_or(rest.len()));
        pieces.push(piece.to_owned());
        rest = after;
    }
    let too_long = TooLong { bytes: text.len() };
    let of = u32::try_from(pieces.len()).ok().filter(|of| *of <= PIECES_AT_MOST).ok_or(too_long)?;
    let numbered = (0..of).zip(pieces);
    Ok(numbered.map(|(piece, text)| Directive::OverlayPiece { revision, piece, of, text }).collect())
}

/// Puts the pieces of one connection together.
#[derive(Debug, Default)]
pub struct Assembly(Option<Begun>);

#[derive(Debug)]
struct Begun {
    revision: u64,
    next: u32,
    of: u32,
    text: String,
}

impl Assembly {
    /// Takes a directive: itself unless it is a piece; then the whole view with its last piece, and nothing before.
    ///
    /// # Errors
    /// When a piece does not follow; what had come of the view is forgotten.
    pub fn take(&mut self, directive: Directive) -> Result<Option<Directive>, BadPiece> {
        let Directive::OverlayPiece { revision, piece, of, text } = directive else { return Ok(Some(directive)) };
        let begun = match (piece, self.0.take()) {
            (0, _) if of <= PIECES_AT_MOST => Some(Begun { revision, next: 0, of, text: String::new() }),
            (_, begun) => begun,
        };
        let follows = |begun: &Begun| {
            begun.revision == revision
                && begun.next == piece
                && begun.of == of
                && piece < of
                && text.len() <= PIECE_BYTES
        };
        let mut begun = begun.filter(follows).ok_or(BadPiece::Order { piece, of })?;
        begun.text.push_str(&text);
        begun.next += 1;
        if begun.next < begun.of {
            self.0 = Some(begun);
            return Ok(None);
        }
        let view = serde_json::from_str(&begun.text)?;
        Ok(Some(Directive::Overlay { revision, view }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame::Frame;

    fn put_together(pieces: Vec<Directive>) -> Vec<Directive> {
        let mut assembly = Assembly::default();
        pieces.into_iter().filter_map(|piece| assembly.take(piece).unwrap()).collect()
    }

    fn long_view(ports: usize) -> Value {
        let port = |n: usize| serde_json::json!({"port": format!("prt-{n:0300}"), "name": "\"ü€𝄞\\\n"});
        serde_json::json!({"ports": (0..ports).map(port).collect::<Vec<_>>()})
    }

    #[test]
    fn a_long_view_comes_whole_and_each_piece_fits_a_frame() {
        for ports in [0, 1, 1500, 9000, 40_000] {
            let view = long_view(ports);
            let pieces = cut(7, view.clone()).unwrap();
            assert_eq!(pieces.len() > 1, ports > 1000);
            for piece in &pieces {
                Frame::json(1, 1, piece).unwrap();
            }
            assert_eq!(put_together(pieces), [Directive::Overlay { revision: 7, view }]);
        }
        assert!(cut(7, long_view(90_000)).is_err());
    }

    #[test]
    fn a_newer_view_takes_the_place_of_one_half_told() {
        let mut pieces = cut(7, long_view(3000)).unwrap();
        pieces.pop();
        pieces.extend(cut(8, long_view(2000)).unwrap());
        assert_eq!(put_together(pieces), [Directive::Overlay { revision: 8, view: long_view(2000) }]);
    }

    #[test]
    fn what_is_no_piece_passes_between_pieces() {
        let view = long_view(3000);
        let other = Directive::Discard { guest: crate::ids::GuestId::generate() };
        let mut pieces = cut(7, view.clone()).unwrap();
        pieces.insert(1, other.clone());
        assert_eq!(put_together(pieces), [other, Directive::Overlay { revision: 7, view }]);
    }

    proptest! {
        #[test]
        fn any_pieces_are_refused_or_make_a_view(
            pieces in proptest::collection::vec((0u64..2, 0u32..4, 0u32..4, "[\\[\\]1,]{0,4}"), 0..20)
        ) {
            let mut assembly = Assembly::default();
            for (revision, piece, of, text) in pieces {
                let taken = assembly.take(Directive::OverlayPiece { revision, piece, of, text });
                if let Ok(Some(whole)) = taken {
                    let is_last = matches!(whole, Directive::Overlay { revision: told, .. } if told == revision && piece + 1 == of);
                    prop_assert!(is_last);
                }
            }
        }
    }

    #[test]
    fn endless_views_are_refused() {
        let mut assembly = Assembly::default();
        let piece = |piece, of, bytes| Directive::OverlayPiece { revision: 1, piece, of, text: "1".repeat(bytes) };
        assert!(assembly.take(piece(0, PIECES_AT_MOST + 1, 1)).is_err());
        assert!(assembly.take(piece(0, u32::MAX, 1)).is_err());
        assert!(assembly.take(piece(0, 2, PIECE_BYTES + 1)).is_err());
        assert!(assembly.take(piece(0, 0, 1)).is_err());
        assert!(assembly.take(piece(0, 2, 1)).unwrap().is_none());
        assert!(assembly.take(piece(2, 2, 1)).is_err());
        assert!(assembly.take(piece(1, 2, 1)).is_err(), "what came before is forgotten");
    }
}
