//! Combinations of values that could not work, refused before anything runs.

use super::{CacheFormat, ConfigError, CorpusConfig, OptimizerConfig, OptimizerKind, Pipeline, Selection};
use crate::hub::{HubError, HubReference, RepositoryKind, is_remote};
use crate::model::{DeviceName, Dtype, MODULES, Products};
use std::path::{Path, PathBuf};

type Check = Result<(), ConfigError>;

fn require(ok: bool, key: &'static str, message: &str, hint: &str) -> Check {
    if ok { Ok(()) } else { Err(ConfigError::Invalid { key, message: message.into(), hint: hint.into() }) }
}

impl Pipeline {
    /// Checks that the values can work together.
    ///
    /// # Errors
    /// Names the first key that cannot work, why, and what to do.
    pub fn validate(&self) -> Check {
        validate_corpus(&self.corpus)?;
        self.validate_references()?;
        self.validate_model()?;
        self.validate_tasks()?;
        self.validate_rollout()?;
        self.validate_stages()
    }

    /// Names on the Hub are read here, long before they are asked for.
    fn validate_references(&self) -> Check {
        let text = |path: &'_ Option<PathBuf>| path.as_deref().and_then(Path::to_str).map(str::to_owned);
        let cold_start = self.cold_start.as_ref().and_then(|stage| stage.source.clone());
        let held_out = self.eval.as_ref().and_then(|eval| eval.source.clone());
        let protected = self.corpus.decontaminate.as_ref().and_then(|settings| settings.source.clone());
        let (model, dataset) = (RepositoryKind::Model, RepositoryKind::Dataset);
        let mixture = self.corpus.mixture.values();
        let mixture = mixture.map(|part| ("corpus.mixture", Some(part.source.clone()), dataset));
        [
            ("corpus.decontaminate.source", protected, dataset),
            ("model.path", text(&self.model.path), model),
            ("tokenizer.path", text(&self.tokenizer.path), model),
            ("tasks.proxy", text(&self.tasks.proxy), model),
            ("tasks.larger_proxy", text(&self.tasks.larger_proxy), model),
            ("corpus.source", Some(self.corpus.source.clone()), dataset),
            ("tasks.source", self.tasks.source.clone(), dataset),
            ("cold_start.source", cold_start, dataset),
            ("eval.source", held_out, dataset),
        ]
        .into_iter()
        .chain(mixture)
        .filter_map(|(key, text, kind)| Some((key, text.filter(|text| is_remote(text))?, kind)))
        .try_for_each(|(key, text, kind)| validate_reference(key, &text, kind))
    }

    fn validate_model(&self) -> Check {
        let (path, scratch) = (self.model.path.is_some(), self.model.scratch.is_some());
        require(
            path != scratch,
            "model",
            "needs either `path` or `scratch`, and not both",
            "set model.path to a Hugging Face directory, or give a [model.scratch] shape",
        )?;
        require(
            path || self.tokenizer.path.is_some() || self.tokenizer.train.is_some(),
            "tokenizer",
            "a model from scratch brings no tokenizer",
            "set tokenizer.path, or train one with [tokenizer.train]",
        )?;
        require(
            self.model.products == Products::F32 || self.model.dtype == Some(Dtype::Bf16),
            "model.products",
            "needs weights of bf16",
            "set model.dtype = \"bf16\" as well",
        )?;
        self.validate_device()?;
        if let Some(lora) = &self.model.lora {
            require(
                path,
                "model.lora",
                "needs a model to stand on",
                "set model.path, or remove [model.lora]",
            )?;
            let known = |name: &String| MODULES.contains(&name.as_str());
            require(
                lora.rank > 0 && lora.alpha.is_finite() && !lora.target_modules.is_empty(),
                "model.lora",
                "needs a rank of at least 1, a finite alpha and at least one target module",
                "for example rank = 16 and alpha = 32",
            )?;
            require(
                lora.target_modules.iter().all(known),
                "model.lora.target_modules",
                "names a module that no layer has",
                &format!("modules are {}", MODULES.join(", ")),
            )?;
        }
        let Some(shape) = &self.model.scratch else { return Ok(()) };
        let heads = shape.num_attention_heads;
        let kv = shape.num_key_value_heads.unwrap_or(heads);
        require(
            heads > 0 && shape.hidden_size % heads == 0 && (shape.hidden_size / heads) % 2 == 0,
            "model.scratch.num_attention_heads",
            "must divide hidden_size into even heads",
            "for example hidden_size = 64 with 4 heads",
        )?;
        require(
            kv > 0 && heads % kv == 0,
            "model.scratch.num_key_value_heads",
            "must divide num_attention_heads",
            "leave it out for one key/value head per query head",
        )?;
        require(
            shape.num_hidden_layers > 0 && shape.intermediate_size > 0,
            "model.scratch",
            "needs at least one layer and an inner width",
            "set num_hidden_layers and intermediate_size",
        )
    }

