//! One thing for people: a line per field; what is inside another is indented; bytes and times in words.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::table::{bytes, time};

/// Nothing that REST answers is deeper; what is, is shown as JSON.
const DEPTH_AT_MOST: usize = 8;

/// The names of ids.
pub type Names = BTreeMap<String, String>;

/// Kinds of ids whose names say more than they do: host, cloud, project, network, image, guest.
const NAMED: [&str; 6] = ["hst-", "cld-", "prj-", "net-", "img-", "gst-"];

/// The text, ending with a line feed. What is no object is shown as JSON.
#[must_use]
pub fn render(value: &Value) -> String {
    render_named(value, &Names::new())
}

/// The same, with the names that are known beside their ids.
#[must_use]
pub fn render_named(value: &Value, names: &Names) -> String {
    let mut out = String::new();
    match value {
        Value::Object(_) => write(&mut out, 0, value, names),
        other => out.push_str(&format!("{other}\n")),
    }
    out
}

/// The ids in a thing that have names which it does not tell itself: not its own (`id`), nor those with a field `…_name` beside.
#[must_use]
pub fn nameless_ids(value: &Value) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    collect(&mut found, 0, value);
    found
}

fn collect(found: &mut BTreeSet<String>, depth: usize, value: &Value) {
    let is_named_id = |text: &str| text.len() == 40 && NAMED.iter().any(|prefix| text.starts_with(prefix));
    match value {
        Value::Object(fields) if depth <= DEPTH_AT_MOST => {
            for (key, value) in fields {
                if key != "id" && !fields.contains_key(&format!("{key}_name")) {
                    collect(found, depth + 1, value);
                }
            }
        }
        Value::Array(items) if depth <= DEPTH_AT_MOST => {
            items.iter().for_each(|item| collect(found, depth + 1, item));
        }
        Value::String(text) if is_named_id(text) => {
            found.insert(text.clone());
        }
        _ => {}
    }
}

fn write(out: &mut String, depth: usize, value: &Value, names: &Names) {
    let Value::Object(fields) = value else { return };
    let width = fields.keys().map(|key| key.chars().count()).max().unwrap_or(0);
    let indent = "  ".repeat(depth);
    for (key, value) in fields {
        match value {
            Value::Object(inner) if !inner.is_empty() && depth < DEPTH_AT_MOST => {
                out.push_str(&format!("{indent}{key}\n"));
                write(out, depth + 1, value, names);
            }
            Value::Array(items) if items.iter().any(Value::is_object) && depth < DEPTH_AT_MOST => {
                for (at, item) in items.iter().enumerate() {
                    out.push_str(&format!("{indent}{key} {}\n", at + 1));
                    write(out, depth + 1, item, names);
                }
            }
            value => out.push_str(&format!("{indent}{key:<width$}  {}\n", word(key, value, names))),
        }
    }
}

/// A value that is shown in its field's line. The units are in the fields' names.
fn word(key: &str, value: &Value, names: &Names) -> String {
    match value {
        Value::Null => "-".into(),
        // One line each: what a guest or a host calls itself must not look like a field.
        Value::String(text) if text.chars().any(char::is_control) => value.to_string(),
        Value::String(text) => match names.get(text) {
            Some(name) => format!("{text} ({name})"),
            None => text.clone(),
        },
        Value::Bool(is) => if *is { "yes" } else { "no" }.into(),
        Value::Array(items) if items.is_empty() => "-".into(),
        Value::Array(items) => items.iter().map(|item| word(key, item, names)).collect::<Vec<_>>().join(", "),
        Value::Object(inner) if inner.is_empty() => "-".into(),
        Value::Number(number) => match number.as_u64() {
            Some(0) if is_instant(key) => "-".into(),
            Some(at_ms) if is_instant(key) => time(at_ms),
            Some(count) if key.ends_with("_bytes") => bytes(count),
            _ => number.to_string(),
        },
        other => other.to_string(),
    }
}

fn is_instant(key: &str) -> bool {
    key.ends_with("_at_ms") || key == "last_seen_ms" || key == "now_ms"
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_are_lines_and_what_is_inside_is_indented() {
        let guest = json!({
            "name": "web",
            "alarm": null,
            "shape": { "vcpus": 2, "memory_bytes": 134_217_728_u64 },
            "volumes": ["vol-1", "vol-2"],
            "ports": [{ "mac": "02:00", "is_open": true }],
            "created_at_ms": 1_769_862_896_000_u64,
        });
        // Fields in the order of the document.
        let text = render(&guest);
        for line in [
            "name           web\n",
            "alarm          -\n",
            "shape\n",
            "  memory_bytes  128.0 MiB\n",
            "  vcpus         2\n",
            "volumes        vol-1, vol-2\n",
            "ports 1\n",
            "  is_open  yes\n",
            "created_at_ms  2026-01-31 12:34:56\n",
        ] {
            assert!(text.contains(line), "{line:?} in\n{text}");
        }
        assert_eq!(text.lines().count(), 10, "{text}");
    }

    #[test]
    fn ids_have_their_names_beside_them() {
        let [host, network, own] =
            ["hst", "net", "gst"].map(|kind| format!("{kind}-01a1fea9-e622-75ca-b41b-c7d245b5cc2f"));
        let guest =
            json!({ "id": own, "host": host, "host_name": "h1", "ports": [{ "network": network, "guest": own }] });
        assert_eq!(nameless_ids(&guest), BTreeSet::from([network.clone(), own.clone()]));
        let names = Names::from([(network.clone(), "lan".into())]);
        let text = render_named(&guest, &names);
        assert!(text.contains(&format!("network  {network} (lan)\n")), "{text}");
        assert!(text.contains(&format!("guest    {own}\n")), "{text}");
    }

    #[test]
    fn a_value_cannot_look_like_another_field() {
        assert_eq!(render(&json!({ "name": "a\nalarm  none" })), "name  \"a\\nalarm  none\"\n");
        let mut deep = json!(1);
        for _ in 0..100 {
            deep = json!({ "in": deep });
        }
        assert!(render(&deep).lines().count() <= DEPTH_AT_MOST + 1);
    }
}
