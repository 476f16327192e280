//! `ferry stream` as a program, and Debian's own `verify-stream-v2` (from xen-utils) as a judge that is not ours.

#[path = "../../migration-stream/tests/support/mod.rs"]
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn ferry(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ferry")).arg("stream").args(arguments).output().expect("run ferry")
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> String {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

/// dom0's packages, fetched into the cache once.
fn dom0_tree() -> PathBuf {
    let cache = lab::cache::Cache::open().expect("the cache folder");
    lab::packages::Pins::load().and_then(|pins| pins.fetch(&cache, "dom0")).expect("Debian's xen-utils").tree
}

fn verify(tree: &Path, format: &str, file: &str) -> Output {
    let xen = tree.join("usr/lib/xen-4.17");
    Command::new("python3")
        .arg(xen.join("bin/verify-stream-v2"))
        .args(["-v", "-f", format, "-i", file])
        .env("PYTHONPATH", xen.join("lib/python"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("run python3")
}

#[test]
fn the_stock_verifier_accepts_ours_stripped_and_refuses_ours_whole_by_name() {
    let tree = dom0_tree();
    let dir = tempfile::tempdir().unwrap();
    let whole = write(dir.path(), "whole", &support::transparent());
    let stripped = dir.path().join("stripped").to_str().unwrap().to_owned();
    let strip = ferry(&["strip", &whole, &stripped]);
    assert!(strip.status.success(), "{strip:?}");

    let good = verify(&tree, "libxl", &stripped);
    let text = String::from_utf8_lossy(&good.stdout);
    assert!(good.status.success() && text.contains("HVM context") && text.contains("HVM from Xen 4.17"), "{good:?}");
    let ordinary = write(dir.path(), "ordinary", &support::ordinary());
    assert!(verify(&tree, "xl", &ordinary).status.success());

    let bad = verify(&tree, "libxl", &whole);
    let text = String::from_utf8_lossy(&bad.stderr);
    // GT_IDENTITY, the first record that it meets.
    assert!(!bad.status.success() && text.contains("Unrecognised record type 47540101"), "{bad:?}");
}

/// What the lab's `migrate-stream` runs on a real stream.
#[test]
fn the_stock_verifier_refuses_each_kind_of_ours_by_name() {
    let xen = dom0_tree().join("usr/lib/xen-4.17");
    let dir = tempfile::tempdir().unwrap();
    let judge = |name: &str, stream: &[u8]| {
        let programs = Path::new(env!("CARGO_BIN_EXE_ferry")).parent().unwrap().to_owned();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths([programs].into_iter().chain(std::env::split_paths(&path))).unwrap();
        Command::new("python3")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios/stream-judge.py"))
            .args([write(dir.path(), name, stream), dir.path().join("plain").to_str().unwrap().to_owned()])
            .env("XEN_TOOLS", &xen)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("PATH", path)
            .output()
            .expect("run python3")
    };
    let good = judge("ours", &support::transparent());
    let text = String::from_utf8_lossy(&good.stdout);
    assert!(good.status.success(), "{good:?}");
    assert!(
        text.contains("stream is refused for GT_IDENTITY") && text.contains("image is refused for GT_DOMAIN"),
        "{text}"
    );
    let each = text.lines().find_map(|line| line.strip_prefix("each is refused by itself: ")).unwrap_or_default();
    for name in ["GT_EVTCHN", "GT_GRANT_TABLE", "GT_VCPU", "GT_CLOCK", "GT_XENSTORE", "GT_STREAM_CHECKSUM"] {
        assert!(each.split(' ').any(|refused| refused == name), "{name}: {text}");
    }
    // A stream in which there is nothing to refuse.
    let ordinary = judge("stock", &support::ordinary());
    assert!(!ordinary.status.success(), "{ordinary:?}");
}

#[test]
fn check_and_show_tell_good_from_bad() {
    let dir = tempfile::tempdir().unwrap();
    let mut stream = support::transparent();
    let good = write(dir.path(), "good", &stream);
    let at = stream.len() / 2;
    stream[at] ^= 1;
    let bad = write(dir.path(), "bad", &stream);

    let out = ferry(&["check", &good]);
    assert!(out.status.success(), "{out:?}");
    assert!(String::from_utf8_lossy(&out.stdout).starts_with("good: 30 records"), "{out:?}");
    let out = ferry(&["check", "--json", &bad]);
    assert_eq!(out.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["good"], false);
    assert!(report["findings"][0]["what"].as_str().unwrap().contains("damaged on the way"), "{report}");

    let out = ferry(&["show", "--json", &good]);
    let shown: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(shown["items"][1]["detail"]["uuid"], "9f3c1152-056e-4cde-8a01-feedbeef0001");
    let out = ferry(&["show", "/nonexistent/file"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("can't open /nonexistent/file"), "{out:?}");
    let out = ferry(&["strip", &good, &good]);
    assert_eq!(out.status.code(), Some(1));
    assert_eq!(fs::read(&good).unwrap(), support::transparent(), "strip onto its input must not touch it");
}
