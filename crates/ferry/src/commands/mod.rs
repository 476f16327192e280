//! One module per subcommand: its `Args`, and a `run` that does it.

pub mod host;
pub mod inspect;
pub mod man;
pub mod stream;

use crate::cli::{Cli, Command};

pub fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Host(args) => host::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Man(args) => man::run(args),
        Command::Stream(args) => stream::run(args),
    }
}
