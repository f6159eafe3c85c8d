//! The reinforcement stage: sample tasks, roll out, reward, advantage, update, commit.

use super::error::PipelineError;
use super::evaluate::Evaluator;
use super::health::{Health, Vitals};
use super::run::Run;
use super::stage::{Finished, Opened, Stage};
use crate::config::{PolicyRecipe, RolloutConfig, TrainConfig};
use crate::error::Error;
use crate::eval::{prompts, reply_bytes};
use crate::ledger::{DropReason, Ledger, LedgerLog, LedgerMark, LedgerSnapshot};
use crate::model::Decoder;
use crate::report::{Metrics, Progress, RolloutLog, RolloutRow};
use crate::reward::{Outcome, Score, Truth, Verifier};
use crate::rollout::{Engine, Finish, Prompt, Rollout, Sampling, StopRule};
use crate::tasks::{Task, TaskCursor, TaskShards, TaskStream};
use crate::train::advantage::{advantages, is_uniform};
use crate::train::loss::PolicyLoss;
use crate::train::{ScoredGroup, UpdateStats, policy_batches};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// Characters of context that the rollout log keeps.
const LOGGED_CONTEXT: usize = 400;

/// What a checkpoint of this stage says besides weights and optimiser.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct ReinforceState {
    /// The trained frontier of the task stream.
    pub cursor: TaskCursor,
    /// Totals of the ledger.
    pub ledger: LedgerSnapshot,
    /// Where the ledger file ends.
    pub ledger_mark: LedgerMark,
    /// Signs of collapse.
    health: Health,
    /// Optimiser updates.
    pub updates: u64,
    /// Last step of the last segment of the rollout log.
    logged: u64,
}

/// The stage with everything it works with.
struct Reinforcement<'run> {
    stage: Box<Stage<'run, ReinforceState>>,
    config: &'run TrainConfig,
    recipe: PolicyRecipe,
    loss: PolicyLoss,
    reference: Option<Decoder>,
    stream: TaskStream,
    ledger: Ledger,
    ledger_log: LedgerLog,
    rollouts: RolloutLog,
    verifier: Verifier,
    probe: Option<Evaluator<'run>>,
}

/// A task's rollouts and what became of them.
struct Group {
    task: Task,
    prompt: Prompt,
    rollouts: Vec<Rollout>,
    replies: Vec<Vec<u8>>,
    truth: crate::tasks::Truth,
    scores: Vec<Score>,
    advantages: Vec<f32>,
    dropped: Option<DropReason>,
}

impl Group {
    fn rewards(&self) -> Vec<f32> {
        self.scores.iter().map(|score| score.reward).collect()
    }
}

/// Costs of the phases of a step.
#[derive(Clone, Copy, Default)]
struct Costs {
    flops: u64,
    sampled_tokens: u64,
    retries: u64,
    unique_prompt_tokens: u64,
    rollout: f64,
    reward: f64,
    update: f64,
}

/// Runs the stage to its end, from its newest checkpoint.
///
/// # Errors
/// When it cannot be opened, starts from too little skill, a step fails, or a signal asks for a stop.
pub(super) fn reinforce(
    run: &Run,
    config: &TrainConfig,
    start: impl FnOnce() -> Result<(Decoder, u64), Error>,
    reference: impl FnOnce() -> Result<Decoder, Error>,
) -> Result<Finished<ReinforceState>, Error> {
    let start = || start().map(|(decoder, bytes)| (decoder, bytes, ReinforceState::default()));
    let stage =
        match Stage::open(run, "train", config.steps, config.updates_per_step, &config.optimizer, start)? {
            Opened::Finished(finished) => return Ok(*finished),
            Opened::Open(stage) => stage,
        };
    let reference = if config.kl_weight > 0.0 { Some(reference()?) } else { None };
    let mut this = Reinforcement::open(run, config, stage, reference)?;
    let mut progress = Progress::new(&run.log, "train", this.stage.state.step, config.steps);
    while !this.stage.is_finished() {
        let (groups, costs) = this.sample_and_score()?;
        let figures = this.learn(&groups, costs)?;
        progress.step(this.stage.state.step, &figures);
        if this.stage.is_due() {
            this.commit()?;
        }
    }
    progress.finish();
    this.stage.finish()
}