    /// What is only done on the CPU.
    fn validate_device(&self) -> Check {
        if self.model.device == DeviceName::Cpu {
            return Ok(());
        }
        require(
            self.model.dtype != Some(Dtype::F16),
            "model.dtype",
            "a CUDA device takes weights of bf16 and f32",
            "set model.dtype = \"bf16\"",
        )?;
        require(
            self.tasks.top_k <= 64,
            "tasks.top_k",
            "a CUDA device takes entropies over at most 64 tokens",
            "the paper uses 16",
        )?;
        require(
            self.model.lora.is_none(),
            "model.lora",
            "adapters are trained on the CPU alone",
            "remove [model.lora], or set model.device = \"cpu\"",
        )
    }

    fn validate_optimizer(&self, optimizer: &OptimizerConfig, key: &'static str) -> Check {
        validate_optimizer(optimizer, key)?;
        let OptimizerConfig { kind, moments, offload, .. } = *optimizer;
        let on_device = self.model.device != DeviceName::Cpu;
        require(
            on_device || (!offload && moments == Dtype::F32),
            key,
            "offload and moments are for models on a device",
            "leave them out, or set model.device = \"cuda\"",
        )?;
        require(
            !on_device || offload || kind == OptimizerKind::Adamw,
            key,
            "has no Muon on a device",
            "use kind = \"adamw\", or offload = true",
        )?;
        require(
            moments == Dtype::F32 || (moments == Dtype::Bf16 && kind == OptimizerKind::Adamw && !offload),
            key,
            "moments are f32 or, of AdamW on the device itself, bf16",
            "leave moments or offload out",
        )
    }

    fn validate_tasks(&self) -> Check {
        let tasks = &self.tasks;
        require(tasks.top_k >= 2, "tasks.top_k", "must be at least 2", "the paper uses 16")?;
        require(
            tasks.min_entropy < tasks.max_entropy,
            "tasks.min_entropy",
            "must be below max_entropy: no position lies between the bounds",
            "entropies are in nats; over 16 tokens they reach ln 16 = 2.77",
        )?;
        require(
            tasks.min_entropy < (tasks.top_k as f32).ln(),
            "tasks.min_entropy",
            "is above ln(top_k), which no position can reach",
            "lower min_entropy or raise top_k",
        )?;
        require(
            tasks.positions_per_document > 0 && tasks.unit_bytes > 0 && tasks.shard_bytes > 0,
            "tasks.positions_per_document",
            "must be at least 1, as must unit_bytes and shard_bytes",
            "leave it out for the default",
        )?;
        require(
            tasks.score || matches!(tasks.selection, Selection::Random | Selection::All),
            "tasks.score",
            "is false, but the selection chooses by scores",
            "set tasks.selection to \"random\" or \"all\", or tasks.score to true",
        )?;
        require(
            tasks.top_share > 0.0 && tasks.top_share <= 1.0,
            "tasks.top_share",
            "must be above 0 and at most 1",
            "0.2 keeps the fifth of each document's positions with the highest entropy",
        )?;
        require(
            !tasks.tiers.is_empty() && tasks.tiers.is_sorted_by(|a, b| a < b),
            "tasks.tiers",
            "must be at least one entropy, ascending",
            "[1.5, 2.0] parts easy, medium and hard positions",
        )?;
        require(
            tasks.selection != Selection::LossGap || tasks.larger_proxy.is_some(),
            "tasks.larger_proxy",
            "is not set, but the selection `loss_gap` compares the proxy with it",
            "name a larger model with the same tokenizer",
        )?;
        require(
            tasks.max_document_tokens > tasks.min_context,
            "tasks.max_document_tokens",
            "must be above min_context",
            "raise max_document_tokens or lower min_context",
        )?;
        require(
            (0.0..=1.0).contains(&tasks.random_share),
            "tasks.random_share",
            "is a share between 0 and 1",
            "0.05 keeps one position in twenty",
        )
    }

