//! `ferry migrate`, `status`, `cancel`, `resolve`: what an operator says to the daemon.

use crate::config::{self, Config, Mode};
use crate::control::{Answer, Client, DryRun, Migrate, Request, Status};
use crate::exit::{Exit, Failure};
use anyhow::{Context, Result};
use migrate::report::{Phase, Place, Progress, Report, Silence};
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the configuration is.
#[derive(Debug, Clone, clap::Args)]
pub struct ConfigArg {
    /// The host's configuration
    #[arg(long, value_name = "FILE", default_value = config::DEFAULT_PATH)]
    pub config: PathBuf,
}

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name or domid
    domain: String,
    /// The destination: HOST or HOST:PORT for a transparent migration, what `xl migrate` takes for a co-operative one
    host: String,
    /// Whether the guest takes part; the configuration's mode if left out, which is cooperative unless it says otherwise
    #[arg(long)]
    mode: Option<Mode>,
    /// Longest that the guest may be away, milliseconds; given up, with the guest unharmed, if it can't be kept
    #[arg(long, value_name = "MS")]
    downtime_limit: Option<u64>,
    /// Longest that copying may take, seconds
    #[arg(long, value_name = "S")]
    max_time: Option<u64>,
    /// Check everything and tell the blackout to expect; touch nothing
    #[arg(long)]
    dry_run: bool,
    /// Write the report as JSON to standard output
    #[arg(long)]
    json: bool,
    /// Also write the report as JSON to this file (transparent mode only); it stays empty if there is none to write
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run")]
    report: Option<PathBuf>,
    /// Also write the stream, as it is sent, to this file on this host, for `ferry stream` (transparent mode only). It must not be there
    /// yet, holds the guest's memory, and makes the blackout longer by the time that writing takes
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run")]
    record: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigArg,
    /// More arguments for `xl migrate` (cooperative mode only)
    #[arg(last = true)]
    xl: Vec<String>,
}

pub fn run(args: Args) -> Result<()> {
    let config = Config::read(&args.config.config)?;
    match args.mode.unwrap_or(config.mode) {
        Mode::Cooperative => cooperative(&args),
        Mode::Transparent => transparent(&args, &config),
    }
}

/// Stock xl does it. What it prints is passed on; any failure of it is exit code 1.
fn cooperative(args: &Args) -> Result<()> {
    if args.dry_run {
        return Err(refused("a cooperative migration has no dry run; give --mode transparent"));
    }
    if args.downtime_limit.is_some() || args.max_time.is_some() {
        return Err(refused(
            "stock xl keeps no limits; give --mode transparent, or leave --downtime-limit and --max-time out",
        ));
    }
    if args.report.is_some() {
        return Err(refused("stock xl writes no report; give --mode transparent, or leave --report out"));
    }
    if args.record.is_some() {
        return Err(refused(
            "of stock xl's stream nothing is recorded; give --mode transparent, or leave --record out (`xl save` writes such a file)",
        ));
    }
    let status = Command::new("xl")
        .arg("migrate")
        .args(&args.xl)
        .args([&args.domain, &args.host])
        .status()
        .context("run xl migrate; is Xen's toolstack installed?")?;
    if status.success() {
        return Ok(());
    }
    Err(anyhow::anyhow!("domain {}: xl migrate ended with {status}", args.domain))
}

fn refused(message: &str) -> anyhow::Error {
    Failure { exit: Exit::Refused, message: message.into() }.into()
}