impl<'run> Reinforcement<'run> {
    fn open(
        run: &'run Run,
        config: &'run TrainConfig,
        stage: Box<Stage<'run, ReinforceState>>,
        reference: Option<Decoder>,
    ) -> Result<Self, Error> {
        let state = &stage.state;
        let shards = TaskShards::open(&run.paths.tasks("train"), &run.vocabulary.fingerprints())?;
        let stream = TaskStream::new(Arc::new(shards), run.pipeline.seed, state.source.cursor)?;
        let ledger = Ledger::restore(state.source.ledger.clone())?;
        let (ledger_log, cut) = LedgerLog::open(&run.paths.ledger(), state.source.ledger_mark)?;
        let mut rollouts = RolloutLog::new(&run.paths.rollouts())?;
        let discarded = rollouts.discard_after(state.step)?;
        if cut.lines > 0 || discarded > 0 {
            run.log.say(format!(
                "{} ledger lines and {discarded} rollout files after the checkpoint are made again",
                cut.lines
            ));
        }
        let probe = match &run.pipeline.eval {
            Some(eval) if eval.probe_every > 0 => Some(Evaluator::open(run)?.probe(eval.probe_positions)),
            _ => None,
        };
        Ok(Self {
            probe,
            recipe: config.recipe(),
            loss: PolicyLoss::new(config),
            verifier: Verifier::new(&run.pipeline.reward),
            stage,
            config,
            reference,
            stream,
            ledger,
            ledger_log,
            rollouts,
        })
    }

    /// Draws tasks and rolls them out until the step is full.
    fn sample_and_score(&mut self) -> Result<(Vec<Group>, Costs), Error> {
        let (wanted, mut costs) = (self.config.tasks_per_step, Costs::default());
        let drops = self.config.drop_uniform_groups_from.is_some_and(|from| self.stage.state.step >= from);
        let rounds = if drops { 1 + self.config.refill_limit } else { 1 };
        let mut groups: Vec<Group> = Vec::new();
        for _ in 0..rounds {
            let tasks = self.sample_tasks(wanted)?;
            let rolled_out = self.roll_out(tasks, &mut costs)?;
            groups.extend(self.reward(rolled_out, &mut costs)?);
            if drops && drop_uniform(&mut groups, wanted) >= wanted {
                break;
            }
        }
        Ok((groups, costs))
    }

    fn sample_tasks(&mut self, count: usize) -> Result<Vec<Task>, Error> {
        let samples = self.stage.run.pipeline.rollout.samples_per_task as u32;
        let mut tasks = Vec::with_capacity(count);
        for _ in 0..count {
            let task = self.stream.next_task()?;
            self.ledger.issue(task.ordinal, samples)?;
            tasks.push(task);
        }
        Ok(tasks)
    }

    fn roll_out(&mut self, tasks: Vec<Task>, costs: &mut Costs) -> Result<Vec<Group>, Error> {
        let start = Instant::now();
        let (run, tokenizer) = (self.stage.run, &self.stage.run.vocabulary.tokenizer);
        let prompts = prompts(&tasks, &run.vocabulary.template);
        let decoder = self.stage.trainer.decoder();
        let engine = engine(run, decoder, sampling(run), self.stage.state.source.updates);
        let generation = engine.generate(&prompts, run.pipeline.rollout.samples_per_task)?;
        costs.flops += generation.flops;
        costs.sampled_tokens += generation.sampled_tokens;
        costs.retries += generation.retries;
        costs.unique_prompt_tokens += generation.unique_prompt_tokens;
        let mut groups = Vec::with_capacity(tasks.len());
        for ((task, prompt), rollouts) in tasks.into_iter().zip(prompts).zip(generation.groups) {
            let mut replies = Vec::with_capacity(rollouts.len());
            for rollout in &rollouts {
                self.ledger.generated(rollout.ordinal, rollout.sample)?;
                replies.push(reply_bytes(&rollout.tokens, rollout.finish, tokenizer));
            }
            let truth = crate::tasks::Truth::of(&task, tokenizer);
            let (scores, advantages) = (Vec::new(), Vec::new());
            groups.push(Group { task, prompt, rollouts, replies, truth, scores, advantages, dropped: None });
        }
        costs.rollout += start.elapsed().as_secs_f64();
        Ok(groups)
    }