    fn validate_rollout(&self) -> Check {
        let rollout = &self.rollout;
        require(
            rollout.samples_per_task >= 2 || self.train.is_none(),
            "rollout.samples_per_task",
            "group-relative advantages need at least 2 rollouts of a task",
            "the paper uses 8",
        )?;
        require(
            rollout.temperature > 0.0 && rollout.temperature.is_finite() || self.train.is_none(),
            "rollout.temperature",
            "must be above 0 for training",
            "the paper trains at 0.8",
        )?;
        require(
            rollout.top_p > 0.0 && rollout.top_p <= 1.0 && (0.0..1.0).contains(&rollout.min_p),
            "rollout.top_p",
            "top_p lies in (0, 1] and min_p in [0, 1)",
            "top_p = 1 and min_p = 0 switch them off",
        )?;
        require(
            rollout.stop.iter().all(|stop| !stop.is_empty()),
            "rollout.stop",
            "holds an empty text, which would end every reply at once",
            "leave the list out for none",
        )?;
        require(
            rollout.max_new_tokens > 0,
            "rollout.max_new_tokens",
            "must be at least 1",
            "leave it out for the default",
        )?;
        self.validate_kv_cache()
    }

    fn validate_kv_cache(&self) -> Check {
        let (model, key) = (&self.model, "rollout.kv_cache");
        if self.rollout.kv_cache == CacheFormat::Model {
            return Ok(());
        }
        require(
            model.device != DeviceName::Cpu,
            key,
            "fp8 is for models on a device",
            "leave it out, or set model.device = \"cuda\"",
        )?;
        let dtype = model.dtype.or(model.scratch.as_ref().map(|_| Dtype::F32));
        require(
            dtype.is_none_or(|dtype| dtype == Dtype::Bf16),
            key,
            "fp8 is for weights of bf16",
            "set model.dtype = \"bf16\" as well",
        )?;
        require(
            !model.batch_invariant,
            key,
            "fp8 gives sampling other bits than training, which model.batch_invariant is to prevent",
            "leave one of the two out",
        )
    }

    fn validate_stages(&self) -> Check {
        if let Some(pretrain) = &self.pretrain {
            self.validate_optimizer(&pretrain.optimizer, "pretrain.optimizer")?;
            require(
                pretrain.documents_per_step > 0 && pretrain.steps > 0,
                "pretrain.documents_per_step",
                "must be at least 1, as must steps",
                "8 works for small models",
            )?;
        }
        if let Some(cold_start) = &self.cold_start {
            self.validate_optimizer(&cold_start.optimizer, "cold_start.optimizer")?;
            require(
                cold_start.traces_per_step > 0 && cold_start.steps > 0,
                "cold_start.traces_per_step",
                "must be at least 1, as must steps",
                "32 works for small models",
            )?;
        }
        if let Some(train) = &self.train {
            self.validate_optimizer(&train.optimizer, "train.optimizer")?;
            require(
                train.tasks_per_step > 0 && train.updates_per_step > 0,
                "train.tasks_per_step",
                "must be at least 1, as must updates_per_step",
                "the paper uses 256 tasks and 1 update",
            )?;
            let recipe = train.recipe();
            require(
                [train.kl_weight, train.ntp_weight, recipe.clip_low, recipe.clip_high]
                    .iter()
                    .all(|value| value.is_finite() && *value >= 0.0),
                "train.kl_weight",
                "must be a finite number of at least 0, as must ntp_weight, clip_low and clip_high",
                "0 switches a penalty off",
            )?;
            require(
                train.importance_cap.is_none_or(|cap| cap.is_finite() && cap > 0.0)
                    && train.max_logprob_gap >= 0.0,
                "train.importance_cap",
                "must be a finite number above 0, and max_logprob_gap one of at least 0",
                "2 is usual",
            )?;
            require(
                train.updates_per_step <= train.tasks_per_step,
                "train.updates_per_step",
                "is larger than tasks_per_step",
                "1 keeps the run exactly on-policy",
            )?;
        }
        self.validate_controls()?;
        require(
            self.run.checkpoint_every > 0 && self.run.tokens_per_micro_batch > 0,
            "run.checkpoint_every",
            "must be at least 1, as must tokens_per_micro_batch",
            "leave it out for the default",
        )
    }

    fn validate_controls(&self) -> Check {
        let controls = &self.controls;
        require(
            !controls.continued_ntp || self.pretrain.is_some(),
            "controls.continued_ntp",
            "continues the pre-training stage, which this pipeline lacks",
            "add [pretrain] or switch the control off",
        )?;
        require(
            !(controls.more_cold_start || controls.clean_traces) || self.cold_start.is_some(),
            "controls.more_cold_start",
            "and clean_traces continue the cold start, which this pipeline lacks",
            "add [cold_start] or switch the controls off",
        )
    }
}

