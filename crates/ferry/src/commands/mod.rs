//! One module per subcommand: its `Args`, and a `run` that does it.

pub mod daemon;
pub mod host;
pub mod inspect;
pub mod man;
pub mod migrate;
pub mod stream;

use crate::cli::{Cli, Command};

pub fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Cancel(args) => migrate::cancel(args),
        Command::Daemon(args) => daemon::run(args),
        Command::Host(args) => host::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Man(args) => man::run(args),
        Command::Migrate(args) => migrate::run(args),
        Command::Resolve(args) => migrate::resolve(args),
        Command::Status(args) => migrate::status(args),
        Command::Stream(args) => stream::run(args),
    }
}
