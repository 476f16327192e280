//! `cargo xtask test`: everything that must hold, one check after another, each timed.

use crate::{build, extension, fuzz};
use anyhow::{Context, Result, bail};
use lab::cache::Cache;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// cargo-deny is built from source into the cache, once for each version.
const DENY: &str = "0.20.2";

/// How long each fuzz target is run; two run at once.
const FUZZ_SECONDS: u32 = 60;

/// One thing to check. The checks of the lab need most of the time and are left out by `--quick`, as is fuzzing.
struct Check {
    name: String,
    lab: bool,
    run: Box<dyn Fn() -> Result<()>>,
}

fn check(name: impl Into<String>, run: impl Fn() -> Result<()> + 'static) -> Check {
    Check { name: name.into(), lab: false, run: Box::new(run) }
}

fn lab_check(name: impl Into<String>, run: impl Fn() -> Result<()> + 'static) -> Check {
    Check { lab: true, ..check(name, run) }
}

/// The scenarios that every change must pass, each with the reason. `--all` runs the others too: they take longer, or show what these
/// show already, or don't hold every time yet. Times are those of two cores; all of `.ci/run` has 60 minutes.
const SCENARIOS: &[(&str, &str)] = &[
    ("control", "with no move every promise is kept, so what fails elsewhere is not the lab's doing; 2 min"),
    ("migrate-pvh", "the main job: every promise kept while a guest under load moves; 2 min"),
    (
        "migrate-faults",
        "a sample of `cargo xtask faults`: exactly one host runs the guest, and it notices nothing; 3 min",
    ),
    ("extension-bad-input", "wrong requests to the hypervisor part harm nobody; one host, 2 min"),
    ("baseline-save-restore", "the witness fails what stock Xen breaks, so it can see; one host, 2 min"),
];

/// Which checks are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// What needs no lab.
    Quick,
    /// What every change must pass.
    Usual,
    /// With every scenario.
    All,
}

/// Runs all checks, or all that need no lab. All are run even if one fails; any failure is an error at the end.
pub fn run(extent: Extent) -> Result<()> {
    let mut outcomes = Vec::new();
    let checks = checks(extent)?;
    for check in checks.iter().filter(|check| extent != Extent::Quick || !check.lab) {
        println!("\n=== {}", check.name);
        let since = Instant::now();
        let result = (check.run)();
        if let Err(error) = &result {
            eprintln!("{}: {error:#}", check.name);
        }
        outcomes.push((&check.name, result.is_ok(), since.elapsed()));
        if outcomes.len() == 1 && outcomes.iter().all(|(_, passed, _)| !passed) {
            // The first check compiles everything; what can't be compiled can't be tested.
            break;
        }
    }
    let failed =
        summary(&outcomes.iter().map(|(name, passed, took)| (name.as_str(), *passed, *took)).collect::<Vec<_>>());
    if failed > 0 {
        bail!("{failed} of the checks failed");
    }
    Ok(())
}

/// Prints what passed and how long it took; gives the number of failures.
fn summary(outcomes: &[(&str, bool, Duration)]) -> usize {
    println!("\n=== summary");
    for (name, passed, took) in outcomes {
        println!("{:<6} {:>7.1} s  {name}", if *passed { "pass" } else { "FAIL" }, took.as_secs_f64());
    }
    let failed = outcomes.iter().filter(|(_, passed, _)| !passed).count();
    println!("{} passed, {failed} failed", outcomes.len() - failed);
    failed
}

