//! Which xenstore nodes may change without breaking promise T2.

/// Host-bound nodes of the guest's own area, relative to `/local/domain/<domid>/`: they name things of the host that the
/// guest runs on and that it has no use for. Everything under them counts too.
pub const HOST_BOUND: &[(&str, &str)] = &[
    ("console/tty", "the pseudo terminal in the host's dom0"),
    ("console/vnc-port", "the device model's VNC port on the host"),
    ("console/vnc-listen", "the device model's VNC address on the host"),
    ("serial/0/tty", "the pseudo terminal of the emulated serial port"),
    ("image/device-model-pid", "a process of the host"),
    ("image/device-model-domid", "where the device model runs"),
];

/// Where the witness writes itself, relative to `/local/domain/<domid>/`.
pub const OWN_AREA: &str = "data/witness";

/// Why a node may change, if it may.
pub fn may_change(path: &str) -> Option<&'static str> {
    // The own area is at "/local/domain/<domid>/…"; nothing outside it is host-bound.
    let rest = path.strip_prefix("/local/domain/")?;
    let (domid, node) = rest.split_once('/')?;
    if domid.parse::<u16>().is_err() || domid == "0" {
        return None;
    }
    let below = |root: &str| node == root || node.strip_prefix(root).is_some_and(|r| r.starts_with('/'));
    if below(OWN_AREA) {
        return Some("written by the witness itself");
    }
    HOST_BOUND.iter().find(|(root, _)| below(root)).map(|(_, why)| *why)
}

/// Text form of a node's value: printable ASCII as it is, a backslash as `\\`, anything else as `\xNN`; cut after 512
/// characters.
pub fn escape(value: &[u8]) -> String {
    let mut out = String::with_capacity(value.len());
    for b in value {
        if out.len() >= 512 {
            out.push_str("\\...");
            break;
        }
        match b {
            b'\\' => out.push_str("\\\\"),
            0x20..=0x7e => out.push(*b as char),
            _ => out.push_str(&format!("\\x{b:02x}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_listed_nodes_may_change() {
        assert!(may_change("/local/domain/5/console/tty").is_some());
        assert!(may_change("/local/domain/5/data/witness/watched").is_some());
        assert!(may_change("/local/domain/5/data/witness").is_some());
        for path in [
            "/local/domain/5/console/ring-ref",
            "/local/domain/5/console/ttyx",
            "/local/domain/0/console/tty",
            "/local/domain/0/backend/vif/5/0/state",
            "/local/domain/5/data/witness2",
            "/local/domain/5",
            "/vm/x/console/tty",
            "",
        ] {
            assert_eq!(may_change(path), None, "{path}");
        }
    }

    #[test]
    fn values_are_made_printable() {
        assert_eq!(escape(b"4"), "4");
        assert_eq!(escape(b"a\\\0\n"), "a\\\\\\x00\\x0a");
        assert!(escape(&[b'x'; 5000]).len() <= 516);
    }
}
