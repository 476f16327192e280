//! Follows the kernel's log.

use crate::context::{Context, Phase, lock};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::sync::Arc;
use witness::klog::{classify, parse_record};
use witness::report::{KernelLine, KernelLog, Noticed};

/// Lines that are kept.
const MOST_LINES: usize = 200;

#[derive(Debug, Default)]
pub struct KernelLogState {
    log: KernelLog,
}

impl KernelLogState {
    pub fn log(&self) -> KernelLog {
        self.log.clone()
    }

    /// Lines of the set-up do not count.
    pub fn forget(&mut self) {
        self.log.lines.clear();
        self.log.dropped = 0;
    }

    fn add(&mut self, line: KernelLine) {
        self.log.last_seq = line.seq;
        self.log.lines.push(line);
        if self.log.lines.len() > MOST_LINES {
            // A guest in trouble says the same thing for ever; how the trouble began is worth as much as its last line.
            self.log.lines.remove(MOST_LINES / 2);
            self.log.dropped += 1;
        }
    }
}

/// Starts following; says why it can't.
pub fn start(ctx: &Arc<Context>) -> Result<(), String> {
    let mut file = File::open("/dev/kmsg").map_err(|e| format!("kernel log: /dev/kmsg: {e}"))?;
    let c = ctx.clone();
    crate::spawn("kmsg", move || {
        let mut buf = vec![0; 8192];
        loop {
            // One record a read (Documentation/ABI/testing/dev-kmsg).
            match file.read(&mut buf) {
                Ok(n) => take(&c, buf.get(..n).unwrap_or_default()),
                // Records were overwritten before they were read; the next read goes on behind them.
                Err(e) if e.raw_os_error() == Some(libc::EPIPE) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    Ok(())
}

fn take(ctx: &Context, bytes: &[u8]) {
    let Some(r) = parse_record(bytes) else { return };
    let line = KernelLine { seq: r.seq, at_us: r.at_us, level: r.level, class: classify(&r.text), text: r.text };
    let counts = ctx.phase() != Phase::Starting;
    lock(&ctx.kernel_log).add(line.clone());
    if counts {
        ctx.counters.klog.add(1);
        if line.class.of_interest() {
            ctx.notice(Noticed::KernelLine(line));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use witness::klog::LineClass;

    #[test]
    fn the_first_and_the_last_lines_are_kept() {
        let mut s = KernelLogState::default();
        for seq in 0..1000 {
            s.add(KernelLine { seq, at_us: seq, level: 6, class: LineClass::Other, text: String::new() });
        }
        let log = s.log();
        assert_eq!((log.lines.len(), log.dropped, log.last_seq), (MOST_LINES, 800, 999));
        assert_eq!((log.lines[0].seq, log.lines[MOST_LINES - 1].seq), (0, 999));
        assert!(log.lines.windows(2).all(|w| w[0].seq < w[1].seq));
    }
}
