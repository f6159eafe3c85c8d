//! Scores that are kept, so that positions can be chosen again without a second model pass.

use super::{PositionScore, Proxy, TasksError};
use arrow::array::{ArrayRef, AsArray, Float32Builder, ListBuilder, RecordBatch, UInt32Builder, UInt64Array};
use arrow::datatypes::{DataType, Field, Float32Type, Schema, UInt32Type, UInt64Type};
use arrow::error::ArrowError;
use arrow::ipc::reader::FileReader;
use arrow::ipc::writer::FileWriter;
use serde::Serialize;
use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// All that scores depend on: of another key they are other scores.
#[derive(Clone, Debug, Serialize)]
pub struct ScoreKey {
    /// Fingerprint of the model.
    pub model: String,
    /// Fingerprint of the tokenizer.
    pub tokenizer: String,
    /// Fingerprint of the corpus.
    pub corpus: String,
    /// How documents are read from it.
    pub reading: String,
    /// Bytes of a unit.
    pub unit_bytes: u64,
    /// Tokens of a piece, at most.
    pub max_document_tokens: usize,
    /// Tokens before a position, at least: shorter pieces are not scored.
    pub min_context: usize,
    /// Documents, at most.
    pub max_documents: Option<u64>,
    /// What the model reads before a piece.
    pub header: Vec<u32>,
    /// Tokens that the entropy is taken over.
    pub top_k: usize,
}

impl ScoreKey {
    /// The directory of these scores.
    ///
    /// # Errors
    /// Fails when it cannot be made.
    pub fn directory(&self, root: &Path) -> Result<PathBuf, TasksError> {
        let text = serde_json::to_string_pretty(self).map_err(|error| TasksError::io(root)(error.into()))?;
        let digest = blake3::hash(text.as_bytes()).to_hex();
        let directory = root.join(&digest[..32]);
        fs::create_dir_all(&directory).map_err(TasksError::io(&directory))?;
        let path = directory.join("key.json");
        if !path.exists() {
            fs::write(&path, text + "\n").map_err(TasksError::io(&path))?;
        }
        Ok(directory)
    }
}

/// A proxy whose scores of one unit are read from a file, or written to it if there is none.
///
/// Rows stand in the order of the calls; each carries a digest of the tokens that it belongs to.
pub struct KeptScores<'a> {
    proxy: &'a dyn Proxy,
    path: PathBuf,
    state: Mutex<State>,
}

enum State {
    Reading(Rows),
    Writing { partial: PathBuf, writer: FileWriter<BufWriter<File>> },
}

impl<'a> KeptScores<'a> {
    /// Opens the file, or begins it.
    ///
    /// # Errors
    /// Fails when it is damaged or cannot be made.
    pub fn open(proxy: &'a dyn Proxy, path: PathBuf) -> Result<Self, TasksError> {
        let state = if path.exists() {
            State::Reading(Rows::open(&path)?)
        } else {
            let tag = RandomState::new().hash_one(std::process::id());
            let partial = path.with_extension(format!("{tag:016x}.partial"));
            let file = File::create(&partial).map_err(TasksError::io(&partial))?;
            let writer = FileWriter::try_new(BufWriter::new(file), &schema()).map_err(failure(&partial))?;
            State::Writing { partial, writer }
        };
        Ok(Self { proxy, path, state: Mutex::new(state) })
    }

    /// Gives a written file its name.
    ///
    /// # Errors
    /// Fails when it cannot be written.
    pub fn finish(self) -> Result<(), TasksError> {
        let State::Writing { partial, mut writer } =
            self.state.into_inner().unwrap_or_else(PoisonError::into_inner)
        else {
            return Ok(());
        };
        writer.finish().map_err(failure(&partial))?;
        let output = writer.into_inner().map_err(failure(&partial))?;
        let file = output.into_inner().map_err(|error| TasksError::io(&partial)(error.into_error()))?;
        file.sync_all().map_err(TasksError::io(&partial))?;
        fs::rename(&partial, &self.path).map_err(TasksError::io(&self.path))
    }
}

impl Proxy for KeptScores<'_> {
    fn score(&self, pieces: &[Vec<u32>], top_k: usize) -> Result<Vec<Vec<PositionScore>>, crate::Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *state {
            State::Reading(rows) => {
                Ok(pieces.iter().map(|piece| rows.next(piece, &self.path)).collect::<Result<_, _>>()?)
            }
            State::Writing { partial, writer } => {
                let scores = self.proxy.score(pieces, top_k)?;
                let batch = encode(pieces, &scores).and_then(|batch| writer.write(&batch));
                batch.map_err(failure(partial))?;
                Ok(scores)
            }
        }
    }
}

