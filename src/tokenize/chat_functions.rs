//! The functions and filters that Python gives to chat templates.
//!
//! Where minijinja's own differ from what `transformers` sets up, or may allocate far more than
//! they are given, they are replaced here.

use super::chat::Date;
use super::chat_meter::{Bounded, CONCAT, ITERATE, MAX_NESTING, Meter, TIMES, WEIGH};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;
use std::fmt::Write as _;
use std::sync::Arc;

/// Filters that no published chat template needs and whose cost nothing bounds.
const REMOVED_FILTERS: [&str; 9] =
    ["batch", "chain", "format", "groupby", "indent", "pprint", "slice", "sum", "zip"];
/// Instructions that a rendering may run.
const MAX_INSTRUCTIONS: u64 = 1 << 20;
/// Macros in macros.
const MAX_RECURSION: usize = 100;

/// How `transformers` reads templates: blocks take their line with them.
pub(super) fn syntax() -> Result<SyntaxConfig, Error> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()
}

/// What a template is rendered in.
pub(super) fn environment(meter: &Arc<Meter>, today: Date) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(MAX_INSTRUCTIONS));
    environment.set_recursion_limit(MAX_RECURSION);
    for name in REMOVED_FILTERS {
        environment.remove_filter(name);
    }
    add_operators(&mut environment, meter);
    add_filters(&mut environment, meter);
    add_tests(&mut environment);
    add_methods(&mut environment, meter);
    environment.remove_global("debug");
    environment.add_function("raise_exception", |message: String| {
        Err::<Value, _>(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", move |format: &str| today.format(format).map_err(invalid));
    environment
}

fn add_operators(environment: &mut Environment<'static>, meter: &Arc<Meter>) {
    let shared = Arc::clone(meter);
    environment.add_filter(WEIGH, move |value: Value| shared.weigh(&value).map(|()| value));
    let shared = Arc::clone(meter);
    environment
        .add_filter(CONCAT, move |left: Value, right: Value| shared.text([&left, &right].into_iter(), ""));
    let shared = Arc::clone(meter);
    environment.add_filter(TIMES, move |left: Value, right: Value| times(&shared, &left, &right));
    let shared = Arc::clone(meter);
    environment.set_formatter(move |out, _, value| {
        shared.weigh(value)?;
        let text = shared.text(std::iter::once(value), "")?;
        shared.write(text.len())?;
        out.write_str(&text).map_err(|_| Error::from(ErrorKind::WriteFailure))
    });
}

fn add_filters(environment: &mut Environment<'static>, meter: &Arc<Meter>) {
    let shared = Arc::clone(meter);
    environment.add_filter("string", move |value: Value| shared.text(std::iter::once(&value), ""));
    let shared = Arc::clone(meter);
    environment.add_filter("replace", move |text: &Value, old: &str, new: &str| {
        replace(&shared, &shared.text(std::iter::once(text), "")?, old, new, None)
    });
    let shared = Arc::clone(meter);
    environment.add_filter("join", move |items: &Value, between: Option<&str>| {
        join(&shared, items, between.unwrap_or(""))
    });
    let shared = Arc::clone(meter);
    environment.add_filter("tojson", move |value: &Value, indent: Option<usize>, options: Kwargs| {
        shared.weigh(value)?;
        tojson(&shared, value, indent, &options)
    });
}

/// Where Python and minijinja disagree on what can be walked.
fn add_tests(environment: &mut Environment<'static>) {
    environment.add_filter(ITERATE, |value: Value| {
        if value.is_none() { Err(invalid("none cannot be iterated")) } else { Ok(value) }
    });
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Value| {
        use ValueKind::{Map, Seq, String, Undefined};
        matches!(value.kind(), Map | Seq | String | Undefined)
    });
}

/// Python's methods of texts, lists and dictionaries.
fn add_methods(environment: &mut Environment<'static>, meter: &Arc<Meter>) {
    let shared = Arc::clone(meter);
    let methods = move |state: &mut State, value: &Value, method: &str, arguments: &[Value]| match (
        value.as_str(),
        method,
    ) {
        (Some(text), "replace") => {
            let (old, new, count): (&str, &str, Option<i64>) = from_args(arguments)?;
            replace(&shared, text, old, new, count).map(Value::from)
        }
        (Some(between), "join") => {
            let (items,): (&Value,) = from_args(arguments)?;
            join(&shared, items, between).map(Value::from)
        }
        (Some(_), "format") => Err(Error::from(ErrorKind::UnknownMethod)),
        _ => pycompat::unknown_method_callback(state, value, method, arguments),
    };
    environment.set_unknown_method_callback(methods);
}

fn replace(meter: &Meter, text: &str, old: &str, new: &str, count: Option<i64>) -> Result<String, Error> {
    let limit = count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX);
    let added = text.matches(old).take(limit).count().checked_mul(new.len());
    meter.check_size(added.and_then(|added| added.checked_add(text.len())))?;
    Ok(text.replacen(old, new, limit))
}

