//! Damage to files: blind to their structure, and along it.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use rpt::random::Stream;
use serde_json::{Map, Value, json};

/// Bytes of the longest file that mutation makes.
const LONGEST: usize = 1 << 18;

/// Choices, one after another, that depend on the number of the case alone.
pub(crate) struct Draw {
    stream: Stream,
    next: u64,
}

impl Draw {
    pub(crate) fn new(kind: &str, case: u64) -> Self {
        Self { stream: Stream::new(1, kind).child(case), next: 0 }
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.next += 1;
        self.stream.below(self.next, bound as u64) as usize
    }

    pub(crate) fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    pub(crate) fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    /// One most of the time, sometimes up to 8.
    pub(crate) fn few(&mut self) -> usize {
        1 + (0..7).take_while(|_| self.one_in(2)).count()
    }
}

/// Numbers at which something may break.
pub(crate) fn number(draw: &mut Draw) -> Value {
    match draw.below(4) {
        0 => json!(draw.below(300)),
        1 => json!(draw.pick(&[-1_i64, -2, i64::MIN, i64::from(i32::MIN), -300])),
        2 => json!(draw.pick(&[0.5, -0.0, 1e308, -1e308, 1e-320, 1e18, 1.0, 0.1, 3.5e38])),
        _ => {
            let power = 1_u64 << draw.below(64);
            json!(*draw.pick(&[power, power - 1, power + 1, u64::MAX, power.wrapping_mul(3)]))
        }
    }
}

fn text(draw: &mut Draw) -> String {
    let unit = *draw.pick(&["x", "é", "▁", " ", "\0", "\u{1F642}", "<|end|>", "\\", "\"", "a\u{301}", "٣"]);
    let times =
        if draw.one_in(40) { [5000, 65_536][draw.below(2)] } else { *draw.pick(&[0, 1, 2, 3, 17, 300]) };
    unit.repeat(times)
}

fn other_type(draw: &mut Draw) -> Value {
    match draw.below(8) {
        0 => Value::Null,
        1 => json!(true),
        2 => json!(false),
        3 => json!([]),
        4 => json!({}),
        5 => json!([[], {}, null]),
        6 => json!({ "": { "": 0 } }),
        _ => json!(text(draw)),
    }
}

/// A place in a value, all depths alike.
fn place<'v>(draw: &mut Draw, value: &'v mut Value) -> &'v mut Value {
    let children = match value {
        Value::Object(fields) => fields.len(),
        Value::Array(items) => items.len(),
        _ => 0,
    };
    if children == 0 || draw.one_in(4) {
        return value;
    }
    let at = draw.below(children);
    let child = match value {
        Value::Object(fields) => fields.values_mut().nth(at),
        Value::Array(items) => items.get_mut(at),
        _ => None,
    };
    place(draw, child.unwrap())
}

fn is_small(value: &Value) -> bool {
    match value {
        Value::String(text) => text.len() < 100,
        Value::Array(items) => items.len() < 8 && items.iter().all(is_small),
        Value::Object(fields) => fields.len() < 8 && fields.values().all(is_small),
        _ => true,
    }
}

/// Changes one place of a value; `donors` are parts that may stand anywhere.
pub(crate) fn change(draw: &mut Draw, value: &mut Value, donors: &[Value]) {
    let (kind, graft) = (draw.below(12), place(draw, value).clone());
    let target = place(draw, value);
    let small = is_small(target);
    match (kind, &mut *target) {
        (0 | 1, _) => *target = number(draw),
        (2, _) => *target = other_type(draw),
        (3 | 4, _) if !donors.is_empty() => *target = draw.pick(donors).clone(),
        (5, _) => *target = graft,
        (6, _) => nest(draw, target),
        (7, _) if small => *target = Value::Array(vec![target.clone(); *draw.pick(&[2, 3, 30, 30, 3000])]),
        (8, Value::String(text)) => *text = edited(draw, text),
        (_, Value::Object(fields)) => change_fields(draw, fields, donors),
        (_, Value::Array(items)) => change_items(draw, items, graft),
        _ => *target = other_type(draw),
    }
}

