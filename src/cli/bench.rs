//! `rpt bench`: what steps, sampling, training and products cost here.

use super::failure::Usage;
use super::input::{DeviceArguments, Model, dtype, products};
use super::output;
use rpt::bench::{self, DecodeWork, TrainWork, Workload};
use rpt::model::{Dtype, Products};
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// A whole step: sampling, reward, advantages, one update
    Step {
        #[command(flatten)]
        common: Common,
        /// Documents, tokens of each, positions of each, samples of each position, tokens of each sample
        #[arg(long, value_name = "D,C,P,G,T", default_value = "4,256,4,8,64")]
        workload: Workload,
    },
    /// Sampling alone
    Decode {
        #[command(flatten)]
        common: Common,
        /// Sequences side by side
        #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
        batch: u16,
        /// Tokens of a prompt
        #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
        prompt: u32,
        /// Tokens of a sample
        #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
        new: u32,
        /// All sequences are samples of one prompt
        #[arg(long)]
        shared: bool,
    },
    /// Plain next-token training alone
    Train {
        #[command(flatten)]
        common: Common,
        /// Documents of a step
        #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
        documents: u16,
        /// Tokens of a document
        #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(2..))]
        length: u32,
    },
    /// The matrix product alone, of square matrices
    Matmul {
        /// Sizes, separated by commas
        #[arg(long, value_name = "SIZES", value_delimiter = ',', default_value = "512,1024,2048,4096",
              value_parser = clap::value_parser!(u32).range(1..=32768))]
        sizes: Vec<u32>,
        /// Number format of the weights: f32, bf16 or f16
        #[arg(long, value_name = "FORMAT", value_parser = dtype, default_value = "f32")]
        dtype: Dtype,
        /// How products are computed: f32, or bf16 with weights of bf16
        #[arg(long, value_name = "FORMAT", value_parser = products, default_value = "f32")]
        products: Products,
        #[command(flatten)]
        device: DeviceArguments,
        /// Products that are measured
        #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
        rounds: u16,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// A copy within a device's memory: what decoding of few sequences is bound by
    Copy {
        #[command(flatten)]
        device: DeviceArguments,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// What a copy within a device's memory reaches.
#[cfg(feature = "cuda")]
fn copy(device: &DeviceArguments) -> anyhow::Result<serde_json::Value> {
    let Some(settings) = device.open()? else {
        return Err(Usage::new("a copy is measured on a device", "add --device cuda").into());
    };
    let bandwidth = bench::copy_bandwidth(&settings.device).map_err(rpt::Error::from)?;
    let name = &settings.device.properties().name;
    Ok(serde_json::json!({ "device": name, "gigabytes_per_second": bandwidth * 1e-9 }))
}

#[cfg(not(feature = "cuda"))]
fn copy(device: &DeviceArguments) -> anyhow::Result<serde_json::Value> {
    device.open()?;
    Err(Usage::new("a copy is measured on a device", "add --device cuda").into())
}

#[derive(clap::Args)]
struct Common {
    /// Hugging Face directory, or `hf://owner/name`
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Number format of the weights: f32, bf16 or f16 [default: that of the files]
    #[arg(long, value_name = "FORMAT", value_parser = dtype)]
    dtype: Option<Dtype>,
    /// How products are computed: f32, or bf16 with weights of bf16
    #[arg(long, value_name = "FORMAT", value_parser = products, default_value = "f32")]
    products: Products,
    #[command(flatten)]
    device: DeviceArguments,
    /// Rounds that are measured, after one that is not
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Common {
    fn load(&self) -> rpt::Result<Model> {
        let mut model = Model::of_directory(&self.model, self.dtype)?;
        model.decoder = self.device.place(model.decoder.with_products(self.products)?)?;
        model.tokenizer.check_vocabulary(model.decoder.config().vocab_size)?;
        Ok(model)
    }
}

impl Arguments {
    pub(super) fn execute(&self) -> anyhow::Result<()> {
        let (figures, json) = match &self.what {
            What::Step { common, workload } => {
                let Model { decoder, tokenizer, .. } = common.load()?;
                let figures = bench::step(decoder, &tokenizer, *workload, common.rounds.into())?;
                (serde_json::to_value(figures)?, common.json)
            }
            What::Decode { common, batch, prompt, new, shared } => {
                let Model { decoder, tokenizer, .. } = common.load()?;
                let work = DecodeWork {
                    batch: (*batch).into(),
                    prompt: *prompt as usize,
                    new_tokens: *new as usize,
                    shared: *shared,
                };
                let figures = bench::decode(&decoder, &tokenizer, work, common.rounds.into())?;
                (serde_json::to_value(figures)?, common.json)
            }
            What::Train { common, documents, length } => {
                let work = TrainWork { documents: (*documents).into(), length: *length as usize };
                let figures = bench::train(common.load()?.decoder, work, common.rounds.into())?;
                (serde_json::to_value(figures)?, common.json)
            }
            What::Matmul { sizes, dtype, products, device, rounds, json } => {
                let device = device.open()?;
                let of = |size: &u32| {
                    bench::matmul(*size as usize, *dtype, *products, (*rounds).into(), device.as_ref())
                };
                let figures: Result<Vec<_>, _> = sizes.iter().map(of).collect();
                (serde_json::to_value(figures.map_err(rpt::Error::from)?)?, *json)
            }
            What::Copy { device, json } => (copy(device)?, *json),
        };
        output::value(&figures, json)
    }
}
