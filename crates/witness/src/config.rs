//! The witness's settings, as `witness.key=value` words on the kernel command line.
//!
//! (A dot in a word makes the kernel pass it to a module of that name and not to init, so nothing else reads them.)

use crate::wire::DEFAULT_PORT;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// Why a command line can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// No such key.
    #[error("witness.{0}: no such key")]
    Key(String),
    /// The value is not of the key's type or out of its range.
    #[error("witness.{key}={value}: want {want}")]
    Value {
        /// Key.
        key: String,
        /// Value.
        value: String,
        /// What would be right.
        want: String,
    },
}

/// An address with the length of its prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    /// Address.
    pub addr: Ipv4Addr,
    /// Prefix length, 0 to 32.
    pub prefix: u8,
}

impl FromStr for Cidr {
    type Err = ();
    fn from_str(s: &str) -> Result<Self, ()> {
        let (addr, prefix) = s.split_once('/').unwrap_or((s, "24"));
        let prefix = prefix.parse().ok().filter(|p| *p <= 32).ok_or(())?;
        Ok(Cidr { addr: addr.parse().map_err(|_| ())?, prefix })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.prefix)
    }
}

/// What is written to the console. Commands are answered there in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConsoleLevel {
    /// Nothing.
    Off,
    /// Hello, anomalies, final, and each 10th beat.
    Events,
    /// All but journal acknowledgements; snapshots too.
    All,
}

impl FromStr for ConsoleLevel {
    type Err = ();
    fn from_str(s: &str) -> Result<Self, ()> {
        match s {
            "off" => Ok(ConsoleLevel::Off),
            "events" => Ok(ConsoleLevel::Events),
            "all" => Ok(ConsoleLevel::All),
            _ => Err(()),
        }
    }
}

impl fmt::Display for ConsoleLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ConsoleLevel::Off => "off",
            ConsoleLevel::Events => "events",
            ConsoleLevel::All => "all",
        })
    }
}

/// What the witness does after its final report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtEnd {
    /// Goes on looking, with its loads stopped.
    Stay,
    /// Powers the guest off.
    PowerOff,
}

impl FromStr for AtEnd {
    type Err = ();
    fn from_str(s: &str) -> Result<Self, ()> {
        match s {
            "stay" => Ok(AtEnd::Stay),
            "poweroff" => Ok(AtEnd::PowerOff),
            _ => Err(()),
        }
    }
}

impl fmt::Display for AtEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AtEnd::Stay => "stay",
            AtEnd::PowerOff => "poweroff",
        })
    }
}

/// A whole number with a range, for a message that says what would be right.
fn number<T: TryFrom<u64>>(value: &str, from: u64, to: u64) -> Result<T, String> {
    let want = || format!("a whole number from {from} to {to}");
    let n: u64 = value.parse().map_err(|_| want())?;
    if !(from..=to).contains(&n) {
        return Err(want());
    }
    T::try_from(n).map_err(|_| want())
}

fn of<T: FromStr>(value: &str, want: &str) -> Result<T, String> {
    value.parse().map_err(|_| want.to_owned())
}