fn nest(draw: &mut Draw, value: &mut Value) {
    for _ in 0..*draw.pick(&[1, 2, 5, 20, 60, 130, 200]) {
        let inner = value.take();
        *value = if draw.one_in(2) {
            json!([inner])
        } else {
            json!({ "type": "Sequence", "normalizers": [inner] })
        };
    }
}

fn edited(draw: &mut Draw, text: &str) -> String {
    let mut characters: Vec<char> = text.chars().collect();
    let at = draw.below(characters.len() + 1);
    match draw.below(4) {
        0 => characters.truncate(at),
        1 => {
            characters.insert(at, *draw.pick(&['\0', ' ', '/', '.', '{', '(', '*', '\\', '▁', '\u{10FFFF}']));
        }
        2 => characters.extend_from_within(at..),
        _ => characters.reverse(),
    }
    characters.into_iter().take(5000).collect()
}

fn change_fields(draw: &mut Draw, fields: &mut Map<String, Value>, donors: &[Value]) {
    let key = fields.keys().nth(draw.below(fields.len().max(1))).cloned().unwrap_or_default();
    match draw.below(4) {
        0 => drop(fields.shift_remove(&key)),
        1 => {
            let value = fields.shift_remove(&key).unwrap_or_default();
            fields.insert(edited(draw, &key), value);
        }
        // A donor that is an object may bring its own fields.
        2 if !donors.is_empty() => match draw.pick(donors) {
            Value::Object(others) => fields.extend(others.clone()),
            other => drop(fields.insert(key, other.clone())),
        },
        _ => drop(fields.insert(text(draw), other_type(draw))),
    }
}

fn change_items(draw: &mut Draw, items: &mut Vec<Value>, graft: Value) {
    let at = draw.below(items.len().max(1));
    match draw.below(4) {
        0 if at < items.len() => drop(items.remove(at)),
        1 => items.insert(at, graft),
        2 => items.reverse(),
        _ => items.truncate(at),
    }
}

/// Pieces of JSON and what it must not hold.
const SPLINTERS: [&[u8]; 22] = [
    b"\"",
    b",",
    b":",
    b"[",
    b"]",
    b"{",
    b"}",
    b"\\",
    b"\\u0000",
    b"\\ud800",
    b"1e999",
    b"-",
    b"NaN",
    b"null",
    b"\0",
    b"\xff",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\xf0\x9f",
    b"0x1",
    b"[[[[[[[[",
    b"\xef\xbb\xbf",
];

/// Changes some bytes, whatever they mean; `splinters` are pieces that may be inserted.
pub(crate) fn damage(draw: &mut Draw, bytes: &mut Vec<u8>, splinters: &[&[u8]]) {
    let at = draw.below(bytes.len() + 1);
    let end = at + draw.below((bytes.len() - at).min(64) + 1);
    match draw.below(8) {
        0 if at < bytes.len() => bytes[at] ^= 1 << draw.below(8),
        1 if at < bytes.len() => bytes[at] = draw.below(256) as u8,
        2 => drop(bytes.drain(at..end)),
        3 => bytes.truncate(at),
        4 => {
            let part = bytes[at..end].repeat(*draw.pick(&[1, 2, 10, 500]));
            drop(bytes.splice(at..at, part));
        }
        5 => {
            let part: Vec<u8> = (0..draw.below(9)).map(|_| draw.below(256) as u8).collect();
            drop(bytes.splice(at..at, part));
        }
        _ => drop(bytes.splice(at..at, draw.pick(splinters).to_vec())),
    }
    bytes.truncate(LONGEST);
}

