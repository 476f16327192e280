//! Threads that hold patterns in general and SSE registers, while they spin and while they sleep in the kernel.

use crate::context::Context;
use std::arch::asm;
use std::sync::Arc;
use std::time::{Duration, Instant};
use witness::pattern::Rng;
use witness::report::Noticed;

/// General registers that hold a pattern, in the order of [`Held::general`].
const GENERAL: [&str; 10] = ["rbx", "rbp", "rdx", "r8", "r9", "r10", "r12", "r13", "r14", "r15"];

/// Patterns before and after; the layout that the assembly below knows.
#[repr(C, align(16))]
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    general: [u64; 10],
    sse: [[u64; 2]; 16],
}

impl Held {
    fn new(rng: &mut Rng) -> Held {
        Held { general: std::array::from_fn(|_| rng.next()), sse: std::array::from_fn(|_| [rng.next(), rng.next()]) }
    }

    fn differences(&self, found: &Held) -> Vec<Noticed> {
        let mut noticed = Vec::new();
        let mut compare = |register: String, want: u64, found: u64| {
            if want != found {
                noticed.push(Noticed::Register { register, want, found });
            }
        };
        for ((name, want), found) in GENERAL.iter().zip(self.general).zip(found.general) {
            compare((*name).into(), want, found);
        }
        for (i, (want, found)) in self.sse.iter().zip(found.sse).enumerate() {
            compare(format!("xmm{i} low"), want[0], found[0]);
            compare(format!("xmm{i} high"), want[1], found[1]);
        }
        noticed
    }
}

/// Loads the registers from `held`, spins, sleeps in nanosleep(2), spins again, and stores them into `held`.
fn hold(held: &mut Held, spins: u64, sleep: Duration) {
    let time = libc::timespec {
        tv_sec: libc::time_t::try_from(sleep.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::from(sleep.subsec_nanos() as i32),
    };
    // SAFETY: the assembly reads and writes `held` (10 * 8 bytes of general registers, then 16 * 16 bytes of SSE
    // registers: repr(C)), reads `time` through the system call, and uses the stack below rsp by push and pop in pairs
    // (the `nostack` option is not given, so there is no red zone to spare). rbx and rbp, which may not be named as
    // operands, are saved and restored; every other register that is changed is named as an output.
    unsafe {
        asm!(
            "push rbx",
            "push rbp",
            "push rsi",
            "push rcx",
            "mov rbx, [rsi]",
            "mov rbp, [rsi + 8]",
            "mov rdx, [rsi + 16]",
            "mov r8, [rsi + 24]",
            "mov r9, [rsi + 32]",
            "mov r10, [rsi + 40]",
            "mov r12, [rsi + 48]",
            "mov r13, [rsi + 56]",
            "mov r14, [rsi + 64]",
            "mov r15, [rsi + 72]",
            "movdqa xmm0, [rsi + 80]",
            "movdqa xmm1, [rsi + 96]",
            "movdqa xmm2, [rsi + 112]",
            "movdqa xmm3, [rsi + 128]",
            "movdqa xmm4, [rsi + 144]",
            "movdqa xmm5, [rsi + 160]",
            "movdqa xmm6, [rsi + 176]",
            "movdqa xmm7, [rsi + 192]",
            "movdqa xmm8, [rsi + 208]",
            "movdqa xmm9, [rsi + 224]",
            "movdqa xmm10, [rsi + 240]",
            "movdqa xmm11, [rsi + 256]",
            "movdqa xmm12, [rsi + 272]",
            "movdqa xmm13, [rsi + 288]",
            "movdqa xmm14, [rsi + 304]",
            "movdqa xmm15, [rsi + 320]",
            "2:",
            "dec rcx",
            "jnz 2b",
            "xor esi, esi",
            "mov eax, {nanosleep}",
            "syscall",
            "pop rcx",
            "3:",
            "dec rcx",
            "jnz 3b",
            "pop rsi",
            "mov [rsi], rbx",
            "mov [rsi + 8], rbp",
            "mov [rsi + 16], rdx",
            "mov [rsi + 24], r8",
            "mov [rsi + 32], r9",
            "mov [rsi + 40], r10",
            "mov [rsi + 48], r12",
            "mov [rsi + 56], r13",
            "mov [rsi + 64], r14",
            "mov [rsi + 72], r15",
            "movdqa [rsi + 80], xmm0",
            "movdqa [rsi + 96], xmm1",
            "movdqa [rsi + 112], xmm2",
            "movdqa [rsi + 128], xmm3",
            "movdqa [rsi + 144], xmm4",
            "movdqa [rsi + 160], xmm5",
            "movdqa [rsi + 176], xmm6",
            "movdqa [rsi + 192], xmm7",
            "movdqa [rsi + 208], xmm8",
            "movdqa [rsi + 224], xmm9",
            "movdqa [rsi + 240], xmm10",
            "movdqa [rsi + 256], xmm11",
            "movdqa [rsi + 272], xmm12",
            "movdqa [rsi + 288], xmm13",
            "movdqa [rsi + 304], xmm14",
            "movdqa [rsi + 320], xmm15",
            "pop rbp",
            "pop rbx",
            nanosleep = const libc::SYS_nanosleep,
            inout("rsi") std::ptr::from_mut(held) => _,
            inout("rdi") std::ptr::from_ref(&time) => _,
            inout("rcx") spins.max(1) => _,
            out("rax") _, out("rdx") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
            out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
        );
    }
}

/// Turns of the spin loop in a microsecond, at least 1.
fn turns_per_us() -> u64 {
    let mut held = Held::new(&mut Rng::new(0));
    let start = Instant::now();
    hold(&mut held, 500_000, Duration::ZERO);
    let us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX).max(1);
    (1_000_000 / us).max(1)
}

pub fn start(ctx: &Arc<Context>) {
    for thread in 0..ctx.config.regs {
        let c = ctx.clone();
        crate::spawn("registers", move || {
            let spins = u64::from(c.config.regs_spin_us).saturating_mul(turns_per_us()) / 2;
            let sleep = Duration::from_millis(c.config.regs_sleep_ms.into());
            let mut rng = Rng::new(c.config.seed ^ u64::from(thread) << 48);
            loop {
                if !c.loads() {
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
                let want = Held::new(&mut rng);
                let mut found = want.clone();
                hold(&mut found, spins, sleep);
                c.counters.regs.add(1);
                let wrong = want.differences(&found);
                c.counters.regs_bad.add(u64::from(!wrong.is_empty()));
                for n in wrong {
                    c.notice(n);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_come_back_as_they_were() {
        let mut rng = Rng::new(9);
        for _ in 0..20 {
            let want = Held::new(&mut rng);
            let mut found = want.clone();
            hold(&mut found, 1000, Duration::from_micros(50));
            assert_eq!(want.differences(&found), vec![]);
        }
    }

    #[test]
    fn every_register_is_compared() {
        let want = Held::new(&mut Rng::new(1));
        let mut other = Held::new(&mut Rng::new(2));
        assert_eq!(want.differences(&other).len(), 10 + 32);
        other = want.clone();
        other.sse[15][1] ^= 1;
        assert!(
            matches!(&want.differences(&other)[..], [Noticed::Register { register, .. }] if register == "xmm15 high")
        );
    }
}
