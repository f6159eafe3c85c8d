//! `rpt rollout`: replies at the end of a text.

use super::input::{DeviceArguments, Model, ModelArguments, TextArguments};
use super::output;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use rpt::config::{RolloutConfig, TemplateName};
use rpt::rollout::{Engine, Prompt, Rollout, Sampling, StopRule};
use rpt::tasks::PromptTemplate;
use rpt::tokenize::Tokenizer;
use serde::Serialize;
use std::fmt::Write;

/// Longest reply where neither the command line nor a run says it.
const MAX_NEW_TOKENS: usize = 256;
const TEMPLATES: [&str; 8] = ["plain", "v0", "v1", "v2", "v3", "v4", "v5", "v6"];

/// A count of at least one.
fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(count) => Ok(count),
        Err(error) => Err(error.to_string()),
    }
}

#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Stage of the run whose newest checkpoint is used [default: the last one]
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    stage: Option<String>,
    #[command(flatten)]
    text: TextArguments,
    /// Number of replies
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    samples: u16,
    /// Prompt template [default: the run's, or v6]
    #[arg(long, value_parser = template_parser())]
    template: Option<TemplateName>,
    /// Sampling temperature, 0 = most probable token [default: the run's, or 0.8]
    #[arg(long, value_parser = non_negative)]
    temperature: Option<f32>,
    /// Keep the k most probable tokens, 0 = all [default: the run's, or 0]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Keep the smallest set of most probable tokens with this mass [default: the run's, or 1]
    #[arg(long, value_name = "P", value_parser = positive_share)]
    top_p: Option<f32>,
    /// Drop tokens below this share of the most probable one [default: the run's, or 0]
    #[arg(long, value_name = "P", value_parser = share_below_one)]
    min_p: Option<f32>,
    /// Longest reply in tokens [default: the run's, or 256, as far as the model's positions reach]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_new_tokens: Option<usize>,
    /// End a reply after this text; may be repeated [default: the run's]
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Key of the random numbers
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    device: DeviceArguments,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Sampled {
    prompt_tokens: usize,
    replies: Vec<Reply>,
}

/// A reply as it is printed. Log-probabilities are natural, at temperature 1, of the untruncated model.
#[derive(Serialize)]
struct Reply {
    text: String,
    logprob: f64,
    finish: &'static str,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
}

impl Arguments {
    pub(super) fn execute(&self) -> anyhow::Result<()> {
        let text = self.text.read()?;
        let mut model = self.model.load(self.stage.as_deref())?;
        model.decoder = self.device.place(model.decoder)?;
        let prompt = self.prompt(&model, &text)?;
        let replies = self.sample(&model, &prompt)?;
        if self.json {
            return output::json(&Sampled { prompt_tokens: prompt.len(), replies });
        }
        output::data(for_people(&replies).as_bytes())
    }

    fn prompt(&self, model: &Model, text: &str) -> rpt::Result<Prompt> {
        let Model { tokenizer, special, pipeline, .. } = model;
        let of_run = pipeline.as_ref().map(|pipeline| pipeline.tasks.template);
        let name = self.template.or(of_run).unwrap_or_default();
        let template = PromptTemplate::resolve(name, tokenizer, special)?;
        let header = template.header.len();
        let trunk = [template.header, tokenizer.encode_document(text)?].concat();
        Ok(Prompt {
            ordinal: 0,
            length: trunk.len(),
            trunk: trunk.into(),
            header,
            footer: template.footer.into(),
            cuts: [].into(),
        })
    }

    fn sample(&self, model: &Model, prompt: &Prompt) -> rpt::Result<Vec<Reply>> {
        let Model { decoder, tokenizer, special, .. } = model;
        let settings = self.settings(model, prompt.len());
        let RolloutConfig { temperature, top_k, top_p, min_p, max_new_tokens, .. } = settings;
        let engine = Engine {
            decoder,
            sampling: Sampling { temperature, top_k, top_p, min_p },
            stop: StopRule { eos: special.ends(), strings: &settings.stop, tokenizer, max_new_tokens },
            seed: self.seed,
            policy_version: 0,
            kv_cache: settings.kv_cache,
            cache_bytes: settings.cache_bytes,
        };
        let generation = engine.generate(std::slice::from_ref(prompt), self.samples.into())?;
        Ok(generation.groups.into_iter().flatten().map(|rollout| Reply::new(rollout, tokenizer)).collect())
    }

    /// The run's settings or the defaults, with what the command line says instead.
    fn settings(&self, model: &Model, prompt: usize) -> RolloutConfig {
        let base = model.pipeline.as_ref().map_or_else(
            || RolloutConfig { max_new_tokens: MAX_NEW_TOKENS, ..RolloutConfig::default() },
            |pipeline| pipeline.rollout.clone(),
        );
        let room = model.decoder.config().max_positions.saturating_sub(prompt).max(1);
        RolloutConfig {
            temperature: self.temperature.unwrap_or(base.temperature),
            top_k: self.top_k.unwrap_or(base.top_k),
            top_p: self.top_p.unwrap_or(base.top_p),
            min_p: self.min_p.unwrap_or(base.min_p),
            max_new_tokens: self.max_new_tokens.unwrap_or(base.max_new_tokens.min(room)),
            stop: if self.stop.is_empty() { base.stop } else { self.stop.clone() },
            samples_per_task: self.samples.into(),
            kv_cache: base.kv_cache,
            cache_bytes: base.cache_bytes,
        }
    }
}

impl Reply {
    fn new(rollout: Rollout, tokenizer: &Tokenizer) -> Self {
        let bytes = rpt::eval::reply_bytes(&rollout.tokens, rollout.finish, tokenizer);
        Self {
            text: String::from_utf8_lossy(&bytes).into_owned(),
            logprob: rollout.logprobs.iter().copied().map(f64::from).sum(),
            finish: rollout.finish.name(),
            tokens: rollout.tokens,
            logprobs: rollout.logprobs,
        }
    }
}

fn for_people(replies: &[Reply]) -> String {
    let mut text = String::new();
    for (number, reply) in replies.iter().enumerate() {
        let Reply { logprob, finish, tokens, .. } = reply;
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "--- reply {}: {} tokens, log-probability {logprob:.3}, finish {finish}\n{}",
            number + 1,
            tokens.len(),
            reply.text
        );
    }
    text
}

fn template_parser() -> impl TypedValueParser<Value = TemplateName> {
    PossibleValuesParser::new(TEMPLATES)
        .try_map(|name| serde_json::from_value::<TemplateName>(serde_json::Value::String(name)))
}

fn number(text: &str, fits: impl Fn(f32) -> bool, range: &str) -> Result<f32, String> {
    text.parse().ok().filter(|value| fits(*value)).ok_or_else(|| format!("not a number {range}"))
}

fn non_negative(text: &str) -> Result<f32, String> {
    number(text, |value| value >= 0.0 && value.is_finite(), "of at least 0")
}

fn positive_share(text: &str) -> Result<f32, String> {
    number(text, |value| value > 0.0 && value <= 1.0, "above 0 and up to 1")
}

fn share_below_one(text: &str) -> Result<f32, String> {
    number(text, |value| (0.0..1.0).contains(&value), "from 0 to below 1")
}
