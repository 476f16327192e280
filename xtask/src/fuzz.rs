//! `cargo xtask fuzz`: builds the targets of `fuzz/` for libFuzzer and runs them, with the pinned toolchain and without
//! cargo-fuzz. An address sanitizer, which needs a nightly compiler, is not among the flags: the code under test is safe Rust,
//! and what is looked for are panics, failed assertions, endless loops and memory without bound.

use crate::build;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What cargo-fuzz gives to rustc, but for the sanitizer: counters for each edge, and compared values for the mutator.
const FLAGS: &[&str] = &[
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// One input may take this long, in seconds, and this much memory, in MiB.
const INPUT_LIMITS: [&str; 2] = ["-timeout=25", "-rss_limit_mb=2048"];

/// What is run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Names of targets; all if there are none.
    targets: Vec<String>,
    /// How long each target is run.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Draw the same inputs as another run with this number; 0 draws new ones
    #[arg(long, default_value_t = 0)]
    seed: u32,
    /// Run this input once, for example one that made the target crash.
    #[arg(long)]
    input: Option<PathBuf>,
}

impl Options {
    /// Every target for so long, with the same inputs each time: a change is judged by what it changed.
    pub fn all(seconds: u32) -> Options {
        Options { targets: Vec::new(), seconds, seed: 1, input: None }
    }
}

