/* SPDX-License-Identifier: GPL-2.0-only
 *
 * A 32-bit PVH guest for trying the extension: small enough to start in a moment, and it uses every place where Xen hands out or takes
 * time, in the 32-bit layouts. It prints through Xen's debug port (xl dmesg shows it) once for each round:
 *
 *   T32 now=<pvclock> hvm=<HVMOP_get_time> rs=<runstate entry> poll=<ns waited> single=<ns> op=<ns> four=<ns of four periods>
 *       wc=<sec>.<nsec> bad=<mask>
 *
 * All numbers are hexadecimal nanoseconds of the guest's system time. `bad` has a bit for each time that makes no sense.
 *
 * `cargo xtask build` makes it:
 *
 * gcc -m32 -ffreestanding -fno-pic -no-pie -fno-stack-protector -mgeneral-regs-only -O2 -nostdlib -static -Wl,--build-id=none \
 *     -Wl,-m,elf_i386,-Ttext-segment=0x200000 -o guest32 guest32.c
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long s64;

/* PT_NOTE with XEN_ELFNOTE_PHYS32_ENTRY (18): entered in protected mode, paging off. */
asm(".pushsection .note.Xen, \"a\", @note\n"
    ".align 4\n.long 4, 4, 18\n.asciz \"Xen\"\n.long _start\n"
    ".popsection\n"
    ".globl _start\n_start:\n cli\n movl $stack_top, %esp\n call guest\n1: hlt\n jmp 1b\n");

#define PAGE __attribute__((aligned(4096), section(".bss")))
static u8 PAGE hypercalls[4096], PAGE shared[4096], PAGE info[4096], PAGE areas[4096];
u8 PAGE stack[16384];
asm(".set stack_top, stack + 16384");

static long call5(u32 nr, u32 a, u32 b, u32 c, u32 d)
{
    long ret;
    asm volatile ( "call *%%eax" : "=a" (ret), "+b" (a), "+c" (b), "+d" (c), "+S" (d)
                   : "0" (hypercalls + nr * 32) : "memory" );
    return ret;
}

static void out(char c) { asm volatile ( "outb %0, %1" :: "a" (c), "Nd" ((u16)0xe9) ); }
static void text(const char *s) { while ( *s ) out(*s++); }
static void hex(u64 v)
{
    int begun = 0;
    for ( int i = 60; i >= 0; i -= 4 )
    {
        u32 digit = (u32)(v >> i) & 15;
        begun |= digit || i == 0;
        if ( begun ) out("0123456789abcdef"[digit]);
    }
}
static void item(const char *name, u64 v) { text(name); hex(v); }
static void must(const char *what, long rc) { if ( rc ) { text("T32 FAILED "); text(what); item(" ", (u64)(u32)-rc); out('\n'); } }

static u64 rdtsc(void) { u32 lo, hi; asm volatile ( "lfence; rdtsc" : "=a" (lo), "=d" (hi) ); return (u64)hi << 32 | lo; }

static volatile u8 *const vcpu = info + 0x80; /* a place of our own, not the page's beginning */
static volatile u8 *const time_area = areas, *const runstate = areas + 0x100;

/* vcpu_time_info: version, pad, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift */
static u64 clock(volatile u8 *t)
{
    u32 version;
    u64 ns;
    do {
        version = *(volatile u32 *)t & ~1u;
        asm volatile ( "" ::: "memory" );
        u64 delta = rdtsc() - *(volatile u64 *)(t + 8);
        u32 mul = *(volatile u32 *)(t + 24);
        signed char shift = *(volatile signed char *)(t + 28);
        delta = shift < 0 ? delta >> -shift : delta << shift;
        ns = *(volatile u64 *)(t + 16) + (delta >> 32) * mul + (((u64)(u32)delta * mul) >> 32);
        asm volatile ( "" ::: "memory" );
    } while ( version != *(volatile u32 *)t );
    return ns;
}
static u64 now(void) { return clock(vcpu + 32); }

struct poll { u32 ports; u32 nr; u64 timeout; } __attribute__((packed));
static u32 timer_port;

static void clear_pending(void)
{
    ((volatile u32 *)(shared + 2048))[timer_port / 32] &= ~(1u << timer_port % 32);
    *(volatile u32 *)(vcpu + 4) = 0;
    *(volatile u8 *)vcpu = 0;
}

/* Waits for the timer's event, at most until `limit`; gives how long it took. */
static u64 wait(u64 limit)
{
    u64 begun = now();
    struct poll poll = { (u32)&timer_port, 1, limit };
    must("poll", call5(29, 3, (u32)&poll, 0, 0));
    return now() - begun;
}

