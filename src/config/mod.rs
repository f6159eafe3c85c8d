//! The pipeline file: a typed schema with defaults, read from TOML.
//!
//! A pipeline file names the corpus, the model and the recipe. Unknown keys are errors with a
//! suggestion, every default is written down here once, and [`Pipeline::validate`] refuses
//! combinations that could not work. Nothing in this room runs anything.

mod corpus;
mod load;
mod validate;

pub use corpus::{CorpusConfig, Decontamination, Deduplication, MixtureSource, Normalization};
pub use load::{ConfigError, Loaded, load, parse};

use crate::kernels::dtype::{Dtype, Products};
use crate::model::{DeviceName, MODULES};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A whole pipeline: what a `pipelines/*.toml` file holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pipeline {
    /// Key of every random choice of the run: corpus generation, initialisation, order, sampling.
    #[serde(default)]
    pub seed: u64,
    /// Where the unlabeled text comes from.
    pub corpus: CorpusConfig,
    /// Where the tokenizer comes from.
    #[serde(default)]
    pub tokenizer: TokenizerConfig,
    /// The model to train.
    pub model: ModelConfig,
    /// Supervised next-token pre-training (for models from scratch).
    pub pretrain: Option<PretrainConfig>,
    /// How prediction positions are chosen and prompts are built.
    #[serde(default)]
    pub tasks: TasksConfig,
    /// Supervised cold start on reasoning traces (for models from scratch).
    pub cold_start: Option<ColdStartConfig>,
    /// How chains of thought are sampled.
    #[serde(default)]
    pub rollout: RolloutConfig,
    /// How a prediction earns its reward.
    #[serde(default)]
    pub reward: RewardConfig,
    /// The reinforcement stage; without it the run ends after the supervised stages.
    pub train: Option<TrainConfig>,
    /// Held-out evaluation; without it the run ends after training.
    pub eval: Option<EvalConfig>,
    /// Control runs that put the result into proportion.
    #[serde(default)]
    pub controls: ControlsConfig,
    /// Checkpoints, logs and limits of the run.
    #[serde(default)]
    pub run: RunConfig,
}

/// `[tokenizer]`: an existing tokenizer.json, or one trained on the corpus.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenizerConfig {
    /// A tokenizer.json, or a model of the Hugging Face Hub (`hf://owner/name[@revision]`); default:
    /// the one in `model.path`.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// Train a byte-level BPE on the corpus instead.
    #[serde(default)]
    pub train: Option<TokenizerTraining>,
    /// Text of the token that ends a reply; default: the model's or tokenizer's own.
    #[serde(default)]
    pub eos: Option<String>,
    /// Text of the token that starts a document; default: the model's or tokenizer's own, if any.
    #[serde(default)]
    pub bos: Option<String>,
}

/// `[tokenizer.train]`: a byte-level BPE trained on the corpus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenizerTraining {
    /// Number of ids including the special tokens.
    pub vocab_size: usize,
    /// Documents to learn merges from, the last of the corpus counted.
    #[serde(default = "default_tokenizer_documents")]
    pub documents: usize,
}

/// `[model]`: a Hugging Face directory, or a shape to start from scratch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// A directory with config.json, safetensors weights and tokenizer.json, or a model of the Hugging
    /// Face Hub: `hf://owner/name[@revision]`.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// The shape of a model that starts from random weights.
    #[serde(default)]
    pub scratch: Option<ScratchModel>,
    /// Number format of the weights; default: that of the model's files, or `f32` from scratch. Sums
    /// run in `f32`, and training keeps parameters in `f32` that the weights are rounded from.
    #[serde(default)]
    pub dtype: Option<Dtype>,
    /// How products with the weights are computed: `f32`, or `bf16`, which rounds what is multiplied with
    /// them to bf16 as well (sums stay in f32). Needs `dtype = "bf16"`; about twice as fast on machines
    /// with `AVX512_BF16`, slower on others.
    #[serde(default)]
    pub products: Products,
    /// Where the model computes: `cpu`, `cuda`, or `cuda:1` for the second of several devices.
    #[serde(default)]
    pub device: DeviceName,
    /// On a device: give rows the same bits in every batch, and training those of decoding, as they
    /// always have on the CPU. Slower: own kernels instead of the vendor's products.
    #[serde(default)]
    pub batch_invariant: bool,
    /// Train a low-rank adapter instead of the model's own weights.
    #[serde(default)]
    pub lora: Option<LoraConfig>,
}

