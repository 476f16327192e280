//! A guest's init that notices what a migration should not let it notice. See `docs/witness.md`.
//!
//! As process 1 it mounts, loads modules and sets the network up by itself. Started as a plain program it does none of
//! that, takes its settings from its arguments, and says what it cannot look at.

mod aio;
mod block;
mod boot;
mod clock;
mod context;
mod counters;
mod crowd;
mod events;
mod kmsg;
mod look;
mod memory;
mod pipeline;
mod registers;
mod reporter;
mod store;
mod system;
mod traffic;
mod xen;

use context::{Context, Phase, lock};
use reporter::Reporter;
use std::io::BufRead;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use witness::config::{AtEnd, Config, ConsoleLevel};
use witness::report::{Body, Final, Hello};
use witness::wire::{Command, UNKNOWN};

/// How long the guest is left alone after set-up, so that drivers have said what they have to say.
const SETTLE: Duration = Duration::from_secs(3);

const HELP: &str = "\
witness: notices what a migration should not let a guest notice

As a guest's init (process 1) it takes its settings from the kernel command line. As a plain program:

    witness [--help] [witness.KEY=VALUE ...]

It then sets nothing up, and reports what it can see on its standard output. The keys are in docs/witness.md.
";

/// True for process 1.
pub fn is_init() -> bool {
    std::process::id() == 1
}

/// Starts a thread. A guest too small for it goes on without: `None`, and a line on the console.
pub fn spawn(name: &str, f: impl FnOnce() + Send + 'static) -> Option<JoinHandle<()>> {
    // Small stacks: there are a few dozen threads in a guest of a few dozen MiB.
    let exact = name.starts_with("clock");
    let body = move || {
        if !exact {
            // Timers that come together are one wake-up.
            // SAFETY: PR_SET_TIMERSLACK takes a number of ns and concerns the calling thread only.
            unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 20_000_000 as libc::c_ulong) };
        }
        f();
    };
    let thread = std::thread::Builder::new().name(name.into()).stack_size(256 * 1024).spawn(body);
    thread.map_err(|e| eprintln!("witness: thread {name}: {e}")).ok()
}

fn main() -> ExitCode {
    if !is_init() && std::env::args().any(|a| a == "--help" || a == "-h") {
        print!("{HELP}");
        return ExitCode::SUCCESS;
    }
    // The kernel runs these when the toolstack wants the guest to end (`control/shutdown`).
    match std::env::args().next().as_deref().and_then(|name| name.rsplit('/').next()) {
        Some("poweroff") => return ended(boot::power_off()),
        Some("reboot") => return ended(boot::reboot()),
        _ => {}
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!("witness: cannot go on: {e}");
            if is_init() {
                // An init that ends makes the kernel panic, and the reason would scroll away.
                loop {
                    std::thread::sleep(Duration::from_secs(60));
                    println!("witness: stopped: {e}");
                }
            }
            ExitCode::FAILURE
        }
    }
}

/// The guest should have ended and goes on.
fn ended(error: std::io::Error) -> ExitCode {
    println!("witness: {error}");
    ExitCode::FAILURE
}

fn settings() -> Result<Config, String> {
    let line = if is_init() {
        std::fs::read_to_string("/proc/cmdline").map_err(|e| format!("/proc/cmdline: {e}"))?
    } else {
        let args: Vec<String> = std::env::args().skip(1).collect();
        if let Some(bad) = args.iter().find(|a| !(a.starts_with("witness.") && a.contains('='))) {
            return Err(format!("{bad}: not of the form witness.KEY=VALUE; see --help"));
        }
        args.join(" ")
    };
    Config::from_command_line(&line).map_err(|e| e.to_string())
}

/// A number that no other run has.
fn draw_run() -> u64 {
    let mut bytes = [0; 8];
    // SAFETY: room for as many bytes as are asked for.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    if n == 8 { u64::from_le_bytes(bytes) } else { clock::read_once().tsc ^ clock::read_once().real_ns.rotate_left(32) }
}

