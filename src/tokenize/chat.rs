//! Chat templates: how a model wants a conversation written.
//!
//! Hugging Face directories carry a Jinja template, which Python's `transformers` renders. Here
//! the same template gives the same bytes, and a hostile one ends with an error: time, memory and
//! output are bounded (see `chat_meter`).

use super::chat_functions::{environment, invalid, syntax};
use super::chat_meter::{Meter, metered};
use super::special::{read_json, token_name};
use super::{TokenizeError, Tokenizer};
use minijinja::machinery::{CodeGenerator, eval, make_string_output, parse};
use minijinja::{AutoEscape, Error, ErrorKind, Value};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of the longest template; published ones have up to 20 KiB.
const MAX_SOURCE: usize = 1 << 18;
/// Syntax trees are parsed, compiled and dropped by recursion as deep as an expression is long.
const STACK: usize = 1 << 28;

/// What someone says in a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who says it: usually `system`, `user` or `assistant`.
    pub role: String,
    /// The words.
    pub content: String,
}

impl Message {
    /// Words of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user".into(), content: content.into() }
    }
}

/// The day that a template is told when it asks for today.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    /// Year of the Gregorian calendar.
    pub year: i32,
    /// Month, from 1.
    pub month: u32,
    /// Day of the month, from 1.
    pub day: u32,
}

