//! What every training stage shares: checkpoints, resuming, and stopping on a signal.

use super::materials::load_base;
use super::run::{Paths, Run};
use crate::checkpoint::{CheckpointStore, TensorView};
use crate::config::{OptimizerConfig, Pipeline};
use crate::error::Error;
use crate::model::{Decoder, DecoderConfig, Dtype, Layout};
use crate::report::MetricsLog;
use crate::train::Trainer;
use crate::train::optimizer::ema_name;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::time::Instant;

/// Names of the training stages, in order.
pub(super) const STAGES: [&str; 6] =
    ["pretrain", "cold_start", "train", "continued_ntp", "more_cold_start", "clean_traces"];

/// Whether a stage has a checkpoint, intact or not.
pub(super) fn has_checkpoints(paths: &Paths, stage: &str) -> bool {
    std::fs::read_dir(paths.checkpoints(stage)).is_ok_and(|entries| {
        entries.filter_map(Result::ok).any(|entry| !entry.file_name().to_string_lossy().starts_with('.'))
    })
}

/// Whether a stage after this one has a checkpoint.
pub(super) fn has_successors(paths: &Paths, stage: &str) -> bool {
    STAGES.iter().skip_while(|name| **name != stage).skip(1).any(|name| has_checkpoints(paths, name))
}

/// What a checkpoint says of a stage besides weights and optimiser.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct StageState<S> {
    /// Finished steps.
    pub step: u64,
    /// Steps of the whole stage.
    pub steps: u64,
    /// Length of the metrics log.
    pub metrics_bytes: u64,
    /// Floating-point operations so far, counted from shapes.
    pub flops: u64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Wall-clock seconds so far, over all attempts.
    pub seconds: f64,
    /// What the stage itself needs to go on.
    pub source: S,
}

/// A stage under way: the trainer with its checkpoints.
pub(super) struct Stage<'run, S> {
    /// The run.
    pub run: &'run Run,
    /// Name of the stage.
    pub name: &'static str,
    /// Model and optimiser.
    pub trainer: Trainer,
    /// What the next checkpoint will say.
    pub state: StageState<S>,
    /// The metrics log.
    pub metrics: MetricsLog,
    store: CheckpointStore,
    since: Instant,
}

/// A stage at its newest intact checkpoint.
pub(super) enum Opened<'run, S> {
    /// All steps are done.
    Finished(Box<Finished<S>>),
    /// Steps are left.
    Open(Box<Stage<'run, S>>),
}

/// A finished stage.
pub(super) struct Finished<S> {
    /// The trained model.
    pub decoder: Decoder,
    /// What its last checkpoint says.
    pub state: StageState<S>,
}