/// `[model.lora]`: a low-rank adapter (arXiv 2106.09685) on a model that stays as it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Inner dimension of the product that is added to each matrix.
    pub rank: usize,
    /// The product is multiplied by alpha / rank.
    pub alpha: f32,
    /// Modules with an adapter, as their tensors are called.
    pub target_modules: Vec<String>,
    /// A PEFT directory to go on from; its rank, alpha and modules then count.
    pub path: Option<PathBuf>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self { rank: 16, alpha: 32.0, target_modules: MODULES.map(String::from).to_vec(), path: None }
    }
}

/// `[model.scratch]`: a Qwen2-like decoder from random weights.
#[expect(clippy::struct_excessive_bools, reason = "each is a key of config.json")]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScratchModel {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key/value heads; default: as many as query heads.
    #[serde(default)]
    pub num_key_value_heads: Option<usize>,
    /// Inner width of the SwiGLU block.
    pub intermediate_size: usize,
    /// Longest sequence of prompt and reply.
    #[serde(default = "default_max_positions")]
    pub max_position_embeddings: usize,
    /// Base of the rotary embedding.
    #[serde(default = "default_rope_theta")]
    pub rope_theta: f64,
    /// Biases on the query, key and value projections (Qwen2).
    #[serde(default = "yes")]
    pub attention_bias: bool,
    /// RMS norm of queries and keys (Qwen3).
    #[serde(default)]
    pub qk_norm: bool,
    /// Output head shares the embedding matrix.
    #[serde(default = "yes")]
    pub tie_word_embeddings: bool,
    /// Standard deviation of the embedding.
    #[serde(default = "default_embedding_std")]
    pub embedding_std: f32,
    /// Standard deviation of the query and key biases.
    #[serde(default)]
    pub attention_bias_std: f32,
    /// Start the output projections of attention and feed-forward blocks at zero.
    #[serde(default = "yes")]
    pub zero_init_outputs: bool,
    /// Strength of a previous-token head wired into the biases of layer 0, head 0 (0 = off).
    #[serde(default)]
    pub previous_token_head: f32,
}

/// Which update rule the optimiser uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    /// AdamW on every parameter.
    #[default]
    Adamw,
    /// Muon on the matrices of the decoder layers, AdamW on everything else.
    Muon,
}

/// Shape of the learning-rate schedule after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// No decay.
    #[default]
    Constant,
    /// Constant, then linear decay over the last `decay_share` of the steps.
    Linear,
    /// Constant, then cosine decay over the last `decay_share` of the steps.
    Cosine,
}

/// An optimiser with its schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Update rule.
    pub kind: OptimizerKind,
    /// Peak learning rate, on AdamW's scale for either rule.
    pub learning_rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay on matrices (norms and biases have none).
    pub weight_decay: f32,
    /// Momentum of Muon.
    pub momentum: f32,
    /// Largest global norm of the gradient (0 = no clipping; the paper clips its reinforcement
    /// stage at 0.2).
    pub max_grad_norm: f32,
    /// Updates of linear warm-up from 0.
    pub warmup_steps: u64,
    /// Decay after warm-up.
    pub schedule: Schedule,
    /// Share of the updates, at the end, over which the rate decays.
    pub decay_share: f32,
    /// Share of the peak rate below which the rate never falls.
    pub final_share: f32,
    /// Number format of AdamW's moments on a device: `f32`, or `bf16`, which is rounded at random.
    pub moments: Dtype,
    /// For a model on a device: keep parameters and moments in the machine's memory, and let its processors
    /// make the updates. The device holds weights and gradients alone.
    pub offload: bool,
    /// Decay of a running average of the parameters, `a = decay a + (1 - decay) p` after every update, which checkpoints
    /// hold and `rpt export --average` writes (0 = none). It begins with the stage's first parameters, which after n
    /// updates still weigh `decay^n`, and is kept in single precision; of an adapter, its factors are averaged.
    pub ema_decay: f32,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            kind: OptimizerKind::Adamw,
            learning_rate: 1e-6,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            momentum: 0.95,
            max_grad_norm: 1.0,
            warmup_steps: 10,
            schedule: Schedule::Constant,
            decay_share: 1.0,
            final_share: 0.05,
            moments: Dtype::F32,
            offload: false,
            ema_decay: 0.0,
        }
    }
}

