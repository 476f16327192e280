//! `ferry man`: the manual pages, made from the same grammar that parses the command line.

use anyhow::Context;
use clap::CommandFactory;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder to write ferry.1, ferry-man.1, … into; it is made if it is missing
    dir: PathBuf,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    std::fs::create_dir_all(&args.dir).with_context(|| format!("can't make {}", args.dir.display()))?;
    clap_mangen::generate_to(crate::cli::Cli::command(), &args.dir)
        .with_context(|| format!("can't write manual pages into {}", args.dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grammar_is_sound() {
        crate::cli::Cli::command().debug_assert();
    }

    #[test]
    fn every_command_gets_a_page() {
        let dir = tempfile::tempdir().unwrap();
        run(Args { dir: dir.path().join("man") }).unwrap();
        for sub in crate::cli::Cli::command().get_subcommands() {
            let page = dir.path().join("man").join(format!("ferry-{}.1", sub.get_name()));
            assert!(page.exists(), "{} is missing", page.display());
        }
    }
}
