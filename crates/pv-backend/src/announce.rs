//! Tells the network where a guest's MAC addresses are now, without the guest.
//!
//! A reverse-ARP broadcast from the guest's address makes every switch on the way learn the new port; nobody answers it.
//! Where the toolstack knows the vif's IPv4 addresses (its `ip` node), a gratuitous ARP for each goes out too. They leave
//! by the bridge, so that the host's own card carries them out.
//!
//! The bridge of this host must be told apart: it had learned that the guest is out behind the host's card, does not learn from what
//! it sends itself, and drops a frame that would go back to where it came from. A guest that only receives would stay cut off.

use std::net::Ipv4Addr;

use crate::device::{Class, Device};
use crate::error::{Error, Result, all};
use crate::machine::Machine;

/// A MAC address.
pub type Mac = [u8; 6];

const BROADCAST: Mac = [0xff; 6];
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
/// Shortest Ethernet frame, without its checksum.
const FRAME_MIN: usize = 60;

/// Reads "00:16:3e:00:00:01".
pub fn parse_mac(text: &str) -> Option<Mac> {
    let mut mac = [0; 6];
    let mut parts = text.trim().split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| (1..=2).contains(&part.len()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

/// RFC 903: "reverse request", who am I, from and about `mac`.
pub fn reverse_arp(mac: Mac) -> Vec<u8> {
    arp(ETHERTYPE_RARP, 3, mac, Ipv4Addr::UNSPECIFIED, mac, Ipv4Addr::UNSPECIFIED)
}

/// RFC 5227 section 3: an ARP announcement, a request whose sender and target are both `address`.
pub fn gratuitous_arp(mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    arp(ETHERTYPE_ARP, 1, mac, address, [0; 6], address)
}

fn arp(ethertype: u16, operation: u16, sender: Mac, sender_ip: Ipv4Addr, target: Mac, target_ip: Ipv4Addr) -> Vec<u8> {
    let mut frame = Vec::with_capacity(FRAME_MIN);
    frame.extend_from_slice(&BROADCAST);
    frame.extend_from_slice(&sender);
    frame.extend_from_slice(&ethertype.to_be_bytes());
    // Ethernet, IPv4, and the lengths of their addresses.
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4]);
    frame.extend_from_slice(&operation.to_be_bytes());
    frame.extend_from_slice(&sender);
    frame.extend_from_slice(&sender_ip.octets());
    frame.extend_from_slice(&target);
    frame.extend_from_slice(&target_ip.octets());
    frame.resize(FRAME_MIN, 0);
    frame
}

/// The frames for one vif, none for other devices and MACs that can't be read.
pub fn frames(device: &Device) -> Vec<Vec<u8>> {
    let Some(mac) = device.node("mac").and_then(parse_mac).filter(|_| device.class == Class::Vif) else {
        return Vec::new();
    };
    let addresses = device.node("ip").unwrap_or_default().split_whitespace();
    let addresses = addresses.filter_map(|ip| ip.split('/').next()?.parse().ok());
    std::iter::once(reverse_arp(mac)).chain(addresses.map(|address| gratuitous_arp(mac, address))).collect()
}

/// Announces every vif once. The first time right after the guest has been resumed; again some 100 ms later does no harm
/// and covers a lost frame.
pub fn announce(machine: &dyn Machine, devices: &[Device]) -> Result<()> {
    let mut errors = Vec::new();
    for device in devices {
        let frames = frames(device);
        let Some(bridge) = device.node("bridge").filter(|bridge| !bridge.is_empty() && !frames.is_empty()) else {
            continue;
        };
        if let Some(mac) = device.node("mac").and_then(parse_mac)
            && let Err(source) = machine.teach_bridge(&device.netdev(), mac)
        {
            errors.push(Error::Machine { what: format!("teach {bridge} where {} is", device.bus_id()), source });
        }
        if let Err(source) = machine.send_frames(bridge, &frames) {
            errors.push(Error::Machine { what: format!("announce {} on {bridge}", device.bus_id()), source });
        }
    }
    all(errors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_those_of_the_rfcs() {
        let mac = parse_mac("00:16:3e:0a:0b:0c").unwrap();
        let frame = reverse_arp(mac);
        assert_eq!(frame.len(), 60);
        assert_eq!(
            frame[..22],
            [255, 255, 255, 255, 255, 255, 0, 0x16, 0x3e, 10, 11, 12, 0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]
        );
        assert_eq!(frame[22..42], [0, 0x16, 0x3e, 10, 11, 12, 0, 0, 0, 0, 0, 0x16, 0x3e, 10, 11, 12, 0, 0, 0, 0]);
        let frame = gratuitous_arp(mac, Ipv4Addr::new(10, 9, 0, 2));
        assert_eq!(frame[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(frame[22..42], [0, 0x16, 0x3e, 10, 11, 12, 10, 9, 0, 2, 0, 0, 0, 0, 0, 0, 10, 9, 0, 2]);
    }

    #[test]
    fn macs_that_are_none_are_refused() {
        for text in
            ["", "00:16:3e:0a:0b", "00:16:3e:0a:0b:0c:0d", "00:16:3e:0a:0b:zz", "00:16:3e:0a:0b:", "001:6:3e:0a:0b:0c"]
        {
            assert_eq!(parse_mac(text), None, "{text}");
        }
    }
}
