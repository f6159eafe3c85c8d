//! What a byte-level BPE model of a tokenizer.json amounts to.

use crate::tokenize::bytes::byte_of_char;
use serde_json::{Map, Value};

/// A byte-level BPE by ids.
pub(super) struct Vocabulary {
    /// Bytes and id of the tokens that a text can spell, in the order of the file.
    pub(super) tokens: Vec<(Vec<u8>, u32)>,
    /// Id of every byte.
    pub(super) bytes: [u32; 256],
    /// Left and right id, and the id that they make; the earlier in the list, the earlier merged.
    pub(super) merges: Vec<[u32; 3]>,
    /// Whether a piece that is a token is that token, whatever the merges make of it.
    pub(super) ignore_merges: bool,
}

impl Vocabulary {
    /// Reads a model that the library has accepted.
    ///
    /// Once every byte has a token, nothing is unknown, so that `unk_token`, `fuse_unk` and
    /// `byte_fallback` do not matter.
    ///
    /// # Errors
    /// Says what about it is not known to encode alike.
    pub(super) fn read(model: &Value) -> Result<Self, String> {
        let (Some(vocab), Some(merges)) = (model["vocab"].as_object(), model["merges"].as_array()) else {
            return Err("its model is not BPE".into());
        };
        if !model["dropout"].is_null() {
            return Err("its merges drop out".into());
        }
        let tokens = tokens(vocab)?;
        let bytes = bytes(&tokens)?;
        let merges = merges_by_id(vocab, merges)?;
        let ignore_merges = model["ignore_merges"] == true;
        Ok(Self { tokens, bytes, merges, ignore_merges })
    }
}

fn tokens(vocab: &Map<String, Value>) -> Result<Vec<(Vec<u8>, u32)>, String> {
    let ids: Option<Vec<u32>> = vocab.values().map(id).collect();
    let mut distinct = ids.ok_or("one of its ids is no number of 32 bits")?;
    distinct.sort_unstable();
    if distinct.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err("two of its tokens share an id".into());
    }
    let spelled = |(token, value): (&String, &Value)| {
        let bytes: Option<Vec<u8>> = token.chars().map(byte_of_char).collect();
        Some((bytes.filter(|bytes| !bytes.is_empty())?, id(value)?))
    };
    Ok(vocab.iter().filter_map(spelled).collect())
}

fn id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

fn bytes(tokens: &[(Vec<u8>, u32)]) -> Result<[u32; 256], String> {
    let mut bytes = [None; 256];
    for (token, id) in tokens {
        if let [byte] = token.as_slice() {
            bytes[usize::from(*byte)] = Some(*id);
        }
    }
    let missing = bytes.iter().position(Option::is_none);
    match missing {
        Some(byte) => Err(format!("byte {byte} has no token")),
        None => Ok(bytes.map(Option::unwrap_or_default)),
    }
}

/// The merges of ids; `"a b"` and `["a", "b"]` are two spellings of one.
fn merges_by_id(vocab: &Map<String, Value>, merges: &[Value]) -> Result<Vec<[u32; 3]>, String> {
    let is_header = |merge: &&Value| merge.as_str().is_some_and(|text| text.starts_with("#version"));
    let known = |token: &str| vocab.get(token).and_then(id);
    let by_id = |merge: &Value| {
        let (left, right) = halves(merge)?;
        Some([known(left)?, known(right)?, known(&format!("{left}{right}"))?])
    };
    let merges: Option<Vec<_>> = merges.iter().filter(|merge| !is_header(merge)).map(by_id).collect();
    merges.ok_or_else(|| "one of its merges is not of its vocabulary".into())
}

fn halves(merge: &Value) -> Option<(&str, &str)> {
    match merge {
        Value::String(pair) => pair.split_once(' ').filter(|(_, right)| !right.contains(' ')),
        pair => Some((pair[0].as_str()?, pair[1].as_str()?)),
    }
}
