//! `supercloud explain`: what the things of the API are and what their fields mean, from its own document; needs no controller.

use std::collections::BTreeMap;

use anyhow::bail;
use serde_json::Value;
use supercloud_cli::table::Table;

/// The document that the controller serves at `/v1/openapi.json`, of this program's version.
const DOCUMENT: &str = include_str!("../../api/openapi.json");

/// What is no thing of the API, and explained all the same.
const EXIT_CODES: &str = "exit-codes";

/// Prints what is known of `path` (`guest`, `guest.shape`, `GuestMigrate`); all things where it is absent.
pub fn run(path: Option<&str>) -> anyhow::Result<()> {
    print!("{}", explain(path)?);
    Ok(())
}

fn explain(path: Option<&str>) -> anyhow::Result<String> {
    if path == Some(EXIT_CODES) {
        return Ok(format!("{}\n", crate::exit::HELP));
    }
    let document: Value = serde_json::from_str(DOCUMENT)?;
    let things: BTreeMap<&str, &Value> = document["components"]["schemas"]
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(name, _)| !name.starts_with("Page_"))
        .map(|(name, schema)| (name.as_str(), schema))
        .collect();
    let Some(path) = path else {
        let mut table = Table::new(["THING", "WHAT IT IS"]);
        for (name, schema) in &things {
            table.row([(*name).to_owned(), first_sentence(schema)]);
        }
        table.row([EXIT_CODES.into(), "How a command ends: no thing of the API, but of this program.".into()]);
        return Ok(table.render());
    };
    let mut steps = path.split('.');
    let first = steps.next().unwrap_or_default().replace(['-', '_'], "");
    // What the commands call otherwise than the API.
    let first = match first.to_lowercase().as_str() {
        "migration" => "operation".to_owned(),
        "plan" => "fleetplan".to_owned(),
        _ => first,
    };
    let Some((name, mut schema)) =
        things.iter().find(|(name, _)| name.eq_ignore_ascii_case(&first)).map(|(n, s)| (*n, *s))
    else {
        bail!("the API knows no '{path}'; `supercloud explain` lists what it knows");
    };
    let mut shown = name.to_owned();
    for step in steps {
        let Some(field) = schema["properties"].get(step) else {
            bail!("{shown} has no field '{step}'; `supercloud explain {shown}` lists its fields");
        };
        shown = format!("{shown}.{step}");
        schema = field;
        while let Some(target) = target(schema).and_then(|target| things.get(target)) {
            schema = target;
        }
    }
    Ok(about(&shown, schema))
}

/// The description; of what may be null it stands with the choice that is not.
fn text(schema: &Value) -> &str {
    let choices = schema["oneOf"].as_array().into_iter().flatten().filter(|one| one["$ref"].is_string());
    std::iter::once(schema).chain(choices).find_map(|one| one["description"].as_str()).unwrap_or_default()
}

fn first_sentence(schema: &Value) -> String {
    let text = text(schema).replace('\n', " ");
    text.split_inclusive(". ").next().unwrap_or_default().trim_end().to_owned()
}

/// The thing that a field refers to: itself, one of a choice with null, or what a list is of.
fn target(schema: &Value) -> Option<&str> {
    let choices = schema["oneOf"].as_array().into_iter().flatten();
    [schema, &schema["items"]].into_iter().chain(choices).find_map(|one| one["$ref"].as_str()?.rsplit('/').next())
}

fn kind(schema: &Value) -> String {
    let of_list = || match target(&schema["items"]) {
        Some(name) => format!("list of {name}"),
        None => format!("list of {}", schema["items"]["type"].as_str().unwrap_or("values")),
    };
    match &schema["type"] {
        Value::String(one) if one == "array" => of_list(),
        Value::String(one) => one.clone(),
        Value::Array(several) => {
            let words: Vec<&str> = several.iter().filter_map(Value::as_str).filter(|word| *word != "null").collect();
            if words == ["array"] { of_list() } else { words.join(" or ") }
        }
        _ => target(schema).unwrap_or("value").to_owned(),
    }
}

/// The words of an enumeration with what they mean: `enum`, or a choice of constants.
fn choices(schema: &Value) -> Vec<(String, String)> {
    let words = schema["enum"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let constants = schema["oneOf"].as_array().into_iter().flatten().flat_map(|one| {
        let words = one["enum"].as_array().into_iter().flatten().filter_map(Value::as_str);
        words.map(|word| (word.to_owned(), first_sentence(one))).collect::<Vec<_>>()
    });
    words.map(|word| (word.to_owned(), String::new())).chain(constants).collect()
}

fn about(name: &str, schema: &Value) -> String {
    let mut out = format!("{name} ({})\n", kind(schema));
    if !text(schema).is_empty() {
        out.push_str(&format!("{}\n", text(schema)));
    }
    let choices = choices(schema);
    if !choices.is_empty() {
        // The document has no words on most choices: no empty column then.
        let is_explained = choices.iter().any(|(_, meaning)| !meaning.is_empty());
        let mut table = if is_explained { Table::new(["ONE OF", "MEANS"]) } else { Table::new(["ONE OF"]) };
        for (word, meaning) in choices {
            table.row([word, meaning]);
        }
        out.push_str(&format!("\n{}", table.render()));
    }
    if let Some(fields) = schema["properties"].as_object() {
        let needed: Vec<&str> = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let mut table = Table::new(["FIELD", "TYPE", "ALWAYS", "WHAT IT IS"]);
        for (field, schema) in fields {
            let always = if needed.contains(&field.as_str()) { "yes" } else { "no" };
            table.row([field.clone(), kind(schema), always.into(), first_sentence(schema)]);
        }
        out.push_str(&format!("\n{}", table.render()));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn things_their_fields_and_their_words_are_explained() {
        let all = explain(None).expect("a list");
        assert!(all.contains("\nGuest ") && !all.contains("Page_"), "{all}");
        let guest = explain(Some("guest")).expect("a guest");
        assert!(guest.starts_with("Guest (object)\n"), "{guest}");
        let shape = guest.lines().find(|line| line.starts_with("shape ")).expect("its shape");
        assert!(shape.contains("Shape") && shape.contains("yes"), "{shape}");
        assert!(guest.contains("The host that owns it"), "what may be absent is explained, too: {guest}");
        assert!(explain(Some("guest.shape")).expect("a shape").contains("memory_bytes"));
        assert!(explain(Some("operation.phase")).expect("a phase").contains("rolled_back"));
        assert!(explain(Some("guest_migrate")).expect("a body").contains("max_downtime_ms"));
        assert!(explain(Some("operation.progress.round")).expect("a number").contains("integer"));
    }

    #[test]
    fn what_is_not_there_is_said() {
        for path in ["gest", "guest.hots", "guest.name.first", ""] {
            assert!(explain(Some(path)).is_err(), "{path}");
        }
    }
}
