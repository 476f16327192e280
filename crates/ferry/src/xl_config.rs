//! A guest's configuration as libxl keeps it (`userdata-d.<domid>.<uuid>.libxl-json`), written as one that `xl create` reads:
//! for a guest that came in and is to be started anew. Stock `xl` can't read its own JSON there.

use serde_json::Value;
use std::fmt::Write as _;

/// Why there is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("libxl's record of it is not JSON: {0}")]
    Json(String),
    #[error("{0} is missing or of the wrong kind in libxl's record of it")]
    Field(String),
    #[error("{0} holds a character that xl's configuration can't have")]
    Character(String),
    #[error("a guest of type {0} can't be started anew from libxl's record of it, only PVH can")]
    Type(String),
}

/// A configuration for `xl create`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XlConfig {
    pub text: String,
    /// What libxl's record has and this has not, by name.
    pub left_out: Vec<String>,
}

/// Set by xl and libxl themselves for every guest, or by what is written below.
const DERIVED: &[&str] = &[
    "c_info.type",
    "c_info.name",
    "c_info.uuid",
    "c_info.domid",
    "c_info.run_hotplug_scripts",
    "c_info.hap",
    "c_info.passthrough",
    "b_info.max_vcpus",
    "b_info.avail_vcpus",
    "b_info.cpumap",
    "b_info.nodemap",
    "b_info.vcpu_hard_affinity",
    "b_info.vcpu_soft_affinity",
    "b_info.numa_placement",
    "b_info.tsc_mode",
    "b_info.max_memkb",
    "b_info.target_memkb",
    "b_info.video_memkb",
    "b_info.shadow_memkb",
    "b_info.iommu_memkb",
    "b_info.rtc_timeoffset",
    "b_info.localtime",
    "b_info.disable_migrate",
    "b_info.cpuid",
    "b_info.blkdev_start",
    "b_info.claim_mode",
    "b_info.sched_params",
    "b_info.event_channels",
    "b_info.kernel",
    "b_info.ramdisk",
    "b_info.cmdline",
    "b_info.max_grant_frames",
    "b_info.max_maptrack_frames",
    "b_info.max_grant_version",
    "b_info.device_model_version",
    "b_info.device_model_stubdomain",
    "b_info.nested_hvm",
    "b_info.apic",
    "b_info.acpi",
    "b_info.bootloader",
    "b_info.type.pvh",
    "b_info.arch_x86",
    "b_info.arch_arm",
    "b_info.altp2m",
    "b_info.dm_restrict",
    "b_info.tee",
    "b_info.vpmu",
    "b_info.trap_unmapped_accesses",
    "disks",
    "nics",
    "on_poweroff",
    "on_reboot",
    "on_crash",
    "on_watchdog",
    "on_soft_reset",
];
/// Of a disk, and of a network card.
const DISK: &[&str] = &[
    "backend_domid",
    "pdev_path",
    "vdev",
    "backend",
    "format",
    "readwrite",
    "removable",
    "discard_enable",
    "trusted",
    "is_cdrom",
    "direct_io_safe",
    "colo_enable",
    "colo_restore_enable",
];
const NIC: &[&str] = &["backend_domid", "devid", "mac", "bridge", "script", "nictype", "model", "trusted", "mtu"];

/// A text in double quotes as xl reads it.
fn quoted(what: &str, text: &str) -> Result<String, ConfigError> {
    if text.chars().any(char::is_control) {
        return Err(ConfigError::Character(what.to_owned()));
    }
    Ok(format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")))
}

/// A value within a comma-separated list.
fn item<'t>(what: &str, text: &'t str) -> Result<&'t str, ConfigError> {
    if text.contains(|c: char| c.is_control() || matches!(c, ',' | '=' | ' ')) {
        return Err(ConfigError::Character(what.to_owned()));
    }
    Ok(text)
}

fn text<'v>(value: &'v Value, what: &str) -> Result<&'v str, ConfigError> {
    value.as_str().ok_or_else(|| ConfigError::Field(what.to_owned()))
}

fn number(value: &Value, what: &str) -> Result<u64, ConfigError> {
    value.as_u64().ok_or_else(|| ConfigError::Field(what.to_owned()))
}

fn list<'v>(value: &'v Value, what: &str) -> Result<&'v [Value], ConfigError> {
    match value {
        Value::Null => Ok(&[]),
        Value::Array(items) => Ok(items),
        _ => Err(ConfigError::Field(what.to_owned())),
    }
}

/// Reads libxl's record.
pub fn parse(record: &[u8]) -> Result<Value, ConfigError> {
    // libxl ends it with a NUL.
    let end = record.iter().position(|b| *b == 0).unwrap_or(record.len());
    serde_json::from_slice(record.get(..end).unwrap_or(record)).map_err(|e| ConfigError::Json(e.to_string()))
}

