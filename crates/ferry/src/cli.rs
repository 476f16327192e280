//! The grammar of the command line.

use crate::commands;
use clap::{ArgAction, Parser, Subcommand};

/// Move running Xen guests between hosts without their help.
#[derive(Debug, Parser)]
#[command(name = "ferry", version, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    /// Log more to standard error (-v what is done, -vv every step, -vvv everything); FERRY_LOG overrides it
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,

    #[command(subcommand)]
    pub command: Command,
}

/// One variant per subcommand; its arguments and its code are in the module of the same name under `commands`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Move a running guest to another host
    Migrate(commands::migrate::Args),
    /// Tell of migrations that are under way on this host
    Status(commands::migrate::StatusArgs),
    /// Give a migration up; the guest goes on where it is
    Cancel(commands::migrate::CancelArgs),
    /// Decide a migration whose other host is gone for good
    Resolve(commands::migrate::ResolveArgs),
    /// Run the daemon that moves guests out and takes them in, in the foreground
    Daemon(commands::daemon::Args),
    /// This host: what it has and lacks for moving guests; load and unload the hypervisor extension
    Host(commands::host::Args),
    /// Show a guest's whole state in the hypervisor, or compare two
    Inspect(commands::inspect::Args),
    /// Write the manual pages, one file per command
    Man(commands::man::Args),
    /// Look into saved domains and recorded migrations
    Stream(commands::stream::Args),
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed; the message says where a guest that was to be moved is now, which mostly is where it was
  2  the command line is wrong
  3  refused before anything was touched; the message says why and what to do
  4  a limit could not be kept, or it was cancelled; the guest is where it was
  5  the outcome is not known yet: see `ferry status`, and `ferry resolve` if a host is gone for good";