/// `[pretrain]`: next-token pre-training on the corpus, in its own order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PretrainConfig {
    /// Optimiser steps.
    pub steps: u64,
    /// Documents in one step.
    pub documents_per_step: usize,
    /// Longest piece of a document, in tokens.
    #[serde(default)]
    pub max_document_tokens: Option<usize>,
    /// Optimiser.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
}

/// How prediction positions are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Selection {
    /// Positions whose next-token entropy under the proxy model lies inside the bounds.
    #[default]
    Entropy,
    /// Positions drawn uniformly.
    Random,
    /// Every position.
    All,
    /// Equally many positions of each band of entropy, labelled by the band: easy, medium and hard ones for a
    /// curriculum.
    Tiers,
    /// Positions that `larger_proxy` finds more probable than the proxy does: learnable, but not learnt.
    LossGap,
}

/// Prompt templates: v0-v6 after Table 10 of the RPT paper in our own words, or `plain`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TemplateName {
    /// Reason step by step, raw context last.
    V0,
    /// v0 with a fenced context.
    V1,
    /// v1 after a role line.
    V2,
    /// List candidates, choose the most probable, fenced context.
    V3,
    /// Three worked examples instead of the note on spaces.
    V4,
    /// v0's wording with a fenced context.
    V5,
    /// List candidates, fenced context, closing request: the best start in the paper.
    #[default]
    V6,
    /// The document itself and an opening think tag: for models without a chat template.
    Plain,
}

/// `[tasks]`: which positions become tasks, and how a prompt looks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TasksConfig {
    /// Corpus to cut tasks from; default: `corpus.source`.
    pub source: Option<String>,
    /// Prompt template.
    pub template: TemplateName,
    /// Model that scores positions; default: the model itself as it is before the cold start.
    pub proxy: Option<PathBuf>,
    /// How positions are chosen.
    pub selection: Selection,
    /// Entropy is taken over so many most probable next tokens, renormalised to sum to 1.
    pub top_k: usize,
    /// Lower bound on the entropy, in nats.
    pub min_entropy: f32,
    /// Upper bound on the entropy, in nats: above it words are unpredictable for any thinker.
    pub max_entropy: f32,
    /// Share of the positions inside the bounds that `entropy` keeps: those of each document with the highest
    /// entropy.
    pub top_share: f32,
    /// Entropies, in nats and ascending, that part the bands of `tiers`.
    pub tiers: Vec<f32>,
    /// Larger model of the same tokenizer for `loss_gap`.
    pub larger_proxy: Option<PathBuf>,
    /// By how many nats the larger model must find the truth more probable for `loss_gap`.
    pub min_loss_gap: f32,
    /// Directory that keeps all scores, so that other bounds or another selection need no second model pass.
    pub scores: Option<PathBuf>,
    /// Tokens of the document that must come before a position.
    pub min_context: usize,
    /// At most so many positions of one document (the first in order of a seeded draw).
    pub positions_per_document: usize,
    /// Longer documents are cut into pieces of so many tokens.
    pub max_document_tokens: usize,
    /// Share of positions that `random` keeps.
    pub random_share: f32,
    /// Use at most so many documents.
    pub max_documents: Option<u64>,
    /// Score positions with the proxy. `false` needs the selection `random` or `all`, and no model runs.
    pub score: bool,
    /// Bytes of text in one unit of work: what a worker of a sharded job builds and commits at a time.
    pub unit_bytes: u64,
    /// Bytes of one task shard.
    pub shard_bytes: u64,
}

