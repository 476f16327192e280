//! `ferry-store`: a xenstore for people.

mod tree;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand, ValueEnum};
use serde_json::json;
use std::fs;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tree::{Change, Tree, diff, shown, shown_perms};
use xenstore_client::Client;

/// Look at a xenstore: list, watch, export, import, compare.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The daemon's socket [default: as xenstore's own tools find it]
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Machine-readable output
    #[arg(long, global = true)]
    json: bool,
    /// Colours
    #[arg(long, global = true, value_enum, default_value_t = Colour::Auto)]
    color: Colour,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Colour {
    Auto,
    Always,
    Never,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List nodes as a tree
    Ls {
        /// Where to begin
        #[arg(default_value = "/")]
        path: String,
        /// Show permissions
        #[arg(short, long)]
        permissions: bool,
        /// Whole paths, one a line
        #[arg(short, long)]
        full: bool,
    },
    /// Show changes as they happen
    Watch {
        /// Paths to watch
        #[arg(required = true)]
        paths: Vec<String>,
        /// End after so many events (the first one of each watch is not counted)
        #[arg(short = 'n', long)]
        count: Option<u64>,
        /// End after so many seconds
        #[arg(long)]
        seconds: Option<u64>,
    },
    /// Write nodes to a file, as a xenstore-migration stream
    Export {
        /// The file, or - for the standard output
        file: PathBuf,
        /// Where to begin
        #[arg(default_value = "/")]
        path: String,
    },
    /// Write a file's nodes to the store, in one transaction, with their permissions; others stay
    Import {
        /// The file, or - for the standard input
        file: PathBuf,
    },
    /// Compare two exports (or an export with the store); ends with 1 if they differ
    Diff {
        /// The first
        a: PathBuf,
        /// The second [default: the store, from the first one's topmost node on]
        b: Option<PathBuf>,
    },
}

struct Paint(bool);

impl Paint {
    fn with(&self, code: &str, s: &str) -> String {
        if self.0 { format!("\x1b[{code}m{s}\x1b[0m") } else { s.to_owned() }
    }

    fn name(&self, s: &str) -> String {
        self.with("34;1", s)
    }

    fn value(&self, s: &str) -> String {
        self.with("32", s)
    }

    fn dim(&self, s: &str) -> String {
        self.with("2", s)
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(e) => {
            eprintln!("ferry-store: {e:#}");
            ExitCode::from(2)
        }
    }
}