/// Says a field again, with another value, at the start of some object.
fn repeat_key(draw: &mut Draw, bytes: &mut Vec<u8>) {
    let text = String::from_utf8_lossy(bytes).into_owned();
    let opened: Vec<usize> = text.match_indices('{').map(|(at, _)| at + 1).collect();
    let keys: Vec<&str> = text.split('"').skip(1).step_by(2).take(200).collect();
    if let (false, false) = (opened.is_empty(), keys.is_empty()) {
        let again = format!("\"{}\":{},", draw.pick(&keys), number(draw));
        let at = *draw.pick(&opened);
        *bytes = [&text.as_bytes()[..at], again.as_bytes(), &text.as_bytes()[at..]].concat();
    }
}

/// A damaged JSON file.
pub(crate) fn json(draw: &mut Draw, start: &Value, donors: &[Value]) -> Vec<u8> {
    let mut value = start.clone();
    for _ in 0..draw.few() - 1 {
        change(draw, &mut value, donors);
    }
    let mut bytes = value.to_string().into_bytes();
    bytes.truncate(LONGEST);
    if draw.one_in(8) {
        repeat_key(draw, &mut bytes);
    }
    if draw.one_in(6) {
        (0..draw.few()).for_each(|_| damage(draw, &mut bytes, &SPLINTERS));
    }
    bytes
}

/// A damaged safetensors file.
pub(crate) fn safetensors(draw: &mut Draw, start: &[u8]) -> Vec<u8> {
    let length = u64::from_le_bytes(start[..8].try_into().unwrap()) as usize;
    let (header, data) = start[8..].split_at(length);
    let mut header: Value = serde_json::from_slice(header).unwrap();
    for _ in 0..draw.few() - 1 {
        change_tensor(draw, &mut header);
    }
    let mut text = header.to_string().into_bytes();
    if draw.one_in(6) {
        repeat_key(draw, &mut text);
    }
    if draw.one_in(6) {
        damage(draw, &mut text, &SPLINTERS);
    }
    let mut data = data.to_vec();
    match draw.below(8) {
        0 => data.truncate(draw.below(start.len())),
        1 => data.resize(data.len() + draw.below(64), 0),
        _ => {}
    }
    let length = text.len() as u64;
    let lies = [
        0,
        1,
        length.saturating_sub(1),
        length + 1,
        length + 8,
        100_000_000,
        100_000_001,
        1 << 40,
        u64::MAX,
        1 << 63,
    ];
    let said = if draw.one_in(6) { *draw.pick(&lies) } else { length };
    let mut file = [&said.to_le_bytes()[..], &text, &data].concat();
    if draw.one_in(8) {
        damage(draw, &mut file, &SPLINTERS);
    }
    file
}

/// Changes where a tensor lies, its shape or its type.
fn change_tensor(draw: &mut Draw, header: &mut Value) {
    const TYPES: [&str; 12] =
        ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "F4", "f32", "F6_E2M3"];
    let others: Vec<Value> =
        header.as_object().into_iter().flatten().map(|(_, tensor)| tensor.clone()).collect();
    let Some(fields) = header.as_object_mut().filter(|fields| !fields.is_empty()) else { return };
    let at = draw.below(fields.len());
    let tensor = fields.values_mut().nth(at).unwrap();
    let Some(fields) = tensor.as_object_mut() else { return };
    match draw.below(7) {
        0 => drop(fields.insert("data_offsets".into(), json!([number(draw), number(draw)]))),
        1 => drop(fields.insert("shape".into(), (0..draw.below(6)).map(|_| number(draw)).collect())),
        2 => drop(fields.insert("dtype".into(), json!(draw.pick(&TYPES)))),
        3 => *tensor = draw.pick(&others).clone(),
        4 => {
            let at = draw.below(2);
            let Some(offset) = tensor.get_mut("data_offsets").and_then(|offsets| offsets.get_mut(at)) else {
                return;
            };
            let moved = offset.as_i64().unwrap_or(0).wrapping_add(*draw.pick(&[-8, -4, -1, 1, 4, 8]));
            *offset = json!(moved);
        }
        5 => drop(fields.insert("shape".into(), json!([0, u64::MAX, 1_u64 << 32, 1_u64 << 32]))),
        _ => change(draw, header, &[json!("F32"), json!([0, 0]), json!({ "format": "pt" })]),
    }
}
