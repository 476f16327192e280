//! The one request that is made of the kernel's rtnetlink: what `bridge fdb replace ADDRESS dev DEVICE master dynamic` asks for. Made without a
//! process, since it is made while a guest that shares the CPU starts.
//!
//! Source: linux/netlink.h, linux/rtnetlink.h, linux/neighbour.h; rtnetlink(7). Native byte order.

use std::io;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with, sockopt::Timeout,
    sockopt::set_socket_timeout,
};
use std::time::Duration;

const LENGTH: usize = 40;
/// The kernel answers such a request before sendto(2) returns.
const PATIENCE: Duration = Duration::from_secs(2);

/// `struct nlmsghdr`, `struct ndmsg`, and an attribute NDA_LLADDR.
fn replace_fdb(index: i32, address: [u8; 6]) -> [u8; LENGTH] {
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
    let mut out = [0; LENGTH];
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        out[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(&(LENGTH as u32).to_ne_bytes());
    put(&libc::RTM_NEWNEIGH.to_ne_bytes());
    put(&(flags as u16).to_ne_bytes());
    // Its number and the sender's port: there is one request on the socket.
    put(&[0; 8]);
    put(&[libc::AF_BRIDGE as u8, 0, 0, 0]);
    put(&index.to_ne_bytes());
    put(&libc::NUD_REACHABLE.to_ne_bytes());
    put(&[libc::NTF_MASTER, 0]);
    put(&10_u16.to_ne_bytes());
    put(&libc::NDA_LLADDR.to_ne_bytes());
    put(&address);
    out
}

/// The kernel's answer: `struct nlmsghdr` of type NLMSG_ERROR, and the error's number, negative, or 0.
fn outcome(answer: &[u8]) -> io::Result<()> {
    let field = |at: usize| answer.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    match (kind.map(i32::from), field(16)) {
        (Some(libc::NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(libc::NLMSG_ERROR), Some(error)) => Err(io::Error::from_raw_os_error(error.saturating_neg())),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is none")),
    }
}

/// Makes the bridge whose port the network device `index` is believe that the address is behind it.
pub fn teach_bridge(index: i32, address: [u8; 6]) -> io::Result<()> {
    // NETLINK_ROUTE is protocol 0, which rustix writes as none.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
    sendto(&socket, &replace_fdb(index, address), SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut answer = [0; 256];
    let (length, _) = recv(&socket, answer.as_mut_slice(), RecvFlags::empty())?;
    outcome(answer.get(..length).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand, from the headers' numbers.
    #[test]
    #[cfg(target_endian = "little")]
    fn the_request_is_as_the_headers_have_it() {
        let want = [
            40, 0, 0, 0, 28, 0, 5, 5, 0, 0, 0, 0, 0, 0, 0,
            0, // header: length, RTM_NEWNEIGH, REQUEST ACK CREATE REPLACE
            7, 0, 0, 0, 7, 0, 0, 0, 2, 0, 4, 0, // AF_BRIDGE, index, NUD_REACHABLE, NTF_MASTER
            10, 0, 2, 0, 0, 0x16, 0x3e, 0, 0, 1, 0, 0, // NDA_LLADDR
        ];
        assert_eq!(replace_fdb(7, [0, 0x16, 0x3e, 0, 0, 1]), want);
    }

    #[test]
    fn answers_are_told_apart() {
        let answer = |kind: u16, error: i32| {
            let mut bytes = vec![0; 20];
            bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
            bytes[16..20].copy_from_slice(&error.to_ne_bytes());
            bytes
        };
        assert!(outcome(&answer(2, 0)).is_ok());
        assert_eq!(outcome(&answer(2, -19)).unwrap_err().raw_os_error(), Some(libc::ENODEV));
        assert_eq!(outcome(&answer(2, i32::MIN)).unwrap_err().raw_os_error(), Some(i32::MAX));
        assert!(outcome(&answer(3, 0)).is_err());
        for length in 0..20 {
            assert!(outcome(&answer(2, 0)[..length]).is_err());
        }
    }

    #[test]
    fn the_kernel_answers() {
        // There is no such device, or it is not for us to ask.
        let error = teach_bridge(i32::MAX, [2; 6]).unwrap_err();
        assert!(matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EPERM)), "{error}");
    }
}