fn checks(extent: Extent) -> Result<Vec<Check>> {
    let mut checks = vec![
        check("lints (clippy, warnings denied)", || {
            cargo(&["clippy", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"])
        }),
        check("layout of the source (rustfmt)", || cargo(&["fmt", "--all", "--check"])),
        check("unit and model tests", || {
            // The same generated cases each time, so that a change is judged by what it changed. `PROPTEST_RNG_SEED` draws others.
            let seed = std::env::var("PROPTEST_RNG_SEED").unwrap_or_else(|_| "1".to_owned());
            build::run(build::cargo()?.args(["test", "--quiet", "--workspace"]).env("PROPTEST_RNG_SEED", seed))
        }),
        check("documentation builds, links hold", || {
            build::run(
                build::cargo()?
                    .args(["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"])
                    .env("RUSTDOCFLAGS", "--deny warnings --allow rustdoc::private-intra-doc-links"),
            )
        }),
        check("hypervisor extension: built and sound", || extension::build(true).map(drop)),
        check("scenario files are well formed", scenarios_are_read),
        lab_check("dependencies: licences, bans, sources (cargo-deny)", deny),
        lab_check("fuzz targets, a minute each", || fuzz::run(&fuzz::Options::all(FUZZ_SECONDS))),
        lab_check("the lab itself", || {
            build::everything()?;
            cargo(&["test", "--package", "lab", "--test", "lab", "--", "--ignored", "--test-threads=1"])
        }),
    ];
    for scenario in scenarios()? {
        let why = SCENARIOS.iter().find(|(name, _)| *name == scenario).map(|(_, why)| format!(": {why}"));
        if extent == Extent::All || why.is_some() {
            checks.push(lab_check(format!("scenario {scenario}{}", why.unwrap_or_default()), move || {
                lab(&["run", &scenario, "--wait", "600", "--time-limit", "3600"])
            }));
        }
    }
    Ok(checks)
}

fn cargo(arguments: &[&str]) -> Result<()> {
    build::run(build::cargo()?.args(arguments))
}

fn lab(arguments: &[&str]) -> Result<()> {
    build::run(Command::new(build::everything()?).args(arguments).current_dir(build::root()?))
}

/// The names of the project's own scenarios.
fn scenarios() -> Result<Vec<String>> {
    let folder = build::root()?.join("scenarios");
    let entries = std::fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|extension| extension == "toml"))
        .filter_map(|entry| Some(entry.path().file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    Ok(names)
}

/// Reads each scenario by the code that runs it, which is in this program already: nothing that the lab runs need be built.
fn scenarios_are_read() -> Result<()> {
    read_all(&build::root()?.join("scenarios"), &scenarios()?)
}

fn read_all(folder: &Path, names: &[String]) -> Result<()> {
    let read = |name: &String| lab::run::load(&folder.join(name).with_extension("toml")).map(drop);
    let broken: Vec<String> =
        names.iter().filter_map(|name| read(name).err()).map(|error| format!("{error:#}")).collect();
    if !broken.is_empty() {
        bail!("of {} scenarios, {} can't be read:\n{}", names.len(), broken.len(), broken.join("\n"));
    }
    Ok(())
}

fn deny() -> Result<()> {
    let home = Cache::open()?.path(format!("tools/cargo-deny-{DENY}"));
    let program = home.join("bin/cargo-deny");
    if !program.is_file() {
        println!("building cargo-deny {DENY} into the cache, once");
        let target = tempfile::tempdir().context("make a folder to build cargo-deny in")?;
        build::run(
            build::cargo()?
                .args(["install", "--quiet", "--locked", "--no-track", "cargo-deny", "--version", DENY, "--root"])
                .arg(&home)
                // Only speed of building matters.
                .args(["--profile", "dev"])
                .env("CARGO_PROFILE_DEV_DEBUG", "false")
                .env("CARGO_TARGET_DIR", target.path()),
        )?;
    }
    build::run(Command::new(&program).current_dir(build::root()?).args([
        "--offline",
        "check",
        "licenses",
        "bans",
        "sources",
    ]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_counted() {
        let second = Duration::from_secs(1);
        assert_eq!(summary(&[("a", true, second), ("b", false, second)]), 1);
        assert_eq!(summary(&[("a", true, second)]), 0);
    }

    #[test]
    fn a_broken_scenario_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("good.toml"), "about = \"x\"\n[[host]]\nname = \"a\"\n").expect("write");
        std::fs::write(folder.path().join("bad.toml"), "about = \"x\"\n[[host]]\nnom = \"a\"\n").expect("write");
        assert!(read_all(folder.path(), &["good".into()]).is_ok());
        let error = read_all(folder.path(), &["bad".into(), "good".into()]).expect_err("`nom` is no key").to_string();
        assert!(error.contains("of 2 scenarios, 1 can't") && error.contains("bad.toml:3:"), "{error}");
    }

    #[test]
    fn the_scenarios_for_every_change_are_there() {
        let found = scenarios().expect("the folder is there");
        assert!(SCENARIOS.iter().all(|(name, _)| found.iter().any(|found| found == name)), "{found:?}");
    }
}
