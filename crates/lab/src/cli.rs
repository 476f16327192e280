//! The command line.

mod exec;
mod run;
mod shell;
mod site;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Two emulated Xen hosts on one machine.
#[derive(Debug, Parser)]
#[command(name = "ferry-lab", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot hosts, run a script in the first one's dom0, and exit with its exit code.
    Exec(exec::Options),
    /// Run a scenario: boot its hosts, carry out its steps, judge the promises, report.
    Run(run::Options),
    /// List the scenarios of a folder.
    List {
        /// The folder.
        #[arg(default_value = run::SCENARIOS)]
        folder: PathBuf,
    },
    /// Boot hosts and give a prompt in each one's dom0.
    Shell(shell::Options),
}

/// What every command that boots hosts takes.
#[derive(Debug, Args)]
struct Common {
    /// Folder for the run's logs.
    #[arg(long, value_name = "DIR", default_value = "target/lab-run")]
    run_dir: PathBuf,
    /// Wait this many seconds if another lab runs.
    #[arg(long, value_name = "SECONDS")]
    wait: Option<u64>,
    /// End everything after this many seconds; a scenario's own limit, or half an hour, if it is not given.
    #[arg(long, value_name = "SECONDS")]
    time_limit: Option<u64>,
}

impl Common {
    fn wait(&self) -> Option<Duration> {
        self.wait.map(Duration::from_secs)
    }

    fn time_limit(&self) -> Option<Duration> {
        self.time_limit.map(Duration::from_secs)
    }
}

pub fn main() -> Result<ExitCode> {
    match Cli::parse().command {
        Command::Exec(options) => exec::run(&options),
        Command::Run(options) => run::run(&options),
        Command::List { folder } => run::list(&folder),
        Command::Shell(options) => shell::run(&options),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_grammar_is_sound() {
        super::Cli::command().debug_assert();
    }
}
