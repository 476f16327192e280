//! A UDP datagram as one Ethernet frame, made by hand: the address that only receives answers no ARP, so the peer's own
//! stack could not send to it.

use std::net::Ipv4Addr;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, IpProtocol, Ipv4Packet, Ipv4Repr, UdpPacket,
    UdpRepr,
};

use crate::net::Mac;

/// One end of a datagram.
#[derive(Clone, Copy, Debug)]
pub(super) struct End {
    pub mac: Mac,
    pub addr: Ipv4Addr,
    pub port: u16,
}

/// The frame that carries `payload` (at most an MTU of it) from `from` to `to`.
pub(super) fn datagram(from: End, to: End, payload: &[u8]) -> Vec<u8> {
    let udp = UdpRepr { src_port: from.port, dst_port: to.port };
    let ip = Ipv4Repr {
        src_addr: from.addr,
        dst_addr: to.addr,
        next_header: IpProtocol::Udp,
        payload_len: udp.header_len() + payload.len(),
        hop_limit: 64,
    };
    let ethernet = EthernetRepr {
        src_addr: EthernetAddress(from.mac.0),
        dst_addr: EthernetAddress(to.mac.0),
        ethertype: EthernetProtocol::Ipv4,
    };
    let checksums = ChecksumCapabilities::default();
    let mut bytes = vec![0; ethernet.buffer_len() + ip.buffer_len() + ip.payload_len];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes);
    ethernet.emit(&mut frame);
    let mut packet = Ipv4Packet::new_unchecked(frame.payload_mut());
    ip.emit(&mut packet, &checksums);
    let mut segment = UdpPacket::new_unchecked(packet.payload_mut());
    udp.emit(
        &mut segment,
        &from.addr.into(),
        &to.addr.into(),
        payload.len(),
        |buffer| buffer.copy_from_slice(payload),
        &checksums,
    );
    bytes
}
