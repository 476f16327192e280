//! What a host must have so that guests can be moved from it and to it, looked at without changing anything.

use crate::config::{Config, Mode};
use crate::control::{Answer, Client, Request};
use crate::toolstack::STORE_ANSWERS;
use hypervisor::{Hypervisor, HypervisorError};
use serde::Serialize;
use std::fmt;
use std::fs;
use std::path::Path;
use xen_abi::sysctl;
use xen_host::XenHost;

/// How one thing stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Good,
    /// Works, but not for every guest or not in every case.
    Limited,
    /// Nothing can be moved until this is put right.
    Missing,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub subject: &'static str,
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Finding {
    fn good(subject: &'static str, found: impl Into<String>) -> Finding {
        Finding { subject, verdict: Verdict::Good, found: found.into(), advice: None }
    }

    fn bad(subject: &'static str, verdict: Verdict, found: impl Into<String>, advice: impl Into<String>) -> Finding {
        Finding { subject, verdict, found: found.into(), advice: Some(advice.into()) }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.verdict {
            Verdict::Good => "good   ",
            Verdict::Limited => "limited",
            Verdict::Missing => "MISSING",
        };
        write!(f, "{mark}  {:<12} {}", self.subject, self.found)?;
        match &self.advice {
            Some(advice) => write!(f, "\n         {:<12} -> {advice}", ""),
            None => Ok(()),
        }
    }
}

/// The worst of them.
pub fn worst(findings: &[Finding]) -> Verdict {
    findings.iter().map(|f| f.verdict).max().unwrap_or(Verdict::Good)
}

/// Looks at all of it.
pub fn check(config: &Config) -> Vec<Finding> {
    let root = Path::new("/");
    let mut findings = xen(XenHost::open());
    findings.push(xenstored(root));
    findings.extend(backends(root));
    findings.push(domid_policy(root));
    findings.push(transport(config));
    findings.push(mode(config));
    findings.push(ferryd(config));
    findings
}

fn transport(config: &Config) -> Finding {
    if config.transport.insecure_tcp {
        return Finding::bad(
            "transport",
            Verdict::Limited,
            format!("plain TCP on {}, neither encrypted nor authenticated", config.listen()),
            "only for a network that nobody else can reach",
        );
    }
    Finding::bad(
        "transport",
        Verdict::Missing,
        "none is enabled, so no guest can leave or come transparently",
        "`insecure-tcp = true` under [transport] in the configuration, if a network of the hosts' own is there",
    )
}

fn mode(config: &Config) -> Finding {
    match config.mode {
        Mode::Transparent => Finding::good("mode", "`ferry migrate` moves guests without their help"),
        Mode::Cooperative => Finding::bad(
            "mode",
            Verdict::Limited,
            "`ferry migrate` is stock `xl migrate`",
            "`ferry migrate --mode transparent`, or `mode = \"transparent\"` in the configuration",
        ),
    }
}

fn ferryd(config: &Config) -> Finding {
    let asked = Client::ask(&config.socket, &Request::Status).and_then(|mut client| client.answer());
    match asked {
        Ok(Some(Answer::Status { migrations })) if migrations.is_empty() => {
            Finding::good("ferryd", "runs; no migration is under way")
        }
        Ok(Some(Answer::Status { migrations })) => {
            Finding::good("ferryd", format!("runs; {} migrations in `ferry status`", migrations.len()))
        }
        Ok(_) => Finding::bad(
            "ferryd",
            Verdict::Missing,
            "it gave no status",
            "look into its log; is it of this program's version?",
        ),
        Err(error) => Finding::bad(
            "ferryd",
            Verdict::Missing,
            format!("{error:#}"),
            "start it: `ferry daemon`; guests leave and come through it",
        ),
    }
}

