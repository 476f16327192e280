//! Scenarios that a task writes, and their runs in the lab.

use crate::build;
use anyhow::{Context, Result};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// Two hosts with Ferry, `a` and `b`, of so much memory each (as a scenario has it).
pub fn two_hosts(memory: &str) -> String {
    ["a", "b"].map(|name| format!("[[host]]\nname = \"{name}\"\nferry = true\nmemory = \"{memory}\"\n")).join("\n")
}

/// Runs scenarios that are written to a folder of their own.
pub struct Runner {
    lab: PathBuf,
    folder: PathBuf,
}

impl Runner {
    /// Builds what the lab runs. The folder is one in `target`.
    pub fn new(folder: &str) -> Result<Self> {
        let lab = build::everything()?;
        let folder = build::root()?.join("target").join(folder);
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        Ok(Self { lab, folder })
    }

    /// Runs a scenario and gives the lab's report, which is there for a run that failed too. `seconds` is the longest that it may take.
    pub fn run(&self, name: &str, scenario: &str, seconds: usize) -> Result<Value> {
        let file = self.folder.join(format!("{name}.toml"));
        let json = file.with_extension("json");
        fs::write(&file, scenario).with_context(|| format!("write {}", file.display()))?;
        let _ = fs::remove_file(&json);
        Command::new(&self.lab)
            .args(["run", "--wait", "600", "--time-limit", &seconds.to_string(), "--json"])
            .args([&json, &file])
            .current_dir(build::root()?)
            .status()
            .with_context(|| format!("run {}", self.lab.display()))?;
        let text = fs::read(&json).context("the lab left no report: it was ended, or its hosts did not come up")?;
        serde_json::from_slice(&text).with_context(|| format!("read {}", json.display()))
    }
}
