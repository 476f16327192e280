//! Holds `docs/scenario.md` against the types: every key that exists is described, and every key described exists.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::Scenario;

const PAGE: &str = include_str!("../../../../docs/scenario.md");

const BASE: &str = "about = \"x\"\n[[host]]\nname = \"a\"\n[[guest]]\nname = \"g\"\nwitness = false\n";

/// The keys that serde would have taken where `text` has the unknown key `zzz`.
fn keys(text: &str) -> BTreeSet<String> {
    let error = Scenario::parse(Path::new("x"), text).expect_err(text).message;
    let (_, expected) = error.split_once("expected").unwrap_or_else(|| panic!("{text}\n{error}"));
    expected.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The first column of each table, by the heading above it.
fn described() -> BTreeMap<String, BTreeSet<String>> {
    let mut heading = String::new();
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in PAGE.lines() {
        if let Some(title) = line.strip_prefix("## ").or_else(|| line.strip_prefix("### ")) {
            heading = title.to_owned();
        } else if let Some((key, _)) = line.strip_prefix("| `").and_then(|rest| rest.split_once('`')) {
            assert!(all.entry(heading.clone()).or_default().insert(key.to_owned()), "{heading}: {key} is there twice");
        }
    }
    all
}

#[test]
fn the_page_has_every_key_and_no_other() {
    let mut described = described();
    let mut want = |heading: &str, text: String| {
        let page = described.remove(heading).unwrap_or_else(|| panic!("docs/scenario.md has no {heading:?}"));
        assert_eq!(page, keys(&text), "docs/scenario.md, {heading}");
    };
    want("Top level", format!("zzz = 1\n{BASE}"));
    want("host", format!("{BASE}[[host]]\nzzz = 1\n"));
    want("disk", format!("{BASE}[[disk]]\nzzz = 1\n"));
    want("guest", format!("{BASE}zzz = 1\n"));
    want("guest.vif", format!("{BASE}[[guest.vif]]\nzzz = 1\n"));
    want("guest.vbd", format!("{BASE}[[guest.vbd]]\nzzz = 1\n"));
    want("guest.peer", format!("{BASE}[guest.peer]\nzzz = 1\n"));
    want("expect", format!("{BASE}[expect]\nzzz = 1\n"));
    want("expect.limits", format!("{BASE}[expect.limits]\nzzz = 1\n"));
    let steps = keys(&format!("{BASE}[[step]]\nzzz = 1\n"));
    want("Steps", format!("{BASE}[[step]]\nzzz = 1\n"));
    for step in &steps {
        let heading = match step.as_str() {
            "sleep" | "expect-verdict" | "heal" | "pause-host" | "resume-host" | "kill-host" => continue,
            other => other,
        };
        want(heading, format!("{BASE}[[step]]\n{step} = {{ zzz = 1 }}\n"));
    }
    for step in ["heal", "pause-host", "resume-host", "kill-host"] {
        assert_eq!(keys(&format!("{BASE}[[step]]\n{step} = {{ zzz = 1 }}\n")), BTreeSet::from(["host".to_owned()]));
    }
    assert!(described.is_empty(), "docs/scenario.md describes what does not exist: {described:?}");
}

#[test]
fn the_readmes_example_is_read() {
    let readme = include_str!("../../../../README.md");
    let example: String = readme
        .lines()
        .skip_while(|line| !line.starts_with("    about ="))
        .take_while(|line| line.is_empty() || line.starts_with("    "))
        .map(|line| format!("{}\n", line.trim()))
        .collect();
    let scenario = Scenario::parse(Path::new("README.md"), &example).unwrap();
    assert!(scenario.steps.len() > 3, "{example}");
}

#[test]
fn the_pages_example_and_the_shipped_scenarios_are_read() {
    let example: String = PAGE.lines().filter_map(|line| line.strip_prefix("    ")).map(|l| format!("{l}\n")).collect();
    let scenario = Scenario::parse(Path::new("docs/scenario.md"), &example).unwrap();
    assert_eq!(scenario.steps.len(), 6);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios");
    let mut read = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "toml") {
            Scenario::parse(&path, &std::fs::read_to_string(&path).unwrap()).unwrap_or_else(|e| panic!("{e}"));
            read += 1;
        }
    }
    assert!(read >= 3, "only {read} scenarios were found");
}
