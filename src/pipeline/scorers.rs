//! The models that score positions, and the scores that they left.

use super::prepare::{Split, header};
use super::run::Run;
use crate::corpus::Corpus;
use crate::error::Error;
use crate::eval::ModelProxy;
use crate::model::Decoder;
use crate::tasks::{ComparedProxies, KeptScores, Proxy, ScoreKey};
use std::borrow::Cow;
use std::path::{Path, PathBuf};

/// One model, with the directory where its scores are kept.
struct Scorer<'a> {
    decoder: Cow<'a, Decoder>,
    kept: Option<PathBuf>,
}

/// The proxy of a split and the larger model beside it, as far as its selection needs them.
pub(super) struct Scorers<'a> {
    proxy: Option<Scorer<'a>>,
    larger: Option<Scorer<'a>>,
}

impl<'a> Scorers<'a> {
    /// Loads what the settings name; `base` serves where they name no proxy.
    ///
    /// # Errors
    /// When a model cannot be loaded or its vocabulary is smaller than the tokenizer's.
    pub(super) fn load(
        run: &Run,
        split: &Split,
        base: Option<&'a Decoder>,
        corpus: &Corpus,
    ) -> Result<Self, Error> {
        if !split.settings.score {
            return Ok(Self { proxy: None, larger: None });
        }
        let named = |path: Option<&Path>| -> Result<Option<Cow<'a, Decoder>>, Error> {
            let Some(path) = path else { return Ok(None) };
            let decoder = Decoder::load(path)?.on(run.device.as_ref());
            run.vocabulary.tokenizer.check_vocabulary(decoder.config().vocab_size)?;
            Ok(Some(Cow::Owned(decoder)))
        };
        let tasks = &run.local.tasks;
        let proxy = named(tasks.proxy.as_deref())?.or(base.map(Cow::Borrowed));
        let larger = named(tasks.larger_proxy.as_deref().filter(|_| split.compares()))?;
        let scorer = |decoder: Option<Cow<'a, Decoder>>| -> Result<Option<Scorer<'a>>, Error> {
            let Some(decoder) = decoder else { return Ok(None) };
            let root = split.settings.scores.as_deref();
            let kept = root.map(|root| directory(root, run, split, &decoder, corpus)).transpose()?;
            Ok(Some(Scorer { decoder, kept }))
        };
        Ok(Self { proxy: scorer(proxy)?, larger: scorer(larger)? })
    }

    /// Works with the proxy on a unit.
    ///
    /// # Errors
    /// Those of the work; when kept scores cannot be read or written.
    pub(super) fn with_proxy<T>(
        &self,
        unit: usize,
        work: impl FnOnce(Option<&dyn Proxy>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let Some(proxy) = &self.proxy else { return work(None) };
        proxy.with_scores(unit, |proxy| match &self.larger {
            None => work(Some(proxy)),
            Some(larger) => larger.with_scores(unit, |larger| work(Some(&ComparedProxies { proxy, larger }))),
        })
    }
}

impl Scorer<'_> {
    fn with_scores<T>(
        &self,
        unit: usize,
        work: impl FnOnce(&dyn Proxy) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let model = ModelProxy(&self.decoder);
        let Some(directory) = &self.kept else { return work(&model) };
        let scores = KeptScores::open(&model, directory.join(format!("unit-{unit:05}.arrow")))?;
        let done = work(&scores)?;
        scores.finish()?;
        Ok(done)
    }
}

fn directory(
    root: &Path,
    run: &Run,
    split: &Split,
    decoder: &Decoder,
    corpus: &Corpus,
) -> Result<PathBuf, Error> {
    let settings = &split.settings;
    let key = ScoreKey {
        model: decoder.fingerprint(),
        tokenizer: run.vocabulary.tokenizer.fingerprint().to_owned(),
        corpus: corpus.fingerprint()?,
        reading: corpus.reading(),
        unit_bytes: settings.unit_bytes,
        max_document_tokens: settings.max_document_tokens,
        min_context: settings.min_context,
        max_documents: settings.max_documents,
        header: header(run),
        top_k: settings.top_k,
    };
    Ok(key.directory(root)?)
}