fn xen(host: Result<XenHost, HypervisorError>) -> Vec<Finding> {
    let host = match host {
        Ok(host) => host,
        Err(e) => {
            let advice = "run this in the control domain of a supported Xen, as root";
            return vec![Finding::bad("xen", Verdict::Missing, e.to_string(), advice)];
        }
    };
    match host.host_info() {
        Ok(info) => {
            let mut findings = xen_findings(&info, host.interface().proven);
            if info.extension.is_none()
                && let Err(e) = host.payload_state(xen_host::livepatch::NAME)
            {
                // `ferry host load` could not help either.
                findings.push(Finding::bad(
                    "livepatch",
                    Verdict::Missing,
                    e.to_string(),
                    "this hypervisor takes no live patches; it must be built with CONFIG_LIVEPATCH=y, as Debian's is",
                ));
            }
            findings
        }
        Err(e) => vec![Finding::bad(
            "xen",
            Verdict::Missing,
            e.to_string(),
            "the hypervisor answers, but not as its version should: is it a stock build?",
        )],
    }
}

fn xen_findings(info: &hypervisor::HostInfo, proven: bool) -> Vec<Finding> {
    let text = format!("Xen {}, build id {}", info.version, info.build_id);
    let version = if proven {
        Finding::good("xen", text)
    } else {
        Finding::bad(
            "xen",
            Verdict::Limited,
            text,
            "this version's interfaces are known but Ferry has not been run on it: try a guest that may be lost first",
        )
    };
    let hvm = info.physcaps & sysctl::PHYSCAP_HVM != 0;
    let hap = info.physcaps & sysctl::PHYSCAP_HAP != 0;
    let cpu = match (hvm, hap) {
        (true, true) => Finding::good("cpu", format!("{} CPUs, HVM with hardware-assisted paging", info.cpus)),
        (true, false) => Finding::bad(
            "cpu",
            Verdict::Limited,
            "HVM without hardware-assisted paging",
            "guests run on shadow paging, whose log-dirty is slow; switch on EPT or NPT in the firmware if it is there",
        ),
        (false, _) => Finding::bad(
            "cpu",
            Verdict::Missing,
            "no HVM",
            "switch on the virtualisation extension (VT-x, AMD-V) in the firmware; PV guests cannot be moved",
        ),
    };
    let free = (info.free_pages.saturating_sub(info.outstanding_pages)) >> 8;
    let memory = Finding::good("memory", format!("{free} MiB free for guests of {} MiB", info.total_pages >> 8));
    let extension = match &info.extension {
        Some(e) if e.abi_version == xen_abi::ext::ABI_VERSION => {
            Finding::good("extension", format!("loaded, interface {}", e.abi_version))
        }
        Some(e) => Finding::bad(
            "extension",
            Verdict::Missing,
            format!(
                "loaded, but its interface is {}, and this program's is {}",
                e.abi_version,
                xen_abi::ext::ABI_VERSION
            ),
            "`ferry host unload`, then `ferry host load` with the extension of this version",
        ),
        None => Finding::bad("extension", Verdict::Missing, "not loaded", "`ferry host load`"),
    };
    vec![version, cpu, memory, extension]
}

/// Whether a program of that name runs, by `/proc/PID/comm`.
fn runs(root: &Path, name: &str) -> bool {
    let processes = fs::read_dir(root.join("proc")).into_iter().flatten().flatten();
    processes.into_iter().any(|p| fs::read_to_string(p.path().join("comm")).is_ok_and(|comm| comm.trim() == name))
}

fn xenstored(root: &Path) -> Finding {
    let features = xenstore_client::Client::open_within(STORE_ANSWERS).and_then(|mut c| c.ferry_features());
    xenstored_finding(features, runs(root, "oxenstored"))
}

