//! `ferry-lab run` and `ferry-lab list`.

use super::Common;
use anyhow::{Context, Result};
use clap::Args;
use lab::run;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Also write the report as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Leave the disks' images in the run's folder.
    #[arg(long)]
    keep: bool,
    /// The scenario: a file, or the name of one in scenarios/.
    #[arg(value_name = "SCENARIO")]
    scenario: PathBuf,
}

/// Where the project's own scenarios are.
pub const SCENARIOS: &str = "scenarios";

fn find(scenario: &Path) -> PathBuf {
    let own = Path::new(SCENARIOS).join(scenario).with_extension("toml");
    if !scenario.exists() && own.exists() { own } else { scenario.to_owned() }
}

/// Runs a scenario; exit code 0 if all came out as it expects, 1 if not.
pub fn run(options: &Options) -> Result<ExitCode> {
    let what = run::Options {
        scenario: find(&options.scenario),
        run_dir: options.common.run_dir.clone(),
        keep: options.keep,
        wait: options.common.wait(),
        time_limit: options.common.time_limit(),
    };
    if let Some(json) = &options.json {
        may_write(json)?;
    }
    let (scenario, report) = run::run(&what)?;
    print!("{}", report.text(&scenario.expect));
    if let Some(json) = &options.json {
        report.write_json(json)?;
    }
    Ok(ExitCode::from(u8::from(!report.passed)))
}

/// That the report can't be written is said now, not after minutes of work. No file is left of it.
fn may_write(file: &Path) -> Result<()> {
    let fresh = !file.exists();
    std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(file)
        .with_context(|| format!("--json: write {}", file.display()))?;
    if fresh {
        std::fs::remove_file(file).with_context(|| format!("--json: remove {}", file.display()))?;
    }
    Ok(())
}

/// Lists the scenarios of a folder with what they are about; a broken one is said and is an error.
pub fn list(folder: &Path) -> Result<ExitCode> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let mut files: Vec<PathBuf> =
        entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "toml")).collect();
    files.sort();
    let mut broken = false;
    for file in files {
        let name = file.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        match run::load(&file) {
            Ok(scenario) => println!("{name:<24}{}", scenario.about),
            Err(error) => {
                broken = true;
                eprintln!("{name:<24}{error:#}");
            }
        }
    }
    Ok(ExitCode::from(u8::from(broken)))
}
