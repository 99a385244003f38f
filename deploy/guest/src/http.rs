//! As much HTTP/1.1 as a status page needs: GET, one request per connection, everything bounded.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const CONNECTIONS_CAP: usize = 64;
const REQUEST_CAP: u64 = 8 << 10;
const ANSWER_CAP: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

/// Serves `answer(path)` on this port for ever; no answer is a 404.
pub fn serve(port: u16, answer: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    let (answer, open) = (Arc::new(answer), Arc::new(AtomicUsize::new(0)));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_CAP {
                open.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let (answer, open) = (Arc::clone(&answer), Arc::clone(&open));
            std::thread::spawn(move || {
                // A client that hangs up only loses its own answer.
                let _ = serve_one(&stream, &*answer);
                open.fetch_sub(1, Ordering::Relaxed);
            });
        }
    });
    Ok(())
}

fn serve_one(stream: &TcpStream, answer: &dyn Fn(&str) -> Option<String>) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(stream.take(REQUEST_CAP));
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let path = first.strip_prefix("GET ").and_then(|rest| rest.split_whitespace().next());
    let (status, body) = match path.map(answer) {
        Some(Some(body)) => ("200 OK", body),
        Some(None) => ("404 Not Found", "{\"error\":\"no such page\"}".to_owned()),
        None => ("400 Bad Request", "{\"error\":\"only GET\"}".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let mut writer = stream;
    writer.write_all(head.as_bytes())?;
    writer.write_all(body.as_bytes())
}

/// One request to its end; gives status and body.
pub fn request(
    to: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
    patience: Duration,
) -> io::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&to, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    let (host, length) = (to.ip(), body.len());
    let mut text =
        format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {length}\r\n");
    for (key, value) in headers {
        text.push_str(&format!("{key}: {value}\r\n"));
    }
    text.push_str("\r\n");
    text.push_str(body);
    stream.write_all(text.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(ANSWER_CAP).read_to_end(&mut answer)?;
    parse_answer(&String::from_utf8_lossy(&answer)).ok_or_else(|| io::Error::other("not an HTTP answer"))
}

fn parse_answer(text: &str) -> Option<(u16, String)> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split_whitespace().nth(1)?.parse().ok()?;
    // A cut answer must not pass for a whole one.
    let length = head.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    if length.is_some_and(|length| length != body.len()) {
        return None;
    }
    Some((status, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serves_and_asks() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        serve(port, |path| (path == "/x").then(|| "{}".to_owned())).unwrap();
        let to = SocketAddr::from(([127, 0, 0, 1], port));
        let ask = |method, path| request(to, method, path, &[("X-A", "b")], "", PATIENCE).unwrap();
        assert_eq!(ask("GET", "/x"), (200, "{}".to_owned()));
        assert_eq!(ask("GET", "/y").0, 404);
        assert_eq!(ask("PUT", "/x").0, 400);
    }

    #[test]
    fn cut_answers_are_refused() {
        assert_eq!(parse_answer("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"), Some((200, "ok".into())));
        assert_eq!(parse_answer("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok"), None);
        assert_eq!(parse_answer("hello"), None);
    }
}
