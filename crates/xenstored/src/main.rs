//! `xenstored`: the options are those of the stock daemon, so that its start scripts and a live update from it work.

use clap::Parser;
use xenstored::daemon::{Args, Daemon, Devices, JournalPlace, log::Log, process, xen::Xen};

fn main() -> anyhow::Result<()> {
    let a = Args::parse();
    let options = a.options()?;
    let words = a.handed_on()?;
    process::return_large_blocks();
    // At a live update this process is in the background, or not, already.
    let background = if a.no_fork || a.live_update { None } else { Some(process::background()?) };
    let log = Log::start(a.trace_file.as_deref(), !a.no_fork, a.verbose)?;
    let _pid_file = a.pid_file.as_deref().map(process::pid_file).transpose()?;
    let place = JournalPlace { dir: a.state_dir.unwrap_or_else(xenstored::daemon::run_dir), on: !a.no_journal };
    let daemon = if a.live_update {
        Daemon::take_over(options, log, place, |events| Ok(Box::new(Xen::open(Some(events.into()))?)))
            .inspect_err(|e| tracing::error!("take-over failed: {e:#}"))?
    } else {
        let xen: Option<Box<dyn Devices>> = if a.no_domain_init { None } else { Some(Box::new(Xen::open(None)?)) };
        Daemon::start(options, log, xen, place).inspect_err(|e| tracing::error!("it can't start: {e:#}"))?
    };
    if a.output_pid {
        println!("{}", std::process::id());
    }
    if !a.live_update {
        process::notify_systemd();
    }
    if let Some(b) = background {
        b.ready()?;
    }
    tracing::info!("serving {}", xenstored::daemon::socket_path().display());
    daemon.handing_on(words).run()
}
