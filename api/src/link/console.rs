//! Consoles of guests over the link: what the controller orders, and what an agent tells.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use supercloud_ids::{Epoch, GuestId};

/// Most bytes of a console that go in one message.
pub const MAX_CONSOLE_BYTES: usize = 16 << 10;

/// Why a console is closed whose guest somebody else looks at now. Who was shown it does not take it back by itself.
pub const CONSOLE_TAKEN: &str = "another console of the guest was opened";

/// What a console says or is typed, base64 on the wire; at most [`MAX_CONSOLE_BYTES`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsoleBytes(pub Vec<u8>);

impl Serialize for ConsoleBytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for ConsoleBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.len() > MAX_CONSOLE_BYTES.div_ceil(3) * 4 {
            return Err(de::Error::custom(format!("at most {MAX_CONSOLE_BYTES} bytes of a console go in one message")));
        }
        STANDARD.decode(text).map(Self).map_err(de::Error::custom)
    }
}

/// What is to be done with a console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "do")]
pub enum ConsoleOrder {
    /// Show it: first the last that it said, then what it says. One of a guest is shown at a time: the newest.
    Open {
        /// The guest.
        guest: GuestId,
        /// Under which epoch this host has it.
        epoch: Epoch,
    },
    /// Type this.
    Type {
        /// What.
        data: ConsoleBytes,
    },
    /// Nobody looks any more.
    Close,
}

/// What becomes of a console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "tells")]
pub enum ConsoleNews {
    /// It says something.
    Said {
        /// What.
        data: ConsoleBytes,
    },
    /// It is not shown any more.
    Closed {
        /// Why, for people.
        why: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_travel_as_text_and_too_many_are_refused() {
        let order = ConsoleOrder::Type { data: ConsoleBytes(vec![0, 10, 255]) };
        let text = serde_json::to_string(&order).unwrap();
        assert_eq!(text, r#"{"do":"type","data":"AAr/"}"#);
        assert_eq!(serde_json::from_str::<ConsoleOrder>(&text).unwrap(), order);
        let most = ConsoleBytes(vec![7; MAX_CONSOLE_BYTES]);
        let text = serde_json::to_string(&most).unwrap();
        assert_eq!(serde_json::from_str::<ConsoleBytes>(&text).unwrap(), most);
        for bad in ["\"AAr\"", "\"!!!!\"", "3", &format!("\"{}\"", "A".repeat(MAX_CONSOLE_BYTES * 2))] {
            assert!(serde_json::from_str::<ConsoleBytes>(bad).is_err(), "{bad:.20}");
        }
    }
}