fn schema() -> Schema {
    let list = |name: &str, kind: DataType| {
        Field::new(name, DataType::List(Arc::new(Field::new("item", kind, true))), false)
    };
    Schema::new(vec![
        Field::new("tokens", DataType::UInt64, false),
        list("entropy", DataType::Float32),
        list("truth_probability", DataType::Float32),
        list("proxy_top", DataType::UInt32),
    ])
}

/// Digest of the tokens that a row of scores belongs to.
fn digest(tokens: &[u32]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    let mut word = [0; 8];
    hasher.finalize_xof().fill(&mut word);
    u64::from_le_bytes(word)
}

fn encode(pieces: &[Vec<u32>], scores: &[Vec<PositionScore>]) -> Result<RecordBatch, ArrowError> {
    let reals = |of: fn(&PositionScore) -> f32| {
        let mut lists = ListBuilder::new(Float32Builder::new());
        for scores in scores {
            for score in scores {
                lists.values().append_value(of(score));
            }
            lists.append(true);
        }
        Arc::new(lists.finish()) as ArrayRef
    };
    let mut tops = ListBuilder::new(UInt32Builder::new());
    for scores in scores {
        for score in scores {
            tops.values().append_value(score.proxy_top);
        }
        tops.append(true);
    }
    let digests = UInt64Array::from_iter_values(pieces.iter().map(|piece| digest(piece)));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(digests),
        reals(|score| score.entropy),
        reals(|score| score.truth_probability),
        Arc::new(tops.finish()),
    ];
    RecordBatch::try_new(Arc::new(schema()), columns)
}

/// The rows of a file, one after another.
struct Rows {
    reader: FileReader<BufReader<File>>,
    batch: Option<RecordBatch>,
    row: usize,
}

impl Rows {
    fn open(path: &Path) -> Result<Self, TasksError> {
        let file = File::open(path).map_err(TasksError::io(path))?;
        let reader = FileReader::try_new(BufReader::new(file), None).map_err(failure(path))?;
        if *reader.schema() != schema() {
            return Err(TasksError::damaged(path, "its columns are not those of scores"));
        }
        Ok(Self { reader, batch: None, row: 0 })
    }

    /// The scores of the next piece, which must be this one.
    fn next(&mut self, piece: &[u32], path: &Path) -> Result<Vec<PositionScore>, TasksError> {
        loop {
            if let Some(batch) = self.batch.as_ref().filter(|batch| self.row < batch.num_rows()) {
                let scores =
                    decode(batch, self.row, piece).map_err(|what| TasksError::damaged(path, what))?;
                self.row += 1;
                return Ok(scores);
            }
            let ended = || TasksError::damaged(path, "it holds fewer scores than there are pieces");
            self.batch = Some(self.reader.next().ok_or_else(ended)?.map_err(failure(path))?);
            self.row = 0;
        }
    }
}

fn decode(batch: &RecordBatch, row: usize, piece: &[u32]) -> Result<Vec<PositionScore>, String> {
    let digests = batch.column(0).as_primitive_opt::<UInt64Type>().ok_or("digests are missing")?;
    if digests.value(row) != digest(piece) {
        return Err("its scores belong to other tokens".into());
    }
    let list = |column: usize| {
        Ok::<_, String>(batch.column(column).as_list_opt::<i32>().ok_or("no list")?.value(row))
    };
    let (entropies, truths, tops) = (list(1)?, list(2)?, list(3)?);
    let entropies = entropies.as_primitive_opt::<Float32Type>().ok_or("no entropies")?;
    let truths = truths.as_primitive_opt::<Float32Type>().ok_or("no probabilities")?;
    let tops = tops.as_primitive_opt::<UInt32Type>().ok_or("no top tokens")?;
    if [entropies.len(), truths.len(), tops.len()] != [piece.len(); 3] {
        return Err("it holds scores of another length".into());
    }
    let score = |at: usize| PositionScore {
        entropy: entropies.value(at),
        truth_probability: truths.value(at),
        proxy_top: tops.value(at),
        larger_truth_probability: None,
    };
    Ok((0..piece.len()).map(score).collect())
}

fn failure(path: &Path) -> impl FnOnce(ArrowError) -> TasksError + '_ {
    move |error| match error {
        ArrowError::IoError(_, source) => TasksError::io(path)(source),
        other => TasksError::damaged(path, other.to_string()),
    }
}
