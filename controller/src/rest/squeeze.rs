//! Large answers are sent compressed to whoever takes that: a page of a thousand guests says the same words a thousand times.
//!
//! Only whole JSON answers to GET: none of them has a secret beside what the asker chose.

use std::io::Write as _;

use axum::{
    body::{Body, HttpBody as _, to_bytes},
    http::{HeaderMap, HeaderValue, Method, header},
    response::Response,
};
use flate2::{Compression, write::GzEncoder};

/// Below this, in bytes, it is not worth it.
const LEAST_BYTES: u64 = 4 << 10;
/// Above this an answer is no page of ours.
const MOST_BYTES: u64 = 64 << 20;

/// Whether the asker takes gzip.
pub(super) fn is_asked_for(method: &Method, headers: &HeaderMap) -> bool {
    let asked = headers.get(header::ACCEPT_ENCODING).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let takes = |one: &str| {
        let mut parts = one.split(';').map(str::trim);
        parts.next() == Some("gzip") && !parts.any(|part| matches!(part, "q=0" | "q=0.0" | "q=0.00" | "q=0.000"))
    };
    *method == Method::GET && asked.split(',').any(takes)
}

/// The answer, compressed where that is worth it.
pub(super) async fn squeeze(response: Response) -> Response {
    let is_json = response.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
    let is_worth_it =
        response.body().size_hint().exact().is_some_and(|size| (LEAST_BYTES..=MOST_BYTES).contains(&size));
    if !is_json || !is_worth_it || response.headers().contains_key(header::CONTENT_ENCODING) {
        return response;
    }
    let (mut head, body) = response.into_parts();
    // All of it is there already: nothing is waited for.
    let Ok(bytes) = to_bytes(body, usize::MAX).await else { return Response::from_parts(head, Body::empty()) };
    let plain = bytes.clone();
    let packed = tokio::task::spawn_blocking(move || {
        let mut encoder = GzEncoder::new(Vec::with_capacity(plain.len() / 8), Compression::fast());
        encoder.write_all(&plain).and_then(|()| encoder.finish())
    });
    let Ok(Ok(packed)) = packed.await else { return Response::from_parts(head, Body::from(bytes)) };
    head.headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    head.headers.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
    head.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(head, Body::from(packed))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use axum::response::IntoResponse as _;

    use super::*;

    #[test]
    fn only_who_takes_it_gets_it() {
        let asked = |text: &'static str| {
            let headers = HeaderMap::from_iter([(header::ACCEPT_ENCODING, HeaderValue::from_static(text))]);
            is_asked_for(&Method::GET, &headers)
        };
        assert!(asked("gzip") && asked("br, gzip;q=0.5, deflate") && asked("deflate,gzip"));
        assert!(!asked("br") && !asked("gzip;q=0") && !asked("gzip; q=0.0") && !asked("x-gzip") && !asked(""));
        assert!(!is_asked_for(&Method::GET, &HeaderMap::new()));
        let headers = HeaderMap::from_iter([(header::ACCEPT_ENCODING, HeaderValue::from_static("gzip"))]);
        assert!(!is_asked_for(&Method::POST, &headers));
    }

    #[tokio::test]
    async fn a_large_answer_is_the_same_afterwards_and_a_small_one_is_left_alone() {
        let json = |text: String| ([(header::CONTENT_TYPE, "application/json")], text).into_response();
        let text = format!("[{}1]", "{\"state\":\"running\"},".repeat(1000));
        let packed = squeeze(json(text.clone())).await;
        assert_eq!(packed.headers()[header::CONTENT_ENCODING], "gzip");
        let bytes = to_bytes(packed.into_body(), usize::MAX).await.unwrap();
        assert!(bytes.len() * 10 < text.len(), "{}", bytes.len());
        let mut unpacked = String::new();
        flate2::read::GzDecoder::new(&*bytes).read_to_string(&mut unpacked).unwrap();
        assert_eq!(unpacked, text);
        let small = squeeze(json("{}".to_owned())).await;
        assert!(!small.headers().contains_key(header::CONTENT_ENCODING));
        let other = squeeze(([(header::CONTENT_TYPE, "text/plain")], text).into_response()).await;
        assert!(!other.headers().contains_key(header::CONTENT_ENCODING));
    }
}