fn run() -> Result<(), String> {
    let mut wrong = Vec::new();
    if is_init() {
        boot::mount_all()?;
        let dir = ["/lib/modules", "/modules"].into_iter().map(Path::new).find(|d| d.is_dir());
        wrong.extend(dir.map(boot::load_modules).unwrap_or_default());
    }
    let config = settings()?;
    if is_init() {
        wrong.extend(boot::set_up_network(&config));
    }
    let ctx = Arc::new(Context::new(config, draw_run()));
    let start = Instant::now();
    Reporter::start(&ctx);
    for w in &wrong {
        ctx.reporter.say(&format!("witness: {w}"));
    }
    let vcpus = std::thread::available_parallelism().map_or(1, |n| n.get());

    let (commands, received) = mpsc::channel();
    wrong.extend(kmsg::start(&ctx).err());
    clock::start(&ctx, vcpus);
    if is_init() {
        boot::wait_for("/dev/xen/xenbus", Duration::from_secs(5));
    }
    let xen = Arc::new(Mutex::new(look::XenSide::open(ctx.config.seed, vcpus as u32)));
    wrong.extend(lock(&xen).absent());
    wrong.extend(events::start(&ctx).err().map(|e| format!("own event channel: {e}")));
    // Held until the end of the program.
    let _crowd = crowd::Crowd::open(ctx.config.ports).unwrap_or_else(|e| {
        wrong.push(e);
        None
    });
    wrong.extend(store::start(&ctx).err());
    let disks = block::start(&ctx).unwrap_or_else(|e| {
        wrong.push(e);
        Vec::new()
    });
    let memory = memory::start(&ctx);
    registers::start(&ctx);
    wrong.extend(traffic::start(&ctx, &commands));
    read_console(&ctx, &commands);

    // The loads start only now, all together, and what was noticed so far is forgotten.
    let settled = Instant::now() + SETTLE;
    while Instant::now() < settled || !lock(&ctx.clocks).calibrated() {
        std::thread::sleep(Duration::from_millis(100));
    }
    lock(&ctx.clocks).forget();
    lock(&ctx.kernel_log).forget();
    look::start(&ctx, &xen);
    ctx.set_phase(Phase::Running);
    ctx.send(Body::Hello(Hello {
        version: env!("CARGO_PKG_VERSION").into(),
        kernel: system::kernel_release(),
        settings: ctx.config.command_line(),
        vcpus: vcpus as u32,
        absent: wrong,
    }));
    start_beat(&ctx, start);
    ctx.send(Body::Snapshot(Box::new(look::snapshot(&ctx, &xen, "start"))));
    obey(&ctx, &xen, &disks, memory.as_deref(), &received)
}

fn start_beat(ctx: &Arc<Context>, start: Instant) {
    let c = ctx.clone();
    spawn("beat", move || {
        let mut pacer = context::Pacer::every(Duration::from_millis(c.config.beat_ms.into()));
        loop {
            pacer.wait_always();
            c.counters.up_ms.set(u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX));
            c.send(Body::Beat(c.counters.beat(c.loads())));
        }
    });
}

/// Lines typed on the console.
fn read_console(ctx: &Arc<Context>, commands: &Sender<(Command, Option<SocketAddr>)>) {
    if ctx.config.console == ConsoleLevel::All {
        boot::no_echo();
    }
    let (c, commands) = (ctx.clone(), commands.clone());
    spawn("typed", move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { continue };
            match Command::parse(&line) {
                Some(command) => {
                    c.reporter.say(command.answer());
                    let _ = commands.send((command, None));
                }
                None if line.trim().is_empty() => {}
                None => c.reporter.say(UNKNOWN),
            }
        }
    });
}

/// Obeys commands and the clock until the end.
fn obey(
    ctx: &Context,
    xen: &Mutex<look::XenSide>,
    disks: &[Arc<Mutex<block::Rewriter>>],
    memory: Option<&Mutex<memory::Region>>,
    received: &mpsc::Receiver<(Command, Option<SocketAddr>)>,
) -> Result<(), String> {
    let start = Instant::now();
    let end = Duration::from_secs(ctx.config.end_s.into());
    let period = Duration::from_secs(ctx.config.snapshot_s.into());
    let mut next_snapshot = Instant::now() + period;
    let mut finished = false;
    loop {
        let command = match received.recv_timeout(Duration::from_millis(200)) {
            Ok((command, _)) => Some(command),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return Err("all threads that take commands are gone".into()),
        };
        match command {
            Some(Command::Report) => ctx.send(Body::Snapshot(Box::new(look::snapshot(ctx, xen, "asked")))),
            Some(Command::Quiet) => ctx.set_phase(Phase::Quiet),
            Some(Command::Resume) => {
                finished = false;
                ctx.set_phase(Phase::Running);
            }
            Some(Command::Ping) | None => {}
            Some(Command::Finish) => {
                finish(ctx, xen, disks, memory);
                finished = true;
            }
        }
        if !period.is_zero() && Instant::now() >= next_snapshot {
            next_snapshot = Instant::now() + period;
            ctx.send(Body::Snapshot(Box::new(look::snapshot(ctx, xen, "periodic"))));
        }
        if !end.is_zero() && start.elapsed() >= end && !finished {
            finish(ctx, xen, disks, memory);
            finished = true;
            if !is_init() {
                return Ok(());
            }
        }
        if finished && ctx.config.at_end == AtEnd::PowerOff && is_init() {
            return Err(format!("power off: {}", boot::power_off()));
        }
    }
}

/// Stops the loads, verifies everything, sends the final report.
fn finish(
    ctx: &Context,
    xen: &Mutex<look::XenSide>,
    disks: &[Arc<Mutex<block::Rewriter>>],
    memory: Option<&Mutex<memory::Region>>,
) {
    ctx.set_phase(Phase::Quiet);
    // What is under way ends; the last events and echoes come in.
    std::thread::sleep(Duration::from_secs(2));
    if let Some(region) = memory {
        memory::report(ctx, lock(region).check_all());
    }
    for rewriter in disks {
        lock(rewriter).check_all(ctx);
    }
    block::check_journals(ctx);
    let snapshot = look::snapshot(ctx, xen, "final");
    let clean = snapshot.counters.anomalies == 0;
    ctx.send(Body::Final(Box::new(Final { clean, snapshot })));
    ctx.reporter.say(if clean { "witness: final: clean" } else { "witness: final: not clean" });
    ctx.reporter.flush(Duration::from_secs(10));
}
