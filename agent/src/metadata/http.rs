//! As much of HTTP/1.1 (RFC 9112) as a metadata service needs: requests with a short body (`POST`) or none, answers with a length.
//! Everything is bounded; what is not understood is refused, never guessed.

use supercloud_api::Problem;
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// The longest request, in bytes.
const MAX_REQUEST_BYTES: usize = 8 << 10;
/// The longest path, in bytes.
const MAX_PATH_BYTES: usize = 1 << 10;
/// The longest body, in bytes.
const MAX_BODY_BYTES: usize = 4 << 10;
/// The most headers.
const MAX_HEADERS: usize = 64;

/// Why a request is not answered by its meaning.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The connection broke.
    #[error("the connection broke")]
    Io(#[from] std::io::Error),
    /// The request is refused with this status.
    #[error("refused with {0}")]
    Refused(u16),
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// `GET`, `PUT`, …
    pub method: String,
    /// From the first slash on, without a query.
    pub path: String,
    /// Names in lower case, values trimmed.
    pub headers: Vec<(String, String)>,
    /// The connection ends after the answer.
    pub wants_close: bool,
    /// What came with it; only `POST` may bring something.
    pub body: Vec<u8>,
}

impl Request {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(had, _)| had == name).map(|(_, value)| value.as_str())
    }

    /// Reads a request's head (without the empty line at its end); gives the length of its body too.
    pub fn parse(head: &[u8]) -> Result<(Self, usize), HttpError> {
        let bad = HttpError::Refused(400);
        let text = std::str::from_utf8(head).map_err(|_| HttpError::Refused(400))?;
        let mut lines = text.split("\r\n");
        let mut words = lines.next().unwrap_or_default().split(' ');
        let (Some(method), Some(target), Some(version), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(bad);
        };
        if method.is_empty() || method.len() > 16 || !method.bytes().all(|b| b.is_ascii_uppercase()) {
            return Err(bad);
        }
        let is_old = match version {
            "HTTP/1.1" => false,
            "HTTP/1.0" => true,
            _ => return Err(HttpError::Refused(505)),
        };
        let path = target.split('?').next().unwrap_or_default();
        if path.len() > MAX_PATH_BYTES {
            return Err(HttpError::Refused(414));
        }
        if !path.starts_with('/') || !path.bytes().all(|b| (0x21..0x7f).contains(&b)) {
            return Err(bad);
        }
        let mut headers = Vec::new();
        for line in lines {
            let (name, value) = line.split_once(':').ok_or(HttpError::Refused(400))?;
            let is_token = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
            if name.is_empty() || !name.bytes().all(is_token) || value.bytes().any(|b| b < 0x20 && b != b'\t') {
                return Err(HttpError::Refused(400));
            }
            if headers.len() >= MAX_HEADERS {
                return Err(HttpError::Refused(431));
            }
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let (method, path) = (method.to_owned(), path.to_owned());
        let mut request = Self { method, path, headers, wants_close: is_old, body: Vec::new() };
        let length = request.body_length()?;
        if let Some(connection) = request.header("connection") {
            request.wants_close |= connection.to_ascii_lowercase().contains("close");
        }
        Ok((request, length))
    }

    /// How long the body is. Two lengths, or a coding that says its own, are refused: where the next request begins must be sure.
    fn body_length(&self) -> Result<usize, HttpError> {
        if self.header("transfer-encoding").is_some() {
            return Err(HttpError::Refused(411));
        }
        let mut lengths = self.headers.iter().filter(|(name, _)| name == "content-length");
        let Some((_, text)) = lengths.next() else { return Ok(0) };
        let is_number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        if lengths.next().is_some() || !is_number {
            return Err(HttpError::Refused(400));
        }
        let most = if self.method == "POST" { MAX_BODY_BYTES } else { 0 };
        text.parse().ok().filter(|length| *length <= most).ok_or(HttpError::Refused(413))
    }
}

/// Reads the next request; `None` when the client has left. `buffer` holds what came beyond it.
pub async fn read<R: AsyncRead + Unpin>(reader: &mut R, buffer: &mut Vec<u8>) -> Result<Option<Request>, HttpError> {
    let (mut request, length) = loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            let rest = buffer.split_off(end + 4);
            let head = std::mem::replace(buffer, rest);
            break Request::parse(&head[..end])?;
        }
        if buffer.len() >= MAX_REQUEST_BYTES {
            return Err(HttpError::Refused(431));
        }
        let mut piece = [0; 2048];
        let space = (MAX_REQUEST_BYTES - buffer.len()).min(piece.len());
        match reader.read(&mut piece[..space]).await? {
            0 => return Ok(None),
            count => buffer.extend_from_slice(&piece[..count]),
        }
    };
    while buffer.len() < length {
        let mut piece = [0; 2048];
        let space = (length - buffer.len()).min(piece.len());
        match reader.read(&mut piece[..space]).await? {
            0 => return Err(HttpError::Refused(400)),
            count => buffer.extend_from_slice(&piece[..count]),
        }
    }
    let rest = buffer.split_off(length);
    request.body = std::mem::replace(buffer, rest);
    Ok(Some(request))
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status.
    pub status: u16,
    kind: &'static str,
    /// The body.
    pub body: Vec<u8>,
    /// Headers of its own.
    extra: Vec<(&'static str, String)>,
}

impl Response {
    /// Plain text.
    pub fn text(body: impl Into<Vec<u8>>) -> Self {
        Self { status: 200, kind: "text/plain; charset=utf-8", body: body.into(), extra: Vec::new() }
    }

    /// JSON.
    pub fn json(body: &serde_json::Value) -> Self {
        Self { kind: "application/json", ..Self::text(body.to_string()) }
    }