    fn reward(&mut self, mut groups: Vec<Group>, costs: &mut Costs) -> Result<Vec<Group>, Error> {
        let start = Instant::now();
        for group in &mut groups {
            let crate::tasks::Truth { bytes, boundaries, ends_document } = &group.truth;
            let truth = Truth { bytes, boundaries, ends_document: *ends_document };
            for (rollout, reply) in group.rollouts.iter().zip(&group.replies) {
                let score = self.verifier.score(reply, rollout.finish != Finish::Length, &truth);
                self.ledger.scored(rollout.ordinal, rollout.sample, score.outcome.name())?;
                group.scores.push(score);
            }
            group.advantages = advantages(&group.rewards(), self.recipe.advantage_scale);
        }
        costs.reward += start.elapsed().as_secs_f64();
        Ok(groups)
    }

    /// Updates the policy and writes down what happened; returns figures for the progress line.
    fn learn(&mut self, groups: &[Group], mut costs: Costs) -> Result<[(&'static str, f64); 3], Error> {
        let vitals = self.vitals(groups);
        if self.stage.state.step == 0 {
            Health::check_start(vitals, self.config)?;
        }
        let start = Instant::now();
        let stats = self.update(groups)?;
        costs.update = start.elapsed().as_secs_f64();
        self.stage.state.step += 1;
        self.stage.state.flops += costs.flops + stats.totals.flops;
        self.stage.state.tokens += costs.sampled_tokens;
        self.close_ledger(groups)?;
        self.write_metrics(groups, vitals, &stats, costs)?;
        self.log_rollouts(groups)?;
        if let Some(symptom) = self.stage.state.source.health.observe(vitals) {
            let step = self.stage.state.step;
            self.stage.run.log.warn(format!("thinking collapsed at step {step}: {symptom}"));
            if self.stage.run.pipeline.run.stop_on_collapse {
                return Err(PipelineError::Collapsed { step, symptom }.into());
            }
        }
        Ok([("reward", vitals.reward), ("thought", vitals.thought), ("zero-variance", vitals.uniform)])
    }

    fn update(&mut self, groups: &[Group]) -> Result<UpdateStats, Error> {
        let pipeline = &self.stage.run.pipeline;
        let kept: Vec<ScoredGroup> = groups
            .iter()
            .filter(|group| group.dropped.is_none())
            .map(|group| ScoredGroup {
                prompt: &group.prompt,
                rollouts: &group.rollouts,
                advantages: group.advantages.clone(),
            })
            .collect();
        let mut sum = UpdateStats::default();
        let share = kept.len().div_ceil(self.config.updates_per_step).max(1);
        let first = self.stage.state.source.updates;
        for part in kept.chunks(share) {
            let batches = policy_batches(
                part,
                self.recipe.loss_mean,
                pipeline.rollout.max_new_tokens,
                self.config.ntp_weight,
                pipeline.run.tokens_per_micro_batch,
            );
            let inverse_temperature = sampling(self.stage.run).inverse_temperature();
            let reference = self.reference.as_ref();
            let stats = self.stage.trainer.update(&batches, &self.loss, inverse_temperature, reference)?;
            // Later updates move away from the policy that sampled: that is no fault of the arithmetic.
            if self.stage.state.source.updates == first {
                self.check_gap(&stats)?;
            }
            sum.totals.absorb(&stats.totals);
            sum.retries += stats.retries;
            sum.gradient_norm = sum.gradient_norm.max(stats.gradient_norm);
            sum.learning_rate = stats.learning_rate;
            sum.times += stats.times;
            self.stage.state.source.updates += 1;
        }
        Ok(sum)
    }

    /// Law 2: engine and trainer must say nearly the same.
    fn check_gap(&self, stats: &UpdateStats) -> Result<(), Error> {
        let (gap, limit) = (stats.totals.mean_gap(), self.config.max_logprob_gap);
        if gap <= f64::from(limit) {
            return Ok(());
        }
        Err(PipelineError::LogprobGap { step: self.stage.state.step + 1, gap, limit }.into())
    }

    fn close_ledger(&mut self, groups: &[Group]) -> Result<(), Error> {
        for group in groups {
            match group.dropped {
                None => self.ledger.trained(group.task.ordinal)?,
                Some(reason) => self.ledger.dropped(group.task.ordinal, reason)?,
            }
        }
        let record = self.ledger.close_step(self.stage.state.step)?;
        self.stage.state.source.ledger_mark = self.ledger_log.append(&record)?;
        self.stage.state.source.ledger = self.ledger.snapshot();
        self.stage.state.source.cursor = self.stream.cursor();
        Ok(())
    }

    fn vitals(&self, groups: &[Group]) -> Vitals {
        let tokenizer = &self.stage.run.vocabulary.tokenizer;
        let samples: usize = groups.iter().map(|group| group.scores.len()).sum();
        let mean = |sum: f64, count: usize| sum / count.max(1) as f64;
        let rewards: f64 = groups.iter().flat_map(Group::rewards).map(f64::from).sum();
        let thoughts: usize = groups
            .iter()
            .flat_map(|group| group.rollouts.iter().zip(&group.scores))
            .map(|(rollout, score)| tokens_within(&rollout.tokens, score.thought.end, tokenizer))
            .sum();
        let uniform = groups.iter().filter(|group| is_uniform(&group.rewards())).count();
        Vitals {
            reward: mean(rewards, samples),
            thought: mean(thoughts as f64, samples),
            uniform: mean(uniform as f64, groups.len()),
        }
    }

    fn write_metrics(
        &mut self,
        groups: &[Group],
        vitals: Vitals,
        stats: &UpdateStats,
        costs: Costs,
    ) -> Result<(), Error> {
        let mut outcomes: BTreeMap<&str, u64> =
            Outcome::ALL.iter().map(|outcome| (outcome.name(), 0)).collect();
        for score in groups.iter().flat_map(|group| &group.scores) {
            *outcomes.entry(score.outcome.name()).or_default() += 1;
        }
        let mut metrics = Metrics::new("train", self.stage.state.step)
            .with("reward", vitals.reward)
            .with("thought_tokens", vitals.thought)
            .with("zero_variance", vitals.uniform)
            .with("groups", groups.len())
            .with("kept_groups", groups.iter().filter(|group| group.dropped.is_none()).count())
            .with("sampled_tokens", costs.sampled_tokens)
            .with("unique_prompt_tokens", costs.unique_prompt_tokens)
            .with("seconds/rollout", costs.rollout)
            .with("seconds/reward", costs.reward)
            .with("seconds/update", costs.update)
            .with("seconds/forward", stats.times.forward.wall_seconds)
            .with("seconds/backward", stats.times.backward.wall_seconds)
            .with("seconds/optimizer", stats.times.optimizer.wall_seconds);
        // A step whose groups are all dropped makes no update and has no such figures.
        if stats.totals.policy_tokens > 0 {
            set_update_figures(&mut metrics, stats);
        }
        if costs.retries + stats.retries > 0 {
            metrics.set("out_of_memory_retries", costs.retries + stats.retries);
        }
        for (name, count) in outcomes {
            metrics.set(format!("outcome/{name}"), count);
        }
        for (name, accuracy) in self.look()? {
            metrics.set(name, accuracy);
        }
        Ok(self.stage.metrics.write(&metrics)?)
    }

    /// Held-out accuracy, on the steps that look at it.
    fn look(&self) -> Result<Vec<(String, f64)>, Error> {
        let every = self.stage.run.pipeline.eval.as_ref().map_or(0, |eval| eval.probe_every);
        let step = self.stage.state.step;
        match &self.probe {
            Some(probe) if step == 1 || step.is_multiple_of(every) || self.stage.is_finished() => {
                probe.look(self.stage.trainer.decoder())
            }
            _ => Ok(Vec::new()),
        }
    }

    fn log_rollouts(&mut self, groups: &[Group]) -> Result<(), Error> {
        let share = f64::from(self.stage.run.pipeline.run.logged_rollouts);
        let logged = crate::random::Stream::new(self.stage.run.pipeline.seed, "logged rollouts");
        for group in groups.iter().filter(|group| logged.uniform(group.task.ordinal) < share) {
            for sample in 0..group.rollouts.len() {
                self.rollouts.push(self.row(group, sample))?;
            }
        }
        Ok(())
    }

    fn row(&self, group: &Group, sample: usize) -> RolloutRow {
        let tokenizer = &self.stage.run.vocabulary.tokenizer;
        let (position, rollout, score) =
            (group.task.position(), &group.rollouts[sample], &group.scores[sample]);
        let reply = &group.replies[sample];
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let context = tokenizer.decode_lossy(&group.task.document.tokens[..position.index as usize]);
        let skipped = context.chars().count().saturating_sub(LOGGED_CONTEXT);
        RolloutRow {
            step: self.stage.state.step,
            ordinal: rollout.ordinal,
            sample: rollout.sample,
            document: group.task.document.id.clone(),
            position: position.index,
            label: position.label.clone(),
            entropy: position.entropy,
            context: context.chars().skip(skipped).collect(),
            thought: text(&reply[score.thought.clone()]),
            prediction: score.prediction.clone().map(|range| text(&reply[range])),
            truth: text(&group.truth.bytes[..group.truth.bytes.len().min(64)]),
            outcome: score.outcome.name().into(),
            reward: score.reward,
            advantage: group.advantages[sample],
            finish: rollout.finish.name().into(),
            policy_version: rollout.policy_version,
            tokens: rollout.tokens.clone(),
            logprobs: rollout.logprobs.clone(),
            policy_logprobs: rollout.policy_logprobs.clone(),
            sampling_logprobs: rollout.sampling_logprobs.clone(),
            prompt_tokens: group.prompt.len() as u32,
        }
    }

    /// Logs first, then the checkpoint that vouches for them.
    fn commit(&mut self) -> Result<(), Error> {
        let (first, last) = (self.stage.state.source.logged + 1, self.stage.state.step);
        self.rollouts.commit(first, last)?;
        self.stage.state.source.logged = last;
        self.ledger_log.sync()?;
        self.stage.commit()
    }
}

fn set_update_figures(metrics: &mut Metrics, stats: &UpdateStats) {
    let totals = &stats.totals;
    let per_token = |sum: f64| sum / totals.policy_tokens.max(1) as f64;
    metrics.set("entropy", per_token(totals.entropy));
    metrics.set("loss", totals.policy_loss + totals.likelihood_loss);
    metrics.set("gradient_norm", stats.gradient_norm);
    metrics.set("learning_rate", stats.learning_rate);
    metrics.set("logprob_gap", totals.largest_mismatch);
    metrics.set("logprob_gap/mean", totals.mean_gap());
    metrics.set("logprob_gap/large", per_token(totals.large_mismatches as f64));
    metrics.set("mismatched_tokens", totals.mismatched);
    metrics.set("clipped", per_token(totals.clipped as f64));
    metrics.set("kl", per_token(totals.kl));
}

/// Marks uniform groups and those beyond `wanted` as dropped; returns how many mixed ones there are.
fn drop_uniform(groups: &mut [Group], wanted: usize) -> usize {
    let mut kept = 0;
    for group in groups {
        let uniform = is_uniform(&group.rewards());
        kept += usize::from(!uniform);
        group.dropped = match (uniform, kept > wanted) {
            (true, _) => Some(DropReason::ZeroVariance),
            (false, true) => Some(DropReason::Surplus),
            (false, false) => None,
        };
    }
    kept
}

/// Tokens of a reply that begin within its first `bytes` bytes.
fn tokens_within(tokens: &[u32], bytes: usize, tokenizer: &crate::tokenize::Tokenizer) -> usize {
    let mut sum = 0;
    tokens
        .iter()
        .take_while(|token| {
            let inside = sum < bytes;
            sum += tokenizer.token_bytes(**token).len();
            inside
        })
        .count()
}

/// The pipeline's sampling settings.
pub(super) fn sampling(run: &Run) -> Sampling {
    let rollout = &run.pipeline.rollout;
    Sampling {
        temperature: rollout.temperature,
        top_k: rollout.top_k,
        top_p: rollout.top_p,
        min_p: rollout.min_p,
    }
}

/// An engine over a run's vocabulary.
pub(super) fn engine<'a>(
    run: &'a Run,
    decoder: &'a Decoder,
    sampling: Sampling,
    policy_version: u64,
) -> Engine<'a> {
    let vocabulary = &run.vocabulary;
    let stop = StopRule {
        eos: vocabulary.special.ends(),
        strings: &run.pipeline.rollout.stop,
        tokenizer: &vocabulary.tokenizer,
        max_new_tokens: run.pipeline.rollout.max_new_tokens,
    };
    let RolloutConfig { kv_cache, cache_bytes, .. } = run.pipeline.rollout;
    Engine { decoder, sampling, stop, seed: run.pipeline.seed, policy_version, kv_cache, cache_bytes }
}