impl<'run, S: Clone + Serialize + DeserializeOwned> Stage<'run, S> {
    /// Opens a stage at its newest intact checkpoint, or at its start.
    ///
    /// # Errors
    /// When checkpoints belong to another pipeline, all are damaged, or files cannot be opened.
    pub(super) fn open(
        run: &'run Run,
        name: &'static str,
        steps: u64,
        updates_per_step: usize,
        optimizer: &OptimizerConfig,
        start: impl FnOnce() -> Result<(Decoder, u64, S), Error>,
    ) -> Result<Opened<'run, S>, Error> {
        let updates = steps * updates_per_step as u64;
        let mut store =
            CheckpointStore::open(&run.paths.checkpoints(name), run.pipeline.run.keep_checkpoints)?;
        for recovered in store.recovered() {
            run.log.warn(recovered.to_string());
        }
        let found = store.newest(&run.identity)?;
        for skipped in &found.skipped {
            run.log.warn(format!("skipping checkpoint {}: {}", skipped.path.display(), skipped.reason));
        }
        let Some(checkpoint) = found.checkpoint else {
            let (decoder, metrics_bytes, source) = start()?;
            let metrics = run.metrics_at(name, metrics_bytes)?;
            let mut trainer = Trainer::new(decoder, optimizer, updates)?;
            trainer.activation_bytes = run.pipeline.run.activation_bytes;
            let state =
                StageState { step: 0, steps, metrics_bytes, flops: 0, tokens: 0, seconds: 0.0, source };
            let stage = Self { run, name, trainer, state, metrics, store, since: Instant::now() };
            return Ok(Opened::Open(Box::new(stage)));
        };
        let state: StageState<S> = checkpoint.json("state")?;
        let (decoder, parameters) = read_decoder(&checkpoint, &run.local)?;
        let decoder = decoder.on(run.device.as_ref());
        if state.step >= state.steps {
            return Ok(Opened::Finished(Box::new(Finished { decoder, state })));
        }
        let mut trainer = Trainer::resume(decoder, parameters, optimizer, updates)?;
        trainer.activation_bytes = run.pipeline.run.activation_bytes;
        let saved = checkpoint.tensors("optimizer")?;
        trainer.restore(checkpoint.json("optimizer_steps")?, |tensor, values| {
            Ok::<_, Error>(saved.read_into(tensor, values)?)
        })?;
        run.log.say(format!("{name}: going on from step {} of {}", state.step, state.steps));
        let metrics = run.metrics_at(name, state.metrics_bytes)?;
        Ok(Opened::Open(Box::new(Self { run, name, trainer, state, metrics, store, since: Instant::now() })))
    }

    /// Whether there is nothing left to do.
    pub(super) fn is_finished(&self) -> bool {
        self.state.step >= self.state.steps
    }

    /// Whether this step ends with a checkpoint.
    pub(super) fn is_due(&self) -> bool {
        let every = self.run.pipeline.run.checkpoint_every;
        self.is_finished() || self.state.step.is_multiple_of(every) || self.run.interrupted()
    }

    /// Writes a checkpoint; then stops if a signal asked for it.
    ///
    /// # Errors
    /// When it cannot be written, or a signal asked for a stop.
    pub(super) fn commit(&mut self) -> Result<(), Error> {
        self.state.metrics_bytes = self.metrics.sync()?;
        self.state.seconds += self.since.elapsed().as_secs_f64();
        self.since = Instant::now();
        let (trainer, state) = (&self.trainer, &self.state);
        let (decoder, saved) = (trainer.decoder(), trainer.state()?);
        let shapes: Vec<Vec<usize>> =
            decoder.trainable().parameters().iter().map(crate::model::Parameter::shape).collect();
        let weights: Vec<TensorView> = decoder
            .trainable()
            .parameters()
            .iter()
            .zip(&shapes)
            .map(|(parameter, shape)| TensorView {
                name: &parameter.name,
                shape,
                data: &saved.parameters[parameter.range.clone()],
            })
            .collect();
        let lengths: Vec<[usize; 1]> = saved.optimizer.iter().map(|(_, values)| [values.len()]).collect();
        let moments: Vec<TensorView> = saved
            .optimizer
            .iter()
            .zip(&lengths)
            .map(|((name, data), shape)| TensorView { name, shape, data })
            .collect();
        let config = decoder.config().to_json(decoder.dtype(), &[0], None);
        let committed = self.store.commit(state.step, &self.run.identity, |writer| {
            writer.tensors("model", &weights)?;
            writer.tensors("optimizer", &moments)?;
            writer.json("optimizer_steps", &saved.updates)?;
            writer.json("config", &config)?;
            writer.json("state", state)
        })?;
        for error in committed.cleanup_errors {
            self.run.log.warn(format!("after a checkpoint: {error}"));
        }
        self.run.check_interrupt(|| format!("in stage {} after step {}", self.name, self.state.step))
    }

    /// Ends the stage.
    ///
    /// # Errors
    /// When the decoder's device has failed.
    pub(super) fn finish(self) -> Result<Finished<S>, Error> {
        Ok(Finished { decoder: self.trainer.into_decoder()?, state: self.state })
    }
}

/// The decoder that a checkpoint holds, and the parameters that are trained, in full precision. The
/// checkpoint of an adapter holds nothing of the model that it stands on, which `pipeline` names.
///
/// # Errors
/// When its configuration or tensors are damaged, or the model under an adapter cannot be loaded.
pub(super) fn read_decoder(
    checkpoint: &crate::checkpoint::Checkpoint,
    pipeline: &Pipeline,
) -> Result<(Decoder, Vec<f32>), Error> {
    if let (Some(path), Some(_)) = (&pipeline.model.path, &pipeline.model.lora) {
        let mut decoder = load_base(pipeline, path)?;
        let parameters = read_parameters(checkpoint, decoder.trainable())?;
        decoder.set_parameters(&parameters);
        return Ok((decoder, parameters));
    }
    let path = checkpoint.path().join("config.json");
    let json: serde_json::Value = checkpoint.json("config")?;
    let config = DecoderConfig::from_json(&path, &json)?;
    let dtype = Dtype::of_name(json["torch_dtype"].as_str().unwrap_or_default()).unwrap_or_default();
    let parameters = read_parameters(checkpoint, &Layout::new(&config))?;
    let decoder = Decoder::new(config, dtype, &parameters).with_products(pipeline.model.products)?;
    Ok((decoder, parameters))
}

/// Reads the running average of the parameters, if the checkpoint holds one, and says whether it does.
pub(super) fn read_average(
    checkpoint: &crate::checkpoint::Checkpoint,
    layout: &Layout,
    parameters: &mut [f32],
) -> Result<bool, Error> {
    let state = checkpoint.tensors("optimizer")?;
    for parameter in layout.parameters() {
        let name = ema_name(&parameter.name);
        if state.shape(&name).is_none() {
            return Ok(false);
        }
        state.read_into(&name, &mut parameters[parameter.range.clone()])?;
    }
    Ok(true)
}

fn read_parameters(checkpoint: &crate::checkpoint::Checkpoint, layout: &Layout) -> Result<Vec<f32>, Error> {
    let weights = checkpoint.tensors("model")?;
    let mut parameters = vec![0.0; layout.len()];
    for parameter in layout.parameters() {
        weights.read_into(&parameter.name, &mut parameters[parameter.range.clone()])?;
    }
    Ok(parameters)
}
