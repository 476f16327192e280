//! `ferry host`: the host that this runs on.

use crate::exit::{Exit, Failure};
use crate::host_check::{Verdict, check, worst};
use anyhow::Result;
use serde_json::json;

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
    },
}

pub fn run(args: Args) -> Result<()> {
    match args.command {
        Command::Check { json } => run_check(json),
    }
}

fn run_check(json: bool) -> Result<()> {
    let findings = check();
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
