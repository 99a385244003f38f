//! OVSDB (RFC 7047) over a unix socket: the database that tells Open vSwitch which bridges and ports to have.
//!
//! [`OvsdbClient`] carries JSON-RPC; [`Vswitch`] holds the idempotent operations on the `Open_vSwitch` schema
//! (ovs-vswitchd.conf.db(5)).

mod vswitch;

use std::{collections::HashMap, path::Path, path::PathBuf, time::Duration};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixStream, unix::OwnedReadHalf, unix::OwnedWriteHalf},
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};

pub use self::vswitch::{BridgeSpec, Interface, InterfaceSpec, Vswitch};

/// The largest message that is taken in. A database of ten thousand ports stays far below.
pub const MAX_MESSAGE: usize = 64 << 20;
/// How deep JSON may nest; the server's answers nest far less.
const MAX_DEPTH: usize = 64;

/// Why the database did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum OvsdbError {
    /// The server cannot be reached.
    #[error("connecting to the switch database at {path} failed")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No answer in time.
    #[error("the switch database did not answer {what} within {deadline:?}")]
    Deadline {
        /// What was asked.
        what: String,
        /// How long was waited.
        deadline: Duration,
    },
    /// The connection ended.
    #[error("the connection to the switch database ended during {what}")]
    Closed {
        /// What was asked.
        what: String,
    },
    /// The server refused.
    #[error("the switch database refused {what}: {error}{}", details.as_ref().map(|d| format!(" ({d})")).unwrap_or_default())]
    Refused {
        /// What was asked.
        what: String,
        /// The error's name.
        error: String,
        /// More about it.
        details: Option<String>,
    },
    /// The answer is not one to this request.
    #[error("the switch database answered {what} by something else")]
    Unexpected {
        /// What was asked.
        what: String,
    },
    /// Open vSwitch has not given an interface its port number.
    #[error("interface {name} got no port number: {reason}")]
    NoPort {
        /// The interface.
        name: String,
        /// What the switch says.
        reason: String,
    },
}

struct Call {
    method: &'static str,
    params: Value,
    answer: oneshot::Sender<Value>,
}

/// A JSON-RPC connection to an OVSDB server. Dropping it ends its task.
#[derive(Debug)]
pub struct OvsdbClient {
    calls: mpsc::Sender<Call>,
    deadline: Duration,
    _tasks: JoinSet<()>,
}

impl OvsdbClient {
    /// Connects.
    pub async fn open(path: &Path, deadline: Duration) -> Result<Self, OvsdbError> {
        let stream = timeout(deadline, UnixStream::connect(path))
            .await
            .map_err(|_| OvsdbError::Deadline { what: "the connection".into(), deadline })?
            .map_err(|source| OvsdbError::Connect { path: path.to_owned(), source })?;
        let (calls, queue) = mpsc::channel(16);
        let (read, write) = stream.into_split();
        let mut tasks = JoinSet::new();
        tasks.spawn(run(read, write, queue));
        Ok(Self { calls, deadline, _tasks: tasks })
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.calls.is_closed()
    }

    async fn call(&self, method: &'static str, params: Value, what: &str) -> Result<Value, OvsdbError> {
        let (answer, wait) = oneshot::channel();
        let exchange = async {
            self.calls.send(Call { method, params, answer }).await.map_err(drop)?;
            wait.await.map_err(drop)
        };
        match timeout(self.deadline, exchange).await {
            Err(_) => Err(OvsdbError::Deadline { what: what.into(), deadline: self.deadline }),
            Ok(Err(())) => Err(OvsdbError::Closed { what: what.into() }),
            Ok(Ok(mut answer)) => match answer.get("error") {
                None | Some(Value::Null) => Ok(answer["result"].take()),
                Some(error) => Err(refused(what, error)),
            },
        }
    }

    /// Carries out operations (RFC 7047, section 4.1.3) at once or not at all; one result for each.
    pub async fn transact(&self, database: &str, operations: Vec<Value>, what: &str) -> Result<Vec<Value>, OvsdbError> {
        let count = operations.len();
        let mut params = vec![Value::from(database)];
        params.extend(operations);
        let result = self.call("transact", Value::Array(params), what).await?;
        let Value::Array(results) = result else {
            return Err(OvsdbError::Unexpected { what: what.into() });
        };
        // A failure is at its operation's place, or behind all of them when the commit failed.
        if let Some(error) = results.iter().find(|r| r.get("error").is_some_and(|e| !e.is_null())) {
            return Err(refused(what, error));
        }
        if results.len() < count || results[..count].iter().any(Value::is_null) {
            return Err(OvsdbError::Unexpected { what: what.into() });
        }
        Ok(results)
    }
}

