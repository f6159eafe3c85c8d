//! What several commands read: a pipeline, a model, and a text.

use super::output;
use anyhow::Context;
use rpt::config::{Loaded, Pipeline, TokenizerConfig};
use rpt::model::{Decoder, DeviceName, DeviceSettings, Dtype, Products};
use rpt::pipeline::RunDirectory;
use rpt::tokenize::{SpecialTokens, Tokenizer};
use std::io::Read;
use std::path::{Path, PathBuf};

/// A pipeline file and what is said instead of its values.
#[derive(clap::Args)]
pub(super) struct PipelineArguments {
    /// Pipeline file (TOML; `rpt schema` describes it)
    #[arg(value_name = "PIPELINE")]
    pipeline: PathBuf,
    /// Replace or add a value of the pipeline file, for example train.steps=20; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl PipelineArguments {
    pub(super) fn load(&self) -> anyhow::Result<Loaded> {
        Ok(rpt::config::load(&self.pipeline, &self.set).map_err(rpt::Error::from)?)
    }
}

/// A text, from the command line or a file.
#[derive(clap::Args)]
#[group(required = true, multiple = false)]
pub(super) struct TextArguments {
    /// Text
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    text: Option<String>,
    /// File that holds the text, exactly as it is (- for standard input)
    #[arg(long, value_name = "FILE")]
    text_file: Option<PathBuf>,
}

impl TextArguments {
    pub(super) fn read(&self) -> anyhow::Result<String> {
        read_text(self.text.as_deref(), self.text_file.as_deref())
    }
}

/// The text that was given, or what its file holds; empty if neither was given.
pub(super) fn read_text(text: Option<&str>, file: Option<&Path>) -> anyhow::Result<String> {
    let Some(path) = file else { return Ok(text.unwrap_or_default().to_owned()) };
    if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
        return Ok(text);
    }
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Says what the Hub is asked for.
pub(super) fn say(line: &str) {
    output::note(line);
}

/// A model directory, or a run and one of its stages.
#[derive(clap::Args)]
#[group(required = true, multiple = false)]
pub(super) struct ModelArguments {
    /// Hugging Face directory with weights and tokenizer, or `hf://owner/name`
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Run directory: its newest model, prompt template and sampling settings
    #[arg(long, value_name = "RUN")]
    run: Option<PathBuf>,
}

/// Where a model computes.
#[derive(clap::Args)]
pub(super) struct DeviceArguments {
    /// Where the model computes: cpu, cuda, or cuda:1 for the second of several devices
    #[arg(long, value_name = "NAME", default_value_t)]
    device: DeviceName,
    /// On a device: rows have the same bits in every batch, as they always have on the CPU
    #[arg(long)]
    batch_invariant: bool,
}

impl DeviceArguments {
    /// The model where it is to compute.
    pub(super) fn place(&self, decoder: Decoder) -> rpt::Result<Decoder> {
        Ok(decoder.on(self.open()?.as_ref()))
    }

    /// The device, if it is not the CPU.
    pub(super) fn open(&self) -> rpt::Result<Option<DeviceSettings>> {
        Ok(DeviceSettings::open(self.device, self.batch_invariant)?)
    }
}

/// A model with its tokenizer and, if it comes from a run, the pipeline that made it.
pub(super) struct Model {
    pub(super) decoder: Decoder,
    pub(super) tokenizer: Tokenizer,
    pub(super) special: SpecialTokens,
    pub(super) pipeline: Option<Pipeline>,
}

impl ModelArguments {
    pub(super) fn load(&self, stage: Option<&str>) -> rpt::Result<Model> {
        let model = match (&self.run, &self.model) {
            (Some(run), _) => Model::of_run(&RunDirectory::open(run)?, stage)?,
            // The command line has exactly one of the two.
            (None, directory) => Model::of_directory(directory.as_deref().unwrap_or(Path::new(".")), None)?,
        };
        model.tokenizer.check_vocabulary(model.decoder.config().vocab_size)?;
        Ok(model)
    }
}

impl Model {
    fn of_run(run: &RunDirectory, stage: Option<&str>) -> rpt::Result<Self> {
        let (tokenizer, special) = run.tokenizer()?;
        let pipeline = Some(run.pipeline().clone());
        Ok(Self { decoder: run.decoder(stage)?, tokenizer, special, pipeline })
    }

    /// A local directory, or a model of the Hub.
    pub(super) fn of_directory(directory: &Path, dtype: Option<Dtype>) -> rpt::Result<Self> {
        let directory = rpt::hub::resolve_model(directory, &say)?;
        let decoder = Decoder::load_as(&directory, dtype)?;
        let tokenizer = Tokenizer::load(&directory.join("tokenizer.json"))?;
        let special = SpecialTokens::resolve(&tokenizer, &TokenizerConfig::default())?;
        Ok(Self { decoder, tokenizer, special, pipeline: None })
    }
}

/// A number format by its name.
pub(super) fn dtype(name: &str) -> Result<Dtype, String> {
    serde_json::from_value(name.into()).map_err(|_| "f32, bf16 and f16 are the formats".to_owned())
}

/// A way to compute products by its name.
pub(super) fn products(name: &str) -> Result<Products, String> {
    serde_json::from_value(name.into())
        .map_err(|_| "f32 and bf16 are the ways to compute products".to_owned())
}
