//! The private apt's sources, made from the machine's own.

use anyhow::{Result, bail};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The machine's Debian archives in deb822 form, for binaries and sources, of one release only.
///
/// A machine of another release has the same archives under other suites; their code name is replaced.
pub fn for_release(etc_apt: &Path, release: &str) -> Result<String> {
    let mut entries = Vec::new();
    let mut files = vec![etc_apt.join("sources.list")];
    let mut parts: Vec<_> = fs::read_dir(etc_apt.join("sources.list.d"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    parts.sort();
    files.extend(parts);
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => entries.extend(text.lines().filter_map(one_line)),
            Some("sources") => entries.extend(stanzas(&text)),
            _ => {}
        }
    }
    let own = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).unwrap_or(release);
    let text = render(&entries, own, release);
    if text.is_empty() {
        bail!(
            "no Debian archive is set up in {} (suites {release}, {release}-security or those of {own}, component main)",
            etc_apt.display()
        );
    }
    Ok(text)
}

/// One archive as apt knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Entry {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    /// Everything else, such as `Signed-By`, as deb822 lines.
    options: Vec<String>,
}

/// `deb [signed-by=… arch=…] URI SUITE COMPONENT…`
fn one_line(line: &str) -> Option<Entry> {
    let line = line.split('#').next()?.trim();
    let rest = line.strip_prefix("deb")?;
    let rest = rest.strip_prefix("-src").unwrap_or(rest).trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace().map(str::to_owned);
    let (uri, suite) = (words.next()?, words.next()?);
    let options = options
        .split_whitespace()
        .filter_map(|option| option.split_once('='))
        .filter_map(|(key, value)| match key {
            "signed-by" => Some(format!("Signed-By: {value}")),
            "trusted" => Some(format!("Trusted: {value}")),
            "check-valid-until" => Some(format!("Check-Valid-Until: {value}")),
            _ => None,
        })
        .collect();
    Some(Entry { uris: vec![uri], suites: vec![suite], components: words.collect(), options })
}

/// The stanzas of a deb822 file.
fn stanzas(text: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            entries.extend(stanza(&fields));
            fields.clear();
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                // A key given in the file itself spans lines; they are kept as they are.
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((key, value)) = line.split_once(':') {
            fields.push((key.trim().to_owned(), value.trim().to_owned()));
        }
    }
    entries
}

fn stanza(fields: &[(String, String)]) -> Option<Entry> {
    let mut entry = Entry::default();
    let words = |value: &str| value.split_whitespace().map(str::to_owned).collect();
    for (key, value) in fields {
        match key.to_ascii_lowercase().as_str() {
            "types" | "architectures" => {}
            "enabled" if value.eq_ignore_ascii_case("no") => return None,
            "enabled" => {}
            "uris" => entry.uris = words(value),
            "suites" => entry.suites = words(value),
            "components" => entry.components = words(value),
            _ => entry.options.push(format!("{key}: {value}")),
        }
    }
    (!entry.uris.is_empty()).then_some(entry)
}

fn render(entries: &[Entry], own: &str, release: &str) -> String {
    let mut seen = BTreeSet::new();
    let mut text = String::new();
    for entry in entries.iter().filter(|entry| entry.components.iter().any(|component| component == "main")) {
        for suite in &entry.suites {
            let Some(suite) = suite_of(suite, own, release) else { continue };
            for uri in &entry.uris {
                if seen.insert((uri.clone(), suite.clone())) {
                    text.push_str(&format!("Types: deb deb-src\nURIs: {uri}\nSuites: {suite}\nComponents: main\n"));
                    for option in &entry.options {
                        text.push_str(option);
                        text.push('\n');
                    }
                    text.push('\n');
                }
            }
        }
    }
    text
}

/// The wanted release's name for a suite of this machine's release; `None` if it is of neither, or not a plain one.
fn suite_of(suite: &str, own: &str, release: &str) -> Option<String> {
    let rest = suite.strip_prefix(release).or_else(|| suite.strip_prefix(own))?;
    matches!(rest, "" | "-updates" | "-security").then(|| format!("{release}{rest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_give_the_same() {
        let line = one_line("deb [arch=amd64 signed-by=/k.gpg] http://a.example/debian bookworm main contrib # x");
        let deb822 = stanzas(
            "# comment\nTypes: deb\nURIs: http://a.example/debian\nSuites: bookworm\nComponents: main contrib\nSigned-By: /k.gpg\n",
        );
        assert_eq!(line.into_iter().collect::<Vec<_>>(), deb822);
    }

    #[test]
    fn only_the_release_and_its_main_component_are_kept() {
        let entries = stanzas(
            "Types: deb\nURIs: http://a.example/debian\nSuites: bookworm bookworm-updates bookworm-backports sid\n\
             Components: main non-free\nSigned-By: /k.gpg\n\n\
             Types: deb\nURIs: http://other.example/x\nSuites: nodistro\nComponents: main\n\n\
             Enabled: no\nTypes: deb\nURIs: http://off.example/x\nSuites: bookworm\nComponents: main\n",
        );
        let text = render(&entries, "bookworm", "bookworm");
        let suites: Vec<_> = text.lines().filter(|line| line.starts_with("Suites")).collect();
        assert_eq!(suites, ["Suites: bookworm", "Suites: bookworm-updates"]);
        assert!(text.contains("Types: deb deb-src") && !text.contains("non-free") && !text.contains("off.example"));
        assert_eq!(text.matches("Signed-By: /k.gpg").count(), 2);
    }

    #[test]
    fn a_machine_of_another_release_lends_its_archives() {
        let entries =
            stanzas("Types: deb\nURIs: http://a.example/debian\nSuites: trixie trixie-security\nComponents: main\n");
        let text = render(&entries, "trixie", "bookworm");
        assert!(text.contains("Suites: bookworm\n") && text.contains("Suites: bookworm-security\n"));
    }

    #[test]
    fn a_key_in_the_file_keeps_its_lines() {
        let entries = stanzas(
            "Types: deb\nURIs: http://a.example/debian\nSuites: bookworm\nComponents: main\nSigned-By:\n -----BEGIN\n .\n abc\n",
        );
        assert!(render(&entries, "bookworm", "bookworm").contains("Signed-By: \n -----BEGIN\n .\n abc\n"));
    }
}
