//! `supercloud api`: any call of REST, as it is.

use std::io::Read as _;

use anyhow::{Context as _, ensure};
use reqwest::Method;
use serde_json::Value;
use supercloud_api::client::{Client, LIST_AT_MOST};

use crate::{
    arguments::{ApiArguments, Output},
    show,
};

/// The largest body that is sent: what the controller takes of JSON is smaller.
const BODY_MAX: u64 = 16 << 20;

/// Sends the call and prints the answer. Where none comes, it is sent again with the same idempotency key.
pub async fn run(client: &Client, output: Output, arguments: ApiArguments) -> anyhow::Result<()> {
    let ApiArguments { method, path, data, all } = arguments;
    let method = Method::from_bytes(method.to_ascii_uppercase().as_bytes()).context("the method")?;
    ensure!(path.starts_with('/'), "the path begins with a slash: /v1/guests");
    if all {
        ensure!(method == Method::GET && data.is_none(), "--all is for listings: GET without a body");
        let (items, is_all) = client.list_up_to(&path, LIST_AT_MOST).await?;
        let count = items.len();
        show::print_value(output, &Value::Array(items))?;
        // What was printed looks like all of it: the exit code says that it is not.
        ensure!(
            is_all,
            "stopped after {count} items, and there are more: ask for less at once (a filter, a shorter time)"
        );
        return Ok(());
    }
    let body = data.as_deref().map(read_body).transpose()?;
    let answer: Value = match body {
        Some(body) => client.call(method, &path, &body).await?,
        None if method == Method::GET => client.get(&path).await?,
        None if method == Method::DELETE => client.delete(&path).await?,
        None => client.call(method, &path, &Value::Object(serde_json::Map::new())).await?,
    };
    match answer {
        // 204: there is nothing to print.
        Value::Null => Ok(()),
        answer => show::print_value(output, &answer),
    }
}

/// JSON as it is written, `@FILE`, or `-` for standard input.
fn read_body(data: &str) -> anyhow::Result<Value> {
    let text = match data {
        "-" => limited(std::io::stdin().lock(), "standard input")?,
        data => match data.strip_prefix('@') {
            Some(file) => limited(std::fs::File::open(file).with_context(|| format!("opening {file}"))?, file)?,
            None => data.to_owned(),
        },
    };
    serde_json::from_str(&text).context("the body is not JSON")
}

fn limited(reader: impl std::io::Read, name: &str) -> anyhow::Result<String> {
    let mut text = String::new();
    let read = reader.take(BODY_MAX + 1).read_to_string(&mut text).with_context(|| format!("reading {name}"))?;
    ensure!(read as u64 <= BODY_MAX, "{name} is larger than {BODY_MAX} bytes");
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_json_from_anywhere_and_bounded() {
        assert_eq!(read_body("{\"to\":\"home\"}").expect("as it is")["to"], "home");
        assert!(read_body("to=home").is_err());
        assert!(read_body("@/nowhere/at-all").is_err());
        assert!(limited(std::io::repeat(b' '), "endless").is_err());
    }
}
