//! `ferry-lab exec`: a script in a fresh lab.

use super::site;
use anyhow::{Context, Result, bail};
use clap::Args;
use lab::host::Host;
use lab_agent::frame::Kind;
use lab_agent::message::{Done, Exec, Failed, Request};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

#[derive(Debug, Args)]
pub struct Options {
    /// How many hosts to boot: a, b, c, d.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=4))]
    hosts: u8,
    #[command(flatten)]
    site: site::SiteOptions,
    /// Copy a file out of the first dom0 when the script is over.
    #[arg(long, value_name = "REMOTE:LOCAL")]
    get: Vec<String>,
    /// Run another script in another host's dom0 (b, c, d) at the same time; its output goes to HOST/script.log in the
    /// run's folder. It is killed when the first one ends. May be given once for each host.
    #[arg(long, value_name = "HOST=SCRIPT")]
    on: Vec<String>,
    /// The script: a file on this machine, run by bash in the first dom0 (host a).
    #[arg(value_name = "SCRIPT")]
    script: PathBuf,
    /// The script's arguments.
    #[arg(value_name = "ARGUMENT", last = true)]
    arguments: Vec<String>,
}

/// A pair of words with `separator` between them.
fn pair<'a>(option: &str, text: &'a str, separator: char) -> Result<(&'a str, &'a str)> {
    text.split_once(separator).with_context(|| format!("{option} {text}: there is no {separator:?} in it"))
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("read {}", path.display()));
    let script = read(&options.script)?;
    let gets = options.get.iter().map(|get| pair("--get", get, ':')).collect::<Result<Vec<_>>>()?;
    let mut others = Vec::new();
    for on in &options.on {
        let (name, script) = pair("--on", on, '=')?;
        others.push((name, read(Path::new(script))?));
    }
    let site = site::boot(&options.site, options.hosts)?;
    for (name, script) in others {
        let host =
            site.hosts.iter().find(|host| host.name() == name).with_context(|| format!("--on: no host {name}"))?;
        host.put(&script, "/root/script", 0o755)?;
        let argv = vec!["bash".to_owned(), "/root/script".to_owned()];
        let program = Exec { argv, background: Some("/var/log/script.log".to_owned()), ..Exec::default() };
        host.exec(&program)?;
    }
    let first = site.hosts.first().context("there is no host")?;
    first.put(&script, "/root/script", 0o755)?;
    let mut argv = vec!["bash".to_owned(), "/root/script".to_owned()];
    argv.extend(options.arguments.iter().cloned());
    let code = stream_out(first, Exec { argv, ..Exec::default() })?;
    for (remote, local) in gets {
        first.get_file(remote, Path::new(local))?;
    }
    for host in &site.hosts {
        if let Ok(log) = host.get("/var/log/script.log") {
            fs::write(host.directory().join("script.log"), log).context("keep a script's output")?;
        }
        host.collect_logs();
    }
    Ok(ExitCode::from(code))
}

/// Runs a program, passing its output through as it comes; gives its exit code.
fn stream_out(host: &Host, program: Exec) -> Result<u8> {
    let stream = host.open(&Request::Exec(program))?;
    stream.send_all(&[])?;
    loop {
        let Some(frame) = stream.next_while(Duration::from_millis(500), || host.check())? else { continue };
        match frame.kind {
            Kind::Data => {
                let mut out = std::io::stdout().lock();
                out.write_all(&frame.body).and_then(|()| out.flush()).context("write to standard output")?;
            }
            Kind::ErrorData => std::io::stderr().write_all(&frame.body).context("write to standard error")?,
            Kind::Done => {
                return Ok(match serde_json::from_slice(&frame.body).context("the agent's answer")? {
                    Done::Exited { code } => u8::try_from(code).unwrap_or(255),
                    Done::Signalled { signal } => u8::try_from(128 + signal).unwrap_or(255),
                    Done::TimedOut => 124,
                    Done::Started { .. } | Done::Ok => 0,
                });
            }
            Kind::Failed => {
                let failed: Failed = serde_json::from_slice(&frame.body).context("the agent's answer")?;
                bail!("{}: {}", host.name(), failed.reason);
            }
            _ => {}
        }
    }
}