fn refused(what: &str, error: &Value) -> OvsdbError {
    let text = |v: &Value| v.as_str().map(|s| s.chars().take(400).collect::<String>());
    OvsdbError::Refused {
        what: what.into(),
        error: text(error)
            .or_else(|| error.get("error").and_then(text))
            .unwrap_or_else(|| error.to_string().chars().take(400).collect()),
        details: error.get("details").and_then(text),
    }
}

/// Writes calls and the answers to the server's echoes, reads answers; ends with the connection or its owner.
async fn run(mut read: OwnedReadHalf, mut write: OwnedWriteHalf, mut queue: mpsc::Receiver<Call>) {
    let mut waiting: HashMap<u64, oneshot::Sender<Value>> = HashMap::new();
    let mut next_id = 1_u64;
    let mut framer = JsonFramer::default();
    let mut chunk = vec![0; 1 << 16];
    loop {
        tokio::select! {
            call = queue.recv() => {
                let Some(call) = call else { return };
                let id = next_id;
                next_id += 1;
                // Whoever stopped waiting leaves its place.
                waiting.retain(|_, answer| !answer.is_closed());
                waiting.insert(id, call.answer);
                let message = json!({"method": call.method, "params": call.params, "id": id});
                if write.write_all(message.to_string().as_bytes()).await.is_err() {
                    return;
                }
            }
            read = read.read(&mut chunk) => {
                let Ok(n @ 1..) = read else { return };
                let messages = match framer.feed(&chunk[..n]) {
                    Ok(messages) => messages,
                    Err(err) => {
                        tracing::warn!(%err, "the switch database broke the protocol");
                        return;
                    }
                };
                for mut message in messages {
                    if message.get("method").and_then(Value::as_str) == Some("echo") {
                        let answer = json!({"result": message["params"].take(), "error": null, "id": message["id"].take()});
                        if write.write_all(answer.to_string().as_bytes()).await.is_err() {
                            return;
                        }
                    } else if let Some(answer) = message["id"].as_u64().and_then(|id| waiting.remove(&id)) {
                        let _ = answer.send(message);
                    }
                }
            }
        }
    }
}

/// Why bytes are no sequence of JSON objects.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// A message is longer than [`MAX_MESSAGE`].
    #[error("a message of more than {MAX_MESSAGE} bytes")]
    TooLong,
    /// A message nests deeper than any of the protocol does.
    #[error("a message that nests more than {MAX_DEPTH} deep")]
    TooDeep,
    /// Not JSON.
    #[error("a message that is not JSON")]
    Syntax(#[from] serde_json::Error),
}

/// Cuts a stream into JSON objects: OVSDB writes them one behind the other, with nothing between.
#[derive(Debug, Default)]
struct JsonFramer {
    buffer: Vec<u8>,
    scanned: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl JsonFramer {
    fn feed(&mut self, bytes: &[u8]) -> Result<Vec<Value>, FrameError> {
        self.buffer.extend_from_slice(bytes);
        let mut messages = Vec::new();
        let mut start = 0;
        while self.scanned < self.buffer.len() {
            let byte = self.buffer[self.scanned];
            self.scanned += 1;
            if self.in_string {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
            if self.depth > MAX_DEPTH {
                return Err(FrameError::TooDeep);
            }
            if self.depth == 0 && matches!(byte, b'}' | b']') {
                messages.push(serde_json::from_slice(&self.buffer[start..self.scanned])?);
                start = self.scanned;
            }
        }
        self.buffer.drain(..start);
        self.scanned -= start;
        if self.buffer.len() > MAX_MESSAGE { Err(FrameError::TooLong) } else { Ok(messages) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_cut_wherever_the_stream_is() {
        let text = br#"{"id":1,"result":["a}\"{"],"error":null} {"id":2,"result":[{}]}"#;
        for cut in 0..text.len() {
            let mut framer = JsonFramer::default();
            let mut all = framer.feed(&text[..cut]).unwrap();
            all.extend(framer.feed(&text[cut..]).unwrap());
            assert_eq!(all.len(), 2, "cut at {cut}");
            assert_eq!(all[0]["result"][0], "a}\"{");
        }
    }

    #[test]
    fn bad_streams_are_errors_and_not_memory() {
        assert!(JsonFramer::default().feed(&[b'['; 1000]).is_err());
        assert!(JsonFramer::default().feed(b"{\"a\":}").is_err());
        assert!(JsonFramer::default().feed(b"}").is_err());
        let mut framer = JsonFramer::default();
        let mut refused = false;
        for _ in 0..=(MAX_MESSAGE >> 20) {
            refused |= framer.feed(&vec![b'a'; 1 << 20]).is_err();
        }
        assert!(refused);
    }
}
