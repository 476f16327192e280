//! `ferry host`: the host that this runs on, and the extension of its hypervisor.

use crate::commands::migrate::ConfigArg;
use crate::config::Config;
use crate::exit::{Exit, Failure};
use crate::host_check::{Verdict, check, worst};
use anyhow::{Result, bail};
use hypervisor::Hypervisor;
use serde_json::json;
use std::path::{Path, PathBuf};
use xen_host::{XenHost, livepatch};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Tell what this host has and lacks for moving guests, and what to do about it; changes nothing
    Check {
        /// The findings as one JSON object
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Load the hypervisor extension; the guests run on and notice nothing
    Load {
        /// The extension's file; without, the one for this hypervisor's build in /usr/lib/ferry/hypervisor-ext
        file: Option<PathBuf>,
    },
    /// Take the hypervisor extension out again
    Unload,
}

/// Where packages put the extension: one file for each build of Xen, `ferry-BUILD-ID.livepatch`.
const EXTENSIONS: &str = "/usr/lib/ferry/hypervisor-ext";

pub fn run(args: Args) -> Result<()> {
    match args.command {
        Command::Check { json, config } => run_check(json, &Config::read(&config.config)?),
        Command::Load { file } => load(file),
        Command::Unload => unload(),
    }
}

fn load(file: Option<PathBuf>) -> Result<()> {
    let host = XenHost::open()?;
    let build_id = host.host_info()?.build_id;
    let file = file.unwrap_or_else(|| Path::new(EXTENSIONS).join(format!("ferry-{build_id}.livepatch")));
    let payload = std::fs::read(&file).map_err(|e| Failure {
        exit: Exit::Refused,
        message: format!(
            "{}: {e}; the extension is made for one build of Xen, and this one's build id is {build_id}",
            file.display()
        ),
    })?;
    host.load_payload(livepatch::NAME, &payload)?;
    match host.extension()? {
        Some(info) => println!("loaded for Xen build {build_id}, interface {}", info.version),
        None => bail!(
            "{} was loaded, but does not answer: it is not Ferry's extension; `ferry host unload`",
            file.display()
        ),
    }
    Ok(())
}

fn unload() -> Result<()> {
    XenHost::open()?.unload_payload(livepatch::NAME)?;
    println!("unloaded");
    Ok(())
}

fn run_check(json: bool, config: &Config) -> Result<()> {
    let findings = check(config);
    let worst = worst(&findings);
    if json {
        println!("{}", json!({"verdict": worst, "findings": findings}));
    } else {
        for finding in &findings {
            println!("{finding}");
        }
    }
    if worst == Verdict::Missing {
        let missing: Vec<_> = findings.iter().filter(|f| f.verdict == worst).map(|f| f.subject).collect();
        let message = format!("this host can't move guests yet; missing: {}", missing.join(", "));
        return Err(Failure { exit: Exit::Refused, message }.into());
    }
    Ok(())
}