impl Default for Date {
    /// 26 July 2024, the day that Llama 3 templates name when nothing else is known. A fixed day,
    /// because the same data and settings must give the same prompts tomorrow.
    fn default() -> Self {
        Self { year: 2024, month: 7, day: 26 }
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl Date {
    /// The date in a `strftime` format, at midnight.
    pub(super) fn format(self, format: &str) -> Result<String, String> {
        let mut text = String::new();
        let mut rest = format.chars();
        while let Some(next) = rest.next() {
            if next == '%' {
                let field = rest.next().unwrap_or('%');
                text.push_str(&self.field(field).ok_or_else(|| format!("strftime has no %{field} here"))?);
            } else {
                text.push(next);
            }
        }
        Ok(text)
    }

    fn field(self, field: char) -> Option<String> {
        let Self { year, month, day } = self;
        let month_name = MONTHS.get((month as usize).checked_sub(1)?)?;
        let weekday = WEEKDAYS[self.weekday()];
        Some(match field {
            'Y' => format!("{year}"),
            'y' => format!("{:02}", year.rem_euclid(100)),
            'm' => format!("{month:02}"),
            'd' => format!("{day:02}"),
            'e' => format!("{day:2}"),
            'B' => (*month_name).to_owned(),
            'b' => month_name[..3].to_owned(),
            'A' => weekday.to_owned(),
            'a' => weekday[..3].to_owned(),
            'F' => format!("{year}-{month:02}-{day:02}"),
            'H' | 'M' | 'S' => "00".to_owned(),
            '%' => "%".to_owned(),
            _ => return None,
        })
    }

    /// Days after Sunday, by Sakamoto's method.
    fn weekday(self) -> usize {
        const SHIFTS: [i64; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
        let year = i64::from(self.year) - i64::from(self.month < 3);
        let shift = SHIFTS[(self.month.clamp(1, 12) - 1) as usize];
        let days = year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
        (days + shift + i64::from(self.day)).rem_euclid(7) as usize
    }
}

/// A model's chat template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatTemplate {
    path: PathBuf,
    source: String,
    /// Special tokens by their names in `tokenizer_config.json`, such as `bos_token`.
    tokens: Vec<(String, String)>,
    today: Date,
}

impl ChatTemplate {
    /// Reads the template of a Hugging Face directory: `chat_template.jinja`, or else
    /// `chat_template` in `tokenizer_config.json`, which is a text or a list of named templates,
    /// of which `default` is taken. `None` when the directory has none.
    ///
    /// # Errors
    /// When a file cannot be read, is malformed or too long, or no template is called `default`.
    pub fn load(model_directory: &Path) -> Result<Option<Self>, TokenizeError> {
        let config_path = model_directory.join("tokenizer_config.json");
        let config = read_json(&config_path)?;
        let file = model_directory.join("chat_template.jinja");
        let (path, source) = match read_source(&file)? {
            Some(source) => (file, source),
            None => match configured(&config["chat_template"]) {
                Ok(Some(source)) => (config_path, source.to_owned()),
                Ok(None) => return Ok(None),
                Err(message) => return Err(TokenizeError::Malformed { path: config_path, message }),
            },
        };
        if source.len() > MAX_SOURCE {
            let limit = format!("the template has more than {MAX_SOURCE} bytes");
            return Err(TokenizeError::TemplateLimit { path, limit });
        }
        let named = config.as_object().into_iter().flatten().filter(|(name, _)| name.ends_with("_token"));
        let tokens =
            named.filter_map(|(name, token)| Some((name.clone(), token_name(token)?.to_owned()))).collect();
        Ok(Some(Self { path, source, tokens, today: Date::default() }))
    }

    /// The template of the directory that a tokenizer was loaded from.
    ///
    /// # Errors
    /// Like [`Self::load`].
    pub fn beside(tokenizer: &Tokenizer) -> Result<Option<Self>, TokenizeError> {
        Self::load(tokenizer.path().parent().unwrap_or(Path::new("")))
    }

    /// The file that the template stands in.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The same template, told that today is `date`.
    #[must_use]
    pub fn on(self, date: Date) -> Self {
        Self { today: date, ..self }
    }

    /// Writes a conversation as the model expects it. `add_generation_prompt` asks for the words
    /// that a reply of the model follows.
    ///
    /// The bytes are those of `transformers` (`apply_chat_template` without tools and documents).
    ///
    /// # Errors
    /// When the template is malformed, refuses the messages, or exceeds a limit.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TokenizeError> {
        let meter = Arc::new(Meter::default());
        let rendered =
            on_large_stack(|| self.rendered(&meter, self.context(messages, add_generation_prompt)));
        rendered.map_err(|error| {
            let path = self.path.clone();
            if meter.exceeded() || error.kind() == ErrorKind::OutOfFuel {
                TokenizeError::TemplateLimit { path, limit: error.to_string() }
            } else {
                TokenizeError::Template { path, message: error.to_string() }
            }
        })
    }

    fn rendered(&self, meter: &Arc<Meter>, context: Value) -> Result<String, Error> {
        // Jinja reads every kind of line end as a line feed.
        let source = self.source.replace("\r\n", "\n").replace('\r', "\n");
        let source = without_generation_tags(&source);
        let environment = environment(meter, self.today);
        let template = metered(&parse(&source, "chat_template", syntax()?)?)?;
        let mut generator = CodeGenerator::new("chat_template", &source);
        generator.compile_stmt(&template);
        let (instructions, blocks) = generator.finish();
        let mut text = String::new();
        let mut output = make_string_output(&mut text);
        eval(&environment, &instructions, context, &blocks, &mut output, AutoEscape::None)?;
        Ok(text)
    }

    /// What the template sees.
    fn context(&self, messages: &[Message], add_generation_prompt: bool) -> Value {
        let message = |Message { role, content }: &Message| {
            Value::from_pairs([("role", Value::from(role)), ("content", Value::from(content))])
        };
        let own = [
            ("messages", messages.iter().map(message).collect()),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        let tokens = self.tokens.iter().map(|(name, token)| (name.as_str(), Value::from(token)));
        Value::from_pairs(tokens.chain(own))
    }
}

/// Runs on a thread of its own, because a long expression needs a deep stack, and so that a fault
/// in the template engine is an error here.
fn on_large_stack<T: Send>(work: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work);
        let thread = thread.map_err(|error| invalid(format!("no thread to render on: {error}")))?;
        thread.join().unwrap_or_else(|_| Err(invalid("the template engine failed")))
    })
}

fn read_source(path: &Path) -> Result<Option<String>, TokenizeError> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error)
            if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(TokenizeError::io(path)(error)),
    };
    let mut source = String::new();
    file.take(MAX_SOURCE as u64 + 1).read_to_string(&mut source).map_err(TokenizeError::io(path))?;
    Ok(Some(source))
}

