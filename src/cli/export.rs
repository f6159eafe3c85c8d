//! `rpt export`: a trained model as a Hugging Face directory.

use super::failure::Usage;
use super::input::dtype;
use super::output;
use anyhow::Context;
use rpt::model::{Dtype, SHARD_BYTES};
use rpt::pipeline::{ExportOptions, RunDirectory};
use std::fs;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Run directory
    run: PathBuf,
    /// Directory to write: must not exist or be empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Stage whose newest checkpoint is exported [default: the last one]
    #[arg(long, value_name = "NAME")]
    stage: Option<String>,
    /// Step of the checkpoint [default: the newest]
    #[arg(long, value_name = "N")]
    step: Option<u64>,
    /// Number format of the tensors: f32, bf16 or f16 [default: the model's own]
    #[arg(long, value_name = "FORMAT", value_parser = dtype)]
    dtype: Option<Dtype>,
    /// Bytes of tensors in one file; more are split into shards with an index
    #[arg(long, value_name = "N", default_value_t = SHARD_BYTES)]
    shard_bytes: u64,
    /// Write the low-rank adapter alone, as a PEFT directory, instead of the merged model
    #[arg(long, conflicts_with_all = ["dtype", "shard_bytes"])]
    adapter: bool,
    /// Write the running average of the parameters instead of the last ones: of a stage whose optimizer has
    /// `ema_decay`
    #[arg(long)]
    average: bool,
}

impl Arguments {
    pub(super) fn execute(&self) -> anyhow::Result<()> {
        let partial = partial_path(&self.out)?;
        refuse_occupied(&self.out)?;
        let run = RunDirectory::open(&self.run)?;
        let options = ExportOptions {
            stage: self.stage.clone(),
            step: self.step,
            dtype: self.dtype,
            shard_bytes: self.shard_bytes,
            adapter: self.adapter,
            average: self.average,
        };
        run.export(&partial, &options)?;
        fs::rename(&partial, &self.out).with_context(|| format!("cannot write {}", self.out.display()))?;
        output::line(&self.out.display().to_string())
    }
}

/// Where the model stands until it is complete; what an earlier attempt left there is removed.
fn partial_path(out: &Path) -> anyhow::Result<PathBuf> {
    let refuse = || Usage::new(format!("{} has no name", out.display()), "name a directory to be made");
    let name = out.file_name().ok_or_else(refuse)?;
    let partial = out.with_file_name(format!(".{}.partial", name.to_string_lossy()));
    if partial.exists() {
        fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    Ok(partial)
}

fn refuse_occupied(out: &Path) -> anyhow::Result<()> {
    let place = out.display();
    let occupied = match fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => out.symlink_metadata().is_ok(),
    };
    if occupied {
        let hint = "name a directory that does not exist, or empty this one";
        return Err(Usage::new(format!("{place} exists and is not an empty directory"), hint).into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_free_place_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("model");
        refuse_occupied(&place).unwrap();
        fs::create_dir(&place).unwrap();
        refuse_occupied(&place).unwrap();
        fs::write(place.join("config.json"), "{}").unwrap();
        assert!(refuse_occupied(&place).is_err());
        assert!(refuse_occupied(&place.join("config.json")).is_err());
        assert!(partial_path(Path::new("..")).is_err());
    }
}