impl Default for TasksConfig {
    fn default() -> Self {
        Self {
            source: None,
            template: TemplateName::V6,
            proxy: None,
            selection: Selection::Entropy,
            top_k: 16,
            min_entropy: 1.0,
            max_entropy: 2.5,
            top_share: 1.0,
            tiers: vec![1.5, 2.0],
            larger_proxy: None,
            min_loss_gap: 0.5,
            scores: None,
            min_context: 16,
            positions_per_document: 8,
            max_document_tokens: 4096,
            random_share: 0.05,
            max_documents: None,
            score: true,
            unit_bytes: 256 << 20,
            shard_bytes: 256 << 20,
        }
    }
}

/// `[cold_start]`: supervised learning of the reply format from traces.
///
/// Traces are parquet rows with the columns `text`, `offset` (bytes of the text before the
/// prediction), `thought`, `prediction` and, optionally, `label`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ColdStartConfig {
    /// Parquet files of traces; default: the traces that a generated corpus brings.
    #[serde(default)]
    pub source: Option<String>,
    /// Optimiser steps.
    pub steps: u64,
    /// Traces in one step.
    pub traces_per_step: usize,
    /// Weight of a next-token loss on corpus documents beside the traces.
    #[serde(default)]
    pub ntp_weight: f32,
    /// Corpus documents in one step for that loss.
    #[serde(default)]
    pub ntp_documents_per_step: usize,
    /// Optimiser.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
}

/// Number format of the keys and values that sampling caches on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CacheFormat {
    /// That of the model's weights.
    #[default]
    Model,
    /// Eight bits (e4m3) with a scale for each sixteen positions of a head: half the memory of bf16.
    Fp8,
}

/// `[rollout]`: sampling of thoughts and predictions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RolloutConfig {
    /// Rollouts of one task (the group of GRPO).
    pub samples_per_task: usize,
    /// Sampling temperature (0 = greedy).
    pub temperature: f32,
    /// Keep the k most probable tokens (0 = all).
    pub top_k: usize,
    /// Keep the smallest set of most probable tokens with at least this mass (1 = all).
    pub top_p: f32,
    /// Drop tokens below this share of the most probable one (0 = none).
    pub min_p: f32,
    /// Longest reply in tokens.
    pub max_new_tokens: usize,
    /// Replies end when their text ends with one of these.
    pub stop: Vec<String>,
    /// Format of cached keys and values on a device: `model`, or `fp8` for models of bf16, which has room for
    /// twice as many replies side by side, and draws them from a policy that is a little other than the
    /// trainer's (see `train.importance_cap`).
    pub kv_cache: CacheFormat,
    /// Most bytes of cached keys and values: replies wait for room, in order. On the CPU 2 GiB if absent, on a
    /// device three quarters of its free memory. The longest prompt with one reply may take more.
    pub cache_bytes: Option<u64>,
}

impl Default for RolloutConfig {
    fn default() -> Self {
        Self {
            samples_per_task: 8,
            temperature: 0.8,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            max_new_tokens: 1024,
            stop: Vec::new(),
            kv_cache: CacheFormat::Model,
            cache_bytes: None,
        }
    }
}

/// Which verifier scores a prediction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RewardKind {
    /// Equation 3 of the RPT paper: bytes are a prefix of the truth that ends at a token boundary.
    #[default]
    PrefixMatch,
}

/// Where the prediction stands in a reply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AnswerFormat {
    /// Content of the last `\boxed{...}` after the end of the thought.
    #[default]
    Boxed,
    /// Everything after the end of the thought.
    Rest,
}

/// `[reward]`: from a reply to an outcome.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RewardConfig {
    /// Verifier.
    pub kind: RewardKind,
    /// Where the prediction stands.
    pub answer: AnswerFormat,
    /// Text that ends the thought.
    pub think_end: String,
}

impl Default for RewardConfig {
    fn default() -> Self {
        Self { kind: RewardKind::PrefixMatch, answer: AnswerFormat::Boxed, think_end: "</think>".into() }
    }
}

