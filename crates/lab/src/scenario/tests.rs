use super::*;

const GOOD: &str = r#"
about = "Two hosts and a guest."
[[host]]
name = "a"
[[host]]
name = "b"
used-domids = 3
[[disk]]
name = "lun"
[[guest]]
name = "g"
[[guest.vif]]
mac = "00:16:3e:00:00:01"
[[guest.vbd]]
disk = "lun"
[guest.workload]
tcp = 5
[[step]]
create = { guest = "g", on = "a" }
[[step]]
sleep = "2s"
[[step]]
migrate = { guest = "g", to = "b", tool = "xl", background = "m" }
[[step]]
cut = { host = "b" }
[[step]]
join = { name = "m" }
[[step]]
expect-verdict = { T1 = "fail" }
[expect]
every-promise = "pass"
[expect.promise]
T1 = "fail"
S1 = "any"
"#;

fn parse(text: &str) -> Result<Scenario, ScenarioError> {
    Scenario::parse(Path::new("x.toml"), text)
}

/// Replaces a line of the good scenario, and gives the error and that line's number.
fn broken(old: &str, new: &str) -> (ScenarioError, usize) {
    assert!(GOOD.contains(old), "{old}");
    let line = GOOD[..GOOD.find(old).unwrap()].matches('\n').count() + 1;
    (parse(&GOOD.replacen(old, new, 1)).expect_err(new), line)
}

#[test]
fn a_good_one_is_read() {
    let s = parse(GOOD).unwrap();
    assert_eq!((s.hosts.len(), s.steps.len()), (2, 6));
    assert_eq!(s.hosts[1].used_domids, 3);
    let guest = s.guest("g").unwrap();
    let settings = guest.workload.settings().unwrap();
    assert_eq!((settings.tcp, settings.udp), (5, witness::config::Config::default().udp));
    assert_eq!(guest.cpuid, "host,rdtscp=0");
    assert_eq!(s.expect.of(Promise::T1), Expected::Fail);
    assert_eq!(s.expect.of(Promise::S1), Expected::Any);
    assert_eq!(s.expect.of(Promise::T9), Expected::Pass);
}

#[test]
fn errors_name_the_line_and_the_key() {
    for (old, new, key) in [
        ("used-domids = 3", "used-domid = 3", "used-domid"),
        ("used-domids = 3", "used-domids = \"x\"", "used-domids"),
        ("tcp = 5", "tpc = 5", "tpc"),
        ("tcp = 5", "tcp = -5", "from 0 to 10000"),
        ("tcp = 5", "tcp = []", "want a number"),
        ("tcp = 5", "peer = \"10.0.0.1\"", "peer: the lab itself sets it"),
        ("sleep = \"2s\"", "sleep = \"2 s\"", "2 s"),
        ("sleep = \"2s\"", "slumber = \"2s\"", "slumber"),
        ("sleep = \"2s\"", "sleep = 2", "duration"),
        (
            "create = { guest = \"g\", on = \"a\" }",
            "create = { guest = \"g\", on = \"c\" }",
            "on: there is no host \"c\"",
        ),
        (
            "create = { guest = \"g\", on = \"a\" }",
            "create = { guest = \"q\", on = \"a\" }",
            "guest: there is no guest",
        ),
        ("create = { guest = \"g\", on = \"a\" }", "create = { guest = \"g\", at = \"a\" }", "at"),
        ("tool = \"xl\"", "tool = \"xm\"", "xm"),
        ("mac = \"00:16:3e:00:00:01\"", "mac = \"00:16:3e:00:01\"", "not an Ethernet address"),
        ("mac = \"00:16:3e:00:00:01\"", "mac = \"01:16:3e:00:00:01\"", "group address"),
        ("disk = \"lun\"", "disk = \"nul\"", "disk: there is no disk"),
        ("name = \"g\"", "init = \"vandal\"\nname = \"g\"", "init: it takes the witness's place"),
        ("name = \"b\"", "name = \"a\"", "two hosts"),
        ("name = \"b\"", "name = \"../b\"", "name: a host's name"),
        ("cut = { host = \"b\" }", "cut = { host = \"peer\" }", "host: there is no host"),
        ("join = { name = \"m\" }", "join = { name = \"n\" }", "name: no earlier step"),
        ("T1 = \"fail\"\nS1", "T11 = \"fail\"\nS1", "T11"),
        ("every-promise = \"pass\"", "every-promise = \"passes\"", "passes"),
    ] {
        let (error, line) = broken(old, new);
        let text = error.to_string();
        assert!(text.starts_with(&format!("x.toml:{line}:")), "{new}: line {line} expected in: {text}");
        assert!(text.contains(key), "{new}: {key} expected in: {text}");
    }
}

#[test]
fn what_is_missing_or_not_toml_is_said() {
    let (error, _) = broken("about = \"Two hosts and a guest.\"\n", "");
    assert!(error.message.contains("about"), "{error}");
    let (error, line) = broken("name = \"lun\"", "name = \"lun");
    assert_eq!(error.line, line, "{error}");
    let error = parse("about = \"no hosts\"").expect_err("no hosts");
    assert!(error.message.contains("host"), "{error}");
}

/// A slip in one of the project's own would only show once hosts are to be booted for it.
#[test]
fn the_projects_own_are_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "toml") {
            let text = std::fs::read_to_string(&path).unwrap();
            Scenario::parse(&path, &text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            count += 1;
        }
    }
    assert!(count > 20, "only {count}");
}
