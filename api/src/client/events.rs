//! The event stream: events out of bytes, and silence told apart from quiet.

use std::time::Duration;

use futures::{Stream, StreamExt as _};

use super::{ClientError, Result};
use crate::Event;

/// An event stream that says nothing for so long is dead: the controller says that it is there every 15 seconds.
pub const STREAM_SILENCE: Duration = Duration::from_secs(45);

/// Events out of the bytes of a `text/event-stream` (WHATWG HTML, section 9.2): only `data` matters to us.
pub fn sse_events(
    url: String,
    bytes: impl Stream<Item = Result<bytes::Bytes>> + Send + 'static,
) -> impl Stream<Item = Result<Event>> + Send {
    const MAX_LINE_BYTES: usize = 1 << 20;
    let state = (Box::pin(bytes), Vec::<u8>::new(), url);
    futures::stream::unfold(state, |(mut bytes, mut buffer, url)| async move {
        loop {
            if let Some(end) = buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                let Some(data) = line.strip_prefix(b"data:") else { continue };
                return Some((event(data.trim_ascii()), (bytes, buffer, url)));
            }
            if buffer.len() > MAX_LINE_BYTES {
                return None;
            }
            match tokio::time::timeout(STREAM_SILENCE, bytes.next()).await {
                Ok(Some(Ok(piece))) => buffer.extend_from_slice(&piece),
                Ok(Some(Err(error))) => {
                    buffer.clear();
                    return Some((Err(error), (bytes, buffer, url)));
                }
                Ok(None) => return None,
                Err(_) => {
                    let silent = ClientError::Silent { url: url.clone(), budget: STREAM_SILENCE };
                    return Some((Err(silent), (bytes, buffer, url)));
                }
            }
        }
    })
}

/// An event as it came; of one of another form its number at least, so that it can be left behind.
fn event(data: &[u8]) -> Result<Event> {
    serde_json::from_slice(data).map_err(|error| {
        let seq = serde_json::from_slice::<serde_json::Value>(data).ok().and_then(|value| value.get("seq")?.as_u64());
        ClientError::UnknownEvent { seq, what: error.to_string() }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(lines: &[String]) -> impl Stream<Item = Result<bytes::Bytes>> + Send + 'static {
        let pieces: Vec<_> = lines.iter().map(|line| Ok(bytes::Bytes::from(line.clone().into_bytes()))).collect();
        futures::stream::iter(pieces)
    }

    fn data(seq: u64, kind: &serde_json::Value) -> String {
        let event = serde_json::json!({ "seq": seq, "at_ms": 1, "kind": kind, "actor": "system",
            "request_id": "req-01a1fea9-e617-7305-957c-ad553aef0867", "data": {}, "previous_hash": "", "hash": "" });
        format!("id: {seq}\ndata: {event}\n\n")
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_does_not_even_say_that_it_is_there_is_told_of() {
        let keep_alives = futures::stream::unfold(0, async |count| {
            tokio::time::sleep(STREAM_SILENCE / 3).await;
            (count < 10).then(|| (Ok(bytes::Bytes::from_static(b": \n\n")), count + 1))
        });
        let quiet = keep_alives.chain(pieces(&[data(1, &"host.up".into())])).chain(futures::stream::pending());
        let mut events = Box::pin(sse_events("x".into(), quiet));
        let begun = tokio::time::Instant::now();
        assert_eq!(events.next().await.unwrap().unwrap().seq, 1, "quiet is not silent");
        assert!(begun.elapsed() > STREAM_SILENCE);
        assert!(matches!(events.next().await, Some(Err(ClientError::Silent { .. }))));
    }

    #[tokio::test]
    async fn an_event_of_another_form_has_its_number_at_least_and_those_after_it_come() {
        let unknown = data(2, &serde_json::json!({}));
        let lines = [data(1, &"a".into()), unknown, "data: nothing\n\n".into(), data(3, &"b".into())];
        let mut events = Box::pin(sse_events("x".into(), pieces(&lines)));
        assert_eq!(events.next().await.unwrap().unwrap().seq, 1);
        assert!(matches!(events.next().await, Some(Err(ClientError::UnknownEvent { seq: Some(2), .. }))));
        assert!(matches!(events.next().await, Some(Err(ClientError::UnknownEvent { seq: None, .. }))));
        assert_eq!(events.next().await.unwrap().unwrap().seq, 3);
        assert!(events.next().await.is_none());
    }
}
