//! `ferry inspect`: a guest's whole state in the hypervisor, and what two such states differ in.

use crate::domain;
use crate::exit::{Exit, Failure};
use anyhow::{Context, Result, bail};
use hypervisor::inspect::{diff, inspect};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use xen_host::XenHost;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A running guest: its name, domid or UUID
    #[arg(required_unless_present = "diff", conflicts_with = "diff")]
    domain: Option<String>,

    /// Compare two states that were written with --json; ends with 1 if they differ in anything that should not
    #[arg(long, num_args = 2, value_names = ["A.json", "B.json"])]
    diff: Option<Vec<PathBuf>>,

    /// Don't hold the guest while looking: what is read may not fit together
    #[arg(long, conflicts_with = "diff")]
    no_pause: bool,

    /// Everything, as one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    match (&args.diff, &args.domain) {
        (Some(files), _) => match files.as_slice() {
            [a, b] => run_diff(a, b, args.json),
            _ => bail!("--diff takes two files"),
        },
        (None, Some(name)) => {
            let hv = XenHost::open()?;
            let dom = domain::find(&hv, name)?;
            let state = inspect(&hv, dom, !args.no_pause)?;
            if args.json {
                println!("{}", serde_json::to_string(&state)?);
            } else {
                print!("{state}");
            }
            Ok(())
        }
        (None, None) => bail!("name a domain, or two files with --diff"),
    }
}

fn read(file: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(file).with_context(|| format!("can't read {}", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not what `ferry inspect --json` writes", file.display()))
}

fn run_diff(a: &Path, b: &Path, json: bool) -> Result<()> {
    let differences = diff(&read(a)?, &read(b)?);
    let unexpected = differences.iter().filter(|d| d.expected.is_none()).count();
    if json {
        println!("{}", json!({"unexpected": unexpected, "differences": differences}));
    } else {
        for d in &differences {
            println!("{d}");
        }
    }
    if unexpected > 0 {
        let message = format!("the states differ in {unexpected} places that should be equal");
        return Err(Failure { exit: Exit::Failed, message }.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::code_of;
    use std::fs;

    #[test]
    fn a_difference_that_should_not_be_is_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let a = write("a", r#"{"vm_assist":32,"timing":{"paused_us":1}}"#);
        let b = write("b", r#"{"vm_assist":32,"timing":{"paused_us":2}}"#);
        let c = write("c", r#"{"vm_assist":0,"timing":{"paused_us":1}}"#);
        let no = write("no", "{");
        run_diff(&a, &b, false).unwrap();
        assert_eq!(code_of(&run_diff(&a, &c, true).unwrap_err()), Exit::Failed);
        assert!(run_diff(&a, &no, false).unwrap_err().to_string().contains("inspect --json"));
    }
}
