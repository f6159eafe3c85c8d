//! The `rpt` command.
use rpt::pipeline::{RunOptions, Until, run};
fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let loaded = rpt::config::load(args[0].as_ref(), &args[2..])?;
    let options = RunOptions { out: Some(args[1].clone().into()), until: Until::End };
    let outcome = run(&loaded, &options, &std::sync::Arc::default())?;
    eprintln!("{outcome:?}");
    Ok(())
}
