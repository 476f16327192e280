//! `ferry stream`: look into a saved domain or a recorded migration, judge it, take the GT records out.

use crate::exit::{Exit, Failure};
use anyhow::{Context, Result, bail};
use migration_stream::{Decoder, Encoder, Event, Layer, StreamError, check, show, strip};
use serde_json::json;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Tell what is in a stream: one line for each header and record
    Show {
        /// An `xl save` file, a libxl stream or a bare libxc image; - for standard input
        file: PathBuf,
        /// Everything in every record, as one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Judge a stream: every field, the order, what is missing; and write it again in memory to see that no byte changes
    Check {
        /// As for show
        file: PathBuf,
        /// The findings as one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Write a stream again without the records of a guest-transparent migration, as stock tools read it
    Strip {
        /// As for show
        file: PathBuf,
        /// The file to write; - for standard output
        out: PathBuf,
    },
}

pub fn run(args: Args) -> Result<()> {
    match args.command {
        Command::Show { file, json } => show(&file, json),
        Command::Check { file, json } => check(&file, json),
        Command::Strip { file, out } => strip(&file, &out),
    }
}

/// Bytes read from a stream at a time.
const PIECE: usize = 1 << 20;

fn open(file: &Path) -> Result<Box<dyn Read>> {
    if file == Path::new("-") {
        return Ok(Box::new(io::stdin().lock()));
    }
    Ok(Box::new(File::open(file).with_context(|| format!("can't open {}", file.display()))?))
}

/// Reads `file` and hands every event to `each`. The inner result is the end of the stream.
fn pump(file: &Path, mut each: impl FnMut(&Event<'_>) -> Result<()>) -> Result<Result<(), StreamError>> {
    let mut input = open(file)?;
    let mut decoder = Decoder::default();
    let mut piece = vec![0; PIECE];
    loop {
        let got = match input.read(&mut piece) {
            Ok(0) => return Ok(decoder.finish()),
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).with_context(|| format!("can't read {}", file.display())),
        };
        decoder.feed(&piece[..got]);
        loop {
            match decoder.next() {
                Ok(Some(event)) => each(&event)?,
                Ok(None) => break,
                Err(error) => return Ok(Err(error)),
            }
        }
    }
}

fn show(file: &Path, json: bool) -> Result<()> {
    let mut shower = show::Shower::new();
    let mut items = Vec::new();
    let mut out = BufWriter::new(io::stdout().lock());
    let mut tell = |item: show::Item| -> Result<()> {
        if json {
            items.push(item.json());
            return Ok(());
        }
        writeln!(out, "{}", item.line()).context("can't write to standard output")
    };
    let end = pump(file, |event| {
        for item in shower.event(event)? {
            tell(item)?;
        }
        Ok(())
    })?;
    if let Some(item) = shower.finish() {
        tell(item)?;
    }
    if json {
        serde_json::to_writer(&mut out, &json!({ "items": items, "error": end.as_ref().err().map(error_json) }))?;
        writeln!(out)?;
    }
    out.flush().context("can't write to standard output")?;
    end.with_context(|| file.display().to_string())
}

fn check(file: &Path, json: bool) -> Result<()> {
    let mut checker = check::Checker::new();
    let mut encoder = Encoder::new();
    let (mut records, mut bytes, mut changed) = (0u64, 0u64, Vec::new());
    let end = pump(file, |event| {
        checker.event(event);
        // What the typed form writes must be what was read; a body that does not parse is a finding already.
        let mut raw = Encoder::new();
        raw.event(event);
        let raw = raw.take();
        bytes += raw.len() as u64;
        if let Event::Record(record) = event {
            records += 1;
            match record.layer {
                Layer::Libxc => record.libxc().map(|typed| encoder.libxc(&typed)),
                Layer::Libxl | Layer::Xl => record.libxl().map(|typed| encoder.libxl(&typed)),
            }
            .unwrap_or_else(|_| encoder.event(event));
            if encoder.take() != raw {
                changed.push(record.offset);
            }
        }
        Ok(())
    })?;
    let purpose = match checker.purpose() {
        check::Purpose::Ordinary => "ordinary",
        check::Purpose::Transparent => "transparent",
    };
    let findings = checker.finish(end);
    let good = findings.is_empty() && changed.is_empty();
    if json {
        let report = json!({
            "good": good, "migration": purpose, "records": records, "bytes": bytes,
            "findings": findings.iter().map(error_json).collect::<Vec<_>>(), "changed_by_rewriting": changed,
        });
        println!("{report}");
    } else {
        for finding in &findings {
            println!("{finding}");
        }
        for offset in &changed {
            println!("byte {offset:#x}: this record would not be written again as it was");
        }
        if good {
            println!(
                "good: {records} records, {bytes} bytes, a stream for {purpose} migration, the same when written again"
            );
        }
    }
    if good {
        return Ok(());
    }
    let message = format!("{}: {} findings", file.display(), findings.len() + changed.len());
    Err(Failure { exit: Exit::Failed, message }.into())
}

fn strip(file: &Path, out: &Path) -> Result<()> {
    if file != Path::new("-")
        && let (Ok(a), Ok(b)) = (file.canonicalize(), out.canonicalize())
        && a == b
    {
        bail!("{} can't be written while it is read: give another file", out.display());
    }
    let mut output: Box<dyn Write> = if out == Path::new("-") {
        Box::new(io::stdout().lock())
    } else {
        Box::new(File::create(out).with_context(|| format!("can't make {}", out.display()))?)
    };
    let mut stripper = strip::Stripper::new();
    let end = pump(file, |event| {
        let bytes = stripper.event(event);
        output.write_all(&bytes).with_context(|| format!("can't write {}", out.display()))
    })?;
    output.flush().with_context(|| format!("can't write {}", out.display()))?;
    end.with_context(|| file.display().to_string())?;
    eprintln!("{} records removed", stripper.removed());
    Ok(())
}

fn error_json(error: &StreamError) -> serde_json::Value {
    json!({ "offset": error.offset, "where": error.place.to_string(), "what": error.kind.to_string() })
}
