//! The options: those of the stock daemon, so that its start scripts and a live update from it work; and two of our own.

use crate::store::Options;
use anyhow::{Context, bail};
use clap::{ArgAction, Parser};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

/// The stock daemon takes no number above.
const STOCK_MAX: u32 = i32::MAX as u32;

/// Ferry's xenstore daemon.
#[derive(Debug, Parser)]
#[command(version, disable_help_flag = true, disable_version_flag = true)]
pub struct Args {
    /// Don't connect with Xen: sockets only
    #[arg(short = 'D', long)]
    pub no_domain_init: bool,
    /// File for the daemon's process id
    #[arg(short = 'F', long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Print this text
    #[arg(short = 'H', long, action = ArgAction::Help)]
    pub help: Option<bool>,
    /// Print the version
    #[arg(long, action = ArgAction::Version)]
    pub version: Option<bool>,
    /// Stay in the foreground
    #[arg(short = 'N', long)]
    pub no_fork: bool,
    /// Print the daemon's process id
    #[arg(short = 'P', long)]
    pub output_pid: bool,
    /// Log every request to this file
    #[arg(short = 'T', long, value_name = "FILE")]
    pub trace_file: Option<PathBuf>,
    /// Limit of nodes of a domain
    #[arg(short = 'E', long, value_name = "NUMBER")]
    pub entry_nb: Option<u32>,
    /// Limit of a node's size, in bytes
    #[arg(short = 'S', long, value_name = "BYTES")]
    pub entry_size: Option<u32>,
    /// Limit of watches of a domain
    #[arg(short = 'W', long, value_name = "NUMBER")]
    pub watch_nb: Option<u32>,
    /// Limit of open transactions of a domain
    #[arg(short = 't', long, value_name = "NUMBER")]
    pub transaction: Option<u32>,
    /// Limit of permissions of a node
    #[arg(short = 'A', long, value_name = "NUMBER")]
    pub perm_nb: Option<u32>,
    /// Limit of a path's length, in bytes
    #[arg(short = 'M', long, value_name = "BYTES")]
    pub path_max: Option<u32>,
    /// Set another quota: transaction-nodes, memory, outstanding
    #[arg(short = 'Q', long, value_name = "WHAT=NUMBER")]
    pub quota: Vec<String>,
    /// Set a quota that only warns: memory
    #[arg(short = 'q', long, value_name = "WHAT=NUMBER")]
    pub quota_soft: Vec<String>,
    /// Set a time: watch-event (how long an event waits to be read), in seconds
    #[arg(short = 'w', long, value_name = "WHAT=SECONDS")]
    pub timeout: Vec<String>,
    /// No effect: the store can't get corrupted on a disk, as it is in memory
    #[arg(short = 'R', long)]
    pub no_recovery: bool,
    /// No effect: the store always is in memory
    #[arg(short = 'I', long, num_args = 0..=1, value_name = "on|off", default_missing_value = "on")]
    pub internal_db: Option<String>,
    /// Give the nodes of a dead domain to dom0 instead of deleting them
    #[arg(short = 'K', long)]
    pub keep_orphans: bool,
    /// Log every request
    #[arg(short = 'V', long)]
    pub verbose: bool,
    /// Take over from the daemon that executed this one
    #[arg(short = 'U', long)]
    pub live_update: bool,
    /// Folder of the state journal, from which the daemon comes back if it is killed; it should be in memory (tmpfs)
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Keep no state journal
    #[arg(long)]
    pub no_journal: bool,
    /// A second domain with all rights
    #[arg(short = 'p', long, value_name = "DOMID")]
    pub priv_domid: Option<u16>,
}

fn assignment(s: &str) -> anyhow::Result<(&str, u32)> {
    let (what, n) = s.split_once('=').with_context(|| format!("{s:?}: <what>=<number> is wanted"))?;
    Ok((what, n.parse().with_context(|| format!("{s:?}: not a number"))?))
}

impl Args {
    /// Quotas and their values, in the order in which they count.
    fn quotas(&self) -> anyhow::Result<Vec<(&str, u32)>> {
        let given = [
            (self.entry_nb, "nodes"),
            (self.entry_size, "node-size"),
            (self.watch_nb, "watches"),
            (self.transaction, "transactions"),
            (self.perm_nb, "permissions"),
            (self.path_max, "path-max"),
        ];
        let given = given.into_iter().filter_map(|(v, name)| Some(Ok((name, v?))));
        let all: anyhow::Result<Vec<(&str, u32)>> = given.chain(self.quota.iter().map(|s| assignment(s))).collect();
        let limit = |what| if what == "path-max" { xenstore_wire::REL_PATH_MAX as u32 } else { u32::MAX };
        Ok(all?.into_iter().map(|(what, n)| (what, n.min(limit(what)))).collect())
    }

    /// What they make of the store.
    ///
    /// # Errors
    /// There is no such quota or time, or its value is no number.
    pub fn options(&self) -> anyhow::Result<Options> {
        let mut o = Options { keep_orphans: self.keep_orphans, ..Options::default() };
        o.privileged_domid = self.priv_domid.unwrap_or(0);
        for (what, n) in self.quotas()? {
            if !o.quotas.set(what.as_bytes(), n) {
                bail!("there is no quota {what:?}");
            }
        }
        for s in &self.quota_soft {
            match assignment(s)? {
                ("memory", n) => o.soft_memory = n,
                (what, _) => bail!("there is no soft quota {what:?}"),
            }
        }
        for s in &self.timeout {
            match assignment(s)? {
                ("watch-event", n) => o.event_timeout_ms = u64::from(n) * 1000,
                (what, _) => bail!("there is no time {what:?}"),
            }
        }
        Ok(o)
    }

