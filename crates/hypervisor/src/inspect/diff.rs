//! Two reports side by side.

use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;

/// One place in which two reports differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Names and indexes from the root, with points between.
    pub path: String,
    /// `None`: not there.
    pub left: Option<Value>,
    pub right: Option<Value>,
    /// Why this differs also after a faultless migration; `None`: it should not.
    pub expected: Option<&'static str>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = |v: &Option<Value>| v.as_ref().map_or_else(|| "(not there)".to_owned(), Value::to_string);
        write!(f, "{}: {} | {}", self.path, side(&self.left), side(&self.right))?;
        match self.expected {
            Some(why) => write!(f, "   (expected: {why})"),
            None => Ok(()),
        }
    }
}

/// What may differ, and why. A path matches if it starts with the left side; `*` stands for one name or index.
const EXPECTED: &[(&str, &str)] = &[
    ("timing", "how long looking took"),
    ("build_id", "another build of the hypervisor"),
    ("xen", "another version of the hypervisor"),
    ("domain.paused", "paused while it is being moved"),
    ("domain.running", "the scheduler's business"),
    ("domain.blocked", "the scheduler's business"),
    ("domain.cpu_time_ns", "counted by each host for itself"),
    ("domain.outstanding_pages", "a claim of the host"),
    ("domain.online_vcpus", "counted when a vCPU is brought up"),
    ("vcpus.*.running", "the scheduler's business"),
    ("vcpus.*.blocked", "the scheduler's business"),
    ("vcpus.*.cpu_time_ns", "counted by each host for itself"),
    ("tsc.elapsed_ns", "time goes on"),
    ("hvm_records.*.fields.tsc", "time goes on"),
    ("tsc.incarnation", "counts the moves"),
    ("ports.*.state.interdomain", "the other end binds anew"),
    ("ports.*.state.unbound", "the other end binds anew"),
    ("gt.ports.*.kind.interdomain", "the other end binds anew"),
    ("gt.ports.*.kind.unbound", "the other end binds anew"),
    ("grants.entries.*.in_use", "the other end maps anew"),
    ("gt.host_now_ns", "each host's own time"),
    ("gt.clock_offset_ns", "makes up for the difference of the hosts' times"),
    ("gt.vcpus.*.runstate", "time goes on"),
    ("hvm_params.IOREQ_PFN", "the device model's business"),
    ("hvm_params.BUFIOREQ_PFN", "the device model's business"),
];

fn expected(path: &str) -> Option<&'static str> {
    EXPECTED
        .iter()
        .find(|(pattern, _)| {
            let mut names = path.split('.');
            pattern.split('.').all(|p| names.next().is_some_and(|n| p == "*" || p == n))
        })
        .map(|(_, why)| *why)
}

fn flatten(path: String, value: &Value, out: &mut BTreeMap<String, Value>) {
    let join = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (name, value) in map {
                flatten(join(name), value, out);
            }
        }
        Value::Array(list) if !list.is_empty() => {
            for (i, value) in list.iter().enumerate() {
                // Ports and records are known by their numbers and names, not by their places in the list.
                let name = match (value.get("port"), value.get("name"), value.get("instance")) {
                    (Some(Value::Number(port)), ..) => port.to_string(),
                    (_, Some(Value::String(name)), Some(instance)) => format!("{name}[{instance}]"),
                    _ => i.to_string(),
                };
                flatten(join(&name), value, out);
            }
        }
        leaf => {
            out.insert(path, leaf.clone());
        }
    }
}

/// Where two reports ([`super::GuestState`] as JSON) differ, in the order of the paths.
pub fn diff(left: &Value, right: &Value) -> Vec<Difference> {
    let (mut a, mut b) = (BTreeMap::new(), BTreeMap::new());
    flatten(String::new(), left, &mut a);
    flatten(String::new(), right, &mut b);
    let mut paths: Vec<_> = a.keys().chain(b.keys()).cloned().collect();
    paths.sort_unstable();
    paths.dedup();
    paths
        .into_iter()
        .filter(|p| a.get(p) != b.get(p))
        .map(|path| Difference {
            left: a.get(&path).cloned(),
            right: b.get(&path).cloned(),
            expected: expected(&path),
            path,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn differences_are_named_and_expected_ones_marked() {
        let a = json!({
            "domain": {"domid": 4, "cpu_time_ns": 1},
            "gt": {"ports": [{"port": 3, "kind": "ipi"}, {"port": 9, "kind": {"interdomain": {"remote": 0, "remote_port": 28}}}]},
            "hvm_records": [{"name": "CPU", "instance": 1, "fields": {"rip": "0x1"}}],
        });
        let mut b = a.clone();
        assert_eq!(diff(&a, &b), []);
        b["domain"]["cpu_time_ns"] = json!(2);
        b["hvm_records"][0]["fields"]["rip"] = json!("0x2");
        b["gt"]["ports"][1]["kind"] = json!({"unbound": {"remote": 0}});
        b["gt"]["ports"].as_array_mut().unwrap().remove(0);
        let d = diff(&a, &b);
        let unexpected: Vec<_> = d.iter().filter(|d| d.expected.is_none()).map(|d| d.path.as_str()).collect();
        assert_eq!(unexpected, ["gt.ports.3.kind", "gt.ports.3.port", "hvm_records.CPU[1].fields.rip"]);
        assert_eq!(d.len() - unexpected.len(), 4);
        let rip = d.iter().find(|d| d.path.ends_with("rip")).unwrap();
        assert_eq!(rip.to_string(), r#"hvm_records.CPU[1].fields.rip: "0x1" | "0x2""#);
    }
}
