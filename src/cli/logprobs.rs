//! `rpt logprobs`: what a model says about a sequence.

use super::failure::Usage;
use super::input::{DeviceArguments, Model, dtype, read_text, say};
use super::output;
use rpt::model::{Decoder, Dtype, ModelError};
use serde::Serialize;
use std::fmt::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Hugging Face directory, or `hf://owner/name`
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    #[command(flatten)]
    sequence: Sequence,
    /// Number format of the weights: f32, bf16 or f16 [default: that of the files]
    #[arg(long, value_name = "FORMAT", value_parser = dtype)]
    dtype: Option<Dtype>,
    #[command(flatten)]
    device: DeviceArguments,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct Sequence {
    /// Token ids, separated by commas
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    ids: Vec<u32>,
    /// Text: encoded as a document, after the tokenizer's start token if it has one
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    text: Option<String>,
    /// File that holds the text, exactly as it is (- for standard input)
    #[arg(long, value_name = "FILE")]
    text_file: Option<PathBuf>,
}

/// In nats; entry i of both lists is about the distribution after ids 0 to i.
#[derive(Serialize)]
struct Scores {
    ids: Vec<u32>,
    /// Of id i + 1; one entry less than there are ids.
    logprobs: Vec<f32>,
    entropy: Vec<f32>,
}

impl Arguments {
    pub(super) fn execute(&self) -> anyhow::Result<()> {
        let (decoder, ids) = self.load()?;
        let decoder = self.device.place(decoder)?;
        if ids.is_empty() {
            return Err(Usage::new("the sequence is empty", "give at least one id or character").into());
        }
        let scores = Scores::of(&decoder, ids).map_err(rpt::Error::from)?;
        if self.json { output::json(&scores) } else { output::data(scores.table().as_bytes()) }
    }

    fn load(&self) -> anyhow::Result<(Decoder, Vec<u32>)> {
        let Sequence { ids, text, text_file } = &self.sequence;
        if text.is_none() && text_file.is_none() {
            let directory = rpt::hub::resolve_model(&self.model, &say).map_err(rpt::Error::from)?;
            let decoder = Decoder::load_as(&directory, self.dtype).map_err(rpt::Error::from)?;
            return Ok((decoder, ids.clone()));
        }
        let text = read_text(text.as_deref(), text_file.as_deref())?;
        let Model { decoder, tokenizer, special, .. } = Model::of_directory(&self.model, self.dtype)?;
        let document = tokenizer.encode_document(&text).map_err(rpt::Error::from)?;
        Ok((decoder, special.bos.into_iter().chain(document).collect()))
    }
}

impl Scores {
    fn of(decoder: &Decoder, ids: Vec<u32>) -> Result<Self, ModelError> {
        let scores = decoder.score_sequence(&ids)?;
        let entropy = scores.iter().map(|score| score.entropy).collect();
        let mut logprobs: Vec<f32> = scores.iter().map(|score| score.logprob).collect();
        // There is no id behind the last one.
        logprobs.pop();
        Ok(Self { ids, logprobs, entropy })
    }

    fn table(&self) -> String {
        let mut text = format!("{:>8} {:>8} {:>12} {:>13}\n", "position", "id", "logprob", "entropy after");
        for (at, (id, entropy)) in self.ids.iter().zip(&self.entropy).enumerate() {
            let logprob = at.checked_sub(1).and_then(|before| self.logprobs.get(before));
            let logprob = logprob.map_or_else(String::new, |logprob| format!("{logprob:.5}"));
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{at:>8} {id:>8} {logprob:>12} {entropy:>13.5}");
        }
        text
    }
}
