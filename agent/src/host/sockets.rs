//! TCP sockets that listen, and which process holds them, from `/proc`.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context as _, Result};
use procfs::net::{TcpNetEntry, TcpState};

/// Whether the kernel has IPv6.
pub(super) fn has_ipv6() -> bool {
    Path::new("/proc/net/tcp6").exists()
}

/// All TCP sockets of this network namespace that listen.
pub(super) fn listening() -> Result<Vec<TcpNetEntry>> {
    let mut entries = procfs::net::tcp().context("reading /proc/net/tcp")?;
    // A kernel without IPv6 has no such file.
    if has_ipv6() {
        entries.extend(procfs::net::tcp6().context("reading /proc/net/tcp6")?);
    }
    entries.retain(|entry| entry.state == TcpState::Listen);
    Ok(entries)
}

/// The inodes of the sockets that a process holds open.
pub(super) fn held_by(pid: u32) -> Result<Vec<u64>> {
    let doing = || format!("listing the sockets of process {pid}");
    let mut inodes = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).with_context(doing)? {
        // A descriptor may be closed between the listing and the look.
        let Ok(target) = std::fs::read_link(entry.with_context(doing)?.path()) else { continue };
        let inode = target.to_str().and_then(|t| t.strip_prefix("socket:[")?.strip_suffix(']'));
        inodes.extend(inode.and_then(|text| text.parse::<u64>().ok()));
    }
    Ok(inodes)
}

/// Where a process listens.
pub fn of(pid: u32) -> Result<Vec<SocketAddr>> {
    let held = held_by(pid)?;
    let own = listening()?.into_iter().filter(|entry| held.contains(&entry.inode));
    let mut addresses: Vec<_> = own.map(|entry| entry.local_address).collect();
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_by_what_it_listens_on() {
        let listener = std::net::TcpListener::bind("127.0.0.8:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert!(of(std::process::id()).unwrap().contains(&address));
        assert!(!of(1).unwrap_or_default().contains(&address));
        assert!(of(u32::MAX).is_err(), "what cannot be looked at is not silent");
    }
}
