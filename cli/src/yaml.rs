//! JSON values as YAML 1.2 in block style. Every string that is not a plain word is written as a JSON string, which YAML
//! reads as it is, so nothing is taken for a number, a date or a boolean that is none.

use serde_json::Value;

/// The document, ending with a line feed.
#[must_use]
pub fn render(value: &Value) -> String {
    let mut out = String::new();
    write(&mut out, value, 0);
    out
}

/// Words that YAML 1.1 or 1.2 take for something other than text.
const RESERVED: [&str; 10] = ["true", "false", "null", "yes", "no", "on", "off", "y", "n", "nan"];

fn is_plain(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-' || b == b'.' || b == b'/')
        && !RESERVED.contains(&text.to_ascii_lowercase().as_str())
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) if is_plain(text) => text.clone(),
        // Empty containers, numbers and all other text: JSON is YAML.
        other => other.to_string(),
    }
}

fn is_block(value: &Value) -> bool {
    match value {
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => false,
    }
}

fn write(out: &mut String, value: &Value, depth: usize) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                if is_block(item) {
                    // The first line of what is inside stands behind the dash.
                    let mut inner = String::new();
                    write(&mut inner, item, depth + 1);
                    out.push_str(&indent);
                    out.push_str("- ");
                    out.push_str(inner.trim_start_matches(' '));
                } else {
                    out.push_str(&format!("{indent}- {}\n", scalar(item)));
                }
            }
        }
        Value::Object(fields) if !fields.is_empty() => {
            for (key, value) in fields {
                let key = scalar(&Value::String(key.clone()));
                if is_block(value) {
                    out.push_str(&format!("{indent}{key}:\n"));
                    write(out, value, depth + 1);
                } else {
                    out.push_str(&format!("{indent}{key}: {}\n", scalar(value)));
                }
            }
        }
        other => out.push_str(&format!("{indent}{}\n", scalar(other))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_lists_and_text_that_looks_like_something_else() {
        let value = serde_json::json!({
            "name": "web", "at_ms": 5, "alarm": null, "is": true, "text": "no", "date": "2026-01-01", "empty": [], "none": {},
            "checks": [{ "name": "room", "detail": "free: 5\nleft" }, ["a", ["b"]], 7],
            "plan": { "to": { "host": "h-1" } }, "odd key": "",
        });
        let expected = "alarm: null\nat_ms: 5\nchecks:\n  - detail: \"free: 5\\nleft\"\n    name: room\n  - - a\n    - - b\n  - 7\n\
            date: \"2026-01-01\"\nempty: []\nis: true\nname: web\nnone: {}\n\"odd key\": \"\"\nplan:\n  to:\n    host: h-1\ntext: \"no\"\n";
        assert_eq!(render(&value), expected);
        assert_eq!(render(&Value::Array(vec![])), "[]\n");
    }
}