/* The same without blocking: Xen stops a vCPU's periodic timer while the vCPU does not run. */
static void spin(u64 limit)
{
    while ( !(((volatile u32 *)(shared + 2048))[timer_port / 32] >> timer_port % 32 & 1) && now() < limit )
        asm volatile ( "pause" );
}

#define MS 1000000ull
static u32 check(u32 bit, u64 value, u64 low, u64 high) { return value < low || value > high ? 1u << bit : 0; }

void guest(void)
{
    u32 a = 0x40000000, b, c, d;
    asm volatile ( "cpuid" : "+a" (a), "=b" (b), "=c" (c), "=d" (d) );
    a = 0x40000002; c = 0;
    asm volatile ( "cpuid" : "+a" (a), "=b" (b), "+c" (c), "=d" (d) );
    asm volatile ( "wrmsr" :: "c" (b), "a" (hypercalls), "d" (0) );

    struct { u16 domid, size; u32 space, idx, gpfn; } map = { 0x7ff0, 0, 0, 0, (u32)shared >> 12 };
    must("shared_info", call5(12, 7, (u32)&map, 0, 0));
    struct { u64 mfn; u32 offset, pad; } place = { (u32)info >> 12, 0x80, 0 };
    must("vcpu_info", call5(24, 10, 0, (u32)&place, 0));
    u64 area = (u32)runstate;
    must("runstate area", call5(24, 5, 0, (u32)&area, 0));
    area = (u32)time_area;
    must("time area", call5(24, 13, 0, (u32)&area, 0));
    struct { u32 virq, vcpu, port; } virq = { 0, 0, 0 };
    must("VIRQ_TIMER", call5(32, 1, (u32)&virq, 0, 0));
    timer_port = virq.port;
    struct { u32 vcpu, port; } ipi = { 0, 0 };
    must("IPI", call5(32, 7, (u32)&ipi, 0, 0));
    struct { u16 dom, remote; u32 port; } unbound = { 0x7ff0, 0, 0 };
    must("unbound", call5(32, 6, (u32)&unbound, 0, 0));
    struct { u32 vcpu; u8 vector; } vector = { 0, 0x55 };
    must("vector", call5(34, 23, (u32)&vector, 0, 0));

    u64 last = now();
    for ( ;; )
    {
        u32 bad = 0;
        u64 hvm, t = now();
        struct { u64 timeout; u32 flags; } __attribute__((packed)) single;
        struct { u32 state; u64 entry, time[4]; } __attribute__((packed)) rs;

        bad |= check(0, t, last, last + 600000 * MS); /* never back */
        last = t;
        must("get_time", call5(34, 10, (u32)&hvm, 0, 0));
        bad |= check(1, hvm - t, 0, 1000 * MS);
        must("runstate", call5(24, 4, 0, (u32)&rs, 0));
        bad |= check(2, now() - rs.entry, 0, 10000 * MS);
        /* Bit 63 is Xen's mark that it is writing. */
        bad |= check(3, (now() - *(volatile u64 *)(runstate + 4)) & ~(1ull << 63), 0, 10000 * MS);
        bad |= check(4, clock(time_area) - t, 0, 1000 * MS);

        /* Nothing is pending: the time-out of the poll ends it. */
        clear_pending();
        u64 polled = wait(now() + 100 * MS);
        bad |= check(5, polled, 95 * MS, 2000 * MS);
        clear_pending();
        single.timeout = now() + 150 * MS;
        single.flags = 0;
        must("singleshot", call5(24, 8, 0, (u32)&single, 0));
        u64 shot = wait(now() + 5000 * MS);
        bad |= check(6, shot, 140 * MS, 2000 * MS);
        clear_pending();
        u64 at = now() + 200 * MS;
        must("set_timer_op", call5(15, (u32)at, at >> 32, 0, 0));
        u64 op = wait(now() + 5000 * MS);
        bad |= check(7, op, 190 * MS, 2000 * MS);

        clear_pending();
        u64 period = 50 * MS;
        must("periodic timer", call5(24, 6, 0, (u32)&period, 0));
        /* The first may be due at once. */
        spin(now() + 5000 * MS);
        u64 four = now();
        for ( int i = 0; i < 4; i++ )
        {
            clear_pending();
            spin(now() + 5000 * MS);
        }
        four = now() - four;
        bad |= check(8, four, 120 * MS, 2000 * MS);
        must("stop of the periodic timer", call5(24, 7, 0, 0, 0));
        clear_pending();

        item("T32 now=", t); item(" hvm=", hvm); item(" rs=", rs.entry);
        item(" poll=", polled); item(" single=", shot); item(" op=", op); item(" four=", four);
        item(" wc=", *(volatile u32 *)(shared + 2308)); item(".", *(volatile u32 *)(shared + 2312));
        item(" bad=", bad); out('\n');
        wait(now() + 500 * MS);
    }
}