fn transparent(args: &Args, config: &Config) -> Result<()> {
    if !args.xl.is_empty() {
        return Err(refused("arguments for xl make no sense with --mode transparent"));
    }
    // That it can't be written is said before anything is touched.
    let mut file = args.report.as_deref().map(create).transpose()?;
    // The daemon makes it, and is in another folder.
    let record = args.record.as_deref().map(std::path::absolute).transpose().context("--record")?;
    let request = Migrate {
        domain: args.domain.clone(),
        host: args.host.clone(),
        downtime_ms: args.downtime_limit,
        max_time_s: args.max_time,
        dry_run: args.dry_run,
        record,
    };
    let mut client = Client::ask(&config.socket, &Request::Migrate(request))?;
    let mut line = Line::new();
    let mut answered = false;
    loop {
        match client.answer() {
            Ok(Some(Answer::Progress(progress))) => line.show(&progress),
            Ok(Some(Answer::Report(report))) => {
                answered = true;
                line.clear();
                let as_json = serde_json::to_string_pretty(&report)? + "\n";
                if args.json {
                    print!("{as_json}");
                } else if report.moved || !report.steps.is_empty() {
                    print_report(&report);
                }
                if let Some((file, path)) = &mut file {
                    file.write_all(as_json.as_bytes())
                        .with_context(|| format!("write the report to {}", path.display()))?;
                }
            }
            Ok(Some(Answer::DryRun(dry))) => {
                line.clear();
                return tell_dry_run(&dry, args.json);
            }
            Ok(Some(other)) => anyhow::bail!("the daemon answered something else than was asked: {other:?}"),
            Ok(None) if answered => return Ok(()),
            Ok(None) => {
                line.clear();
                let message =
                    "the daemon has gone away before the outcome was known; `ferry status` tells when it is back"
                        .into();
                return Err(Failure { exit: Exit::Unresolved, message }.into());
            }
            Err(error) => {
                line.clear();
                return Err(error);
            }
        }
    }
}

fn create(path: &Path) -> Result<(File, &Path)> {
    let file = File::create(path).with_context(|| format!("--report: create {}", path.display()))?;
    Ok((file, path))
}

fn tell_dry_run(dry: &DryRun, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(dry)?);
    } else if dry.refused.is_empty() {
        println!("domain {} ({}), {} MiB, with {}: can move", dry.name, dry.domid, dry.memory_mib, list(&dry.devices));
        println!(
            "  it dirties {} pages/s now; blackout to expect {} ms, limit {} ms",
            dry.dirty_rate, dry.expected_blackout_ms, dry.downtime_limit_ms
        );
        print_warnings(&dry.warnings);
    }
    if dry.refused.is_empty() {
        return Ok(());
    }
    let message = format!("domain {} ({}) can't move: {}", dry.name, dry.domid, dry.refused.join("; "));
    Err(Failure { exit: Exit::Refused, message }.into())
}

fn print_warnings(warnings: &[String]) {
    for warning in warnings {
        println!("  warning: {warning}");
    }
}

fn list(items: &[String]) -> String {
    if items.is_empty() { "no devices".into() } else { items.join(", ") }
}

/// One line that is written over, on a terminal only.
struct Line {
    terminal: bool,
    shown: bool,
}

impl Line {
    fn new() -> Line {
        Line { terminal: std::io::stderr().is_terminal(), shown: false }
    }

    fn show(&mut self, p: &Progress) {
        if !self.terminal {
            return;
        }
        self.shown = true;
        // Nobody reads a terminal that is gone.
        let _ = write!(std::io::stderr(), "\r\x1b[K{}", progress_text(p));
        let _ = std::io::stderr().flush();
    }

    fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

fn progress_text(p: &Progress) -> String {
    let mut text = match p.phase {
        Phase::Preflight => "checking both hosts".into(),
        Phase::Precopy => format!(
            "round {}: {} MiB sent, {} MiB of this round left, {} MiB/s, dirtied {} MiB/s, blackout to expect {} ms",
            p.round + 1,
            p.sent_bytes >> 20,
            p.remaining_pages >> 8,
            p.rate >> 20,
            p.dirty_rate >> 8,
            p.expected_blackout_ms
        ),
        Phase::Blackout => "the guest is paused; its last state is on the way".into(),
        Phase::Committed => "handed over; waiting for the destination to say that it runs".into(),
        Phase::RollingBack => "going back".into(),
        Phase::Leaving => "it runs there; removing what is left here".into(),
        Phase::Done => "done".into(),
    };
    if let Some(waiting) = &p.waiting_for {
        text = format!("{text} ({waiting})");
    }
    text
}

fn print_report(report: &Report) {
    if report.moved {
        println!("domain {} ({}) runs on {}", report.name, report.domid, report.peer);
        print_warnings(&report.warnings);
    }
    println!(
        "  {:.1} s in all, {} rounds, {:.1} MiB sent",
        report.total_ms as f64 / 1e3,
        report.rounds.len(),
        report.bytes as f64 / f64::from(1 << 20)
    );
    println!("  blackout {:.1} ms:", report.blackout_us as f64 / 1e3);
    for step in &report.steps {
        let place = match step.place {
            Place::Source => "source",
            Place::Network => "network",
            Place::Destination => "destination",
        };
        println!("  {:>10.1} ms  {place:<12} {}", step.micros as f64 / 1e3, step.name);
    }
    if let Some((Silence { before_us, after_us }, silence_us)) = report.silence.zip(report.silence_us()) {
        let ms = |us: u64| us as f64 / 1e3;
        println!("  {:.1} ms without a packet of the guest's:", ms(silence_us));
        println!("  {:>10.1} ms  {:<12} last packet to pause", ms(before_us), "source");
        println!("  {:>10.1} ms  {:<12} blackout", ms(report.blackout_us), "");
        println!("  {:>10.1} ms  {:<12} unpause to first packet", ms(after_us), "destination");
    }
}

// ---- status, cancel, resolve ----

#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// Write JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArg,
}

pub fn status(args: StatusArgs) -> Result<()> {
    let config = Config::read(&args.config.config)?;
    let mut client = Client::ask(&config.socket, &Request::Status)?;
    let Some(Answer::Status { migrations }) = client.answer()? else { anyhow::bail!("the daemon gave no status") };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&migrations)?);
    } else if migrations.is_empty() {
        println!("no migration is under way");
    } else {
        migrations.iter().for_each(print_status);
    }
    Ok(())
}

fn print_status(s: &Status) {
    let way = if s.direction == "out" { "to" } else { "from" };
    println!("{}  domain {} ({}) {way} {}: {}", s.id, s.name, s.domid, s.peer, s.state);
    if let Some(progress) = &s.progress {
        println!("    {}", progress_text(progress));
    } else if let Some(waiting) = &s.waiting_for {
        println!("    {waiting}");
    }
}

#[derive(Debug, clap::Args)]
pub struct CancelArgs {
    /// Id of the migration (`ferry status`), or name or domid of its domain
    which: String,
    #[command(flatten)]
    config: ConfigArg,
}

pub fn cancel(args: CancelArgs) -> Result<()> {
    let config = Config::read(&args.config.config)?;
    done(&config, &Request::Cancel { which: args.which })
}

#[derive(Debug, clap::Args)]
pub struct ResolveArgs {
    /// Id of the migration (`ferry status`), or name or domid of its domain
    which: String,
    /// I state that the other host is powered off, or cut from the guest's disks and network, and will not come back with the guest
    /// running. If that is not so, two hosts will run the guest and destroy its data
    #[arg(long)]
    peer_fenced: bool,
    #[command(flatten)]
    config: ConfigArg,
}

pub fn resolve(args: ResolveArgs) -> Result<()> {
    let config = Config::read(&args.config.config)?;
    done(&config, &Request::Resolve { which: args.which, peer_fenced: args.peer_fenced })
}

fn done(config: &Config, request: &Request) -> Result<()> {
    match Client::ask(&config.socket, request)?.answer()? {
        Some(Answer::Done) => Ok(()),
        other => anyhow::bail!("the daemon gave no answer that fits: {other:?}"),
    }
}
