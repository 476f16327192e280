//! Our xenstored, on the Xen made of files in the folder `FAKE_XEN`. Always in the foreground, without a pid file.

use anyhow::{Context, Result};
use clap::Parser;
use std::path::PathBuf;
use xenstore_trial::ours::Files;
use xenstored::daemon::{Args, Daemon, JournalPlace, log::Log, process};

fn main() -> Result<()> {
    let dir = PathBuf::from(std::env::var_os("FAKE_XEN").context("FAKE_XEN is not set")?);
    let log = Log::start(None, false, false)?;
    let a = Args::parse();
    let options = a.options()?;
    let words = a.handed_on()?;
    process::return_large_blocks();
    let place = JournalPlace { dir: a.state_dir.unwrap_or_else(xenstored::daemon::run_dir), on: !a.no_journal };
    let daemon = if a.live_update {
        Daemon::take_over(options, log, place, |events| Ok(Box::new(Files::open(&dir, Some(events))?)))?
    } else {
        Daemon::start(options, log, Some(Box::new(Files::open(&dir, None)?)), place)?
    };
    daemon.handing_on(words).run()
}
