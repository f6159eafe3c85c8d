//! Writing: data to standard output, everything else to standard error.

use anyhow::Context;
use serde::Serialize;
use serde_json::Value;
use std::io::{self, ErrorKind, Write};

/// Writes data. That nobody reads on is no error.
pub(super) fn data(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot write to standard output"),
    }
}

/// Writes text with a line end as data.
pub(super) fn line(text: &str) -> anyhow::Result<()> {
    data(format!("{text}\n").as_bytes())
}

/// Writes a value as one line of JSON, or as an outline for people.
pub(super) fn value(value: &Value, json: bool) -> anyhow::Result<()> {
    if json { self::json(value) } else { data(outline(value).as_bytes()) }
}

/// Writes one line of JSON.
pub(super) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(&serde_json::to_string(value)?)
}

/// Writes a line to standard error; where that cannot be written there is nobody to tell.
pub(super) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// A value for people: one `name: value` a line, what belongs to a name indented below it.
pub(super) fn outline(value: &Value) -> String {
    let mut text = String::new();
    write_outline(&mut text, value, 0);
    text
}

fn write_outline(text: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Object(map) => map.iter().for_each(|(name, value)| write_entry(text, name, value, depth)),
        Value::Array(items) => {
            for (number, item) in items.iter().enumerate() {
                write_entry(text, &(number + 1).to_string(), item, depth);
            }
        }
        scalar => push_line(text, depth, &scalar_text(scalar)),
    }
}

fn write_entry(text: &mut String, name: &str, value: &Value, depth: usize) {
    if let Some(inline) = inline(value) {
        push_line(text, depth, format!("{name}: {inline}").trim_end());
    } else {
        push_line(text, depth, &format!("{name}:"));
        write_outline(text, value, depth + 1);
    }
}

/// The value on one line, if it is a scalar or a list of numbers and words.
fn inline(value: &Value) -> Option<String> {
    match value {
        Value::Object(map) if map.is_empty() => Some("none".into()),
        Value::Array(items) if items.is_empty() => Some("none".into()),
        Value::Array(items) if items.iter().all(|item| item.is_number() || item.is_string()) => {
            Some(items.iter().map(scalar_text).collect::<Vec<_>>().join(", "))
        }
        Value::Object(_) | Value::Array(_) => None,
        scalar => Some(scalar_text(scalar)),
    }
}

fn scalar_text(value: &Value) -> String {
    match value {
        Value::Null => "none".into(),
        Value::String(text) if text.chars().any(char::is_control) => format!("{text:?}"),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn push_line(text: &mut String, depth: usize, line: &str) {
    text.extend(std::iter::repeat_n("  ", depth));
    text.push_str(line);
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_outline_indents_what_belongs_together() {
        let value = json!({"a": 1, "b": {"c": "x\ny", "d": []}, "e": [1, 2], "f": [{"g": null}]});
        assert_eq!(outline(&value), "a: 1\nb:\n  c: \"x\\ny\"\n  d: none\ne: 1, 2\nf:\n  1:\n    g: none\n");
    }
}