fn run() -> anyhow::Result<ExitCode> {
    let a = Args::parse();
    let colours = match a.color {
        Colour::Auto => std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
        c => c == Colour::Always,
    };
    let paint = Paint(colours && !a.json);
    let connect = || -> anyhow::Result<Client> {
        Ok(match &a.socket {
            Some(p) => Client::connect(p)?,
            None => Client::open()?,
        })
    };
    let mut out = std::io::stdout().lock();
    match &a.command {
        Command::Ls { path, permissions, full } => {
            let t = Tree::read(&mut connect()?, path)?;
            let r =
                if a.json { list_json(&t, &mut out) } else { list(&t, path, *permissions, *full, &paint, &mut out) };
            // `ferry-store ls | head` is fine.
            match r {
                Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => {}
                r => r?,
            }
        }
        Command::Watch { paths, count, seconds } => {
            watch(&mut connect()?, paths, *count, *seconds, a.json, &paint, &mut out)?;
        }
        Command::Export { file, path } => {
            let t = Tree::read(&mut connect()?, path)?;
            let bytes = t.to_stream()?;
            if file == Path::new("-") {
                out.write_all(&bytes)?;
            } else {
                fs::write(file, &bytes).with_context(|| format!("{}", file.display()))?;
                if a.json {
                    writeln!(out, "{}", json!({ "nodes": t.nodes.len(), "bytes": bytes.len() }))?;
                }
            }
        }
        Command::Import { file } => {
            let t = load(file)?;
            t.write(&mut connect()?)?;
            if a.json {
                writeln!(out, "{}", json!({ "nodes": t.nodes.len() }))?;
            }
        }
        Command::Diff { a: first, b } => {
            let x = load(first)?;
            let y = match b {
                Some(b) => load(b)?,
                None => {
                    let Some(top) = x.order.first() else { bail!("{} holds no nodes", first.display()) };
                    Tree::read(&mut connect()?, top)?
                }
            };
            let changes = diff(&x, &y);
            show_diff(&changes, a.json, &paint, &mut out)?;
            return Ok(ExitCode::from(u8::from(!changes.is_empty())));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn load(file: &Path) -> anyhow::Result<Tree> {
    let mut bytes = Vec::new();
    if file == Path::new("-") {
        std::io::stdin().lock().read_to_end(&mut bytes)?;
    } else {
        bytes = fs::read(file).with_context(|| format!("{}", file.display()))?;
    }
    Tree::from_stream(&bytes).with_context(|| format!("{}", file.display()))
}

fn list_json(t: &Tree, out: &mut impl Write) -> std::io::Result<()> {
    let nodes: Vec<_> = t
        .order
        .iter()
        .filter_map(|p| Some((p, t.nodes.get(p)?)))
        .map(|(p, n)| {
            let perms: Vec<String> = n.perms.iter().map(|p| p.to_string()).collect();
            json!({ "path": p, "value": String::from_utf8_lossy(&n.value), "perms": perms })
        })
        .collect();
    writeln!(out, "{}", serde_json::Value::Array(nodes))
}

fn list(
    t: &Tree,
    top: &str,
    permissions: bool,
    full: bool,
    paint: &Paint,
    out: &mut impl Write,
) -> std::io::Result<()> {
    let levels = |p: &str| if p == "/" { 0 } else { p.matches('/').count() };
    let base = levels(top);
    for p in &t.order {
        let Some(n) = t.nodes.get(p) else { continue };
        let name = if full || p == top { p.as_str() } else { p.rsplit('/').next().unwrap_or(p) };
        let indent = if full { 0 } else { 2 * (levels(p) - base) };
        let value = if n.value.is_empty() {
            String::new()
        } else {
            format!(" {} {}", paint.dim("="), paint.value(&shown(&n.value)))
        };
        let perms = if permissions {
            format!("  {}", paint.dim(&format!("({})", shown_perms(&n.perms))))
        } else {
            String::new()
        };
        writeln!(out, "{:indent$}{}{value}{perms}", "", paint.name(name))?;
    }
    Ok(())
}

fn watch(
    c: &mut Client,
    paths: &[String],
    count: Option<u64>,
    seconds: Option<u64>,
    json: bool,
    paint: &Paint,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    use xenstore_client::Nodes;
    let start = Instant::now();
    let end = seconds.map(|s| start + Duration::from_secs(s));
    for p in paths {
        c.watch(p, "ferry-store")?;
        // The one for the watch itself.
        c.next_event(None)?;
    }
    let mut left = count;
    while left != Some(0) {
        let wait = end.map(|e| e.saturating_duration_since(Instant::now()));
        let Some(e) = c.next_event(wait)? else { break };
        let value = if e.path.starts_with('@') { None } else { c.read_opt(&e.path)? };
        let at = start.elapsed().as_secs_f64();
        if json {
            let v = value.as_deref().map(String::from_utf8_lossy);
            writeln!(out, "{}", json!({ "seconds": at, "path": e.path, "value": v }))?;
        } else {
            let v = match &value {
                Some(v) => paint.value(&shown(v)),
                None if e.path.starts_with('@') => String::new(),
                None => paint.with("31", "removed"),
            };
            writeln!(out, "{} {} {v}", paint.dim(&format!("{at:9.3}")), paint.name(&e.path))?;
        }
        out.flush()?;
        left = left.map(|n| n - 1);
    }
    Ok(())
}

fn show_diff(
    changes: &std::collections::BTreeMap<String, Change>,
    json: bool,
    paint: &Paint,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    for (p, c) in changes {
        let (a, b) = match c {
            Change::Added(n) => (None, Some(n)),
            Change::Removed(n) => (Some(n), None),
            Change::Changed(n, m) => (Some(n), Some(m)),
        };
        if json {
            let side = |n: Option<&tree::Node>| {
                n.map(|n| json!({ "value": String::from_utf8_lossy(&n.value), "perms": shown_perms(&n.perms) }))
            };
            writeln!(out, "{}", json!({ "path": p, "a": side(a), "b": side(b) }))?;
            continue;
        }
        for (sign, code, n) in [("-", "31", a), ("+", "32", b)] {
            if let Some(n) = n {
                let line = format!("{sign} {p} = {} ({})", shown(&n.value), shown_perms(&n.perms));
                writeln!(out, "{}", paint.with(code, &line))?;
            }
        }
    }
    Ok(())
}
