//! The kernel's device events (netlink, `NETLINK_KOBJECT_UEVENT`), used as a wake-up only: what
//! changed is always looked up, never taken from the event.

use std::os::fd::{AsRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::unix::AsyncFd;

/// Group 1 is the kernel's own announcement, group 2 is udev's, after it has made its links.
const GROUPS: u32 = 0b11;

/// A subscription to device events.
#[derive(Debug)]
pub struct Uevents {
    socket: AsyncFd<OwnedFd>,
}

impl Uevents {
    /// Subscribes. Subscribe first and look second, so that nothing falls between the two.
    pub fn subscribe() -> Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkKObjectUEvent,
        )
        .context("opening the kernel's event socket")?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))
            .context("subscribing to the kernel's events")?;
        // Deprecated because a type may hand out another descriptor than it owns; OwnedFd does not.
        #[expect(deprecated, reason = "its replacement is unsafe to call, and this use is sound")]
        let socket = AsyncFd::new(socket).context("watching the kernel's event socket")?;
        Ok(Self { socket })
    }

    /// Waits for an event of a block device and takes all that have arrived.
    pub async fn block_event(&self) -> Result<()> {
        loop {
            let mut ready = self.socket.readable().await.context("waiting for kernel events")?;
            let mut block = false;
            let mut buffer = vec![0_u8; 16 * 1024];
            loop {
                match recv(self.socket.get_ref().as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                    Ok(length) => block |= concerns_block(&buffer[..length]),
                    Err(nix::errno::Errno::EAGAIN) => break,
                    // The queue overflowed: something was lost, so something happened.
                    Err(nix::errno::Errno::ENOBUFS) => block = true,
                    Err(nix::errno::Errno::EINTR) => {}
                    Err(e) => return Err(e).context("reading kernel events"),
                }
            }
            ready.clear_ready();
            if block {
                return Ok(());
            }
        }
    }
}

fn concerns_block(message: &[u8]) -> bool {
    message.windows(16).any(|window| window == b"SUBSYSTEM=block\0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_block_devices_wake() {
        assert!(concerns_block(b"add@/devices/x\0ACTION=add\0SUBSYSTEM=block\0SEQNUM=1\0"));
        assert!(!concerns_block(b"add@/devices/x\0ACTION=add\0SUBSYSTEM=net\0SEQNUM=1\0"));
    }
}
