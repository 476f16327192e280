//! `cargo xtask`: every task of the project that is not a plain cargo command.

mod blackout;
mod build;
mod checks;
mod extension;
mod faults;
mod fuzz;
mod generated;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::process::{Command, ExitCode};

/// The scenario that `demo` runs: a move there and back beside a stock one.
const DEMO: &str = "demo";

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
    /// Build the hypervisor extension for every build of Xen that it has a table for.
    Extension {
        /// Prove that the object has no instruction, relocation or reference that may not be in a payload, and that each `unsafe` in
        /// the source says why it is sound.
        #[arg(long)]
        check: bool,
    },
    /// Make the extension's table for one build of Xen, from Debian's source of it and its symbol file.
    ExtensionTable {
        /// Folder with Debian's source of that version, patches applied; fetched when it is not given.
        #[arg(long, requires_all = ["symbols", "config"])]
        source: Option<std::path::PathBuf>,
        /// `xen-syms` of the hypervisor's -dbg package.
        #[arg(long)]
        symbols: Option<std::path::PathBuf>,
        /// `/boot/xen-*.config` of the hypervisor's package.
        #[arg(long)]
        config: Option<std::path::PathBuf>,
    },
    /// Show the main job beside the stock one on two real Xen hosts in the lab, with all of its own set-up.
    Demo,
    /// Every check that a change must pass.
    Test {
        /// Leave out what needs the lab, and fuzzing.
        #[arg(long)]
        quick: bool,
        /// Run every scenario, not only those that each change must pass.
        #[arg(long, conflicts_with = "quick")]
        all: bool,
    },
    /// Have every fault happen at every step of the handshake, one by one, on two real Xen hosts in the lab. All of them take
    /// hours.
    Faults(faults::Options),
    /// Time something against its stock counterpart.
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
    /// Run fuzz targets, two at once; an input that makes one crash is kept.
    Fuzz(fuzz::Options),
    /// Build, then run `ferry-lab` with the given arguments.
    #[command(disable_help_flag = true)]
    Lab {
        /// Arguments for `ferry-lab`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Our xenstored against the stock one.
    #[command(disable_help_flag = true)]
    Xenstored {
        /// Arguments for it (`--help` lists them)
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// How long a guest is away by ferry migrate and by stock xl migrate, on two real Xen hosts in the lab.
    Blackout(blackout::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Build => build::everything().map(|_| ExitCode::SUCCESS),
        Task::Extension { check } => extension::build(check).map(|_| ExitCode::SUCCESS),
        Task::ExtensionTable { source, symbols, config } => {
            extension::make_table(source, symbols, config).map(|()| ExitCode::SUCCESS)
        }
        Task::Demo => lab(&["run".into(), DEMO.into()]),
        Task::Test { quick, all } => {
            let extent = match (quick, all) {
                (true, _) => checks::Extent::Quick,
                (_, true) => checks::Extent::All,
                _ => checks::Extent::Usual,
            };
            checks::run(extent).map(|()| ExitCode::SUCCESS)
        }
        Task::Faults(options) => faults::run(&options),
        Task::Bench { what: Bench::Xenstored { arguments } } => bench("xenstored", &arguments),
        Task::Bench { what: Bench::Blackout(options) } => blackout::run(&options),
        Task::Fuzz(options) => fuzz::run(&options).map(|()| ExitCode::SUCCESS),
        Task::Lab { arguments } => lab(&arguments),
    };
    result.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::from(1)
    })
}

/// Builds a bench with optimisation and runs it.
fn bench(what: &str, arguments: &[OsString]) -> Result<ExitCode> {
    let program = format!("{what}-bench");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let build = Command::new(&cargo).args(["build", "--release", "-p", "xenstore-trial", "--bins"]).status()?;
    if !build.success() {
        bail!("cargo could not build {program}");
    }
    let run = ["run", "--release", "-q", "-p", "xenstore-trial", "--bin", &program, "--"];
    let status = Command::new(&cargo).args(run).args(arguments).status().with_context(|| format!("run {program}"))?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Runs `ferry-lab` with its exit code passed on.
fn lab(arguments: &[OsString]) -> Result<ExitCode> {
    let lab = build::everything()?;
    let status = Command::new(&lab)
        .args(arguments)
        .current_dir(build::root()?)
        .status()
        .with_context(|| format!("run {}", lab.display()))?;
    match status.code() {
        Some(code) => Ok(ExitCode::from(u8::try_from(code).unwrap_or(255))),
        None => bail!("ferry-lab was ended by a signal ({status})"),
    }
}
