//! The vCPUs' TSCs in an HVM context (CPU record, `struct hvm_hw_cpu`, public/arch-x86/hvm/save.h).

use crate::trouble::{Result, Trouble};
use hypervisor::TscPoint;
use xen_abi::hvm_save::{CODE_CPU, CODE_END, Cpu, Record, push_record, records};

/// Ticks in so many nanoseconds at a rate in kHz.
fn ticks(ns: u64, khz: u32) -> u64 {
    u64::try_from(u128::from(ns) * u128::from(khz) / 1_000_000).unwrap_or(u64::MAX)
}

/// What a TSC that runs through that point at a rate in kHz reads at another moment of the guest's system time.
pub fn moved(point: TscPoint, to_ns: i64, khz: u32) -> u64 {
    let away = ticks(to_ns.abs_diff(point.at_ns), khz);
    if to_ns < point.at_ns { point.ticks.wrapping_sub(away) } else { point.ticks.wrapping_add(away) }
}

fn cpu(record: &Record<'_>) -> Result<Cpu> {
    record.get().ok_or_else(|| Trouble::new("a CPU record of the HVM context is too short"))
}

/// Each vCPU's number and TSC.
///
/// # Errors
/// The records do not follow each other, or a CPU record is too short.
pub fn read(context: &[u8]) -> Result<Vec<(u16, u64)>> {
    let cpus = records(context)?.into_iter().filter(|record| record.code == CODE_CPU);
    cpus.map(|record| Ok((record.instance, cpu(&record)?.tsc))).collect()
}

/// The context with every vCPU's TSC replaced by what its number and the present one make.
///
/// # Errors
/// As [`read`].
pub fn replaced(context: &[u8], with: impl Fn(u16, u64) -> u64) -> Result<Vec<u8>> {
    let mut new = Vec::with_capacity(context.len());
    for record in records(context)? {
        match record.code {
            CODE_CPU => {
                let mut cpu = cpu(&record)?;
                cpu.tsc = with(record.instance, cpu.tsc);
                let bytes = zerocopy::IntoBytes::as_bytes(&cpu);
                let rest = record.payload.get(bytes.len()..).unwrap_or_default();
                push_record(&mut new, record.code, record.instance, &[bytes, rest].concat());
            }
            CODE_END => {}
            _ => push_record(&mut new, record.code, record.instance, record.payload),
        }
    }
    push_record(&mut new, CODE_END, 0, &[]);
    Ok(new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use xen_abi::hvm_save::{CODE_HEADER, FILE_MAGIC, FILE_VERSION, Header};
    use zerocopy::{FromZeros, IntoBytes};

    #[test]
    fn ticks_of_long_absences_do_not_overflow() {
        assert_eq!(ticks(1_000_000_000, 2_000_000), 2_000_000_000);
        assert_eq!(ticks(86_400_000_000_000 * 365, 3_000_000), 3_000_000_000 * 86_400 * 365);
    }

    #[test]
    fn a_point_moves_both_ways() {
        let point = TscPoint { ticks: 10_000, at_ns: 5_000 };
        assert_eq!(moved(point, 6_000, 2_000_000), 12_000);
        assert_eq!(moved(point, 4_000, 2_000_000), 8_000);
    }

    #[test]
    fn only_the_tsc_changes() {
        let mut context = Vec::new();
        let header = Header { magic: FILE_MAGIC, version: FILE_VERSION, ..Header::new_zeroed() };
        push_record(&mut context, CODE_HEADER, 0, header.as_bytes());
        let mut cpu = Cpu::new_zeroed();
        cpu.rip = 0x1234;
        cpu.tsc = 1000;
        push_record(&mut context, CODE_CPU, 1, cpu.as_bytes());
        push_record(&mut context, 9, 0, b"other");
        push_record(&mut context, CODE_END, 0, &[]);
        assert_eq!(replaced(&context, |_, tsc| tsc).unwrap(), context);
        let earlier = replaced(&context, |vcpu, tsc| tsc - 400 + u64::from(vcpu)).unwrap();
        assert_eq!(read(&earlier).unwrap(), [(1, 601)]);
        let changed: Vec<Cpu> = records(&earlier).unwrap().iter().filter_map(|r| r.get()).collect();
        assert_eq!(changed.iter().find(|c| c.tsc == 601).map(|c| c.rip), Some(0x1234));
        assert_eq!(earlier.len(), context.len());
    }
}
