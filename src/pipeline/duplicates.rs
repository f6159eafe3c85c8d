//! A corpus as the stages read it: without the documents that repeat an earlier one.

use super::prepare::Share;
use super::run::Run;
use crate::config::CorpusConfig;
use crate::corpus::{Corpus, DuplicateSearch};
use crate::error::Error;

/// Opens a corpus of the run and, where the pipeline asks for it, finds its duplicates first.
///
/// Each of several workers reads its own share of the corpus first, and then whatever others have not
/// read by then, so none waits for another.
///
/// # Errors
/// When the corpus cannot be read or what is found not be written, or a signal asked for a stop.
pub(super) fn open_corpus(run: &Run, config: &CorpusConfig, share: Share) -> Result<Corpus, Error> {
    let corpus = Corpus::open(config)?;
    let Some(settings) = &config.deduplicate else { return Ok(corpus) };
    let unit_bytes = run.pipeline.tasks.unit_bytes;
    let search = DuplicateSearch::open(&corpus, settings, unit_bytes, &run.paths.duplicates())?;
    let keep_on = || run.check_interrupt(|| "before all duplicates were found".into());
    let units = search.units();
    let (own, others): (Vec<_>, Vec<_>) = (0..units).partition(|unit| unit % share.count == share.index);
    let mut read = 0;
    for unit in own.into_iter().chain(others) {
        if !search.has_keys(unit) {
            search.find_keys(unit, keep_on)?;
            read += 1;
        }
    }
    if read > 0 {
        run.log.say(format!("read {read} of {units} units of {} for duplicates", config.place()));
    }
    let partitions = search.partitions()?;
    let first = share.index as u64 * partitions / share.count as u64;
    for number in (first..partitions).chain(0..first) {
        keep_on()?;
        search.compare(number, partitions)?;
    }
    Ok(corpus.without(search.finish(partitions)))
}