fn join(meter: &Meter, items: &Value, between: &str) -> Result<String, Error> {
    let items: Vec<Value> = items.try_iter()?.collect();
    meter.text(items.iter(), between)
}

/// Python's `*`: numbers are multiplied, texts and lists repeated.
fn times(meter: &Meter, left: &Value, right: &Value) -> Result<Value, Error> {
    let repeatable = |value: &Value| matches!(value.kind(), ValueKind::String | ValueKind::Seq);
    match (repeatable(left), repeatable(right)) {
        (false, false) => multiply(left, right),
        (true, false) => repeat(meter, left, right),
        (false, true) => repeat(meter, right, left),
        (true, true) => Err(invalid("cannot multiply two sequences")),
    }
}

fn multiply(left: &Value, right: &Value) -> Result<Value, Error> {
    if left.is_integer() && right.is_integer() {
        let product = left.as_i64().zip(right.as_i64()).and_then(|(left, right)| left.checked_mul(right));
        return product.map(Value::from).ok_or_else(|| invalid("the product is too large"));
    }
    let number =
        |value: &Value| f64::try_from(value.clone()).map_err(|_| invalid("only numbers can be multiplied"));
    Ok(Value::from(number(left)? * number(right)?))
}

fn repeat(meter: &Meter, value: &Value, count: &Value) -> Result<Value, Error> {
    let count = count.as_i64().ok_or_else(|| invalid("a sequence is repeated a whole number of times"))?;
    let count = usize::try_from(count).unwrap_or(0);
    if let Some(text) = value.as_str() {
        meter.check_size(text.len().checked_mul(count))?;
        return Ok(Value::from(text.repeat(count)));
    }
    let items: Vec<Value> = value.try_iter()?.collect();
    meter.check_size(items.len().checked_mul(count))?;
    Ok(std::iter::repeat_n(items, count).flatten().collect())
}

/// Python's `json.dumps(value, ensure_ascii=False)`, with `indent` and `sort_keys`.
fn tojson(meter: &Meter, value: &Value, indent: Option<usize>, options: &Kwargs) -> Result<String, Error> {
    let indent = indent.or(options.get::<Option<usize>>("indent")?);
    meter.check_size(indent.map_or(Some(0), |width| width.checked_mul(MAX_NESTING)))?;
    let sort = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.get::<Option<Value>>("ensure_ascii")?;
    options.assert_all_used()?;
    let mut writer = JsonWriter { text: Bounded(String::new()), indent, sort };
    match writer.value(value, 0) {
        Ok(()) => Ok(writer.text.0),
        Err(_) => Err(invalid("a value has no JSON, or too much of it")),
    }
}

struct JsonWriter {
    text: Bounded,
    indent: Option<usize>,
    sort: bool,
}

impl JsonWriter {
    fn value(&mut self, value: &Value, depth: usize) -> std::fmt::Result {
        match value.kind() {
            ValueKind::None => self.text.write_str("null"),
            ValueKind::Bool => self.text.write_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => write!(self.text, "{value}"),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter().map_err(|_| std::fmt::Error)?.collect();
                self.items(['[', ']'], &items, depth, |writer, item| writer.value(item, depth + 1))
            }
            ValueKind::Map => self.map(value, depth),
            _ => Err(std::fmt::Error),
        }
    }

    fn map(&mut self, value: &Value, depth: usize) -> std::fmt::Result {
        let mut keys: Vec<Value> = value.try_iter().map_err(|_| std::fmt::Error)?.collect();
        if self.sort {
            keys.sort();
        }
        self.items(['{', '}'], &keys, depth, |writer, key| {
            writer.string(&key.to_string())?;
            writer.text.write_str(": ")?;
            writer.value(&value.get_item(key).map_err(|_| std::fmt::Error)?, depth + 1)
        })
    }

    /// Items between brackets: `[a, b]`, or with `indent` one a line.
    fn items(
        &mut self,
        [open, close]: [char; 2],
        items: &[Value],
        depth: usize,
        mut write: impl FnMut(&mut Self, &Value) -> std::fmt::Result,
    ) -> std::fmt::Result {
        self.text.write_char(open)?;
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                self.text.write_str(if self.indent.is_some() { "," } else { ", " })?;
            }
            self.line(depth + 1)?;
            write(self, item)?;
        }
        if !items.is_empty() {
            self.line(depth)?;
        }
        self.text.write_char(close)
    }

    fn line(&mut self, depth: usize) -> std::fmt::Result {
        let Some(width) = self.indent else { return Ok(()) };
        self.text.write_char('\n')?;
        (0..width * depth).try_for_each(|_| self.text.write_char(' '))
    }

    fn string(&mut self, text: &str) -> std::fmt::Result {
        self.text.write_str(&serde_json::to_string(text).map_err(|_| std::fmt::Error)?)
    }
}

pub(super) fn invalid(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