fn xenstored_finding(features: xenstore_client::Result<Vec<String>>, oxenstored: bool) -> Finding {
    match features {
        Ok(f) if f.is_empty() && oxenstored => Finding::bad(
            "xenstored",
            Verdict::Missing,
            "oxenstored, which cannot carry a guest's connection over",
            "Ferry's can't take over from it while the host runs: set XENSTORED in /etc/default/xen to Ferry's xenstored or the stock C one, \
             and start the host anew",
        ),
        Ok(f) if f.is_empty() => Finding::bad(
            "xenstored",
            Verdict::Missing,
            "the stock daemon, which cannot carry a guest's connection over",
            "let Ferry's take over from it: `xenstore-control live-update -t 60 PATH`, PATH being Ferry's xenstored on this host",
        ),
        Ok(f) => Finding::good("xenstored", format!("Ferry's, with {}", f.join(", "))),
        Err(e) => {
            Finding::bad("xenstored", Verdict::Missing, e.to_string(), "is it running? start it, or look into its log")
        }
    }
}

/// The kernel's backends: their limits must be no lower on the destination than on the source, so they are told.
fn backends(root: &Path) -> Vec<Finding> {
    const DRIVERS: [(&str, &str, &str, &[&str]); 2] = [
        ("blkback", "vbd", "xen_blkback", &["max_queues", "max_ring_page_order", "max_persistent_grants"]),
        ("netback", "vif", "xen_netback", &["max_queues"]),
    ];
    DRIVERS
        .iter()
        .map(|&(subject, driver, module, parameters)| {
            let dir = root.join("sys/bus/xen-backend/drivers").join(driver);
            if !dir.join("bind").exists() || !dir.join("unbind").exists() {
                let advice = format!(
                    "modprobe {}; guests with such a device can't be moved without it",
                    module.replace('_', "-")
                );
                return Finding::bad(subject, Verdict::Limited, "the kernel's backend is not loaded", advice);
            }
            let limits: Vec<_> = parameters
                .iter()
                .filter_map(|p| {
                    let text =
                        fs::read_to_string(root.join("sys/module").join(module).join("parameters").join(p)).ok()?;
                    Some(format!("{p} {}", text.trim()))
                })
                .collect();
            Finding::good(subject, format!("loaded; {}", limits.join(", ")))
        })
        .collect()
}

