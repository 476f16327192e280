//! Our xenstored, on the Xen made of files in the folder `FAKE_XEN`. Knows the options `-U` and `--no-journal`.

use anyhow::{Context, Result};
use std::path::PathBuf;
use xenstore_trial::ours::Files;
use xenstored::Options;
use xenstored::daemon::{Daemon, JournalPlace, log::Log};

fn main() -> Result<()> {
    let dir = PathBuf::from(std::env::var_os("FAKE_XEN").context("FAKE_XEN is not set")?);
    let log = Log::start(None, false, false)?;
    let options = Options::default();
    let has = |option| std::env::args().any(|a| a == option);
    let place = JournalPlace { dir: xenstored::daemon::run_dir(), on: !has("--no-journal") };
    if has("-U") {
        Daemon::take_over(options, log, place, |events| Ok(Box::new(Files::open(&dir, Some(events))?)))?.run()
    } else {
        Daemon::start(options, log, Some(Box::new(Files::open(&dir, None)?)), place)?.run()
    }
}
