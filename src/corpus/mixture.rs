//! The sources of a corpus, and the share of each that is read.

use super::columns::Columns;
use super::error::CorpusError;
use super::shard::Shard;
use super::source::{SourceFile, resolve};
use super::units::text_bytes;
use crate::config::{CorpusConfig, MixtureSource};
use rayon::prelude::*;
use std::path::Path;

/// A source of a corpus, with what holds for all of its files.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Part {
    /// Its name in the mixture; empty where there is none.
    pub(super) name: String,
    pub(super) text_column: String,
    pub(super) id_column: Option<String>,
    /// Share of its documents that is read.
    pub(super) rate: f64,
}

impl Part {
    pub(super) fn columns(&self, shard: &Shard, path: &Path) -> Result<Columns, CorpusError> {
        shard.columns(path, &self.text_column, self.id_column.as_deref())
    }
}

/// The files of all sources, in reading order, and the sources that they are numbered by. Footers are
/// read only where weights turn on them.
pub(super) fn open(config: &CorpusConfig) -> Result<(Vec<SourceFile>, Vec<Part>), CorpusError> {
    let whole = Part {
        name: String::new(),
        text_column: config.text_column.clone(),
        id_column: config.id_column.clone(),
        rate: config.rate.unwrap_or(1.0),
    };
    if config.mixture.is_empty() {
        return Ok((resolve(&config.source)?, vec![whole]));
    }
    let (mut files, mut parts, mut sizes) = (Vec::new(), Vec::new(), Vec::new());
    for (number, (name, source)) in config.mixture.iter().enumerate() {
        let part = part(name, source, &whole);
        let resolved = resolve(&source.source)?;
        let named =
            |file: SourceFile| SourceFile { name: format!("{name}/{}", file.name), part: number, ..file };
        let bytes = || resolved.par_iter().map(|file| text_bytes(file, &part)).sum();
        sizes.extend(source.weight.map(|weight| (weight, bytes())));
        files.extend(resolved.into_iter().map(named));
        parts.push(part);
    }
    for (part, rate) in parts.iter_mut().zip(rates(&sizes)) {
        part.rate *= rate;
    }
    Ok((files, parts))
}

fn part(name: &str, source: &MixtureSource, whole: &Part) -> Part {
    Part {
        name: name.to_owned(),
        text_column: source.text_column.clone().unwrap_or_else(|| whole.text_column.clone()),
        id_column: source.id_column.clone().or_else(|| whole.id_column.clone()),
        rate: whole.rate * source.rate.unwrap_or(1.0),
    }
}

/// The largest shares of sources of so many bytes that leave them in proportion to their weights.
fn rates(sources: &[(f64, u64)]) -> Vec<f64> {
    let per_weight = |(weight, bytes): &(f64, u64)| *bytes as f64 / weight;
    // A source without a byte takes part in no proportion.
    let scarcest = sources.iter().map(per_weight).filter(|bytes| *bytes > 0.0).fold(f64::INFINITY, f64::min);
    sources.iter().map(|source| (scarcest / per_weight(source)).min(1.0)).collect()
}

#[cfg(test)]
mod tests {
    use super::rates;

    #[test]
    fn weights_become_the_largest_rates_that_keep_their_proportions() {
        let close = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12);
        assert!(close(&rates(&[(1.0, 100), (1.0, 400)]), &[1.0, 0.25]));
        assert!(close(&rates(&[(3.0, 100), (1.0, 400)]), &[1.0, 1.0 / 12.0]));
        assert!(close(&rates(&[(0.2, 1000), (0.8, 1000)]), &[0.25, 1.0]));
        assert!(close(&rates(&[(1.0, 0), (1.0, 7)]), &[1.0, 1.0]));
        assert!(rates(&[]).is_empty());
    }
}