/// Writes it for `xl create`. Without the UUID the new domain gets one of its own.
pub fn convert(config: &Value, with_uuid: bool) -> Result<XlConfig, ConfigError> {
    let (create, build) = (&config["c_info"], &config["b_info"]);
    let kind = text(&create["type"], "c_info.type")?;
    if kind != "pvh" {
        return Err(ConfigError::Type(kind.to_owned()));
    }
    let mut out = String::new();
    let mut line = |key: &str, value: String| {
        let _ = writeln!(out, "{key} = {value}");
    };
    line("name", quoted("its name", text(&create["name"], "c_info.name")?)?);
    line("type", "\"pvh\"".to_owned());
    if with_uuid {
        line("uuid", quoted("its UUID", text(&create["uuid"], "c_info.uuid")?)?);
    }
    for key in ["kernel", "ramdisk", "cmdline"] {
        let value = &build[key];
        if !value.is_null() {
            line(key, quoted(key, text(value, key)?)?);
        }
    }
    let most = number(&build["max_memkb"], "b_info.max_memkb")?;
    let memory =
        if build["target_memkb"].is_null() { most } else { number(&build["target_memkb"], "b_info.target_memkb")? };
    line("memory", (memory >> 10).to_string());
    line("maxmem", (most >> 10).to_string());
    let vcpus = number(&build["max_vcpus"], "b_info.max_vcpus")?;
    let online = list(&build["avail_vcpus"], "b_info.avail_vcpus")?.len() as u64;
    line("vcpus", if online == 0 { vcpus } else { online }.to_string());
    line("maxvcpus", vcpus.to_string());
    for key in ["max_grant_frames", "max_maptrack_frames", "event_channels"] {
        if let Some(value) = build[key].as_u64() {
            line(key, value.to_string());
        }
    }
    if let Some(cpuid) = cpuid(&build["cpuid"])? {
        line("cpuid", cpuid);
    }
    for key in ["on_poweroff", "on_reboot", "on_crash", "on_watchdog", "on_soft_reset"] {
        if let Some(action) = config[key].as_str() {
            // Their names have dashes in xl's configuration.
            line(key, quoted(key, &action.replace('_', "-"))?);
        }
    }
    let mut left_out = left_out(config);
    line("vif", devices(&config["nics"], "nics", NIC, &mut left_out, vif)?);
    line("disk", devices(&config["disks"], "disks", DISK, &mut left_out, disk)?);
    Ok(XlConfig { text: out, left_out })
}

fn devices(
    value: &Value,
    what: &str,
    known: &[&str],
    left_out: &mut Vec<String>,
    one: fn(&Value) -> Result<String, ConfigError>,
) -> Result<String, ConfigError> {
    let mut items = Vec::new();
    for device in list(value, what)? {
        items.push(quoted(what, &one(device)?)?);
        let keys = device.as_object().into_iter().flat_map(|map| map.iter());
        let others = keys.filter(|(key, value)| !known.contains(&key.as_str()) && !value.is_null());
        left_out.extend(others.map(|(key, _)| format!("{what}.{key}")));
    }
    Ok(format!("[ {} ]", items.join(", ")))
}

fn vif(nic: &Value) -> Result<String, ConfigError> {
    let mut words = vec![format!("mac={}", item("nics.mac", text(&nic["mac"], "nics.mac")?)?)];
    for key in ["bridge", "script"] {
        if let Some(value) = nic[key].as_str() {
            words.push(format!("{key}={}", item(key, value)?));
        }
    }
    Ok(words.join(","))
}

fn disk(disk: &Value) -> Result<String, ConfigError> {
    let (vdev, backend) = (text(&disk["vdev"], "disks.vdev")?, disk["backend"].as_str().unwrap_or("phy"));
    let (format, access) =
        (disk["format"].as_str().unwrap_or("raw"), if disk["readwrite"].as_u64() == Some(0) { "ro" } else { "rw" });
    let [format, vdev, backend] = [("disks.format", format), ("disks.vdev", vdev), ("disks.backend", backend)]
        .map(|(what, text)| item(what, text));
    // The target comes last, because all that follows belongs to it.
    let target = text(&disk["pdev_path"], "disks.pdev_path")?;
    Ok(format!("format={},vdev={},access={access},backendtype={},target={target}", format?, vdev?, backend?))
}

/// The policy in the form with a leaf and 32 characters for a register.
fn cpuid(value: &Value) -> Result<Option<String>, ConfigError> {
    let leaves = list(if value.is_object() { &value["cpuid"] } else { value }, "b_info.cpuid")?;
    let mut items = Vec::new();
    for leaf in leaves {
        let mut word = format!("{:#x}", number(&leaf["leaf"], "b_info.cpuid.leaf")?);
        if let Some(subleaf) = leaf["subleaf"].as_u64() {
            let _ = write!(word, ",{subleaf:#x}");
        }
        let mut registers = Vec::new();
        for register in ["eax", "ebx", "ecx", "edx"] {
            if let Some(bits) = leaf[register].as_str() {
                registers.push(format!("{register}={}", item("b_info.cpuid", bits)?));
            }
        }
        items.push(quoted("b_info.cpuid", &format!("{word}:{}", registers.join(",")))?);
    }
    Ok((!items.is_empty()).then(|| format!("[ {} ]", items.join(", "))))
}

