//! What can't work ends `ferry-lab` with one clear message and exit code 1, and leaves nothing. Needs no emulated host: all of it is found
//! before one is started.

use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

const GOOD: &str = "about = \"x\"\n[[host]]\nname = \"a\"\n[[disk]]\nname = \"lun\"\n";

struct Ended {
    output: Output,
    said: String,
}

/// Runs the program in a folder of its own and checks what holds for all bad input.
fn refused(command: &mut Command, folder: &Path) -> Result<Ended> {
    let output = command
        .env("TMPDIR", folder.join("tmp"))
        .env("FERRY_CACHE", folder.join("cache"))
        .current_dir(folder)
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1), "exit code {:?}: {said}", output.status.code());
    ensure!(said.matches("ferry-lab: ").count() == 1, "not one message: {said}");
    // Nothing but what belongs to it comes after it: the line of a scenario, a tool's words.
    let after = said.split_once("ferry-lab: ").map_or("", |(_, after)| after);
    ensure!(after.lines().skip(1).all(|line| line.is_empty() || line.starts_with("    ")), "not the last: {said}");
    ensure!(fs::read_dir(folder.join("tmp"))?.next().is_none(), "something is left in the scratch folder");
    Ok(Ended { output, said })
}

fn folder() -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    fs::create_dir(folder.path().join("tmp"))?;
    fs::create_dir(folder.path().join("cache"))?;
    fs::write(folder.path().join("x.toml"), GOOD)?;
    Ok(folder)
}

fn lab(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferry-lab"));
    command.args(arguments);
    command
}

#[test]
fn an_error_in_a_scenario_names_file_line_and_key() -> Result<()> {
    for (text, line, key) in [
        ("uptime = \"3s\"\n", 6, "uptime"),
        ("delay = \"soon\"\n", 6, "soon"),
        ("[[step]]\ncut = { host = \"z\" }\n", 7, "there is no host \"z\""),
        ("[[step]\n", 6, ""),
    ] {
        let folder = folder()?;
        fs::write(folder.path().join("bad.toml"), format!("{GOOD}{text}"))?;
        let ended = refused(&mut lab(&["run", "bad.toml"]), folder.path())?;
        ensure!(ended.said.contains(&format!("bad.toml:{line}:")) && ended.said.contains(key), "{}", ended.said);
        ensure!(ended.output.stdout.is_empty() && !folder.path().join("target").exists());
    }
    let folder = folder()?;
    let ended = refused(&mut lab(&["run", "none.toml"]), folder.path())?;
    ensure!(ended.said.contains("none.toml"), "{}", ended.said);
    Ok(())
}

#[test]
fn a_report_that_cant_be_written_is_said_at_once() -> Result<()> {
    let folder = folder()?;
    let ended = refused(&mut lab(&["run", "x.toml", "--json", "no/folder/x.json"]), folder.path())?;
    ensure!(ended.said.contains("no/folder/x.json"), "{}", ended.said);
    Ok(())
}

/// Tools that stand for apt's, in a folder that is all of the program's PATH.
fn tools(folder: &Path, tools: &[(&str, &str)]) -> Result<std::path::PathBuf> {
    let path = folder.join("bin");
    fs::create_dir_all(&path)?;
    for (name, script) in tools {
        let file = path.join(name);
        fs::write(&file, format!("#!/bin/sh\n{script}\n"))?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    }
    Ok(path)
}

#[test]
fn a_package_that_cant_be_had_is_named() -> Result<()> {
    let nothing: &[(&str, &str)] = &[];
    let all = |update: &'static str| [("apt-get", update), ("apt-cache", "exit 0"), ("dpkg-deb", "exit 0")];
    let offline = "[ \"$*\" = --version ] || { echo 'E: Could not resolve host' >&2; exit 100; }";
    for (path, texts) in [
        (nothing, ["apt-get is not on this machine", "Debian"]),
        (&all(offline), ["package lists can't be fetched", "Could not resolve host"]),
        // The archive has no version of it at all.
        (&all("exit 0"), ["is not to be had in the pinned version", "qemu-system-x86"]),
    ] {
        let folder = folder()?;
        let bin = tools(folder.path(), path)?;
        let ended = refused(lab(&["run", "x.toml"]).env("PATH", bin), folder.path())?;
        ensure!(texts.iter().all(|text| ended.said.contains(text)), "{texts:?}: {}", ended.said);
        ensure!(!folder.path().join("target/lab-run/x").exists(), "the run began");
        let trees = folder.path().join("cache/trees");
        ensure!(!trees.exists() || fs::read_dir(trees)?.next().is_none(), "half a tree is left in the cache");
    }
    Ok(())
}

/// Runs the program with a file system of 8 MiB at a folder, in a mount namespace of its own. `None`: this machine lets nobody make one.
fn on_a_full_disk(folder: &Path, full: &str, arguments: &[&str]) -> Result<Option<Ended>> {
    fs::create_dir_all(folder.join(full))?;
    // Without tools to fetch packages with, in case that the full disk is not seen.
    let script = "mount -t tmpfs -o size=8m full \"$0\" && export PATH=/nonexistent && exec \"$@\"";
    let mut may = Command::new("unshare");
    may.args(["--user", "--map-root-user", "--mount", "sh", "-c", script]).arg(folder.join(full)).arg("/bin/true");
    if !may.output().is_ok_and(|output| output.status.success()) {
        return Ok(None);
    }
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script]).arg(folder.join(full));
    command.arg(env!("CARGO_BIN_EXE_ferry-lab")).args(arguments);
    refused(&mut command, folder).map(Some).with_context(|| format!("with {full} full"))
}

#[test]
fn a_full_disk_is_named() -> Result<()> {
    for (full, remedy) in [("cache", "FERRY_CACHE"), ("logs", "--run-dir"), ("tmp", "TMPDIR")] {
        let folder = folder()?;
        let arguments = ["run", "x.toml", "--run-dir", "logs"];
        let Some(ended) = on_a_full_disk(folder.path(), full, &arguments)? else {
            eprintln!("not tried: no user may mount anything on this machine");
            return Ok(());
        };
        let at = folder.path().canonicalize()?.join(full);
        ensure!(ended.said.contains(remedy) && ended.said.contains("MiB free"), "{}", ended.said);
        ensure!(full == "logs" || ended.said.contains(&at.display().to_string()), "{}", ended.said);
    }
    Ok(())
}
