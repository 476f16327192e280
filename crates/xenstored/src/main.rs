//! `xenstored`: the options are those of the stock daemon, so that its start scripts and a live update from it work.

use anyhow::{Context, bail};
use clap::{ArgAction, Parser};
use std::path::PathBuf;
use xenstored::daemon::{Daemon, Devices, JournalPlace, log::Log, process, xen::Xen};
use xenstored::{Options, Quotas};

/// Ferry's xenstore daemon.
#[derive(Debug, Parser)]
#[command(version, disable_help_flag = true, disable_version_flag = true)]
struct Args {
    /// Don't connect with Xen: sockets only
    #[arg(short = 'D', long)]
    no_domain_init: bool,
    /// File for the daemon's process id
    #[arg(short = 'F', long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Print this text
    #[arg(short = 'H', long, action = ArgAction::Help)]
    help: Option<bool>,
    /// Print the version
    #[arg(long, action = ArgAction::Version)]
    version: Option<bool>,
    /// Stay in the foreground
    #[arg(short = 'N', long)]
    no_fork: bool,
    /// Print the daemon's process id
    #[arg(short = 'P', long)]
    output_pid: bool,
    /// Log every request to this file
    #[arg(short = 'T', long, value_name = "FILE")]
    trace_file: Option<PathBuf>,
    /// Limit of nodes of a domain
    #[arg(short = 'E', long, value_name = "NUMBER")]
    entry_nb: Option<u32>,
    /// Limit of a node's size, in bytes
    #[arg(short = 'S', long, value_name = "BYTES")]
    entry_size: Option<u32>,
    /// Limit of watches of a domain
    #[arg(short = 'W', long, value_name = "NUMBER")]
    watch_nb: Option<u32>,
    /// Limit of open transactions of a domain
    #[arg(short = 't', long, value_name = "NUMBER")]
    transaction: Option<u32>,
    /// Limit of permissions of a node
    #[arg(short = 'A', long, value_name = "NUMBER")]
    perm_nb: Option<u32>,
    /// Limit of a path's length, in bytes
    #[arg(short = 'M', long, value_name = "BYTES")]
    path_max: Option<u32>,
    /// Set another quota: transaction-nodes, memory, outstanding
    #[arg(short = 'Q', long, value_name = "WHAT=NUMBER")]
    quota: Vec<String>,
    /// Set a quota that only warns: memory
    #[arg(short = 'q', long, value_name = "WHAT=NUMBER")]
    quota_soft: Vec<String>,
    /// Set a time: watch-event (how long an event waits to be read), in seconds
    #[arg(short = 'w', long, value_name = "WHAT=SECONDS")]
    timeout: Vec<String>,
    /// No effect: the store can't get corrupted on a disk, as it is in memory
    #[arg(short = 'R', long)]
    no_recovery: bool,
    /// No effect: the store always is in memory
    #[arg(short = 'I', long, num_args = 0..=1, value_name = "on|off", default_missing_value = "on")]
    internal_db: Option<String>,
    /// Give the nodes of a dead domain to dom0 instead of deleting them
    #[arg(short = 'K', long)]
    keep_orphans: bool,
    /// Log every request
    #[arg(short = 'V', long)]
    verbose: bool,
    /// Take over from the daemon that executed this one
    #[arg(short = 'U', long)]
    live_update: bool,
    /// Folder of the state journal, from which the daemon comes back if it is killed; it should be in memory (tmpfs)
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Keep no state journal
    #[arg(long)]
    no_journal: bool,
    /// A second domain with all rights
    #[arg(short = 'p', long, value_name = "DOMID")]
    priv_domid: Option<u16>,
}

fn assignment(s: &str) -> anyhow::Result<(&str, u32)> {
    let (what, n) = s.split_once('=').with_context(|| format!("{s:?}: <what>=<number> is wanted"))?;
    Ok((what, n.parse().with_context(|| format!("{s:?}: not a number"))?))
}

fn options(a: &Args) -> anyhow::Result<Options> {
    let mut o = Options { keep_orphans: a.keep_orphans, ..Options::default() };
    o.privileged_domid = a.priv_domid.unwrap_or(0);
    let q: &mut Quotas = &mut o.quotas;
    let given = [
        (a.entry_nb, "nodes"),
        (a.entry_size, "node-size"),
        (a.watch_nb, "watches"),
        (a.transaction, "transactions"),
        (a.perm_nb, "permissions"),
        (a.path_max.map(|n| n.min(xenstore_wire::REL_PATH_MAX as u32)), "path-max"),
    ];
    for (v, name) in given {
        if let Some(v) = v {
            q.set(name.as_bytes(), v);
        }
    }
    for s in &a.quota {
        let (what, n) = assignment(s)?;
        if !q.set(what.as_bytes(), n) {
            bail!("there is no quota {what:?}");
        }
    }
    for s in &a.quota_soft {
        match assignment(s)? {
            ("memory", n) => o.soft_memory = n,
            (what, _) => bail!("there is no soft quota {what:?}"),
        }
    }
    for s in &a.timeout {
        match assignment(s)? {
            ("watch-event", n) => o.event_timeout_ms = u64::from(n) * 1000,
            (what, _) => bail!("there is no time {what:?}"),
        }
    }
    Ok(o)
}

fn main() -> anyhow::Result<()> {
    let a = Args::parse();
    let options = options(&a)?;
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
    daemon.run()
}
