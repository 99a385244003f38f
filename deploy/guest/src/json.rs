//! As much JSON as is needed to read one word out of an answer: the string under a key of the outermost object.

/// The string at `key` of the outermost object; `None` when it is not there, is no string, or has escapes.
pub fn word<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let bytes = text.as_bytes();
    let (mut depth, mut at) = (0_u32, 0);
    let mut is_key = false;
    while at < bytes.len() {
        match bytes[at] {
            b'{' | b'[' => {
                depth += 1;
                is_key = bytes[at] == b'{';
            }
            b'}' | b']' => depth = depth.checked_sub(1)?,
            b',' => is_key = true,
            b'"' => {
                let end = end_of_string(bytes, at + 1)?;
                let found = depth == 1 && is_key && &text[at + 1..end] == key;
                at = end;
                if found {
                    let rest = text[end + 1..].trim_start().strip_prefix(':')?.trim_start().strip_prefix('"')?;
                    let value = &rest[..end_of_string(rest.as_bytes(), 0)?];
                    return (!value.contains('\\')).then_some(value);
                }
                is_key = false;
            }
            _ => {}
        }
        at += 1;
    }
    None
}

/// Where the string that goes on here has its closing quote.
fn end_of_string(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match bytes.get(at)? {
            b'"' => return Some(at),
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_read_from_the_outermost_object_only() {
        let text = r#"{"a":{"id":"inner"},"b":["id","x"],"c":"id","n":1,"id" : "outer","e":"x\"y","z":null}"#;
        assert_eq!(word(text, "id"), Some("outer"));
        assert_eq!(
            (word(text, "c"), word(text, "n"), word(text, "e"), word(text, "z")),
            (Some("id"), None, None, None)
        );
        for bad in ["", "{", "}", "{\"id", "{\"id\":", "{\"id\":\"", "[\"id\":\"x\"", "\"\\"] {
            assert_eq!(word(bad, "id"), None, "{bad}");
        }
    }
}