/// Declares the settings once: type, default, and how a value is read.
macro_rules! settings {
    ($($(#[$doc:meta])* $key:ident: $type:ty = $default:expr, |$value:ident| $read:expr;)*) => {
        /// The settings. A rate of 0 turns a load off.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct Config {
            $($(#[$doc])* pub $key: $type,)*
        }

        impl Default for Config {
            fn default() -> Self {
                Config { $($key: $default,)* }
            }
        }

        impl Config {
            /// All keys.
            pub const KEYS: &'static [&'static str] = &[$(stringify!($key)),*];

            /// Sets one key from its text.
            pub fn set(&mut self, key: &str, value: &str) -> Result<(), ConfigError> {
                let result: Result<(), String> = match key {
                    $(stringify!($key) => { let $value = value; ($read).map(|v| self.$key = v) })*
                    _ => return Err(ConfigError::Key(key.to_owned())),
                };
                result.map_err(|want| ConfigError::Value { key: key.to_owned(), value: value.to_owned(), want })
            }

            /// The words for a kernel command line that differ from the defaults, separated by spaces.
            pub fn command_line(&self) -> String {
                let default = Config::default();
                let mut words: Vec<String> = Vec::new();
                $(if self.$key != default.$key {
                    words.push(format!("witness.{}={}", stringify!($key), show(&self.$key)));
                })*
                words.join(" ")
            }
        }
    };
}

/// Text of a value as [`Config::set`] reads it.
fn show<T: Show>(v: &T) -> String {
    v.show()
}

trait Show {
    fn show(&self) -> String;
}

macro_rules! show_by_display {
    ($($t:ty),*) => { $(impl Show for $t { fn show(&self) -> String { self.to_string() } })* };
}
show_by_display!(u16, u32, u64, String, Ipv4Addr, Cidr, ConsoleLevel, AtEnd);

impl Show for Option<Cidr> {
    fn show(&self) -> String {
        self.map_or_else(|| "none".into(), |c| c.to_string())
    }
}

fn maybe_cidr(value: &str) -> Result<Option<Cidr>, String> {
    if value == "none" {
        return Ok(None);
    }
    of(value, "an address like 10.77.0.10/24, or none").map(Some)
}

settings! {
    /// Seeds every generator: memory, disk, store values.
    seed: u64 = 1, |v| number(v, 0, u64::MAX);
    /// Network device of the loads.
    dev: String = "eth0".into(), |v| Ok(v.to_owned());
    /// Its address.
    addr: Option<Cidr> = None, |v| maybe_cidr(v);
    /// The peer's address.
    peer: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1), |v| of(v, "an address like 10.77.0.1");
    /// Base port; see [`crate::wire::Service`].
    port: u16 = DEFAULT_PORT, |v| number(v, 1, 65_000);
    /// Network device of the address that only receives. It sends one gratuitous ARP when it comes up, then nothing,
    /// not even an ARP reply.
    rxdev: String = "eth1".into(), |v| Ok(v.to_owned());
    /// The address that only receives.
    rx: Option<Cidr> = None, |v| maybe_cidr(v);
    /// Disk for journal and rewrites; everything on it is overwritten. `none` for no disk load.
    disk: String = "/dev/xvda".into(), |v| Ok(v.to_owned());
    /// A second disk, overwritten too: a journal record is told only once both have it, and it has rewritten blocks of
    /// its own. `none` for no such disk.
    mirror: String = "none".into(), |v| Ok(v.to_owned());
    /// Journal records a second.
    journal: u32 = 5, |v| number(v, 0, 10_000);
    /// Versioned sectors rewritten a second.
    rewrite: u32 = 32, |v| number(v, 0, 100_000);
    /// Requests in flight in the rewrite load.
    depth: u32 = 32, |v| number(v, 1, 256);
    /// Memory region, MiB.
    mem_mib: u32 = 16, |v| number(v, 0, 1 << 20);
    /// Memory churned, KiB a second; as much again of the part that stays as it is gets checked.
    churn_kib: u32 = 512, |v| number(v, 0, 1 << 24);
    /// Frames a second on the TCP stream.
    tcp: u32 = 10, |v| number(v, 0, 10_000);
    /// Datagrams a second on the UDP stream.
    udp: u32 = 20, |v| number(v, 0, 10_000);
    /// Nodes of the store view read again a second.
    store: u32 = 1, |v| number(v, 0, 1000);
    /// Writes a second under the load's watch.
    watch: u32 = 1, |v| number(v, 0, 1000);
    /// How long a transaction is held, ms; 0 for none.
    tx_hold_ms: u32 = 5000, |v| number(v, 0, 3_600_000);
    /// Events a second through an event channel of its own whose both ends are in this guest.
    events: u32 = 1, |v| number(v, 0, 1000);
    /// Period of looking at identity, ports, grant table, interrupts, links and devices, ms; 0 for only in snapshots.
    look_ms: u32 = 3000, |v| number(v, 0, 3_600_000);
    /// Further event channels that are opened at the start and wait for domain 0; each third is closed again, so that there are holes.
    ports: u32 = 0, |v| number(v, 0, 100_000);
    /// Threads that hold patterns in registers.
    regs: u32 = 1, |v| number(v, 0, 64);
    /// How long they spin with them at a time, µs.
    regs_spin_us: u32 = 2000, |v| number(v, 0, 1_000_000);
    /// How long they sleep with them at a time, ms.
    regs_sleep_ms: u32 = 200, |v| number(v, 0, 10_000);
    /// Period of the fine timer, µs.
    tick_us: u32 = 1000, |v| number(v, 100, 1_000_000);
    /// Part of each second in which the fine timer runs, percent.
    tick_duty: u32 = 3, |v| number(v, 0, 100);
    /// Period in which every vCPU reads all clocks, ms.
    clock_ms: u32 = 40, |v| number(v, 1, 10_000);
    /// A gap between two clock readings that is reported at once, ms.
    gap_ms: u32 = 1000, |v| number(v, 1, 3_600_000);
    /// Period of the beat, ms.
    beat_ms: u32 = 1000, |v| number(v, 50, 3_600_000);
    /// Period of snapshots that nobody asked for, s; 0 for none.
    snapshot_s: u32 = 0, |v| number(v, 0, 86_400);
    /// What goes to the console.
    console: ConsoleLevel = ConsoleLevel::Events, |v| of(v, "off, events or all");
    /// After so many seconds the loads stop and the final report is made; 0 for never.
    end_s: u32 = 0, |v| number(v, 0, 86_400);
    /// What happens after the final report.
    at_end: AtEnd = AtEnd::Stay, |v| of(v, "stay or poweroff");
}

impl Config {
    /// Reads the `witness.` words of a kernel command line; others are not ours. A dash in a key counts as an
    /// underscore, as the kernel has it.
    pub fn from_command_line(line: &str) -> Result<Config, ConfigError> {
        let mut config = Config::default();
        for word in line.split_ascii_whitespace() {
            if let Some((key, value)) = word.strip_prefix("witness.").and_then(|w| w.split_once('=')) {
                config.set(&key.replace('-', "_"), value)?;
            }
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_it_writes() {
        let mut c = Config::default();
        assert_eq!(c.command_line(), "");
        for (k, v) in [
            ("seed", "18446744073709551615"),
            ("addr", "10.77.0.10/16"),
            ("rx", "10.77.0.11/24"),
            ("console", "all"),
            ("at_end", "poweroff"),
            ("disk", "none"),
            ("depth", "64"),
        ] {
            c.set(k, v).unwrap();
        }
        let line = format!("console=hvc0 quiet {} rdinit=/init", c.command_line());
        assert_eq!(Config::from_command_line(&line).unwrap(), c);
    }

    #[test]
    fn errors_name_the_word() {
        let e = Config::from_command_line("witness.rate=1").unwrap_err();
        assert_eq!(e.to_string(), "witness.rate: no such key");
        let e = Config::from_command_line("witness.depth=0").unwrap_err();
        assert_eq!(e.to_string(), "witness.depth=0: want a whole number from 1 to 256");
        let e = Config::from_command_line("witness.addr=10.0.0.1/33").unwrap_err();
        assert_eq!(e.to_string(), "witness.addr=10.0.0.1/33: want an address like 10.77.0.10/24, or none");
    }

    proptest! {
        #[test]
        fn no_line_fails(line in "\\PC{0,200}") {
            let _ = Config::from_command_line(&line);
            let _ = Config::from_command_line(&format!("witness.{line}"));
        }
    }
}
