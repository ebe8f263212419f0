//! Trees of files: measured, copied with everything that a filesystem keeps, compared completely,
//! and erased. What is copied where, and when, is the business of [`super::migration`].
//!
//! A tree is walked by descriptors: each directory is opened in its parent, never through a link and
//! never across a mount, so that nothing in a tree can lead a copy or a removal out of it. Memory is
//! bounded by the depth of the tree and the number of files with several links. Nobody else may
//! change the trees meanwhile; a change that is noticed is an error.
//!
//! Kept are: type, owner, mode, times of access and modification, extended attributes of all
//! namespaces (POSIX ACLs and capabilities among them), links among the files of the tree, holes,
//! targets of links, device numbers, and the attributes of chattr(1) in [`KEPT_FLAGS`]. Project ids
//! (quotas) are not: they mean nothing on another filesystem.

mod changed;
mod compare;
mod copy;
mod erase;
mod node;
mod progress;
#[cfg(test)]
mod tests;
mod walk;

use std::collections::HashSet;
use std::os::fd::{BorrowedFd, OwnedFd};

use anyhow::{Context as _, Result};
use rustix::fs::IFlags;
use serde::{Deserialize, Serialize};

pub use changed::{Time, changed_since, now};
pub use compare::{Alike, Difference, compare};
pub use copy::copy;
pub use erase::{erase, remove};
pub use progress::{Progress, human};

use walk::{Visit, Walk};

/// How the names of hostagent's own extended attributes begin, on the top of a tree: no part of it.
const OWN: &str = "trusted.hostagent.";

/// The attribute that a copy and its original have in common.
pub const MARK: &str = "trusted.hostagent.migration";

/// The attribute of an original that says when it was compared with its copy.
pub const COMPARED: &str = "trusted.hostagent.compared";

/// The attributes of chattr(1) that are kept: those that a user sets and every filesystem means alike.
pub const KEPT_FLAGS: IFlags = IFlags::IMMUTABLE
    .union(IFlags::APPEND)
    .union(IFlags::NODUMP)
    .union(IFlags::NOATIME)
    .union(IFlags::SYNC)
    .union(IFlags::DIRSYNC);

/// How much is read or written in one go.
const CHUNK: usize = 1 << 20;

/// After how many bytes of one file the kernel's memory for it is given back.
const FLUSH_EVERY: u64 = 64 << 20;

/// How much a tree takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Allocated bytes: holes not counted, a file with several links counted once.
    pub bytes: u64,
    /// Files, directories and all others, the top included.
    pub inodes: u64,
}

impl Usage {
    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            bytes: self.bytes.saturating_add(other.bytes),
            inodes: self.inodes.saturating_add(other.inodes),
        }
    }
}

/// Measures the tree under an opened directory.
pub fn measure(top: OwnedFd, progress: &Progress) -> Result<Usage> {
    let mut usage = Usage::default();
    let mut count = |stat: &rustix::fs::Stat| {
        usage.bytes += (node::wide(stat.st_blocks) * 512).next_multiple_of(4096);
        usage.inodes += 1;
    };
    count(&rustix::fs::fstat(&top).context("looking at the top of a tree")?);
    let mut seen = HashSet::new();
    let mut walk = Walk::new(top)?;
    while let Some(visit) = walk.next()? {
        let Visit::Entry(name, stat) = visit else { continue };
        progress.tick()?;
        let is_dir = node::kind(&stat) == rustix::fs::FileType::Directory;
        if is_dir || stat.st_nlink == 1 || seen.insert(stat.st_ino) {
            count(&stat);
        }
        if is_dir {
            walk.enter(&name, &stat)?;
        }
    }
    Ok(usage)
}

/// Opens a directory in an opened directory: not through a link, and not if something is mounted
/// on it.
pub fn open_dir(parent: BorrowedFd<'_>, name: &std::ffi::CStr) -> rustix::io::Result<OwnedFd> {
    node::open(parent, name, rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY)
}

/// Lets this process hold as many descriptors as the system allows: a walk holds two for each level
/// of a tree.
pub fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // A tree that is too deep for the limit is an error of its own.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}