/// The template in a `chat_template` entry.
fn configured(entry: &serde_json::Value) -> Result<Option<&str>, String> {
    match entry {
        serde_json::Value::Null => Ok(None),
        serde_json::Value::String(source) => Ok(Some(source)),
        serde_json::Value::Array(templates) => {
            let default = templates.iter().find(|template| template["name"] == "default");
            let source = default.and_then(|template| template["template"].as_str());
            source.map(Some).ok_or_else(|| "no template in `chat_template` is called `default`".into())
        }
        _ => Err("`chat_template` is neither a text nor a list".into()),
    }
}

/// Turns `{% generation %}` blocks, with which `transformers` marks the model's own words, into
/// blocks that only open a scope, whitespace control kept.
fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        text.push_str(before);
        let end = tag.find("%}").unwrap_or(tag.len());
        match tag[..end].trim_matches(['-', '+']).trim() {
            "generation" => text.push_str(&tag[..end].replace("generation", "with")),
            "endgeneration" => text.push_str(&tag[..end].replace("endgeneration", "endwith")),
            _ => text.push_str(&tag[..end]),
        }
        rest = &tag[end..];
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate {
            path: "chat_template.jinja".into(),
            source: source.into(),
            tokens: vec![("bos_token".into(), "<s>".into())],
            today: Date::default(),
        }
    }

    fn render(source: &str) -> String {
        template(source).render(&[Message::user("Hello")], true).unwrap()
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let day = |year, month, day| Date { year, month, day };
        assert_eq!(Date::default().format("%d %b %Y, %A %%").unwrap(), "26 Jul 2024, Friday %");
        assert_eq!(day(2000, 2, 29).format("%a %F %y %e").unwrap(), "Tue 2000-02-29 00 29");
        assert_eq!(day(1900, 1, 1).format("%A %B").unwrap(), "Monday January");
        assert!(Date::default().format("%Q").is_err());
        assert!(day(2000, 13, 1).format("%d").is_err());
        assert_eq!(render("{{ strftime_now('%d %B %Y') }}"), "26 July 2024");
        let tomorrow = template("{{ strftime_now('%F') }}").on(day(2025, 1, 2));
        assert_eq!(tomorrow.render(&[], false).unwrap(), "2025-01-02");
    }

    #[test]
    fn generation_blocks_keep_their_whitespace_control() {
        assert_eq!(render("a {%- generation -%} b {%- endgeneration %} c"), "ab c");
        assert_eq!(render("a{% generation %}\nb{% endgeneration %}\nc"), "abc");
        assert_eq!(without_generation_tags("{% open {{ x }}"), "{% open {{ x }}");
    }

    #[test]
    fn json_is_python_s() {
        assert_eq!(
            render("{{ [1, 'é<', {'a': none, 'b': [true]}] | tojson }}"),
            "[1, \"é<\", {\"a\": null, \"b\": [true]}]"
        );
        assert_eq!(
            render("{{ {'b': [], 'a': [1]} | tojson(indent=2) }}"),
            "{\n  \"b\": [],\n  \"a\": [\n    1\n  ]\n}"
        );
    }

    #[test]
    fn a_template_s_own_refusal_is_its_message() {
        let error = template("{{ raise_exception('roles must alternate') }}").render(&[], false).unwrap_err();
        assert!(matches!(&error, TokenizeError::Template { .. }), "{error:?}");
        assert!(error.to_string().contains("roles must alternate"), "{error}");
    }

    #[test]
    fn a_template_that_the_engine_panics_on_is_refused() {
        // The engine leaves the inner scope in place and then misses its loop.
        let source = "{% for x in [1] %}{% with y = 1 %}{% break %}{% endwith %}{% endfor %}";
        let error = template(source).render(&[], false).unwrap_err();
        assert!(error.to_string().contains("engine failed"), "{error}");
    }

    #[test]
    fn the_default_among_named_templates_is_taken() {
        let json = |text| serde_json::from_str::<serde_json::Value>(text).unwrap();
        let named = json(r#"[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]"#);
        assert_eq!(configured(&named), Ok(Some("d")));
        assert_eq!(configured(&json("null")), Ok(None));
        assert!(configured(&json("[]")).is_err());
        assert!(configured(&json("3")).is_err());
    }
}