    /// The words for the daemon that takes over. It may be a stock one: that passes over options which it does not know, but not
    /// over words that are none, or a quota or number that it does not know; and if it gives up the store is lost. So each is one
    /// word, in the stock daemon's spelling.
    ///
    /// # Errors
    /// As of [`Args::options`].
    pub fn handed_on(&self) -> anyhow::Result<Vec<OsString>> {
        let mut words: Vec<OsString> = Vec::new();
        let flags = [
            (self.no_domain_init, "--no-domain-init"),
            (self.no_fork, "--no-fork"),
            (self.output_pid, "--output-pid"),
            (self.no_recovery, "--no-recovery"),
            (self.keep_orphans, "--keep-orphans"),
            (self.verbose, "--verbose"),
            (self.no_journal, "--no-journal"),
        ];
        words.extend(flags.into_iter().filter(|(yes, _)| *yes).map(|(_, word)| word.into()));
        let paths =
            [("--pid-file=", &self.pid_file), ("--trace-file=", &self.trace_file), ("--state-dir=", &self.state_dir)];
        for (option, path) in paths {
            if let Some(p) = path {
                let mut word = OsString::from(option);
                word.push(p);
                words.push(word);
            }
        }
        if let Some(v) = &self.internal_db {
            words.push(format!("--internal-db={v}").into());
        }
        if let Some(d) = self.priv_domid {
            words.push(format!("--priv-domid={d}").into());
        }
        // The last of a name counts.
        let quotas: BTreeMap<&str, u32> = self.quotas()?.into_iter().collect();
        for (what, n) in quotas {
            let option = match what {
                "nodes" => "--entry-nb=",
                "node-size" => "--entry-size=",
                "watches" => "--watch-nb=",
                "transactions" => "--transaction=",
                "permissions" => "--perm-nb=",
                "path-max" => "--path-max=",
                what => &format!("--quota={what}="),
            };
            words.push(format!("{option}{}", n.min(STOCK_MAX)).into());
        }
        for s in &self.quota_soft {
            let (what, n) = assignment(s)?;
            words.push(format!("--quota-soft={what}={}", n.min(STOCK_MAX)).into());
        }
        for s in &self.timeout {
            let (what, n) = assignment(s)?;
            // Kept in milliseconds there.
            words.push(format!("--timeout={what}={}", n.min(STOCK_MAX / 1000)).into());
        }
        Ok(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::Quotas;

    fn args(words: &[&str]) -> Args {
        Args::try_parse_from(["xenstored"].iter().chain(words)).unwrap()
    }

    /// A word that the stock daemon takes, or passes over.
    fn stock_lives_with(word: &str) -> bool {
        const FLAGS: [&str; 6] = ["no-domain-init", "no-fork", "output-pid", "no-recovery", "keep-orphans", "verbose"];
        const NUMBERS: [&str; 7] =
            ["entry-nb", "entry-size", "watch-nb", "transaction", "perm-nb", "path-max", "priv-domid"];
        let Some(option) = word.strip_prefix("--") else { return false };
        let Some((option, value)) = option.split_once('=') else {
            return FLAGS.contains(&option) || option == "no-journal";
        };
        let number = |s: &str| s.parse::<i32>().is_ok_and(|n| n >= 0);
        let quota = |of: &[&str]| value.split_once('=').is_some_and(|(what, n)| of.contains(&what) && number(n));
        match option {
            "pid-file" | "trace-file" | "internal-db" | "state-dir" => true,
            "quota" => quota(&["outstanding", "transaction-nodes", "memory"]),
            "quota-soft" => quota(&["memory"]),
            "timeout" => quota(&["watch-event"]),
            o => NUMBERS.contains(&o) && number(value),
        }
    }

    #[test]
    fn a_stock_daemon_lives_with_what_is_handed_on_and_ours_makes_the_same_of_it() {
        let all: Vec<String> = Quotas::NAMES.iter().flat_map(|(name, _)| ["-Q".into(), format!("{name}=77")]).collect();
        let all: Vec<&str> = all.iter().map(|s| &s[..]).collect();
        let cases: [&[&str]; 6] = [
            &[],
            &["-DNPRKV", "-F", "/run/pid", "-T", "/a file", "--state-dir", "/x", "--no-journal", "-I", "on", "-p", "3"],
            &["-E", "5", "-S1", "-W2", "-t", "3", "-A", "4", "-M", "9999", "-Qnodes=6", "--quota", "path-max=9999"],
            &["-q", "memory=5", "-w", "watch-event=6", "-I"],
            &["-Q", "memory=4000000000", "-q", "memory=4000000000", "-w", "watch-event=4000000000", "-E", "4000000000"],
            &all,
        ];
        for words in cases {
            let a = args(words);
            let next = a.handed_on().unwrap();
            let next: Vec<&str> = next.iter().map(|w| w.to_str().unwrap()).collect();
            let bad: Vec<_> = next.iter().filter(|w| !stock_lives_with(w)).collect();
            assert!(bad.is_empty(), "{words:?} give {bad:?}");
            let b = args(&next);
            assert_eq!(b.handed_on().unwrap(), next.iter().map(OsString::from).collect::<Vec<_>>());
            if !words.contains(&"memory=4000000000") {
                assert_eq!(format!("{:?}", b.options().unwrap()), format!("{:?}", a.options().unwrap()), "{words:?}");
            }
            assert_eq!((b.state_dir, b.pid_file, b.trace_file), (a.state_dir, a.pid_file, a.trace_file));
        }
    }
}
