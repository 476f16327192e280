//! The agent that runs as the lab's dom0 init, and the protocol between it and `ferry-lab`.
//!
//! The two talk over one virtio-serial port (a byte stream that keeps order and loses nothing). [`frame`] cuts the
//! stream into frames, [`message`] says what the frames carry.

pub mod frame;
pub mod message;

/// Name of the virtio-serial port; the kernel shows it in `/sys/class/virtio-ports/*/name`.
pub const PORT_NAME: &str = "ferry.lab.agent";

/// Version of this protocol. The agent says it in its hello; a lab that expects another refuses the host.
pub const PROTOCOL_VERSION: u32 = 1;