    /// The same as the answer to what was begun, which can be followed there.
    pub fn accepted(self, location: String) -> Self {
        Self { status: 202, ..self }.with("Location", location)
    }

    /// The same with a header more.
    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.extra.push((name, value.into()));
        self
    }

    /// A problem (RFC 9457), with the time after which to try again where that may help.
    pub fn problem(problem: &Problem) -> Self {
        let body = serde_json::to_vec(problem).unwrap_or_default();
        let status = if (400..600).contains(&problem.status) { problem.status } else { 500 };
        let response = Self { status, kind: "application/problem+json", body, extra: Vec::new() };
        match status {
            429 | 503 => response.with("Retry-After", "1"),
            _ => response,
        }
    }

    /// An answer that is its status alone.
    pub fn error(status: u16) -> Self {
        Self { status, ..Self::text(format!("{status} {}\n", reason(status))) }
    }

    /// What goes over the wire.
    pub fn bytes(&self, is_last: bool) -> Vec<u8> {
        let connection = if is_last { "close" } else { "keep-alive" };
        let extra: String = self.extra.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let mut out = format!(
            "HTTP/1.1 {} {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: {connection}\r\nServer: \
             supercloud\r\n{extra}\r\n",
            self.status,
            reason(self.status),
            self.kind,
            self.body.len()
        )
        .into_bytes();
        out.extend_from_slice(&self.body);
        out
    }
}

const fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        202 => "Accepted",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        411 => "Length Required",
        412 => "Precondition Failed",
        413 => "Content Too Large",
        414 => "URI Too Long",
        422 => "Unprocessable Content",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "Error",
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _};

    use super::*;

    async fn one(text: &str) -> Result<Option<Request>, HttpError> {
        read(&mut text.as_bytes(), &mut Vec::new()).await
    }

    #[tokio::test]
    async fn requests_are_read_one_after_the_other() {
        let text = "GET /a?q=1 HTTP/1.1\r\nHost: x\r\nX-A:  b \r\n\r\nPUT /b HTTP/1.1\r\nConnection: Close\r\n\r\n";
        let (mut reader, mut buffer) = (text.as_bytes(), Vec::new());
        let first = read(&mut reader, &mut buffer).await.unwrap().unwrap();
        assert_eq!((first.method.as_str(), first.path.as_str(), first.wants_close), ("GET", "/a", false));
        assert_eq!(first.header("x-a"), Some("b"));
        let second = read(&mut reader, &mut buffer).await.unwrap().unwrap();
        assert!(second.wants_close && second.path == "/b");
        let text = "POST /c HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcGET /d HTTP/1.1\r\n\r\n";
        let (mut reader, mut buffer) = (text.as_bytes(), Vec::new());
        assert_eq!(read(&mut reader, &mut buffer).await.unwrap().unwrap().body, b"abc");
        let next = read(&mut reader, &mut buffer).await.unwrap().unwrap();
        assert_eq!((next.path.as_str(), next.body.len()), ("/d", 0));
        assert!(read(&mut reader, &mut buffer).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn what_is_not_understood_is_refused() {
        let long = "a".repeat(MAX_REQUEST_BYTES);
        let many = "a: b\r\n".repeat(MAX_HEADERS + 1);
        for (text, status) in [
            ("GET /\r\n\r\n".to_owned(), 400),
            ("get / HTTP/1.1\r\n\r\n".to_owned(), 400),
            ("GET / HTTP/2\r\n\r\n".to_owned(), 505),
            ("GET http://other/ HTTP/1.1\r\n\r\n".to_owned(), 400),
            ("GET / HTTP/1.1\r\nbad header\r\n\r\n".to_owned(), 400),
            ("GET / HTTP/1.1\r\nContent-Length: 5\r\n\r\n".to_owned(), 413),
            ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(), 411),
            ("POST / HTTP/1.1\r\nContent-Length: 4097\r\n\r\n".to_owned(), 413),
            ("POST / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n".to_owned(), 413),
            ("POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab".to_owned(), 400),
            ("POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\na".to_owned(), 400),
            ("POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nabc".to_owned(), 400),
            (format!("GET /{} HTTP/1.1\r\n\r\n", &long[..MAX_PATH_BYTES]), 414),
            (format!("GET / HTTP/1.1\r\nx: {long}\r\n\r\n"), 431),
            (format!("GET / HTTP/1.1\r\n{many}\r\n"), 431),
        ] {
            match one(&text).await {
                Err(HttpError::Refused(found)) => assert_eq!(found, status, "{}", &text[..40.min(text.len())]),
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn mutated_requests_never_panic() {
        let seed = 0x5eed_a901;
        println!("seed {seed:#x}");
        let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
        let good: [&[u8]; 2] = [
            b"PUT /latest/api/token HTTP/1.1\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n",
            b"POST /supercloud/v1/guest/migrate HTTP/1.1\r\nContent-Length: 13\r\n\r\n{\"to\":\"east\"}GET / HTTP/1.1\r\n\r\n",
        ];
        for round in 0..10_000 {
            let mut bytes = good[round % 2].to_vec();
            for _ in 0..rng.random_range(1..6) {
                let at = rng.random_range(0..bytes.len());
                bytes[at] = rng.random();
            }
            bytes.truncate(rng.random_range(0..=bytes.len()));
            let (mut reader, mut buffer) = (bytes.as_slice(), Vec::new());
            while let Ok(Some(request)) = read(&mut reader, &mut buffer).await {
                assert!(request.path.starts_with('/') && request.body.len() <= MAX_BODY_BYTES);
            }
        }
    }
}
