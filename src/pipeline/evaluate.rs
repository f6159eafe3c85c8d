//! Evaluations of a run, each kept in a file of its own.

use super::materials::{read_json, write_json};
use super::reinforce::engine;
use super::run::Run;
use crate::error::Error;
use crate::eval::{EvalSet, Evaluation, plain, reasoned};
use crate::model::Decoder;
use crate::reward::Verifier;
use crate::rollout::Sampling;
use crate::tasks::TaskShards;

/// Evaluates models on a run's held-out tasks.
pub(super) struct Evaluator<'run> {
    run: &'run Run,
    set: Option<EvalSet>,
}

impl<'run> Evaluator<'run> {
    /// Opens the held-out tasks; without held-out text every evaluation is passed over.
    ///
    /// # Errors
    /// When the shards cannot be read.
    pub(super) fn open(run: &'run Run) -> Result<Self, Error> {
        let (Some(config), true) = (&run.pipeline.eval, run.sources.held_out.is_some()) else {
            return Ok(Self { run, set: None });
        };
        let shards = TaskShards::open(&run.paths.tasks("eval"), &run.vocabulary.fingerprints())?;
        let set = EvalSet::new(&shards, &run.pipeline.tasks, config, run.pipeline.seed)?;
        Ok(Self { run, set: Some(set) })
    }

    /// Plain accuracy of a model, unless its file is there.
    ///
    /// # Errors
    /// When the model cannot be run or the file cannot be written.
    pub(super) fn plain(&self, name: &str, decoder: &Decoder) -> Result<(), Error> {
        self.once(name, |set| plain(decoder, set, &self.header()))
    }

    /// Reasoned accuracy of a model, unless its file is there.
    ///
    /// # Errors
    /// As [`Evaluator::plain`].
    pub(super) fn reasoned(&self, name: &str, decoder: &Decoder) -> Result<(), Error> {
        self.once(name, |set| self.reasoned_now(decoder, set))
    }

    /// Keeps only a few positions, to watch a training run with.
    #[must_use]
    pub(super) fn probe(self, positions: usize) -> Self {
        Self { set: self.set.map(|set| set.probe(positions)), ..self }
    }

    /// Reasoned accuracy of a model over all positions and by label, written nowhere.
    ///
    /// # Errors
    /// When the model cannot be run.
    pub(super) fn look(&self, decoder: &Decoder) -> Result<Vec<(String, f64)>, Error> {
        let Some(set) = &self.set else { return Ok(Vec::new()) };
        let evaluation = self.reasoned_now(decoder, set)?;
        let Some(part) = evaluation.marked.or(evaluation.band) else { return Ok(Vec::new()) };
        let labels =
            part.by_band.into_iter().map(|(label, part)| (format!("accuracy/{label}"), part.accuracy));
        Ok(std::iter::once(("accuracy".to_string(), part.all.accuracy)).chain(labels).collect())
    }

    /// Plain and reasoned accuracy of a model, written nowhere.
    ///
    /// # Errors
    /// When the model cannot be run.
    pub(super) fn both(&self, decoder: &Decoder) -> Result<Option<(Evaluation, Evaluation)>, Error> {
        let Some(set) = &self.set else { return Ok(None) };
        Ok(Some((plain(decoder, set, &self.header())?, self.reasoned_now(decoder, set)?)))
    }

    fn reasoned_now(&self, decoder: &Decoder, set: &EvalSet) -> Result<Evaluation, Error> {
        let engine = engine(self.run, decoder, Sampling::GREEDY, 0);
        let verifier = Verifier::new(&self.run.pipeline.reward);
        reasoned(&engine, set, &self.run.vocabulary.template, &self.run.vocabulary.tokenizer, &verifier)
    }

    /// What stands before a document for plain prediction.
    fn header(&self) -> Vec<u32> {
        self.run.vocabulary.special.bos.into_iter().collect()
    }

    fn once(
        &self,
        name: &str,
        evaluate: impl FnOnce(&EvalSet) -> Result<Evaluation, Error>,
    ) -> Result<(), Error> {
        let Some(set) = &self.set else { return Ok(()) };
        let path = self.run.paths.evaluation(name);
        if read_json::<Evaluation>(&path)?.is_some() {
            return Ok(());
        }
        self.run.check_interrupt(|| format!("before the evaluation of {name}"))?;
        let evaluation = evaluate(set)?;
        let show = |part: &Option<crate::eval::Breakdown>| {
            part.as_ref().map_or("-".into(), |part| format!("{:.3}", part.all.accuracy))
        };
        self.run.log.say(format!(
            "{name}: accuracy {} at marked positions, {} over the entropy band",
            show(&evaluation.marked),
            show(&evaluation.band)
        ));
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(super::PipelineError::io(parent))?;
        }
        write_json(&path, &evaluation)
    }
}
