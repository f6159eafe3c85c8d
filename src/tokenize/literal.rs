//! A variant of a tokenizer.json for which control tokens do not exist in text.

use super::bytes::METASPACE;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};

/// Removes what would make encoding lossy or random: truncation, padding and dropout.
pub(super) fn remove_lossy_settings(json: &mut Value) {
    json["truncation"] = Value::Null;
    json["padding"] = Value::Null;
    if json["model"].get("dropout").is_some() {
        json["model"]["dropout"] = Value::Null;
    }
}

/// Whether an added token is a control token, as opposed to a piece of text.
///
/// Special tokens are. So are the others (`<think>`, `[TOOL]`) unless they are made of letters,
/// digits and white space alone: models learn such tokens (runs of spaces, added words) in text.
pub(super) fn is_control(added: &Value) -> bool {
    let content = added["content"].as_str().unwrap_or_default();
    let is_text = |c: char| c.is_alphanumeric() || c.is_whitespace() || c == METASPACE;
    added["special"] == true || !content.chars().all(is_text)
}

/// Rewrites a tokenizer.json so that no text encodes to a control token; ids stay as they are.
///
/// Added control tokens become special, which `set_encode_special_tokens(true)` makes text.
/// Entries of the model's own vocabulary of the same name (Unigram finds those in any text) get
/// a name with a bare space, which no text can contain once it is spelled for the model.
pub(super) fn without_control_tokens(mut json: Value) -> Value {
    let mut renamed = BTreeMap::new();
    for added in json["added_tokens"].as_array_mut().into_iter().flatten() {
        if is_control(added) {
            added["special"] = true.into();
            if let Some(content) = added["content"].as_str() {
                renamed.insert(content.to_owned(), format!(" control {}", added["id"]));
            }
        }
    }
    let model = &mut json["model"];
    let entries = entries_among(&model["vocab"], &renamed);
    renamed.retain(|content, _| entries.contains(content));
    rename_vocabulary(&mut model["vocab"], &renamed);
    rename_string(&mut model["unk_token"], &renamed);
    if let Some(merges) = model["merges"].as_array_mut() {
        merges.retain(|merge| !mentions(merge, &renamed));
    }
    for added in json["added_tokens"].as_array_mut().into_iter().flatten() {
        rename_string(&mut added["content"], &renamed);
    }
    json["post_processor"] = Value::Null;
    json
}

/// Those of some names that the model's own vocabulary has.
fn entries_among(vocabulary: &Value, names: &BTreeMap<String, String>) -> BTreeSet<String> {
    let ids = vocabulary.as_object().into_iter().flat_map(|ids| ids.keys().map(String::as_str));
    let pieces = vocabulary.as_array().into_iter().flatten().filter_map(|piece| piece[0].as_str());
    ids.chain(pieces).filter(|name| names.contains_key(*name)).map(str::to_owned).collect()
}

/// Renames in a map from token to id (BPE) or a list of (piece, score) (Unigram).
fn rename_vocabulary(vocabulary: &mut Value, renamed: &BTreeMap<String, String>) {
    match vocabulary {
        Value::Object(ids) => {
            let entries: Map<String, Value> = std::mem::take(ids)
                .into_iter()
                .map(|(token, id)| (renamed.get(&token).cloned().unwrap_or(token), id))
                .collect();
            *ids = entries;
        }
        Value::Array(pieces) => pieces.iter_mut().for_each(|piece| rename_string(&mut piece[0], renamed)),
        _ => {}
    }
}

fn rename_string(value: &mut Value, renamed: &BTreeMap<String, String>) {
    if let Some(name) = value.as_str().and_then(|old| renamed.get(old)) {
        *value = name.as_str().into();
    }
}

/// Whether a merge (`"a b"` or `["a", "b"]`) takes or makes one of the renamed tokens.
fn mentions(merge: &Value, renamed: &BTreeMap<String, String>) -> bool {
    let (left, right) = match merge {
        Value::String(pair) => pair.split_once(' ').unwrap_or_default(),
        pair => (pair[0].as_str().unwrap_or_default(), pair[1].as_str().unwrap_or_default()),
    };
    !renamed.is_empty()
        && (renamed.contains_key(left)
            || renamed.contains_key(right)
            || renamed.contains_key(&format!("{left}{right}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn words_and_white_space_are_text() {
        let added = |content: &str, special: bool| json!({"content": content, "special": special});
        assert!(is_control(&added("<think>", false)));
        assert!(is_control(&added("[TOOL]", false)));
        assert!(is_control(&added("eos", true)));
        assert!(!is_control(&added("    ", false)));
        assert!(!is_control(&added("covid19", false)));
    }

    #[test]
    fn renames_entries_and_drops_their_merges() {
        let json = without_control_tokens(json!({
            "added_tokens": [{"id": 2, "content": "<a>", "special": false}],
            "model": {"vocab": {"<": 0, "a>": 1, "<a>": 2}, "merges": ["< a>", ["a", ">"]], "unk_token": "<a>"},
        }));
        assert_eq!(json["model"]["vocab"], json!({"<": 0, "a>": 1, " control 2": 2}));
        assert_eq!(json["model"]["merges"], json!([["a", ">"]]));
        assert_eq!(json["model"]["unk_token"], " control 2");
        assert_eq!(json["added_tokens"][0]["content"], " control 2");
        assert_eq!(json["added_tokens"][0]["special"], true);
    }
}