/// Builds and runs.
pub fn run(options: &Options) -> Result<()> {
    let root = build::root()?;
    let known = targets(root)?;
    if let Some(wrong) = options.targets.iter().find(|name| !known.contains(name)) {
        bail!("there is no fuzz target {wrong}; there are {}", known.join(", "));
    }
    let wanted = if options.targets.is_empty() { known } else { options.targets.clone() };
    let home = target_dir(root).join("fuzz");
    let programs = compile(root, &home, &wanted)?;
    if let Some(input) = &options.input {
        let [name] = &wanted[..] else { bail!("an input belongs to one target: name it") };
        return build::run(Command::new(programs.join(name)).args(INPUT_LIMITS).arg(input))
            .with_context(|| format!("{name} fails on {}", input.display()));
    }
    // Two at a time: libFuzzer keeps one processor busy.
    let queue = Mutex::new(wanted.iter());
    let failures = Mutex::new(Vec::new());
    let next = || queue.lock().ok().and_then(|mut queue| queue.next());
    std::thread::scope(|scope| {
        for _ in 0..2.min(wanted.len()) {
            scope.spawn(|| {
                while let Some(name) = next() {
                    let job = Job {
                        name,
                        program: programs.join(name),
                        seeds: root.join("fuzz/seeds").join(name),
                        home: &home,
                    };
                    match job.run(options.seconds, options.seed) {
                        Ok(line) => println!("{line}"),
                        Err(error) => {
                            eprintln!("{error:#}");
                            failures.lock().iter_mut().for_each(|failures| failures.push(name.as_str()));
                        }
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap_or_default();
    if !failures.is_empty() {
        bail!("fuzzing failed: {}", failures.join(", "));
    }
    Ok(())
}

/// The targets' names: those of their files.
fn targets(root: &Path) -> Result<Vec<String>> {
    let folder = root.join("fuzz/fuzz_targets");
    let entries = fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
    let mut names: Vec<String> =
        entries.flatten().filter_map(|entry| Some(entry.path().file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    Ok(names)
}

fn target_dir(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |path| root.join(path))
}

/// Builds the targets; gives the folder of the programs.
fn compile(root: &Path, home: &Path, names: &[String]) -> Result<PathBuf> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let there =
        || Command::new(&compiler).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !there() {
        println!("libFuzzer is C++, and there is no {compiler} on this machine: installing Debian's package g++");
        let installed = Command::new("apt-get").args(["install", "--yes", "g++"]).status();
        if !installed.is_ok_and(|status| status.success()) || !there() {
            bail!("g++ could not be installed: install a C++ compiler (as root: apt-get install g++)");
        }
    }
    let mut cargo = build::cargo()?;
    cargo
        .args(["build", "--quiet", "--release", "--target", TARGET, "--manifest-path"])
        .arg(root.join("fuzz/Cargo.toml"));
    for name in names {
        cargo.args(["--bin", name]);
    }
    // With `--target`, the flags are not those of build scripts and procedural macros.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f")).env("CARGO_TARGET_DIR", home);
    build::run(&mut cargo).context("build the fuzz targets")?;
    Ok(home.join(TARGET).join("release"))
}

/// One target to be run.
struct Job<'a> {
    name: &'a str,
    program: PathBuf,
    seeds: PathBuf,
    home: &'a Path,
}

impl Job<'_> {
    /// Runs it; what it found is kept for the next run. Gives a line about it.
    fn run(&self, seconds: u32, seed: u32) -> Result<String> {
        let (corpus, crashes) = (self.home.join("corpus").join(self.name), self.home.join("crashes").join(self.name));
        for folder in [&corpus, &crashes] {
            fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        }
        let log = self.home.join(format!("{}.log", self.name));
        let file = File::create(&log).with_context(|| format!("make {}", log.display()))?;
        let status = Command::new(&self.program)
            .args(INPUT_LIMITS)
            .args(["-print_final_stats=1", &format!("-max_total_time={seconds}"), &format!("-seed={seed}")])
            .arg(format!("-artifact_prefix={}/", crashes.display()))
            .args([&corpus, &self.seeds])
            .stdin(Stdio::null())
            .stdout(file.try_clone().context("share the log")?)
            .stderr(file)
            .status()
            .with_context(|| format!("run {}", self.program.display()))?;
        let text = String::from_utf8_lossy(&fs::read(&log).context("read the log")?).into_owned();
        if !status.success() {
            bail!("{}", self.complaint(&text, &log));
        }
        let inputs = figure(&text, "stat::number_of_executed_units:").unwrap_or(0);
        if inputs == 0 {
            bail!("fuzz target {} ran no input; see {}", self.name, log.display());
        }
        let edges = figure(&text, "cov:").unwrap_or(0);
        Ok(format!("{}: {inputs} inputs in {seconds} s, {edges} edges reached, no crash", self.name))
    }

    /// What happened, with which input, and what to do about it.
    fn complaint(&self, log: &str, at: &Path) -> String {
        let why: Vec<&str> = log
            .lines()
            .filter(|line| {
                line.contains("panicked at") || line.contains("ERROR: libFuzzer") || line.starts_with("SUMMARY")
            })
            .collect();
        let input = log.lines().find_map(|line| Some(line.split_once("Test unit written to ")?.1.trim()));
        let again = match input {
            Some(input) => format!("the input is {input}; again: cargo xtask fuzz {} --input {input}", self.name),
            None => "it left no input".to_owned(),
        };
        format!("fuzz target {} failed\n  {}\n  {again}\n  its log is {}", self.name, why.join("\n  "), at.display())
    }
}

/// The last number behind a word in libFuzzer's output.
fn figure(log: &str, word: &str) -> Option<u64> {
    log.rsplit_once(word)?.1.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_built_and_has_a_seed() {
        let root = build::root().expect("the workspace");
        let manifest = fs::read_to_string(root.join("fuzz/Cargo.toml")).expect("its manifest");
        let names = targets(root).expect("the folder is there");
        assert!(names.len() >= 4, "{names:?}");
        for name in names {
            assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is not in fuzz/Cargo.toml");
            let seeds = fs::read_dir(root.join("fuzz/seeds").join(&name)).map_or(0, Iterator::count);
            assert!(seeds > 0, "{name} has no seed");
        }
    }

    #[test]
    fn a_crash_is_told_with_its_input() {
        let log = "INFO: Seed\n#9 NEW cov: 12 ft: 3\nthread '<unnamed>' panicked at a.rs:1:2:\nboom\n\
                   ==7== ERROR: libFuzzer: deadly signal\nTest unit written to /x/crash-1\nstat::number_of_executed_units: 77\n";
        let job = Job { name: "t", program: "p".into(), seeds: "s".into(), home: Path::new("h") };
        let text = job.complaint(log, Path::new("/l"));
        assert!(
            text.contains("panicked at a.rs:1:2") && text.contains("cargo xtask fuzz t --input /x/crash-1"),
            "{text}"
        );
        assert_eq!((figure(log, "cov:"), figure(log, "stat::number_of_executed_units:")), (Some(12), Some(77)));
    }
}
