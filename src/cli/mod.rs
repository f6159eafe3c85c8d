//! The command line: one thin file per command, and what the commands share.
//!
//! Data goes to standard output and everything else to standard error. A reader that closes the
//! pipe early ends a command successfully. [`failure`] says errors and picks exit codes.

mod bench;
mod completions;
mod eval;
mod export;
mod failure;
mod input;
mod inspect;
mod logprobs;
mod output;
mod plan;
mod prepare;
mod report;
mod rollout;
mod run;
mod schema;
mod verify;

use clap::{Parser, Subcommand};
use rpt::pipeline::Until;
use std::process::ExitCode;

/// Shown below every command's help.
const EXIT_CODES: &str = "\
Exit codes:
  0   success
  1   failure
  2   wrong usage or a pipeline file that was refused
  75  interrupted after a checkpoint: run the same command again to go on";

/// Reinforcement pre-training: unlabeled text becomes verifiable next-token reasoning tasks, and a
/// model learns to think before it predicts.
#[derive(Parser)]
#[command(name = "rpt", version, after_help = format!("Example:\n  rpt run pipelines/quickstart.toml\n\n{EXIT_CODES}"))]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run every stage of a pipeline, or go on where an earlier call stopped
    ///
    /// Prints the run directory. A finished run is left as it is. Ctrl-C and SIGTERM end the run after a
    /// checkpoint with exit code 75; a second signal ends it at once.
    #[command(after_help = help("rpt run pipelines/quickstart.toml --set train.steps=20"))]
    Run(run::Arguments),
    /// Print what a run would do and what training would hold in memory, and touch nothing
    ///
    /// Resolves and checks everything. Of a model on the Hub the configuration is fetched.
    #[command(after_help = help("rpt plan pipelines/quickstart.toml --set model.device=cuda"))]
    Plan(plan::Arguments),
    /// Run a pipeline until its tasks are built, by one worker or by many
    ///
    /// The corpus is cut into units by the footers of its files, so every worker finds the same. Workers share
    /// the run directory and nothing else: each builds its units and commits them whole. A worker may be killed
    /// and started again, run twice at once, or come in any order; the tasks have the same bytes. Whoever
    /// finds all units built completes the tasks.
    #[command(after_help = help("rpt prepare pipeline.toml --out /shared/run --shard 3/64"))]
    Prepare(prepare::ShareArguments),
    /// Run a pipeline until its model is trained, without the evaluation
    #[command(after_help = help("rpt train pipelines/quickstart.toml"))]
    Train(run::Arguments),
    /// Measure next-token accuracy, plain and reasoned, on the held-out text of a run
    #[command(after_help = help("rpt eval runs/quickstart --stage train --json"))]
    Eval(eval::Arguments),
    /// Write the report of a run and print its path
    #[command(after_help = help("rpt report runs/quickstart"))]
    Report(report::Arguments),
    /// Read a run's checkpoints and ledger to the last byte; exit code 1 if anything is damaged
    #[command(after_help = help("rpt verify runs/quickstart --json"))]
    Verify(verify::Arguments),
    /// Write a trained model as a Hugging Face directory
    #[command(after_help = help("rpt export runs/quickstart --out models/quickstart"))]
    Export(export::Arguments),
    /// Sample chains of thought with predictions at the end of a text
    #[command(after_help = help("rpt rollout --run runs/quickstart --text 'The capital of France is' --samples 4"))]
    Rollout(rollout::Arguments),
    /// Log-probabilities and entropies of a sequence, in nats
    ///
    /// With --json prints {"ids": [...], "logprobs": [...], "entropy": [...]}. For n ids, `logprobs` has n - 1
    /// entries: entry i is the natural logarithm of the probability of id i + 1 after ids 0 to i, because the
    /// first id has none. `entropy` has n entries: entry i belongs to the distribution after ids 0 to i.
    #[command(after_help = help("rpt logprobs --model models/base --ids 1,2,3 --json"))]
    Logprobs(logprobs::Arguments),
    /// Show what a file or directory holds
    ///
    /// Knows corpora (parquet and JSON-lines files, directories, globs, places in a store), generated corpora,
    /// task directories and single task shards, model directories, run directories, checkpoints, and models and datasets of the Hugging Face Hub.
    #[command(after_help = help("rpt inspect runs/quickstart/tasks/train"))]
    Inspect(inspect::Arguments),
    /// Measure what steps, sampling, training and matrix products cost on this machine
    ///
    /// Figures are medians over the rounds but the first. Operations are counted from shapes; `share_of_peak`
    /// compares them with what the matrix product alone reaches with all threads (`RAYON_NUM_THREADS`).
    #[command(after_help = help("rpt bench step --model models/base --workload 4,256,4,8,64 --json"))]
    Bench(bench::Arguments),
    /// Print the JSON schema of the pipeline file
    #[command(after_help = help("rpt schema > pipeline.schema.json"))]
    Schema,
    /// Print completions for a shell
    #[command(after_help = help("rpt completions bash > /etc/bash_completion.d/rpt"))]
    Completions(completions::Arguments),
}

fn help(example: &str) -> String {
    format!("Example:\n  {example}\n\n{EXIT_CODES}")
}

impl Command {
    fn execute(&self) -> anyhow::Result<()> {
        match self {
            Self::Run(arguments) => arguments.execute(Until::End),
            Self::Plan(arguments) => arguments.execute(),
            Self::Prepare(arguments) => arguments.execute(),
            Self::Train(arguments) => arguments.execute(Until::Train),
            Self::Eval(arguments) => arguments.execute(),
            Self::Report(arguments) => arguments.execute(),
            Self::Verify(arguments) => arguments.execute(),
            Self::Export(arguments) => arguments.execute(),
            Self::Rollout(arguments) => arguments.execute(),
            Self::Logprobs(arguments) => arguments.execute(),
            Self::Inspect(arguments) => arguments.execute(),
            Self::Bench(arguments) => arguments.execute(),
            Self::Schema => schema::execute(),
            Self::Completions(arguments) => arguments.execute(),
        }
    }
}

/// Parses the command line, executes the command and says what went wrong.
pub(crate) fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(answer) => {
            // Help is wanted on standard output, and there may be nobody left to read it.
            let _ = answer.print();
            return if answer.use_stderr() { failure::USAGE.into() } else { ExitCode::SUCCESS };
        }
    };
    // On a worker of the pool, so that operations need no hand-over to start on it.
    match rayon::scope(|_| cli.command.execute()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::say(&error).into(),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_definition_of_the_command_line_is_sound() {
        super::Cli::command().debug_assert();
    }
}