/// Guests keep their domid, so domids must not be handed out in the same order on every host.
fn domid_policy(root: &Path) -> Finding {
    let path = root.join("etc/xen/xl.conf");
    let text = fs::read_to_string(&path).unwrap_or_default();
    let policy = text
        .lines()
        .filter_map(|line| {
            let (name, value) = line.split('#').next()?.split_once('=')?;
            (name.trim() == "domid_policy").then(|| value.trim().trim_matches(['"', '\'']).to_owned())
        })
        .next_back();
    match policy.as_deref() {
        Some("random") => Finding::good("domid", "xl chooses domids at random"),
        other => Finding::bad(
            "domid",
            Verdict::Limited,
            format!("xl chooses domids in sequence (domid_policy={})", other.unwrap_or("unset")),
            "set domid_policy=\"random\" in /etc/xen/xl.conf: a guest keeps its domid, which must be free where it goes",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypervisor::{ExtensionInfo, HostInfo, XenVersion};

    fn info() -> HostInfo {
        HostInfo {
            version: XenVersion { major: 4, minor: 17, extra: ".5".into() },
            capabilities: "hvm-3.0-x86_64".into(),
            build_id: "39a6".into(),
            command_line: String::new(),
            total_pages: 1 << 20,
            free_pages: 1 << 18,
            outstanding_pages: 0,
            cpus: 2,
            tsc_khz: 2_000_000,
            physcaps: sysctl::PHYSCAP_HVM | sysctl::PHYSCAP_HAP,
            extension: Some(ExtensionInfo { abi_version: xen_abi::ext::ABI_VERSION }),
        }
    }

    fn verdict(findings: &[Finding], subject: &str) -> Verdict {
        findings.iter().find(|f| f.subject == subject).unwrap().verdict
    }

    #[test]
    fn what_is_missing_is_said_with_what_to_do() {
        let good = xen_findings(&info(), true);
        assert_eq!(worst(&good), Verdict::Good, "{good:?}");
        assert_eq!(verdict(&xen_findings(&info(), false), "xen"), Verdict::Limited);
        let bad = xen_findings(&HostInfo { physcaps: 0, extension: None, ..info() }, true);
        assert_eq!((verdict(&bad, "cpu"), verdict(&bad, "extension")), (Verdict::Missing, Verdict::Missing));
        assert!(bad.iter().filter(|f| f.verdict != Verdict::Good).all(|f| f.advice.is_some()));
        let old = HostInfo { extension: Some(ExtensionInfo { abi_version: 99 }), ..info() };
        assert_eq!(verdict(&xen_findings(&old, true), "extension"), Verdict::Missing);
    }

    #[test]
    fn the_configuration_and_the_daemon_are_looked_at() {
        let root = tempfile::tempdir().unwrap();
        let mut config = Config { socket: root.path().join("sock"), ..Config::default() };
        let look = |config: &Config| [transport(config), mode(config), ferryd(config)].map(|f| f.verdict);
        assert_eq!(look(&config), [Verdict::Missing, Verdict::Limited, Verdict::Missing]);
        config.transport.insecure_tcp = true;
        config.mode = Mode::Transparent;
        let listener = std::os::unix::net::UnixListener::bind(&config.socket).unwrap();
        let daemon = std::thread::spawn(move || {
            use std::io::{BufRead, Write};
            let (mut stream, _) = listener.accept().unwrap();
            std::io::BufReader::new(stream.try_clone().unwrap()).read_line(&mut String::new()).unwrap();
            let answer = serde_json::to_string(&Answer::Status { migrations: Vec::new() }).unwrap();
            writeln!(stream, "{answer}").unwrap();
        });
        assert_eq!(look(&config), [Verdict::Limited, Verdict::Good, Verdict::Good]);
        daemon.join().unwrap();
    }

    #[test]
    fn nobody_is_told_to_take_over_from_oxenstored() {
        let root = tempfile::tempdir().unwrap();
        for (pid, comm) in [("1", "init"), ("70", "oxenstored")] {
            fs::create_dir_all(root.path().join("proc").join(pid)).unwrap();
            fs::write(root.path().join("proc").join(pid).join("comm"), format!("{comm}\n")).unwrap();
        }
        assert!(runs(root.path(), "oxenstored") && !runs(root.path(), "xenstored"));
        let advice = |oxenstored| xenstored_finding(Ok(Vec::new()), oxenstored).advice.unwrap();
        assert!(!advice(true).contains("live-update"), "{}", advice(true));
        assert!(advice(false).contains("live-update"), "{}", advice(false));
        assert_eq!(xenstored_finding(Ok(vec!["freeze".into()]), false).verdict, Verdict::Good);
    }

    #[test]
    fn the_kernel_and_xl_are_looked_at() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path();
        let found = backends(dir);
        assert!(found.iter().all(|f| f.verdict == Verdict::Limited), "{found:?}");
        let vif = dir.join("sys/bus/xen-backend/drivers/vif");
        let parameters = dir.join("sys/module/xen_netback/parameters");
        fs::create_dir_all(&vif).unwrap();
        fs::create_dir_all(&parameters).unwrap();
        fs::write(vif.join("bind"), "").unwrap();
        fs::write(vif.join("unbind"), "").unwrap();
        fs::write(parameters.join("max_queues"), "2\n").unwrap();
        let found = backends(dir);
        assert_eq!(verdict(&found, "netback"), Verdict::Good);
        assert_eq!(found[1].found, "loaded; max_queues 2");

        assert_eq!(domid_policy(dir).verdict, Verdict::Limited);
        fs::create_dir_all(dir.join("etc/xen")).unwrap();
        fs::write(dir.join("etc/xen/xl.conf"), "#domid_policy=\"random\"\n").unwrap();
        assert_eq!(domid_policy(dir).verdict, Verdict::Limited);
        fs::write(dir.join("etc/xen/xl.conf"), "domid_policy = 'random' # as it should be\n").unwrap();
        assert_eq!(domid_policy(dir).verdict, Verdict::Good);
    }
}