/// One name that picks advantage, loss and clipping; each can be overridden.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// Group mean and standard deviation, mean over sequences of token means (arXiv 2402.03300).
    #[default]
    Grpo,
    /// Group mean only, sum over tokens over a constant (arXiv 2503.20783).
    DrGrpo,
    /// Group mean and standard deviation, mean over all tokens, clip-higher (arXiv 2503.14476).
    Dapo,
}

/// What a group's rewards are divided by after their mean is taken off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AdvantageScale {
    /// Nothing.
    None,
    /// The group's standard deviation (unbiased, plus 1e-4, as TRL does).
    Std,
}

/// How per-token losses become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossMean {
    /// Mean over all tokens of the step.
    Token,
    /// Mean over sequences of each sequence's token mean.
    Sequence,
    /// Sum over tokens over (sequences x `max_new_tokens`).
    Constant,
}

/// Estimator of the divergence from the reference model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KlEstimator {
    /// x^2 / 2: on-policy the same gradient as the exact penalty (arXiv 2510.01555).
    #[default]
    K2,
    /// exp(-x) + x - 1 (GRPO, arXiv 2402.03300 eq. 4).
    K3,
}

/// `[train]`: group-relative policy optimisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Optimiser steps.
    pub steps: u64,
    /// Tasks in one step; rollouts in one step = this x `rollout.samples_per_task`.
    pub tasks_per_step: usize,
    /// Recipe that sets the four fields below where they are not given.
    pub algorithm: Algorithm,
    /// Division of the advantage.
    pub advantage_scale: Option<AdvantageScale>,
    /// Averaging of the loss.
    pub loss_mean: Option<LossMean>,
    /// Lower clip width of the importance ratio.
    pub clip_low: Option<f32>,
    /// Upper clip width of the importance ratio.
    pub clip_high: Option<f32>,
    /// Weigh every token by its importance ratio, at most this, in place of clipping the ratio: truncated
    /// importance sampling for an engine that is not bit for bit the trainer (2 is usual), and CISPO where a
    /// step makes several updates (5 is usual).
    pub importance_cap: Option<f32>,
    /// Largest mean difference, over the tokens of a step's first update, between the log-probabilities of
    /// engine and trainer; above it the run stops. On the CPU, and in the mode `batch_invariant`, there is none.
    pub max_logprob_gap: f32,
    /// Optimiser updates made from one step's rollouts (1 = exactly on-policy).
    pub updates_per_step: usize,
    /// Weight of the divergence from the model at the start of the stage (0 = off).
    pub kl_weight: f32,
    /// Estimator of that divergence.
    pub kl_estimator: KlEstimator,
    /// Weight of a next-token loss on the trunk tokens, which are computed anyway.
    pub ntp_weight: f32,
    /// Drop groups without variance from this step on (0 = from the start; absent = never).
    pub drop_uniform_groups_from: Option<u64>,
    /// After dropping, draw further tasks until the step is full, at most so many times its size.
    pub refill_limit: usize,
    /// Optimiser.
    pub optimizer: OptimizerConfig,
    /// Smallest mean reward in the first step: below it there is too little skill to learn from.
    pub min_initial_reward: f32,
    /// Smallest share of first-step groups with both right and wrong rollouts.
    pub min_initial_mixed_groups: f32,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            tasks_per_step: 256,
            algorithm: Algorithm::Grpo,
            advantage_scale: None,
            loss_mean: None,
            clip_low: None,
            clip_high: None,
            importance_cap: None,
            max_logprob_gap: 0.1,
            updates_per_step: 1,
            kl_weight: 0.0,
            kl_estimator: KlEstimator::K2,
            ntp_weight: 0.0,
            drop_uniform_groups_from: None,
            refill_limit: 0,
            optimizer: OptimizerConfig::default(),
            min_initial_reward: 0.005,
            min_initial_mixed_groups: 0.02,
        }
    }
}

/// The choices that an algorithm's name and its overrides resolve to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PolicyRecipe {
    /// Division of the advantage.
    pub advantage_scale: AdvantageScale,
    /// Averaging of the loss.
    pub loss_mean: LossMean,
    /// Lower clip width.
    pub clip_low: f32,
    /// Upper clip width.
    pub clip_high: f32,
}

