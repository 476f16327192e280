//! Whether a host's CPU has what a guest was started with.
//!
//! Xen (4.17 and 4.20) does not refuse a policy with features that its CPU lacks: it takes them out without a word
//! (`recalculate_cpuid_policy`, xen/arch/x86/cpu-policy.c). A guest that was told of them once would die of an invalid opcode.

use hypervisor::{CpuPolicy, CpuidLeaf};

/// A register of CPUID that holds features.
struct Features {
    leaf: u32,
    subleaf: u32,
    register: &'static str,
    /// Bits that are no features: they follow the guest's own settings, or Xen copies them from the host it runs on.
    besides: u32,
    read: fn(&CpuidLeaf) -> u32,
    /// What people know by name.
    names: &'static [(u32, &'static str)],
}

const NONE: u32 = CpuidLeaf::NO_SUBLEAF;

static FEATURES: &[Features] = &[
    Features {
        leaf: 1,
        subleaf: NONE,
        register: "EDX",
        besides: 0,
        read: |l| l.d,
        names: &[(25, "sse"), (26, "sse2")],
    },
    Features {
        leaf: 1,
        subleaf: NONE,
        register: "ECX",
        // OSXSAVE.
        besides: 1 << 27,
        read: |l| l.c,
        names: &[
            (1, "pclmulqdq"),
            (9, "ssse3"),
            (12, "fma"),
            (13, "cx16"),
            (17, "pcid"),
            (19, "sse4.1"),
            (20, "sse4.2"),
            (21, "x2apic"),
            (22, "movbe"),
            (23, "popcnt"),
            (25, "aes"),
            (26, "xsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
    },
    Features {
        leaf: 7,
        subleaf: 0,
        register: "EBX",
        // FDP_EXCPTN_ONLY and NO_FPU_SEL.
        besides: 1 << 6 | 1 << 13,
        read: |l| l.b,
        names: &[
            (0, "fsgsbase"),
            (3, "bmi1"),
            (4, "hle"),
            (5, "avx2"),
            (7, "smep"),
            (8, "bmi2"),
            (9, "erms"),
            (10, "invpcid"),
            (11, "rtm"),
            (14, "mpx"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (20, "smap"),
            (21, "avx512-ifma"),
            (23, "clflushopt"),
            (24, "clwb"),
            (28, "avx512cd"),
            (29, "sha"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    },
    Features {
        leaf: 7,
        subleaf: 0,
        register: "ECX",
        // OSPKE.
        besides: 1 << 4,
        read: |l| l.c,
        names: &[
            (1, "avx512-vbmi"),
            (2, "umip"),
            (3, "pku"),
            (6, "avx512-vbmi2"),
            (8, "gfni"),
            (9, "vaes"),
            (10, "vpclmulqdq"),
            (11, "avx512-vnni"),
            (22, "rdpid"),
        ],
    },
    Features {
        leaf: 7,
        subleaf: 0,
        register: "EDX",
        besides: 0,
        read: |l| l.d,
        names: &[(4, "fsrm"), (10, "md-clear"), (26, "ibrsb"), (27, "stibp"), (28, "l1d-flush"), (31, "ssbd")],
    },
    Features {
        leaf: 7,
        subleaf: 1,
        register: "EAX",
        besides: 0,
        read: |l| l.a,
        names: &[(4, "avx-vnni"), (5, "avx512-bf16")],
    },
    Features { leaf: 7, subleaf: 1, register: "EDX", besides: 0, read: |l| l.d, names: &[] },
    Features { leaf: 7, subleaf: 2, register: "EDX", besides: 0, read: |l| l.d, names: &[] },
    // The parts of the FPU's state that XCR0 may switch on.
    Features {
        leaf: 0xd,
        subleaf: 0,
        register: "EAX",
        besides: 0,
        read: |l| l.a,
        names: &[(2, "AVX state"), (9, "PKRU state")],
    },
    Features {
        leaf: 0xd,
        subleaf: 1,
        register: "EAX",
        besides: 0,
        read: |l| l.a,
        names: &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves")],
    },
    Features {
        leaf: 0x8000_0001,
        subleaf: NONE,
        register: "ECX",
        besides: 0,
        read: |l| l.c,
        names: &[(5, "abm"), (6, "sse4a"), (8, "prefetchw"), (11, "xop"), (16, "fma4"), (21, "tbm"), (29, "monitorx")],
    },
    Features {
        leaf: 0x8000_0001,
        subleaf: NONE,
        register: "EDX",
        // On AMD those of leaf 1 stand here again, and Xen's largest policy leaves them out (`CPUID_COMMON_1D_FEATURES`).
        besides: 0x0183_f3ff,
        read: |l| l.d,
        names: &[(11, "syscall"), (20, "nx"), (26, "page1gb"), (27, "rdtscp"), (29, "lm")],
    },
    Features { leaf: 0x8000_0007, subleaf: NONE, register: "EDX", besides: 0, read: |l| l.d, names: &[(8, "itsc")] },
    Features {
        leaf: 0x8000_0008,
        subleaf: NONE,
        register: "EBX",
        besides: 0,
        read: |l| l.b,
        names: &[(0, "clzero"), (12, "ibpb"), (14, "ibrs"), (15, "stibp"), (24, "ssbd")],
    },
    Features { leaf: 0x8000_0021, subleaf: NONE, register: "EAX", besides: 0, read: |l| l.a, names: &[] },
];

/// Features of `wanted` that `there` does not have, by name. A leaf that is not there has none.
pub fn lacks(wanted: &CpuPolicy, there: &CpuPolicy) -> Vec<String> {
    let mut lost = Vec::new();
    for features in FEATURES {
        let bits = |policy: &CpuPolicy| {
            let leaf = policy.leaves.iter().find(|l| (l.leaf, l.subleaf) == (features.leaf, features.subleaf));
            leaf.map_or(0, features.read)
        };
        let missing = bits(wanted) & !bits(there) & !features.besides;
        for bit in (0..32).filter(|bit| missing >> bit & 1 == 1) {
            lost.push(match features.names.iter().find(|(n, _)| *n == bit) {
                Some((_, name)) => (*name).to_owned(),
                None if features.subleaf == NONE => {
                    format!("bit {bit} of {} of CPUID leaf {:#x}", features.register, features.leaf)
                }
                None => format!(
                    "bit {bit} of {} of CPUID leaf {:#x}, subleaf {}",
                    features.register, features.leaf, features.subleaf
                ),
            });
        }
    }
    lost
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(leaf: u32, subleaf: u32, b: u32, c: u32) -> CpuidLeaf {
        CpuidLeaf { leaf, subleaf, a: 0, b, c, d: 0 }
    }

    #[test]
    fn features_that_are_missing_are_named() {
        let policy = |leaves: &[CpuidLeaf]| CpuPolicy { leaves: leaves.to_vec(), msrs: Vec::new() };
        // avx2, avx512f and a bit without a name, FDP_EXCPTN_ONLY; leaf 1 has another APIC id and OSXSAVE.
        let guest =
            policy(&[leaf(1, NONE, 0x0100_0800, 1 << 28 | 1 << 27), leaf(7, 0, 1 << 5 | 1 << 16 | 1 << 2 | 1 << 6, 0)]);
        let same = policy(&[leaf(1, NONE, 0, 1 << 28), leaf(7, 0, 1 << 5 | 1 << 16 | 1 << 2 | 1 << 31, 0)]);
        assert_eq!(lacks(&guest, &same), Vec::<String>::new());
        let edx = |d: u32| policy(&[CpuidLeaf { d, ..leaf(0x8000_0001, NONE, 0, 0) }]);
        assert_eq!(lacks(&edx(0x0183_f3ff | 1 << 29), &edx(0)), ["lm"]);
        let older = policy(&[leaf(1, NONE, 0, 1 << 28), leaf(7, 0, 1 << 5, 0)]);
        assert_eq!(lacks(&guest, &older), ["bit 2 of EBX of CPUID leaf 0x7, subleaf 0", "avx512f"]);
        assert_eq!(lacks(&guest, &policy(&[])).first().map(String::as_str), Some("avx"));
    }

    #[test]
    fn no_register_is_listed_twice() {
        let mut seen: Vec<_> = FEATURES.iter().map(|f| (f.leaf, f.subleaf, f.register)).collect();
        seen.sort_unstable();
        let all = seen.len();
        seen.dedup();
        assert_eq!(seen.len(), all);
    }
}
