//! `cargo xtask bench blackout`: how long an idle guest is away, by its peer, by its own clock and by Ferry's report, for a small
//! and a large guest, by `ferry migrate` and by stock `xl migrate` in one run.
//!
//! Figures and ratios are printed, and with `--check` what is promised of them is held against them. [`table`] makes them from the lab's report.

mod table;

use crate::generated::{self, Runner};
use anyhow::{Context, Result};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

/// What is run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Moves of each guest by ferry migrate, there, back, there …
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=20))]
    moves: usize,
    /// Moves of each guest by xl migrate, after those
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=5))]
    stock: usize,
    /// Exit with 1 if a figure is not as promised; best on a machine with nothing else to do
    #[arg(long)]
    check: bool,
    /// Write the figures as JSON too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A guest of the bench.
struct Size {
    name: &'static str,
    memory: &'static str,
    title: &'static str,
    /// The longest that one move may take, seconds: Ferry's, and the stock one, which sends all memory.
    limits: [usize; 2],
}

const SIZES: [Size; 2] = [
    Size { name: "small", memory: "256M", title: "256 MiB", limits: [300, 400] },
    Size { name: "large", memory: "1G", title: "1 GiB", limits: [600, 1200] },
];

/// Of each host: dom0 has 1 GiB, and both guests must fit beside it.
const HOST_MEMORY: &str = "2816M";

/// An idle guest, but for a datagram each 10 ms, whose gap is what the peer times, and a clock that is read as often.
const WORKLOAD: &str = "\
[guest.workload]
udp = 100
clock-ms = 10
tcp = 0
journal = 0
rewrite = 0
mem-mib = 0
churn-kib = 0
store = 0
watch = 0
tx-hold-ms = 0
events = 0
look-ms = 0
regs = 0
tick-duty = 0
[guest.peer]
tcp = 0
udp = 0
quiet = 0
";

/// Seconds for what comes before the first move of a guest.
const BEFORE: usize = 300;
/// Seconds for the looks at the guest around a move.
const AROUND: usize = 120;

fn seconds(options: &Options) -> usize {
    let guest = |size: &Size| {
        let [ferry, stock] = size.limits.map(|limit| limit + AROUND);
        BEFORE + options.moves * ferry + options.stock * stock
    };
    BEFORE + SIZES.iter().map(guest).sum::<usize>()
}

/// The guests take turns: what makes the hosts slower or faster as the run goes on does so to both. The other one idles meanwhile.
fn scenario(options: &Options) -> String {
    let mut text = format!(
        "about = \"Idle guests of two sizes, moved by ferry migrate and then by xl migrate: how long are they away?\"\n\
         time-limit = \"{}s\"\n\n{}",
        seconds(options),
        generated::two_hosts(HOST_MEMORY)
    );
    for (number, size) in SIZES.iter().enumerate() {
        let Size { name, memory, .. } = size;
        let _ = write!(
            text,
            "\n[[disk]]\nname = \"lun-{name}\"\n\n[[guest]]\nname = \"{name}\"\nmemory = \"{memory}\"\n{WORKLOAD}\
             [[guest.vif]]\nmac = \"00:16:3e:f0:00:{number:02x}\"\n[[guest.vbd]]\ndisk = \"lun-{name}\"\n"
        );
    }
    let mut step = |what: String| {
        let _ = write!(text, "\n[[step]]\n{what}\n");
    };
    for Size { name, .. } in &SIZES {
        step(format!("create = {{ guest = \"{name}\", on = \"a\" }}"));
        step(format!("wait = {{ guest = \"{name}\", reports = 3, limit = \"180s\" }}"));
    }
    step("sleep = \"10s\"".to_owned());
    let ferry = std::iter::repeat_n(("ferry", 0), options.moves);
    let stock = std::iter::repeat_n(("xl", 1), options.stock);
    for ((tool, limit), to) in ferry.chain(stock).zip(["b", "a"].into_iter().cycle()) {
        for Size { name, limits, .. } in &SIZES {
            let limit = limits[limit];
            step(format!("migrate = {{ guest = \"{name}\", to = \"{to}\", tool = \"{tool}\", limit = \"{limit}s\" }}"));
            step(format!("wait = {{ guest = \"{name}\", reports = 3 }}"));
        }
    }
    for Size { name, .. } in &SIZES {
        step(format!("destroy = {{ guest = \"{name}\" }}"));
    }
    text
}

/// Runs it and prints the table; exit code 1 if a move is missing, or a promise broken that is checked.
pub fn run(options: &Options) -> Result<ExitCode> {
    let report = Runner::new("bench")?.run("blackout", &scenario(options), seconds(options))?;
    let figures = table::Figures::read(&report)?;
    print!("\n{}\n", figures.text());
    let judged = figures.judged();
    judged.iter().for_each(|promise| println!("{promise}"));
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&figures.json())? + "\n";
        std::fs::write(file, text).with_context(|| format!("write {}", file.display()))?;
    }
    let whole = figures.count() == SIZES.len() * (options.moves + options.stock);
    if !whole {
        eprintln!("not every move was made: {}", report["error"].as_str().unwrap_or("the lab's report says no reason"));
    }
    let broken = options.check && judged.iter().any(|promise| !promise.holds());
    Ok(ExitCode::from(u8::from(!whole || broken)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lab::scenario::{MigrateTool, Scenario, Step};
    use std::path::Path;

    #[test]
    fn the_scenario_is_one_that_the_lab_reads() {
        let options = Options { moves: 5, stock: 2, check: false, json: None };
        let read = Scenario::parse(Path::new("blackout.toml"), &scenario(&options)).expect("a good scenario");
        for size in &SIZES {
            let moves: Vec<(&str, MigrateTool)> = read
                .steps
                .iter()
                .filter_map(|step| match step.get_ref() {
                    Step::Migrate(m) if m.guest.get_ref() == size.name => Some((m.to.get_ref().as_str(), m.tool)),
                    _ => None,
                })
                .collect();
            let (ferry, xl) = (MigrateTool::Ferry, MigrateTool::Xl);
            let want = [("b", ferry), ("a", ferry), ("b", ferry), ("a", ferry), ("b", ferry), ("a", xl), ("b", xl)];
            assert_eq!(moves, want, "{}", size.name);
        }
        let turns: Vec<&str> = read
            .steps
            .iter()
            .filter_map(|step| match step.get_ref() {
                Step::Migrate(m) => Some(m.guest.get_ref().as_str()),
                _ => None,
            })
            .collect();
        assert!(turns.chunks(2).all(|pair| pair == ["small", "large"]), "the guests take turns: {turns:?}");
        let [small, large] = [&read.guests[0], &read.guests[1]];
        assert_eq!((small.memory.as_mib(), large.memory.as_mib()), (256, 1024));
        let room = read.hosts[1].memory.as_mib() - read.hosts[1].dom0_memory.as_mib();
        assert!(room >= 1024 + 256 + 300, "Xen and both guests need more than {room} MiB");
    }
}