fn left_out(config: &Value) -> Vec<String> {
    let mut names = Vec::new();
    for (key, value) in config.as_object().into_iter().flat_map(|map| map.iter()) {
        let inner: Vec<String> = match (key.as_str(), value) {
            ("c_info" | "b_info", Value::Object(map)) => map.keys().map(|inner| format!("{key}.{inner}")).collect(),
            (_, Value::Null) => continue,
            (_, Value::Array(items)) if items.is_empty() => continue,
            _ => vec![key.clone()],
        };
        names.extend(inner.into_iter().filter(|name| !DERIVED.contains(&name.as_str())));
    }
    if config["b_info"]["cpuid"]["msr"].as_array().is_some_and(|msr| !msr.is_empty()) {
        names.push("b_info.cpuid.msr".to_owned());
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn guest() -> Value {
        json!({
            "c_info": {"type": "pvh", "name": "g \"1\"", "uuid": "6a0f", "run_hotplug_scripts": "True"},
            "b_info": {
                "max_vcpus": 4, "avail_vcpus": [0, 1], "max_memkb": 524288, "target_memkb": 262144,
                "cpuid": {"cpuid": [{"leaf": 2147483649u32, "edx": "xxxx0xxxxxxxxxxxxxxxxxxxxxxxxxxx"},
                                    {"leaf": 7, "subleaf": 0, "ebx": "x1xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}], "msr": []},
                "kernel": "/boot/k", "cmdline": "console=hvc0 a=\\b", "sched_params": {}, "type.pvh": {"pvshim": "False"},
                "vnuma_nodes": [1]
            },
            "disks": [{"pdev_path": "/dev/a,b", "vdev": "xvda", "backend": "phy", "format": "raw", "readwrite": 1}],
            "nics": [{"devid": 0, "mac": "00:16:3e:00:00:01", "bridge": "xenbr0", "script": "vif-bridge", "nictype": "vif",
                      "rate_interval_usecs": 50000}],
            "on_poweroff": "destroy", "on_crash": "coredump_restart",
        })
    }

    #[test]
    fn a_pvh_guest_is_written_as_xl_reads_it() {
        let config = convert(&guest(), true).unwrap();
        for want in [
            "name = \"g \\\"1\\\"\"\n",
            "uuid = \"6a0f\"\n",
            "cmdline = \"console=hvc0 a=\\\\b\"\n",
            "memory = 256\nmaxmem = 512\nvcpus = 2\nmaxvcpus = 4\n",
            "cpuid = [ \"0x80000001:edx=xxxx0xxxxxxxxxxxxxxxxxxxxxxxxxxx\", \"0x7,0x0:ebx=x1xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\" ]\n",
            "on_crash = \"coredump-restart\"\n",
            "vif = [ \"mac=00:16:3e:00:00:01,bridge=xenbr0,script=vif-bridge\" ]\n",
            "disk = [ \"format=raw,vdev=xvda,access=rw,backendtype=phy,target=/dev/a,b\" ]\n",
        ] {
            assert!(config.text.contains(want), "{want} in\n{}", config.text);
        }
        assert_eq!(config.left_out, ["b_info.vnuma_nodes", "nics.rate_interval_usecs"]);
        assert!(!convert(&guest(), false).unwrap().text.contains("uuid"));
    }

    #[test]
    fn what_could_break_out_of_its_place_is_refused() {
        for (place, bad) in [
            ("/c_info/name", "g\"\non_crash = \"restart"),
            ("/nics/0/bridge", "xenbr0,script=/tmp/x"),
            ("/disks/0/vdev", "xvda,access=ro"),
            ("/b_info/cpuid/cpuid/0/edx", "1,eax=0"),
        ] {
            let mut config = guest();
            *config.pointer_mut(place).unwrap() = json!(bad);
            assert!(matches!(convert(&config, true), Err(ConfigError::Character(_))), "{place}");
        }
        let mut config = guest();
        config["c_info"]["type"] = json!("hvm");
        assert_eq!(convert(&config, true), Err(ConfigError::Type("hvm".to_owned())));
        config["c_info"]["type"] = json!("pvh");
        config["b_info"]["max_memkb"] = json!("much");
        assert_eq!(convert(&config, true), Err(ConfigError::Field("b_info.max_memkb".to_owned())));
    }

    #[test]
    fn libxls_record_ends_with_a_nul() {
        assert_eq!(parse(b"{\"a\":1}\0").unwrap(), json!({"a": 1}));
        assert!(parse(b"{").is_err());
    }
}
