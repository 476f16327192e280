//! `cargo xtask`: every task of the project that is not a plain cargo command.

mod build;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::process::{Command, ExitCode};

/// The project's tasks.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, about)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Build everything that the lab runs: the static programs for dom0 and guests, and `ferry-lab` itself.
    Build,
    /// Build, then run `ferry-lab` with the given arguments.
    #[command(disable_help_flag = true)]
    Lab {
        /// Arguments for `ferry-lab`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Build => build::everything().map(|_| ExitCode::SUCCESS),
        Task::Lab { arguments } => lab(&arguments),
    };
    result.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::from(1)
    })
}

/// Runs `ferry-lab` with its exit code passed on.
fn lab(arguments: &[OsString]) -> Result<ExitCode> {
    let lab = build::everything()?;
    let status = Command::new(&lab).args(arguments).status().with_context(|| format!("run {}", lab.display()))?;
    match status.code() {
        Some(code) => Ok(ExitCode::from(u8::try_from(code).unwrap_or(255))),
        None => bail!("ferry-lab was ended by a signal ({status})"),
    }
}
