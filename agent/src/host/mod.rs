//! All I/O with the machine. Functions here say what is, or change one thing; what it means is
//! decided in the controls, and which change is made is decided in a plan.

pub mod ahead;
pub mod beneath;
pub mod block;
pub mod chain;
pub mod command;
pub mod command_line;
pub mod containers;
pub mod content;
pub mod device;
pub mod docker;
pub mod docker_config;
pub mod dockerd;
pub mod engine_api;
pub mod files;
pub mod format;
pub mod ground;
pub mod growth;
pub mod identity;
pub mod inner_links;
pub mod kernel;
pub mod link;
pub mod logs;
#[cfg(test)]
mod loops;
pub mod migration;
pub mod mounts;
pub mod processes;
pub mod settings;
pub mod signatures;
pub mod sockets;
pub mod sshd;
pub mod superblock;
pub mod swap;
pub mod systemd;
pub mod tree;
pub mod uevents;

use anyhow::{Context as _, Result};
use tokio::sync::OnceCell;

use systemd::Systemd;

/// Looks at something that may take long, in a thread of its own: whoever waits can give up.
pub async fn blocking<T: Send + 'static>(
    look: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(look).await.context("a look ended without a result")?
}

/// The machine that hostagent runs on. Holds what is expensive to open; everything else is read
/// afresh each time.
#[derive(Debug, Default)]
pub struct Host {
    systemd: OnceCell<Systemd>,
    /// Filesystems' images that have been begun.
    pub ahead: ahead::Ahead,
}

impl Host {
    /// The connection to PID 1, opened at the first use.
    pub async fn systemd(&self) -> Result<&Systemd> {
        self.systemd.get_or_try_init(Systemd::connect).await
    }
}