fn validate_corpus(corpus: &CorpusConfig) -> Check {
    require(
        corpus.source.is_empty() != corpus.mixture.is_empty(),
        "corpus.source",
        "or [corpus.mixture.NAME] names the text, one of the two",
        "several sources go into the mixture, each under a name of its own",
    )?;
    let is_rate = |rate: Option<f64>| rate.is_none_or(|rate| rate > 0.0 && rate <= 1.0);
    require(
        is_rate(corpus.rate) && corpus.mixture.values().all(|part| is_rate(part.rate)),
        "corpus.rate",
        "must be above 0 and at most 1, as must the rates of a mixture",
        "0.1 reads one document in ten",
    )?;
    require(
        corpus.mixture.values().all(|part| part.rate.is_none() || part.weight.is_none()),
        "corpus.mixture",
        "gives a source both a rate and a weight, from which its rate follows",
        "give it one of the two",
    )?;
    let weights: Vec<f64> = corpus.mixture.values().filter_map(|part| part.weight).collect();
    require(
        weights.is_empty() || weights.len() == corpus.mixture.len(),
        "corpus.mixture",
        "gives weights to some of its sources only",
        "give every source a weight, or none",
    )?;
    require(
        weights.iter().all(|weight| weight.is_finite() && *weight > 0.0),
        "corpus.mixture",
        "has a weight that is not above 0",
        "leave out a source that should not be read",
    )?;
    require(
        corpus.max_bytes.is_none_or(|most| most >= corpus.min_bytes),
        "corpus.max_bytes",
        "is below min_bytes: no document lies between the bounds",
        "raise max_bytes or lower min_bytes",
    )?;
    if let Some(settings) = &corpus.deduplicate {
        require(
            settings.exact || settings.near,
            "corpus.deduplicate",
            "switches both `exact` and `near` off",
            "leave the section out to keep duplicates",
        )?;
        require(
            settings.shingle_words > 0 && (1..=4096).contains(&settings.bands.saturating_mul(settings.rows)),
            "corpus.deduplicate.bands",
            "times rows must lie between 1 and 4096, and shingle_words be at least 1",
            "14 bands of 8 rows find texts that share about three quarters of their runs of words",
        )?;
    }
    require(
        corpus.decontaminate.as_ref().is_none_or(|settings| settings.words > 0),
        "corpus.decontaminate.words",
        "must be at least 1",
        "13 is usual; fewer drop more documents by chance",
    )
}

fn validate_reference(key: &'static str, text: &str, kind: RepositoryKind) -> Check {
    let invalid = |error: HubError| ConfigError::Invalid {
        key,
        message: error.to_string(),
        hint: error.hint().unwrap_or_default(),
    };
    HubReference::parse(text).and_then(|reference| reference.expect_kind(kind)).map(drop).map_err(invalid)
}

fn validate_optimizer(optimizer: &OptimizerConfig, key: &'static str) -> Check {
    let share = |value: f32| (0.0..=1.0).contains(&value);
    let numbers = [optimizer.weight_decay, optimizer.max_grad_norm, optimizer.momentum, optimizer.epsilon];
    require(
        numbers.iter().all(|value| value.is_finite() && *value >= 0.0),
        key,
        "weight_decay, max_grad_norm, momentum and epsilon are finite numbers of at least 0",
        "leave them out for the defaults",
    )?;
    require(
        optimizer.learning_rate > 0.0 && optimizer.learning_rate.is_finite(),
        key,
        "learning_rate must be above 0",
        "1e-6 for a pretrained model, about 1e-3 from scratch",
    )?;
    require(
        share(optimizer.beta1) && share(optimizer.beta2) && optimizer.beta1 < 1.0 && optimizer.beta2 < 1.0,
        key,
        "beta1 and beta2 lie in [0, 1)",
        "leave them out for the defaults",
    )?;
    require(
        (0.0..1.0).contains(&optimizer.ema_decay),
        key,
        "ema_decay lies in [0, 1)",
        "0 keeps no average; with 0.99 the start weighs 37 % after 100 updates, and 5 % after 300",
    )?;
    require(
        share(optimizer.decay_share) && share(optimizer.final_share),
        key,
        "decay_share and final_share lie between 0 and 1",
        "leave them out for the defaults",
    )
}