impl TrainConfig {
    /// The recipe that `algorithm` names, with this section's overrides.
    pub fn recipe(&self) -> PolicyRecipe {
        let (scale, mean, high) = match self.algorithm {
            Algorithm::Grpo => (AdvantageScale::Std, LossMean::Sequence, 0.2),
            Algorithm::DrGrpo => (AdvantageScale::None, LossMean::Constant, 0.2),
            Algorithm::Dapo => (AdvantageScale::Std, LossMean::Token, 0.28),
        };
        PolicyRecipe {
            advantage_scale: self.advantage_scale.unwrap_or(scale),
            loss_mean: self.loss_mean.unwrap_or(mean),
            clip_low: self.clip_low.unwrap_or(0.2),
            clip_high: self.clip_high.unwrap_or(high),
        }
    }
}

/// `[eval]`: next-token accuracy, plain and reasoned, on held-out text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvalConfig {
    /// Held-out parquet text; default: the held-out split of a generated corpus. An optional
    /// column `positions` (list of {offset, label}) marks positions that are scored apart.
    #[serde(default)]
    pub source: Option<String>,
    /// Use at most so many documents.
    #[serde(default)]
    pub max_documents: Option<u64>,
    /// Evaluate at most so many positions of the entropy band (a seeded draw).
    #[serde(default = "default_eval_positions")]
    pub max_positions: usize,
    /// Entropy bounds (nats) between the bands of the table, ascending.
    #[serde(default = "default_bands")]
    pub bands: Vec<f32>,
    /// Steps of the reinforcement stage between looks at held-out accuracy (0 = none).
    #[serde(default = "default_probe_every")]
    pub probe_every: u64,
    /// Held-out positions of such a look.
    #[serde(default = "default_probe_positions")]
    pub probe_positions: usize,
    /// Bootstrap resamples behind each confidence interval.
    #[serde(default = "default_resamples")]
    pub resamples: usize,
}

/// `[controls]`: further models trained for the same counted compute.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ControlsConfig {
    /// Pre-training continued for the compute of cold start and reinforcement stage.
    pub continued_ntp: bool,
    /// The cold start continued on the same traces for the compute of the reinforcement stage.
    pub more_cold_start: bool,
    /// A cold start on clean traces for the compute of cold start and reinforcement stage.
    pub clean_traces: bool,
}

/// `[run]`: checkpoints, logs and limits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Checkpoints to keep besides the newest.
    pub keep_checkpoints: usize,
    /// Share of tasks whose rollouts are written to the rollout log.
    pub logged_rollouts: f32,
    /// Tokens that one micro-batch of a training step may hold.
    pub tokens_per_micro_batch: usize,
    /// Bytes of activations that a step may keep. On the CPU a micro-batch is computed in parts, shared prefixes
    /// once: parts of so many tokens as pay, or of fewer that fit. Where none of a fair size fit, layers are computed again in
    /// the backward pass; the order of sums is that of the parts. A device does that first, and takes parts where it is not enough. Default:
    /// 2 GiB on the CPU, and on a device half of what is free there.
    pub activation_bytes: Option<u64>,
    /// Stop when thinking collapses (otherwise it is reported only).
    pub stop_on_collapse: bool,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            checkpoint_every: 100,
            keep_checkpoints: 2,
            logged_rollouts: 1.0,
            tokens_per_micro_batch: 4096,
            activation_bytes: None,
            stop_on_collapse: false,
        }
    }
}

fn default_tokenizer_documents() -> usize {
    10_000
}
fn default_max_positions() -> usize {
    2048
}
fn default_rope_theta() -> f64 {
    10_000.0
}
fn default_embedding_std() -> f32 {
    0.02
}
fn default_eval_positions() -> usize {
    2000
}
fn default_bands() -> Vec<f32> {
    vec![0.5, 1.0, 1.5]
}
fn default_probe_every() -> u64 {
    50
}
fn default_probe_positions() -> usize {
    160
}
fn default_resamples() -> usize {
    1000
}
fn yes() -> bool {
    true
}
