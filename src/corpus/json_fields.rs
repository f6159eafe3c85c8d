//! Two fields of a JSON object, read without keeping the others.

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::fmt;

/// What was found under a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Field {
    /// The key is not there.
    #[default]
    Absent,
    Null,
    Text(String),
    Integer(String),
    /// Anything else.
    Other(&'static str),
}

impl Field {
    /// What is found, in words.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Absent => "nothing",
            Self::Null => "null",
            Self::Text(_) => "a string",
            Self::Integer(_) => "an integer",
            Self::Other(kind) => kind,
        }
    }
}

/// The fields of a JSON object under two names: keys, or paths of keys with dots between them. A key
/// goes before a path; the last of equal keys counts.
///
/// # Errors
/// The text is not one JSON object.
pub(super) fn read(line: &str, names: [Option<&str>; 2]) -> Result<[Field; 2], serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_str(line);
    let fields = Object(names).deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(fields)
}

/// The keys of a JSON object.
pub(super) fn keys(line: &str) -> Vec<String> {
    let object: Option<serde_json::Map<String, serde_json::Value>> = serde_json::from_str(line).ok();
    object.into_iter().flatten().map(|(key, _)| key).collect()
}

struct Object<'n>([Option<&'n str>; 2]);

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = [Field; 2];

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<[Field; 2], D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = [Field; 2];

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<[Field; 2], A::Error> {
        let (mut whole, mut below) = (<[Field; 2]>::default(), <[Field; 2]>::default());
        while let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            let inner = self.0.map(|name| name?.strip_prefix(key.as_ref())?.strip_prefix('.'));
            let exact = self.0.map(|name| name == Some(key.as_ref()));
            let (value, fields) = map.next_value_seed(Value { wanted: exact[0] || exact[1], inner })?;
            for ((field, exact), slot) in fields.into_iter().zip(inner).zip(&mut below) {
                if exact.is_some() {
                    *slot = field;
                }
            }
            for (slot, _) in whole.iter_mut().zip(exact).filter(|(_, exact)| *exact) {
                *slot = value.clone();
            }
        }
        let [first, second] = whole;
        let [below_first, below_second] = below;
        let either = |whole, below| if whole == Field::Absent { below } else { whole };
        Ok([either(first, below_first), either(second, below_second)])
    }
}

/// A value that is wanted itself, or for fields below it, or not at all.
struct Value<'n> {
    wanted: bool,
    inner: [Option<&'n str>; 2],
}

type Found = (Field, [Field; 2]);

impl<'de> DeserializeSeed<'de> for Value<'_> {
    type Value = Found;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Found, D::Error> {
        if self.wanted || self.inner.iter().any(Option::is_some) {
            return deserializer.deserialize_any(self);
        }
        deserializer.deserialize_ignored_any(IgnoredAny)?;
        Ok(Found::default())
    }
}

fn alone(field: Field) -> Found {
    (field, Default::default())
}

impl<'de> Visitor<'de> for Value<'_> {
    type Value = Found;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: Error>(self) -> Result<Found, E> {
        Ok(alone(Field::Null))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Found, E> {
        Ok(alone(if self.wanted { Field::Text(text.to_owned()) } else { Field::Other("a string") }))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Found, E> {
        Ok(alone(Field::Integer(value.to_string())))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Found, E> {
        Ok(alone(Field::Integer(value.to_string())))
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Found, E> {
        Ok(alone(Field::Other("a number")))
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Found, E> {
        Ok(alone(Field::Other("a truth value")))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Found, A::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(alone(Field::Other("a list")))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Found, A::Error> {
        Ok((Field::Other("an object"), Object(self.inner).visit_map(map)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(line: &str, name: &str) -> Field {
        let [text, id] = read(line, [Some(name), None]).unwrap();
        assert_eq!(id, Field::Absent);
        text
    }

    #[test]
    fn keys_go_before_paths_and_the_last_of_equal_ones_counts() {
        assert_eq!(text(r#"{"a":{"b":"x"}}"#, "a.b"), Field::Text("x".into()));
        assert_eq!(text(r#"{"a.b":"y","a":{"b":"x"}}"#, "a.b"), Field::Text("y".into()));
        assert_eq!(text(r#"{"a":"x","a":"y"}"#, "a"), Field::Text("y".into()));
        assert_eq!(text(r#"{"a":{"b":{"c":"\u00e9"}}}"#, "a.b.c"), Field::Text("é".into()));
        assert_eq!(text(r#"{"a":{"b":"x"}}"#, "a"), Field::Other("an object"));
        assert_eq!(text(r#"{"a":"b"}"#, "a.b"), Field::Absent);
        assert_eq!(text(r#"{"b":[1,{"a":2}],"a":null}"#, "a"), Field::Null);
        let both = read(r#"{"m":{"text":"t","id":-7},"n":1.5}"#, [Some("m.text"), Some("m.id")]).unwrap();
        assert_eq!(both, [Field::Text("t".into()), Field::Integer("-7".into())]);
    }

    #[test]
    fn whatever_is_not_one_object_is_refused() {
        for line in ["", "[]", "1", "\"a\"", "{", "{}{}", "{\"a\":}", "{\"a\":\"\\ud800\"}", "null"] {
            assert!(read(line, [Some("a"), None]).is_err(), "{line}");
        }
        let deep = format!("{{\"a\":{}}}", "[".repeat(100_000));
        assert!(read(&deep, [Some("b"), None]).is_err());
    }
}
