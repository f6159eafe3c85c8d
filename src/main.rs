//! The `rpt` command.
use rpt::pipeline::{RunDirectory, RunOptions, Until, run};
fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args[0] == "export" {
        let d = RunDirectory::open(args[1].as_ref())?;
        let (t, s) = d.tokenizer()?;
        let m = d.decoder(Some(&args[2]))?;
        m.save(args[3].as_ref(), s.eos, s.bos)?;
        t.save(args[3].as_ref(), &s)?;
        return Ok(());
    }
    let loaded = rpt::config::load(args[0].as_ref(), &args[2..])?;
    let options = RunOptions { out: Some(args[1].clone().into()), until: Until::End };
    let outcome = run(&loaded, &options, &std::sync::Arc::default())?;
    eprintln!("{outcome:?}");
    Ok(())
}
