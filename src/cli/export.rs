//! `rpt export`: a trained model as a Hugging Face directory.

use super::failure::Usage;
use super::output;
use anyhow::Context;
use rpt::pipeline::RunDirectory;
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
}

impl Arguments {
    pub(super) fn execute(&self) -> anyhow::Result<()> {
        let partial = partial_path(&self.out)?;
        refuse_occupied(&self.out)?;
        let run = RunDirectory::open(&self.run)?;
        write_model(&run, self.stage.as_deref(), &partial)?;
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

fn write_model(run: &RunDirectory, stage: Option<&str>, directory: &Path) -> rpt::Result<()> {
    let (tokenizer, special) = run.tokenizer()?;
    run.decoder(stage)?.save(directory, special.eos, special.bos)?;
    tokenizer.save(directory, &special)?;
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
