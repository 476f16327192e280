//! Our xenstored, on the Xen made of files in the folder `FAKE_XEN`. Knows the one option `-U`.

use anyhow::{Context, Result};
use std::path::PathBuf;
use xenstore_trial::ours::Files;
use xenstored::Options;
use xenstored::daemon::{Daemon, log::Log};

fn main() -> Result<()> {
    let dir = PathBuf::from(std::env::var_os("FAKE_XEN").context("FAKE_XEN is not set")?);
    let log = Log::start(None, false, false)?;
    let options = Options::default();
    if std::env::args().any(|a| a == "-U") {
        Daemon::take_over(options, log, |events| Ok(Box::new(Files::open(&dir, Some(events))?)))?.run()
    } else {
        Daemon::start(options, log, Some(Box::new(Files::open(&dir, None)?)))?.run()
    }
}
